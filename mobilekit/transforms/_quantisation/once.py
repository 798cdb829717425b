"""Weights prepared once for all int8 files of a candidate."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection

import torch
from torch import nn

from mobilekit.transforms._quantisation import rounded_for_file
from mobilekit.types import Calibration, Candidate

KEPT = 2
"""Prepared modules that are kept: the formats' files, and a look at them, are written one after another."""
_PREPARED: dict[str, nn.Module] = {}


def rounded_once(candidate: Candidate, calibration: Calibration, layers: Collection[str]) -> nn.Module:
    """A module as of `rounded_for_file`, the caller's own; taken from an earlier call where nothing has changed.

    Raises as `rounded_for_file`.
    """
    key = _key(candidate, calibration, layers)
    if key not in _PREPARED:
        module = rounded_for_file(candidate.module, candidate.network, calibration, layers)
        while len(_PREPARED) >= KEPT:
            _PREPARED.pop(next(iter(_PREPARED)))
        _PREPARED[key] = module
    return copy.deepcopy(_PREPARED[key])


def _key(candidate: Candidate, calibration: Calibration, layers: Collection[str]) -> str:
    """sha256 of all that the weights of a file depend on."""
    digest = hashlib.sha256(f"{candidate.network.model_dump_json()}{sorted(layers)}{calibration.seed}".encode())
    for name, tensor in candidate.module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    for batch in calibration.inputs:
        digest.update(_bytes(batch))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
