"""The original, measured: its accuracy, its latency in float and int8, and prices anchored on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mobilekit import bench, registry
from mobilekit.cost.price import corrected, latencies_ms, latency_ms, price
from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.evaluate import SessionModule, accuracy, divergence, outputs
from mobilekit.network import trace
from mobilekit.pipeline import pricing
from mobilekit.pipeline.run import Recorded, Run, bench_model
from mobilekit.sensitivity import MOST_SAMPLES
from mobilekit.types import Budget, DeviceInfo, DeviceProfile, Estimate, Network, Option, Precision, Value

GRID = 0.05
"""Corrections are rounded to 5 %: finer digits are noise, and would make plans differ from run to run."""


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

    def of(self, network: Network) -> float:
        """Predicted latency, as a figure of the search."""
        return self.latency_ms(network)

    def of_widths(self, network: Network, widths: Mapping[str, np.ndarray]) -> np.ndarray:
        """Predicted latency at many width assignments, shape (assignments,)."""
        return latencies_ms(network, self.profile, self.runtime, widths)

    def price(self, network: Network) -> Estimate:
        """The prediction with its operators and interval."""
        return price(network, self.profile, self.runtime)

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
        device = run.job.device or registry.device("host")
        profile, failures = pricing.measured_profile(device, run.job.profile, run.stages.progress)
        for failure in failures:
            run.stages.fail(failure)
        return profile

    profile = run.stages.run("profile", DeviceProfile, measured)
    entry = profile.runtime(run.job.entry.name)
    return replace(run, job=replace(run.job, profile=profile, entry=entry or run.job.entry))


def met(run: Run, *, dry: bool) -> DeviceInfo | None:
    """What the device is, asked before anything else, so that one out of reach is noticed at once.

    A dry run measures nothing: it goes on without an answer. A resumed one takes what it was told. Raises
    MobilekitError where the device does not answer, and BadInputError for an emulator, whose times are no latency.
    """
    device = run.job.device
    if device is None:
        return None
    if dry:
        try:
            return device.info()
        except MobilekitError:
            return None
    info = run.stages.run("device", DeviceInfo, device.info)
    if info.origin == "emulator":
        raise BadInputError(
            f"'{device.name}' is an emulator, whose times are no latency: plan with a device, or give it to --devices"
        )
    return info


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
    int8 = whole_int8(run, network)
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


def judged_by(run: Run, base: Baseline) -> Run:
    """The run, judged on wall time where the device takes no CPU times."""
    if base.float_run is None:
        return run
    request = run.job.request
    clock = bench.clock_of(base.float_run.measurement, request.budget.clock)
    budget = request.budget.model_copy(update={"clock": clock})
    return replace(run, job=replace(run.job, request=replace(request, budget=budget)))


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
        option = whole_int8(run, network)
        variant = registry.transform("int8").predict(network, option) if option else network
        factor = bench.median_ms(base.int8_run.measurement, clock) / prices.latency_ms(variant)
        prices = prices.corrected("int8", on_grid(factor))
    return prices


def whole_int8(run: Run, network: Network) -> Option | None:
    """The option of int8 for the whole network, where the runtime offers it on this device."""
    return next(iter(registry.transform("int8").options(network, run.job.entry)), None)


def limit_ms(budget: Budget, original_ms: float) -> float:
    """The latency that the budget allows; infinite where it sets none."""
    if budget.latency_ms is not None:
        return budget.latency_ms
    return original_ms / budget.speedup if budget.speedup is not None else math.inf


def original_limit(run: Run, prices: Prices, base: Baseline) -> float:
    """The latency the budget allows, from the original's first measurement; predicted where there is none."""
    budget = run.job.request.budget
    if base.float_run is None:
        return limit_ms(budget, prices.latency_ms(prices.network))
    return limit_ms(budget, bench.median_ms(base.float_run.measurement, budget.clock))


def on_grid(factor: float, *, upwards: bool = False) -> float:
    """A correction rounded to steps of 5 %; `upwards` never rounds a needed correction away."""
    steps = math.log(factor) / math.log1p(GRID)
    return (1 + GRID) ** (math.ceil(steps - 1e-9) if upwards else round(steps))


def file_size(path: Path) -> int:
    """Bytes of a file, or of all files in a package folder."""
    if path.is_dir():
        return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    return path.stat().st_size
