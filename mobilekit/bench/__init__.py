"""The measuring protocol: what is asked of a device, what its raw samples say, and how far they can be trusted."""

from mobilekit.bench.advice import FEW_ROUNDS, warning_of_spread, warnings_about
from mobilekit.bench.comparison import LEVEL, SESSION, Comparison, Repeats, compare, joined, repeat
from mobilekit.bench.figures import (
    Clock,
    clock_of,
    fast_ms,
    median_ms,
    min_ms,
    p90_ms,
    reference_ratio,
    row,
    samples_ms,
)
from mobilekit.bench.protocol import COMPARE, COOL_SECONDS, FILES, MEASURE, MLPERF, Settings, measure

__all__ = [
    "COMPARE",
    "COOL_SECONDS",
    "FEW_ROUNDS",
    "FILES",
    "LEVEL",
    "MEASURE",
    "MLPERF",
    "SESSION",
    "Clock",
    "Comparison",
    "Repeats",
    "Settings",
    "clock_of",
    "compare",
    "fast_ms",
    "joined",
    "measure",
    "median_ms",
    "min_ms",
    "p90_ms",
    "reference_ratio",
    "repeat",
    "row",
    "samples_ms",
    "warning_of_spread",
    "warnings_about",
]
