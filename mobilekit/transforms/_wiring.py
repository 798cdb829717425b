"""A module made of plain layers that are wired as links say, and the single convolution that it amounts to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mobilekit.errors import UnsupportedError
from mobilekit.transforms._links import INPUT, WEIGHTED, Link, sources
from mobilekit.transforms._surgery import Geometry, conv_of, padded_conv


class Wired(nn.Module):
    """Convolutions by name, and what each of them reads; slices, concatenations and shuffles in between."""

    def __init__(self, links: Sequence[Link], layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.links, self.reads = tuple(links), tuple(sources(links))
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to map (N, C', H', W')."""
        values = {INPUT: x}
        for link, reads in zip(self.links, self.reads, strict=True):
            read = [values[name] for name in reads]
            if link.kind == "concat":
                x = torch.cat(read, 1)
            elif link.kind == "shuffle":
                x = F.channel_shuffle(read[0], link.groups)
            elif link.kind == "slice":
                x = read[0].narrow(1, link.start, link.width or 0)
            else:
                x = self.get_submodule(link.layer)(read[0])
            values[link.layer] = x
        return x

    def extra_repr(self) -> str:
        """Which link reads which."""
        return ", ".join(
            f"{link.layer}: {link.kind} of {' and '.join(self.reads[i])}" for i, link in enumerate(self.links)
        )


def wired(layer: nn.Conv2d, geometry: Geometry, links: Sequence[Link], kernels: Mapping[str, torch.Tensor]) -> Wired:
    """The links as a module with these weights: the old layer's bias, dtype, device, modes and frozen state go to it.

    Padding and dilation go to the links that move over the map: zeros pass through layers without bias unchanged.
    Raises UnsupportedError where the layer puts zeros around its map itself and several links read that map.
    """
    first = [link for link, reads in zip(links, sources(links), strict=True) if INPUT in reads]
    if any(geometry.margins) and (len(first) > 1 or first[0].kind != "conv"):
        raise UnsupportedError("the layer puts zeros around its map itself, and more than one new layer would read it")
    layers: dict[str, nn.Module] = {}
    for link in links:
        if link.kind not in WEIGHTED:
            continue
        kernel = kernels[link.layer]
        new = conv_of(link, tuple(kernel.shape), geometry, [link.spatial, link.spatial])
        if link is first[0] and any(geometry.margins):
            new = padded_conv(new, geometry.margins)
        new.weight = nn.Parameter(kernel.contiguous().to(layer.weight), requires_grad=layer.weight.requires_grad)
        new.bias = layer.bias if link is links[-1] else None
        layers[link.layer] = new
    return Wired(links, layers).train(layer.training)


# ---------------------------------------------------------------- what it computes


def composed(
    links: Sequence[Link], kernels: Mapping[str, torch.Tensor], inputs: int, centre: int
) -> dict[str, torch.Tensor]:
    """What every link gives as a function of the old layer's input: (channels, inputs, taps) by name.

    `taps` is 1 where no link has moved over the map yet, and else those of the old kernel; `centre` is the tap at
    which a layer without a kernel, beside one, reads the map. Layers without bias and activation inside are one
    linear function of each window, so that the last link's is the kernel of the convolution that the links amount to.
    """
    like = next(iter(kernels.values()))
    values = {INPUT: torch.eye(inputs, dtype=like.dtype, device=like.device)[:, :, None]}
    for link, reads in zip(links, sources(links), strict=True):
        x = values[reads[0]]
        if link.kind == "concat":
            parts = [values[name] for name in reads]
            taps = max(part.shape[2] for part in parts)
            x = torch.cat([at_tap(part, taps, centre) for part in parts])
        elif link.kind == "shuffle":
            x = x.reshape(link.groups, -1, *x.shape[1:]).transpose(0, 1).flatten(0, 1)
        elif link.kind == "slice":
            x = x.narrow(0, link.start, link.width or 0)
        else:
            x = _applied(kernels[link.layer], x, link)
        values[link.layer] = x
    return values


def at_tap(value: torch.Tensor, taps: int, centre: int) -> torch.Tensor:
    """A function of the map's one place as one of a window (channels, inputs, taps)."""
    if value.shape[2] == taps:
        return value
    return F.pad(value, (centre, taps - 1 - centre))


def _applied(kernel: torch.Tensor, x: torch.Tensor, link: Link) -> torch.Tensor:
    outputs, inside = kernel.shape[:2]
    split = x.reshape(link.groups, inside, *x.shape[1:])
    weight = kernel.reshape(link.groups, outputs // link.groups, inside, -1)
    if link.spatial:
        return torch.einsum("goit,gic->goct", weight, split[..., 0]).flatten(0, 1)
    return torch.einsum("goi,gict->goct", weight[..., 0], split).flatten(0, 1)
