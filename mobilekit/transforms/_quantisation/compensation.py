"""Rounding to int8 where the weights that are still to be rounded make up for those that are (GPTQ).

Frantar et al. 2022, arXiv:2210.17323, after Optimal Brain Surgeon: with the second moments of what a layer reads, the
best change of all other weights for the error of one is known in closed form.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mobilekit.network.grids import INT8_STEPS, int8_rounded, int8_scales
from mobilekit.network.layer_calls import Layer, out_dim
from mobilekit.transforms._criteria.subject import run
from mobilekit.transforms._quantisation.recording import layers_in_order
from mobilekit.types import Network

POSITIONS = 8192
"""Positions of all images that a layer's moments are taken from, at most."""
MOST_VALUES = 1 << 25
"""Values of these positions, with the layer's window at each: 128 MB in float32."""
FEATURES = 2304
"""Weights of an output channel that make up for each other; more than that go in parts."""
BLOCK = 128
"""Columns whose errors are handed on to all others at once."""
DAMPING = 0.01
"""Added to the moments' diagonal, as a part of its mean (the paper's)."""


def round_with_compensation(
    module: nn.Module, network: Network, inputs: torch.Tensor, only: Collection[str] | None = None
) -> nn.Module:
    """A copy whose convolutions and linear layers have weights on the runtimes' int8 grid.

    Each layer is rounded for what it reads behind layers that are rounded already, when one forward of all inputs
    (N, C, H, W) reaches it. An output channel keeps what rounding to the nearest gives it where that leaves less of an
    error on these inputs. What shifts a channel's mean is left to its bias. Transposed convolutions are rounded to
    the nearest. `module` has its batch norms folded; `only` names layers by their paths, None: all.
    """
    rounded = copy.deepcopy(module).eval()
    paths = [path for path in layers_in_order(rounded, network) if only is None or path in only]
    handles = [rounded.get_submodule(path).register_forward_pre_hook(_Once()) for path in paths]
    try:
        with torch.no_grad():
            run(rounded, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return rounded


class _Once:
    """Rounds a layer in front of its first call."""

    def __init__(self) -> None:
        self.done = False

    def __call__(self, layer: nn.Module, given: Any) -> None:
        """Write the rounded weight into the layer."""
        assert isinstance(layer, Layer)  # noqa: S101  (as `layers_in_order` found them)
        if self.done or not given:
            return
        self.done = True
        if isinstance(layer, nn.ConvTranspose2d):
            layer.weight.copy_(int8_rounded(layer.weight, out_dim(layer)))
            return
        windows = _windows(layer, given[0])
        windows -= windows.mean(dim=1, keepdim=True)
        weight = layer.weight.reshape(len(windows), -1, windows.shape[2])
        scales = int8_scales(layer.weight, 0).reshape(len(windows), -1, 1)
        parts = math.ceil(windows.shape[2] / FEATURES)
        best = [
            _rounded(some, seen.transpose(1, 2) @ seen / seen.shape[1], scales)
            for some, seen in zip(weight.chunk(parts, 2), windows.chunk(parts, 2), strict=True)
        ]
        layer.weight.copy_(torch.cat(best, dim=2).reshape(layer.weight.shape))


def _windows(layer: nn.Conv2d | nn.Linear, given: torch.Tensor) -> torch.Tensor:
    """What the layer multiplies its weights with, at drawn positions: (groups, positions, weights of one channel)."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        read = given.reshape(1, -1, given.shape[-1])
        count = min(read.shape[1], POSITIONS, max(1, MOST_VALUES // read.shape[2]))
        return read[:, torch.randperm(read.shape[1], generator=generator)[:count].sort().values]
    (height, width), (down, right) = layer.kernel_size, layer.dilation
    padded = _padded(layer, given)
    spans = [(size - 1) * apart + 1 for size, apart in ((height, down), (width, right))]
    # a view: the positions first, then the window at each
    views = padded.unfold(2, spans[0], layer.stride[0]).unfold(3, spans[1], layer.stride[1])[..., ::down, ::right]
    images, channels, rows, columns = (int(size) for size in views.shape[:4])
    positions = images * rows * columns
    most = min(positions, POSITIONS, max(1, MOST_VALUES // (channels * height * width)))
    drawn = torch.randperm(positions, generator=generator)[:most].sort().values
    # (positions, channels, height, width)
    found = views[drawn // (rows * columns), :, drawn // columns % rows, drawn % columns]
    return found.reshape(most, layer.groups, -1).movedim(1, 0).contiguous()


def _padded(layer: nn.Conv2d, given: torch.Tensor) -> torch.Tensor:
    """The input with the layer's padding around it."""
    sides: list[int] = []
    for axis in (1, 0):
        whole = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        if isinstance(layer.padding, str):
            sides += [whole // 2, whole - whole // 2] if layer.padding == "same" else [0, 0]
        else:
            sides += [int(layer.padding[axis])] * 2
    return functional.pad(given, sides, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _rounded(weight: torch.Tensor, moments: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight (groups, outputs, features) on the grid of `scales` (groups, outputs, 1).

    `moments` (groups, features, features) are those of the features without their means.
    """
    exact, moments, scales = weight.double(), moments.double(), scales.double()
    nearest = (exact / scales).round().clamp(-INT8_STEPS, INT8_STEPS)
    found = _compensated(exact, moments, scales, nearest)
    if found is None:
        return (nearest * scales).to(weight.dtype)
    errors = [_error(exact - each * scales, moments) for each in (nearest, found)]
    better = torch.where((errors[1] < errors[0])[..., None], found, nearest)
    return (better * scales).to(weight.dtype)


def _compensated(
    exact: torch.Tensor, moments: torch.Tensor, scales: torch.Tensor, nearest: torch.Tensor
) -> torch.Tensor | None:
    """Whole steps, column by column, each column's error handed on to those that follow; None: moments are singular."""
    diagonal = moments.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1)
    damping = torch.where(mean > 0, DAMPING * mean, torch.ones_like(mean))
    # what varies most has most to lose, and is rounded while many others can make up for it
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    sorted_ = moments.gather(1, order[:, :, None].expand_as(moments)).gather(2, order[:, None].expand_as(moments))
    sorted_ = sorted_ + torch.diag_embed(damping[:, None].expand_as(diagonal))
    lower, failed = torch.linalg.cholesky_ex(sorted_)
    if bool(failed.any()) or not bool(lower.isfinite().all()):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if bool(failed.any()):
        return None
    columns = order[:, None].expand_as(exact)
    rest, whole = exact.gather(2, columns), nearest.gather(2, columns)
    # the largest magnitudes hold the grid in place, so that an exporter finds the same one
    held = (rest / scales).abs() > INT8_STEPS - 0.01
    for begin in range(0, rest.shape[2], BLOCK):
        end = min(begin + BLOCK, rest.shape[2])
        errors = torch.zeros_like(rest[:, :, begin:end])
        for at in range(begin, end):
            here = slice(at, at + 1)
            steps = (rest[:, :, here] / scales).round().clamp(-INT8_STEPS, INT8_STEPS)
            steps = torch.where(held[:, :, here], whole[:, :, here], steps)
            whole[:, :, here] = steps
            error = (rest[:, :, here] - steps * scales) / upper[:, here, here]
            rest[:, :, at + 1 : end] -= error * upper[:, here, at + 1 : end]
            errors[:, :, at - begin : at - begin + 1] = error
        rest[:, :, end:] -= errors @ upper[:, begin:end, end:]
    return torch.empty_like(whole).scatter(2, columns, whole)


def _error(change: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each output that a change of the weights makes: (groups, outputs)."""
    return ((change @ moments) * change).sum(dim=2)
