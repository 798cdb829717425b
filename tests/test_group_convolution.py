"""Substituted convolutions: started at the optimum where one is known, fitted to outputs, as predicted, and refused."""

from __future__ import annotations

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
from networks import SLOW_TO_TRACE, SamePadConv, build, example, headed, settled
from torch import Tensor, nn

from mobilekit import registry
from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.network import trace
from mobilekit.transforms._refits import writers
from mobilekit.transforms._substitutes import METHODS
from mobilekit.transforms.group_convolution import GroupConvolution
from mobilekit.types import Calibration, Candidate, ExportJob, Network, Option, QuantSpec, RuntimeEntry
from mobilekit.workloads import fashion_mnist

LEVER = GroupConvolution()
ENTRY = RuntimeEntry(name="onnx", precisions=("fp32", "int8"), channel_multiple=1)
SETTINGS: dict[str, dict[str, int]] = {
    "depthwise_separable": {"multiplier": 2},
    "inverted_residual": {"expansion": 1},
    "shuffle_v1": {"groups": 2, "expansion": 1},
    "shuffle_v2": {},
    "interleaved": {"groups": 2},
    "fire": {"squeeze": 4},
}


def option(where: str, method: str, **settings: Any) -> Option:
    chosen = {**SETTINGS.get(method, {}), **settings}
    return Option(transform="group_convolution", where=where, settings={"method": method, **chosen})


def single(conv: nn.Conv2d, size: tuple[int, int] = (9, 9)) -> Candidate:
    """A network of this convolution between others, so that its channels on both sides are its own."""
    layers = nn.Sequential(
        nn.Conv2d(3, conv.in_channels, 1), nn.ReLU(), conv, nn.ReLU(), nn.Conv2d(conv.out_channels, 3, 1)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settled(layers)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    return Candidate(module=layers, example_input=x, network=trace(layers, x))


@functools.cache
def start(name: str) -> Candidate:
    module = build(name)
    return Candidate(module=module, example_input=example(), network=trace(module, example(), name))


@functools.cache
def fashion() -> Candidate:
    module, x = fashion_mnist.model(), fashion_mnist.example_input()
    calibration = Calibration(inputs=(next(iter(fashion_mnist.calibration_data()))[:20],), seed=3)
    return Candidate(module=module, example_input=x, network=trace(module, x), calibration=calibration)


def kernel_of(module: nn.Module, at: nn.Conv2d) -> np.ndarray:
    """The kernel that a linear unit of stride 1 with zeros around the map amounts to, measured by impulses."""
    reach = at.kernel_size[0] // 2
    side = 2 * reach + 1
    found = np.zeros((at.out_channels, at.in_channels, side, side))
    with torch.no_grad():
        zero = module(torch.zeros(1, at.in_channels, side, side))
        for channel in range(at.in_channels):
            x = torch.zeros(1, at.in_channels, side, side)
            x[0, channel, reach, reach] = 1
            found[:, channel] = (module(x) - zero)[0].flip(1, 2).numpy()
    return found


def substitute(conv: nn.Conv2d, method: str, **settings: Any) -> tuple[nn.Module, nn.Conv2d]:
    """What stands in the place of the convolution, and the convolution with the weights that it had."""
    begun = single(conv)
    result = LEVER.apply(begun, option("2", method, **settings))
    old = begun.module.get_submodule("2")
    assert isinstance(old, nn.Conv2d)
    return result.module.get_submodule("2"), old


def squared(conv: nn.Conv2d, new: nn.Module) -> float:
    return float(np.square(conv.weight.detach().numpy() - kernel_of(new, conv)).sum())


# ---------------------------------------------------------------- the start from the weights


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("method", "full"), [("depthwise_separable", "multiplier"), ("inverted_residual", "expansion")]
)
def test_as_many_filters_as_taps_are_exact(method: str, full: str, stride: int, bias: bool) -> None:
    new, conv = substitute(nn.Conv2d(5, 12, 3, stride, 1, bias=bias), method, **{full: 9})
    x = torch.randn(2, 5, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(new(x), conv(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("multiplier", [1, 2, 4])
def test_depthwise_separable_misses_exactly_the_dropped_singular_values(multiplier: int) -> None:
    new, conv = substitute(nn.Conv2d(6, 10, 3, padding=1), "depthwise_separable", multiplier=multiplier)
    weight = conv.weight.detach().numpy().astype(np.float64)
    dropped = [np.linalg.svd(weight[:, c].reshape(10, 9), compute_uv=False)[multiplier:] for c in range(6)]
    assert squared(conv, new) == pytest.approx(sum(float((s**2).sum()) for s in dropped), rel=1e-4)


def test_interleaved_misses_exactly_the_dropped_singular_values_of_its_blocks() -> None:
    new, conv = substitute(nn.Conv2d(6, 12, 3, padding=1), "interleaved", groups=2)
    weight = conv.weight.detach().numpy().astype(np.float64)
    want = 0.0
    for part in range(3):  # three groups of four outputs, two of three inputs
        for group in range(2):
            block = weight[4 * part : 4 * part + 4, 3 * group : 3 * group + 3].reshape(4, -1)
            want += float((np.linalg.svd(block, compute_uv=False)[1:] ** 2).sum())
    assert squared(conv, new) == pytest.approx(want, rel=1e-4)


def test_fire_misses_what_its_rank_and_its_pointwise_half_drop() -> None:
    new, conv = substitute(nn.Conv2d(6, 10, 3, padding=1), "fire", squeeze=4)
    weight = conv.weight.detach().numpy().astype(np.float64)
    rows = [weight[o, :, 1, 1] for o in range(5)] + [
        weight[o, :, y, x] for o in range(5, 10) for y, x in np.ndindex(3, 3)
    ]
    dropped = float((np.linalg.svd(np.array(rows), compute_uv=False)[4:] ** 2).sum())
    around = float((weight[:5] ** 2).sum() - (weight[:5, :, 1, 1] ** 2).sum())
    assert squared(conv, new) == pytest.approx(dropped + around, rel=1e-4)


def test_terms_found_by_sweeps_are_better_than_the_largest_singular_values() -> None:
    new, conv = substitute(nn.Conv2d(8, 12, 3, padding=1), "inverted_residual", expansion=2)
    weight = conv.weight.detach().numpy().astype(np.float64)
    values = [np.linalg.svd(weight[:, c].reshape(12, 9), compute_uv=False) for c in range(8)]
    left = np.sort(np.concatenate(values))[:-16]
    assert squared(conv, new) < 0.9 * float((left**2).sum())
    blocks, conv = substitute(nn.Conv2d(8, 12, 3, padding=1), "shuffle_v1", groups=2, expansion=2)
    assert squared(conv, blocks) < 0.75 * float((conv.weight.detach() ** 2).sum())


def test_shuffle_v1_finds_a_kernel_of_its_own_form_and_keeps_groups_apart() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    begun = single(conv)
    rng = np.random.default_rng(0)
    weight = np.zeros((4, 4, 3, 3))
    for o, i in np.ndindex(2, 2):  # rank one in every block of two outputs and two inputs
        terms = np.einsum("n,c,hw->nchw", rng.normal(size=2), rng.normal(size=2), rng.normal(size=(3, 3)))
        weight[2 * o : 2 * o + 2, 2 * i : 2 * i + 2] = terms
    conv.weight.data = torch.from_numpy(weight).float()
    new = LEVER.apply(begun, option("2", "shuffle_v1", groups=2, expansion=1)).module.get_submodule("2")
    assert squared(conv, new) <= 1e-6 * float((weight**2).sum())


def test_shuffle_v2_passes_half_of_the_channels_weighed_by_the_centre() -> None:
    new, conv = substitute(nn.Conv2d(8, 8, 3, padding=1), "shuffle_v2")
    found, weight = kernel_of(new, conv), conv.weight.detach().numpy()
    want = np.zeros((4, 8, 3, 3))
    for i in range(4):
        want[i, i, 1, 1] = weight[2 * i, i, 1, 1]
    np.testing.assert_allclose(found[0::2], want, atol=1e-5)
    assert np.abs(found[1::2, :4]).max() < 1e-5  # the branch reads the other half alone
    missed = np.square(weight[1::2, 4:] - found[1::2, 4:]).sum()
    assert missed < 0.6 * np.square(weight[1::2, 4:]).sum()


@pytest.mark.parametrize("method", METHODS)
def test_the_old_bias_is_the_last_layers(method: str) -> None:
    new, conv = substitute(nn.Conv2d(8, 8, 3, padding=1), method)
    with torch.no_grad():
        got = new(torch.zeros(1, 8, 5, 5))
    assert conv.bias is not None
    torch.testing.assert_close(got, conv.bias[None, :, None, None].expand(1, 8, 5, 5))
    assert sum(isinstance(layer, nn.Conv2d) and layer.bias is not None for layer in new.modules()) == 1


def test_outputs_are_traced_back_through_shuffles_to_who_writes_them() -> None:
    new, _ = substitute(nn.Conv2d(8, 8, 3, padding=1), "shuffle_v2")
    kernels = {name: layer.weight for name, layer in new.named_children() if isinstance(layer, nn.Conv2d)}
    found = writers(new.links, kernels)  # type: ignore[arg-type]
    assert found == [pair for i in range(4) for pair in (("passing", i), ("expand", i))]


# ---------------------------------------------------------------- fits to the layer's output


PLACE = "stage1.0.conv2"


def output_error(candidate: Candidate, settings: Option) -> float:
    """Relative squared error of the layer's output on its own inputs, over the images that were fitted."""
    new = LEVER.apply(candidate, settings).module.get_submodule(settings.where)
    old = candidate.module.get_submodule(settings.where)
    missed = total = 0.0
    assert candidate.calibration is not None
    seen: list[Tensor] = []
    handle = old.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        for batch in candidate.calibration.inputs:
            candidate.module(batch)
        handle.remove()
        for x in seen:
            want = old(x)
            missed, total = missed + float((new(x) - want).square().sum()), total + float(want.square().sum())
    return missed / total


@pytest.mark.parametrize("method", METHODS)
def test_least_squares_lowers_the_output_error_and_training_does_not_raise_it(method: str) -> None:
    where = "stage1.0.conv1" if method == "fire" else PLACE  # the other one's channels are added to a stream
    settings = {"squeeze": 16} if method == "fire" else {}
    by_weights, by_squares, trained = (
        output_error(fashion(), option(where, method, **settings, fit=fit))
        for fit in ("weights", "least_squares", "layer_wise")
    )
    assert by_squares < 0.95 * by_weights
    assert trained <= by_squares * (1 + 1e-3)


def test_a_fitted_bias_takes_up_the_mean() -> None:
    begun = single(nn.Conv2d(6, 8, 3, padding=1))
    inputs = (torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(2)) + 1,)
    begun = Candidate(begun.module, begun.example_input, begun.network, calibration=Calibration(inputs=inputs))
    new = LEVER.apply(begun, option("2", "depthwise_separable", multiplier=1, fit="least_squares")).module
    with torch.no_grad():
        x = begun.module[:2](inputs[0])  # type: ignore[index]
        missed = new.get_submodule("2")(x) - begun.module.get_submodule("2")(x)
    assert missed.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert missed.abs().mean() > 1e-2


def test_fits_are_the_same_each_time() -> None:
    begun = single(nn.Conv2d(6, 8, 3, padding=1))
    calibration = Calibration(inputs=(torch.randn(9, 3, 9, 9, generator=torch.Generator().manual_seed(2)),))
    begun = Candidate(begun.module, begun.example_input, begun.network, calibration=calibration)
    asked = option("2", "depthwise_separable", multiplier=1, fit="layer_wise")
    first, second = (LEVER.apply(begun, asked).module.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- as predicted


def assert_traced(candidate: Candidate) -> None:
    found = trace(candidate.module, candidate.example_input, candidate.network.name)
    assert found.operators == candidate.network.operators
    assert list(found.groups.items()) == list(candidate.network.groups.items())
    assert list(found.axes.items()) == list(candidate.network.axes.items())


def uses_centre(network: Network, asked: Option) -> bool:
    """Whether channels without a kernel stand beside others; the network shows neither padding nor dilation."""
    kinds = {o.kind for o in LEVER.predict(network, asked).operators}
    return asked.settings["method"] == "fire" or "slice" in kinds


@SLOW_TO_TRACE
@given(
    method=st.sampled_from(sorted(METHODS)), inputs=st.integers(2, 9), outputs=st.integers(2, 10),
    kernel=st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 3), (2, 2)]), stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same"]), dilation=st.integers(1, 2), strength=st.integers(1, 4),
)  # fmt: skip
def test_random_layers_are_refused_alike_or_come_out_as_predicted(  # noqa: PLR0917
    method: str,
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: int,
    padding: Any,
    dilation: int,
    strength: int,
) -> None:
    stride = 1 if padding == "same" else stride
    begun = single(nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation), size=(10, 11))
    settings = dict.fromkeys(METHODS[method], strength)
    if "groups" in settings:
        settings["groups"] = 2
    asked = option("2", method, **settings)
    try:
        predicted = LEVER.predict(begun.network, asked)
    except UnsupportedError:
        with pytest.raises(UnsupportedError):
            LEVER.apply(begun, asked)
        return
    unseen = isinstance(padding, int) and (padding % dilation or padding // dilation >= min(kernel))
    if method in ("fire", "shuffle_v2") and unseen and uses_centre(begun.network, asked):
        with pytest.raises(UnsupportedError, match=r"padding is wider|dilated kernel"):
            LEVER.apply(begun, asked)
        return
    result = LEVER.apply(begun, asked)
    assert result.network == predicted
    assert_traced(result)


@pytest.mark.parametrize("name", ["resnet", "shufflenet_v1", "inception", "unet", "senet"])
def test_every_method_in_networks_with_sums_shuffles_and_concatenations(name: str) -> None:
    begun, seen = start(name), set()
    for asked in LEVER.options(begun.network, ENTRY)[::-1]:
        if asked.settings["method"] not in seen:
            seen.add(asked.settings["method"])
            assert_traced(LEVER.apply(begun, asked))
    assert "depthwise_separable" in seen


def test_a_layer_with_zeros_of_its_own() -> None:
    layers = headed(SamePadConv(3, 8, 3, 2), nn.ReLU(), SamePadConv(8, 12, 3, 2), width=12)
    module = settled(layers)
    begun = Candidate(module, example(), trace(module, example()))
    for method in ("depthwise_separable", "inverted_residual", "shuffle_v1", "interleaved"):
        result = LEVER.apply(begun, option("2", method, **({"groups": 4} if method == "interleaved" else {})))
        assert_traced(result)
    exact = LEVER.apply(begun, option("2", "depthwise_separable", multiplier=9)).module
    with torch.no_grad():
        torch.testing.assert_close(exact(example()), module(example()), rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedError, match="two branches would read it"):
        LEVER.predict(begun.network, option("2", "shuffle_v2"))


def test_two_substitutions_and_a_pruning_behind_them() -> None:
    begun = start("resnet")
    first = next(o for o in LEVER.options(begun.network, ENTRY) if o.where == "1.first.0" and "squeeze" in o.settings)
    current = LEVER.apply(begun, first)
    second = option("2.first.0", "inverted_residual", expansion=1)
    current = LEVER.apply(current, second)
    assert_traced(current)
    for group in ("1.first.0.squeeze", "2.first.0.expand"):
        prune = Option(transform="channel_pruning", where=group, settings={"width": 2, "criterion": "l1"})
        current = registry.transform("channel_pruning").apply(current, prune)
    found = trace(current.module, example())
    assert [(o.name, found.shape(o)) for o in found.operators] == [
        (o.name, current.network.shape(o)) for o in current.network.operators
    ]
    assert list(found.groups.items()) == list(current.network.groups.items())
    assert found.axes == current.network.axes
    assert [o.transform for o in current.history] == ["group_convolution"] * 2 + ["channel_pruning"] * 2
    with torch.no_grad():
        assert torch.isfinite(current.module(example())).all()


def test_channels_that_are_fixed_now_cannot_be_pruned() -> None:
    result = LEVER.apply(start("vgg"), option("features.3", "interleaved", groups=4))
    group = result.network.groups["features.0"]
    assert group.refused == "a grouped convolution (4 groups) fixes it"
    prune = Option(transform="channel_pruning", where="features.0", settings={"width": 4})
    with pytest.raises(UnsupportedError, match="fixes it"):
        registry.transform("channel_pruning").predict(result.network, prune)


def test_int8_plans_hold_for_the_new_operators() -> None:
    begun = start("vgg")
    network = begun.network.with_precisions({"conv2d": "int8", "conv2d_1": "int8"})
    spec = QuantSpec(operators=network.precisions)
    begun = Candidate(begun.module, begun.example_input, network, quant=spec)
    result = LEVER.apply(begun, option("features.3", "fire"))
    assert result.quant is not None
    assert result.quant.operators == result.network.precisions
    assert result.network.precisions["cat"] == "int8"
    assert len(result.network.precisions) == 6


@pytest.mark.parametrize("method", ["depthwise_separable", "shuffle_v2"])  # together all kinds of links
def test_the_new_layers_can_be_exported(method: str, tmp_path: Path) -> None:
    where = "stage1.0.conv1"
    begun = fashion()
    result = LEVER.apply(begun, option(where, method))
    runtime, path = registry.runtime("onnx"), tmp_path / "net.onnx"
    runtime.export(ExportJob(candidate=result, precision="fp32", path=path))
    x = next(iter(fashion_mnist.calibration_data()))[:4]
    with torch.no_grad():
        want = result.module(x).numpy()
    np.testing.assert_allclose(runtime.open(path)([x.numpy()])[0], want, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- where it is offered


def test_at_most_two_strengths_a_method_and_each_saves_a_fifth() -> None:
    network = fashion().network
    options = LEVER.options(network, ENTRY)
    assert {o.settings["method"] for o in options} == set(METHODS)
    counts: dict[tuple[Any, ...], int] = {}
    for asked in options:
        counts[asked.where, asked.settings["method"]] = counts.get((asked.where, asked.settings["method"]), 0) + 1
        old = next(network.shape(o).macs for o in network.operators if o.module == asked.where)
        assert network.macs - LEVER.predict(network, asked).macs >= 0.2 * old
    assert max(counts.values()) <= 2
    refused = LEVER.refusals(network, ENTRY)
    assert "one channel" in refused["stem.0"]
    dense = {o.module for o in network.operators if o.kind == "conv"}
    assert dense == set(refused) | {o.where for o in options}
    npu = ENTRY.model_copy(update={"processor": "npu"})
    methods = {o.settings["method"] for o in LEVER.options(network, npu)}
    assert methods == {"depthwise_separable", "inverted_residual", "fire"}


# ---------------------------------------------------------------- refused, or right all the same


def refusal(begun: Candidate, asked: Option) -> str:
    texts = []
    for call in (lambda: LEVER.predict(begun.network, asked), lambda: LEVER.apply(begun, asked)):
        with pytest.raises(UnsupportedError) as caught:
            call()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    return texts[0]


@pytest.mark.parametrize(
    ("conv", "asked", "reason"),
    [
        ((6, 8, 3), ("interleaved", {"groups": 4}), "its groups can be 2 to 3, not 4"),
        ((8, 6, 3), ("interleaved", {"groups": 2}), "6 output channels do not divide among the 4 groups"),
        ((9, 8, 3), ("shuffle_v1", {"groups": 2}), "2 groups do not divide its 9 input channels"),
        ((6, 8, 3), ("shuffle_v1", {"groups": 2}), "2 x 2 pairs of groups do not divide the 6 channels"),
        ((8, 9, 3), ("shuffle_v1", {"groups": 2}), "2 groups do not divide its 9 output channels"),
        ((8, 9, 3), ("shuffle_v2", {}), "halves the output channels"),
        ((8, 8, 3), ("depthwise_separable", {"multiplier": 10}), "its multiplier can be 1 to 9, not 10"),
        ((8, 8, 3), ("inverted_residual", {"expansion": 0}), "its expansion can be 1 to 9, not 0"),
        ((8, 8, 3), ("fire", {"squeeze": 9}), "its squeeze can be 1 to 8, not 9"),
        ((8, 8, 3), ("fire", {"squeeze": True}), "not True"),
        ((1, 8, 3), ("depthwise_separable", {"multiplier": 1}), "one channel cannot be divided"),
        ((8, 1, 3), ("fire", {}), "one channel cannot be divided"),
        ((8, 8, 1), ("depthwise_separable", {}), "its kernel is 1 x 1"),
        ((8, 8, 3), ("fire", {"rank": 3}), "no setting 'rank'"),
        ((8, 8, 3), ("fire", {"fit": "guess"}), "no fit 'guess'"),
        ((8, 8, 3), ("mobile", {}), "no method 'mobile'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    conv: tuple[int, int, int], asked: tuple[str, dict[str, Any]], reason: str
) -> None:
    inputs, outputs, kernel = conv
    begun = single(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))
    assert reason in refusal(begun, option("2", asked[0], **asked[1]))


def test_places_that_cannot_be_replaced_are_refused() -> None:
    assert "groups" in refusal(start("resnext"), option("2.0", "depthwise_separable"))
    assert "times" in refusal(start("shared"), option("layer", "depthwise_separable")) or "no such" in refusal(
        start("shared"), option("layer", "depthwise_separable")
    )
    assert "it is a linear layer" in refusal(start("vgg"), option("classifier.0", "depthwise_separable"))
    assert "added to those of" in refusal(start("resnet"), option("1.second.0", "fire"))
    no_padding = single(nn.Conv2d(8, 8, 3))
    assert "different sizes" in refusal(no_padding, option("2", "fire"))


def test_fits_without_data_and_values_that_are_not_finite() -> None:
    begun = single(nn.Conv2d(8, 8, 3, padding=1))
    for fit in ("least_squares", "layer_wise"):
        with pytest.raises(UnsupportedError, match="needs calibration inputs"):
            LEVER.apply(begun, option("2", "fire", fit=fit))
    bad = Calibration(inputs=(torch.full((2, 3, 9, 9), math.nan),))
    with pytest.raises(BadInputError, match="not finite"):
        LEVER.apply(
            Candidate(begun.module, begun.example_input, begun.network, calibration=bad),
            option("2", "fire", fit="least_squares"),
        )
    with torch.no_grad():
        begun.module.get_parameter("2.weight")[0, 0, 0, 0] = math.nan
    with pytest.raises(BadInputError, match="not finite"):
        LEVER.apply(begun, option("2", "fire"))


@pytest.mark.parametrize("fit", ["weights", "least_squares"])
def test_half_precision_and_frozen_layers_stay_what_they_are(fit: str) -> None:
    begun = single(nn.Conv2d(8, 8, 3, padding=1))
    module, x = begun.module.to(torch.bfloat16), begun.example_input.to(torch.bfloat16)
    module.get_parameter("2.weight").requires_grad_(False)
    inputs = (torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0)),)
    begun = Candidate(module, x, trace(module, x), calibration=Calibration(inputs=inputs))
    new = LEVER.apply(begun, option("2", "depthwise_separable", fit=fit)).module.get_submodule("2")
    weights = [layer.weight for layer in new.modules() if isinstance(layer, nn.Conv2d)]
    assert {w.dtype for w in weights} == {torch.bfloat16}
    assert not any(w.requires_grad for w in weights)
    exact = LEVER.apply(begun, option("2", "depthwise_separable", multiplier=9)).module
    with torch.no_grad():
        torch.testing.assert_close(exact(x), module(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("padding", [2, "same", (2, 0)])
def test_dilated_and_unevenly_padded_layers_are_exact_at_full_strength(padding: Any) -> None:
    kernel = (2, 3) if padding == "same" else 3
    conv = nn.Conv2d(4, 6, kernel, padding=padding, dilation=2)
    full = 6 if padding == "same" else 9
    new, conv = substitute(conv, "depthwise_separable", multiplier=full)
    x = torch.randn(1, 4, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(new(x), conv(x), rtol=1e-4, atol=1e-4)


def test_the_pointwise_half_of_fire_reads_the_tap_on_its_place() -> None:
    new, conv = substitute(nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2), "fire", squeeze=4)
    centre = torch.zeros_like(conv.weight)
    centre[:3, :, 1, 1], centre[3:] = conv.weight[:3, :, 1, 1], conv.weight[3:]
    x = torch.randn(1, 4, 9, 9)
    with torch.no_grad():
        want = F.conv2d(x, centre, conv.bias, 2, 2, 2)
        torch.testing.assert_close(new(x), want, rtol=1e-4, atol=1e-4)


def test_modes_of_the_old_layer_are_kept_and_the_given_module_is_left_alone() -> None:
    begun = single(nn.Conv2d(8, 8, 3, padding=1))
    before = {name: tensor.clone() for name, tensor in begun.module.state_dict().items()}
    begun.module.get_submodule("2").train()
    new = LEVER.apply(begun, option("2", "shuffle_v2")).module.get_submodule("2")
    assert all(part.training for part in new.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in begun.module.state_dict().items())
