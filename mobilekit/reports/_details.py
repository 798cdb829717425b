"""The second part of the report: operators, plan, files, samples, and the conditions they were found under."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from mobilekit import stats
from mobilekit.reports import _words as words
from mobilekit.reports._blocks import (
    Bar,
    Bars,
    Basis,
    Block,
    Bullets,
    Cell,
    Columns,
    Fold,
    Group,
    Section,
    Strip,
    Strips,
    Table,
    Text,
    num,
    table,
)
from mobilekit.reports._figures import MOST_DOTS
from mobilekit.types import OperatorBar, Report

MOST_BARS = 18
"""Bars of one picture; a longer list ends in sums of the rest by kind."""
SHOWN_OF_LONG = 14
LONG = 6
"""Rows of a table that is not folded away."""
APART = 1.3
"""A sum of operators this far from the latency is remarked on."""


def operators(report: Report) -> Section:
    """Where the milliseconds went, as measured and as predicted."""
    measured = (report.operators_before, report.operators_after)
    predicted = (report.predicted_before, report.predicted_after)
    apart = _apart(report)
    groups: tuple[Group, ...] = (
        ("by the runtime's profiler", "measured", (*apart, *_operator_blocks(*measured, "measured"))),
        ("by the device profile", "predicted", _operator_blocks(*predicted, "predicted")),
    )
    return Section("operators", "Where the milliseconds went", (Columns(groups),))


def _apart(report: Report) -> tuple[Text, ...]:
    """A line for each side whose operators do not add up to its latency: they were timed in another run."""
    sides = (
        ("original", report.operators_before, report.baseline.latency_ms),
        ("result", report.operators_after, report.result.latency_ms),
    )
    lines = []
    for name, bars, latency_ms in sides:
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
                Cell(_spaced(kind)),
                num(words.brief_ms(bar.before)),
                num(words.brief_ms(bar.after)),
            )
            for bar, kind in pairs
        ]
        heads = ("Operator", "Kind", f"Before (ms, {basis})", f"After (ms, {basis})")
        blocks.append(Fold(f"All {len(pairs)} operators, {basis}", table(heads, rows, key="no such operator")))
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
        _summed(f"{len(bars)} more ({_spaced(kind)})" if len(bars) > 1 else bars[0].label, bars) for kind, bars in named
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
            Cell(_spaced(kind)),
            num(f"{len(b)} → {len(a)}" if before and after else str(len(b) + len(a))),
            num(words.brief_ms(sum(b)) if b else words.DASH),
            num(words.brief_ms(sum(a)) if a else words.DASH),
        )
        for kind, (b, a) in order
    ]
    heads = ("Kind", "Operators", f"Before (ms, {basis})", f"After (ms, {basis})")
    return table(heads, rows, key="none" if before and after else f"not {basis}")


def plan(report: Report) -> Section:
    """What was done to the network, what was not, and why."""
    chosen = [
        (
            Cell(_spaced(row.transform)),
            Cell(row.where, "code"),
            Cell(row.reason),
            num(words.ms(row.saved_ms, words.DASH)),
            num(words.number(row.damage)),
        )
        for row in report.plan
    ]
    rejected = [(Cell(_spaced(r.transform)), Cell(r.where, "code"), Cell(r.reason)) for r in report.rejected]
    blocks: list[Block | Fold] = []
    if chosen:
        heads = ("Lever", "Where", "Why", "Saves, predicted", "Damage, measured")
        key = "no price, or damage not measured"
        blocks.append(table(heads, chosen, f"{words.plural(len(chosen), 'lever')} used", key))
        blocks.append(Text("Damage: how far this lever alone moves the network's output from the original's.", "quiet"))
        if report.together:
            blocks.append(Text(_sentence(str(report.together)), "quiet"))
    else:
        blocks.append(Text("The plan changes nothing.", "quiet"))
    summary = f"{words.plural(len(rejected), 'lever')} not used, with reasons"
    if rejected:
        short = len(rejected) <= LONG
        unused = table(("Lever", "Where", "Why not"), rejected, summary if short else "")
        blocks.append(unused if short else Fold(summary, unused))
    return Section("plan", "The plan", tuple(blocks))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def samples(report: Report) -> Section:
    """Every single run behind the latencies."""
    title = "Raw samples"
    usable = {name: [s for s in values if math.isfinite(s)] for name, values in report.samples.items()}
    usable = {name: values for name, values in usable.items() if values}
    if not usable:
        return Section("samples", title, (Text("Not measured: there are no samples.", "quiet"),))
    rows = [
        (
            Cell(name),
            num(f"{len(values):,}"),
            num(words.number(min(values))),
            num(words.number(stats.median(values))),
            num(words.number(stats.percentile(values, 90))),
            num(words.number(max(values))),
        )
        for name, values in usable.items()
    ]
    heads = ("Model", "Samples", "Min (ms)", "Median (ms)", "p90 (ms)", "Max (ms)")
    strips = tuple(Strip(name, tuple(values), stats.median(values)) for name, values in usable.items())
    kind = "CPU" if report.budget.clock == "cpu" else "wall"
    caption = f"{kind} time of every run, measured; from top to bottom in the order of the runs"
    if any(len(values) > MOST_DOTS for values in usable.values()):
        caption += f" (evenly thinned to at most {MOST_DOTS} dots)"
    return Section("samples", title, (Strips(caption, strips), table(heads, rows, "The same in numbers, measured")))


def conditions(report: Report) -> Section:
    """What the measurements were made on and how."""
    recorded = {_spaced(name): value or "not known" for name, value in report.conditions.items()}
    nothing = "No conditions were recorded: nothing was measured."
    groups = [_pairs("Protocol and state", ("Condition", "Value"), recorded, nothing)]
    info = report.device_info
    if info:
        facts = {
            "name": info.name,
            "kind": f"{info.kind} (measured on: {info.origin})",
            "processor": info.soc or "not known",
            "cores": str(info.cores),
            "memory": "not known" if info.memory_mb is None else f"{info.memory_mb:,} MB",
            "system": info.os or "not known",
        }
        groups.append(_pairs("Device", ("Device", "Value"), facts, ""))
    blocks: list[Block | Columns] = [Columns(tuple(groups))]
    if report.extrapolated:
        title = "Predicted outside the sampled range (extrapolated)"
        blocks.append(Bullets(title, _capped(report.extrapolated)))
    return Section("conditions", "Conditions of measurement", tuple(blocks))


def _pairs(title: str, heads: tuple[str, str], facts: dict[str, str], nothing: str) -> Group:
    rows = [(Cell(name), Cell(value)) for name, value in facts.items()]
    return (title, "", (table(heads, rows) if rows else Text(nothing, "quiet"),))


def _capped(items: Sequence[str], most: int = 60) -> tuple[str, ...]:
    rest = (f"{len(items) - most} more in report.json",) if len(items) > most else ()
    return (*items[:most], *rest)


def troubles(report: Report) -> Section:
    """What did not work, and what deserves doubt."""
    blocks: list[Block] = []
    if report.warnings:
        blocks.append(Bullets("Warnings", _capped(report.warnings)))
    if report.failures:
        rows = [
            (Cell(f.stage), Cell(f.subject, "code"), Cell(f.message), Cell(f.remedy or words.DASH))
            for f in report.failures
        ]
        heads = ("Stage", "Subject", "What happened", "What to do")
        blocks.append(table(heads, rows, "Failures", "no remedy known"))
    if not blocks:
        blocks.append(Text("No failures and no warnings.", "quiet"))
    return Section("troubles", "Warnings and failures", tuple(blocks))


def origin(report: Report) -> Section:
    """How long it took, with which versions and seed."""
    versions = dict(report.device_info.versions) if report.device_info else {}
    facts = {"mobilekit": report.mobilekit_version, **versions, "random seed": str(report.seed)}
    facts["report made"] = words.moment(report.created_at)
    groups = [_pairs("Versions and seed", ("Software", "Version"), facts, "")]
    if report.stages:
        rows = [
            (Cell(s.name), num(words.seconds(s.seconds)), Cell("resumed, time of the earlier run" if s.resumed else ""))
            for s in report.stages
        ]
        rows.append((Cell("all stages"), num(words.seconds(sum(s.seconds for s in report.stages))), Cell("")))
        groups.insert(0, ("Stages", "", (table(("Stage", "Time", "Note"), rows),)))
    return Section("stages", "Stages and versions", (Columns(tuple(groups)),))
