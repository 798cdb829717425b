"""The fastest plan within an accuracy drop: plans along the front are tried with a short training, by bisection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mobilekit.errors import MobilekitError, StorageError
from mobilekit.pipeline.frontier import frontier
from mobilekit.pipeline.options import Offered
from mobilekit.pipeline.original import Baseline, Prices
from mobilekit.pipeline.planning import search, write_plan
from mobilekit.pipeline.run import Run
from mobilekit.planner.offers import Found
from mobilekit.types import Plan, Report

PLANS = 8
SHARE = 0.25
"""Of the training time for each trial: the plan that is taken then gets the whole time, and loses no more."""

Trial = Callable[[Plan, float, Path], Report]


def fastest_within(run: Run, prices: Prices, base: Baseline, known: Offered, trial: Trial) -> tuple[Plan, list[str]]:
    """The fastest plan of the front whose trial keeps the budget's drop, and a line about every trial.

    The files of trials are judged as results are, by what the workload's `evaluate` says of them; that figure is then
    no longer independent of the choice. Where no plan keeps the drop, nothing is changed. A damage falls from plan to
    plan along the front, so that three trials decide between eight.
    """
    budget = run.job.request.budget
    rows, plans, known = frontier(run, prices, base, known, PLANS)
    left = [(row, plan) for row, plan in zip(rows, plans, strict=True) if not row.beaten and row.damage is not None]
    said: list[str] = []
    low, high = 0, len(left)
    while low < high:
        middle = (low + high) // 2
        row, plan = left[middle]
        folder = run.store.path("trials", Path(row.plan).stem)
        try:
            report = trial(plan, SHARE * run.job.request.train_seconds, folder)
        except StorageError:
            raise
        except MobilekitError as error:
            run.fail("trial", row.plan, error, "the slower plans of the front are tried")
            low = middle + 1
            continue
        drop = next((finding.found for finding in report.findings if finding.item == "max_drop"), None)
        kept = drop is not None and drop <= (budget.max_drop or 0.0)
        figure = "was not judged" if drop is None else f"lost {drop:.2f} points"
        latency = "not measured" if report.result.latency_ms is None else f"{report.result.latency_ms:.3f} ms"
        said.append(f"trial of {row.plan} with a quarter of the training: {latency}, {figure}")
        low, high = (low, middle) if kept else (middle + 1, high)
    if high < len(left):
        return left[high][1], said
    searched = search(run, prices, known, float("inf"))
    start = searched.starts[0]
    nothing = Found(start, {}, searched.latency_ms(start, {}), reachable=True)
    said.append(f"no plan of the front keeps the drop within {budget.max_drop} points: nothing is changed")
    return write_plan(run, prices, known, searched, nothing), said
