"""What an operator does in numbers: padded channels, patches, groups that follow, one definition for all callers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilekit.cost.features import BASIS, basis, features
from mobilekit.cost.sampling import basics, borders, pool
from mobilekit.cost.work import Channels, fused_row_name, parts, row_name
from mobilekit.types import OperatorShape, Precision

KINDS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "conv", "kernel": (3, 3)},
    "pointwise": {"kind": "conv"},
    "depthwise": {"kind": "conv", "kernel": (3, 3), "groups": 12},
    "grouped": {"kind": "conv", "kernel": (3, 3), "groups": 4},
    "conv_transpose": {"kind": "conv_transpose", "kernel": (2, 2), "out_size": (20, 18)},
    "linear": {"kind": "linear", "in_size": (1, 1), "out_size": (1, 1)},
    **{kind: {"kind": kind} for kind in ("add", "mul", "concat", "softmax", "resize", "quantize", "dequantize")},
    **{kind: {"kind": kind, "kernel": (3, 3)} for kind in ("max_pool", "avg_pool")},
}
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


def shape_of(name: str, read: int = 12, written: int = 12, /, **changes: Any) -> OperatorShape:
    facts = {"in_size": (10, 9), "out_size": (10, 9), **KINDS[name], **changes}
    return OperatorShape(in_channels=read, out_channels=written, **facts)


@given(st.sampled_from(sorted(KINDS)), st.sampled_from(PRECISIONS), st.lists(st.integers(1, 99), min_size=1))
@settings(max_examples=120, deadline=None)
def test_arrays_are_the_numbers_one_by_one_and_none_is_negative(
    name: str, precision: Precision, widths: list[int]
) -> None:
    inputs = np.array(widths, dtype=float)
    outputs = inputs if name == "depthwise" else inputs[::-1] + 3
    shape = shape_of(name)
    together = features(shape, precision, Channels(inputs, outputs))
    assert set(basis(row_name(shape))) <= set(together)
    for number, pair in enumerate(zip(inputs, outputs, strict=True)):
        alone = features(shape, precision, Channels(*map(float, pair)))
        assert alone.keys() == together.keys()
        for feature, amount in alone.items():
            assert np.broadcast_to(together[feature], inputs.shape)[number] == pytest.approx(amount), feature
            assert amount >= 0, feature


def test_sampled_networks_do_nothing_negative() -> None:
    for network in [*basics(), *borders(), *pool(5, 40)]:
        for operator in network.operators:
            for precision in PRECISIONS:
                amounts = features(network.shape(operator), precision)
                assert all(np.isfinite(a) and a >= 0 for a in amounts.values())
                assert amounts["calls"] == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_dense_convolution_by_hand(precision: Precision) -> None:
    size = {"fp32": 4, "fp16": 2, "int8": 1}[precision]
    shape = shape_of("dense", 6, 20, stride=(2, 2), out_size=(5, 5))
    found = features(shape, precision)
    assert found["macs"] == 6 * 20 * 9 * 25 == shape.macs
    assert found["macs8"] == 6 * 24 * 9 * 25
    assert found["macs16"] == 6 * 32 * 9 * 25
    assert found["macs_small"] == pytest.approx(shape.macs * (64 / 25 - 1))
    assert found["macs_tile"] == pytest.approx(shape.macs * (30 / 25 - 1))
    assert found["in_bytes"] == 6 * 90 * size
    assert found["out_bytes"] == 20 * 25 * size
    assert found["weight_bytes"] == 6 * 20 * 9 * size
    assert found["patch_bytes"] == 6 * 9 * 25 * size
    assert found["taps"] == 9 * 25
    assert found["tiles"] == 2 * 25
    assert found["rows"] == 2 * 5
    assert found["spill_bytes"] == found["weight_spill_bytes"] == 0


@given(st.integers(2, 80))
@settings(max_examples=40, deadline=None)
def test_channels_are_counted_in_whole_blocks(width: int) -> None:
    for block in (8, 16):
        whole = -(-width // block) * block
        assert features(shape_of("pointwise", 5, width), "fp32")[f"macs{block}"] == pytest.approx(5 * whole * 90)
        # The groups of a depthwise convolution fill blocks together, others each their own.
        deep = features(shape_of("depthwise", width, width, groups=width), "fp32")
        assert deep[f"macs{block}"] == pytest.approx(whole * 9 * 90)
        grouped = features(shape_of("grouped", 4 * 5, 4 * width), "fp32")
        assert grouped[f"macs{block}"] == pytest.approx(4 * 5 * whole * 9 * 90)


def test_depthwise_groups_follow_the_channels() -> None:
    shape = shape_of("depthwise")
    for width in (7.0, 48.0):
        found = features(shape, "int8", Channels(width, width))
        assert found["macs"] == width * 9 * 90
        assert found["weight_bytes"] == width * 9
        assert found["patch_bytes"] == 0
    grouped = features(shape_of("grouped"), "int8", Channels(48.0, 24.0))
    assert grouped["macs"] == 24 * (48 / 4) * 9 * 90


@pytest.mark.parametrize(
    ("inputs", "outputs", "odd"),
    [(16, 32, 0), (20, 36, 0), (18, 32, 1), (32, 18, 1), (3, 32, 0), (3, 30, 1), (14, 16, 0), (17, 16, 1)],
)
def test_odd_channels_are_no_multiple_of_four_but_images_are_not_odd(inputs: int, outputs: int, odd: int) -> None:
    found = features(shape_of("dense", inputs, outputs), "fp32")
    assert found["odd_calls"] == odd
    assert found["odd_macs"] == odd * found["macs"]
    assert found["odd_bytes"] == odd * (found["in_bytes"] + found["out_bytes"])
    assert found["odd_patch_bytes"] == odd * found["patch_bytes"]


def test_patches_are_gathered_for_kernels_that_are_larger_than_a_pixel() -> None:
    assert features(shape_of("pointwise"), "fp32")["patch_bytes"] == 0
    assert features(shape_of("pointwise"), "fp32")["taps"] == 0
    assert features(shape_of("linear"), "fp32")["patch_bytes"] == 0
    assert features(shape_of("dense"), "fp32")["patch_bytes"] == 12 * 90 * 9 * 4


def test_a_transposed_convolution_works_at_every_input_position() -> None:
    shape = shape_of("conv_transpose", 12, 5)
    found = features(shape, "fp32")
    assert found["macs"] == 12 * 5 * 4 * 90 == shape.macs
    assert found["patch_bytes"] == 12 * 90 * 4 * 4
    assert found["out_bytes"] == 5 * 20 * 18 * 4


def test_what_does_not_fit_the_cache_spills() -> None:
    large = shape_of("linear", 4096, 1000)
    found = features(large, "fp32")
    moved = 4 * (4096 + 1000 + 4096 * 1000)
    assert found["spill_bytes"] == moved - 2**20
    assert found["weight_spill_bytes"] == 4 * 4096 * 1000 - 2**18
    wide = features(shape_of("add", 64, 64, in_size=(112, 112), out_size=(112, 112), inputs=2), "fp32")
    assert wide["spill_bytes"] == 3 * 4 * 64 * 112 * 112 - 2**20


def test_moved_bytes_by_hand() -> None:
    assert features(shape_of("add"), "int8")["in_bytes"] == 12 * 90
    two = features(shape_of("add", inputs=2), "fp32")
    assert two["in_bytes"] == 2 * two["out_bytes"] == 2 * 12 * 90 * 4
    for kind, into, out in (("quantize", 4, 1), ("dequantize", 1, 4)):
        found = features(shape_of(kind), "int8")
        assert (found["in_bytes"], found["out_bytes"]) == (12 * 90 * into, 12 * 90 * out)
    assert features(shape_of("max_pool"), "fp32")["window"] == 12 * 90 * 9
    assert features(shape_of("max_pool"), "fp32")["ragged_window"] == 12 * 90 * 9
    assert features(shape_of("max_pool", 16, 16), "fp32")["ragged_window"] == 0
    assert features(shape_of("concat"), "fp32")["window"] == 0
    assert [features(shape_of("add", 9, w), "fp32")["ragged_bytes"] > 0 for w in (16, 24)] == [False, True]


@pytest.mark.parametrize(
    ("out", "ceil", "padded"), [((5, 5), False, True), ((5, 5), True, False), ((4, 4), False, False)]
)
def test_a_pool_is_padded_where_its_windows_need_more_than_the_map(
    out: tuple[int, int], ceil: bool, padded: bool
) -> None:
    pool = shape_of("max_pool", in_size=(10, 10), out_size=out, stride=(2, 2), ceil=ceil)
    assert features(pool, "fp32")["padded_bytes"] == 4 * 12 * 100 * padded


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("dense", {}, "dense"),
        ("depthwise", {"kernel": (5, 5)}, "depthwise.5"),
        ("depthwise", {"kernel": (1, 7)}, "depthwise.7"),
        ("grouped", {}, "grouped"),
        ("add", {"kind": "activation", "activation": "silu"}, "activation.silu"),
        ("add", {"kind": "activation"}, "activation.constant"),
        ("softmax", {"in_size": (1, 1), "out_size": (1, 1)}, "softmax"),
        ("softmax", {}, "softmax.map"),
    ],
)
def test_rows(name: str, changes: dict[str, Any], expected: str) -> None:
    assert row_name(shape_of(name, **changes)) == expected
    if name == "add" and not changes:
        assert row_name(shape_of(name), place="fused") == "add.fused"


def test_a_row_of_a_known_family_has_its_basis() -> None:
    assert basis("depthwise.5") == BASIS["depthwise"]
    assert basis("conv+silu") == ("calls", "out_bytes")
    assert "macs" not in basis("softmax.map")


def test_parts_are_the_operator_and_its_activation() -> None:
    shape = shape_of("dense", 6, 20, activation="hardswish")
    own, function = parts(shape)
    assert (own.row, own.channels) == ("dense", Channels(6, 20))
    assert (function.row, function.channels, function.shape.kind) == ("conv+hardswish", Channels(20, 20), "activation")
    assert [part.row for part in parts(shape_of("add", activation="relu"), place="fused")] == ["add.fused", "add+relu"]
    assert fused_row_name(shape_of("linear", activation="relu")) == "conv+relu"
    assert [part.row for part in parts(shape_of("add", kind="activation", activation="relu"))] == ["activation.relu"]
    assert list(parts(shape_of("add", kind="flatten"))) == []
