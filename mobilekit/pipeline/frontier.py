"""Plans along the front of latency and damage, from one measurement of the options."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mobilekit import bench
from mobilekit.pipeline.options import Offered, combination, with_damages
from mobilekit.pipeline.original import Baseline, Prices
from mobilekit.pipeline.paired import original_model
from mobilekit.pipeline.planning import search, write_plan
from mobilekit.pipeline.rounds import apply_options, precision_of
from mobilekit.pipeline.run import Run, bench_model
from mobilekit.planner.offers import Found
from mobilekit.types import FrontierRow, Plan, Together, Value

REACH = 1.02
"""The fastest plan of the front is this far from the fastest there is, at which everything is given up."""


class Timed(Value):
    """A plan's file beside the original's."""

    measured_ms: float
    ratio: float


def frontier(
    run: Run, prices: Prices, base: Baseline, known: Offered, count: int, *, dry: bool = False
) -> tuple[list[FrontierRow], list[Plan], Offered]:
    """At most `count` plans, fastest first, each written to plans/ and measured untrained where there is a device.

    Latency targets are evenly spaced on a logarithmic scale between the original and the fastest plan; targets that
    lead to the same choice give one plan.
    """
    known = with_damages(run, prices, base, known)
    found = _found(run, prices, known, count)
    rows, plans = [], []
    for number, one in enumerate(found, 1):
        searched = search(run, prices, known, one.latency_ms)
        together = combination(run, prices, f"front {number}", one)
        plan = write_plan(run, prices, known, searched, one).model_copy(update={"together": together})
        name = f"plans/plan-{number}.json"
        run.store.write_text(name, plan.model_dump_json(indent=2) + "\n")
        plans.append(plan)
        rows.append(_row(name, plan, together))
    if run.job.device is not None and not dry:
        timed = run.stages.run("front", list[Timed], lambda: _timed(run, prices, plans))
        rows = [
            row.model_copy(update={"measured_ms": t.measured_ms, "ratio": t.ratio})
            for row, t in zip(rows, timed, strict=True)
        ]
    return _judged(rows), plans, known


def _found(run: Run, prices: Prices, known: Offered, count: int) -> list[Found]:
    """Searches at each target, each choice once, fastest first."""
    whole = prices.latency_ms(prices.network)
    least = REACH * search(run, prices, known, 1e-6).fastest().latency_ms
    kept: list[Found] = []
    for step in range(count, 0, -1):
        most = whole * (min(least, whole) / whole) ** (step / count)
        one = search(run, prices, known, most).run()
        if one.reachable and not any(one.same_as(other) for other in kept):
            kept.append(one)
    return kept


def _row(name: str, plan: Plan, together: Together | None) -> FrontierRow:
    return FrontierRow(
        plan=name,
        target_ms=plan.target_ms,
        predicted_ms=plan.estimate.latency_ms,
        measured_ms=None,
        ratio=None,
        damage=None if together is None else together.damage,
        agreement=None if together is None else together.agreement,
        judged="" if together is None else together.when,
        options=len(plan.chosen),
        beaten=False,
    )


def _timed(run: Run, prices: Prices, plans: Sequence[Plan]) -> list[Timed]:
    """The untrained files of all plans and the original's, in turn: latency does not depend on the weights."""
    runtime, models = run.job.runtime, [original_model(run)]
    for number, plan in enumerate(plans, 1):
        candidate = apply_options(run, prices.network, [c.option for c in plan.chosen], bare=True)
        path = run.store.path("checkpoints", f"front-{number}{runtime.suffix}")
        run.export(candidate, runtime, precision_of(run, candidate), path, timed_only=True)
        models.append(bench_model(f"front {number}", path, runtime.name))
        run.stages.progress("front", 0.7 * number / len(plans))
    measured = [recorded.measurement for recorded in run.measure(models)]
    clock = run.job.request.budget.clock
    return [
        Timed(measured_ms=bench.median_ms(one, clock), ratio=bench.Comparison.of((measured[0], one), clock=clock).ratio)
        for one in measured[1:]
    ]


def _judged(rows: Sequence[FrontierRow]) -> list[FrontierRow]:
    """Each row with whether another beats it."""

    def point(row: FrontierRow) -> tuple[float, float]:
        latency = row.predicted_ms if row.measured_ms is None else row.measured_ms
        return latency, math.inf if row.damage is None else row.damage

    found = []
    for row in rows:
        time, damage = point(row)
        others = [point(other) for other in rows if other is not row]
        beaten = any(t <= time and d <= damage and (t, d) != (time, damage) for t, d in others)
        found.append(row.model_copy(update={"beaten": beaten}))
    return found
