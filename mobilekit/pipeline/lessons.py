"""What a workload's data can teach: batches to train on, and inputs kept back to judge the training by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from mobilekit.evaluate import classes, divergence, outputs
from mobilekit.workload import FEWEST_TO_SPLIT, Workload

TRAIN_BATCH = 32
PEEKED = 4
"""Batches that are looked at before the training."""
FEW_SAMPLES = 16
PICKED = 64
"""Values of an input that are compared before all of them are."""


@dataclass
class Lessons:
    """Training batches without what is kept back, and what is odd about them.

    `held` are inputs (N, C, H, W): those of `calibration_data()` where the workload has training data of its own, else
    a quarter of the calibration inputs. Training samples that equal one of them are left out; one that was changed at
    random (a shifted copy) cannot be known again. `evaluate` and what it reads take no part.
    """

    workload: Workload
    held: torch.Tensor
    inputs: tuple[torch.Tensor, ...]
    """Calibration inputs to train on where there is no training data."""
    warnings: list[str] = field(default_factory=list)
    hopeless: bool = False
    """Nothing can be learnt from the data."""
    _data: Iterable[Any] | None = None
    """What the workload gave: a loader may have another order each time that it is gone through."""
    seen: bool = False
    """Samples that are kept back had to be trained on: there were too few others."""

    def batches(self) -> Iterator[Any]:
        """A pass over the data."""
        if self.workload.train_data is None:
            return iter(_shuffled(self.inputs))
        if self._data is None or isinstance(self._data, Iterator):  # what can be gone through once only
            self._data = self.workload.train_data()
        return iter(self._data) if self.seen else self._without_held(self._data)

    def _without_held(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The samples that are not kept back; all of them from the next pass on where these are less than half."""
        held = self.held.flatten(1)
        picks = torch.linspace(0, held.shape[1] - 1, min(PICKED, held.shape[1])).long()
        total = left = 0
        for batch in batches:
            inputs = batch[0] if self.workload.labelled and isinstance(batch, tuple | list) and batch else batch
            if not isinstance(inputs, torch.Tensor) or inputs.shape[1:] != self.held.shape[1:]:
                yield batch
                continue
            kept = ~_among(inputs.flatten(1), held, picks)
            total, left = total + len(kept), left + int(kept.sum())
            if bool(kept.all()):
                yield batch
            elif not _selectable(batch, len(kept)):
                self.seen = True
                yield batch
            elif int(kept.sum()) > 1:
                yield tuple(part[kept] for part in batch) if self.workload.labelled else batch[kept]
        if 2 * left < total:
            self.seen = True
            if left < 2:
                yield from self.batches()

    def all_warnings(self, judged: bool) -> list[str]:
        """What the report should say of the data, after the training."""
        if not (self.seen and judged):
            return self.warnings
        return [
            *self.warnings,
            "the weights were chosen on inputs that the training saw too: there are too few others",
        ]


def lessons_of(workload: Workload) -> Lessons:
    """Look at the data of a workload with inputs of its own."""
    calibration = torch.cat(list(workload.calibration))
    found = Lessons(workload, calibration, (calibration,))
    if len(calibration) < FEW_SAMPLES:
        found.warnings.append(
            f"there are only {len(calibration)} calibration inputs: ranges of int8 and the choice of the best weights "
            "rest on them"
        )
    if workload.train_data is None:
        if len(calibration) >= FEWEST_TO_SPLIT:
            kept = len(calibration) - len(calibration) // 4
            found.inputs, found.held = (calibration[:kept],), calibration[kept:]
        else:
            found.seen = True
    _peek(found)
    return found


def _peek(found: Lessons) -> None:
    """Say what the first batches lack. What is wrong with the user's code the training itself will say."""
    try:
        first = list(islice(found.batches(), PEEKED))
    except Exception:  # noqa: BLE001
        return
    parts = [batch if found.workload.labelled else (batch, None) for batch in first]
    if not all(isinstance(part, tuple | list) and len(part) == 2 for part in parts):
        return
    inputs = [each for each, _ in parts if isinstance(each, torch.Tensor) and each.ndim == 4 and len(each)]
    if inputs and all(torch.equal(image, inputs[0][0]) for each in inputs for image in each):
        found.hopeless = True
        found.warnings.append("all training images are the same: nothing can be learnt from them")
    elif inputs and all(bool((each.amax((2, 3)) == each.amin((2, 3))).all()) for each in inputs):
        found.warnings.append("every training image is of one colour: they teach little")
    targets = [target for _, target in parts if isinstance(target, torch.Tensor)]
    whole = targets and all(target.ndim == 1 and not target.is_floating_point() for target in targets)
    if whole and sum(map(len, targets)) > 1 and len({int(value) for target in targets for value in target}) == 1:
        found.warnings.append(
            f"the first {sum(map(len, targets))} training labels are all of class {int(targets[0][0])}: other classes "
            "are only learnt from the original's outputs"
        )


def _shuffled(inputs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Inputs in batches that batch norms can work with, in another order each pass."""
    whole = torch.cat(list(inputs))
    return list(whole[torch.randperm(len(whole))].tensor_split(max(1, round(len(whole) / TRAIN_BATCH))))


def _among(rows: torch.Tensor, known: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
    """Which rows (N, values) equal one of the known ones (M, values), bool (N,)."""
    alike = (rows[:, None, picks] == known[None, :, picks]).all(dim=2)
    found = torch.zeros(len(rows), dtype=torch.bool)
    for row, other in alike.nonzero().tolist():
        found[row] |= torch.equal(rows[row], known[other])
    return found


def _selectable(batch: Any, count: int) -> bool:
    parts = batch if isinstance(batch, tuple | list) else (batch,)
    return all(isinstance(part, torch.Tensor) and part.ndim > 0 and len(part) == count for part in parts)


# ---------------------------------------------------------------- judging


@dataclass(frozen=True)
class Judgement:
    """How far modules are from the original on inputs that are kept back."""

    inputs: torch.Tensor
    wanted: np.ndarray
    """The original's outputs."""
    labelled: bool = True
    """Whether accuracy counts right answers. Without labels it counts answers that are the original's."""

    def distance(self, module: nn.Module) -> float:
        """Divergence of the outputs from the original's (`evaluate.divergence`), lower is better."""
        return divergence(self.wanted, outputs(module, self.inputs))

    def points(self, module: nn.Module) -> float:
        """Expected accuracy in points: the mean probability that the original gives the module's choice.

        It needs no labels, and has less noise than counting: where two modules choose differently, a doubtful image
        counts for less. Without labels it is that probability as a share of the one of the original's own choice:
        100 where all choices are the same. Where outputs are single values, 100 times one minus their relative squared
        error.
        """
        found = outputs(module, self.inputs)
        if not np.isfinite(found).all():
            return 0.0
        if classes(self.wanted) < 2:
            return 100 * (1 - divergence(self.wanted, found))
        shifted = np.exp(self.wanted - self.wanted.max(axis=1, keepdims=True))
        chances = shifted / shifted.sum(axis=1, keepdims=True)
        choice = np.expand_dims(found.argmax(axis=1), 1)
        given = np.take_along_axis(chances, choice, axis=1)
        return float(100 * (given if self.labelled else given / chances.max(axis=1, keepdims=True)).mean())
