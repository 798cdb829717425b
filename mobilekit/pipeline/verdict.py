"""Judges a result: each line of the budget against what was measured, with its uncertainty."""

from __future__ import annotations

from typing import NamedTuple

from mobilekit import bench
from mobilekit.types import Budget, Finding


class Outcome(NamedTuple):
    """What was measured of a result; None: it was not."""

    comparison: bench.Comparison | None
    """With the original."""
    size_mb: float | None = None
    peak_memory_mb: float | None = None
    drop: float | None = None
    """Of the accuracy, in points."""


def judged(budget: Budget, found: Outcome) -> tuple[Finding, ...]:
    """Each line of the budget. A latency is in it only with the end of its interval that is farther from it."""
    rows = []
    if budget.latency_ms is not None:
        rows.append(_latency(budget.latency_ms, budget, found.comparison))
    if budget.speedup is not None:
        rows.append(_speedup(budget.speedup, budget, found.comparison))
    if budget.size_mb is not None:
        rows.append(_most("size_mb", budget.size_mb, found.size_mb))
    if budget.peak_memory_mb is not None:
        rows.append(_most("peak_memory_mb", budget.peak_memory_mb, found.peak_memory_mb))
    if budget.max_drop is not None:
        rows.append(_most("max_drop", budget.max_drop, found.drop))
    return tuple(rows)


def _most(item: str, limit: float, value: float | None) -> Finding:
    met = value is not None and value <= limit
    return Finding(item=item, limit=limit, found=value, met=met, note="" if value is not None else "not measured")


def _latency(limit: float, budget: Budget, comparison: bench.Comparison | None) -> Finding:
    """The median, judged by the upper end of its interval."""
    if comparison is None:
        return _most("latency_ms", limit, None)
    low, high = comparison.latency_interval_ms(comparison.candidate)
    return Finding(
        item="latency_ms",
        limit=limit,
        found=bench.median_ms(comparison.candidate, budget.clock),
        met=comparison.meets(budget),
        interval=(low, high),
        judged=high,
        note=f"{_over(comparison, low, high, ' ms')}, of which the upper end is judged",
    )


def _speedup(limit: float, budget: Budget, comparison: bench.Comparison | None) -> Finding:
    """The paired ratio, judged by the lower end of its interval, and by the ratio of the medians where that is less."""
    if comparison is None:
        return Finding(item="speedup", limit=limit, found=None, met=False, note="not measured")
    (low, high), medians = comparison.interval, comparison.ratio_of_medians
    note = f"paired ratio {comparison.ratio:.2f}, {_over(comparison, low, high)}, of which the lower end is judged"
    return Finding(
        item="speedup",
        limit=limit,
        found=comparison.ratio,
        met=comparison.meets(budget),
        interval=(low, high),
        judged=min(low, medians),
        note=note if low <= medians else f"{note}; the ratio of the medians, {medians:.2f}, is less",
    )


def _over(comparison: bench.Comparison, low: float, high: float, unit: str = "") -> str:
    return f"90 % interval {low:.4g} to {high:.4g}{unit} over {len(comparison.rounds)} sessions"
