"""Gates behind channel groups, and squeeze-excite blocks that become constants: exact where they have to be."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import SIDE, Shuffle, SqueezeConv, SqueezeLinear, build, conv_bn, example, headed, settled
from torch import Tensor, nn

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.evaluate import divergence
from mobilekit.network import shrink, trace
from mobilekit.training.gates import (
    ChannelGate,
    add_gates,
    fold_gates,
    gate_importance,
    gate_keep,
    gate_penalty,
    gate_refusals,
    remove_gates,
)
from mobilekit.training.squeeze_excite import FoldedSqueezeExcite, fold_squeeze_excite
from mobilekit.types import Calibration, Network

GATED = (
    "vgg", "resnet", "densenet", "mobilenet_v2", "senet", "shufflenet_v1", "unet", "pre_activation",
)  # fmt: skip


@functools.cache
def traced(name: str) -> tuple[nn.Module, Network]:
    module = build(name)
    return module, trace(module, example(), name)


def gates(module: nn.Module) -> dict[str, nn.Parameter]:
    return {m.group: m.gate for m in module.modules() if isinstance(m, ChannelGate)}


def randomise(module: nn.Module, seed: int = 5) -> None:
    """Gates between 0.3 and 1.3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates(module).values():
            gate.copy_(torch.rand(gate.shape, generator=generator) + 0.3)


def noise(count: int, seed: int = 7) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def plain(*layers: nn.Module, seed: int = 3) -> tuple[nn.Module, Network]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = settled(nn.Sequential(*layers))
    return module, trace(module, example())


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize("name", GATED)
def test_gates_of_one_change_nothing_and_folding_gives_the_gated_outputs(name: str) -> None:
    module, network = traced(name)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    gated = add_gates(module, network)
    opened = {group for group, facts in network.groups.items() if facts.refused is None}
    assert set(gates(gated)) == opened == set(network.groups) - set(gate_refusals(module, network))
    assert {group: len(gate) for group, gate in gates(gated).items()} == {g: network.groups[g].width for g in opened}
    x = noise(4)
    torch.testing.assert_close(gated(x), module(x), rtol=1e-6, atol=1e-6)
    randomise(gated)
    want = gated(x)
    assert (want - module(x)).abs().max() > 1e-3
    folded, bare = fold_gates(gated), remove_gates(gated)
    torch.testing.assert_close(folded(x), want, rtol=1e-5, atol=1e-5)
    assert repr(folded) == repr(bare) == repr(module)
    assert list(folded.state_dict()) == list(before)
    assert all(torch.equal(before[key], tensor) for key, tensor in bare.state_dict().items())
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())


def test_a_gate_multiplies_the_channel_behind_its_batch_norm() -> None:
    module, network = plain(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 4, 1))
    gated = add_gates(module, network)
    randomise(gated)
    x, factors = noise(2), gates(gated)["0"].detach()
    behind = module[1](module[0](x)) * factors[:, None, None]  # type: ignore[index,operator]
    torch.testing.assert_close(gated(x), module[3](module[2](behind)), rtol=1e-5, atol=1e-5)  # type: ignore[index,operator]


def test_layers_that_write_one_group_share_a_gate() -> None:
    module, network = traced("resnet")
    gated = add_gates(module, network)
    owners = [m for m in gated.modules() if isinstance(m, ChannelGate) and m.group == "2.second.0"]
    assert len(network.groups["2.second.0"].producers) == 3
    assert len(owners) == 6, "scale and shift of three batch norms"
    assert len({id(m.gate) for m in owners}) == 1


def test_the_penalty_is_the_l1_norm_and_only_gates_feel_it() -> None:
    module, network = traced("mobilenet_v2")
    gated = add_gates(module, network)
    randomise(gated)
    with torch.no_grad():
        next(iter(gates(gated).values()))[0] = -0.7
    penalty = gate_penalty(gated, 0.1)
    want = 0.1 * sum(float(np.abs(gate.detach().numpy()).sum()) for gate in gates(gated).values())
    assert float(penalty.detach()) == pytest.approx(want, rel=1e-5)
    penalty.backward()  # type: ignore[no-untyped-call]
    felt = {name for name, p in gated.named_parameters() if p.grad is not None}
    assert felt == {name for name, _ in gated.named_parameters() if name.endswith(".gate")}
    for strength in (-1.0, math.nan):
        with pytest.raises(BadInputError, match="zero or more"):
            gate_penalty(gated, strength)


def test_training_closes_the_gates_of_channels_that_the_target_does_not_need() -> None:
    torch.manual_seed(0)
    module, network = plain(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        module.get_parameter("2.weight")[:, 5:] *= 1e-3  # what these give hardly counts
    x = noise(8)
    want = module(x).detach()
    gated = add_gates(module, network)
    for name, parameter in gated.named_parameters():
        parameter.requires_grad_(name.endswith(".gate"))
    optimiser = torch.optim.Adam([p for p in gated.parameters() if p.requires_grad], 0.05)
    for _ in range(60):
        optimiser.zero_grad()
        (F.mse_loss(gated(x), want) + gate_penalty(gated, 1e-3)).backward()
        optimiser.step()
    scores = gate_importance(gated, "0")
    assert scores.dtype == torch.float64
    assert scores[5:].max() < 0.1 < scores[:5].min(), scores
    keep = gate_keep(gated, 3 / 8)
    assert keep == {"0": [0, 1, 2, 3, 4]}
    slim = shrink(fold_gates(gated), network, keep)
    assert divergence(gated(x).detach().numpy(), slim(x).detach().numpy()) < 1e-3


def test_channels_are_ranked_over_all_groups_and_none_is_emptied() -> None:
    module, network = traced("mobilenet_v2")
    gated = add_gates(module, network)
    for number, gate in enumerate(gates(gated).values()):
        with torch.no_grad():
            gate.copy_(torch.arange(len(gate)) + (1 if number else 1e-3))
    with torch.no_grad():
        gates(gated)["0.0"].mul_(1e-6)  # the whole group is less than all others
    total = sum(len(gate) for gate in gates(gated).values())
    keep = gate_keep(gated, 6 / total)
    assert keep == {"0.0": [5]}
    assert gate_keep(gated, 0.0) == {}
    most = gate_keep(gated, 0.999)
    assert all(len(stays) >= 1 for stays in most.values())
    slim = shrink(fold_gates(gated), network, most)
    assert torch.isfinite(slim(example())).all()
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(BadInputError, match="must be 0 or more and below 1"):
            gate_keep(gated, share)


def test_half_precision_frozen_and_training_mode() -> None:
    module, network = traced("mobilenet_v2")
    half = copy.deepcopy(module).half()
    half.get_parameter("0.0.weight").requires_grad_(False)
    half.get_parameter("0.1.weight").requires_grad_(False)
    gated = add_gates(half, network)
    randomise(gated)
    folded = fold_gates(gated)
    assert {p.dtype for p in folded.parameters()} == {torch.float16}
    frozen = [name for name, p in folded.named_parameters() if not p.requires_grad]
    assert frozen == ["0.0.weight", "0.1.weight"]
    torch.testing.assert_close(folded(example().half()), gated(example().half()), rtol=1e-2, atol=1e-2)
    learning = add_gates(copy.deepcopy(module).train(), network)
    assert learning.training


def test_what_cannot_have_a_gate_is_said() -> None:
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    module = nn.Sequential(*layers).eval()
    network = trace(module, example())
    assert "no parameters that could be scaled" in gate_refusals(module, network)["0"]
    assert set(gates(add_gates(module, network))) == {"2"}
    shared, facts = traced("shared")
    reasons = gate_refusals(shared, facts)
    assert all(" " in reason for reason in reasons.values())
    assert "<input>" in reasons
    alone, only = plain(nn.Conv2d(3, 4, 1))
    with pytest.raises(UnsupportedError, match="no channel group can have a gate"):
        add_gates(alone, only)
    gated = add_gates(*traced("vgg"))
    with pytest.raises(UnsupportedError, match="gates already"):
        add_gates(gated, traced("vgg")[1])
    with pytest.raises(UnsupportedError, match="nowhere has no gate"):
        gate_importance(gated, "nowhere")
    for call in (fold_gates, remove_gates, lambda m: gate_penalty(m, 1.0), lambda m: gate_keep(m, 0.5)):
        with pytest.raises(UnsupportedError, match="has no gates"):
            call(module)
    with torch.no_grad():
        gates(gated)["features.0"][0] = math.nan
    with pytest.raises(BadInputError, match="not finite"):
        gate_importance(gated, "features.0")


# ---------------------------------------------------------------- squeeze and excite


def calibration(count: int = 8) -> Calibration:
    return Calibration(inputs=noise(count).split(4))


def mean_gate(module: nn.Module, place: str, inputs: Tensor) -> np.ndarray:
    """The mean of what the block multiplies by: its output over its input, where that is not zero."""
    found: list[np.ndarray] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        x, y = given[0].double().flatten(2).numpy(), result.double().flatten(2).numpy()
        largest = np.abs(x).argmax(axis=2)[..., None]
        found.append((np.take_along_axis(y, largest, 2) / np.take_along_axis(x, largest, 2))[..., 0])

    handle = module.get_submodule(place).register_forward_hook(keep)
    with torch.inference_mode():
        module(inputs)
    handle.remove()
    return np.concatenate(found).mean(axis=0)


class Constant(nn.Module):
    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors.float()[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


def assert_folded(module: nn.Module, network: Network, place: str) -> FoldedSqueezeExcite:
    """The result equals the module with a constant factor in the block's place."""
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    result = fold_squeeze_excite(module, network, calibration(), place)
    held = copy.deepcopy(module)
    held.set_submodule(place, Constant(result.factors))
    x = noise(4, seed=11)
    with torch.inference_mode():
        torch.testing.assert_close(result.module(x), held(x), rtol=1e-4, atol=1e-5)
        calls = torch.cat(calibration().inputs)
        want = divergence(module(calls).numpy(), result.module(calls).numpy())
    assert result.divergence == pytest.approx(want, rel=1e-3, abs=1e-7)
    assert result.divergence > 0
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())
    after = trace(result.module, example())
    gone = [o.name for o in network.operators if o.module == place or o.module.startswith(f"{place}.")]
    assert gone
    assert len(after.operators) == len(network.operators) - len(gone)
    assert after.macs < network.macs
    return result


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("squeeze_linear", "1"),  # behind batch norm and ReLU: into the batch norm
        ("squeeze_conv", "3"),
        ("senet", "1.excite"),  # in front of a sum
        ("efficientnet", "1.layers.6"),  # behind SiLU: into the projection
    ],
)
def test_a_block_becomes_its_mean_gate(name: str, place: str) -> None:
    module, network = traced(name)
    result = assert_folded(module, network, place)
    assert 0 < result.spread < 1
    assert bool((result.factors > 0).all())


def test_the_factors_are_the_mean_of_the_gate() -> None:
    for block in (SqueezeConv(8), SqueezeLinear(8)):
        module, network = plain(nn.Conv2d(3, 8, 3, padding=1), block, nn.Conv2d(8, 4, 1))
        result = assert_folded(module, network, "1")
        want = mean_gate(module, "1", torch.cat(calibration().inputs))
        np.testing.assert_allclose(result.factors.numpy(), want, rtol=1e-5)


def test_a_gate_that_is_constant_is_folded_without_loss() -> None:
    module, network = plain(conv_bn(3, 8), SqueezeLinear(8), conv_bn(8, 6), nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        module.get_parameter("1.layers.2.weight").zero_()
    result = fold_squeeze_excite(module, network, calibration(), "1")
    assert result.spread < 1e-6
    assert result.divergence < 1e-10
    torch.testing.assert_close(result.module(noise(2)), module(noise(2)), rtol=1e-5, atol=1e-5)


def test_a_flattened_map_and_depthwise_readers_take_the_gate() -> None:
    module, network = plain(
        nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU(), SqueezeConv(4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 5)
    )
    assert_folded(module, network, "2")
    module, network = plain(
        nn.Conv2d(3, 6, 3), nn.SiLU(), SqueezeLinear(6), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1)
    )
    assert_folded(module, network, "2")


class Residue(SqueezeConv):
    """Adds its input: no plain gate."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Places(nn.Module):
    """A gate for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.map(x))


@pytest.mark.parametrize(
    ("layers", "place", "reason"),
    [
        ((conv_bn(3, 8), Residue(8), conv_bn(8, 6)), "1", "reads what is inside it"),
        ((conv_bn(3, 8), Places(), conv_bn(8, 6)), "1", "not one number a channel"),
        ((conv_bn(3, 8), conv_bn(8, 6)), "1", "no squeeze-excite block: the network has 0 products"),
        ((conv_bn(3, 8), conv_bn(8, 6)), "nowhere", "the network has no operators there"),
        (
            (conv_bn(3, 8), nn.SiLU(), SqueezeConv(8), Shuffle(8)),
            "2",
            r"a silu lies between .*, and .*cannot take a factor",
        ),
        ((conv_bn(3, 8), nn.SiLU(), SqueezeConv(8)), "2", r"a silu lies between .*, and it is the network's output"),
    ],
)
def test_what_is_no_such_block_or_has_no_neighbour_is_refused(
    layers: tuple[nn.Module, ...], place: str, reason: str
) -> None:
    module, network = plain(*copy.deepcopy(layers))
    with pytest.raises(UnsupportedError, match=reason):
        fold_squeeze_excite(module, network, calibration(), place)


def test_no_inputs_and_gates_that_are_not_finite_are_refused() -> None:
    module, network = traced("squeeze_linear")
    with pytest.raises(UnsupportedError, match="needs calibration inputs"):
        fold_squeeze_excite(module, network, Calibration(inputs=()), "1")
    broken = copy.deepcopy(module)
    with torch.no_grad():
        broken.get_parameter("1.layers.2.bias")[0] = math.nan
    with pytest.raises(BadInputError, match="not finite"):
        fold_squeeze_excite(broken, network, calibration(), "1")


def test_half_precision_stays_half() -> None:
    module, network = plain(nn.Conv2d(3, 8, 3, padding=1), SqueezeConv(8), nn.Conv2d(8, 4, 1))
    result = fold_squeeze_excite(copy.deepcopy(module).half(), network, calibration(), "1")
    assert {p.dtype for p in result.module.parameters()} == {torch.float16}
    exact = fold_squeeze_excite(module, network, calibration(), "1")
    torch.testing.assert_close(result.factors, exact.factors, rtol=1e-2, atol=1e-2)


def test_folding_one_block_leaves_a_network_that_can_be_pruned() -> None:
    module, network = plain(conv_bn(3, 8), SqueezeConv(8), conv_bn(8, 6), *headed(width=6))
    after = fold_squeeze_excite(module, network, calibration(), "1").module
    again = trace(after, example())
    assert again.groups["0.0"].refused is None
    assert torch.isfinite(shrink(after, again, {"0.0": [0, 3]})(example())).all()
