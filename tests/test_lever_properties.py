"""Every lever on hard shapes and on random networks: predictions are what a trace finds, and outputs stay finite."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SIDE, SLOW_TO_TRACE, build, example
from test_criteria import open_groups, with_dead
from test_rewrite import PIECES, of_pieces

from mobilekit import registry
from mobilekit.network import trace
from mobilekit.transforms.channel_pruning import ChannelPruning
from mobilekit.types import Calibration, Candidate, Network, Option, RuntimeEntry

ENTRY = RuntimeEntry(name="onnx", precisions=("fp32", "int8"), channel_multiple=1)
OFFERED = {
    "vgg": 3,
    "resnet": 5,
    "densenet": 3,
    "mobilenet_v2": 5,
    "shufflenet_v1": 2,
    "shufflenet_v2": 2,
    "squeezenet": 7,
    "efficientnet": 6,
    "senet": 5,
}
"""Channel groups of each family that can be pruned, counted by hand: one for each stream of channels that no grouped
convolution, shuffle, input or output holds fast. In the ResNet the sums make one stream of three layers."""
REASONS = ("input", "output", "grouped convolution", "shuffle", "chunk", "slice")


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))


@functools.cache
def start(name: str) -> Candidate:
    module = build(name)
    return Candidate(module=module, example_input=example(), network=trace(module, example(), name))


def facts(network: Network) -> list[object]:
    """What a trace and a prediction have to agree in."""
    operators = [(o.name, o.kind, o.module, o.inputs, o.activation, network.shape(o)) for o in network.operators]
    return [*operators, {name: (group.width, group.producers) for name, group in network.groups.items()}, network.axes]


def assert_as_predicted(lever_name: str, before: Candidate, option: Option) -> Candidate:
    lever = registry.transform(lever_name)
    after = lever.apply(before, option)
    assert after.network == lever.predict(before.network, option)
    assert facts(trace(after.module, before.example_input)) == facts(after.network)
    with torch.inference_mode():
        output = after.module(before.example_input)
        assert output.shape == before.module(before.example_input).shape
        assert torch.isfinite(output).all()
    return after


# ---------------------------------------------------------------- hard shapes


@pytest.mark.parametrize("name", OFFERED)
def test_every_group_of_every_family_is_halved_or_refused_with_a_reason(name: str) -> None:
    before = start(name)
    lever = ChannelPruning()
    places = {option.where for option in lever.options(before.network, ENTRY)}
    refused = lever.refusals(before.network, ENTRY)
    assert places | set(refused) == set(before.network.groups)
    assert len(places) == OFFERED[name]
    assert all(any(word in reason for word in REASONS) for reason in refused.values()), refused
    for where in sorted(places):
        width = before.network.groups[where].width // 2
        after = assert_as_predicted(
            "channel_pruning", before, Option(transform="channel_pruning", where=where, settings={"width": width})
        )
        assert after.network.groups[where].width == width
        assert after.network.macs < before.network.macs


@pytest.mark.parametrize("name", OFFERED)
def test_all_groups_of_a_family_can_be_halved_together(name: str) -> None:
    current = start(name)
    for where, width in open_groups(current.network).items():
        option = Option(transform="channel_pruning", where=where, settings={"width": width // 2})
        current = ChannelPruning().apply(current, option)
    assert facts(trace(current.module, example())) == facts(current.network)
    with torch.inference_mode():
        assert torch.isfinite(current.module(example())).all()


# ---------------------------------------------------------------- random networks

KINDS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4)


@pytest.mark.parametrize("plugin", registry.names("transforms"))
@settings(SLOW_TO_TRACE, max_examples=4)
@given(kinds=KINDS, data=st.data())
def test_a_random_option_leaves_what_was_predicted(plugin: str, kinds: list[str], data: st.DataObject) -> None:
    module, lever = of_pieces(kinds), registry.transform(plugin)
    network = trace(module, example())
    before = Candidate(module, example(), network, calibration=Calibration(inputs=noise(8).split(4)))
    options = lever.options(network, ENTRY)
    if not options:
        assert lever.refusals(network, ENTRY)
        return
    assert_as_predicted(plugin, before, options[data.draw(st.integers(0, len(options) - 1))])


@settings(SLOW_TO_TRACE, max_examples=10)
@given(kinds=KINDS, data=st.data())
def test_removing_channels_that_are_exactly_zero_changes_nothing(kinds: list[str], data: st.DataObject) -> None:
    module = of_pieces(kinds)
    network = trace(module, example())
    opened = {name: width for name, width in open_groups(network).items() if width > 1}
    names = data.draw(st.lists(st.sampled_from(sorted(opened)), min_size=1, max_size=3, unique=True))
    dead = {
        name: sorted(data.draw(st.sets(st.integers(0, opened[name] - 1), min_size=1, max_size=opened[name] - 1)))
        for name in names
    }
    quiet = with_dead(module, network, dead)
    current = Candidate(quiet, example(), network)
    for name, gone in dead.items():
        option = Option(transform="channel_pruning", where=name, settings={"width": opened[name] - len(gone)})
        current = ChannelPruning().apply(current, option)
    x = noise(4)
    with torch.inference_mode():
        want = quiet(x)
        assert (current.module(x) - want).abs().max() < 1e-5 * max(1.0, float(want.abs().max()))
