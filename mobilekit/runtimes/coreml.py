"""Core ML packages: written here, run on Apple devices only."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mobilekit.errors import BadInputError, UnsupportedError, first_line
from mobilekit.files import appearing
from mobilekit.interfaces import Session
from mobilekit.runtimes import _coreml_facts
from mobilekit.runtimes._coreml_weights import float_constants, with_int8_weights
from mobilekit.runtimes._job import Source, private_copy, quiet, refuse_quantised_ends, refuse_unknown
from mobilekit.runtimes._selection import selection
from mobilekit.types import Candidate, ExportJob, FileFacts, Network, OperatorShape, Precision

FIRST_IOS_WITH_INT8 = 16
MOST_BATCH = 64
"""Core ML wants a bound for an axis that is left open."""


class Coreml:
    """Writes ML Programs for iOS 15 to 18 (16 unless asked) through torch.export. They cannot be executed off macOS.

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
        """Write a package folder: static batch 1, float32 multi-arrays in and out as PyTorch has them.

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
        refuse_quantised_ends("Core ML", job)
        if choice is not None and job.options.ios < FIRST_IOS_WITH_INT8:
            raise UnsupportedError(
                f"Core ML files for iOS {job.options.ios} cannot hold int8 weights: "
                f"ask for iOS {FIRST_IOS_WITH_INT8} or newer, or for fp16"
            )
        if choice is not None and choice.activations == "dynamic":
            raise UnsupportedError("Core ML has no dynamic int8: ask for weight-only int8 (activations: float)")
        source = private_copy(job)
        model = _converted(source, job.precision, job.options.ios)
        if choice is not None:
            with quiet(native=True):
                kept, known = choice.kept_float, job.candidate
                left: list[str] = []
                if isinstance(known, Candidate) and kept:
                    left = float_constants(model, source.network, known.network, kept)
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

    def tensors(self, path: Path, sample: Sequence[np.ndarray]) -> dict[str, tuple[np.ndarray, ...]]:
        """Always raises UnsupportedError: only Apple's systems run these files."""
        raise UnsupportedError(f"Core ML files can only be run on macOS or iOS: {path.name} cannot be looked into here")

    def sketch(self, network: Network, path: Path) -> None:
        """Always raises UnsupportedError: there is nothing here to time it with."""
        raise UnsupportedError("Core ML networks cannot be timed off macOS; use a profile fitted to an Apple device")


def _converted(source: Source, precision: Precision, ios: int) -> Any:
    """The network as a coremltools MLModel that is not loaded."""
    import torch

    with quiet(native=True), torch.no_grad():
        import coremltools

        try:
            exported = torch.export.export(source.module, source.inputs, dynamic_shapes=source.dynamic_shapes)
            program = exported.run_decompositions({})
            first = coremltools.RangeDim(1, MOST_BATCH, default=1) if source.open_batch else 1
            return coremltools.convert(
                program,
                inputs=[
                    coremltools.TensorType(name=name, shape=(first, *value.shape[1:]), dtype=np.float32)
                    for name, value in zip(source.input_names, source.inputs, strict=True)
                ],
                outputs=[coremltools.TensorType(name=name, dtype=np.float32) for name in source.outputs],
                minimum_deployment_target=getattr(coremltools.target, f"iOS{ios}"),
                compute_precision=getattr(coremltools.precision, "FLOAT32" if precision == "fp32" else "FLOAT16"),
                skip_model_load=True,
            )
        # The converter raises whatever its many passes raise; the user needs to know that it was the converter.
        except Exception as error:
            raise UnsupportedError(f"coremltools cannot convert the network: {first_line(error)}") from error
