"""Values that quantised weights may take: int8 as the runtimes round, k bits, ternary and binary."""

from __future__ import annotations

from typing import Literal

import torch

INT8_STEPS = 127
TERNARY_THRESHOLD = 0.7
"""Times the mean magnitude: below it a ternary weight is zero (Li, Zhang, Liu 2016, arXiv:1605.04711)."""
SEARCHED = 40
"""Scales that are tried for a k-bit grid, from the largest magnitude down to a fifth of it."""
REFINED = 4

Grid = int | Literal["ternary", "binary"]
"""Bits (2 to 8), or one of the two grids with values of their own."""


def int8_scales(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Step of each output channel (along `dim`) on the runtimes' int8 grid: largest magnitude / 127.

    One for a channel of zeros.
    """
    scales = _rows(weight, dim).abs().amax(dim=1) / INT8_STEPS
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def along(values: torch.Tensor, weight: torch.Tensor, dim: int) -> torch.Tensor:
    """One value a channel, in a shape that broadcasts over the weight."""
    return values.reshape([-1 if axis == dim else 1 for axis in range(weight.ndim)])


def int8_rounded(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """The weight rounded to the nearest value of its int8 grid."""
    scales = along(int8_scales(weight, dim), weight, dim)
    return (weight / scales).round().clamp(-INT8_STEPS, INT8_STEPS) * scales


def snapped(weight: torch.Tensor, dim: int, grid: Grid) -> torch.Tensor:
    """The weight on a coarse grid with a scale for each output channel (along `dim`).

    k bits: whole multiples of a step from -(2^(k-1) - 1) to 2^(k-1) - 1 of them, with the step of the least squared
    error among 40 that are tried and refined (with 6 bits and more, a lucky step may do up to a fifth better).
    "ternary": minus a scale, zero and the scale (TWN, Li, Zhang, Liu 2016, arXiv:1605.04711): zero below 0.7 times
    the mean magnitude, and the scale is the mean magnitude of the rest. "binary": the sign times the mean magnitude
    (XNOR-Net, Rastegari et al. 2016, arXiv:1603.05279); zero counts as positive.
    """
    rows = _rows(weight, dim)
    if grid == "binary":
        signs = torch.where(rows >= 0, torch.ones_like(rows), -torch.ones_like(rows))
        found = signs * rows.abs().mean(dim=1, keepdim=True)
    elif grid == "ternary":
        kept = (rows.abs() > TERNARY_THRESHOLD * rows.abs().mean(dim=1, keepdim=True)).to(rows.dtype)
        scale = (rows.abs() * kept).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp(min=1)
        found = rows.sign() * kept * scale
    else:
        found = _least_squares(rows, 2 ** (int(grid) - 1) - 1)
    return found.reshape(weight.movedim(dim, 0).shape).movedim(0, dim)


def _least_squares(rows: torch.Tensor, steps: int) -> torch.Tensor:
    """Every row on its best grid of `steps` steps to both sides of zero."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    best, error = torch.zeros_like(rows), rows.square().sum(dim=1, keepdim=True)
    for part in torch.linspace(1, 0.2, SEARCHED).tolist():
        scale = largest * part / steps
        for _ in range(REFINED):
            whole = (rows / scale.where(scale > 0, torch.ones_like(scale))).round().clamp(-steps, steps)
            # the best step for these whole numbers; rounding again with it can only lessen the error
            scale = (rows * whole).sum(dim=1, keepdim=True) / whole.square().sum(dim=1, keepdim=True).clamp(min=1)
        found = whole * scale
        lost = (rows - found).square().sum(dim=1, keepdim=True)
        best, error = torch.where(lost < error, found, best), torch.minimum(lost, error)
    return best


def _rows(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return weight.movedim(dim, 0).flatten(1)
