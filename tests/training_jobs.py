"""A small network, small data and a job for the tests of training."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mobilekit.training.job import State, TrainingJob


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 1, 8, 8, generator=generator)
    target = (inputs[:, :, :4].mean((1, 2, 3)) > 0).long() + (inputs[:, :, :, :4].mean((1, 2, 3)) > 0).long()
    return list(zip(inputs.split(16), target.split(16), strict=True))


def job(**changes: Any) -> TrainingJob:
    known: dict[str, Any] = {
        "batches": data, "labelled": True, "loss": None, "seconds": 5.0, "seed": 0,
        "load": lambda: None, "save": lambda _: None, "progress": lambda _: None,
    }  # fmt: skip
    return TrainingJob(**{**known, **changes})


class Killed(BaseException):
    """What a kill looks like from inside."""


def killed(train: Callable[..., object], at: int) -> list[State]:
    """What a training saved until it was killed in this step; `train` takes changes of its job."""
    kept: list[State] = []
    steps = iter(range(1, at + 1))

    def progress(_: float) -> None:
        if next(steps) == at:
            raise Killed

    def save(state: State) -> None:
        kept.append({name: tensor.detach().clone() for name, tensor in state.items()})

    with pytest.raises(Killed):
        train(progress=progress, save=save)
    return kept


def launched(*arguments: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """A command in two processes on CPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    return subprocess.run(
        [*command, "--num_machines", "1", "--main_process_port", str(port), *arguments],
        capture_output=True, text=True, check=False, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
