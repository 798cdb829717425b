"""What an operator does, in the named amounts that its price is linear in: one definition for fitting and pricing."""

from __future__ import annotations

import numpy as np

from mobilekit.cost.work import BORDERS, BYTES, POOLS, VECTOR, WEIGHTED, Amount, Channels, Part
from mobilekit.types import OperatorShape, Precision

L2_BYTES = 1 << 20
"""Second-level cache of the cores of present phones and laptops; beyond it data comes from further away."""
TILE = 6
"""Output pixels that a float32 matrix kernel for NEON computes together (XNNPACK's are 6 x 8)."""
WINOGRAD_TILE = 8
"""Output rows and columns that a Winograd kernel computes together (4, 6 or 8 are in use)."""
PICTURE = 4
"""Channels up to which an input is taken for a picture, which runtimes read in its own layout."""
SMALL_MAP = 64
"""Output pixels under which the kernels of a convolution do not fill their tiles."""


def features(shape: OperatorShape, precision: Precision, channels: Channels | None = None) -> dict[str, Amount]:
    """What the operator does, without its fused activation: feature name -> amount (counts and bytes, batch 1).

    `channels` replaces the shape's channel counts, by arrays if need be; the amounts are then arrays of that shape.
    The groups of a depthwise convolution follow its channels.

    * `calls`: 1, the start of a kernel; `single_calls`: of one with a single output position (squeeze-excite)
    * `macs`; `macs8`, `macs16`: the same with the output channels of each group in whole blocks of 8 or 16, as vector
      kernels compute them; `macs_small`: the share that small maps leave idle in a tile of 64 pixels; `macs_tile`: what
      whole tiles of 6 output pixels add (a depthwise kernel has none)
    * `in_bytes`, `out_bytes`, `weight_bytes`: data read and written once
    * `patch_bytes`: input that is gathered, kernel position by kernel position, in front of a matrix product (im2col)
    * `winograd_macs`, `winograd_bytes`: of a 3 x 3 convolution of stride 1, which some runtimes compute by Winograd's
      algorithm: MACs, and activations with the input twice (it is cut into overlapping tiles), for whole tiles of 8 x 8
      output pixels; `direct_macs`, `direct_patch_bytes`: of every other window, MACs (the channels of groups in whole
      blocks of 8) and gathered input
    * `few_macs`, `few_pixels`: MACs and output positions of one with fewer than 16 input channels; `narrow_macs`,
      `narrow_pixels`: of one with fewer than 16 output channels in a group; `strided_bytes`, `strided_pixels`: what a
      1 x 1 convolution with a stride has to gather first; `ragged_taps`: taps of one whose channels do not fill blocks
    * `taps`: kernel positions times output pixels; `tiles`: dot products begun, in blocks of 16 output channels;
      `rows`: output rows begun, in blocks of 16 channels
    * `window`: reads of a pool; `ragged_window`: of one whose channels do not fill blocks of 16; `padded_bytes`: input
      of one with a stride whose windows reach over all edges, which some runtimes copy into a larger map first
    * `spill_bytes`: what does not fit the second-level cache; `weight_spill_bytes`: the same of the weights alone
    * `near_spill_bytes`, `far_spill_bytes`: what does not fit a quarter of it, or four times of it; `stream_bytes`: the
      weights beyond a quarter of it, read again for every tile of 6 output pixels
    * `ragged_macs`, `ragged_bytes`: MACs and activations of an operator whose channels do not fill blocks of 16
    * `in_block_bytes`, `out_block_bytes`: activations with their channels in whole blocks of 16; `few_bytes`: what is
      read of an input of 5 to 15 channels; `macs_blocks`: MACs with both sides' channels in whole blocks; `rest_macs`:
      of the last, incomplete block
    * `macs_tiny`: as `macs_small`, for tiles of 16 pixels; `strided_macs`: with a stride; `large_window_macs`: of
      kernels above 3; `weight_near_bytes`: weights beyond 32 KiB; `groups`, `odd_groups`: those of a grouped kernel;
      `gathers`: rows of input that are gathered one by one in front of its matrix products
    * `pixels`: output positions, which kernels begin one by one; `uneven_pixels`: where what is summed up for one is
      no multiple of 4
    * `odd_calls`, `odd_macs`, `odd_bytes`, `odd_patch_bytes`: calls, MACs, activations and gathered input of one whose
      channels are no multiple of 4, which some runtimes send through their general kernel, layout changes around it
    """
    given = channels or Channels(float(shape.in_channels), float(shape.out_channels))
    if shape.kind in WEIGHTED:
        return _weighted(shape, precision, given)
    return _moved(shape, precision, given)


def weight_bytes(part: Part, precision: Precision) -> Amount:
    """Bytes of the weights of the operator that the part prices (0 for what has none)."""
    if part.shape.kind not in WEIGHTED:
        return 0.0
    groups = part.channels.inputs if part.shape.cost_kind == "depthwise" else part.shape.groups
    taps = part.shape.kernel[0] * part.shape.kernel[1]
    return part.channels.outputs * part.channels.inputs / groups * taps * BYTES[precision]


def _weighted(shape: OperatorShape, precision: Precision, channels: Channels) -> dict[str, Amount]:
    size = BYTES[precision]
    depthwise = shape.cost_kind == "depthwise"
    groups = channels.inputs if depthwise else shape.groups
    deep, wide = channels.inputs / groups, channels.outputs / groups
    taps = shape.kernel[0] * shape.kernel[1]
    # A transposed convolution applies its kernel at every input position.
    pixels = _pixels(shape.in_size if shape.kind == "conv_transpose" else shape.out_size)
    macs = channels.outputs * deep * taps * pixels
    # A depthwise kernel runs over blocks of channels, each its own group; others fill blocks within a group.
    together, times = (channels.outputs, 1) if depthwise else (wide, groups)
    blocks = np.ceil(together / VECTOR) * times
    read = channels.inputs * _pixels(shape.in_size) * size
    written = channels.outputs * _pixels(shape.out_size) * size
    weights = channels.outputs * deep * taps * size
    ragged = (together % VECTOR != 0) | (channels.inputs % VECTOR != 0)
    windowed = taps > 1 and shape.kind != "linear"
    # Images and other inputs of few channels have kernels of their own.
    odd = (channels.outputs % 4 != 0) | ((channels.inputs % 4 != 0) & (channels.inputs >= VECTOR))
    if shape.cost_kind == "grouped":
        odd = (wide % VECTOR != 0) | (deep % VECTOR != 0)
    patches = channels.inputs * pixels * taps * size * windowed
    return {
        "calls": _ones(macs),
        "single_calls": _ones(macs) * (pixels == 1),
        "macs": macs,
        "macs8": macs * _up(together, 8),
        "macs16": macs * _up(together, VECTOR),
        "macs_small": macs * max(0.0, SMALL_MAP / pixels - 1),
        "macs_tile": macs * (_up(pixels, TILE) - 1) * (not depthwise),
        "in_bytes": read,
        "out_bytes": written,
        "weight_bytes": weights,
        "patch_bytes": patches * (not depthwise),
        "taps": _ones(macs) * pixels * taps * windowed,
        **_algorithms(shape, channels, macs, (read, written, patches)),
        "tiles": blocks * pixels,
        "rows": blocks * shape.out_size[0],
        "spill_bytes": np.maximum(read + written + weights - L2_BYTES, 0.0),
        "weight_spill_bytes": np.maximum(weights - L2_BYTES / 4, 0.0),
        "near_spill_bytes": np.maximum(read + written + weights - L2_BYTES / 4, 0.0),
        "far_spill_bytes": np.maximum(read + written + weights - L2_BYTES * 4, 0.0),
        "stream_bytes": np.ceil(pixels / TILE) * np.maximum(weights - L2_BYTES / 4, 0.0) * (not depthwise),
        "few_macs": macs * (channels.inputs < VECTOR) * (not depthwise),
        "narrow_macs": macs * (together < VECTOR),
        "narrow_pixels": _ones(macs) * pixels * groups * (together < VECTOR) * (not depthwise),
        "few_pixels": _ones(macs) * pixels * (channels.inputs < VECTOR),
        "ragged_taps": _ones(macs) * pixels * taps * (together % VECTOR != 0),
        "strided_pixels": _ones(macs) * pixels * (taps == 1 and shape.stride[0] > 1),
        "strided_bytes": channels.inputs * pixels * size * (taps == 1 and shape.stride[0] > 1),
        "ragged_macs": macs * ragged,
        "ragged_bytes": (read + written) * ragged,
        "odd_calls": _ones(macs) * odd,
        "odd_macs": macs * odd,
        "odd_bytes": (read + written) * odd,
        "odd_patch_bytes": patches * odd,
        "groups": _ones(macs) * groups,
        "gathers": _ones(macs) * groups * pixels * taps * windowed,
        "odd_groups": groups * odd,
        "macs_blocks": macs * _up(together, VECTOR) * (1.0 if depthwise else _up(deep, VECTOR)),
        "rest_macs": macs * (together % VECTOR) / together,
        "strided_macs": macs * (shape.stride[0] > 1),
        "large_window_macs": macs * (shape.kernel[0] > 3),
        "pixels": _ones(macs) * pixels,
        "uneven_pixels": _ones(macs) * pixels * ((deep * taps) % 4 != 0),
        "macs_tiny": macs * max(0.0, SMALL_MAP / 4 / pixels - 1),
        "weight_near_bytes": np.maximum(weights - L2_BYTES / 32, 0.0),
        **_blocked(shape, channels, size),
    }


def _blocked(shape: OperatorShape, channels: Channels, size: float) -> dict[str, Amount]:
    """Activations with their channels in whole blocks, as layouts for vector kernels keep them."""
    read = channels.inputs * _up(channels.inputs, VECTOR) * _pixels(shape.in_size) * size * shape.inputs
    written = channels.outputs * _up(channels.outputs, VECTOR) * _pixels(shape.out_size) * size
    few = (channels.inputs < VECTOR) & (channels.inputs > PICTURE)
    return {"in_block_bytes": read, "out_block_bytes": written, "few_bytes": read * few}


def _algorithms(
    shape: OperatorShape, channels: Channels, macs: Amount, moved: tuple[Amount, Amount, Amount]
) -> dict[str, Amount]:
    """The features that differ by the algorithm of a dense or grouped convolution; `moved`: read, written, gathered."""
    kind = shape.cost_kind
    if kind not in ("dense", "grouped"):
        return {}
    read, written, patches = moved
    if kind == "dense" and shape.kernel == (3, 3) and shape.stride == (1, 1):
        whole = _up(shape.out_size[0], WINOGRAD_TILE) * _up(shape.out_size[1], WINOGRAD_TILE)
        return {"winograd_macs": macs * whole, "winograd_bytes": (2 * read + written) * whole}
    if kind == "grouped":
        filled = _up(channels.inputs / shape.groups, 8) * _up(channels.outputs / shape.groups, 8)
        gathered = patches if shape.kernel != (1, 1) else read
        return {"direct_macs": macs * filled, "direct_patch_bytes": gathered}
    return {"direct_macs": macs, "direct_patch_bytes": patches}


def _moved(shape: OperatorShape, precision: Precision, channels: Channels) -> dict[str, Amount]:
    size = float(BYTES[precision])
    into = out = size
    if shape.kind in BORDERS:  # one side is float32, the other one byte
        into, out = (4.0, 1.0) if shape.kind == "quantize" else (1.0, 4.0)
    pixels = _pixels(shape.out_size)
    read = channels.inputs * _pixels(shape.in_size) * into * shape.inputs
    written = channels.outputs * pixels * out
    window = channels.outputs * pixels * shape.kernel[0] * shape.kernel[1] * (shape.kind in POOLS)
    return {
        "calls": _ones(written),
        "in_bytes": read,
        "out_bytes": written,
        "window": window,
        "ragged_window": window * (channels.outputs % VECTOR != 0),
        "padded_bytes": read * (shape.kind in POOLS and _padded(shape)),
        "spill_bytes": np.maximum(read + written - L2_BYTES, 0.0),
        "near_spill_bytes": np.maximum(read + written - L2_BYTES / 4, 0.0),
        "far_spill_bytes": np.maximum(read + written - L2_BYTES * 4, 0.0),
        "ragged_bytes": (read + written) * (channels.outputs % VECTOR != 0),
        **_blocked(shape, channels, size),
    }


COMPUTING = (
    "calls", "macs", "macs16", "macs_blocks", "macs_small", "macs_tiny", "macs_tile", "strided_macs", "in_bytes",
    "out_bytes", "in_block_bytes", "out_block_bytes", "few_bytes", "weight_bytes", "weight_near_bytes",
    "weight_spill_bytes", "tiles", "near_spill_bytes", "spill_bytes", "odd_calls", "odd_macs", "odd_bytes", "pixels",
    "uneven_pixels", "few_macs", "narrow_macs", "narrow_pixels", "ragged_macs", "ragged_bytes", "rest_macs",
    "few_pixels",
)  # fmt: skip
MOVING = ("calls", "in_bytes", "out_bytes", "in_block_bytes", "out_block_bytes", "near_spill_bytes", "spill_bytes")
BASIS: dict[str, tuple[str, ...]] = {
    "dense": (*COMPUTING, "patch_bytes", "odd_patch_bytes", "large_window_macs"),
    "pointwise": (*COMPUTING, "single_calls", "strided_bytes", "strided_pixels"),
    "grouped": (*COMPUTING, "patch_bytes", "odd_patch_bytes", "groups", "odd_groups", "gathers"),
    "depthwise": (
        "calls", "macs16", "macs_small", "macs_tiny", "rest_macs", "strided_macs", "in_block_bytes", "out_block_bytes",
        "out_bytes", "rows", "near_spill_bytes", "spill_bytes", "odd_calls", "odd_macs", "odd_bytes", "odd_groups",
        "pixels", "taps", "macs8", "ragged_taps", "weight_bytes",
    ),
    "conv_transpose": ("calls", "macs16", "in_bytes", "out_bytes", "weight_bytes", "patch_bytes", "odd_macs"),
    "linear": ("calls", "weight_bytes", "weight_near_bytes", "weight_spill_bytes", "out_bytes"),
    "shuffle.fresh": ("calls", "in_bytes", "in_block_bytes"),
    "cold": ("in_bytes",),
    "batch_norm": ("calls", "in_bytes"),
    "max_pool": (*MOVING, "window", "ragged_window", "padded_bytes"),
    "avg_pool": (*MOVING, "window", "ragged_window", "padded_bytes"),
    "concat": (*MOVING, "ragged_bytes"),
}  # fmt: skip
"""The features that explain a kind's kernels; what is not listed takes `MOVING`. More would need more
measurements than a few minutes hold."""


def basis(row: str) -> tuple[str, ...]:
    """The features that a row of a cost table is fitted with.

    >>> basis("depthwise.3") == BASIS["depthwise"]
    True
    """
    family = row if row in BASIS else row.partition(".")[0]
    return BASIS.get(family, ("calls", "out_bytes") if "+" in row else MOVING)


def _padded(shape: OperatorShape) -> bool:
    """Whether a window with a stride needs more than the map has, on all sides."""
    if shape.ceil:
        return False
    axes = zip(shape.in_size, shape.kernel, shape.stride, shape.out_size, strict=True)
    return shape.stride[0] > 1 and any((size - kernel) // step + 1 < out for size, kernel, step, out in axes)


def _pixels(size: tuple[int, int]) -> float:
    return float(size[0] * size[1])


def _ones(like: Amount) -> Amount:
    return like * 0.0 + 1.0


def _up(channels: Amount, block: int) -> Amount:
    """By how much whole blocks of channels are more than the channels."""
    return np.ceil(channels / block) * block / np.maximum(channels, 1e-9)  # of none there are no blocks
