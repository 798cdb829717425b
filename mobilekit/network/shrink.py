"""Removes channels from a module: slices every parameter that runs over them and mends the layers' attributes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from mobilekit.interfaces import Keep
from mobilekit.types import Axis, Network


def shrink(module: nn.Module, network: Network, keep: Keep) -> nn.Module:
    """A copy of the module in which each named channel group holds only the kept channels.

    Weights are sliced in place of a rebuilt layer, so that subclasses keep their own behaviour (padding of their
    own, for instance). `keep` maps group -> ascending indices into the group's present channels.
    """
    slim = copy.deepcopy(module)
    cut(slim, network, keep)
    return slim


def cut(module: nn.Module, network: Network, keep: Keep) -> None:
    """Remove channels from the module itself; `shrink` does it to a copy."""
    owners = _owners(module)
    done: set[int] = set()
    changed: set[str] = set()
    for name, axes in network.axes.items():
        touched = {dim: axis for dim, axis in axes.items() if any(group in keep for group in axis.groups)}
        path, _, leaf = name.rpartition(".")
        tensor = getattr(module.get_submodule(path), leaf)
        if not touched or id(tensor) in done:
            continue
        sliced = tensor.detach()
        for dim, axis in touched.items():
            sliced = sliced.index_select(dim, _indices(axis, network, keep).to(sliced.device))
        new = nn.Parameter(sliced, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else sliced
        done.add(id(new))
        for owner_path, owner_leaf in owners[id(tensor)]:
            _replace(module.get_submodule(owner_path), owner_leaf, new)
            changed.add(owner_path)
    for path in changed:
        _mend_attributes(module.get_submodule(path))


def _owners(module: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """Tensor -> every module path and name that holds it: tied weights are cut once and stay tied."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for path, owner in module.named_modules():
        for leaf, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((path, leaf))
    return owners


def _indices(axis: Axis, network: Network, keep: Keep) -> torch.Tensor:
    """Entries of the axis that stay."""
    indices: list[int] = []
    offset = 0
    for group in axis.groups:
        width = network.groups[group].width
        for channel in keep.get(group, range(width)):
            start = (offset + channel) * axis.repeat
            indices.extend(range(start, start + axis.repeat))
        offset += width
    return torch.tensor(indices, dtype=torch.long)


def _replace(owner: nn.Module, leaf: str, new: torch.Tensor) -> None:
    if isinstance(new, nn.Parameter):
        setattr(owner, leaf, new)
    else:
        owner.register_buffer(leaf, new, persistent=leaf not in owner._non_persistent_buffers_set)


def _mend_attributes(layer: nn.Module) -> None:
    """Bring the numbers that a layer keeps beside its weights in line with them."""
    if isinstance(layer, nn.ConvTranspose2d):
        layer.in_channels = layer.weight.shape[0]
        layer.out_channels = layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Conv2d):
        layer.out_channels = layer.weight.shape[0]
        if layer.groups > 1:  # only depthwise convolutions are ever cut: one group a channel
            layer.groups = layer.out_channels
        layer.in_channels = layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.modules.batchnorm._NormBase):  # batch and instance norms
        kept = next(t for t in (layer.running_mean, layer.weight) if t is not None)
        layer.num_features = kept.shape[0]
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = layer.weight.shape[0]
