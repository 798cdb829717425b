"""Block-circulant layers: the nearest ones, stored as their vectors, as predicted, and never offered."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SLOW_TO_TRACE, build, conv_bn, example, headed
from test_rewrite import PIECES, of_pieces
from torch import nn

from mobilekit import registry
from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.network import trace
from mobilekit.transforms.block_circulant import BlockCirculant, dense, stored
from mobilekit.types import Candidate, ExportJob, Network, Option, QuantSpec, RuntimeEntry

ENTRY = RuntimeEntry(name="onnx", precisions=("fp32", "int8"), channel_multiple=1)
VERDICT = "saves bytes but no time"


def option(where: str, block: Any) -> Option:
    return Option(transform="block_circulant", where=where, settings={"block": block})


def candidate(module: nn.Module, x: torch.Tensor | None = None) -> Candidate:
    x = example() if x is None else x
    return Candidate(module=module.eval(), example_input=x, network=trace(module, x))


@functools.cache
def start(name: str) -> Candidate:
    return candidate(build(name))


def linear(inputs: int, outputs: int, bias: bool = True) -> Candidate:
    """A linear layer between two others, on vectors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = nn.Sequential(nn.Linear(6, inputs), nn.ReLU(), nn.Linear(inputs, outputs, bias), nn.Linear(outputs, 3))
    return candidate(layers, torch.randn(1, 6, generator=torch.Generator().manual_seed(2)))


def suitable(network: Network) -> list[str]:
    return [where for where, reason in BlockCirculant().refusals(network, ENTRY).items() if VERDICT in reason]


def projected(weight: np.ndarray, block: int) -> np.ndarray:
    """The nearest block-circulant matrix, by loops over blocks and their wrapped diagonals."""
    found = np.empty_like(weight)
    for top in range(0, weight.shape[0], block):
        for left in range(0, weight.shape[1], block):
            part = weight[top : top + block, left : left + block]
            for diagonal in range(block):
                places = [(i, j) for i, j in np.ndindex(*part.shape) if (j - i) % block == diagonal]
                if places:
                    mean = sum(part[place] for place in places) / len(places)
                    for i, j in places:
                        found[top + i, left + j] = mean
    return found


# ---------------------------------------------------------------- the projection


@settings(max_examples=10, deadline=None, derandomize=True)
@given(inputs=st.integers(2, 13), outputs=st.integers(2, 13), block=st.integers(2, 13))
def test_the_weight_is_the_nearest_block_circulant_one(inputs: int, outputs: int, block: int) -> None:
    given_ = linear_cached(inputs, outputs)
    if block > max(inputs, outputs):
        with pytest.raises(UnsupportedError, match="cannot be made block-circulant"):
            BlockCirculant().predict(given_.network, option("2", block))
        return
    layer = BlockCirculant().apply(given_, option("2", block)).module.get_submodule("2")
    want = projected(given_.module.get_parameter("2.weight").detach().double().numpy(), block)
    np.testing.assert_allclose(layer.weight.detach().numpy(), want, atol=1e-6)  # type: ignore[union-attr]
    vectors = layer.get_parameter("parametrizations.weight.original")
    assert vectors.shape == (-(-outputs // block), -(-inputs // block), block)
    assert vectors.numel() == stored(outputs, inputs, block) < inputs * outputs


@functools.cache
def linear_cached(inputs: int, outputs: int) -> Candidate:
    return linear(inputs, outputs)


def test_no_other_circulant_matrix_is_nearer() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 4))
    shifts = np.stack([np.roll(np.eye(4), k, axis=1).ravel() for k in range(4)], axis=1)  # a basis of the circulants
    best = shifts @ np.linalg.lstsq(shifts, weight.ravel(), rcond=None)[0]
    np.testing.assert_allclose(projected(weight, 4).ravel(), best, atol=1e-12)


def test_a_circulant_matrix_stays_as_it_is_and_the_output_too() -> None:
    before = linear(8, 8)
    with torch.no_grad():
        row = torch.randn(8, generator=torch.Generator().manual_seed(3))
        before.module.get_parameter("2.weight").copy_(torch.stack([row.roll(i) for i in range(8)]))
    after = BlockCirculant().apply(before, option("2", 8))
    torch.testing.assert_close(after.module.get_submodule("2").weight, before.module.get_parameter("2.weight"))
    torch.testing.assert_close(after.module(before.example_input), before.module(before.example_input))


def test_only_the_vectors_are_parameters_and_gradients_reach_them() -> None:
    after = BlockCirculant().apply(linear(16, 16), option("2", 4)).module
    names = {name for name, _ in after.named_parameters() if name.startswith("2.")}
    assert names == {"2.parametrizations.weight.original", "2.bias"}
    assert after.state_dict()["2.parametrizations.weight.original"].numel() == 64
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(4))
    optimiser = torch.optim.SGD(after.parameters(), 0.05)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (after(inputs) - 1).square().mean()
        loss.backward()
        gradient = after.get_parameter("2.parametrizations.weight.original").grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    weight = after.get_submodule("2").weight.detach().double().numpy()  # type: ignore[union-attr,operator]
    np.testing.assert_allclose(projected(weight, 4), weight, atol=1e-6)


# ---------------------------------------------------------------- the network


def assert_as_predicted(before: Candidate, chosen: Option) -> Candidate:
    after = BlockCirculant().apply(before, chosen)
    predicted = BlockCirculant().predict(before.network, chosen)
    found = trace(after.module, before.example_input, before.network.name)
    assert after.network == predicted
    assert predicted.operators == found.operators
    assert list(predicted.groups.items()) == list(found.groups.items())
    assert predicted.axes == found.axes
    with torch.inference_mode():
        assert torch.isfinite(after.module(before.example_input)).all()
    return after


HARD = (
    "efficientnet",
    "odds",
    "shared",
    "shufflenet_v1",
    "shufflenet_v2",
    "squeeze_linear",
    "squeezenet",
    "unet",
    "watched",
)


@pytest.mark.parametrize("name", HARD)
def test_the_last_place_of_a_network_comes_out_as_predicted(name: str) -> None:
    places = suitable(start(name).network)
    if not places:
        pytest.skip("no linear layer or pointwise convolution of its own")
    assert_as_predicted(start(name), option(places[-1], 2))


@SLOW_TO_TRACE
@given(kinds=st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), data=st.data())
def test_two_layers_in_random_networks_come_out_as_predicted(kinds: list[str], data: st.DataObject) -> None:
    current = candidate(of_pieces(kinds))
    for _ in range(2):
        places = suitable(current.network)
        if places:
            current = assert_as_predicted(current, option(data.draw(st.sampled_from(places)), data.draw(BLOCKS)))


BLOCKS = st.sampled_from([2, 3, 4])


def test_channels_around_the_layer_are_fixed_and_others_can_still_be_pruned() -> None:
    before = candidate(headed(conv_bn(3, 8), conv_bn(8, 12, 1), conv_bn(12, 10), width=10))
    after = assert_as_predicted(before, option("1.0", 4))
    reasons = {name: group.refused for name, group in after.network.groups.items() if group.width in (8, 12)}
    assert len(reasons) == 2
    assert all(reason is not None and "weights that are computed" in reason for reason in reasons.values())
    wish = Option(transform="channel_pruning", where="2.0", settings={"width": 5})
    slim = registry.transform("channel_pruning").apply(after, wish)
    assert trace(slim.module, example()).operators == slim.network.operators


def test_precisions_and_the_history_follow() -> None:
    before = start("mobilenet_v2")
    quantised = dict.fromkeys([operator.name for operator in before.network.operators], "int8")
    network = before.network.with_precisions(quantised)  # type: ignore[arg-type]
    spec = QuantSpec(operators=network.precisions)
    with_spec = Candidate(before.module, before.example_input, network, quant=spec)
    after = BlockCirculant().apply(with_spec, option("3.0", 2))
    assert after.quant is not None
    assert after.quant.operators == after.network.precisions
    assert set(after.network.precisions) == {operator.name for operator in after.network.operators}
    assert after.history == (option("3.0", 2),)


# ---------------------------------------------------------------- what it is good for


def test_nothing_is_offered_and_every_layer_has_a_verdict() -> None:
    for name in ("mobilenet_v2", "vgg", "unet"):
        network = start(name).network
        assert BlockCirculant().options(network, ENTRY) == []
        weighted = {o.module for o in network.operators if o.kind in ("conv", "linear", "conv_transpose")}
        assert set(BlockCirculant().refusals(network, ENTRY)) == weighted
    assert suitable(start("vgg").network) == ["classifier.0", "classifier.3"]
    bare = trace(nn.Sequential(nn.ReLU()), example())
    assert BlockCirculant().refusals(bare, ENTRY) == {"network": "it has no layer with weights"}


def test_the_onnx_file_holds_the_vectors_of_a_large_layer(tmp_path: Path) -> None:
    before = candidate(nn.Sequential(nn.Flatten(), nn.Linear(768, 256), nn.ReLU(), nn.Linear(256, 5)))
    after = BlockCirculant().apply(before, option("1", 16))
    runtime, sizes = registry.runtime("onnx"), []
    for name, each in (("before", before), ("after", after)):
        path = tmp_path / f"{name}.onnx"
        runtime.export(ExportJob(candidate=each, precision="fp32", path=str(path)))
        sizes.append(path.stat().st_size)
        found = runtime.open(path)([example().numpy()])[0]
        np.testing.assert_allclose(found, each.module(example()).detach().numpy(), atol=1e-4)
    assert sizes[0] - sizes[1] > 0.95 * 4 * (768 * 256 - stored(256, 768, 16))


def test_a_dense_copy_has_plain_layers_again_and_the_given_one_stays_circulant() -> None:
    before = linear(8, 8)
    after = BlockCirculant().apply(before, option("2", 4)).module
    plain = dense(after)
    x = before.example_input
    torch.testing.assert_close(plain(x), after(x))
    assert repr(plain) == repr(before.module)
    assert plain.get_parameter("2.weight").shape == (8, 8)
    assert "2.parametrizations.weight.original" in dict(after.named_parameters())
    torch.testing.assert_close(dense(before.module)(x), before.module(x))
    flat = trace(plain, x)
    assert flat.groups == before.network.groups


def test_the_verdict_for_tflite_says_that_it_gets_slower() -> None:
    network = start("vgg").network
    tflite = ENTRY.model_copy(update={"name": "tflite"})
    assert "in every inference" in BlockCirculant().refusals(network, tflite)["classifier.0"]
    assert "in every inference" not in BlockCirculant().refusals(network, ENTRY)["classifier.0"]


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("block", [0, 1, -2, True, None, 2.0, "4", 17, 10**6])
def test_blocks_that_are_none_are_refused(block: Any) -> None:
    before = linear_cached(8, 16)
    for call in (lambda o: BlockCirculant().predict(before.network, o), lambda o: BlockCirculant().apply(before, o)):
        with pytest.raises(UnsupportedError, match="blocks can have 2 to 16 rows"):
            call(option("2", block))


@pytest.mark.parametrize(
    ("name", "chosen", "reason"),
    [
        ("vgg", option("features.0", 2), "only linear layers and pointwise convolutions are suitable"),
        ("vgg", option("nowhere", 2), "no such layer"),
        ("vgg", Option(transform="low_rank", where="classifier.0", settings={"block": 2}), "an option of low_rank"),
        ("vgg", Option(transform="block_circulant", where="classifier.0", settings={"size": 2}), "no setting 'size'"),
        ("shared", option("layer", 2), "used 2 times|also reads|used 3 times|cannot be replaced"),
        ("unet", option("up", 2), "cannot be replaced"),
        ("by_hand", option("map", 2), "one row or one column only"),
        ("mobilenet_v2", option("1.layers.3", 2), "only linear|groups"),
    ],
)
def test_what_cannot_be_done_is_said(name: str, chosen: Option, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        BlockCirculant().predict(start(name).network, chosen)
    with pytest.raises(UnsupportedError, match=reason):
        BlockCirculant().apply(start(name), chosen)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_frozen_weights_and_the_given_module_are_kept(dtype: torch.dtype) -> None:
    before = linear(8, 8)
    module = copy.deepcopy(before.module).to(dtype)
    module.get_parameter("2.weight").requires_grad_(False)
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    given_ = Candidate(module, before.example_input.to(dtype), before.network)
    after = BlockCirculant().apply(given_, option("2", 4)).module
    weight = after.get_submodule("2").weight
    assert isinstance(weight, torch.Tensor)
    assert weight.dtype == dtype
    assert not after.get_parameter("2.parametrizations.weight.original").requires_grad
    assert after.get_parameter("0.weight").requires_grad
    want = projected(kept["2.weight"].double().numpy(), 4)
    np.testing.assert_allclose(weight.detach().double().numpy(), want, rtol=1e-2, atol=1e-3)
    assert all(torch.equal(kept[name], tensor) for name, tensor in module.state_dict().items())


def test_weights_that_are_not_finite_and_layers_that_are_watched_are_refused() -> None:
    before = linear(8, 8)
    with torch.no_grad():
        before.module.get_parameter("2.weight")[0, 0] = math.nan
    with pytest.raises(BadInputError, match="not finite"):
        BlockCirculant().apply(before, option("2", 4))
    watched = linear(8, 8)
    watched.module.get_submodule("2").register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="hooks"):
        BlockCirculant().apply(watched, option("2", 4))
    twice = linear(8, 8)
    done = BlockCirculant().apply(twice, option("2", 4))
    with pytest.raises(UnsupportedError, match=r"cannot be replaced: \w+"):
        BlockCirculant().apply(done, option("2", 2))
