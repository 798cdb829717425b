"""Clusters of least error of few points on a line, by dynamic programming over ranges.

Wang and Song 2011, "Ckmeans.1d.dp: optimal k-means clustering in one dimension by dynamic programming", The R Journal
3(2).
"""

from __future__ import annotations

import numpy as np


def optimal(points: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Ascending centroids (count,) of least squared error of ascending points with weights, both (n,), n > count.

    Takes n^2 count steps and memory for two matrices of n^2 float64.
    """
    total = len(points)
    centred = points - np.average(points, weights=weights)
    mass, sums, squares = (
        np.concatenate([[0.0], np.cumsum(weights * power)]) for power in (1.0, centred, centred * centred)
    )
    begin, end = np.arange(total)[None, :], np.arange(1, total + 1)[:, None]
    inside = begin < end
    held = np.where(inside, mass[end] - mass[begin], 1.0)
    error = squares[end] - squares[begin] - (sums[end] - sums[begin]) ** 2 / held
    error = np.where(inside, np.maximum(error, 0.0), np.inf)
    # best[j]: least error of the points up to j in so many clusters; the last of them begins at choice[j]
    best, choices = error[:, 0], []
    for _ in range(count - 1):
        candidates = error + np.concatenate([[np.inf], best[:-1]])
        choice = candidates.argmin(axis=1)
        best = candidates[np.arange(total), choice]
        choices.append(choice)
    edges = [total]
    for choice in reversed(choices):
        edges.append(int(choice[edges[-1] - 1]))
    cuts = np.array([*edges, 0][::-1])
    return np.add.reduceat(weights * points, cuts[:-1]) / np.diff(mass[cuts])
