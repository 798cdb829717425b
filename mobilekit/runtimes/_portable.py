"""Rewrites a module into forms that exporters convert as they should, where it uses others: the same function.

Every rule says which exporter needs it. A network that needs none of them is handed over as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mobilekit.runtimes import _portable_pools as pools
from mobilekit.runtimes._job import Source

if TYPE_CHECKING:
    import torch
    from torch import fx

Rule = Callable[["fx.Node"], bool]
"""Rewrites around a node; whether it did."""
ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "maximum", "minimum", "add_", "sub_", "mul_", "div_"})


def portable(source: Source, runtime: str) -> torch.nn.Module:
    """The module where every exporter understands it, else its torch.export graph after the rules of this runtime.

    A module that torch.export cannot trace comes back as it is: the exporter says so in its own words. So does one
    whose batch is left open: the rules count with sizes.
    """
    import torch

    module = source.module
    if source.open_batch:
        return module
    try:
        with torch.no_grad():
            graph_module = torch.export.export(module, source.inputs).module(check_guards=False)
    except Exception:  # noqa: BLE001 -- the module's forward may raise anything
        return module
    changed = False
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        rule = RULES[runtime].get(node.target._opname)
        changed |= rule is not None and rule(node)
    if not changed:
        return module
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def _without_expansion(node: fx.Node) -> bool:
    """Leave a repetition to the operators that read it, which broadcast by themselves.

    litert-torch moves channels last in the map and not in the sizes of the expansion.
    """
    data, shape = node.args[0], pools.shape_of(node)
    before = pools.shape_of(data)
    if len(before) != len(shape) or not node.users:
        return False
    for user in node.users:
        others = [each for each in user.args[:2] if each is not node]
        same = [each for each in others if hasattr(each, "meta") and pools.shape_of(each) == shape]
        if user.target._opname not in ELEMENTWISE or not same or (user.args[0] is node and _in_place(user)):  # type: ignore[union-attr]
            return False
    node.replace_all_uses_with(data)  # type: ignore[arg-type]
    return True


def _without_alias(node: fx.Node) -> bool:
    """Leave out what a slice that takes everything becomes: coremltools does not know it."""
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    return True


def _shuffled(node: fx.Node) -> bool:
    """Write a shuffle of channels as the reshape, the transposition and the reshape that it is, for coremltools."""
    import torch

    data, groups = node.args[0], int(node.args[1])  # type: ignore[arg-type]
    batch, channels, *sizes = pools.shape_of(node)
    aten, graph = torch.ops.aten, node.graph
    with graph.inserting_before(node):
        grouped = graph.call_function(aten.reshape.default, (data, [batch, groups, channels // groups, *sizes]))
        turned = graph.call_function(aten.transpose.int, (grouped, 1, 2))
        whole = graph.call_function(aten.reshape.default, (turned, [batch, channels, *sizes]))
    pools.replaced(node, whole)
    return True


def _in_place(node: fx.Node) -> bool:
    return str(node.target._opname).endswith("_")  # type: ignore[union-attr]


def _whole_transposed(node: fx.Node) -> bool:
    """Write the padding of a transposed convolution as what it is: rows and columns of the whole result left out.

    litert-torch knows transposed convolutions without padding, and those that give a whole multiple of their input.
    """
    import torch

    data, weight, bias, stride, padding, more, groups, dilation = _arguments(
        node, (None, None, None, [1, 1], [0, 0], [0, 0], 1, [1, 1])
    )
    stride, padding, more, dilation = (pools.pair(each) for each in (stride, padding, more, dilation))
    sizes, results = pools.shape_of(data)[2:], pools.shape_of(node)[2:]
    if len(sizes) != 2:  # without a batch axis
        return False
    multiple = all(given == size * step for given, size, step in zip(results, sizes, stride, strict=True))
    if not any(more) and (multiple or not any(padding)):
        return False
    aten, graph = torch.ops.aten, node.graph
    with graph.inserting_before(node):
        beyond = [max(0, m - p) for m, p in zip(more, padding, strict=True)]
        if any(beyond):  # rows of zeros behind the map make the result longer
            steps = [math.ceil(b / s) for b, s in zip(beyond, stride, strict=True)]
            data = graph.call_function(aten.constant_pad_nd.default, (data, [0, steps[1], 0, steps[0]], 0.0))
        whole = graph.call_function(
            aten.conv_transpose2d.input, (data, weight, bias, list(stride), [0, 0], [0, 0], groups, list(dilation))
        )
        for axis, (start, size) in enumerate(zip(padding, results, strict=True), start=2):
            whole = graph.call_function(aten.slice.Tensor, (whole, axis, start, start + size))
    pools.replaced(node, whole)
    return True


def _arguments(node: fx.Node, defaults: Sequence[Any]) -> list[Any]:
    return [*node.args, *defaults[len(node.args) :]]


POOLS: dict[str, Rule] = {
    "avg_pool2d": pools.plain_average,
    "max_pool2d": pools.plain_maximum,
    "max_pool2d_with_indices": pools.plain_maximum,
    "adaptive_max_pool2d": pools.maximum_to_size,
    "adaptive_avg_pool2d": pools.average_to_size,
}
RULES: dict[str, dict[str, Rule]] = {
    "onnx": {**POOLS, "avg_pool2d": pools.average_with_ends},
    "coreml": {
        **POOLS,
        "max_pool2d": pools.maximum_with_stride,
        "max_pool2d_with_indices": pools.maximum_with_stride,
        "alias": _without_alias,
        "channel_shuffle": _shuffled,
        "native_channel_shuffle": _shuffled,
    },
    "tflite": {
        **POOLS,
        "avg_pool2d": pools.average_with_padding,
        "expand": _without_expansion,
        "expand_as": _without_expansion,
        "conv_transpose2d": _whole_transposed,
    },
}
"""Runtime -> operator -> rule."""
