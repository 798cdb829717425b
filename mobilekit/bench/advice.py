"""What makes samples less trustworthy, and what can be done about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mobilekit.bench.figures import median_ms
from mobilekit.stats import median, spread, two_modes
from mobilekit.types import BenchWarning, Measurement, WarningKind

Finding = tuple[WarningKind, str, str]
"""Kind, message and advice."""

OTHER_LOAD = 1.15
"""Wall over CPU time from which another process is blamed."""
DRIFT = 0.1
FEW_ROUNDS = 30
SPREAD = 0.05
"""Of repeats, from which they are said not to repeat."""
HOT_C = 1.0
"""Degrees above the gate that are no matter: it was warmed up and pinned since."""
THERMAL_WORDS = (
    ("nominal", "fair", "serious", "critical"),
    ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown"),
)
"""Of iOS and of Android, from cool to hot."""


def warnings_about(measurement: Measurement, wanted: int = FEW_ROUNDS) -> list[BenchWarning]:
    """What makes the samples less trustworthy, each with its figures; `wanted` is the number of rounds asked for.

    Nothing about a measurement that was not timed (an emulator's).
    """
    if not measurement.samples_ms:
        return []
    found = (*_rounds(measurement, wanted), *_load(measurement), *_shape(measurement), *_heat(measurement))
    return [
        BenchWarning(kind=kind, subject=measurement.model, message=message, advice=advice)
        for kind, message, advice in found
    ]


def warning_of_spread(subject: str, what: str, values: Sequence[float]) -> BenchWarning | None:
    """That repeats of one figure (`what`) lie further apart than 5 %, or None."""
    apart = spread(values)
    if apart <= SPREAD:
        return None
    return BenchWarning(
        kind="spread",
        subject=subject,
        message=f"{what} differs by {apart:.1%} between {len(values)} repeats, which is more than {SPREAD:.0%}",
        advice="measure when the machine is at rest, longer (--mlperf), or judge by ratios to a --baseline",
    )


def _rounds(measurement: Measurement, wanted: int) -> Iterator[Finding]:
    count = len(measurement.samples_ms)
    if count < min(wanted, FEW_ROUNDS):
        yield "few-rounds", f"only {count} rounds were timed", "allow more time or runs for a median that repeats"
    elif count < wanted:
        yield (
            "few-rounds",
            f"only {count} of the {wanted} rounds that were wanted were timed before the time was over",
            "measure fewer files at once (--one-by-one)",
        )
    if measurement.stable is False:
        runs = "" if measurement.warmup is None else f" after {measurement.warmup} runs"
        yield (
            "unstable-start",
            f"its runs were still becoming faster or slower when warming up ended{runs}",
            "measure again when the machine is at rest; the first rounds may be unlike the others",
        )


def _load(measurement: Measurement) -> Iterator[Finding]:
    if not measurement.cpu_samples_ms:
        return
    wall_ms, cpu_ms = median_ms(measurement, "wall"), median_ms(measurement)
    if measurement.threads > 1:
        yield (
            "threads",
            f"CPU time adds up {measurement.threads} threads",
            "judge latency by wall time",
        )
    elif wall_ms > OTHER_LOAD * cpu_ms:
        yield (
            "other-load",
            f"the median wall time of {wall_ms:.3f} ms is {wall_ms / cpu_ms - 1:.0%} above the CPU time of "
            f"{cpu_ms:.3f} ms: other processes used the same CPU",
            "end other programs, or judge by CPU time and by ratios of the same rounds",
        )


def _shape(measurement: Measurement) -> Iterator[Finding]:
    """What the samples look like: two modes, or a drift."""
    samples = measurement.cpu_samples_ms or measurement.samples_ms
    modes = two_modes(samples)
    if modes:
        slow = 1 - modes[2]
        yield (
            "two-modes",
            f"the samples have two modes, {modes[0]:.3f} ms and {modes[1]:.3f} ms ({slow:.0%} of the rounds): the CPU "
            "changed its speed or shares its core",
            "judge by ratios of the same rounds, for the median may jump between them; or fix the CPU's frequency",
        )
    drift = _drift(samples)
    if abs(drift) > DRIFT:
        reference = measurement.reference_ms
        machine = f", the reference product by {_drift(reference):+.0%}" if reference else ""
        yield (
            "drift",
            f"the median changed by {drift:+.0%} from the first half of the rounds to the second{machine}",
            "let the device cool down first (--cool-to), and measure again when nothing else starts or ends",
        )


def _heat(measurement: Measurement) -> Iterator[Finding]:
    before, after = measurement.thermal_before, measurement.thermal_after
    if measurement.throttled or _worse(before, after):
        words = f" ({before} before, {after} after)" if before and after else ""
        yield (
            "throttling",
            f"the system held its frequencies down while it ran{words}",
            "let it cool down first (--cool-to), cool it better, or give it a stronger power supply",
        )
    gate, found = measurement.cool_to_c, measurement.temperature_before_c
    if gate is not None and found is None:
        yield (
            "hot",
            f"no temperature can be read here: it did not wait to cool down to {gate:g} °C",
            "let the device rest for some minutes before you measure",
        )
    elif gate is not None and found is not None and found > gate + HOT_C:
        yield (
            "hot",
            f"after {measurement.waited_seconds or 0:.0f} s of waiting it was at {found:.0f} °C and not at {gate:g} °C",
            "let the device rest, cool it better, or allow a higher --cool-to",
        )


def _worse(before: str | None, after: str | None) -> bool:
    """Whether an app's system called the phone hotter afterwards."""
    return any(
        before in words and after in words and words.index(after) > words.index(before)
        for words in THERMAL_WORDS
        if before is not None and after is not None
    )


def _drift(samples: Sequence[float]) -> float:
    """Relative change of the median from the first half to the second."""
    half = len(samples) // 2
    return median(samples[half:]) / median(samples[:half]) - 1 if half else 0.0
