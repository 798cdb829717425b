"""Training samples that are used several times, with what was computed for them: data echoing.

Choi et al. 2019, arXiv:1907.05550, "example echoing before batching": the teacher's forward pass costs as much as the
whole step of a four times smaller student, and a time budget lacks steps more than it lacks data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

MEMORY_BYTES = 512 * 2**20
LARGEST_HALF = 6e4


class Known(NamedTuple):
    """A target beside what else the loss needs and what does not depend on the module in training."""

    target: Any
    wanted: torch.Tensor


class Echo:
    """Batches of which each `uses`-th is fresh, the others drawn anew from the samples that came before.

    `prepare` computes, once for a fresh batch, the teacher's outputs (`Known`). What is kept takes half precision and
    at most `MEMORY_BYTES`: new samples replace the oldest. Batches that cannot be taken apart into samples (targets
    that are no tensors, another size of image) are used once. Draws come from torch's global random numbers.
    """

    def __init__(
        self, fresh: Iterator[tuple[Any, Any]], prepare: Callable[[Any, Any], tuple[Any, Any]], uses: int
    ) -> None:
        self.fresh, self.prepare, self.uses = fresh, prepare, uses
        self.kept: list[torch.Tensor] = []
        """Inputs, the teacher's outputs and, where there are any, targets: (capacity, ...) each."""
        self.filled = self.place = self.drawn = 0
        self.sizes: list[int] = []

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Itself."""
        return self

    def __next__(self) -> tuple[Any, Any]:
        """The next batch, inputs float32 (N, C, H, W), and its `Known` target."""
        self.drawn += 1
        if self.filled and self.drawn % self.uses != 1:
            return self._again()
        inputs, target = self.prepare(*next(self.fresh))
        self._keep(inputs, target)
        return inputs, target

    def _again(self) -> tuple[Any, Any]:
        chosen = torch.randint(self.filled, (self.size,))
        inputs, wanted, *target = (rows[chosen] for rows in self.kept)
        return inputs.float(), Known(target[0] if target else None, wanted.float())

    def _keep(self, inputs: Any, target: Any) -> None:
        rows = _rows(inputs, target)
        if rows is None:
            return
        if not self.kept:
            each = sum(row[0].numel() * row.element_size() for row in rows)
            capacity = MEMORY_BYTES // each
            if capacity < len(inputs):
                return
            self.size = len(inputs)
            self.kept = [torch.empty((capacity, *row.shape[1:]), dtype=row.dtype) for row in rows]
        capacity = len(self.kept[0])
        like = [(row.dtype, row.shape[1:]) for row in rows]
        if like != [(row.dtype, row.shape[1:]) for row in self.kept]:
            return
        places = torch.arange(self.place, self.place + len(inputs)) % capacity
        for whole, row in zip(self.kept, rows, strict=True):
            whole[places] = row
        self.filled = min(capacity, self.filled + len(inputs))
        self.place = (self.place + len(inputs)) % capacity


def _rows(inputs: Any, target: Any) -> list[torch.Tensor] | None:
    """A batch as tensors with a row for each sample; None where it is not made of such."""
    if not isinstance(inputs, torch.Tensor) or not isinstance(target, Known):
        return None
    rows = [_half(inputs), _half(target.wanted)]
    if target.target is not None:
        if not isinstance(target.target, torch.Tensor):
            return None
        rows.append(target.target)
    rows = [row.cpu() for row in rows]
    return rows if all(row.ndim and len(row) == len(inputs) for row in rows) else None


def _half(values: torch.Tensor) -> torch.Tensor:
    """In half precision where it has the range for the values."""
    values = values.detach()
    fits = values.dtype == torch.float32 and bool((values.abs() <= LARGEST_HALF).all())
    return values.half() if fits else values
