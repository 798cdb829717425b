"""Loads a WORKLOAD: the user's module with `model()`, `example_input()` and whatever data it offers."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from mobilekit import documents
from mobilekit.errors import BadInputError
from mobilekit.named_models import module_of, short_name
from mobilekit.types import Calibration, Candidate, Network, Preprocessing

CALIBRATION_SAMPLES = 512
RANDOM_SAMPLES = 32
LONGEST = 240
"""Characters of another library's message that are passed on."""
AGREEMENT = "top-1 agreement with the original on calibration inputs"
AGREEMENT_HELD_BACK = "top-1 agreement with the original on held-back calibration inputs"
CLOSENESS = ", 1 - relative squared error: the output is one value"
FEWEST_TO_SPLIT = 8
EXPORT_ALONE = "a plan needs one image tensor in and one tensor out; `mobilekit export` takes other networks too"
Inputs = tuple[torch.Tensor, ...]
"""A tensor for each input of a network, in order, all of the same batch size."""
NO_DATA = "no data: judged on random input, not to be trusted"


@dataclass(frozen=True)
class Workload:
    """A user's network and data. What is None the workload does not offer."""

    spec: str
    name: str
    key: str
    """sha256 of the source and of the weights: results kept for another key are not reused."""
    module: nn.Module
    example_input: torch.Tensor
    calibration: tuple[torch.Tensor, ...]
    """Input batches, at most 512 samples in all; random noise where `trusted` is False."""
    trusted: bool
    held_back: tuple[torch.Tensor, ...]
    """Inputs to judge agreement on where there is no `evaluate`: not trained on, where there are enough."""
    train_data: Callable[[], Iterable[Any]] | None
    """Gives batches: (input, target) pairs, or inputs alone where `labelled` is False."""
    labelled: bool
    evaluate: Callable[[nn.Module], float] | None
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    preprocessing: Preprocessing | None
    labels: tuple[str, ...] | None
    accuracy_kind: str
    data: str
    """One sentence about the data that is used."""

    def candidate(self, network: Network) -> Candidate:
        """The original with its trace; levers that measure get the calibration inputs, if they are the user's own."""
        calibration = Calibration(self.calibration, loss=self.loss) if self.trusted else None
        return Candidate(self.module, self.example_input, network, calibration=calibration)

    def calibration_arrays(self, limit: int = CALIBRATION_SAMPLES) -> tuple[np.ndarray, ...]:
        """The first `limit` calibration samples as float32 batches for the runtimes."""
        samples = torch.cat(self.calibration)[:limit]
        return tuple(batch.numpy() for batch in torch.split(samples, 32))


@dataclass(frozen=True)
class Opened:
    """A workload's source with what its `model()` and `example_input()` gave; the example is not checked yet."""

    spec: str
    source: ModuleType
    module: nn.Module
    example: Any

    @property
    def name(self) -> str:
        """What files are called after."""
        return re.sub(r"[^A-Za-z0-9_]+", "_", short_name(self.spec))


def opened(spec: str) -> Opened:
    """Import `file.py` or `package.module`; `timm:NAME` and `torchvision:NAME` where those are installed.

    Raises BadInputError where it gives no float32 network or no example.
    """
    source = module_of(spec) or _import(spec)
    network = _call(source, spec, "model", required=True)
    if not isinstance(network, nn.Module):
        raise BadInputError(f"model() in '{spec}' must return a torch.nn.Module, not {type(network).__name__}")
    example = _call(source, spec, "example_input", required=True)
    network = network.eval()
    for parameter in network.parameters():
        if parameter.dtype != torch.float32:
            raise BadInputError(f"the model in '{spec}' has {parameter.dtype} weights: give it in float32")
    return Opened(spec, source, network, example)


def load(spec: str, seed: int = 0) -> Workload:
    """Load `file.py` or `package.module` for a plan: a network of one tensor (1, C, H, W) in and one out.

    Raises BadInputError in one sentence for whatever the module lacks or gets wrong.
    """
    found = opened(spec)
    source, network, example = found.source, found.module, found.example
    _check_example(example, spec)
    output = _check_output(network, example, spec)
    train_data, labelled = _training_data(source)
    batches, trusted = calibration_of(found, (example,), seed)
    calibration = tuple(batch for (batch,) in batches)
    evaluate = getattr(source, "evaluate", None)
    whole = evaluate is not None or train_data is not None or not trusted
    kept, held_back = (calibration, calibration) if whole else _split(calibration)
    return Workload(
        spec=spec,
        name=found.name,
        key=_key(source, network, example),
        module=network,
        example_input=example,
        calibration=kept,
        trusted=trusted,
        held_back=held_back,
        train_data=train_data,
        labelled=labelled,
        evaluate=evaluate,
        loss=getattr(source, "loss", None),
        preprocessing=preprocessing_of(found),
        labels=labels_of(found),
        accuracy_kind=_accuracy_kind(source, whole, output.shape[1] if output.ndim > 1 else 1),
        data=_call(source, spec, "data_description") or _describe(source, trusted),
    )


def _import(spec: str) -> ModuleType:
    """Import the workload; user code may raise anything, and the user wants one sentence."""
    is_file = spec.endswith(".py") or Path(spec).is_file()
    missing = f"the workload '{spec}' does not exist: give a Python file or an importable module"
    if (is_file and not Path(spec).is_file()) or (not is_file and not re.fullmatch(r"[A-Za-z_][\w.]*", spec)):
        raise BadInputError(missing)
    try:
        return _import_file(Path(spec)) if is_file else _import_module(spec)
    except ModuleNotFoundError as error:
        if not is_file and error.name and (spec == error.name or spec.startswith(error.name + ".")):
            raise BadInputError(missing) from error
        raise BadInputError(f"the workload '{spec}' needs the package '{error.name}', which is missing") from error
    except Exception as error:
        raise BadInputError(f"the workload '{spec}' cannot be imported: {sentence(error)}") from error
    except SystemExit as error:
        raise BadInputError(
            f"the workload '{spec}' ends the program when imported: put what it does behind if __name__ == '__main__'"
        ) from error


def _import_module(name: str) -> ModuleType:
    """Also one that lies in the present folder, as with `python -m`."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    name = f"mobilekit_workload_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ImportError("it is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    beside = str(path.resolve().parent)
    if beside not in sys.path:  # a workload may import files that lie beside it, like any script
        sys.path.insert(0, beside)
    found.loader.exec_module(module)
    return module


def _call(module: ModuleType, spec: str, name: str, *, required: bool = False) -> Any:
    function = getattr(module, name, None)
    if function is None:
        if required:
            raise BadInputError(f"the workload '{spec}' does not define {name}()")
        return None
    try:
        return function()
    except Exception as error:
        raise BadInputError(f"{name}() in '{spec}' fails: {sentence(error)}") from error


def sentence(error: BaseException) -> str:
    """What an exception of the user's code says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):  # a KeyError's text is the key alone
        return " ".join([type(error).__name__, *lines[:1]])
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said if len(said) <= LONGEST else said[:LONGEST].rsplit(" ", 1)[0] + " ..."


def _check_example(example: Any, spec: str) -> None:
    if not isinstance(example, torch.Tensor) or example.ndim != 4 or example.dtype != torch.float32:
        kind = (
            f"{tuple(example.shape)} {example.dtype}" if isinstance(example, torch.Tensor) else type(example).__name__
        )
        said = f"example_input() in '{spec}' must be a float32 tensor (1, C, H, W), not {kind}"
        parts = example if isinstance(example, tuple | list) else (example,)
        floats = all(isinstance(part, torch.Tensor) and part.dtype == torch.float32 for part in parts)
        raise BadInputError(f"{said}: {EXPORT_ALONE}" if floats else said)
    if example.shape[0] != 1:
        raise BadInputError(f"example_input() in '{spec}' must have batch size 1, not {example.shape[0]}")


def _check_output(network: nn.Module, example: torch.Tensor, spec: str) -> torch.Tensor:
    try:
        with torch.inference_mode():
            output = network(example)
    except Exception as error:
        raise BadInputError(f"the model in '{spec}' fails on its example input: {sentence(error)}") from error
    if not isinstance(output, torch.Tensor):
        raise BadInputError(
            f"the model in '{spec}' returns {type(output).__name__}: it must return one tensor (wrap it in a module "
            f"that picks the output you deploy): {EXPORT_ALONE}"
        )
    if not bool(torch.isfinite(output).all()):
        raise BadInputError(f"the model in '{spec}' returns values that are not finite on its example input")
    return output


def _training_data(module: ModuleType) -> tuple[Callable[[], Iterable[Any]] | None, bool]:
    if hasattr(module, "train_data"):
        return module.train_data, True
    if hasattr(module, "distillation_data"):
        return module.distillation_data, False
    return None, False


def calibration_of(found: Opened, inputs: Inputs, seed: int) -> tuple[tuple[Inputs, ...], bool]:
    """Batches of real inputs where the workload has any, else seeded noise that is marked untrusted.

    `inputs` are the examples. A batch is a tensor, or a tuple of tensors where there are several inputs.
    """
    module, spec = found.source, found.spec
    name = next((name for name in ("calibration_data", "train_data") if hasattr(module, name)), None)
    if name is None:
        return noise(inputs, seed), False
    where, paired = f"{name}() in '{spec}'", name == "train_data"
    collected: list[Inputs] = []
    count = 0
    for batch in islice(_batches(module, spec, name), CALIBRATION_SAMPLES):
        if paired and (not isinstance(batch, tuple | list) or len(batch) != 2):
            raise BadInputError(f"{where} must give (input, target) pairs; inputs alone belong in calibration_data()")
        collected.append(checked_inputs(batch[0] if paired else batch, inputs, where))
        count += len(collected[-1][0])
        if count >= CALIBRATION_SAMPLES:
            break
    if not count:
        raise BadInputError(f"{where} gives no inputs")
    return tuple(collected), True


def _batches(module: ModuleType, spec: str, name: str) -> Iterator[Any]:
    """What the user's function gives, one by one: a generator may fail late."""
    batches = _call(module, spec, name)
    try:
        yield from batches
    except Exception as error:
        raise BadInputError(f"{name}() in '{spec}' fails: {sentence(error)}") from error


def checked_inputs(batch: Any, examples: Inputs, where: str) -> Inputs:
    """The tensors of a calibration batch as float32.

    Raises BadInputError where it has not a tensor of the right shape for each input, or a value that is not finite.
    """
    given = tuple(batch) if len(examples) > 1 and isinstance(batch, tuple | list) else (batch,)
    if len(given) != len(examples):
        raise BadInputError(f"{where} must give a tuple of {len(examples)} tensors, one for each input of the network")
    for part, example in zip(given, examples, strict=True):
        if not isinstance(part, torch.Tensor) or part.ndim != example.ndim or part.shape[1:] != example.shape[1:]:
            found = tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__
            wanted = ", ".join(map(str, example.shape[1:]))
            raise BadInputError(f"{where} must give input tensors (N, {wanted}), not {found}")
        if len(part) != len(given[0]):
            raise BadInputError(f"{where} gives {len(given[0])} samples for one input and {len(part)} for another")
        if not bool(torch.isfinite(part).all()):
            raise BadInputError(f"{where} gives values that are not finite")
    return tuple(part.float() for part in given)


def preprocessing_of(found: Opened) -> Preprocessing | None:
    """What the workload says about preparing its inputs. Known keys are checked, and others kept as they are."""
    value = _call(found.source, found.spec, "preprocessing")
    where = f"preprocessing() in '{found.spec}'"
    try:
        plain = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        plain, value = "", ()
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadInputError(f"{where} must return a dict of plain numbers, strings and lists")
    return documents.parse(plain.encode(), Preprocessing, f"what {where} returns")


def labels_of(found: Opened) -> tuple[str, ...] | None:
    """The names of the classes, where the workload gives them."""
    spec = found.spec
    value = _call(found.source, spec, "labels")
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(label, str) for label in value):
        raise BadInputError(f"labels() in '{spec}' must return a list of strings")
    return tuple(value) or None


def noise(inputs: Inputs, seed: int) -> tuple[Inputs, ...]:
    """One batch of seeded noise of the examples' shapes."""
    generator = torch.Generator().manual_seed(seed)
    return (tuple(torch.randn((RANDOM_SAMPLES, *one.shape[1:]), generator=generator) for one in inputs),)


def _accuracy_kind(module: ModuleType, whole: bool, classes: int) -> str:
    stated = getattr(module, "ACCURACY_KIND", None)
    if isinstance(stated, str):
        return stated
    if hasattr(module, "evaluate"):
        return "the workload's evaluate()"
    kind = AGREEMENT if whole else AGREEMENT_HELD_BACK
    return kind if classes > 1 else kind.replace("top-1 agreement", "closeness") + CLOSENESS


def _describe(module: ModuleType, trusted: bool) -> str:
    if not trusted:
        return NO_DATA
    return (
        "labelled training data of the workload" if hasattr(module, "train_data") else "unlabelled calibration inputs"
    )


def _split(calibration: tuple[torch.Tensor, ...]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Without training data the network is trained on calibration inputs: a quarter is held back to judge it on."""
    inputs = torch.cat(calibration)
    if len(inputs) < FEWEST_TO_SPLIT:
        return calibration, calibration
    kept = len(inputs) - len(inputs) // 4
    return (inputs[:kept],), (inputs[kept:],)


def _key(module: ModuleType, network: nn.Module, example: torch.Tensor) -> str:
    source = getattr(module, "__file__", None)
    return _digest(Path(source).read_bytes() if source else b"", network, example)


def _digest(source: bytes, network: nn.Module, example: torch.Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(example.shape)).encode() + source)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
