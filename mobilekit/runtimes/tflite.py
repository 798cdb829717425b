"""TFLite files, run by LiteRT with XNNPACK."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mobilekit.documents import short
from mobilekit.errors import BadInputError, MobilekitError, UnsupportedError, first_line
from mobilekit.files import appearing
from mobilekit.interfaces import Session
from mobilekit.runtimes import _tflite_facts, _tflite_int8, _tflite_sketch
from mobilekit.runtimes._job import (
    MOST_SAMPLES,
    Sample,
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
from mobilekit.runtimes._portable import portable
from mobilekit.runtimes._selection import Selection, selection
from mobilekit.runtimes._tflite_ends import name_ends
from mobilekit.runtimes._tracing import node_values, operator_values, tensor_ranges
from mobilekit.types import ExportJob, FileFacts, Network, OperatorShape, Precision, Range, Target

if TYPE_CHECKING:
    import torch

MAP = 4
"""Axes of a map (N, C, H, W), which files have with channels last."""


class Tflite:
    """Writes files with channels last through litert-torch, and runs them on one CPU thread.

    >>> Tflite().suffix
    '.tflite'
    """

    name = "tflite"
    suffix = ".tflite"
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    execution: Literal["executed", "evaluated"] = "executed"

    def unavailable(self) -> str | None:
        """Why this machine cannot write the format; None: it can."""
        packages = ("ai_edge_litert", "ai_edge_quantizer", "litert_torch")
        missing = [name for name in packages if find_spec(name) is None]
        return f'{missing[0]} is not installed: pip install "mobilekit[tflite]"' if missing else None

    def supports(self, shape: OperatorShape, precision: Precision) -> str | None:
        """None where LiteRT has a kernel for the operator in this precision, else the reason."""
        if precision not in self.precisions:
            return f"TFLite files are not written in {precision}"
        return _tflite_sketch.int8_refusal(shape) if precision == "int8" else None

    def export(self, job: ExportJob) -> None:
        """Write one file: batch 1, float32 (or int8) in and out; maps (N, C, H, W) are NHWC, the rest as in PyTorch.

        int8 has symmetric int8 weights with a scale per output channel, and is what `candidate.quant` says (None: the
        whole network, static). Static: int8 activations with the minimum and maximum over the calibration samples (256
        of them at most, evenly chosen), wherever the spec names the operator and the quantiser has it in int8.
        Dynamic: inputs of convolutions and linear layers are quantised at every inference, everything else is float.
        Weight-only: weights behind dequantise operators, arithmetic in float.

        Raises UnsupportedError where the network cannot be exported as asked, BadInputError where static int8 has no
        calibration.
        """
        refuse_unknown("TFLite", job.precision, self.precisions)
        refuse_other_weights("TFLite", job)
        missing = self.unavailable()
        if missing:
            raise UnsupportedError(missing)
        if job.options.dynamic_batch:
            raise UnsupportedError(
                "TFLite files are written with batch 1: litert-torch cannot leave the batch of common networks open "
                "(global pools, reshapes); feed samples one by one, or ask for ONNX"
            )
        source = private_copy(job)
        choice = selection(job.candidate) if job.precision == "int8" else None
        static = choice is not None and choice.activations == "static"
        if job.options.io == "int8" and not static:
            refuse_quantised_ends(f"TFLite {job.precision}", job)
        with appearing(Path(job.path)) as draft:
            _write_float(source, draft)
            if choice is not None:
                content = _int8_content(job, source.network, choice, draft)
                draft.unlink()  # The interpreter has the file mapped: it must not change under it.
                draft.write_bytes(content)

    def describe(self, path: Path) -> FileFacts:
        """Inputs, outputs and operators per precision, counted in the file."""
        return _tflite_facts.describe(path)

    def open(self, path: Path) -> Session:
        """An interpreter on one thread with XNNPACK; batches are fed one sample at a time."""
        interpreter = start_interpreter(path)
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

        def run(batches: Sequence[np.ndarray]) -> list[np.ndarray]:
            refuse_other_counts(batches, inputs)
            rows = []
            try:
                for i in range(len(batches[0])):
                    for source, batch in zip(inputs, batches, strict=True):
                        sample = _to_file(np.asarray(batch[i : i + 1], np.float32), source)
                        interpreter.set_tensor(source["index"], sample)
                    interpreter.invoke()
                    rows.append([_from_file(interpreter.get_tensor(result["index"]), result) for result in outputs])
            except (ValueError, RuntimeError) as error:
                raise MobilekitError(f"LiteRT cannot run {path}: {short(first_line(error))}") from error
            return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

        return run

    def tensors(self, path: Path, sample: Sequence[np.ndarray]) -> dict[str, tuple[np.ndarray, ...]]:
        """Every float or int8 tensor that the file computes for a sample, maps as they are and as NCHW."""
        interpreter = start_interpreter(path, keep_all=True)
        for source, array in zip(interpreter.get_input_details(), sample, strict=True):
            interpreter.set_tensor(source["index"], _to_file(np.asarray(array, np.float32), source))
        interpreter.invoke()
        return _tflite_int8.computed(interpreter)

    def sketch(self, network: Network, path: Path, target: Target = "host") -> None:
        """Write a model of this network's structure with random weights, as the exporter would; needs no torch.

        Input and output are float32 NHWC as in exported files; each operator runs in `network.precision(operator)`,
        and tensors bear its name. Raises UnsupportedError for an operator that cannot be built.
        """
        # Hundreds are written and read once: making each safe against a crash would take most of the time.
        Path(path).write_bytes(_tflite_sketch.sketch(network))


def _int8_content(job: ExportJob, network: torch.nn.Module, choice: Selection, path: Path) -> bytes:
    """The int8 form of the float file at `path`."""
    content, static = path.read_bytes(), choice.activations == "static"
    interpreter = start_interpreter(path, keep_all=True)
    sample = telling_sample(job)
    maps = _channels_last(sample)
    left: set[str] = set()
    ranges: dict[str, Range] = {}
    _tflite_int8.run(interpreter, maps)
    tensors = _tflite_int8.computed(interpreter)
    if choice.kept_float:
        left = _tflite_int8.float_tensors(content, choice, operator_values(network, sample[0]), tensors)
    if static:
        ranges = tensor_ranges(tensors, node_values(network, sample), ranges_of(job, network))
        taken_apart = tensors.keys() - ranges.keys()  # by the converter: no tensors of the module
        if taken_apart:
            samples = (_channels_last(each) for each in calibration_samples(job, MOST_SAMPLES))
            ranges |= _tflite_int8.measured(interpreter, taken_apart, samples)
    return _tflite_int8.quantised(content, maps, choice, left, ranges, job.options.io == "float")


def start_interpreter(path: Path, keep_all: bool = False) -> Any:
    """A LiteRT interpreter on one thread. Raises BadInputError where the file cannot be read.

    `keep_all` keeps every tensor readable after a run.
    """
    with quiet(native=True):
        from ai_edge_litert.interpreter import Interpreter

        try:
            interpreter = Interpreter(model_path=str(path), num_threads=1, experimental_preserve_all_tensors=keep_all)
            interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            said = short(first_line(error))
            raise BadInputError(f"LiteRT cannot open {path}: {said}; export it again") from None
    if not interpreter.get_input_details() or not interpreter.get_output_details():
        raise BadInputError(f"{path} has no inputs or no outputs; export it again")
    return interpreter


def _channels_last(sample: Sample) -> Sample:
    """A sample with maps (1, C, H, W) as (1, H, W, C); arrays of another rank as they are."""
    return tuple(np.ascontiguousarray(a.transpose(0, 2, 3, 1)) if a.ndim == MAP else a for a in sample)


def _to_file(sample: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """A float32 NCHW sample as the file takes it."""
    if sample.ndim == MAP:
        sample = sample.transpose(0, 2, 3, 1)
    if details["dtype"] is not np.float32:
        scale, zero = details["quantization"]
        limits = np.iinfo(details["dtype"])
        sample = np.clip(np.round(sample / scale) + zero, limits.min, limits.max)
    return np.ascontiguousarray(sample, dtype=details["dtype"])


def _from_file(value: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """What the file gave as float32, a map as NCHW."""
    if details["dtype"] is not np.float32:
        scale, zero = details["quantization"]
        value = (value.astype(np.float32) - zero) * np.float32(scale)
    return value.transpose(0, 3, 1, 2) if value.ndim == MAP else value


def _write_float(source: Source, path: Path) -> None:
    """Convert a module and write it with channels last at both ends, which bear the names of inputs and outputs."""
    import torch

    with quiet(native=True), torch.no_grad():
        import litert_torch

        maps_in = [i for i, value in enumerate(source.inputs) if value.ndim == MAP]
        maps_out = [i for i, value in enumerate(source.outputs.values()) if value.ndim == MAP]
        sample = tuple(v.permute(0, 2, 3, 1).contiguous() if v.ndim == MAP else v for v in source.inputs)
        try:
            known = portable(source, "tflite")
            wrapped = litert_torch.to_channel_last_io(known, args=maps_in, outputs=maps_out)
            wrapped.training = False  # `known` is in eval mode already, and may be a graph that refuses to be told
            litert_torch.convert(wrapped, sample).export(str(path))
        # The converter raises whatever its many passes raise; the user needs to know that it was the converter.
        except Exception as error:
            raise UnsupportedError(f"litert-torch cannot convert the network: {first_line(error)}") from error
    name_ends(path, source.input_names, tuple(source.outputs))
    _tflite_int8.zero_pads(path)
