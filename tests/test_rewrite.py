"""Replacing a layer in a Network gives what a trace of the changed module gives, whatever stands around it."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import (
    NETWORKS,
    SLOW_TO_TRACE,
    Dense,
    Fire,
    Inverted,
    Residual,
    Shuffle,
    SqueezeConv,
    build,
    conv_bn,
    example,
    headed,
)
from networks import settled as with_statistics
from torch import Tensor, nn

from mobilekit import registry
from mobilekit.errors import UnsupportedError
from mobilekit.network import trace
from mobilekit.transforms._rewrite import Link, replaceable, replaced
from mobilekit.types import Candidate, Network, Operator, Option


@functools.cache
def traced(name: str) -> tuple[nn.Module, Network]:
    module = build(name)
    return module, trace(module, example(), name)


def with_chain(module: nn.Module, path: str, *layers: nn.Module) -> nn.Module:
    """A copy with these layers in the place of one."""
    changed = copy.deepcopy(module)
    changed.set_submodule(path, nn.Sequential(*layers).eval())
    return changed


def assert_same(predicted: Network, module: nn.Module) -> None:
    """Everything is compared, down to the order of groups and axes, which decides in what order levers are offered."""
    found = trace(module, example(), predicted.name)
    assert predicted.operators == found.operators
    assert list(predicted.groups.items()) == list(found.groups.items())
    assert predicted.axes == found.axes
    assert predicted == found


def places(network: Network) -> list[Operator]:
    found = []
    for operator in network.operators:
        try:
            found.append(replaceable(network, operator.module))
        except UnsupportedError:
            continue
    return found


def doubled(module: nn.Module, network: Network, place: Operator, width: int) -> tuple[nn.Module, Network]:
    """The layer followed by a pointwise (or linear) one: the module so changed, and what is said of it."""
    layer = module.get_submodule(place.module)
    shape = network.shape(place)
    if isinstance(layer, nn.Linear):
        new: tuple[nn.Module, nn.Module] = (
            nn.Linear(layer.in_features, width, bias=False),
            nn.Linear(width, layer.out_features, layer.bias is not None),
        )
    else:
        assert isinstance(layer, nn.Conv2d)
        first = copy.deepcopy(layer)  # a subclass keeps its own padding
        first.weight, first.bias = nn.Parameter(layer.weight[:1].repeat(width, 1, 1, 1)), None
        first.out_channels = width
        new = first, nn.Conv2d(width, layer.out_channels, 1, bias=layer.bias is not None)
    kind = "linear" if isinstance(layer, nn.Linear) else "conv"
    links = (
        Link("0", kind, width, shape.out_size, kernel=shape.kernel, stride=shape.stride),
        Link("1", kind, None, shape.out_size),
    )
    return with_chain(module, place.module, *new), replaced(network, place.module, links)


# ---------------------------------------------------------------- against the trace


@pytest.mark.parametrize(
    "name", sorted(set(NETWORKS) - {"inception", "densenet", "squeeze_conv", "resnet", "squeezenet"})
)
def test_the_first_and_the_last_place_of_every_network(name: str) -> None:
    module, network = traced(name)
    found = places(network)
    assert found, "every test network has a dense layer that one call uses"
    for place in {found[0].name: found[0], found[-1].name: found[-1]}.values():
        changed, predicted = doubled(module, network, place, width=3)
        assert_same(predicted, changed)


PIECES = ("conv", "grouped", "depthwise", "residual", "inverted", "squeeze", "fire", "dense", "shuffle")


def of_pieces(kinds: list[str]) -> nn.Module:
    """A network out of blocks with sums, products, concatenations, shuffles and groups; widths stay even."""
    layers, width = [conv_bn(3, 8, stride=2)], 8
    for kind in kinds:
        if kind == "conv":
            layers.append(conv_bn(width, 12))
            width = 12
        elif kind in ("grouped", "depthwise"):
            layers.append(conv_bn(width, width, groups=2 if kind == "grouped" else width))
        elif kind == "fire":
            layers.append(Fire(width, 4, 6))
            width = 12
        elif kind == "dense":
            layers.append(Dense(width, 4))
            width += 4
        else:
            block = {"residual": Residual, "inverted": Inverted}.get(kind)
            layers.append(block(width, width) if block else {"squeeze": SqueezeConv, "shuffle": Shuffle}[kind](width))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return with_statistics(headed(*layers, width=width))


@SLOW_TO_TRACE
@given(kinds=st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), data=st.data())
def test_two_replacements_in_random_networks_then_pruning_a_new_group(kinds: list[str], data: st.DataObject) -> None:
    module = of_pieces(kinds)
    network = trace(module, example())
    for _ in range(2):
        place = data.draw(st.sampled_from(places(network)))
        module, network = doubled(module, network, place, data.draw(st.integers(2, 5)))
    assert_same(network, module)
    new = f"{place.module}.0"
    option = Option(transform="channel_pruning", where=new, settings={"width": 1})
    start = Candidate(module=module, example_input=example(), network=network)
    slim = registry.transform("channel_pruning").apply(start, option)
    found = trace(slim.module, example())
    assert found.operators == slim.network.operators
    assert {name: group.width for name, group in found.groups.items()}[new] == 1
    assert found.axes == slim.network.axes


class Unnamed(nn.Module):
    """Channels that no weight writes, before and behind the layers: their groups have numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.c, self.d = nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 1, groups=3)
        self.e = nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.d(self.c(self.b(self.a(x)).relu()).roll(1, 1))
        y = torch.cat([y, torch.ones(1, 3, 8, 8)], 1)
        return self.e(torch.softmax(y, 1)).roll(1, 1)


@pytest.mark.parametrize("path", ["a", "c", "e"])
def test_numbers_of_unnamed_groups_and_operators_in_reasons_move(path: str) -> None:
    module = Unnamed().eval()
    network = trace(module, example())
    assert any(name.startswith("<") and name != "<input>" for name in network.groups)
    changed, predicted = doubled(module, network, next(o for o in network.operators if o.module == path), 3)
    assert_same(predicted, changed)


def test_a_depthwise_separable_chain_with_norms_and_activations() -> None:
    module, network = traced("resnet")
    place = next(o for o in network.operators if o.module == "2.first.0")  # 8 -> 12 channels, stride 2
    norm = ("1.weight", "1.bias", "1.running_mean", "1.running_var")
    chain = (
        Link("0", "conv", 8, place.out_size, (3, 3), (2, 2), groups=8, activation="relu6", vectors=norm),
        Link("3", "conv", 20, place.out_size, activation="relu", vectors=("3.bias",)),
        Link("5", "conv", None, place.out_size),
    )
    layers = (
        nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 20, 1), nn.ReLU(),
        nn.Conv2d(20, 12, 1, bias=False),
    )  # fmt: skip
    assert_same(replaced(network, place.module, chain), with_chain(module, place.module, *layers))


def test_an_inverted_residual_chain_with_two_widths() -> None:
    module, network = traced("vgg")
    place = next(o for o in network.operators if o.module == "features.3")
    chain = (
        Link("0", "conv", 16, place.in_size, activation="relu6"),
        Link("2", "conv", 16, place.out_size, (3, 3), groups=16, activation="relu6"),
        Link("4", "conv", None, place.out_size),
    )
    layers = (
        nn.Conv2d(8, 16, 1, bias=False), nn.ReLU6(), nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.ReLU6(),
        nn.Conv2d(16, 12, 1),
    )  # fmt: skip
    assert_same(replaced(network, place.module, chain), with_chain(module, place.module, *layers))


class Branches(nn.Module):
    """A slice of what is read beside a grouped convolution of it, shuffled; a dense layer behind."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs // 2, 6, 1, stride, bias=False)
        self.two = nn.Conv2d(inputs, 4, 3, stride, 1, groups=2, bias=False)
        self.last = nn.Conv2d(10, outputs, 1, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.one(x.narrow(1, 0, x.shape[1] // 2)), self.two(x)], 1)
        return self.last(nn.functional.channel_shuffle(y, 5))


@SLOW_TO_TRACE
@given(kinds=st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), data=st.data())
def test_graphs_with_slices_shuffles_and_groups_in_random_networks(kinds: list[str], data: st.DataObject) -> None:
    module = of_pieces(kinds)
    network = trace(module, example())
    for _ in range(2):
        found = [(o, network.shape(o)) for o in places(network) if o.kind == "conv"]
        even = [(o, s) for o, s in found if not (s.in_channels % 2 or s.out_channels % 2) and s.kernel == (3, 3)]
        if not even:
            break
        place, shape = data.draw(st.sampled_from(even))
        inputs, outputs, stride = shape.in_channels, shape.out_channels, shape.stride
        if network.axes.get(f"{place.module}.bias"):
            break
        chain = (
            Link("half", "slice", inputs // 2, shape.in_size, reads=("<input>",)),
            Link("one", "conv", 6, shape.out_size, stride=stride),
            Link("two", "conv", 4, shape.out_size, (3, 3), stride, groups=2, reads=("<input>",)),
            Link("both", "concat", 10, shape.out_size, reads=("one", "two")),
            Link("mixed", "shuffle", 10, shape.out_size, groups=5),
            Link("last", "conv", None, shape.out_size, groups=2),
        )
        changed = copy.deepcopy(module)
        changed.set_submodule(place.module, Branches(inputs, outputs, stride[0]).eval())
        module, network = changed, replaced(network, place.module, chain)
    assert_same(network, module)


# ---------------------------------------------------------------- names, precisions, refusals


def test_precisions_follow_the_new_names() -> None:
    module, network = traced("vgg")
    planned = network.with_precisions({"conv2d": "int8", "linear": "fp16", "linear_1": "int8"})
    _, predicted = doubled(module, planned, network.operators[0], 2)
    assert predicted.precisions == {"conv2d": "int8", "conv2d_1": "int8", "linear": "fp16", "linear_1": "int8"}
    place = next(o for o in predicted.operators if o.name == "linear")
    chain = (Link("0", "linear", 2), Link("1", "linear", None))
    assert replaced(predicted, place.module, chain).precisions == {
        "conv2d": "int8", "conv2d_1": "int8", "linear": "fp16", "linear_1": "fp16", "linear_2": "int8",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("network", "path", "reason"),
    [
        ("vgg", "nowhere", "no such layer"),
        ("vgg", "", "no such layer"),
        ("vgg", "features.2", "max_pool"),
        ("unet", "up", "conv_transpose"),
        ("mobilenet_v2", "1.layers.3", "groups"),
        ("shared", "layer", "used 3 times|no such layer"),  # torch.export calls both layers by one of their names
        ("shared", "tied", "used 3 times|no such layer"),
        ("odds", "a", "more than the layer"),
        ("watched", "norm", "something else reads"),
    ],
)
def test_what_cannot_be_replaced_is_said(network: str, path: str, reason: str) -> None:
    chain = (Link("0", "conv", 2), Link("1", "conv", None))
    with pytest.raises(UnsupportedError, match=reason):
        replaced(traced(network)[1], path, chain)


@pytest.mark.parametrize(
    ("links", "reason"),
    [
        ((), "has to write the old channels"),
        ((Link("0", "conv", 4, (16, 16)),), "has to write the old channels"),
        ((Link("0", "conv", None, (16, 16)), Link("1", "conv", None, (16, 16))), "has to write the old channels"),
        ((Link("0", "conv", 4, (16, 16)), Link("1", "conv", None, (8, 8))), "instead of"),
        ((Link("0", "conv", 4, (16, 16)), Link("0", "conv", None, (16, 16))), "the same name"),
        ((Link("0", "linear", 4, (16, 16)), Link("1", "conv", None, (16, 16))), "conv layers only"),
        ((Link("0", "conv", None, (16, 16), activation="relu"),), "activation of its own"),
        ((Link("0", "conv", 6, (16, 16), groups=2), Link("1", "conv", None, (16, 16))), "2 groups between 3 and 6"),
        ((Link("0", "conv", 4, (16, 16)), Link("1", "shuffle", None, (16, 16), groups=2)), "has to have weights"),
        ((Link("0", "conv", 4, (16, 16), reads=("1",)), Link("1", "conv", None, (16, 16))), "what comes after it"),
    ],
)
def test_chains_that_do_not_fit_are_refused(links: tuple[Link, ...], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        replaced(traced("vgg")[1], "features.0", links)


def test_rewriting_needs_no_torch() -> None:
    code = "import sys, mobilekit.transforms._rewrite; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
