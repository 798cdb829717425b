"""Resized, cropped and padded maps of ML Programs.

Sources: coremltools/converters/mil/mil/ops/defs, image_resizing.py of iOS15 to iOS17 and iOS15/tensor_operation.py
(pad). The grids of bilinear sampling are documented there. That of nearest neighbours is not: the element that
contains the left edge of the wanted one is taken, as in PyTorch and TensorFlow, whose operators are converted to it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from mobilekit.runtimes._mil_table import Arguments, Table

OPERATORS = Table()


def grid(mode: str, size: int, wanted: int) -> torch.Tensor:
    """Points of the input, between 0 and size - 1, at which `wanted` values are read. Raises KeyError for a new mode.

    UNALIGN_CORNERS is known elsewhere as half-pixel centres, DEFAULT as neither that nor aligned corners.
    """
    index = torch.arange(wanted, dtype=torch.float64)
    if mode == "ALIGN_CORNERS" and wanted == 1:
        return torch.tensor([(size - 1) / 2], dtype=torch.float64)
    step = max(1, size - 1) / wanted
    points = {
        "STRICT_ALIGN_CORNERS": index * ((size - 1) / max(wanted - 1, 1)),
        "ALIGN_CORNERS": index * ((size - 1) / max(wanted - 1, 1)),
        "DEFAULT": index * (size / wanted),
        "OFFSET_CORNERS": (index + 0.5) * step,
        "UNALIGN_CORNERS": (index + 0.5) * (size / wanted) - 0.5,
    }[mode]
    return points.clamp(0, size - 1)


def linear(x: torch.Tensor, axis: int, points: torch.Tensor) -> torch.Tensor:
    """Values between elements of an axis."""
    lower = points.floor().long()
    upper = (lower + 1).clamp(max=x.shape[axis] - 1)
    shape = [1] * x.ndim
    shape[axis] = -1
    weight = (points - lower).to(torch.float32).reshape(shape)
    first = x.index_select(axis, lower)
    return first + weight * (x.index_select(axis, upper) - first)


def nearest(x: torch.Tensor, axis: int, wanted: int) -> torch.Tensor:
    """Element floor(i * size / wanted) for each i, in exact arithmetic."""
    return x.index_select(axis, torch.arange(wanted) * x.shape[axis] // wanted)


def _scaled_sizes(given: Arguments) -> dict[int, int]:
    """Axis -> floor(size * factor), with the factor in float32 as the file's type inference has it."""
    x = given.tensor()
    factors = {-2: given.number("scale_factor_height", 1.0), -1: given.number("scale_factor_width", 1.0)}
    return {axis: int(np.floor(np.float32(factor) * np.float32(x.shape[axis]))) for axis, factor in factors.items()}


def _target_sizes(given: Arguments) -> dict[int, int]:
    return {-2: given.integer("target_size_height", 1), -1: given.integer("target_size_width", 1)}


def _nearest(x: torch.Tensor, sizes: dict[int, int]) -> torch.Tensor:
    for axis, wanted in sizes.items():
        x = nearest(x, axis, wanted)
    return x


def _bilinear(x: torch.Tensor, sizes: dict[int, int], mode: str) -> torch.Tensor:
    for axis, wanted in sizes.items():
        x = linear(x, axis, grid(mode, x.shape[axis], wanted))
    return x


@OPERATORS.operator("upsample_nearest_neighbor", "x scale_factor_height scale_factor_width")
def upsample_nearest_neighbor(given: Arguments) -> torch.Tensor:
    """The last two axes longer by factors."""
    return _nearest(given.tensor(), _scaled_sizes(given))


@OPERATORS.operator("resize_nearest_neighbor", "x target_size_height target_size_width")
def resize_nearest_neighbor(given: Arguments) -> torch.Tensor:
    """The last two axes of the lengths asked for."""
    return _nearest(given.tensor(), _target_sizes(given))


@OPERATORS.operator("upsample_bilinear", "x scale_factor_height scale_factor_width align_corners half_pixel_centers")
def upsample_bilinear(given: Arguments) -> torch.Tensor:
    """The last two axes longer by factors, which are computed again from the rounded lengths."""
    aligned = given.flag("align_corners", True)
    centres = given.flag("half_pixel_centers", not aligned)
    if aligned and centres:
        raise ValueError("aligned corners and half-pixel centres exclude each other")
    mode = "STRICT_ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS" if centres else "DEFAULT"
    return _bilinear(given.tensor(), _scaled_sizes(given), mode)


@OPERATORS.operator("resize_bilinear", "x target_size_height target_size_width sampling_mode")
def resize_bilinear(given: Arguments) -> torch.Tensor:
    """The last two axes of the lengths asked for."""
    return _bilinear(given.tensor(), _target_sizes(given), given.text("sampling_mode", "DEFAULT"))


@OPERATORS.operator("resize", "x shape resized_dims interpolation_mode sampling_mode")
def resize(given: Arguments) -> torch.Tensor:
    """The last `resized_dims` axes of the lengths asked for, where 0 means: as it was.

    Nearest neighbours have sampling mode DEFAULT only: where others would look is not documented.
    """
    x, count, mode = given.tensor(), given.integer("resized_dims"), given.text("sampling_mode", "DEFAULT")
    asked = given.integers("shape")[-count:]
    sizes = {axis: size or x.shape[axis] for axis, size in zip(range(-count, 0), asked, strict=True)}
    if given.text("interpolation_mode", "LINEAR") == "LINEAR":
        return _bilinear(x, sizes, mode)
    if mode != "DEFAULT":
        raise ValueError(f"nearest neighbours in sampling mode {mode} are not documented")
    return _nearest(x, sizes)


@OPERATORS.operator("crop", "x crop_height crop_width")
def crop(given: Arguments) -> torch.Tensor:
    """The last two axes without so many elements before and after."""
    (top, bottom), (left, right) = given.integers("crop_height"), given.integers("crop_width")
    return F.pad(given.tensor(), [-left, -right, -top, -bottom])


@OPERATORS.operator("pad", "x pad mode constant_val")
def pad(given: Arguments) -> torch.Tensor:
    """The last axes with elements before and after: a constant, a mirror image without the edge, or the edge."""
    x, amounts, mode = given.tensor(), given.integers("pad"), given.text("mode", "constant")
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    if mode == "constant":
        value = given.number("constant_val", 0.0)
        return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=value)
    for axis, (before, after) in zip(range(-len(pairs), 0), pairs, strict=True):
        size = x.shape[axis]
        index = torch.arange(-before, size + after)
        if mode == "reflect":
            if max(before, after) >= size:
                raise ValueError(f"a mirror image of {size} elements is shorter than {max(before, after)}")
            index = (size - 1) - (index.abs() - (size - 1)).abs()
        elif mode != "replicate":
            raise ValueError(f"the padding mode {mode} is unknown")
        x = x.index_select(axis, index.clamp(0, size - 1))
    return x
