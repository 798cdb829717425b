"""The summary of a sweep as a page, as Markdown and as a picture: measured, predicted, failed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mobilekit.reports import _words as words
from mobilekit.reports._blocks import Cell, Table, Tone, num
from mobilekit.reports._sweep_figure import Panel, Point, draw, standalone
from mobilekit.reports.html import _environment as environment
from mobilekit.reports.markdown import escape
from mobilekit.types.sweep import CellRow, SweepSummary

TONES: dict[str, Tone] = {
    "met": "good",
    "missed": "warn",
    "unreachable": "warn",
    "failed": "bad",
    "not judged": "quiet",
}
UNKNOWN = words.DASH
FORMS: dict[str, Callable[[float | None, str], str]] = {
    "latency_ms": words.ms,
    "accuracy": words.score,
    "size_bytes": words.size,
}


@dataclass(frozen=True)
class Part:
    """A titled table whose rows lead to the reports of their cells."""

    anchor: str
    title: str
    intro: str
    table: Table
    links: tuple[str, ...]
    """Of each row's first column; empty where the cell left no report."""
    notes: tuple[str, ...] = ()


def html(summary: SweepSummary) -> str:
    """sweep.html: self-contained, without scripts; every string of the cells is escaped."""
    panels = [(panel, draw(panel)) for panel in _panels(summary)]
    text = (
        environment()
        .get_template("sweep.html.j2")
        .render(
            title=f"mobilekit sweep: {summary.spec}",
            state=_state(summary),
            headline=headline(summary),
            facts=_facts(summary),
            warnings=summary.warnings,
            parts=_parts(summary),
            panels=panels,
            footer=_footer(summary),
        )
    )
    return words.clean(text)


def markdown(summary: SweepSummary) -> str:
    """sweep.md in GitHub's dialect; every string of the cells is escaped."""
    blocks = [f"# {escape(headline(summary))}", " · ".join(f"{k}: {escape(v)}" for k, v in _facts(summary))]
    blocks += [f"**Warning:** {escape(warning)}." for warning in summary.warnings]
    for part in _parts(summary):
        blocks += [f"## {part.title}", escape(part.intro), _lines(part), part.table.legend]
        blocks.append("\n".join(f"- {escape(note)}" for note in part.notes))
        if part.anchor == "measured" and _panels(summary):
            blocks.append("![Measured accuracy over measured latency](sweep.svg)")
    blocks.append(f"*{escape(_footer(summary))}*")
    return words.clean("\n\n".join(block for block in blocks if block)) + "\n"


def svg(summary: SweepSummary) -> str:
    """sweep.svg: measured accuracy over measured latency; empty where no cell measured both."""
    panels = _panels(summary)
    return words.clean(standalone(panels)) if panels else ""


def headline(summary: SweepSummary) -> str:
    """`12 cells: 9 met, 2 missed and 1 failed`."""
    counts = words.listed([f"{count:,} {name}" for name, count in summary.counts.items()])
    return f"{words.plural(len(summary.cells), 'cell')}: {counts}"


def in_words(row: CellRow) -> str:
    """The outcome of a cell in one line: a verdict and the figure that goes with it."""
    if row.failure is not None:
        return f"failed: {row.failure.message}"
    if row.verdict == "unreachable":
        best = words.ms(row.best_reachable_ms, "latency not known")
        basis = f" ({row.best_reachable_basis})" if row.best_reachable_basis else ""
        return f"unreachable, best {best}{basis}"
    if row.ratio is not None:
        return f"{row.outcome}, measured {words.faster(row.ratio)}"
    predicted = row.predicted_latency_ms
    return row.outcome + (f", predicted {words.ms(predicted.value)}" if predicted else "")


# ---------------------------------------------------------------- the head


def _state(summary: SweepSummary) -> str:
    """The colour of the page's top, by the worst that happened."""
    states = {"failed": "unreachable", "unreachable": "missed", "missed": "missed", "not judged": "open", "met": "met"}
    return next((state for name, state in states.items() if name in summary.counts), "open")


def _facts(summary: SweepSummary) -> tuple[tuple[str, str], ...]:
    return (
        ("Sweep", summary.spec),
        ("Ran", "in local processes" if summary.engine == "local" else "on a Ray cluster"),
        ("Dry run", "yes, no latency was measured" if summary.dry_run else "no"),
        ("Made", words.moment(summary.created_at)),
    )


def _footer(summary: SweepSummary) -> str:
    return f"mobilekit {summary.mobilekit_version}. Every figure is in sweep.json, and each cell has its own report."


# ---------------------------------------------------------------- tables


def _parts(summary: SweepSummary) -> list[Part]:
    rows = list(enumerate(summary.cells, 1))
    parts = [_outcomes(rows)]
    measured = [(i, row) for i, row in rows if row.baseline is not None]
    if measured:
        parts.append(_measured(measured))
    predicted = [(i, row) for i, row in rows if row.predicted_latency_ms is not None]
    if predicted:
        parts.append(_predicted(predicted))
    failed = [(i, row) for i, row in rows if row.failure is not None]
    if failed:
        parts.append(_failures(failed))
    return [*parts, _conduct(rows)]


def _link(row: CellRow) -> str:
    return f"{row.folder}/report.html" if row.failure is None or row.baseline is not None else ""


def _links(rows: Sequence[tuple[int, CellRow]]) -> tuple[str, ...]:
    return tuple(_link(row) for _, row in rows)


def _outcomes(rows: Sequence[tuple[int, CellRow]]) -> Part:
    heads = ("Cell", "Workload", "Profile", "Runtime", "Budget", "Seed", "Outcome", "Times faster, measured")
    cells = tuple(
        (
            Cell(str(index)),
            Cell(row.workload),
            Cell(row.profile),
            Cell(row.runtime or "not known"),
            Cell(row.budget.label),
            num(str(row.seed)),
            Cell(row.outcome, TONES[row.outcome]),
            num(_faster(row)),
        )
        for index, row in rows
    )
    budgets = {row.budget.label: words.listed(words.asked(row.budget)) or "nothing" for _, row in rows}
    notes = tuple(f"Budget {label}: {text}" for label, text in budgets.items())
    intro = "The ratio is that of original and result, paired run by run, with its 90 % interval."
    return Part("cells", "Cells", intro, Table(heads, cells), _links(rows), notes)


def _faster(row: CellRow) -> str:
    if row.ratio is None:
        return UNKNOWN
    low, high = row.ratio_interval or (math.nan, math.nan)
    span = f" ({words.number(low)} to {words.number(high)})" if math.isfinite(low + high) else ""
    return words.number(row.ratio) + span


def _measured(rows: Sequence[tuple[int, CellRow]]) -> Part:
    heads = ("Cell", "Name", "Latency before", "Latency after", "Accuracy before", "Accuracy after",
             "File size before", "File size after", "Best reachable")  # fmt: skip
    cells = []
    for index, row in rows:
        best = row.best_reachable_ms if row.best_reachable_basis == "measured" else None
        figures = [
            form(getattr(side, name, None), UNKNOWN)
            for name, form in FORMS.items()
            for side in (row.baseline, row.result)
        ]
        cells.append((Cell(str(index)), Cell(row.name), *map(num, figures), num(words.ms(best, UNKNOWN))))
    kinds = {row.workload: row.accuracy_kind for _, row in rows if row.accuracy_kind}
    notes = tuple(f"Accuracy of {workload}: {kind}" for workload, kind in kinds.items())
    clocks = words.listed(sorted({words.clock(row.budget) for _, row in rows}))
    intro = f"The original before and the result after. Latency is the {clocks}."
    return Part("measured", "Measured", intro, Table(heads, tuple(cells)), _links(rows), notes)


def _predicted(rows: Sequence[tuple[int, CellRow]]) -> Part:
    heads = ("Cell", "Name", "Original, predicted", "Result, predicted", "Low", "High", "Basis",
             "Best reachable, predicted")  # fmt: skip
    cells = []
    for index, row in rows:
        before, after = row.predicted_baseline_ms, row.predicted_latency_ms
        best = row.best_reachable_ms if row.best_reachable_basis == "predicted" else None
        figures = [before.value if before else None, *((after.value, after.low, after.high) if after else ())]
        cells.append(
            (
                Cell(str(index)),
                Cell(row.name),
                *(num(words.ms(figure, UNKNOWN)) for figure in figures),
                Cell(after.basis if after else UNKNOWN),
                num(words.ms(best, UNKNOWN)),
            )
        )
    table = Table(heads, tuple(cells), key="within reach, or nothing was asked for")
    intro = "By the device profiles; low and high are a nominal 80 % interval. Nothing here was measured."
    return Part("predicted", "Predicted", intro, table, _links(rows))


def _failures(rows: Sequence[tuple[int, CellRow]]) -> Part:
    cells = tuple(
        (Cell(str(index)), Cell(row.name), Cell(f.stage), Cell(f.message), Cell(f.remedy))
        for index, row in rows
        if (f := row.failure) is not None
    )
    table = Table(("Cell", "Name", "Stage", "What went wrong", "What to do"), cells)
    intro = "Tried twice; these are the words of the last attempt. The other cells were not affected."
    return Part("failures", "Failures", intro, table, _links(rows))


def _conduct(rows: Sequence[tuple[int, CellRow]]) -> Part:
    heads = ("Cell", "Folder", "Device", "Processor", "Attempts", "Time", "Warnings", "Failures survived")
    cells = tuple(
        (
            Cell(str(index)),
            Cell(row.folder, "code"),
            Cell(row.device or "none"),
            Cell(row.machine or UNKNOWN),
            num(str(row.attempts)),
            num(words.seconds(row.seconds)),
            num(str(row.warnings)),
            num(str(row.troubles)),
        )
        for index, row in rows
    )
    intro = "Each folder holds the cell's own report, its log (log.txt) and its files."
    table = Table(heads, cells, key="no device was asked")
    return Part("conduct", "How it ran", intro, table, _links(rows))


def _lines(part: Part) -> str:
    """The table as Markdown."""
    table = part.table
    rows = [[escape(cell.text) for cell in row] for row in table.rows]
    for row, link in zip(rows, part.links, strict=True):
        if link:
            row[0] = f"[{row[0]}]({link})"
    rules = ["---:" if numeric else "---" for numeric in table.numeric]
    return "\n".join("| " + " | ".join(row) + " |" for row in ([escape(h) for h in table.columns], rules, *rows))


# ---------------------------------------------------------------- the picture


def _panels(summary: SweepSummary) -> list[Panel]:
    """One for each workload on each device in each runtime: only there can latencies be compared."""
    found: dict[tuple[str, ...], list[Point]] = {}
    for index, row in enumerate(summary.cells, 1):
        points = list(_points(index, row))
        if any(not point.original for point in points):
            place = (
                row.workload,
                row.profile,
                row.runtime or "",
                row.machine or row.device or "",
                words.clock(row.budget),
            )
            found.setdefault(place, []).extend(points)
    return [
        Panel(f"{workload} on {profile}, {runtime}", f"{machine}, {clock}", tuple(points))
        for (workload, profile, runtime, machine, clock), points in found.items()
    ]


def _points(index: int, row: CellRow) -> Iterator[Point]:
    for figures, original in ((row.baseline, True), (row.result, False)):
        if figures is None or figures.latency_ms is None or figures.accuracy is None:
            continue
        if math.isfinite(figures.latency_ms + figures.accuracy):
            yield Point(str(index), figures.latency_ms, figures.accuracy, original, row.budget.label)
