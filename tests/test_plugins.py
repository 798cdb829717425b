"""Contract tests that every plugin file of a room has to pass."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from networks import build, example
from torch import nn

from mobilekit import registry
from mobilekit.errors import UnsupportedError
from mobilekit.network import trace
from mobilekit.transforms.channel_pruning import importance
from mobilekit.types import Candidate, Network, Option, RuntimeEntry

TRANSFORMS = registry.names("transforms")
SUBJECTS = ("mobilenet_v2", "squeeze_linear", "densenet", "shufflenet_v2")
ENTRIES = (
    RuntimeEntry(name="onnx", precisions=("fp32", "int8"), channel_multiple=1),
    RuntimeEntry(name="tflite", precisions=("fp32", "int8"), channel_multiple=4),
    RuntimeEntry(name="onnx", precisions=("fp32",), channel_multiple=16),
)


@functools.cache
def candidate(name: str) -> Candidate:
    module = build(name)
    return Candidate(module=module, example_input=example(), network=trace(module, example(), name))


def shapes(network: Network) -> list[object]:
    return [(o.name, o.kind, o.module, network.shape(o), network.precision(o)) for o in network.operators]


# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize("plugin", TRANSFORMS)
def test_transform_is_named_after_its_file(plugin: str) -> None:
    assert registry.transform(plugin).name == plugin


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("plugin", TRANSFORMS)
def test_options_are_distinct_sound_and_never_at_a_refused_place(plugin: str, subject: str) -> None:
    lever, start = registry.transform(plugin), candidate(subject)
    for entry in ENTRIES:
        options = lever.options(start.network, entry)
        refused = lever.refusals(start.network, entry)
        assert options or refused
        assert not {option.where for option in options} & set(refused)
        assert all(" " in reason and len(reason) > 12 for reason in refused.values())
        texts = [option.model_dump_json() for option in options]
        assert len(set(texts)) == len(texts)
        for option, text in zip(options, texts, strict=True):
            assert option.transform == plugin
            assert Option.model_validate_json(text) == option


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("plugin", TRANSFORMS)
def test_apply_does_what_predict_says_and_leaves_its_input(plugin: str, subject: str) -> None:
    lever, start = registry.transform(plugin), candidate(subject)
    options = lever.options(start.network, ENTRIES[1])
    before = {name: tensor.clone() for name, tensor in start.module.state_dict().items()}
    text, picture = start.network.model_dump_json(), repr(start.module)
    for index, option in enumerate(options):
        result = lever.apply(start, option)
        assert result.module is not start.module or result.quant is not None
        assert result.network == lever.predict(start.network, option)
        assert result.history == (*start.history, option)
        with torch.inference_mode():
            assert torch.isfinite(result.module(start.example_input)).all()
        if index % 5 == 0:  # tracing takes longer than all the rest
            traced = trace(result.module, start.example_input)
            if result.quant is not None:
                traced = traced.with_precisions(result.quant.operators)
            assert shapes(traced) == shapes(result.network)
    assert start.network.model_dump_json() == text
    assert repr(start.module) == picture
    assert all(torch.equal(before[name], tensor) for name, tensor in start.module.state_dict().items())


@pytest.mark.parametrize("plugin", TRANSFORMS)
def test_fitting_keeps_the_structure(plugin: str) -> None:
    lever, start = registry.transform(plugin), candidate("resnet")
    for option in lever.options(start.network, ENTRIES[1]):
        fitted = lever.fitted(start.network, option)
        for other in (fitted, lever.bare(option), lever.bare(fitted)):
            assert (other.transform, other.where) == (option.transform, option.where)
            assert lever.predict(start.network, other) == lever.predict(start.network, option)
        assert lever.fitted(start.network, fitted) == fitted
        assert lever.bare(fitted) == lever.bare(option)


@pytest.mark.parametrize("plugin", TRANSFORMS)
def test_options_can_follow_one_another(plugin: str) -> None:
    lever, entry = registry.transform(plugin), ENTRIES[0]
    current = candidate("resnet" if lever.at == "block" else "mobilenet_v2")  # one that has two blocks to remove
    if not lever.options(current.network, entry):
        pytest.skip("the lever is never offered: its own tests apply it")
    for option in (lever.options(current.network, entry)[0], lever.options(current.network, entry)[-1]):
        current = lever.apply(current, option)
    assert len(current.history) == 2
    assert current.network.groups == trace(current.module, current.example_input).groups


@pytest.mark.parametrize("plugin", TRANSFORMS)
def test_predict_needs_no_torch(plugin: str) -> None:
    lever, start = registry.transform(plugin), candidate("mobilenet_v2")
    options = lever.options(start.network, ENTRIES[0])
    code = (
        "import json, sys\n"
        f"from mobilekit.transforms import {plugin}\n"
        "from mobilekit import registry\n"
        "from mobilekit.types import Network, Option\n"
        "given = json.load(sys.stdin)\n"
        f"lever = registry.transform('{plugin}')\n"
        "network = Network.model_validate(given['network'])\n"
        "macs = [lever.predict(network, Option.model_validate(o)).macs for o in given['options']]\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "print(json.dumps(macs))\n"
    )
    given = {"network": start.network.model_dump(mode="json"), "options": [o.model_dump(mode="json") for o in options]}
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [lever.predict(start.network, option).macs for option in options]


@pytest.mark.parametrize("plugin", TRANSFORMS)
def test_an_option_that_cannot_be_carried_out_is_refused_in_a_sentence(plugin: str) -> None:
    lever, start = registry.transform(plugin), candidate("shufflenet_v2")
    offered = lever.options(start.network, ENTRIES[0])
    if not offered:
        pytest.skip("the lever is never offered: its own tests hand it wrong options")
    good = offered[0]
    wrong = [good.model_copy(update={"transform": "another"}), good.model_copy(update={"where": "nowhere"})]
    for key in good.settings:
        for value in ("nonsense", -3, 0, True, 10**6, 2.5, None):
            wrong.append(good.model_copy(update={"settings": {**good.settings, key: value}}))
    for place in [p for p in lever.refusals(start.network, ENTRIES[0]) if p in start.network.groups]:
        wrong.append(good.model_copy(update={"where": place}))
    for option in wrong:
        with pytest.raises(UnsupportedError, match=r"\w+ .* \w+"):
            lever.apply(start, option)
        with pytest.raises(UnsupportedError, match=r"\w+ .* \w+"):
            lever.predict(start.network, option)


def test_int8_precisions_are_the_quant_spec() -> None:
    lever, start = registry.transform("int8"), candidate("squeeze_linear")
    result = lever.apply(start, lever.options(start.network, ENTRIES[0])[0])
    assert result.quant is not None
    assert result.network.precisions == result.quant.operators
    names = {operator.name for operator in start.network.operators}
    assert set(result.quant.operators) <= names
    assert "no int8" in lever.refusals(start.network, ENTRIES[2])["network"]


def test_importance_is_the_sum_of_relative_l1_norms_over_all_producers() -> None:
    start = candidate("mobilenet_v2")
    group = "1.layers.6"  # a residual stream: two projections write it
    weights = [start.module.get_parameter(f"{n}.layers.6.weight").detach().numpy() for n in (1, 2)]
    norms = [np.abs(w.astype(np.float64)).reshape(len(w), -1).sum(axis=1) for w in weights]
    want = sum(n / n.mean() for n in norms)
    np.testing.assert_allclose(importance(start.module, start.network, group).numpy(), want, rtol=1e-5)
    option = Option(transform="channel_pruning", where=group, settings={"width": 3, "criterion": "l1"})
    slim = registry.transform("channel_pruning").apply(start, option).module
    best = np.sort(np.argsort(-want)[:3])
    np.testing.assert_array_equal(slim.get_parameter("1.layers.6.weight").detach().numpy(), weights[0][best])


def test_importance_reads_the_output_axis_of_a_transposed_convolution() -> None:
    start = candidate("unet")
    weight = start.module.get_parameter("up.weight").detach().numpy()
    norms = np.abs(weight).sum(axis=(0, 2, 3))
    np.testing.assert_allclose(importance(start.module, start.network, "up").numpy(), norms / norms.mean(), rtol=1e-5)


def test_importance_of_dead_filters_is_zero_and_not_undefined() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    nn.init.zeros_(module.get_parameter("0.weight"))
    network = trace(module, example())
    assert importance(module, network, "0").tolist() == [0, 0, 0, 0]


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("kind", registry.device_kinds())
def test_a_kind_of_device_says_what_is_there_and_what_is_missing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # adb would start its server and see the phones of whoever runs the tests
    monkeypatch.setitem(sys.modules, "adbutils", None)
    found = registry.device_kinds()[kind]
    missing = found.unavailable()
    assert missing is None or (": " in missing and len(missing.splitlines()) == 1)
    visible = found.visible()
    assert all(spec.partition(":")[0] == kind for spec in visible)
    if missing:
        assert visible == []
