"""Measures a file in turn with the original, in session after session; and what its kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mobilekit import bench
from mobilekit.pipeline.run import Recorded, Run, bench_model
from mobilekit.types import BenchModel, Measurement

ROUND = bench.Repeats(least=3, most=6, within=0.02)
"""Of a plan before training."""
VERDICT = bench.Repeats(least=5, most=12, within=0.01)
"""Of the result, and of the best that is within reach where the budget is not."""

Sessions = tuple[tuple[Recorded, Recorded], ...]
"""(original, file) of each session."""


def paired(run: Run, stage: str, name: str, path: Path, repeats: bench.Repeats) -> tuple[Sessions, bench.Comparison]:
    """Original and file in turn, in as many sessions as it takes; every raw sample is kept.

    Raises MobilekitError when one of the two does not run.
    """
    models = [original_model(run), bench_model(name, path, run.job.runtime.name)]
    seconds = bench.SESSION * bench.COMPARE["max_seconds"]
    sessions: list[tuple[Recorded, Recorded]] = []

    def session() -> Sequence[Measurement]:
        before, after = run.measure(models, max_seconds=seconds)
        sessions.append((before, after))
        return before.measurement, after.measurement

    def told(fraction: float) -> None:
        run.stages.progress(stage, 0.2 + 0.6 * fraction)

    found = bench.repeat(session, repeats, run.job.request.budget, told)
    return tuple(sessions), found


def original_model(run: Run) -> BenchModel:
    """The original's file in the planned runtime."""
    runtime = run.job.runtime
    return bench_model("original", run.store.path("checkpoints", f"original{runtime.suffix}"), runtime.name)


def profiled(run: Run, name: str, path: Path) -> tuple[Recorded, Recorded]:
    """Original and file with the runtime's own times of their kernels. Raises MobilekitError when one does not run."""
    models = [original_model(run), bench_model(name, path, run.job.runtime.name)]
    before, after = run.measure(models, per_operator=True, runs=20, max_seconds=5.0)
    return before, after
