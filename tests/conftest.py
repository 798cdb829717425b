"""A tiny trained workload, and a host whose timing is computed instead of taken: runs of seconds, alike every time."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# a change is judged on the same cases each time; `make test-slow` draws others
# on a busy machine any case may take long: time is no reason to fail
CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **CALM)
settings.register_profile("drawn", **CALM)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

TINY = '''
"""Stripes in four directions, told apart by a residual CNN."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

LABELS = ["-", "/", "|", "\\\\"]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return torch.relu(x + self.second(self.first(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.one = Block(16)
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.two = Block(32)
        self.last = nn.Linear(32, 4)

    def forward(self, x):
        x = self.two(self.down(self.one(self.stem(x))))
        return self.last(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def stripes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(count) % 4
    angle = (target * torch.pi / 4)[:, None, None]
    phase = torch.rand((count, 1, 1), generator=generator) * 6.3
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    waves = torch.sin(1.2 * (x * torch.sin(angle) + y * torch.cos(angle)) + phase)
    images = waves + 0.3 * torch.randn((count, 16, 16), generator=generator)
    return images[:, None].contiguous(), target


def model():
    net = Net()
    net.load_state_dict(load_file(Path(__file__).with_name("weights.safetensors")))
    return net


def example_input():
    return torch.zeros(1, 1, 16, 16)


def calibration_data():
    return stripes(64, 1)[0].split(32)


def train_data():
    images, target = stripes(256, 2)
    return zip(images.split(32), target.split(32))


def evaluate(model):
    images, target = stripes(128, 3)
    return (model(images).argmax(1) == target).float().mean()


def labels():
    return LABELS


def preprocessing():
    return {"mean": [0.0], "std": [1.0]}
'''


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workload file, with trained weights beside it."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("workload") / "tiny.py"
    path.write_text(TINY, encoding="utf-8")
    scope: dict[str, Any] = {"__name__": "tiny", "__file__": str(path)}
    exec(compile(TINY, str(path), "exec"), scope)  # noqa: S102
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = scope["Net"]()
        optimiser = torch.optim.Adam(net.parameters(), 3e-3)
        for seed in range(30):
            images, target = scope["stripes"](64, 100 + seed)
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(images), target).backward()
            optimiser.step()
        net.eval()
        with torch.inference_mode():
            assert scope["evaluate"](net) > 0.95
    save_file(net.state_dict(), path.with_name("weights.safetensors"))
    return path


# ---------------------------------------------------------------- a quick and steady machine


def computed_ms(path: Path) -> float:
    """A time for an ONNX file: 1 ms for 2.7 million MACs of convolutions, 0.4 of it for those in int8."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(str(path))).graph
    shapes = {t.name: list(t.dims) for t in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        shapes[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    dequantised = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    total = 0.03 + 0.002 * len(graph.node)
    for node in convolutions:
        macs = math.prod(shapes[node.input[1]]) * math.prod(shapes[node.output[0]][2:])
        total += macs / 2.7e6 * (0.4 if node.input[1] in dequantised else 1.0)
    return total


def real_outputs(model: Any) -> tuple[Any, ...]:
    """What an ONNX file of one input and output really makes of its golden inputs, as a device returns it."""
    import numpy as np
    import onnxruntime

    from mobilekit.types import TensorData

    session = onnxruntime.InferenceSession(model.path, providers=["CPUExecutionProvider"])
    given, result = session.get_inputs()[0], session.get_outputs()[0]
    samples = np.fromfile(model.inputs[0], "<f4").reshape(-1, 1, *given.shape[1:])
    found = np.concatenate([session.run(None, {given.name: sample})[0] for sample in samples])
    data = base64.b64encode(found.tobytes()).decode()
    return (TensorData(name=result.name, shape=found.shape, dtype=found.dtype.name, data=data),)


def computed_run(_: object, request: Any) -> Any:
    """In place of `Host.run`: samples that follow from the files."""
    from mobilekit.types import BenchResult, Measurement

    wave = [1 + 0.01 * math.sin(turn) for turn in range(40)]
    took = {model.path: computed_ms(Path(model.path)) for model in request.models}
    return BenchResult(
        measurements=tuple(
            Measurement(
                model=model.name,
                path=model.path,
                sha256=hashlib.sha256(Path(model.path).read_bytes()).hexdigest(),
                runtime=model.runtime,
                device="host",
                origin="host",
                threads=request.threads,
                samples_ms=tuple(1.01 * took[model.path] * turn for turn in wave),
                cpu_samples_ms=tuple(took[model.path] * turn for turn in wave),
                reference_ms=tuple(wave),
                load_ms=1.0,
                compute_unit="cpu",
                started_at="2026-01-01T00:00:00+00:00",
                versions={"onnx": "1"},
                outputs=real_outputs(model) if request.return_outputs and model.inputs else (),
            )
            for model in request.models
        )
    )


def hasten(patch: Callable[[object, str, object], object]) -> None:
    """Measuring takes a second and training a few steps, kept one by one."""
    import torch

    from mobilekit import bench
    from mobilekit.pipeline import planning, story, trial
    from mobilekit.training import distillation

    torch.set_num_threads(1)
    patch(story, "use_quicker_threads", lambda *_: 1)  # the number of threads changes the last digits
    patch(bench, "COMPARE", {**bench.COMPARE, "max_seconds": 1.0})
    patch(distillation, "FEWEST_STEPS", 20)
    patch(distillation, "MOST_STEPS", 20)
    patch(distillation, "CHECKPOINT_SECONDS", 0.0)
    patch(trial, "FEWEST_STEPS", 4)
    patch(trial, "MOST_STEPS", 4)
    patch(planning, "COMBINATIONS", 3)


def quicken(patch: Callable[[object, str, object], object]) -> None:
    """Times are computed, training is short, two levers are searched, and only ONNX files can be written."""
    from mobilekit import registry
    from mobilekit.devices.host import Host
    from mobilekit.pipeline import options

    hasten(patch)
    patch(Host, "run", computed_run)
    patch(options, "SEARCHED", ("channel_pruning", "int8"))
    for name in registry.names("runtimes"):
        if name != "onnx":
            kind = type(registry.runtime(name))
            patch(kind, "unavailable", lambda _, name=name: f"{name} is not installed: pip install it")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, host_profile: object) -> None:
    """A quick and steady machine with a priced host, for this test."""
    quicken(monkeypatch.setattr)


def die_at(stage: str, moment: str) -> None:
    """Let this process be killed when a stage reaches a fraction, or when it is done but not yet kept (`end`)."""
    from mobilekit.pipeline import stages
    from mobilekit.store import Store

    start, save = stages.Stages.__init__, Store.save_stage

    def begin(self: Any, store: Any, key: str, progress: Any) -> None:
        def watched(name: str, fraction: float) -> None:
            if name == stage and moment != "end" and fraction >= float(moment):
                os.kill(os.getpid(), signal.SIGKILL)
            progress(name, fraction)

        start(self, store, key, watched)

    def keep(self: Any, name: str, *rest: Any, **named: Any) -> None:
        if name == stage and moment == "end":
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, name, *rest, **named)

    stages.Stages.__init__ = begin  # type: ignore[method-assign]
    Store.save_stage = keep  # type: ignore[method-assign]


def quick_command(*arguments: str, die: tuple[str, str] | None = None, computed: bool = True) -> list[str]:
    """The command line on a quick and steady machine (or a real one that measures for a second at a time only)."""
    lines = [
        "import runpy, sys",
        f"own = runpy.run_path({str(Path(__file__))!r})",
        "own['quicken'](setattr)" if computed else "own['hasten'](setattr)",
        f"own['die_at'](*{die!r})" if die else "",
        "from mobilekit.cli import main",
        "sys.argv[0] = 'mobilekit'",
        "main()",
    ]
    return [sys.executable, "-c", "\n".join(lines), *arguments]
