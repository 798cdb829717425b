"""What each operator of a graph does to channels: one rule an operator, and how the rules are followed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from mobilekit.network import movement, weighted
from mobilekit.network.movement import FREE, VIEWS
from mobilekit.network.nodes import (
    argument,
    integer,
    node_argument,
    op_name,
    pair,
    result_of,
    shape_of,
    size_of,
    tensors_in,
)
from mobilekit.network.walk import Walk

ACTIVATIONS = {
    "relu": "relu",
    "hardtanh": "relu6",
    "relu6": "relu6",
    "clamp": "relu6",
    "clamp_min": "relu",
    "hardswish": "hardswish",
    "hardsigmoid": "hardsigmoid",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "tanh": "tanh",
    "gelu": "gelu",
    "elu": "elu",
    "leaky_relu": "leaky_relu",
    "prelu": "prelu",
}
"""Functions of one element that runtimes fuse -> the name that prices know."""
POINTWISE = frozenset(
    {
        "abs", "celu", "clamp_max", "cos", "erf", "exp", "floor", "hardshrink", "log", "log1p", "log_sigmoid", "mish",
        "neg", "reciprocal", "round", "rsqrt", "rsub", "selu", "sign", "sin", "softplus", "softshrink", "softsign",
        "sqrt", "square", "threshold",
    }
)  # fmt: skip
"""Other functions of one element."""
FUSED_INTO = ("conv", "linear", "add", "conv_transpose", "batch_norm")
RESIZES = frozenset(
    {"upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d", "interpolate"}
)
Rule = Callable[[Walk, fx.Node], None]


def follow(program: torch.export.ExportedProgram) -> Walk:
    """Visit every node of the graph in order."""
    walk = Walk(program)
    for node in walk.graph.nodes:
        if node.op == "placeholder" and node.name in walk.user_inputs:
            walk.begin(node)
        elif node.op == "call_function":
            _visit(walk, node)
            walk.check(node)
        elif node.op == "output":
            walk.end(node)
    walk.refuse_unexplained()
    return walk


def _visit(walk: Walk, node: fx.Node) -> None:
    op = op_name(node)
    if node in walk.absorbed:
        return
    if op == "getitem":
        walk.piece(node)
    elif not walk.data(node):
        return  # arithmetic of constants
    elif op in RULES:
        RULES[op](walk, node)
    elif op in VIEWS:
        movement.view(walk, node)
    elif op in FREE:
        walk.pass_on(node, node_argument(node, 0))
    elif op in ACTIVATIONS or op in POINTWISE:
        _activation(walk, node)
    elif op in RESIZES:
        walk.same_channels(node, "resize")
    else:
        walk.unknown(node, op)


# ---------------------------------------------------------------- element by element


def _activation(walk: Walk, node: fx.Node) -> None:
    op, data = op_name(node), node_argument(node, 0)
    others = tensors_in(node)[1:]
    if op != "prelu" and others:
        walk.unknown(node, op)
        return
    for parameter in others:
        if shape_of(parameter)[0] > 1:
            walk.axis(node, parameter, 0, walk.layout(data))
    activation = ACTIVATIONS.get(op, op)
    host = walk.fusable(data) if op in ACTIVATIONS else None
    if host is not None and host.kind in FUSED_INTO and not host.activation:
        host.activation = activation
        walk.pass_on(node, data)
    else:
        walk.layouts[node] = walk.layout(data)
        walk.operator(node, "activation", [data], activation=activation)


def _elementwise(walk: Walk, node: fx.Node) -> None:
    data, shape = walk.data(node), shape_of(node)
    whole = [n for n in data if len(shape_of(n)) == len(shape) > 1 and shape_of(n)[1] == shape[1]]
    flat = [n for n in data if len(shape_of(n)) == len(shape) > 1 and shape_of(n)[1] == 1 != shape[1]]
    if not whole or len(whole) + len(flat) < len(data):
        walk.unknown(node, f"{op_name(node)} over unlike axes")
        return
    for other in whole[1:]:
        walk.channels.join(walk.layout(whole[0]), walk.layout(other), f"{op_name(node)} at {node.name}")
    for other in flat:  # one channel that meets all of the others', an attention map for instance
        walk.channels.refuse(walk.layout(other), "it is one channel that meets many")
    walk.layouts[node] = walk.layout(whole[0])
    for other in tensors_in(node):
        if other not in data:
            _channelwise_constant(walk, node, other)
    kind = "add" if op_name(node) in ("add", "sub") else "mul"
    walk.operator(node, kind if len(data) > 1 else "activation", [*whole, *flat])


def _channelwise_constant(walk: Walk, node: fx.Node, constant: fx.Node) -> None:
    """A constant added or multiplied: one for all channels, or a parameter with one value a channel; else refused."""
    shape, layout = shape_of(constant), walk.layouts[node]
    axis = 1 - (len(shape_of(node)) - len(shape))
    if axis < 0 or shape[axis] == 1:
        return
    reader, origin = node, constant
    while origin.name not in walk.weights:  # `self.scale.view(1, -1, 1, 1)`, `self.gate.sigmoid()`
        known = op_name(origin) in VIEWS or op_name(origin) in ACTIVATIONS or op_name(origin) in POINTWISE
        if not known or len(origin.all_input_nodes) != 1 or len(origin.users) != 1:
            break
        reader, origin = origin, origin.all_input_nodes[0]
    if origin is not constant:  # the axis has to be the only one, so that views cannot have moved it
        long = [dim for dim, size in enumerate(shape_of(origin)) if size != 1]
        axis = long[0] if len(long) == 1 and max(shape) == math.prod(shape) else -1
    width = walk.channels.width(layout)
    if origin.name in walk.weights and axis >= 0 and shape_of(origin)[axis] == width:
        walk.axis(reader, origin, axis, layout)
    else:
        walk.channels.refuse(layout, f"a constant tensor of fixed size is combined with it at {node.name}")


def _softmax(walk: Walk, node: fx.Node) -> None:
    data = node_argument(node, 0)
    rank = len(shape_of(data))
    walk.layouts[node] = walk.layout(data)
    if integer(argument(node, 1, "dim", 1)) % rank < 2:
        walk.channels.refuse(walk.layout(data), f"{op_name(node)} at {node.name} compares its channels")
    walk.operator(node, "softmax", [data])


# ---------------------------------------------------------------- pools and resizing


def _pool(walk: Walk, node: fx.Node) -> None:
    kernel = argument(node, 1, "kernel_size")
    stride = argument(node, 2, "stride")
    kind = "max_pool" if "max" in op_name(node) else "avg_pool"
    ceil = argument(node, 5 if kind == "max_pool" else 4, "ceil_mode", False)
    ceil = bool(ceil) and not any(pair(argument(node, 3, "padding", 0)))
    walk.same_channels(node, kind, kernel=pair(kernel), stride=pair(stride or kernel), ceil=ceil)


def _pool_to_size(walk: Walk, node: fx.Node) -> None:
    """Pools to a given size; windows are those of the plain pool with the same output size."""
    before, after = size_of(node_argument(node, 0)), size_of(result_of(node) or node)
    if op_name(node) == "adaptive_avg_pool2d" and after == (1, 1):
        walk.same_channels(node, "global_pool")
        return
    stride = (max(1, before[0] // after[0]), max(1, before[1] // after[1]))
    kernel = tuple(max(1, b - (a - 1) * s) for b, a, s in zip(before, after, stride, strict=True))
    kind = "avg_pool" if "avg" in op_name(node) else "max_pool"
    walk.same_channels(node, kind, kernel=(kernel[0], kernel[1]), stride=stride)


def _reduce(walk: Walk, node: fx.Node) -> None:
    """A mean, sum or extreme over axes of the map; over channels or the batch it is refused."""
    rank = len(shape_of(node_argument(node, 0)))
    dims = argument(node, 1, "dim")
    listed = [dims] if isinstance(dims, int) else dims
    axes = {integer(d) % rank for d in listed} if isinstance(listed, list | tuple) else set()
    if not shape_of(node) or not axes or min(axes) < 2:
        walk.unknown(node, f"{op_name(node)} over channels")
    else:
        whole = axes == set(range(2, rank))
        walk.same_channels(node, "global_pool" if whole else "avg_pool")


RULES: dict[str, Rule] = {
    "conv2d": weighted.conv,
    "conv_transpose2d": weighted.conv_transpose,
    "linear": weighted.linear,
    "batch_norm": weighted.batch_norm,
    "instance_norm": weighted.instance_norm,
    **dict.fromkeys(("add", "sub", "mul", "div", "pow", "maximum", "minimum"), _elementwise),
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices", "avg_pool2d"), _pool),
    **dict.fromkeys(("adaptive_avg_pool2d", "adaptive_max_pool2d"), _pool_to_size),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduce),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax"), _softmax),
    **dict.fromkeys(("cat", "concat"), movement.concat),
    **dict.fromkeys(("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"), movement.pad),
    **dict.fromkeys(("expand", "expand_as"), movement.expand),
    **dict.fromkeys(("slice", "narrow"), movement.cut_out),
    **dict.fromkeys(movement.TRANSPOSITIONS, movement.transpose),
    **dict.fromkeys(movement.SHUFFLES, movement.shuffle),
}
