"""Pools in forms that exporters convert: two numbers for every setting, windows of one size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx


def shape_of(node: Any) -> tuple[int, ...]:
    """Shape of the tensor that a node gives; () for anything else."""
    shape = getattr(getattr(node, "meta", {}).get("val"), "shape", ())
    return tuple(int(size) for size in shape)


def pair(value: Any) -> tuple[int, int]:
    """Height and width of a setting that is one number or a list of one or two."""
    if isinstance(value, list | tuple):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


def replaced(node: fx.Node, other: fx.Node) -> None:
    """Let everyone read the other node, which gives a tensor of the same shape: later rules ask for that."""
    other.meta.update(node.meta)
    node.replace_all_uses_with(other)


def plain_average(node: fx.Node) -> bool:
    """Settings that are lists of one number as two: exporters take them as they are."""
    return _doubled(node, range(1, 4))


def average_with_ends(node: fx.Node) -> bool:
    """As `plain_average`; windows that reach over the end are cut to what is there by a factor a place.

    ONNX Runtime's int8 kernel divides by the whole window where the pool rounds its size up.
    """
    doubled = plain_average(node)
    return _by_a_factor(node, needed=lambda beyond, _: any(beyond)) or doubled


def average_with_padding(node: fx.Node) -> bool:
    """As `plain_average`; where padding is not counted, it is cut off by a factor a place.

    litert-torch knows such pools with unmoved windows only, and the quantiser none of the sums that it makes of others.
    """
    doubled = plain_average(node)

    def needed(_: tuple[int, ...], settings: tuple[tuple[int, int], ...]) -> bool:
        kernel, stride, padding = settings
        unmoved = all(k == 2 * p + 1 and s == 1 for k, s, p in zip(kernel, stride, padding, strict=True))
        return any(padding) and not _counts_padding(node) and not unmoved

    return _by_a_factor(node, needed) or doubled


def _counts_padding(node: fx.Node) -> bool:
    return bool(node.args[5]) if len(node.args) > 5 else True


def _by_a_factor(node: fx.Node, needed: Callable[[tuple[int, ...], tuple[tuple[int, int], ...]], bool]) -> bool:
    """Pad with zeros, average whole windows, and scale every place by the share of its window that counts."""
    import torch
    from torch.nn import functional

    given: list[Any] = [*node.args, *(None, None, [], 0, False, True, None)[len(node.args) :]]
    data, kernel, stride, padding, _, counted, divisor = given
    kernel, padding = pair(kernel), pair(padding)
    stride = pair(stride) if stride else kernel
    sizes, results = shape_of(data)[-2:], shape_of(node)[-2:]
    beyond = tuple(
        max(0, (r - 1) * s + k - size - 2 * p)
        for r, s, k, size, p in zip(results, stride, kernel, sizes, padding, strict=True)
    )
    if divisor is not None or not needed(beyond, (kernel, stride, padding)):
        return False
    inner = [padding[1], padding[1], padding[0], padding[0]]
    outer = [0, beyond[1], 0, beyond[0]]
    there = functional.pad(torch.ones(1, 1, *sizes), inner, value=float(bool(counted)))
    share = functional.avg_pool2d(functional.pad(there, outer), kernel, stride)
    graph, aten, owner = node.graph, torch.ops.aten, node.graph.owning_module
    assert owner is not None  # noqa: S101  (the graph of a GraphModule)
    name = f"window_share_{node.name}"
    owner.register_buffer(name, 1 / share)
    with graph.inserting_before(node):
        around = [a + b for a, b in zip(inner, outer, strict=True)]
        if any(around):
            data = graph.call_function(aten.constant_pad_nd.default, (data, around, 0.0))
        whole = graph.call_function(aten.avg_pool2d.default, (data, list(kernel), list(stride)))
        made = graph.call_function(aten.mul.Tensor, (whole, graph.get_attr(name)))
    replaced(node, made)
    return True


def plain_maximum(node: fx.Node) -> bool:
    """As `plain_average`."""
    return _doubled(node, range(1, 5))


def maximum_with_stride(node: fx.Node) -> bool:
    """Also a stride where there is none, which coremltools takes for a mistake."""
    doubled = plain_maximum(node)
    if len(node.args) > 2:
        return doubled
    node.args = (*node.args, node.args[1])
    return True


def _doubled(node: fx.Node, places: range) -> bool:
    given = [
        [value[0], value[0]] if place in places and isinstance(value, list | tuple) and len(value) == 1 else value
        for place, value in enumerate(node.args)
    ]
    changed = any(new is not old for new, old in zip(given, node.args, strict=True))
    node.args = tuple(given)
    return changed


def maximum_to_size(node: fx.Node) -> bool:
    """A pool to a size as a plain one where windows are alike, else as slices: litert-torch has none."""
    import torch

    read = [user for user in node.users if user.users]
    values = [user for user in read if user.args[1] == 0]
    if len(values) < len(read):
        return False  # someone reads where the largest values are
    data: Any = node.args[0]
    before, after = shape_of(data)[-2:], pair(node.args[1])
    with node.graph.inserting_before(node):
        if all(b % a == 0 for b, a in zip(before, after, strict=True)):
            kernel = [b // a for b, a in zip(before, after, strict=True)]
            made = node.graph.call_function(torch.ops.aten.max_pool2d.default, (data, kernel, kernel))
        else:
            made = _in_slices(node, data, torch.ops.aten.amax.default)
    for user in values:
        replaced(user, made)
    return True


def average_to_size(node: fx.Node) -> bool:
    """A pool to a size whose windows are unlike, as slices; the others exporters convert by themselves."""
    import torch

    data: Any = node.args[0]
    before, after = shape_of(data)[-2:], pair(node.args[1])
    if all(b % a == 0 for b, a in zip(before, after, strict=True)):
        return False
    with node.graph.inserting_before(node):
        made = _in_slices(node, data, torch.ops.aten.mean.dim)
    replaced(node, made)
    return True


def _in_slices(node: fx.Node, data: fx.Node, reduced: Any) -> fx.Node:
    """Reduce the windows of rows, then those of columns: a window is a rectangle, so that the order is free."""
    import torch

    graph, aten = node.graph, torch.ops.aten
    rank = len(shape_of(data))
    for axis, wanted in zip((rank - 2, rank - 1), pair(node.args[1]), strict=True):
        size = shape_of(node.args[0])[axis]
        parts = []
        for index in range(wanted):  # windows as PyTorch cuts them; neighbours may overlap
            start, end = index * size // wanted, -(-(index + 1) * size // wanted)
            cut = graph.call_function(aten.slice.Tensor, (data, axis, start, end))
            parts.append(graph.call_function(reduced, (cut, [axis], True)))
        data = graph.call_function(aten.cat.default, (parts, axis)) if len(parts) > 1 else parts[0]
    return data
