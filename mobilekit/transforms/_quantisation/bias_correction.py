"""Bias correction on calibration inputs (Nagel et al. 2019, arXiv:1906.04721, section 4.2 and appendix D)."""

from __future__ import annotations

import copy

import torch
from torch import nn

from mobilekit.network.grids import int8_rounded
from mobilekit.network.layer_calls import Layer, out_dim
from mobilekit.transforms._quantisation.recording import chosen, layers_in_order, mean_output, output_means
from mobilekit.types import Calibration, Network

IMAGES = 256
"""Calibration images that are looked at, at most: every layer takes a pass over them."""
BATCH = 64


def correct_biases(module: nn.Module, reference: nn.Module, network: Network, calibration: Calibration) -> nn.Module:
    """A copy whose biases take off what rounding the weights to int8 shifts each layer's mean output by.

    Layers come in order: each is looked at behind layers that are rounded and corrected already, and compared with
    the same layer of `reference`. The weights themselves stay as they are. A layer without a bias stays as it is: what
    it shifts is taken off behind it. `module` and `reference` have their batch norms folded.
    """
    corrected, rounded = copy.deepcopy(module), copy.deepcopy(module)
    paths = layers_in_order(rounded, network)
    for path in paths:
        layer = _layer(rounded, path)
        with torch.no_grad():
            layer.weight.copy_(int8_rounded(layer.weight, out_dim(layer)))
    inputs = chosen(reference, calibration, IMAGES, BATCH)
    wanted = output_means(reference, paths, inputs)
    done: set[int] = set()
    for path in paths:
        layer = _layer(rounded, path)
        if layer.bias is None or path not in wanted or id(layer.bias) in done:
            continue
        done.add(id(layer.bias))
        shift = mean_output(rounded, path, inputs) - wanted[path]
        with torch.no_grad():
            layer.bias -= shift.to(layer.bias.dtype)
            _layer(corrected, path).bias.copy_(layer.bias)  # type: ignore[union-attr]
    return corrected


def _layer(module: nn.Module, path: str) -> Layer:
    layer = module.get_submodule(path)
    assert isinstance(layer, Layer)  # noqa: S101  (as `layers_in_order` found them)
    return layer
