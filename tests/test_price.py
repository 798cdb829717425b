"""The price of a network: by hand, alike on every path, honest about what it does not know."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from priced import BOTH, FLOAT, INT8, changed, full_table, model, operator, profile, residual, row, table, varied

from mobilekit.cost.features import features
from mobilekit.cost.lines import lines
from mobilekit.cost.price import corrected, latencies_ms, latency_ms, price, price_shapes
from mobilekit.cost.sketches import Sketch
from mobilekit.cost.work import Channels
from mobilekit.errors import BadInputError
from mobilekit.types import CostTable, DeviceProfile, Estimate, Network, OperatorShape, Precision

QUANTISED: dict[str, Precision] = dict.fromkeys(("conv_2", "conv_4", "add_1", "concat_1", "linear_1"), "int8")


def us(estimate: Estimate) -> dict[str, float]:
    return {line.name: 1000 * line.latency_ms for line in estimate.operators}


def spreads(estimate: Estimate) -> tuple[float, float]:
    """By what share of the price the interval reaches down and up."""
    return 1 - estimate.low_ms / estimate.latency_ms, estimate.high_ms / estimate.latency_ms - 1


# ---------------------------------------------------------------- the sum


def test_sum_of_operators_by_hand() -> None:
    estimate = price(residual(), BOTH, "onnx")
    a = 10 + 1e-4 * (16 * 3 * 9 * 64) + 1e-4 * 4 * 64 * (3 + 16)
    b = 10 + 1e-4 * (16 * 8 * 9 * 64) + 1e-4 * 4 * 64 * (8 + 16)
    c = 8 + 1e-4 * (16 * 8 * 64) + 1e-4 * 4 * 64 * (8 + 16)
    add = 2 + 1e-3 * 4 * 64 * 16 * 3
    fc = 3 + 1e-3 * 16 * 64 * 10
    assert list(us(estimate).values()) == pytest.approx([a, b, c, add, 0, fc])
    assert estimate.latency_ms * 1000 == pytest.approx(5 + a + b + c + add + fc)
    assert estimate.low_ms < estimate.latency_ms < estimate.high_ms
    assert estimate.basis == "kernel table"
    assert estimate.extrapolated == ()


def test_every_feature_counts() -> None:
    shape = OperatorShape(kind="conv", in_channels=18, out_channels=30, in_size=(9, 9), out_size=(9, 9), kernel=(3, 3))
    amounts = features(shape, "fp32")
    assert len(amounts) >= 15
    for feature, amount in amounts.items():
        only = profile(table("fp32", {"dense": model({feature: 0.5})}))
        assert 1000 * price_shapes({"x": shape}, "fp32", only, "onnx").latency_ms == pytest.approx(5 + 0.5 * amount)
    unknown = profile(table("fp32", {"dense": model({"calls": 2.0, "moonlight": 9.0})}))
    assert 1000 * price_shapes({"x": shape}, "fp32", unknown, "onnx").latency_ms == pytest.approx(5 + 2)


def test_overhead_is_that_of_the_precisions_in_use() -> None:
    def beside(network: Network) -> float:
        estimate = price(network, BOTH, "onnx")
        return 1000 * estimate.latency_ms - sum(us(estimate).values())

    assert beside(residual()) == pytest.approx(5)
    assert beside(residual().with_precisions({"b": "int8"})) == pytest.approx(6)


def test_weights_that_do_not_stay_in_the_cache_are_read_again() -> None:
    network = residual((512, 8)).with_precisions({"fc": "int8"})
    cold = model({"in_bytes": 1e-3})
    known = profile(*(t.model_copy(update={"kinds": {**t.kinds, "cold": cold}}) for t in (FLOAT, INT8)))
    held = {o.name: network.shape(o).weights * (1 if o.name == "fc" else 4) for o in network.operators}
    beyond = 1 - 2**20 / sum(held.values())
    assert beyond < 0  # with weights of a byte all of them stay
    assert "cold" not in {line.kind for line in price(network, known, "onnx").operators}
    float_ = network.with_precisions({})
    total = 4 * sum(float_.shape(o).weights for o in float_.operators)
    assert total > 2**20
    (line,) = [line for line in price(float_, known, "onnx").operators if line.kind == "cold"]
    assert 1000 * line.latency_ms == pytest.approx(1e-3 * (total - 2**20))
    found = latencies_ms(float_, known, "onnx", {"trunk": [16, 512]})
    assert list(found) == pytest.approx([latency_ms(residual((w, 8)), known, "onnx") for w in (16, 512)])
    unpriced = price(float_, BOTH, "onnx")  # prices from whole networks hold them already
    assert "cold" not in {line.kind for line in unpriced.operators}
    assert unpriced.extrapolated == ()


def test_where_the_prices_are_from() -> None:
    fitted = profile(FLOAT, INT8.model_copy(update={"basis": "fitted"}))
    assert price(residual(), fitted, "onnx").basis == "kernel table"
    assert price(residual().with_precisions({"b": "int8"}), fitted, "onnx").basis == "fitted"
    assert price(residual(), corrected(fitted, "onnx", "fp32", 1.2), "onnx").basis == "anchored"


def test_shapes_alone_are_priced_like_the_network() -> None:
    network = residual()
    shapes = {o.name: network.shape(o) for o in network.operators}
    alone, whole = price_shapes(shapes, "fp32", BOTH, "onnx"), price(network, BOTH, "onnx")
    assert alone.latency_ms == pytest.approx(whole.latency_ms)
    assert (alone.low_ms, alone.high_ms) == pytest.approx((whole.low_ms, whole.high_ms))
    assert [line.name for line in alone.operators] == list(shapes)
    assert alone.peak_memory_bytes is None
    assert alone.size_bytes is None
    with pytest.raises(BadInputError, match="for runtime onnx in fp16"):
        price_shapes(shapes, "fp16", BOTH, "onnx")


# ---------------------------------------------------------------- alike on every path

FULL = profile(full_table("fp32"), full_table("int8", overhead=7.0))


@pytest.mark.parametrize("int8", [{}, {"b": "int8"}, dict.fromkeys("abc", "int8")])
def test_fast_path_is_the_same_figure(int8: dict[str, Precision]) -> None:
    network = residual().with_precisions(int8)
    for known in (BOTH, FULL, corrected(BOTH, "onnx", "fp32", 1.7)):
        assert latency_ms(network, known, "onnx") == price(network, known, "onnx").latency_ms


@given(st.data(), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_many_widths_at_once_are_priced_like_each_alone(data: st.DataObject, int8: bool, fused: bool) -> None:
    fusions = ("conv>add", "conv+relu6") if fused else ()
    known = profile(full_table("fp32", fusions=fusions), full_table("int8", fusions=fusions, correction=1.5))
    network = varied().with_precisions(QUANTISED if int8 else {})
    names = data.draw(st.lists(st.sampled_from(sorted(network.groups)), min_size=1, unique=True))
    count = data.draw(st.integers(1, 5))
    column = st.lists(st.integers(2, 70), min_size=count, max_size=count)
    widths = {name: data.draw(column) for name in names}
    found = latencies_ms(network, known, "onnx", widths)
    alone = [{name: values[n] for name, values in widths.items()} for n in range(count)]
    expected = [latency_ms(network.with_widths(one), known, "onnx") for one in alone]
    assert found.shape == (count,)
    assert list(found) == pytest.approx(expected, rel=1e-9)


def test_ten_thousand_assignments_of_fifty_operators() -> None:
    s = Sketch("long", 3, (16, 16))
    x = s.conv(s.input, 16)
    for _ in range(24):
        x = s.add(s.conv(x, 16, 3, activation=None), x, "relu")
    s.linear(s.global_pool(x), 10)
    network = s.network().with_precisions({"conv_5": "int8", "conv_9": "int8"})
    assert len(network.operators) >= 50
    random = np.random.default_rng(0)
    trunk = random.integers(4, 65, 10_000)
    # A sum needs maps of the same width: all groups of the trunk are assigned together.
    names = [name for name in network.groups if network.groups[name].width == 16]
    assert len(names) == 25
    found = latencies_ms(network, FULL, "onnx", dict.fromkeys(names, trunk))
    assert found.shape == (10_000,)
    for index in (0, 17, 9_999):
        one = network.with_widths(dict.fromkeys(names, int(trunk[index])))
        assert found[index] == pytest.approx(latency_ms(one, FULL, "onnx"))
    assert len(np.unique(found)) == len(np.unique(trunk))


def test_width_assignments_that_are_none() -> None:
    with pytest.raises(BadInputError, match="no channel group 'trnk'"):
        latencies_ms(residual(), BOTH, "onnx", {"trnk": [8, 16]})
    for wrong in ({"trunk": [8, 16], "hidden": [8]}, {"trunk": [[8], [16]]}, {}):
        with pytest.raises(BadInputError, match="arrays of one length"):
            latencies_ms(residual(), BOTH, "onnx", wrong)
    with pytest.raises(BadInputError, match="no measured operator times for runtime tflite"):
        latencies_ms(residual(), BOTH, "tflite", {"trunk": [8, 16]})


@given(
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
    st.tuples(st.integers(0, 16), st.integers(0, 16)),
)
@settings(max_examples=60, deadline=None)
def test_more_channels_never_cost_less(widths: tuple[int, int], more: tuple[int, int]) -> None:
    wider = (widths[0] + more[0], widths[1] + more[1])
    smooth = profile(full_table("fp32", without=("odd_", "ragged_", "few_", "rest_")))
    assert latency_ms(residual(wider), smooth, "onnx") >= latency_ms(residual(widths), smooth, "onnx")
    # What runs channels that fill no block through slower kernels may be dearer than the next block: compare blocks.
    blocks = [residual((16 * pair[0], 16 * pair[1])) for pair in (wider, widths)]
    assert latency_ms(blocks[0], FULL, "onnx") >= latency_ms(blocks[1], FULL, "onnx")


def test_caches_do_not_mix_profiles_up() -> None:
    for calls in range(1, 40):
        dear = profile(table("fp32", {"dense": row(calls)}, overhead=0))
        assert latency_ms(residual(), dear, "onnx") == pytest.approx(5 * calls / 1000)
    one, other = profile(table("fp32", {"dense": row(1)})), profile(table("fp32", {"dense": row(2)}))
    for known, calls in ((one, 1), (other, 2)) * 3:
        assert latency_ms(residual(), known, "onnx") == pytest.approx((5 + 5 * calls) / 1000)
    both = profile(FLOAT, FLOAT.model_copy(update={"runtime": "tflite", "overhead_us": 105.0}))
    for _ in range(2):
        difference = latency_ms(residual(), both, "tflite") - latency_ms(residual(), both, "onnx")
        assert difference == pytest.approx(0.1)


# ---------------------------------------------------------------- borders between precisions


def borders(network: Network, which: set[str]) -> list[str]:
    int8: dict[str, Precision] = dict.fromkeys(which, "int8")
    estimate = price(network.with_precisions(int8), BOTH, "onnx")
    return [line.name for line in estimate.operators if line.kind in ("quantize", "dequantize")]


@pytest.mark.parametrize(
    ("int8", "expected"),
    [
        (set(), []),
        ({"a", "b", "c", "sum", "fc"}, ["quantize input", "dequantize fc"]),
        ({"b"}, ["quantize a", "dequantize b"]),
        ({"b", "c"}, ["quantize a", "dequantize c"]),
        ({"b", "c", "sum"}, ["quantize a", "dequantize sum"]),  # a is read twice, converted once
        ({"sum", "fc"}, ["quantize c", "quantize a", "dequantize fc"]),  # nothing between sum and fc: flatten is free
        ({"a"}, ["quantize input", "dequantize a"]),
    ],
)
def test_borders_appear_exactly_where_precision_changes(int8: set[str], expected: list[str]) -> None:
    assert borders(residual(), int8) == expected


def test_output_that_is_also_read_inside_is_converted_once() -> None:
    network = residual()
    two = network.model_copy(
        update={"operators": (*network.operators, operator("side", "conv", ("b",), ("hidden", "trunk")))}
    )
    assert borders(two, {"b", "side"}) == ["quantize a", "dequantize b", "dequantize side"]


def test_borders_cost_what_their_tensors_hold() -> None:
    costs = us(price(residual().with_precisions({"b": "int8"}), BOTH, "onnx"))
    assert costs["quantize a"] == pytest.approx(20 + 1e-3 * 5 * 16 * 64)
    assert costs["dequantize b"] == pytest.approx(30 + 1e-3 * 5 * 8 * 64)
    assert costs["b"] == pytest.approx(7 + 2e-5 * 16 * 8 * 9 * 64 + 1e-4 * 64 * (8 + 16))


def test_half_precision_is_float() -> None:
    half = profile(FLOAT, INT8, table("fp16", {"dense": row(1), "pointwise": row(2)}))
    mixed = residual().with_precisions({"b": "fp16", "c": "int8"})
    names = list(us(price(mixed, half, "onnx")))
    assert [name for name in names if "quant" in name] == ["quantize b", "dequantize c"]


def test_lines_of_many_widths_have_the_names_of_one() -> None:
    network = varied().with_precisions(QUANTISED)
    wide = lines(network, (), {name: np.array([8.0, 16.0]) for name in network.groups})
    assert [(line.name, line.precision) for line in wide] == [(line.name, line.precision) for line in lines(network)]
    last = wide[-1].parts[0].channels
    assert isinstance(last, Channels)
    assert np.shape(last.outputs) == (2,)


def test_a_shuffle_of_what_was_computed_costs_more_than_the_next_one() -> None:
    sketch = Sketch("shuffles", 3, (8, 8))
    x = sketch.shuffle(sketch.conv(sketch.input, 8), 2)
    left, right = sketch.split(x, 4)
    x = sketch.shuffle(sketch.concat(left, sketch.conv(right, 4)), 2)
    x = sketch.shuffle(sketch.conv(x, 8), 2)
    sketch.shuffle(x, 4)
    rows = [part.row for line in lines(sketch.network()) for part in line.parts if part.shape.kind == "shuffle"]
    assert rows == ["shuffle", "shuffle.fresh", "shuffle", "shuffle", "shuffle.fresh", "shuffle"]


# ---------------------------------------------------------------- tables that lack something


def test_missing_tables() -> None:
    with pytest.raises(BadInputError, match="'bench' has no measured operator times for runtime tflite"):
        price(residual(), BOTH, "tflite")
    with pytest.raises(BadInputError, match="for runtime onnx in int8"):
        latency_ms(residual().with_precisions({"a": "int8"}), profile(FLOAT), "onnx")
    with pytest.raises(BadInputError, match="no measured operator times"):
        price(residual(), profile(table("fp32", {})), "onnx")


def test_sizes_beyond_the_sampled_are_flagged() -> None:
    kinds = {**FLOAT.kinds, "dense": row(10, max_macs=30_000.0), "linear": row(3, max_bytes=100.0)}
    estimate = price(residual(), profile(table("fp32", kinds)), "onnx")
    assert estimate.extrapolated == ("b", "fc")  # a: 27,648 MACs, b: 73,728
    assert [line.extrapolated for line in estimate.operators] == [False, True, False, False, False, True]
    flagged = {line.name: (line.low_ms / line.latency_ms, line.high_ms / line.latency_ms)
               for line in estimate.operators if line.latency_ms}  # fmt: skip
    assert flagged["a"] == pytest.approx((0.8, 1.25))
    assert flagged["b"] == pytest.approx((0.5, 2.0))


def test_sizes_below_the_sampled_are_flagged() -> None:
    kinds = {**FLOAT.kinds, "dense": row(10, min_macs=30_000.0), "linear": row(3, min_bytes=1e6)}
    assert price(residual(), profile(table("fp32", kinds)), "onnx").extrapolated == ("a", "fc")


@pytest.mark.parametrize("limits", [{}, {"low": 0.95, "high": 1.05}])
def test_extrapolation_widens_the_interval(limits: dict[str, float]) -> None:
    sampled = table("fp32", {**FLOAT.kinds}, **limits)
    large = table("fp32", {**FLOAT.kinds, "dense": FLOAT.kinds["dense"].model_copy(update={"max_macs": 1.0})}, **limits)
    kind = table("fp32", {name: m for name, m in FLOAT.kinds.items() if name != "dense"}, **limits)
    down, up = spreads(price(residual(), profile(sampled), "onnx"))
    for unsure in (large, kind):
        estimate = price(residual(), profile(unsure), "onnx")
        assert estimate.extrapolated == ("a", "b")
        wider = spreads(estimate)
        assert wider[0] > down
        assert wider[1] > up


@pytest.mark.parametrize(
    ("kind", "facts", "stand_in"),
    [
        ("softmax", {}, "add"),
        ("resize", {}, "add"),
        ("conv", {"kernel": (3, 3), "groups": 2}, "dense"),
        ("conv", {"kernel": (3, 3), "groups": 16, "depthwise": True}, "dense"),
        ("conv_transpose", {"kernel": (2, 2)}, "dense"),
    ],
)
def test_kind_without_a_row_uses_the_nearest_and_says_so(kind: str, facts: dict[str, Any], stand_in: str) -> None:
    network = residual()
    odd = operator("odd", kind, ("sum",), ("trunk", "trunk"), **facts)
    network = network.model_copy(update={"operators": (*network.operators[:4], odd)})
    estimate = price(network, BOTH, "onnx")
    amounts = features(network.shape(odd), "fp32")
    expected = sum(c * amounts.get(f, 0.0) for f, c in FLOAT.kinds[stand_in].coefficients.items())
    assert us(estimate)["odd"] == pytest.approx(expected)
    assert estimate.extrapolated == ("odd",)


def test_another_kernel_size_stands_in_first() -> None:
    deep = operator("deep", "conv", ("sum",), ("trunk", "trunk"), kernel=(5, 5), depthwise=True)
    network = residual().model_copy(update={"operators": (*residual().operators[:4], deep)})
    known = table("fp32", {**FLOAT.kinds, "depthwise.3": row(77), "grouped": row(88)})
    estimate = price(network, profile(known), "onnx")
    assert us(estimate)["deep"] == pytest.approx(77)
    assert estimate.extrapolated == ("deep",)


def test_no_row_at_all_to_stand_in() -> None:
    estimate = price(residual(), profile(table("fp32", {"resize": row(7)})), "onnx")
    assert estimate.latency_ms * 1000 == pytest.approx(5 + 5 * 7)
    assert len(estimate.extrapolated) == 5


# ---------------------------------------------------------------- what runs inside another operator


def of_c(activation: str | None, known: CostTable) -> float:
    network = changed(residual(), "c", activation=activation)
    return us(price(network, profile(known), "onnx"))["c"]


def test_fused_activations() -> None:
    plain = of_c(None, FLOAT)
    assert of_c("relu", FLOAT) == of_c("relu6", FLOAT) == plain
    assert of_c("hardswish", FLOAT) == pytest.approx(plain + 4 + 1e-3 * 4 * 64 * 32)  # the function's own price
    measured = table("fp32", {**FLOAT.kinds, "conv+hardswish": row(0.5)})
    assert of_c("hardswish", measured) == pytest.approx(plain + 0.5)
    seen = table("fp32", FLOAT.kinds, fusions=("conv+hardswish",))
    assert of_c("hardswish", seen) == plain
    assert of_c("silu", seen) > plain


def test_an_unpriced_function_is_flagged_only_where_it_costs() -> None:
    def flagged(activation: str, known: CostTable) -> tuple[str, ...]:
        return price(changed(residual(), "c", activation=activation), profile(known), "onnx").extrapolated

    assert flagged("relu", FLOAT) == flagged("hardswish", FLOAT) == ()
    assert flagged("silu", FLOAT) == ("c",)
    assert flagged("silu", table("fp32", FLOAT.kinds, fusions=("conv+silu",))) == ()


INSIDE = {**FLOAT.kinds, "add.fused": row(0.25)}


def of_sum(network: Network, fusions: tuple[str, ...] = ("conv>add",)) -> float:
    known = profile(table("fp32", INSIDE, fusions=fusions), INT8.model_copy(update={"fusions": fusions}))
    return us(price(network, known, "onnx"))["sum"]


ALONE = 2 + 1e-3 * 4 * 64 * 16 * 3


def test_an_addition_runs_inside_a_convolution_that_it_alone_reads() -> None:
    assert of_sum(residual()) == pytest.approx(0.25)
    assert of_sum(residual(), ()) == pytest.approx(ALONE)
    assert of_sum(residual(), ("conv>mul",)) == pytest.approx(ALONE)


def test_an_addition_does_not_run_inside_a_finished_convolution() -> None:
    assert of_sum(changed(residual(), "c", activation="relu")) == pytest.approx(ALONE)


def with_side(read: str) -> Network:
    side = operator("side", "conv", (read,), ("trunk", "trunk"))
    return residual().model_copy(update={"operators": (*residual().operators, side)})


def test_an_addition_does_not_run_inside_a_convolution_that_others_read() -> None:
    assert of_sum(with_side("c")) == pytest.approx(ALONE)
    assert of_sum(with_side("b")) == pytest.approx(0.25)


def test_readers_are_counted_through_operators_that_are_free() -> None:
    def dropped(network: Network) -> Network:
        first = network.operators[:3]
        free = operator("dropped", "dropout", ("c",), ("trunk", "trunk"))
        rest = changed(network, "sum", inputs=("dropped", "a")).operators[3:]
        return network.model_copy(update={"operators": (*first, free, *rest)})

    assert of_sum(dropped(residual())) == pytest.approx(0.25)
    assert of_sum(dropped(with_side("c"))) == pytest.approx(ALONE)


def test_an_addition_in_another_precision_runs_on_its_own() -> None:
    assert of_sum(residual().with_precisions({"c": "int8"})) == pytest.approx(ALONE)


# ---------------------------------------------------------------- intervals and corrections


def test_operators_intervals_add_up_between_shared_and_independent_errors() -> None:
    estimate = price(residual(), BOTH, "onnx")
    up = [line.high_ms - line.latency_ms for line in estimate.operators]
    width = estimate.high_ms - estimate.latency_ms
    assert math.sqrt(sum(u * u for u in up)) < width < sum(up)


def test_the_tables_own_interval_counts_where_it_is_known() -> None:
    known = profile(FLOAT.model_copy(update={"low": 0.9, "high": 1.3}), INT8)
    estimate = price(residual(), known, "onnx")
    assert spreads(estimate) == pytest.approx((0.1, 0.3))
    mixed = price(residual().with_precisions({"b": "int8"}), known, "onnx")
    assert spreads(mixed) == pytest.approx((0.1, 0.3))


def test_corrections_multiply_and_anchor() -> None:
    twice = corrected(corrected(BOTH, "onnx", "fp32", 4.0), "onnx", "fp32", 0.5)
    before, after = price(residual(), BOTH, "onnx"), price(residual(), twice, "onnx")
    assert after.latency_ms == pytest.approx(2 * before.latency_ms)
    assert after.operators[0].high_ms == pytest.approx(2 * before.operators[0].high_ms)
    assert after.basis == "anchored"
    assert twice.table("onnx", "int8") == BOTH.table("onnx", "int8")
    assert BOTH.tables[0].correction == 1
    for factor in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(BadInputError, match="positive and finite"):
            corrected(BOTH, "onnx", "fp32", factor)
    with pytest.raises(BadInputError, match="tflite"):
        corrected(BOTH, "tflite", "fp32", 2.0)


def test_a_correction_belongs_to_its_precision() -> None:
    mixed = residual().with_precisions({"b": "int8"})
    before, after = (us(price(mixed, p, "onnx")) for p in (BOTH, corrected(BOTH, "onnx", "int8", 3.0)))
    for name in before:
        factor = 3 if name in ("b", "quantize a", "dequantize b") else 1
        assert after[name] == pytest.approx(factor * before[name]), name


def test_a_measured_network_narrows_the_interval() -> None:
    def known(**changes: float) -> DeviceProfile:
        return profile(FLOAT.model_copy(update={"low": 0.81, "high": 1.44, **changes}))

    anchored = price(residual(), corrected(known(), "onnx", "fp32", 1.1), "onnx")
    assert spreads(price(residual(), known(), "onnx")) == pytest.approx((0.19, 0.44))
    assert spreads(anchored) == pytest.approx((0.1, 0.2))


# ---------------------------------------------------------------- size and memory


def test_size_counts_weights_in_their_precision() -> None:
    network = residual()
    count = 16 * 3 * 9 + 16 * 8 * 9 + 16 * 8 + 16 * 64 * 10
    full = price(network, BOTH, "onnx").size_bytes
    assert full is not None
    assert 4 * count < full < 4 * count + 3000
    names: dict[str, Precision] = {o.name: "int8" for o in network.operators}
    small = price(network.with_precisions(names), BOTH, "onnx").size_bytes
    assert small is not None
    assert full - small == 3 * count


def test_peak_memory_follows_the_names() -> None:
    # c runs while a waits for the sum: a (16) + b (8) + c (16) channels of 8x8 float32.
    assert price(residual(), BOTH, "onnx").peak_memory_bytes == (16 + 16 + 16) * 64 * 4
    plain = residual().model_copy(update={"operators": residual().operators[:3]})
    assert price(plain, BOTH, "onnx").peak_memory_bytes == (16 + 8) * 64 * 4
