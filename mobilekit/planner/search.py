"""Finds the options that keep every limit at the least damage: a multiple choice under coupled prices.

Lagrangian relaxation gives the start (minimise damage plus a multiplier times the figures, place by place; bisect the
multiplier), a local search improves it (`local`), and the exact price judges what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mobilekit.errors import UnsupportedError
from mobilekit.planner.local import KICKS, LEAST_DAMAGE, improved
from mobilekit.planner.offers import Choice, Found, Offer, Start, predicted
from mobilekit.planner.surface import Changes
from mobilekit.planner.terrain import Limit, State, Terrain
from mobilekit.types import Network

SWEEPS = 12
"""Over all places for one multiplier; they settle after three or four."""
MULTIPLIERS = 14
THOROUGH = 2
"""Starts from which the search goes on with forced moves, which take most of its time: those that do best without."""
TIGHTENINGS = 8
"""How often limits are moved inwards because the exact price was above the tables'."""


class Search:
    """The best choice within limits; the first limit is the latency. Everything is deterministic.

    The damage of a combination is taken as the sum of its parts: it ranks combinations, and whoever asks measures
    those that come out. `starts` are assignments of precisions, the network as it is first. `like` is a search with
    the same figures: what it found out about layers is not asked again.
    """

    def __init__(
        self,
        starts: Sequence[Start],
        offers: Sequence[Offer],
        limits: Sequence[Limit],
        *,
        like: Search | None = None,
    ) -> None:
        self.starts, self.offers, self.limits = list(starts), list(offers), list(limits)
        self.network = self.starts[0].network
        self._known: dict[tuple[int, str], tuple[float, ...]] = {}
        self._terrains: dict[int, Terrain] = {}
        self._changes: list[Changes] = like._changes if like else [{} for _ in self.limits]
        self._reached: list[Found] | None = None

    # ------------------------------------------------------------ exact figures

    def latency_ms(self, start: Start, choice: Choice) -> float:
        """Predicted latency of a choice; infinite where its options do not go together."""
        return self._figures(start, choice)[0]

    def _figures(self, start: Start, choice: Choice) -> tuple[float, ...]:
        key = id(start), "".join(sorted(offer.key for offer in choice.values()))
        if key not in self._known:
            try:
                network = predicted(start, choice)
            except UnsupportedError:
                self._known[key] = (math.inf,) * len(self.limits)
            else:
                self._known[key] = tuple(limit.figure.of(network) for limit in self.limits)
        return self._known[key]

    def within(self, start: Start, choice: Choice, limits: Sequence[float] | None = None) -> bool:
        """Whether the exact figures keep all limits."""
        most = limits or [limit.most for limit in self.limits]
        return all(figure <= bound for figure, bound in zip(self._figures(start, choice), most, strict=True))

    def predict(self, found: Found) -> Network:
        """The network after a search."""
        return predicted(found.start, found.choice)

    # ------------------------------------------------------------ answers

    def run(self) -> Found:
        """The choice of least damage within the limits, or the fastest there is where none is within them.

        Precision alone is taken wherever it suffices: it needs no training and keeps the architecture.
        """
        alone = self.without_structure()
        if alone is not None:
            return alone
        reached = self.reached()
        if reached:
            return min(reached, key=lambda one: (one.damage, one.latency_ms))
        return self.fastest()

    def reached(self) -> list[Found]:
        """The best choice from every start that has one within the limits; moves are forced from the best starts."""
        if self._reached is None:
            rough = [one for start in self.starts if (one := self.best_of(start, kicks=0)) is not None]
            rough.sort(key=lambda one: (one.damage, one.latency_ms))
            thorough = [self.best_of(one.start) or one for one in rough[:THOROUGH]]
            self._reached = thorough + rough[THOROUGH:]
        return self._reached

    def without_structure(self) -> Found | None:
        """The network as it is, or precision alone, where that is within the limits."""
        within = [start for start in self.starts if self.within(start, {})]
        if not within:
            return None
        best = min(within, key=lambda start: (start is not self.starts[0], start.cost, self.latency_ms(start, {})))
        return Found(best, {}, self.latency_ms(best, {}), reachable=True)

    def again(self, found: Found) -> Found | None:
        """Another search's answer at the prices and damages of this one; None where it is not within the limits."""
        start = next((s for s in self.starts if s.network.precisions == found.start.network.precisions), found.start)
        offers = {offer.key: offer for offer in self.offers}
        choice = {place: offers[offer.key] for place, offer in found.choice.items() if offer.key in offers}
        if len(choice) < len(found.choice) or not self.within(start, choice):
            return None
        return Found(start, choice, self.latency_ms(start, choice), reachable=True)

    def best_of(self, start: Start, kicks: int = KICKS) -> Found | None:
        """The choice of least damage within the limits from one start, after so many forced moves; None where there is
        none."""
        terrain = self._terrain(start)
        bound = np.ones(len(self.limits))
        best: Choice | None = None
        for _ in range(TIGHTENINGS):
            state = _lowest(terrain, bound)
            if state is None:
                break
            choice = terrain.choice(improved(terrain, state, bound, kicks))
            if self.within(start, choice):
                best = choice
                break
            figures = np.array(self._figures(start, choice)) * terrain.scales
            if not np.isfinite(figures).all():
                return self._greedy(start)
            estimated = terrain.figures(terrain.state(choice))
            bound = bound * np.minimum(1.0, 0.999 * estimated / np.maximum(figures, estimated)) * 0.998
        if best is None:
            return self._greedy(start)
        return Found(start, best, self.latency_ms(start, best), reachable=True)

    def _greedy(self, start: Start) -> Found | None:
        """By exact figures alone: from the fastest choice, give back whatever can be given back."""
        choice = dict(self._fastest_of(start))
        if not self.within(start, choice):
            return None
        for place in sorted(choice, key=lambda p: -choice[p].cost):
            options = [o for o in self.offers if o.place == place and o.cost < choice[place].cost]
            rest = {p: o for p, o in choice.items() if p != place}
            for milder in [rest, *({**rest, place: o} for o in sorted(options, key=lambda o: o.cost))]:
                if self.within(start, milder):
                    choice = milder
                    break
        return Found(start, choice, self.latency_ms(start, choice), reachable=True)

    def fastest(self) -> Found:
        """The choice with the least predicted latency: what the limit is judged against before any training."""
        return min(self.extremes(), key=lambda found: found.latency_ms)

    def extremes(self) -> list[Found]:
        """The fastest choice of each start: prices of precisions are off by different factors."""
        found = []
        for start in self.starts:
            choice = self._fastest_of(start)
            found.append(Found(start, choice, self.latency_ms(start, choice), reachable=False))
        return found

    def _fastest_of(self, start: Start) -> Choice:
        terrain = self._terrain(start)
        narrowest = {place: len(options) for place, options in terrain.options.items()}
        ends = [terrain.none()]
        for begun in (terrain.none(), narrowest):
            ends.append(_descended(terrain, begun, np.eye(len(self.limits))[0] / LEAST_DAMAGE))
        return min((terrain.choice(end) for end in ends), key=lambda choice: self.latency_ms(start, choice))

    def _terrain(self, start: Start) -> Terrain:
        if id(start) not in self._terrains:
            self._terrains[id(start)] = Terrain(start, self.offers, self.limits, self._changes)
        return self._terrains[id(start)]


# ---------------------------------------------------------------- the relaxed problem


def _descended(terrain: Terrain, state: State, weights: np.ndarray) -> State:
    """Least damage plus weighted figures, place by place until nothing changes."""
    state = dict(state)
    for _ in range(SWEEPS):
        changed = False
        for place in terrain.places:
            total = terrain.damages[place] + weights @ terrain.at(place, state)
            taken = int(np.argmin(np.where(np.isnan(total), np.inf, total)))
            if total[taken] < total[state[place]] - 1e-15:
                state[place], changed = taken, True
        if not changed:
            return state
    return state


def _lowest(terrain: Terrain, bound: np.ndarray) -> State | None:
    """The least damage among the relaxed problem's solutions that keep the bounds; None where none does."""
    best: State | None = None
    active = np.zeros(len(bound))
    active[0] = 1.0
    for _ in range(len(bound)):
        found, violated = _bisected(terrain, bound, active)
        if found is not None and (best is None or terrain.damage(found) < terrain.damage(best)):
            best = found
        if best is not None or violated is None or active[violated]:
            return best
        active[violated] = 1.0
    return best


def _bisected(terrain: Terrain, bound: np.ndarray, active: np.ndarray) -> tuple[State | None, int | None]:
    """Search for the least multiplier of the active figures; also the limit that stays violated at the greatest."""
    low, high = 1e-6, 1e9
    best: State | None = None
    state = terrain.none()
    for _ in range(MULTIPLIERS):
        middle = math.sqrt(low * high)
        # from both sides: the descent ends in the local optimum that is nearest
        ends = [_descended(terrain, begun, middle * active) for begun in (terrain.none(), state)]
        state = min(ends, key=lambda s: terrain.damage(s) + middle * float(active @ terrain.figures(s)))
        if (terrain.figures(state) <= bound).all():
            high = middle
            if best is None or terrain.damage(state) < terrain.damage(best):
                best = dict(state)
        else:
            low = middle
    if best is not None:
        return best, None
    state = _descended(terrain, state, active / LEAST_DAMAGE)
    over = terrain.figures(state) / bound
    if (over <= 1).all():
        return state, None
    return None, int(np.argmax(np.where(active > 0, 0, over))) if (over[active == 0] > 1).any() else None
