"""The search against trying everything, on small networks with constructed prices."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from priced import profile, row, table
from torch import nn

from mobilekit import registry
from mobilekit.cost.memory import peak_memory_bytes, size_bytes
from mobilekit.cost.price import price as cost_price
from mobilekit.network import trace
from mobilekit.planner import reasons
from mobilekit.planner.offers import Choice, Offer, Start, damage, predicted
from mobilekit.planner.precision import as_option, starts
from mobilekit.planner.search import Search
from mobilekit.planner.surface import OneByOne
from mobilekit.planner.surrogate import Correction, Parts, completed, correction
from mobilekit.planner.terrain import Limit, Terrain
from mobilekit.planner.worth import Worth, worth
from mobilekit.types import (
    INPUT_GROUP,
    At,
    Axis,
    ChannelGroup,
    Estimate,
    KindModel,
    Network,
    Operator,
    OperatorPrice,
    Option,
    Producer,
    RuntimeEntry,
)
from mobilekit.workloads import fashion_mnist

ENTRY = RuntimeEntry(name="onnx", precisions=("fp32", "int8"), channel_multiple=8)


def chain(widths: list[int], sizes: list[int]) -> Network:
    """Convolutions in a row, one channel group each; the last is the output and refused."""
    names = [INPUT_GROUP, *(f"g{i}" for i in range(len(widths)))]
    groups = {name: ChannelGroup(width=width) for name, width in zip(names, [3, *widths], strict=True)}
    for name in (INPUT_GROUP, names[-1]):
        groups[name] = groups[name].model_copy(update={"refused": "it is what the user sees"})
    operators = [
        Operator(
            name=f"conv{i}",
            kind="conv",
            module=f"conv{i}",
            inputs=(f"conv{i - 1}" if i else "input",),
            in_groups=(names[i],),
            out_groups=(names[i + 1],),
            in_size=(size, size),
            out_size=(size, size),
            kernel=(3, 3),
        )
        for i, size in enumerate(sizes)
    ]
    return Network(name="net", input_shape=(1, 3, 8, 8), operators=tuple(operators), groups=groups, axes={})


def price(network: Network) -> float:
    """Milliseconds: a part for each operator, one for each MAC (less in int8), and the run's own."""
    total = 0.01
    for operator in network.operators:
        speed = 0.4 if network.precision(operator) == "int8" else 1.0
        total += 0.002 + speed * network.shape(operator).macs * 1e-6
    return total


FIGURE = OneByOne(price)


def offers(network: Network, damages: list[float], entry: RuntimeEntry = ENTRY) -> list[Offer]:
    """Each option of pruning with a damage of its group, growing with what is cut away."""
    lever = registry.transform("channel_pruning")
    found = []
    for option in lever.options(network, entry):
        cut = 1 - int(str(option.settings["width"])) / network.groups[option.where].width
        place = list(network.groups).index(option.where)
        found.append(Offer(option, lever, damages[place % len(damages)] * cut**1.5))
    return found


def begin(network: Network, damage: float = 0.0) -> list[Start]:
    """The network in float, and in int8."""
    int8 = network.with_precisions({o.name: "int8" for o in network.operators})
    return [Start(network), Start(int8, damage)]


def searched(
    network: Network, found: list[Offer], target: float, *, int8: float | None = None, limits: list[Limit] | None = None
) -> Search:
    starts = [Start(network)] if int8 is None else begin(network, int8)
    return Search(starts, found, [Limit("latency", FIGURE, target), *(limits or [])])


def everything(search: Search) -> list[tuple[float, float]]:
    """Latency and damage of every choice there is."""
    places: dict[tuple[str, str], list[Offer | None]] = {}
    for offer in search.offers:
        places.setdefault(offer.place, [None]).append(offer)
    found = []
    for start in search.starts:
        for taken in itertools.product(*places.values()):
            choice: Choice = {offer.place: offer for offer in taken if offer is not None}
            found.append((search.latency_ms(start, choice), damage(choice) + start.cost))
    return found


NETWORKS = st.integers(2, 4).flatmap(
    lambda depth: st.builds(
        chain,
        st.lists(st.sampled_from([16, 24, 32, 64]), min_size=depth, max_size=depth),
        st.lists(st.sampled_from([2, 4, 8, 16]), min_size=depth, max_size=depth),
    )
)
DAMAGES = st.lists(st.floats(0.001, 2), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(NETWORKS, DAMAGES, st.floats(0.05, 1.0), st.booleans())
@example(chain([16, 24, 16, 16], [2, 4, 2, 4]), [1.0] * 4, 0.625, False)  # pairs of moves do not suffice
@example(chain([16, 24, 64, 16], [2, 8, 2, 2]), [1.0, 1.0, 1.0, 2.0], 0.65625, False)
@example(chain([16, 16], [2, 2]), [1.0] * 4, 0.9999999999999999, False)  # over by one rounding is over
def test_near_the_best_there_is(network: Network, damages: list[float], share: float, int8: bool) -> None:
    target = share * price(network)
    search = searched(network, offers(network, damages), target, int8=damages[0] / 10 if int8 else None)
    found = search.run()
    within = [worse for latency, worse in everything(search) if latency <= target]
    assert found.reachable == bool(within)
    assert found.latency_ms == search.latency_ms(found.start, found.choice)
    if not within:
        assert found.latency_ms == pytest.approx(min(latency for latency, _ in everything(search)))
        return
    assert found.latency_ms <= target
    if not any(search.latency_ms(start, {}) <= target for start in search.starts):
        # precision alone is preferred to pruning that does less damage
        assert found.damage <= 1.1 * min(within) + 1e-9


def residual() -> Network:
    """Two residual blocks, one behind each of two layers that change the width."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.two(torch.relu(self.one(x))))

    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Block(16), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), Block(32)]
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)).eval()
    return trace(module, torch.zeros(1, 3, 8, 8), "residual")


RESIDUAL = residual()


@functools.cache
def residual_offers() -> tuple[list[Offer], Search]:
    """Half of every width, every block left out, and depthwise separable layers in the first block: 256 choices."""
    found = []
    for name in ("channel_pruning", "block_removal", "group_convolution"):
        lever = registry.transform(name)
        for option in lever.options(RESIDUAL, ENTRY):
            where, settings = option.where, option.settings
            half = "width" not in settings or settings["width"] == RESIDUAL.groups[where].width // 2
            method = (settings.get("method", "depthwise_separable"), settings.get("multiplier", 1))
            first = name != "group_convolution" or where.startswith("2.")
            if half and first and method == ("depthwise_separable", 1):
                found.append(Offer(option, lever))
    return found, Search([Start(RESIDUAL)], found, [Limit("latency", FIGURE, 1.0)])


@functools.cache
def residual_choices() -> list[tuple[tuple[bool, ...], float]]:
    """Every choice among those offers, with its latency."""
    known, search = residual_offers()
    found = []
    for taken in itertools.product((False, True), repeat=len(known)):
        choice = {offer.place: offer for offer, used in zip(known, taken, strict=True) if used}
        found.append((taken, search.latency_ms(search.starts[0], choice)))
    return found


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1.0), min_size=8, max_size=8), st.floats(0.15, 0.99))
def test_near_the_best_with_blocks_that_are_left_out(damages: list[float], share: float) -> None:
    known, like = residual_offers()
    assert len(known) == len({offer.place for offer in known}) == 8
    known = [replace(offer, damage=found) for offer, found in zip(known, damages, strict=True)]
    target = share * price(RESIDUAL)
    search = Search(like.starts, known, [Limit("latency", FIGURE, target)], like=like)
    found = search.run()
    within = [sum(itertools.compress(damages, taken)) for taken, latency in residual_choices() if latency <= target]
    assert found.reachable == bool(within)
    assert found.latency_ms == price(search.predict(found))
    if within:
        assert found.latency_ms <= target
        assert found.damage <= 1.1 * min(within) + 1e-9


def test_a_block_that_is_left_out_takes_what_was_done_to_its_layers_with_it() -> None:
    """The tables agree with the exact price of every choice."""
    known, like = residual_offers()
    terrain = Terrain(like.starts[0], known, like.limits)
    layers = [place for place in terrain.places if place[0] == "layer"]
    (block,) = {place for place in terrain.places if place[0] == "block" and layers[0][1].startswith(f"{place[1]}.")}
    for taken in itertools.product((0, 1), repeat=len(terrain.places)):
        state = dict(zip(terrain.places, taken, strict=True))
        choice = terrain.choice(state)
        assert not state[block] or not any(layer in choice for layer in layers)
        exact = price(predicted(like.starts[0], choice))
        assert terrain.figures(state)[0] == pytest.approx(exact, rel=1e-6)
        for place in terrain.places:
            moved = terrain.figures({**state, place: 1 - state[place]})[0] - terrain.figures(state)[0]
            row = terrain.at(place, state)[0]
            assert row[1 - state[place]] - row[state[place]] == pytest.approx(moved, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(NETWORKS, DAMAGES, st.floats(0.05, 1.0), st.randoms(use_true_random=False))
def test_the_order_of_offers_does_not_matter(network: Network, damages: list[float], share: float, random) -> None:  # type: ignore[no-untyped-def]
    known, target = offers(network, damages), share * price(network)
    first = searched(network, known, target).run()
    mixed = list(known)
    random.shuffle(mixed)
    other = searched(network, mixed, target).run()
    assert (other.reachable, other.choice) == (first.reachable, first.choice)


@settings(max_examples=25, deadline=None)
@given(NETWORKS, DAMAGES, st.floats(0.05, 1.2))
def test_at_most_one_option_at_a_place(network: Network, damages: list[float], share: float) -> None:
    found = searched(network, offers(network, damages), share * price(network), int8=0.01).run()
    assert all(place == offer.place for place, offer in found.choice.items())
    assert len({o.option.where for o in found.choice.values()}) == len(found.choice)


@pytest.mark.parametrize("share", [0.9, 0.8, 0.6])
def test_options_that_do_not_go_together_are_not_taken_together(share: float) -> None:
    """A block of groups fits only widths that the groups divide."""
    network = fashion()
    lever = registry.transform("group_convolution")
    blocks = [Offer(o, lever, 0.05) for o in lever.options(network, ENTRY) if "groups" in o.settings]
    layers = sorted({block.option.where for block in blocks})[:3]
    blocks = [block for block in blocks if block.option.where in layers]
    assert blocks
    beside = {g for o in network.operators if o.module in layers for g in (*o.in_groups, *o.out_groups)}
    odd = ENTRY.model_copy(update={"channel_multiple": 7})
    known = [*(o for o in offers(network, [0.5, 1.0, 0.2], odd) if o.option.where in beside), *blocks]
    search = searched(network, known, share * price(network))
    found = search.run()
    assert math.isfinite(found.latency_ms)
    assert found.latency_ms == price(search.predict(found))


@settings(max_examples=25, deadline=None)
@given(NETWORKS, DAMAGES)
def test_int8_alone_wherever_it_suffices(network: Network, damages: list[float]) -> None:
    known = offers(network, damages)
    int8 = begin(network)[1].network
    alone = price(int8)
    for target in (alone, (alone + price(network)) / 2):
        found = searched(network, known, target, int8=0.1).run()
        assert (found.choice, found.start.network) == ({}, int8)
    assert searched(network, known, alone * 0.999, int8=0.1).run().choice != {}
    found = searched(network, known, price(network), int8=0.1).run()
    assert (found.choice, found.start.network) == ({}, network)


@settings(max_examples=25, deadline=None)
@given(NETWORKS, DAMAGES, st.floats(0.1, 0.9), st.floats(0.2, 0.9))
def test_every_limit_is_kept(network: Network, damages: list[float], share: float, part: float) -> None:
    most = part * size_bytes(network)
    limits = [Limit("size", OneByOne(size_bytes), most)]
    search = searched(network, offers(network, damages), share * price(network), limits=limits)
    found = search.run()
    if found.reachable:
        assert size_bytes(search.predict(found)) <= most
        assert found.latency_ms <= share * price(network)
    else:
        narrowest = {o.place: o for o in sorted(search.offers, key=lambda o: -int(str(o.option.settings["width"])))}
        network = predicted(search.starts[0], narrowest)
        assert size_bytes(network) > most or price(network) > share * price(search.network)


def test_memory_is_kept_too() -> None:
    network = chain([32, 64, 32], [8, 8, 8])
    most = 0.7 * peak_memory_bytes(network)
    limits = [Limit("memory", OneByOne(peak_memory_bytes), most)]
    search = searched(network, offers(network, [0.5, 1.0, 0.2]), math.inf, limits=limits)
    found = search.run()
    assert found.reachable
    assert peak_memory_bytes(search.predict(found)) <= most


def test_unreachable_gives_the_fastest() -> None:
    network = chain([32, 32, 16], [8, 8, 4])
    search = searched(network, offers(network, [1.0]), 0.0)
    found = search.run()
    assert not found.reachable
    assert found.choice == search.fastest().choice
    assert found.latency_ms == pytest.approx(min(latency for latency, _ in everything(search)))


def test_no_offers() -> None:
    network = chain([16, 16], [4, 4])
    found = searched(network, [], 0.0).run()
    assert (found.choice, found.reachable) == ({}, False)
    assert searched(network, [], math.inf).run().reachable


def test_unmeasured_damages_are_searched_too() -> None:
    network = chain([32, 32, 16], [8, 8, 4])
    unmeasured = [Offer(o.option, o.transform) for o in offers(network, [1.0])]
    target = 0.3 * price(network)
    assert searched(network, unmeasured, target, int8=0.0).run().latency_ms <= target


def test_levers_at_one_layer_exclude_each_other_and_follow_its_widths() -> None:
    network = chain([64, 64, 32], [16, 16, 8])
    lever = registry.transform("low_rank")
    chains = [Offer(o, lever, 0.01) for o in lever.options(linear_trace(network), ENTRY)]
    assert chains
    search = searched(linear_trace(network), [*offers(network, [0.5, 1.0]), *chains], 0.25 * price(network))
    found = search.run()
    assert found.reachable
    assert any(place[0] == "layer" for place in found.choice)
    assert found.latency_ms == price(search.predict(found))  # applied one after the other, widths first


def linear_trace(network: Network) -> Network:
    """The chain with what low rank asks for: the axes and producers of its weights."""
    axes, groups = {}, dict(network.groups)
    for operator in network.operators:
        weight = f"{operator.module}.weight"
        axes[weight] = {0: Axis(groups=operator.out_groups), 1: Axis(groups=operator.in_groups)}
        written = groups[operator.out_groups[0]]
        producers = (*written.producers, Producer(parameter=weight, dim=0))
        groups[operator.out_groups[0]] = written.model_copy(update={"producers": producers})
    return network.model_copy(update={"axes": axes, "groups": groups})


@dataclass(frozen=True)
class Slower:
    """A lever that saves nothing."""

    name: str = "slower"
    changes: Literal["structure", "precision"] = "structure"
    at: At = "channels"

    def predict(self, network: Network, option: Option) -> Network:
        wider = int(option.settings["width"] or 0)
        return network.with_widths({option.where: wider})


def test_what_saves_nothing_is_not_taken() -> None:
    network = chain([32, 32], [8, 8])
    option = Option(transform="slower", where="g0", settings={"width": 64})
    search = searched(network, [Offer(option, Slower(), 0.0)], 0.5 * price(network))  # type: ignore[arg-type]
    assert search.run().choice == {}
    rows = reasons.rejected(search, search.run(), [], ENTRY)
    assert re.search(r"saves nothing: \d\.\d{3} ms slower", rows[0].reason)


# ---------------------------------------------------------------- prices as a sum of tables


@settings(max_examples=30, deadline=None)
@given(NETWORKS, DAMAGES, st.data())
def test_the_tables_add_up_to_the_price(network: Network, damages: list[float], data: st.DataObject) -> None:
    terrain = Terrain(begin(network)[1], offers(network, damages), [Limit("latency", FIGURE, 1.0)])
    state = {place: data.draw(st.integers(0, len(found))) for place, found in terrain.options.items()}
    exact = price(predicted(terrain.start, terrain.choice(state)))
    assert terrain.figures(state)[0] == pytest.approx(exact)
    for place in terrain.places:
        here = terrain.at(place, state)[0]
        moved = {**state, place: 0}
        assert terrain.figures(state)[0] - terrain.figures(moved)[0] == pytest.approx(here[state[place]], abs=1e-12)


# ---------------------------------------------------------------- precisions


def test_int8_stays_out_where_it_is_slower() -> None:
    network = chain([32, 32, 32, 32], [8, 8, 8, 8])

    def dear(given: Network) -> float:
        total, before = 0.0, "fp32"
        for operator in given.operators:
            precision = given.precision(operator)
            total += (5.0 if operator.name == "conv2" else 0.5) if precision == "int8" else 1.0
            total += 0.2 if precision != before else 0.0
            before = precision
        return total + (0.2 if before == "int8" else 0.0)

    found = starts(network, dear)
    assert [start.name for start in found] == ["float", "mixed precision"]  # the whole in int8 is beaten
    assert found[1].network.precisions == {"conv0": "int8", "conv1": "int8", "conv3": "int8"}
    option = as_option(found[1].network)
    assert option is not None
    assert option.settings["float"] == "conv2"
    assert registry.transform("int8").predict(network, option).precisions == found[1].network.precisions
    rows = reasons.left_in_float(found[1].network, lambda n: estimate(n, dear))
    assert [(row.transform, row.where) for row in rows] == [("int8", "conv2")]
    assert rows[0].reason.startswith("5.000 ms against 1.000 ms in float")


def test_a_border_can_cost_more_than_int8_saves() -> None:
    network = chain([32, 32, 32], [8, 8, 8])

    def bordered(given: Network) -> float:
        total, before = 0.0, "fp32"
        for operator in given.operators:
            precision = given.precision(operator)
            total += {"conv1": 1.1}.get(operator.name, 0.5) if precision == "int8" else 1.0
            total += 0.4 if precision != before else 0.0
            before = precision
        return total

    found = starts(network, bordered)
    assert set(found[-1].network.precisions) == {"conv0", "conv1", "conv2"}


def test_the_most_harmful_operators_are_tried_in_float() -> None:
    network = chain([32, 32, 32], [8, 8, 8])
    harm = {"conv0": 0.9, "conv1": 0.01, "conv2": 0.01}
    found = starts(network, price, harm, whole=2 * sum(harm.values()))
    assert [start.damage for start in found] == pytest.approx([0.0, 1.84, 0.04, 0.02])
    assert "conv0" not in found[2].network.precisions


def test_an_operator_is_spared_with_what_writes_its_input() -> None:
    """In float alone, between two in int8, it would read rounded values all the same."""
    network = chain([32, 32, 32], [8, 8, 8])
    harm = {"conv0": 0.01, "conv1": 0.9, "conv2": 0.02}
    found = starts(network, price, harm)
    int8 = [set(start.network.precisions) for start in found]
    assert {"conv0", "conv2"} not in int8
    assert {"conv2"} in int8
    assert found[int8.index({"conv2"})].damage == pytest.approx(0.02)


def estimate(network: Network, latency: Callable[[Network], float]) -> Estimate:
    """A price in the form that a profile gives it."""
    rows = []
    for operator in network.operators:
        own = network.precision(operator)
        one = network.model_copy(update={"operators": (operator,)})
        base = latency(one) - (0.4 if own == "int8" else 0.0)
        rows.append(
            OperatorPrice(
                name=operator.name, kind="conv", module=operator.module, precision=own,
                latency_ms=base, low_ms=base, high_ms=base, extrapolated=False,
            )
        )  # fmt: skip
    total = latency(network)
    return Estimate(
        latency_ms=total, low_ms=total, high_ms=total, runtime="onnx", basis="fitted",
        operators=tuple(rows), extrapolated=(),
    )  # fmt: skip


# ---------------------------------------------------------------- damages that were not measured


def test_a_power_law_runs_through_what_was_measured() -> None:
    network = chain([64, 64], [8, 8])
    every = offers(network, [1.0])

    def strong(offer: Offer) -> float:
        return 1 - int(str(offer.option.settings["width"])) / 64

    known = [replace(o, damage=strong(o) ** 3 if strong(o) in (0.25, 0.5) else None) for o in every]
    found = {int(str(o.option.settings["width"])): o for o in completed(known, strong, 3.0)}
    assert len(found) == len(every)
    for width, offer in found.items():
        assert offer.damage == pytest.approx((1 - width / 64) ** 3)
        assert offer.interpolated == (width not in (48, 32))
    one = [replace(o, damage=0.1 if strong(o) == 0.5 else None) for o in every]
    assert [o.damage for o in completed(one, strong, 3.0) if strong(o) == 0.25] == pytest.approx([0.025])
    unknown = completed([replace(o, damage=None) for o in every], strong, 3.0)
    assert [(o.damage, o.cost) for o in unknown] == [(None, 3.0)] * len(every)


@given(st.lists(st.tuples(*[st.floats(0.001, 1.0)] * 4), min_size=1, max_size=4), st.floats(0.5, 3.0))
def test_combinations_teach_factors(parts: list[tuple[float, float, float, float]], factor: float) -> None:
    seen = [Parts(*each, factor * sum(each)) for each in parts]
    taught = correction(seen)
    factors = (taught.channels, taught.blocks, taught.layers, taught.precision)
    for each in parts:
        after = sum(one * damage for one, damage in zip(factors, each, strict=True))
        assert abs(math.log(after / (factor * sum(each)))) <= abs(math.log(factor)) + 1e-6
    assert correction([]) == Correction()
    assert correction([Parts(0.1, 0.0, 0.0, 0.0, 0.1)]).channels == pytest.approx(1.0)


# ---------------------------------------------------------------- options that save no time


def test_a_profile_turns_down_what_its_tables_say_saves_no_time() -> None:
    network = fashion()
    lever = registry.transform("group_convolution")
    every = [Offer(option, lever) for option in lever.options(network, ENTRY)]
    cheap = {
        "dense": row(10, 1e-3), "pointwise": row(1, 1e-4), "depthwise.3": row(1, 1e-4), "linear": row(1, 1e-4),
        "add": row(1), "global_pool": row(1),
    }  # fmt: skip

    def left(rows: dict[str, KindModel]) -> Worth:
        return worth([Start(network)], every, lambda n: cost_price(n, profile(table("fp32", rows)), "onnx"))

    found = left(cheap)
    methods = {o.option.settings["method"] for o in found.offers}
    assert methods == {"depthwise_separable", "inverted_residual"}  # the others need rows that are not there
    assert all(o.option.settings.get("multiplier", 1) == 1 for o in found.offers)  # else a grouped convolution
    assert all(gain > 0 for gain in found.saved_ms.values())
    none = left({**cheap, "depthwise.3": row(1e5)})
    assert none.offers == ()
    assert {r.where for r in none.turned_down} == {o.option.where for o in every}
    assert all(re.search(r"\d", r.reason) for r in none.turned_down)
    assert any("no price for its conv" in r.reason for r in none.turned_down)


def fashion() -> Network:
    return trace(fashion_mnist.model(), fashion_mnist.example_input(), "fashion")


# ---------------------------------------------------------------- reasons


@pytest.mark.parametrize("share", [0.02, 0.2, 0.7, 1.0])
def test_every_place_has_a_reason_with_numbers(share: float) -> None:
    network = chain([32, 64, 32], [8, 4, 4])
    search = searched(network, offers(network, [0.5, 1.0]), share * price(network), int8=0.05)
    found = search.run()
    levers = [registry.transform(name) for name in ("channel_pruning", "int8")]
    chosen, rejected = reasons.chosen(search, found), reasons.rejected(search, found, levers, ENTRY)
    for picked in chosen:
        assert re.search(r"saves -?\d+\.\d{3} ms \(predicted\) at a (measured )?damage of \d", picked.reason)
        assert picked.saved_ms is not None
        assert f"{picked.saved_ms:.3f}" in picked.reason
    told = {(p.option.transform, p.option.where) for p in chosen}
    turned_down = [(r.transform, r.where) for r in rejected]
    assert told.isdisjoint(turned_down)
    assert len(set(turned_down)) == len(turned_down)
    offered = {(o.option.transform, o.option.where) for o in search.offers} | {("int8", "network")}
    assert told | set(turned_down) == offered | {("channel_pruning", INPUT_GROUP), ("channel_pruning", "g2")}
    assert all(re.search(r"\d", r.reason) for r in rejected if (r.transform, r.where) in offered)
    if found.choice and not found.reachable:
        assert all("not needed" not in r.reason for r in rejected)


def test_structure_comes_before_precision() -> None:
    network = chain([32, 64, 32], [8, 4, 4])
    search = searched(network, offers(network, [0.5]), 0.2 * price(network), int8=0.01)
    levers = [picked.option.transform for picked in reasons.chosen(search, search.run())]
    assert levers[-1] == "int8"
    assert set(levers[:-1]) == {"channel_pruning"}


def test_a_saving_is_what_leaving_the_option_out_costs() -> None:
    network = chain([32, 64, 32], [8, 4, 4])
    search = searched(network, offers(network, [0.5]), 0.2 * price(network))
    found = search.run()
    for picked in reasons.chosen(search, found):
        rest = {p: o for p, o in found.choice.items() if o.option != picked.option}
        assert picked.saved_ms == pytest.approx(search.latency_ms(found.start, rest) - found.latency_ms)
