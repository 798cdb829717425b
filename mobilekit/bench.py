"""The measuring protocol: what is asked of a device, and what its raw samples say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

from mobilekit.errors import MobilekitError
from mobilekit.interfaces import Device
from mobilekit.stats import median, median_interval, paired_ratio, percentile, ratios, two_modes
from mobilekit.types import (
    BenchModel,
    BenchRequest,
    BenchResult,
    Budget,
    Measurement,
    MeasurementRow,
    Value,
)

Clock = Literal["cpu", "wall"]


class Settings(TypedDict, total=False):
    """Fields of a BenchRequest that `measure` and `compare` pass on."""

    threads: int
    warmup: int
    runs: int
    max_seconds: float
    reference: bool
    per_operator: bool
    timeout_seconds: float


MEASURE: Settings = {"runs": 200, "max_seconds": 20.0}
COMPARE: Settings = {"runs": 3000, "max_seconds": 10.0}
"""Ten seconds of rounds and not a number of them: what disturbs a shared machine changes over seconds, and a short
comparison sees one of its states only. On a two-thread core whose other thread was busy, the paired ratio of two
networks ranged over 18 % in repeats of 2 s, 14 % in 5 s and 7 % in 10 s."""

SESSION = 0.5
"""Length of one of several sessions, as a share of a comparison."""
LEVEL = 0.9
"""Of the intervals."""
OTHER_LOAD = 1.15
"""Wall over CPU time from which another process is blamed."""
DRIFT = 0.1
FEW_ROUNDS = 30


class Repeats(NamedTuple):
    """How often a comparison is repeated: at least and at most so many sessions, and no more of them once the interval
    reaches no further than `within` (a share) to either side."""

    least: int
    most: int
    within: float


def measure(device: Device, models: Sequence[BenchModel], **settings: Unpack[Settings]) -> BenchResult:
    """Time models on a device, interleaved round by round. Settings are the fields of BenchRequest.

    Without `timeout_seconds` the device gets five times the measuring time, three seconds a model and two minutes.
    """
    return device.run(_request(tuple(models), {**MEASURE, **settings}))


def _request(models: tuple[BenchModel, ...], settings: Settings) -> BenchRequest:
    seconds = settings.get("max_seconds", MEASURE["max_seconds"])
    known: dict[str, Any] = {"timeout_seconds": 120 + 5 * seconds + 3 * len(models), **settings}
    return BenchRequest(models=models, **known)


class Comparison(Value):
    """Two models that ran in turn, in one session or in several, and by how much the second was faster."""

    baseline: Measurement
    """All sessions' rounds, one after the other."""
    candidate: Measurement
    clock: Clock
    rounds: tuple[int, ...]
    """Rounds of each session."""
    ratio: float
    """Median over rounds of baseline over candidate: 2 means that the candidate takes half the time."""
    interval: tuple[float, float]
    """90 % bootstrap interval of the ratio, over sessions and rounds (`stats.median_interval`)."""

    @property
    def session_ratios(self) -> tuple[float, ...]:
        """The median ratio of each session: how well the comparison repeats."""
        pairs = zip(self._sessions(self.baseline), self._sessions(self.candidate), strict=True)
        return tuple(paired_ratio(*pair) for pair in pairs)

    @property
    def ratio_by_speed(self) -> tuple[float, ...]:
        """The ratio at each of the machine's speeds that the run has seen: one, or fast then slow.

        A busy neighbour slows small and int8 kernels more than large float ones, so that the ratio at the slow speed
        can be 15 % lower; which speed prevails changes from minute to minute.
        """
        modes = two_modes(samples_ms(self.baseline, self.clock))
        if modes is None:
            return (self.ratio,)
        between = math.sqrt(modes[0] * modes[1])
        pairs = list(zip(*(samples_ms(m, self.clock) for m in (self.baseline, self.candidate)), strict=True))
        speeds = [[pair for pair in pairs if (pair[0] > between) == slow] for slow in (False, True)]
        return tuple(paired_ratio(*zip(*rounds, strict=True)) for rounds in speeds)

    @property
    def ratio_of_medians(self) -> float:
        """The baseline's median latency over the candidate's."""
        before, after = (median_ms(m, self.clock) for m in (self.baseline, self.candidate))
        return before / after

    def meets(self, budget: Budget) -> bool:
        """Whether the latency that the budget asks for is kept: not by the median alone, but by the end of its
        interval that is farther from it. A speedup's medians have to say so too, so that neither way of looking is
        flattered."""
        if budget.latency_ms is not None:
            return self.latency_interval_ms(self.candidate)[1] <= budget.latency_ms
        return budget.speedup is None or min(self.interval[0], self.ratio_of_medians) >= budget.speedup

    def latency_interval_ms(self, measurement: Measurement) -> tuple[float, float]:
        """90 % interval of the median latency of the baseline or the candidate, as that of the ratio is found."""
        return median_interval(self._sessions(measurement), level=LEVEL)

    def _sessions(self, measurement: Measurement) -> list[tuple[float, ...]]:
        samples = iter(samples_ms(measurement, self.clock))
        return [tuple(islice(samples, count)) for count in self.rounds]

    @classmethod
    def of(cls, *sessions: tuple[Measurement, Measurement], clock: Clock = "cpu") -> Comparison:
        """Compare the (baseline, candidate) measurements of one session each. Raises ValueError where rounds do not
        pair, or there are none."""
        each = [ratios(samples_ms(before, clock), samples_ms(after, clock)) for before, after in sessions]
        return cls(
            baseline=_joined([before for before, _ in sessions]),
            candidate=_joined([after for _, after in sessions]),
            clock=clock,
            rounds=tuple(len(found) for found in each),
            ratio=median([ratio for found in each for ratio in found]),
            interval=median_interval([found.tolist() for found in each], level=LEVEL),
        )


def _joined(sessions: Sequence[Measurement]) -> Measurement:
    """One measurement with the rounds of several."""
    first, last = sessions[0], sessions[-1]
    lists = ("samples_ms", "cpu_samples_ms", "reference_ms")
    rounds = {name: tuple(ms for session in sessions for ms in getattr(session, name)) for name in lists}
    cpus = tuple(sorted({cpu for session in sessions for cpu in session.cpus}))
    return first.model_copy(update={**rounds, "cpus": cpus, "temperature_after_c": last.temperature_after_c})


def repeat(
    session: Callable[[], Sequence[Measurement]], repeats: Repeats, budget: Budget, told: Callable[[float], None]
) -> Comparison:
    """Call `session`, which measures a baseline and a candidate in turn in a process of its own, until it is known well
    enough what the budget asks for: the candidate's latency, or how many times faster it is.

    A process lays out its memory once, and a machine's neighbour stays for seconds: rounds of one session repeat better
    than sessions do. `told` is given the finished fraction.
    """
    pairs: list[tuple[Measurement, Measurement]] = []
    while True:
        before, after = session()
        pairs.append((before, after))
        told(len(pairs) / repeats.most)
        if len(pairs) < repeats.least:
            continue
        found = Comparison.of(*pairs, clock=budget.clock)
        in_ms = budget.latency_ms is not None
        low, high = found.latency_interval_ms(found.candidate) if in_ms else found.interval
        if len(pairs) >= repeats.most or math.log(high / low) <= 2 * repeats.within:
            return found


def compare(device: Device, baseline: BenchModel, candidate: BenchModel, **settings: Unpack[Settings]) -> Comparison:
    """Time two models in turn and relate them. Raises MobilekitError when either could not be measured.

    The ratio is judged on CPU time, of which only that of the model itself is counted.
    """
    models = (baseline, candidate)
    result = device.run(_request(models, {**COMPARE, **settings}))
    if [m.path for m in result.measurements] != [model.path for model in models]:
        reasons = [f"{f.subject} could not be measured: {f.message}; {f.remedy}" for f in result.failures]
        raise MobilekitError(reasons[0] if reasons else f"{device.name} did not measure both models: try again")
    return Comparison.of((result.measurements[0], result.measurements[1]))


# ---------------------------------------------------------------- figures of one measurement


def samples_ms(measurement: Measurement, clock: Clock = "cpu") -> tuple[float, ...]:
    """The raw samples on a clock, milliseconds."""
    return measurement.cpu_samples_ms if clock == "cpu" else measurement.samples_ms


def median_ms(measurement: Measurement, clock: Clock = "cpu") -> float:
    """Median of the rounds, milliseconds."""
    return median(samples_ms(measurement, clock))


def p90_ms(measurement: Measurement, clock: Clock = "cpu") -> float:
    """Time that nine rounds of ten stayed under, milliseconds."""
    return percentile(samples_ms(measurement, clock), 90)


def min_ms(measurement: Measurement, clock: Clock = "cpu") -> float:
    """The fastest round, milliseconds."""
    return min(samples_ms(measurement, clock))


def reference_ratio(measurement: Measurement) -> float | None:
    """Median over rounds of CPU time over that of the reference matrix product; None where that was not timed.

    It compares runs at different times or on different machines better than milliseconds do.
    """
    if not measurement.reference_ms or not measurement.cpu_samples_ms:
        return None
    return paired_ratio(measurement.cpu_samples_ms, measurement.reference_ms)


def row(measurement: Measurement, clock: Clock, line: int) -> MeasurementRow:
    """The measurement as the report shows it; `line` is its line in measurements.jsonl.

    One without CPU times is shown at wall time.
    """
    clock = clock if measurement.cpu_samples_ms else "wall"
    return MeasurementRow(
        device=measurement.device,
        origin=measurement.origin,
        threads=measurement.threads,
        median_ms=median_ms(measurement, clock),
        clock=clock,
        p90_ms=p90_ms(measurement, clock),
        min_ms=min_ms(measurement, clock),
        wall_median_ms=median_ms(measurement, "wall"),
        reference_ratio=reference_ratio(measurement),
        samples=len(measurement.samples_ms),
        file="measurements.jsonl",
        line=line,
        compute_unit=measurement.compute_unit,
    )


# ---------------------------------------------------------------- advice


def warnings_about(measurement: Measurement) -> list[str]:
    """What makes the samples less trustworthy, each as a sentence with its figures."""
    return [f"{measurement.model}: {text}" for text in _warnings(measurement)]


def _warnings(measurement: Measurement) -> Iterator[str]:
    cpu = measurement.cpu_samples_ms
    if len(cpu) < FEW_ROUNDS:
        yield f"only {len(cpu)} rounds were timed: allow more time for a median that repeats"
    wall_ms, cpu_ms = median_ms(measurement, "wall"), median_ms(measurement)
    if measurement.threads == 1 and wall_ms > OTHER_LOAD * cpu_ms:
        yield (
            f"the median wall time of {wall_ms:.3f} ms is {wall_ms / cpu_ms - 1:.0%} above the CPU time of "
            f"{cpu_ms:.3f} ms: other processes used the same CPU"
        )
    if measurement.threads > 1:
        yield f"CPU time adds up {measurement.threads} threads: judge latency by wall time"
    modes = two_modes(cpu)
    if modes:
        slow = 1 - modes[2]
        yield (
            f"the samples have two modes, {modes[0]:.3f} ms and {modes[1]:.3f} ms ({slow:.0%} of the rounds): the CPU "
            f"changed its speed or shares its core; the median may jump between them"
        )
    drift = _drift(cpu)
    if abs(drift) > DRIFT:
        machine = (
            f", the reference product by {_drift(measurement.reference_ms):+.0%}" if measurement.reference_ms else ""
        )
        yield f"the median changed by {drift:+.0%} from the first half of the rounds to the second{machine}"


def _drift(samples: Sequence[float]) -> float:
    """Relative change of the median from the first half to the second."""
    half = len(samples) // 2
    return median(samples[half:]) / median(samples[:half]) - 1 if half else 0.0
