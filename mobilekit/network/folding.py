"""Folds batch norms into the layers in front of them, as exporters do, and puts folded weights back beside them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mobilekit.errors import UnsupportedError
from mobilekit.network.layer_calls import CallGraph, Layer
from mobilekit.network.nodes import op_name
from mobilekit.types import Network

TOLERANCE = 1e-3
"""Largest change of an output that folding may cause, relative to the largest output."""


@dataclass(frozen=True)
class Fold:
    """Paths of a layer and of the batch norm that alone reads its output."""

    layer: str
    norm: str


def foldable(module: nn.Module, network: Network) -> tuple[Fold, ...]:
    """The batch norms that can become part of the layer before them, in the order of the forward.

    One stays where something else reads between it and the layer, where either of them is used twice or shares its
    weights, and where what comes before it is no convolution, transposed convolution of one group, or linear layer.
    Raises BadInputError where torch.export cannot trace the module.
    """
    graph = CallGraph(module, network)
    found = []
    for call in graph.calls:
        layer, users = module.get_submodule(call.path), list(call.node.users)
        if len(users) != 1 or op_name(users[0]) != "batch_norm" or users[0].args[0] is not call.node:
            continue
        path = graph.owner(users[0].args[3], "running_mean")
        norm = module.get_submodule(path) if path is not None else None
        grouped = isinstance(layer, nn.ConvTranspose2d) and call.groups > 1
        if path is not None and isinstance(norm, _BatchNorm) and graph.only_place(path) and not grouped:
            found.append(Fold(call.path, path))
    return tuple(found)


def fold_batch_norms(module: nn.Module, network: Network) -> nn.Module:
    """A copy in eval mode whose batch norms are part of the layers before them; each becomes an identity.

    What `foldable` does not list stays. Weights of exported files are those of the folded layers: rounding has to be
    prepared on them. Raises BadInputError where torch.export cannot trace the module, and UnsupportedError where
    folding changes its outputs (a forward of its own that does not add the layer's bias).
    """
    folded = copy.deepcopy(module).eval()
    for fold in foldable(module, network):
        layer, norm = _pair(folded, fold)
        transposed = isinstance(layer, nn.ConvTranspose2d)
        numbers = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        with torch.no_grad():
            weight, bias = fuse_conv_bn_weights(layer.weight, layer.bias, *numbers, transpose=transposed)  # type: ignore[arg-type]
        trainable = layer.weight.requires_grad
        layer.weight = nn.Parameter(weight.detach(), requires_grad=trainable)
        layer.bias = nn.Parameter(bias.detach(), requires_grad=trainable)
        folded.set_submodule(fold.norm, nn.Identity())
    check_same(folded, module, random_input(module, network), "the batch norms cannot be folded")
    return folded


def unfolded(original: nn.Module, folded: nn.Module, folds: Sequence[Fold]) -> nn.Module:
    """A copy of the original, batch norms included, that computes what the folded module does.

    Layers take the folded weights. The batch norms of `folds` (of `foldable`) scale by one and add the folded bias
    where their layer has none of its own: parameters, their names and the trace stay those of the original, and an
    exporter that folds them finds the folded weights.
    """
    result = copy.deepcopy(original).eval()
    norms = {fold.layer: _pair(result, fold)[1] for fold in folds}
    with torch.no_grad():
        for path, layer in result.named_modules():
            if not isinstance(layer, Layer) or not isinstance(layer.weight, nn.Parameter):
                continue
            source = folded.get_submodule(path)
            layer.weight.copy_(source.weight)  # type: ignore[arg-type]
            if layer.bias is not None:
                layer.bias.copy_(source.bias)  # type: ignore[arg-type]
            if path in norms:
                _neutralise(norms[path], None if layer.bias is not None else source.bias)  # type: ignore[arg-type]
    return result


def _neutralise(norm: _BatchNorm, bias: torch.Tensor | None) -> None:
    """Let the batch norm add this bias and do nothing else."""
    assert norm.running_mean is not None  # noqa: S101  (foldable names those with statistics only)
    assert norm.running_var is not None  # noqa: S101
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    if norm.weight is not None:
        norm.weight.fill_(1)
        norm.bias.zero_()
    if bias is not None and norm.bias is not None:
        norm.bias.copy_(bias)
    elif bias is not None:
        norm.running_mean.copy_(-bias)


def random_input(module: nn.Module, network: Network) -> torch.Tensor:
    """Normal random numbers in the shape of the network's input, in the module's type; always the same."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    numbers = torch.randn(network.input_shape, generator=torch.Generator().manual_seed(0))
    return numbers.to(like.device, like.dtype)


def check_same(changed: nn.Module, module: nn.Module, example: torch.Tensor, what: str) -> None:
    """Raise UnsupportedError, with `what` in front, where the outputs for an input are not the module's."""
    with torch.no_grad():
        wanted, given = copy.deepcopy(module).eval()(example), changed(example)
    # half precision rounds in the eleventh bit
    tolerance = TOLERANCE if example.dtype in (torch.float32, torch.float64) else 0.03
    if not float((given - wanted).abs().max()) <= tolerance * float(wanted.abs().max()):
        raise UnsupportedError(f"{what}: the outputs are not the same afterwards")


def _pair(module: nn.Module, fold: Fold) -> tuple[Layer, _BatchNorm]:
    layer, norm = module.get_submodule(fold.layer), module.get_submodule(fold.norm)
    assert isinstance(layer, Layer)  # noqa: S101  (as `foldable` found them)
    assert isinstance(norm, _BatchNorm)  # noqa: S101
    return layer, norm
