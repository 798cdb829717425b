"""Core ML packages with int8 weights: all of them, or all but those of operators that stay in float."""

from __future__ import annotations

from typing import Any


def with_int8_weights(model: Any, left: list[str]) -> Any:
    """The model with symmetric int8 weights, a scale per output channel; the constants `left` stay as they are."""
    from coremltools.optimize import coreml

    each = coreml.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
    names = dict.fromkeys(left)
    return coreml.linear_quantize_weights(
        model, coreml.OptimizationConfig(global_config=each, op_name_configs=names or None)
    )
