"""Removing residual blocks: what is said is what a trace finds, what is done is an identity in the block's place."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    SLOW_TO_TRACE,
    Dense,
    Head,
    Inverted,
    MobileInverted,
    Residual,
    ShuffleGroups,
    SqueezeConv,
    SqueezeResidual,
    build,
    conv_bn,
    example,
    headed,
    settled,
)
from test_rewrite import assert_same
from torch import Tensor, nn

from mobilekit import registry
from mobilekit.errors import UnsupportedError
from mobilekit.network import trace
from mobilekit.transforms.block_removal import BlockRemoval
from mobilekit.types import Candidate, Network, Option, QuantSpec, RuntimeEntry

ENTRY = RuntimeEntry(name="onnx", precisions=("fp32", "int8"), channel_multiple=1)
LEVER = BlockRemoval()


def at(where: str) -> Option:
    return Option(transform="block_removal", where=where, settings={})


def start(*layers: nn.Module, width: int = 8) -> Candidate:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return candidate(settled(headed(*layers, width=width)))


def candidate(module: nn.Module) -> Candidate:
    return Candidate(module, example(), trace(module, example()))


def offered(network: Network) -> list[str]:
    return [option.where for option in LEVER.options(network, ENTRY)]


def refused(network: Network) -> dict[str, str]:
    return LEVER.refusals(network, ENTRY)


def removed(before: Candidate, where: str) -> Candidate:
    """The candidate without the block, compared with the trace of its module and with an identity put in by hand."""
    after = LEVER.apply(before, at(where))
    assert after.network == LEVER.predict(before.network, at(where))
    assert after.history == (*before.history, at(where))
    assert_same(after.network.with_precisions({}), after.module)
    by_hand = copy.deepcopy(before.module)
    by_hand.set_submodule(where, nn.Identity())
    with torch.inference_mode():
        torch.testing.assert_close(after.module(example()), by_hand(example()), rtol=0, atol=0)
    return after


# ---------------------------------------------------------------- blocks of real networks


class Bottleneck(nn.Module):
    """ResNet's bottleneck; `groups` makes it ResNeXt's."""

    def __init__(self, width: int, inner: int, groups: int = 1) -> None:
        super().__init__()
        self.reduce, self.conv = conv_bn(width, inner, 1), conv_bn(inner, inner, groups=groups)
        self.expand = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.conv(self.reduce(x)))
        y += x
        return self.relu(y)


class PreActivation(nn.Module):
    """ResNet v2: batch norm and ReLU in front of the convolutions, nothing behind the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.relu(norm(y)))
        return x + y


class Gated(nn.Module):
    """Swish written out, so that its sigmoid is an operator, and no batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * torch.sigmoid(y) + x


class Halved(nn.Module):
    """A branch in which one half of the channels gates the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width // 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return x + self.conv(torch.tanh(left) * right)


class Around(nn.Module):
    """Whatever branch, its input added, and something done to the sum."""

    def __init__(self, branch: nn.Module, then: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.branch, self.then = branch, then

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.branch(x)
        return y if self.then is None else self.then(y)


@pytest.mark.parametrize(
    ("name", "blocks", "kept"),
    [
        ("resnet", ["1", "3"], {"2"}),
        ("mobilenet_v2", ["2"], set()),
        ("efficientnet", ["2"], set()),
        ("senet", ["1", "2"], set()),
        ("shufflenet_v1", ["3"], set()),
    ],
)
def test_blocks_of_known_families(name: str, blocks: list[str], kept: set[str]) -> None:
    before = candidate(build(name))
    assert offered(before.network) == blocks
    assert set(refused(before.network)) == kept
    where = blocks[-1]
    after = removed(before, where)
    assert after.network.macs < before.network.macs
    assert not any(o.module == where or o.module.startswith(f"{where}.") for o in after.network.operators)


def test_neighbours_go_in_any_order_and_the_first_block_behind_a_pool_goes_too() -> None:
    layers = (conv_bn(3, 8), nn.MaxPool2d(2), Bottleneck(8, 4), Bottleneck(8, 4, groups=2), Bottleneck(8, 6))
    before = start(*layers)
    assert offered(before.network) == ["2", "3", "4"]
    once, other = removed(LEVER.apply(before, at("2")), "3"), LEVER.apply(LEVER.apply(before, at("3")), at("2"))
    assert once.network == other.network
    assert offered(once.network) == ["4"]
    bare = LEVER.apply(once, at("4"))
    assert [o.kind for o in bare.network.operators] == ["conv", "max_pool", "global_pool", "linear"]
    assert refused(bare.network) == {"network": "it has no sum of a tensor and what is made of it"}


def test_inverted_residuals_and_relu6_behind_the_sum() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6())
    plain = Around(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6())
    before = start(stem, plain, Inverted(8, 8), MobileInverted(8, 8))
    assert offered(before.network) == ["1", "2", "3"]
    removed(LEVER.apply(before, at("3")), "1")


def test_a_batch_norm_behind_the_block_becomes_part_of_the_layer_in_front() -> None:
    layers = (nn.Conv2d(3, 8, 3), PreActivation(8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    after = removed(start(*layers), "1")
    assert [(o.kind, o.activation) for o in after.network.operators][:2] == [("conv", "relu"), ("conv", None)]


def test_pre_activation_blocks_among_themselves() -> None:
    before = start(conv_bn(3, 8), PreActivation(8), PreActivation(8), PreActivation(8), nn.BatchNorm2d(8), nn.ReLU())
    assert offered(before.network) == ["1", "2", "3"]
    removed(before, "2")


def test_numbers_of_functions_that_are_operators_and_of_those_that_are_not() -> None:
    before = start(conv_bn(3, 8), Gated(8), SqueezeConv(8), Inverted(8, 8), Gated(8), Around(nn.Conv2d(8, 8, 1)))
    assert offered(before.network) == ["1", "3", "4", "5"]
    assert "sigmoid_1" in {o.name for o in before.network.operators}
    assert "sigmoid" in {o.name for o in removed(before, "1").network.operators}


def test_a_block_inside_of_another_goes_with_it() -> None:
    before = start(conv_bn(3, 8), Around(nn.Sequential(Bottleneck(8, 4), nn.Conv2d(8, 8, 1))))
    assert offered(before.network) == ["1.branch.0", "1"]
    assert offered(removed(before, "1.branch.0").network) == ["1"]
    with pytest.raises(UnsupportedError, match="no such module"):
        LEVER.predict(removed(before, "1").network, at("1.branch.0"))


class Lazy(nn.Module):
    """Blocks that are called with a setting, as those with stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 8), Head(8)
        self.block = self.Rated()

    class Rated(Inverted):
        def __init__(self) -> None:
            super().__init__(8, 8)

        def forward(self, x: Tensor, rate: float = 0.5) -> Tensor:
            return x + F.dropout(self.layers(x), rate, self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x), rate=0.1))


def test_a_block_that_is_called_with_settings() -> None:
    before = candidate(settled(Lazy()))
    after = LEVER.apply(before, at("block"))
    assert_same(after.network, after.module)
    assert isinstance(after.module.get_submodule("block"), nn.Identity)


PIECES: dict[str, Callable[[int], nn.Module]] = {
    "conv": lambda width: conv_bn(width, width),
    "grouped": lambda width: nn.Conv2d(width, width, 1, groups=2),
    "norm": nn.BatchNorm2d,
    "residual": lambda width: Residual(width, width),
    "inverted": lambda width: Inverted(width, width),
    "excite": SqueezeResidual,
    "shuffle": lambda width: ShuffleGroups(width, width),
    "pre": PreActivation,
    "gated": Gated,
    "halved": Halved,
    "dense": lambda width: Dense(width, 4),
}


@settings(SLOW_TO_TRACE, max_examples=3)
@given(
    first=st.lists(st.sampled_from(sorted(PIECES)), max_size=2),
    second=st.lists(st.sampled_from(sorted(PIECES)), max_size=2),
    data=st.data(),
)
def test_random_networks(first: list[str], second: list[str], data: st.DataObject) -> None:
    layers, width = [conv_bn(3, 8, stride=2)], 8
    for kind in (*first, "residual", *second):
        layers.append(PIECES[kind](width))
        width += 4 * (kind == "dense")
    current = start(*layers, width=width)
    for _ in range(2):
        places = offered(current.network)
        assert places or refused(current.network)
        if places:
            current = removed(current, data.draw(st.sampled_from(places)))


# ---------------------------------------------------------------- channel groups, widths, precisions


def test_refusals_that_came_from_the_block_are_lifted() -> None:
    before = start(conv_bn(3, 8), ShuffleGroups(8, 8), ShuffleGroups(8, 8))
    reason = "a grouped convolution (2 groups) fixes it"
    assert before.network.groups["0.0"].refused == reason
    once = removed(before, "1")
    assert once.network.groups["0.0"].refused == reason  # the other block's
    assert removed(once, "2").network.groups["0.0"].refused is None


def test_nodes_that_refusals_name_are_renumbered() -> None:
    before = start(conv_bn(3, 8), Halved(8), Halved(8))
    assert (before.network.groups["0.0"].refused or "").startswith("chunk at chunk needs")
    after = removed(before, "1").network
    assert (after.groups["0.0"].refused or "").startswith("chunk at chunk needs")
    assert LEVER.predict(after, at("2")).groups["0.0"].refused is None


def test_a_group_that_the_block_named_has_a_number_without_it() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU())
    before = start(stem, Residual(8, 8), nn.Conv2d(8, 8, 1, groups=4))
    assert "1.second.0" in before.network.groups
    assert "<2>" in removed(before, "1").network.groups


def test_channels_from_a_concatenation() -> None:
    before = start(conv_bn(3, 8), Dense(8, 4), Around(conv_bn(12, 12)), conv_bn(12, 8))
    assert "different concatenations" in (before.network.groups["0.0"].refused or "")
    after = removed(before, "2").network
    assert after.groups["0.0"].refused is None


def test_widths_first() -> None:
    current = candidate(build("resnet"))
    pruning = registry.transform("channel_pruning")
    for where, width in (("0.0", 5), ("1.first.0", 3), ("2.second.0", 7)):
        option = Option(transform="channel_pruning", where=where, settings={"width": width})
        current = pruning.apply(current, option)
    assert offered(current.network) == ["1", "3"]
    bare = removed(LEVER.apply(current, at("1")), "3")
    assert {name: bare.network.groups[name].width for name in ("0.0", "2.second.0")} == {"0.0": 5, "2.second.0": 7}
    with pytest.raises(UnsupportedError, match="no such channels"):
        pruning.predict(bare.network, Option(transform="channel_pruning", where="1.first.0", settings={"width": 2}))


def test_precisions_go_with_the_block_or_have_the_new_names() -> None:
    before = candidate(build("resnet"))
    planned: dict[str, str] = {"conv2d_1": "int8", "add_": "int8", "conv2d_3": "int8", "linear": "fp16"}
    network = before.network.model_validate({**before.network.model_dump(), "precisions": planned})
    quant = QuantSpec(operators=network.precisions)
    after = LEVER.apply(Candidate(before.module, example(), network, quant=quant), at("1"))
    assert after.network.precisions == {"conv2d_1": "int8", "linear": "fp16"}
    assert after.quant is not None
    assert after.quant.operators == after.network.precisions
    assert after.network.precision(next(o for o in after.network.operators if o.module == "2.first.0")) == "int8"


def test_the_given_candidate_stays_and_modes_are_kept() -> None:
    before = candidate(build("resnet"))
    before.module.get_submodule("1").train()
    text, picture = before.network.model_dump_json(), repr(before.module)
    after = LEVER.apply(before, at("1"))
    assert before.network.model_dump_json() == text
    assert repr(before.module) == picture
    assert after.module.get_submodule("1").training
    assert not after.module.get_submodule("2").training
    assert before.module.get_submodule("1.first.0").training


# ---------------------------------------------------------------- what stays


class Functional(nn.Module):
    """Blocks of layers that the model's own forward adds up, and a stage that does so."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(8, 8), conv_bn(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x)
            return x + self.b(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.stage, self.head = conv_bn(3, 8), conv_bn(8, 8), self.Stage(), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.stage(x + self.layer(x)))


def test_functional_residuals_have_no_module_of_their_own() -> None:
    network = trace(settled(Functional()), example())
    assert offered(network) == []
    assert refused(network) == {
        "add": "it is no module of its own: its sum is part of the model's own forward",
        "stage": "it is no module of its own: 'stage' holds conv2d_3 too",
        "add_2": "it is no module of its own: 'stage' holds conv2d_2 too",
    }


class Told(nn.Module):
    """A block that gives what is inside of it, and one that reads two tensors."""

    class Inside(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = self.first(x)
            return x + self.second(y), y

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return x + self.conv(x) * other

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.two, self.head = conv_bn(3, 8), self.Inside(8, 8), self.Two(), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        x, inside = self.block(first)
        return self.head(torch.cat([self.two(x, first), torch.tanh(inside)], 1))


def test_blocks_that_stay() -> None:
    stays: list[tuple[nn.Module, str]] = [
        (Residual(8, 8, 2), "its shortcut is no identity"),
        (Around(conv_bn(8, 8), nn.SiLU()), "the silu behind its sum"),
        (Around(conv_bn(8, 8), nn.ReLU6()), "the relu6 behind its sum"),
        (Around(conv_bn(8, 8), lambda y: y * 2), "the function behind its sum"),
        (Around(conv_bn(8, 8), nn.ReLU()), "the relu behind its sum"),
        (Around(conv_bn(8, 8), nn.MaxPool2d(2)), "holds max_pool2d too"),
        (Around(nn.Identity()), "adds a tensor to itself"),
        (nn.Conv2d(8, 1, 1), ""),
        (Around(nn.Conv2d(1, 8, 1)), "channels of other layers"),
        (Residual(8, 12), "its shortcut is no identity"),
    ]
    before = start(conv_bn(3, 8), *(block for block, _ in stays), width=12)
    assert offered(before.network) == []
    found = refused(before.network)
    for where, reason in ((str(index), reason) for index, (_, reason) in enumerate(stays, 1) if reason):
        assert reason in found.pop(where)
        with pytest.raises(UnsupportedError, match=f"'{where}' cannot be removed: .*{reason}"):
            LEVER.apply(before, at(where))
    assert not found


def test_blocks_that_are_read_or_read_elsewhere_stay() -> None:
    network = trace(settled(Told()), example())
    assert offered(network) == []
    assert refused(network) == {
        "block": "tanh reads conv2d_1, which is inside it",
        "two": "its branch reads more than the block's input (conv2d)",
    }


class Minus(nn.Module):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.conv, self.turned = nn.Conv2d(8, 8, 1), turned

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) - x if self.turned else x - self.conv(x)


def test_a_difference_is_a_sum_where_the_input_stays_as_it_is() -> None:
    before = start(conv_bn(3, 8), Minus(turned=False), Minus(turned=True))
    assert refused(before.network) == {"2": "its sum takes the block's input away"}
    removed(before, "1")


def test_numbers_that_a_network_leaves_open_are_no_guesses() -> None:
    """In-place ReLUs are nodes of another name, and which of the fused ones are in place cannot be seen."""
    mixed = nn.Sequential(conv_bn(8, 8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    before = start(conv_bn(3, 8), Around(mixed), nn.Conv2d(8, 8, 1), nn.MaxPool2d(2), nn.ReLU())
    assert offered(before.network) == []
    assert "how many 'relu' nodes go with it, and relu_" in refused(before.network)["1"]
    with pytest.raises(UnsupportedError, match="'1' cannot be removed: a network does not show"):
        LEVER.predict(before.network, at("1"))


# ---------------------------------------------------------------- what only a module shows


class Reader(nn.Module):
    """A forward that looks at its block, in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.stem, self.block, self.head = conv_bn(3, 8), Residual(8, 8), Head(8)
        self.way = way
        if way == "other name":
            self.block = self.same = Around(nn.AvgPool2d(3, 1, 1))  # type: ignore[assignment]
        elif way == "shared":
            self.norm = nn.BatchNorm2d(8)
            self.norm.weight = self.block.first[1].weight
        elif way == "hooks":
            self.block.register_forward_hook(lambda *_: None)
        elif way == "outside":
            self.block = Around(conv_bn(8, 8))  # type: ignore[assignment]
        elif way == "tuple":
            self.block = Pair()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.way == "attribute":
            return self.head(self.block(x) * self.block.first[0].stride[0])
        if self.way == "outside":
            return self.head(torch.relu(self.block(x)))
        if self.way == "by name":
            return self.head(self.block(x=x))
        if self.way == "tuple":
            return self.head(self.block(x)[0])
        return self.head(self.norm(self.block(x)) if self.way == "shared" else self.block(x))


class Pair(Residual):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return super().forward(x), 1


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("other name", "under several names"),
        ("shared", "shared with another layer"),
        ("hooks", "hooks are registered"),
        ("outside", "the relu behind its sum is not its own"),
        ("tuple", "does not give one tensor"),
        ("by name", "not called with one tensor"),
        ("attribute", "the model's forward fails without it"),
    ],
)
def test_what_a_network_cannot_show_is_refused(way: str, reason: str) -> None:
    before = candidate(settled(Reader(way)))
    (where,) = offered(before.network)
    with pytest.raises(UnsupportedError, match=f"'{where}' cannot be .*{reason}"):
        LEVER.apply(before, at(where))


class Again(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = conv_bn(3, 8), Residual(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.stem(x))))


def test_a_block_that_is_called_twice_stays() -> None:
    before = candidate(settled(Again()))
    assert offered(before.network) == []
    assert set(refused(before.network)) == {"block", "add__1"}


@functools.cache
def resnet() -> Candidate:
    return candidate(build("resnet"))


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (Option(transform="low_rank", where="1", settings={}), "was given an option of low_rank"),
        (Option(transform="block_removal", where="1", settings={"fit": "none"}), "has no setting 'fit'"),
        (at("nowhere"), "the network has no such module"),
        (at(""), "no such module"),
        (at("1.first"), "it is no residual block"),
        (at("2"), "its shortcut is no identity"),
    ],
)
def test_options_that_cannot_be_carried_out(option: Option, reason: str) -> None:
    for call in (lambda: LEVER.predict(resnet().network, option), lambda: LEVER.apply(resnet(), option)):
        with pytest.raises(UnsupportedError, match=reason):
            call()


def test_nothing_is_fitted() -> None:
    assert LEVER.fitted(resnet().network, at("1")) == LEVER.bare(at("1")) == at("1")
