"""Measures a plan before anything is trained, corrects the prices by what was found, and plans again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mobilekit import bench, registry
from mobilekit.cost.correct import brought_to, corrected_kinds
from mobilekit.cost.kernels import Profiled, kind_factors, profiling_us, times_us
from mobilekit.cost.price import priced_lines
from mobilekit.errors import MobilekitError, StorageError
from mobilekit.pipeline.acceptance import RoundResult, accept, original_now_ms
from mobilekit.pipeline.options import Offered, offered
from mobilekit.pipeline.original import Baseline, Prices, on_grid, original_limit
from mobilekit.pipeline.paired import ROUND, VERDICT, paired, profiled
from mobilekit.pipeline.planning import make_plan, search, target, write_plan
from mobilekit.pipeline.run import Run
from mobilekit.types import Candidate, KindFactor, Network, Option, Plan, Precision

MOST_ROUNDS = 3
TOO_FAST = 0.88
"""A round this far inside the limit gave accuracy away: the plan is made again with the corrected prices."""
HOPELESS = 1.5
"""Predicted latency over the least one from which a precision is not measured as the fastest: the prices of all
precisions are anchored on the original."""


@dataclass(frozen=True)
class Settled:
    """What the rounds ended with."""

    plan: Plan
    prices: Prices
    rounds: tuple[RoundResult, ...]
    unreachable_ms: float | None = None
    """Set when no plan fits: what the fastest one was measured at, the upper end of its interval."""


def apply_options(run: Run, network: Network, options: Iterable[Option], *, bare: bool = False) -> Candidate:
    """The original after these options, in their order.

    New weights are fitted on the calibration inputs, if these are the user's own; `bare`: with as little work on
    weights as possible, for a file that is only timed.
    """
    candidate = run.start(network)
    for option in options:
        lever, ready = registry.transform(option.transform), option
        if bare:
            ready = lever.bare(option)
        elif candidate.calibration is not None:
            ready = lever.fitted(candidate.network, option)
        candidate = lever.apply(candidate, ready)
    return candidate


def precision_of(run: Run, candidate: Candidate) -> Precision:
    """The precision that the candidate is deployed in."""
    return "int8" if candidate.quant is not None else run.float_precision


# ---------------------------------------------------------------- rounds


def reachable_or_not(run: Run, base: Baseline, prices: Prices, known: Offered) -> tuple[RoundResult | None, Prices]:
    """Where the search finds nothing within the limit: measure the fastest plan of each precision and take the best.

    None: the limit is in reach as predicted. A best one outside of the limit was measured twice, the second time as
    carefully as a result is. What was measured corrects the prices. This comes before any damage is measured and before
    any training.
    """
    searched = search(run, prices, known, target(run, prices, base))
    ends = sorted(searched.extremes(), key=lambda found: found.latency_ms)
    if ends[0].latency_ms <= target(run, prices, base):
        return None, prices
    loop = _Loop(run, base)
    results = []
    for index, found in enumerate(end for end in ends if end.latency_ms <= HOPELESS * ends[0].latency_ms):
        plan = write_plan(run, prices, known, searched, found)
        result = loop.round(f"fastest {index + 1}", plan, prices)
        results.append(result)
        prices = loop.corrected(prices, result)
    best = min(results, key=lambda r: r.judged_ms)
    return (best if best.possible else loop.confirmed(best, prices)), prices


def settle(run: Run, plan: Plan, base: Baseline, prices: Prices, known: Offered, *, replan: bool) -> Settled:
    """Measure the plan untrained; correct the prices and plan again until it fits, at most MOST_ROUNDS times.

    Where no round comes inside the limit, the fastest plan by the corrected prices is measured too.
    """
    loop = _Loop(run, base)
    while True:
        result = loop.round(f"round {len(loop.rounds) + 1}", plan, prices)
        if not replan or math.isinf(result.limit_ms) or len(loop.rounds) == MOST_ROUNDS:
            break
        if result.fits and (result.judged_ms >= TOO_FAST * result.limit_ms or not _structural(plan)):
            break
        prices = loop.at_speed(loop.corrected(prices, result), result)
        known = offered(run, prices, base, known.damages, known.seen)
        plan, known = make_plan(run, prices, known, base)
        if loop.measured(plan):
            break
    if not any(result.possible for result in loop.rounds) and replan:
        searched = search(run, prices, known, target(run, prices, base))
        last = write_plan(run, prices, known, searched, searched.fastest())
        if not loop.measured(last):
            loop.round("fastest after rounds", last, prices)
        best = min(loop.rounds, key=lambda r: r.judged_ms)
        if not best.possible:
            loop.confirmed(best, prices)
    return _best(loop.rounds, prices)


def _best(rounds: list[RoundResult], prices: Prices) -> Settled:
    """The fitting round with the least damage; where none fits, the fastest: the last one if it is a confirmation."""
    fitting = [r for r in rounds if r.fits]
    if fitting:
        best = min(fitting, key=lambda r: (r.plan.damage, r.judged_ms))
        return Settled(best.plan, prices, tuple(rounds))
    inside = [r for r in rounds if r.possible]
    best = min(inside, key=lambda r: r.judged_ms) if inside else rounds[-1]
    return Settled(best.plan, prices, tuple(rounds), None if inside else best.reachable_ms)


@dataclass
class _Loop:
    """The rounds of a run so far, and the original's latency that the prices are for."""

    run: Run
    base: Baseline
    rounds: list[RoundResult] = field(default_factory=list)
    slower: float = 1.0
    """The machine's speed that the prices are for, against that of the original's first measurement."""

    def round(self, name: str, plan: Plan, prices: Prices, repeats: bench.Repeats = ROUND) -> RoundResult:
        """Measure a plan, once a run."""
        result = self.run.stages.run(name, RoundResult, lambda: self._measure(name, plan, prices, repeats))
        self.rounds.append(result)
        return result

    def confirmed(self, best: RoundResult, prices: Prices) -> RoundResult:
        """The best plan measured again: that it came out best may be luck, and what is claimed has to hold."""
        return self.round("best within reach", best.plan, prices, VERDICT)

    def measured(self, plan: Plan) -> bool:
        """Whether a round has measured the same options."""
        return any(_signature(result.plan) == _signature(plan) for result in self.rounds)

    def corrected(self, prices: Prices, result: RoundResult) -> Prices:
        """Prices at which the measured plan costs what it was measured at: kind by kind where the profile of its
        kernels says so, and then as a whole, in steps of the grid.

        No round comes after the last one: for it, half of the error that was just seen is expected once more.
        """
        off = result.judged_ms / result.predicted_ms
        if off > 1 and not result.fits and len(self.rounds) == MOST_ROUNDS - 1:
            off **= 1.5
        factor = on_grid(off, upwards=not result.fits)
        kinds = [kind.model_copy(update={"factor": on_grid(kind.factor)}) for kind in result.kinds]
        profile = corrected_kinds(prices.profile, prices.runtime, kinds)
        network = planned(prices.network, result.plan)
        measured_ms = factor * result.predicted_ms
        return replace(prices, profile=brought_to(network, profile, prices.runtime, result.precision, measured_ms))

    def at_speed(self, prices: Prices, result: RoundResult) -> Prices:
        """Prices for a machine that is as slow as this round found it, where the budget is in milliseconds."""
        if result.speed == 1:
            return prices
        self.slower *= result.speed
        for precision in [t.precision for t in prices.profile.tables if t.runtime == prices.runtime and t.kinds]:
            prices = prices.corrected(precision, result.speed)
        return prices

    def _measure(self, name: str, plan: Plan, prices: Prices, repeats: bench.Repeats) -> RoundResult:
        run, budget = self.run, self.run.job.request.budget
        candidate = apply_options(run, prices.network, [c.option for c in plan.chosen], bare=True)
        path = run.store.path("checkpoints", f"{name.replace(' ', '-')}{run.job.runtime.suffix}")
        precision = precision_of(run, candidate)
        run.export(candidate, run.job.runtime, precision, path, timed_only=True)
        run.stages.progress(name, 0.2)
        sessions, found = paired(run, name, name, path, repeats)
        before, after = (bench.median_ms(m, budget.clock) for m in (found.baseline, found.candidate))
        originals = [bench.median_ms(original.measurement, budget.clock) for original, _ in sessions]
        speed = self._speed(originals)
        return RoundResult(
            plan=plan,
            precision=precision,
            predicted_ms=plan.estimate.latency_ms,
            unit_ms=self._unit_ms(prices),
            limit_ms=original_limit(run, prices, self.base) / speed,
            speed=speed,
            measured_ms=after,
            measured_interval_ms=found.latency_interval_ms(found.candidate),
            baseline_ms=before,
            ratio=found.ratio,
            ratio_interval=found.interval,
            slowest_ratio=min(found.ratio_by_speed),
            session_ratios=found.session_ratios,
            baseline_sessions_ms=tuple(originals),
            inside=found.meets(budget),
            accept=accept(found.session_ratios, self.rounds),
            kinds=self._kinds(name, plan, prices, path, (before, after)),
        )

    def _unit_ms(self, prices: Prices) -> float:
        """What the prices take the original for."""
        first = self.base.float_run
        if first is None:
            return prices.latency_ms(prices.network)
        return self.slower * bench.median_ms(first.measurement, self.run.job.request.budget.clock)

    def _speed(self, originals: list[float]) -> float:
        """By how much slower than the prices say the machine may be, in steps of the grid."""
        budget, first = self.run.job.request.budget, self.base.float_run
        if budget.latency_ms is None or first is None:
            return 1.0
        earlier = [result.baseline_sessions_ms for result in self.rounds]
        begun = bench.samples_ms(first.measurement, budget.clock)
        unit_ms = self.slower * bench.median_ms(first.measurement, budget.clock)
        return on_grid(original_now_ms(begun, [*earlier, originals]) / unit_ms)

    def _kinds(
        self, name: str, plan: Plan, prices: Prices, path: Path, measured_ms: tuple[float, float]
    ) -> tuple[KindFactor, ...]:
        """What the runtime's profile says about single kinds; nothing where the device gives none."""
        run = self.run
        try:
            files = profiled(run, name, path)
        except StorageError:
            raise
        except MobilekitError as error:
            run.fail(name, path.name, error, "the prices are corrected as a whole, and not by the kind of operator")
            return ()
        profiles = [Profiled(f.measurement.operators, 1000 * ms) for f, ms in zip(files, measured_ms, strict=True)]
        lines = priced_lines(planned(prices.network, plan), prices.profile, prices.runtime)
        order = path if run.job.runtime.name == "onnx" else None
        times = times_us(lines, profiles[1].kernels, profiling_us(profiles), order)
        return kind_factors(lines, times)


def planned(network: Network, plan: Plan) -> Network:
    """The network after a plan, as predicted."""
    for chosen in plan.chosen:
        network = registry.transform(chosen.option.transform).predict(network, chosen.option)
    return network


def _signature(plan: Plan) -> tuple[str, ...]:
    return tuple(c.option.model_dump_json() for c in plan.chosen)


def _structural(plan: Plan) -> bool:
    return any(registry.transform(c.option.transform).changes == "structure" for c in plan.chosen)
