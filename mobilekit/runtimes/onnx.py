"""ONNX files, run by ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mobilekit.documents import short
from mobilekit.errors import BadInputError, MobilekitError, UnsupportedError, first_line
from mobilekit.files import appearing
from mobilekit.interfaces import Session
from mobilekit.runtimes import _onnx_facts, _onnx_int8, _onnx_sketch, _onnx_weights
from mobilekit.runtimes._job import (
    MOST_SAMPLES,
    Source,
    calibration_samples,
    private_copy,
    quiet,
    ranges_of,
    refuse_other_counts,
    refuse_other_weights,
    refuse_quantised_ends,
    refuse_unknown,
    telling_sample,
)
from mobilekit.runtimes._onnx_opset import OLDEST_EXPORTED, to_opset_17
from mobilekit.runtimes._onnx_registry import keep_operators
from mobilekit.runtimes._portable import portable
from mobilekit.runtimes._selection import selection
from mobilekit.runtimes._tracing import node_values, operator_values, tensor_ranges
from mobilekit.types import ExportJob, FileFacts, Network, OperatorShape, Precision, Target


class Onnx:
    """Writes files of opset 17 to 22 through torch.export, and runs them on one CPU thread.

    >>> Onnx().suffix
    '.onnx'
    """

    name = "onnx"
    suffix = ".onnx"
    # The CPU provider has no fp16 kernels: it would convert every tensor forth and back.
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    execution: Literal["executed", "evaluated"] = "executed"

    def unavailable(self) -> str | None:
        """Why this machine cannot write the format; None: it can."""
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
        return f"{missing[0]} is not installed: pip install mobilekit" if missing else None

    def supports(self, shape: OperatorShape, precision: Precision) -> str | None:
        """None where ONNX Runtime has a kernel for the operator in this precision, else the reason."""
        if precision not in self.precisions:
            return f"ONNX Runtime has no {precision} kernels on the CPU"
        return _onnx_sketch.int8_refusal(shape) if precision == "int8" else None

    def export(self, job: ExportJob) -> None:
        """Write one file without external data: static batch 1, float32 in PyTorch's layout, batch norm folded.

        int8 has symmetric int8 weights with a scale per output channel, and is what `candidate.quant` says (None: the
        whole network, static). Static: quantise nodes around every operator that the spec names and ONNX Runtime has in
        int8, with the spec's ranges, activations uint8 for x86 and int8 for Arm; a linear layer that writes an output
        writes it in float; behind an operator without weights that stays in float between two int8 ones stands a Max
        of one tensor, or ONNX Runtime would run it in int8. Dynamic: inputs of convolutions and linear layers are
        quantised at every inference, everything else and what lies between operators is float; transposed convolutions
        have no such form. Weight-only: weights behind dequantise nodes, which ONNX Runtime carries out at every
        inference, so that the file is smaller and not faster.

        Raises UnsupportedError where the network cannot be exported as asked, BadInputError where static int8 has no
        calibration.
        """
        refuse_unknown("ONNX", job.precision, self.precisions)
        refuse_other_weights("ONNX", job)
        refuse_quantised_ends("ONNX", job)
        source = private_copy(job)
        if job.precision != "int8":
            content = _float_model(source, job.options.opset).SerializeToString(deterministic=True)
        else:
            content = _int8_content(job, source)
        with appearing(Path(job.path)) as draft:
            draft.write_bytes(content)

    def describe(self, path: Path) -> FileFacts:
        """Inputs, outputs and operators per precision, counted in the file."""
        return _onnx_facts.describe(path)

    def open(self, path: Path) -> Session:
        """A session on one thread of the CPU; batches are fed whole to a file with an open batch, else by sample."""
        session = start_session(path)
        open_batch = not isinstance(session.get_inputs()[0].shape[0], int)
        inputs = [source.name for source in session.get_inputs()]
        outputs = [result.name for result in session.get_outputs()]

        def run(batches: Sequence[np.ndarray]) -> list[np.ndarray]:
            refuse_other_counts(batches, inputs)
            given = [np.ascontiguousarray(batch, dtype=np.float32) for batch in batches]
            rows: list[list[np.ndarray]] = []
            size = len(given[0]) if open_batch else 1
            for i in range(0, len(given[0]), size):
                feed = {name: batch[i : i + size] for name, batch in zip(inputs, given, strict=True)}
                try:
                    rows.append(session.run(outputs, feed))
                except Exception as error:  # its errors have no type in common
                    raise MobilekitError(f"ONNX Runtime cannot run {path}: {short(first_line(error))}") from error
            return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

        return run

    def tensors(self, path: Path, sample: Sequence[np.ndarray]) -> dict[str, tuple[np.ndarray, ...]]:
        """Every float tensor that the file computes for a sample, its graph taken as it is written."""
        import onnx

        with quiet():
            return _onnx_int8.tensors(onnx.shape_inference.infer_shapes(onnx.load(str(path))), tuple(sample))

    def sketch(self, network: Network, path: Path, target: Target = "host") -> None:
        """Write a model of this network's structure with random weights, for timing; needs no torch.

        Nodes are named after the operators (`NAME`, further nodes of the same operator `NAME/...`), and the tensors
        after the nodes, because ONNX Runtime names what it fuses after one or the other. Each operator runs in
        `network.precision(operator)`, with quantise nodes where an export would have them; input and outputs are
        float32, quantised activations signed for Arm. Raises UnsupportedError, in a sentence, for an operator that
        cannot be built.
        """
        for operator in network.operators:
            precision = network.precision(operator)
            refuse_unknown("ONNX", precision, self.precisions)
            reason = self.supports(network.shape(operator), precision)
            if reason:
                raise UnsupportedError(reason)
        # Hundreds are written and read once: making each safe against a crash would take most of the time.
        made = _onnx_sketch.build(network, signed=_onnx_int8.is_arm(target))
        Path(path).write_bytes(made.SerializeToString(deterministic=True))


def start_session(path: Path) -> Any:
    """An onnxruntime session on one thread. Raises BadInputError where the file cannot be read."""
    import onnxruntime

    if path.exists() and not path.is_file():  # a pipe would wait for its writer
        raise BadInputError(f"ONNX Runtime cannot open {path}: it is no plain file; export it again")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # Its errors have no type in common, and the text of one about a damaged name cannot even be decoded.
    except Exception as error:
        raise BadInputError(f"ONNX Runtime cannot open {path}: {short(first_line(error))}; export it again") from error
    if not session.get_inputs() or not session.get_outputs():
        raise BadInputError(f"{path} has no inputs or no outputs; export it again")
    return session


def _float_model(source: Source, opset: int) -> Any:
    """The network as a float32 onnx.ModelProto without the exporter's notes (they hold paths of this machine)."""
    import torch

    keep_operators()
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                portable(source, "onnx"),
                source.inputs,
                dynamo=True,
                optimize=True,
                opset_version=max(opset, OLDEST_EXPORTED),
                dynamic_shapes=source.dynamic_shapes,
                input_names=list(source.input_names),
                output_names=list(source.outputs),
                verbose=False,
            )
            assert program is not None  # noqa: S101  (only dynamo=False returns None)
            model = program.model_proto
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedError(
            f"PyTorch cannot export the network to ONNX: {first_line(error.__cause__ or error)}"
        ) from error
    _pool_globally(model)
    for holder in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del holder.metadata_props[:]
    for named in (model.graph, *model.graph.node, *model.graph.initializer):
        named.doc_string = ""
    del model.graph.value_info[:]
    del model.functions[:]
    if opset < OLDEST_EXPORTED:
        to_opset_17(model)
    return model


def _pool_globally(model: Any) -> None:
    """Write means over a map's height and width as global pools: only those have an int8 kernel."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        axes = constants.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) == 2 else None
        rank = ranks.get(node.input[0]) if node.input else None
        if axes is None or rank != 4 or {int(a) % rank for a in numpy_helper.to_array(axes)} != {2, 3}:
            model.graph.node.append(node)
            continue
        keep = all(a.i for a in node.attribute if a.name == "keepdims")
        pooled = node.output[0] if keep else f"{node.output[0]}_map"
        model.graph.node.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name))
        if not keep:
            flat = helper.make_node("Flatten", [pooled], list(node.output), name=f"{node.name}_flat", axis=1)
            model.graph.node.append(flat)
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _int8_content(job: ExportJob, source: Source) -> bytes:
    """The network's int8 file."""
    choice = selection(job.candidate)
    model = _float_model(source, job.options.opset)
    with tempfile.TemporaryDirectory() as folder:
        ready = _onnx_int8.prepared(model, Path(folder))
    tensors: dict[str, tuple[np.ndarray, ...]] = {}
    left: set[str] = set()
    if choice.activations == "static" or choice.kept_float:
        sample = telling_sample(job)
        tensors = _onnx_int8.tensors(ready, sample)
    if choice.kept_float:
        left = _onnx_int8.float_nodes(ready, choice, operator_values(source.network, sample[0]), tensors)
    if choice.activations == "dynamic":
        quantised = _onnx_weights.dynamic(ready, left)
    elif choice.activations == "float":
        quantised = _onnx_weights.weight_only(ready, left)
    else:
        ranges = tensor_ranges(tensors, node_values(source.network, sample), ranges_of(job, source.network))
        taken_apart = tensors.keys() - ranges.keys()  # by the exporter: no tensors of the module
        if taken_apart:
            ranges |= _onnx_int8.measured(ready, taken_apart, calibration_samples(job, MOST_SAMPLES))
        quantised = _onnx_int8.static(ready, left, ranges, job.options.target)
    del quantised.metadata_props[:]
    content: bytes = quantised.SerializeToString(deterministic=True)
    return content
