"""The whole story on one screen."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mobilekit.evaluate import use_quicker_threads
from mobilekit.pipeline import (
    dual,
    elsewhere,
    frontier,
    options,
    original,
    planning,
    recovery,
    rounds,
    shipping,
    summary,
)
from mobilekit.pipeline.listener import Listener
from mobilekit.pipeline.options import Offered
from mobilekit.pipeline.original import Baseline, Prices
from mobilekit.pipeline.request import Job
from mobilekit.pipeline.run import Run
from mobilekit.pipeline.stages import Stages
from mobilekit.pipeline.teaching import together
from mobilekit.store import Store
from mobilekit.types import FrontierRow, Plan, Report


@dataclass(frozen=True)
class Course:
    """Where a run starts and how far it goes."""

    dry: bool = False
    """Stop at the plan: nothing is measured or changed."""
    given: Plan | None = None
    """Start from this plan and not from a search of its own."""
    correct: bool = True
    """Plan again while the measured latency does not fit; False replays the given plan as it is."""


def tell(job: Job, out: Path, listener: Listener, course: Course, *, resume: bool = False) -> Report:
    """Carry a job through: plan, measure untrained, correct, train, export, verify, measure, report.

    Returns the report, which lies in `out` in three forms beside plan.json, models/ and the raw samples. Of several
    processes that `accelerate launch` started, only the first returns (`teaching.together`).
    """
    with together(job):
        return _tell(job, out, listener, course, resume=resume)


def _tell(job: Job, out: Path, listener: Listener, course: Course, *, resume: bool) -> Report:
    store = Store(out)
    key = hashlib.sha256(f"{job.key}{course}".encode()).hexdigest()
    if not store.prepare(key, resume=resume) and resume:
        listener.say("nothing of the same request is there to go on from: started anew")
    run = Run(job, store, Stages(store, key, listener.progress))
    torch.manual_seed(job.request.seed)
    use_quicker_threads(job.workload.module, job.workload.calibration[0])

    run = replace(run, info=original.met(run, dry=course.dry))
    run = original.priced(run)
    network = original.traced(run)
    base = original.original(run, network, dry=course.dry)
    run = original.judged_by(run, base)
    prices = original.anchored(run, network, base)
    known = options.offered(run, prices, base, None)

    on_device = job.device is not None and not course.dry
    front: list[FrontierRow] = []
    if job.request.pareto is not None and course.given is None:
        front, _, known = frontier.frontier(run, prices, base, known, job.request.pareto, dry=course.dry)
    if on_device and course.given is None:
        stuck, prices = rounds.reachable_or_not(run, base, prices, known)
        if stuck is not None and not stuck.possible:
            found = summary.Findings(network, base, stuck.plan, rounds=[stuck], frontier=front)
            return _unreachable(run, found, stuck.measured_ms)

    plan, known, warnings = _planned(run, (prices, base, known), listener, course)
    store.write_text("plan.json", plan.model_dump_json(indent=2) + "\n")
    listener.say(str(plan))
    found = summary.Findings(network, base, plan, warnings=warnings, frontier=front)
    if front and job.request.budget.limits_nothing:
        return summary.write_reports(run, found)
    if course.dry:
        found.dry_run = True
        found.unreachable = not planning.reachable(plan)
        found.unreachable_ms = plan.estimate.latency_ms if found.unreachable else None
        return summary.write_reports(run, found)

    if on_device:
        settled = rounds.settle(run, plan, base, prices, known, replan=course.correct)
        if settled.plan != plan:
            listener.say("corrected by what was measured:\n" + str(settled.plan))
        found.plan, found.rounds = settled.plan, settled.rounds
        if settled.unreachable_ms is not None and course.correct:
            return _unreachable(run, found, settled.unreachable_ms)
        store.write_text("plan.json", found.plan.model_dump_json(indent=2) + "\n")

    use_quicker_threads(job.workload.module, job.workload.calibration[0])
    start = rounds.apply_options(run, network, [c.option for c in found.plan.chosen])
    found.candidate, recovered = recovery.recover(run, start, listener.remaining)
    found.warnings += recovered.warnings
    for what, said in recovered.conditions.items():
        listener.say(f"{what}: {said}")
    found.shipped = shipping.export_all(run, found.candidate)
    found.final = shipping.measure_all(run, list(found.shipped))
    found.elsewhere = elsewhere.measure_elsewhere(run, list(found.shipped))
    return summary.write_reports(run, found)


def _planned(
    run: Run, given: tuple[Prices, Baseline, Offered], listener: Listener, course: Course
) -> tuple[Plan, Offered, list[str]]:
    """The plan to carry out, the options with what was learnt on the way, and what has to be said about it."""
    prices, base, known = given
    if course.given is not None:
        return planning.repriced(run, prices, course.given), known, []
    if run.job.request.budget.is_dual and not course.dry:
        plan, said = dual.fastest_within(run, prices, base, known, lambda *trial: _trial(run.job, listener, *trial))
        return plan, known, said
    known = options.offered(run, prices, base, known.damages)
    plan, known = planning.make_plan(run, prices, known, base)
    return plan, known, []


def _trial(job: Job, listener: Listener, made: Plan, seconds: float, out: Path) -> Report:
    """Carry a plan out with a training of so many seconds, in a folder of its own."""
    request = replace(job.request, train_seconds=seconds, pareto=None)
    return _tell(replace(job, request=request), out, listener, Course(given=made, correct=False), resume=True)


def _unreachable(run: Run, found: summary.Findings, best_ms: float) -> Report:
    """Say so before any training, with the best latency that was measured."""
    run.store.write_text("plan.json", found.plan.model_dump_json(indent=2) + "\n")
    found.unreachable, found.unreachable_ms = True, best_ms
    return summary.write_reports(run, found)
