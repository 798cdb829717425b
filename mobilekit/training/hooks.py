"""What the training loop lets others do: give the loss, and look after weights between its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.training.job import State

Loss = Callable[[nn.Module, torch.Tensor, Any], torch.Tensor]
"""A scalar to be made small, of the module in training, inputs (N, ...) and the target (None without labels)."""


class Objective:
    """A `Loss` that may have trained parts of its own, such as adapters."""

    parts: nn.Module | None = None

    def __call__(self, module: nn.Module, inputs: torch.Tensor, target: Any) -> torch.Tensor:
        """The loss of one batch, a scalar with a gradient."""
        raise NotImplementedError

    def prepare(self, inputs: torch.Tensor, target: Any) -> tuple[torch.Tensor, Any]:
        """A batch with what does not depend on the module in training (`echo.Known`); the same batch by default.

        Asked once for a batch that is used several times.
        """
        return inputs, target

    def to(self, device: torch.device) -> None:
        """Move what the loss is computed with."""
        if self.parts is not None:
            self.parts.to(device)


class Labels(Objective):
    """The loss of outputs and labels; cross entropy where none is given."""

    def __init__(self, loss: Callable[[torch.Tensor, Any], torch.Tensor] | None = None) -> None:
        self.loss = loss or functional.cross_entropy

    def __call__(self, module: nn.Module, inputs: torch.Tensor, target: Any) -> torch.Tensor:
        """The loss of one batch. Raises BadInputError without labels."""
        if target is None:
            raise BadInputError("this training needs labels")
        return self.loss(module(inputs), target)


class Hook:
    """Looks after weights of a module in training. The loop calls the methods in the order in which they stand here."""

    def attach(self, module: nn.Module) -> None:
        """Get to know the module that will be trained; called once, before anything is restored."""

    def restore(self, state: State) -> None:
        """Go on from a kept `state`; the module's weights were restored before."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the hook's own to train."""
        return ()

    def replaced(self) -> Iterable[nn.Parameter]:
        """Parameters of the module that get gradients but are not updated: the hook does it."""
        return ()

    def before_forward(self) -> None:
        """A step begins."""

    def before_update(self) -> None:
        """Gradients are there, and are not clipped yet."""

    def after_step(self, step: int, fraction: float) -> None:
        """The weights are updated; `step` counts from 1, `fraction` of the training is over (1: all of it)."""

    def state(self) -> State:
        """Tensors to go on from."""
        return {}


def weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of convolutions and linear layers by name; not biases, batch norms, or what is frozen.

    A weight that several layers share is there once. Raises UnsupportedError where there is none, and BadInputError
    for weights that are not finite.
    """
    found: dict[str, nn.Parameter] = {}
    known: set[int] = set()
    for path, layer in module.named_modules():
        weight = layer.weight if isinstance(layer, _ConvNd | nn.Linear) else None
        # the weight of a parametrised layer is computed, and no parameter
        if not isinstance(weight, nn.Parameter) or not weight.requires_grad or id(weight) in known:
            continue
        name = f"{path}.weight" if path else "weight"
        if not bool(torch.isfinite(weight.detach()).all()):
            raise BadInputError(f"{name} holds numbers that are not finite")
        known.add(id(weight))
        found[name] = weight
    if not found:
        raise UnsupportedError("the network has no convolution or linear layer with weights that may be changed")
    return found
