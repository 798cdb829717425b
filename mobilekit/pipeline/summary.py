"""Gathers what a run found into the Report, and writes its three forms."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from mobilekit import __version__, bench, documents, registry
from mobilekit.errors import BadInputError
from mobilekit.pipeline.acceptance import RoundResult
from mobilekit.pipeline.elsewhere import FurtherRuns
from mobilekit.pipeline.original import Baseline
from mobilekit.pipeline.precisions import precision_rows
from mobilekit.pipeline.rounds import planned
from mobilekit.pipeline.run import Recorded, Run, written
from mobilekit.pipeline.shipping import FinalRuns, Shipped, result_of
from mobilekit.pipeline.verdict import Outcome, judged
from mobilekit.store import Store
from mobilekit.types import (
    Budget,
    Candidate,
    DeviceRow,
    Estimate,
    ExportedModel,
    Finding,
    FrontierRow,
    Interval,
    Measurement,
    ModelFigures,
    ModelRow,
    Network,
    OperatorBar,
    Plan,
    PlanRow,
    Report,
    Round,
)

MEGABYTE = 1_000_000
Verdict = Literal["met", "missed", "unreachable"]


@dataclass
class Findings:
    """What is known so far; later stages fill in the rest."""

    network: Network
    base: Baseline
    plan: Plan
    candidate: Candidate | None = None
    """None: nothing was changed or written, the result is a plan only."""
    rounds: Sequence[RoundResult] = ()
    unreachable_ms: float | None = None
    unreachable: bool = False
    dry_run: bool = False
    shipped: Sequence[Shipped] = ()
    final: FinalRuns = field(default_factory=FinalRuns)
    elsewhere: Sequence[FurtherRuns] = ()
    warnings: list[str] = field(default_factory=list)
    frontier: Sequence[FrontierRow] = ()


def write_reports(run: Run, found: Findings) -> Report:
    """report.json, report.md and report.html."""
    report = _report(run, found)
    render(run.store, report)
    return report


def read_report(folder: Path) -> Report:
    """A folder's report.json. Raises BadInputError in one sentence where there is none that this version reads."""
    path = folder / "report.json"
    if not path.exists():
        raise BadInputError(f"'{folder}' holds no report.json: give the folder of a plan")
    return documents.read(path, Report, f"the report '{path}'")


def render(store: Store, report: Report) -> None:
    """Write the report in every form there is a writer for."""
    for name in registry.names("reports"):
        writer = registry.report_writer(name)
        store.write_text(writer.file_name, writer.render(report))


def _report(run: Run, found: Findings) -> Report:
    job, budget = run.job, run.job.request.budget
    models = [s.model for s in found.shipped]
    main = result_of(run, models)
    comparison = _comparison(budget, found.final)
    pair = [comparison.baseline, comparison.candidate] if comparison else []
    result = _result(run, found, main, comparison)
    findings = judged(budget, _outcome(found, comparison, result))
    estimate, stuck = found.plan.estimate, _stuck(found)
    return Report(
        mobilekit_version=__version__,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        workload=job.request.workload,
        data=job.workload.data,
        profile=job.request.profile,
        device=job.request.device,
        device_info=run.info,
        seed=job.request.seed,
        budget=budget,
        verdict=_verdict(found, findings),
        findings=findings,
        best_reachable_ms=stuck.reachable_ms if stuck else found.unreachable_ms,
        best_reachable_ratio=stuck.reachable_ratio if stuck else None,
        best_reachable_basis=None if found.unreachable_ms is None else ("predicted" if found.dry_run else "measured"),
        dry_run=found.dry_run,
        baseline=_baseline(run, found, comparison),
        result=result,
        accuracy_kind=job.workload.accuracy_kind,
        ratio=comparison.ratio if comparison else None,
        ratio_interval=comparison.interval if comparison else None,
        sessions=len(comparison.rounds) if comparison else None,
        predicted_latency_ms=_interval(estimate),
        predicted_baseline_ms=_interval(found.plan.baseline_estimate),
        extrapolated=estimate.extrapolated,
        rounds=tuple(_round(budget, r) for r in found.rounds),
        frontier=tuple(found.frontier),
        plan=tuple(
            PlanRow(
                transform=c.option.transform,
                where=c.option.where,
                reason=c.reason,
                saved_ms=c.saved_ms,
                damage=c.damage,
            )
            for c in found.plan.chosen
        ),
        together=found.plan.together,
        rejected=found.plan.rejected,
        models=tuple(_model_row(run, found, s, main) for s in found.shipped),
        operators_before=_measured_bars(found.final.profiled[:1]),
        operators_after=_measured_bars(found.final.profiled[1:]),
        predicted_before=_predicted_bars(found.plan.baseline_estimate),
        predicted_after=_predicted_bars(estimate),
        samples={m.model: bench.samples_ms(m, budget.clock) for m in pair},
        conditions=_conditions(comparison),
        precisions=precision_rows(found.candidate, main) if found.candidate and main else (),
        devices=tuple(_device_row(budget, further) for further in found.elsewhere),
        stages=tuple(run.stages.rows),
        failures=tuple(run.stages.failures),
        measured_warnings=tuple(warning for m in pair for warning in bench.warnings_about(m)),
        warnings=(*found.plan.warnings, *found.warnings),
    )


def _verdict(found: Findings, findings: Sequence[Finding]) -> Verdict | None:
    if found.unreachable:
        return "unreachable"
    if not findings or not found.final.sessions:
        return None
    return "met" if all(row.met for row in findings) else "missed"


def _outcome(found: Findings, comparison: bench.Comparison | None, result: ModelFigures) -> Outcome:
    drop = None if result.accuracy is None else 100 * (found.base.accuracy - result.accuracy)
    size = result.size_bytes / MEGABYTE if result.size_bytes is not None else None
    return Outcome(comparison, size_mb=size, peak_memory_mb=found.final.peak_memory_mb, drop=drop)


def _comparison(budget: Budget, final: FinalRuns) -> bench.Comparison | None:
    """The last measurement: original and result over all sessions."""
    if not final.sessions:
        return None
    pairs = [(before.measurement, after.measurement) for before, after in final.sessions]
    return bench.Comparison.of(*pairs, clock=budget.clock)


def _stuck(found: Findings) -> RoundResult | None:
    """The round that found the best that is within reach, where that was measured and is not enough."""
    return found.rounds[-1] if found.unreachable and not found.dry_run and found.rounds else None


def _interval(estimate: Estimate) -> Interval:
    return Interval(low=estimate.low_ms, value=estimate.latency_ms, high=estimate.high_ms, basis=estimate.basis)


def _baseline(run: Run, found: Findings, comparison: bench.Comparison | None) -> ModelFigures:
    base = found.base
    # beside what it is compared with: the result, or the round that measured this plan
    latency = next((r.baseline_ms for r in reversed(found.rounds) if r.plan == found.plan), None)
    if comparison is not None:
        latency = bench.median_ms(comparison.baseline, comparison.clock)
    return ModelFigures(
        latency_ms=latency,
        latency_interval_ms=comparison.latency_interval_ms(comparison.baseline) if comparison else None,
        accuracy=base.accuracy,
        size_bytes=base.size_bytes,
        macs=found.network.macs,
        params=base.params,
        runtime=run.job.runtime.name,
        precision=written(run.float_precision, run.job.runtime),
        path=f"checkpoints/original{run.job.runtime.suffix}",
    )


def _result(run: Run, found: Findings, main: ExportedModel | None, comparison: bench.Comparison | None) -> ModelFigures:
    """The planned network: its size in numbers is known without weights, the rest only once it was built."""
    measured = next((s.accuracy for s in found.shipped if s.model is main), None)
    return ModelFigures(
        latency_ms=bench.median_ms(comparison.candidate, comparison.clock) if comparison else None,
        latency_interval_ms=comparison.latency_interval_ms(comparison.candidate) if comparison else None,
        accuracy=measured,
        size_bytes=main.size_bytes if main else None,
        macs=planned(found.network, found.plan).macs,
        params=sum(p.numel() for p in found.candidate.module.parameters()) if found.candidate else None,
        runtime=run.job.runtime.name,
        precision=main.precision if main else None,
        path=main.path if main else None,
    )


def _model_row(run: Run, found: Findings, shipped: Shipped, main: ExportedModel | None) -> ModelRow:
    model = shipped.model
    own: list[Recorded] = []
    for final in (found.final, *(further.final for further in found.elsewhere)):
        own += [after for _, after in final.sessions if after.measurement.sha256 == model.sha256]
        if model.path in final.others:
            own.append(final.others[model.path])
    clock = run.job.request.budget.clock
    return ModelRow(
        path=model.path,
        runtime=model.runtime,
        precision=model.precision,
        size_bytes=model.size_bytes,
        sha256=model.sha256,
        parity=model.parity,
        operators=model.facts.operators,
        accuracy=shipped.accuracy,
        measurements=tuple(bench.row(r.measurement, clock, r.line) for r in (*own, *_shared(run.store, model))),
    )


def _shared(store: Store, model: ExportedModel) -> Iterator[Recorded]:
    """What apps have shared of this file: a resumed run keeps it."""
    for line, document in enumerate(store.lines("measurements.jsonl"), 1):
        measurement = Measurement.model_validate_json(json.dumps(document))
        if measurement.app is not None and measurement.sha256 == model.sha256:
            yield Recorded(measurement=measurement, line=line)


def _round(budget: Budget, result: RoundResult) -> Round:
    """The prediction and the target at this round's speed of the machine: relative to its original."""
    speed = result.baseline_ms / result.unit_ms
    target_ms = budget.latency_ms
    if target_ms is None and not math.isinf(result.limit_ms):
        target_ms = result.limit_ms * speed
    return Round(
        predicted_ms=result.predicted_ms * speed,
        measured_ms=result.measured_ms,
        baseline_ms=result.baseline_ms,
        target_ms=target_ms,
        options=len(result.plan.chosen),
        predicted_ratio=result.predicted_ratio,
        ratio=result.ratio,
        ratio_interval=result.ratio_interval,
        sessions=len(result.session_ratios),
        accept=result.accept,
        accepted=None if target_ms is None else result.fits,
        kinds=result.kinds,
    )


def _measured_bars(profiled: Sequence[Recorded]) -> tuple[OperatorBar, ...]:
    return tuple(
        OperatorBar(name=o.name, kind=o.kind, ms=o.median_us / 1000)
        for recorded in profiled
        for o in recorded.measurement.operators
    )


def _predicted_bars(estimate: Estimate) -> tuple[OperatorBar, ...]:
    return tuple(OperatorBar(name=o.name, kind=o.kind, ms=o.latency_ms) for o in estimate.operators)


def _device_row(budget: Budget, further: FurtherRuns) -> DeviceRow:
    comparison = _comparison(budget, further.final)
    pair = [comparison.baseline, comparison.candidate] if comparison else []
    return DeviceRow(
        device=further.device,
        info=further.info,
        baseline_ms=bench.median_ms(comparison.baseline, comparison.clock) if comparison else None,
        result_ms=bench.median_ms(comparison.candidate, comparison.clock) if comparison else None,
        ratio=comparison.ratio if comparison else None,
        ratio_interval=comparison.interval if comparison else None,
        sessions=len(comparison.rounds) if comparison else None,
        operators_before=_measured_bars(further.final.profiled[:1]),
        operators_after=_measured_bars(further.final.profiled[1:]),
        samples={m.model: bench.samples_ms(m, budget.clock) for m in pair},
        conditions=_conditions(comparison),
    )


def _conditions(comparison: bench.Comparison | None) -> dict[str, str]:
    """How the last measurement was made, in words."""
    if comparison is None:
        return {"measurement": "none: nothing was run on a device"}
    first, last = comparison.baseline, comparison.candidate
    temperatures = [first.temperature_before_c, last.temperature_after_c]
    return {
        "protocol": "original, result and reference matrix product in turn, one after another in every round; "
        "every session in a process of its own",
        "clock": f"{comparison.clock} time; wall time is kept beside it in measurements.jsonl",
        "threads": f"{first.threads}, "
        + (f"pinned to CPU {' or '.join(map(str, first.cpus))}" if first.cpus else "not pinned"),
        "rounds": f"{len(first.samples_ms)} in {len(comparison.rounds)} sessions",
        "compute unit": first.compute_unit,
        "started": first.started_at,
        "runtime versions": ", ".join(f"{name} {version}" for name, version in sorted(first.versions.items())),
        "temperature": "not readable here"
        if None in temperatures
        else f"{temperatures[0]:.0f} °C before, {temperatures[1]:.0f} °C after",
    }
