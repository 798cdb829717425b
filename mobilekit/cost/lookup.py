"""Which row of a cost table prices a part of an operator, and at how much."""

from __future__ import annotations

from mobilekit.cost.features import features
from mobilekit.cost.work import FRESH, Amount, Part
from mobilekit.types import CostTable, KindModel, Precision

STAND_INS = {
    "grouped": ("dense", "pointwise"),
    "depthwise": ("depthwise.3", "depthwise.5", "depthwise.7", "grouped", "dense", "pointwise"),
    "pointwise": ("dense", "linear"),
    "dense": ("pointwise", "linear"),
    "linear": ("pointwise", "dense"),
    "conv_transpose": ("dense", "pointwise"),
}
"""Rows that price a kind that computes and has no row of its own."""
MOVERS = ("add", "mul", "concat", "max_pool", "activation.relu")
"""Rows that price a kind that moves data and has no row of its own: the time of passing its bytes once."""
CLAMPS = ("relu", "relu6")


def row_of(part: Part, table: CostTable) -> tuple[KindModel | None, bool]:
    """The row that prices the part, and whether it was sampled for this kind; no row where it is free."""
    if part.row in table.kinds:
        return table.kinds[part.row], True
    if part.row == "cold" or part.row.endswith(f".{FRESH}"):
        return None, True  # Whole networks were timed: it is in the other prices.
    if "+" in part.row:
        return _activation_row(part, table)
    family = part.row.partition(".")[0]
    if family in table.kinds:
        return table.kinds[family], True
    for name in STAND_INS.get(family, MOVERS):
        if name in table.kinds:
            return table.kinds[name], False
    return table.kinds[min(table.kinds)], False


def _activation_row(part: Part, table: CostTable) -> tuple[KindModel | None, bool]:
    """A fused activation without a row of its own: free for clamps, which kernels that compute hold, and where the
    runtime was seen to fuse it; else the price of the function alone."""
    function = part.row.partition("+")[2]
    if part.row in table.fusions or function in CLAMPS:
        return None, True
    alone = Part(f"activation.{function}", part.shape, part.channels)
    return row_of(alone, table)


def part_us(model: KindModel | None, correction: float, part: Part, precision: Precision) -> Amount:
    """Microseconds of a part; an array where its channels are arrays."""
    if model is None:
        return 0.0
    found = features(part.shape, precision, part.channels)
    return correction * sum([c * found[name] for name, c in model.coefficients.items() if name in found])


def reaches_beyond(model: KindModel, part: Part, precision: Precision) -> bool:
    """Whether the part does more or less, or moves more or less, than anything that the row was fitted to."""
    found = features(part.shape, precision, part.channels)
    macs, moved = found.get("macs", 0.0), found["in_bytes"] + found["out_bytes"]
    return not (model.min_macs <= macs <= model.max_macs and model.min_bytes <= moved <= model.max_bytes)
