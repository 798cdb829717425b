"""A figure of the network, such as its latency, over all choices at once: a sum of small tables.

An operator's price hangs on the widths of the channel groups that it touches, two as a rule. A sum over single groups
and over pairs that meet in an operator is therefore exact for most networks, and is filled by one vectorised call (an
anchored decomposition of second order: Rabitz, Alis 1999, doi:10.1023/A:1019188517934). What a lever at a layer or a
block changes hangs on the widths there alone, and is looked up when it is asked for. What is left out (weights that no
longer fit a cache, borders of precisions inside replaced layers) is small: whoever relies on a figure asks for the
exact one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mobilekit.errors import UnsupportedError
from mobilekit.planner.offers import Offer, Place
from mobilekit.types import INPUT_GROUP, Network, Operator, Precision, within

Widths = tuple[int, ...]
Changes = dict[tuple[str, tuple[Precision, ...], Widths], float]
"""What a lever does to a figure, by the option, the precisions of the operators there and the widths around them."""


class Figure(Protocol):
    """Something of a network that is to be small: milliseconds, bytes."""

    def of(self, network: Network) -> float:
        """The figure of one network."""
        ...

    def of_widths(self, network: Network, widths: Mapping[str, np.ndarray]) -> np.ndarray:
        """The figure at many width assignments, shape (assignments,)."""
        ...


@dataclass(frozen=True)
class OneByOne:
    """A figure that is computed for one network at a time."""

    figure: Callable[[Network], float]

    def of(self, network: Network) -> float:
        """The figure of one network."""
        return self.figure(network)

    def of_widths(self, network: Network, widths: Mapping[str, np.ndarray]) -> np.ndarray:
        """The figure at many width assignments, shape (assignments,)."""
        rows = zip(*(values.tolist() for values in widths.values()), strict=True)
        given = ({name: int(w) for name, w in zip(widths, row, strict=True)} for row in rows)
        return np.array([self.figure(network.with_widths(each)) for each in given])


class Surface:
    """One figure over the widths of the groups in `offered`, and over what levers do to layers and blocks.

    `offered` gives each group's widths, the present one first. `changes` is what surfaces of the same figure have
    found out about layers and blocks, whose prices hang on nothing else of the network.
    """

    def __init__(
        self, network: Network, offered: Mapping[str, Sequence[int]], figure: Figure, changes: Changes
    ) -> None:
        self.network, self.figure = network, figure
        self._changes = changes
        self.offered = {group: tuple(widths) for group, widths in offered.items()}
        self.neighbours: dict[str, list[str]] = {group: [] for group in self.offered}
        for one, other in self._pairs():
            self.neighbours[one].append(other)
            self.neighbours[other].append(one)
        self._fill()
        self._alone: dict[tuple[Place, Widths], tuple[Network, float]] = {}
        self._inside: dict[Place, tuple[Operator, ...]] = {}
        self._around: dict[Place, tuple[str, ...]] = {}

    def _pairs(self) -> list[tuple[str, str]]:
        """Groups that meet in an operator."""
        found: dict[tuple[str, str], None] = {}
        for operator in self.network.operators:
            touched = [group for group in self.touched(operator) if group in self.offered]
            found.update({(a, b): None for i, a in enumerate(touched) for b in touched[i + 1 :]})
        return list(found)

    @staticmethod
    def touched(operator: Operator) -> tuple[str, ...]:
        """The channel groups that an operator reads or writes, sorted."""
        return tuple(sorted({*operator.in_groups, *operator.out_groups}))

    def _fill(self) -> None:
        """Every width alone and every pair of widths, in one call."""
        assignments: list[dict[str, int]] = [{}]
        assignments += [{g: w} for g, widths in self.offered.items() for w in widths[1:]]
        pairs = self._pairs()
        for a, b in pairs:
            assignments += [{a: v, b: w} for v in self.offered[a][1:] for w in self.offered[b][1:]]
        values = iter(self._evaluated(assignments).tolist())
        self.base: float = next(values)
        self.single = {
            g: np.array([0.0, *(next(values) - self.base for _ in widths[1:])]) for g, widths in self.offered.items()
        }
        self.pair: dict[tuple[str, str], np.ndarray] = {}
        for a, b in pairs:
            table = np.zeros((len(self.offered[a]), len(self.offered[b])))
            for i in range(1, table.shape[0]):
                for j in range(1, table.shape[1]):
                    table[i, j] = next(values) - self.base - self.single[a][i] - self.single[b][j]
            self.pair[a, b] = table
            self.pair[b, a] = table.T

    def _evaluated(self, assignments: Sequence[Mapping[str, int]]) -> np.ndarray:
        if not self.offered:
            return np.array([self.figure.of(self.network)])
        widths = {
            group: np.array([given.get(group, self.offered[group][0]) for given in assignments], dtype=np.float64)
            for group in self.offered
        }
        return self.figure.of_widths(self.network, widths)

    # ------------------------------------------------------------ layers and blocks

    def change(self, offer: Offer, widths: Mapping[str, int]) -> float:
        """What the lever at a layer or a block adds to the figure (negative: saves) at these widths; infinite where it
        does not fit them."""
        place = offer.place
        at = self.widths_at(place, widths)
        key = offer.key, tuple(self.network.precision(operator) for operator in self.inside(place)), at
        if key not in self._changes:
            before, figure = self._before(place, at)
            try:
                self._changes[key] = self.figure.of(offer.transform.predict(before, offer.option)) - figure
            except UnsupportedError:
                self._changes[key] = math.inf
        return self._changes[key]

    def inside(self, place: Place) -> tuple[Operator, ...]:
        """The operator of a layer, all operators of a block."""
        if place not in self._inside:
            at, where = place
            block = at == "block"
            found = [o for o in self.network.operators if (within(o.module, where) if block else o.module == where)]
            self._inside[place] = tuple(found if block else found[-1:])
        return self._inside[place]

    def around(self, place: Place) -> tuple[str, ...]:
        """The channel groups that a layer or a block reads or writes, sorted."""
        if place not in self._around:
            self._around[place] = tuple(sorted({g for operator in self.inside(place) for g in self.touched(operator)}))
        return self._around[place]

    def widths_at(self, place: Place, widths: Mapping[str, int]) -> Widths:
        """The widths of those groups."""
        return tuple(widths.get(g, self.network.groups[g].width) for g in self.around(place))

    def _before(self, place: Place, at: Widths) -> tuple[Network, float]:
        """What a lever is priced on, the layer alone or all of the network at these widths, and the figure of it."""
        if (place, at) not in self._alone:
            widths = dict(zip(self.around(place), at, strict=True))
            if place[0] == "block":
                before = self.network.with_widths(widths)
            else:
                before = alone(self.network, self.inside(place)[0], widths)
            self._alone[place, at] = before, self.figure.of(before)
        return self._alone[place, at]


def alone(network: Network, operator: Operator, widths: Mapping[str, int]) -> Network:
    """A network of this operator only, at these widths of its groups: what a lever at the layer is priced on."""
    own = {*operator.in_groups, *operator.out_groups, INPUT_GROUP}
    groups = {
        name: group.model_copy(update={"width": widths.get(name, group.width)})
        for name, group in network.groups.items()
        if name in own
    }
    inside = f"{operator.module}."
    return network.model_copy(
        update={
            "input_shape": (1, sum(groups[g].width for g in operator.in_groups), *operator.in_size),
            "operators": (operator.model_copy(update={"inputs": ("input",)}),),
            "groups": groups,
            "axes": {name: axes for name, axes in network.axes.items() if name.startswith(inside)},
            "precisions": {n: p for n, p in network.precisions.items() if n == operator.name},
        }
    )
