"""What a shape leaves for the builders of single operators to work out."""

from __future__ import annotations

from mobilekit.types import OperatorShape


def plain(activation: str | None) -> str | None:
    """An activation's name without underscores, as the tables here spell it."""
    return activation.replace("_", "").lower() if activation else None


def padding(shape: OperatorShape) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows (before, after) and columns (before, after) of padding that lead from in_size to out_size."""
    (top, bottom), (left, right) = (
        _pad_axis(*axis, shape.ceil)
        for axis in zip(shape.in_size, shape.out_size, shape.kernel, shape.stride, strict=True)
    )
    return (top, bottom), (left, right)


def _pad_axis(size: int, out: int, kernel: int, stride: int, ceil: bool) -> tuple[int, int]:
    total = max((out - 1) * stride + kernel - size, 0)
    if ceil:
        return 0, total
    # PyTorch pads both sides alike; where the last row is never read, the missing one is at the end.
    return (total + 1) // 2, total // 2
