"""Writes an ONNX model of opset 18 with the operators of opset 17.

PyTorch's exporter goes down to 18, and onnx's own converter does not know all operators on this step.
"""

from __future__ import annotations

from typing import Any

from mobilekit.errors import UnsupportedError

OLDEST_EXPORTED = 18
"""The oldest opset that PyTorch's exporter writes."""


def to_opset_17(model: Any) -> None:
    """Change a model of opset 18 in place.

    Raises UnsupportedError, with its name, for an operator that opset 17 does not have in this form.
    """
    import onnx
    from onnx import numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    shapes = _shapes(onnx.shape_inference.infer_shapes(model).graph)
    nodes: list[Any] = []
    for node in model.graph.node:
        if node.op_type.startswith("Reduce"):
            _axes_as_attribute(node, constants)
        elif node.op_type == "Split":
            _equal_parts(node, shapes)
        elif node.op_type == "Resize":
            _drop_defaults(node)
        nodes.extend(_mish(node) if node.op_type == "Mish" else [node])
    for node in nodes:
        _refuse_newer(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.opset_import[0].version = 17


def _shapes(graph: Any) -> dict[str, list[int]]:
    values = (*graph.value_info, *graph.input, *graph.output)
    return {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}


def _axes_as_attribute(node: Any, constants: dict[str, Any]) -> None:
    """ReduceMean and its like read their axes from an input since 18 (ReduceSum since 13, which stays as it is)."""
    from onnx import helper

    if node.op_type == "ReduceSum":
        return
    axes = constants.get(node.input[1]) if len(node.input) > 1 else None
    kept = [attribute for attribute in node.attribute if attribute.name != "noop_with_empty_axes"]
    del node.attribute[:]
    node.attribute.extend(kept)
    if axes is not None:
        node.attribute.append(helper.make_attribute("axes", [int(axis) for axis in axes]))
        del node.input[1:]


def _equal_parts(node: Any, shapes: dict[str, list[int]]) -> None:
    """The number of parts is counted by the outputs before 18; a last part that is smaller needs its size written."""
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    kept = [attribute for attribute in node.attribute if attribute.name != "num_outputs"]
    if len(node.input) == 1 and len({shapes.get(name, [0] * 9)[axis] for name in node.output}) > 1:
        raise UnsupportedError(f"opset 17 has no Split into parts of different sizes ({node.name}): use --opset 18")
    del node.attribute[:]
    node.attribute.extend(kept)


def _drop_defaults(node: Any) -> None:
    """Attributes that came with 18, where they say what 17 does anyway."""
    plain = {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"}
    kept = [a for a in node.attribute if a.name not in plain or plain[a.name] not in (a.i, a.s)]
    del node.attribute[:]
    node.attribute.extend(kept)


def _mish(node: Any) -> list[Any]:
    """x * tanh(softplus(x)), by its definition."""
    from onnx import helper

    (given,), (result,) = node.input, node.output
    soft, bent = f"{result}_softplus", f"{result}_tanh"
    return [
        helper.make_node("Softplus", [given], [soft], name=f"{node.name}_softplus"),
        helper.make_node("Tanh", [soft], [bent], name=f"{node.name}_tanh"),
        helper.make_node("Mul", [given, bent], [result], name=node.name),
    ]


def _refuse_newer(node: Any) -> None:
    from onnx import defs

    try:
        known = defs.get_schema(node.op_type, 17, node.domain)
    except defs.SchemaError:
        known = None
    if (
        known is None
        or len(node.input) > known.max_input
        or any(attribute.name not in known.attributes for attribute in node.attribute)
    ):
        raise UnsupportedError(f"opset 17 has no {node.op_type} as the network needs it: use --opset 18 or newer")
