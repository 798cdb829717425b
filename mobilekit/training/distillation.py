"""Knowledge distillation from the original network: its outputs, its features, where it looks.

Soft targets after Hinton, Vinyals, Dean 2015 (arXiv:1503.02531), hints after FitNets (Romero et al. 2015,
arXiv:1412.6550), attention transfer after Zagoruyko and Komodakis 2017 (arXiv:1612.03928).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mobilekit.errors import BadInputError, MobilekitError, UnsupportedError, first_line
from mobilekit.training.echo import Known
from mobilekit.training.features import Hints, Watch, attention_loss, checked_points, matching_points, outputs_at
from mobilekit.training.hooks import Hook, Objective
from mobilekit.training.job import Recipe, State, Trained, TrainingJob, endless
from mobilekit.training.loop import train

__all__ = ["Distillation", "Mix", "State", "Trained", "TrainingJob", "distil", "soft_target_loss"]

TEMPERATURE = 4.0
TEACHER_WEIGHT = 0.9
"""Share of the teacher in the loss where there are labels too."""
FEWEST_STEPS, MOST_STEPS = 10, 1_000_000
"""Bounds where time decides: the minutes are the user's, but a few steps are no training."""
CHECKPOINT_SECONDS = 15.0


@dataclass(frozen=True)
class Mix:
    """What of the teacher the student is to match. Raises BadInputError for numbers that make no sense."""

    temperature: float = TEMPERATURE
    teacher: float = TEACHER_WEIGHT
    """Share of the teacher's outputs beside the labels, 0 to 1; without labels the outputs count whole."""
    hints: float = 0.0
    """Weight of the features' mean squared error, 0: none."""
    attention: float = 0.0
    """Weight of the attention maps' distance, 0: none."""
    points: tuple[str, ...] | None = None
    """Module paths whose features are compared; None: the ends of stages that both networks have."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise BadInputError(f"the temperature is {self.temperature}: it must be above zero")
        if not 0 <= self.teacher <= 1:
            raise BadInputError(f"the teacher's share of the loss is {self.teacher}: it must be from 0 to 1")
        for name, weight in (("hints", self.hints), ("attention", self.attention)):
            if not (math.isfinite(weight) and weight >= 0):
                raise BadInputError(f"the weight of {name} is {weight}: it must be zero or more")


def soft_target_loss(output: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divergence of softened classes, times the square of the temperature, so that gradients keep their size.

    Both are logits (N, classes); maps and other outputs are compared by their mean squared error.
    """
    if output.ndim != 2:
        return functional.mse_loss(output, wanted)
    divergence = functional.kl_div(
        functional.log_softmax(output / temperature, dim=1),
        functional.log_softmax(wanted / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


class Distillation(Objective):
    """The loss of a student beside its teacher, which is copied and stays as it is.

    `example` is an input (N, C, H, W), needed for hints and attention. Raises BadInputError for points that a network
    lacks, UnsupportedError where the features there cannot be compared.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        mix: Mix | None = None,
        loss: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
        example: torch.Tensor | None = None,
    ) -> None:
        self.mix, self.loss = mix or Mix(), loss or functional.cross_entropy
        self.teacher = copy.deepcopy(teacher).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.points: tuple[str, ...] = ()
        self.parts: Hints | None = None
        if not (self.mix.hints or self.mix.attention):
            return
        if example is None:
            raise BadInputError("hints and attention need an example input")
        given = self.mix.points
        chosen = matching_points(student, teacher, example) if given is None else given
        self.points = checked_points(student, teacher, chosen)
        ours, theirs = (outputs_at(module, self.points, example) for module in (student, teacher))
        for point in self.points:
            if point not in ours or point not in theirs:
                raise UnsupportedError(f"'{point}' gives no tensor in both networks that could be compared")
            if self.mix.attention:
                attention_loss(ours[point], theirs[point])
        if self.mix.hints:
            self.parts = Hints({point: ours[point] for point in self.points}, theirs)

    def prepare(self, inputs: torch.Tensor, target: Any) -> tuple[torch.Tensor, Any]:
        """A batch with the teacher's outputs; as it is where features are compared, which would be too much to keep."""
        if self.points:
            return inputs, target
        with torch.no_grad():
            return inputs, Known(target, self.teacher(inputs))

    def to(self, device: torch.device) -> None:
        """Move the teacher and the adapters."""
        super().to(device)
        self.teacher.to(device)

    def __call__(self, module: nn.Module, inputs: torch.Tensor, target: Any) -> torch.Tensor:
        """The loss of one batch."""
        theirs: dict[str, torch.Tensor] = {}
        if isinstance(target, Known):
            target, wanted = target
        else:
            with torch.no_grad(), Watch(self.teacher, self.points) as theirs:
                wanted = self.teacher(inputs)
        with Watch(module, self.points) as ours:
            output = module(inputs)
        total = soft_target_loss(output, wanted, self.mix.temperature)
        if target is not None:
            total = self.mix.teacher * total + (1 - self.mix.teacher) * self.loss(output, target)
        if self.parts is not None:
            total = total + self.mix.hints * self.parts(ours, theirs)
        if self.mix.attention:
            maps = [attention_loss(ours[point], theirs[point]) for point in self.points]
            total = total + self.mix.attention * torch.stack(maps).mean()
        return total


def sized_by_time(**settings: Any) -> Recipe:
    """A recipe whose number of steps is what the job's time holds; `settings` are other fields of it."""
    return Recipe(fewest_steps=FEWEST_STEPS, most_steps=MOST_STEPS, checkpoint_seconds=CHECKPOINT_SECONDS, **settings)


def distil(
    student: nn.Module,
    teacher: nn.Module,
    job: TrainingJob,
    mix: Mix | None = None,
    recipe: Recipe | None = None,
    hooks: Sequence[Hook] = (),
) -> Trained:
    """Train a copy of the student to match the teacher, and the labels where there are any.

    `hooks` keep what a lever made of the student: `masks.KeptMasks(Masks.of_zeros(student))` its zeros. With hints or
    attention, the first batch of a pass over the data says how the features look.

    Raises MobilekitError when the loss is no longer finite or the user's data or loss fails, and as `Distillation`.
    """
    recipe = recipe or sized_by_time()
    student = copy.deepcopy(student)
    objective = _objective(student, teacher, job, mix or Mix())
    return train(student, objective, job, recipe, hooks)


def _objective(student: nn.Module, teacher: nn.Module, job: TrainingJob, mix: Mix) -> Distillation:
    """The loss, with adapters that are the same for the same seed."""
    if not (mix.hints or mix.attention):
        return Distillation(student, teacher, mix, job.loss)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        example, _ = next(endless(job))
        try:
            return Distillation(student, teacher, mix, job.loss, example)
        except MobilekitError:
            raise
        except Exception as error:  # the user's data may not fit the networks
            raise MobilekitError(f"the features cannot be compared: {first_line(error)}") from error
