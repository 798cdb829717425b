"""What int8 files hold: channels smoothed along streams, and weights whose rounding errors make up for each other."""

from __future__ import annotations

import copy

import networks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mobilekit.errors import UnsupportedError
from mobilekit.network import trace
from mobilekit.network.folding import fold_batch_norms
from mobilekit.network.grids import int8_rounded, int8_scales
from mobilekit.transforms._quantisation import compensation, rounded_for_file
from mobilekit.transforms._quantisation.compensation import round_with_compensation
from mobilekit.transforms._quantisation.smoothing import smooth, streams
from mobilekit.transforms.int8 import Int8, for_file, layers_in_int8
from mobilekit.types import Calibration, Candidate, Network, Option


def images(count: int, seed: int, side: int = networks.SIDE) -> torch.Tensor:
    """Smooth pictures: neighbouring positions are alike, as in photographs."""
    coarse = torch.randn((count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


def folded(name: str) -> tuple[nn.Module, Network]:
    """A network without the batch norms that exporters fold."""
    module = networks.build(name)
    network = trace(module, networks.example())
    return fold_batch_norms(module, network), network


def outputs(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x)


def error(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Squared error without what shifts a channel's mean, which biases take off."""
    difference = found - wanted
    return float((difference - difference.mean(dim=0, keepdim=True)).square().mean())


# ---------------------------------------------------------------- compensation


def test_errors_make_up_for_each_other_where_inputs_go_together() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 32))
    few = torch.randn(2000, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(2000, 64)
    network = trace(layer, few[:1])
    rounded = round_with_compensation(layer, network, few)
    nearest = copy.deepcopy(layer)
    nearest[0].weight.data = int8_rounded(nearest[0].weight.data, 0)
    wanted = outputs(layer, few)
    assert error(wanted, outputs(rounded, few)) < 0.2 * error(wanted, outputs(nearest, few))


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "densenet"])
def test_weights_lie_on_the_grid_that_exporters_find_and_lose_less_on_other_inputs(name: str) -> None:
    module, network = folded(name)
    rounded = round_with_compensation(module, network, images(64, 10))
    nearest = copy.deepcopy(module)
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            found = rounded.get_submodule(path).weight
            assert torch.allclose(int8_scales(found, 0), int8_scales(layer.weight, 0))
            assert torch.allclose(int8_rounded(found, 0), found, atol=1e-6)
            nearest.get_submodule(path).weight.data = int8_rounded(layer.weight.data, 0)
    test = images(64, 11)
    wanted = outputs(module, test)
    assert error(wanted, outputs(rounded, test)) < 0.8 * error(wanted, outputs(nearest, test))


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
)
def test_no_channel_loses_more_than_by_rounding_to_the_nearest(
    kernel: int, stride: int, dilation: int, groups: int, padding: int | str, mode: str
) -> None:
    """With all positions looked at: windows are those that the convolution itself sees."""
    if padding == "same":
        stride = 1
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, padding_mode=mode)
    inputs = torch.rand(3, 4, 9, 9)
    network = trace(nn.Sequential(layer), inputs[:1])
    rounded = round_with_compensation(nn.Sequential(layer), network, inputs)[0]
    nearest = copy.deepcopy(layer)
    nearest.weight.data = int8_rounded(nearest.weight.data, 0)
    wanted = outputs(layer, inputs)

    def lost(each: nn.Module) -> torch.Tensor:
        difference = (outputs(each, inputs) - wanted).transpose(0, 1).flatten(1)
        return difference.var(dim=1)

    assert bool((lost(rounded) <= lost(nearest) * (1 + 1e-3) + 1e-12).all())


def test_layers_with_many_weights_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(50, 10))
    few = torch.randn(400, 5) @ torch.randn(5, 50)
    network, wanted = trace(layer, few[:1]), outputs(layer, few)
    whole = error(wanted, outputs(round_with_compensation(layer, network, few), few))
    monkeypatch.setattr(compensation, "FEATURES", 20)
    parts = error(wanted, outputs(round_with_compensation(layer, network, few), few))
    layer[0].weight.data = int8_rounded(layer[0].weight.data, 0)
    assert whole < parts < error(wanted, outputs(layer, few))


def test_dead_inputs_and_dead_channels_are_survived() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4))
    layer[0].weight.data[1] = 0
    layer[0].bias.data[1] = -1
    inputs = images(4, 0)
    rounded = round_with_compensation(layer, trace(layer, inputs[:1]), inputs)
    assert all(bool(p.isfinite().all()) for p in rounded.parameters())
    assert torch.equal(rounded[0].weight[1], torch.zeros_like(rounded[0].weight[1]))


# ---------------------------------------------------------------- streams


class Residual(nn.Module):
    """A stream of two writers and two readers; its channels have very different ranges."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner, self.back = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            loud = torch.logspace(0, 2, 8)
            for writer in (self.stem, self.back):
                writer.weight *= loud[:, None, None, None]
                writer.bias *= loud
            self.inner.weight /= loud[None, :, None, None]
            self.head.weight /= loud

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.back(torch.relu(self.inner(x)))
        return self.head(torch.relu(x).mean((2, 3)))


def test_a_residual_stream_is_scaled_as_a_whole() -> None:
    module, inputs = Residual(), images(8, 0)
    network = trace(module, inputs[:1])
    (stem, inner, head) = streams(module, network)
    assert set(stem.writers) == {"stem", "back"}
    assert {r.layer for r in stem.readers} == {"inner", "head"}
    assert (inner.writers, [r.layer for r in inner.readers]) == (["inner"], ["back"])
    assert head.reason == "the output reads it"
    smoothed = smooth(module, network, [inputs])
    assert torch.allclose(outputs(module, inputs), outputs(smoothed, inputs), rtol=1e-4, atol=1e-4)

    def spread(each: nn.Module) -> float:
        peaks = outputs(each.stem, inputs).abs().amax((0, 2, 3))
        return float(peaks.max() / peaks.min())

    assert spread(smoothed) < 2 * spread(module) ** 0.5


def test_layers_that_are_to_be_left_keep_their_streams() -> None:
    module, inputs = Residual(), images(8, 0)
    smoothed = smooth(module, trace(module, inputs[:1]), [inputs], left=["head"])
    assert torch.equal(smoothed.stem.weight, module.stem.weight)
    assert not torch.equal(smoothed.inner.bias, module.inner.bias)


@pytest.mark.parametrize("name", sorted(networks.NETWORKS))
def test_smoothing_changes_no_output(name: str) -> None:
    module, network = folded(name)
    inputs = images(1, 3)
    wanted, found = outputs(module, inputs), outputs(smooth(module, network, [inputs]), inputs)
    assert torch.allclose(wanted, found, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_a_bound_keeps_channels_from_being_scaled() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 1))
    example = torch.zeros(1, 3, 8, 8)
    assert [stream.reason is None for stream in streams(layers, trace(layers, example))] == [False, False, False]


# ---------------------------------------------------------------- together


def quantised(module: nn.Module, inputs: torch.Tensor) -> Candidate:
    start = Candidate(module, inputs[:1], trace(module, inputs[:1]))
    return Int8().apply(start, Option(transform="int8", where="network", settings={"calibration": "min-max"}))


def test_files_lose_less_than_by_rounding_to_the_nearest() -> None:
    module, inputs = Residual(), images(32, 0)
    start = quantised(module, inputs)
    ready = for_file(start, Calibration((inputs,)))
    nearest = copy.deepcopy(module)
    for layer in (nearest.stem, nearest.inner, nearest.back, nearest.head):
        layer.weight.data = int8_rounded(layer.weight.data, 0)
    test = images(32, 1)
    wanted = outputs(module, test)
    lost = [float((outputs(each, test) - wanted).square().mean()) for each in (nearest, ready.module)]
    assert lost[1] < 0.1 * lost[0]
    assert torch.equal(start.module.stem.weight, Residual().stem.weight)


def test_what_is_on_its_grid_stays_as_it_was_trained() -> None:
    module, inputs = Residual(), images(8, 0)
    start = quantised(module, inputs)
    once = for_file(start, Calibration((inputs,)))
    again = rounded_for_file(once.module, once.network, Calibration((inputs,)), layers_in_int8(start))
    for one, other in zip(once.module.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_prepared_module_is_the_callers_own() -> None:
    module, inputs = Residual(), images(8, 0)
    start, calibration = quantised(module, inputs), Calibration((inputs,))
    first = for_file(start, calibration).module
    kept = first.stem.weight.detach().clone()
    with torch.no_grad():
        first.stem.weight.zero_()
    assert torch.equal(for_file(start, calibration).module.stem.weight, kept)
    with torch.no_grad():
        module.stem.weight *= 2
    assert not torch.equal(for_file(quantised(module, inputs), calibration).module.stem.weight, kept)


def test_outputs_that_change_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = Residual(), images(4, 0)
    network = trace(module, inputs[:1])
    monkeypatch.setattr("mobilekit.transforms._quantisation.smoothing.multiply", lambda *_: None)
    with pytest.raises(UnsupportedError, match="channels cannot be scaled"):
        smooth(module, network, [inputs])
    ready = rounded_for_file(module, network, Calibration((inputs,)), {"stem"})
    assert outputs(ready, inputs).isfinite().all()
