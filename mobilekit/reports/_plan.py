"""What was done to the network, what was tried or weighed and left, and why."""

from __future__ import annotations

from collections import Counter

from mobilekit.reports import _words as words
from mobilekit.reports._blocks import Block, Cell, Fold, Section, Text, num, table
from mobilekit.types import RejectedOption, Report

LONG = 6
"""Rows of a table that is not folded away."""


def plan(report: Report) -> Section:
    """The levers of the plan."""
    chosen = [
        (
            Cell(words.spaced(row.transform)),
            Cell(row.where, "code"),
            Cell(row.reason),
            num(words.ms(row.saved_ms, words.DASH)),
            num(words.number(row.damage)),
        )
        for row in report.plan
    ]
    if not chosen:
        return Section("plan", "The plan", (Text("The plan changes nothing.", "quiet"),))
    heads = ("Lever", "Where", "Why", "Saves, predicted", "Damage, measured")
    key = "no price, or damage not measured"
    blocks: list[Block | Fold] = [
        table(heads, chosen, f"{words.plural(len(chosen), 'lever')} used", key),
        Text("Damage: how far this lever alone moves the network's output from the original's.", "quiet"),
    ]
    if report.together:
        blocks.append(Text(_sentence(str(report.together)), "quiet"))
    return Section("plan", "The plan", tuple(blocks))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def rejected(report: Report) -> Section:
    """What the plan does not use, with the reason for each: results too, although negative ones."""
    title = "Tried and not used"
    if not report.rejected:
        return Section("rejected", title, (Text("No lever was turned down.", "quiet"),))
    counts = Counter(row.transform for row in report.rejected)
    rows = [_row(row) for row in report.rejected]
    heads = ("Lever", "Where", "Why not")
    if len(rows) <= LONG:
        return Section("rejected", title, (table(heads, rows, f"{words.plural(len(rows), 'lever')} not used"),))
    told = ", ".join(f"{words.spaced(name)} at {words.plural(n, 'place')}" for name, n in counts.most_common(LONG))
    rest = len(counts) - LONG
    more = f" and {words.plural(rest, 'more lever')}" if rest > 0 else ""
    summary = f"{words.plural(len(rows), 'lever')} not used, with reasons"
    every = Fold(summary, (table(heads, rows),))
    return Section("rejected", title, (Text(f"Not used: {told}{more}."), every))


def _row(row: RejectedOption) -> tuple[Cell, ...]:
    return Cell(words.spaced(row.transform)), Cell(row.where, "code"), Cell(row.reason)
