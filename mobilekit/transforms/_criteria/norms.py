"""Criteria that look at the filters alone: L1 and L2 norms, distance from the geometric median.

A coupled group (a residual stream, say) is written by several weights: a channel's score is the sum over them, each
relative to its weight's mean, so that no layer outvotes the others by its scale.
"""

from __future__ import annotations

import torch

from mobilekit.transforms._criteria.subject import Subject


def l1(subject: Subject) -> torch.Tensor:
    """Sum of the absolute weights of each filter (Li et al. 2016, arXiv:1608.08710)."""
    return _summed([weights.abs().sum(dim=1) for weights in subject.filters])


def l2(subject: Subject) -> torch.Tensor:
    """Euclidean norm of each filter (the other norm of Li et al. 2016, arXiv:1608.08710)."""
    return _summed([weights.norm(dim=1) for weights in subject.filters])


def geometric_median(subject: Subject) -> torch.Tensor:
    """Sum of each filter's distances to all others (FPGM, He et al. 2019, arXiv:1811.00250).

    Filters near the geometric median can be represented by the others and go first. Every filter of one weight is
    compared as a whole, and the distances are computed without the cancellation of the expanded square.
    """
    exact = "donot_use_mm_for_euclid_dist"
    return _summed([torch.cdist(weights, weights, compute_mode=exact).sum(dim=1) for weights in subject.filters])


def _summed(figures: list[torch.Tensor]) -> torch.Tensor:
    tiny = torch.finfo(torch.float64).tiny
    return torch.stack([figure / figure.mean().clamp(min=tiny) for figure in figures]).sum(dim=0)
