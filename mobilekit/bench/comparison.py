"""Two models that ran in turn: by how much one is faster, in one session or several, and what a budget makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple, Unpack

from mobilekit.bench.figures import Clock, clock_of, fast_ms, median_ms, samples_ms
from mobilekit.bench.protocol import COMPARE, Settings, request
from mobilekit.errors import MobilekitError
from mobilekit.interfaces import Device
from mobilekit.stats import median, median_interval, paired_ratio, ratios, two_modes
from mobilekit.types import BenchModel, Budget, Measurement, Value

SESSION = 0.5
"""Length of one of several sessions, as a share of a comparison."""
LEVEL = 0.9
"""Of the intervals."""


class Repeats(NamedTuple):
    """How often a comparison is repeated: at least and at most so many sessions, and no more of them once the interval
    reaches no further than `within` (a share) to either side."""

    least: int
    most: int
    within: float

    def narrow(self, interval: tuple[float, float]) -> bool:
        """Whether an interval reaches no further than that."""
        low, high = interval
        return low > 0 and math.log(high / low) <= 2 * self.within


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
    def fast_ratio(self) -> float:
        """The ratio at the fastest speed that the machine had: of the times that one round of ten stayed under."""
        before, after = (fast_ms(m, self.clock) for m in (self.baseline, self.candidate))
        return before / after

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
        taken = {clock_of(measurement, clock) for pair in sessions for measurement in pair}
        clock = "wall" if "wall" in taken else clock  # CPU time of one is not compared with wall time of the other
        each = [ratios(samples_ms(before, clock), samples_ms(after, clock)) for before, after in sessions]
        return cls(
            baseline=joined([before for before, _ in sessions]),
            candidate=joined([after for _, after in sessions]),
            clock=clock,
            rounds=tuple(len(found) for found in each),
            ratio=median([ratio for found in each for ratio in found]),
            interval=median_interval([found.tolist() for found in each], level=LEVEL),
        )


def joined(sessions: Sequence[Measurement]) -> Measurement:
    """One measurement with the rounds of several; the rest is the first one's, and of what they noticed the worst."""
    first, last = sessions[0], sessions[-1]
    lists = ("samples_ms", "cpu_samples_ms", "reference_ms")
    rounds = {name: tuple(ms for session in sessions for ms in getattr(session, name)) for name in lists}
    steady = [session.stable for session in sessions if session.stable is not None]
    held = [session.throttled for session in sessions if session.throttled is not None]
    return first.model_copy(
        update={
            **rounds,
            "cpus": tuple(sorted({cpu for session in sessions for cpu in session.cpus})),
            "temperature_after_c": last.temperature_after_c,
            "thermal_after": last.thermal_after,
            "stable": all(steady) if steady else None,
            "throttled": any(held) if held else None,
        }
    )


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
        interval = found.latency_interval_ms(found.candidate) if in_ms else found.interval
        if len(pairs) >= repeats.most or repeats.narrow(interval):
            return found


def compare(device: Device, baseline: BenchModel, candidate: BenchModel, **settings: Unpack[Settings]) -> Comparison:
    """Time two models in turn and relate them. Raises MobilekitError when either could not be measured.

    The ratio is judged on CPU time, of which only that of the model itself is counted.
    """
    models = (baseline, candidate)
    result = device.run(request(models, {**COMPARE, **settings}))
    if [m.path for m in result.measurements] != [model.path for model in models]:
        reasons = [f"{f.subject} could not be measured: {f.message}; {f.remedy}" for f in result.failures]
        raise MobilekitError(reasons[0] if reasons else f"{device.name} did not measure both models: try again")
    return Comparison.of((result.measurements[0], result.measurements[1]))
