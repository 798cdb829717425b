"""Learned rounding to int8: AdaRound (Nagel et al. 2020, arXiv:2004.10568)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from mobilekit.network.grids import INT8_STEPS, along, int8_scales
from mobilekit.network.layer_calls import Layer, out_dim
from mobilekit.transforms._quantisation.recording import (
    Activation,
    activations,
    calls_of,
    chosen,
    layers_in_order,
    sharing,
    unchanged,
)
from mobilekit.types import Calibration, Network

STEPS = 200
"""Optimisation steps a layer. The paper takes 10,000 on a GPU; the error falls fastest in the first hundreds."""
RATE = 0.05
IMAGES = 128
"""Calibration images that are used, at most."""
BATCH = 32
MOST_VALUES = 1 << 26
"""Values of one layer's maps that are held at once (256 MB in float32); larger maps are learned from fewer images."""
MOST_MACS = 50_000_000
"""Multiplications of one forward of a step: large maps are learned from fewer images at a time."""
STRETCH = (-0.1, 1.1)
"""The rectified sigmoid reaches zero and one (the paper's zeta and gamma)."""
SHARPNESS = (20.0, 2.0)
"""Exponent of the regulariser at the start and at the end (the paper's beta)."""
WARM_UP = 0.2
"""Part of the steps without the regulariser."""
STRENGTH = 0.02
"""Of the regulariser beside the mean squared error, which counts relative to that of nearest rounding."""


@dataclass(frozen=True)
class Record:
    """Mean squared error of a layer's output, behind its activation, before and after learning."""

    nearest: float
    learned: float


@dataclass(frozen=True)
class Learned:
    """The module with every weight on its int8 grid, and what each layer gained."""

    module: nn.Module
    layers: dict[str, Record]


@dataclass(frozen=True)
class _Call:
    """One call of a layer: what it reads behind rounded layers, and what it gives in the float module."""

    layer: Layer
    given: torch.Tensor
    wanted: torch.Tensor

    def drawn(self, generator: torch.Generator) -> _Call:
        """Neighbouring images of the call, as many as one step can afford."""
        count = len(self.wanted)
        positions = self.wanted[0].numel() // self.layer.weight.shape[out_dim(self.layer)]
        size = min(count, max(1, MOST_MACS // max(1, self.layer.weight.numel() * positions)))
        start = int(torch.randint(count - size + 1, (), generator=generator))
        return _Call(self.layer, self.given[start : start + size], self.wanted[start : start + size])


def learn_rounding(module: nn.Module, network: Network, calibration: Calibration, steps: int | None = None) -> Learned:
    """Round each weight up or down so that its layer's output, behind its activation, stays closest to the float one.

    Layers come in order; each reads what the layers before it give when they are rounded, and is to give what it gives
    in the float module. The grid is that of the runtimes, the largest magnitude of a channel at +-127 steps: it keeps
    its place, so that exporters find the same grid and these very integers. Where nothing is gained, rounding is to
    the nearest. `module` has its batch norms folded.
    """
    rounded, records = copy.deepcopy(module), {}
    follows = activations(module, network)
    images = chosen(module, calibration, IMAGES, BATCH)
    for number, path in enumerate(layers_in_order(module, network)):
        layers, twins = sharing(module, path), sharing(rounded, path)
        act = follows.get(path, unchanged)
        rounding = _Rounding(layers[0].weight.detach(), out_dim(layers[0]))
        calls = _pairs((module, rounded), (layers, twins), images, path in follows)
        weight = rounding.nearest
        if calls:
            generator = torch.Generator().manual_seed(calibration.seed + number)
            with torch.enable_grad():  # whatever mode the caller is in
                learned = _learn(rounding, calls, act, STEPS if steps is None else steps, generator)
            errors = [_error(candidate, calls, act) for candidate in (rounding.nearest, learned)]
            weight = learned if errors[1] < errors[0] else rounding.nearest
            records[path] = Record(errors[0], min(errors))
        with torch.no_grad():
            twins[0].weight.copy_(weight)
    return Learned(rounded, records)


class _Rounding:
    """A weight between the two values of its grid next to it."""

    def __init__(self, weight: torch.Tensor, dim: int) -> None:
        self.scales = along(int8_scales(weight, dim), weight, dim)
        steps = weight / self.scales
        self.nearest = steps.round().clamp(-INT8_STEPS, INT8_STEPS) * self.scales
        self.below = steps.floor().clamp(-INT8_STEPS, INT8_STEPS)
        # entries that hold the grid in place
        self.fixed = steps.abs() > INT8_STEPS - 0.01
        self.ends = steps.round().clamp(-INT8_STEPS, INT8_STEPS)
        low, high = STRETCH
        inside = (steps - self.below).clamp(0.01, 0.99)
        self.start = torch.logit((inside - low) / (high - low))

    def up(self, variable: torch.Tensor) -> torch.Tensor:
        """How far towards the upper value, from zero to one."""
        low, high = STRETCH
        return (torch.sigmoid(variable) * (high - low) + low).clamp(0, 1)

    def weight(self, up: torch.Tensor) -> torch.Tensor:
        """The weight with this much added to the lower value."""
        steps = (self.below + up).clamp(-INT8_STEPS, INT8_STEPS)
        return torch.where(self.fixed, self.ends, steps) * self.scales


def _learn(
    rounding: _Rounding, calls: Sequence[_Call], act: Activation, steps: int, generator: torch.Generator
) -> torch.Tensor:
    """The weight on its grid that the optimisation ends at."""
    variable = rounding.start.clone().requires_grad_()
    optimiser = torch.optim.Adam([variable], RATE)
    unit = max(_error(rounding.nearest, calls, act), torch.finfo(torch.float32).tiny)
    for step in range(steps):
        call = calls[int(torch.randint(len(calls), (), generator=generator))].drawn(generator)
        up = rounding.up(variable)
        loss = _squared(rounding.weight(up), call, act).mean() / unit
        progress = (step / steps - WARM_UP) / (1 - WARM_UP)
        if progress >= 0:
            beta = SHARPNESS[1] + (SHARPNESS[0] - SHARPNESS[1]) * (1 - progress)
            loss = loss + STRENGTH * (1 - (2 * up - 1).abs().pow(beta)).sum() / _outputs(rounding)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        return rounding.weight((rounding.up(variable) >= 0.5).to(variable.dtype))


def _outputs(rounding: _Rounding) -> int:
    return rounding.scales.numel()


def _squared(weight: torch.Tensor, call: _Call, act: Activation) -> torch.Tensor:
    bias = {} if call.layer.bias is None else {"bias": call.layer.bias.detach()}
    given = functional_call(call.layer, {"weight": weight, **bias}, (call.given,))
    return (act(given) - act(call.wanted)).square()


def _error(weight: torch.Tensor, calls: Sequence[_Call], act: Activation) -> float:
    with torch.no_grad():
        sums = [_squared(weight, call, act).double().sum() for call in calls]
    return float(torch.stack(sums).sum()) / sum(call.wanted.numel() for call in calls)


def _pairs(
    modules: tuple[nn.Module, nn.Module],
    layers: tuple[list[Layer], list[Layer]],
    images: Sequence[torch.Tensor],
    once: bool,
) -> list[_Call]:
    """Calls of a layer in the float and the rounded module side by side, from as many batches as there is room for."""
    held, calls = 0, []
    for batch in images:
        floats, behind = (calls_of(m, each, [batch], once) for m, each in zip(modules, layers, strict=True))
        for (index, _, wanted), (_, given, _) in zip(floats, behind, strict=True):
            calls.append(_Call(layers[0][index], given, wanted))
            held += given.numel() + wanted.numel()
        if held > MOST_VALUES:
            break
    return calls
