"""The report's part on exported model files: what they are, how faithful, how fast."""

from __future__ import annotations

from mobilekit.reports import _words as words
from mobilekit.reports._blocks import Block, Cell, Section, Text, Tone, num, table
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
    return Cell(model.path, "code")


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


def _measurements(report: Report) -> list[Block]:
    rows = [_measured(model, row) for model in report.models for row in model.measurements]
    absent = [model.path for model in report.models if not model.measurements]
    blocks: list[Block] = []
    if rows:
        heads = (
            "File",
            "Device",
            "Origin",
            "Threads",
            "Median (ms)",
            "p90 (ms)",
            "Min (ms)",
            "Clock",
            "Wall median (ms)",
            "Over reference",
            "Samples",
            "Raw samples",
        )
        blocks.append(table(heads, rows, "Latency, measured", "no reference was timed"))
        lines = words.listed(sorted({row.file for model in report.models for row in model.measurements}))
        note = (
            f"A row for each session. Raw samples: line of {lines}. Over reference: CPU time over that of a "
            "512 x 512 x 512 float32 matrix product in the same round."
        )
        blocks.append(Text(note, "quiet"))
    if absent:
        blocks.append(Text(f"Latency not measured: {words.listed(absent)}.", "quiet"))
    return blocks


def _measured(model: ModelRow, row: MeasurementRow) -> tuple[Cell, ...]:
    return (
        _name(model),
        Cell(row.device if row.compute_unit in {None, "cpu"} else f"{row.device}, {row.compute_unit}"),
        Cell(row.origin, "warn" if row.origin == "emulator" else ""),
        num(str(row.threads)),
        num(words.number(row.median_ms)),
        num(words.number(row.p90_ms)),
        num(words.number(row.min_ms)),
        Cell("CPU" if row.clock == "cpu" else "wall"),
        num(words.number(row.wall_median_ms)),
        num(words.number(row.reference_ratio)),
        num(f"{row.samples:,}"),
        Cell(f"line {row.line}", title=row.file),
    )
