"""Predicted against measured: every round, and the result."""

from __future__ import annotations

from mobilekit.reports import _words as words
from mobilekit.reports._blocks import Block, Cell, Fold, Section, Step, Steps, Text, num, table
from mobilekit.reports._summary import predicted, span
from mobilekit.types import Report, Round

HEADS = (
    *("Round", "Options", "Target", "Predicted", "Measured", "Measured over predicted", "Original, measured"),
    *("Times faster, predicted", "Times faster, measured", "90 % interval", "Accepted"),
)


def rounds(report: Report) -> Section:
    """How well the predictions held."""
    title = "Predicted against measured"
    intro = Text(
        "A round predicts a plan, exports it untrained, measures it in turn with the original, and corrects the device "
        "profile by what was measured. Milliseconds are those of the machine's speed in that round. "
        + predicted(report).replace("Predicted:", "The last prediction:")
    )
    rows = [_round(f"Round {i}", r) for i, r in enumerate(report.rounds, 1)]
    if not rows and report.result.latency_ms is None:
        return Section("rounds", title, (intro, Text("No round was measured.", "quiet")))
    if report.result.latency_ms is not None:
        rows.append(_result(report))
    shown = [0, *(i for i in range(1, len(HEADS)) if any(row[i].text != words.DASH for row in rows))]
    kept = [[row[i] for i in shown] for row in rows]
    told = table([HEADS[i] for i in shown], kept, key="no target, or nothing to compare")
    return Section("rounds", title, (intro, _steps(report), told, *_kinds(report)))


def _round(label: str, r: Round) -> tuple[Cell, ...]:
    return (
        Cell(label),
        num(str(r.options)),
        num(words.ms(r.target_ms, words.DASH)),
        num(words.ms(r.predicted_ms)),
        num(words.ms(r.measured_ms)),
        num(words.change(r.predicted_ms, r.measured_ms)),
        num(words.ms(r.baseline_ms)),
        num(words.number(r.predicted_ratio)),
        num(words.number(r.ratio)),
        num(span(r.ratio_interval) if r.ratio_interval else words.DASH),
        Cell(words.DASH if r.accepted is None else "yes" if r.accepted else "no"),
    )


def _result(report: Report) -> tuple[Cell, ...]:
    """The files as they were shipped, after any training, beside the last prediction."""
    after = report.result.latency_ms
    last = report.predicted_latency_ms.value
    of_rounds = [r.predicted_ratio for r in report.rounds if r.accepted and r.options == len(report.plan)]
    ratio = of_rounds[-1] if of_rounds else None
    if not report.rounds and last:
        ratio = report.predicted_baseline_ms.value / last
    return (
        Cell("Result"),
        num(str(len(report.plan))),
        num(words.ms(report.rounds[-1].target_ms if report.rounds else None, words.DASH)),
        num(words.ms(last)),
        num(words.ms(after)),
        num(words.change(last, after)),
        num(words.ms(report.baseline.latency_ms)),
        num(words.number(ratio)),
        num(words.number(report.ratio)),
        num(span(report.ratio_interval) if report.ratio_interval else words.DASH),
        Cell(words.DASH),
    )


def _kinds(report: Report) -> list[Block | Fold]:
    """What the runtime's profile said about the prices of kinds."""
    rows = [
        (Cell(f"Round {i}"), Cell(k.row, "code"), Cell(k.precision), num(str(k.operators)), num(words.number(k.factor)))
        for i, r in enumerate(report.rounds, 1)
        for k in r.kinds
    ]
    if not rows:
        return []
    heads = ("Round", "Kind", "Precision", "Operators", "Price off by a factor of")
    title = "Kinds of operators in the runtime's profile, against the whole network"
    return [Fold(f"{title} ({len(rows)} rows)", (table(heads, rows),))]


def _steps(report: Report) -> Steps:
    p = report.predicted_latency_ms
    steps = [Step(f"Round {i}", r.predicted_ms, r.measured_ms, r.target_ms) for i, r in enumerate(report.rounds, 1)]
    target = report.rounds[-1].target_ms if report.rounds else None
    label = "Last prediction" if report.result.latency_ms is None else "Result"
    final = Step(label, p.value, report.result.latency_ms, target, p.low, p.high)
    return Steps("Predicted and measured latency", (*steps, final))
