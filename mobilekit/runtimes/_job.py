"""What every export needs: silence, a file that appears whole, and calibration samples one at a time."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.types import ExportJob, Precision, Range

if TYPE_CHECKING:
    import torch

MOST_SAMPLES = 256
"""Calibration samples that are used at most, evenly chosen, where a file is calibrated by itself."""


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


def private_copy(job: ExportJob) -> tuple[torch.nn.Module, torch.Tensor]:
    """A copy of the candidate's module in eval mode on the CPU, and its example input cut to batch 1."""
    import copy

    module = copy.deepcopy(job.candidate.module).cpu()
    # The module of a torch.export program has its mode baked in and refuses.
    with contextlib.suppress(NotImplementedError):
        module.eval()
    return module, job.candidate.example_input[:1].detach().cpu().float()


def calibration_samples(job: ExportJob, most: int | None = None) -> list[np.ndarray]:
    """Samples (1, C, H, W) float32 of the job's calibration batches; at most `most` of them, evenly chosen.

    Raises BadInputError where there are none (int8 ranges cannot be guessed) or one has not the input's shape.
    """
    wanted = tuple(job.candidate.example_input.shape[1:])
    for batch in job.calibration:
        if batch.shape[1:] != wanted:
            raise BadInputError(
                f"calibration samples have shape {batch.shape[1:]}, the example input {wanted}; "
                "give inputs of one shape"
            )
    samples = [
        np.ascontiguousarray(batch[i : i + 1], dtype=np.float32) for batch in job.calibration for i in range(len(batch))
    ]
    if not samples:
        raise BadInputError("int8 export needs calibration inputs; give calibration_data() in the workload")
    if most is None or len(samples) <= most:
        return samples
    return [samples[i] for i in np.linspace(0, len(samples) - 1, most).round().astype(int)]


def ranges_of(job: ExportJob, module: torch.nn.Module) -> dict[str, Range]:
    """What the tensors of the module range over: as the candidate's QuantSpec says, or else over the calibration.

    Raises BadInputError as `calibration_samples`.
    """
    import torch

    from mobilekit.network.observation import activation_ranges

    spec = job.candidate.quant
    if spec is not None and spec.ranges:
        return dict(spec.ranges)
    return activation_ranges(module, [(torch.from_numpy(sample),) for sample in calibration_samples(job, MOST_SAMPLES)])


def telling_sample(job: ExportJob) -> np.ndarray:
    """A sample (1, C, H, W) float32 for which no two operators compute the same: a real one, or else noise."""
    if job.calibration:
        return calibration_samples(job, 1)[0]
    shape = (1, *job.candidate.example_input.shape[1:])
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def refuse_unknown(name: str, precision: Precision, precisions: tuple[Precision, ...]) -> None:
    """Raise UnsupportedError unless the runtime writes this precision."""
    if precision not in precisions:
        raise UnsupportedError(f"{name} files are written in {', '.join(precisions)}, not in {precision}")
