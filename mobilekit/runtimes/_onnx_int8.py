"""Turns a float ONNX model into int8 through onnxruntime's static quantiser, whole or with operators left in float."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilekit.errors import UnsupportedError, first_line
from mobilekit.runtimes._job import Sample, quiet
from mobilekit.runtimes._onnx_facts import ABSORBED, FUSED, SUMS, WEIGHTED
from mobilekit.runtimes._onnx_qdq import BARRIER, INT8_TYPES
from mobilekit.runtimes._selection import Selection
from mobilekit.runtimes._tracing import FileNode, OperatorValue, kept_nodes
from mobilekit.types import Range, Target


def prepared(model: Any, folder: Path) -> Any:
    """The model with constants folded and shapes inferred, without which quantisers skip operators; named nodes.

    Raises UnsupportedError where onnxruntime cannot infer a shape.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, path = folder / "float.onnx", folder / "prepared.onnx"
    onnx.save(model, str(source))  # a model in memory would lose its weights to the first attempt
    # onnxruntime's own shape inference does not know every operator (a maximum over axes, for one), nor some with an
    # open batch; ONNX's then does.
    for skipped in (False, True):
        try:
            # Where it stops half-way, it leaves a file in the working directory.
            with quiet(), contextlib.chdir(folder):
                quant_pre_process(str(source), str(path), skip_symbolic_shape=skipped)
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


def float_nodes(
    model: Any, selection: Selection, values: list[OperatorValue], tensors: Mapping[str, Sequence[np.ndarray]]
) -> set[str]:
    """Names of the nodes that belong to the operators which stay in float. Raises UnsupportedError as `kept_nodes`."""
    nodes = [FileNode(n.name, tuple(n.input), tuple(n.output)) for n in model.graph.node]
    return kept_nodes(selection, nodes, tensors, values)


def tensors(model: Any, sample: Sample) -> dict[str, tuple[np.ndarray, ...]]:
    """Every float tensor that the model reads and computes for a sample."""
    return {name: (value,) for name, value in _probe(model)(sample).items()}


def _probe(model: Any, wanted: Collection[str] | None = None) -> Callable[[Sample], dict[str, np.ndarray]]:
    """Runs the model, unoptimised, and gives its float tensors: the wanted ones, or all."""
    import onnx
    import onnxruntime

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    written = {name for node in model.graph.node for name in node.output}
    results = {value.name for value in model.graph.output}
    for value in model.graph.value_info:
        is_float = value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        if is_float and value.name in written and value.name not in results:
            shown.graph.output.append(value)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in shown.graph.output if wanted is None or value.name in wanted]

    def run(sample: Sample) -> dict[str, np.ndarray]:
        feed = {value.name: array for value, array in zip(model.graph.input, sample, strict=True)}
        found = dict(zip(names, session.run(names, feed), strict=True)) if names else {}
        return {name: value for name, value in feed.items() if wanted is None or name in wanted} | found

    return run


def measured(model: Any, wanted: Collection[str], samples: Iterable[Sample]) -> dict[str, Range]:
    """What these tensors of the model range over, finite values only."""
    found: dict[str, Range] = {}
    run = _probe(model, wanted)
    for sample in samples:
        for name, value in run(sample).items():
            finite = value[np.isfinite(value)]
            low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
            before = found.get(name, (low, high))
            found[name] = (min(low, before[0]), max(high, before[1]))
    return found


def static(model: Any, left: set[str], ranges: Mapping[str, Range], target: Target) -> Any:
    """The prepared model with quantise nodes, scales of these ranges, around all nodes but those `left` in float."""
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    ends = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        # On x86 only unsigned activations with signed weights (U8S8) fuse everywhere: with signed ones a
        # third of the convolutions and all adds stay in float, and unsigned weights are 4 to 17 times slower.
        # Arm multiplies signed by signed.
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if is_arm(target) else QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, ends),
        nodes_to_quantize=[],
        nodes_to_exclude=sorted(left),
        op_types_to_quantize=list(INT8_TYPES),
        # Behind an operator in float, what only moves data would stay in float too.
        extra_options={"ForceQuantizeNoInputCheck": bool(left)},
    )
    with quiet():
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    ready = quantizer.model.model
    _keep_float(ready.graph, left)
    _give_sums_in_float(ready.graph)
    return ready


def is_arm(target: Target) -> bool:
    """Whether files are for an Arm processor."""
    return target == "arm" or (target == "host" and platform.machine().lower() in ("arm64", "aarch64"))


def _give_sums_in_float(graph: Any) -> None:
    """Let linear layers that write an output of the network write it in float.

    ONNX Runtime's integer kernel for them takes the sums to float as well as to bytes; 256 values for all logits give
    the first place to several classes at once.
    """
    writers = {name: node for node in graph.node for name in node.output}

    def behind(kinds: Collection[str], name: str) -> Any:
        """The node of one of these kinds that writes a tensor; None: another one does."""
        node = writers.get(name)
        return node if node is not None and node.op_type in kinds else None

    for result in [value.name for value in graph.output]:
        dequantise = behind(("DequantizeLinear",), result)
        quantise = dequantise and behind(("QuantizeLinear",), dequantise.input[0])
        layer = quantise and behind(SUMS, quantise.input[0])
        if layer and sum(quantise.input[0] in node.input for node in graph.node) == 1:
            layer.output[0] = result
            graph.node.remove(dequantise)
            graph.node.remove(quantise)
    used = {name for node in graph.node for name in node.input}
    for tensor in [each for each in graph.initializer if each.name not in used]:
        graph.initializer.remove(tensor)


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
