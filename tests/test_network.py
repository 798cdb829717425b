"""Tracing and shrinking: counts, channel groups, and that removing channels equals silencing them."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, NOT_ZERO_FOR_ZERO, SIDE, SLOW_TO_TRACE, SamePadConv, blocks, build, example
from torch import Tensor, nn

from mobilekit.errors import BadInputError
from mobilekit.network import shrink, trace
from mobilekit.types import Network

Dead = Mapping[str, Sequence[int]]
QUICK = settings(SLOW_TO_TRACE, max_examples=40)


@functools.cache
def traced(name: str) -> tuple[nn.Module, Network]:
    module = build(name)
    return module, trace(module, example(), name)


def open_groups(network: Network) -> dict[str, int]:
    return {name: group.width for name, group in network.groups.items() if group.refused is None}


def kept(network: Network, dead: Dead) -> dict[str, list[int]]:
    return {g: [i for i in range(network.groups[g].width) if i not in set(gone)] for g, gone in dead.items()}


def silenced(module: nn.Module, network: Network, dead: Dead, readers_too: bool) -> nn.Module:
    """The original with these channels exactly zero: what writes them is zero, and their batch norms are.

    `readers_too`: what reads them is zero as well, for functions whose value at zero is not zero.
    """
    quiet = copy.deepcopy(module)
    tensors = {**dict(quiet.named_parameters(remove_duplicate=False)), **dict(quiet.named_buffers())}
    written = {(p.parameter, p.dim) for group in network.groups.values() for p in group.producers}
    with torch.no_grad():
        for name, axes in network.axes.items():
            for dim, axis in axes.items():
                if not (readers_too or (name, dim) in written or tensors[name].ndim == 1):
                    continue
                position = 0
                for group in axis.groups:
                    for channel in range(network.groups[group].width):
                        if channel in dead.get(group, ()):
                            tensors[name].narrow(dim, position, axis.repeat).zero_()
                        position += axis.repeat
                assert position == tensors[name].shape[dim]
    return quiet


def assert_removed_equals_silenced(module: nn.Module, network: Network, dead: Dead, readers_too: bool) -> None:
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    slim = shrink(module, network, kept(network, dead))
    with torch.inference_mode():
        for batch in (x[:1], x[1:]):
            want = silenced(module, network, dead, readers_too)(batch)
            scale = float(want.abs().max())
            torch.testing.assert_close(slim(batch), want, rtol=1e-5, atol=1e-5 * max(scale, 1e-3))


@st.composite
def deaths(draw: st.DrawFn, widths: Mapping[str, int]) -> dict[str, list[int]]:
    """Some groups, and some channels of each that die; one at least stays."""
    groups = draw(st.lists(st.sampled_from(sorted(widths)), min_size=1, max_size=3, unique=True))
    return {g: sorted(draw(st.sets(st.integers(0, widths[g] - 1), min_size=1, max_size=widths[g] - 1))) for g in groups}


# ---------------------------------------------------------------- tracing


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_and_parameters_are_those_of_the_layers(name: str) -> None:
    module, network = traced(name)
    counted = [0, 0]

    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        taps = math.prod(getattr(layer, "kernel_size", (1,)))
        if isinstance(layer, nn.ConvTranspose2d):
            counted[1] += inputs[0].numel() * layer.out_channels * taps
        elif not (isinstance(layer, nn.Linear) and inputs[0].ndim != 2):
            per_output = layer.in_channels // layer.groups if isinstance(layer, nn.Conv2d) else layer.in_features
            counted[0] += output.numel() * per_output * taps

    handles = [m.register_forward_hook(hook) for m in module.modules() if hasattr(m, "weight") and m.weight.ndim > 1]
    with torch.inference_mode():
        module(example())
    for handle in handles:
        handle.remove()
    functional = 7 * 6 * SIDE * SIDE if name == "watched" else 0  # its F.conv2d belongs to no layer
    counted[1] += 6 * 5 * 4 * 8 * 8 if name == "odds" else 0  # so does its F.conv_transpose2d
    transposed = [network.shape(o) for o in network.operators if o.kind == "conv_transpose"]
    assert sum(o.macs for o in transposed) == counted[1]
    assert network.macs == counted[0] + counted[1] + functional
    if name not in ("watched", "shared"):  # a linear layer over a map is no priced layer; one is used three times
        weights = sum(p.numel() for p in module.parameters() if p.ndim in (2, 4))
        priced = sum(network.shape(o).weights for o in network.operators)
        assert priced == weights


@pytest.mark.parametrize("name", NETWORKS)
def test_operators_read_what_earlier_ones_wrote_and_axes_fit_the_tensors(name: str) -> None:
    module, network = traced(name)
    seen = {"input"}
    for operator in network.operators:
        assert set(operator.inputs) <= seen
        seen.add(operator.name)
    assert Network.model_validate_json(network.model_dump_json()) == network
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    for parameter, axes in network.axes.items():
        for dim, axis in axes.items():
            assert network.width(axis.groups) * axis.repeat == tensors[parameter].shape[dim]


@pytest.mark.parametrize("name", ["resnet", "unet", "shufflenet_v2", "by_hand"])
def test_a_traced_and_shrunk_module_is_left_as_it_was(name: str) -> None:
    module = build(name)
    module.features_seen = [1, 2]  # type: ignore[assignment]
    next(module.parameters()).requires_grad_(False)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    attributes = [(path, {k: repr(v) for k, v in vars(m).items()}) for path, m in module.named_modules()]
    pieces = [id(t) for t in [*module.parameters(), *module.buffers()]]
    for training in (False, True):
        module.train(training)
        attributes = [(path, {k: repr(v) for k, v in vars(m).items()}) for path, m in module.named_modules()]
        network = trace(module, example())
        shrink(module, network, {g: range(1, w) for g, w in open_groups(network).items()})
        assert attributes == [(path, {k: repr(v) for k, v in vars(m).items()}) for path, m in module.named_modules()]
        assert pieces == [id(t) for t in [*module.parameters(), *module.buffers()]]
        assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())
        assert all(m.training == training for m in module.modules())


def test_what_cannot_be_traced_is_said_in_a_sentence() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(BadInputError, match=r"cannot be traced by torch\.export: "):
        trace(Branches(), example())


# ---------------------------------------------------------------- channel groups

UNTOLD = {"scaled", "shared", "watched", "by_hand", "odds"}
"""Networks with parameters or functions that torch-pruning leaves to its user."""


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - UNTOLD))
def test_coupled_layers_are_those_of_torch_pruning(name: str) -> None:
    pruning = pytest.importorskip("torch_pruning")
    module, network = copy.deepcopy(traced(name)[0]), traced(name)[1]
    names = {m: path for path, m in module.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning's own
        graph = pruning.DependencyGraph().build_dependency(module, example_inputs=example())
    for group in open_groups(network):
        producers = {p.parameter.rpartition(".")[0] for p in network.groups[group].producers}
        readers = {
            parameter.rpartition(".")[0]
            for parameter, axes in network.axes.items()
            for dim, axis in axes.items()
            if group in axis.groups and len(axes) == 2 and dim == (0 if parameter == "up.weight" else 1)
        }
        layer = module.get_submodule(sorted(producers)[0])
        cut = pruning.prune_linear_out_channels
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            cut = pruning.prune_conv_out_channels
        found: tuple[set[str], set[str]] = (set(), set())
        for item in graph.get_pruning_group(layer, cut, idxs=[0]):
            target = item.dep.target.module
            if isinstance(target, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and getattr(target, "groups", 1) == 1:
                found[0 if graph.is_out_channel_pruning_fn(item.dep.handler) else 1].add(names[target])
        assert found == (producers, readers), group


def refusals(name: str) -> dict[str, str]:
    return {g: group.refused for g, group in traced(name)[1].groups.items() if group.refused}


@pytest.mark.parametrize("name", NETWORKS)
def test_refusals_are_sentences_and_something_stays_prunable(name: str) -> None:
    assert all(" " in reason and len(reason) > 12 for reason in refusals(name).values())
    assert refusals(name)["<input>"] == "it is the network's input"
    assert name == "watched" or open_groups(traced(name)[1])


def test_shuffled_channels_are_refused_and_the_branch_is_not() -> None:
    assert {"1.branch.0.0", "2.0"} == set(open_groups(traced("shufflenet_v2")[1]))
    assert "shuffle" in refusals("shufflenet_v2")["1.branch.3.0"]
    assert "chunk" in refusals("shufflenet_v2")["0.0"]
    network = traced("shufflenet_v2")[1]
    kinds = [operator.kind for operator in network.operators]
    assert kinds == ["conv", "slice", "slice", *["conv"] * 3, "concat", "shuffle", "conv", "global_pool", "linear"]
    assert next(o.groups for o in network.operators if o.kind == "shuffle") == 2


class Interleaved(nn.Module):
    """Forms of the channel shuffle, and permutations that are none."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.first, self.last = form, nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        forms = {
            "view": lambda: x.view(n, 3, c // 3, h, w).transpose(1, 2).contiguous().view(n, c, h, w),
            "permute": lambda: x.reshape(n, 3, c // 3, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w),
            "flat map": lambda: x.reshape(n, 3, -1, h * w).transpose(-3, -2).clone().reshape(n, -1, h, w),
            "unflatten": lambda: x.unflatten(1, (3, -1)).swapaxes(1, 2).flatten(1, 2),
            "module": lambda: F.channel_shuffle(x, 3),
            "map's axes too": lambda: x.view(n, 3, c // 3, h, w).permute(0, 2, 1, 4, 3).reshape(n, c, h, w),
            "looked at": lambda: self.looked_at(x.view(n, 3, c // 3, h, w).transpose(1, 2)),
        }
        return self.last(forms[self.form]())

    def looked_at(self, x: Tensor) -> Tensor:
        return x.reshape(1, 12, SIDE, SIDE) + x.mean()


def inner_kinds(module: nn.Module) -> list[str]:
    """Kinds of the operators between the first and the last, in order."""
    return [operator.kind for operator in trace(module.eval(), example()).operators][1:-1]


@pytest.mark.parametrize("form", ["view", "permute", "flat map", "unflatten", "module"])
def test_a_channel_shuffle_is_one_operator(form: str) -> None:
    network = trace(Interleaved(form).eval(), example())
    first, shuffle, last = network.operators
    shape = network.shape(shuffle)
    assert (shuffle.kind, shuffle.inputs, last.inputs) == ("shuffle", (first.name,), (shuffle.name,))
    assert (shape.groups, shape.in_channels, shape.out_channels) == (3, 12, 12)
    assert shape.in_size == shape.out_size == (SIDE, SIDE)
    assert shape.macs == 0 == shape.weights
    assert open_groups(network) == {}
    assert "shuffle of the channels" in str(network.groups["first"].refused)


@pytest.mark.parametrize("form", ["map's axes too", "looked at"])
def test_what_is_more_than_a_shuffle_is_a_transposition(form: str) -> None:
    kinds = inner_kinds(Interleaved(form))
    assert "transpose" in kinds
    assert "shuffle" not in kinds


class Cut(nn.Module):
    """Pieces of a tensor of twelve channels, all of them read."""

    def __init__(self, pieces: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.pieces, self.first = pieces, nn.Conv2d(3, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return sum(piece.mean((1, 2, 3), keepdim=True) for piece in self.pieces(self.first(x)))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("pieces", "widths"),
    [
        (lambda x: x.chunk(2, 1), [6, 6]),
        (lambda x: x.split([5, 4, 3], dim=-3), [5, 4, 3]),
        (lambda x: torch.tensor_split(x, 3, dim=1), [4, 4, 4]),
        (lambda x: (x[:, :7], x[:, 7:]), [7, 5]),
        (lambda x: (x.narrow(1, 2, 3), x), [3]),
    ],
    ids=["chunk", "split", "tensor_split", "slice", "narrow"],
)
def test_every_piece_of_the_channels_is_a_slice(
    pieces: Callable[[Tensor], Sequence[Tensor]], widths: list[int]
) -> None:
    network = trace(Cut(pieces).eval(), example())
    slices = [operator for operator in network.operators if operator.kind == "slice"]
    shapes = [network.shape(operator) for operator in slices]
    assert [shape.out_channels for shape in shapes] == widths
    assert all(shape.in_channels == 12 and shape.in_size == shape.out_size == (SIDE, SIDE) for shape in shapes)
    assert all(operator.inputs == ("conv2d",) for operator in slices)
    assert open_groups(network) == {}


def test_pieces_of_the_map_are_no_slices_of_channels() -> None:
    network = trace(Cut(lambda x: [*x.chunk(2, 2), x[:, :, 3:]]).eval(), example())
    assert [operator.kind for operator in network.operators].count("other") >= 3
    assert "slice" not in {operator.kind for operator in network.operators}


def test_transpositions_are_priced_and_those_that_change_nothing_are_not() -> None:
    class Turned(nn.Module):
        def __init__(self, *dims: int) -> None:
            super().__init__()
            self.dims, self.first, self.last = dims, nn.Conv2d(3, SIDE, 1), nn.Conv2d(SIDE, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).permute(self.dims))

    assert inner_kinds(Turned(0, 1, 3, 2)) == ["transpose"]
    assert inner_kinds(Turned(0, 3, 1, 2)) == ["transpose"]
    assert inner_kinds(Turned(0, 1, 2, 3)) == []
    assert set(open_groups(trace(Turned(0, 1, 2, 3).eval(), example()))) == {"first"}


def test_grouped_convolutions_are_refused() -> None:
    assert "grouped convolution" in refusals("resnext")["1.0"]
    assert {"0.0", "3.0"} == set(open_groups(traced("resnext")[1]))


def test_a_size_written_into_the_forward_is_found_by_trying() -> None:
    assert "forward fails" in refusals("hard_coded")["b.0"]
    assert {"a.0"} == set(open_groups(traced("hard_coded")[1]))


def test_code_that_needs_two_groups_alike_is_found_by_trying() -> None:
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = self.a(x), self.b(x), self.c(x)
            if a.shape != b.shape:
                raise ValueError("the branches differ")
            return torch.cat([a, b, c], 1).mean((2, 3)).sum(1, keepdim=True) * 0 + x.mean()

    class Reads(Alike):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(24, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            return self.last(torch.cat([self.a(x), self.b(x), self.c(x)], 1))

    network = trace(Reads().eval(), example())
    assert {"a", "b"} <= {g for g, group in network.groups.items() if group.refused}
    assert "sum over channels" in str(trace(Alike().eval(), example()).groups["a"].refused)


def test_channels_that_others_watch_are_refused() -> None:
    found = refusals("watched")
    assert "compares its channels" in found["soft.0"]
    assert "also reads norm.weight" in found["norm"]
    assert "computed" in found["plain.0"]


@pytest.mark.parametrize(
    ("layer", "width"),
    [
        (nn.GroupNorm(2, 8), 8), (nn.PixelShuffle(2), 2), (nn.LocalResponseNorm(3), 8), (nn.GLU(1), 4),
        (nn.ConvTranspose2d(8, 8, 2, groups=8), 8), (nn.ChannelShuffle(2), 8), (nn.Softmax2d(), 8),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_layers_that_mix_or_count_channels_keep_them(layer: nn.Module, width: int) -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), layer, nn.Conv2d(width, 2, 1)).eval()
    network = trace(module, example())
    assert open_groups(network) == {"0": 6}
    assert "1" in {g for g, group in network.groups.items() if group.refused}


def test_an_instance_norm_follows_its_channels() -> None:
    norm = nn.InstanceNorm2d(8, affine=True)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    network = trace(module, example())
    assert open_groups(network) == {"0": 8}
    assert_removed_equals_silenced(module, network, {"0": [1, 6, 7]}, readers_too=False)
    slim = shrink(module, network, {"0": [0, 2, 3]})
    assert slim.get_submodule("1").num_features == 3
    assert summary(trace(slim, example())) == summary(network.with_widths({"0": 3}))


def test_two_weights_of_one_layer_and_a_bare_layer_have_names_of_their_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ParameterList([torch.randn(6, 3, 1, 1), torch.randn(7, 6, 1, 1)])
            self.last = nn.Conv2d(7, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.inner:
                x = torch.relu(torch.conv2d(x, weight))
            return self.last(x)

    module = Two().eval()
    network = trace(module, example())
    assert open_groups(network) == {"inner.0": 6, "inner.1": 7}
    assert_removed_equals_silenced(module, network, {"inner.0": [0, 3], "inner.1": [6]}, readers_too=False)
    assert set(trace(nn.Conv2d(3, 4, 1), example()).groups) == {"<input>", "weight"}


# ---------------------------------------------------------------- shrinking


@QUICK
@given(st.data())
def test_removing_channels_equals_silencing_them(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([n for n in NETWORKS if n != "watched"]))
    module, network = traced(name)
    dead = data.draw(deaths(open_groups(network)))
    assert_removed_equals_silenced(module, network, dead, readers_too=name in NOT_ZERO_FOR_ZERO)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"watched"}))
def test_every_open_group_can_be_removed_alone_and_with_all_others(name: str) -> None:
    module, network = traced(name)
    dead = {g: [0, *range(2, w, 2)] for g, w in open_groups(network).items()}
    for some in ({g: channels} for g, channels in dead.items()):
        assert_removed_equals_silenced(module, network, some, readers_too=name in NOT_ZERO_FOR_ZERO)
    assert_removed_equals_silenced(module, network, dead, readers_too=name in NOT_ZERO_FOR_ZERO)


def summary(network: Network) -> list[object]:
    return [(o.name, o.kind, o.module, o.inputs, o.activation, o.groups, network.shape(o)) for o in network.operators]


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"watched"}))
def test_tracing_the_shrunk_module_gives_the_predicted_network(name: str) -> None:
    module, network = traced(name)
    keep = {g: range(2 * w // 3) for g, w in open_groups(network).items()}
    predicted = network.with_widths({g: len(k) for g, k in keep.items()})
    again = trace(shrink(module, network, keep), example())
    assert summary(again) == summary(predicted)
    assert {g: group.width for g, group in again.groups.items()} == {g: v.width for g, v in predicted.groups.items()}
    assert again.axes == predicted.axes


def test_a_convolution_of_the_users_own_keeps_its_class_and_padding() -> None:
    module, network = traced("same_pad")
    slim = shrink(module, network, {"0": [1, 4, 5], "3": range(4)})
    first, depthwise, last = (slim.get_submodule(path) for path in ("0", "2", "3"))
    assert all(type(layer) is SamePadConv for layer in (first, depthwise, last))
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (3, 3, 3)
    assert (last.in_channels, last.out_channels) == (3, 4)
    with torch.inference_mode():
        assert first(example()).shape == (1, 3, 8, 8)  # stride 2 with one row of padding after the last only


def test_tied_weights_are_cut_once_and_stay_tied() -> None:
    module, network = traced("shared")
    slim = shrink(module, network, {"stem.0": [0, 2, 5]})
    assert slim.layer.weight is slim.tied.weight  # type: ignore[union-attr]
    assert slim.tied.out_channels == 3  # type: ignore[union-attr]


BLOCK = st.tuples(
    st.sampled_from(["conv", "depthwise", "residual", "inverted", "squeeze", "fire", "dense"]), st.integers(2, 6)
)


@settings(QUICK, max_examples=8)
@given(st.data())
def test_random_networks_hold_the_property_too(data: st.DataObject) -> None:
    module = blocks(data.draw(st.lists(BLOCK, min_size=2, max_size=5)))
    network = trace(module, example())
    reasons = {g.refused for g in network.groups.values()} - {None, "it is the network's input"}
    # A sum of a concatenation with one convolution's output ties parts of a group to others: refused as a whole.
    assert all("output" in reason or "different concatenations" in reason for reason in reasons)
    for _ in range(3 if open_groups(network) else 0):
        dead = data.draw(deaths(open_groups(network)))
        assert_removed_equals_silenced(module, network, dead, readers_too=False)


@pytest.mark.parametrize(
    ("pool", "ceil"),
    [
        (nn.MaxPool2d(3, 2, ceil_mode=True), True),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), False),
        (nn.MaxPool2d(3, 2, 1), False),
        (nn.AvgPool2d(3, 2, ceil_mode=True), True),
    ],
)
def test_pools_whose_windows_reach_over_the_end_are_told_from_padded_ones(pool: nn.Module, ceil: bool) -> None:
    network = trace(nn.Sequential(nn.Conv2d(3, 8, 1), pool).eval(), example())
    assert [operator.ceil for operator in network.operators] == [False, ceil]
