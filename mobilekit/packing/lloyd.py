"""Lloyd's algorithm on sorted numbers through prefix sums, and the moves that free it from poor local optima."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from mobilekit.packing.optimum import optimal

ROUNDS = 400
BRIEF = 12
"""Rounds after a cluster has moved: its neighbours settle, the rest hardly changes."""
TOLERANCE = 1e-6
PATIENCE = 8
"""Rounds end where so many in turn lower the error by less than this share of it."""
WORTH = 1e-5
"""Centroids move where that lowers the error by more than this share of it."""
EVEN = 8
"""Merging two clusters alike costs 6 times the error of one, halving one gains 3/4 of it: so where all errors are
equal, and nothing is to be gained once the neighbours have settled."""
KNOTS = 4096
"""Ranks at which the values' density is taken."""
FEW = 32
RANGES = 1024
CHUNK = 1 << 16


def thresholds(centroids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Borders (k - 1,) between ascending float64 centroids (k,): a value above border i is nearer to i + 1.

    They are rounded down to the values' type, which changes no comparison with values of that type.
    """
    middle = centroids[:-1] + (centroids[1:] - centroids[:-1]) / 2
    return _floor(middle, dtype)


def _floor(numbers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    rounded = numbers.astype(dtype)
    return np.where(rounded > numbers, np.nextafter(rounded, dtype.type(-np.inf)), rounded)


class SortedValues:
    """Ascending finite numbers of one type with what Lloyd's algorithm asks of them."""

    def __init__(self, ordered: np.ndarray) -> None:
        self.ordered = ordered
        self.prefix = np.zeros(len(ordered) + 1)
        np.cumsum(ordered, dtype=np.float64, out=self.prefix[1:])
        self.mean = float(self.prefix[-1]) / len(ordered)
        self.scatter = 0.0
        """Sum of squared distances from the mean."""
        for begin in range(0, len(ordered), CHUNK):
            off = ordered[begin : begin + CHUNK] - np.float64(self.mean)
            self.scatter += float(off @ off)

    def edges(self, centroids: np.ndarray) -> np.ndarray:
        """(k + 1,): the values of cluster j are those from edges[j] to edges[j + 1] - 1."""
        inner = np.searchsorted(self.ordered, thresholds(centroids, self.ordered.dtype), side="right")
        return np.concatenate([[0], inner, [len(self.ordered)]])

    def means(self, begin: np.ndarray, end: np.ndarray, empty: np.ndarray) -> np.ndarray:
        """Means of ranges; the number in `empty` for a range without values."""
        counts = end - begin
        return np.where(counts > 0, (self.prefix[end] - self.prefix[begin]) / np.maximum(counts, 1), empty)


def lloyd(values: SortedValues, count: int, start: str) -> np.ndarray:
    """Ascending centroids (count,) of sorted values, more than `count` of them distinct, from a named start.

    Where Lloyd's algorithm rests, centroids are tried elsewhere: many at first, fewer where that does not help. Few
    centroids are compared with the optimum for the means of a thousand ranges of the values.
    """
    centroids, error = _settled(values, _start(values, count, start), ROUNDS)
    moves = max(1, count // 4)
    while moves:
        tried, reached = _settled(values, _moved(values, centroids, moves), BRIEF)
        if reached < error * (1 - WORTH):
            centroids, error = tried, reached
        else:
            moves //= 2
    centroids, error = _settled(values, centroids, ROUNDS)
    if count <= FEW:
        other, reached = _settled(values, _optimal_for_ranges(values, count), ROUNDS)
        centroids = other if reached < error else centroids
    return centroids


def _optimal_for_ranges(values: SortedValues, count: int) -> np.ndarray:
    """Optimal centroids of the means of ranges: half of them of equal length, half with equally many values."""
    ordered = values.ordered
    even = np.linspace(0, len(ordered), RANGES // 2 + 1).astype(np.intp)
    grid = _floor(np.linspace(float(ordered[0]), float(ordered[-1]), RANGES // 2), ordered.dtype)
    edges = np.union1d(even, np.searchsorted(ordered, grid))
    means = values.means(edges[:-1], edges[1:], np.zeros(len(edges) - 1))
    return optimal(means, np.diff(edges), count)


def _start(values: SortedValues, count: int, start: str) -> np.ndarray:
    ordered = values.ordered
    shares = (np.arange(count) + 0.5) / count
    low, high = float(ordered[0]), float(ordered[-1])
    if start == "linear":
        return np.linspace(low, high, count)
    if start == "quantile":
        return np.asarray(ordered[(shares * len(ordered)).astype(np.intp)], np.float64)
    if start == "gaussian":
        # the cube root of a normal density is, but for a factor, a normal density of three times the variance
        normal = NormalDist(values.mean, (3 * values.scatter / len(ordered)) ** 0.5)
        return np.clip(np.array([normal.inv_cdf(float(share)) for share in shares]), low, high)
    knots = ordered[np.linspace(0, len(ordered) - 1, KNOTS).astype(np.intp)].astype(np.float64)
    # between two knots lie equally many values: their density is 1 / gap, its cube root times the gap is gap^(2/3)
    grown = np.concatenate([[0.0], np.cumsum(np.diff(knots) ** (2 / 3))])
    return np.asarray(np.interp(shares * grown[-1], grown, knots))


def _settled(values: SortedValues, centroids: np.ndarray, rounds: int) -> tuple[np.ndarray, float]:
    """Rounds of Lloyd's algorithm until the error hardly falls: ascending centroids, and their squared error.

    Plain rounds pass a lack of centroids on from neighbour to neighbour and take the square of their number to even it
    out. So a round begins ahead of where the last one led (Nesterov's momentum), and at rest again where that did harm.
    """
    ahead, error, steps, slow = centroids, np.inf, 0, 0
    for _ in range(rounds):
        edges = values.edges(ahead)
        found = values.means(edges[:-1], edges[1:], ahead)
        reached = values.scatter - float(np.diff(edges) @ (found - values.mean) ** 2)
        if reached > error:
            if not steps:
                break
            ahead, steps = centroids, 0
            continue
        slow = slow + 1 if error - reached <= TOLERANCE * reached else 0
        step, centroids, error, steps = found - centroids, found, reached, steps + 1
        if slow == PATIENCE:
            break
        ahead = np.sort(centroids + steps / (steps + 3) * step)
    return centroids, error


def _moved(values: SortedValues, centroids: np.ndarray, moves: int) -> np.ndarray:
    """Ascending centroids with up to `moves` pairs of neighbours merged and as many clusters halved at their means.

    Merged are those that differ least, halved those that gain most by it.
    """
    edges = values.edges(centroids)
    begin, end = edges[:-1], edges[1:]
    means = values.means(begin, end, centroids)
    middle = np.searchsorted(values.ordered, _floor(means, values.ordered.dtype), side="right")
    middle = np.clip(middle, begin, end)
    left, right = values.means(begin, middle, means), values.means(middle, end, means)
    gain = _apart(middle - begin, end - middle, right - left)
    cost = _apart(end[:-1] - begin[:-1], end[1:] - begin[1:], np.diff(means))
    free = np.ones(len(means), bool)
    halved: list[int] = []
    merged: list[int] = []
    richest = iter(np.argsort(-gain))
    for pair in np.argsort(cost):
        if len(merged) == moves:
            break
        if not (free[pair] and free[pair + 1]):
            continue
        free[[pair, pair + 1]] = False
        best = next((j for j in richest if free[j] and gain[j] > 0), None)
        if best is None or EVEN * gain[best] <= cost[pair]:
            break
        free[best] = False
        merged.append(pair)
        halved.append(best)
    pairs = np.array(merged, np.intp)
    together = values.means(begin[pairs], end[pairs + 1], means[pairs])
    kept = np.delete(means, np.concatenate([pairs, pairs + 1, np.array(halved, np.intp)]))
    return np.sort(np.concatenate([kept, together, left[halved], right[halved]]))


def _apart(first: np.ndarray, second: np.ndarray, distance: np.ndarray) -> np.ndarray:
    return np.asarray(first * (second / np.maximum(first + second, 1)) * distance**2)
