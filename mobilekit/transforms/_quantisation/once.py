"""Weights and ranges prepared once for all int8 files of a candidate."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn

from mobilekit.errors import MobilekitError
from mobilekit.evaluate import batch_size
from mobilekit.network.observation import activation_ranges
from mobilekit.transforms._quantisation import rounded_for_file
from mobilekit.types import Calibration, Candidate, Range

KEPT = 2
"""Preparations that are kept: the formats' files, and a look at them, are written one after another."""


class Prepared(NamedTuple):
    """What int8 files of a candidate are written from."""

    module: nn.Module
    ranges: dict[str, Range]
    """Of static activations, by the node of the module's graph; empty for others."""


_PREPARED: dict[str, Prepared] = {}


def prepared_once(candidate: Candidate, calibration: Calibration, layers: Collection[str]) -> Prepared:
    """A module as of `rounded_for_file` and the ranges of its tensors, the caller's own; taken from an earlier call
    where nothing has changed.

    Where weights cannot be prepared (batch norms that cannot be folded), the module is the candidate's.
    Raises BadInputError where the module cannot be traced on the inputs.
    """
    key = _key(candidate, calibration, layers)
    if key not in _PREPARED:
        made = _prepare(candidate, calibration, layers)
        while len(_PREPARED) >= KEPT:
            _PREPARED.pop(next(iter(_PREPARED)))
        _PREPARED[key] = made
    module, ranges = _PREPARED[key]
    return Prepared(copy.deepcopy(module), dict(ranges))


def _prepare(candidate: Candidate, calibration: Calibration, layers: Collection[str]) -> Prepared:
    module = candidate.module
    if layers:
        with contextlib.suppress(MobilekitError):
            module = rounded_for_file(module, candidate.network, calibration, layers)
    ranges: dict[str, Range] = {}
    if candidate.quant is not None and candidate.quant.activations == "static":
        inputs = torch.cat([batch.detach().cpu().float() for batch in calibration.inputs])
        on_cpu = copy.deepcopy(module).cpu().eval()
        ranges = activation_ranges(on_cpu, [(batch,) for batch in torch.split(inputs, batch_size(inputs))])
    return Prepared(module, ranges)


def _key(candidate: Candidate, calibration: Calibration, layers: Collection[str]) -> str:
    """sha256 of all that the weights of a file depend on."""
    treatment = candidate.quant.activations if candidate.quant is not None else ""
    digest = hashlib.sha256(
        f"{candidate.network.model_dump_json()}{sorted(layers)}{treatment}{calibration.seed}".encode()
    )
    for name, tensor in candidate.module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    for batch in calibration.inputs:
        digest.update(_bytes(batch))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
