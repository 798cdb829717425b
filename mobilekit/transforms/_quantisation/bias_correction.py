"""Bias correction on calibration inputs (Nagel et al. 2019, arXiv:1906.04721, section 4.2 and appendix D)."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn

from mobilekit.network.grids import int8_rounded
from mobilekit.network.layer_calls import out_dim
from mobilekit.transforms._quantisation.recording import layers_in_order, output_means, shifted_outputs
from mobilekit.transforms._quantisation.scaling import layer_at
from mobilekit.types import Network


def correct_biases(
    module: nn.Module,
    reference: nn.Module,
    network: Network,
    inputs: torch.Tensor,
    only: Collection[str] | None = None,
) -> nn.Module:
    """A copy whose biases take off what rounding the weights to int8 shifts each layer's mean output by.

    Each layer is looked at behind layers that are rounded and corrected already, and compared with the same layer of
    `reference`: one forward of `inputs` (N, C, H, W) through each does for all. The weights themselves stay as they
    are. A layer without a bias stays as it is: what it shifts is taken off behind it. `module` and `reference` have
    their batch norms folded. `only` names the layers that are rounded, by their paths; None: all.
    """
    corrected, rounded = copy.deepcopy(module), copy.deepcopy(module)
    paths = [path for path in layers_in_order(rounded, network) if only is None or path in only]
    for path in paths:
        layer = layer_at(rounded, path)
        with torch.no_grad():
            layer.weight.copy_(int8_rounded(layer.weight, out_dim(layer)))
    first = {id(layer_at(rounded, path).bias): path for path in reversed(paths)}  # a bias that layers share, once
    biased = [path for path in first.values() if layer_at(rounded, path).bias is not None]
    wanted = output_means(reference, biased, inputs)
    for path, shift in shifted_outputs(rounded, wanted, inputs).items():
        bias = layer_at(corrected, path).bias
        assert bias is not None  # noqa: S101  (of those that have one)
        with torch.no_grad():
            bias -= shift.to(bias.dtype)
    return corrected
