"""What is asked of a device and the raw samples that it sends back."""

from __future__ import annotations

import statistics
from typing import Annotated, Literal

from pydantic import Field

from mobilekit.types.models import Parity
from mobilekit.types.values import NonNegative, Origin, Positive, RuntimeName, Value

Cores = Literal["any", "big", "little"]
WarningKind = Literal[
    "few-rounds", "unstable-start", "other-load", "threads", "two-modes", "drift", "throttling", "hot", "spread"
]


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
    inputs: tuple[str, ...] = ()
    """Files with what it is fed, one for each of its inputs in their order: samples one after another, each in the
    model's own type and layout, little-endian. Empty: seeded normal numbers for floats, zeros for all else."""


class BenchRequest(Value):
    """The measuring protocol that is asked of a device.

    Models run in turn, A B C A B C, once a round, so that all of them meet the same disturbances.
    """

    models: tuple[BenchModel, ...]
    threads: Annotated[int, Field(ge=1)] = 1
    cores: Cores = "any"
    """The cluster whose CPUs are used; "any": the least busy ones. Where all CPUs are alike they are one cluster."""
    warmup: Annotated[int, Field(ge=0)] = 10
    """Untimed runs of each model before the first round, at least."""
    warm_until_stable: bool = False
    """Warm up until a model's runs no longer become faster or slower, or its share of the time is over."""
    runs: Annotated[int, Field(ge=1)] = 100
    """Most rounds; fewer where `max_seconds` are over before."""
    least_runs: Annotated[int, Field(ge=0)] = 0
    """Go on to so many rounds, and to `least_seconds`, whatever `runs` says; `max_seconds` still ends it."""
    least_seconds: NonNegative = 0.0
    max_seconds: Positive = 20.0
    """Stop early, after at least 10 rounds, when the time is used up."""
    cool_to_c: float | None = None
    """Wait until no temperature zone is hotter before anything is loaded, at most `cool_seconds`."""
    cool_seconds: NonNegative = 0.0
    return_outputs: bool = False
    """Also return the outputs for all samples of `inputs`, for comparison on the device."""
    reference: bool = True
    """Time a 512x512x512 float32 matrix product before and after the models of every round, and in between."""
    per_operator: bool = False
    """Also report each operator's time through the runtime's own profiler."""
    timeout_seconds: Positive = 300.0


class BenchWarning(Value):
    """What makes samples less trustworthy, with its figures and what can be done about it."""

    kind: WarningKind
    subject: str
    message: str
    advice: str

    def __str__(self) -> str:
        """As one line."""
        return f"{self.subject}: {self.message}: {self.advice}"


class TensorData(Value):
    """An output that a device returned: all samples' values, one after another."""

    name: str
    shape: tuple[int, ...]
    """The samples come first."""
    dtype: str
    data: str
    """Base64 of the little-endian values in C order, as the model wrote them."""


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
    """Wall time of each run; empty where the origin is an emulator that mobilekit ran: its times are no latency."""
    cpu_samples_ms: tuple[float, ...]
    """CPU time of the process in each run; empty where an app did not take it."""
    reference_ms: tuple[float, ...] = ()
    """CPU time of the reference matrix product around each run, the mean of before and after; empty where it was not
    asked for."""
    load_ms: float | None = None
    """None where nothing is timed: on an emulator."""
    first_run_ms: float | None = None
    """Wall time of the first run after loading, which packs weights and fills caches."""
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
    """Untimed runs before the first sample; None: an app did not say."""
    stable: bool | None = None
    """Whether warming up went on until runs were alike; None: it was not asked for."""
    cool_to_c: float | None = None
    """The temperature that was waited for before it was loaded; None: there was no such gate."""
    waited_seconds: float | None = None
    """For the device to cool down."""
    thermal_before: str | None = None
    """The system's word for how hot the device was."""
    thermal_after: str | None = None
    throttled: bool | None = None
    """Whether the system held its frequencies down while it ran; None: it does not say."""
    energy_mj: float | None = None
    """Energy of one run, from the device's own meter, with all that runs on it; None: it has none."""
    instructions: int | None = None
    """Of one run, counted by an emulator."""
    parity: Parity | None = None
    """Outputs on this device against those of the PyTorch network on golden inputs; None: they were not asked for."""
    beside_host: Parity | None = None
    """Outputs of an emulator against those of the machine that emulates, for the same file and inputs."""
    outputs: Annotated[tuple[TensorData, ...], Field(exclude=True)] = ()
    """What it returned, until it was compared; never stored."""

    @property
    def median_ms(self) -> float | None:
        """Median CPU time of a run; wall time where no CPU time was taken; None where nothing was timed."""
        samples = self.cpu_samples_ms or self.samples_ms
        return statistics.median(samples) if samples else None


class BenchResult(Value):
    """What a device sent back: a measurement for each model that ran, a failure for each that did not."""

    measurements: tuple[Measurement, ...]
    failures: tuple[Failure, ...] = ()
