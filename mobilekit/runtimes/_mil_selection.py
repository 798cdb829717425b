"""Parts of tensors of ML Programs: slices, gathered elements, and tensors joined or split.

Sources: coremltools/converters/mil/mil/ops/defs, tensor_transformation.py, tensor_operation.py and scatter_gather.py of
iOS15 to iOS18, and `solve_slice_by_index_slice` of _utils.py.
"""

from __future__ import annotations

import torch

from mobilekit.runtimes._mil_table import Arguments, Table

OPERATORS = Table()


def _indices(given: Arguments) -> tuple[list[torch.Tensor], list[int]]:
    """For each axis the indices of a slice; and the axes that are indexed, not sliced, and fall away."""
    x = given.tensor()
    begin, end = given.integers("begin"), given.integers("end")
    stride = given.integers("stride", [1] * x.ndim)
    from_start, to_end, single = (
        [bool(value) for value in given.integers(f"{name}_mask", [0] * x.ndim)] for name in ("begin", "end", "squeeze")
    )
    found = []
    for axis, size in enumerate(x.shape):
        if single[axis]:
            index = 0 if from_start[axis] else begin[axis]
            if not -size <= index < size:
                raise ValueError(f"index {index} lies outside of the {size} elements of axis {axis}")
            found.append(torch.tensor([index % size]))
            continue
        part = slice(None if from_start[axis] else begin[axis], None if to_end[axis] else end[axis], stride[axis])
        found.append(torch.tensor(range(*part.indices(size)), dtype=torch.int64))
    return found, [axis for axis in range(x.ndim) if single[axis]]


@OPERATORS.operator("slice_by_index", "x begin end stride begin_mask end_mask squeeze_mask")
def slice_by_index(given: Arguments) -> torch.Tensor:
    """x[begin:end:stride] on every axis as in NumPy; masks leave a bound out, or make a slice an index."""
    indices, single = _indices(given)
    x = given.tensor()
    for axis, index in enumerate(indices):
        if index.numel() != x.shape[axis] or (index.numel() and int(index[0])):
            x = x.index_select(axis, index)
    return x.squeeze(single) if single else x


@OPERATORS.operator("slice_update", "x update begin end stride begin_mask end_mask squeeze_mask")
def slice_update(given: Arguments) -> torch.Tensor:
    """x with other elements in the place of such a slice."""
    indices, _ = _indices(given)
    result = given.tensor().clone()
    shape = [index.numel() for index in indices]
    result[torch.meshgrid(indices, indexing="ij")] = given.tensor("update").reshape(shape)
    return result


@OPERATORS.operator("slice_by_size", "x begin size")
def slice_by_size(given: Arguments) -> torch.Tensor:
    """So many elements of each axis from an index on; -1: all that are left."""
    x = given.tensor()
    for axis, (begin, size) in enumerate(zip(given.integers("begin"), given.integers("size"), strict=True)):
        start = begin % x.shape[axis]
        x = x.narrow(axis, start, x.shape[axis] - start if size < 0 else size)
    return x


@OPERATORS.operator("split", "x axis num_splits split_sizes")
def split(given: Arguments) -> tuple[torch.Tensor, ...]:
    """Parts of an axis, equal or of given lengths."""
    x, axis = given.tensor(), given.integer("axis")
    if "split_sizes" in given:
        return tuple(torch.split(x, given.integers("split_sizes"), axis))
    count = given.integer("num_splits")
    if x.shape[axis] % count:
        raise ValueError(f"{x.shape[axis]} elements cannot be split into {count} equal parts")
    return tuple(torch.split(x, x.shape[axis] // count, axis))


@OPERATORS.operator("concat", "values axis interleave")
def concat(given: Arguments) -> torch.Tensor:
    """Tensors behind each other along an axis, or their elements in turn."""
    values, axis = given.tensors("values"), given.integer("axis")
    if not given.flag("interleave"):
        return torch.cat([value.reshape(1) if value.ndim == 0 else value for value in values], axis)
    axis %= values[0].ndim
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


@OPERATORS.operator("stack", "values axis")
def stack(given: Arguments) -> torch.Tensor:
    """Tensors along a new axis."""
    return torch.stack(given.tensors("values"), given.integer("axis"))


def _checked(given: Arguments, indices: torch.Tensor, size: int) -> torch.Tensor:
    """Indices of so many elements. Raises ValueError outside: what a device reads there is not defined.

    Before iOS 17, which brought `validate_indices`, negative ones count from the end; from then on, they are outside.
    """
    least = 0 if "validate_indices" in given else -size
    if indices.numel() and not (least <= int(indices.min()) and int(indices.max()) < size):
        raise ValueError(f"an index lies outside of {size} elements")
    return indices.long() % size


@OPERATORS.operator("gather", "x indices axis batch_dims validate_indices")
def gather(given: Arguments) -> torch.Tensor:
    """Elements of an axis by index: the indices' axes (without the shared batch axes) take that axis's place."""
    x, batch = given.tensor(), given.integer("batch_dims", 0)
    axis = given.integer("axis", 0) % x.ndim
    indices = _checked(given, given.tensor("indices"), x.shape[axis])
    if not batch:
        picked = x.index_select(axis, indices.reshape(-1))
        return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    rows = list(x.flatten(0, batch - 1))
    chosen = list(indices.flatten(0, batch - 1))
    picked = torch.stack([r.index_select(axis - batch, c.reshape(-1)) for r, c in zip(rows, chosen, strict=True)])
    return picked.reshape(*x.shape[:axis], *indices.shape[batch:], *x.shape[axis + 1 :])


@OPERATORS.operator("gather_along_axis", "x indices axis validate_indices")
def gather_along_axis(given: Arguments) -> torch.Tensor:
    """For each place of the indices, the element of x with that index along the axis."""
    x, axis = given.tensor(), given.integer("axis", 0)
    return torch.take_along_dim(x, _checked(given, given.tensor("indices"), x.shape[axis]), axis)


@OPERATORS.operator("gather_nd", "x indices batch_dims validate_indices")
def gather_nd(given: Arguments) -> torch.Tensor:
    """For each vector on the last axis of the indices, the part of x at that place; batch axes are shared."""
    x, indices, batch = given.tensor(), given.tensor("indices"), given.integer("batch_dims", 0)
    shared = torch.meshgrid(*(torch.arange(size) for size in indices.shape[:-1]), indexing="ij")[:batch]
    parts = [_checked(given, part, x.shape[batch + i]) for i, part in enumerate(indices.unbind(-1))]
    return x[(*shared, *parts)]


@OPERATORS.operator("one_hot", "indices one_hot_vector_size axis on_value off_value")
def one_hot(given: Arguments) -> torch.Tensor:
    """A new axis with `on_value` at the index and `off_value` elsewhere."""
    indices, size = given.tensor("indices"), given.integer("one_hot_vector_size")
    axis = given.integer("axis", -1) % (indices.ndim + 1)
    shape = [1] * (indices.ndim + 1)
    shape[axis] = size
    chosen = indices.unsqueeze(axis) == torch.arange(size).reshape(shape)
    on, off = given.optional("on_value"), given.optional("off_value")
    return torch.where(chosen, torch.ones(()) if on is None else on, torch.zeros(()) if off is None else off)


@OPERATORS.operator("non_zero", "x")
def non_zero(given: Arguments) -> torch.Tensor:
    """Places (n, rank) of elements that are not zero."""
    return torch.nonzero(given.tensor())
