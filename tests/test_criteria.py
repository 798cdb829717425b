"""Channel pruning criteria: arithmetic, dead channels, repair of readers, recalibration, and the iterative schedule."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import NETWORKS, SIDE, blocks, build, conv_bn, example, settled
from torch import Tensor, nn

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.evaluate import divergence, outputs
from mobilekit.network import trace
from mobilekit.training.iterative import Limits, Pruned, prune_iteratively
from mobilekit.transforms._criteria import CRITERIA
from mobilekit.transforms._criteria.calls import as_matrix, sampled
from mobilekit.transforms._criteria.selection import descend, factors, grams
from mobilekit.transforms._criteria.subject import Reader, Subject
from mobilekit.transforms.channel_pruning import ChannelPruning, importance, sparsity_penalty
from mobilekit.types import Calibration, Candidate, Network, Option
from mobilekit.workloads import fashion_mnist

MEASURING = ("apoz", "taylor", "lasso", "reconstruction")
Dead = dict[str, list[int]]


def noise(count: int, seed: int = 7) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def calibration(count: int = 16, size: int = 8, seed: int = 7, **facts: Any) -> Calibration:
    return Calibration(inputs=noise(count, seed).split(size), **facts)


@functools.cache
def traced(name: str) -> tuple[nn.Module, Network]:
    module = build(name)
    return module, trace(module, example(), name)


def prune(module: nn.Module, network: Network, group: str, data: Calibration | None = None, **wish: Any) -> nn.Module:
    option = Option(transform="channel_pruning", where=group, settings=wish)
    return ChannelPruning().apply(Candidate(module, example(), network, calibration=data), option).module


def plain(*layers: nn.Module, seed: int = 3) -> tuple[nn.Module, Network]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:  # they were made before the seed
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        module = settled(nn.Sequential(*layers))
    return module, trace(module, example())


def open_groups(network: Network) -> dict[str, int]:
    return {name: group.width for name, group in network.groups.items() if group.refused is None}


def with_dead(module: nn.Module, network: Network, dead: Dead) -> nn.Module:
    """A copy in which everything that makes these channels is zero: they are exactly zero on any input."""
    quiet = copy.deepcopy(module)
    tensors = {**dict(quiet.named_parameters(remove_duplicate=False)), **dict(quiet.named_buffers())}
    made = {(p.parameter, p.dim) for group in network.groups.values() for p in group.producers}
    with torch.no_grad():
        for name, axes in network.axes.items():
            for dim, axis in axes.items():
                if (
                    (name, dim) in made or tensors[name].ndim == 1 or dim == 0 == len(axes) - 1
                ):  # the last: depthwise weights
                    position = 0
                    for group, repeat in ((g, axis.repeat) for g in axis.groups):
                        for channel in dead.get(group, ()):
                            tensors[name].narrow(dim, position + channel * repeat, repeat).zero_()
                        position += network.groups[group].width * repeat
    return quiet


def error(a: nn.Module, b: nn.Module, inputs: Tensor) -> float:
    """Mean squared difference of the outputs, relative to the first one's mean square."""
    with torch.inference_mode():
        want, found = a(inputs), b(inputs)
    return float((want - found).square().mean() / want.square().mean())


# ---------------------------------------------------------------- settings


def test_every_criterion_of_the_table_is_a_function_with_its_source() -> None:
    for name, family in CRITERIA.items():
        function = getattr(importlib.import_module(f"mobilekit.transforms._criteria.{family}"), name)
        assert "arXiv" in function.__doc__


@pytest.mark.parametrize("wish", [{"criterion": "magic"}, {"repair": "glue"}, {"recalibrate": "yes"}])
def test_unknown_settings_are_refused_with_the_known_ones(wish: dict[str, Any]) -> None:
    module, network = traced("vgg")
    known = {"criterion": "geometric_median, bn_scale", "repair": "none, least_squares", "recalibrate": "true or false"}
    option = Option(transform="channel_pruning", where="features.0", settings={"width": 4, **wish})
    lever, start = ChannelPruning(), Candidate(module, example(), network)
    for act in (lambda: lever.apply(start, option), lambda: lever.predict(network, option)):
        with pytest.raises(UnsupportedError, match=known[next(iter(wish))]):
            act()


def test_an_old_plan_without_the_new_settings_means_what_it_meant() -> None:
    module, network = traced("resnet")
    bare = prune(module, network, "0.0", width=5)
    named = prune(module, network, "0.0", width=5, criterion="l1", repair="none", recalibrate=False)
    assert_same(bare, named)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    "wish", [{"criterion": c} for c in MEASURING] + [{"repair": "least_squares"}, {"recalibrate": True}]
)
def test_what_needs_data_and_gets_none_is_refused(wish: dict[str, Any]) -> None:
    module, network = traced("resnet")
    for data in (None, Calibration(inputs=())):
        with pytest.raises(UnsupportedError, match="needs calibration inputs"):
            prune(module, network, "0.0", data, width=4, **wish)


def test_every_criterion_is_deterministic_and_leaves_the_random_state_and_the_module() -> None:
    module, network = traced("resnet")
    before, state = torch.get_rng_state(), copy.deepcopy(module.state_dict())
    for name in CRITERIA:
        wish = {"width": 5, "criterion": name, "repair": "least_squares", "recalibrate": True}
        first = prune(module, network, "0.0", calibration(), **wish)
        assert_same(first, prune(module, network, "0.0", calibration(), **wish))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    assert not any(m.training for m in module.modules())


# ---------------------------------------------------------------- filters


def test_l2_is_the_sum_of_relative_euclidean_norms() -> None:
    module, network = traced("mobilenet_v2")
    group = "1.layers.6"
    weights = [module.get_parameter(p.parameter).detach().double().numpy() for p in network.groups[group].producers]
    assert len(weights) == 2
    norms = [np.sqrt((w**2).sum(axis=(1, 2, 3))) for w in weights]
    want = sum(n / n.mean() for n in norms)
    np.testing.assert_allclose(importance(module, network, group, "l2").numpy(), want, rtol=1e-9)


def test_the_geometric_median_is_measured_by_distances_to_all_other_filters() -> None:
    module, network = traced("unet")  # a transposed convolution: filters lie along axis 1
    weight = module.get_parameter("up.weight").detach().double().numpy().transpose(1, 0, 2, 3).reshape(6, -1)
    want = np.array([sum(math.dist(a, b) for b in weight) for a in weight])
    found = importance(module, network, "up", "geometric_median")
    np.testing.assert_allclose(found.numpy(), want / want.mean(), rtol=1e-9)


def test_bn_scale_sums_the_scales_of_all_batch_norms_over_the_group() -> None:
    module, network = traced("densenet")
    gamma = {n: p.detach().double().abs().numpy() for n, p in module.named_parameters() if p.ndim == 1}
    # the stem's channels come first in every later concatenation
    want = sum(gamma[name][:8] for name in ("0.1.weight", "1.norm.weight", "2.norm.weight", "3.weight"))
    np.testing.assert_allclose(importance(module, network, "0.0", "bn_scale").numpy(), want, rtol=1e-9)
    behind = gamma["2.norm.weight"][8:12] + gamma["3.weight"][8:12]
    np.testing.assert_allclose(importance(module, network, "1.conv", "bn_scale").numpy(), behind, rtol=1e-9)
    with pytest.raises(UnsupportedError, match="no batch norm"):
        importance(*traced("vgg"), "features.0", "bn_scale")


def test_the_sparsity_penalty_is_the_l1_norm_of_prunable_scales_and_has_their_gradient() -> None:
    module, network = traced("shufflenet_v2")  # the shuffled channels are refused
    module = copy.deepcopy(module)
    norms = {n: m for n, m in module.named_modules() if isinstance(m, nn.BatchNorm2d)}
    prunable = {n for n in norms if set(network.axes[f"{n}.weight"][0].groups) <= set(open_groups(network))}
    assert set() < prunable < set(norms)
    term = sparsity_penalty(module, network, 0.3)
    assert float(term.detach()) == pytest.approx(
        0.3 * sum(float(norms[n].weight.detach().abs().sum()) for n in prunable)
    )
    term.backward()
    for name, norm in norms.items():
        want = 0.3 * norm.weight.detach().sign() if name in prunable else None
        assert (norm.weight.grad is None) if want is None else torch.allclose(norm.weight.grad, want)
    with pytest.raises(UnsupportedError, match="no batch norm"):
        sparsity_penalty(*traced("vgg"), 0.1)
    with pytest.raises(BadInputError, match="zero or more"):
        sparsity_penalty(module, network, -1.0)


def test_sparsity_training_makes_scales_small() -> None:
    module, network = plain(*conv_bn(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    norm = module.get_submodule("1")
    before = float(norm.weight.detach().abs().sum())
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(20):
        optimiser.zero_grad()
        loss = F.cross_entropy(module(noise(8)), torch.arange(8) % 4) + sparsity_penalty(module, network, 0.5)
        loss.backward()
        optimiser.step()
    assert float(norm.weight.detach().abs().sum()) < 0.7 * before


# ---------------------------------------------------------------- activations and gradients


@pytest.mark.parametrize("name", ["resnet", "vgg", "densenet", "mobilenet_v2", "squeeze_conv"])
def test_apoz_counts_zeros_behind_the_activations_of_the_group(name: str) -> None:
    module, network = traced(name)
    group = {"resnet": "0.0", "vgg": "features.3", "densenet": "1.conv", "mobilenet_v2": "1.layers.0",
             "squeeze_conv": "1.reduce"}[name]  # fmt: skip
    data = calibration(6, 4)  # batches of 4 and 2
    x = torch.cat(data.inputs)
    with torch.inference_mode():
        if name == "resnet":
            stem = module[0](x)
            maps = [stem, module[1](stem)]  # the stem's activation, and the one behind the sum
        elif name == "vgg":
            maps = [module.features[:5](x)]
        elif name == "densenet":
            y = module[1](module[0](x))
            z = module[2](y)
            maps = [F.relu(module[2].norm(y))[:, 8:12], F.relu(module[3](z))[:, 8:12]]
        elif name == "mobilenet_v2":
            y = module[0](x)
            maps = [module[1].layers[:3](y), module[1].layers[:6](y)]  # behind the depthwise one too
        else:
            maps = [F.relu(module[1].reduce(module[0](x).mean(dim=(2, 3), keepdim=True)))]
    values = np.concatenate([m.numpy().swapaxes(0, 1).reshape(m.shape[1], -1) for m in maps], axis=1)
    want = (values != 0).mean(axis=1)
    assert want.min() < want.max()
    np.testing.assert_allclose(importance(module, network, group, "apoz", data).numpy(), want, atol=1e-3)


def test_apoz_is_refused_where_no_activation_gives_zeros() -> None:
    module, network = traced("mobilenet_v2")
    with pytest.raises(UnsupportedError, match="no ReLU-like activation"):  # a residual stream without activation
        importance(module, network, "1.layers.6", "apoz", calibration())


def taylor_by_differences(module: nn.Module, scaled: Sequence[Tensor], loss: Any, batches: Sequence[Any]) -> np.ndarray:
    """Sum of weight x gradient as the derivative by a common factor of a channel's weights, squared, mean."""
    sums = np.zeros((len(batches), len(scaled[0])))
    with torch.no_grad():
        for (row, batch), channel in itertools.product(enumerate(batches), range(len(scaled[0]))):
            values = []
            for step in (1e-5, -1e-5):
                old = [t[channel].clone() for t in scaled]
                for t in scaled:
                    t[channel] *= 1 + step
                values.append(float(loss(module(batch[0]), batch[1])))
                for t, o in zip(scaled, old, strict=True):
                    t[channel] = o
            # factors of both tensors at once: the derivative is the sum over them
            sums[row, channel] = (values[0] - values[1]) / 2e-5
    return (sums**2).mean(axis=0)


def test_taylor_is_the_squared_sum_of_weight_times_gradient_of_the_given_loss() -> None:
    module, network = plain(*conv_bn(3, 6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4))
    module = module.double()
    inputs = noise(10).double().split(5)
    targets = tuple((torch.arange(5) + i) % 4 for i in range(2))
    scaled = [module.get_parameter("0.weight"), module.get_parameter("1.weight")]
    for loss in (None, lambda output, target: output.square().mean() + F.cross_entropy(output, target)):
        found = importance(module, network, "0", "taylor", Calibration(inputs, targets, loss))
        pairs = list(zip(inputs, targets, strict=True))
        want = taylor_by_differences(module, scaled, loss or F.cross_entropy, pairs)
        np.testing.assert_allclose(found.numpy(), want, rtol=1e-4)


def test_taylor_draws_labels_from_the_output_by_the_seed() -> None:
    module, network = traced("unet")  # a map as output: a label a position
    first, second = (importance(module, network, "down.0", "taylor", calibration(seed=7)) for _ in range(2))
    other = Calibration(calibration().inputs, seed=1)
    assert torch.equal(first, second)
    assert not torch.equal(first, importance(module, network, "down.0", "taylor", other))


def test_taylor_refuses_what_has_no_gradient_and_no_classes() -> None:
    module, network = traced("by_hand")  # its forward detaches the first map
    with pytest.raises(UnsupportedError, match="no gradient"):
        importance(nograd := copy.deepcopy(module), network, "last", "taylor",
                   calibration(targets=(0, 0), loss=lambda output, target: output.detach().sum()))  # fmt: skip
    single, drawn = plain(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1))
    with pytest.raises(UnsupportedError, match="no classes"):
        importance(single, drawn, "0", "taylor", calibration())
    with pytest.raises(BadInputError, match="2 calibration batches and 1 of targets"):
        importance(nograd, network, "last", "taylor", calibration(targets=(torch.zeros(8, dtype=torch.long),)))
    with pytest.raises(BadInputError, match="the loss fails"):
        importance(nograd, network, "last", "taylor", calibration(targets=("a", "b")))


# ---------------------------------------------------------------- what readers read


LAYERS = {
    "plain": lambda: nn.Conv2d(4, 5, 3),
    "strided": lambda: nn.Conv2d(4, 5, (3, 2), stride=(2, 3), padding=(1, 0)),
    "dilated": lambda: nn.Conv2d(4, 5, 3, padding=2, dilation=2),
    "same": lambda: nn.Conv2d(4, 5, (4, 3), padding="same", bias=False),
    "valid": lambda: nn.Conv2d(4, 5, 1, padding="valid"),
    "circular": lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(4, 5, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2)),
    "spread": lambda: nn.ConvTranspose2d(4, 5, 3, stride=1, padding=3, dilation=2),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", [*LAYERS, "linear"])
def test_sampled_rows_times_the_weights_are_the_outputs(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = LAYERS[kind]() if kind in LAYERS else nn.Linear(4 * 25, 5)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(5 if kind == "linear" else 9))
    module = nn.Sequential(*module, nn.Flatten() if kind == "linear" else nn.Identity(), layer).double()
    reader = Reader("3.weight", 0, 1) if isinstance(layer, nn.ConvTranspose2d) else Reader("3.weight", 1, 0)
    with torch.inference_mode():
        whole = [module(batch.double()) for batch in calibration().inputs]
    found = list(sampled(module, [reader], calibration()))
    assert len(found) == 2
    for (name, rows), want in zip(found, whole, strict=True):
        assert name == "3.weight"
        assert rows.bias is layer.bias
        made = rows.inputs @ as_matrix(layer.weight, reader.out_dim).T + (0 if rows.bias is None else rows.bias)
        torch.testing.assert_close(made, rows.outputs)
        torch.testing.assert_close(rows.outputs, want.movedim(1, -1).reshape(-1, 5))  # all positions, in order


def test_few_of_many_positions_are_sampled_alike_in_a_pruned_network() -> None:
    module, network = plain(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    data = calibration(128, 64)  # 32768 positions
    slim = prune(module, network, "0", width=3)
    rows = [[r for _, r in sampled(m, [Reader("1.weight", 1, 0)], data)] for m in (module, slim)]
    assert [len(r.inputs) for r in rows[0]] == [5000, 5000]
    stays = [j for j in range(4) if any(torch.equal(slim[0].weight[i], module[0].weight[j]) for i in range(3))]
    for full, part in zip(*rows, strict=True):
        assert torch.equal(full.inputs[:, stays], part.inputs)


# ---------------------------------------------------------------- LASSO and greedy removal


def two_convs(bias: bool) -> tuple[nn.Module, Network, np.ndarray, np.ndarray]:
    """A network, and its reader's unfolded inputs (rows, channels, taps) and weights (outputs, channels, taps).

    On this one the smallest ridge serves held-back rows best, so that repairs can be compared with plain least squares.
    """
    module, network = plain(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3, bias=bias), nn.Conv2d(4, 2, 1), seed=13)
    with torch.inference_mode():
        columns = F.unfold(module[:2](torch.cat(calibration().inputs)).double(), 3)
    x = columns.movedim(1, 2).reshape(-1, 5, 9).numpy()
    return module, network, x, module.get_parameter("2.weight").detach().double().numpy().reshape(4, 5, 9)


@pytest.mark.parametrize("bias", [False, True])
def test_contributions_are_the_inner_products_of_what_channels_give(bias: bool) -> None:
    module, network, x, w = two_convs(bias)
    given = np.einsum("rct,oct->cro", x, w)
    if bias:  # a free bias takes up every mean
        given -= given.mean(axis=1, keepdims=True)
    want = np.einsum("cro,dro->cd", given, given)
    [gram] = grams(Subject(module, network, "0", 3, calibration()), "lasso")
    np.testing.assert_allclose(gram.contributions().numpy(), want, rtol=1e-4, atol=1e-5 * want.max())


@given(size=st.integers(2, 12), seed=st.integers(0, 99), share=st.floats(0.01, 1.2))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_coordinate_descent_meets_the_optimality_conditions_of_the_lasso(size: int, seed: int, share: float) -> None:
    given = np.random.default_rng(seed).normal(size=(3 * size, size))
    products = given.T @ given
    penalty = share * np.abs(products.sum(axis=1)).max()
    beta = descend(products, penalty, np.ones(size))
    slope = products @ beta - products.sum(axis=1)
    slack = 1e-4 * np.diag(products).max()
    assert (np.abs(slope) <= penalty + slack).all()
    np.testing.assert_allclose(slope[beta != 0], -penalty * np.sign(beta[beta != 0]), atol=slack)
    assert share < 1 or not beta.any()
    for count in range(1, size):
        left = np.count_nonzero(factors(products, count))
        assert left >= count  # a path on which two factors vanish together leaves one too many
        assert left == count or left > count > np.count_nonzero(descend(products, penalty_after(products, left), beta))


def penalty_after(products: np.ndarray, left: int) -> float:
    """The largest penalty that leaves at least `left` factors, a little raised."""
    low, high = 0.0, float(np.abs(products.sum(axis=1)).max())
    for _ in range(40):
        middle = (low + high) / 2
        many = np.count_nonzero(descend(products, middle, np.ones(len(products)))) >= left
        low, high = (middle, high) if many else (low, middle)
    return high * (1 + 1e-6)


def test_lasso_keeps_the_strongest_of_channels_that_have_nothing_in_common() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 2, 1)).eval()
    network = trace(module, example())
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0.0]])[:, :, None, None])
        module[1].weight.copy_(torch.diag(torch.tensor([0.5, 3.0, 1.0, 9.0]))[:, :, None, None])
    scores = importance(module, network, "0", "lasso", calibration(), 2)
    assert scores.nonzero().flatten().tolist() == [1, 2]  # the third producer is the strongest reader's, and dead


def residual_energy(x: np.ndarray, w: np.ndarray, gone: set[int], bias: bool) -> float:
    """Squared error that least squares leave without these channels, relative to the group's energy."""
    y = np.einsum("rct,oct->ro", x, w)
    left = [c for c in range(x.shape[1]) if c not in gone]
    a = x[:, left].reshape(len(x), -1)
    if bias:
        a, y = a - a.mean(axis=0), y - y.mean(axis=0)
    fitted = a @ np.linalg.lstsq(a, y, rcond=None)[0]
    return float(((y - fitted) ** 2).sum() / (y**2).sum())


@pytest.mark.parametrize("bias", [False, True])
def test_reconstruction_removes_greedily_what_least_squares_miss_least(bias: bool) -> None:
    module, network, x, w = two_convs(bias)
    found = importance(module, network, "0", "reconstruction", calibration(), 5).numpy()
    want = [residual_energy(x, w, {c}, bias) for c in range(5)]
    np.testing.assert_allclose(found, want, rtol=1e-3)
    gone: list[int] = []
    for _ in range(3):
        rest = [c for c in range(5) if c not in gone]
        gone.append(min(rest, key=lambda c: residual_energy(x, w, {*gone, c}, bias)))
    scores = importance(module, network, "0", "reconstruction", calibration(), 2)
    assert scores.argsort()[:3].tolist() == gone
    for left in set(range(5)) - set(gone):
        rise = residual_energy(x, w, {*gone, left}, bias) - residual_energy(x, w, set(gone), bias)
        assert float(scores[left]) == pytest.approx(rise, rel=1e-3)


# ---------------------------------------------------------------- dead channels


def assert_dead_channels_are_free(module: nn.Module, network: Network, dead: Dead, criteria: Sequence[str]) -> int:
    """Prune exactly the dead channels of each group under each criterion; the number of times it was done."""
    done, x = 0, noise(2, seed=1)
    for (group, gone), name in itertools.product(dead.items(), criteria):
        quiet = with_dead(module, network, {group: gone})
        with torch.inference_mode():
            want = quiet(x)
        width = network.groups[group].width - len(gone)
        for repair in ("none", "least_squares"):
            wish = {"width": width, "criterion": name, "repair": repair}
            try:
                slim = prune(quiet, network, group, calibration(8, 4), **wish)
            except UnsupportedError:
                if name not in ("bn_scale", "apoz", "taylor"):  # no batch norm, no ReLU, no gradient
                    raise
                continue
            done += 1
            with torch.inference_mode():
                difference = (slim(x) - want).abs().max()
            assert difference < 1e-5 * max(1.0, float(want.abs().max())), (group, name, repair)
    return done


FAMILIES = [n for n in NETWORKS if n not in ("sigmoids", "watched", "hard_coded")]  # zeros would not give zeros


@pytest.mark.parametrize("name", FAMILIES)
def test_pruning_dead_channels_changes_nothing_under_any_criterion(name: str) -> None:
    module, network = traced(name)
    groups = dict(itertools.islice(open_groups(network).items(), 2))
    dead = {group: [0, *range(2, width, 3)] for group, width in groups.items()}
    assert assert_dead_channels_are_free(module, network, dead, list(CRITERIA)) >= 10 * len(dead)


KINDS = st.sampled_from(["conv", "depthwise", "residual", "inverted", "squeeze", "fire", "dense"])


@given(data=st.data())
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_pruning_dead_channels_changes_nothing_in_random_networks(data: st.DataObject) -> None:
    module = blocks(data.draw(st.lists(st.tuples(KINDS, st.integers(2, 9)), min_size=1, max_size=4)))
    network = trace(module, example())
    group = data.draw(st.sampled_from(sorted(open_groups(network))))
    width = network.groups[group].width
    gone = data.draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=width - 1))
    assert_dead_channels_are_free(module, network, {group: sorted(gone)}, [data.draw(st.sampled_from(list(CRITERIA)))])


# ---------------------------------------------------------------- repair


@pytest.mark.parametrize("bias", [False, True])
def test_repair_is_the_least_squares_solution(bias: bool) -> None:
    module, network, x, w = two_convs(bias)
    slim = prune(module, network, "0", calibration(), width=3, criterion="l2", repair="least_squares")
    stays = sorted(importance(module, network, "0", "l2").argsort(descending=True)[:3].tolist())
    y = np.einsum("rct,oct->ro", x, w)
    a = x[:, stays].reshape(len(x), -1)
    if bias:
        y, a = y + module.get_parameter("2.bias").detach().double().numpy(), np.column_stack([a, np.ones(len(a))])
    want = np.linalg.lstsq(a, y, rcond=None)[0]
    found = slim.get_parameter("2.weight").detach().double().numpy().reshape(4, -1).T
    if bias:
        found = np.vstack([found, slim.get_parameter("2.bias").detach().double().numpy()])
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("name", ["l1", "bn_scale", "reconstruction"])
def test_repair_is_exact_where_a_channel_is_a_combination_of_others(name: str) -> None:
    module, network = plain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 7, 3), nn.ReLU(), nn.Conv2d(7, 4, 1))
    with torch.no_grad():
        module[1].weight[4] = 1e-3  # the scale is what bn_scale ranks by; filters follow it below
        module[0].weight[4] = 0.01 * (module[0].weight[0] - 2 * module[0].weight[3])
        module[0].bias[4] = 0.0
    slim = prune(module, network, "0", calibration(), width=5, criterion=name, repair="least_squares")
    assert slim.get_parameter("0.weight").shape[0] == 5
    assert error(module, slim, noise(4, seed=2)) < 1e-8


@pytest.mark.parametrize(
    ("name", "group"),
    [("resnet", "0.0"), ("mobilenet_v2", "1.layers.6"), ("densenet", "0.0"), ("squeeze_linear", "0.0"),
     ("vgg", "features.3"), ("unet", "deep.0"), ("shared", "stem.0"), ("inception", "1.b.1.0"), ("scaled", "a")],
)  # fmt: skip
def test_repair_lowers_the_error_on_other_inputs(name: str, group: str) -> None:
    module, network = traced(name)
    width, held_back = max(1, network.groups[group].width * 2 // 3), noise(16, seed=9)
    data = calibration(128, 32)
    bare = prune(module, network, group, data, width=width)
    repaired = prune(module, network, group, data, width=width, repair="least_squares")
    assert error(module, repaired, held_back) < 0.9 * error(module, bare, held_back)
    assert trace(repaired, example()).groups == network.with_widths({group: width}).groups


def test_lasso_and_reconstruction_beat_l1_before_fine_tuning_on_fashion_mnist() -> None:
    module, start = fashion_mnist.model(), fashion_mnist.example_input()
    network = trace(module, start)
    images = list(fashion_mnist.calibration_data())
    held_back = torch.cat(images[4:6])
    candidate = Candidate(module, start, network, calibration=Calibration(tuple(images[:2])))
    reference = outputs(module, held_back)

    def damage(group: str, name: str, **wish: Any) -> float:
        half = {"width": network.groups[group].width // 2, "criterion": name, **wish}
        slim = ChannelPruning().apply(candidate, Option(transform="channel_pruning", where=group, settings=half))
        return divergence(reference, outputs(slim.module, held_back))

    for group in ("stem.0", "stage2.0.conv1"):
        bare = damage(group, "l1")
        for name in ("lasso", "reconstruction"):
            assert damage(group, name) < 0.5 * bare
        assert damage(group, "l1", repair="least_squares") < 0.5 * bare


# ---------------------------------------------------------------- recalibration


def test_recalibration_takes_plain_means_over_the_batches() -> None:
    module, network = plain(*conv_bn(3, 6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9))
    slim = prune(module, network, "0", calibration(), width=4, recalibrate=True)
    assert not any(m.training for m in slim.modules())
    assert slim[1].momentum == module[1].momentum
    with torch.inference_mode():
        maps = [slim[0](batch).double().movedim(1, 0).flatten(1).numpy() for batch in calibration().inputs]
    want = np.mean([m.mean(axis=1) for m in maps], axis=0), np.mean([m.var(axis=1, ddof=1) for m in maps], axis=0)
    np.testing.assert_allclose(slim[1].running_mean.numpy(), want[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(slim[1].running_var.numpy(), want[1], rtol=1e-4)
    assert not torch.allclose(slim[4].running_mean, module[4].running_mean)


def test_recalibration_refuses_a_single_value_a_channel() -> None:
    module, network = plain(*conv_bn(3, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 2))
    with pytest.raises(UnsupportedError, match="larger calibration batches"):
        prune(module, network, "0", calibration(1, 1), width=4, recalibrate=True)


# ---------------------------------------------------------------- edges


EVERYTHING = {"repair": "least_squares", "recalibrate": True}


@pytest.mark.parametrize("name", CRITERIA)
def test_a_group_can_shrink_to_one_channel_and_no_further(name: str) -> None:
    module, network = traced("resnet")
    slim = prune(module, network, "0.0", calibration(), width=1, criterion=name, **EVERYTHING)
    assert slim[0][0].weight.shape[0] == 1
    assert torch.isfinite(slim(example())).all()
    again = trace(slim, example())
    with pytest.raises(UnsupportedError, match="one channel only"):
        prune(slim, again, "0.0", calibration(), width=1, criterion=name)
    whole = prune(module, network, "0.0", calibration(), width=8, criterion=name, repair="least_squares")
    assert_same(whole, module)


@pytest.mark.parametrize("name", CRITERIA)
def test_frozen_parameters_stay_frozen_and_tied_ones_tied(name: str) -> None:
    module, network = traced("shared")
    module = copy.deepcopy(module)
    module.layer.weight.requires_grad_(False)
    slim = prune(module, network, "stem.0", calibration(), width=5, criterion=name, **EVERYTHING)
    assert {n: p.requires_grad for n, p in slim.named_parameters()} == {
        n: p.requires_grad for n, p in module.named_parameters()
    }
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["layer.weight"]
    assert slim.layer.weight is slim.tied.weight
    assert slim.layer.weight.shape == (5, 5, 3, 3)
    assert torch.isfinite(slim(example())).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CRITERIA)
def test_half_precision_is_computed_in_float32_and_cast_back(name: str, kind: torch.dtype) -> None:
    module, network = traced("resnet")
    low = copy.deepcopy(module).to(kind)
    rounded = copy.deepcopy(low).float()
    wish = {"width": 5, "criterion": name, **EVERYTHING}
    slim, exact = (
        prune(low, network, "0.0", calibration(), **wish),
        prune(rounded, network, "0.0", calibration(), **wish),
    )
    for key, value in exact.state_dict().items():
        found = slim.state_dict()[key]
        assert found.dtype == (kind if value.is_floating_point() else value.dtype)
        torch.testing.assert_close(found, value.to(found.dtype), rtol=0.03, atol=0.03, msg=key)


@pytest.mark.parametrize("name", CRITERIA)
def test_weights_and_inputs_that_are_not_finite_are_refused(name: str) -> None:
    module, network = traced("resnet")
    for parameter in ("0.0.weight", "1.first.0.weight", "0.1.bias"):  # producer, reader, batch norm
        broken = copy.deepcopy(module)
        with torch.no_grad():
            broken.get_parameter(parameter).view(-1)[1] = math.nan
        with pytest.raises(BadInputError, match=f"{parameter} holds values that are not finite"):
            prune(broken, network, "0.0", calibration(), width=4, criterion=name)
    if name in MEASURING:
        with pytest.raises(BadInputError, match="calibration inputs hold values"):
            prune(
                module,
                network,
                "0.0",
                Calibration((torch.full((2, 3, SIDE, SIDE), math.inf),)),
                width=4,
                criterion=name,
            )


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("images", ["one", "constant", "black"])
def test_poor_calibration_inputs_do_no_harm(name: str, images: str) -> None:
    inputs = {"one": noise(1), "constant": torch.full((4, 3, SIDE, SIDE), 0.4), "black": torch.zeros(2, 3, SIDE, SIDE)}
    module, network = traced("resnet")
    wish = {"width": 6, "criterion": name}
    data = Calibration((inputs[images],))
    repaired = prune(module, network, "0.0", data, repair="least_squares", **wish)
    if name not in ("lasso", "reconstruction"):  # these are always repaired
        bare = prune(module, network, "0.0", data, **wish)
        assert error(module, repaired, data.inputs[0]) <= 1.01 * error(module, bare, data.inputs[0])
    other = noise(8, seed=4)
    with torch.inference_mode():  # what the inputs leave open stays near the old weights
        assert float(repaired(other).abs().max()) < 5 * float(module(other).abs().max())
    fresh = prune(module, network, "0.0", data, **wish, **EVERYTHING)
    assert all(bool(tensor.isfinite().all()) for tensor in fresh.state_dict().values())


def test_channels_that_do_not_vary_keep_their_statistics() -> None:
    module, network = plain(*conv_bn(3, 6, 1), nn.Conv2d(6, 2, 1))
    slim = prune(module, network, "0", Calibration((torch.full((4, 3, SIDE, SIDE), 0.4),)), width=4, recalibrate=True)
    bare = prune(module, network, "0", width=4)
    assert torch.equal(slim[1].running_var, bare[1].running_var)
    assert torch.equal(slim[1].running_mean, bare[1].running_mean)


def test_a_reader_that_is_too_wide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module, network = traced("vgg")  # the linear layer reads 12 x 16 values
    monkeypatch.setattr("mobilekit.transforms._criteria.calls.MOST_COLUMNS", 191)
    with pytest.raises(UnsupportedError, match="it reads 192 values at once, and 191 are the most"):
        prune(module, network, "features.3", calibration(), width=6, criterion="reconstruction")


def test_inputs_that_do_not_fit_the_model_are_refused() -> None:
    module, network = traced("resnet")
    with pytest.raises(BadInputError, match="the model fails on the calibration inputs"):
        prune(module, network, "0.0", Calibration((torch.zeros(2, 5, SIDE, SIDE),)), width=4, criterion="apoz")


# ---------------------------------------------------------------- iterative pruning


def schedule(floor: float, limits: Limits, tolerance: float = 0.01) -> Pruned[float]:
    """A network that is its own size: the score is 0.9 down to the floor, then falls."""
    return prune_iteratively(
        1.0,
        step=lambda size, amount: size - amount,
        tune=lambda size: size,
        judge=lambda size: 0.9 - max(0.0, floor - size),
        tolerance=tolerance,
        limits=limits,
    )


def test_steps_back_off_until_the_smallest_one_fails() -> None:
    found = schedule(0.4, Limits(first=0.25, smallest=0.04, attempts=50))
    assert [a.accepted for a in found.history] == [True, True, False, False, True, False]
    assert [a.amount for a in found.history] == [0.25, 0.25, 0.25, 0.125, 0.0625, 0.0625]
    assert found.best == pytest.approx(0.4375)
    assert (found.score, found.reference) == (0.9, 0.9)
    assert "smallest" in found.stopped
    assert all("the score is" in attempt.reason for attempt in found.history)


@given(
    floor=st.floats(-0.5, 1.1), first=st.floats(0.05, 0.6), back_off=st.floats(0.1, 0.9), tolerance=st.floats(0, 0.2)
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_best_is_within_tolerance_and_nothing_smaller_was_left_untried(
    floor: float, first: float, back_off: float, tolerance: float
) -> None:
    limits = Limits(first, smallest=0.04, back_off=back_off, attempts=60)
    found = schedule(floor, limits, tolerance)
    assert found.score >= found.reference - tolerance
    assert found.best == pytest.approx(1.0 - sum(a.amount for a in found.history if a.accepted))
    assert len(found.history) <= 60
    if len(found.history) < 60:
        last = next((a.amount for a in reversed(found.history) if not a.accepted), math.inf)
        assert last * back_off < 0.04
    amounts = [a.amount for a in found.history]
    assert amounts == sorted(amounts, reverse=True)


def test_a_refused_step_is_tried_smaller_and_a_score_that_is_no_number_is_rejected() -> None:
    def step(size: int, amount: float) -> int:
        if amount > 2:
            raise UnsupportedError("too far at once")
        return size - round(amount)

    found = prune_iteratively(
        10, step, lambda s: s, lambda s: math.nan if s < 7 else 1.0, 0.0, Limits(4, 1, attempts=9)
    )
    assert [(a.amount, a.accepted) for a in found.history] == [(4, False), (2, True), (2, False), (1, True), (1, False)]
    assert (found.history[0].score, found.history[0].reason) == (None, "too far at once")
    assert found.best == 7
    assert prune_iteratively(10, step, lambda s: s, float, 99, Limits(2, 1, attempts=3)).stopped.startswith("all 3")


@pytest.mark.parametrize(
    ("tolerance", "limits"),
    [(-1, Limits(1, 0.1)), (math.nan, Limits(1, 0.1)), (0, Limits(0.1, 1)), (0, Limits(1, 0)), (0, Limits(1, 0.1, 1.0)),
     (0, Limits(1, 0.1, 0.5, 0)), (0, Limits(math.inf, 1))],
)  # fmt: skip
def test_limits_that_make_no_sense_are_refused(tolerance: float, limits: Limits) -> None:
    with pytest.raises(BadInputError, match=r"\w+ .* \w+"):
        prune_iteratively(1.0, lambda s, a: s - a, lambda s: s, lambda s: s, tolerance, limits)
    with pytest.raises(BadInputError, match="nothing can be compared"):
        prune_iteratively(1.0, lambda s, a: s - a, lambda s: s, lambda s: math.nan, 0.0, Limits(1, 0.1))


def test_the_schedule_prunes_a_tiny_trained_network() -> None:
    images = noise(96, seed=5)
    labels = (images.mean(dim=(2, 3)).argmax(dim=1)).long()
    module, network = plain(*conv_bn(3, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))

    def tune(candidate: Candidate, steps: int = 40) -> Candidate:
        student = copy.deepcopy(candidate.module)
        optimiser = torch.optim.Adam(student.parameters(), lr=0.02)
        for _ in range(steps):
            optimiser.zero_grad()
            F.cross_entropy(student(images), labels).backward()
            optimiser.step()
        return Candidate(student, candidate.example_input, candidate.network, history=candidate.history)

    def step(candidate: Candidate, amount: float) -> Candidate:
        width = candidate.network.groups["0"].width - round(amount)
        return ChannelPruning().apply(
            candidate, Option(transform="channel_pruning", where="0", settings={"width": width})
        )

    def judge(candidate: Candidate) -> float:
        with torch.inference_mode():
            return float((candidate.module(images).argmax(dim=1) == labels).float().mean())

    start = tune(Candidate(module, example(), network), steps=150)
    found = prune_iteratively(start, step, tune, judge, 0.02, Limits(first=4, smallest=1, attempts=12))
    assert found.reference > 0.9
    assert judge(found.best) == found.score >= found.reference - 0.02
    accepted = [round(a.amount) for a in found.history if a.accepted]
    assert found.best.network.groups["0"].width == 12 - sum(accepted) < 12
    assert len(found.best.history) == len(accepted)
    assert any(not a.accepted for a in found.history)  # in the end it cannot go on
