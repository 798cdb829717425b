"""Channels scaled between layers without changing what a network computes: which functions let a scale through."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx, nn

from mobilekit.network.layer_calls import Layer, rectifies
from mobilekit.network.nodes import argument, op_name, shape_of

POOLS = frozenset({"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"})
RESIZES = frozenset({"upsample_nearest2d", "upsample_bilinear2d"})
PASSES = frozenset({"dropout", "identity", "contiguous", "clone", "leaky_relu"}) | POOLS | RESIZES
"""Functions f, channel by channel, with f(s x) = s f(x) for s > 0."""
VIEWS = frozenset({"flatten", "view", "reshape", "squeeze"})


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels; each is `repeat` of its input features (a flattened map)."""

    layer: str
    repeat: int


def passes_scale(node: fx.Node, data: fx.Node) -> bool:
    """Whether the node is a function f of `data` alone, channel by channel, with f(s x) = s f(x) for s > 0."""
    return rectifies(node) or (op_name(node) in PASSES and node.args[0] is data) or _keeps(node, data)


def flattened(node: fx.Node, repeat: int) -> int | None:
    """Features a channel after a view of (N, C, H, W) as (N, C x H x W) or of (N, C, 1, 1) as (N, C)."""
    before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
    if before == after:
        return repeat
    if len(before) == 4 and after == (before[0], math.prod(before[1:])):
        return math.prod(before[2:])
    return None


def _keeps(node: fx.Node, data: fx.Node) -> bool:
    """A mean over the map, padding with zeros, or a PReLU."""
    name = op_name(node)
    if node.args[:1] != (data,):
        return False
    if name == "mean":
        rank, dims = len(shape_of(data)), argument(node, 1, "dim")
        return rank == 4 and isinstance(dims, list | tuple) and {int(str(d)) % rank for d in dims} == {2, 3}
    if name in ("pad", "constant_pad_nd"):
        where = 3 if name == "pad" else 2
        sides = argument(node, 1, "pad")
        plain = name != "pad" or argument(node, 2, "mode", "constant") == "constant"
        zero = argument(node, where, "value") in (None, 0)
        return plain and zero and isinstance(sides, list | tuple) and len(sides) <= 4 and len(shape_of(data)) == 4
    return name == "prelu"


def read_magnitudes(layer: Layer, repeat: int) -> torch.Tensor:
    """Largest magnitude of the weights that read each input channel."""
    weight = layer.weight.abs()
    if isinstance(layer, nn.Linear):
        return weight.amax(dim=0).reshape(-1, repeat).amax(dim=1)
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.flatten(1).amax(dim=1)
    rows = weight.flatten(2).amax(dim=2)
    return rows.reshape(layer.groups, -1, rows.shape[1]).amax(dim=1).flatten()


def multiply(layer: Layer, repeat: int, scale: torch.Tensor) -> None:
    """Multiply the weights that read each input channel by its scale."""
    if isinstance(layer, nn.Linear):
        layer.weight *= scale.repeat_interleave(repeat)
    elif isinstance(layer, nn.ConvTranspose2d):
        layer.weight *= scale[:, None, None, None]
    else:
        each = scale.reshape(layer.groups, 1, -1).expand(-1, layer.out_channels // layer.groups, -1)
        layer.weight *= each.reshape(layer.out_channels, -1)[:, :, None, None]


def layer_at(module: nn.Module, path: str) -> Layer:
    """The layer at this path."""
    layer = module.get_submodule(path)
    assert isinstance(layer, Layer)  # noqa: S101  (as the graph's calls found them)
    return layer
