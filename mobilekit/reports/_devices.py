"""The result on every device that measured it: one line each."""

from __future__ import annotations

from mobilekit.reports import _words as words
from mobilekit.reports._blocks import Bar, Bars, Cell, Section, Text, num, table
from mobilekit.types import DeviceInfo, DeviceRow, Report

EXPLAINED = (
    "Milliseconds of different devices are never averaged. Times faster: median over rounds of original over result, "
    "measured in turn."
)


def devices(report: Report) -> Section:
    """Before, after and the ratio, a row for each device; the one that the plan was made for comes first."""
    first = DeviceRow(
        device=report.device or "none",
        info=report.device_info,
        baseline_ms=report.baseline.latency_ms,
        result_ms=report.result.latency_ms,
        ratio=report.ratio,
        ratio_interval=report.ratio_interval,
        sessions=report.sessions,
    )
    rows = (first, *report.devices)
    heads = (
        *("Device", "Before (ms, measured)", "After (ms, measured)", "Times faster", "90 % interval"),
        *("Sessions", "Origin", "Processor"),
    )
    bars = tuple(Bar(row.device, row.baseline_ms, row.result_ms) for row in rows if row.result_ms is not None)
    drawn = (
        [Bars("Latency before and after on each device, measured", "measured", bars, "ms", head="Device")]
        if bars
        else []
    )
    told = table(heads, [_row(row) for row in rows], key="not known")
    return Section("devices", "On every device", (Text(EXPLAINED, "quiet"), told, *drawn))


def _row(row: DeviceRow) -> tuple[Cell, ...]:
    low_high = row.ratio_interval
    return (
        Cell(row.device),
        num(words.number(row.baseline_ms, missing="not measured")),
        num(words.number(row.result_ms, missing="not measured")),
        num(words.number(row.ratio, missing="not measured")),
        num(f"{words.number(low_high[0])} to {words.number(low_high[1])}" if low_high else words.DASH),
        num(words.DASH if row.sessions is None else str(row.sessions)),
        _origin(row.info),
        Cell(row.info.soc if row.info and row.info.soc else words.DASH),
    )


def _origin(info: DeviceInfo | None) -> Cell:
    if info is None:
        return Cell(words.DASH)
    return Cell(info.origin, "warn" if info.origin == "emulator" else "")
