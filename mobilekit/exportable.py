"""What `export` alone needs of a workload: a network with any number of float tensors in and out, and inputs for it."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mobilekit import workload
from mobilekit.errors import BadInputError
from mobilekit.signature import named_outputs
from mobilekit.types import Preprocessing
from mobilekit.workload import CALIBRATION_SAMPLES, Inputs, Workload

RANKS = range(2, 6)
"""Axes that an input may have, the batch among them."""
BATCH = 32
Arrays = tuple[np.ndarray, ...]
"""A float32 batch for each input of a network, in order, all with the same number of samples."""


@dataclass(frozen=True)
class Exportable:
    """A user's network, an example of each of its inputs (batch 1), and calibration inputs."""

    spec: str
    name: str
    module: nn.Module
    inputs: Inputs
    calibration: tuple[Inputs, ...]
    """Batches, each with a tensor for every input, at most 512 samples in all; noise where `trusted` is False."""
    trusted: bool
    plannable: bool
    """Whether it takes one batch of images (N, C, H, W) and gives one tensor, so that it may be traced."""
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] | None = None

    def calibration_arrays(self, limit: int = CALIBRATION_SAMPLES) -> tuple[Arrays, ...]:
        """The first `limit` calibration samples as float32 batches of 32 for the runtimes."""
        whole = [torch.cat(batches)[:limit] for batches in zip(*self.calibration, strict=True)]
        parts = zip(*(torch.split(samples, BATCH) for samples in whole), strict=True)
        return tuple(tuple(part.numpy() for part in batch) for batch in parts)


def load(spec: str, seed: int = 0) -> Exportable:
    """Load a workload for export alone. Raises BadInputError in one sentence for what it lacks or gets wrong."""
    opened = workload.opened(spec)
    inputs = _example_inputs(opened.example, f"example_input() in '{spec}'")
    one_output = _checked_outputs(opened.module, inputs, spec)
    calibration, trusted = workload.calibration_of(opened, inputs, seed)
    return Exportable(
        spec=spec,
        name=opened.name,
        module=opened.module,
        inputs=inputs,
        calibration=calibration,
        trusted=trusted,
        plannable=one_output and _is_image(inputs),
        preprocessing=workload.preprocessing_of(opened),
        labels=workload.labels_of(opened),
    )


def of_module(
    module: nn.Module,
    example_input: torch.Tensor | Sequence[torch.Tensor],
    calibration: Sequence[np.ndarray | Sequence[np.ndarray]],
    name: str,
) -> Exportable:
    """A copy of a module at hand, without a file: `calibration` are float32 batches, one for each input."""
    module = copy.deepcopy(module).eval()
    inputs = _example_inputs(example_input, "example_input")
    one_output = _checked_outputs(module, inputs, name)
    batches = tuple(
        workload.checked_inputs(_tensors(batch, len(inputs) > 1), inputs, "calibration") for batch in calibration
    )
    return Exportable(
        spec=name,
        name=re.sub(r"[^A-Za-z0-9_]+", "_", Path(name).stem),
        module=module,
        inputs=inputs,
        calibration=batches or workload.noise(inputs, 0),
        trusted=bool(batches),
        plannable=one_output and _is_image(inputs),
    )


def of_workload(found: Workload) -> Exportable:
    """What export needs of a workload that was loaded for a plan."""
    return Exportable(
        spec=found.spec,
        name=found.name,
        module=found.module,
        inputs=(found.example_input,),
        calibration=tuple((batch,) for batch in found.calibration),
        trusted=found.trusted,
        plannable=True,
        preprocessing=found.preprocessing,
        labels=found.labels,
    )


def _tensors(batch: Any, several: bool) -> Any:
    """Arrays as tensors; what is none is left for the check to name."""
    if several and isinstance(batch, tuple | list):
        return tuple(torch.from_numpy(np.array(part, dtype=np.float32)) for part in batch)
    return torch.from_numpy(np.array(batch, dtype=np.float32))


def _example_inputs(example: Any, where: str) -> Inputs:
    inputs = tuple(example) if isinstance(example, tuple | list) else (example,)
    wrong_ones = [value for value in inputs if not _is_input(value)] if inputs else [example]
    if wrong_ones:
        wrong = wrong_ones[0]
        kind = f"{tuple(wrong.shape)} {wrong.dtype}" if isinstance(wrong, torch.Tensor) else type(wrong).__name__
        raise BadInputError(
            f"{where} must be a float32 tensor (1, C, H, W), or a tuple of float32 tensors of {RANKS[0]} to "
            f"{RANKS[-1]} axes for other networks, not {kind}"
        )
    size = next((value.shape[0] for value in inputs if value.shape[0] != 1), None)
    if size is not None:
        raise BadInputError(f"{where} must have batch size 1, not {size}")
    return inputs


def _is_input(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.ndim in RANKS


def _is_image(inputs: Inputs) -> bool:
    return len(inputs) == 1 and inputs[0].ndim == 4


def _checked_outputs(module: nn.Module, inputs: Inputs, spec: str) -> bool:
    """Whether the module gives a tensor, and not several in something.

    Raises BadInputError where it does not give finite float tensors with a batch axis.
    """
    try:
        with torch.inference_mode():
            result = module(*inputs)
    except Exception as error:
        said = workload.sentence(error)
        raise BadInputError(f"the model in '{spec}' fails on its example input: {said}") from error
    for name, value in named_outputs(result).items():
        if value.ndim == 0 or value.shape[0] != 1:
            raise BadInputError(
                f"the model in '{spec}' returns {name} of shape {tuple(value.shape)} for one sample: the first axis of "
                "every output must be the batch (leave out what does not depend on the input)"
            )
        if not bool(torch.isfinite(value).all()):
            raise BadInputError(f"the model in '{spec}' returns values that are not finite on its example input")
    return isinstance(result, torch.Tensor)
