"""Prices a network on a device: the sum of its operators' fitted prices, with an interval and a memory figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np

from mobilekit.cost.lines import Line, from_memory, lines
from mobilekit.cost.lookup import part_us, reaches_beyond, row_of
from mobilekit.cost.memory import peak_memory_bytes, size_bytes
from mobilekit.cost.work import FREE, Amount, Part, parts
from mobilekit.errors import BadInputError
from mobilekit.types import (
    CostTable,
    DeviceProfile,
    Estimate,
    Network,
    Operator,
    OperatorPrice,
    OperatorShape,
    Precision,
)

SHARED = 0.5
"""Share of the operators' error variance that all of them have in common."""
UNKNOWN = 2.0
"""Factor either way around the price of an operator that no measurement of its kind or size supports."""
INSIDE = ", inside"
ANCHORED = 0.5
"""Share of the network interval, in logarithms, that is left once a related network was measured: what the table gets
wrong for that family is then known, what it gets wrong for widths is not."""


class PricedLine(NamedTuple):
    """A priced part of a network: the row of the table of a precision that prices it ("": it is free), microseconds.

    What runs inside an operator, its activation above all, is of kind "inside" and named after it with INSIDE.
    """

    name: str
    kind: str
    precision: Precision
    row: str
    us: float


class Cost(NamedTuple):
    """Microseconds of one operator with its 80 % interval."""

    us: float
    low: float
    high: float
    extrapolated: bool


def latency_ms(network: Network, profile: DeviceProfile, runtime: str) -> float:
    """Predicted latency in milliseconds: the same figure as `price(...).latency_ms`, sooner.

    Raises BadInputError where the profile has no table for the runtime and a precision the network uses.
    """
    prices = _prices(_Same(profile), runtime)
    total = _overhead(prices.tables(network)) + sum([prices.cost(line).us for line in prices.lines(network)])
    return total / 1000


def latencies_ms(
    network: Network, profile: DeviceProfile, runtime: str, widths: Mapping[str, Sequence[int] | np.ndarray]
) -> np.ndarray:
    """Predicted latency in milliseconds of many width assignments at once, shape (assignments,).

    `widths` gives the channels of some channel groups, each an array of shape (assignments,); the other groups keep
    theirs. Raises BadInputError for arrays of unlike length, unknown groups, and as `latency_ms` does.
    """
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in widths.items()}
    unknown = sorted(set(arrays) - set(network.groups))
    if unknown:
        raise BadInputError(f"the network has no channel group '{unknown[0]}'")
    if len({array.shape for array in arrays.values()}) != 1 or next(iter(arrays.values())).ndim != 1:
        raise BadInputError("widths have to be arrays of one length, one figure for each assignment")
    prices = _prices(_Same(profile), runtime)
    total = np.full(next(iter(arrays.values())).shape, _overhead(prices.tables(network)))
    for line in prices.lines(network, arrays):
        total += line_us(line, prices.table(line.precision))
    return np.asarray(total / 1000)


def price(network: Network, profile: DeviceProfile, runtime: str) -> Estimate:
    """Predicted latency, file size and peak activation memory of the network; needs no torch.

    The interval is that of the table's left-out networks, wider for operators that are extrapolated and narrower once
    the profile was corrected by a measured network (see `lines` for the conversions between precisions).
    Raises BadInputError where the profile has no table for the runtime and a precision the network uses.
    """
    prices = _prices(_Same(profile), runtime)
    found = _estimate(prices, prices.tables(network), prices.lines(network))
    return found.model_copy(update={"size_bytes": size_bytes(network), "peak_memory_bytes": peak_memory_bytes(network)})


def priced_lines(network: Network, profile: DeviceProfile, runtime: str) -> tuple[PricedLine, ...]:
    """What the network is priced by, in order: operators and conversions, and behind an operator what is inside of it.

    Raises BadInputError as `latency_ms` does.
    """
    prices = _prices(_Same(profile), runtime)
    found = []
    for line in prices.lines(network):
        table = prices.table(line.precision)
        for number, part in enumerate(line.parts):
            model, _ = row_of(part, table)
            names = (part.row, part.row.partition(".")[0], *table.kinds)
            row = next((name for name in names if model is not None and table.kinds.get(name) is model), "")
            us = float(part_us(model, table.correction, part, line.precision))
            name, kind = (f"{line.name}{INSIDE}", "inside") if number else (line.name, line.kind)
            found.append(PricedLine(name, kind, table.precision, row, us))
    return tuple(found)


def price_shapes(
    shapes: Mapping[str, OperatorShape], precision: Precision, profile: DeviceProfile, runtime: str
) -> Estimate:
    """Predicted latency of operators of which only the shapes are known, by name; what fuses is not known then.

    Raises BadInputError where the profile has no table for the runtime and precision.
    """
    prices = _prices(_Same(profile), runtime)
    found = [Line(name, shape.kind, "", precision, tuple(parts(shape))) for name, shape in shapes.items()]
    return _estimate(prices, [prices.table(precision)], found + from_memory(found))


def _estimate(prices: _Prices, used: Sequence[CostTable], found: Sequence[Line]) -> Estimate:
    costs = [(line, prices.cost(line)) for line in found]
    # Tables from whole networks hold their weights' way from memory in the other prices.
    costs = [(line, cost) for line, cost in costs if line.kind != "cold" or cost.us]
    overhead = _overhead(used)
    total = overhead + sum(cost.us for _, cost in costs)
    down, up = _reach(used, overhead, [cost for _, cost in costs])
    return Estimate(
        latency_ms=total / 1000,
        low_ms=max(total - down, 0.0) / 1000,
        high_ms=(total + up) / 1000,
        runtime=prices.runtime,
        basis=_basis(used),
        operators=tuple(_row(line, cost) for line, cost in costs),
        extrapolated=tuple(line.name for line, cost in costs if cost.extrapolated),
    )


def corrected(profile: DeviceProfile, runtime: str, precision: Precision, factor: float) -> DeviceProfile:
    """The profile with every price of this runtime and precision multiplied by `factor` (measured over predicted).

    The factor joins those of earlier calls. Raises BadInputError for a factor that is not positive and finite and
    for a table that is not there.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise BadInputError(f"a correction factor has to be positive and finite, not {factor}")
    table = _table(profile, runtime, precision)
    better = table.model_copy(update={"correction": table.correction * factor})
    tables = tuple(better if t is table else t for t in profile.tables)
    return profile.model_copy(update={"tables": tables})


def line_us(line: Line, table: CostTable) -> Amount:
    """Price of a line in one table, microseconds; an array where its channels are arrays, 0 where it is free."""
    return sum([part_us(row_of(part, table)[0], table.correction, part, line.precision) for part in line.parts], 0.0)


# ---------------------------------------------------------------- operators


@dataclass(eq=False)
class _Prices:
    """Operator prices of one profile in one runtime; each shape is priced once."""

    profile: DeviceProfile
    runtime: str
    _known: dict[tuple[object, ...], tuple[Cost, tuple[Part, ...]]] = field(default_factory=dict)
    _tables: dict[Precision, CostTable] = field(default_factory=dict)

    def table(self, precision: Precision) -> CostTable:
        """The table for operators of this precision; a float network runs in fp16 where that is the only one."""
        if precision not in self._tables:
            halved = precision == "fp32" and self._only_half
            self._tables[precision] = _table(self.profile, self.runtime, "fp16" if halved else precision)
        return self._tables[precision]

    @cached_property
    def _only_half(self) -> bool:
        has = {table.precision for table in self.profile.tables if table.runtime == self.runtime and table.kinds}
        return "fp16" in has and "fp32" not in has

    def tables(self, network: Network) -> list[CostTable]:
        return [self.table(precision) for precision in sorted(_precisions(network))]

    def fusions(self, network: Network) -> frozenset[str]:
        """What runs inside another operator in all precisions that the network uses."""
        return frozenset.intersection(*(frozenset(table.fusions) for table in self.tables(network)))

    def lines(self, network: Network, widths: Mapping[str, Amount] | None = None) -> tuple[Line, ...]:
        """What the network is priced by, at its own widths or at arrays of them, in the precision that it runs in."""
        found = lines(self._as_run(network), self.fusions(network), widths)
        if not self._only_half:
            return found
        return tuple(line._replace(precision="fp16") if line.precision == "fp32" else line for line in found)

    def _as_run(self, network: Network) -> Network:
        """The network with those int8 operators in float that the runtime was seen to run in float only."""
        if "int8" not in network.precisions.values() or self.profile.table(self.runtime, "fp32") is None:
            return network
        int8, floats = self.table("int8").kinds, self.table("fp32").kinds
        families = {row.partition(".")[0] for row in floats} - {row.partition(".")[0] for row in int8}
        stay = {o.name for o in network.operators if _cost_kind(o) in families}
        if not stay:
            return network
        return network.with_precisions({name: p for name, p in network.precisions.items() if name not in stay})

    def cost(self, line: Line) -> Cost:
        """Price of an operator together with the activation fused into it.

        A search prices networks that share their shapes: each is priced once.
        """
        # By identity, which is quicker than comparing shapes; the parts are kept, so that it stays theirs.
        key = (line.precision, id(line.parts))
        known = self._known.get(key)
        if known is None:
            known = self._price(line), line.parts
            if len(self._known) > 200_000:  # a long search must not grow without bound
                self._known.clear()
            self._known[key] = known
        return known[0]

    def _price(self, line: Line) -> Cost:
        us = low = high = 0.0
        extrapolated = False
        for part in line.parts:
            table = self.table(line.precision)
            model, exact = row_of(part, table)
            if model is None:
                continue
            own = float(part_us(model, table.correction, part, line.precision))
            beyond = not exact or reaches_beyond(model, part, line.precision)
            us, extrapolated = us + own, extrapolated or beyond
            low += own * (min(model.low, 1 / UNKNOWN) if beyond else model.low)
            high += own * (max(model.high, UNKNOWN) if beyond else model.high)
        return Cost(us, low, high, extrapolated)


def _overhead(used: Sequence[CostTable]) -> float:
    """Microseconds of a run beside its operators: the dearest of the precisions in use."""
    return max(table.overhead_us * table.correction for table in used)


def _basis(used: Sequence[CostTable]) -> Literal["fitted", "kernel table", "anchored"]:
    if any(table.correction != 1.0 for table in used):
        return "anchored"
    return "fitted" if any(table.basis == "fitted" for table in used) else "kernel table"


def _reach(used: Sequence[CostTable], overhead: float, costs: Sequence[Cost]) -> tuple[float, float]:
    """How far below and above the price the interval reaches, microseconds."""
    if all(table.low == table.high == 1.0 for table in used):
        return _spread([c.us - c.low for c in costs]), _spread([c.high - c.us for c in costs])
    share = ANCHORED if _basis(used) == "anchored" else 1.0
    low = min(table.low for table in used) ** share
    high = max(table.high for table in used) ** share
    inside = overhead + sum(cost.us for cost in costs if not cost.extrapolated)
    beyond = [cost for cost in costs if cost.extrapolated]
    down = (1 - low) * inside + sum(cost.us - cost.low for cost in beyond)
    return down, (high - 1) * inside + sum(cost.high - cost.us for cost in beyond)


class _Same:
    """Makes a profile, which holds dicts and has no hash, a cache key: the same object, not an equal one."""

    def __init__(self, profile: DeviceProfile) -> None:
        self.profile = profile

    def __hash__(self) -> int:
        return id(self.profile)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.profile is self.profile


@lru_cache(maxsize=16)
def _prices(profile: _Same, runtime: str) -> _Prices:
    return _Prices(profile.profile, runtime)


def _cost_kind(operator: Operator) -> str:
    return operator.shape(2 * operator.groups, 2 * operator.groups).cost_kind  # widths do not matter to it


def _table(profile: DeviceProfile, runtime: str, precision: Precision) -> CostTable:
    table = profile.table(runtime, precision)
    if table is not None and table.kinds:
        return table
    missing = f"the profile '{profile.name}' has no measured operator times for runtime {runtime}"
    if any(t.runtime == runtime and t.kinds for t in profile.tables):
        missing += f" in {precision}"
    raise BadInputError(f"{missing}: build a profile on the device, or choose another runtime or precision")


def _precisions(network: Network) -> set[Precision]:
    """Of the operators that cost something; a network of none is priced as float."""
    if not network.precisions:
        return {"fp32"}
    used = {network.precision(o) for o in network.operators if o.kind not in FREE}
    return used or {"fp32"}


# ---------------------------------------------------------------- networks


def _spread(deviations: list[float]) -> float:
    """Deviation of a sum from the deviations of its terms.

    Errors of single prices have a part in common (the clock of that day, a kernel that the model misjudges
    everywhere) and a part of their own. The common part adds up, the others' squares do; nothing measured says how
    large each is, so that half the variance is given to either.
    """
    together = sum(deviations) ** 2
    apart = sum(d * d for d in deviations)
    return math.sqrt(SHARED * together + (1 - SHARED) * apart)


def _row(line: Line, cost: Cost) -> OperatorPrice:
    return OperatorPrice(
        name=line.name,
        kind=line.kind,
        module=line.module,
        precision=line.precision,
        latency_ms=cost.us / 1000,
        low_ms=cost.low / 1000,
        high_ms=cost.high / 1000,
        extrapolated=cost.extrapolated,
    )
