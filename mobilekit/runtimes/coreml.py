"""Core ML packages: written here, run by Core ML on macOS, and evaluated operator by operator elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mobilekit.errors import BadInputError, UnsupportedError, first_line
from mobilekit.files import appearing
from mobilekit.interfaces import Session
from mobilekit.runtimes import _coreml_facts, _mil_program
from mobilekit.runtimes._coreml_int8 import INT8_KINDS, placement, with_rounded_tensors
from mobilekit.runtimes._coreml_weights import with_packed_weights
from mobilekit.runtimes._job import (
    Source,
    private_copy,
    quiet,
    refuse_other_counts,
    refuse_quantised_ends,
    refuse_unknown,
)
from mobilekit.runtimes._portable import portable
from mobilekit.runtimes._selection import Selection, selection
from mobilekit.types import ExportJob, FileFacts, Network, OperatorShape, Precision, Target, WeightForm

OLDEST_IOS, USUAL_IOS = 15, 16
FIRST_IOS_WITH_INT8, FIRST_IOS_IN_INT8, FIRST_IOS_WITH_INT4 = 16, 17, 18
"""Programs can hold int8 weights and palettes since the first, quantise operations since the second."""
MOST_BATCH = 64
"""Core ML wants a bound for an axis that is left open."""


class Coreml:
    """Writes ML Programs for iOS 15 to 18 through torch.export; off macOS they are evaluated, not executed.

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
        """None where Core ML has the operator in this precision, else the reason."""
        if precision == "int8" and shape.kind not in INT8_KINDS:
            kind = shape.activation if shape.kind == "activation" and shape.activation else shape.kind
            return f"Core ML has no int8 form of {kind}: it stays in half precision"
        return None

    def export(self, job: ExportJob) -> None:
        """Write a package folder: static batch 1, float32 multi-arrays in and out as PyTorch has them.

        fp16 computes in half precision. int8 is the fp16 program with symmetric int8 weights, a scale per output
        channel, and is what `candidate.quant` says (None: the whole network, static). Static, for iOS 17 or newer:
        quantise and dequantise operations with the spec's ranges around convolutions, linear layers, sums and pools;
        what else there is stays in half precision. Weight-only: nothing but the weights is int8, or what
        `options.weights` says, so that the file is smaller, not necessarily faster. Operators that the spec leaves in
        float keep fp16 weights.

        Raises UnsupportedError where the network cannot be converted as asked, and for dynamic int8, which Core ML has
        not; BadInputError where static int8 has no calibration.
        """
        refuse_unknown("Core ML", job.precision, self.precisions)
        missing = self.unavailable()
        if missing:
            raise UnsupportedError(missing)
        refuse_quantised_ends("Core ML", job)
        choice = selection(job.candidate) if job.precision == "int8" else None
        if choice is not None and choice.activations == "dynamic":
            raise UnsupportedError("Core ML has no dynamic int8: ask for weight-only int8 (activations: float)")
        form, ios = job.options.weights, job.options.ios
        if choice is not None and choice.activations == "static" and form != "int8":
            raise UnsupportedError(
                f"{form} weights go with float activations: ask for them (--activations float), or for int8 weights"
            )
        needed = _needed(choice, form)
        if ios is not None and ios < needed:
            what = "compute in int8" if needed == FIRST_IOS_IN_INT8 else f"hold {form} weights"
            raise UnsupportedError(
                f"Core ML files for iOS {ios} cannot {what}: ask for iOS {needed} or newer, or for fp16"
            )
        source = private_copy(job)
        model = _converted(source, job.precision, ios or max(needed, USUAL_IOS))
        if choice is not None:
            place = placement(model, job, source.network, choice)
            if place.scales:
                model = with_rounded_tensors(model, place.scales)
            with quiet(native=True):
                model = with_packed_weights(model, job.options.weights, place.float_weights)
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

        Raises BadInputError where the file cannot be read, and UnsupportedError where its program has operators that
        the evaluator lacks.
        """
        missing = self.unavailable()
        if missing:
            raise UnsupportedError(missing)
        program = _mil_program.read(path)
        if self.execution == "executed":
            return _session(program, _core_ml(path))
        from mobilekit.runtimes._mil_evaluator import Evaluator

        return _session(program, Evaluator(program).evaluate)

    def tensors(self, path: Path, sample: Sequence[np.ndarray]) -> dict[str, tuple[np.ndarray, ...]]:
        """Every float tensor that the program computes for a sample, by mobilekit's own evaluator on every system."""
        from mobilekit.runtimes._mil_evaluator import Evaluator

        evaluator = Evaluator(_mil_program.read(path))
        names = [tensor.name for tensor in evaluator.program.inputs]
        found = evaluator.tensors(dict(zip(names, sample, strict=True)))
        return {name: (value,) for name, value in found.items() if value.dtype == np.float32}

    def sketch(self, network: Network, path: Path, target: Target = "host") -> None:
        """Always raises UnsupportedError: there is nothing here to time it with."""
        raise UnsupportedError("Core ML networks cannot be timed off macOS; use a profile fitted to an Apple device")


def _needed(choice: Selection | None, form: WeightForm) -> int:
    """The oldest iOS whose programs can hold such a file."""
    if choice is None:
        return OLDEST_IOS
    if form == "int4":
        return FIRST_IOS_WITH_INT4
    return FIRST_IOS_IN_INT8 if choice.activations == "static" else FIRST_IOS_WITH_INT8


def _session(
    program: _mil_program.Program, carry_out: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
) -> Session:
    """A program that takes and gives arrays by name; batches are fed one sample at a time."""
    inputs = [tensor.name for tensor in program.inputs]
    outputs = [tensor.name for tensor in program.outputs]

    def run(batches: Sequence[np.ndarray]) -> list[np.ndarray]:
        refuse_other_counts(batches, inputs)
        given = [np.ascontiguousarray(batch, dtype=np.float32) for batch in batches]
        rows = []
        for i in range(len(given[0])):
            found = carry_out({name: batch[i : i + 1] for name, batch in zip(inputs, given, strict=True)})
            rows.append([np.asarray(found[name], np.float32) for name in outputs])
        return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

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


def _converted(source: Source, precision: Precision, ios: int) -> Any:
    """The network as a coremltools MLModel that is not loaded."""
    import torch

    with quiet(native=True), torch.no_grad():
        import coremltools

        try:
            exported = torch.export.export(
                portable(source, "coreml"), source.inputs, dynamic_shapes=source.dynamic_shapes
            )
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
