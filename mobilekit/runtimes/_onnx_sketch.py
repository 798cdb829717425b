"""Builds an ONNX model of a network's structure with random weights, for timing it without the network's weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from mobilekit.errors import UnsupportedError
from mobilekit.runtimes._onnx_graph import INPUT, Graph, Place
from mobilekit.runtimes._onnx_layers import write
from mobilekit.runtimes._onnx_qdq import quantise
from mobilekit.runtimes._shape import plain
from mobilekit.types import Network, Operator, OperatorShape

INT8_ACTIVATIONS = ("relu", "relu6", "sigmoid", "silu", "leakyrelu")
BORDERS = {"quantize": "QuantizeLinear", "dequantize": "DequantizeLinear"}


def int8_refusal(shape: OperatorShape) -> str | None:
    """Why ONNX Runtime has no int8 kernel for the operator; None: it has one.

    Found by optimising one operator of each kind. A float-only activation behind an int8 convolution is no refusal:
    the convolution runs in int8, and its activation's way through float32 is part of it.
    """
    if shape.kind in ("pad", "batch_norm", "conv_transpose", "other"):
        return f"ONNX Runtime has no int8 kernel for {shape.kind}: it would convert to float32 and back"
    if shape.kind == "activation" and plain(shape.activation) not in (None, *INT8_ACTIVATIONS):
        return f"ONNX Runtime has no int8 kernel for {shape.activation}: it would convert to float32 and back"
    return None


def build(network: Network, *, signed: bool = False) -> Any:
    """The network as an onnx.ModelProto, batch 1, with unsigned or signed int8 activations.

    Raises UnsupportedError for an operator that cannot be written.
    """
    if not network.operators:
        raise UnsupportedError(f"the network {network.name} has no operators: there is nothing to write")
    graph = Graph((1, *network.input_shape[1:]))
    lone = network.operators[0].kind if len(network.operators) == 1 else ""
    if lone in BORDERS:
        return _border(graph, network, signed=signed)
    tensors = {INPUT: INPUT}
    for operator in network.operators:
        missing = [name for name in operator.inputs if name not in tensors]
        if missing or not operator.inputs:
            raise UnsupportedError(
                f"operator {operator.name} reads {missing or 'nothing'}: no earlier operator's output"
            )
        sources = tuple(tensors[name] for name in operator.inputs)
        if operator.kind == "slice":
            _slice(graph, network, operator, tensors)
            continue
        shape, int8 = network.shape(operator), network.precision(operator) == "int8"
        tensors[operator.name] = write(Place(graph, operator.name, shape, sources, int8))
    read = {name for operator in network.operators for name in operator.inputs}
    outputs = [tensors[operator.name] for operator in network.operators if operator.name not in read]
    int8_operators = {o.name for o in network.operators if network.precision(o) == "int8"}
    if int8_operators:
        quantise(graph, int8_operators, outputs)
    if signed:
        graph.sign()
    return graph.model(outputs)


def _border(graph: Graph, network: Network, *, signed: bool) -> Any:
    """A quantise or dequantise node alone: float32 on one side, an 8-bit type on the other."""
    operator = network.operators[0]
    down, kind = operator.kind == "quantize", np.int8 if signed else np.uint8
    numbers = [graph.constant("scale", 0.05), graph.constant("zero", 0 if signed else 128, kind)]
    outputs = graph.add(operator.name, BORDERS[operator.kind], [INPUT, *numbers], [graph.input_shape])
    graph.input_type = np.float32 if down else kind
    return graph.model(list(outputs), kind if down else np.float32)


def _slice(graph: Graph, network: Network, operator: Operator, tensors: dict[str, str]) -> None:
    """Channels of a tensor. Slices that together make up their source are the outputs of one Split, as of a chunk.

    Others are taken from the start, the second one of a source from the end.
    """
    if operator.name in tensors:
        return
    source = tensors[operator.inputs[0]]
    found = graph.shapes[source]
    pieces = [o for o in network.operators if o.kind == "slice" and o.inputs == operator.inputs]
    widths = [network.shape(piece).out_channels for piece in pieces]
    if sum(widths) == found[1] and len({network.precision(piece) for piece in pieces}) == 1:
        shapes = [(1, width, *found[2:]) for width in widths]
        if len(set(widths)) == 1:
            results = graph.add(operator.name, "Split", [source], shapes, axis=1, num_outputs=len(widths))
        else:
            sizes = graph.constant(f"{operator.name}/sizes", widths, np.int64)
            results = graph.add(operator.name, "Split", [source, sizes], shapes, axis=1)
        tensors.update(zip((piece.name for piece in pieces), results, strict=True))
        return
    width = network.shape(operator).out_channels
    if width > found[1]:
        raise UnsupportedError(f"operator {operator.name} takes {width} channels of {found[1]}")
    start = found[1] - width if [piece.name for piece in pieces].index(operator.name) == 1 else 0
    numbers = [
        graph.constant(f"{operator.name}/{part}", [value], np.int64)
        for part, value in (("start", start), ("end", start + width), ("axis", 1), ("step", 1))
    ]
    tensors[operator.name] = graph.add(operator.name, "Slice", [source, *numbers], [(1, width, *found[2:])])[0]
