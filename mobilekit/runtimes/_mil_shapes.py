"""Tensors of ML Programs in another shape or order, and tensors made from a shape.

Sources: coremltools/converters/mil/mil/ops/defs, tensor_transformation.py and tensor_operation.py of iOS15 to iOS17.
depth_to_space and space_to_depth are TensorFlow's (the block's place is the slower part of the channel index),
pixel_shuffle and pixel_unshuffle PyTorch's (the faster part).
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from mobilekit.runtimes._mil_table import Arguments, Table

OPERATORS = Table()


@OPERATORS.operator("reshape", "x shape")
def reshape(given: Arguments) -> torch.Tensor:
    """The same elements: -1 is what is left, 0 the input's length at the same place counted from the end, or 1."""
    x, asked = given.tensor(), given.integers("shape")
    before = x.ndim - len(asked)
    return x.reshape(
        [size if size else (x.shape[before + i] if before + i >= 0 else 1) for i, size in enumerate(asked)]
    )


@OPERATORS.operator("reshape_like", "x ref_tensors begins ends end_masks")
def reshape_like(given: Arguments) -> torch.Tensor:
    """The same elements in a shape put together from parts of other tensors' shapes."""
    shape: list[int] = []
    parts = zip(*(given.tensors(name) for name in ("ref_tensors", "begins", "ends", "end_masks")), strict=True)
    for reference, begin, end, to_the_end in parts:
        shape += reference.shape[int(begin) : None if bool(to_the_end) else int(end)]
    return given.tensor().reshape(shape)


@OPERATORS.operator("flatten2d", "x axis")
def flatten2d(given: Arguments) -> torch.Tensor:
    """Two axes: those before `axis`, and the others."""
    x = given.tensor()
    return x.reshape(math.prod(x.shape[: given.integer("axis", 1)]), -1)


@OPERATORS.operator("expand_dims", "x axes")
def expand_dims(given: Arguments) -> torch.Tensor:
    """Axes of length one at these places of the result."""
    x, axes = given.tensor(), given.integers("axes")
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@OPERATORS.operator("squeeze", "x axes")
def squeeze(given: Arguments) -> torch.Tensor:
    """Without axes of length one: the given ones, or all."""
    x = given.tensor()
    return x.squeeze(given.integers("axes")) if "axes" in given else x.squeeze()


@OPERATORS.operator("transpose", "x perm")
def transpose(given: Arguments) -> torch.Tensor:
    """Axes in another order."""
    return given.tensor().permute(given.integers("perm"))


@OPERATORS.operator("reverse", "x axes")
def reverse(given: Arguments) -> torch.Tensor:
    """Axes (all unless given) from their ends."""
    x = given.tensor()
    return x.flip(given.integers("axes", range(x.ndim)))


@OPERATORS.operator("tile", "x reps")
def tile(given: Arguments) -> torch.Tensor:
    """Each axis so many times."""
    return given.tensor().repeat(given.integers("reps"))


@OPERATORS.operator("pixel_shuffle", "x upscale_factor")
def pixel_shuffle(given: Arguments) -> torch.Tensor:
    """(N, C f f, H, W) to (N, C, H f, W f)."""
    return F.pixel_shuffle(given.tensor(), given.integer("upscale_factor"))


@OPERATORS.operator("pixel_unshuffle", "x downscale_factor")
def pixel_unshuffle(given: Arguments) -> torch.Tensor:
    """(N, C, H f, W f) to (N, C f f, H, W)."""
    return F.pixel_unshuffle(given.tensor(), given.integer("downscale_factor"))


@OPERATORS.operator("depth_to_space", "x block_size")
def depth_to_space(given: Arguments) -> torch.Tensor:
    """(N, b b C, H, W) to (N, C, H b, W b)."""
    x, block = given.tensor(), given.integer("block_size")
    count, channels, height, width = x.shape
    blocks = x.reshape(count, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(count, channels // block**2, height * block, width * block)


@OPERATORS.operator("space_to_depth", "x block_size")
def space_to_depth(given: Arguments) -> torch.Tensor:
    """(N, C, H b, W b) to (N, b b C, H, W)."""
    x, block = given.tensor(), given.integer("block_size")
    count, channels, height, width = x.shape
    blocks = x.reshape(count, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(count, channels * block**2, height // block, width // block)


@OPERATORS.operator("sliding_windows", "x axis size stride")
def sliding_windows(given: Arguments) -> torch.Tensor:
    """Windows along an axis: their number takes its place, their elements the place after it."""
    x = given.tensor()
    axis = given.integer("axis") % x.ndim
    return x.unfold(axis, given.integer("size"), given.integer("stride", 1)).movedim(-1, axis + 1)


@OPERATORS.operator("shape", "x")
def shape_of(given: Arguments) -> torch.Tensor:
    """The lengths of all axes."""
    return torch.tensor(given.tensor().shape, dtype=torch.int32)


@OPERATORS.operator("fill", "shape value")
def fill(given: Arguments) -> torch.Tensor:
    """A tensor of one value."""
    value = given.optional("value")
    return (torch.zeros(()) if value is None else value).expand(given.integers("shape"))


@OPERATORS.operator("fill_like", "ref_tensor value")
def fill_like(given: Arguments) -> torch.Tensor:
    """A tensor of one value in another one's shape."""
    value = given.optional("value")
    return (torch.zeros(()) if value is None else value).expand(given.tensor("ref_tensor").shape)


@OPERATORS.operator("range_1d", "start end step")
def range_1d(given: Arguments) -> torch.Tensor:
    """From `start` in steps to what lies before `end`."""
    return torch.arange(*(given.tensor(name).item() for name in ("start", "end", "step")))


@OPERATORS.operator("band_part", "x lower upper")
def band_part(given: Arguments) -> torch.Tensor:
    """Matrices on the last two axes with zeros outside of a band; a negative width keeps that whole side."""
    x, lower, upper = given.tensor(), given.integer("lower", -1), given.integer("upper", -1)
    below = torch.arange(x.shape[-2]).unsqueeze(1) - torch.arange(x.shape[-1])
    outside = ((below > lower) & (lower >= 0)) | ((-below > upper) & (upper >= 0))
    return x.masked_fill(outside, 0)
