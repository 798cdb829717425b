"""What int8 costs after the training, and training with rounding where that is more than the user allows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from mobilekit.errors import MobilekitError, StorageError, UnsupportedError
from mobilekit.evaluate import SessionModule
from mobilekit.network.folding import foldable, unfolded
from mobilekit.pipeline.lessons import Judgement
from mobilekit.pipeline.run import Run
from mobilekit.pipeline.teaching import Lesson, Teaching, student_of
from mobilekit.training.quantisation_aware import settled
from mobilekit.types import Candidate, Value

SHARE = 0.3
"""Part of the time that is kept for training with rounding, where int8 costs too much."""
LEAST_SHARE = 0.05
"""Less time is not worth a training."""


class Int8Cost(Value):
    """What int8 costs on inputs that are kept back, in points of expected accuracy (`lessons.Judgement.points`)."""

    float_points: float
    int8_points: float
    samples: int
    simulated: bool
    """This machine cannot run the file: a module that rounds as it does was asked instead."""

    @property
    def drop(self) -> float:
        """Points that int8 loses."""
        return self.float_points - self.int8_points


class RoundingResult(Value):
    """What int8 costs, and what training with rounding did about it."""

    allowed: float
    cost: Int8Cost
    steps: int = 0
    learning_rate: float | None = None
    after: Int8Cost | None = None
    """With the weights that were trained with rounding; None: there was no such training."""
    kept: bool = False
    """Whether these weights are better, and were kept."""
    note: str = ""
    """Why there was no such training, where there should have been."""

    @property
    def warnings(self) -> list[str]:
        """For the report, where int8 still costs more than is allowed."""
        last = self.after if self.kept and self.after is not None else self.cost
        left = self.cost.float_points - last.int8_points
        if left <= self.allowed:
            return []
        return [
            f"int8 costs {left:.2f} points of expected accuracy on {last.samples} inputs that were kept back, more "
            f"than the {self.allowed:g} that are allowed" + (f": {self.note}" if self.note else "")
        ]

    @property
    def in_words(self) -> str:
        """For the report's conditions."""
        cost = self.cost
        said = (
            f"{cost.float_points:.2f} points of expected accuracy in float, {cost.int8_points:.2f} in int8 "
            f"({'simulated, ' if cost.simulated else ''}{cost.samples} inputs kept back); {self.allowed:g} may be lost"
        )
        if self.after is None:
            return f"{said}; not trained with rounding"
        end = "kept" if self.kept else "no better, and not kept"
        return f"{said}; {self.after.int8_points:.2f} after {self.steps} steps of training with rounding: {end}"


def reviewer(run: Run, candidate: Candidate, judgement: Judgement, allowed: float) -> Callable[[nn.Module], float]:
    """How much of its time a float training may have: all, or less where int8 costs too much as things stand."""

    def review(module: nn.Module) -> float:
        try:
            found = cost_of_int8(run, replace(candidate, module=module), judgement)
        except MobilekitError:
            return 1.0  # it will be said when the file is written
        return 1.0 - SHARE if found.drop > allowed else 1.0

    return review


def cost_of_int8(run: Run, candidate: Candidate, judgement: Judgement) -> Int8Cost:
    """Write the candidate's int8 file in the planned runtime and run it beside the module."""
    path = run.store.path("checkpoints", f"int8-check{run.job.runtime.suffix}")
    run.export(candidate, run.job.runtime, "int8", path)
    simulated = False
    try:
        rounded: nn.Module = SessionModule(run.job.runtime.open(path))
    except UnsupportedError:
        simulated, rounded = True, student_of(run.job, "int8 training", candidate)
    return Int8Cost(
        float_points=judgement.points(candidate.module),
        int8_points=judgement.points(rounded),
        samples=len(judgement.inputs),
        simulated=simulated,
    )


@dataclass(frozen=True)
class Rounding:
    """Training with rounding in the time that is left."""

    teaching: Teaching
    judgement: Judgement
    """For points: many inputs, as few of them are doubtful."""
    judge: Callable[[nn.Module], float]
    """For choosing the best weights."""

    def recovered(self, candidate: Candidate, seconds: float) -> tuple[Candidate, RoundingResult | None]:
        """The candidate with the better weights; None where int8 could not be looked at, which is reported."""
        run = self.teaching.run
        try:
            cost = run.stages.run("int8 check", Int8Cost, lambda: cost_of_int8(run, candidate, self.judgement))
        except StorageError:
            raise
        except MobilekitError as error:
            run.fail("int8 check", run.job.workload.name, error, "the loss by int8 is not known; the files tell theirs")
            return candidate, None
        found = RoundingResult(allowed=run.job.request.qat_drop, cost=cost)
        if cost.drop <= found.allowed:
            return candidate, found
        assert candidate.quant is not None  # noqa: S101  (asked for candidates in int8)
        treated, note = candidate.quant.activations, ""
        if treated != "static":
            note = f"training with rounding is for static activations, and the plan has {treated} ones"
        if seconds < LEAST_SHARE * run.job.request.train_seconds:
            note = note or "no time was left for training with rounding, give more --train-minutes"
        if note:
            return candidate, found.model_copy(update={"note": note})
        return self._trained(candidate, found, seconds)

    def _trained(self, candidate: Candidate, found: RoundingResult, seconds: float) -> tuple[Candidate, RoundingResult]:
        run = self.teaching.run
        try:
            found = run.stages.run("int8 training", RoundingResult, lambda: self._train(candidate, found, seconds))
        except StorageError:
            raise
        except MobilekitError as error:
            run.fail("int8 training", run.job.workload.name, error, "int8 files are rounded after the training instead")
            return candidate, found.model_copy(update={"note": "training with rounding failed"})
        if not found.kept:
            return candidate, found
        weights = run.store.load_tensors("rounded")
        if weights is None:
            raise MobilekitError("checkpoints/rounded.safetensors cannot be read: run again without --resume")
        module = copy.deepcopy(candidate.module)
        module.load_state_dict(weights)
        return replace(candidate, module=module), found

    def _train(self, candidate: Candidate, found: RoundingResult, seconds: float) -> RoundingResult:
        run = self.teaching.run
        trained = self.teaching.distil(Lesson("int8 training", candidate, seconds, self.judge))
        folds = foldable(candidate.module, candidate.network)
        module = unfolded(candidate.module, settled(trained.module), folds)
        after = cost_of_int8(run, replace(candidate, module=module), self.judgement)
        kept = after.int8_points > found.cost.int8_points
        if kept:
            run.store.save_tensors("rounded", module.state_dict())
        update = {"after": after, "kept": kept, "steps": trained.steps, "learning_rate": trained.learning_rate}
        return found.model_copy(update=update)
