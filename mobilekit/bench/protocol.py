"""What is asked of a device: the defaults of the measuring protocol (`docs/bench_protocol.md`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

from mobilekit.interfaces import Device
from mobilekit.types import BenchModel, BenchRequest, BenchResult, Cores


class Settings(TypedDict, total=False):
    """Fields of a BenchRequest that `measure` and `compare` pass on."""

    threads: int
    cores: Cores
    warmup: int
    warm_until_stable: bool
    runs: int
    least_runs: int
    least_seconds: float
    max_seconds: float
    cool_to_c: float | None
    cool_seconds: float
    return_outputs: bool
    reference: bool
    per_operator: bool
    timeout_seconds: float


MEASURE: Settings = {"runs": 200, "max_seconds": 20.0}
COMPARE: Settings = {"runs": 3000, "max_seconds": 10.0}
"""Ten seconds of rounds and not a number of them: what disturbs a shared machine changes over seconds, and a short
comparison sees one of its states only. On a two-thread core whose other thread was busy, the paired ratio of two
networks ranged over 18 % in repeats of 2 s, 14 % in 5 s and 7 % in 10 s."""

FILES: Settings = {"runs": 50, "least_runs": 50, "least_seconds": 5.0, "max_seconds": 30.0, "warm_until_stable": True}
"""Of `mobilekit measure`: at least 50 runs and five seconds."""
MLPERF: Settings = {**FILES, "runs": 1024, "least_runs": 1024, "least_seconds": 60.0, "max_seconds": 1800.0}
"""The least of MLPerf Mobile's single-stream scenario (arXiv:2012.02328): 1,024 runs and a minute."""
COOL_SECONDS = 300.0
"""Longest wait for a device to cool down: that of MLPerf Mobile between two benchmarks."""


def measure(device: Device, models: Sequence[BenchModel], **settings: Unpack[Settings]) -> BenchResult:
    """Time models on a device, interleaved round by round. Settings are the fields of BenchRequest.

    Without `timeout_seconds` the device gets five times the measuring time, three seconds a model and two minutes, and
    the time to cool down.
    """
    return device.run(request(tuple(models), {**MEASURE, **settings}))


def request(models: tuple[BenchModel, ...], settings: Settings) -> BenchRequest:
    """The whole request for these models."""
    seconds = settings.get("max_seconds", MEASURE["max_seconds"])
    waiting = settings.get("cool_seconds", 0.0)
    known: dict[str, Any] = {"timeout_seconds": 120 + 5 * seconds + 3 * len(models) + waiting, **settings}
    return BenchRequest(models=models, **known)
