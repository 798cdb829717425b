"""What a training is given, how its steps are taken, and what it tells afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from mobilekit.errors import BadInputError, MobilekitError, first_line
from mobilekit.training.workers import ALONE, Workers
from mobilekit.types import within

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainingJob:
    """What to train with.

    `batches` gives a fresh pass over the data: (input, target) pairs where `labelled`, else inputs alone.
    `load` and `save` keep the state that a killed run goes on from.
    """

    batches: Callable[[], Iterable[Any]]
    labelled: bool
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    seconds: float
    """Time to spend, within bounds on the number of steps; a resumed training goes on with what is left of it.
    Not read where the recipe fixes the number of steps."""
    seed: int
    load: Callable[[], State | None]
    save: Callable[[State], None]
    progress: Callable[[float], None]
    judge: Callable[[nn.Module], float] | None = None
    """How far a module is from what it should be, lower is better, on data that is not trained on: the best weights
    of the training, those it began with included, are the ones that are kept. None: the last ones are."""
    review: Callable[[nn.Module], float] | None = None
    """Asked once, when 0.6 of the training is over: the part of the time that it may have in all, above 0.6 to 1."""
    workers: Workers = ALONE
    """The processes that train together; batches, judgements and files are the first one's, or shared out by it."""


@dataclass(frozen=True)
class Recipe:
    """How the steps are taken. Raises BadInputError for numbers that make no sense."""

    steps: int | None = None
    """A fixed number; a resumed training then ends in the very state of an uninterrupted one. None: by time."""
    learning_rate: float = 3e-3
    """The highest: warm-up leads to it, a cosine from it to zero (Loshchilov, Hutter 2017, arXiv:1608.03983)."""
    find_rate: bool = False
    """Look for it first, in 5 % of the time (`rate_range.sweep`); `learning_rate` where that is too little."""
    echo: int = 1
    """How often each batch is used where the objective can prepare it (`echo.Echo`)."""
    optimiser: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 1e-4
    warmup: float = 0.1
    """Fraction of the training."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Factors on the learning rate of modules or parameters by path; the longest path counts, "" is all, 0 freezes."""
    fewest_steps: int = 100
    most_steps: int = 4000
    """Bounds where time decides."""
    checkpoint_seconds: float = 15.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, value in (("learning rate", self.learning_rate), ("gradient clip", self.clip)):
            if not (math.isfinite(value) and value > 0):
                raise BadInputError(f"the {name} is {value}: it must be a number above zero")
        if self.steps is not None and self.steps < 1:
            raise BadInputError(f"{self.steps} steps were asked for: one is the least")
        if self.echo < 1:
            raise BadInputError(f"each batch is to be used {self.echo} times: once is the least")
        if not 0 <= self.warmup < 1 or not 0 <= self.momentum < 1:
            raise BadInputError("the warm-up and the momentum are fractions from 0 to below 1")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise BadInputError(f"the weight decay is {self.weight_decay}: it must be zero or more")
        if self.optimiser not in ("adamw", "sgd"):
            raise BadInputError(f"'{self.optimiser}' is no optimiser: give adamw or sgd")
        wrong = [f"'{path}': {rate}" for path, rate in self.rates.items() if not (math.isfinite(rate) and rate >= 0)]
        if wrong:
            raise BadInputError(f"a factor on the learning rate must be zero or more, which {wrong[0]} is not")

    def schedule(self, fraction: float) -> float:
        """Part of the learning rate after this fraction of the training: linear warm-up, then a cosine to zero."""
        if fraction < self.warmup:
            return 0.1 + 0.9 * fraction / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (fraction - self.warmup) / (1 - self.warmup)))

    def rate(self, parameter: str) -> float:
        """The factor on the learning rate of a parameter."""
        paths = [path for path in self.rates if not path or within(parameter, path)]
        return self.rates[max(paths, key=len)] if paths else 1.0


@dataclass(frozen=True)
class Trained:
    """The trained module and what the training did."""

    module: nn.Module
    steps: int
    first_loss: float
    last_loss: float
    seconds: float = 0.0
    learning_rate: float = math.nan
    """The highest that was used, before any retreat."""
    rate_note: str = ""
    """Why this one, where it was looked for."""
    kept_step: int | None = None
    """After which step the module was as it is returned; None: nothing judged it, and it is the last one's."""
    figure: float | None = None
    """What the judge said of it, and of the module at the start."""
    start_figure: float | None = None
    warnings: tuple[str, ...] = ()


class Phases:
    """One job for several trainings in turn, each with an equal part of the time; resumed in the phase that was left.

    The kept state is that of the phase under way, with its number as `phase`. Batches of later phases begin with a
    new pass: what `TrainingJob.batches` gives must not depend on how often it was called, where a resumed run is to
    end as an uninterrupted one.
    """

    def __init__(self, job: TrainingJob, count: int) -> None:
        self.whole, self.count = job, count
        self._state = dict(job.load() or {})
        reached = self._state.pop("phase", None)
        self.reached = 0 if reached is None else int(reached)

    def over(self, index: int) -> bool:
        """The phase was finished before the run was interrupted; what it left is in the state of a later one."""
        return index < self.reached

    def job(self, index: int) -> TrainingJob:
        """The job of a phase."""

        def save(state: State) -> None:
            self.whole.save({**state, "phase": torch.tensor(index)})

        return replace(
            self.whole,
            seconds=self.whole.seconds / self.count,
            load=lambda: dict(self._state) if index == self.reached else None,
            save=save,
            progress=lambda fraction: self.whole.progress((index + fraction) / self.count),
        )


# ---------------------------------------------------------------- data


def endless(job: TrainingJob) -> Iterator[tuple[Any, Any]]:
    """Input and target (None without labels), pass after pass.

    Raises MobilekitError where a pass is empty or fails, and where labels are missing.
    """
    while True:
        empty = True
        for batch in _pass(job):
            empty = False
            yield _parts(job, batch)
        if empty:
            raise MobilekitError("the training data gave no batches")


def _pass(job: TrainingJob) -> Iterator[Any]:
    """One pass over the user's data, whose errors become one sentence."""
    try:
        yield from job.batches()
    except Exception as error:
        raise MobilekitError(f"train_data() fails: {first_line(error)}") from error


def _parts(job: TrainingJob, batch: Any) -> tuple[Any, Any]:
    if not job.labelled:
        return batch, None
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise MobilekitError(
            "train_data() must give (input, target) pairs; inputs without labels come from distillation_data()"
        )
    return batch[0], batch[1]
