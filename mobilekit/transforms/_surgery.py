"""Puts a chain of layers where a module has one: reads the old layer's geometry, builds the new ones, checks them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mobilekit.errors import BadInputError, UnsupportedError, first_line
from mobilekit.transforms._links import Link
from mobilekit.types import OperatorShape

Pair = tuple[int, int]
Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its map.

    `rows` are zeros above and below the map, `columns` left and right of it, both part of the convolution; `margins`
    are zeros left, right, above and below that the layer puts around its map itself before it.
    """

    dilation: Pair = (1, 1)
    rows: Pair = (0, 0)
    columns: Pair = (0, 0)
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)


class PaddedConv2d(nn.Conv2d):
    """A convolution that first puts zeros around its map, as layers with exact "same" padding do."""

    margins: tuple[int, int, int, int]
    """Zeros left, right, above and below."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to map (N, C', H', W')."""
        return super().forward(F.pad(x, self.margins))


def layer_at(module: nn.Module, path: str) -> Layer:
    """The convolution or linear layer at this path, whose weight can be read and which nothing else shares.

    Raises UnsupportedError for any other layer, for one with hooks and for tied weights, and BadInputError for
    weights that are not finite.
    """
    place = f"'{path}' cannot be replaced"
    layer = module.get_submodule(path)
    if not isinstance(layer, nn.Conv2d | nn.Linear) or not isinstance(layer.weight, nn.Parameter):
        raise UnsupportedError(f"{place}: it is a {type(layer).__name__}, no convolution or linear layer")
    if hooked(layer):
        raise UnsupportedError(f"{place}: hooks are registered on it")
    modules = list(module.named_modules(remove_duplicate=False))
    own = (layer.weight, layer.bias)
    for tensor in (t for t in own if t is not None):
        if sum(p is tensor for _, m in modules for p in m._parameters.values()) > 1:
            raise UnsupportedError(f"{place}: its weights are shared with another layer")
    if not torch.is_floating_point(layer.weight):
        raise UnsupportedError(f"{place}: its weights are {layer.weight.dtype}, no floating point numbers")
    if not all(bool(torch.isfinite(t).all()) for t in own if t is not None):
        raise BadInputError(f"the weights of '{path}' hold values that are not finite")
    return layer


def hooked(part: nn.Module) -> bool:
    """Whether something is registered that runs with the module's forward or backward."""
    return any((part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks))


def kernel_of(layer: Layer) -> np.ndarray:
    """The weight as an array: float64 for a float64 layer, else float32; (N, C, kh, kw) or (N, C)."""
    weight = layer.weight.detach().cpu()
    return (weight if weight.dtype == torch.float64 else weight.float()).numpy()


def geometry_of(module: nn.Module, path: str, shape: OperatorShape, example_input: torch.Tensor) -> Geometry:
    """Padding and dilation of the layer at this path, which the network uses at this shape.

    A subclass with a forward of its own is tried on numbers: where it equals the plain convolution with some zeros
    around the map, these are its padding. Raises UnsupportedError where it equals none.
    """
    layer = module.get_submodule(path)
    if not isinstance(layer, nn.Conv2d):
        if type(layer).forward is not nn.Linear.forward:
            raise UnsupportedError(f"'{path}' cannot be replaced: its class computes in a way of its own")
        return Geometry()
    if layer.padding_mode != "zeros":
        raise UnsupportedError(f"'{path}' cannot be replaced: it pads with {layer.padding_mode} values, not with zeros")
    dilation = (layer.dilation[0], layer.dilation[-1])
    own = type(layer)
    if own.forward is nn.Conv2d.forward and own._conv_forward is nn.Conv2d._conv_forward:
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        return Geometry(dilation, (int(top), int(bottom)), (int(left), int(right)))
    size = next(iter(_run(module, layer, example_input)), (1, shape.in_channels, *shape.in_size))
    found = _tried(layer, shape, size, dilation)
    if found is None:
        raise UnsupportedError(f"'{path}' cannot be replaced: its class computes something else than its convolution")
    return found


def _tried(layer: nn.Conv2d, shape: OperatorShape, size: tuple[int, ...], dilation: Pair) -> Geometry | None:
    """The geometry with which the plain convolution gives what the layer gives for maps of this size."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(weight)
    outside = tuple(shape.in_size[axis] - size[2 + axis] for axis in (0, 1))
    with torch.no_grad():
        want = layer(x)
        slack = 1e-3 * float(want.abs().max())
        for rows, columns in product(
            *(_paddings(outside[axis], shape.kernel[axis] * dilation[axis]) for axis in (0, 1))
        ):
            found = F.conv2d(F.pad(x, (*columns, *rows)), weight, bias, shape.stride, 0, dilation)
            if found.shape == want.shape and torch.allclose(found, want, rtol=1e-3, atol=slack):
                inside = (columns if outside[1] == 0 else (0, 0), rows if outside[0] == 0 else (0, 0))
                margins = (columns if outside[1] else (0, 0), rows if outside[0] else (0, 0))
                return Geometry(dilation, inside[1], inside[0], (*margins[0], *margins[1]))
    return None


def _paddings(outside: int, reach: int) -> list[Pair]:
    """What zeros along an axis can be: `outside` in all where the layer adds them to its map, else alike or "same"."""
    if outside:
        return [(before, outside - before) for before in range(outside + 1)]
    return [pair for before in range(reach) for pair in ((before, before), (before, before + 1))]


def chain_of(layer: Layer, geometry: Geometry, links: Sequence[Link], kernels: Sequence[np.ndarray]) -> nn.Sequential:
    """The new layers with these weights: the old layer's bias, dtype, device, modes and frozen state go to them.

    The layer's own margins come first. Along each axis, padding and dilation go to the link that moves over it: zeros
    pass through layers without bias unchanged.
    """
    carriers = [_carrier(links, axis) for axis in (0, 1)]
    chain = nn.Sequential()
    for index, (link, kernel) in enumerate(zip(links, kernels, strict=True)):
        bias = layer.bias if index == len(links) - 1 else None
        if isinstance(layer, nn.Linear):
            new: Layer = nn.Linear(kernel.shape[1], kernel.shape[0], bias is not None, device="meta")
        else:
            new = conv_of(link, kernel.shape, geometry, [carrier == index for carrier in carriers])
            if index == 0 and any(geometry.margins):
                new = padded_conv(new, geometry.margins)
        weight = torch.from_numpy(np.ascontiguousarray(kernel)).to(layer.weight)
        new.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        new.bias = bias
        chain.add_module(link.layer, new)
    return chain.train(layer.training)


def _carrier(links: Sequence[Link], axis: int) -> int:
    """The link that moves over this axis, or else the first that gives the map its last size."""
    moving = (i for i, link in enumerate(links) if link.kernel[axis] > 1 or link.stride[axis] > 1)
    sized = next(i for i, link in enumerate(links) if link.out_size[axis] == links[-1].out_size[axis])
    return next(moving, sized)


def conv_of(link: Link, kernel: tuple[int, ...], geometry: Geometry, carries: Sequence[bool]) -> nn.Conv2d:
    """The link's convolution without weights, for a kernel of this shape; `carries`: the axes that it moves over."""
    rows = geometry.rows if carries[0] else (0, 0)
    columns = geometry.columns if carries[1] else (0, 0)
    dilation = (geometry.dilation[0] if carries[0] else 1, geometry.dilation[1] if carries[1] else 1)
    alike = rows[0] == rows[1] and columns[0] == columns[1]
    padding: str | Pair = (rows[0], columns[0]) if alike else "same"  # layers with stride 1 alone have others
    sizes = (kernel[1] * link.groups, kernel[0], link.kernel, link.stride)
    return nn.Conv2d(*sizes, padding, dilation, link.groups, bias=False, device="meta")


def padded_conv(plain: nn.Conv2d, margins: tuple[int, int, int, int]) -> PaddedConv2d:
    """All margins in front of the first layer: a traced network counts them to the map that the layer reads."""
    sizes = (plain.in_channels, plain.out_channels, plain.kernel_size, plain.stride, plain.padding, plain.dilation)
    new = PaddedConv2d(*sizes, plain.groups, bias=False, device="meta")  # type: ignore[arg-type]
    new.margins = margins
    return new


def put(module: nn.Module, path: str, chain: nn.Module, example_input: torch.Tensor) -> None:
    """Put the new layers at this path of the module, in place, and run the module once in eval mode without gradients.

    Raises UnsupportedError where the module's own forward fails then, or does not come by there exactly once: code
    that reads the layer's weight or keeps it in a plain list cannot be seen in a traced network.
    """
    module.set_submodule(path, chain)
    try:
        calls = len(_run(module, chain, example_input))
    except Exception as error:
        reason = f"the model's forward fails without it: {first_line(error)}"
        raise UnsupportedError(f"'{path}' cannot be replaced: {reason}") from error
    if calls != 1:
        raise UnsupportedError(f"'{path}' cannot be replaced: the model's forward calls it {calls} times")


def _run(module: nn.Module, part: nn.Module, example_input: torch.Tensor) -> list[tuple[int, ...]]:
    """Run the module in eval mode, leaving its modes as they were: the shapes that went into one of its parts."""
    shapes: list[tuple[int, ...]] = []
    handle = part.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    try:
        with evaluated(module):
            module(example_input)
    finally:
        handle.remove()
    return shapes


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, for as long as it lasts."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, training in modes:
            each.training = training
