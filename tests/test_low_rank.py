"""Low-rank layers: exact at full rank, optimal where an optimum is known, as predicted, and refused with a reason."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import SLOW_TO_TRACE, SamePadConv, build, conv_bn, example, headed
from test_rewrite import PIECES, of_pieces
from torch import Tensor, nn

import mobilekit
from mobilekit import registry
from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.network import trace
from mobilekit.transforms._alternating import cp
from mobilekit.transforms._chains import METHODS, full_ranks
from mobilekit.transforms._factors import factors, tucker2
from mobilekit.transforms.low_rank import LowRank, rank_for_energy
from mobilekit.types import Candidate, Network, OperatorShape, Option, QuantSpec, RuntimeEntry

ENTRY = RuntimeEntry(name="onnx", precisions=("fp32", "int8"), channel_multiple=1)
KERNELS = {"svd": (10, 7, 1, 1), "spatial": (10, 7, 3, 5), "tucker2": (10, 7, 3, 5), "cp": (4, 3, 2, 3)}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def rebuilt(kernels: tuple[np.ndarray, ...], method: str) -> np.ndarray:
    """The single kernel that the chain amounts to, by loops over its terms."""
    if method == "svd":
        first, second = (k.reshape(k.shape[:2]) for k in kernels)
        return (second @ first).reshape(*kernels[1].shape[:2][:1], first.shape[1], *kernels[0].shape[2:])
    if method == "spatial":
        rows, columns = kernels[0][..., 0], kernels[1][:, :, 0]
        return sum(columns[:, r][:, None, None, :] * rows[r][None, :, :, None] for r in range(len(rows)))  # type: ignore[return-value]
    if method == "tucker2":
        inner, core, outer = kernels[0][..., 0, 0], kernels[1], kernels[2][..., 0, 0]
        return np.tensordot(outer, np.tensordot(inner.T, core, (1, 1)).transpose(1, 0, 2, 3), (1, 0))
    b, rows, columns, a = kernels[0][..., 0, 0], kernels[1][:, 0, :, 0], kernels[2][:, 0, 0], kernels[3][..., 0, 0]
    terms = (np.multiply.outer(np.multiply.outer(np.outer(a[:, r], b[r]), rows[r]), columns[r]) for r in range(len(b)))
    return sum(terms)  # type: ignore[return-value]


def missed(kernel: np.ndarray, kernels: tuple[np.ndarray, ...], method: str) -> float:
    return float(np.linalg.norm(kernel - rebuilt(kernels, method)))


def shape_of(kernel: tuple[int, ...]) -> OperatorShape:
    return OperatorShape(kind="conv", in_channels=kernel[1], out_channels=kernel[0], kernel=kernel[2:])


@functools.cache
def start(name: str) -> Candidate:
    module = build(name)
    return Candidate(module=module, example_input=example(), network=trace(module, example(), name))


def candidate(module: nn.Module, x: Tensor) -> Candidate:
    module.eval()
    return Candidate(module=module, example_input=x, network=trace(module, x))


def option(where: str, method: str, rank: Any, **more: Any) -> Option:
    return Option(transform="low_rank", where=where, settings={"method": method, "rank": rank, **more})


def effective_kernel(chain: nn.Module, like: nn.Conv2d) -> np.ndarray:
    """The single kernel of a chain of convolutions, read off its weights."""
    weights = [layer.weight.detach().double().numpy() for layer in chain.children()]  # type: ignore[operator,union-attr]
    method = {2: "svd" if like.kernel_size == (1, 1) else "spatial", 3: "tucker2", 4: "cp"}[len(weights)]
    return rebuilt(tuple(weights), method)


# ---------------------------------------------------------------- the algebra


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_gives_the_kernel_back(method: str) -> None:
    kernel = random(*KERNELS[method])
    for dtype, slack in ((np.float64, 1e-4), (np.float32, 1e-4)):
        found = factors(kernel.astype(dtype), method, full_ranks(shape_of(kernel.shape), method))
        assert {part.dtype for part in found} == {np.dtype(dtype)}
        assert missed(kernel, found, method) <= slack * np.linalg.norm(kernel)


@pytest.mark.parametrize("rank", [1, 2, 5, 6])
def test_svd_and_spatial_miss_exactly_the_dropped_singular_values(rank: int) -> None:
    kernel = random(10, 7, 1, 1)
    values = np.linalg.svd(kernel[:, :, 0, 0], compute_uv=False)
    want = math.sqrt(sum(values[rank:] ** 2))
    assert missed(kernel, factors(kernel, "svd", {"rank": rank}), "svd") == pytest.approx(want, rel=1e-9)
    kernel = random(6, 4, 3, 5)
    table = np.empty((4 * 3, 6 * 5))
    for n, c, y, x in np.ndindex(6, 4, 3, 5):
        table[c * 3 + y, n * 5 + x] = kernel[n, c, y, x]
    values = np.linalg.svd(table, compute_uv=False)
    want = math.sqrt(sum(values[rank:] ** 2))
    assert missed(kernel, factors(kernel, "spatial", {"rank": rank}), "spatial") == pytest.approx(want, rel=1e-9)


def test_the_root_of_the_singular_values_is_on_either_side() -> None:
    first, second = factors(random(9, 6), "svd", {"rank": 4})
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=0), rtol=1e-9)


@pytest.mark.parametrize(("rank", "rank_in"), [(3, 2), (5, 6), (1, 7), (10, 1)])
def test_tucker2_is_no_worse_than_hosvd_and_better_than_random_projections(rank: int, rank_in: int) -> None:
    kernel = random(10, 7, 3, 3, seed=rank)
    outer = np.linalg.svd(kernel.reshape(10, -1))[0][:, :rank]
    inner = np.linalg.svd(kernel.transpose(1, 0, 2, 3).reshape(7, -1))[0][:, :rank_in]

    def left(outer: np.ndarray, inner: np.ndarray) -> float:
        onto_n, onto_c = outer @ outer.T, inner @ inner.T
        return float(np.linalg.norm(kernel - np.einsum("nm,cd,mdhw->nchw", onto_n, onto_c, kernel)))

    found = missed(kernel, tucker2(kernel, rank, rank_in), "tucker2")
    assert found <= left(outer, inner) * (1 + 1e-9)
    assert missed(kernel, tucker2(kernel, rank, rank_in, sweeps=1), "tucker2") >= found * (1 - 1e-9)
    for seed in range(5):
        bases = (np.linalg.qr(random(size, r, seed=seed))[0] for size, r in ((10, rank), (7, rank_in)))
        assert found < left(*bases)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_cp_finds_a_tensor_that_has_the_rank(rank: int) -> None:
    kernel = np.einsum("nr,cr,hr,wr->nchw", *(random(size, rank, seed=size) for size in (12, 10, 3, 4)))
    found = factors(kernel, "cp", {"rank": rank})
    assert missed(kernel, found, "cp") <= 1e-3 * np.linalg.norm(kernel)


def test_cp_terms_stay_bounded_where_no_best_approximation_exists() -> None:
    a, b = np.eye(2)  # of border rank 2: rank 2 comes as near as one likes, with terms that grow beyond all bounds
    kernel = sum(np.einsum("i,j,k->ijk", *v) for v in ((a, a, b), (a, b, a), (b, a, a)))[..., None]  # type: ignore[index]
    found = cp(kernel, 2)
    norms = np.prod([np.linalg.norm(factor, axis=0) for factor in found], axis=0)
    assert norms.max() < 100 * np.linalg.norm(kernel)
    assert missed(kernel, factors(kernel, "cp", {"rank": 2}), "cp") < 0.2 * np.linalg.norm(kernel)


def test_cp_is_deterministic_and_falls_with_the_rank() -> None:
    kernel = random(8, 6, 3, 3)
    errors = [missed(kernel, factors(kernel, "cp", {"rank": rank}), "cp") for rank in (1, 4, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]
    assert all(np.array_equal(x, y) for x, y in zip(cp(kernel, 4), cp(kernel, 4), strict=True))


def test_a_kernel_of_zeros_stays_zero() -> None:
    for method, size in KERNELS.items():
        found = factors(np.zeros(size), method, dict.fromkeys(full_ranks(shape_of(size), method), 2))
        assert not rebuilt(found, method).any()


@pytest.mark.parametrize("method", ["svd", "spatial", "tucker2"])
@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95, 1.0])
def test_rank_for_energy_is_the_smallest_that_keeps_it(method: str, energy: float) -> None:
    kernel = random(*KERNELS[method])
    rank = rank_for_energy(kernel, method, energy)

    def share(rank: int) -> float:
        full = full_ranks(shape_of(kernel.shape), method)
        ranks = {name: min(most, rank) for name, most in full.items()}
        sweeps = {"sweeps": 0} if method == "tucker2" else {}
        parts = tucker2(kernel, ranks["rank"], ranks["rank_in"], **sweeps) if sweeps else factors(kernel, method, ranks)
        return float(1 - (missed(kernel, parts, method) / np.linalg.norm(kernel)) ** 2)

    assert share(rank) >= energy - 1e-9
    assert rank == 1 or share(rank - 1) < energy


def test_rank_for_energy_by_cp_and_what_it_refuses() -> None:
    kernel = np.einsum("nr,cr,hr,wr->nchw", *(random(size, 3, seed=size) for size in (6, 5, 3, 2)))
    rank = rank_for_energy(kernel, "cp", 0.999)
    assert rank <= 3
    assert 1 - (missed(kernel, factors(kernel, "cp", {"rank": rank}), "cp") / np.linalg.norm(kernel)) ** 2 >= 0.999
    assert rank_for_energy(random(5, 4), "svd", 1e-6) == 1
    for energy in (0.0, 1.5, -1.0, math.nan):
        with pytest.raises(BadInputError, match="share"):
            rank_for_energy(kernel, "cp", energy)
    for bad in (np.zeros((4, 4)), np.full((4, 4), np.nan)):
        with pytest.raises(BadInputError, match="zero or holds"):
            rank_for_energy(bad, "svd", 0.9)
    for method, weight in (("svd", kernel), ("cp", random(4, 4)), ("qr", kernel)):
        with pytest.raises(UnsupportedError):
            rank_for_energy(weight, method, 0.9)


# ---------------------------------------------------------------- layers in networks

LAYERS = {
    "plain": lambda: nn.Conv2d(12, 16, 3, padding=1),
    "strides": lambda: nn.Conv2d(12, 16, (3, 5), stride=(2, 3), padding=(1, 0), bias=False),
    "dilation": lambda: nn.Conv2d(12, 16, 3, padding=(4, 2), dilation=(3, 2)),
    "same": lambda: nn.Conv2d(12, 16, (4, 3), padding="same", dilation=(1, 2)),
    "own": lambda: SamePadConv(12, 16, 3, 2),
    "own_even": lambda: SamePadConv(12, 16, 5, 3),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", ["spatial", "tucker2", "cp"])
def test_strides_paddings_and_dilations_are_divided_between_the_layers(method: str, kind: str) -> None:
    """The layer gets a kernel that has the rank: then the chain has to give the old layer's outputs."""
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    ranks = {"rank": 3, "rank_in": 2} if method == "tucker2" else {"rank": 3}
    with torch.no_grad():
        exact = rebuilt(factors(layer.weight.double().numpy(), method, ranks), method)
        layer.weight.copy_(torch.from_numpy(exact))
    module = nn.Sequential(nn.Conv2d(3, 12, 1), layer, nn.ReLU(), nn.Conv2d(16, 4, 1))
    first = candidate(module, torch.randn(1, 3, 13, 16))
    result = LowRank().apply(first, option("1", method, **ranks))
    x = torch.randn(2, 3, 13, 16)
    with torch.inference_mode():
        want, found = module(x), result.module(x)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=2e-3 * float(want.abs().max()))
    assert trace(result.module, first.example_input, "network") == result.network
    if kind == "own":  # a later layer, beside the padding layers of the first
        again = LowRank().apply(result, option("3", "svd", 1))
        assert trace(again.module, first.example_input, "network") == again.network


def test_zeros_beside_a_kernel_of_rows_alone_stay_with_it() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 16, (3, 1), padding=(1, 2))
    with torch.no_grad():
        kernels = factors(layer.weight.double().numpy(), "tucker2", {"rank": 4, "rank_in": 3})
        layer.weight.copy_(torch.from_numpy(rebuilt(kernels, "tucker2")))
    module = nn.Sequential(nn.Conv2d(3, 12, 1), layer)
    result = LowRank().apply(candidate(module, torch.randn(1, 3, 9, 9)), option("1", "tucker2", 4, rank_in=3))
    x = torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        torch.testing.assert_close(result.module(x), module(x), rtol=1e-4, atol=1e-4)
    assert trace(result.module, torch.randn(1, 3, 9, 9), "network") == result.network


@pytest.mark.parametrize("pads", [0, 1])
def test_pointwise_layers_keep_stride_and_padding(pads: int) -> None:
    torch.manual_seed(0)
    low = torch.randn(16, 2) @ torch.randn(2, 12)
    layer = nn.Conv2d(12, 16, 1, stride=2, padding=pads)
    layer.weight = nn.Parameter(low[:, :, None, None])
    module = nn.Sequential(nn.Conv2d(3, 12, 1), layer)
    result = LowRank().apply(candidate(module, torch.randn(1, 3, 9, 9)), option("1", "svd", 2))
    x = torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        torch.testing.assert_close(result.module(x), module(x), rtol=1e-4, atol=1e-4)
    assert [layer.stride for layer in result.module[1]] == [(2, 2), (1, 1)]  # type: ignore[index,union-attr]


def test_linear_layers_and_their_macs() -> None:
    first = start("vgg")
    result = LowRank().apply(first, option("classifier.0", "svd", 5))
    weight = first.module.get_parameter("classifier.0.weight").detach().numpy()
    chain = [result.module.get_parameter(f"classifier.0.{i}.weight").detach().numpy() for i in (0, 1)]
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(chain[1] @ chain[0], (left[:, :5] * values[:5]) @ right[:5], atol=1e-5)
    bias = result.module.get_parameter("classifier.0.1.bias")
    assert torch.equal(bias, first.module.get_parameter("classifier.0.bias"))
    assert first.network.macs - result.network.macs == 192 * 10 - 5 * (192 + 10)
    assert sum(p.numel() for p in result.module.parameters()) < sum(p.numel() for p in first.module.parameters())


def test_no_low_rank_layer_of_the_same_form_fits_the_outputs_of_a_kernel_better() -> None:
    first = start("resnet")
    layer = first.module.get_submodule("3.first.0")
    assert isinstance(layer, nn.Conv2d)
    kernel = layer.weight.detach().double().numpy()
    result = LowRank().apply(first, option("3.first.0", "spatial", 6))
    found = effective_kernel(result.module.get_submodule("3.first.0"), layer)
    values = np.linalg.svd(kernel.transpose(1, 2, 0, 3).reshape(36, 36), compute_uv=False)
    assert np.linalg.norm(found - kernel) == pytest.approx(math.sqrt(sum(values[6:] ** 2)), rel=1e-5)


# ---------------------------------------------------------------- prediction


def first_of_each(network: Network, data: st.DataObject) -> Option:
    offered = LowRank().options(network, ENTRY)
    method = data.draw(st.sampled_from(sorted({str(o.settings["method"]) for o in offered})))
    return data.draw(st.sampled_from([o for o in offered if o.settings["method"] == method]))


@SLOW_TO_TRACE
@given(kinds=st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), data=st.data())
def test_predicted_networks_are_traced_networks(kinds: list[str], data: st.DataObject) -> None:
    module = of_pieces(kinds)
    current = Candidate(module=module, example_input=example(), network=trace(module, example()))
    for _ in range(2):
        chosen = first_of_each(current.network, data)
        before = current
        current = LowRank().apply(before, chosen)
        assert current.network == LowRank().predict(before.network, chosen)
        assert current.network == trace(current.module, example())
        assert current.network.macs < before.network.macs
    new = f"{chosen.where}.0"
    if current.network.groups[new].refused is None:
        width = current.network.groups[new].width - 1
        pruning = Option(transform="channel_pruning", where=new, settings={"width": width})
        current = registry.transform("channel_pruning").apply(current, pruning)
        found = trace(current.module, example())
        assert [(o.name, found.shape(o)) for o in found.operators] == [
            (o.name, current.network.shape(o)) for o in current.network.operators
        ]
        assert found.axes == current.network.axes
    with torch.inference_mode():
        assert torch.isfinite(current.module(example())).all()


@pytest.mark.parametrize("multiple", [1, 4])
def test_options_save_a_fifth_and_keep_to_the_multiple(multiple: int) -> None:
    entry = ENTRY.model_copy(update={"channel_multiple": multiple})
    network = trace(headed(conv_bn(3, 32), conv_bn(32, 48), conv_bn(48, 40, 1), width=40).eval(), example())
    offered = LowRank().options(network, entry)
    assert {str(o.settings["method"]) for o in offered} == set(METHODS)
    for chosen in offered:
        (place,) = (o for o in network.operators if o.module == chosen.where)
        saved = network.macs - LowRank().predict(network, chosen).macs
        assert saved >= 0.2 * network.shape(place).macs
        ranks = [value for value in chosen.settings.values() if isinstance(value, int)]
        assert all(rank % multiple == 0 for rank in ranks)


def test_a_quantised_candidate_keeps_its_precisions() -> None:
    int8 = registry.transform("int8")
    first = start("vgg")
    whole = int8.apply(first, int8.options(first.network, ENTRY)[0])
    result = LowRank().apply(whole, option("features.0", "spatial", 2))
    assert isinstance(result.quant, QuantSpec)
    assert result.quant.operators == result.network.precisions
    assert set(result.quant.operators) <= {o.name for o in result.network.operators}
    assert len(result.quant.operators) == len(whole.quant.operators) + 1  # type: ignore[union-attr]


# ---------------------------------------------------------------- what the layers keep


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_frozen_weights_modes_and_bias_are_kept(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 16, 3)).to(dtype)
    x = torch.randn(1, 3, 8, 8, dtype=dtype)
    first = candidate(module, x)
    module.train()
    module[0].weight.requires_grad_(False)
    module[2].bias.requires_grad_(False)  # type: ignore[union-attr]
    statistics = module[1].running_mean.clone()  # type: ignore[union-attr,operator]
    low = LowRank().apply(first, option("0", "spatial", 2))
    low = LowRank().apply(low, option("2", "tucker2", 4, rank_in=4))
    chains = [low.module.get_submodule(path) for path in ("0", "2")]
    assert {p.dtype for p in low.module.parameters()} == {dtype}
    assert [p.requires_grad for p in chains[0].parameters()] == [False, False, True]
    assert [p.requires_grad for p in chains[1].parameters()] == [True, True, True, False]
    assert all(m.training for m in low.module.modules())
    assert not any(m._forward_hooks for m in low.module.modules())
    assert torch.equal(low.module.get_buffer("1.running_mean"), statistics)
    assert not set(map(id, module.parameters())) & set(map(id, low.module.parameters()))
    assert torch.isfinite(low.module.eval()(x)).all()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("network", "chosen", "reason"),
    [
        ("resnet", option("1.first.0", "spatial", 25), "1 to 24, not 25"),
        ("resnet", option("1.first.0", "spatial", 13), "saves nothing"),
        ("resnet", option("1.first.0", "spatial", 12), "saves nothing"),
        ("resnet", option("1.first.0", "svd", 2), "kernel is 3 x 3"),
        ("resnet", option("1.first.0", "tucker2", 2), "rank_in of 1 to 8, not None"),
        ("resnet", option("1.first.0", "spatial", 2, rank_in=2), "no setting 'rank_in'"),
        ("resnet", option("1.first.0", "qr", 2), "no method 'qr'"),
        ("mobilenet_v2", option("1.layers.3", "cp", 2), "groups"),
        ("mobilenet_v2", option("1.layers.0", "tucker2", 2, rank_in=2), "has none"),
        ("unet", option("up", "svd", 2), "conv_transpose"),
        ("by_hand", option("map", "svd", 1), "one channel only"),
        ("shared", option("tied", "spatial", 2), "used 3 times|no such layer"),
        ("odds", option("a", "spatial", 2), "more than the layer"),
    ],
)
def test_refusals_of_predict_and_apply_are_the_same(network: str, chosen: Option, reason: str) -> None:
    first = start(network)
    for attempt in (lambda: LowRank().predict(first.network, chosen), lambda: LowRank().apply(first, chosen)):
        with pytest.raises(UnsupportedError, match=reason):
            attempt()


@pytest.mark.parametrize("network", ["unet", "shared", "odds", "watched", "same_pad", "by_hand", "resnext"])
def test_every_option_can_be_applied_and_every_other_layer_has_a_reason(network: str) -> None:
    first = start(network)
    offered = LowRank().options(first.network, ENTRY)
    for chosen in offered[:: max(1, len(offered) // 8)]:
        with torch.inference_mode():
            assert torch.isfinite(LowRank().apply(first, chosen).module(first.example_input)).all()
    layers = {o.module or o.name for o in first.network.operators if o.kind in ("conv", "linear", "conv_transpose")}
    refused = LowRank().refusals(first.network, ENTRY)
    assert set(refused) | {o.where for o in offered} == layers
    assert not set(refused) & {o.where for o in offered}


class Dilated(nn.Conv2d):
    """Computes something else than its convolution, which a trace does not show as another operator."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, dilation=2)


class Curious(nn.Module):
    """Reads an attribute of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / self.layer.in_channels


class Listed(nn.Module):
    """Keeps its layer in a plain list too, and calls it from there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 12, 3)
        self.all = [self.layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.all[0](x)


def test_what_only_the_module_shows_is_refused_by_apply() -> None:
    hooked, broken = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 12, 3)
    hooked.register_forward_hook(lambda *_: None)
    twins = nn.ModuleDict({"a": nn.Conv2d(3, 12, 3), "b": nn.Conv2d(3, 12, 3)})
    twins["b"].weight = twins["a"].weight
    with torch.no_grad():
        broken.weight[0, 0, 0, 0] = math.nan

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twins = twins

        def forward(self, x: Tensor) -> Tensor:
            return self.twins["a"](x)

    cases: list[tuple[nn.Module, str, str]] = [
        (nn.Sequential(Dilated(3, 12, 3)), "0", "something else than its convolution"),
        (Curious(), "layer", "without it"),
        (Listed(), "layer", "calls it 0 times"),
        (nn.Sequential(hooked), "0", "hooks"),
        (Half(), "twins.a", "shared|no such layer"),
    ]
    x = torch.randn(1, 3, 8, 8)
    for module, path, reason in cases:
        first = candidate(module, x)
        kept = copy.deepcopy(module.state_dict())
        with pytest.raises(UnsupportedError, match=reason):
            LowRank().apply(first, option(path, "spatial", 2))
        assert all(torch.equal(kept[name], tensor) for name, tensor in module.state_dict().items())
    with pytest.raises(BadInputError, match="not finite"):
        LowRank().apply(candidate(nn.Sequential(broken), x), option("0", "spatial", 2))


# ---------------------------------------------------------------- files


def test_an_exported_low_rank_network_gives_the_same_output(tmp_path: Path) -> None:
    current = start("same_pad")
    for chosen in (option("0", "spatial", 3), option("3", "svd", 2)):
        current = LowRank().apply(current, chosen)
    (model,) = mobilekit.export(current.module, example(), to=["onnx"], out=tmp_path)
    assert model.parity.status == "executed"
    with torch.inference_mode():
        want = current.module(example()).numpy()
    found = registry.runtime("onnx").open(tmp_path / model.path)([example().numpy()])[0]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
