"""What came of an attempt at a cell, read from the folder that it left."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from mobilekit.errors import BadInputError
from mobilekit.pipeline._sweep_engines import Ended
from mobilekit.pipeline._sweep_folders import FAILURE, LOG
from mobilekit.pipeline._sweep_spec import Cell
from mobilekit.pipeline.request import read_plan
from mobilekit.types import Failure, Report
from mobilekit.types.sweep import CellRow

OUT_OF_MEMORY = "the system may have run out of memory: run fewer cells at once"


def row_of(cell: Cell, folder: Path, ended: Ended, attempts: int, seconds: float) -> CellRow:
    """The row of a cell that has ended, well or not; `folder` is its folder in the sweep's, `cells/NAME`."""
    row = CellRow(
        name=cell.name,
        folder=f"{folder.parent.name}/{folder.name}",
        key=cell.job.key,
        workload=cell.workload,
        profile=cell.profile,
        runtime=cell.job.runtime,
        budget=cell.budget,
        seed=cell.job.seed,
        attempts=attempts,
        seconds=seconds,
    )
    failure = _failure(folder, ended)
    if failure is None:
        try:
            report = Report.model_validate_json((folder / "report.json").read_bytes())
            plan = read_plan(folder / "plan.json")
        except (OSError, ValidationError, BadInputError):
            failure = _said(folder, "the cell's process ended without a report that can be read")
        else:
            return _filled(row, report).model_copy(
                update={"workload_key": plan.workload_key, "runtime": plan.runtime, "failure": _unmeasured(report)}
            )
    return row.model_copy(update={"failure": failure})


def _filled(row: CellRow, report: Report) -> CellRow:
    """The row with what the cell's report says."""
    same = (
        "device", "verdict", "accuracy_kind", "baseline", "result", "ratio", "ratio_interval", "predicted_baseline_ms",
        "predicted_latency_ms", "best_reachable_ms", "best_reachable_basis",
    )  # fmt: skip
    return row.model_copy(
        update={
            **{name: getattr(report, name) for name in same},
            "machine": report.device_info.soc if report.device_info else None,
            "warnings": len(report.warnings),
            "troubles": len(report.failures),
        }
    )


def _failure(folder: Path, ended: Ended) -> Failure | None:
    """What the cell said of its own end, or what its process showed; None where it ended well."""
    try:
        return Failure.model_validate_json((folder / FAILURE).read_bytes())
    except (OSError, ValidationError):
        pass
    if not ended.how:
        return None
    return _said(folder, ended.how, OUT_OF_MEMORY if ended.how.endswith("SIGKILL") else "")


def _unmeasured(report: Report) -> Failure | None:
    """A budget that was to be judged on a device and could not be, which `mobilekit plan` calls a failure too."""
    if report.verdict is not None or report.dry_run or report.device is None or not report.findings:
        return None
    first = next((failure for failure in report.failures if failure.stage == "measure"), None)
    message = "the budget could not be judged: nothing was measured"
    return Failure(
        stage="measure",
        subject=first.subject if first else report.device,
        message=f"{message} ({first.message})" if first else message,
        remedy=first.remedy if first else "see the cell's report",
    )


def _said(folder: Path, message: str, remedy: str = "") -> Failure:
    see = f"see {LOG} in its folder"
    return Failure(stage="cell", subject=folder.name, message=message, remedy=f"{remedy}; {see}" if remedy else see)
