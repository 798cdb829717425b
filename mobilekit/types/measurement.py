"""What is asked of a device and the raw samples that it sends back."""

from __future__ import annotations

import statistics
from typing import Annotated

from pydantic import Field

from mobilekit.types.values import Origin, Positive, RuntimeName, Value


class Failure(Value):
    """Something that did not work: a row in the report, never only a log line."""

    stage: str
    subject: str
    message: str
    remedy: str


class BenchModel(Value):
    """One file to time."""

    name: str
    path: str
    runtime: RuntimeName


class BenchRequest(Value):
    """The measuring protocol that is asked of a device.

    Models run in turn, A B C A B C, once a round, so that all of them meet the same disturbances.
    """

    models: tuple[BenchModel, ...]
    threads: Annotated[int, Field(ge=1)] = 1
    warmup: Annotated[int, Field(ge=0)] = 10
    runs: Annotated[int, Field(ge=1)] = 100
    max_seconds: Positive = 20.0
    """Stop early, after at least 10 rounds, when the time is used up."""
    reference: bool = True
    """Time a 512x512x512 float32 matrix product before and after the models of every round, and in between."""
    per_operator: bool = False
    """Also report each operator's time through the runtime's own profiler."""
    timeout_seconds: Positive = 300.0


class OperatorTime(Value):
    """Measured time of one operator of a file, from the runtime's own profiler."""

    name: str
    kind: str
    median_us: float


class Measurement(Value):
    """Raw samples of one model file on one device."""

    model: str
    path: str
    sha256: str
    runtime: RuntimeName
    device: str
    origin: Origin
    threads: int
    samples_ms: tuple[float, ...]
    """Wall time of each run."""
    cpu_samples_ms: tuple[float, ...]
    """CPU time of the process in each run; empty where an app did not take it."""
    reference_ms: tuple[float, ...] = ()
    """CPU time of the reference matrix product around each run, the mean of before and after; empty where it was not
    asked for."""
    load_ms: float
    peak_memory_mb: float | None = None
    """None where several models share one process, so that none of them has a peak of its own."""
    compute_unit: str
    temperature_before_c: float | None = None
    temperature_after_c: float | None = None
    started_at: str
    versions: dict[str, str]
    cpus: tuple[int, ...] = ()
    """CPUs that the process was pinned to; empty where the system does not pin."""
    operators: tuple[OperatorTime, ...] = ()
    app: str | None = None
    """Name and version of the app that shared it; None: it was measured from here."""
    warmup: int | None = None
    """Untimed runs before the first sample, where an app says so."""
    thermal_before: str | None = None
    """The system's word for how hot the device was."""
    thermal_after: str | None = None

    @property
    def median_ms(self) -> float:
        """Median CPU time of a run; wall time where no CPU time was taken."""
        return statistics.median(self.cpu_samples_ms or self.samples_ms)


class BenchResult(Value):
    """What a device sent back: a measurement for each model that ran, a failure for each that did not."""

    measurements: tuple[Measurement, ...]
    failures: tuple[Failure, ...] = ()
