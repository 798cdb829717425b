"""ONNX files, run by ONNX Runtime."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mobilekit.errors import BadInputError, UnsupportedError, first_line
from mobilekit.files import appearing
from mobilekit.interfaces import Session
from mobilekit.runtimes import _onnx_facts, _onnx_int8, _onnx_sketch
from mobilekit.runtimes._job import calibration_samples, private_copy, quiet, refuse_unknown, telling_sample
from mobilekit.runtimes._onnx_graph import OPSET
from mobilekit.runtimes._onnx_registry import keep_operators
from mobilekit.runtimes._portable import portable
from mobilekit.runtimes._selection import selection
from mobilekit.runtimes._tracing import operator_values
from mobilekit.types import ExportJob, FileFacts, Network, OperatorShape, Precision

if TYPE_CHECKING:
    import torch


class Onnx:
    """Writes opset 20 files through torch.export, and runs them on one CPU thread.

    >>> Onnx().suffix
    '.onnx'
    """

    name = "onnx"
    suffix = ".onnx"
    # The CPU provider has no fp16 kernels: it would convert every tensor forth and back.
    precisions: tuple[Precision, ...] = ("fp32", "int8")

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
        """Write one file without external data: static batch 1, float32 NCHW in, float32 out, batch norm folded.

        int8 has symmetric int8 weights with a scale per output channel, and is what `candidate.quant` says (None: the
        whole network, static). Static: quantise nodes around every operator that the spec names and ONNX Runtime has in
        int8, uint8 activations with the minimum and maximum over all calibration samples; behind an operator without
        weights that stays in float between two int8 ones stands a Max of one tensor, or ONNX Runtime would run it in
        int8. Dynamic: inputs of convolutions and linear layers are quantised at every inference, everything else and
        what lies between operators is float; transposed convolutions have no such form. Weight-only: weights behind
        dequantise nodes, which ONNX Runtime carries out at every inference, so that the file is smaller and not faster.

        Raises UnsupportedError where the network cannot be exported as asked, BadInputError where static int8 has no
        calibration.
        """
        refuse_unknown("ONNX", job.precision, self.precisions)
        module, example = private_copy(job)
        if job.precision != "int8":
            content = _float_model(module, example).SerializeToString(deterministic=True)
        else:
            content = _int8_content(job, module, example)
        with appearing(Path(job.path)) as draft:
            draft.write_bytes(content)

    def describe(self, path: Path) -> FileFacts:
        """Inputs, outputs and operators per precision, counted in the file."""
        return _onnx_facts.describe(path)

    def open(self, path: Path) -> Session:
        """A session on one thread of the CPU; batches are fed one sample at a time."""
        session = start_session(path)
        (source, *_), (result, *_) = session.get_inputs(), session.get_outputs()

        def run(batch: np.ndarray) -> np.ndarray:
            batch = np.ascontiguousarray(batch, dtype=np.float32)
            rows: list[np.ndarray] = [
                session.run([result.name], {source.name: batch[i : i + 1]})[0] for i in range(len(batch))
            ]
            return np.concatenate(rows)

        return run

    def sketch(self, network: Network, path: Path) -> None:
        """Write a model of this network's structure with random weights, for timing; needs no torch.

        Nodes are named after the operators (`NAME`, further nodes of the same operator `NAME/...`), and the tensors
        after the nodes, because ONNX Runtime names what it fuses after one or the other. Each operator runs in
        `network.precision(operator)`, with quantise nodes where an export would have them; input and outputs are
        float32. Raises UnsupportedError, in a sentence, for an operator that cannot be built.
        """
        for operator in network.operators:
            precision = network.precision(operator)
            refuse_unknown("ONNX", precision, self.precisions)
            reason = self.supports(network.shape(operator), precision)
            if reason:
                raise UnsupportedError(reason)
        # Hundreds are written and read once: making each safe against a crash would take most of the time.
        Path(path).write_bytes(_onnx_sketch.build(network).SerializeToString(deterministic=True))


def start_session(path: Path) -> Any:
    """An onnxruntime session on one thread. Raises BadInputError where the file cannot be read."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (state.NoSuchFile, state.InvalidProtobuf, state.InvalidGraph, state.InvalidArgument, state.Fail) as error:
        raise BadInputError(f"ONNX Runtime cannot open {path}: {error}; export it again") from None


def _float_model(module: torch.nn.Module, example: torch.Tensor) -> Any:
    """The network as a float32 onnx.ModelProto without the exporter's notes (they hold paths of this machine)."""
    import torch

    keep_operators()
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                portable(module, example, "onnx"),
                (example,),
                dynamo=True,
                optimize=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
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


def _int8_content(job: ExportJob, module: torch.nn.Module, example: torch.Tensor) -> bytes:
    """The network's int8 file."""
    choice = selection(job.candidate)
    samples = calibration_samples(job) if choice.activations == "static" else []
    model = _float_model(module, example)
    with tempfile.TemporaryDirectory() as folder:
        ready = _onnx_int8.prepared(model, Path(folder))
        left: set[str] = set()
        if choice.kept_float:
            sample = telling_sample(job)
            left = _onnx_int8.float_nodes(ready, choice, operator_values(module, sample), sample)
        quantised = _onnx_int8.quantised(ready, choice, left, samples, Path(folder))
    del quantised.metadata_props[:]
    content: bytes = quantised.SerializeToString(deterministic=True)
    return content
