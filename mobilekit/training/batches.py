"""The batches that one process trains on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from mobilekit.errors import MobilekitError
from mobilekit.training.echo import Echo, Known
from mobilekit.training.hooks import Loss, Objective
from mobilekit.training.job import TrainingJob, endless

MOST_LEFT_OUT = 20
"""Batches in a row without finite numbers that are passed over."""


class Batches:
    """Fresh and echoed batches, drawn with random numbers of their own and laid where they are used.

    The data of earlier steps can so be drawn again, whatever else draws random numbers. Batches whose inputs are not
    finite are left out, as is a single sample that is left at the end of a pass.
    """

    def __init__(self, job: TrainingJob, objective: Loss, echo: int) -> None:
        self.job, self.objective = job, objective
        self.left_out = 0
        torch.manual_seed(job.seed)
        self._random = torch.get_rng_state()
        fresh = self._usable(job.workers.share(endless(job)))
        self._source = Echo(fresh, self._prepared, echo) if echo > 1 else fresh
        self._ahead: deque[tuple[torch.Tensor, Any]] = deque()

    def __next__(self) -> tuple[torch.Tensor, Any]:
        """The next inputs and target."""
        return self._ahead.popleft() if self._ahead else self._drawn()

    def ahead(self, count: int) -> list[tuple[torch.Tensor, Any]]:
        """The batches that come next, prepared; they still come."""
        self._ahead.extend(self._prepared(*self._drawn()) for _ in range(count - len(self._ahead)))
        return list(self._ahead)

    def _drawn(self) -> tuple[torch.Tensor, Any]:
        others = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            inputs, target = next(self._source)
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(others)
        return self._placed((inputs, target))

    def _usable(self, fresh: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        in_a_row = largest = 0
        for inputs, target in fresh:
            if isinstance(inputs, torch.Tensor) and inputs.ndim:
                largest = max(largest, len(inputs))
                if len(inputs) < min(2, largest):
                    continue  # what is left of a pass: batch norms have no statistics of one sample
            if isinstance(inputs, torch.Tensor) and not bool(torch.isfinite(inputs).all()):
                self.left_out, in_a_row = self.left_out + 1, in_a_row + 1
                if in_a_row > MOST_LEFT_OUT:
                    raise MobilekitError(f"train_data() gave {in_a_row} batches in a row that hold no finite numbers")
                continue
            in_a_row = 0
            yield inputs, target

    def _prepared(self, inputs: Any, target: Any) -> tuple[Any, Any]:
        inputs, target = self._placed((inputs, target))
        if isinstance(target, Known):
            return inputs, target
        return self.objective.prepare(inputs, target) if isinstance(self.objective, Objective) else (inputs, target)

    def _placed(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        """On the device, images in the layout in memory that convolutions like."""
        inputs, target = batch
        device = self.job.workers.device
        if inputs.ndim == 4:
            inputs = inputs.to(device, memory_format=torch.channels_last)
        if isinstance(target, Known):
            return inputs, Known(_moved(target.target, device), _moved(target.wanted, device))
        return inputs, _moved(target, device)


def _moved(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if device is not None and isinstance(value, torch.Tensor) else value
