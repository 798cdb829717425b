"""The report's part on exported model files: what they are, how faithful, how fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from mobilekit.reports import _words as words
from mobilekit.reports._blocks import Block, Cell, Fold, Section, Table, Text, Tone, num, table
from mobilekit.types import MeasurementRow, ModelRow, Parity, Report

_STATUS: dict[str, tuple[str, Tone]] = {
    "executed": ("executed in its runtime", "good"),
    "evaluated": ("evaluated by mobilekit, not by its runtime", "warn"),
    "structure-only": ("structure only, neither executed nor evaluated", "warn"),
    "unchecked": ("not checked", "warn"),
}


def models(report: Report) -> Section:
    """The written files: facts, parity, measurements."""
    if not report.models:
        return Section("models", "Model files", (Text("No model file was written.", "quiet"),))
    files = table(
        ("File", "Runtime", "Precision", "Size", "Operators in the file", "Accuracy of the file", "SHA-256"),
        [_facts(model) for model in report.models],
        "Files, as read back after writing",
    )
    parity = table(
        ("File", "Check", "SQNR (dB)", "Cosine", "Top-1 agreement", "Largest error", "Inputs", "Note"),
        [_parity(model) for model in report.models],
        "Parity: each file's outputs against the PyTorch model's, measured",
    )
    return Section("models", "Model files", (files, parity, *_measurements(report)))


def _name(model: ModelRow) -> Cell:
    """The file's name; the folder is that of all files."""
    return Cell(model.path.rpartition("/")[2] or model.path, "code", model.path)


def _facts(model: ModelRow) -> tuple[Cell, ...]:
    counts = ", ".join(f"{count:,} {precision}" for precision, count in model.operators.items())
    accuracy = words.score(model.accuracy)
    return (
        _name(model),
        Cell(model.runtime),
        Cell(model.precision),
        num(words.size(model.size_bytes)),
        Cell(counts) if counts else Cell("not counted", "quiet"),
        num(accuracy),
        Cell(model.sha256[:12], "code", model.sha256),
    )


def _parity(model: ModelRow) -> tuple[Cell, ...]:
    p = model.parity
    text, tone = _STATUS[p.status]
    checks = (
        _ratio(p),
        num("not checked" if p.cosine is None else f"{p.cosine:.6f}"),
        num("not checked" if p.top1_agreement is None else f"{p.top1_agreement * 100:.2f} %"),
        num(words.number(p.max_abs_error, missing="not checked")),
        num(f"{p.samples:,}" if p.samples else "none"),
    )
    return (_name(model), Cell(text, tone), *checks, Cell(p.note))


def _ratio(parity: Parity) -> Cell:
    if parity.sqnr_db is not None:
        return num(f"{parity.sqnr_db:.1f}")
    return num("bit-exact") if parity.samples else num("not checked")


def _measurements(report: Report) -> list[Block | Fold]:
    rows = [(model, row) for model in report.models for row in model.measurements]
    absent = [model.path for model in report.models if not model.measurements]
    blocks: list[Block | Fold] = []
    if rows:
        groups = _grouped(rows)
        blocks.append(_latencies(groups))
        blocks.append(Text(EXPLAINED, "quiet"))
        blocks += _beside(groups)
        lines = words.listed(sorted({row.file for _, row in rows}))
        heads = (
            *("File", "Device", "Median (ms)", "p90 (ms)", "Min (ms)", "Wall median (ms)", "Over reference"),
            *("Samples", "Raw samples"),
        )
        each = table(heads, [_session(model, row) for model, row in rows], f"Raw samples: line of {lines}")
        blocks.append(Fold(f"{words.plural(len(rows), 'session')}, one by one", (each, Text(OVER_REFERENCE, "quiet"))))
    if absent:
        blocks.append(Text(f"Latency not measured: {words.listed(absent)}.", "quiet"))
    return blocks


Rows = list[tuple[ModelRow, MeasurementRow]]
LATENCY = (
    *("File", "Device", "Origin", "Threads", "Clock", "Sessions"),
    *("Median (ms)", "p90 (ms)", "Min (ms)", "Samples"),
)
SAID_ONCE = {2: "origin {}", 3: "threads: {}", 4: "{} time"}
"""Columns that are named in the caption where all rows hold the same."""
EXPLAINED = "Of several sessions: the lowest and the highest of their figures; the samples of all of them."
OVER_REFERENCE = (
    "Over reference: CPU time over that of a 512 x 512 x 512 float32 matrix product in the same round; a dash: none "
    "was timed."
)


def _grouped(rows: Rows) -> list[Rows]:
    """Sessions of one file on one device together, in the order in which they came."""
    found: dict[tuple[object, ...], Rows] = {}
    for model, row in rows:
        key = (model.path, row.device, row.origin, row.threads, row.compute_unit, row.app, row.clock)
        found.setdefault(key, []).append((model, row))
    return list(found.values())


def _device(row: MeasurementRow) -> Cell:
    unit = "" if row.compute_unit in {None, "cpu"} else f", {row.compute_unit}"
    by = f" (shared by {row.app})" if row.app else ""
    return Cell(f"{row.device}{unit}{by}")


def _latencies(groups: list[Rows]) -> Table:
    """A row for each file on each device, without the columns that would say the same in all of them."""
    rows = [_latency(group) for group in groups]
    same = {i: rows[0][i].text for i in SAID_ONCE if len({row[i].text for row in rows}) == 1}
    kept = [i for i in range(len(LATENCY)) if i not in same]
    caption = "Latency, measured"
    if same:
        caption += f" ({', '.join(SAID_ONCE[i].format(text) for i, text in same.items())})"
    shown = [[row[i] for i in kept] for row in rows]
    return table([LATENCY[i] for i in kept], shown, caption, "nothing was timed")


def _latency(group: Rows) -> tuple[Cell, ...]:
    model, first = group[0]
    every = [row for _, row in group]
    least = [row.min_ms for row in every if row.min_ms is not None]
    return (
        _name(model),
        _device(first),
        Cell(first.origin, "warn" if first.origin == "emulator" else ""),
        num(str(first.threads)),
        Cell({"cpu": "CPU", "wall": "wall"}[first.clock] if first.median_ms is not None else words.DASH),
        num(str(len(every))),
        num(_span([row.median_ms for row in every])),
        num(_span([row.p90_ms for row in every])),
        num(words.number(min(least)) if least else "not measured"),
        num(f"{sum(row.samples for row in every):,}"),
    )


def _span(values: Sequence[float | None], missing: str = "not measured") -> str:
    """One figure, or the lowest and the highest of several."""
    known = [value for value in values if value is not None]
    if not known:
        return missing
    low, high = words.number(min(known)), words.number(max(known))
    return low if low == high else f"{low} to {high}"


EMULATED = "Emulated beside this machine"
"""A column that only an emulator can fill: without one nothing is missing."""


def _beside(groups: list[Rows]) -> list[Block]:
    """What was measured beside the latency, in columns that hold anything; the rest is named."""
    columns: dict[str, Callable[[list[MeasurementRow]], str]] = {
        "Load (ms)": lambda rows: _span([row.load_ms for row in rows], words.DASH),
        "First run (ms)": lambda rows: _span([row.first_run_ms for row in rows], words.DASH),
        "Peak memory (MB)": lambda rows: _span([row.peak_memory_mb for row in rows], words.DASH),
        "Energy of a run (mJ)": lambda rows: _span([row.energy_mj for row in rows], words.DASH),
        "Instructions of a run": lambda rows: _first([row.instructions for row in rows], words.count_of),
        "Parity on the device": lambda rows: _first([row.parity for row in rows], _compared),
        EMULATED: lambda rows: _first([row.beside_host for row in rows], _compared),
    }
    cells = {name: [figure([row for _, row in group]) for group in groups] for name, figure in columns.items()}
    known = [name for name, column in cells.items() if any(text != words.DASH for text in column)]
    absent = [name.partition(" (")[0].lower() for name in columns if name not in (*known, EMULATED)]
    blocks: list[Block] = []
    if known:
        rows = [
            (_name(group[0][0]), _device(group[0][1]), *(num(cells[name][i]) for name in known))
            for i, group in enumerate(groups)
        ]
        blocks.append(table(("File", "Device", *known), rows, "Beside the latency, measured"))
    if known and absent:
        blocks.append(Text(f"Not measured on any device: {words.listed(absent)}.", "quiet"))
    return blocks


T = TypeVar("T")


def _first(values: Sequence[T | None], told: Callable[[T], str]) -> str:
    """What is the same in every session, from the first that has it."""
    return next((told(value) for value in values if value is not None), words.DASH)


def _compared(parity: Parity) -> str:
    if not parity.samples:
        return "not checked"
    ratio = "bit-exact" if parity.sqnr_db is None else f"{parity.sqnr_db:.1f} dB"
    return ratio if parity.top1_agreement is None else f"{ratio}, top-1 {parity.top1_agreement * 100:.1f} %"


def _session(model: ModelRow, row: MeasurementRow) -> tuple[Cell, ...]:
    return (
        _name(model),
        _device(row),
        num(words.number(row.median_ms, missing="not measured")),
        num(words.number(row.p90_ms, missing="not measured")),
        num(words.number(row.min_ms, missing="not measured")),
        num(words.number(row.wall_median_ms, missing="not measured")),
        num(words.number(row.reference_ratio)),
        num(f"{row.samples:,}"),
        Cell(f"line {row.line}", title=row.file),
    )
