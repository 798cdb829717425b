"""Takes in measurements that a phone app shared: `mobilekit import RESULT.json --into DIR`."""

from __future__ import annotations

from pathlib import Path

from mobilekit import bench, documents, manifest
from mobilekit.errors import BadInputError
from mobilekit.pipeline import summary
from mobilekit.store import Store
from mobilekit.types import Measurement, MeasurementRow, ModelRow, Report, RuntimeName, SharedResult, Value

LINES = "measurements.jsonl"
SAME = ("sha256", "device", "origin", "compute_unit", "threads", "started_at", "samples_ms")
"""What two documents of one measurement have in common."""


class Imported(Value):
    """What came of it."""

    model: str
    """The file's path in the folder."""
    row: MeasurementRow
    report: str | None
    """The page that shows it now; None: the folder is one of exported files and has no report."""


class _Known(Value):
    """A model file of the folder."""

    path: str
    runtime: RuntimeName


def import_result(result: Path, folder: Path) -> Imported:
    """Put a shared result beside a folder's own measurements and write its report again.

    Raises BadInputError in one sentence, and changes nothing, for what is no such result, is of a file that the folder
    does not hold, or is there already.
    """
    shared = documents.read(result, SharedResult, f"the result '{result}'")
    if not folder.is_dir():
        raise BadInputError(f"'{folder}' is no folder: give the one that a plan or an export left to --into")
    report = summary.read_report(folder) if (folder / "report.json").exists() else None
    known = _known(folder, report)
    if shared.model_sha256 not in known:
        raise BadInputError(
            f"'{result}' is of a file with sha256 {shared.model_sha256[:12]}..., which is none of the "
            f"{len(known)} models in '{folder}': give the folder whose model was measured"
        )
    model = known[shared.model_sha256]
    if shared.runtime != model.runtime:
        raise BadInputError(f"'{result}' says that {model.path} was run by {shared.runtime}: it is of {model.runtime}")
    measurement = _measurement(shared, model)
    store = Store(folder)
    line = _line(store, measurement)
    if line is not None and (report is None or _shown(report, line)):
        raise BadInputError(f"'{result}' is in '{folder}' already (line {line} of {LINES}): nothing was changed")
    if line is None:
        line = store.append(LINES, measurement)
    row = bench.row(measurement, report.budget.clock if report else "wall", line)
    if report is None:
        return Imported(model=model.path, row=row, report=None)
    summary.render(store, _with(report, shared.model_sha256, row))
    return Imported(model=model.path, row=row, report=str(folder / "report.html"))


def _known(folder: Path, report: Report | None) -> dict[str, _Known]:
    """The folder's models by sha256: those of the report, else those of the manifest."""
    if report is not None:
        return {row.sha256: _Known(path=row.path, runtime=row.runtime) for row in report.models}
    if not (folder / manifest.NAME).exists():
        raise BadInputError(f"'{folder}' holds neither report.json nor manifest.json: give the folder of a plan")
    models = manifest.read(folder).models
    return {model.sha256: _Known(path=model.path, runtime=model.runtime) for model in models}


def _measurement(shared: SharedResult, model: _Known) -> Measurement:
    before, after = shared.thermal_before, shared.thermal_after
    return Measurement(
        model=Path(model.path).name,
        path=model.path,
        sha256=shared.model_sha256,
        runtime=shared.runtime,
        device=shared.device.name,
        origin=shared.origin,
        threads=shared.threads,
        samples_ms=shared.samples_ms,
        cpu_samples_ms=shared.cpu_samples_ms or (),
        load_ms=shared.load_ms,
        peak_memory_mb=shared.peak_memory_mb,
        compute_unit=shared.compute_unit,
        temperature_before_c=before.temperature_c,
        temperature_after_c=after.temperature_c,
        started_at=shared.started_at.isoformat(),
        versions={**shared.versions, "os": shared.device.os},
        app=f"{shared.app.name} {shared.app.version}",
        warmup=shared.warmup,
        thermal_before=before.state,
        thermal_after=after.state,
    )


def _line(store: Store, measurement: Measurement) -> int | None:
    """The line that holds this measurement already."""
    wanted = measurement.model_dump(mode="json", include=set(SAME))
    for number, document in enumerate(store.lines(LINES), 1):
        if isinstance(document, dict) and all(document.get(key) == value for key, value in wanted.items()):
            return number
    return None


def _shown(report: Report, line: int) -> bool:
    """Whether the report shows it: a crash may have come between the line and the report."""
    return any(row.line == line and row.file == LINES for model in report.models for row in model.measurements)


def _with(report: Report, sha256: str, row: MeasurementRow) -> Report:
    def grown(model: ModelRow) -> ModelRow:
        if model.sha256 != sha256:
            return model
        return model.model_copy(update={"measurements": (*model.measurements, row)})

    return report.model_copy(update={"models": tuple(grown(model) for model in report.models)})
