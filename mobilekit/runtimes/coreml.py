"""Core ML packages: written here, run on Apple devices only."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mobilekit.errors import BadInputError, UnsupportedError, first_line
from mobilekit.files import appearing
from mobilekit.interfaces import Session
from mobilekit.runtimes import _coreml_facts
from mobilekit.runtimes._coreml_weights import float_constants, with_int8_weights
from mobilekit.runtimes._job import private_copy, quiet, refuse_unknown
from mobilekit.runtimes._portable import portable
from mobilekit.runtimes._selection import selection
from mobilekit.types import ExportJob, FileFacts, Network, OperatorShape, Precision

if TYPE_CHECKING:
    import torch


class Coreml:
    """Writes ML Programs for iOS 16 or newer through torch.export. They cannot be executed off macOS.

    >>> Coreml().suffix
    '.mlpackage'
    """

    name = "coreml"
    suffix = ".mlpackage"
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8")

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
        model = _converted(module, example, job.precision)
        if choice is not None:
            with quiet(native=True):
                kept = choice.kept_float
                left = float_constants(model, module, job.candidate.network, kept) if kept else []
                model = with_int8_weights(model, left)
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
        """Always raises UnsupportedError: only Apple's systems run these files."""
        if not path.exists():
            raise BadInputError(f"{path} does not exist; export it first")
        raise UnsupportedError(
            f"Core ML files can only be run on macOS or iOS, so {path.name} cannot be executed here; "
            "time it with the iOS app or in Xcode"
        )

    def sketch(self, network: Network, path: Path) -> None:
        """Always raises UnsupportedError: there is nothing here to time it with."""
        raise UnsupportedError("Core ML networks cannot be timed off macOS; use a profile fitted to an Apple device")


def _converted(module: torch.nn.Module, example: torch.Tensor, precision: Precision) -> Any:
    """The network as a coremltools MLModel that is not loaded."""
    import torch

    with quiet(native=True), torch.no_grad():
        import coremltools

        try:
            program = torch.export.export(portable(module, example, "coreml"), (example,)).run_decompositions({})
            return coremltools.convert(
                program,
                inputs=[coremltools.TensorType(name="input", shape=tuple(example.shape), dtype=np.float32)],
                outputs=[coremltools.TensorType(name="output", dtype=np.float32)],
                minimum_deployment_target=coremltools.target.iOS16,
                compute_precision=getattr(coremltools.precision, "FLOAT32" if precision == "fp32" else "FLOAT16"),
                skip_model_load=True,
            )
        # The converter raises whatever its many passes raise; the user needs to know that it was the converter.
        except Exception as error:
            raise UnsupportedError(f"coremltools cannot convert the network: {first_line(error)}") from error
