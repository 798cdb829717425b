"""TFLite files, run by LiteRT with XNNPACK."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mobilekit.errors import BadInputError, UnsupportedError, first_line
from mobilekit.files import appearing
from mobilekit.interfaces import Session
from mobilekit.runtimes import _tflite_facts, _tflite_int8, _tflite_sketch
from mobilekit.runtimes._job import (
    calibration_samples,
    private_copy,
    quiet,
    refuse_unknown,
    telling_sample,
)
from mobilekit.runtimes._portable import portable
from mobilekit.runtimes._selection import selection
from mobilekit.runtimes._tracing import operator_values
from mobilekit.types import ExportJob, FileFacts, Network, OperatorShape, Precision

if TYPE_CHECKING:
    import torch

MOST_SAMPLES = 256
"""Calibration samples that are used at most, evenly chosen: every one of them visits every tensor in Python."""


class Tflite:
    """Writes files with channels last through litert-torch, and runs them on one CPU thread.

    >>> Tflite().suffix
    '.tflite'
    """

    name = "tflite"
    suffix = ".tflite"
    precisions: tuple[Precision, ...] = ("fp32", "int8")

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
        """Write one file: static batch 1, float32 NHWC in, float32 out (a map is NHWC too).

        int8 has symmetric int8 weights with a scale per output channel, and is what `candidate.quant` says (None: the
        whole network, static). Static: int8 activations with the minimum and maximum over the calibration samples (256
        of them at most, evenly chosen), wherever the spec names the operator and the quantiser has it in int8.
        Dynamic: inputs of convolutions and linear layers are quantised at every inference, everything else is float.
        Weight-only: weights behind dequantise operators, arithmetic in float.

        Raises UnsupportedError where the network cannot be exported as asked, BadInputError where static int8 has no
        calibration.
        """
        refuse_unknown("TFLite", job.precision, self.precisions)
        missing = self.unavailable()
        if missing:
            raise UnsupportedError(missing)
        module, example = private_copy(job)
        choice = selection(job.candidate) if job.precision == "int8" else None
        static = choice is not None and choice.activations == "static"
        samples = calibration_samples(job, MOST_SAMPLES) if static else []
        with appearing(Path(job.path)) as draft:
            _write_float(module, example, draft)
            if choice is not None:
                interpreter = start_interpreter(draft, keep_all=True)
                content, left = draft.read_bytes(), set[str]()
                if choice.kept_float:
                    sample = telling_sample(job)
                    values = operator_values(module, sample)
                    left = _tflite_int8.float_tensors(content, interpreter, choice, values, _channels_last(sample))
                maps = [_channels_last(sample) for sample in samples]
                content = _tflite_int8.quantised(content, interpreter, maps, choice, left)
                draft.unlink()  # The interpreter has the file mapped: it must not change under it.
                draft.write_bytes(content)

    def describe(self, path: Path) -> FileFacts:
        """Inputs, outputs and operators per precision, counted in the file."""
        return _tflite_facts.describe(path)

    def open(self, path: Path) -> Session:
        """An interpreter on one thread with XNNPACK; batches are fed one sample at a time."""
        interpreter = start_interpreter(path)
        source, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

        def run(batch: np.ndarray) -> np.ndarray:
            rows = []
            for i in range(len(batch)):
                sample = _to_file(np.asarray(batch[i : i + 1], np.float32), source)
                interpreter.set_tensor(source["index"], sample)
                interpreter.invoke()
                rows.append(_from_file(interpreter.get_tensor(result["index"]), result))
            return np.concatenate(rows)

        return run

    def sketch(self, network: Network, path: Path) -> None:
        """Write a model of this network's structure with random weights, as the exporter would; needs no torch.

        Input and output are float32 NHWC as in exported files; each operator runs in `network.precision(operator)`,
        and tensors bear its name. Raises UnsupportedError for an operator that cannot be built.
        """
        # Hundreds are written and read once: making each safe against a crash would take most of the time.
        Path(path).write_bytes(_tflite_sketch.sketch(network))


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
            raise BadInputError(f"LiteRT cannot open {path}: {error}; export it again") from None
    return interpreter


def _channels_last(sample: np.ndarray) -> np.ndarray:
    """A sample (1, C, H, W) as (1, H, W, C); one of another rank as it is."""
    return np.ascontiguousarray(sample.transpose(0, 2, 3, 1)) if sample.ndim == 4 else sample


def _to_file(sample: np.ndarray, details: dict[str, Any]) -> np.ndarray:
    """A float32 NCHW sample as the file takes it."""
    if sample.ndim == 4:
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
    return value.transpose(0, 3, 1, 2) if value.ndim == 4 else value


def _write_float(module: torch.nn.Module, example: torch.Tensor, path: Path) -> None:
    """Convert a module and write it with channels last at both ends."""
    import torch

    with quiet(native=True), torch.no_grad():
        import litert_torch

        result = module(example)
        maps_out = [0] if isinstance(result, torch.Tensor) and result.ndim == 4 else None
        sample = (example.permute(0, 2, 3, 1).contiguous(),)
        try:
            known = portable(module, example, "tflite")
            wrapped = litert_torch.to_channel_last_io(known, args=[0], outputs=maps_out)
            wrapped.training = False  # `known` is in eval mode already, and may be a graph that refuses to be told
            litert_torch.convert(wrapped, sample).export(str(path))
        # The converter raises whatever its many passes raise; the user needs to know that it was the converter.
        except Exception as error:
            raise UnsupportedError(f"litert-torch cannot convert the network: {first_line(error)}") from error
    _tflite_int8.zero_pads(path)
