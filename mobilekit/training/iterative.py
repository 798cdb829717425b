"""Iterative pruning: a small step, fine-tuning, and a smaller step where the accuracy does not recover.

The schedule of Han et al. 2015 (arXiv:1506.02626) and Molchanov et al. 2017 (arXiv:1611.06440) with the back-off
that people do by hand. Pure control flow: what a step, a tuning and a judgement are is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from mobilekit.errors import BadInputError, UnsupportedError

C = TypeVar("C")


@dataclass(frozen=True)
class Limits:
    """How large the steps are and when to stop.

    `first` and `smallest` are amounts in the unit that the caller's step takes; a step that fails is tried again
    with `back_off` times its amount. At most `attempts` steps are tried.
    """

    first: float
    smallest: float
    back_off: float = 0.5
    attempts: int = 20


@dataclass(frozen=True)
class Attempt:
    """One step: its amount, the score after tuning (None: the step was refused), and what became of it."""

    amount: float
    score: float | None
    accepted: bool
    reason: str


@dataclass(frozen=True)
class Pruned(Generic[C]):
    """The candidate after the last accepted step (the start where none was), its score, and every attempt."""

    best: C
    score: float
    reference: float
    """Score of the start, which the tolerance counts from."""
    history: tuple[Attempt, ...]
    stopped: str
    """Why no further step was tried, in a sentence."""


def prune_iteratively(
    start: C,
    step: Callable[[C, float], C],
    tune: Callable[[C], C],
    judge: Callable[[C], float],
    tolerance: float,
    limits: Limits,
) -> Pruned[C]:
    """Prune step by step while the judged score stays within `tolerance` of the start's.

    `step(candidate, amount)` gives a smaller candidate and may raise UnsupportedError where it cannot go so far;
    `tune` wins accuracy back; `judge` gives a score, higher is better. None of them may change its candidate.
    A rejected step costs its tuning and nothing else: the next, smaller one begins at the last accepted candidate.
    Raises BadInputError for limits that make no sense, and where the start's score is not finite.
    """
    _check(tolerance, limits)
    best, reference = start, judge(start)
    if not math.isfinite(reference):
        raise BadInputError(f"the score of the network at the start is {reference}: nothing can be compared with it")
    score, amount = reference, limits.first
    history: list[Attempt] = []
    while amount >= limits.smallest and len(history) < limits.attempts:
        try:
            smaller = step(best, amount)
        except UnsupportedError as error:
            history.append(Attempt(amount, None, accepted=False, reason=str(error)))
            amount *= limits.back_off
            continue
        tuned = tune(smaller)
        found = judge(tuned)
        accepted = found >= reference - tolerance  # false for a score that is not a number
        lost = f"the score is {found:g}, the start's {reference:g}, and {tolerance:g} may be lost"
        history.append(Attempt(amount, found, accepted, lost))
        if accepted:
            best, score = tuned, found
        else:
            amount *= limits.back_off
    if amount < limits.smallest:
        stopped = f"the next step of {amount:g} would be smaller than the smallest, {limits.smallest:g}"
    else:
        stopped = f"all {limits.attempts} attempts are used"
    return Pruned(best, score, reference, tuple(history), stopped)


def _check(tolerance: float, limits: Limits) -> None:
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise BadInputError(f"the tolerance is {tolerance}: it must be zero or more")
    if not (math.isfinite(limits.first) and 0 < limits.smallest <= limits.first):
        raise BadInputError(f"the steps go from {limits.first} to {limits.smallest}: the first must be the larger one")
    if not 0 < limits.back_off < 1:
        raise BadInputError(f"the back-off is {limits.back_off}: it must lie between 0 and 1")
    if limits.attempts < 1:
        raise BadInputError(f"{limits.attempts} attempts were allowed: one is the least")
