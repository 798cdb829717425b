"""Core ML packages with int8 weights: all of them, or all but those of operators that stay in float."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mobilekit.errors import UnsupportedError
from mobilekit.types import Network

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-2
"""Largest difference between directions of a filter before and after its conversion to half precision."""
LEAST_LENGTH = 1e-4
"""Of a filter, beside the longest of its layer, for its direction to count."""


def with_int8_weights(model: Any, left: list[str]) -> Any:
    """The model with symmetric int8 weights, a scale per output channel; the constants `left` stay as they are."""
    from coremltools.optimize import coreml

    each = coreml.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
    names = dict.fromkeys(left)
    return coreml.linear_quantize_weights(
        model, coreml.OptimizationConfig(global_config=each, op_name_configs=names or None)
    )


def float_constants(model: Any, module: torch.nn.Module, network: Network, kept: frozenset[str]) -> list[str]:
    """Names of the constants that are the weights of operators which stay in float.

    The converter renames operators and folds batch norms into filters; what stays is the direction of every filter.
    Raises UnsupportedError where a weight cannot be found again, or might be that of an operator which does not stay.
    """
    from coremltools.optimize.coreml import get_weights_metadata

    constants = {name: data.val for name, data in get_weights_metadata(model, weight_threshold=0).items()}
    owners: dict[str, set[str]] = {}
    for operator in network.operators:
        if operator.kind not in ("conv", "conv_transpose", "linear"):
            continue
        try:
            weight = module.get_parameter(f"{operator.module}.weight".lstrip("."))
        except AttributeError:
            raise UnsupportedError(f"{operator.name} has no weight of its own that could be told in the file") from None
        wanted = _directions(weight.detach().float().numpy())
        same = [name for name, found in constants.items() if _alike(found, wanted)]
        if not same and operator.name in kept:
            raise UnsupportedError(f"the weights of {operator.name} are not to be found in the exported file")
        for name in same:
            owners.setdefault(name, set()).add(operator.name)
    mixed = sorted(set().union(*(o for o in owners.values() if o & kept and o - kept)))
    if mixed:
        raise UnsupportedError(f"these operators share weights, and only some stay in float: {', '.join(mixed)}")
    return sorted(name for name, operators in owners.items() if operators & kept)


def _directions(weight: np.ndarray) -> np.ndarray:
    """Filters as unit vectors: batch norms change their lengths and signs only."""
    rows = np.asarray(weight, np.float32).reshape(len(weight), -1) if np.ndim(weight) > 1 else np.zeros((0, 0))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: np.ndarray = (rows / np.maximum(lengths, 1e-12)).reshape(np.shape(weight) if rows.size else (0,))
    return unit


def _alike(stored: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether stored filters have the wanted directions; those that are nearly zero have none in half precision."""
    found = _directions(stored)
    if found.shape != wanted.shape or not found.size:
        return False
    axes = tuple(range(1, wanted.ndim))
    lengths = np.sqrt(np.square(np.asarray(stored, np.float32)).sum(axis=axes))
    distance = np.minimum(np.abs(found - wanted).max(axis=axes), np.abs(found + wanted).max(axis=axes))
    return bool(distance[lengths > LEAST_LENGTH * lengths.max()].max(initial=0.0) < TOLERANCE)
