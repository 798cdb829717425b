"""Bias correction on calibration inputs (Nagel et al. 2019, arXiv:1906.04721, section 4.2 and appendix D)."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection

import torch
from torch import nn

from mobilekit.network.grids import int8_rounded
from mobilekit.network.layer_calls import Layer, out_dim
from mobilekit.transforms._quantisation.recording import chosen, layers_in_order, output_means, shifted_outputs
from mobilekit.types import Calibration, Network

IMAGES = 256
"""Calibration images that are looked at, at most."""
FEWEST = 8
VALUES = 32 * 3 * 224 * 224
"""Input values that are looked at, at most, as all images run at once."""


def correct_biases(
    module: nn.Module,
    reference: nn.Module,
    network: Network,
    calibration: Calibration,
    only: Collection[str] | None = None,
) -> nn.Module:
    """A copy whose biases take off what rounding the weights to int8 shifts each layer's mean output by.

    Each layer is looked at behind layers that are rounded and corrected already, and compared with the same layer of
    `reference`: one forward of each does for all. The weights themselves stay as they are. A layer without a bias
    stays as it is: what it shifts is taken off behind it. `module` and `reference` have their batch norms folded.
    `only` names the layers that are rounded, by their paths; None: all.
    """
    corrected, rounded = copy.deepcopy(module), copy.deepcopy(module)
    paths = [path for path in layers_in_order(rounded, network) if only is None or path in only]
    for path in paths:
        layer = _layer(rounded, path)
        with torch.no_grad():
            layer.weight.copy_(int8_rounded(layer.weight, out_dim(layer)))
    most = min(IMAGES, max(FEWEST, VALUES // math.prod(network.input_shape[1:])))
    (inputs,) = chosen(reference, calibration, most, most)
    first = {id(_layer(rounded, path).bias): path for path in reversed(paths)}  # a bias that layers share, once
    biased = [path for path in first.values() if _layer(rounded, path).bias is not None]
    wanted = output_means(reference, biased, inputs)
    for path, shift in shifted_outputs(rounded, wanted, inputs).items():
        bias = _layer(corrected, path).bias
        assert bias is not None  # noqa: S101  (of those that have one)
        with torch.no_grad():
            bias -= shift.to(bias.dtype)
    return corrected


def _layer(module: nn.Module, path: str) -> Layer:
    layer = module.get_submodule(path)
    assert isinstance(layer, Layer)  # noqa: S101  (as `layers_in_order` found them)
    return layer
