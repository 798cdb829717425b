"""The first half of the story: prices, the original measured, the damage of every option, and the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mobilekit import bench, registry
from mobilekit.cost.price import corrected, latency_ms, price
from mobilekit.evaluate import SessionModule, accuracy, divergence, outputs
from mobilekit.network import trace
from mobilekit.pipeline import pricing
from mobilekit.pipeline.run import Recorded, Run, bench_model
from mobilekit.planner import reasons
from mobilekit.planner.search import Found, Offer, Search
from mobilekit.sensitivity import MOST_SAMPLES, damages
from mobilekit.types import Budget, DeviceProfile, Network, Option, Plan, Precision, Value

MARGIN = 0.92
"""The search stays this far inside the limit: paired ratios on a shared machine repeat within 6 to 7 %."""
GRID = 0.05
"""Corrections are rounded to 5 %: finer digits are noise, and would make plans differ from run to run."""
SEARCHED = ("channel_pruning", "int8")
"""The levers that the search combines; the others are applied by their names."""


class Baseline(Value):
    """The original: its files in the planned runtime, what they took, and what int8 alone does to its outputs."""

    accuracy: float
    params: int
    size_bytes: int
    float_run: Recorded | None
    int8_run: Recorded | None
    int8_damage: float | None


@dataclass(frozen=True)
class Prices:
    """A profile anchored on the original's measurements, and the network that it prices."""

    profile: DeviceProfile
    network: Network
    runtime: str

    def latency_ms(self, network: Network) -> float:
        """Predicted latency."""
        return latency_ms(network, self.profile, self.runtime)

    def corrected(self, precision: Precision, factor: float) -> Prices:
        """Prices after a measurement was `factor` times the prediction."""
        return Prices(corrected(self.profile, self.runtime, precision, factor), self.network, self.runtime)


def priced(run: Run) -> Run:
    """The run with a profile that has prices: a host's without tables is measured first (at most a minute, then kept).

    What was measured also says which channel multiple each runtime likes.
    """

    def measured() -> DeviceProfile:
        if run.job.profile.kind != "host" or run.job.profile.tables:
            return run.job.profile
        profile, failures = pricing.host_profile(run.job.profile, run.stages.progress)
        for failure in failures:
            run.stages.fail(failure)
        return profile

    profile = run.stages.run("profile", DeviceProfile, measured)
    entry = profile.runtime(run.job.entry.name)
    return replace(run, job=replace(run.job, profile=profile, entry=entry or run.job.entry))


def traced(run: Run) -> Network:
    """The original as priced operators."""
    workload = run.job.workload
    return run.stages.run("network", Network, lambda: trace(workload.module, workload.example_input, workload.name))


def original(run: Run, network: Network, *, dry: bool) -> Baseline:
    """Accuracy, size and, where there is a device, the latency of the original as it is and in int8."""
    return run.stages.run("original", Baseline, lambda: _original(run, network, dry=dry))


def _original(run: Run, network: Network, *, dry: bool) -> Baseline:
    job = run.job
    runtime, module = job.runtime, job.workload.module
    start = run.start(network)
    files = [("original", run.float_precision, run.store.path("checkpoints", f"original{runtime.suffix}"))]
    int8 = next((o for o in _options(run, network) if o.transform == "int8"), None)
    if int8 is not None:
        files.append(("original int8", "int8", run.store.path("checkpoints", f"original.int8{runtime.suffix}")))
    for index, (_, precision, path) in enumerate(files):
        candidate = registry.transform("int8").apply(start, int8) if int8 and precision == "int8" else start
        run.export(candidate, runtime, precision, path)
        run.stages.progress("original", (index + 1) / 5)
    measured: list[Recorded] = []
    if not dry and job.device is not None:
        measured = run.measure([bench_model(name, path, runtime.name) for name, _, path in files])
    run.stages.progress("original", 0.8)
    return Baseline(
        accuracy=accuracy(job.workload, module),
        params=sum(p.numel() for p in module.parameters()),
        size_bytes=file_size(files[0][2]),
        float_run=measured[0] if measured else None,
        int8_run=measured[1] if len(measured) > 1 else None,
        int8_damage=_file_damage(run, files[1][2]) if len(files) > 1 else None,
    )


def _file_damage(run: Run, path: Path) -> float:
    """Divergence of an exported file from the original module on calibration inputs, by running the file."""
    inputs = torch.cat(run.job.workload.calibration)[:MOST_SAMPLES]
    session = SessionModule(run.job.runtime.open(path))
    return divergence(outputs(run.job.workload.module, inputs), outputs(session, inputs))


def anchored(run: Run, network: Network, base: Baseline) -> Prices:
    """Prices scaled so that the original costs what it was measured to cost, in each precision."""
    prices = Prices(run.job.profile, network, run.job.entry.name)
    clock = run.job.request.budget.clock
    if base.float_run is not None:
        factor = bench.median_ms(base.float_run.measurement, clock) / prices.latency_ms(network)
        prices = prices.corrected(run.float_precision, on_grid(factor))
    if base.int8_run is not None:
        variant = network
        for option in _options(run, network):
            if option.transform == "int8":
                variant = registry.transform("int8").predict(network, option)
        factor = bench.median_ms(base.int8_run.measurement, clock) / prices.latency_ms(variant)
        prices = prices.corrected("int8", on_grid(factor))
    return prices


def _options(run: Run, network: Network) -> list[Option]:
    """Everything that the levers offer for this network and runtime."""
    found = []
    for name in SEARCHED:
        lever = registry.transform(name)
        if lever.changes == "structure" and not run.job.workload.trusted:
            continue  # without real inputs nobody can tell what removing channels does
        found += lever.options(network, run.job.entry)
    return found


def offers(run: Run, network: Network, base: Baseline, *, measure: bool) -> list[Offer]:
    """Every option with its damage: int8 from the exported file; the rest, where asked, by applying it to a copy."""
    options = _options(run, network)
    structural = [o for o in options if registry.transform(o.transform).changes == "structure"]
    found: list[float] | None = None
    if measure:
        start = run.start(network)
        found = run.stages.run(
            "damage",
            list[float],
            lambda: damages(
                start,
                structural,
                lambda candidate, option: registry.transform(option.transform).apply(candidate, option),
                run.job.workload.calibration,
                lambda fraction: run.stages.progress("damage", fraction),
            ),
        )
    known = dict(zip((o.model_dump_json() for o in structural), found or [], strict=False))
    return [
        Offer(
            option,
            registry.transform(option.transform),
            base.int8_damage if option.transform == "int8" else known.get(option.model_dump_json()),
        )
        for option in options
    ]


def limit_ms(budget: Budget, original_ms: float) -> float:
    """The latency that the budget allows; infinite where it sets none."""
    if budget.latency_ms is not None:
        return budget.latency_ms
    return original_ms / budget.speedup if budget.speedup is not None else math.inf


def search(prices: Prices, found_offers: list[Offer]) -> Search:
    """The search over these offers at these prices."""
    return Search(prices.network, found_offers, prices.latency_ms)


def repriced(run: Run, prices: Prices, given: Plan) -> Plan:
    """A given plan with predictions for the network that it is applied to now."""
    network = prices.network
    for chosen in given.chosen:
        network = registry.transform(chosen.option.transform).predict(network, chosen.option)
    warnings = given.warnings
    if run.job.workload.key != given.workload_key:
        warnings = (*warnings, "the workload's code or weights differ from those that the plan was made for")
    return given.model_copy(
        update={
            "estimate": price(network, prices.profile, prices.runtime),
            "baseline_estimate": price(prices.network, prices.profile, prices.runtime),
            "workload": run.job.request.workload,
            "workload_key": run.job.workload.key,
            "warnings": warnings,
        }
    )


def make_plan(run: Run, prices: Prices, found_offers: list[Offer], base: Baseline) -> Plan:
    """Search within the limit, less the margin, and write the plan down."""
    target = MARGIN * original_limit(run, prices, base)
    searched = search(prices, found_offers)
    return write_plan(run, prices, searched, searched.run(target), target)


def original_limit(run: Run, prices: Prices, base: Baseline) -> float:
    """The latency the budget allows, from the original's first measurement; predicted where there is none."""
    budget = run.job.request.budget
    if base.float_run is None:
        return limit_ms(budget, prices.latency_ms(prices.network))
    return limit_ms(budget, bench.median_ms(base.float_run.measurement, budget.clock))


def reachable(plan: Plan) -> bool:
    """Whether the plan is predicted to stay within the target that it was searched for."""
    return plan.target_ms is None or plan.estimate.latency_ms <= plan.target_ms / MARGIN


def with_damages(run: Run, prices: Prices, base: Baseline, known: list[Offer]) -> list[Offer]:
    """The offers, their damage measured if the limit takes more than the network as it is or another precision."""
    target = MARGIN * original_limit(run, prices, base)
    structural = [offer for offer in known if offer.transform.changes == "structure"]
    measured = all(offer.damage is not None for offer in structural)
    if measured or search(prices, known).without_structure(target) is not None:
        return known
    return offers(run, prices.network, base, measure=True)


def write_plan(run: Run, prices: Prices, searched: Search, found: Found, target_ms: float) -> Plan:
    """The plan as data, with a sentence for every lever."""
    job = run.job
    levers = [registry.transform(name) for name in SEARCHED]
    estimate = price(searched.predict(found.choice), prices.profile, prices.runtime)
    warnings = []
    if estimate.extrapolated:
        warnings.append(f"{len(estimate.extrapolated)} operators lie outside what was timed: their prices are guesses")
    for table in filter(None, (job.profile.table(job.entry.name, p) for p in job.entry.precisions)):
        if table.weak:
            warnings.append(f"low confidence in the prices of {table.runtime} in {table.precision}: {table.weak}")
    if job.entry.format != job.entry.name:
        warnings.append(f"prices are those of {job.entry.name}; the file written for it is {job.entry.format}")
    if not job.workload.trusted:
        warnings.append("no calibration_data(): judged on random input, int8 ranges are not to be trusted")
    structural = any(offer.transform.changes == "structure" for offer in found.choice.values())
    if job.workload.train_data is None and job.request.train and structural:
        warnings.append("no training data: the network is trained on the calibration inputs alone")
    return Plan(
        workload=job.request.workload,
        workload_key=job.workload.key,
        profile=job.request.profile,
        runtime=job.entry.name,
        device=job.request.device,
        budget=job.request.budget,
        seed=job.request.seed,
        train=job.request.train,
        train_seconds=job.request.train_seconds,
        target_ms=None if math.isinf(target_ms) else target_ms,
        estimate=estimate,
        baseline_estimate=price(prices.network, prices.profile, prices.runtime),
        chosen=reasons.chosen(searched, found),
        rejected=reasons.rejected(searched, found, levers, job.entry),
        warnings=tuple(warnings),
    )


def on_grid(factor: float, *, upwards: bool = False) -> float:
    """A correction rounded to steps of 5 %; `upwards` never rounds a needed correction away."""
    steps = math.log(factor) / math.log1p(GRID)
    return (1 + GRID) ** (math.ceil(steps - 1e-9) if upwards else round(steps))


def file_size(path: Path) -> int:
    """Bytes of a file, or of all files in a package folder."""
    if path.is_dir():
        return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    return path.stat().st_size
