"""Weights of few bits, simulated, and quantisation-aware training of int8 and fewer bits."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import build, conv_bn, example, headed, settled
from torch import nn
from torch.nn.utils import parametrize

from mobilekit import registry
from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.network import trace
from mobilekit.network.folding import fold_batch_norms, foldable, unfolded
from mobilekit.network.grids import Grid, int8_rounded, snapped
from mobilekit.packing import pack
from mobilekit.training import quantisation_aware
from mobilekit.training.quantisation_aware import Rounding, fake_quantised
from mobilekit.types import Calibration, Candidate, ExportJob, Option, RuntimeEntry

LOW_BIT = registry.transform("low_bit")
ENTRY = RuntimeEntry(name="onnx", precisions=("fp32", "int8"), channel_multiple=1)
LAYERS = (nn.Conv2d, nn.Linear)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CALIBRATION = Calibration(inputs=(numbers(8, 3, 16, 16), numbers(8, 3, 16, 16, seed=1)))


def option(where: str = "network", **wanted: Any) -> Option:
    return Option(transform="low_bit", where=where, settings=wanted)


def small() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (conv_bn(3, 8, stride=2), conv_bn(8, 8, groups=8), conv_bn(8, 12, 1))
        return settled(headed(*layers, width=12))


@functools.cache
def start() -> Candidate:
    module = small()
    return Candidate(module=module, example_input=example(), network=trace(module, example()))


def values(weight: torch.Tensor) -> list[int]:
    """Distinct values of each output channel."""
    return [len(torch.unique(row)) for row in weight.detach().flatten(1)]


# ---------------------------------------------------------------- grids


def test_ternary_is_that_of_the_paper() -> None:
    weight = numbers(5, 4, 3, 3)
    rows = weight.numpy().reshape(5, -1)
    wanted = np.zeros_like(rows)
    for row, found in zip(rows, wanted, strict=True):
        kept = np.abs(row) > 0.7 * np.abs(row).mean()
        found[kept] = np.sign(row[kept]) * np.abs(row[kept]).mean()
    np.testing.assert_allclose(snapped(weight, 0, "ternary").numpy().reshape(5, -1), wanted, rtol=1e-5)


def test_binary_is_the_sign_times_the_mean_magnitude() -> None:
    weight = numbers(6, 3, 3, 3)
    weight[0, 0, 0, 0] = 0  # counts as positive
    rows = weight.numpy().reshape(6, -1)
    wanted = np.where(rows >= 0, 1, -1) * np.abs(rows).mean(1, keepdims=True)
    np.testing.assert_allclose(snapped(weight, 0, "binary").numpy().reshape(6, -1), wanted, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_k_bits_have_nearly_the_least_squared_error_of_all_scales(bits: int) -> None:
    weight, steps = numbers(4, 90), 2 ** (bits - 1) - 1
    found = snapped(weight, 0, bits)
    for row, ours in zip(weight.double().numpy(), found.double().numpy(), strict=True):
        scales = np.abs(row).max() / steps * np.linspace(0.02, 1.2, 4000)[:, None]
        errors = ((np.clip(np.rint(row / scales), -steps, steps) * scales - row) ** 2).sum(1)
        found_error, plain = (
            ((ours - row) ** 2).sum(),
            errors[np.abs(scales[:, 0] * steps / np.abs(row).max() - 1).argmin()],
        )
        assert found_error <= errors.min() * (1.02 if bits <= 4 else 1.25)
        assert found_error <= plain * 1.001
        assert len(np.unique(ours)) <= 2 * steps + 1


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    dim=st.integers(0, 1),
    grid=st.sampled_from([2, 3, 5, 8, "ternary", "binary"]),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_grids_keep_the_shape_and_follow_the_scale(
    shape: tuple[int, ...], dim: int, grid: Grid, seed: int, size: float
) -> None:
    weight = numbers(*shape, seed=seed).double()
    found = snapped(weight, dim, grid)
    assert found.shape == weight.shape
    torch.testing.assert_close(snapped(weight * size, dim, grid), found * size, rtol=1e-6, atol=0)
    most = {"ternary": 3, "binary": 2}.get(str(grid)) or 2 ** int(grid)
    assert all(count <= most for count in values(found.movedim(dim, 0)))
    assert float((found - weight).square().sum()) <= float(weight.square().sum()) + 1e-12  # never worse than zeros


@pytest.mark.parametrize("grid", [2, 8, "ternary", "binary"])
def test_channels_of_zeros_stay_zero(grid: Grid) -> None:
    weight = numbers(3, 4)
    weight[1] = 0
    found = snapped(weight, 0, grid)
    assert torch.equal(found[1], torch.zeros(4))
    assert torch.isfinite(found).all()
    assert torch.equal(int8_rounded(weight, 0)[1], torch.zeros(4))


# ---------------------------------------------------------------- the lever


def test_nothing_is_offered_and_every_layer_has_the_reason() -> None:
    assert LOW_BIT.options(start().network, ENTRY) == []
    refused = LOW_BIT.refusals(start().network, ENTRY)
    assert set(refused) == {"network", "0.0", "1.0", "2.0", "3.classifier"}
    assert all("no runtime here executes" in reason for reason in refused.values())


@pytest.mark.parametrize(("bits", "most"), [(2, 3), (4, 15), (8, 255), ("ternary", 3), ("binary", 2)])
def test_inner_layers_get_few_values_and_the_ends_stay(bits: object, most: int) -> None:
    before = {name: value.clone() for name, value in start().module.state_dict().items()}
    result = LOW_BIT.apply(start(), option(bits=bits))
    assert result.network == LOW_BIT.predict(start().network, option(bits=bits)) == start().network
    assert result.history == (option(bits=bits),)
    after = result.module.state_dict()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == {
        "1.0.weight",
        "2.0.weight",
    }
    assert max(values(after["1.0.weight"]) + values(after["2.0.weight"])) <= most
    assert all(torch.equal(before[name], value) for name, value in start().module.state_dict().items())


def test_ends_and_named_layers() -> None:
    whole = LOW_BIT.apply(start(), option(bits="binary", ends=True)).module
    assert all(max(values(layer.weight)) <= 2 for layer in whole.modules() if isinstance(layer, LAYERS))
    one = LOW_BIT.apply(start(), option("3.classifier", bits=2)).module
    assert max(values(one[3].classifier.weight)) <= 3
    assert torch.equal(one[1][0].weight, start().module[1][0].weight)
    assert trace(whole, example()).operators == start().network.operators


@pytest.mark.parametrize(
    "wrong",
    [
        *(option(bits=bits) for bits in ("nonsense", -3, 0, 1, 9, True, 10**6, 2.5, None)),
        *(option(bits=4, ends=ends) for ends in (0, "yes", None)),
        option(), option(bits=4, other=1), option("nowhere", bits=4), option("0.1", bits=4),
        option(bits=4).model_copy(update={"transform": "int8"}),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_a_sentence(wrong: Option) -> None:
    for attempt in (LOW_BIT.predict, LOW_BIT.apply):
        with pytest.raises(UnsupportedError, match=r"low_bit \w+ .* \w+"):
            attempt(start().network if attempt == LOW_BIT.predict else start(), wrong)


def test_a_network_of_two_layers_has_nothing_between_its_ends() -> None:
    module = settled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)))
    two = Candidate(module, example(), trace(module, example()))
    with pytest.raises(UnsupportedError, match="set ends to true"):
        LOW_BIT.apply(two, option(bits=2))
    assert max(values(LOW_BIT.apply(two, option(bits=2, ends=True)).module[0].weight)) <= 3


def test_weights_that_are_not_finite_are_refused() -> None:
    module = small()
    broken = Candidate(module, example(), start().network)
    module[1][0].weight.data[0] = float("inf")
    with pytest.raises(BadInputError, match=r"'1\.0' hold values that are not finite"):
        LOW_BIT.apply(broken, option(bits=2))


def test_tied_transposed_and_half_weights() -> None:
    shared = build("shared")
    result = LOW_BIT.apply(Candidate(shared, example(), trace(shared, example())), option(bits="ternary")).module
    assert result.tied.weight is result.layer.weight
    assert max(values(result.layer.weight)) <= 3
    unet = build("unet")
    result = LOW_BIT.apply(Candidate(unet, example(), trace(unet, example())), option("up", bits="binary")).module
    assert max(values(result.up.weight.transpose(0, 1))) == 2
    half = LOW_BIT.apply(Candidate(small().half(), example().half(), start().network), option(bits=4)).module
    assert half[1][0].weight.dtype == torch.float16
    assert max(values(half[1][0].weight)) <= 15


def test_packages_get_smaller(tmp_path: Any) -> None:
    path = tmp_path / "few.onnx"
    registry.runtime("onnx").export(ExportJob(LOW_BIT.apply(wide(), option(bits=2, ends=True)), "fp32", str(path)))
    assert pack(path).packed_bytes < 0.3 * path.stat().st_size  # floats of full precision keep nine tenths


@functools.cache
def wide() -> Candidate:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = settled(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()))
    return Candidate(module, example(), trace(module, example()))


# ---------------------------------------------------------------- quantisation-aware training


def quantised(module: nn.Module | None = None, **wanted: Any) -> nn.Module:
    network = start().network if module is None else trace(module, example())
    module = module or small()
    return fake_quantised(module, network, CALIBRATION, Rounding(**wanted))


def train(module: nn.Module, steps: int = 30) -> list[float]:
    """A loop as anyone's: fit the outputs of another network."""
    goal, x = small(), torch.cat(CALIBRATION.inputs)
    with torch.no_grad():
        target = goal(x).detach() * 1.5 + 0.5
    optimiser = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(steps):
        module.train()
        loss = (module(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def test_layers_that_stay_in_float_are_not_rounded() -> None:
    plain = fold_batch_norms(small(), start().network)
    first = next(path for path, layer in plain.named_modules() if isinstance(layer, LAYERS))
    others = frozenset(path for path, layer in plain.named_modules() if isinstance(layer, LAYERS)) - {first}
    module = quantised(layers=others)
    for path in (first, *others):
        same = torch.equal(module.get_submodule(path).weight, plain.get_submodule(path).weight)
        assert same == (path == first)
        assert hasattr(module.get_submodule(path), "input_range") == (path != first)


def test_weights_and_inputs_are_rounded_as_int8_files_round_them() -> None:
    module = quantised().eval()
    plain = fold_batch_norms(small(), start().network)
    for path, layer in plain.named_modules():
        if isinstance(layer, LAYERS):
            weight = layer.weight.detach().numpy()
            step = np.abs(weight.reshape(len(weight), -1)).max(1).reshape([-1] + [1] * (weight.ndim - 1)) / 127
            ours = module.get_submodule(path).weight.detach().numpy()
            np.testing.assert_allclose(ours, np.rint(weight / step) * step, rtol=1e-4, atol=1e-7)
    seen: list[torch.Tensor] = []
    module[1][0].register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    with torch.no_grad():
        module(CALIBRATION.inputs[0])
        wanted = plain(CALIBRATION.inputs[0])
        given = module(CALIBRATION.inputs[0])
    assert len(torch.unique(seen[0])) <= 256
    assert float((seen[0] == 0).float().mean()) > 0.1  # ReLU's zeros stay zeros
    assert 0 < float((given - wanted).abs().max()) < 0.1 * float(wanted.abs().max())


@pytest.mark.parametrize(
    "wanted",
    [{}, {"ranges": "learned"}, {"weights": 4}, {"weights": "ternary", "ends": True}, {"weights": "binary"}],
)
def test_it_trains_and_settles_on_its_grid(wanted: dict[str, Any]) -> None:
    module = quantised(**wanted)
    losses = train(module)
    assert min(losses[-5:]) < 0.6 * losses[0]
    plain = quantisation_aware.settled(module)
    assert not any(parametrize.is_parametrized(each) for each in plain.modules())
    assert not any(isinstance(each, quantisation_aware.FakeActivations) for each in plain.modules())
    assert set(plain.state_dict()) == set(fold_batch_norms(small(), start().network).state_dict())
    weight = plain[1][0].weight
    assert torch.equal(weight, module[1][0].weight)
    if wanted.get("weights", "int8") == "int8":
        torch.testing.assert_close(int8_rounded(weight.detach(), 0), weight.detach(), rtol=1e-5, atol=1e-7)
    else:
        assert max(values(weight)) <= {4: 15, "ternary": 3, "binary": 2}[wanted["weights"]]
        assert (max(values(plain[3].classifier.weight)) <= 3) == wanted.get("ends", False)
    assert parametrize.is_parametrized(module[1][0])  # the trained module is as it was


def test_settled_weights_go_back_beside_the_batch_norms() -> None:
    original = small()
    module = quantised(original)
    train(module, 5)
    plain = quantisation_aware.settled(module)
    again = unfolded(original, plain, foldable(original, start().network))
    assert trace(again, example()).operators == start().network.operators
    with torch.no_grad():
        torch.testing.assert_close(again(example()), plain(example()), atol=1e-4, rtol=1e-4)


def test_rounded_values_pass_gradients_and_clipped_ones_do_not() -> None:
    fake = quantisation_aware.FakeActivations(torch.tensor(-1.0), torch.tensor(1.55), learned=True)
    x = torch.tensor([-3.0, -0.5, 0.0, 0.7, 4.0], requires_grad=True)
    y = fake(x)
    np.testing.assert_allclose(y.detach(), [-1, -0.5, 0, 0.7, 1.55], atol=0.006)
    y.sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad, [0, 1, 1, 1, 0], atol=1e-6)
    assert fake.high.grad is not None
    assert float(fake.high.grad) != 0


def test_moving_ranges_follow_the_batches_in_training_only() -> None:
    fake = quantisation_aware.FakeActivations(torch.tensor(0.0), torch.tensor(1.0), learned=False)
    fake.eval()(torch.tensor([5.0]))
    assert float(fake.high) == 1
    fake.train()(torch.tensor([5.0]))
    np.testing.assert_allclose(float(fake.high), 1 + 0.01 * 4, rtol=1e-6)


def test_a_copy_has_ranges_of_its_own() -> None:
    module = quantised()
    twin = copy.deepcopy(module)
    before = float(module[1][0].input_range.high)
    twin.train()(100 * example())
    assert float(module[1][0].input_range.high) == before
    assert float(twin[1][0].input_range.high) > before


def test_frozen_layers_stay_frozen_and_shared_ones_shared() -> None:
    module = small()
    module[1].requires_grad_(False)
    fake = quantised(module)
    train(fake, 3)
    plain = quantisation_aware.settled(fake)
    assert not plain[1][0].weight.requires_grad
    assert plain[2][0].weight.requires_grad
    wanted = int8_rounded(fold_batch_norms(module, start().network)[1][0].weight.detach(), 0)
    torch.testing.assert_close(plain[1][0].weight.detach(), wanted)
    shared = quantised(build("shared"))
    with torch.no_grad():
        assert torch.isfinite(shared(example())).all()
    assert torch.equal(shared.tied.weight, shared.layer.weight)
    originals = [each.parametrizations.weight.original for each in (shared.tied, shared.layer)]
    assert originals[0] is originals[1]


def test_float_activations_and_layers_without_bias() -> None:
    module = small()
    module[-1].classifier = nn.Linear(12, 5, bias=False)
    fake = fake_quantised(module, trace(module, example()), CALIBRATION, Rounding(weights=2, activations="float"))
    assert not any(isinstance(each, quantisation_aware.FakeActivations) for each in fake.modules())
    assert quantisation_aware.settled(fake)[-1].classifier.bias is None


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="needs calibration inputs"):
        fake_quantised(small(), start().network, Calibration(inputs=()))
    broken = small()
    broken[0][0].weight.data[0] = float("nan")
    with pytest.raises(BadInputError, match="not finite"):
        fake_quantised(broken, start().network, CALIBRATION)
    with pytest.raises(BadInputError, match="not finite"):
        fake_quantised(small(), start().network, Calibration(inputs=(torch.full((1, 3, 16, 16), torch.inf),)))
    for wrong in ({"weights": 1}, {"weights": True}, {"weights": "int4"}, {"activations": "int4"}, {"ranges": "no"}):
        with pytest.raises(BadInputError, match=r"\w+ .* \w+"):
            Rounding(**wrong)
