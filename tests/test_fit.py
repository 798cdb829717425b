"""Prices from the times of operators that ran together: what is recovered, how sure the table says it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from priced import profile

from mobilekit.cost.adapt import most_telling
from mobilekit.cost.features import basis
from mobilekit.cost.fit import OVERHEAD, Design, Observation, amounts, folds, interval, left_out, solve, table
from mobilekit.cost.lines import lines
from mobilekit.cost.measure import Sample, in_precision, joined, undisturbed_ms
from mobilekit.cost.price import latency_ms, price_shapes
from mobilekit.cost.sampling import basics, pool
from mobilekit.cost.sketches import Sketch
from mobilekit.cost.tables import candidate, fitted, observed
from mobilekit.types import CostTable, Network, OperatorShape, OperatorTime

TRUTH = {
    "calls": 3.0, "macs": 2e-5, "macs16": 1e-5, "in_bytes": 5e-5, "out_bytes": 8e-5, "weight_bytes": 4e-5,
    "odd_calls": 4.0, "window": 1e-4, "rows": 1e-2, "patch_bytes": 2e-5,
}  # fmt: skip
"""Microseconds a unit, in every row whose basis has the feature."""
OVERHEAD_US = 11.0
TIMED = [*basics(), *pool(1, 120)]
FRESH = pool(2, 60)


def clock(network: Network) -> float:
    """Microseconds of a run on a machine whose prices are TRUTH."""
    parts = [part for line in lines(network) for part in line.parts]
    terms = [(f, a) for part in parts for f, a in amounts(part, "fp32") if f in basis(part.row)]
    return OVERHEAD_US + sum(TRUTH.get(feature, 0.0) * amount for feature, amount in terms)


def observations(networks: Sequence[Network], noise: float = 0.0, seed: int = 0) -> list[Observation]:
    random = np.random.default_rng(seed)
    factors = np.exp(noise * random.standard_normal(len(networks)))
    timed = zip(networks, factors, strict=True)
    return [Observation.of_lines(lines(network), "fp32", clock(network) * factor) for network, factor in timed]


def predictions(found: CostTable, networks: Sequence[Network]) -> np.ndarray:
    known = profile(found)
    return np.array([1000 * latency_ms(network, known, found.runtime) for network in networks])


def known_kinds(found: CostTable, networks: Sequence[Network]) -> list[Network]:
    """Those of which the table has every row."""
    return [n for n in networks if all(part.row in found.kinds for line in lines(n) for part in line.parts)]


# ---------------------------------------------------------------- what is recovered


@pytest.fixture(scope="module")
def exact() -> CostTable:
    return table(observations(TIMED), "onnx", "fp32", threads=2, method="five-fold")


@pytest.mark.parametrize("kind", ["dense", "pointwise", "depthwise.3", "linear", "max_pool"])
def test_known_prices_are_recovered_from_sums(kind: str, exact: CostTable) -> None:
    """Among features that can be told apart; those of a whole basis share what they have in common."""
    design = Design.of(observations(TIMED), chosen=lambda row: [f for f in basis(row) if f in TRUTH])
    found = dict(zip(design.terms, solve(design), strict=True))
    terms = [term for term in design.terms if term[0] == kind]
    assert len(terms) >= 2
    for row, feature in terms:
        assert found[row, feature] == pytest.approx(TRUTH[feature], rel=0.05), feature
    assert found[OVERHEAD] == pytest.approx(OVERHEAD_US, rel=0.01)
    assert exact.overhead_us == pytest.approx(OVERHEAD_US, rel=0.01)


def test_networks_that_were_never_timed_are_predicted(exact: CostTable) -> None:
    networks = known_kinds(exact, FRESH)
    assert len(networks) > 40
    ratios = predictions(exact, networks) / [clock(n) for n in networks]
    assert np.median(np.abs(ratios - 1)) < 0.005
    assert np.mean(np.abs(ratios - 1) < 0.05) > 0.9


def test_a_table_says_what_it_is_of(exact: CostTable) -> None:
    assert (exact.runtime, exact.precision, exact.threads, exact.basis) == ("onnx", "fp32", 2, "kernel table")
    assert exact.validation is not None
    assert exact.validation.method == "five-fold"
    assert exact.validation.cases == len(TIMED)
    assert exact.validation.median_error < 0.01
    assert exact.validation.within_5 > 0.9
    shapes = [network.shape(o) for network in TIMED for o in network.operators]
    dense = exact.kinds["dense"]
    assert dense.max_macs == max(s.macs for s in shapes if s.cost_kind == "dense")
    assert dense.max_bytes == max(4 * s.elements for s in shapes if s.cost_kind == "dense")
    assert dense.min_macs == min(s.macs for s in shapes if s.cost_kind == "dense")
    assert dense.min_bytes == min(4 * s.elements for s in shapes if s.cost_kind == "dense")
    assert dense.samples == sum(any(n.shape(o).cost_kind == "dense" for o in n.operators) for n in TIMED)
    assert dense.median_error is not None
    assert exact.kinds["batch_norm+relu"].median_error is None  # no network is mostly that


def test_the_interval_is_that_of_networks_as_deep_as_real_ones_where_enough_were_timed() -> None:
    noisy = observations(TIMED[: len(TIMED) // 2], 0.3)
    calm = [o._replace(real=True) for o in observations(TIMED[len(TIMED) // 2 :], 0.02, seed=1)]
    together = table([*noisy, *calm], "onnx", "fp32")
    small = table([*noisy, *(o._replace(real=False) for o in calm)], "onnx", "fp32")
    few = table([*noisy, *(o._replace(real=number < 10) for number, o in enumerate(calm))], "onnx", "fp32")
    assert together.validation is not None
    assert together.validation.cases == len(calm)
    assert together.high / together.low < 0.8 * small.high / small.low
    assert (few.low, few.high) == (small.low, small.high)


def test_a_few_outliers_do_not_move_it() -> None:
    clean = observations(TIMED, 0.02)
    spoilt = [o._replace(us=o.us * (4 if n % 20 == 7 else 1)) for n, o in enumerate(clean)]
    steady, moved = (table(o, "onnx", "fp32") for o in (clean, spoilt))
    networks = known_kinds(steady, FRESH)
    ratios = predictions(moved, networks) / predictions(steady, networks)
    assert np.median(np.abs(ratios - 1)) < 0.02
    assert np.quantile(np.abs(ratios - 1), 0.9) < 0.1


def test_what_is_known_is_taken_out() -> None:
    random = np.random.default_rng(3)
    known = [1000 * float(random.random()) for _ in TIMED]
    clean = observations(TIMED)
    more = [o._replace(us=o.us + k, known_us=k) for o, k in zip(clean, known, strict=True)]
    found = table(more, "onnx", "fp32")
    assert found.overhead_us == pytest.approx(OVERHEAD_US, rel=0.05)
    networks = known_kinds(found, FRESH)
    assert np.median(np.abs(predictions(found, networks) / [clock(n) for n in networks] - 1)) < 0.01
    assert found.validation is not None
    assert found.validation.median_error < 0.005


def test_light_observations_count_less() -> None:
    right = observations(TIMED)
    wrong = [o._replace(us=3 * o.us, weight=1e-6) for o in right]
    design = Design.of([*right, *wrong])
    found = dict(zip(design.terms, solve(design), strict=True))
    assert found[OVERHEAD] == pytest.approx(OVERHEAD_US, rel=0.02)


def test_a_strong_prior_holds_and_a_weak_one_fills_in() -> None:
    design = Design.of(observations(TIMED[:3]))
    truth = np.array([TRUTH.get(feature, 0.0) if row else OVERHEAD_US for row, feature in design.terms])
    dearer = solve(design, 2 * truth, 1e6)
    assert design.amounts @ dearer == pytest.approx(2 * design.times, rel=0.01)
    alone, borrowed = solve(design), solve(design, truth)
    for found in (alone, borrowed):
        assert design.amounts @ found == pytest.approx(design.times, rel=0.02)
    # Three networks leave most prices open: what they do not tell is the prior's.
    assert borrowed == pytest.approx(truth, rel=0.02, abs=1e-7)
    assert alone != pytest.approx(truth, rel=0.2, abs=1e-7)


@given(st.lists(st.floats(0.5, 1e6), min_size=2, max_size=12))
@settings(max_examples=40, deadline=None)
def test_no_price_is_ever_negative(times: list[float]) -> None:
    made = [o._replace(us=us) for o, us in zip(observations(TIMED[: len(times)]), times, strict=True)]
    found = table(made, "onnx", "fp32")
    assert found.overhead_us >= 0
    assert all(c >= 0 for m in found.kinds.values() for c in m.coefficients.values())
    assert 0 < found.low <= 1 <= found.high < math.inf


# ---------------------------------------------------------------- how sure it is


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_noise_is_stated_as_error_and_interval(noise: float) -> None:
    found = table(observations(TIMED, noise), "onnx", "fp32")
    checked = found.validation
    assert checked is not None
    # Half of normal errors are under 0.67 deviations, four fifths within 1.28; the fit adds its own.
    assert 0.6 * noise < checked.median_error < 1.3 * noise
    assert 1 < math.log(found.high) / noise < 3.5
    assert 1 < -math.log(found.low) / noise < 3.5
    assert 0.7 <= checked.coverage <= 0.9


def test_the_interval_holds_four_fifths_of_what_was_never_timed() -> None:
    inside = []
    for seed in (1, 2, 3):
        found = table(observations(TIMED, 0.1, seed), "onnx", "fp32")
        networks = known_kinds(found, pool(seed + 20, 120))
        measured = [o.us for o in observations(networks, 0.1, seed + 50)]
        ratios = measured / predictions(found, networks)
        inside += list((found.low <= ratios) & (ratios <= found.high))
    assert len(inside) > 300
    assert 0.7 <= np.mean(inside) <= 0.9


def one(kind: str, width: int) -> Network:
    sketch = Sketch(f"{kind}-{width}", width, (8, 8))
    x = sketch.input
    if kind == "pool":
        sketch.max_pool(x)
    else:
        sketch.add(x, x)
    return sketch.network()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_observations_are_modest(count: int) -> None:
    found = table(observations([one("add", 8 * (n + 1)) for n in range(count)]), "onnx", "fp32")
    assert found.kinds["add"].samples == count
    for low, high in ((found.low, found.high), (found.kinds["add"].low, found.kinds["add"].high)):
        assert low <= 1 <= high
        assert count > 1 or (low, high) == (0.5, 2.0)
    assert (found.validation is None) == (count == 1)


def test_no_observations() -> None:
    with pytest.raises(ValueError, match="no observations"):
        table([], "onnx", "fp32")


def test_intervals_of_few_are_wider_and_always_hold_the_price() -> None:
    ratios = np.exp(0.1 * np.random.default_rng(0).standard_normal(2000))
    few, many = interval(np.array([0.9, 1.0, 1.1])), interval(np.tile([0.9, 1.0, 1.1], 50))
    assert few[0] < many[0] < 1 < many[1] < few[1]
    assert interval(ratios) == pytest.approx((math.exp(-0.128), math.exp(0.128)), rel=0.01)
    assert interval(np.full(30, 0.5)) == pytest.approx((1.0, 2 ** math.sqrt(1 + 4 / 30)))
    assert interval(np.array([])) == (0.5, 2.0)


def test_groups_are_left_out_together() -> None:
    pools = observations([one("pool", 8 * n) for n in range(1, 5)])
    adds = observations([one("add", 8 * n) for n in range(1, 13)])
    made = [o._replace(group="pools") for o in pools] + adds
    turns = folds(made)
    assert len(set(turns[:4])) == 1
    assert set(turns[4:]) == set(range(5))
    design = Design.of(made)
    apart = left_out(design, range(len(made)))
    together = left_out(design, turns)
    assert apart == pytest.approx(1, abs=0.05)
    assert (together[:4] < 0.9).all()  # nothing else tells what a pool costs
    assert together[4:] == pytest.approx(1, abs=0.05)


def test_a_group_on_its_own_is_not_left_out() -> None:
    design = Design.of(observations([one("add", 8), one("add", 16)]))
    assert list(left_out(design, ["all", "all"])) == [1.0, 1.0]


# ---------------------------------------------------------------- what to time next


def chain(*kinds: str, width: int = 16) -> Network:
    sketch = Sketch("-".join(kinds), width, (14, 14))
    x = sketch.input
    for kind in kinds:
        x = {
            "conv": lambda x: sketch.conv(x, 16, 3),
            "point": lambda x: sketch.conv(x, 16),
            "pool": lambda x: sketch.max_pool(x, 3, 1),
            "deep": lambda x: sketch.depthwise(x, 5),
            "resize": sketch.resize,
        }[kind](x)
    return sketch.network()


def test_the_sketch_with_an_unseen_kind_is_the_most_telling() -> None:
    timed = observations([chain("conv", "point", width=8 * n) for n in range(1, 9)])
    familiar = [chain("conv", "point", width=8 * n) for n in range(2, 6)]
    candidates = observations([*familiar, chain("conv", "deep", "point"), *familiar])
    assert most_telling(timed, candidates, 1) == [4]


def test_alike_sketches_are_not_chosen_twice() -> None:
    timed = observations([chain("conv", "point", width=8 * n) for n in range(1, 9)])
    alike = [chain("conv", "deep")] * 3 + [chain("conv", "pool")] * 3 + [chain("conv", "resize")] * 3
    chosen = most_telling(timed, observations(alike), 3)
    assert {index // 3 for index in chosen} == {0, 1, 2}


def test_no_more_is_chosen_than_there_is() -> None:
    timed = observations([chain("conv")])
    chosen = most_telling(timed, observations([chain("pool"), chain("deep"), chain("conv")]), 10)
    assert sorted(chosen) == [0, 1, 2]
    assert most_telling(timed, [], 4) == []


def test_what_is_hardly_sampled_is_chosen_before_what_is_well_known() -> None:
    timed = observations([chain("conv", width=8 * n) for n in range(1, 30)] + [chain("deep")])
    candidates = observations([chain("conv", width=20), chain("deep", width=64)])
    assert most_telling(timed, candidates, 1) == [1]


# ---------------------------------------------------------------- from samples to tables


def sample(network: Network, us: float, reference: Sequence[float] = (), runtime: str = "onnx") -> Sample:
    precision = "int8" if network.precisions else "fp32"
    rounds = max(1, len(reference))
    return Sample(runtime, precision, 1, network, (us / 1000,) * rounds, tuple(reference))


def test_what_stays_float_in_an_int8_file_is_priced_by_the_float_table() -> None:
    floats = [sample(n, clock(n)) for n in TIMED]
    eights = []
    for network in TIMED:
        mixed = in_precision(network, "int8")
        if not mixed.precisions:
            continue
        every = lines(mixed)
        us = 7.0
        for line in every:
            scale = 0.25 if line.precision == "int8" else 1.0
            terms = [(f, a) for part in line.parts for f, a in amounts(part, line.precision) if f in basis(part.row)]
            us += scale * sum(TRUTH.get(f, 0.0) * a for f, a in terms)
        eights.append(sample(mixed, us))
    found = fitted([*eights, *floats], {("onnx", "int8"): ("conv+relu",)})
    assert [(t.precision, t.fusions) for t in found] == [("fp32", ()), ("int8", ("conv+relu",))]
    eight = found[1]
    assert not {row for row in eight.kinds if row.startswith(("softmax", "activation", "batch_norm"))}
    shape = OperatorShape(kind="conv", in_channels=32, out_channels=32, in_size=(14, 14), out_size=(14, 14))
    known = profile(*found)
    full, quarter = (price_shapes({"x": shape}, p, known, "onnx") for p in ("fp32", "int8"))
    # A quarter of the time for as many bytes, and MACs and calls do not shrink.
    assert quarter.operators[0].latency_ms < 0.3 * full.operators[0].latency_ms
    assert eight.validation is not None
    assert eight.validation.median_error < 0.02


def test_times_of_zero_and_times_that_are_all_float_say_nothing() -> None:
    network = TIMED[0]
    assert observed([sample(network, 0.0)], (), None) == []
    assert fitted([sample(network, 0.0)], {}) == []
    assert len(fitted([sample(network, 0.0), *(sample(n, clock(n)) for n in TIMED[:5])], {})) == 1


def test_candidates_have_the_parts_of_their_own_precision() -> None:
    for network in FRESH[:10]:
        (timed,) = observations([network])
        assert candidate(network, "fp32", ()).parts == timed.parts
        eight = {part.row for part in candidate(network, "int8", ()).parts}
        assert "quantize" in eight
        assert not {row for row in eight if row.startswith(("softmax", "batch_norm", "activation"))}


def test_rounds_at_that_speed_count() -> None:
    network = TIMED[0]
    ms = (1.0, 1.01, 0.99, 1.0, 1.0, 2.4, 2.5)
    reference = (5.0, 5.0, 5.0, 5.0, 5.0, 9.0, 10.0)
    mixed = Sample("onnx", "fp32", 1, network, ms, reference)
    assert mixed.us(5.0) == pytest.approx(1000, rel=0.001)
    assert mixed.us(None) == pytest.approx(1000)  # the median, as it was
    slow = Sample("onnx", "fp32", 1, network, (2.0,) * 7, (10.0,) * 7)
    assert slow.us(5.0) == pytest.approx(1000)  # no round at that speed: all are brought to it
    assert not slow.steady(5.0)
    assert mixed.steady(5.0)
    assert Sample("onnx", "fp32", 1, network, ms, ()).steady(5.0)  # without a reference nothing is known of it


def test_the_undisturbed_speed_is_the_fastest_that_rounds_share() -> None:
    assert undisturbed_ms([5.0, 5.1, 4.9, 5.0, 9.0, 9.1, 9.2, 9.3, 9.0, 9.1]) == pytest.approx(5.0, rel=0.02)
    lucky = [2.0, *[5.0] * 20, *[9.0] * 40]  # one round in sixty says nothing
    assert undisturbed_ms(lucky) == 5.0
    assert undisturbed_ms([3.0]) == 3.0
    assert undisturbed_ms([]) is None


def test_samples_of_one_network_in_one_variant_become_one() -> None:
    once = Sample("onnx", "fp32", 1, TIMED[0], (1.0, 1.1), (5.0, 9.0))
    twice = [once, once._replace(precision="int8"), once._replace(samples_ms=(2.0,), reference_ms=(5.1,))]
    first, other = joined(twice)
    assert (first.samples_ms, first.reference_ms) == ((1.0, 1.1, 2.0), (5.0, 9.0, 5.1))
    assert other.precision == "int8"
    assert other.samples_ms == (1.0, 1.1)


def test_what_changes_a_layout_belongs_to_the_operator_behind_it() -> None:
    sketch = Sketch("layouts", 3, (8, 8))
    sketch.conv(sketch.conv(sketch.input, 8), 8)
    network = sketch.network()

    def kernel(name: str, us: float) -> OperatorTime:
        return OperatorTime(name=name, kind="k", median_us=us)

    border = OperatorTime(name="input/quantize", kind="QuantizeLinear", median_us=10.0)
    kernels = (border, kernel("conv_1", 10.0), kernel("Transpose_token_3", 5.0), kernel("fused conv_2", 25.0))
    shares = Sample("onnx", "int8", 1, network, (1.0,), (), kernels).shares()
    assert shares == pytest.approx({"conv_1": 0.2, "conv_2": 0.6})  # the rest converts the input


def test_disturbed_samples_weigh_less() -> None:
    steady = sample(TIMED[0], 100.0, [5.0] * 8)
    disturbed = sample(TIMED[1], 100.0, [9.0] * 8)
    one, other = observed([steady, disturbed], (), 5.0)
    assert other.weight < one.weight == 1
    assert other.us == pytest.approx(one.us * 5 / 9)
