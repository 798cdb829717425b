"""Quantised, palettised and sparse values of ML Programs, and how they become numbers again.

Sources: coremltools/converters/mil/mil/ops/defs, iOS16/constexpr_ops.py, iOS17/quantization_ops.py and
iOS18/compression.py. An operation that stores its weights so is carried out once, when the file is opened.
"""

from __future__ import annotations

import math

import torch

from mobilekit.runtimes._mil_program import unpacked
from mobilekit.runtimes._mil_table import Arguments, Table

OPERATORS = Table()
LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}


def along(values: torch.Tensor, like: torch.Tensor, axis: int | None) -> torch.Tensor:
    """A scalar, or a vector with an entry for each index of `axis`, so that it broadcasts against `like`."""
    if values.ndim == 0 or axis is None:
        return values.float()
    shape = [1] * like.ndim
    shape[axis] = -1
    return values.float().reshape(shape)


def _affine(given: Arguments, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of an operation, ready to broadcast against its data."""
    axis = given.integer("axis") if "axis" in given else None
    zero = given.optional("zero_point")
    return along(given.tensor("scale"), data, axis), along(zero if zero is not None else torch.zeros(()), data, axis)


@OPERATORS.operator("quantize", "input scale zero_point output_dtype axis")
def quantize(given: Arguments) -> torch.Tensor:
    """clip(round(input / scale) + zero_point), halves to even, in the range of int8 or uint8."""
    data = given.tensor("input")
    scale, zero = _affine(given, data)
    return torch.clamp(torch.round(data / scale) + zero, *LIMITS[given.text("output_dtype")])


@OPERATORS.operator("dequantize", "input scale zero_point axis")
def dequantize(given: Arguments) -> torch.Tensor:
    """scale * (input - zero_point)."""
    data = given.tensor("input")
    scale, zero = _affine(given, data)
    return (data.float() - zero) * scale


@OPERATORS.operator("constexpr_affine_dequantize", "quantized_data scale zero_point axis")
def affine_dequantize(given: Arguments) -> torch.Tensor:
    """scale * (quantized_data - zero_point), a scale for the whole or for each index of an axis."""
    data = given.tensor("quantized_data")
    scale, zero = _affine(given, data)
    return (data.float() - zero) * scale


@OPERATORS.operator("constexpr_cast", "source_val output_dtype")
def constexpr_cast(given: Arguments) -> torch.Tensor:
    """Half precision numbers, which float32 holds as they are."""
    return given.tensor("source_val")


def spread(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Repeat a value for each block of a tensor until it has the tensor's shape.

    Raises ValueError where a length is no multiple of the number of blocks along it.
    """
    for axis, size in enumerate(shape):
        if size % blocks.shape[axis]:
            raise ValueError(f"{size} along axis {axis} cannot be parted into {blocks.shape[axis]} blocks")
        if size != blocks.shape[axis]:
            blocks = blocks.repeat_interleave(size // blocks.shape[axis], axis)
    return blocks


def _shifted(data: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    shift = 0.0 if offset is None else spread(offset.float(), data.shape)
    return spread(scale, data.shape) * (data.float() - shift)


@OPERATORS.operator("constexpr_blockwise_shift_scale", "data scale offset")
def blockwise_shift_scale(given: Arguments) -> torch.Tensor:
    """scale * (data - offset), where scale and offset have an entry for each block of the data."""
    return _shifted(given.tensor("data"), given.tensor("scale"), given.optional("offset"))


@OPERATORS.operator("constexpr_sparse_blockwise_shift_scale", "data_mask nonzero_data scale offset")
def sparse_blockwise_shift_scale(given: Arguments) -> tuple[torch.Tensor, ...]:
    """The same for the values that a mask leaves: (mask, values)."""
    mask = given.tensor("data_mask")
    dense = _scattered(given.tensor("nonzero_data"), mask)
    return mask, _shifted(dense, given.tensor("scale"), given.optional("offset"))[mask != 0]


def _looked_up(indices: torch.Tensor, table: torch.Tensor, vector_axis: int | None) -> torch.Tensor:
    """Entries of look-up tables (*blocks, entries, vector) at indices of the blocks' rank.

    Vectors longer than one lie along `vector_axis` of the result, which is as many times longer there.
    """
    blocks: list[torch.Tensor] = []
    for axis, (size, count) in enumerate(zip(indices.shape, table.shape[:-2], strict=True)):
        if size % count:
            raise ValueError(f"{size} along axis {axis} cannot be parted into {count} blocks")
        shape = [-1 if axis == other else 1 for other in range(indices.ndim)]
        blocks.append((torch.arange(size) // (size // count)).reshape(shape))
    found = table[(*blocks, indices.long())]
    if table.shape[-1] == 1:
        return found[..., 0]
    if vector_axis is None:
        raise ValueError("vectors in a look-up table need a vector_axis")
    axis = vector_axis % indices.ndim
    return found.movedim(-1, axis + 1).flatten(axis, axis + 1)


@OPERATORS.operator("constexpr_lut_to_dense", "indices lut shape vector_axis")
def lut_to_dense(given: Arguments) -> torch.Tensor:
    """Values looked up by index.

    iOS 16: one table, indices packed into bytes, the result's shape given. iOS 18: tables for blocks, a plain index
    an element (or a vector of elements).
    """
    indices, table = given.tensor("indices"), given.tensor("lut")
    if "shape" in given:
        shape = given.integers("shape")
        packed = unpacked(indices.numpy(), round(math.log2(table.numel())), math.prod(shape))
        return table[torch.from_numpy(packed).long()].reshape(shape)
    return _looked_up(indices, table, given.integer("vector_axis") if "vector_axis" in given else None)


def _scattered(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values, in order, where the mask is not zero, and zeros elsewhere. Raises ValueError where the counts differ."""
    chosen = mask != 0
    if int(chosen.sum()) != values.numel():
        raise ValueError(f"{values.numel()} values for a mask of {int(chosen.sum())}")
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[chosen] = values
    return dense


@OPERATORS.operator("constexpr_sparse_to_dense", "nonzero_data mask shape")
def sparse_to_dense(given: Arguments) -> torch.Tensor:
    """Values where a mask is set, zeros elsewhere. iOS 16 packs the mask's bits into bytes; iOS 18 does not."""
    mask = given.tensor("mask")
    if "shape" in given:
        shape = given.integers("shape")
        mask = torch.from_numpy(unpacked(mask.numpy(), 1, math.prod(shape))).reshape(shape)
    return _scattered(given.tensor("nonzero_data"), mask)


@OPERATORS.operator("constexpr_lut_to_sparse", "indices_mask indices_nonzero_data lut vector_axis")
def lut_to_sparse(given: Arguments) -> tuple[torch.Tensor, ...]:
    """Values looked up where a mask is set: (mask, values), both longer along `vector_axis` where it is given."""
    mask, table = given.tensor("indices_mask"), given.tensor("lut")
    axis = given.integer("vector_axis") if "vector_axis" in given else None
    dense = _looked_up(_scattered(given.tensor("indices_nonzero_data"), mask), table, axis)
    if axis is not None:
        mask = mask.repeat_interleave(table.shape[-1], axis)
    return mask, dense[mask != 0]
