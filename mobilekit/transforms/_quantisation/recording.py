"""What layers read and give while calibration inputs run through a module."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mobilekit.errors import BadInputError
from mobilekit.network.layer_calls import CallGraph, Layer, clipped_at, rectifies
from mobilekit.transforms._criteria.subject import batches, run
from mobilekit.types import Calibration, Network

Watcher = Callable[[nn.Module, Any, torch.Tensor], torch.Tensor | None]
"""A forward hook: what it returns takes the place of the output."""
Activation = Callable[[torch.Tensor], torch.Tensor]


TOGETHER = 256
"""Calibration images that run at once, at most."""
FEWEST = 8
VALUES = 64 * 3 * 224 * 224
"""Input values that run at once, at most."""


class _ReachedError(Exception):
    """The layer of interest has run: the rest of the forward is not needed."""


def layers_in_order(module: nn.Module, network: Network) -> list[str]:
    """Paths of the convolutions and linear layers whose weights are parameters, as the network runs them.

    A layer that is used twice counts where it is used first; of layers with tied weights, only the first is listed.
    """
    paths = [operator.module for operator in network.operators]
    paths += [path for path, _ in module.named_modules() if path not in set(paths)]
    found: dict[int, str] = {}
    for path in dict.fromkeys(paths):
        with contextlib.suppress(AttributeError):  # functions of a forward bear the path of their caller
            layer = module.get_submodule(path)
            if isinstance(layer, Layer) and isinstance(layer.weight, nn.Parameter):
                found.setdefault(id(layer.weight), path)
    return list(found.values())


def sharing(module: nn.Module, path: str) -> list[Layer]:
    """The layer at this path and every other whose weight is the same parameter."""
    weight = module.get_submodule(path).weight
    return [each for each in module.modules() if isinstance(each, Layer) and each.weight is weight]


def chosen(module: nn.Module, calibration: Calibration, most: int, size: int) -> list[torch.Tensor]:
    """At most `most` calibration images, evenly chosen, on the module's device, in batches of `size`."""
    images = torch.cat(list(batches(module, calibration)))
    if len(images) > most:
        images = images[torch.from_numpy(np.linspace(0, len(images) - 1, most).round().astype(np.int64))]
    return list(torch.split(images, size))


def one_batch(module: nn.Module, network: Network, calibration: Calibration) -> torch.Tensor:
    """As many calibration images as one forward can take, evenly chosen, on the module's device."""
    most = min(TOGETHER, max(FEWEST, VALUES // math.prod(network.input_shape[1:])))
    (images,) = chosen(module, calibration, most, most)
    return images


def output_means(module: nn.Module, paths: Sequence[str], batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean output of each layer's first call, a channel over all inputs and positions, float64; those that never run
    miss."""
    found: dict[str, torch.Tensor] = {}

    def watcher(path: str) -> Watcher:
        def watch(layer: nn.Module, _given: Any, output: torch.Tensor) -> None:
            if path not in found:
                found[path] = _channels_first(layer, output).double().mean(dim=1)

        return watch

    with _watching([(module.get_submodule(path), watcher(path)) for path in paths]):
        _run_until_reached(module, batch)
    return found


def shifted_outputs(
    module: nn.Module, wanted: Mapping[str, torch.Tensor], batch: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How far each layer's mean output is above the wanted one, float64 a channel; layers that never run miss.

    Each is looked at behind layers whose outputs are set right already. A layer that is called again takes off what
    its first call was found to be too high by.
    """
    found: dict[str, torch.Tensor] = {}

    def watcher(path: str) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
        def watch(layer: nn.Module, _given: Any, output: torch.Tensor) -> torch.Tensor:
            if path not in found:
                found[path] = _channels_first(layer, output).double().mean(dim=1) - wanted[path]
            shift = found[path].to(output.dtype)
            return output - (shift if isinstance(layer, nn.Linear) else shift.reshape(-1, *[1] * (output.ndim - 2)))

        return watch

    with _watching([(module.get_submodule(path), watcher(path)) for path in wanted]):
        _run_until_reached(module, batch)
    return found


def calls_of(
    module: nn.Module, layers: Sequence[Layer], inputs: Sequence[torch.Tensor], once: bool = False
) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Every call of these layers: which of them, what it read and what it gave, in the order of the runs.

    `once`: there is one call in a run, and nothing behind it needs to be computed.
    """
    found: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def watcher(index: int) -> Watcher:
        def watch(_layer: nn.Module, given: Any, output: torch.Tensor) -> None:
            if given:
                found.append((index, given[0].clone(), output.clone()))  # an activation in place comes behind it
            if once:
                raise _ReachedError

        return watch

    with _watching([(layer, watcher(index)) for index, layer in enumerate(layers)]):
        for batch in inputs:
            _run_until_reached(module, batch)
    return found


def activations(module: nn.Module, network: Network) -> dict[str, Activation]:
    """Layers that are called once -> the ReLU or clamp that alone reads what they give, as a function.

    The identity where there is none. Layers that are called twice, or share their weights, miss.
    """
    found: dict[str, Activation] = {}
    for call in CallGraph(module, network).calls:
        users = list(call.node.users)
        bound = clipped_at(users[0]) if len(users) == 1 else None
        if bound is not None:
            found[call.path] = _Clamp(bound)
        else:
            found[call.path] = torch.relu if len(users) == 1 and rectifies(users[0]) else unchanged
    return found


def unchanged(x: torch.Tensor) -> torch.Tensor:
    """The identity."""
    return x


class _Clamp:
    """A clamp between zero and a bound."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(0, self.bound)


def _channels_first(layer: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """An output as (channels, values): those of a linear layer are on the last axis."""
    return output.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)


def _run_until_reached(module: nn.Module, batch: torch.Tensor) -> None:
    with torch.no_grad():
        try:
            run(module, batch)
        except BadInputError as error:
            if not isinstance(error.__cause__, _ReachedError):
                raise


@contextlib.contextmanager
def _watching(places: Sequence[tuple[nn.Module, Watcher]]) -> Iterator[None]:
    handles = [layer.register_forward_hook(watch) for layer, watch in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
