"""Masks that hold weights at zero, schedules along which they grow, and their hooks into the training loop.

Masks lie over the weights of convolutions and linear layers; biases and batch norms stay as they are. Sparsity is the
fraction of a weight's entries that are zero, the same in every layer or one for each weight by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mobilekit.errors import BadInputError
from mobilekit.training.hooks import Hook, weights
from mobilekit.training.job import State

Sparsity = float | Mapping[str, float]
END = 0.75
"""Fraction of a training after which masks no longer change: the rest wins accuracy back."""
MARGIN = 0.1
"""Half the distance of surgery's two thresholds, as a fraction of their mean."""


@dataclass(frozen=True)
class Masks:
    """Which entries of weights stay: bool tensors in the weights' shapes, by the weights' names; False is zero."""

    kept: Mapping[str, torch.Tensor]

    @classmethod
    def of_zeros(cls, module: nn.Module) -> Masks:
        """Masks that keep the zeros that a module's weights hold already."""
        return cls({name: weight.detach() != 0 for name, weight in weights(module).items()})

    @classmethod
    def smallest(cls, module: nn.Module, sparsity: Sparsity) -> Masks:
        """Masks over the entries of least magnitude, in exactly the sparsity asked for (Han et al. 2015).

        Raises BadInputError for a sparsity that is not from 0 to below 1 and for unknown names.
        """
        found = weights(module)
        return cls({name: _cut(found[name], None, amount) for name, amount in amounts(found, sparsity).items()})

    @property
    def sparsity(self) -> dict[str, float]:
        """Fraction of entries at zero, by weight."""
        return {name: 1 - float(kept.sum()) / kept.numel() for name, kept in self.kept.items()}

    def apply(self, module: nn.Module) -> None:
        """Set the module's masked entries to zero."""
        with torch.no_grad():
            for name, kept in self.kept.items():
                module.get_parameter(name).masked_fill_(~kept, 0)


@dataclass(frozen=True)
class Schedule:
    """How sparsity grows over a training (Zhu and Gupta 2017, arXiv:1710.01878), as fractions of the training."""

    sparsity: Sparsity
    begin: float = 0.0
    end: float = END
    every: int = 10
    """Steps between two changes of the masks."""

    def __post_init__(self) -> None:
        """Check the numbers; sparsity is checked with the weights at hand."""
        if not 0 <= self.begin < self.end <= 1:
            raise BadInputError(f"sparsity cannot grow from {self.begin} to {self.end} of a training: give 0 to 1")
        if self.every < 1:
            raise BadInputError(f"masks cannot change every {self.every} steps: one is the least")

    def part(self, fraction: float) -> float:
        """Part of the sparsity that is reached after this fraction of the training: fast at first, then slower."""
        return cubic((fraction - self.begin) / (self.end - self.begin), 1.0)


# ---------------------------------------------------------------- arithmetic


def cubic(fraction: float, final: float, initial: float = 0.0) -> float:
    """Sparsity at this fraction of the schedule: final + (initial - final) (1 - fraction)^3.

    >>> cubic(0.0, 0.8), cubic(0.5, 0.8), cubic(1.0, 0.8)
    (0.0, 0.7000000000000001, 0.8)
    """
    over = min(1.0, max(0.0, fraction))
    return final + (initial - final) * (1.0 - over) ** 3


def amounts(found: Mapping[str, torch.Tensor], sparsity: Sparsity) -> dict[str, float]:
    """The sparsity of each weight. Raises BadInputError for what is not from 0 to below 1, and for unknown names."""
    chosen = dict(sparsity) if isinstance(sparsity, Mapping) else dict.fromkeys(found, sparsity)
    for name, value in chosen.items():
        if name not in found:
            raise BadInputError(f"'{name}' is no weight of a convolution or linear layer that may be changed")
        if not (math.isfinite(value) and 0 <= value < 1):
            raise BadInputError(f"the sparsity of {name} is {value}: it must be from 0 to below 1")
    return chosen


def surgery(weight: torch.Tensor, kept: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Masks after one update: below `low` cut, from `high` on kept, between them as before (Guo et al. 2016, eq. 3)."""
    magnitude = weight.detach().abs()
    return (magnitude >= high) | (kept & (magnitude >= low))


def _count(weight: torch.Tensor, sparsity: float) -> int:
    """Entries to cut; one stays, so that a layer never dies of rounding."""
    return min(round(sparsity * weight.numel()), weight.numel() - 1)


def _cut(weight: torch.Tensor, kept: torch.Tensor | None, sparsity: float) -> torch.Tensor:
    """A mask over the entries of least magnitude; those that are cut already go first."""
    magnitude = weight.detach().abs()
    if kept is not None:
        magnitude = magnitude.masked_fill(~kept, -1.0)
    order = magnitude.flatten().argsort(stable=True)
    mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[order[: _count(weight, sparsity)]] = False
    return mask.reshape(weight.shape)


# ---------------------------------------------------------------- hooks


class KeptMasks(Hook):
    """Holds masked entries at exactly zero through a training, whatever momentum and weight decay do."""

    def __init__(self, masks: Masks) -> None:
        self.kept = dict(masks.kept)

    def attach(self, module: nn.Module) -> None:
        """Find the weights and set masked entries to zero; what the recipe freezes is left alone."""
        found = {name: module.get_parameter(name) for name in self.kept}
        self.weights = {name: weight for name, weight in found.items() if weight.requires_grad}
        self.kept = {name: self.kept[name] for name in self.weights}
        Masks(self.kept).apply(module)

    def restore(self, state: State) -> None:
        """Take the kept masks."""
        self.kept = {name[5:]: mask.clone() for name, mask in state.items() if name.startswith("kept.")}

    def after_step(self, step: int, fraction: float) -> None:
        """Set masked entries to zero again."""
        for name, kept in self.kept.items():
            self.weights[name].masked_fill_(~kept, 0)

    def state(self) -> State:
        """The masks."""
        return {f"kept.{name}": mask for name, mask in self.kept.items()}


class GrowingMasks(KeptMasks):
    """Masks over the entries of least magnitude that grow along a schedule; what is cut stays cut."""

    def __init__(self, module: nn.Module, schedule: Schedule) -> None:
        found = weights(module)
        self.amounts, self.schedule = amounts(found, schedule.sparsity), schedule
        super().__init__(Masks({name: torch.ones_like(found[name], dtype=torch.bool) for name in self.amounts}))

    def after_step(self, step: int, fraction: float) -> None:
        """Cut further where it is time to, and set masked entries to zero."""
        if step % self.schedule.every == 0 or fraction >= self.schedule.end:
            for name in self.kept:
                now = self.amounts[name] * self.schedule.part(fraction)
                if _count(self.weights[name], now) > int((~self.kept[name]).sum()):
                    self.kept[name] = _cut(self.weights[name], self.kept[name], now)
        super().after_step(step, fraction)


class Surgery(GrowingMasks):
    """Dynamic network surgery (Guo et al. 2016): cut weights go on learning behind the mask and may come back.

    The network runs with masked weights, and its gradients update all of them. Thresholds lie a tenth around the
    magnitude that the schedule's sparsity asks for. At the schedule's end the masks become exact and stay.
    """

    def __init__(self, module: nn.Module, schedule: Schedule) -> None:
        super().__init__(module, schedule)
        self.settled, self.regrown = False, 0
        self.behind: State = {}

    def restore(self, state: State) -> None:
        """Take the kept masks and counters."""
        super().restore(state)
        self.settled, self.regrown = (bool(state["settled"]), int(state["regrown"]))

    def before_forward(self) -> None:
        """Put the masks on, and the whole weights aside."""
        if self.settled:
            return
        for name, kept in self.kept.items():
            self.behind[name] = self.weights[name].clone()
            self.weights[name].masked_fill_(~kept, 0)

    def before_update(self) -> None:
        """Bring the whole weights back: the gradients go to them."""
        for name, whole in self.behind.items():
            self.weights[name].copy_(whole)
        self.behind.clear()

    def after_step(self, step: int, fraction: float) -> None:
        """Update the masks where it is time to."""
        if not self.settled and fraction >= self.schedule.end:
            self._change({name: _cut(self.weights[name], None, self.amounts[name]) for name in self.kept})
            self.settled = True
        elif not self.settled and step % self.schedule.every == 0:
            self._change({name: self._updated(name, self.schedule.part(fraction)) for name in self.kept})
        if self.settled:
            KeptMasks.after_step(self, step, fraction)

    def state(self) -> State:
        """The masks and counters; the whole weights are those of the module between two steps."""
        return {**super().state(), "settled": torch.tensor(self.settled), "regrown": torch.tensor(self.regrown)}

    def _updated(self, name: str, part: float) -> torch.Tensor:
        weight = self.weights[name].detach()
        count = _count(weight, self.amounts[name] * part)
        level = float(weight.abs().flatten().kthvalue(count).values) if count else 0.0
        return surgery(weight, self.kept[name], (1 - MARGIN) * level, (1 + MARGIN) * level)

    def _change(self, masks: Mapping[str, torch.Tensor]) -> None:
        self.regrown += sum(int((new & ~self.kept[name]).sum()) for name, new in masks.items())
        self.kept.update(masks)
