"""Operators of the evaluator, read from a saved package, against their documentation, where nothing is inferred."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("coremltools")
from mil_programs import Build, carried_out, computed, mb

from mobilekit.errors import BadInputError

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 4, 3, 6)).astype(np.float32)
Y = RANDOM.standard_normal((2, 4, 3, 6)).astype(np.float32)
PER_CHANNEL = RANDOM.uniform(0.1, 1, 4).astype(np.float32)


def unary(name: str) -> Build:
    return lambda x: getattr(mb, name)(x=x)


def normalised(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> np.ndarray:
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + epsilon)


def channels(values: np.ndarray) -> np.ndarray:
    return values.reshape(1, -1, 1, 1)


MEAN, GAMMA = PER_CHANNEL - 1, PER_CHANNEL * 2
ARANGE = np.arange(2 * 4 * 3 * 6, dtype=np.float32).reshape(2, 4, 3, 6)
PLACES = np.array([[0, 3, 1], [1, 0, 2]], np.int32)
STATED: dict[str, tuple[Build, list[np.ndarray], np.ndarray]] = {
    "silu": (unary("silu"), [X], X / (1 + np.exp(-X))),
    "batch_norm": (
        lambda x: mb.batch_norm(x=x, mean=MEAN, variance=PER_CHANNEL, gamma=GAMMA, beta=MEAN, epsilon=1e-3),
        [X],
        (X - channels(MEAN)) / np.sqrt(channels(PER_CHANNEL) + 1e-3) * channels(GAMMA) + channels(MEAN),
    ),
    "batch_norm without factors": (
        lambda x: mb.batch_norm(x=x, mean=MEAN, variance=PER_CHANNEL, epsilon=1e-2),
        [X],
        (X - channels(MEAN)) / np.sqrt(channels(PER_CHANNEL) + 1e-2),
    ),
    "instance_norm": (
        lambda x: mb.instance_norm(x=x, gamma=GAMMA, beta=MEAN, epsilon=1e-2),
        [X],
        normalised(X, (2, 3), 1e-2) * channels(GAMMA) + channels(MEAN),
    ),
    "local_response_norm": (
        lambda x: mb.local_response_norm(x=x, size=3, alpha=0.6, beta=0.7, k=1.5),
        [X],
        X / (1.5 + 0.2 * sum(np.pad(X**2, ((0, 0), (1, 1), (0, 0), (0, 0)))[:, i : i + 4] for i in range(3))) ** 0.7,
    ),
    "concat interleaved": (
        lambda x, y: mb.concat(values=[x, y], axis=1, interleave=True),
        [X, Y],
        np.stack([X, Y], 2).reshape(2, 8, 3, 6),
    ),
    "cumsum exclusive": (
        lambda x: mb.cumsum(x=x, axis=1, exclusive=True, reverse=True),
        [X],
        np.flip(np.cumsum(np.flip(X, 1), 1), 1) - X,
    ),
    "one_hot": (
        lambda x: mb.one_hot(indices=x, one_hot_vector_size=4, axis=1, on_value=2.0, off_value=-1.0),
        [PLACES],
        np.where(PLACES[:, None] == np.arange(4)[:, None], 2.0, -1.0),
    ),
    "non_zero": (unary("non_zero"), [PLACES.astype(np.float32)], np.argwhere(PLACES)),
    "gather_nd": (lambda x: mb.gather_nd(x=x, indices=np.array([[1, 2], [0, 3]], np.int32)), [X], X[[1, 0], [2, 3]]),
    "gather_nd in batches": (
        lambda x: mb.gather_nd(x=x, indices=np.array([[[3]], [[1]]], np.int32), batch_dims=1),
        [X],
        X[[0, 1], [3, 1]][:, None],
    ),
    "dynamic reshape": (
        lambda x, y: mb.reshape(
            x=x, shape=mb.concat(values=[mb.slice_by_size(x=mb.shape(x=y), begin=[1], size=[2]), [-1]], axis=0)
        ),
        [X, Y],
        X.reshape(4, 3, -1),
    ),
    "reshape_like": (
        lambda x, y: mb.reshape_like(x=x, ref_tensors=(y, y), begins=(0, 2), ends=(1, 0), end_masks=(False, True)),
        [X.reshape(8, 18), X[:, :1, :, :].repeat(4, 2)],
        X.reshape(2, 12, 6),
    ),
    "fill": (lambda x: mb.mul(x=mb.fill(shape=[3, 6], value=2.0), y=x), [X], X * 2),
    "range_1d": (lambda x: mb.add(x=x, y=mb.range_1d(start=1.0, end=7.0, step=1.0)), [X], X + np.arange(1, 7)),
    "sliding_windows": (
        lambda x: mb.sliding_windows(x=x, axis=-1, size=3, stride=2),
        [X],
        np.stack([X[..., 0:3], X[..., 2:5]], 3),
    ),
    "pixel_shuffle": (
        lambda x: mb.pixel_shuffle(x=x, upscale_factor=2),
        [X],
        X.reshape(2, 1, 2, 2, 3, 6).transpose(0, 1, 4, 2, 5, 3).reshape(2, 1, 6, 12),
    ),
    "pixel_unshuffle": (
        lambda x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(3)),
        [X],
        X.reshape(2, 4, 1, 3, 2, 3).transpose(0, 1, 3, 5, 2, 4).reshape(2, 36, 1, 2),
    ),
    # TensorFlow's, with channels last: https://www.tensorflow.org/api_docs/python/tf/nn/depth_to_space
    "depth_to_space": (
        lambda x: mb.depth_to_space(x=x, block_size=2),
        [np.tile(ARANGE, (1, 2, 1, 1))],
        np.tile(ARANGE, (1, 2, 1, 1))
        .transpose(0, 2, 3, 1)
        .reshape(2, 3, 6, 2, 2, 2)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(2, 6, 12, 2)
        .transpose(0, 3, 1, 2),
    ),
    "space_to_depth": (
        lambda x: mb.space_to_depth(x=x, block_size=3),
        [ARANGE],
        ARANGE.transpose(0, 2, 3, 1)
        .reshape(2, 1, 3, 2, 3, 4)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(2, 1, 2, 36)
        .transpose(0, 3, 1, 2),
    ),
    "crop": (lambda x: mb.crop(x=x, crop_height=[1, 0], crop_width=[2, 3]), [X], X[:, :, 1:, 2:3]),
    "dequantize": (
        lambda x: mb.dequantize(
            input=mb.quantize(input=x, scale=np.float32(0.03), zero_point=np.int8(5), output_dtype="int8"),
            scale=np.float32(0.03),
            zero_point=np.int8(5),
        ),
        [X],
        (np.clip(np.round(X / np.float32(0.03)) + 5, -128, 127) - 5) * 0.03,
    ),
    "dequantize by channel": (
        lambda x: mb.dequantize(
            input=mb.quantize(input=x, scale=np.float32(0.03), zero_point=np.uint8(128), output_dtype="uint8"),
            scale=PER_CHANNEL,
            zero_point=np.array([1, 2, 3, 250], np.uint8),
            axis=-3,
        ),
        [X],
        (np.clip(np.round(X / np.float32(0.03)) + 128, 0, 255) - channels(np.array([1, 2, 3, 250])))
        * channels(PER_CHANNEL),
    ),
    "upsample_nearest_neighbor": (
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        [X],
        X.repeat(2, 2).repeat(3, 3),
    ),
    "upsample_nearest_neighbor by a fraction": (
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=1.0, scale_factor_width=1.5),
        [X],
        X[..., [0, 0, 1, 2, 2, 3, 4, 4, 5]],
    ),
    "resize_nearest_neighbor": (
        lambda x: mb.resize_nearest_neighbor(x=x, target_size_height=5, target_size_width=4),
        [X],
        F.interpolate(torch.from_numpy(X), (5, 4), mode="nearest").numpy(),
    ),
    **{
        f"upsample_bilinear aligned={aligned}": (
            lambda x, aligned=aligned: mb.upsample_bilinear(
                x=x, scale_factor_height=2.0, scale_factor_width=1.7, align_corners=aligned
            ),
            [X],
            F.interpolate(torch.from_numpy(X), (6, 10), mode="bilinear", align_corners=aligned).numpy(),
        )
        for aligned in (True, False)
    },
    "resize": (
        lambda x: mb.resize(x=x, shape=[0, 9], resized_dims=np.uint32(2), sampling_mode="UNALIGN_CORNERS"),
        [X],
        F.interpolate(torch.from_numpy(X), (3, 9), mode="bilinear").numpy(),
    ),
    "resize to nearest": (
        lambda x: mb.resize(x=x, shape=[5, 0], resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR"),
        [X],
        F.interpolate(torch.from_numpy(X), (5, 6), mode="nearest").numpy(),
    ),
}
"""Name -> operator, inputs, and what its documentation says, computed otherwise."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[np.ndarray]]:
    return computed(
        {case: (build, inputs) for case, (build, inputs, _) in STATED.items()},
        tmp_path_factory.mktemp("mil") / "all.mlpackage",
    )


@pytest.mark.parametrize("case", STATED)
def test_as_documented(case: str, results: dict[str, list[np.ndarray]]) -> None:
    expected = STATED[case][2]
    (found,) = results[case]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("mode", "wanted", "grid"),
    [
        # coremltools' own examples: iOS15/image_resizing.py, resize_bilinear
        ("UNALIGN_CORNERS", 5, [0, 0.1, 0.5, 0.9, 1]),
        ("STRICT_ALIGN_CORNERS", 5, [0, 0.25, 0.5, 0.75, 1]),
        ("ALIGN_CORNERS", 5, [0, 0.25, 0.5, 0.75, 1]),
        ("ALIGN_CORNERS", 1, [0.5]),
        ("DEFAULT", 5, [0, 0.4, 0.8, 1, 1]),
        ("OFFSET_CORNERS", 5, [0.1, 0.3, 0.5, 0.7, 0.9]),
        ("UNALIGN_CORNERS", 6, [0, 0, 1 / 3, 2 / 3, 1, 1]),
        ("STRICT_ALIGN_CORNERS", 6, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ("DEFAULT", 6, [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("OFFSET_CORNERS", 6, [1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12]),
    ],
)
def test_sampling_modes_have_the_documented_grids(mode: str, wanted: int, grid: list[float], tmp_path: Path) -> None:
    ramp = np.array([[[[0, 1]]]], np.float32)

    def build(x: Any) -> Any:
        return mb.resize_bilinear(x=x, target_size_height=1, target_size_width=wanted, sampling_mode=mode)

    np.testing.assert_allclose(carried_out(build, [ramp], tmp_path)[0][0, 0, 0], grid, atol=1e-6)


def test_fp16_results_are_rounded_after_every_operator(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        half = mb.cast(x=x, dtype="fp16")
        return mb.cast(x=mb.sub(x=mb.mul(x=half, y=np.float16(3.14)), y=np.float16(3.14)), dtype="fp32")

    (found,) = carried_out(build, [X], tmp_path)
    half = X.astype(np.float16)
    expected = (half * np.float16(3.14)).astype(np.float16) - np.float16(3.14)
    assert np.array_equal(found, expected.astype(np.float32))
    large = carried_out(lambda x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"), [X[:1] * 1e6], tmp_path)
    assert np.isinf(large[0]).any()


@pytest.mark.parametrize(("opset", "fine"), [("iOS16", True), ("iOS18", False)])
def test_negative_indices_count_from_the_end_before_ios17_only(opset: str, fine: bool, tmp_path: Path) -> None:
    def build(x: Any, index: Any) -> Any:
        return mb.gather(x=x, indices=index, axis=1)

    index = np.array([-1, 0], np.int32)
    if fine:
        assert np.array_equal(carried_out(build, [X, index], tmp_path, opset)[0], X[:, [3, 0]])
    else:
        with pytest.raises(BadInputError, match="an index lies outside of 4 elements"):
            carried_out(build, [X, index], tmp_path, opset)
