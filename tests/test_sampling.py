"""The networks that are timed: valid, within limits, of all kinds, the same every time."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilekit.cost.families import FAMILIES
from mobilekit.cost.sampling import LIMITS, RUNG, WHOLE, basics, borders, channel_ladder, pool, random_network, wholes
from mobilekit.errors import BadInputError
from mobilekit.types import INPUT_GROUP, Network, OperatorShape

KINDS = {
    *("dense", "pointwise", "depthwise", "grouped", "linear", "max_pool", "avg_pool", "global_pool", "add", "mul"),
    *("activation", "concat", "shuffle", "slice", "resize", "conv_transpose", "softmax", "batch_norm", "pad"),
}
POOL = pool(seed=3, count=30 * len(FAMILIES))
FIXED = [*basics(), *channel_ladder(), *borders()]


def dice(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 -- sampling, no secret


# ---------------------------------------------------------------- properties of what is timed


def check(network: Network) -> None:
    """Operators read earlier ones, sizes and channels agree, one output, nothing too large."""
    held = {"input": ((INPUT_GROUP,), network.input_shape[2:])}
    read = set()
    for o in network.operators:
        assert o.name not in held
        assert o.inputs
        shape, sources = network.shape(o), [held[name] for name in o.inputs]
        read.update(o.inputs)
        groups = tuple(g for source, _ in sources for g in source) if o.kind == "concat" else sources[0][0]
        assert o.in_groups == groups
        height, width = sources[0][1]
        assert o.in_size == ((1, 1) if o.kind == "linear" else (height, width))
        assert o.in_repeat == (height * width if o.kind == "linear" else 1)
        assert shape.in_channels % shape.groups == shape.out_channels % shape.groups == 0
        assert shape.groups == 1 or o.kind in ("conv", "shuffle")
        assert 4 * shape.out_channels * shape.out_size[0] * shape.out_size[1] <= LIMITS["activation_bytes"]
        held[o.name] = (o.out_groups, o.out_size)
    names = [o.name for o in network.operators]
    assert set(names) - read == {names[-1]}
    assert "input" in read
    assert network.macs <= LIMITS["macs"]
    assert 4 * sum(network.shape(o).weights for o in network.operators) <= LIMITS["weight_bytes"]


@given(st.integers(0, 2**32), st.floats(0.1e6, 60e6))
@settings(max_examples=60, deadline=None)
def test_random_networks_are_valid_and_within_the_budget(seed: int, budget: float) -> None:
    network = random_network(dice(seed), budget)
    check(network)
    assert 0.05e6 <= network.macs <= budget
    assert 3 <= len(network.operators) <= 14
    assert 4 <= network.input_shape[2] == network.input_shape[3] <= 224


@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_networks_are_valid(family: str) -> None:
    networks = [n for n in POOL if n.name.startswith(f"{family}-")]
    assert len(networks) == len(POOL) // len(FAMILIES)
    for network in networks:
        check(network)
        assert max(network.width(o.out_groups) for o in network.operators) <= 4 * 1280
    assert min(n.macs for n in networks) < 2e6
    assert max(n.macs for n in networks) > 10e6


def test_fixed_networks_are_valid_and_have_names_of_their_own() -> None:
    for network in FIXED:
        check(network)
    assert len({n.name for n in [*FIXED, *POOL]}) == len(FIXED) + len(POOL)


@pytest.mark.parametrize("budget", [0, 99_999, float("nan")])
def test_a_budget_for_nothing_is_refused(budget: float) -> None:
    with pytest.raises(BadInputError, match="too small"):
        random_network(dice(0), budget)


def test_a_seed_gives_the_same_networks() -> None:
    assert pool(seed=3, count=20) == POOL[:20]
    assert pool(seed=4, count=20) != POOL[:20]
    assert random_network(dice(7), 5e6) == random_network(dice(7), 5e6)
    assert basics() == basics()


# ---------------------------------------------------------------- coverage


def shapes_of(sampled: list[Network], kind: str) -> list[OperatorShape]:
    return [s for network in sampled for s in map(network.shape, network.operators) if s.cost_kind == kind]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_occurs_at_several_sizes_with_whole_and_ragged_channels(kind: str) -> None:
    fixed, pooled = shapes_of(FIXED, kind), shapes_of(POOL, kind)
    for shapes in (fixed, pooled):
        assert len({(s.in_channels, s.in_size) for s in shapes}) > 1
    assert {s.out_channels % 16 == 0 for s in fixed + pooled} == {True, False}


@pytest.mark.parametrize("sampled", [basics(), POOL], ids=["basics", "pool"])
def test_fused_and_lone_functions_and_kernels_occur(sampled: list[Network]) -> None:
    for kind in ("pointwise", "depthwise"):
        assert {s.activation for s in shapes_of(sampled, kind)} >= {None, "relu", "relu6", "hardswish", "silu"}
    assert "sigmoid" in {s.activation for s in shapes_of(sampled, "pointwise")}
    assert {s.activation for s in shapes_of(sampled, "add")} >= {None, "relu"}
    lone = {s.activation for s in shapes_of(sampled, "activation")}
    assert lone >= {"relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid"}
    assert {s.kernel[0] for s in shapes_of(sampled, "depthwise")} >= {3, 5, 7}


def test_the_first_basics_hold_every_kind() -> None:
    first = basics()[: len(basics()) // 2]
    assert {network.shape(o).cost_kind for network in first for o in network.operators} >= KINDS


def test_channel_counts_are_spread() -> None:
    widths = Counter(network.shape(o).out_channels for network in POOL for o in network.operators if o.kind == "conv")
    total = sum(widths.values())
    whole = sum(count for width, count in widths.items() if width % 16 == 0) / total
    ragged = sum(count for width, count in widths.items() if width % 4) / total
    assert 0.35 < whole < 0.65
    assert 0.05 < ragged < 0.25
    assert all(any(low <= width < 2 * low for width in widths) for low in (2, 4, 8, 16, 32, 64, 128, 256, 512))


def test_the_ladder_differs_in_its_rung_alone() -> None:
    ladders: dict[str, list[Network]] = {}
    for network in channel_ladder():
        ladders.setdefault(network.name.rpartition("-")[0], []).append(network)
    assert len(ladders) == 2
    for ladder in ladders.values():
        rungs = [next(o for o in network.operators if o.name == RUNG) for network in ladder]
        widths = {network.width(rung.out_groups) for network, rung in zip(ladder, rungs, strict=True)}
        assert {24, 28, 32, 36, 40, 44, 48} <= widths
        assert any(width % 4 for width in widths)
        same = [
            network.with_widths(dict.fromkeys(rung.out_groups, 1)).model_copy(update={"name": ""})
            for network, rung in zip(ladder, rungs, strict=True)
        ]
        assert all(network == same[0] for network in same)
        assert [o.name == RUNG for o in ladder[0].operators] == [False, True, False]


def test_borders_are_crossed() -> None:
    sizes = set()
    for network in borders():
        precisions = [network.precision(o) for o in network.operators]
        assert precisions[0] == precisions[-1] == "fp32"
        assert "int8" in precisions
        by_name = {o.name: o for o in network.operators}
        for o in network.operators:
            for name in o.inputs:
                if name != "input" and network.precision(o) != network.precision(by_name[name]):
                    sizes.add(network.width(by_name[name].out_groups) * o.in_size[0] * o.in_size[1])
    assert len(sizes) >= 5
    assert max(sizes) > 10 * min(sizes)


# ---------------------------------------------------------------- whole networks


def test_whole_networks_are_as_deep_and_large_as_real_ones() -> None:
    networks = wholes(5, 44)
    assert [n.name for n in networks] == [n.name for n in wholes(5, 44)]
    assert len({n.name for n in networks}) == 44
    assert [n.name for n in wholes(5, 3)] == [n.name for n in networks[:3]]
    for network in networks:
        shapes = [network.shape(operator) for operator in network.operators]
        assert sum(shape.macs for shape in shapes) <= WHOLE["macs"]
        assert 4 * sum(shape.weights for shape in shapes) <= WHOLE["weight_bytes"]
        assert network.input_shape[2] >= 96
    depths = sorted(len(network.operators) for network in networks)
    assert depths[0] > 14
    assert depths[len(depths) // 2] > 30
    last = [[o for o in n.operators if o.kind == "conv"][-1].in_size[0] for n in networks]
    assert sorted(last)[len(last) // 2] <= 14  # maps shrink
