"""Whether one set of timings is faster than another, where samples follow one another and come in sessions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mobilekit.stats import resampled_medians, widening

Sessions = Sequence[Sequence[float]]
"""Samples of each session in the order in which they were taken."""
Verdict = Literal["faster", "slower", "no difference shown"]
Unit = Literal["sessions", "blocks"]
ThresholdBasis = Literal["least", "sessions", "one session", "within"]
"""What nobody needs to know; how well sessions repeat; what is taken where there are too few to see that; how restless
the machine was within one."""

LEVEL = 0.9
"""Of the interval."""
ALPHA = 0.05
"""Of the rank test."""
LEAST_SESSIONS = 4
"""On both sides, for a test over sessions: of fewer, no arrangement of ranks is rarer than ALPHA."""
MOST_BLOCKS = 20
"""Of one session."""
BLOCK_TIMES = 2.0
"""Length of a block in autocorrelation times: medians of neighbouring blocks then share little."""
LEAST_DIFFERENCE = 0.02
"""What nobody needs to know, and what the layout of a process's memory alone can do."""
ONE_SESSION = 0.1
"""Where there are too few sessions to see how well they repeat. The medians of one network in nine sessions of 5 s on a
shared host ranged over 9 %, and one of them alone lay 8 % above the middle of the others."""
REPEATABILITY = 1.96
"""Normal quantile of the critical difference between two means of repeats (ISO 5725-6: 95 %)."""


@dataclass(frozen=True)
class Judgement:
    """What two sets of samples say about each other."""

    ratio: float
    """First median over second: 2 means that the second takes half the time."""
    interval: tuple[float, float]
    """Of the ratio, at LEVEL."""
    p_value: float | None
    """Of the two-sided rank test; None: too few units for it."""
    unit: Unit
    units: tuple[int, int]
    """How many medians were ranked on either side."""
    threshold: float
    """Relative difference below which nothing is said."""
    threshold_basis: ThresholdBasis

    @property
    def verdict(self) -> Verdict:
        """What is said of the second set: only what the test, the interval and the threshold all say."""
        shown = self.p_value is not None and self.p_value < ALPHA and abs(math.log(self.ratio)) > self._margin
        if shown and self.interval[0] > 1:
            return "faster"
        return "slower" if shown and self.interval[1] < 1 else "no difference shown"

    @property
    def _margin(self) -> float:
        return math.log1p(self.threshold)


def judge(first: Sessions, second: Sessions) -> Judgement:
    """Relate the timings of two sets of sessions. Swapping the sets swaps the judgement.

    Raises ValueError for no samples, and for medians that are not above zero.

    >>> same = [[1.0, 1.1, 1.0, 1.05] * 25]
    >>> judge(same, same).verdict
    'no difference shown'
    """
    sides = [_cleaned(first), _cleaned(second)]
    swapped = _key(sides[1]) < _key(sides[0])  # one order for both ways of asking: the bootstrap draws alike
    if swapped:
        sides.reverse()
    middles = [float(np.median(np.concatenate(side))) for side in sides]
    if not all(middle > 0 for middle in middles):
        raise ValueError("the clock is too coarse for these samples: their median is not above zero")
    interval = _interval(sides[0], sides[1], math.log(middles[0] / middles[1]))
    ratio = middles[0] / middles[1]
    p_value, unit, units = _rank_test(sides[0], sides[1])
    threshold, basis = _threshold(sides[0], sides[1])
    if swapped:
        ratio, interval, units = 1 / ratio, (1 / interval[1], 1 / interval[0]), (units[1], units[0])
    return Judgement(ratio, interval, p_value, unit, units, threshold, basis)


def _cleaned(sessions: Sessions) -> list[np.ndarray]:
    found = [np.asarray(session, dtype=np.float64) for session in sessions if len(session)]
    if not found:
        raise ValueError("no samples")
    return found


def _key(sessions: list[np.ndarray]) -> tuple[int, bytes]:
    return len(sessions), np.concatenate(sessions).tobytes()


def _interval(first: list[np.ndarray], second: list[np.ndarray], middle: float) -> tuple[float, float]:
    """Bootstrap interval of the ratio of medians: both sides are drawn again, each by itself."""
    generator = np.random.default_rng(0)
    drawn = [resampled_medians([s.tolist() for s in side], generator) for side in (first, second)]
    if not all(bool((side > 0).all()) for side in drawn):
        return 0.0, math.inf
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.log(drawn[0]) - np.log(drawn[1]), [tail, 1 - tail])
    wider = max(widening(len(side), LEVEL) for side in (first, second))
    ends = (math.exp(middle + wider * (float(end) - middle)) for end in (low, high))
    return next(ends), next(ends)


# ---------------------------------------------------------------- the rank test


def _rank_test(first: list[np.ndarray], second: list[np.ndarray]) -> tuple[float | None, Unit, tuple[int, int]]:
    """Mann-Whitney U over medians that know little of each other: of sessions, else of blocks within them."""
    from scipy.stats import mannwhitneyu

    unit: Unit = "sessions" if min(len(first), len(second)) >= LEAST_SESSIONS else "blocks"
    if unit == "sessions":
        units = [[float(np.median(session)) for session in side] for side in (first, second)]
    else:
        units = [[m for session in side for m in block_medians(session)] for side in (first, second)]
    counts = len(units[0]), len(units[1])
    if min(counts) < LEAST_SESSIONS:
        return None, unit, counts
    return float(mannwhitneyu(*units, alternative="two-sided").pvalue), unit, counts


def block_medians(samples: Sequence[float] | np.ndarray) -> list[float]:
    """Medians of stretches of consecutive samples, so long that neighbouring ones hardly know of each other.

    >>> block_medians([1.0, 2.0, 3.0] * 20)[:2]
    [2.0, 2.0]
    """
    values = np.asarray(samples, dtype=np.float64)
    length = max(math.ceil(len(values) / MOST_BLOCKS), math.ceil(BLOCK_TIMES * autocorrelation_time(values)))
    count = max(1, len(values) // length)
    return [float(np.median(part)) for part in np.array_split(values, count)]


def autocorrelation_time(samples: Sequence[float] | np.ndarray) -> float:
    """How many consecutive samples say as much as one: 1 for independent ones.

    Of their ranks, since single slow runs are no trend; summed up to five times itself (Sokal 1997, Monte Carlo methods
    in statistical mechanics, on self-consistent windows).
    """
    from scipy.stats import rankdata

    ranks = rankdata(np.asarray(samples, dtype=np.float64))
    centred = ranks - ranks.mean()
    count = len(centred)
    if count < 4 or not centred.any():
        return 1.0
    spectrum = np.fft.rfft(centred, 2 * count)
    covariance = np.fft.irfft(spectrum * np.conj(spectrum))[:count]
    times = 2 * np.cumsum(covariance / covariance[0]) - 1
    windows = np.arange(count) >= 5 * times
    end = int(np.argmax(windows)) if windows.any() else count - 1
    return max(1.0, float(times[end]))


# ---------------------------------------------------------------- what counts as a difference


def _threshold(first: list[np.ndarray], second: list[np.ndarray]) -> tuple[float, ThresholdBasis]:
    """The critical difference of the sessions' medians, where there are enough of them to know it.

    Of fewer, what the machine did within a session may be all that sets it apart from the next one: the quartiles of
    the more restless side have to be closer to each other than the two medians are.
    """
    medians = [np.log([max(float(np.median(s)), 1e-12) for s in side]) for side in (first, second)]
    freedom = sum(len(side) - 1 for side in medians)
    squares = sum(float(((side - side.mean()) ** 2).sum()) for side in medians)
    spread = math.sqrt(squares / freedom) if freedom else 0.0
    known: dict[ThresholdBasis, float] = {
        "sessions": math.expm1(REPEATABILITY * spread * math.sqrt(sum(1 / len(side) for side in medians)))
    }
    if min(len(side) for side in medians) < LEAST_SESSIONS:
        known |= {"one session": ONE_SESSION, "within": max(_restlessness(side) for side in (first, second))}
    else:
        known["least"] = LEAST_DIFFERENCE
    basis = max(known, key=lambda name: known[name])
    return known[basis], basis


def _restlessness(sessions: list[np.ndarray]) -> float:
    """How far the upper quartile of all samples lies above the lower one."""
    low, high = np.percentile(np.concatenate(sessions), [25, 75])
    return float(high / low) - 1 if low > 0 else math.inf
