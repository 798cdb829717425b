"""What a window of a sketch slides over: padding as litert-torch writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mobilekit.errors import UnsupportedError
from mobilekit.runtimes._shape import padding
from mobilekit.runtimes._tflite_writer import LOWEST, Activation, Writer
from mobilekit.types import OperatorShape

Pads = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """One operator of the network, and what its neighbours make of it."""

    name: str
    shape: OperatorShape
    inputs: tuple[Activation, ...]
    feeds_linear: bool = False
    """Nobody but linear layers reads it: the exporter flattens it as it is made."""
    feeds_weights: bool = False
    """The one operator that reads it has weights: a factor is folded into them."""
    first_channel: int = 0
    """Where a slice begins."""
    writes_output: bool = False
    """Nobody reads it: it is an output of the network."""

    @property
    def source(self) -> Activation:
        """The first input."""
        return self.inputs[0]


def refusal(step: Step, why: str) -> UnsupportedError:
    """The error for an operator whose numbers cannot be built."""
    return UnsupportedError(f"{step.name} ({step.shape.kind}) cannot be built for TFLite: {why}")


def window(writer: Writer, step: Step, code: str) -> tuple[Activation, dict[str, Any]]:
    """What the window slides over, and its stride and padding.

    PyTorch pads both ends alike. Where that is not TFLite's SAME, and in front of every padded average, a pad
    operator stands before a VALID window. Zeros that a module pads a convolution with show as an `in_size` larger
    than what it reads.
    """
    shape, source = step.shape, as_map(writer, step.source)
    sizes = source.dims[1:3]
    pads = [_pads(step, axis, sizes[axis]) for axis in (0, 1)]
    options = {"strideH": shape.stride[0], "strideW": shape.stride[1], "padding": writer.tables.fb.Padding.VALID}
    if not any(sum(pad) for pad in pads):
        return source, options
    same = all(pads[axis] == _same_pads(shape, axis, sizes[axis]) for axis in (0, 1))
    if same and code != "AVERAGE_POOL_2D":
        return source, {**options, "padding": writer.tables.fb.Padding.SAME}
    lowest = code == "MAX_POOL_2D" and not writer.clamps(source)
    return padded(writer, source, pads[0], pads[1], lowest), options


def _pads(step: Step, axis: int, size: int) -> Pads:
    """Zeros before and after one axis."""
    shape = step.shape
    before, after = padding(shape)[axis]
    if shape.ceil:
        return before, after
    low, high = min(before, after), max(before, after)
    room = shape.in_size[axis] - shape.kernel[axis]
    stride, out = shape.stride[axis], shape.out_size[axis]
    if (room + 2 * high) // stride + 1 == out:
        low = high
    extra = shape.in_size[axis] - size
    if extra < 0 or (room + low + high) // stride + 1 != out:
        raise refusal(step, f"no padding leads from {shape.in_size} to {shape.out_size}")
    return low + extra // 2, high + extra - extra // 2


def _same_pads(shape: OperatorShape, axis: int, size: int) -> Pads | None:
    """What TFLite's SAME would pad; None where it gives another size."""
    stride, out = shape.stride[axis], shape.out_size[axis]
    total = max((out - 1) * stride + shape.kernel[axis] - size, 0)
    return (total // 2, total - total // 2) if out == -(-size // stride) else None


def padded(writer: Writer, source: Activation, rows: Pads, columns: Pads, lowest: bool = False) -> Activation:
    """Zeros around a map; `lowest`: something that no maximum takes."""
    _, height, width, channels = source.dims
    dims = (1, height + sum(rows), width + sum(columns), channels)
    amounts = writer.integers("pads", [[0, 0], list(rows), list(columns), [0, 0]])
    if not lowest:
        return writer.apply("PAD", [source, amounts], dims)
    if not writer.int8:
        value = writer.tables.tensor("lowest", (), "FLOAT32", data=np.array(-np.inf, np.float32))
    else:
        scale, zero = writer.tables.quantisation(source.index)
        facts = (np.array([scale]), np.array([zero]), 0)
        value = writer.tables.tensor("lowest", (), "INT8", facts, np.array(LOWEST, np.int8))
    return writer.apply("PADV2", [source, amounts, value], dims)


def as_map(writer: Writer, source: Activation) -> Activation:
    """A vector as a map of one pixel."""
    if len(source.dims) == 4:
        return source
    return writer.reshaped(source, (1, 1, 1, source.dims[1]))
