"""What is written for a measuring program on a device, and what it writes back (`docs/bench_protocol.md`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from mobilekit.types.measurement import BenchRequest
from mobilekit.types.shared_result import LONGEST_MS, Celsius, Milliseconds, Words

MOST_ROUNDS = 1_000_000
MOST_OPERATORS = 100_000
MOST_OUTPUT_BYTES = 256 * 1024 * 1024
LONG_LINE = 2000
STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True, protected_namespaces=())
Line = Annotated[str, Field(max_length=LONG_LINE)]
Samples = Annotated[
    tuple[Annotated[float, Field(ge=0, le=LONGEST_MS, allow_inf_nan=False)], ...], Field(max_length=MOST_ROUNDS)
]
Index = Annotated[int, Field(ge=0, lt=100_000)]


class RunnerRequest(BenchRequest):
    """REQUEST.json (schema 1): paths of models and inputs are those on the device."""

    schema_number: Literal[1] = Field(default=1, alias="schema")
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())


class RunnerConditions(BaseModel):
    """Under which it measured. What the system does not say is null."""

    model_config = STRICT
    started_at: AwareDatetime
    versions: Annotated[dict[Words, Words], Field(max_length=50)]
    """Runtime name -> version, and of whatever else matters."""
    compute_unit: Words
    cpus: Annotated[tuple[Annotated[int, Field(ge=0, lt=4096)], ...], Field(max_length=4096)] = ()
    """That the process was pinned to."""
    waited_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """For the device to cool down."""
    temperature_before_c: Celsius | None = None
    temperature_after_c: Celsius | None = None
    thermal_before: Words | None = None
    """The system's word for how hot it is."""
    thermal_after: Words | None = None
    throttled: bool | None = None


class RunnerOperator(BaseModel):
    """Time of one operator, from the runtime's profiler."""

    model_config = STRICT
    name: Line
    kind: Line
    median_us: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RunnerOutput(BaseModel):
    """An output for all samples of the inputs."""

    model_config = STRICT
    name: Line
    shape: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...], Field(max_length=8)]
    """The samples come first."""
    dtype: Words
    data: Annotated[str, Field(max_length=MOST_OUTPUT_BYTES)]
    """Base64 of the little-endian values in C order."""


class RunnerMeasurement(BaseModel):
    """Raw samples of one model."""

    model_config = STRICT
    index: Index
    """Of the model in the request."""
    load_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    first_run_ms: Milliseconds | None = None
    warmup: Annotated[int, Field(ge=0)] | None = None
    """Untimed runs before the first round."""
    stable: bool | None = None
    """Whether warming up went on until runs were alike; null: it was not asked for."""
    samples_ms: Samples
    """Wall time of each round."""
    cpu_samples_ms: Samples = ()
    """CPU time of the process in the same rounds; empty where it was not taken."""
    reference_ms: Samples = ()
    peak_memory_mb: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    energy_mj: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    instructions: Annotated[int, Field(ge=0)] | None = None
    operators: Annotated[tuple[RunnerOperator, ...], Field(max_length=MOST_OPERATORS)] = ()
    outputs: Annotated[tuple[RunnerOutput, ...], Field(max_length=1000)] = ()

    @model_validator(mode="after")
    def _pair(self) -> RunnerMeasurement:
        for name in ("cpu_samples_ms", "reference_ms"):
            count = len(getattr(self, name))
            if count not in (0, len(self.samples_ms)):
                raise ValueError(
                    f"{name} and samples_ms are not of the same rounds: {count} and {len(self.samples_ms)}"
                )
        return self


class RunnerFailure(BaseModel):
    """What did not work."""

    model_config = STRICT
    stage: Literal["load", "measure", "operators"]
    index: Index
    message: Line
    remedy: Line


class RunnerResult(BaseModel):
    """RESULT.json (schema 1)."""

    model_config = STRICT
    schema_number: Literal[1] = Field(alias="schema")
    conditions: RunnerConditions
    measurements: Annotated[tuple[RunnerMeasurement, ...], Field(max_length=100_000)]
    failures: Annotated[tuple[RunnerFailure, ...], Field(max_length=100_000)]

    @model_validator(mode="after")
    def _once(self) -> RunnerResult:
        indices = [measurement.index for measurement in self.measurements]
        if len(set(indices)) < len(indices):
            raise ValueError("a model is measured twice")
        return self
