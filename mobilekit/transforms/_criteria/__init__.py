"""Channel pruning criteria, one family a file: which channels of a coupled group stay, and how readers are re-fitted.

Importing this package needs no torch; a family is loaded when one of its criteria is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mobilekit.errors import BadInputError

if TYPE_CHECKING:
    import torch

    from mobilekit.transforms._criteria.subject import Subject

CRITERIA = {
    "l1": "norms",
    "l2": "norms",
    "geometric_median": "norms",
    "bn_scale": "batch_norm",
    "apoz": "activations",
    "taylor": "gradients",
    "lasso": "selection",
    "reconstruction": "selection",
}
"""Criterion -> the file that holds the function of this name."""
REPAIRS = ("none", "least_squares")
ALWAYS_REPAIRED = frozenset({"lasso", "reconstruction"})
"""Criteria that choose channels so that the re-fitted readers lose least: without the re-fit they mean nothing."""


def scores(subject: Subject, criterion: str) -> torch.Tensor:
    """Score of each channel, float64 (channels,): higher is more important.

    Raises UnsupportedError where the criterion cannot be used on the group, BadInputError where the weights or the
    calibration inputs are not finite.
    """
    subject.check_finite()
    family = importlib.import_module(f"mobilekit.transforms._criteria.{CRITERIA[criterion]}")
    found: torch.Tensor = getattr(family, criterion)(subject)
    if not bool(found.isfinite().all()):
        raise BadInputError(
            f"the criterion {criterion} gives no finite scores for {subject.group}: "
            "the network's weights or the calibration inputs lead to values that are not finite"
        )
    return found


def kept(subject: Subject, criterion: str) -> list[int]:
    """Indices of the `subject.width` channels that stay, ascending.

    Dead filters (every producer is exactly zero) go first under every criterion: they carry no information. Equal
    scores are decided by position, so that the choice is the same on every run.
    """
    found = scores(subject, criterion)
    found[subject.dead] = -float("inf")
    return sorted(found.argsort(descending=True, stable=True)[: subject.width].tolist())
