"""Quantisation-aware training: a module that rounds as an int8 file will, with straight-through gradients.

Jacob et al. 2018, arXiv:1712.05877, with the batch norms folded before training; weights of fewer bits as in TWN
(arXiv:1605.04711) and XNOR-Net (arXiv:1603.05279). Any training loop trains the module; `settled` gives it back.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.network.folding import fold_batch_norms
from mobilekit.network.grids import INT8_STEPS, Grid, int8_scales, snapped
from mobilekit.network.layer_calls import Layer, out_dim
from mobilekit.types import Calibration, Network

LEVELS = 255
"""Steps between the least and the largest value of an int8 activation."""
MOMENTUM = 0.01
"""Part of a moving range that each batch renews."""
CHILD = "input_range"
"""Name under which a layer holds the range of its input."""


@dataclass(frozen=True)
class Rounding:
    """What is rounded while training."""

    weights: Literal["int8", "ternary", "binary"] | int = "int8"
    """int8 as the runtimes round it, 2 to 8 bits, ternary or binary."""
    ends: bool = False
    """Whether the first and the last layer have such weights too; int8 weights are everywhere."""
    activations: Literal["int8", "float"] = "int8"
    ranges: Literal["moving", "learned"] = "moving"
    """Moving averages of the least and largest value, which is what runtimes calibrate to, or trained ends."""
    layers: frozenset[str] | None = None
    """Paths of the layers that are rounded, weights and inputs; None: all."""

    def __post_init__(self) -> None:
        """Check the settings."""
        whole = isinstance(self.weights, int) and not isinstance(self.weights, bool) and 2 <= self.weights <= 8
        if not whole and self.weights not in ("int8", "ternary", "binary"):
            raise BadInputError(f"weights cannot be trained in {self.weights!r}: give int8, 2 to 8, ternary or binary")
        if self.activations not in ("int8", "float") or self.ranges not in ("moving", "learned"):
            raise BadInputError("activations are int8 or float, and their ranges moving or learned")


def fake_quantised(
    module: nn.Module, network: Network, calibration: Calibration, rounding: Rounding | None = None
) -> nn.Module:
    """A copy with folded batch norms whose layers round their weights and what they read; to be trained.

    Weights of convolutions and linear layers are parametrised (`torch.nn.utils.parametrize`): the float weight is
    trained, its rounded value is used, and the gradient passes straight through. Every such layer rounds its input to
    8 bits per tensor, asymmetric, with zero on the grid; ranges start at the least and largest value over the
    calibration inputs. What else runs in int8 in a file (sums, concatenations, the output) is not rounded here.
    Batch norms that cannot be folded stay, layers that are parametrised already stay in float, and frozen parameters
    stay frozen.
    Raises UnsupportedError without calibration inputs and where no layer is left to round, BadInputError where
    weights or inputs are not finite and where the module cannot be traced.
    """
    rounding = rounding or Rounding()
    if not calibration.inputs:
        raise UnsupportedError("quantisation-aware training needs calibration inputs for the ranges of activations")
    for name, tensor in module.named_parameters():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BadInputError(f"{name} holds values that are not finite: it cannot be quantised")
    folded = fold_batch_norms(module, network)
    paths = [path for path in _layers(folded, network) if rounding.layers is None or path in rounding.layers]
    if not paths:
        raise UnsupportedError("quantisation-aware training finds no convolution or linear layer to round")
    if rounding.activations == "int8":
        _add_ranges(folded, paths, calibration, rounding.ranges == "learned")
    rounded: dict[int, nn.Module] = {}
    for path in paths:
        grid = rounding.weights
        if grid != "int8" and not rounding.ends and path in (paths[0], paths[-1]):
            continue
        layer = folded.get_submodule(path)
        weight = layer.weight
        # tied weights stay tied: the original parameter is shared by both parametrisations
        rounded.setdefault(id(weight), FakeWeights(out_dim(layer), grid))
        parametrize.register_parametrization(layer, "weight", rounded[id(weight)])
    return folded


def settled(module: nn.Module) -> nn.Module:
    """A copy without parametrisations and ranges: weights are plain float parameters on their grid.

    An exporter that rounds int8 weights to the nearest finds these very values. Calibration is that of the export:
    learned ranges are not carried over. `network.folding.unfolded` puts the weights back beside the batch norms of
    the module that `fake_quantised` was given.
    """
    plain = copy.deepcopy(module).eval()
    for layer in plain.modules():
        if isinstance(layer, Layer):
            if hasattr(layer, CHILD):
                delattr(layer, CHILD)
                hooks = layer._forward_pre_hooks
                for key in [key for key, hook in hooks.items() if hook is _round_input]:
                    del hooks[key]
            if _is_fake(layer):
                _bake(layer)
    return plain


class FakeWeights(nn.Module):
    """Rounds a weight to its grid, a scale for each output channel along `dim`; the gradient passes through."""

    def __init__(self, dim: int, grid: Literal["int8"] | Grid) -> None:
        super().__init__()
        self.dim, self.grid = dim, grid

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight to the weight on its grid, of the same shape."""
        if self.grid == "int8":
            scales = int8_scales(weight.detach(), self.dim).float()
            zeros = torch.zeros_like(scales, dtype=torch.int32)
            return torch.fake_quantize_per_channel_affine(weight, scales, zeros, self.dim, -INT8_STEPS, INT8_STEPS)
        return _Through.apply(weight, snapped(weight.detach(), self.dim, self.grid))  # type: ignore[no-any-return, no-untyped-call]


class _Through(torch.autograd.Function):
    """The second tensor forward, the gradient to the first one back."""

    @staticmethod
    def forward(_ctx: Any, _weight: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(_ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class FakeActivations(nn.Module):
    """Rounds a tensor to 256 values between two ends, with zero among them.

    Learned ends are parameters: clipped values move them, as do rounding errors (LSQ+, Bhalgat et al. 2020,
    arXiv:2004.09576). Moving ones follow the batches seen in training mode.
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, low: torch.Tensor, high: torch.Tensor, learned: bool) -> None:
        super().__init__()
        self.learned = learned
        for name, value in (("low", low.clamp(max=0)), ("high", high.clamp(min=0))):
            if learned:
                self.register_parameter(name, nn.Parameter(value.clone()))
            else:
                self.register_buffer(name, value.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor to its rounded values, of the same shape."""
        if self.training and not self.learned:
            with torch.no_grad():
                self.low.lerp_(x.amin().clamp(max=0), MOMENTUM)
                self.high.lerp_(x.amax().clamp(min=0), MOMENTUM)
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        step = ((high - low) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny * 2**20)
        zero = _round(-low / step)
        return ((_round(x / step) + zero).clamp(0, LEVELS) - zero) * step


def _round(x: torch.Tensor) -> torch.Tensor:
    return _Through.apply(x, x.detach().round())  # type: ignore[no-any-return, no-untyped-call]


def _round_input(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    # looked up on the layer, so that copies of the module use their own ranges
    return (layer.get_submodule(CHILD)(given[0]), *given[1:]) if given else given


def _layers(module: nn.Module, network: Network) -> list[str]:
    """Paths of the layers whose weights are parameters, as the network runs them."""
    named = {path: each for path, each in module.named_modules() if isinstance(each, Layer)}
    order = [operator.module for operator in network.operators]
    paths = dict.fromkeys([path for path in order if path in named] + list(named))
    return [path for path in paths if not parametrize.is_parametrized(named[path])]


def _is_fake(layer: nn.Module) -> bool:
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    return any(isinstance(each, FakeWeights) for each in layer.parametrizations["weight"])  # type: ignore[index]


def _bake(layer: Layer) -> None:
    """Make the rounded weight the layer's parameter.

    `parametrize.remove_parametrizations` would change the class of the layer, which copies share.
    """
    rounded = layer.weight.detach()
    weight = layer.parametrizations["weight"].original  # type: ignore[index, union-attr]
    weight.data.copy_(rounded)
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    layer.register_parameter("weight", weight)


def _add_ranges(module: nn.Module, paths: list[str], calibration: Calibration, learned: bool) -> None:
    """Give each layer the range of what it reads on the calibration inputs."""
    found: dict[str, list[torch.Tensor]] = {path: [] for path in paths}

    def watcher(path: str) -> Any:
        def watch(_layer: nn.Module, given: tuple[Any, ...]) -> None:
            found[path] += [end.detach() for end in given[0].aminmax()] if given else []

        return watch

    handles = [module.get_submodule(path).register_forward_pre_hook(watcher(path)) for path in paths]
    like = next(module.parameters())
    try:
        with torch.no_grad():
            for batch in calibration.inputs:
                module(batch.to(like.device, like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    for path, ends in found.items():
        if not ends:
            continue  # a layer that never runs, or takes its input by name
        values = torch.stack(ends).float()
        if not bool(values.isfinite().all()):
            raise BadInputError(f"'{path}' reads values that are not finite on the calibration inputs")
        layer = module.get_submodule(path)
        layer.add_module(CHILD, FakeActivations(values.min(), values.max(), learned))
        layer.register_forward_pre_hook(_round_input)
