"""Convolutions and pools of ML Programs, over one, two or three spatial axes.

Sources: coremltools/converters/mil/mil/ops/defs, iOS15/conv.py and pool.py, iOS17/conv.py, and `aggregated_pad` and
`spatial_dimensions_out_shape` of _utils.py. Where a stride is not 1, the sentence there that derives `same` pads from
the kernel alone contradicts those functions; they are TensorFlow's, whose graphs are converted to `same` as they are,
and they are what is followed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mobilekit.runtimes._mil_table import Arguments, Table

OPERATORS = Table()
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
Pads = list[tuple[int, int]]
"""Before and after, for each spatial axis."""


def spans(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Input elements from the first to the last that a window reads."""
    return [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]


def divided(total: int, kind: str) -> tuple[int, int]:
    """A total padding before and after; an odd one is larger after, with `same_lower` before."""
    smaller = total // 2
    return (total - smaller, smaller) if kind == "same_lower" else (smaller, total - smaller)


def pads_of(given: Arguments, sizes: Sequence[int], windows: Sequence[int], strides: Sequence[int]) -> Pads:
    """The pads of a convolution or pool; `same` is as much as ceil(size / stride) results need."""
    kind = given.text("pad_type", "valid")
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom":
        pad = given.integers("pad", [0] * 2 * len(sizes))
        return [(pad[2 * i], pad[2 * i + 1]) for i in range(len(sizes))]
    if kind not in ("same", "same_lower"):
        raise ValueError(f"the pad_type {kind} is unknown")
    totals = [
        max((math.ceil(size / stride) - 1) * stride + window - size, 0)
        for size, window, stride in zip(sizes, windows, strides, strict=True)
    ]
    return [divided(total, kind) for total in totals]


def padded(x: torch.Tensor, pads: Pads, value: float = 0.0) -> torch.Tensor:
    """The tensor with a constant around its spatial axes; negative pads cut it."""
    if not any(map(any, pads)):
        return x
    return F.pad(x, [amount for pair in reversed(pads) for amount in pair], value=value)


@OPERATORS.operator("conv", "x weight bias strides pad_type pad dilations groups")
def conv(given: Arguments) -> torch.Tensor:
    """Convolution (N, C, *D) by (C_out, C / groups, *K), zeros around the input."""
    x, weight = given.tensor(), given.tensor("weight")
    axes = x.ndim - 2
    strides, dilations = given.integers("strides", [1] * axes), given.integers("dilations", [1] * axes)
    pads = pads_of(given, x.shape[2:], spans(weight.shape[2:], dilations), strides)
    inside = [before if before == after else 0 for before, after in pads]
    if any(before != after for before, after in pads):
        x, inside = padded(x, pads), [0] * axes
    groups = given.integer("groups", 1)
    return CONVOLUTIONS[axes](x, weight, given.optional("bias"), strides, inside, dilations, groups)


@OPERATORS.operator("conv_transpose", "x weight bias strides pad_type pad dilations groups output_shape")
def conv_transpose(given: Arguments) -> torch.Tensor:
    """Transposed convolution (N, C, *D) by (C, C_out / groups, *K).

    Of everything that input elements reach, `pad` elements are cut off before, and the rest is cut, or continued with
    zeros, to the length asked for; the bias is added last.
    """
    x, weight, bias = given.tensor(), given.tensor("weight"), given.optional("bias")
    axes = x.ndim - 2
    strides, dilations = given.integers("strides", [1] * axes), given.integers("dilations", [1] * axes)
    full = TRANSPOSED[axes](x, weight, None, strides, 0, 0, given.integer("groups", 1), dilations)
    kind, pad = given.text("pad_type", "valid"), given.integers("pad", [0] * 2 * axes)
    wanted = given.integers("output_shape")[2:] if "output_shape" in given else None
    cuts = []
    for i, (size, length) in enumerate(zip(x.shape[2:], full.shape[2:], strict=True)):
        if kind in ("same", "same_lower"):
            out = wanted[i] if wanted else size * strides[i]
            before = divided(max(length - out, 0), kind)[0]
        else:
            before, after = (pad[2 * i], pad[2 * i + 1]) if kind == "custom" else (0, 0)
            out = wanted[i] if wanted else length - before - after
        cuts.append((-before, out + before - length))
    result = padded(full, cuts)
    return result if bias is None else result + bias.reshape(-1, *[1] * axes)


@dataclass(frozen=True)
class _Windows:
    """Where the windows of a pool lie."""

    kernel: list[int]
    strides: list[int]
    pads: Pads
    overhang: Pads
    """How far the last windows reach beyond the padded input (ceil_mode), as pads after; negative: never read."""


def _windows(given: Arguments) -> _Windows:
    sizes = given.tensor().shape[2:]
    kernel = given.integers("kernel_sizes")
    strides = given.integers("strides", [1] * len(kernel))
    pads = pads_of(given, sizes, kernel, strides)
    overhang: Pads = []
    for size, window, stride, (before, after) in zip(sizes, kernel, strides, pads, strict=True):
        length = size + before + after
        count = (length - window) // stride + 1
        if given.flag("ceil_mode"):
            count = (length - window + stride - 1) // stride + 1
            # PyTorch's rule: the last window must begin inside the input or the padding before it.
            if (count - 1) * stride >= size + before and before + after > 0:
                count -= 1
        overhang.append((0, (count - 1) * stride + window - length))
    return _Windows(kernel, strides, pads, overhang)


@OPERATORS.operator("max_pool", "x kernel_sizes strides pad_type pad ceil_mode")
def max_pool(given: Arguments) -> torch.Tensor:
    """Largest element of each window; what lies outside of the input is never the largest."""
    windows = _windows(given)
    x = given.tensor()
    for pads in (windows.pads, windows.overhang):
        x = padded(x, pads, -math.inf)
    return MAX_POOLS[x.ndim - 2](x, windows.kernel, windows.strides)


@OPERATORS.operator("avg_pool", "x kernel_sizes strides pad_type pad ceil_mode exclude_padding_from_average")
def avg_pool(given: Arguments) -> torch.Tensor:
    """Mean of each window; padding counts as zeros or not at all, and what lies beyond it never counts (PyTorch)."""
    windows = _windows(given)
    x = given.tensor()
    axes = x.ndim - 2
    mean = AVERAGE_POOLS[axes]
    total = mean(padded(padded(x, windows.pads), windows.overhang), windows.kernel, windows.strides)
    inside = torch.ones(1, 1, *x.shape[2:])
    counted = padded(inside, windows.pads, 0.0 if given.flag("exclude_padding_from_average") else 1.0)
    share = mean(padded(counted, windows.overhang), windows.kernel, windows.strides)
    return total if bool((share == 1).all()) else total / share
