"""Trains a combination for a moment before it is judged: what training wins back differs from lever to lever."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn

from mobilekit.errors import MobilekitError
from mobilekit.pipeline.lessons import Lessons, lessons_of
from mobilekit.pipeline.run import Run
from mobilekit.pipeline.teaching import ECHO, RATES
from mobilekit.training.distillation import distil
from mobilekit.training.job import Recipe, TrainingJob
from mobilekit.types import Candidate, Network

MACS = 16 * 10**10
"""Multiply-accumulates that one trial may take, backward passes included: like a limit of time, but the same number of
steps on every machine."""
FEWEST_STEPS, MOST_STEPS = 24, 48
"""With fewer steps than these nothing is told of what training wins back: a large network gets no trial."""
BACKWARD = 2
"""A backward pass takes as much as so many forward passes."""


def tried(run: Run, original: Network, candidate: Candidate) -> tuple[nn.Module, int]:
    """A copy of the candidate's module after a short distillation, and the steps that it had; 0: it had none.

    There is none where the run does not train, where the data teach nothing, where the network is too large for it,
    and where a step of it fails: the training itself will say why.
    """
    job = run.job
    if not job.request.train or not job.workload.trusted:
        return candidate.module, 0
    lessons = lessons_of(job.workload)
    steps = (
        0 if lessons.hopeless else _steps(run, original.macs / ECHO + (1 + BACKWARD) * candidate.network.macs, lessons)
    )
    if steps < FEWEST_STEPS:
        return candidate.module, 0
    training = TrainingJob(
        batches=lessons.batches,
        labelled=job.workload.labelled,
        loss=job.workload.loss,
        seconds=0.0,
        seed=job.request.seed,
        load=dict,
        save=lambda _: None,
        progress=lambda _: None,
    )
    recipe = Recipe(steps=steps, learning_rate=RATES["training"], echo=ECHO)
    try:
        return distil(candidate.module, job.workload.module, training, recipe=recipe).module, steps
    except MobilekitError:
        return candidate.module, 0


def _steps(run: Run, macs: float, lessons: Lessons) -> int:
    """As many as the multiply-accumulates hold, at so many for each sample, by the size of the first batch."""
    try:
        first = next(islice(lessons.batches(), 1))
    except Exception:  # noqa: BLE001 -- the user's code; the training will say what is wrong with it
        return 0
    inputs = first[0] if run.job.workload.labelled and isinstance(first, tuple | list) else first
    if not isinstance(inputs, torch.Tensor):
        return 0
    return min(MOST_STEPS, int(MACS / max(1.0, len(inputs) * macs)))
