"""One training of the story in one process or many: its batches, its checkpoints, and who does what.

Started by `accelerate launch`, the same command trains in all its processes: `together` lets the first one tell the
story, and the others only join its trainings and leave with exit code 0. Plans, files, checkpoints and measurements
are the first one's alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mobilekit import registry
from mobilekit.errors import MobilekitError
from mobilekit.network import trace
from mobilekit.pipeline.lessons import Lessons, lessons_of
from mobilekit.pipeline.request import Job
from mobilekit.pipeline.run import Run
from mobilekit.training.distillation import Mix, distil, sized_by_time
from mobilekit.training.job import Recipe, State, Trained, TrainingJob
from mobilekit.training.keeping import copied
from mobilekit.training.quantisation_aware import Rounding, fake_quantised
from mobilekit.training.workers import Workers, connected
from mobilekit.transforms import int8
from mobilekit.types import Calibration, Candidate, Option

Stage = Literal["training", "int8 training"]
RATES: dict[Stage, float] = {"training": 3e-3, "int8 training": 3e-4}
"""Learning rates where there is no time to look for one."""
ECHO = 2
"""Uses of each batch: with more the samples become too few, with one the teacher takes nearly half of the time."""
WITH_LABELS: dict[str, Any] = {"optimiser": "sgd", "learning_rate": 0.05, "weight_decay": 5e-4}
"""The recipe of a training with labels, which uses each batch once."""
TEACHER_BESIDE_LABELS = 0.5
Remaining = Callable[[str, float], None]
"""Called with a stage's name and the seconds that it still takes."""


@dataclass(frozen=True)
class Lesson:
    """One training: what starts it, how long it takes, who judges it."""

    stage: Stage
    candidate: Candidate
    seconds: float
    judge: Callable[[nn.Module], float]
    review: Callable[[nn.Module], float] | None = None


@dataclass(frozen=True)
class _Orders:
    """What the first process tells the others before a training."""

    stage: Stage
    options: tuple[Option, ...]
    weights: State
    seconds: float
    reviewed: bool


@dataclass(frozen=True)
class Teaching:
    """The trainings of one run, in its first process."""

    run: Run
    lessons: Lessons
    remaining: Remaining

    def distil(self, lesson: Lesson) -> Trained:
        """Train a copy of the candidate's module (`student_of`) to match the original.

        A killed one goes on from its checkpoint. Raises MobilekitError as `training.distillation.distil` does.
        """
        job, workers = self.run.job, connected()
        student = student_of(job, lesson.stage, lesson.candidate)
        workers.agreed(
            _Orders(
                lesson.stage,
                lesson.candidate.history,
                copied(lesson.candidate.module.state_dict()),
                lesson.seconds,
                lesson.review is not None,
            )
        )
        return _distilled(job, student, lesson.stage, self._training_job(lesson, workers))

    def _training_job(self, lesson: Lesson, workers: Workers) -> TrainingJob:
        run, stage = self.run, lesson.stage
        whole = lesson.seconds

        def review(module: nn.Module) -> float:
            nonlocal whole
            assert lesson.review is not None  # noqa: S101  (asked for where there is one)
            share = lesson.review(module)
            whole = share * lesson.seconds
            return share

        def progress(fraction: float) -> None:
            run.stages.progress(stage, fraction)
            self.remaining(stage, (1 - fraction) * whole)

        def save(state: State) -> None:
            run.store.save_tensors("training", state)
            run.store.save_stage("training-key", run.stages.key, value=stage)

        def load() -> State | None:
            same = run.store.load_stage("training-key", run.stages.key) == stage
            return run.store.load_tensors("training") if same else None

        return TrainingJob(
            batches=self.lessons.batches,
            labelled=run.job.workload.labelled,
            loss=run.job.workload.loss,
            seconds=lesson.seconds,
            seed=run.job.request.seed,
            load=load,
            save=save,
            progress=progress,
            judge=lesson.judge,
            review=None if lesson.review is None else review,
            workers=workers,
        )


def student_of(job: Job, stage: Stage, candidate: Candidate) -> nn.Module:
    """What is trained: the candidate's module, or one that rounds as its int8 file will."""
    if stage == "training":
        return candidate.module
    calibration = Calibration(job.workload.calibration)
    module = int8.for_file(candidate, calibration).module
    return fake_quantised(module, candidate.network, calibration, Rounding(layers=int8.layers_in_int8(candidate)))


def _distilled(job: Job, student: nn.Module, stage: Stage, training: TrainingJob) -> Trained:
    if stage == "training" and training.labelled:
        recipe: Recipe = sized_by_time(find_rate=True, **WITH_LABELS)
    else:
        recipe = sized_by_time(learning_rate=RATES[stage], find_rate=True, echo=ECHO)
    return distil(student, job.workload.module, training, Mix(teacher=TEACHER_BESIDE_LABELS), recipe)


# ---------------------------------------------------------------- several processes


@contextmanager
def together(job: Job) -> Iterator[None]:
    """Tell a story in the first process; the others train with it until it ends, and end there themselves.

    Raises SystemExit(0) in the others when the story is over.
    """
    workers = connected()
    if workers.rank > 0:
        _follow(job, workers)
        sys.exit(0)
    try:
        yield
    finally:
        workers.agreed(None)


def _follow(job: Job, workers: Workers) -> None:
    """Join every training of the first process; it judges, keeps and reports."""
    workload = job.workload
    lessons = lessons_of(workload)
    network = trace(workload.module, workload.example_input, workload.name)
    while True:
        orders: _Orders | None = workers.agreed(None)
        if orders is None:
            return
        candidate = workload.candidate(network)
        for option in orders.options:
            candidate = registry.transform(option.transform).apply(candidate, option)
        candidate.module.load_state_dict(orders.weights)
        training = TrainingJob(
            batches=lessons.batches,
            labelled=workload.labelled,
            loss=workload.loss,
            seconds=orders.seconds,
            seed=job.request.seed,
            load=lambda: None,
            save=lambda _: None,
            progress=lambda _: None,
            judge=lambda _: math.nan,
            review=(lambda _: 1.0) if orders.reviewed else None,
            workers=workers,
        )
        try:
            _distilled(job, student_of(job, orders.stage, candidate), orders.stage, training)
        except MobilekitError:
            continue  # the first process fails alike, and says so
