"""What a round before training found, and how far inside the limit it has to be so that the verdict will hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mobilekit import bench
from mobilekit.pipeline.paired import VERDICT
from mobilekit.pipeline.planning import MARGIN
from mobilekit.stats import median, median_interval
from mobilekit.types import KindFactor, Plan, Precision, Value

SESSION_SPREAD = 0.02
"""Standard deviation of a session's paired ratio on shared machines: 1 % on a quiet one, above 3 % beside others."""
KNOWN = 6
"""How many degrees of freedom that figure counts for, beside the sessions of this run."""
OCCASION_SPREAD = 0.015
"""Of a ratio from one minute to another, which sessions of one minute do not show: repeats ranged over 3 to 7 %."""
SURE = 1.645
"""Deviations that an accepted round is sure by: 19 of 20 accepted ones pass the verdict even at the very limit."""
LEAST_ACCEPT = 1.005 * MARGIN
"""No round has to be further inside: the search aims at MARGIN, and the same plan would come out again."""


class RoundResult(Value):
    """A plan as it was measured before training, in turn with the original.

    What was predicted, `judged_ms` and `limit_ms` are milliseconds at one speed of the machine, that at which the
    original takes `unit_ms`: the prices are for it. The others are as measured in this round.
    """

    plan: Plan
    precision: Precision
    predicted_ms: float
    unit_ms: float
    limit_ms: float
    speed: float
    """Factor by which the machine may be slower than the prices are for; 1 where the budget is relative."""
    measured_ms: float
    """Median of the candidate."""
    measured_interval_ms: tuple[float, float]
    baseline_ms: float
    ratio: float
    """How many times faster than the original, median of the paired rounds."""
    ratio_interval: tuple[float, float]
    slowest_ratio: float
    """The ratio at the one of the machine's speeds at which it is least."""
    session_ratios: tuple[float, ...]
    baseline_sessions_ms: tuple[float, ...]
    inside: bool
    """Whether this round would have met the budget by the verdict's rule."""
    accept: float
    """How far inside the limit the judged latency has to be, as a share of it."""
    kinds: tuple[KindFactor, ...] = ()
    """What the profile of its kernels says about the prices of single kinds."""

    @property
    def judged_ms(self) -> float:
        """What is compared with the limit: the original's latency over the ratio."""
        return self.unit_ms / self.slowest_ratio

    @property
    def predicted_ratio(self) -> float:
        """How many times faster than the original it was predicted to be."""
        return self.unit_ms / self.predicted_ms

    @property
    def fits(self) -> bool:
        """Whether the measured latency is safely inside the limit."""
        return self.judged_ms <= self.accept * self.limit_ms

    @property
    def possible(self) -> bool:
        """Whether the measured latency is inside the limit at all."""
        return self.fits or self.inside

    @property
    def reachable_ms(self) -> float:
        """The latency that is claimed to be within reach: the upper end of the interval, for other occasions too."""
        return self.measured_interval_ms[1] * math.exp(SURE * OCCASION_SPREAD)

    @property
    def reachable_ratio(self) -> float:
        """How many times faster than the original is claimed to be within reach: the lower end, likewise."""
        return self.ratio_interval[0] * math.exp(-SURE * OCCASION_SPREAD)


def accept(sessions: Sequence[float], earlier: Sequence[RoundResult]) -> float:
    """The share of the limit at which a round is accepted, from how well paired ratios repeat.

    The verdict is passed where its own ratio, less the half width of its interval, keeps the limit. Its ratio differs
    from the round's by the spread of two occasions and of the sessions of both. `sessions` are the ratios of this
    round's sessions.
    """
    spread = session_spread([sessions, *(result.session_ratios for result in earlier)])
    half, count = _verdict(spread)
    apart = math.sqrt(2 * OCCASION_SPREAD**2 + spread**2 * (1 / len(sessions) + 1 / count))
    return max(LEAST_ACCEPT, math.exp(-SURE * apart - half))


def session_spread(groups: Sequence[Sequence[float]]) -> float:
    """Standard deviation of the logarithms of a session's ratio: what is known of shared machines, and what the
    sessions of this run (a group for each plan) show."""
    squares, free = KNOWN * SESSION_SPREAD**2, float(KNOWN)
    for ratios in groups:
        logs = [math.log(ratio) for ratio in ratios]
        middle = sum(logs) / len(logs)
        squares += sum((value - middle) ** 2 for value in logs)
        free += len(logs) - 1
    return math.sqrt(squares / free)


def _verdict(spread: float) -> tuple[float, int]:
    """The half width of the last measurement's interval (in logarithms), and the sessions that it will take."""
    from scipy.special import stdtrit

    for count in range(VERDICT.least, VERDICT.most + 1):
        half = float(stdtrit(count - 1, (1 + bench.LEVEL) / 2)) * spread / math.sqrt(count)
        if half <= VERDICT.within:
            break
    return max(half, VERDICT.within), count


def original_now_ms(first: Sequence[float], rounds: Sequence[Sequence[float]]) -> float:
    """The original's latency on the machine as it is: the upper end of the interval over all sessions of this run.

    `first` are the samples of the first session, `rounds` the medians of later ones. A budget in milliseconds has to
    hold at the speed that the machine turns out to have.
    """
    return median_interval([[median(first)], *([ms] for sessions in rounds for ms in sessions)], level=bench.LEVEL)[1]
