"""The map of precisions: every operator of the result, with what it computes in."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from mobilekit.reports import _words as words
from mobilekit.reports._blocks import Block, Cell, Fold, Map, Section, Spot, Text, table
from mobilekit.types import ModelRow, Precision, PrecisionRow, Report

SIGNS: dict[Precision, str] = {"int8": "8", "fp16": "16", "fp32": "32"}
ROWS = 12
"""Of the map, at most; a network of other parts is drawn in one."""
MOST_SPOTS = 3000


def precisions(report: Report) -> Section:
    """A spot for each operator, what the file itself says, and the reasons where one is not in the file's precision."""
    title = "Precision of every operator"
    rows = report.precisions
    if not rows:
        return Section("precisions", title, (Text("Not known: no result was written.", "quiet"),))
    counts = Counter(row.precision for row in rows)
    legend = tuple((p, sign, f"{counts[p]:,} in {p}") for p, sign in SIGNS.items() if p in counts)
    said = f"{words.plural(len(rows), 'operator')} in the order in which they run"
    blocks: list[Block | Fold] = [Map(said, _parts(rows[:MOST_SPOTS]), legend)]
    own = next((m for m in report.models if m.path == report.result.path), None)
    blocks += [Text(_read_back(own), "quiet")] if own and own.operators else []
    blocks += _reasons(rows)
    heads = ("Operator", "Kind", "Precision", "Why not as the file is called")
    every = [
        (Cell(row.name, "code"), Cell(words.spaced(row.kind)), Cell(row.precision), Cell(row.reason or ""))
        for row in rows
    ]
    blocks.append(Fold(f"All {len(rows):,} operators with their precision", (table(heads, every),)))
    return Section("precisions", title, tuple(blocks))


def _parts(rows: tuple[PrecisionRow, ...]) -> tuple[tuple[str, tuple[Spot, ...]], ...]:
    """Consecutive operators of one module are a row: of modules so far up that there are a few rows."""
    found = [_together(rows, depth) for depth in (1, 2, 3)]
    return next((parts for parts in found if 3 <= len(parts) <= ROWS), (("", tuple(map(_spot, rows))),))


def _together(rows: tuple[PrecisionRow, ...], depth: int) -> tuple[tuple[str, tuple[Spot, ...]], ...]:
    parts = groupby(rows, key=lambda row: ".".join(row.name.split(".")[:depth]))
    return tuple((part, tuple(map(_spot, inside))) for part, inside in parts)


def _spot(row: PrecisionRow) -> Spot:
    return Spot(row.precision, f"{row.name} ({words.spaced(row.kind)}): {row.precision}")


def _read_back(model: ModelRow) -> str:
    counts = words.listed([f"{count:,} in {precision}" for precision, count in model.operators.items()])
    return (
        f"The map is what {model.path} was asked for. Counted in the file itself: {counts}; it may hold an operator of "
        "the map in several pieces, or several in one."
    )


def _reasons(rows: tuple[PrecisionRow, ...]) -> list[Block]:
    """The exceptions, by reason."""
    found = Counter((row.precision, row.reason) for row in rows if row.reason)
    if not found:
        return []
    told = [
        (Cell(reason or ""), Cell(precision), Cell(f"{count:,}", "number"))
        for (precision, reason), count in found.most_common()
    ]
    return [table(("Reason", "Precision", "Operators"), told, "Not in the precision that the file is named after")]
