"""What of a training is kept for a later run: counters, and tensors under the names of what they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mobilekit.training.hooks import Hook
from mobilekit.training.job import State
from mobilekit.training.workers import Workers


@dataclass
class Counters:
    """How far a training has come."""

    step: int = 0
    drawn: int = 0
    """Batches; more than the steps where some were left out."""
    left_out: int = 0
    elapsed: float = 0.0
    """Seconds."""
    first_loss: float = math.nan
    last_loss: float = math.nan
    rate: float = math.nan
    """The highest learning rate, before retreats."""
    retreats: int = 0
    """How often the training went back to earlier weights."""
    share: float = math.nan
    """Part of the time that the review allowed; no number: it was not held yet."""
    judged: int = -1
    """The last judgement, counted from 0 for the start."""
    figure: float = math.inf
    """The best judgement."""
    start_figure: float = math.nan
    best_step: int = -1

    def tensor(self) -> torch.Tensor:
        """All of it, float64."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    def warnings(self, stopped: str) -> tuple[str, ...]:
        """What went wrong on the way; `stopped` is why it ended early."""
        found = []
        if self.left_out:
            found.append(f"{self.left_out} training batches held no finite numbers and were left out")
        if self.retreats:
            times = self.retreats + bool(stopped)
            found.append(
                f"the training loss or gradient was not finite {times} times: each time the training went back to "
                "earlier weights and a lower learning rate"
            )
        if stopped:
            found.append(f"the training was stopped after {self.step} steps: {stopped}")
        return tuple(found)

    @classmethod
    def of(cls, values: torch.Tensor) -> Counters:
        """Back from a tensor."""
        named = zip(fields(cls), values.tolist(), strict=True)
        return cls(**{field.name: int(value) if field.type == "int" else value for field, value in named})


def named(prefix: str, state: State) -> State:
    """The same tensors, their names below a prefix."""
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def under(prefix: str, state: State) -> State:
    """The part of a state below a prefix, named as it was before."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")}


def copied(state: State) -> State:
    """Tensors of their own, which a later step does not change."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


class Subject:
    """What is trained: a module, trained parts of the objective, and what the hooks hold."""

    def __init__(self, module: nn.Module, parts: nn.Module | None, hooks: Sequence[Hook]) -> None:
        self.module, self.parts, self.hooks = module, parts, hooks

    def ready(self) -> None:
        """Training mode, but for batch norms whose scale is frozen: they keep their statistics."""
        self.module.train()
        for layer in self.module.modules():
            if isinstance(layer, _BatchNorm) and layer.weight is not None and not layer.weight.requires_grad:
                layer.eval()

    def state(self) -> State:
        """Every tensor, under names that `restore` knows; they change with the next step."""
        state = named("model", self.module.state_dict())
        if self.parts is not None:
            state |= named("objective", self.parts.state_dict())
        for place, hook in enumerate(self.hooks):
            state |= named(f"hook.{place}", hook.state())
        return state

    def restore(self, state: State) -> None:
        """Go on from a state; hooks may hold other parameters than before."""
        self.module.load_state_dict(under("model", state))
        if self.parts is not None:
            self.parts.load_state_dict(under("objective", state))
        with torch.no_grad():
            for place, hook in enumerate(self.hooks):
                hook.restore(under(f"hook.{place}", state))

    def parameters(self) -> list[nn.Parameter]:
        """What gets gradients from the loss."""
        both = [self.module] if self.parts is None else [self.module, self.parts]
        return [parameter for each in both for parameter in each.parameters() if parameter.requires_grad]

    def average_statistics(self, workers: Workers) -> None:
        """The mean over the processes of what they did not average with the gradients: statistics of batch norms."""
        workers.average([each for each in self.module.buffers() if each.is_floating_point()])
