"""Kinds of operators, and the rows of a cost table that price an operator and its fused activation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from mobilekit.types import Network, OperatorShape, Precision

BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}
"""Bytes of one activation or weight."""
FREE = frozenset({"reshape", "flatten", "dropout", "identity"})
"""Kinds that leave no kernel behind in an exported file."""
VECTOR = 16
"""Channels of the widest blocks in use: 16 float32 of AVX-512, 16 bytes of NEON and SSE."""
BORDERS = frozenset({"quantize", "dequantize"})
POOLS = frozenset({"max_pool", "avg_pool"})
MOVES = frozenset({"shuffle", "transpose"})
"""Kinds that a runtime whose kernels keep channels in a layout of their own leaves that layout for."""
PASSES = frozenset({"concat", "slice"})
"""Kinds that work in the layout that they find."""
FUSED, FRESH = "fused", "fresh"
"""Places of an operator: inside the one that it reads; a shuffle of what was computed and not moved before."""
WEIGHTED = frozenset({"conv", "conv_transpose", "linear", "matmul"})
QUANTISED = frozenset(
    {
        "conv", "conv_transpose", "linear", "add", "mul", "concat", "max_pool", "avg_pool", "global_pool", "pad",
        "resize", "shuffle", "slice", "transpose",
    }
)  # fmt: skip
"""Operator kinds that run in int8; batch norms and activations that fuse with nothing stay in fp32."""


def quantised(network: Network) -> dict[str, Precision]:
    """The operators of the network that have an int8 form, each in int8."""
    return {operator.name: "int8" for operator in network.operators if operator.kind in QUANTISED}


Amount = Any
"""A float, or an array of floats with one entry for each assignment of channel counts."""


class Channels(NamedTuple):
    """Input and output channels of an operator: two numbers, or two arrays of the same shape."""

    inputs: Amount
    outputs: Amount


def row_name(shape: OperatorShape, fused: bool = False) -> str:
    """The row of a cost table that prices the operator without its fused activation.

    Activations differ by function, convolutions with few kernels of their own (depthwise) by kernel size. `fused`: the
    operator runs inside the one that it reads.

    >>> row_name(OperatorShape(kind="activation", in_channels=8, out_channels=8, activation="relu"))
    'activation.relu'
    """
    kind = shape.cost_kind
    if kind == "activation":
        return f"activation.{shape.activation or 'constant'}"
    if kind == "depthwise":
        return f"depthwise.{max(shape.kernel)}"
    if kind == "softmax" and shape.out_size != (1, 1):
        return "softmax.map"  # along an axis that is not the last one in memory
    return f"{kind}.fused" if fused else kind


def fused_row_name(shape: OperatorShape) -> str | None:
    """The row of what the operator's fused activation adds to it, "conv+hardswish"; None where it has none."""
    if shape.activation is None or shape.kind == "activation":
        return None
    family = "conv" if shape.kind in WEIGHTED else shape.kind
    return f"{family}+{shape.activation}"


def activation_alone(shape: OperatorShape) -> OperatorShape:
    """The operator's fused activation as an operator of its own."""
    return OperatorShape(
        kind="activation",
        in_channels=shape.out_channels,
        out_channels=shape.out_channels,
        in_size=shape.out_size,
        out_size=shape.out_size,
        activation=shape.activation,
    )


class Part(NamedTuple):
    """What one row of a cost table prices of an operator."""

    row: str
    shape: OperatorShape
    channels: Channels


def parts(shape: OperatorShape, channels: Channels | None = None, place: str = "") -> Iterator[Part]:
    """The operator itself, what its place adds, and its fused activation as a function of its output.

    Nothing for kinds that are free. A shuffle of a tensor that kernels computed is two parts: some runtimes have to
    bring it into another layout first, and leave it there for the next one.
    """
    if shape.kind in FREE:
        return
    given = channels or Channels(float(shape.in_channels), float(shape.out_channels))
    yield Part(row_name(shape, place == FUSED), shape, given)
    if place == FRESH:
        yield Part(f"{shape.kind}.{FRESH}", shape, given)
    name = fused_row_name(shape)
    if name is not None:
        yield Part(name, activation_alone(shape), Channels(given.outputs, given.outputs))
