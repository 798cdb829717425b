"""Workloads by name: `timm:NAME` and `torchvision:NAME`, where those packages are installed."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from mobilekit.errors import BadInputError, first_line

RANDOM = "random"
"""What stands behind the name for a network without trained weights."""
NAMED = re.compile(r"(timm|torchvision):([\w.\-]*)(?::(\w+))?")
NO_WEIGHTS = "random weights and no data: only size and latency mean anything"


def short_name(spec: str) -> str:
    """What files and folders of a workload are called, before they are cleaned of characters.

    >>> short_name("nets/small.py"), short_name("my.nets"), short_name("timm:resnet18.a1_in1k")
    ('small', 'nets', 'resnet18.a1_in1k')
    """
    named = NAMED.fullmatch(spec)
    if named:
        return named[2]
    return Path(spec).stem if spec.endswith(".py") else spec.rpartition(".")[2]


def module_of(spec: str) -> ModuleType | None:
    """A module with what a workload file defines, for `timm:NAME` or `torchvision:NAME`; None for any other workload.

    The network has its trained weights, which the package downloads where it has not kept them; `timm:NAME:random`
    has none. Input size and normalisation are those of the weights. Raises BadInputError where the package is not
    installed, does not know the name, or the weights cannot be had.
    """
    named = NAMED.fullmatch(spec)
    if named is None:
        return None
    package, name, ending = named.groups()
    if not name or ending not in (None, RANDOM):
        raise BadInputError(f"'{spec}' names no workload: write {package}:NAME or {package}:NAME:{RANDOM}")
    source = _timm if package == "timm" else _torchvision
    with _weights_only():
        try:
            return source(_imported(package), spec, name, trained=ending is None)
        except BadInputError:
            raise
        except Exception as error:
            raise BadInputError(
                f"{package} gives no network for '{spec}': {first_line(error)}; weights that are not kept here have to "
                f"be downloaded, and {package}:{name}:{RANDOM} goes without"
            ) from error


def _imported(package: str) -> Any:
    """The package. Raises BadInputError where it is missing or cannot be imported."""
    if find_spec(package) is None:
        raise BadInputError(f"'{package}:NAME' needs the package {package}: pip install {package}")
    try:
        return importlib.import_module(package)
    except Exception as error:
        raise BadInputError(
            f"the package {package} cannot be imported ({first_line(error)}): pip install --upgrade {package} torch"
        ) from error


def _timm(timm: Any, spec: str, name: str, trained: bool) -> ModuleType:
    """A network of timm (Wightman 2019, https://github.com/huggingface/pytorch-image-models)."""
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    network = timm.create_model(name, pretrained=trained)
    settings = importlib.import_module("timm.data").resolve_model_data_config(network)
    channels, height, width = settings["input_size"]
    shorter = round(min(height, width) / settings["crop_pct"])
    prepared = _prepared((channels, height, width), settings["mean"], settings["std"], shorter)
    prepared["resize"]["interpolation"] = str(settings["interpolation"])
    return _module(spec, network, prepared, trained)


def _torchvision(torchvision: Any, spec: str, name: str, trained: bool) -> ModuleType:
    """A network of torchvision (https://github.com/pytorch/vision), with the labels of its weights."""
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    builder, weights = models.get_model_builder(name), models.get_model_weights(name).DEFAULT
    chosen = {"weights": weights if trained else None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        chosen["weights_backbone"] = None  # they are part of the whole network's, or not wanted
    network, transform = builder(**chosen), weights.transforms()
    resized = list(transform.resize_size)
    side = list(getattr(transform, "crop_size", resized))
    prepared = _prepared((3, side[0], side[-1]), transform.mean, transform.std, resized[0])
    prepared["resize"]["interpolation"] = str(transform.interpolation.value)
    return _module(spec, network, prepared, trained, weights.meta.get("categories"))


def _unknown(package: str, name: str, known: list[str]) -> BadInputError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f": did you mean '{near[0]}'?" if near else ""
    return BadInputError(f"{package} has no network '{name}'{hint}")


def _prepared(size: tuple[int, int, int], mean: Any, std: Any, shorter: int) -> dict[str, Any]:
    """What an app does to a picture, as `preprocessing()` of a workload says it."""
    channels, height, width = size
    return {
        "layout": "NCHW",
        "input_size": [height, width],
        "channels": channels,
        "channel_order": "RGB",
        "input_range": [0.0, 1.0],
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "resize": {"shorter_side": shorter, "interpolation": "bilinear"},
        "crop": "centre",
    }


def _module(
    spec: str, network: Any, prepared: dict[str, Any], trained: bool, labels: list[str] | None = None
) -> ModuleType:
    """What a workload file would define."""
    import torch

    module = ModuleType(short_name(spec))
    shape = (1, prepared["channels"], *prepared["input_size"])
    offers: dict[str, Any] = {
        "model": lambda: network,
        "example_input": lambda: torch.zeros(shape),
        "preprocessing": lambda: prepared,
    }
    if not trained:
        offers["data_description"] = lambda: NO_WEIGHTS
    elif labels:
        offers["labels"] = lambda: list(labels)
    vars(module).update(offers)
    return module


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Let torch.load read nothing but tensors: downloaded files are not to run code."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
