"""int8 without training: folding, equalisation, bias correction, learned rounding, and the files they end in."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Head, build, conv_bn, example, headed, settled
from torch import nn

from mobilekit import registry
from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.evaluate import SessionModule
from mobilekit.network import shrink, trace
from mobilekit.network.folding import fold_batch_norms, foldable, unfolded
from mobilekit.network.grids import int8_rounded
from mobilekit.runtimes._tflite_facts import schema
from mobilekit.runtimes._tflite_tables import unpacked
from mobilekit.sensitivity import simulated_int8
from mobilekit.transforms._quantisation import rounding
from mobilekit.transforms._quantisation.bias_correction import correct_biases
from mobilekit.transforms._quantisation.equalisation import equalise
from mobilekit.transforms._quantisation.rounding import learn_rounding
from mobilekit.transforms.int8 import for_file
from mobilekit.types import Calibration, Candidate, ExportJob, Network, Option
from mobilekit.workloads import fashion_mnist

LAYERS = (nn.Conv2d, nn.Linear)
EQUALISED = (
    "vgg",
    "resnet",
    "mobilenet_v2",
    "squeeze_linear",
    "efficientnet",
    "inception",
    "resnext",
    "unet",
    "by_hand",
)
INT8 = registry.transform("int8")


def images(count: int = 16, seed: int = 0) -> torch.Tensor:
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=16, mode="bilinear")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned rounding that is quick; tests of what it gains say how many steps they take."""
    monkeypatch.setattr(rounding, "STEPS", 30)


CALIBRATION = Calibration(inputs=(images(8), images(8, 1)))


def mobile() -> nn.Module:
    """A MobileNet-like network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [conv_bn(3, 12, stride=2), conv_bn(12, 12, groups=12), conv_bn(12, 16, 1), conv_bn(16, 16, groups=16)]
        parts += [conv_bn(16, 20, 1)]
        return settled(headed(*parts, width=20))


def badly_scaled(module: nn.Module, spread: float = 1.5) -> nn.Module:
    """The same function with channels of very different size: what one layer writes larger the next reads smaller."""
    generator = torch.Generator().manual_seed(3)
    parts = list(module.children())
    readers = [part[0] for part in parts[1:-1]] + [parts[-1].classifier]
    with torch.no_grad():
        for part, reader in zip(parts[:-1], readers, strict=True):
            scale = 10 ** (spread * (2 * torch.rand(len(part[1].weight), generator=generator) - 1))
            part[1].weight.mul_(scale)
            part[1].bias.mul_(scale)
            if reader.weight.shape[1] == 1:
                reader.weight.div_(scale[:, None, None, None])
            else:
                reader.weight.div_(scale.reshape([1, -1] + [1] * (reader.weight.ndim - 2)))
    return module


def outputs(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(x)


def simulated(module: nn.Module, inputs: Sequence[torch.Tensor], activations: bool = True) -> nn.Module:
    """int8 in numpy's arithmetic, written for this test: nearest weights, inputs of layers between their extremes."""
    twin = copy.deepcopy(module)
    for layer in twin.modules():
        if isinstance(layer, LAYERS):
            weight = layer.weight.detach().numpy()
            step = np.abs(weight.reshape(len(weight), -1)).max(1).reshape([-1] + [1] * (weight.ndim - 1)) / 127
            layer.weight.data = torch.from_numpy((np.rint(weight / np.where(step == 0, 1, step)) * step).astype("f4"))
    if not activations:
        return twin
    for layer, real in zip(twin.modules(), module.modules(), strict=True):
        if isinstance(layer, LAYERS):
            ends: list[float] = [0.0]
            handle = real.register_forward_pre_hook(
                lambda _m, given, ends=ends: ends.extend(map(float, given[0].aminmax()))
            )
            for batch in inputs:
                outputs(module, batch)
            handle.remove()
            layer.register_forward_pre_hook(functools.partial(_input, (max(ends) - min(ends)) / 255, min(ends)))
    return twin


def _input(step: float, low: float, _layer: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    zero = round(-low / step)
    return ((((given[0] / step).round() + zero).clamp(0, 255) - zero) * step,)


def sqnr(wanted: torch.Tensor, given: torch.Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (given - wanted).square().sum()))


def steps_of(weight: torch.Tensor) -> np.ndarray:
    """Whole numbers of an int8 weight, found from its own values."""
    w = weight.detach().double().numpy()
    largest = np.abs(w.reshape(len(w), -1)).max(1).reshape([-1] + [1] * (w.ndim - 1))
    return w / np.where(largest == 0, 1, largest) * 127


def candidate(module: nn.Module, calibration: Calibration | None = CALIBRATION) -> Candidate:
    kind = next(module.parameters()).dtype
    return Candidate(module, example().to(kind), trace(module, example().to(kind)), calibration=calibration)


def option(**settings: Any) -> Option:
    return Option(transform="int8", where="network", settings={"calibration": "min-max", **settings})


# ---------------------------------------------------------------- folding


@pytest.mark.parametrize(
    ("name", "stays"),
    [("resnet", 0), ("mobilenet_v2", 0), ("densenet", 3), ("unet", 0), ("pre_activation", 1), ("odds", 1)],
)
def test_folding_keeps_the_function_and_leaves_what_cannot_be_folded(name: str, stays: int) -> None:
    module = build(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    network = trace(module, example())
    folded = fold_batch_norms(module, network)
    left = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert len(left) == stays
    torch.testing.assert_close(outputs(folded, images(1)), outputs(module, images(1)), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_a_batch_norm_behind_a_transposed_convolution_is_folded() -> None:
    module = settled(nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    network = trace(module, example())
    folded = fold_batch_norms(module, network)
    assert isinstance(folded[1], nn.Identity)
    torch.testing.assert_close(outputs(folded, images(2)), outputs(module, images(2)), atol=1e-5, rtol=1e-5)


def test_what_is_used_twice_or_read_in_between_is_not_folded() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_bn(3, 4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.b(self.a(x))
            return self.norm(x) + self.other(x)

    between = settled(Between())
    assert [fold.norm for fold in foldable(between, trace(between, example()))] == ["a.1"]
    norm = nn.BatchNorm2d(4)
    twice = settled(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 4, 1), norm))
    assert foldable(twice, trace(twice, example())) == ()
    layer = nn.Conv2d(3, 3, 1, bias=False)
    same = settled(nn.Sequential(layer, nn.BatchNorm2d(3), layer, nn.BatchNorm2d(3)))
    assert foldable(same, trace(same, example())) == ()


def test_frozen_weights_stay_frozen_when_they_are_folded() -> None:
    module = mobile()
    module[0][0].weight.requires_grad_(False)
    folded = fold_batch_norms(module, trace(module, example()))
    assert not folded[0][0].weight.requires_grad
    assert not folded[0][0].bias.requires_grad
    assert folded[1][0].weight.requires_grad


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "inception", "unet"])
def test_unfolded_weights_stand_beside_idle_batch_norms(name: str) -> None:
    module = build(name)
    network = trace(module, example())
    folds, folded = foldable(module, network), fold_batch_norms(module, network)
    again = unfolded(module, folded, folds)
    assert trace(again, example()) == network
    torch.testing.assert_close(outputs(again, images(1)), outputs(module, images(1)), atol=1e-5, rtol=1e-5)
    for fold in folds:
        assert torch.equal(again.get_parameter(f"{fold.layer}.weight"), folded.get_parameter(f"{fold.layer}.weight"))
        norm = again.get_submodule(fold.norm)
        assert torch.equal(norm.weight / (norm.running_var + norm.eps).sqrt(), torch.ones_like(norm.weight))


def test_a_batch_norm_without_parameters_is_unfolded_too() -> None:
    layers = (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False), nn.ReLU())
    module = settled_without_affine(headed(*layers, width=6))
    network = trace(module, example())
    again = unfolded(module, fold_batch_norms(module, network), foldable(module, network))
    torch.testing.assert_close(outputs(again, images(2)), outputs(module, images(2)), atol=1e-5, rtol=1e-5)


def settled_without_affine(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module[1].running_mean.uniform_(-1, 1)
        module[1].running_var.uniform_(0.5, 2)
    return module.eval()


# ---------------------------------------------------------------- equalisation


@pytest.mark.parametrize("name", EQUALISED)
def test_equalisation_keeps_the_function_and_gives_a_reason_for_what_it_leaves(name: str) -> None:
    module = build(name)
    network = trace(module, example())
    folded = fold_batch_norms(module, network)
    found = equalise(folded, network, CALIBRATION)
    wanted = outputs(module, CALIBRATION.inputs[0])
    torch.testing.assert_close(outputs(found.module, CALIBRATION.inputs[0]), wanted, atol=1e-4, rtol=1e-4)
    assert not {pair.layer for pair in found.pairs} & set(found.refused)
    assert all(" " in reason for reason in found.refused.values())


def test_two_layers_are_equal_afterwards_by_the_formula_of_the_paper() -> None:
    module = settled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1)))
    first, second = module[0].weight.detach().numpy(), module[3].weight.detach().numpy()
    first *= np.geomspace(0.01, 100, 6).reshape(-1, 1, 1, 1).astype("f4")
    written, read = np.abs(first).max((1, 2, 3)), np.abs(second).max((0, 2, 3))
    scale = np.sqrt(written / read)
    equal = equalise(module, trace(module, example()), None)
    assert [pair.layer for pair in equal.pairs] == ["0"]
    np.testing.assert_allclose(equal.module[0].weight.detach(), first / scale.reshape(-1, 1, 1, 1), rtol=1e-4)
    np.testing.assert_allclose(equal.module[3].weight.detach(), second * scale.reshape(1, -1, 1, 1), rtol=1e-4)
    np.testing.assert_allclose(equal.module[0].bias.detach(), module[0].bias.detach().numpy() / scale, rtol=1e-4)


def test_a_flattened_map_and_groups_are_scaled_feature_by_feature() -> None:
    layers = (
        nn.Conv2d(3, 6, 3, 4),
        nn.ReLU(),
        nn.Conv2d(6, 9, 1, groups=3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 5),
    )
    module = settled(nn.Sequential(*layers))
    module[0].weight.data *= torch.logspace(-2, 2, 6)[:, None, None, None]
    module[2].weight.data *= torch.logspace(-2, 2, 9)[:, None, None, None]
    found = equalise(module, trace(module, example()), None)
    assert [pair.readers[0].repeat for pair in found.pairs] == [1, 16]
    torch.testing.assert_close(outputs(found.module, images(4)), outputs(module, images(4)), atol=1e-4, rtol=1e-4)
    written = found.module[2].weight.detach().abs().amax((1, 2, 3))
    read = found.module[5].weight.detach().abs().reshape(5, 9, 16).amax((0, 2))
    np.testing.assert_allclose(written, read, rtol=1e-2)


def test_channels_that_reach_the_bound_of_a_relu6_stay() -> None:
    module = badly_scaled(mobile(), 1.0)
    for part in list(module)[:-1]:
        part[2] = nn.ReLU6()
    network = trace(module, example())
    folded = fold_batch_norms(module, network)
    assert "clipped at 6" in equalise(folded, network, None).refused["0.0"]
    found = equalise(folded, network, CALIBRATION)
    assert "0.0" in {pair.layer for pair in found.pairs}
    seen: list[torch.Tensor] = []
    folded[0][0].register_forward_hook(lambda _m, _g, out: seen.append(out.amax((0, 2, 3))))
    for batch in CALIBRATION.inputs:
        outputs(folded, batch)
        torch.testing.assert_close(outputs(found.module, batch), outputs(folded, batch), atol=1e-4, rtol=1e-4)
    clipped = torch.stack(seen).amax(0) >= 6
    assert 0 < int(clipped.sum()) < len(clipped)
    same = (found.module[0][0].weight == folded[0][0].weight).flatten(1).all(1)
    assert torch.equal(same, clipped)


def test_other_clamps_are_no_relu6() -> None:
    module = settled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Hardtanh(), nn.Conv2d(6, 4, 1)))
    found = equalise(module, trace(module, example()), CALIBRATION)
    assert found.pairs == ()
    assert "hardtanh" in found.refused["0"]


# ---------------------------------------------------------------- what it wins


def test_badly_scaled_channels_lose_in_int8_and_preparation_wins_them_back() -> None:
    module, test = badly_scaled(mobile()), images(32, 7)
    start = candidate(module)
    network, wanted = start.network, outputs(module, test)
    plain = fold_batch_norms(module, network)
    lost = sqnr(wanted, outputs(simulated(plain, CALIBRATION.inputs), test))
    prepared = INT8.apply(start, option(equalise=True, correct_bias=True)).module
    won = sqnr(wanted, outputs(simulated(fold_batch_norms(prepared, network), CALIBRATION.inputs), test))
    assert lost < 15
    assert won > lost + 12


def test_correction_takes_the_mean_shift_off_every_layer() -> None:
    module = mobile()
    network = trace(module, example())
    folded = coarse(fold_batch_norms(module, network))
    corrected = correct_biases(folded, folded, network, torch.cat(CALIBRATION.inputs))
    for path, layer in folded.named_modules():
        if isinstance(layer, LAYERS):
            assert torch.equal(layer.weight, corrected.get_parameter(f"{path}.weight"))
    wanted = means(folded)
    before, after = means(simulated(folded, (), False)), means(simulated(corrected, (), False))
    for path, mean in wanted.items():
        size = float(mean.abs().max())
        assert float((after[path] - mean).abs().max()) < 1e-4 * size
        assert float((before[path] - mean).abs().max()) > 20 * float((after[path] - mean).abs().max())


def coarse(module: nn.Module) -> nn.Module:
    """One weight of each filter dwarfs the others, so that rounding shifts what the layers give."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight[:, 0, 0, 0] = 20 * layer.weight.abs().amax()
    return module


@pytest.mark.parametrize("name", ["onnx", "tflite"])
def test_int8_files_are_written_with_corrected_biases(name: str, tmp_path: Path) -> None:
    runtime, test = registry.runtime(name), images(16, 7)
    start = INT8.apply(candidate(coarse(mobile())), option())
    ready = for_file(start, CALIBRATION)
    samples = tuple(batch.numpy() for batch in CALIBRATION.inputs)
    wanted, found = outputs(start.module, test), []
    for number, each in enumerate((start, ready)):
        path = tmp_path / f"{number}{runtime.suffix}"
        runtime.export(ExportJob(each, "int8", str(path), samples))
        found.append(sqnr(wanted, SessionModule(runtime.open(path))(test)))
    assert found[1] > found[0] + 3
    assert ready.network is start.network
    assert all(torch.equal(a, b) for a, b in zip(start.module.parameters(), coarse(mobile()).parameters(), strict=True))


def test_layers_in_float_are_not_rounded_for_a_file() -> None:
    start = INT8.apply(candidate(coarse(mobile())), option(float="conv2d,conv2d_1"))
    ready = fold_batch_norms(for_file(start, CALIBRATION).module, start.network)
    on_grid = [torch.allclose(ready[n][0].weight, int8_rounded(ready[n][0].weight, 0), atol=1e-6) for n in range(5)]
    assert on_grid == [False, False, True, True, True]


@pytest.mark.parametrize("why", ["no quant", "no inputs", "not finite"])
def test_what_cannot_be_corrected_is_written_as_it_is(why: str) -> None:
    start = candidate(small())
    if why != "no quant":
        start = INT8.apply(start, option())
    inputs = {"no inputs": (), "not finite": (torch.full((1, 3, 16, 16), torch.nan),)}.get(why, CALIBRATION.inputs)
    assert for_file(start, Calibration(inputs=inputs)) is start


def test_simulated_int8_is_as_files_are_whose_weights_are_prepared() -> None:
    module = coarse(mobile())
    network, test = trace(module, example()), images(16, 7)
    wanted = outputs(module, test)
    lost = sqnr(wanted, outputs(simulated(module, CALIBRATION.inputs), test))
    with simulated_int8(module, network, {o.name for o in network.operators}, CALIBRATION.inputs):
        kept = sqnr(wanted, outputs(module, test))
    assert kept > lost + 2
    assert torch.equal(outputs(module, test), wanted)


def means(module: nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, LAYERS):
            layer.register_forward_hook(
                lambda _m, _g, out, path=path: found.update({path: out.double().transpose(0, 1).flatten(1).mean(1)})
            )
    outputs(module, torch.cat(CALIBRATION.inputs))
    for layer in module.modules():
        layer._forward_hooks.clear()
    return found


def test_learned_rounding_lies_on_the_grid_and_beats_the_nearest() -> None:
    module = mobile()
    network = trace(module, example())
    folded = fold_batch_norms(module, network)
    found = learn_rounding(folded, network, Calibration(inputs=(images(64), images(64, 1))), 100)
    moved = 0
    for path, layer in folded.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        steps, before = steps_of(found.module.get_parameter(f"{path}.weight")), steps_of(layer.weight)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
        assert (np.abs(steps).reshape(len(steps), -1).max(1).round(3) == 127).all()
        assert np.abs(steps - before).max() < 1.001  # up or down, not further
        moved += int((np.rint(steps) != np.rint(before)).sum())
        assert found.layers[path].learned <= found.layers[path].nearest
    assert moved > 20
    assert sum(record.learned < 0.9 * record.nearest for record in found.layers.values()) >= 3
    test = images(64, 9)  # not those that it was learned on
    wanted = outputs(folded, test)
    nearest = simulated(folded, (), activations=False)
    assert sqnr(wanted, outputs(found.module, test)) > sqnr(wanted, outputs(nearest, test)) + 1


# ---------------------------------------------------------------- files


@functools.cache
def learned() -> Candidate:
    return INT8.apply(candidate(mobile()), option(rounding="learned"))


def exported(runtime: str, result: Candidate, path: Path) -> Path:
    calibration = tuple(batch.numpy() for batch in CALIBRATION.inputs)
    registry.runtime(runtime).export(ExportJob(result, "int8", str(path), calibration))
    return path


def in_onnx(path: Path) -> list[np.ndarray]:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    weighted = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    return [constants[makers[node.input[1]].input[0]] for node in weighted]


def in_tflite(path: Path) -> list[np.ndarray]:
    model = unpacked(path.read_bytes())
    graph, kinds, found = model.subgraphs[0], schema().BuiltinOperator, []
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        kind = max(code.builtinCode, code.deprecatedBuiltinCode)
        if kind not in (kinds.CONV_2D, kinds.DEPTHWISE_CONV_2D, kinds.FULLY_CONNECTED):
            continue
        tensor = graph.tensors[operator.inputs[1]]
        data = np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.int8).reshape(tensor.shape)
        order = {kinds.CONV_2D: (0, 3, 1, 2), kinds.DEPTHWISE_CONV_2D: (3, 0, 1, 2)}.get(kind)
        found.append(data if order is None else data.transpose(order))
    return found


@pytest.mark.parametrize(("runtime", "read"), [("onnx", in_onnx), ("tflite", in_tflite)])
def test_the_file_holds_the_very_integers_that_were_learned(runtime: str, read: Any, tmp_path: Path) -> None:
    if registry.runtime(runtime).unavailable():
        pytest.skip(str(registry.runtime(runtime).unavailable()))
    result = learned()
    wanted = [np.rint(steps_of(layer.weight)) for layer in result.module.modules() if isinstance(layer, LAYERS)]
    given = read(exported(runtime, result, tmp_path / f"file.{runtime}"))
    assert len(given) == len(wanted) == 6
    for ours, theirs in zip(wanted, given, strict=True):
        np.testing.assert_array_equal(ours, theirs if ours.shape == theirs.shape else theirs.T)


# ---------------------------------------------------------------- the lever


def test_old_plans_leave_the_module_as_it_is() -> None:
    start = candidate(mobile(), None)
    result = INT8.apply(start, option())
    assert result.module is start.module
    assert INT8.apply(start, option(equalise=False, correct_bias=False, rounding="nearest")).module is start.module


@pytest.mark.parametrize(
    "settings",
    [{"equalise": True}, {"correct_bias": True}, {"equalise": True, "rounding": "learned"}],
)
def test_the_prepared_candidate_is_as_predicted_and_can_still_be_shrunk(settings: dict[str, Any]) -> None:
    start = candidate(mobile())
    before = {key: value.clone() for key, value in start.module.state_dict().items()}
    result = INT8.apply(start, option(**settings))
    assert result.network == INT8.predict(start.network, option(**settings))
    assert trace(result.module, example()).with_precisions(result.quant.operators) == result.network.model_copy(
        update={"name": "network"}
    )
    assert list(result.module.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in start.module.state_dict().items())
    assert any(not torch.equal(before[key], value) for key, value in result.module.state_dict().items())
    group = next(name for name, each in result.network.groups.items() if each.refused is None)
    assert torch.isfinite(outputs(shrink(result.module, result.network, {group: [0, 1]}), images(2))).all()


@pytest.mark.parametrize(
    "settings", [{"equalise": 1}, {"equalise": "yes"}, {"correct_bias": None}, {"rounding": "up"}, {"rounding": None}]
)
def test_unknown_settings_are_refused(settings: dict[str, Any]) -> None:
    start = candidate(mobile())
    for attempt in (
        lambda: INT8.apply(start, option(**settings)),
        lambda: INT8.predict(start.network, option(**settings)),
    ):
        with pytest.raises(UnsupportedError, match=r"int8 cannot .* only|int8 cannot .* true or false"):
            attempt()


@pytest.mark.parametrize("settings", [{"correct_bias": True}, {"rounding": "learned"}])
@pytest.mark.parametrize("calibration", [None, Calibration(inputs=())])
def test_what_needs_inputs_says_so(settings: dict[str, Any], calibration: Calibration | None) -> None:
    with pytest.raises(UnsupportedError, match="needs calibration inputs"):
        INT8.apply(candidate(mobile(), calibration), option(**settings))


def test_equalisation_needs_no_inputs_without_clamps() -> None:
    assert INT8.apply(candidate(mobile(), None), option(equalise=True)).module is not None
    with pytest.raises(UnsupportedError, match="cannot equalise layers here"):
        INT8.apply(candidate(settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish()))), option(equalise=True))


ALL = {"equalise": True, "correct_bias": True, "rounding": "learned"}


def finite_and_close(start: Candidate, result: Candidate, test: torch.Tensor, tolerance: float = 0.1) -> None:
    wanted, given = outputs(start.module, test).float(), outputs(result.module, test).float()
    assert torch.isfinite(given).all()
    assert float((given - wanted).abs().max()) < tolerance * float(wanted.abs().max())


def small(*, bias: bool = True) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = headed(conv_bn(3, 6, stride=2), conv_bn(6, 8, 1), width=8)
        module[-1].classifier = nn.Linear(8, 5, bias=bias)
        return settled(module)


def test_dead_channels_stay_dead() -> None:
    module = small()
    module[0][0].weight.data[2] = 0
    module[1][0].weight.data[:, 4] = 0
    start = candidate(module)
    result = INT8.apply(start, option(**ALL))
    assert torch.equal(result.module[0][0].weight[2], torch.zeros_like(result.module[0][0].weight[2]))
    finite_and_close(start, result, images(4))


@pytest.mark.parametrize("batch", [images(1), torch.full((4, 3, 16, 16), 0.3), torch.zeros(2, 3, 16, 16)])
def test_one_image_and_constant_images_are_enough(batch: torch.Tensor) -> None:
    start = candidate(small(), Calibration(inputs=(batch,)))
    finite_and_close(start, INT8.apply(start, option(**ALL)), batch)


def test_half_precision_keeps_its_type_and_its_grid() -> None:
    start = candidate(small().half())
    result = INT8.apply(start, option(**ALL))
    assert {p.dtype for p in result.module.parameters()} == {torch.float16}
    finite_and_close(start, result, images(4).half(), 0.15)
    steps = steps_of(result.module[1][0].weight)
    assert np.abs(steps - np.rint(steps)).max() < 0.2  # far from the half where rounding would go another way


def test_double_precision_is_not_rounded_to_single() -> None:
    start = candidate(small().double())
    result = INT8.apply(start, option(equalise=True))
    wanted, given = outputs(start.module, images(2).double()), outputs(result.module, images(2).double())
    torch.testing.assert_close(given, wanted, atol=1e-12, rtol=1e-10)


def test_bad_numbers_and_shapes_are_refused() -> None:
    broken = small()
    start = candidate(broken)
    broken[0][0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(BadInputError, match=r"0\.0\.weight holds values that are not finite"):
        INT8.apply(start, option(equalise=True))
    for wrong, words in ((torch.randn(2, 1, 16, 16), "shape"), (torch.full((1, 3, 16, 16), torch.inf), "not finite")):
        with pytest.raises(BadInputError, match=words):
            INT8.apply(candidate(small(), Calibration(inputs=(wrong,))), option(correct_bias=True))


def test_layers_that_are_used_twice_and_tied_weights_are_rounded_once() -> None:
    start = candidate(build("shared"))
    result = INT8.apply(start, option(correct_bias=True, rounding="learned"))
    assert result.module.tied.weight is result.module.layer.weight
    finite_and_close(start, result, images(4))
    steps = steps_of(result.module.layer.weight)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)


def test_frozen_parameters_stay_frozen_and_others_trainable() -> None:
    module = small()
    module[0].requires_grad_(False)
    result = INT8.apply(candidate(module), option(**ALL)).module
    assert [p.requires_grad for p in result.parameters()] == [p.requires_grad for p in module.parameters()]
    assert all(p.grad is None for p in (*module.parameters(), *result.parameters()))


def test_a_linear_layer_without_bias_gets_none() -> None:
    start = candidate(small(bias=False))
    result = INT8.apply(start, option(**ALL))
    assert result.module[-1].classifier.bias is None
    finite_and_close(start, result, images(4))


def test_the_same_seed_rounds_the_same() -> None:
    module = small()
    network = trace(module, example())
    first, second = (learn_rounding(module, network, CALIBRATION, 20).module for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_fashion_mnist_keeps_its_answers() -> None:
    module = fashion_mnist.model()
    network: Network = trace(module, fashion_mnist.example_input())
    inputs = tuple(fashion_mnist.calibration_data())[:1]
    start = Candidate(module, fashion_mnist.example_input(), network, calibration=Calibration(inputs=inputs))
    result = INT8.apply(start, option(equalise=True, correct_bias=True))
    test = tuple(fashion_mnist.calibration_data())[4]
    wanted, given = outputs(module, test), outputs(simulated(fold_batch_norms(result.module, network), inputs), test)
    assert float((wanted.argmax(1) == given.argmax(1)).float().mean()) > 0.95
    assert sqnr(wanted, given) > 20


def test_a_head_alone_can_be_prepared() -> None:
    module = settled(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), Head(6)))
    start = candidate(module)
    finite_and_close(start, INT8.apply(start, option(**ALL)), images(4))
