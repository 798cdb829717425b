"""Every lever on bad input: refused with a sentence, or done right, which is checked; nothing in between."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import SIDE, Head, build, conv_bn, example, headed, settled
from torch import nn

from mobilekit import registry
from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.network import trace
from mobilekit.types import Calibration, Candidate, Option, RuntimeEntry

LEVERS = registry.names("transforms")
ENTRY = RuntimeEntry(name="onnx", precisions=("fp32", "int8"), channel_multiple=1)
BY_HAND: dict[str, list[dict[str, Any]]] = {
    "block_circulant": [{"block": 2}],
    "low_bit": [{"bits": 4}, {"bits": 2}],
}
"""Settings for levers that offer nothing themselves; tried at every layer with weights, where they may be refused."""
AT_MOST = 3
REFUSED = (UnsupportedError, BadInputError)


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))


def candidate(module: nn.Module) -> Candidate:
    like = next(module.parameters())
    x = example().to(like.dtype)
    data = Calibration(inputs=noise(8).split(4))
    return Candidate(module, x, trace(module, x), calibration=data)


@functools.cache
def start(name: str) -> Candidate:
    return candidate(build(name))


def wishes(plugin: str, before: Candidate) -> list[Option]:
    """A few options, spread over all that the lever offers, or those written by hand."""
    options = registry.transform(plugin).options(before.network, ENTRY)
    if not options:
        places = [o.module for o in before.network.operators if o.kind in ("conv", "linear")]
        options = [
            Option(transform=plugin, where=place, settings=settings)
            for settings in BY_HAND.get(plugin, [])
            for place in dict.fromkeys([*places, "network"])
        ]
    return options[:: max(1, len(options) // AT_MOST)]


def sentence(text: object) -> bool:
    return len(re.findall(r"\w+", str(text))) >= 4


def carried_out(plugin: str, before: Candidate, option: Option) -> tuple[Candidate | None, str]:
    """The result, or None and why it was refused."""
    try:
        return registry.transform(plugin).apply(before, option), ""
    except REFUSED as error:
        return None, str(error)


def results(plugin: str, before: Candidate) -> Iterator[tuple[Option, Candidate]]:
    """What comes out of each option that is carried out; the others are refused alike by `predict` or by `apply`."""
    lever = registry.transform(plugin)
    offered = lever.options(before.network, ENTRY)
    text = before.network.model_dump_json()
    kept = {name: tensor.clone() for name, tensor in before.module.state_dict().items()}
    for option in wishes(plugin, before):
        after, reason = carried_out(plugin, before, option)
        if after is None:
            assert sentence(reason)
            assert option not in offered or "float" in reason, f"an offered option is refused: {reason}"
            continue
        assert after.network == lever.predict(before.network, option)
        with torch.inference_mode():
            output = after.module(before.example_input)
        assert output.dtype == before.example_input.dtype
        assert torch.isfinite(output).all()
        yield option, after
    assert before.network.model_dump_json() == text
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.module.state_dict().items())


def shapes(candidate_: Candidate) -> list[object]:
    network = trace(candidate_.module, candidate_.example_input)
    return [(o.name, o.kind, o.module, network.shape(o)) for o in network.operators]


def as_told(candidate_: Candidate) -> list[object]:
    network = candidate_.network
    return [(o.name, o.kind, o.module, network.shape(o)) for o in network.operators]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("plugin", LEVERS)
def test_numbers_out_of_range_are_refused(plugin: str) -> None:
    """A width of 0 (sparsity 1), a rank above the full one, groups that do not divide, blocks larger than a layer."""
    before, lever = start("mobilenet_v2"), registry.transform(plugin)
    tried = 0
    for option in wishes(plugin, before):
        for key, value in option.settings.items():
            if isinstance(value, bool) or not isinstance(value, int):
                continue
            for wrong in (0, -1, 10**6, None, float("nan")):
                other = option.model_copy(update={"settings": {**option.settings, key: wrong}})
                for call in (lambda o: lever.predict(before.network, o), lambda o: lever.apply(before, o)):
                    with pytest.raises(REFUSED) as caught:
                        call(other)
                    assert sentence(caught.value), caught.value
                tried += 1
    texts = {str(v) for o in wishes(plugin, before) for v in o.settings.values() if isinstance(v, str)}
    plain = [o for o in wishes(plugin, before) if not o.settings]
    assert tried or texts or plain, f"{plugin} has no settings that could be wrong"
    for option in plain:  # a lever without settings takes none
        other = option.model_copy(update={"settings": {"amount": 1}})
        for call in (lambda o: lever.predict(before.network, o), lambda o: lever.apply(before, o)):
            with pytest.raises(REFUSED) as caught:
                call(other)
            assert sentence(caught.value), caught.value


@pytest.mark.parametrize("width", [0, -1, 9, 7.5, "4"])
def test_no_channels_and_more_channels_than_there_are_are_refused(width: Any) -> None:
    before, lever = start("resnet"), registry.transform("channel_pruning")
    option = Option(transform="channel_pruning", where="0.0", settings={"width": width})
    with pytest.raises(UnsupportedError, match=f"0.0 cannot keep {width} of 8 channels"):
        lever.apply(before, option)


@pytest.mark.parametrize(("method", "settings"), [("svd", {"rank": 11}), ("svd", {"rank": 0})])
def test_ranks_above_the_full_one_are_refused(method: str, settings: dict[str, int]) -> None:
    before, lever = start("vgg"), registry.transform("low_rank")
    option = Option(transform="low_rank", where="classifier.0", settings={"method": method, **settings})
    with pytest.raises(UnsupportedError, match="can have a rank of 1 to 10"):
        lever.apply(before, option)


def test_groups_that_do_not_divide_are_refused() -> None:
    if "group_convolution" not in LEVERS:
        pytest.skip("there is no group_convolution lever")
    before, lever = (
        candidate(headed(conv_bn(3, 16), conv_bn(16, 16), width=16).eval()),
        registry.transform("group_convolution"),
    )
    grouped = [o for o in lever.options(before.network, ENTRY) if isinstance(o.settings.get("groups"), int)]
    for option in grouped:
        for groups in (3, 5, 7, 32):
            wrong = option.model_copy(update={"settings": {**option.settings, "groups": groups}})
            with pytest.raises(UnsupportedError) as caught:
                lever.apply(before, wrong)
            assert sentence(caught.value)


# ---------------------------------------------------------------- networks


def narrow() -> nn.Module:
    """Layers of one channel at every place that can have one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (conv_bn(3, 1), nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.Conv2d(1, 4, 1), nn.ReLU(), Head(4))
        return settled(nn.Sequential(*layers))


@pytest.mark.parametrize("plugin", LEVERS)
def test_one_channel_layers(plugin: str) -> None:
    before = candidate(narrow())
    refused = registry.transform(plugin).refusals(before.network, ENTRY)
    for option, after in results(plugin, before):
        assert option.where not in refused or plugin in BY_HAND
        assert shapes(after) == as_told(after)
    assert refused or registry.transform(plugin).options(before.network, ENTRY)


@pytest.mark.parametrize("plugin", LEVERS)
def test_modules_that_are_used_twice(plugin: str) -> None:
    before, lever = start("shared"), registry.transform(plugin)
    for option, after in results(plugin, before):
        assert shapes(after) == as_told(after), option
        shared = after.module
        if option.where not in ("layer", "tied") and isinstance(shared.layer, nn.Conv2d):  # type: ignore[union-attr]
            assert torch.equal(shared.get_parameter("layer.weight"), shared.tied.weight)  # type: ignore[union-attr,arg-type]
    for wish in wishes(plugin, start("mobilenet_v2"))[:1]:
        for where in ("layer", "tied"):
            option = wish.model_copy(update={"where": where})
            after, reason = carried_out(plugin, before, option)
            if after is None:
                assert sentence(reason)
            else:  # both uses read one weight: it may change, if it stays one
                assert plugin in BY_HAND
                assert after.network == lever.predict(before.network, option)
                assert shapes(after) == as_told(after)
                assert after.module.layer.weight is after.module.tied.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("plugin", LEVERS)
def test_frozen_parameters_stay_frozen(plugin: str) -> None:
    module = copy.deepcopy(build("mobilenet_v2"))
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    before = candidate(module)
    carried_out = 0
    for option, after in results(plugin, before):
        assert not [name for name, p in after.module.named_parameters() if p.requires_grad], option
        carried_out += 1
    assert carried_out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plugin", LEVERS)
def test_half_precision_is_refused_or_right(plugin: str, dtype: torch.dtype) -> None:
    half = copy.deepcopy(build("mobilenet_v2")).to(dtype)
    exact = candidate(copy.deepcopy(half).float())
    lever = registry.transform(plugin)
    for option, after in results(plugin, candidate(half)):
        kinds = {t.dtype for t in after.module.state_dict().values() if t.is_floating_point()}
        assert kinds == {dtype}, option
        with torch.inference_mode():
            want = lever.apply(exact, option).module(exact.example_input)
            found = after.module(exact.example_input.to(dtype)).float()
        spread = float(want.std())
        assert float((found - want).abs().max()) < (0.3 if dtype == torch.bfloat16 else 0.05) * max(spread, 1e-3), (
            option
        )
