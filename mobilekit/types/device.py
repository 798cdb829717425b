"""Devices, what they run, and what their operators cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mobilekit.types.values import NonNegative, Origin, Positive, Precision, RuntimeName, Target, Value

WEAK_ERROR = 0.15
"""Median left-out error from which a profile is called weak."""


class Provenance(Value):
    """Where a figure came from."""

    source: str
    version: str
    date: str
    licence: str


class KindModel(Value):
    """Price model of one operator kind: what each unit of each of its features costs.

    Features are defined in `mobilekit.cost.features`; a feature that is absent costs nothing. `low` and `high` multiply
    the price to give the interval that held for 80 % of the left-out samples; `min_macs` to `max_macs` and `min_bytes`
    to `max_bytes` is what was sampled: outside of it a price is extrapolated.
    """

    coefficients: dict[str, NonNegative]
    """Feature -> microseconds a unit."""
    low: Positive
    high: Positive
    samples: Annotated[int, Field(ge=0)]
    """Timed files, networks or blocks that hold an operator of this kind; 0: all of it comes from other devices."""
    median_error: NonNegative | None
    """Of left-out samples that are mostly of this kind; None where there were none."""
    max_macs: NonNegative
    max_bytes: NonNegative
    min_macs: NonNegative = 0.0
    min_bytes: NonNegative = 0.0


class Validation(Value):
    """How far a table's own predictor was off on samples that it was not fitted to."""

    method: str
    cases: Annotated[int, Field(ge=1)]
    median_error: NonNegative
    mean_error: NonNegative
    within_5: Annotated[float, Field(ge=0, le=1)]
    """Share of the cases within 5 % of the measured time."""
    within_10: Annotated[float, Field(ge=0, le=1)]
    coverage: Annotated[float, Field(ge=0, le=1)]
    """Share of the cases inside the nominal 80 % interval."""


class CostTable(Value):
    """Prices of operator kinds in one runtime, precision and thread count."""

    runtime: RuntimeName
    precision: Precision
    threads: Annotated[int, Field(ge=1)]
    overhead_us: NonNegative
    kinds: dict[str, KindModel]
    correction: Positive = 1.0
    """Factor by which measured networks were slower than the sum of their operators."""
    cores: Literal["", "big", "little", "all"] = ""
    """Which cluster ran it, where that is stated."""
    basis: Literal["kernel table", "fitted"] = "kernel table"
    """Operators were timed, alone or a few together; or whole networks were, and the prices fitted to them."""
    low: Positive = 1.0
    high: Positive = 1.0
    """Factors of the interval around a network's price that held for 80 % of the left-out networks; both 1: not known,
    the operators' own intervals are added up instead."""
    fusions: tuple[str, ...] = ()
    """What the runtime's own profile showed to run as one kernel: "conv+hardswish" (an activation inside the operator
    before it), "conv>add" (an operator inside the one that it reads)."""
    validation: Validation | None = None
    provenance: tuple[Provenance, ...] = ()
    reference_ms: Positive | None = None
    """The 512x512x512 float32 matrix product at the speed of the device that these prices are for."""

    @property
    def title(self) -> str:
        """Runtime, precision and threads in words."""
        return f"{self.runtime} {self.precision}, {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def weak(self) -> str | None:
        """Why these prices deserve low confidence, or None."""
        if self.validation is None:
            return "its prices were never checked against a measurement that they were not fitted to"
        if self.validation.median_error > WEAK_ERROR:
            return f"it is off by {self.validation.median_error:.0%} in the median"
        return None


class KindFactor(Value):
    """By how much a row of a cost table is off, as a profile of a network showed, against the other rows."""

    precision: Precision
    row: str
    factor: Positive
    """Measured over predicted time, relative to that of the whole network, and shrunk where little was seen of it."""
    operators: Annotated[int, Field(ge=1)]
    """How many operators of the network the factor rests on."""


class RuntimeEntry(Value):
    """What a device runs: a runtime, its precisions, and the channel multiple that its kernels like.

    Where a runtime runs on something else than the CPU the name says so: `tflite-gpu`, `onnx-npu`.
    """

    name: RuntimeName
    processor: Literal["cpu", "gpu", "npu"] = "cpu"
    precisions: tuple[Precision, ...]
    channel_multiple: Annotated[int, Field(ge=1)]
    writes: RuntimeName = ""
    """The format to write where the prices come from a runtime that reads another one's files (ncnn: onnx)."""

    @property
    def format(self) -> RuntimeName:
        """The runtime whose files are exported for it."""
        return self.writes or self.name


class DeviceProfile(Value):
    """A device and what is known of its speed."""

    schema_version: Literal[2] = 2
    name: Annotated[str, Field(min_length=1)]
    kind: Literal["host", "android", "ios", "linux-board"]
    soc: str
    cores: Annotated[int, Field(ge=1)]
    memory_mb: Annotated[int, Field(ge=1)] | None
    compute_units: tuple[str, ...]
    runtimes: Annotated[tuple[RuntimeEntry, ...], Field(min_length=1)]
    tables: tuple[CostTable, ...] = ()
    provenance: tuple[Provenance, ...] = ()
    validation_error: NonNegative | None = None
    """Median relative error of this profile's own predictor on samples it was not fitted to; None: not known."""
    key: str = ""
    """For a measured host: processor and runtime versions; the cache is only used while it is the same."""

    def runtime(self, name: RuntimeName) -> RuntimeEntry | None:
        """The entry of a runtime, or None where the device does not run it."""
        return next((entry for entry in self.runtimes if entry.name == name), None)

    def table(self, runtime: RuntimeName, precision: Precision) -> CostTable | None:
        """The cost table of a runtime and precision (of several thread counts the first), or None."""
        return next((t for t in self.tables if (t.runtime, t.precision) == (runtime, precision)), None)

    @property
    def weak(self) -> str | None:
        """Why the profile's predictions deserve low confidence, or None."""
        errors = [t.validation.median_error for t in self.tables if t.validation is not None]
        if not self.tables:
            return "no prices: nothing was measured yet"
        if not errors:
            return "its prices were never checked against a measurement that they were not fitted to"
        if min(errors) > WEAK_ERROR:
            return f"its best table is off by {min(errors):.0%} in the median"
        return None


class DeviceSettings(Value):
    """What a user says about a device beside its address."""

    runner: str | None = None
    """File that measures there in place of mobilekit's own script: `RUNNER REQUEST.json RESULT.json`."""
    wheels: str | None = None
    """Folder with wheels of the runtimes for the device, which then needs no internet."""


class Cluster(Value):
    """CPUs of one kind."""

    cpus: tuple[int, ...]
    core: str | None = None
    """As its maker calls it (Cortex-A76)."""
    min_mhz: float | None = None
    max_mhz: float | None = None
    now_mhz: float | None = None
    governor: str | None = None


class Battery(Value):
    """What a battery says of itself."""

    percent: float | None = None
    charging: bool | None = None
    temperature_c: float | None = None


class DeviceInfo(Value):
    """What a device is, as found out by asking it. What it does not say is None or empty."""

    name: str
    kind: str
    origin: Origin
    soc: str
    cores: int
    memory_mb: int | None
    os: str
    versions: dict[str, str]
    """Runtime name -> version; a runtime that is absent is not there."""
    model: str | None = None
    """The product: Raspberry Pi 4 Model B Rev 1.1, Google Pixel 8."""
    architecture: str | None = None
    """Of its processor: aarch64, armv7l, x86_64."""
    free_memory_mb: int | None = None
    """What programs can take now without swapping."""
    swap_used_mb: int | None = None
    clusters: tuple[Cluster, ...] = ()
    """The fastest first."""
    temperatures_c: dict[str, float] = Field(default_factory=dict)
    """Temperature zone -> degrees."""
    throttling: str | None = None
    """Whether it holds its frequencies down, in words; begins with "none" where it says that it does not."""
    battery: Battery | None = None

    @property
    def target(self) -> Target | None:
        """Whose processors its files are for; None: it does not say what it has."""
        if self.origin == "host":
            return "host"
        if self.architecture is None:
            return None
        return "arm" if self.architecture.lower().startswith(("aarch64", "arm")) else "x86"

    @property
    def throttled(self) -> bool:
        """Whether it says that it holds its frequencies down now."""
        return self.throttling is not None and not self.throttling.startswith("none")
