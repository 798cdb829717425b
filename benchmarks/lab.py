"""What the benchmarks of methods share: trained networks, fine-tuning by steps, accuracy, files, paired timing."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from network_blocks import conv, inverted
from safetensors.torch import load_file, save_file
from torch import nn

from mobilekit import bench, registry
from mobilekit.network import trace
from mobilekit.training.distillation import Mix, distil
from mobilekit.training.hooks import Hook, Labels, Loss
from mobilekit.training.job import Recipe, Trained, TrainingJob
from mobilekit.training.loop import train
from mobilekit.types import BenchModel, Calibration, Candidate, ExportJob, Precision
from mobilekit.workloads import fashion_mnist

RUNTIMES = ("onnx", "tflite")
PACKAGES = ("mobilekit", "torch", "onnxruntime", "ai-edge-litert", "ai-edge-quantizer", "numpy")
CACHE = Path("mobilekit-out/lab")
"""Trained networks and exported files; delete it to train anew."""
CALIBRATION_IMAGES = 256
VGG16 = (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8, 8)
"""Widths of VGG-16's convolutions in units of 64 channels; 0 is a pool. Its fifth pool would have one pixel to read."""
MOBILENET_V2 = ((1, 16, 1, 1), (6, 16, 2, 2), (6, 32, 3, 1), (6, 48, 2, 1), (6, 80, 2, 2), (6, 160, 1, 1))
"""Stages of MobileNetV2 at half its width: expansion, channels, blocks, stride of the first block."""
FROM_SCRATCH = {"optimiser": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
"""Recipe of the networks that are trained here."""


class LeNet5(nn.Module):
    """Caffe's LeNet-5, the network of Deep Compression's first table: 431,080 weights (arXiv:1510.00149)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, 28, 28) -> logits (N, 10)."""
        x = self.pool(self.conv2(self.pool(self.conv1(x))))
        return self.fc2(self.relu(self.fc1(torch.flatten(x, 1))))


class Vgg(nn.Module):
    """VGG-16 with batch norm at a fraction of its width, its two wide linear layers included (arXiv:1409.1556)."""

    def __init__(self, scale: float = 0.125) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for units in VGG16:
            if units == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            width = int(64 * units * scale)
            layers += [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        wide = int(4096 * scale)
        self.classifier = nn.Sequential(
            *(nn.Linear(channels, wide), nn.ReLU(), nn.Dropout(0.3)),
            *(nn.Linear(wide, wide), nn.ReLU(), nn.Dropout(0.3), nn.Linear(wide, 10)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, 28, 28) -> logits (N, 10)."""
        return self.classifier(torch.flatten(self.features(x), 1))


class MobileNet(nn.Module):
    """A MobileNetV2 of eleven blocks at half its width, for 28 x 28 pictures (arXiv:1801.04381)."""

    def __init__(self, last: int = 320) -> None:
        super().__init__()
        width = 16
        layers: list[nn.Module] = [conv(1, width, 3, 2, act=nn.ReLU6)]
        for factor, outputs, depth, first in MOBILENET_V2:
            for index in range(depth):
                stride = first if index == 0 else 1
                layers.append(inverted((width, width * factor, outputs), 3, stride, nn.ReLU6))
                width = outputs
        self.features = nn.Sequential(*layers, conv(width, last, act=nn.ReLU6))
        self.pool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(last, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 1, 28, 28) -> logits (N, 10)."""
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


@dataclass(frozen=True)
class Subject:
    """A network of the benchmarks: how it is made, and how long it is trained where it has no weights yet."""

    make: Callable[[], nn.Module]
    epochs: int


SUBJECTS = {
    "resnet": Subject(fashion_mnist.model, 0),
    "vgg": Subject(Vgg, 8),
    "lenet": Subject(LeNet5, 8),
    "mobilenet": Subject(MobileNet, 6),
}
"""The bundled network, with its weights, and three that are trained here."""


def trained(name: str, seed: int = 0) -> nn.Module:
    """The subject after its training, from the cache where it was trained before."""
    subject = SUBJECTS[name]
    torch.manual_seed(seed)
    module = subject.make()
    if not subject.epochs:
        return module.eval()
    path = CACHE / f"{name}-{seed}.safetensors"
    if not path.exists():
        say(f"training {name}, seed {seed}, {subject.epochs} epochs")
        steps = subject.epochs * len(fashion_mnist.train_data())
        train(module, Labels(fashion_mnist.loss), job(seed), Recipe(steps=steps, **FROM_SCRATCH))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(module.state_dict(), path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    module.load_state_dict(load_file(path))
    return module.eval()


def candidate(module: nn.Module, name: str) -> Candidate:
    """The module with what levers need: its trace, calibration images with labels, and the loss."""
    example = fashion_mnist.example_input()
    return Candidate(module, example, trace(module, example, name), calibration=calibration())


@functools.cache
def calibration() -> Calibration:
    """The same training images for every method, with their labels."""
    images, targets = zip(*_first_batches(CALIBRATION_IMAGES), strict=True)
    return Calibration(tuple(images), tuple(targets), fashion_mnist.loss)


def _first_batches(images: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    data = fashion_mnist.train_data(seed=9)
    for number, batch in enumerate(data):
        if number * data.batch >= images:
            return
        yield batch


def train_data() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """What a workload's `train_data` gives: passes in the order of the run's seed, each augmented anew, as in `job`."""
    return _passes(torch.initial_seed() % 2**31)


@functools.cache
def _passes(seed: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    return fashion_mnist.train_data(seed)


def job(seed: int = 0, seconds: float = math.inf) -> TrainingJob:
    """Training images of this seed, for so many seconds or by a fixed number of steps (the recipe's)."""
    data = fashion_mnist.train_data(seed)
    return TrainingJob(
        batches=lambda: data,
        labelled=True,
        loss=fashion_mnist.loss,
        seconds=seconds,
        seed=seed,
        load=lambda: None,
        save=lambda _: None,
        progress=lambda _: None,
    )


def tuned(
    student: nn.Module,
    teacher: nn.Module,
    steps: int,
    seed: int = 0,
    mix: Mix | None = None,
    hooks: tuple[Hook, ...] = (),
) -> nn.Module:
    """A copy of the student after so many steps of distillation from the teacher."""
    return distil(student, teacher, job(seed), mix, Recipe(steps=steps), hooks).module


def tuned_plainly(student: nn.Module, objective: Loss, steps: int, seed: int = 0, **recipe: Any) -> nn.Module:
    """A copy of the student after so many steps on the objective, without a teacher."""
    return train(copy.deepcopy(student), objective, job(seed), Recipe(steps=steps, **recipe)).module


def tuned_for(student: nn.Module, seconds: float, seed: int = 0, **recipe: Any) -> Trained:
    """A copy of the student after so many seconds of training on the labels: on a GPU where there is one."""
    place = "cuda" if torch.cuda.is_available() else "cpu"
    plain = job(seed, seconds)
    moved = replace(plain, batches=lambda: ((x.to(place), y.to(place)) for x, y in plain.batches()))
    steps = Recipe(fewest_steps=1, most_steps=sys.maxsize, checkpoint_seconds=math.inf, **recipe)
    found = train(copy.deepcopy(student).to(place), Labels(fashion_mnist.loss), moved, steps)
    return replace(found, module=found.module.cpu())


def accuracy(module: nn.Module) -> float:
    """Top-1 on the 10,000 test images."""
    return fashion_mnist.evaluate(module)


def weight_count(module: nn.Module) -> int:
    """Parameters that are not zero."""
    return sum(int((parameter != 0).sum()) for parameter in module.parameters())


# ---------------------------------------------------------------- files and times


def exported(
    subject: Candidate,
    runtime: str,
    precision: Precision,
    path: Path,
    inputs: Sequence[torch.Tensor] | None = None,
) -> Path:
    """The candidate's file in one runtime; `inputs` calibrate int8, those of `calibration` where they are missing."""
    plugin = registry.runtime(runtime)
    path = path.with_suffix(plugin.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    batches = tuple(batch.numpy() for batch in inputs or calibration().inputs)
    plugin.export(ExportJob(subject, precision, str(path), batches if precision == "int8" else ()))
    return path


def file_accuracy(runtime: str, path: Path) -> float:
    """Top-1 of a file on the test images."""
    session = registry.runtime(runtime).open(path)
    return fashion_mnist.evaluate(lambda images: torch.from_numpy(session([images.numpy()])[0]))


def timed(baseline: Path, file: Path, runtime: str, seconds: float) -> bench.Comparison:
    """Both files run in turn on this machine for so many seconds."""
    models = (BenchModel(name=name, path=str(path), runtime=runtime) for name, path in (("a", baseline), ("b", file)))
    return bench.compare(registry.device("host"), *models, max_seconds=seconds)


def compared(baseline: Path, file: Path, runtime: str, seconds: float = 4.0) -> dict[str, float]:
    """Median CPU milliseconds of a file on this machine, and how many times faster than the baseline, run in turn."""
    found = timed(baseline, file, runtime, seconds)
    low, high = found.interval
    milliseconds = float(np.median(found.candidate.cpu_samples_ms))
    return {"ms": milliseconds, "ratio": found.ratio, "low": low, "high": high}


# ---------------------------------------------------------------- cells


@dataclass(frozen=True)
class Cells:
    """Results by key in a file of JSON lines: what is there is not computed again."""

    path: Path

    def known(self) -> dict[str, dict[str, Any]]:
        """Key -> result, the last one where there are several."""
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return {entry["key"]: entry for entry in map(json.loads, lines)}

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        """Append one result."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **result}) + "\n")

    def compute(self, key: str, compute: Callable[[], Mapping[str, Any]]) -> None:
        """Compute and append, unless the key is there."""
        if key in self.known():
            return
        say(key)
        self.add(key, compute())


def made_by(script: str) -> str:
    """The line that says how a result was made."""
    numbers = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return (
        f"Made by `.venv/bin/python {script}` on {datetime.now(UTC):%Y-%m-%d}; {fashion_mnist.data_description()} "
        f"One thread; {registry.device('host').info().soc}; {numbers}."
    )


def say(line: str) -> None:
    """Progress, beside the results."""
    print(line, file=sys.stderr, flush=True)
