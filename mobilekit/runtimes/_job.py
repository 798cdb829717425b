"""What every export needs: silence, a file that appears whole, and calibration samples one at a time."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mobilekit.errors import BadInputError, UnsupportedError, first_line
from mobilekit.types import Candidate, ExportJob, Precision, Range

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def quiet(native: bool = False) -> Iterator[None]:
    """Keep a third-party call's warnings, log lines and prints away from the user; exceptions pass.

    `native` also silences what compiled code writes to the process's stdout and stderr.
    """
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            _native_silence() if native else contextlib.nullcontext(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _native_silence() -> Iterator[None]:
    """Point file descriptors 1 and 2 at nothing for a while."""
    for stream in (sys.stdout, sys.stderr):
        # What Python has not written yet would vanish with the rest. Test runners' streams may be closed.
        with contextlib.suppress(ValueError, OSError):
            stream.flush()
    kept = [(descriptor, os.dup(descriptor)) for descriptor in (1, 2)]
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor, _ in kept:
            os.dup2(nothing, descriptor)
        yield
    finally:
        for descriptor, copy in kept:
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(nothing)


MOST_SAMPLES = 256
"""Calibration samples that are used at most, evenly chosen, where a file is calibrated by itself."""
Sample = tuple[np.ndarray, ...]
"""A float32 array of batch 1 for each input of a network, in order."""


@dataclass(frozen=True)
class Source:
    """What an exporter is given: a module that returns a tensor or a tuple of tensors, its inputs, and all names."""

    network: torch.nn.Module
    """The copy of the candidate's module."""
    module: torch.nn.Module
    """The same, or the network in a `Flat`."""
    inputs: tuple[torch.Tensor, ...]
    """Of batch 1; of batch 2 where the batch is left open, or torch.export would take the 1 for a constant."""
    input_names: tuple[str, ...]
    outputs: dict[str, torch.Tensor]
    """What it gives for these inputs."""
    open_batch: bool

    @property
    def dynamic_shapes(self) -> tuple[Any, ...] | None:
        """What torch.export is told about the batch: the first axis of all inputs is one and the same."""
        import torch

        batch = torch.export.Dim("batch")
        return (tuple({0: batch} for _ in self.inputs),) if self.open_batch else None


def private_copy(job: ExportJob) -> Source:
    """A copy of the candidate's module in eval mode on the CPU with flat outputs, and its inputs cut to batch 1."""
    import copy

    import torch

    from mobilekit.signature import Flat, input_names, named_outputs

    module = copy.deepcopy(job.candidate.module).cpu()
    # The module of a torch.export program has its mode baked in and refuses.
    with contextlib.suppress(NotImplementedError):
        module.eval()
    dynamic = job.options.dynamic_batch
    inputs = tuple(value[:1].detach().cpu().float() for value in job.inputs)
    if dynamic:
        inputs = tuple(torch.cat([value, value]) for value in inputs)
    names = input_names(module, len(inputs))
    with torch.no_grad():
        try:
            result = module(*inputs)
        except Exception as error:  # the module's own; batch 1 was tried when it was loaded
            raise UnsupportedError(f"the network fails on a batch of {len(inputs[0])}: {first_line(error)}") from error
    # A Flat takes any number of inputs as one argument, as `dynamic_shapes` has it.
    flat = module if isinstance(result, torch.Tensor) and not dynamic else Flat(module).eval()
    return Source(module, flat, inputs, names, named_outputs(result, names), dynamic)


def calibration_samples(job: ExportJob, most: int | None = None) -> list[Sample]:
    """Samples of the job's calibration batches; at most `most` of them, evenly chosen.

    Raises BadInputError where there are none (int8 ranges cannot be guessed) or one has not the input's shape.
    """
    wanted = [tuple(value.shape[1:]) for value in job.inputs]
    samples: list[Sample] = []
    for batch in job.calibration:
        parts = batch if isinstance(batch, tuple) else (batch,)
        found = [part.shape[1:] for part in parts]
        if found != wanted:
            raise BadInputError(
                f"calibration samples have shape {_shown(found)}, the example input {_shown(wanted)}; "
                "give inputs of one shape"
            )
        for i in range(len(parts[0])):
            samples.append(tuple(np.ascontiguousarray(part[i : i + 1], dtype=np.float32) for part in parts))
    if not samples:
        raise BadInputError("int8 export needs calibration inputs; give calibration_data() in the workload")
    if most is None or len(samples) <= most:
        return samples
    return [samples[i] for i in np.linspace(0, len(samples) - 1, most).round().astype(int)]


def _shown(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(str(shape) for shape in shapes)


def ranges_of(job: ExportJob, module: torch.nn.Module) -> dict[str, Range]:
    """What the tensors of the module range over: as the candidate's QuantSpec says, or else over the calibration.

    Raises BadInputError as `calibration_samples`, UnsupportedError where the module cannot be traced.
    """
    import torch

    from mobilekit.network.observation import activation_ranges

    spec = job.candidate.quant if isinstance(job.candidate, Candidate) else None
    if spec is not None and spec.ranges:
        return dict(spec.ranges)
    samples = calibration_samples(job, MOST_SAMPLES)
    return activation_ranges(module, [tuple(torch.from_numpy(array) for array in sample) for sample in samples])


def telling_sample(job: ExportJob) -> Sample:
    """A sample for which no two operators compute the same: a real one, or else noise."""
    if job.calibration:
        return calibration_samples(job, 1)[0]
    random = np.random.default_rng(0)
    return tuple(random.standard_normal((1, *value.shape[1:]), dtype=np.float32) for value in job.inputs)


def refuse_other_counts(given: Sequence[object], inputs: Sequence[object]) -> None:
    """Raise BadInputError unless a session is given as many batches as its file has inputs."""
    if len(given) != len(inputs):
        raise BadInputError(f"the file takes {len(inputs)} inputs, and {len(given)} were given")


def refuse_other_weights(name: str, job: ExportJob) -> None:
    """Raise UnsupportedError where weights are to be stored in a form that only Core ML has."""
    if job.precision == "int8" and job.options.weights != "int8":
        raise UnsupportedError(f"{name} files store quantised weights as int8: {job.options.weights} is for Core ML")


def refuse_quantised_ends(name: str, job: ExportJob) -> None:
    """Raise UnsupportedError where inputs and outputs are to be int8 in a format that has them in float."""
    if job.options.io == "int8":
        raise UnsupportedError(f"{name} files take and give float32: int8 at both ends is for static TFLite int8")


def refuse_unknown(name: str, precision: Precision, precisions: tuple[Precision, ...]) -> None:
    """Raise UnsupportedError unless the runtime writes this precision."""
    if precision not in precisions:
        raise UnsupportedError(f"{name} files are written in {', '.join(precisions)}, not in {precision}")
