"""What a phone app shares of a measurement that it made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from mobilekit.types.manifest import Sha256

FEWEST_SAMPLES = 10
MOST_SAMPLES = 100_000
LONGEST_MS = 600_000.0
"""Of one run: ten minutes."""
STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+$"
Words = Annotated[str, Field(min_length=1, max_length=200, pattern=PRINTABLE)]
"""A line for people: no control characters, which would tear tables apart or hide what a terminal shows."""
Milliseconds = Annotated[float, Field(gt=0, le=LONGEST_MS, allow_inf_nan=False)]
Celsius = Annotated[float, Field(ge=-50, le=150, allow_inf_nan=False)]


class App(BaseModel):
    """Who measured."""

    model_config = STRICT
    name: Words
    version: Words


class Phone(BaseModel):
    """What it was measured on."""

    model_config = STRICT
    manufacturer: Words
    model: Words
    os: Words
    """With its version."""
    soc: Words | None = None
    cores: Annotated[int, Field(ge=1, le=1024)] | None = None
    memory_mb: Annotated[int, Field(ge=1, le=1 << 24)] | None = None

    @property
    def name(self) -> str:
        """As tables show it."""
        named = self.model if self.model.startswith(self.manufacturer) else f"{self.manufacturer} {self.model}"
        return f"{named} ({self.soc})" if self.soc else named


class ThermalState(BaseModel):
    """How hot the phone was, in its system's own words (iOS: nominal ... critical; Android: none ... shutdown)."""

    model_config = STRICT
    state: Words | None = None
    """None: the system does not say."""
    temperature_c: Celsius | None = None


class SharedResult(BaseModel):
    """The raw samples of one model file on one phone (schema 1); `docs/bench_protocol.md` says how they are taken."""

    model_config = STRICT

    schema_number: Literal[1] = Field(alias="schema")
    origin: Literal["device", "emulator"]
    app: App
    device: Phone
    model_sha256: Sha256
    """As the manifest states it."""
    runtime: Words
    threads: Annotated[int, Field(ge=1, le=1024)]
    compute_unit: Words
    """The one that was really used: cpu, gpu, npu, ..."""
    started_at: AwareDatetime
    warmup: Annotated[int, Field(ge=0, le=MOST_SAMPLES)]
    """Untimed runs before the first sample."""
    samples_ms: Annotated[tuple[Milliseconds, ...], Field(min_length=FEWEST_SAMPLES, max_length=MOST_SAMPLES)]
    """Wall time of each run, in order, none left out."""
    cpu_samples_ms: tuple[Milliseconds, ...] | None = None
    """CPU time of the process in each run; None: it was not taken."""
    load_ms: Annotated[float, Field(ge=0, le=LONGEST_MS, allow_inf_nan=False)]
    peak_memory_mb: Annotated[float, Field(gt=0, le=1 << 24, allow_inf_nan=False)] | None = None
    thermal_before: ThermalState
    thermal_after: ThermalState
    versions: Annotated[dict[Words, Words], Field(min_length=1, max_length=50)]
    """Of the runtime, under its name, and of whatever else matters."""

    @model_validator(mode="after")
    def _agree(self) -> SharedResult:
        if self.cpu_samples_ms is not None and len(self.cpu_samples_ms) != len(self.samples_ms):
            raise ValueError("cpu_samples_ms and samples_ms are not of the same runs: they differ in number")
        if self.runtime not in self.versions:
            raise ValueError(f"versions does not hold that of the runtime '{self.runtime}'")
        return self
