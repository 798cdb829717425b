"""Rules of the layers with weights: where channels are produced and read."""

from __future__ import annotations

from torch import fx

from mobilekit.network.channels import Layout
from mobilekit.network.nodes import argument, integer, node_argument, pair, shape_of, tensors_in
from mobilekit.network.walk import Walk


def conv(walk: Walk, node: fx.Node) -> None:
    """A convolution; a depthwise one keeps its input's channels, any other grouped one fixes both sides."""
    data, weight = node_argument(node, 0), node_argument(node, 1)
    groups = integer(argument(node, 6, "groups", 1))
    inputs = walk.layout(data)
    out_width, per_group = shape_of(weight)[:2]
    if len(shape_of(data)) != 4:
        walk.unknown(node, "a convolution without a batch axis")
        return
    depthwise = groups > 1 and groups == walk.channels.width(inputs) == out_width and per_group == 1
    if depthwise:
        walk.axis(node, weight, 0, inputs)
        outputs = inputs
    elif groups > 1:
        outputs = _grouped(walk, inputs, out_width, f"a grouped convolution ({groups} groups) fixes it")
    else:
        walk.axis(node, weight, 1, inputs)
        outputs = walk.produced(node, weight, 0)
    _finish_conv(walk, node, "conv", outputs, depthwise)


def conv_transpose(walk: Walk, node: fx.Node) -> None:
    """A transposed convolution: its weight has the input channels on axis 0 and the output channels on axis 1."""
    data, weight = node_argument(node, 0), node_argument(node, 1)
    groups = integer(argument(node, 6, "groups", 1))
    inputs = walk.layout(data)
    if len(shape_of(data)) != 4:
        walk.unknown(node, "a transposed convolution without a batch axis")
        return
    if groups > 1:
        reason = f"a grouped transposed convolution ({groups} groups) fixes it"
        outputs = _grouped(walk, inputs, shape_of(node)[1], reason)
    else:
        walk.axis(node, weight, 0, inputs)
        outputs = walk.produced(node, weight, 1)
    _finish_conv(walk, node, "conv_transpose", outputs, depthwise=False)


def _grouped(walk: Walk, inputs: Layout, out_width: int, reason: str) -> Layout:
    walk.channels.refuse(inputs, reason)
    return Layout((walk.channels.new(out_width, reason),))


def _finish_conv(walk: Walk, node: fx.Node, kind: str, outputs: Layout, depthwise: bool) -> None:
    weight, bias = node_argument(node, 1), argument(node, 2, "bias")
    if isinstance(bias, fx.Node):
        walk.axis(node, bias, 0, outputs)
    walk.layouts[node] = outputs
    walk.operator(
        node,
        kind,
        [node_argument(node, 0)],
        weight=weight,
        kernel=shape_of(weight)[2:],
        stride=pair(argument(node, 3, "stride", 1)),
        groups=integer(argument(node, 6, "groups", 1)),
        depthwise=depthwise,
    )


def linear(walk: Walk, node: fx.Node) -> None:
    """A linear layer over vectors (N, features)."""
    data, weight, bias = node_argument(node, 0), node_argument(node, 1), argument(node, 2, "bias")
    if len(shape_of(data)) != 2:
        walk.unknown(node, "a linear layer over the last of several axes")
        return
    walk.axis(node, weight, 1, walk.layout(data))
    outputs = walk.produced(node, weight, 0)
    if isinstance(bias, fx.Node):
        walk.axis(node, bias, 0, outputs)
    walk.layouts[node] = outputs
    walk.operator(node, "linear", [data], weight=weight)


def batch_norm(walk: Walk, node: fx.Node) -> None:
    """A batch norm: part of the layer in front of it where nothing else reads that, else an operator."""
    data = node_argument(node, 0)
    for parameter in tensors_in(node)[1:]:
        walk.axis(node, parameter, 0, walk.layout(data))
    host = walk.fusable(data)
    if host is not None and host.kind in ("conv", "linear", "conv_transpose") and not host.activation:
        walk.pass_on(node, data)
    else:
        walk.layouts[node] = walk.layout(data)
        walk.operator(node, "batch_norm", [data])


def instance_norm(walk: Walk, node: fx.Node) -> None:
    """An instance norm: statistics of each map alone, with perhaps a scale and a shift a channel."""
    for parameter in tensors_in(node)[1:]:
        walk.axis(node, parameter, 0, walk.layout(node_argument(node, 0)))
    walk.same_channels(node, "other")
