"""Turns a float ONNX model into int8 through onnxruntime's static quantiser, whole or with operators left in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mobilekit.errors import UnsupportedError, first_line
from mobilekit.runtimes import _onnx_weights
from mobilekit.runtimes._job import quiet
from mobilekit.runtimes._onnx_facts import ABSORBED, FUSED, WEIGHTED
from mobilekit.runtimes._onnx_qdq import BARRIER, INT8_TYPES
from mobilekit.runtimes._selection import Selection
from mobilekit.runtimes._tracing import FileNode, OperatorValue, kept_nodes


def prepared(model: Any, folder: Path) -> Any:
    """The model with constants folded and shapes inferred, without which quantisers skip operators; named nodes.

    Raises UnsupportedError where onnxruntime cannot infer a shape.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    given, path = folder / "given.onnx", folder / "prepared.onnx"
    onnx.save(model, str(given))  # a model in memory would lose its weights to the first attempt
    # onnxruntime's own shape inference does not know every operator (a maximum over axes, for one); ONNX's then does.
    for skipped in (False, True):
        try:
            with quiet():
                quant_pre_process(str(given), str(path), skip_symbolic_shape=skipped)
            break
        # It raises whatever its many rules raise, bare assertions among them.
        except Exception as error:
            if skipped:
                message = f"onnxruntime cannot prepare the network for int8: {first_line(error)}"
                raise UnsupportedError(message) from error
    ready = onnx.load(str(path))
    taken: set[str] = set()
    for number, node in enumerate(ready.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}"
        taken.add(node.name)
    return ready


def float_nodes(model: Any, selection: Selection, values: list[OperatorValue], sample: np.ndarray) -> set[str]:
    """Names of the nodes that belong to the operators which stay in float. Raises UnsupportedError as `kept_nodes`."""
    nodes = [FileNode(n.name, tuple(n.input), tuple(n.output)) for n in model.graph.node]
    return kept_nodes(selection, nodes, _tensors(model, sample), values)


def _tensors(model: Any, sample: np.ndarray) -> dict[str, tuple[np.ndarray, ...]]:
    """Every float tensor that the model computes for a sample."""
    import onnx
    import onnxruntime

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    written = {name for node in model.graph.node for name in node.output}
    results = {value.name for value in model.graph.output}
    for value in model.graph.value_info:
        is_float = value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        if is_float and value.name in written and value.name not in results:
            watched.graph.output.append(value)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in watched.graph.output]
    found = session.run(names, {model.graph.input[0].name: sample})
    return {name: (value,) for name, value in zip(names, found, strict=True)}


def quantised(model: Any, selection: Selection, left: set[str], samples: list[np.ndarray], folder: Path) -> Any:
    """The prepared model as an int8 one; nodes `left` stay in float. `samples` are read for static ranges only."""
    if selection.activations == "dynamic":
        return _onnx_weights.dynamic(model, left)
    if selection.activations == "float":
        return _onnx_weights.weight_only(model, left)
    return _static(model, left, samples, folder)


def _static(model: Any, left: set[str], samples: list[np.ndarray], folder: Path) -> Any:
    """Quantise nodes around all others, with ranges over all samples."""
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is untyped
        """Feeds the samples one by one: the graph has batch 1."""

        def __init__(self) -> None:
            self.rest = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            sample = next(self.rest, None)
            return None if sample is None else {"input": sample}

    source, result = folder / "named.onnx", folder / "quantised.onnx"
    onnx.save(model, str(source))
    with quiet():
        quantize_static(
            str(source),
            str(result),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(INT8_TYPES),
            nodes_to_exclude=sorted(left),
            per_channel=True,
            # On x86 only unsigned activations with signed weights (U8S8) fuse everywhere: with signed ones a
            # third of the convolutions and all adds stay in float, and unsigned weights are 4 to 17 times slower.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            # Behind an operator in float, what only moves data would stay in float too.
            extra_options={"ForceQuantizeNoInputCheck": bool(left)},
        )
    ready = onnx.load(str(result))
    _keep_float(ready.graph, left)
    return ready


def _keep_float(graph: Any, left: set[str]) -> None:
    """Let nodes stay in float between quantise nodes, where ONNX Runtime would run them in int8.

    It would also round weights that are not rounded between such nodes, with one scale for all channels.
    """
    from onnx import helper

    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes: list[Any] = []
    for node in graph.node:
        plain = node.name in left and node.op_type in FUSED - WEIGHTED
        source = producers.get(node.input[0]) if node.input else None
        clamps = (
            node.name in left and node.op_type in ABSORBED and source is not None and source.op_type not in WEIGHTED
        )
        following = readers.get(node.output[0], [])
        weighted = node.name in left and node.op_type in WEIGHTED
        if (
            (weighted or (plain and node.op_type == "MaxPool"))
            and source is not None
            and source.op_type == "DequantizeLinear"
        ):
            # Behind one, weights are rounded; those in front of a pool wander to behind it.
            given = f"{node.name}_input_float"
            nodes.append(helper.make_node(BARRIER, [node.input[0]], [given], name=given))
            node.input[0] = given
        nodes.append(node)
        if (plain or clamps) and following and all(r.op_type == "QuantizeLinear" for r in following):
            kept = f"{node.output[0]}_float"
            nodes.append(helper.make_node(BARRIER, [node.output[0]], [kept], name=kept))
            for reader in following:
                reader.input[0] = kept
    del graph.node[:]
    graph.node.extend(nodes)
