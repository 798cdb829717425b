"""Training with weights held at zero: gradually, with regrowth, or sparse for a while only."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mobilekit.errors import BadInputError
from mobilekit.training.hooks import Hook, Loss, Objective, weights
from mobilekit.training.job import Phases, Recipe, Trained, TrainingJob
from mobilekit.training.loop import train
from mobilekit.training.masks import GrowingMasks, KeptMasks, Masks, Schedule, Sparsity, Surgery

REDENSE_RATE = 0.1
"""Factor on the learning rate where a network is made dense again (Han et al. 2016)."""


@dataclass(frozen=True)
class Sparse:
    """A module whose masked weights are exactly zero."""

    module: nn.Module
    masks: Masks
    trained: Trained
    regrown: int = 0
    """How often an entry that had been cut came back."""


def l1_penalty(module: nn.Module, strength: float) -> torch.Tensor:
    """`strength` times the sum of |w| over the weights, a scalar with a gradient.

    Raises BadInputError for a strength below zero.
    """
    _check_strength(strength)
    return strength * torch.stack([weight.abs().sum() for weight in weights(module).values()]).sum()


def _check_strength(strength: float) -> None:
    if not (math.isfinite(strength) and strength >= 0):
        raise BadInputError(f"the strength of the penalty is {strength}: it must be zero or more")


class Penalised(Objective):
    """An objective with the L1 norm of the weights added, which drives those that matter little to zero."""

    def __init__(self, objective: Loss, strength: float) -> None:
        _check_strength(strength)
        self.objective, self.strength = objective, strength
        self.parts = objective.parts if isinstance(objective, Objective) else None

    def __call__(self, module: nn.Module, inputs: torch.Tensor, target: Any) -> torch.Tensor:
        """The loss of one batch."""
        return self.objective(module, inputs, target) + l1_penalty(module, self.strength)


class _Remembered(KeptMasks):
    """Masks that are kept in the state and no longer held."""

    def attach(self, module: nn.Module) -> None:
        """Nothing is set to zero."""

    def after_step(self, step: int, fraction: float) -> None:
        """Nothing is set to zero."""


def prune_gradually(
    module: nn.Module, objective: Loss, job: TrainingJob, schedule: Schedule, recipe: Recipe | None = None
) -> Sparse:
    """Train a copy while its smallest weights are cut more and more (Zhu and Gupta 2017, arXiv:1710.01878).

    The sparsity is exact in every weight at the end. For L1 regularisation hand in `Penalised(objective, strength)`.
    Raises as `train` does, and BadInputError for a sparsity that is not from 0 to below 1.
    """
    module = copy.deepcopy(module)
    hook = GrowingMasks(module, schedule)
    trained = train(module, objective, job, recipe or Recipe(), (hook,))
    return Sparse(module, Masks(hook.kept), trained)


def prune_dynamically(
    module: nn.Module, objective: Loss, job: TrainingJob, schedule: Schedule, recipe: Recipe | None = None
) -> Sparse:
    """Train a copy by dynamic network surgery (Guo et al. 2016, arXiv:1608.04493): wrongly cut weights grow again.

    The sparsity is exact in every weight at the end. Raises as `prune_gradually` does.
    """
    module = copy.deepcopy(module)
    hook = Surgery(module, schedule)
    trained = train(module, objective, job, recipe or Recipe(), (hook,))
    return Sparse(module, Masks(hook.kept), trained, hook.regrown)


@dataclass(frozen=True)
class Redensed:
    """A dense module, better trained for having been sparse; phases that an earlier run had finished are None."""

    module: nn.Module
    masks: Masks
    """What was cut while it was sparse."""
    sparse: Sparse | None
    """The module as it was then."""
    dense: Trained


def dense_sparse_dense(
    module: nn.Module,
    objective: Loss,
    job: TrainingJob,
    sparsity: Sparsity = 0.6,
    recipe: Recipe | None = None,
    hooks: Sequence[Hook] = (),
) -> Redensed:
    """Train a copy of a trained network sparse, then dense again (Han et al. 2016, arXiv:1607.04381).

    The smallest weights are held at zero in the first half; in the second they start from zero and all weights train,
    at a tenth of the learning rate. Halves are of the job's time, or of the recipe's steps each. The first dense
    phase of the paper is the training that the network comes from. Raises as `prune_gradually` does.
    """
    module, recipe, phases = copy.deepcopy(module), recipe or Recipe(), Phases(job, 2)
    masks = Masks.smallest(module, sparsity)
    sparse = None
    if not phases.over(0):
        held = KeptMasks(masks)
        trained = train(module, objective, phases.job(0), recipe, (*hooks, held))
        masks = Masks(dict(held.kept))
        snapshot = copy.deepcopy(module)
        sparse = Sparse(snapshot, masks, replace(trained, module=snapshot))
    remembered = _Remembered(masks)
    slower = replace(recipe, learning_rate=REDENSE_RATE * recipe.learning_rate)
    dense = train(module, objective, phases.job(1), slower, (*hooks, remembered))
    return Redensed(module, Masks(dict(remembered.kept)), sparse, dense)
