"""Everything that a report holds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mobilekit.types.device import DeviceInfo, KindFactor
from mobilekit.types.measurement import BenchWarning, Failure
from mobilekit.types.models import Parity
from mobilekit.types.plan import Budget, RejectedOption, Together
from mobilekit.types.values import Origin, Precision, RuntimeName, Value

Duration = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
"""What is drawn or divided into minutes."""


class Finding(Value):
    """One line of the verdict: a budget item, what was asked and what was found."""

    item: str
    limit: float
    found: float | None
    """Of a latency or a speedup, the median."""
    met: bool
    note: str = ""
    interval: tuple[float, float] | None = None
    """90 % interval of a measured median."""
    judged: float | None = None
    """The end of the interval that was compared with the limit; None: `found` was."""


class ModelFigures(Value):
    """Baseline or result in the report. What was not measured is None."""

    latency_ms: float | None
    """Median of all rounds of all sessions."""
    accuracy: float | None
    size_bytes: int | None
    macs: int
    params: int | None
    runtime: RuntimeName | None = None
    precision: Precision | None = None
    path: str | None = None
    latency_interval_ms: tuple[float, float] | None = None
    """90 % interval of that median."""


class MeasurementRow(Value):
    """A measurement as the report shows it; `line` is its line in measurements.jsonl, where the raw samples are."""

    device: str
    origin: Origin
    threads: int
    median_ms: float | None
    """Median at the budget's clock; None: nothing was timed (an emulator's times are no latency)."""
    clock: Literal["cpu", "wall"]
    p90_ms: float | None
    min_ms: float | None
    wall_median_ms: float | None
    reference_ratio: float | None
    """Median over rounds of this model's CPU time over the reference matrix product's."""
    samples: int
    file: str
    line: int
    compute_unit: str | None = None
    """The one that was used; None: an older report does not say."""
    load_ms: float | None = None
    first_run_ms: float | None = None
    peak_memory_mb: float | None = None
    energy_mj: float | None = None
    """Of one run."""
    instructions: int | None = None
    """Of one run, counted by an emulator."""
    parity: Parity | None = None
    """Of the outputs on this device; None: they were not compared."""
    beside_host: Parity | None = None
    """Of an emulator's outputs against those of the machine that emulates."""
    app: str | None = None
    """Name and version of the app that shared it; None: it was measured from here."""


class ModelRow(Value):
    """An exported file in the report."""

    path: str
    runtime: RuntimeName
    precision: Precision
    size_bytes: int
    sha256: str
    parity: Parity
    operators: dict[str, int]
    accuracy: float | None
    """Of the file itself, where this machine can run it."""
    measurements: tuple[MeasurementRow, ...]


class PlanRow(Value):
    """A chosen lever in the report."""

    transform: str
    where: str
    reason: str
    saved_ms: float | None
    damage: float | None


class Interval(Value):
    """A predicted latency."""

    low: float
    value: float
    high: float
    basis: str


class Round(Value):
    """One turn of plan, export untrained, measure. Milliseconds are those of the machine's speed in this round."""

    predicted_ms: float
    """The original of this round over the ratio that was predicted."""
    measured_ms: float | None
    baseline_ms: float | None
    target_ms: float | None
    options: int
    predicted_ratio: float | None = None
    ratio: float | None = None
    """Measured original over candidate, paired round by round."""
    ratio_interval: tuple[float, float] | None = None
    """90 % bootstrap interval of that ratio over sessions and rounds."""
    sessions: int | None = None
    accept: float | None = None
    """The share of the target that it had to keep to be accepted."""
    accepted: bool | None = None
    kinds: tuple[KindFactor, ...] = ()
    """What the runtime's profile said about the prices of single kinds of operators, against those of all."""


class FrontierRow(Value):
    """A plan along the front of latency and what is lost, timed before any training."""

    plan: str
    """Its file in the folder: `mobilekit apply` carries it out."""
    target_ms: float | None
    predicted_ms: float
    measured_ms: float | None
    """None: nothing was measured (dry run)."""
    ratio: float | None
    """Measured original over it, paired round by round."""
    damage: float | None
    """Divergence of its outputs from the original's, measured of all options together, int8 simulated; None: it could
    not be applied."""
    agreement: float | None
    """Top-1 agreement with the original on the same inputs."""
    judged: str = ""
    """When damage and agreement were measured, in words: before any training, or after a trial of it."""
    options: int
    beaten: bool
    """Another row is at least as fast as measured and does no more damage."""


class StageRow(Value):
    """How long a stage took; a resumed run shows the time of the run that did the work."""

    name: str
    seconds: Duration
    resumed: bool = False


class OperatorBar(Value):
    """Measured time of an operator before or after, for the report's bars."""

    name: str
    kind: str
    ms: Duration


class PrecisionRow(Value):
    """In which precision an operator of the result runs."""

    name: str
    kind: str
    precision: Precision
    reason: str | None = None
    """Why it is not what the file's name says; None: it is."""


class DeviceRow(Value):
    """What one more device measured of the final files: original and result in turn, and the other files."""

    device: str
    info: DeviceInfo | None
    baseline_ms: float | None
    result_ms: float | None
    ratio: float | None
    """Original over result, paired round by round."""
    ratio_interval: tuple[float, float] | None
    sessions: int | None = None
    operators_before: tuple[OperatorBar, ...] = ()
    operators_after: tuple[OperatorBar, ...] = ()
    samples: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Raw samples of baseline and result."""
    conditions: dict[str, str] = Field(default_factory=dict)


class Report(BaseModel):
    """Everything `report.json` holds (schema 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())

    schema_number: Literal[1] = Field(default=1, alias="schema")
    mobilekit_version: str
    created_at: str
    workload: str
    data: str
    profile: str
    device: str | None
    device_info: DeviceInfo | None
    seed: int
    budget: Budget
    verdict: Literal["met", "missed", "unreachable"] | None
    """None: no budget was given, or nothing was measured (dry run)."""
    findings: tuple[Finding, ...]
    best_reachable_ms: float | None
    """As measured, the upper end of the 90 % interval of its median."""
    best_reachable_basis: Literal["measured", "predicted"] | None
    best_reachable_ratio: float | None = None
    """How many times faster than the original that is, the lower end of the paired ratio's 90 % interval."""
    dry_run: bool
    baseline: ModelFigures
    result: ModelFigures
    accuracy_kind: str
    ratio: float | None
    """Measured baseline over result, paired round by round."""
    ratio_interval: tuple[float, float] | None
    """90 % bootstrap interval of that ratio, over sessions and rounds."""
    sessions: int | None = None
    """Processes in which original and result were measured in turn."""
    predicted_latency_ms: Interval
    predicted_baseline_ms: Interval
    extrapolated: tuple[str, ...]
    rounds: tuple[Round, ...]
    frontier: tuple[FrontierRow, ...] = ()
    plan: tuple[PlanRow, ...]
    together: Together | None = None
    """What all rows of the plan do to the output, after a trial of training or before any; None: not measured."""
    rejected: tuple[RejectedOption, ...]
    models: tuple[ModelRow, ...]
    operators_before: tuple[OperatorBar, ...]
    operators_after: tuple[OperatorBar, ...]
    predicted_before: tuple[OperatorBar, ...]
    predicted_after: tuple[OperatorBar, ...]
    samples: dict[str, tuple[float, ...]]
    """Raw samples of baseline and result at the budget's clock, from the last measurement."""
    conditions: dict[str, str]
    precisions: tuple[PrecisionRow, ...] = ()
    """Of the result's operators, in the order in which they run."""
    devices: tuple[DeviceRow, ...] = ()
    """Devices that measured the final files beside `device`."""
    measured_warnings: tuple[BenchWarning, ...] = ()
    """What makes samples less trustworthy."""
    stages: tuple[StageRow, ...]
    failures: tuple[Failure, ...]
    warnings: tuple[str, ...]
