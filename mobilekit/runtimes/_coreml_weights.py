"""Core ML packages with packed weights: int8, int4 or palettes, of all operators or of all but those in float."""

from __future__ import annotations

from typing import Any

from mobilekit.types import WeightForm

BLOCK = 32
"""Weights of a channel that share a scale of int4."""


def with_packed_weights(model: Any, form: WeightForm, left: list[str]) -> Any:
    """The model with weights in this form; the constants `left` stay as they are.

    int8: symmetric, a scale per output channel. int4: symmetric, a scale for `BLOCK` input channels of an output
    channel, or for the whole output channel where these cannot be cut. Palettes: a table of k-means centres for each
    tensor.
    """
    from coremltools.optimize import coreml

    kept: dict[str, Any] = dict.fromkeys(left)
    if form.startswith("palette"):
        palette = coreml.OpPalettizerConfig(mode="kmeans", nbits=int(form.removeprefix("palette")), weight_threshold=0)
        return coreml.palettize_weights(model, _config(palette, kept))
    whole = coreml.OpLinearQuantizerConfig(mode="linear_symmetric", dtype=form, weight_threshold=0)
    if form == "int8":
        return coreml.linear_quantize_weights(model, _config(whole, kept))
    cut = coreml.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype=form, weight_threshold=0, granularity="per_block", block_size=BLOCK
    )
    weights = coreml.get_weights_metadata(model, weight_threshold=0)
    uneven = {name: whole for name, data in weights.items() if data.val.ndim < 2 or data.val.shape[1] % BLOCK}
    return coreml.linear_quantize_weights(model, _config(cut, uneven | kept))


def _config(each: Any, named: dict[str, Any]) -> Any:
    from coremltools.optimize import coreml

    return coreml.OptimizationConfig(global_config=each, op_name_configs=named or None)
