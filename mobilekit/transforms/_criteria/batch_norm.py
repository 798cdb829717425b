"""Network slimming by the scales of batch norms, and fresh statistics for them after pruning."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.transforms._criteria.subject import Subject, batches, run, working_copy
from mobilekit.types import Calibration, Network

STILL = 1e-6
"""A channel whose variance on the calibration inputs falls below this part of the former one does not vary there."""


def bn_scale(subject: Subject) -> torch.Tensor:
    """Sum of |gamma| over the group's batch norms (Liu et al. 2017, arXiv:1708.06519).

    Where several entries of a batch norm belong to one channel (behind a flattened map), their mean counts.
    Raises UnsupportedError where the group has no batch norm with a scale.
    """
    found = [gamma.detach().to("cpu", torch.float64).abs()[entries] for gamma, entries in gammas(subject)]
    if not found:
        raise UnsupportedError(f"{subject.group} cannot be pruned by bn_scale: no batch norm with a scale follows it")
    return torch.stack([values.mean(dim=1) for values in found]).sum(dim=0)


def gammas(subject: Subject) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Scales of the batch norms over the group, each with the entries of every channel, int64 (channels, entries)."""
    found = {}
    for name, gamma in _scales(subject.module, subject.network):
        axis = subject.network.axes[name][0]
        if subject.group in axis.groups:
            found[id(gamma)] = (gamma, subject.entries(axis))
    return list(found.values())


def sparsity_penalty(module: nn.Module, network: Network, strength: float) -> torch.Tensor:
    """`strength` times the sum of |gamma| over the batch norms of every prunable group, a scalar with a gradient.

    Added to the loss of a training loop, it drives scales to zero, so that `bn_scale` finds channels that are not
    needed (Liu et al. 2017, arXiv:1708.06519). Channels of refused groups are left out, frozen scales too.
    Raises UnsupportedError where there is nothing to penalise, BadInputError for a strength below zero.
    """
    if not strength >= 0:
        raise BadInputError(f"the sparsity penalty's strength is {strength}: it must be zero or more")
    terms: dict[int, torch.Tensor] = {}
    for name, gamma in _scales(module, network):
        axis = network.axes[name][0]
        prunable = [
            network.groups[group].refused is None
            for group in axis.groups
            for _ in range(network.groups[group].width * axis.repeat)
        ]
        if gamma.requires_grad and any(prunable):
            terms[id(gamma)] = gamma[torch.tensor(prunable, device=gamma.device)].abs().sum()
    if not terms:
        raise UnsupportedError("the network has no batch norm with a trainable scale over channels that can be pruned")
    return strength * torch.stack(list(terms.values())).sum()


def _scales(module: nn.Module, network: Network) -> Iterator[tuple[str, nn.Parameter]]:
    for name in network.axes:
        path, _, leaf = name.rpartition(".")
        layer = module.get_submodule(path)
        if leaf == "weight" and isinstance(layer, _BatchNorm):
            yield name, layer.weight


def recalibrate(module: nn.Module, calibration: Calibration) -> None:
    """Give the module's batch norms fresh running statistics: plain (Cesaro) means over the calibration batches.

    A channel that does not vary on the calibration inputs keeps its former statistics: they say nothing about its
    spread, and a variance of zero would blow up whatever varies later.
    Raises UnsupportedError where a batch norm sees a single value a channel.
    """
    twin = working_copy(module)
    norms = {path: layer for path, layer in twin.named_modules() if isinstance(layer, _BatchNorm)}
    fresh = {path: layer for path, layer in norms.items() if layer.running_mean is not None}
    former = {path: copy.deepcopy(layer) for path, layer in fresh.items()}
    for layer in fresh.values():
        layer.reset_running_stats()
        layer.momentum, layer.training = None, True
    with torch.no_grad():
        for batch in batches(twin, calibration):
            try:
                run(twin, batch)
            except BadInputError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UnsupportedError(
                    "the batch norms cannot be recalibrated: one of them sees a single value a channel; "
                    "give larger calibration batches"
                ) from error
        for path, layer in fresh.items():
            if layer.num_batches_tracked:
                _take_over(module.get_submodule(path), layer, former[path])


def _take_over(target: nn.Module, fresh: _BatchNorm, former: _BatchNorm) -> None:
    after, before = _statistics(fresh), _statistics(former)
    varies = after["running_var"] > STILL * before["running_var"]
    for leaf, values in after.items():
        chosen = torch.where(varies, values, before[leaf])
        if not bool(values.isfinite().all()):
            raise BadInputError("the calibration inputs lead to batch norm statistics that are not finite")
        target.get_buffer(leaf).copy_(chosen)


def _statistics(layer: _BatchNorm) -> dict[str, torch.Tensor]:
    return {leaf: layer.get_buffer(leaf) for leaf in ("running_mean", "running_var")}
