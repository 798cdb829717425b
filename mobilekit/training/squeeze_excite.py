"""Replaces a squeeze-excite block by the constant mean of its gate, folded into a neighbouring layer.

A block (Hu et al. 2018, arXiv:1709.01507) multiplies a map's channels by a gate that it computes from their means.
Where the gate hardly depends on the input, the constant does the same for nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.evaluate import divergence, outputs
from mobilekit.training.gates import owners, scales_of
from mobilekit.types import Calibration, Network, Operator, within

PRODUCTS = frozenset({"mul", "imul", "rmul", "multiply"})
HOMOGENEOUS = (None, "relu", "leaky_relu")
"""Activations f with f(s x) = s f(x) for every s of zero or more."""
PASSING = frozenset({"global_pool", "avg_pool", "max_pool", "resize"})
"""Operators that a positive factor a channel passes through."""
Target = tuple[str, int, int]
"""A parameter, the axis along which it is scaled, and the entries of one channel there."""


@dataclass(frozen=True)
class FoldedSqueezeExcite:
    """The module without the block, and what that did to it."""

    module: nn.Module
    factors: torch.Tensor
    """Mean of the gate over the calibration inputs, float64 (channels,)."""
    spread: float
    """Standard deviation of the gate over the inputs relative to its mean, averaged over channels: 0 loses nothing."""
    divergence: float
    """Divergence of the output from the original's on the calibration inputs (`mobilekit.evaluate.divergence`)."""


def fold_squeeze_excite(
    module: nn.Module, network: Network, calibration: Calibration, place: str
) -> FoldedSqueezeExcite:
    """A copy of the module with `nn.Identity` at the path `place` and the block's mean gate in a neighbour's weights.

    `network` is the module's trace. The gate goes into the layer in front of the block (or its batch norm) where that
    feeds nothing else and only a ReLU lies between, else into all layers that read the block.
    Raises UnsupportedError where the block does anything else than to scale its input's channels, where neither
    neighbour can take the gate, and without calibration inputs; BadInputError where the gate is not finite.
    """
    inside = [o for o in network.operators if within(o.module, place)] if place else []
    product = _product(network, inside, place)
    factors, spread = _mean_gate(module, place, calibration, network.width(product.out_groups))
    targets = _targets(module, network, product, {o.name for o in inside}, bool((factors >= 0).all()))
    if isinstance(targets, str):
        raise UnsupportedError(f"'{place}' cannot be folded: {targets}")
    folded = copy.deepcopy(module)
    folded.set_submodule(place, nn.Identity())
    with torch.no_grad():
        for name, dim, repeat in targets:
            parameter = folded.get_parameter(name)
            shape = [1] * parameter.ndim
            shape[dim] = -1
            scale = factors.repeat_interleave(repeat).reshape(shape).to(parameter.device)
            parameter.copy_(parameter.double() * scale)
    inputs = torch.cat(list(_inputs(module, calibration)))
    return FoldedSqueezeExcite(folded, factors, spread, divergence(outputs(module, inputs), outputs(folded, inputs)))


def _product(network: Network, inside: list[Operator], place: str) -> Operator:
    """The operator that applies the gate. Raises UnsupportedError where the operators are no squeeze-excite block."""
    names = {o.name for o in inside}
    products = [o for o in inside if o.kind == "mul"]
    if not inside or len(products) != 1:
        found = f"{len(products)} products" if inside else "no operators"
        raise UnsupportedError(f"'{place}' is no squeeze-excite block: the network has {found} there")
    sources = {source for o in inside for source in o.inputs if source not in names}
    leaks = [o.name for o in network.operators if o.name not in names and (names - {products[0].name}) & set(o.inputs)]
    if len(sources) != 1 or leaks:
        reason = f"{leaks[0]} reads what is inside it" if leaks else f"it reads {len(sources)} maps"
        raise UnsupportedError(f"'{place}' is no squeeze-excite block: {reason}")
    return products[0]


# ---------------------------------------------------------------- the gate


class _Watch(TorchFunctionMode):
    """Sees what the block's input is multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.source: torch.Tensor | None = None
        self.factor: torch.Tensor | None = None
        self.result: torch.Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        source = self.source
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if source is not None and name in PRODUCTS and len(args) == 2 and any(arg is source for arg in args):
            other = args[1] if args[0] is source else args[0]
            if isinstance(other, torch.Tensor):
                self.factor, self.result = other.detach().clone(), result
        return result


def _mean_gate(module: nn.Module, place: str, calibration: Calibration, channels: int) -> tuple[torch.Tensor, float]:
    """Mean over the calibration inputs, float64 (channels,), and the relative spread."""
    if not calibration.inputs:
        raise UnsupportedError(f"'{place}' cannot be folded: the mean of its gate needs calibration inputs")
    watch, seen = _Watch(), []
    twin = copy.deepcopy(module).eval()

    def before(_: nn.Module, given: tuple[Any, ...]) -> None:
        watch.source, watch.factor = (given[0] if given else None), None

    def after(_: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        factor = watch.factor
        if factor is None or result is not watch.result:
            raise UnsupportedError(f"'{place}' is no squeeze-excite block: it does not return its input times a gate")
        maps = factor.expand_as(given[0]).flatten(2)
        if not bool(maps.isfinite().all()):
            raise BadInputError(f"the gate of '{place}' is not finite on the calibration inputs")
        if maps.shape[1] != channels or bool((maps != maps[:, :, :1]).any()):
            raise UnsupportedError(f"'{place}' is no squeeze-excite block: its gate is not one number a channel")
        seen.append(maps[:, :, 0].to("cpu", torch.float64))
        watch.source = None

    block = twin.get_submodule(place)
    block.register_forward_pre_hook(before)
    block.register_forward_hook(after)
    with torch.no_grad(), watch:
        for batch in _inputs(module, calibration):
            twin(batch)
    if len(seen) != len(calibration.inputs):
        raise UnsupportedError(f"'{place}' cannot be folded: the forward runs it {len(seen)} times")
    gates = torch.cat(seen)
    mean = gates.mean(dim=0)
    spread = gates.std(dim=0, correction=0) / mean.abs().clamp(min=torch.finfo(torch.float64).tiny)
    return mean, float(spread.mean())


def _inputs(module: nn.Module, calibration: Calibration) -> Iterator[torch.Tensor]:
    like = next(module.parameters(), torch.zeros(()))
    for batch in calibration.inputs:
        yield batch.detach().to(like.device, like.dtype, copy=True)


# ---------------------------------------------------------------- where it goes


def _targets(
    module: nn.Module, network: Network, product: Operator, inside: set[str], positive: bool
) -> list[Target] | str:
    """The parameters that take the gate, in front of the block or else behind it; a sentence where none can."""
    front = _in_front(module, network, product, inside, positive)
    if not isinstance(front, str):
        return front
    behind: list[Target] = []
    reason = _behind(network, product, positive, behind)
    held = owners(module)
    reason = reason or next((f"{name} is shared or computed" for name, _, _ in behind if held.get(name) != 1), None)
    return f"{front}, and {reason}" if reason else behind


def _in_front(
    module: nn.Module, network: Network, product: Operator, inside: set[str], positive: bool
) -> list[Target] | str:
    source = next((o for o in network.operators if o.name in product.inputs and o.name not in inside), None)
    if source is None:
        return "it reads the network's input"
    readers = [o.name for o in network.operators if source.name in o.inputs and o.name not in inside]
    if readers:
        return f"{readers[0]} reads the same map"
    if source.activation not in HOMOGENEOUS or (source.activation and not positive):
        return f"a {source.activation} lies between {source.name} and its product"
    tensors = _scaling(module, network, source)
    if isinstance(tensors, str):
        return tensors
    held = owners(module)
    used = sum(o.module == source.module for o in network.operators)
    if used > 1 or any(held.get(name) != 1 for name, _ in tensors):
        return f"the weights of {source.name} are shared, or are no parameters"
    return [(name, dim, 1) for name, dim in tensors]


def _scaling(module: nn.Module, network: Network, source: Operator) -> tuple[tuple[str, int], ...] | str:
    """The parameters that scale what this layer gives, with their channel axes; a sentence where there are none."""
    weight = f"{source.module}.weight"
    if source.kind == "batch_norm":
        return (weight, 0), (f"{source.module}.bias", 0)
    if source.kind not in ("conv", "linear", "conv_transpose"):
        return f"{source.name} in front of it is no layer with weights"
    like = next(module.parameters())
    scales = scales_of(module, torch.zeros(network.input_shape, dtype=like.dtype, device=like.device)).get(weight)
    if scales is None or scales.refused:
        return (scales and scales.refused) or f"the weights of {source.name} are computed"
    return scales.tensors


def _behind(network: Network, product: Operator, positive: bool, targets: list[Target]) -> str | None:
    """Fill in the weights that read the product; a sentence where something reads it that cannot take a factor."""
    front, ends = [product.name], True
    while front:
        name = front.pop()
        for reader in (o for o in network.operators if name in o.inputs):
            ends = False
            weight, alone = f"{reader.module}.weight", sum(o.module == reader.module for o in network.operators) == 1
            dense = reader.kind in ("conv", "linear") and reader.groups == 1
            if (dense or reader.depthwise) and reader.in_groups == product.out_groups and alone:
                targets.append((weight, 0 if reader.depthwise else 1, reader.in_repeat))
            elif positive and (
                reader.kind in PASSING or (reader.kind == "activation" and reader.activation in HOMOGENEOUS)
            ):
                front.append(reader.name)
            else:
                return f"{reader.name} behind it cannot take a factor a channel"
    return "it is the network's output" if ends else None
