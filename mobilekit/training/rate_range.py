"""The learning rate that a network can take as it is: a short exponential sweep (Smith 2017, arXiv:1506.01186)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mobilekit.training.hooks import Loss
from mobilekit.training.job import Recipe
from mobilekit.training.optimiser import optimiser, parameter_groups, set_rate

LOWEST, HIGHEST = 1e-5, 0.3
"""Ends of the sweep."""
FEWEST, MOST = 16, 40
"""Steps of a sweep."""
BATCHES = 8
"""Different batches in it: a loss is compared with that of the same batch at the start, so that they do not matter."""
RISE = 1.25
"""The loss has begun to rise when it is this many times its least."""
BELOW = {"adamw": 12, "sgd": 6}
"""How far below that rate the choice lies."""
SANE = {"adamw": (1e-4, 1e-2), "sgd": (1e-3, 5e-2)}
"""Least and greatest choice."""


@dataclass(frozen=True)
class Swept:
    """The rate that was chosen, and why, in words."""

    rate: float
    note: str


def sweep(
    module: nn.Module, objective: Loss, batches: Sequence[tuple[Any, Any]], recipe: Recipe, seconds: float
) -> Swept:
    """Train a copy with rates from 1e-5 to 0.3 until the loss rises, and choose a rate that far below (`BELOW`).

    The choice stays within `SANE`. The module is in the mode that it is trained in; hooks take no part.
    Where `seconds` hold fewer than 16 steps it is the recipe's own rate. The same number of steps gives the same rate.
    """
    module = copy.deepcopy(module)
    chosen = optimiser(parameter_groups(module, recipe), recipe)
    first: dict[int, float] = {}
    steps, smooth, least = MOST, 1.0, 1.0
    started = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        for step in range(MOST):
            if step == 2:
                steps = int(min(MOST, seconds / ((time.monotonic() - started) / 2)))
                if steps < FEWEST:
                    return Swept(recipe.learning_rate, "the usual one: too little time to look for it")
            if step >= steps:
                break
            rate = LOWEST * (HIGHEST / LOWEST) ** (step / (steps - 1))
            place = step % min(len(batches), max(1, steps // 5))
            set_rate(chosen, rate)
            loss = _step(objective(module, *batches[place]), chosen, recipe.clip)
            level = first.setdefault(place, loss)
            ratio = (loss + 1e-8) / (level + 1e-8)
            smooth = 0.6 * smooth + 0.4 * ratio
            if not smooth <= RISE * least:  # true for what is no number too
                note = f"1/{BELOW[recipe.optimiser]} of {rate:.1e}, where the loss began to rise"
                return _chosen(rate, recipe, note)
            least = min(least, smooth)
    return _chosen(HIGHEST, recipe, "no rate made the loss rise")


def _step(loss: torch.Tensor, chosen: torch.optim.Optimizer, clip: float) -> float:
    """The loss before the step."""
    value = float(loss.detach())
    if math.isfinite(value):
        chosen.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for group in chosen.param_groups for p in group["params"]], clip)
        chosen.step()
    return value


def _chosen(rose: float, recipe: Recipe, note: str) -> Swept:
    low, high = SANE[recipe.optimiser]
    return Swept(min(high, max(low, rose / BELOW[recipe.optimiser])), note)
