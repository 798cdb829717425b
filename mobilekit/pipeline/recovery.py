"""Wins accuracy back in the minutes that the user gives: distillation, then training with rounding where int8 costs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from mobilekit import registry
from mobilekit.errors import MobilekitError, StorageError
from mobilekit.evaluate import outputs
from mobilekit.pipeline.lessons import Judgement, lessons_of
from mobilekit.pipeline.rounding import Rounding, RoundingResult, reviewer
from mobilekit.pipeline.run import Run
from mobilekit.pipeline.teaching import Lesson, Remaining, Teaching
from mobilekit.training.job import Trained
from mobilekit.training.loop import JUDGEMENTS
from mobilekit.training.workers import connected, not_started
from mobilekit.types import Candidate, Value

JUDGING = 0.05
"""Part of the time that judging may take."""
FEWEST_JUDGED, FEWEST_COMPARED = 64, 128
"""Inputs for choosing the best weights, which happens often, and for what int8 costs."""
COMPARISONS = 3
TIMED = 16
"""Inputs that the original is timed on."""
FEW_STEPS = 100


class TrainingResult(Value):
    """What the distillation did; the weights are in checkpoints/trained.safetensors."""

    steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    seconds: float = 0.0
    processes: int = 1
    learning_rate: float | None = None
    rate_note: str = ""
    kept_step: int | None = None
    """After which step the weights are as they were kept; 0: as they were before the training."""
    distance: float | None = None
    """Divergence of the outputs from the original's on the inputs that are kept back."""
    start_distance: float | None = None
    judged: int = 0
    """Inputs that are kept back and judged on."""
    warnings: tuple[str, ...] = ()

    @property
    def in_words(self) -> str:
        """For the report's conditions."""
        if not self.steps:
            return "none: nothing can be learnt from the data"
        processes = f" in each of {self.processes} processes" if self.processes > 1 else ""
        rate = f", learning rate {self.learning_rate:.1e}" + (f" ({self.rate_note})" if self.rate_note else "")
        kept = "those before it" if self.kept_step == 0 else f"those after step {self.kept_step}"
        return (
            f"{self.steps} steps{processes} in {self.seconds:.0f} s{rate}; loss {self.first_loss:.3f} to "
            f"{self.last_loss:.3f}; divergence from the original {self.start_distance:.3g} to {self.distance:.3g} on "
            f"{self.judged} inputs that were kept back, weights kept: {kept}"
        )


@dataclass(frozen=True)
class Recovered:
    """What was done to win accuracy back; None: not that."""

    training: TrainingResult | None = None
    rounding: RoundingResult | None = None
    warnings: tuple[str, ...] = field(default=())
    """For the report."""

    @property
    def conditions(self) -> dict[str, str]:
        """What was done, in words, for the report and for people who wait."""
        said = {"training": self.training, "loss by int8": self.rounding}
        return {name: each.in_words for name, each in said.items() if each is not None}


def recover(run: Run, candidate: Candidate, remaining: Remaining) -> tuple[Candidate, Recovered]:
    """Distil from the original where the structure was changed; then see what int8 costs, and train with rounding.

    All of it takes `Request.train_seconds`. A failure is reported and leaves the network as it was before it.
    """
    levers = {registry.transform(option.transform).changes for option in candidate.history}
    structural, int8 = "structure" in levers, candidate.quant is not None
    if not run.job.request.train or not run.job.workload.trusted or not (structural or int8):
        return candidate, Recovered()
    teaching = Teaching(run, lessons_of(run.job.workload), remaining)
    if teaching.lessons.hopeless:
        nothing = TrainingResult(warnings=tuple(teaching.lessons.warnings))
        return candidate, Recovered(training=nothing if structural else None, warnings=nothing.warnings)
    judge, compare = _judgements(teaching)
    rounding = Rounding(teaching, compare, judge.distance)
    left = run.job.request.train_seconds
    training = loss_by_int8 = None
    if structural:
        lesson = Lesson("training", candidate, left, judge.distance)
        if int8:
            review = reviewer(run, candidate, compare, run.job.request.qat_drop)
            lesson = Lesson("training", candidate, left, judge.distance, review)
        candidate, training = _distilled(teaching, lesson, len(judge.inputs))
        left -= training.seconds if training is not None else left
    if int8:
        candidate, loss_by_int8 = rounding.recovered(candidate, left)
    rounded = loss_by_int8 is not None and loss_by_int8.steps > 0
    said = list(training.warnings) if training is not None else teaching.lessons.all_warnings(judged=rounded)
    said += loss_by_int8.warnings if loss_by_int8 is not None else []
    return candidate, Recovered(training, loss_by_int8, tuple(said))


def _distilled(teaching: Teaching, lesson: Lesson, judged: int) -> tuple[Candidate, TrainingResult | None]:
    run, candidate = teaching.run, lesson.candidate

    def compute() -> TrainingResult:
        trained = teaching.distil(lesson)
        run.store.save_tensors("trained", trained.module.state_dict())
        return _result(teaching, trained, judged)

    try:
        result = run.stages.run("training", TrainingResult, compute)
    except StorageError:
        raise
    except MobilekitError as error:
        run.fail("training", run.job.workload.name, error, "the files hold the compressed network without training")
        return candidate, None
    weights = run.store.load_tensors("trained")
    if weights is None:
        raise MobilekitError("checkpoints/trained.safetensors cannot be read: run again without --resume")
    candidate.module.load_state_dict(weights)
    return candidate, result


def _result(teaching: Teaching, trained: Trained, judged: int) -> TrainingResult:
    warnings = [*teaching.lessons.all_warnings(judged=True), *trained.warnings]
    if reason := not_started():
        warnings.append(reason)
    if trained.steps < FEW_STEPS:
        warnings.append(f"the training had time for {trained.steps} steps only: give more --train-minutes")
    if trained.kept_step == 0:
        warnings.append("the training made the network no better: the weights are those from before it")
    return TrainingResult(
        steps=trained.steps,
        first_loss=trained.first_loss,
        last_loss=trained.last_loss,
        seconds=trained.seconds,
        processes=connected().count,
        learning_rate=trained.learning_rate,
        rate_note=trained.rate_note,
        kept_step=trained.kept_step,
        distance=trained.figure,
        start_distance=trained.start_figure,
        judged=judged,
        warnings=tuple(warnings),
    )


def _judgements(teaching: Teaching) -> tuple[Judgement, Judgement]:
    """Inputs to choose weights on, and inputs to see the cost of int8 on: as many as a part of the time can run."""
    job, held = teaching.run.job, teaching.lessons.held
    few = held[:TIMED]
    outputs(job.workload.module, few)
    started = time.monotonic()
    outputs(job.workload.module, few)
    each = (time.monotonic() - started) / len(few)
    limit = JUDGING * job.request.train_seconds / max(each, 1e-9)
    chosen = _spread(held, max(FEWEST_JUDGED, int(limit / (JUDGEMENTS + 2))))
    compared = _spread(held, max(FEWEST_COMPARED, int(limit / COMPARISONS)))
    labelled = job.workload.labelled
    first, second = (Judgement(part, outputs(job.workload.module, part), labelled) for part in (chosen, compared))
    return first, second


def _spread(inputs: torch.Tensor, count: int) -> torch.Tensor:
    """So many of the inputs, evenly taken."""
    return inputs if count >= len(inputs) else inputs[torch.linspace(0, len(inputs) - 1, count).long()]
