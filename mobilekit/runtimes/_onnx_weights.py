"""ONNX files with int8 weights, a scale per output channel, and no calibration: dynamic int8, and weights alone.

onnxruntime's `quantize_dynamic` gives the weights of a convolution one scale for all channels, and knows no weights
behind dequantise nodes alone; so both are written here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mobilekit.runtimes._onnx_facts import WEIGHTED


class Weight(NamedTuple):
    """A weight in int8: values = quantised * scales along the axis of the output channels."""

    quantised: np.ndarray
    scales: np.ndarray
    axis: int


def weight_only(model: Any, left: set[str]) -> Any:
    """The model with int8 weights behind dequantise nodes; nodes `left` keep theirs. Arithmetic is in float."""
    from onnx import helper

    graph, arrays = model.graph, _constants(model.graph)
    nodes, written = [], set()
    for node in graph.node:
        if node.op_type in WEIGHTED and node.name not in left and node.input[1] in arrays:
            name = node.input[1]
            if name not in written:
                made = _rounded(arrays[name], _output_axis(node))
                parts = [
                    _store(graph, f"{name}_quantized", made.quantised),
                    _store(graph, f"{name}_scale", made.scales),
                    _store(graph, f"{name}_zero_point", np.zeros(len(made.scales), np.int8)),
                ]
                result = [f"{name}_dequantized"]
                nodes.append(
                    helper.make_node("DequantizeLinear", parts, result, name=f"{name}_dequantize", axis=made.axis)
                )
                written.add(name)
            node.input[1] = f"{name}_dequantized"
        nodes.append(node)
    return _finished(model, nodes)


def dynamic(model: Any, left: set[str]) -> Any:
    """The model with int8 convolutions and linear layers whose inputs are quantised at every inference.

    A tensor is quantised once for all that read it: uint8, its own minimum and maximum. Nodes `left` stay in float, as
    does what is no convolution and no linear layer.
    """
    from onnx import helper

    graph, arrays = model.graph, _constants(model.graph)
    nodes: list[Any] = []
    quantised: set[str] = set()
    for node in graph.node:
        if not _has_integer_form(node, arrays) or node.name in left:
            nodes.append(node)
            continue
        source = node.input[0]
        low, scale, zero = (f"{source}_{part}" for part in ("quantized", "scale", "zero_point"))
        if source not in quantised:
            nodes.append(
                helper.make_node("DynamicQuantizeLinear", [source], [low, scale, zero], name=f"{source}_quantize")
            )
            quantised.add(source)
        nodes += _integer(graph, node, arrays, (low, scale, zero))
    return _finished(model, nodes)


def _integer(graph: Any, node: Any, arrays: dict[str, np.ndarray], source: tuple[str, str, str]) -> list[Any]:
    """A convolution or linear layer as an integer one: int32 sums times both scales, and the bias in float."""
    from onnx import helper

    low, scale, zero = source
    convolves = node.op_type == "Conv"
    weight, axis = arrays[node.input[1]], _output_axis(node)
    if not convolves and axis == 0:
        weight = weight.T  # MatMulInteger takes (inputs, outputs)
    made = _rounded(weight, 0 if convolves else 1)
    shape = (1, -1, *[1] * (weight.ndim - 2)) if convolves else (-1,)
    name = node.name
    kept = _store(graph, f"{name}_weight_quantized", made.quantised)
    scales = _store(graph, f"{name}_weight_scale", made.scales.reshape(shape))
    has_bias = len(node.input) > 2 and bool(node.input[2])
    scaled = f"{name}_scaled" if has_bias else node.output[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute} if convolves else {}
    kind = "ConvInteger" if convolves else "MatMulInteger"
    nodes = [
        helper.make_node(kind, [low, kept, zero], [f"{name}_sums"], name=f"{name}_integer", **attributes),
        helper.make_node("Cast", [f"{name}_sums"], [f"{name}_float"], name=f"{name}_cast", to=1),
        helper.make_node("Mul", [scale, scales], [f"{name}_scales"], name=f"{name}_scale"),
        helper.make_node("Mul", [f"{name}_float", f"{name}_scales"], [scaled], name=f"{name}_rescale"),
    ]
    if has_bias:
        bias = _store(graph, f"{name}_bias", arrays[node.input[2]].reshape(shape))
        nodes.append(helper.make_node("Add", [scaled, bias], list(node.output), name=f"{name}_add_bias"))
    return nodes


def _has_integer_form(node: Any, arrays: dict[str, np.ndarray]) -> bool:
    """Convolutions and linear layers with constant weights; a Gemm only without factors of its own."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in arrays:
        return False
    if any(name and name not in arrays for name in node.input[2:]):
        return False
    settings = {a.name: a for a in node.attribute}
    if node.op_type == "MatMul":
        return arrays[node.input[1]].ndim == 2
    if node.op_type == "Gemm":
        factors = [settings[name].f for name in ("alpha", "beta") if name in settings]
        return all(f == 1 for f in factors) and not ("transA" in settings and settings["transA"].i)
    return True


def _output_axis(node: Any) -> int:
    """Axis of a weight that its output channels run along."""
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}[node.op_type]


def _rounded(weight: np.ndarray, axis: int) -> Weight:
    """Symmetric int8, -127 to 127, one scale a channel."""
    axis %= weight.ndim
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others).astype(np.float32)
    scales = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    along = scales.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    return Weight(np.clip(np.rint(weight / along), -127, 127).astype(np.int8), scales, axis)


def _constants(graph: Any) -> dict[str, np.ndarray]:
    from onnx import TensorProto, numpy_helper

    return {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == TensorProto.FLOAT}


def _store(graph: Any, name: str, array: np.ndarray) -> str:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    return name


def _finished(model: Any, nodes: list[Any]) -> Any:
    """Set the nodes, and drop the constants that nobody reads any more."""
    graph = model.graph
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]
    return model
