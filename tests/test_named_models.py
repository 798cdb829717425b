"""Workloads by name: against small stand-ins of the packages, which are found through sys.path as the real ones are."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from mobilekit import workload
from mobilekit.errors import BadInputError
from mobilekit.named_models import short_name

NET = """
import os
import torch
from torch import nn

def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
TIMM = (
    NET
    + """
def list_models():
    return ["small_net", "untrained_net"]

def is_model(name):
    return name.partition(".")[0] in list_models()

def create_model(name, pretrained=False):
    if pretrained and name == "untrained_net":
        raise RuntimeError("No pretrained weights exist for untrained_net.")
    if pretrained and os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") != "1":
        raise RuntimeError("a file could run code")
    return net(1 if pretrained else 0)
"""
)
TIMM_DATA = """
def resolve_model_data_config(model):
    return {"input_size": (3, 28, 20), "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1),
            "crop_pct": 0.8}
"""
TORCHVISION = (
    NET
    + """
import enum
from types import SimpleNamespace

class Weights:
    meta = {"categories": ["cat", "dog", "cow", "ant"]}

    def __init__(self, size):
        self.size = size

    def transforms(self):
        bilinear = SimpleNamespace(value="bilinear")
        return SimpleNamespace(mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1], interpolation=bilinear, **self.size)

def list_models():
    return ["plain", "parts"]

def get_model_weights(name):
    size = {"crop_size": [24], "resize_size": [32]} if name == "plain" else {"resize_size": [26]}
    return SimpleNamespace(DEFAULT=Weights(size))

def plain(*, weights=None):
    return net(0 if weights is None else 1)

def parts(*, weights=None, weights_backbone="downloaded"):
    if weights_backbone is not None:
        raise OSError("nothing can be downloaded here")
    return net(0 if weights is None else 1)

def get_model_builder(name):
    return {"plain": plain, "parts": parts}[name]
"""
)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path that holds both packages."""
    for path, text in (
        ("timm/__init__.py", TIMM), ("timm/data.py", TIMM_DATA),
        ("torchvision/__init__.py", ""), ("torchvision/models.py", TORCHVISION),
    ):  # fmt: skip
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.partition(".")[0] in ("timm", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path  # type: ignore[misc]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("timm", "torchvision")]:
        del sys.modules[name]


def first_weight(found: workload.Workload) -> torch.Tensor:
    return next(found.module.parameters())


@pytest.mark.usefixtures("packages")
def test_timm_with_its_weights() -> None:
    found = workload.load("timm:small_net.tag_in1k")
    assert found.name == "small_net_tag_in1k"
    assert found.example_input.shape == (1, 3, 28, 20)
    assert found.preprocessing is not None
    assert (found.preprocessing.mean, found.preprocessing.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert (found.preprocessing.resize.shorter_side, found.preprocessing.resize.interpolation) == (25, "bicubic")
    assert (found.trusted, found.data) == (False, workload.NO_DATA)
    assert not found.module.training
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.usefixtures("packages")
def test_random_weights_are_said_to_be() -> None:
    found, trained = workload.load("timm:small_net:random"), workload.load("timm:small_net")
    assert not torch.equal(first_weight(found), first_weight(trained))
    assert "random weights" in found.data
    assert found.key != trained.key


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("name", "side", "shorter"), [("plain", 24, 32), ("parts", 26, 26)])
def test_torchvision_with_labels_and_sizes_of_its_weights(name: str, side: int, shorter: int) -> None:
    found, bare = workload.load(f"torchvision:{name}"), workload.load(f"torchvision:{name}:random")
    assert found.labels == ("cat", "dog", "cow", "ant")
    assert bare.labels is None
    assert found.example_input.shape == bare.example_input.shape == (1, 3, side, side)
    assert found.preprocessing is not None
    assert (found.preprocessing.resize.shorter_side, found.preprocessing.resize.interpolation) == (shorter, "bilinear")


@pytest.mark.usefixtures("packages")
def test_weights_that_cannot_be_had_are_one_sentence() -> None:
    with pytest.raises(BadInputError, match=r"No pretrained weights exist.*timm:untrained_net:random goes without"):
        workload.load("timm:untrained_net")


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_wrong_name_is_answered_with_a_near_one(package: str) -> None:
    near = {"timm": "small_net", "torchvision": "plain"}[package]
    with pytest.raises(BadInputError, match=f"has no network '{near}s': did you mean '{near}'"):
        workload.load(f"{package}:{near}s")


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_missing_package_is_answered_with_its_command(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilekit.named_models.find_spec", lambda _: None)
    with pytest.raises(BadInputError, match=f"pip install {package}$"):
        workload.load(f"{package}:resnet18")


def test_a_package_that_cannot_be_imported(packages: Path) -> None:
    (packages / "timm" / "__init__.py").write_text("import nonsense_of_nowhere", encoding="utf-8")
    with pytest.raises(BadInputError, match=r"timm cannot be imported .*nonsense_of_nowhere"):
        workload.load("timm:small_net")


@pytest.mark.parametrize("spec", ["timm:", "timm:small_net:trained", "torchvision::random"])
def test_a_name_in_another_form(spec: str) -> None:
    with pytest.raises(BadInputError, match=r":NAME:random$"):
        workload.load(spec)


def test_other_workloads_keep_their_names() -> None:
    assert short_name("some.package.nets") == "nets"
    assert short_name("a/b/net.py") == "net"
    assert short_name("torchvision:resnet18:random") == "resnet18"
