"""Weights prepared for int8: equalised, rounded with care, biases corrected; the runtimes round what is left."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.network.folding import fold_batch_norms, foldable, unfolded
from mobilekit.network.grids import along, int8_rounded, int8_scales
from mobilekit.network.layer_calls import Layer, out_dim
from mobilekit.transforms._criteria.subject import working_copy
from mobilekit.transforms._quantisation.bias_correction import correct_biases
from mobilekit.transforms._quantisation.compensation import round_with_compensation
from mobilekit.transforms._quantisation.equalisation import equalise
from mobilekit.transforms._quantisation.recording import layers_in_order, one_batch
from mobilekit.transforms._quantisation.rounding import learn_rounding
from mobilekit.transforms._quantisation.scaling import layer_at
from mobilekit.transforms._quantisation.smoothing import smooth
from mobilekit.types import Calibration, Network

BATCH = 16
"""Images that run at once where only ranges are looked at."""
ON_GRID = 1e-3
"""Steps that a weight may be off a value of its grid, for folding a batch norm moves last digits."""


@dataclass(frozen=True)
class Preparation:
    """What is done to the weights before a runtime rounds them."""

    equalise: bool = False
    correct_bias: bool = False
    rounding: Literal["nearest", "learned"] = "nearest"

    @property
    def needs_data(self) -> bool:
        """Whether calibration inputs are a must."""
        return self.correct_bias or self.rounding == "learned"


def prepared(
    module: nn.Module,
    network: Network,
    wish: Preparation,
    calibration: Calibration | None,
) -> nn.Module:
    """A copy of the module with the same layers, names and trace, whose weights suffer less from int8.

    Batch norms that an exporter folds become part of the weights, and are left as the addition of a bias. Half
    precision is worked on in float32 and rounded back. Raises UnsupportedError where calibration inputs are needed and
    missing, and where there is nothing to equalise; BadInputError where weights or inputs are not finite or do not fit.
    """
    if wish.needs_data and (calibration is None or not calibration.inputs):
        needing = "bias correction" if wish.correct_bias else "learned rounding"
        raise UnsupportedError(f"int8 with {needing} needs calibration inputs, and there are none")
    _check(module, network, calibration)
    work = working_copy(module)
    folds = foldable(work, network)
    plain = fold_batch_norms(work, network)
    if wish.equalise:
        equalised = equalise(plain, network, calibration)
        if not equalised.pairs:
            reasons = list(equalised.refused.items()) or [("the network", "it has no layer with weights of its own")]
            raise UnsupportedError(f"int8 cannot equalise layers here: {reasons[0][0]}: {reasons[0][1]}")
        plain = equalised.module
    better = plain
    if wish.rounding == "learned" and calibration is not None:
        better = learn_rounding(plain, network, calibration).module
    if wish.correct_bias and calibration is not None:
        better = correct_biases(better, plain, network, one_batch(plain, network, calibration))
    return unfolded(module, better, folds)


def rounded_for_file(
    module: nn.Module, network: Network, calibration: Calibration, layers: Collection[str]
) -> nn.Module:
    """A copy of the module, as `prepared` makes them, with the weights of these layers where an int8 file has them.

    Channels are smoothed, weights rounded with compensation, and biases take off what is left of shifts. Layers that
    lie on their grids already, since they were trained or rounded there, keep their weights; where that is so for all
    of `layers` (paths), the copy is equal to the module. Raises as `prepared`.
    """
    _check(module, network, calibration)
    work = working_copy(module)
    folds = foldable(work, network)
    plain = fold_batch_norms(work, network)
    paths = [path for path in layers_in_order(plain, network) if path in layers]
    done = [path for path in paths if _on_grid(layer_at(plain, path))]
    if len(done) == len(paths):
        return copy.deepcopy(module).eval()
    inputs = one_batch(plain, network, calibration)
    with contextlib.suppress(UnsupportedError):  # without it, rounding is harder and still right
        plain = smooth(plain, network, torch.split(inputs, BATCH), done)
    better = round_with_compensation(plain, network, inputs, paths)
    return unfolded(module, correct_biases(better, plain, network, inputs, paths), folds)


def _on_grid(layer: Layer) -> bool:
    dim = out_dim(layer)
    weight = layer.weight.detach()
    step = along(int8_scales(weight, dim), weight, dim)
    return bool(((weight - int8_rounded(weight, dim)).abs() <= ON_GRID * step).all())


def _check(module: nn.Module, network: Network, calibration: Calibration | None) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BadInputError(f"{name} holds values that are not finite: it cannot be quantised")
    if not any(isinstance(layer, Layer) for layer in module.modules()):
        raise UnsupportedError("int8 cannot prepare the weights: the network has no convolution or linear layer")
    wanted = tuple(network.input_shape[1:])
    for batch in calibration.inputs if calibration is not None else ():
        if tuple(batch.shape[1:]) != wanted or not len(batch):
            raise BadInputError(f"calibration inputs have shape {tuple(batch.shape)}, the network reads (N, *{wanted})")
        if not bool(torch.isfinite(batch).all()):
            raise BadInputError("the calibration inputs hold values that are not finite")
