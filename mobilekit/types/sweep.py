"""Many runs at once: what a sweep is asked for, what each cell does, and what came of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mobilekit.types.measurement import Failure
from mobilekit.types.plan import Budget
from mobilekit.types.report import Interval, ModelFigures
from mobilekit.types.values import Positive, RuntimeName, Value

Text = Annotated[str, Field(min_length=1, max_length=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class NamedBudget(Budget):
    """A budget of a sweep; `name` is what folders and tables call it. Without one it is called by its figures.

    >>> NamedBudget(speedup=2, size_mb=0.5).label
    '2x-0.5mb'
    """

    name: Annotated[str, Field(min_length=1, max_length=60)] | None = None

    @property
    def label(self) -> str:
        """The name, or a short one made of the figures."""
        parts = (
            (self.latency_ms, "{:g}ms"),
            (self.speedup, "{:g}x"),
            (self.size_mb, "{:g}mb"),
            (self.peak_memory_mb, "peak{:g}mb"),
            (self.max_drop, "drop{:g}"),
        )
        return self.name or "-".join(form.format(value) for value, form in parts if value is not None) or "no-budget"

    @property
    def plain(self) -> Budget:
        """The budget as a single run takes it."""
        return Budget(**self.model_dump(exclude={"name"}))


class SweepSpec(Value):
    """What `mobilekit sweep` reads: every workload on every profile in every runtime within every budget, per seed."""

    workloads: Annotated[tuple[Text, ...], Field(min_length=1)]
    """`file.py` (relative to the specification's folder) or `package.module`."""
    profiles: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Names of shipped profiles, or `.json` files (relative to the specification's folder)."""
    budgets: Annotated[tuple[NamedBudget, ...], Field(min_length=1)]
    runtimes: tuple[Text, ...] = ()
    """Empty: the first runtime of each profile."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    device: Text | None = None
    """Where to measure; None: this machine for host profiles, nothing for others."""
    dry_run: bool = False
    train: bool = True
    train_minutes: Positive | None = None
    """Longest training of a cell; None: as long as `mobilekit plan` trains."""

    @model_validator(mode="after")
    def _sound(self) -> SweepSpec:
        for name in ("workloads", "profiles", "budgets", "runtimes", "seeds"):
            values = [v.plain if isinstance(v, NamedBudget) else v for v in getattr(self, name)]
            twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
            if twice is not None:
                said = twice.model_dump(exclude_defaults=True) if isinstance(twice, Budget) else twice
                raise ValueError(f"{name} holds {said!r} twice")
        if not self.train and self.train_minutes is not None:
            raise ValueError("train_minutes is for runs that train, and train is false")
        return self


class CellJob(Value):
    """All that a cell's process needs to know: one run of `mobilekit plan`."""

    mobilekit_version: str
    workload: str
    """An absolute path or an importable name."""
    profile: str
    profile_sha256: str
    budget: Budget
    runtime: RuntimeName | None
    device: str | None
    seed: int
    train: bool
    train_seconds: float
    dry_run: bool

    @property
    def key(self) -> str:
        """sha256 of everything that is asked; the workload's weights have a key of their own."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class CellRow(Value):
    """What came of one cell. What was not measured is None; measured and predicted figures never share a field."""

    name: str
    folder: str
    """Relative to the sweep's folder."""
    key: str
    """`CellJob.key`."""
    workload_key: str | None = None
    """sha256 of the workload's source and weights, as the cell found them."""
    workload: str
    profile: str
    runtime: RuntimeName | None
    budget: NamedBudget
    seed: int
    device: str | None = None
    machine: str | None = None
    """Processor of the device."""
    verdict: Literal["met", "missed", "unreachable"] | None = None
    """None: failed, or there was nothing to judge (no budget, or nothing measured)."""
    accuracy_kind: str | None = None
    baseline: ModelFigures | None = None
    """Measured and counted."""
    result: ModelFigures | None = None
    """Measured and counted."""
    ratio: float | None = None
    """Measured baseline over result, paired round by round."""
    ratio_interval: tuple[float, float] | None = None
    """90 % bootstrap interval of that ratio."""
    predicted_baseline_ms: Interval | None = None
    predicted_latency_ms: Interval | None = None
    best_reachable_ms: float | None = None
    best_reachable_basis: Literal["measured", "predicted"] | None = None
    disturbed: bool = False
    """It may have been measured while another cell kept the same device busy."""
    warnings: int = 0
    """Warnings in the cell's own report."""
    troubles: int = 0
    """Failures that the cell survived, in its own report."""
    attempts: Annotated[int, Field(ge=1)]
    seconds: float
    """Of all attempts together."""
    failure: Failure | None = None
    """Why there is no result, after the last attempt."""

    @property
    def outcome(self) -> Literal["met", "missed", "unreachable", "not judged", "failed"]:
        """The verdict in a word, also where there is none."""
        return "failed" if self.failure is not None else self.verdict or "not judged"


class SweepSummary(BaseModel):
    """Everything `sweep.json` holds (schema 1)."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())

    schema_number: Literal[1] = Field(default=1, alias="schema")
    mobilekit_version: str
    created_at: str
    spec: str
    engine: Literal["local", "ray"]
    dry_run: bool
    cells: tuple[CellRow, ...]
    warnings: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Outcome -> number of cells, the worst last; outcomes that did not occur are left out."""
        found: Counter[str] = Counter(cell.outcome for cell in self.cells)
        order = ("met", "not judged", "missed", "unreachable", "failed")
        return {name: found[name] for name in order if found[name]}
