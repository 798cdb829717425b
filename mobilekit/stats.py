"""The statistics that are computed from raw samples; phones and boards only send samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

RESAMPLES = 500
SEPARATION = 4.0
SMALLER_SHARE = 0.1
APART = 1.1


def median(samples: Sequence[float]) -> float:
    """Middle value. Raises ValueError for no samples.

    >>> median([3.0, 1.0, 2.0])
    2.0
    """
    return percentile(samples, 50)


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100, linear interpolation). Raises ValueError for no samples."""
    if not len(samples):
        raise ValueError("no samples")
    return float(np.percentile(np.asarray(samples, dtype=np.float64), q))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of numerator/denominator: what moves both in a round cancels.

    >>> paired_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    2.0
    """
    return float(np.median(ratios(numerator, denominator)))


def spread(values: Sequence[float]) -> float:
    """By how much the largest value is above the smallest, as a share. Raises ValueError for none.

    >>> spread([2.0, 2.1, 2.05])
    0.05
    """
    if not len(values):
        raise ValueError("no values")
    return round(max(values) / min(values) - 1, 12) if min(values) > 0 else 0.0


def median_interval(sessions: Sequence[Sequence[float]], level: float = 0.9, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the median of samples that were taken in several sessions.

    Sessions differ (a process lays out its memory anew, the machine has another neighbour), and within one neighbouring
    rounds share disturbances: sessions are drawn with replacement, and in each of them blocks of rounds (moving-block
    bootstrap, Kuensch 1989). A bootstrap of few sessions is too narrow (Hesterberg 2014, arXiv:1411.5279, on the
    narrowness bias and t quantiles): its deviations are widened by sqrt(n / (n - 1)) and by Student's t with n - 1
    degrees of freedom over the normal quantile. One session says nothing about another one: its interval holds for
    itself alone. Raises ValueError for no samples.

    >>> median_interval([[2.0] * 20, [2.0] * 20])
    (2.0, 2.0)
    """
    drawn = [np.asarray(session, dtype=np.float64) for session in sessions if len(session)]
    medians = resampled_medians(sessions, np.random.default_rng(seed))
    tail = (1 - level) / 2
    low, high = (float(end) for end in np.quantile(medians, [tail, 1 - tail]))
    middle, wider = float(np.median(np.concatenate(drawn))), widening(len(drawn), level)
    if not (low > 0 and wider > 1):
        return low, high
    return middle * (low / middle) ** wider, middle * (high / middle) ** wider


def resampled_medians(sessions: Sequence[Sequence[float]], generator: np.random.Generator) -> np.ndarray:
    """Medians of samples drawn again as in `median_interval`, not widened yet. Raises ValueError for no samples."""
    drawn = [np.asarray(session, dtype=np.float64) for session in sessions if len(session)]
    if not drawn:
        raise ValueError("no samples")
    chosen = generator.integers(0, len(drawn), size=(RESAMPLES, len(drawn)))
    again = [_in_blocks(session, generator) for session in drawn]
    return np.asarray([np.median(np.concatenate([next(again[i]) for i in row])) for row in chosen])


def _in_blocks(samples: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """As many samples, in blocks of neighbours that are drawn with replacement, again and again."""
    count = len(samples)
    block = max(1, round(count ** (1 / 3)))
    while True:  # many at once: one by one takes ten times as long
        starts = generator.integers(0, count - block + 1, size=(64, -(-count // block)))
        yield from samples[(starts[:, :, None] + np.arange(block)).reshape(64, -1)[:, :count]]


def widening(sessions: int, level: float) -> float:
    """Factor on the deviations of a bootstrap of so many sessions; 1 for one, which says nothing about others."""
    if sessions == 1:
        return 1.0
    from scipy.special import ndtri, stdtrit

    upper = (1 + level) / 2
    return float(stdtrit(sessions - 1, upper) / ndtri(upper)) * math.sqrt(sessions / (sessions - 1))


def two_modes(samples: Sequence[float]) -> tuple[float, float, float] | None:
    """Medians of the fast and the slow mode and the share of the fast one, or None for one mode.

    The logarithms are cut in two where the variance between the parts is largest (Otsu 1979). They are two modes when
    the parts' distance in units of their spread, Ashman's D (Ashman, Bird and Zepf 1994), exceeds 4: cutting one
    normal distribution gives 2.7, an exponential 2.6 and a uniform one 3.5. Parts under a tenth of the samples are
    outliers, and modes less than 10 % apart do not matter.

    >>> two_modes([1.0, 1.01, 0.99] * 10 + [2.0, 2.02, 1.98] * 10)
    (1.0, 2.0, 0.5)
    >>> two_modes([1.0, 1.01, 0.99] * 20) is None
    True
    """
    count = len(samples)
    least = max(2, math.ceil(SMALLER_SHARE * count))
    if count < 2 * least or min(samples) <= 0:
        return None
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    logs = np.log(ordered)
    cuts = np.arange(1, count)
    below = np.cumsum(logs)[:-1] / cuts
    above = (logs.sum() - np.cumsum(logs)[:-1]) / (count - cuts)
    between = cuts * (count - cuts) * (above - below) ** 2
    # Only cuts that leave a tenth on both sides: else a few outliers would decide where to cut.
    cut = least + int(np.argmax(between[least - 1 : count - least]))
    fast, slow = logs[:cut], logs[cut:]
    spread = math.sqrt(float(fast.var() + slow.var()))
    distance = float(slow.mean() - fast.mean())
    if distance < math.log(APART) or math.sqrt(2) * distance <= SEPARATION * spread:
        return None
    return float(np.median(ordered[:cut])), float(np.median(ordered[cut:])), cut / count


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> np.ndarray:
    """Numerator over denominator, round by round. Raises ValueError for samples that do not pair."""
    if len(numerator) != len(denominator) or not len(numerator):
        raise ValueError(f"paired samples differ in number: {len(numerator)} and {len(denominator)}")
    return np.asarray(numerator, dtype=np.float64) / np.asarray(denominator, dtype=np.float64)
