"""Core ML packages: written here, run by Core ML on macOS, and evaluated operator by operator elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mobilekit.errors import BadInputError, UnsupportedError, first_line
from mobilekit.files import appearing
from mobilekit.interfaces import Session
from mobilekit.runtimes import _coreml_facts, _mil_program
from mobilekit.runtimes._coreml_int8 import placement, with_rounded_tensors
from mobilekit.runtimes._coreml_weights import with_int8_weights
from mobilekit.runtimes._job import private_copy, quiet, refuse_unknown
from mobilekit.runtimes._selection import selection
from mobilekit.types import ExportJob, FileFacts, Network, OperatorShape, Precision

if TYPE_CHECKING:
    import torch

TARGET, ROUNDING_TARGET = "iOS16", "iOS17"
"""The oldest systems that a file is for; quantise operations came with the second."""


class Coreml:
    """Writes ML Programs for iOS 16 or newer through torch.export; off macOS they are evaluated, not executed.

    >>> Coreml().suffix
    '.mlpackage'
    """

    name = "coreml"
    suffix = ".mlpackage"
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8")

    @property
    def execution(self) -> Literal["executed", "evaluated"]:
        """Core ML itself runs files on macOS; elsewhere mobilekit carries out their programs with PyTorch."""
        return "executed" if sys.platform == "darwin" else "evaluated"

    def unavailable(self) -> str | None:
        """Why this machine cannot write the format; None: it can."""
        if find_spec("coremltools") is None:
            return 'coremltools is not installed: pip install "mobilekit[coreml]"'
        return None

    def supports(self, shape: OperatorShape, precision: Precision) -> str | None:
        """None where Core ML has the operator in this precision, else the reason.

        int8 is a matter of weights here, so only operators that have weights can be int8.
        """
        if precision == "int8" and shape.kind not in ("conv", "linear"):
            return f"Core ML files hold int8 weights only, and an operator of kind {shape.kind} has none"
        return None

    def export(self, job: ExportJob) -> None:
        """Write a package folder: static batch 1, float32 NCHW multi-array in, float32 out.

        fp16 computes in half precision. int8 is the fp16 program with symmetric int8 weights, a scale per output
        channel: activations and biases stay fp16, so no calibration is needed and it is smaller, not necessarily
        faster. That is the weight-only QuantSpec, and what is written for a static one too; operators with weights
        that the spec leaves in float keep fp16 weights.

        Raises UnsupportedError where the network cannot be converted, and for dynamic int8, which Core ML has not.
        """
        refuse_unknown("Core ML", job.precision, self.precisions)
        missing = self.unavailable()
        if missing:
            raise UnsupportedError(missing)
        choice = selection(job.candidate) if job.precision == "int8" else None
        if choice is not None and choice.activations == "dynamic":
            raise UnsupportedError("Core ML has no dynamic int8: ask for weight-only int8 (activations: float)")
        module, example = private_copy(job)
        rounds = choice is not None and choice.activations == "static"
        model = _converted(module, example, job.precision, ROUNDING_TARGET if rounds else TARGET)
        if choice is not None:
            place = placement(model, job, module, choice)
            if place.scales:
                model = with_rounded_tensors(model, place.scales)
            with quiet(native=True):
                model = with_int8_weights(model, place.float_weights)
        with appearing(Path(job.path)) as draft, quiet():
            model.save(str(draft))

    def describe(self, path: Path) -> FileFacts:
        """Inputs, outputs and operators per precision, counted in the package's program.

        An operator whose weights are int8 counts as int8, although its activations are fp16.
        """
        missing = self.unavailable()
        if missing:
            raise UnsupportedError(missing)
        return _coreml_facts.describe(path)

    def open(self, path: Path) -> Session:
        """A session of the saved file, by Core ML on macOS and by `_mil_evaluator` elsewhere; one sample at a time.

        The first input and the first output count. Raises BadInputError where the file cannot be read, and
        UnsupportedError where its program has operators that the evaluator lacks.
        """
        missing = self.unavailable()
        if missing:
            raise UnsupportedError(missing)
        program = _mil_program.read(path)
        if self.execution == "executed":
            return _session(program, _core_ml(path))
        from mobilekit.runtimes._mil_evaluator import Evaluator

        return _session(program, Evaluator(program).evaluate)

    def sketch(self, network: Network, path: Path) -> None:
        """Always raises UnsupportedError: there is nothing here to time it with."""
        raise UnsupportedError("Core ML networks cannot be timed off macOS; use a profile fitted to an Apple device")


def _session(
    program: _mil_program.Program, carry_out: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
) -> Session:
    """A program that takes and gives arrays by name, fed one sample at a time."""
    source, result = program.inputs[0].name, program.outputs[0].name

    def run(batch: np.ndarray) -> np.ndarray:
        batch = np.ascontiguousarray(batch, dtype=np.float32)
        rows = [carry_out({source: batch[i : i + 1]})[result] for i in range(len(batch))]
        return np.asarray(np.concatenate(rows), np.float32)

    return run


def _core_ml(path: Path) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Apple's own engine, which exists on macOS only. Raises BadInputError where it refuses the file."""
    with quiet(native=True):
        import coremltools

        try:
            model = coremltools.models.MLModel(str(path))
        # What Core ML refuses, and how, changes with macOS; the user needs to know that it was Core ML.
        except Exception as error:
            raise BadInputError(f"Core ML cannot open {path}: {first_line(error)}; export it again") from error
    predict: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = model.predict
    return predict


def _converted(module: torch.nn.Module, example: torch.Tensor, precision: Precision, target: str) -> Any:
    """The network as a coremltools MLModel that is not loaded."""
    import torch

    with quiet(native=True), torch.no_grad():
        import coremltools

        try:
            program = torch.export.export(module, (example,)).run_decompositions({})
            return coremltools.convert(
                program,
                inputs=[coremltools.TensorType(name="input", shape=tuple(example.shape), dtype=np.float32)],
                outputs=[coremltools.TensorType(name="output", dtype=np.float32)],
                minimum_deployment_target=getattr(coremltools.target, target),
                compute_precision=getattr(coremltools.precision, "FLOAT32" if precision == "fp32" else "FLOAT16"),
                skip_model_load=True,
            )
        # The converter raises whatever its many passes raise; the user needs to know that it was the converter.
        except Exception as error:
            raise UnsupportedError(f"coremltools cannot convert the network: {first_line(error)}") from error
