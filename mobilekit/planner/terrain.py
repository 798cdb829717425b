"""All choices of one start as arrays: the options at every place, their damage, and the figures they change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mobilekit.planner.offers import Choice, Offer, Place, Start
from mobilekit.planner.surface import Changes, Figure, Surface
from mobilekit.types import within

State = dict[Place, int]
"""Option taken at each place; 0: none."""


@dataclass(frozen=True)
class Limit:
    """A figure that has to stay within `most`."""

    name: str
    figure: Figure
    most: float


class Terrain:
    """Places, options and their tables, so that moving at a place costs a look into a few arrays.

    Figures are in units of their limits: within the limits is at most 1.
    """

    def __init__(
        self, start: Start, offers: Sequence[Offer], limits: Sequence[Limit], changes: Sequence[Changes] | None = None
    ) -> None:
        self.start, self.limits = start, list(limits)
        self.options: dict[Place, list[Offer]] = {}
        for offer in sorted(offers, key=lambda o: (o.place, o.cost, o.key)):
            self.options.setdefault(offer.place, []).append(offer)
        self.damages = {p: np.array([0.0, *(o.cost for o in found)]) for p, found in self.options.items()}
        groups = start.network.groups
        offered = {
            where: [groups[where].width, *(_width(o) for o in found)]
            for (at, where), found in self.options.items()
            if at == "channels"
        }
        known = changes or [{} for _ in self.limits]
        self.surfaces = [
            Surface(start.network, offered, limit.figure, each) for limit, each in zip(self.limits, known, strict=True)
        ]
        self.holders = {
            place: [other for other in self.options if other[0] == "block" and within(place[1], other[1])]
            for place in self.options
            if place[0] == "layer"
        }
        self.scales = np.array([_scale(s.base, limit.most) for s, limit in zip(self.surfaces, limits, strict=True)])
        self.beside = self._beside()
        self._at_places: dict[tuple[Place, tuple[int, ...]], np.ndarray] = {}

    def _beside(self) -> dict[Place, list[Place]]:
        """Places whose figures hang on each other."""
        found: dict[Place, set[Place]] = {place: set() for place in self.options}
        first = self.surfaces[0]
        for place in self.options:
            at, where = place
            if at == "channels":
                found[place] |= {("channels", other) for other in first.neighbours[where]}
                continue
            for group in first.around(place):
                if ("channels", group) in found:
                    found[place].add(("channels", group))
                    found["channels", group].add(place)
        return {place: sorted(others) for place, others in found.items()}

    @property
    def places(self) -> list[Place]:
        """All places, in their order."""
        return list(self.options)

    def none(self) -> State:
        """Nothing taken anywhere."""
        return dict.fromkeys(self.options, 0)

    def choice(self, state: State) -> Choice:
        """The offers of a state; those at layers of blocks that go are of no use."""
        return {
            place: self.options[place][taken - 1]
            for place, taken in state.items()
            if taken and not self._gone(place, state)
        }

    def _gone(self, place: Place, state: State) -> bool:
        """Whether a layer lies in a block that the state takes away."""
        return any(state[block] for block in self.holders.get(place, ()))

    def state(self, choice: Choice) -> State:
        """The state of a choice among these offers; what is not offered here is left out."""
        found = self.none()
        for place, offer in choice.items():
            known = [o.option for o in self.options.get(place, [])]
            if offer.option in known:
                found[place] = known.index(offer.option) + 1
        return found

    def damage(self, state: State) -> float:
        """Summed damage of the structure."""
        return float(sum(self.damages[place][taken] for place, taken in state.items()))

    def figures(self, state: State) -> np.ndarray:
        """Every figure of a state, shape (limits,), in units of its limit."""
        widths = self._widths(state)
        found = np.array([surface.base for surface in self.surfaces])
        for place, taken in state.items():
            if not taken or self._gone(place, state):
                continue
            at, where = place
            for index, surface in enumerate(self.surfaces):
                if at != "channels":
                    found[index] += surface.change(self.options[place][taken - 1], widths)
                    continue
                found[index] += surface.single[where][taken]
                found[index] += sum(
                    surface.pair[where, other][taken, state["channels", other]]
                    for other in surface.neighbours[where]
                    if where < other
                )
        return np.asarray(found * self.scales)

    def at(self, place: Place, state: State) -> np.ndarray:
        """Every figure for every option at a place, the rest of the state as it is; relative to taking none there.

        Shape (limits, options).
        """
        name, where = place
        if name == "block":
            return self._at_block(place, state)
        if name == "layer":
            own = self._at_place(place, self._widths(state))
            return np.zeros_like(own) if self._gone(place, state) else own
        found = np.stack([self._of_channels(surface, where, state) for surface in self.surfaces])
        with np.errstate(invalid="ignore"):  # what cannot be is infinite, and less itself it is no number
            return np.asarray((found - found[:, :1]) * self.scales[:, None])

    def _at_place(self, place: Place, widths: dict[str, int]) -> np.ndarray:
        key = place, self.surfaces[0].widths_at(place, widths)
        if key not in self._at_places:
            rows = [[0.0, *(s.change(o, widths) for o in self.options[place])] for s in self.surfaces]
            self._at_places[key] = np.asarray(np.array(rows) * self.scales[:, None])
        return self._at_places[key]

    def _at_block(self, place: Place, state: State) -> np.ndarray:
        """With the block, what levers did to its layers goes too."""
        widths = self._widths(state)
        found = self._at_place(place, widths).copy()
        rest = {**state, place: 0}
        for layer, blocks in self.holders.items():
            if state[layer] and place in blocks and not self._gone(layer, rest):
                found[:, 1:] -= self._at_place(layer, widths)[:, [state[layer]]]
        return found

    def _of_channels(self, surface: Surface, where: str, state: State) -> np.ndarray:
        total = surface.single[where].copy()
        for other in surface.neighbours[where]:
            total += surface.pair[where, other][:, state["channels", other]]
        beside = self.beside["channels", where]
        taken = [p for p in beside if p[0] != "channels" and state[p] and not self._gone(p, state)]
        if not taken:
            return total
        widths, offered = self._widths(state), surface.offered[where]
        for place in taken:
            offer = self.options[place][state[place] - 1]
            total += np.array([surface.change(offer, {**widths, where: width}) for width in offered])
        return total

    def _widths(self, state: State) -> dict[str, int]:
        offered = self.surfaces[0].offered
        return {where: offered[where][taken] for (at, where), taken in state.items() if at == "channels"}


def _scale(present: float, most: float) -> float:
    """What turns a figure into shares of its limit; a limit that is none is far away, one of zero out of reach."""
    return 1 / min(max(most, 1e-9 * present), 1e3 * present)


def _width(offer: Offer) -> int:
    return int(str(offer.option.settings["width"]))
