"""Reads what `mobilekit report compare` is given: folders of plans, and what `mobilekit measure --json` prints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mobilekit import documents
from mobilekit.errors import BadInputError, StorageError
from mobilekit.pipeline import summary
from mobilekit.pipeline.request import read_plan
from mobilekit.store import Store
from mobilekit.types import Measurement, MeasurementRow, ModelRow, Plan, Report

LINES = "measurements.jsonl"
GIVE = "give the folder of a plan, or a file with what mobilekit measure --json prints"


class Key(NamedTuple):
    """What is compared with its like."""

    role: str
    """`original`, `result` or a format and precision in a folder; else the name of the file."""
    runtime: str
    device: str
    compute_unit: str


@dataclass(frozen=True)
class Source:
    """One of the two results."""

    name: str
    measured: dict[Key, list[Measurement]] = field(default_factory=dict)
    """Sessions in the order in which they were measured."""
    report: Report | None = None
    plan: Plan | None = None


class _Document(BaseModel):
    """What `mobilekit measure --json` prints, or one measurement as measurements.jsonl has it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    measurements: tuple[Measurement, ...]

    @model_validator(mode="before")
    @classmethod
    def _of_one(cls, document: Any) -> Any:
        if isinstance(document, dict) and "samples_ms" in document:
            return {"measurements": [document]}
        if not isinstance(document, dict) or "measurements" not in document:
            raise ValueError(f"it holds no measurements: {GIVE}")
        return document


def read_source(path: Path) -> Source:
    """The measurements at a path. Raises BadInputError in one sentence where it is none that this version reads."""
    if not path.exists():
        raise BadInputError(f"'{path}' does not exist: {GIVE}")
    if path.name == "report.json" and path.is_file():
        path = path.parent
    if path.is_dir():
        return _folder(path)
    measurements = _lines(path) if path.suffix == ".jsonl" else _document(path)
    if not measurements:
        raise BadInputError(f"'{path}' holds no measurements: {GIVE}")
    return Source(str(path), _by_key((m.model, m) for m in measurements))


def _document(path: Path) -> tuple[Measurement, ...]:
    return documents.read(path, _Document, f"the measurements '{path}'").measurements


def _lines(path: Path) -> tuple[Measurement, ...]:
    found = enumerate(documents.content(path, f"'{path}'").splitlines(), 1)
    return tuple(
        documents.parse(line, Measurement, f"line {number} of '{path}'") for number, line in found if line.strip()
    )


def _by_key(pairs: Iterable[tuple[str, Measurement]]) -> dict[Key, list[Measurement]]:
    found: dict[Key, list[Measurement]] = {}
    for role, m in pairs:
        if m.operators:  # the profiler slows it down
            continue
        times = (*m.samples_ms, *m.cpu_samples_ms, *m.reference_ms)
        if not all(math.isfinite(time) and time >= 0 for time in times):
            raise BadInputError(f"the measurement of {m.model} on {m.device} has samples that are no times")
        found.setdefault(Key(role, m.runtime, m.device, m.compute_unit), []).append(m)
    return found


# ---------------------------------------------------------------- folders of plans


def _folder(folder: Path) -> Source:
    report = summary.read_report(folder)
    plan_file = folder / "plan.json"
    plan = read_plan(plan_file) if plan_file.exists() else None
    measured = _by_key(_measured(report, _all_lines(folder)))
    return Source(str(folder), measured, report, plan)


def _all_lines(folder: Path) -> list[Any]:
    try:
        return Store(folder).lines(LINES)
    except StorageError as error:
        raise BadInputError(f"{error}") from error


def _measured(report: Report, lines: list[Any]) -> Iterator[tuple[str, Measurement]]:
    """The last measurements of the files, and of the original the sessions in which it ran in turn with the result."""
    beside: set[tuple[str, str]] = set()
    for model in report.models:
        for row in model.measurements:
            found = _at(lines, row)
            if model.path == report.result.path:
                beside.add((found.device, found.started_at))
            yield _role(model, report), found
    for document in lines:
        if isinstance(document, dict) and document.get("model") == "original":
            found = _valid(document)
            if (found.device, found.started_at) in beside:
                yield "original", found


def _role(model: ModelRow, report: Report) -> str:
    return "result" if model.path == report.result.path else f"{model.runtime} {model.precision}"


def _at(lines: list[Any], row: MeasurementRow) -> Measurement:
    if row.file != LINES or not 1 <= row.line <= len(lines):
        raise BadInputError(f"report.json names line {row.line} of {LINES}, which is not there: run the plan again")
    return _valid(lines[row.line - 1])


def _valid(document: Any) -> Measurement:
    try:
        return Measurement.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise BadInputError(f"a line of {LINES} {documents.sentence(error)}") from error
