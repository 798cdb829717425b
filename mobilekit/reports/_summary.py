"""The first part of the report: the verdict, and before and after."""

from __future__ import annotations

from dataclasses import replace

from mobilekit.reports import _words as words
from mobilekit.reports._blocks import (
    Bar,
    Bars,
    Cell,
    Section,
    Text,
    Tile,
    Verdict,
    num,
    table,
)
from mobilekit.types import Finding, ModelFigures, Report

_WORD = {"met": "Met", "missed": "Missed", "unreachable": "Unreachable", "open": "Not judged"}


def verdict(report: Report) -> Verdict:
    """The verdict in one headline, a few sentences and the headline figures."""
    state = report.verdict or "open"
    asked = words.asked(report.budget)
    want = f"Asked: {words.listed(asked)}." if asked else "No budget was given, so there is nothing to meet."
    sentences = [want, _measured(report), predicted(report), _accuracy(report)]
    if report.verdict == "unreachable":
        sentences.insert(1, _best(report))
    if report.verdict is None and asked and report.result.latency_ms is None:
        sentences[0] += " Not judged, because nothing was measured."
    return Verdict(state, _WORD[state], _headline(report), tuple(s for s in sentences if s), _tiles(report))


def _headline(report: Report) -> str:
    before, after = report.baseline.latency_ms, report.result.latency_ms
    if report.verdict == "unreachable":
        if report.best_reachable_ms is None:
            return "no plan reaches the budget"
        return f"{words.ms(report.best_reachable_ms)} ({report.best_reachable_basis}) is the best within reach"
    if after is None:
        value = words.ms(report.predicted_latency_ms.value, "no latency")
        return f"{'dry run: ' if report.dry_run else ''}{value} predicted, nothing measured"
    span = f"{words.ms(before)} to {words.ms(after)}" if before is not None else words.ms(after)
    faster = "" if report.ratio is None else f"{words.faster(report.ratio)}, "
    return f"{faster}{span} measured" + ("" if words.asked(report.budget) else ", no budget given")


def _measured(report: Report) -> str:
    before, after = report.baseline.latency_ms, report.result.latency_ms
    if after is None:
        return "The result's latency was not measured."
    where = f" on {report.device}" if report.device else ""
    text = f"Measured{where}: {words.ms(after)} ({words.clock(report.budget)})"
    if before is not None:
        text += f" against {words.ms(before)} for the original"
    if report.ratio is None:
        return text + "."
    text += f", that is {words.faster(report.ratio)}"
    if report.ratio_interval is None:
        return text + "."
    sessions = f", over {words.plural(report.sessions, 'session')}" if report.sessions else ""
    return f"{text} (90 % interval of the ratio: {span(report.ratio_interval)}{sessions})."


def span(interval: tuple[float, float]) -> str:
    """The ends of an interval."""
    return f"{words.number(interval[0])} to {words.number(interval[1])}"


def predicted(report: Report) -> str:
    """The prediction in a sentence."""
    p, before = report.predicted_latency_ms, report.predicted_baseline_ms
    return (
        f"Predicted: {words.ms(p.value)} ({words.number(p.low)} to {words.number(p.high)}, "
        f"nominal 80 % interval, basis: {p.basis}) against {words.ms(before.value)} for the original."
    )


def _accuracy(report: Report) -> str:
    before, after = report.baseline.accuracy, report.result.accuracy
    kind = report.accuracy_kind or "kind not stated"
    text = f"Accuracy ({kind}): {words.score(before)} before, {words.score(after)} after"
    delta = words.score_change(before, after, missing="")
    return text + (f" ({delta})" if delta else "") + f". Data: {(report.data or 'not stated').rstrip('.')}."


def _best(report: Report) -> str:
    if report.best_reachable_ms is None:
        return "No plan reaches the budget; the best reachable latency is not known."
    best = f"{words.ms(report.best_reachable_ms)} ({report.best_reachable_basis})"
    text = f"No plan reaches the budget: the best reachable latency is {best}"
    if report.best_reachable_ratio is None:
        return text + "."
    return text + (
        f", that is {words.faster(report.best_reachable_ratio)} than the original, by the ends of the 90 % intervals "
        "that are closer to it."
    )


def _tiles(report: Report) -> tuple[Tile, ...]:
    before, after = report.baseline, report.result
    spread = f"90 % interval {span(report.ratio_interval)}" if report.ratio_interval else "no interval"
    speed = Tile("Speed-up", words.times(report.ratio), spread) if report.ratio is not None else _absent("Speed-up")
    accuracy, size = _absent("Accuracy"), _absent("File size", "not written")
    if after.accuracy is not None:
        scores = [words.score(before.accuracy, words.DASH), words.score(after.accuracy)]
        if all(score.endswith(" %") for score in scores):
            scores[0] = scores[0].removesuffix(" %")
        accuracy = Tile("Accuracy", " → ".join(scores), report.accuracy_kind)
    if after.size_bytes is not None:
        sizes = f"{words.size(before.size_bytes, words.DASH)} → {words.size(after.size_bytes)}"
        smaller = words.change(before.size_bytes, after.size_bytes)
        size = Tile("File size", sizes, "" if smaller == words.DASH else smaller)
    return (_latency_tile(report), speed, accuracy, size)


def _latency_tile(report: Report) -> Tile:
    after, p = report.result.latency_ms, report.predicted_latency_ms
    if after is None:
        note = f"{words.number(p.low)} to {words.number(p.high)} ms, {p.basis}"
        return Tile("Latency", words.ms(p.value), note, "predicted")
    value = f"{words.number(report.baseline.latency_ms)} → {words.ms(after)}"
    return Tile("Latency", value, words.clock(report.budget))


def _absent(label: str, why: str = "not measured") -> Tile:
    return Tile(label, why, "", "")


def findings(report: Report) -> Section:
    """A line for every item of the budget."""
    title = "Budget, line by line"
    if not report.findings:
        reason = "No budget line was judged." if words.asked(report.budget) else "No budget was given."
        return Section("budget", title, (Text(reason, "quiet"),))
    heads = ("Item", "Limit", "Found", "90 % interval", "Judgement", "Note")
    told = table(heads, [_finding(f) for f in report.findings], key="one figure")
    return Section("budget", title, (replace(told, listed=True),))


def _finding(finding: Finding) -> tuple[Cell, ...]:
    unit = words.unit_of(finding.item)
    found, judgement = "not measured", Cell("not measured", "warn")
    if finding.found is not None:
        found = words.amount(words.number(finding.found), unit)
        judgement = Cell("met", "good") if finding.met else Cell("not met", "bad")
    limit = words.amount(words.plain(finding.limit), unit)
    ends = num(words.amount(span(finding.interval), unit) if finding.interval else words.DASH)
    return (Cell(_item(finding.item)), num(limit), num(found), ends, judgement, Cell(finding.note))


def _item(name: str) -> str:
    for suffix, unit in (("_ms", " (ms)"), ("_mb", " (MB)")):
        name = name.removesuffix(suffix) + unit if name.endswith(suffix) else name
    return name.replace("_", " ")


def before_after(report: Report) -> Section:
    """What the network was and what it is."""
    b, a = report.baseline, report.result
    rows = [
        (
            Cell(f"Latency, {words.clock(report.budget)}"),
            num(words.ms(b.latency_ms)),
            num(words.ms(a.latency_ms)),
            num(words.change(b.latency_ms, a.latency_ms)),
        ),
        *_latency_intervals(report),
        (
            Cell(f"Accuracy, {report.accuracy_kind}" if report.accuracy_kind else "Accuracy"),
            num(words.score(b.accuracy)),
            num(words.score(a.accuracy)),
            num(words.score_change(b.accuracy, a.accuracy)),
        ),
        (
            Cell("File size"),
            num(words.size(b.size_bytes)),
            num(words.size(a.size_bytes)),
            num(words.change(b.size_bytes, a.size_bytes)),
        ),
        _counted("MACs", b.macs, a.macs),
        _counted("Parameters", b.params, a.params),
    ]
    heads = ("Quantity", "Before", "After", "Change")
    files = f"MACs: multiply-accumulates of one inference. {_described(b, 'Before')}. {_described(a, 'After')}."
    figures = table(
        heads, rows, "The original before and the result after, measured and counted", key="cannot be computed"
    )
    return Section("before-after", "Before and after", (figures, Text(files, "quiet"), *_shares(report)))


def _latency_intervals(report: Report) -> list[tuple[Cell, ...]]:
    """A row for the uncertainty of the latencies, where it is known."""
    intervals = [report.baseline.latency_interval_ms, report.result.latency_interval_ms]
    if not any(intervals):
        return []
    cells = [num(f"{span(found)} ms" if found else "not measured") for found in intervals]
    return [(Cell("90 % interval of that median"), *cells, num(words.DASH))]


def _counted(label: str, before: int | None, after: int | None) -> tuple[Cell, ...]:
    cells = (num("not counted") if n is None else num(words.count_of(n), f"{n:,}") for n in (before, after))
    return (Cell(label), *cells, num(words.change(before, after)))


def _described(figures: ModelFigures, name: str) -> str:
    facts = [fact for fact in (figures.runtime, figures.precision) if fact]
    path = figures.path or "no file"
    return f"{name}: {path}" + (f" ({', '.join(facts)})" if facts else "")


def _shares(report: Report) -> list[Bars]:
    b, a = report.baseline, report.result
    pairs: tuple[tuple[str, float | None, float | None], ...] = (
        ("Latency, measured", b.latency_ms, a.latency_ms),
        ("File size", b.size_bytes, a.size_bytes),
        ("MACs", b.macs, a.macs),
        ("Parameters", b.params, a.params),
    )
    bars = tuple(Bar(name, 100.0, 100 * y / x) for name, x, y in pairs if x and y is not None)
    caption = "What is left of the original, in percent (measured and counted)"
    return [Bars(caption, "measured", bars, "%", head="Quantity")] if bars else []
