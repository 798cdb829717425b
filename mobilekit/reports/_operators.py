"""Where the milliseconds went: operators before and after, on every device, and as predicted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from mobilekit.reports import _words as words
from mobilekit.reports._blocks import (
    Bar,
    Bars,
    Basis,
    Block,
    Cell,
    Columns,
    Fold,
    Group,
    Section,
    Table,
    Text,
    num,
    table,
)
from mobilekit.types import OperatorBar, Report

MOST_BARS = 18
"""Bars of one picture; a longer list ends in sums of the rest by kind."""
SHOWN_OF_LONG = 14
APART = 1.3
"""A sum of operators this far from the latency is remarked on."""


def operators(report: Report) -> Section:
    """Where the milliseconds went, as measured and as predicted, and as measured on other devices."""
    predicted = (report.predicted_before, report.predicted_after)
    latencies = (report.baseline.latency_ms, report.result.latency_ms)
    measured = _measured((report.operators_before, report.operators_after), latencies)
    groups: tuple[Group, ...] = (
        (f"by the runtime's profiler{f' on {report.device}' if report.devices else ''}", "measured", measured),
        ("by the device profile", "predicted", _operator_blocks(*predicted, "predicted")),
    )
    others: list[Fold | Text] = []
    for row in report.devices:
        if row.operators_before or row.operators_after:
            found = _measured((row.operators_before, row.operators_after), (row.baseline_ms, row.result_ms))
            others.append(Fold(f"Measured on {row.device}", found))
        else:
            others.append(Text(f"On {row.device} operators were not measured one by one.", "quiet"))
    return Section("operators", "Where the milliseconds went", (Columns(groups), *others))


Bothsides = tuple[Sequence[OperatorBar], Sequence[OperatorBar]]


def _measured(sides: Bothsides, latencies: tuple[float | None, float | None]) -> tuple[Block | Fold, ...]:
    return (*_apart(sides, latencies), *_operator_blocks(*sides, "measured"))


def _apart(sides: Bothsides, latencies: tuple[float | None, float | None]) -> tuple[Text, ...]:
    """A line for each side whose operators do not add up to its latency: they were timed in another run."""
    lines = []
    for name, bars, latency_ms in zip(("original", "result"), sides, latencies, strict=True):
        total = sum(bar.ms for bar in bars if math.isfinite(bar.ms))
        if latency_ms and total and not 1 / APART < total / latency_ms < APART:
            lines.append(
                f"The operators of the {name} add up to {words.ms(total)}, {total / latency_ms:.2g} times its latency "
                f"of {words.ms(latency_ms)}: the profiler runs the file apart and slows small operators down, so that "
                "only their shares can be compared."
            )
    return tuple(Text(line, "quiet") for line in lines)


def _operator_blocks(
    before: Sequence[OperatorBar], after: Sequence[OperatorBar], basis: Basis
) -> tuple[Block | Fold, ...]:
    if not before and not after:
        what = "Not measured: the runtime's profiler gave no times." if basis == "measured" else "Not predicted."
        return (Text(what, "quiet"),)
    totals = [words.ms(sum(o.ms for o in side), "0 ms") if side else f"not {basis}" for side in (before, after)]
    pairs = _paired(before, after)
    note = f"Sum before: {totals[0]}, after: {totals[1]}"
    blocks: list[Block | Fold] = [
        Bars(f"Time of each operator, {basis}", basis, _grouped(pairs), "ms", note),
        _by_kind(before, after, basis),
    ]
    if len(pairs) > MOST_BARS:
        rows = [
            (
                Cell(bar.label, "code"),
                Cell(words.spaced(kind)),
                num(words.brief_ms(bar.before)),
                num(words.brief_ms(bar.after)),
            )
            for bar, kind in pairs
        ]
        heads = ("Operator", "Kind", f"Before (ms, {basis})", f"After (ms, {basis})")
        blocks.append(Fold(f"All {len(pairs)} operators, {basis}", (table(heads, rows, key="no such operator"),)))
    return tuple(blocks)


def _paired(before: Sequence[OperatorBar], after: Sequence[OperatorBar]) -> list[tuple[Bar, str]]:
    """Operators of the same name side by side, the slowest first; equal names are told apart by their order."""
    found: dict[tuple[str, int], list[float | None]] = {}
    kinds: dict[tuple[str, int], str] = {}
    for side, bars in enumerate((before, after)):
        seen: Counter[str] = Counter()
        for bar in bars:
            key = (bar.name, seen[bar.name])
            seen[bar.name] += 1
            found.setdefault(key, [None, None])[side] = bar.ms if math.isfinite(bar.ms) else None
            kinds[key] = bar.kind
    pairs = [(Bar(key[0], before=b, after=a), kinds[key]) for key, (b, a) in found.items()]
    return sorted(pairs, key=lambda pair: -_height(pair[0]))


def _height(bar: Bar) -> float:
    return max(bar.before or 0.0, bar.after or 0.0)


def _grouped(pairs: list[tuple[Bar, str]]) -> tuple[Bar, ...]:
    """The slowest operators one by one and the rest summed by kind, so that a deep network stays readable."""
    if len(pairs) <= MOST_BARS:
        return tuple(bar for bar, _ in pairs)
    rest: dict[str, list[Bar]] = {}
    for bar, kind in pairs[SHOWN_OF_LONG:]:
        rest.setdefault(kind, []).append(bar)
    most = MOST_BARS - SHOWN_OF_LONG
    groups = sorted(rest.items(), key=lambda item: -_height(_summed("", item[1])))
    named = groups if len(groups) <= most else groups[: most - 1]
    sums = [
        _summed(f"{len(bars)} more ({words.spaced(kind)})" if len(bars) > 1 else bars[0].label, bars)
        for kind, bars in named
    ]
    left = [bar for _, bars in groups[len(named) :] for bar in bars]
    tail = [_summed(f"{len(left)} more (other kinds)", left)] if left else []
    return (*(bar for bar, _ in pairs[:SHOWN_OF_LONG]), *sums, *tail)


def _summed(label: str, bars: Sequence[Bar]) -> Bar:
    before = [b.before for b in bars if b.before is not None]
    after = [b.after for b in bars if b.after is not None]
    return Bar(label, sum(before) if before else None, sum(after) if after else None, is_sum=len(bars) > 1)


def _by_kind(before: Sequence[OperatorBar], after: Sequence[OperatorBar], basis: Basis) -> Table:
    sums: dict[str, list[list[float]]] = {}
    for side, bars in enumerate((before, after)):
        for bar in bars:
            sums.setdefault(bar.kind, [[], []])[side].append(bar.ms)
    order = sorted(sums.items(), key=lambda item: -max(sum(item[1][0]), sum(item[1][1])))
    rows = [
        (
            Cell(words.spaced(kind)),
            num(f"{len(b)} → {len(a)}" if before and after else str(len(b) + len(a))),
            num(words.brief_ms(sum(b)) if b else words.DASH),
            num(words.brief_ms(sum(a)) if a else words.DASH),
        )
        for kind, (b, a) in order
    ]
    heads = ("Kind", "Operators", f"Before (ms, {basis})", f"After (ms, {basis})")
    return table(heads, rows, key="none" if before and after else f"not {basis}")
