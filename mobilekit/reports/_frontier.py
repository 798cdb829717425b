"""The front of plans: a table, and a picture of what each loses over its latency."""

from __future__ import annotations

from mobilekit.reports import _words as words
from mobilekit.reports._blocks import Block, Cell, Dot, Scatter, Section, Text, num, table
from mobilekit.types import FrontierRow, Report

EXPLAINED = (
    "Plans from one measurement of the options, timed before any training: latency does not depend on the weights. "
    "What is lost does, and is measured as the last column says. Carry one out with mobilekit apply."
)


def frontier(report: Report) -> Section:
    """The section of the report."""
    rows = report.frontier
    measured = any(row.measured_ms is not None for row in rows)
    blocks: list[Block] = [Text(EXPLAINED)]
    dots = _dots(report, measured)
    if len(dots) > 1:
        blocks.append(
            Scatter("Agreement with the original before the training", "measured" if measured else "predicted", dots)
        )
    figures = ("Predicted ms", "Measured ms", "Times faster", "Divergence", "Agreement", "Options")
    heads = ("Plan", *figures, "", "Divergence measured")
    told = [_row(row) for row in rows]
    blocks.append(table(heads, told))
    return Section("front", "Front of plans", tuple(blocks))


def _row(row: FrontierRow) -> tuple[Cell, ...]:
    return (
        Cell(row.plan, tone="code"),
        num(words.brief_ms(row.predicted_ms)),
        num(words.brief_ms(row.measured_ms)),
        num(words.number(row.ratio)),
        num(words.number(row.damage)),
        num("not measured" if row.agreement is None else words.score(row.agreement)),
        num(str(row.options)),
        Cell("beaten by another" if row.beaten else "", tone="warn"),
        Cell(row.judged),
    )


def _dots(report: Report, measured: bool) -> tuple[Dot, ...]:
    found = []
    for number, row in enumerate(report.frontier, 1):
        latency = row.measured_ms if measured else row.predicted_ms
        if latency is not None and row.agreement is not None:
            found.append(Dot(str(number), latency, row.agreement, original=False, spoken=f"plan {number}"))
    whole = report.baseline.latency_ms if measured else report.predicted_baseline_ms.value
    if found and whole is not None:
        found.append(Dot("original", whole, 1.0, original=True, spoken="original"))
    return tuple(found)
