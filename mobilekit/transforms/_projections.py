"""First weights of grouped substitutes: projections of the old kernel (N, C, taps), float64, none of them random."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mobilekit.transforms._links import Link

Kernels = dict[str, Tensor]
SWEEPS = 30
"""Most sweeps of alternating least squares."""
WORK = 2 * 10**10
"""Multiply-accumulates that they may take in all: sweeps are counted from it, so that machines agree."""
RIDGE = 1e-9
"""Of the mean diagonal, added to every normal equation: terms may be alike."""


def projected(kernel: Tensor, links: Sequence[Link], method: str, centre: int) -> Kernels:
    """Weights of the links, by name, in the layout of the layers.

    `kernel` has shape (N, C, kh, kw); `centre` is the tap, counted along the rows, at which a layer without a kernel
    reads the map. The result is float64.
    """
    flat = kernel.detach().double().flatten(2)
    found = _STARTS[method](flat, {link.layer: link for link in links}, centre)
    size = tuple(kernel.shape[2:])
    return {link.layer: _laid_out(found[link.layer], link, size) for link in links if link.layer in found}


def _laid_out(weight: Tensor, link: Link, size: tuple[int, ...]) -> Tensor:
    """(outputs, inputs a group) or (outputs, inputs a group, taps) as a convolution's weight."""
    return weight.reshape(*weight.shape[:2], *size) if link.spatial else weight[:, :, None, None]


def _depthwise_separable(kernel: Tensor, links: Mapping[str, Link], _: int) -> Kernels:
    """The nearest kernel of rank m for each input channel: the SVD of its (N, taps) slice.

    The right vectors are the depthwise filters, the left ones the pointwise weights, and the root of each singular
    value goes to either side (network decoupling, Guo et al. 2018, arXiv:1808.05517; the layers are those of
    arXiv:1704.04861). Where there are more filters than singular values, the rest are zero.
    """
    outputs, inputs, taps = kernel.shape
    multiplier = (links["depthwise"].width or 0) // inputs
    left, right = _channel_svd(kernel, multiplier)
    return {
        "depthwise": right.permute(1, 0, 2).reshape(inputs * multiplier, 1, taps),
        "pointwise": left.permute(2, 1, 0).reshape(outputs, inputs * multiplier),
    }


def _channel_svd(kernel: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(rank, C, N) and (rank, C, taps): outer products of both, added up, are each channel's nearest slice."""
    outputs, inputs, taps = kernel.shape
    left, values, right = torch.linalg.svd(kernel.permute(1, 0, 2), full_matrices=False)
    kept = min(rank, values.shape[1])
    root = values[:, :kept].sqrt()
    u, v = kernel.new_zeros(rank, inputs, outputs), kernel.new_zeros(rank, inputs, taps)
    u[:kept] = (left[:, :, :kept] * root[:, None]).permute(2, 0, 1)
    v[:kept] = (right[:, :kept] * root[:, :, None]).permute(1, 0, 2)
    return u, v


def _inverted_residual(kernel: Tensor, links: Mapping[str, Link], _: int) -> Kernels:
    """Terms a b k over outputs, inputs and taps, as many as the expanded channels: a CP decomposition (see `terms`)."""
    project, expand, filters = terms(kernel, links["expand"].width or 0)
    return {"expand": expand, "depthwise": filters[:, None], "project": project}


def _shuffle_v1(kernel: Tensor, links: Mapping[str, Link], _: int) -> Kernels:
    """Each pair of an input and an output group has channels of its own between the layers, found by `terms`.

    The shuffle brings channel (i, j) of the first layer, group i, to place (j, i), so that every output group reads
    as many channels of each input group: the kernel falls apart into blocks (output group, input group), each of
    which is decomposed alone (ShuffleNet, arXiv:1707.01083).
    """
    outputs, inputs, taps = kernel.shape
    groups, hidden = links["expand"].groups, links["expand"].width or 0
    share = hidden // groups
    rank = share // groups
    expand = kernel.new_zeros(groups, share, inputs // groups)
    filters = kernel.new_zeros(groups, share, taps)
    project = kernel.new_zeros(groups, outputs // groups, share)
    blocks = kernel.reshape(groups, outputs // groups, groups, inputs // groups, taps)
    for o in range(groups):
        for i in range(groups):
            a, b, k = terms(blocks[o, :, i], rank, parts=groups**2)
            place = torch.arange(rank) + o * rank  # channels of input group i that go to output group o
            expand[i, place] = b
            shuffled = place * groups + i - o * share
            filters[o, shuffled] = k
            project[o][:, shuffled] = a
    return {
        "expand": expand.flatten(0, 1),
        "depthwise": filters.reshape(hidden, 1, taps),
        "project": project.flatten(0, 1),
    }


def _shuffle_v2(kernel: Tensor, links: Mapping[str, Link], centre: int) -> Kernels:
    """Even outputs are the left branch's, odd ones the right one's, as the final shuffle deals them out.

    A channel that passes keeps the weight that its output gave it at the window's centre, by the layer behind the
    shuffle: the projection of that output's kernel. At stride 2 or another width the left branch is a depthwise
    separable layer, started like one. The right branch is started by `terms` from the inputs that it reads
    (ShuffleNet V2, arXiv:1807.11164).
    """
    outputs = len(kernel)
    half = outputs // 2
    scale = kernel.new_ones(outputs, 1)
    found: Kernels = {}
    if "passing" in links:
        own = torch.arange(half)
        scale[0::2, 0] = kernel[0::2][own, own, centre]
        read = kernel[1::2, half:]
    else:
        left, right = _channel_svd(kernel[0::2], 1)
        found = {"left_depthwise": right[0][:, None], "left": left[0].T}
        read = kernel[1::2]
    expand, reduce, filters = terms(read, links["reduce"].width or 0)
    return {**found, "reduce": reduce, "depthwise": filters[:, None], "expand": expand, "scale": scale}


def _interleaved(kernel: Tensor, links: Mapping[str, Link], _: int) -> Kernels:
    """Each group of outputs reads one channel of each primary group: the nearest rank-one block, by SVD.

    The shuffle is the permutation of interleaved group convolution (IGCV, arXiv:1707.02725); its way back is left
    out, because the outputs' order comes from the old layer. Blocks (output group, primary group) tile the kernel,
    so that this is the nearest kernel of the form, by Eckart and Young (1936).
    """
    outputs, inputs, taps = kernel.shape
    groups, partitions = links["primary"].groups, links["secondary"].groups
    blocks = kernel.reshape(partitions, outputs // partitions, groups, -1).permute(0, 2, 1, 3)
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    root = values[..., 0, None].sqrt()
    primary = (right[..., 0, :] * root).transpose(0, 1)  # (groups, partitions, inputs a group x taps)
    secondary = (left[..., 0] * root).transpose(1, 2)  # (partitions, outputs a partition, groups)
    return {"primary": primary.reshape(inputs, inputs // groups, taps), "secondary": secondary.flatten(0, 1)}


def _fire(kernel: Tensor, links: Mapping[str, Link], centre: int) -> Kernels:
    """The squeezed channels are the leading input directions of what both layers behind are to compute.

    The first half of the outputs goes to the 1 x 1 layer and keeps its centre tap; the rest keep their kernels. The
    rows of both, one above the other, are projected onto their leading right singular vectors, the nearest of that
    rank (SqueezeNet, arXiv:1602.07360; Eckart and Young 1936). Which outputs would be served best by the 1 x 1 layer
    is not asked: the readers of the channels count on their order.
    """
    half = links["pointwise"].width or 0
    rows = torch.cat([kernel[:half, :, centre], kernel[half:].transpose(1, 2).flatten(0, 1)])
    basis = torch.linalg.svd(rows, full_matrices=True)[2][: links["squeeze"].width]
    return {
        "squeeze": basis,
        "pointwise": kernel[:half, :, centre] @ basis.T,
        "windows": torch.einsum("nct,sc->nst", kernel[half:], basis),
        "scale": kernel.new_ones(len(kernel), 1),
    }


_STARTS: dict[str, Callable[[Tensor, Mapping[str, Link], int], Kernels]] = {
    "depthwise_separable": _depthwise_separable,
    "inverted_residual": _inverted_residual,
    "shuffle_v1": _shuffle_v1,
    "shuffle_v2": _shuffle_v2,
    "interleaved": _interleaved,
    "fire": _fire,
}


def terms(kernel: Tensor, rank: int, parts: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(N, rank), (rank, C) and (rank, taps) whose outer products add up to the kernel (N, C, taps), nearly.

    The start takes the largest singular values of all input channels' slices (see `_depthwise_separable`): its error
    is exactly the values left out. Sweeps of alternating least squares follow and only lower it (CP decomposition,
    Lebedev et al. 2015, arXiv:1412.6553); they may take 1 / `parts` of the work. Deterministic.
    """
    outputs, inputs, taps = kernel.shape
    most = min(outputs, taps)
    left, right = _channel_svd(kernel, most)
    strength = left.square().sum(2).T.flatten()  # (C x most): the root is on either side
    chosen = strength.argsort(descending=True, stable=True)[:rank]
    a, b, k = kernel.new_zeros(outputs, rank), kernel.new_zeros(rank, inputs), kernel.new_zeros(rank, taps)
    channel, turn = chosen // most, chosen % most
    count = torch.arange(len(chosen))
    a[:, : len(chosen)], k[: len(chosen)] = left[turn, channel].T, right[turn, channel]
    b[count, channel] = 1.0
    goal = float(kernel.square().sum())
    best, found = _error(kernel, a, b, k), (a, b, k)
    sweeps = int(min(SWEEPS, WORK // parts // (3 * kernel.numel() * rank + rank**3)))
    for _ in range(sweeps):
        if best <= 1e-12 * goal:
            break
        a = _solved((b @ b.T) * (k @ k.T), torch.einsum("nct,rc,rt->rn", kernel, b, k)).T
        b = _solved((a.T @ a) * (k @ k.T), torch.einsum("nct,nr,rt->rc", kernel, a, k))
        k = _solved((a.T @ a) * (b @ b.T), torch.einsum("nct,nr,rc->rt", kernel, a, b))
        a, b, k = _even(a, b, k)
        error = _error(kernel, a, b, k)
        if error < best:
            gained, best, found = best - error, error, (a, b, k)
            if gained <= 1e-6 * goal:
                break
    return found


def _error(kernel: Tensor, a: Tensor, b: Tensor, k: Tensor) -> float:
    return float((kernel - torch.einsum("nr,rc,rt->nct", a, b, k)).square().sum())


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    ridge = RIDGE * float(gram.diagonal().mean()) + 1e-30
    found: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), right)
    return found


def _even(a: Tensor, b: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same terms with their norms spread evenly over the three factors."""
    norms = a.norm(dim=0), b.norm(dim=1), k.norm(dim=1)
    even = (norms[0] * norms[1] * norms[2]).pow(1 / 3)
    scale = [torch.where(norm > 0, even / norm.clamp(min=1e-30), torch.zeros_like(norm)) for norm in norms]
    return a * scale[0], b * scale[1][:, None], k * scale[2][:, None]
