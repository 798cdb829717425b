"""Figures of one measurement, computed from its raw samples."""

from __future__ import annotations

from typing import Literal

from mobilekit.stats import median, paired_ratio, percentile
from mobilekit.types import Measurement, MeasurementRow

Clock = Literal["cpu", "wall"]


def samples_ms(measurement: Measurement, clock: Clock = "cpu") -> tuple[float, ...]:
    """The raw samples on a clock, milliseconds; wall time where no CPU time was taken."""
    return measurement.cpu_samples_ms if clock_of(measurement, clock) == "cpu" else measurement.samples_ms


def clock_of(measurement: Measurement, clock: Clock = "cpu") -> Clock:
    """The clock that its figures are on: a phone's program may not take CPU times."""
    return clock if measurement.cpu_samples_ms else "wall"


def median_ms(measurement: Measurement, clock: Clock = "cpu") -> float:
    """Median of the rounds, milliseconds."""
    return median(samples_ms(measurement, clock))


def p90_ms(measurement: Measurement, clock: Clock = "cpu") -> float:
    """Time that nine rounds of ten stayed under, milliseconds."""
    return percentile(samples_ms(measurement, clock), 90)


def min_ms(measurement: Measurement, clock: Clock = "cpu") -> float:
    """The fastest round, milliseconds."""
    return min(samples_ms(measurement, clock))


def fast_ms(measurement: Measurement, clock: Clock = "cpu") -> float:
    """Time at the fastest speed that the machine had: that one round of ten stayed under, milliseconds.

    Of a shared machine's speeds only the undisturbed one is repeatable (`docs/decisions/0010`).
    """
    return percentile(samples_ms(measurement, clock), 10)


def reference_ratio(measurement: Measurement) -> float | None:
    """Median over rounds of CPU time over that of the reference matrix product; None where that was not timed.

    It compares runs at different times or on different machines better than milliseconds do.
    """
    if not measurement.reference_ms or not measurement.cpu_samples_ms:
        return None
    return paired_ratio(measurement.cpu_samples_ms, measurement.reference_ms)


def row(measurement: Measurement, clock: Clock, line: int) -> MeasurementRow:
    """The measurement as the report shows it; `line` is its line in measurements.jsonl.

    One without CPU times is shown at wall time, and one that was not timed, as on an emulator, without medians.
    """
    clock = clock_of(measurement, clock)
    timed = bool(samples_ms(measurement, clock))
    return MeasurementRow(
        device=measurement.device,
        origin=measurement.origin,
        threads=measurement.threads,
        median_ms=median_ms(measurement, clock) if timed else None,
        clock=clock,
        p90_ms=p90_ms(measurement, clock) if timed else None,
        min_ms=min_ms(measurement, clock) if timed else None,
        wall_median_ms=median_ms(measurement, "wall") if timed else None,
        reference_ratio=reference_ratio(measurement),
        samples=len(measurement.samples_ms),
        file="measurements.jsonl",
        line=line,
        compute_unit=measurement.compute_unit,
        load_ms=measurement.load_ms,
        first_run_ms=measurement.first_run_ms,
        peak_memory_mb=measurement.peak_memory_mb,
        energy_mj=measurement.energy_mj,
        instructions=measurement.instructions,
        parity=measurement.parity,
        beside_host=measurement.beside_host,
        app=measurement.app,
    )
