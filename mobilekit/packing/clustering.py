"""One-dimensional k-means: weights that share few values, after Han, Mao, Dally 2016 (arXiv:1510.00149, section 3).

Values are sorted once. A cluster of sorted values is a range, its sum a difference of prefix sums, and so a round of
Lloyd's algorithm costs one binary search for each cluster, however many values there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from mobilekit.errors import BadInputError
from mobilekit.packing.lloyd import SortedValues, lloyd, thresholds
from mobilekit.packing.optimum import optimal

Start = Literal["quantile", "linear", "density", "gaussian"]
MOST = 1 << 16
"""Clusters: codes are at most 16 bits wide."""
PEAK = 1e150
"""Largest magnitude: squares of larger ones leave float64."""
EXACT_POINTS = 2048
EXACT_WORK = 1 << 27
"""Within both, dynamic programming takes about a second: at most so many distinct values, their square times k."""
CHUNK = 1 << 16
"""Values that are assigned at a time: what is computed in between stays in the cache."""
CELLS = 1 << 14


@dataclass(frozen=True)
class Codebook:
    """Values replaced by the nearest of few centroids."""

    centroids: np.ndarray
    """(k,), ascending; float64 where the values were, else float32. k is less than asked where fewer values differ."""
    codes: np.ndarray
    """Index of each value's centroid, in the shape of the values; uint8 for up to 256 centroids, else uint16."""
    distortion: float
    """Mean squared error of what is restored, in the values' unit squared."""
    exact: bool
    """True where no other centroids have less distortion, but for rounding; else a local optimum of Lloyd's."""

    def restored(self) -> np.ndarray:
        """Each value's centroid, in the shape of the values."""
        return np.asarray(self.centroids[self.codes])


def cluster(values: np.ndarray, count: int, start: Start = "density", *, keep_zero: bool = False) -> Codebook:
    """Cluster numbers of any shape into at most `count` values with the least mean squared error.

    Few distinct values are clustered to the optimum, by dynamic programming. For more, Lloyd's algorithm runs on all
    values; where it rests, centroids are moved from where they are missed least to where they help most, as long as
    that lowers the error, so that the start changes little. It begins with

    * "quantile": equally many values each (what Han et al. call density-based);
    * "linear": evenly spaced from the least to the greatest value, which Han et al. found best for accuracy;
    * "density": as dense as the cube root of the values' density, best for many clusters (Panter and Dite 1951);
    * "gaussian": the same for a normal distribution of the values' mean and deviation, whatever they are.

    With `keep_zero`, values that are zero (pruned weights) stay exactly zero and no others become zero by sharing their
    centroid. float16 and float32 are clustered as float32, everything else as float64. Raises BadInputError for no
    values, NaN, infinity, numbers beyond 1e150, an unknown start, or a count that is not between 1 and 65536 (2 with
    `keep_zero`, where there are zeros and others).

    >>> import numpy as np
    >>> book = cluster(np.array([0.0, 0.1, 0.9, 1.0]), 2)
    >>> book.centroids.round(2).tolist(), book.codes.tolist(), round(book.distortion, 4)
    ([0.05, 0.95], [0, 0, 1, 1], 0.0025)
    """
    array = _numbers(values)
    if not 1 <= count <= MOST:
        raise BadInputError(f"the number of clusters is between 1 and {MOST}, not {count}")
    if start not in get_args(Start):
        raise BadInputError(f"'{start}' is no start of clustering: give {', '.join(get_args(Start))}")
    flat = array.ravel()
    ordered = np.sort(flat)
    if not max(-float(ordered[0]), float(ordered[-1])) <= PEAK or np.isnan(ordered[-1]):  # NaN is sorted to the end
        raise BadInputError("values to cluster must be finite, and their squares too")
    first, last = (np.searchsorted(ordered, array.dtype.type(0), side=side) for side in ("left", "right"))
    if not keep_zero or first == last:
        centroids, exact = _centroids(ordered, count, start)
        codes, distortion = _assigned(flat, centroids.astype(array.dtype))
        return Codebook(centroids.astype(array.dtype), codes.reshape(array.shape), distortion, exact)
    others = np.concatenate([ordered[:first], ordered[last:]])
    if len(others) and count < 2:
        raise BadInputError("zeros that are kept need a cluster of their own: give at least 2 clusters")
    return _with_zero(array, others, count, start)


def _numbers(values: np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise BadInputError(f"values to cluster are real numbers, not {array.dtype}")
    if not array.size:
        raise BadInputError("there are no values to cluster")
    small = array.dtype.kind == "f" and array.dtype.itemsize <= 4
    return array.astype(np.float32 if small else np.float64, copy=False)


def _with_zero(array: np.ndarray, others: np.ndarray, count: int, start: Start) -> Codebook:
    """Zero as a centroid of its own, and `count - 1` clusters for the sorted values that are not zero."""
    zero = array.dtype.type(0)
    if not len(others):
        return Codebook(np.array([zero]), np.zeros(array.shape, np.uint8), 0.0, exact=True)
    found, exact = _centroids(others, count - 1, start)
    centroids = found.astype(array.dtype)
    place = int(np.searchsorted(centroids, zero))
    flat = array.ravel()
    codes, _ = _assigned(flat, centroids)
    codes = codes.astype(np.uint8 if len(centroids) < 256 else np.uint16, copy=False)
    codes[codes >= place] += 1
    codes[flat == 0] = place
    centroids = np.insert(centroids, place, zero)
    distortion = _squared_error(flat, centroids, codes) / len(flat)
    return Codebook(centroids, codes.reshape(array.shape), distortion, exact)


def _centroids(ordered: np.ndarray, count: int, start: Start) -> tuple[np.ndarray, bool]:
    """Ascending float64 centroids of sorted values, and whether they are optimal."""
    differs = ordered[1:] != ordered[:-1]
    distinct = 1 + int(np.count_nonzero(differs))
    if distinct > count and (distinct > EXACT_POINTS or distinct**2 * count > EXACT_WORK):
        return lloyd(SortedValues(ordered), count, start), False
    firsts = np.concatenate([[0], np.flatnonzero(differs) + 1])
    points = ordered[firsts].astype(np.float64)
    if distinct <= count:
        return points, True
    return optimal(points, np.diff(np.append(firsts, len(ordered))), count), True


# ---------------------------------------------------------------- assigning


def _assigned(flat: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, float]:
    """Index of the nearest centroid of each value (the lower one of two as near), and the mean squared error.

    The range of the borders is cut into equal cells. Where no border lies in a value's cell, the cell says its cluster;
    a search is needed only in the others. The cell is the same rounded, monotone function for borders and values: a
    border in a lower cell is lower than the value.
    """
    borders = thresholds(centroids.astype(np.float64), flat.dtype)
    codes = np.zeros(len(flat), np.uint8 if len(centroids) <= 256 else np.uint16)
    if len(borders):
        span = float(borders[-1]) - float(borders[0])
        scale = flat.dtype.type(1 if span < 1e-25 else CELLS / span)
        places = _cells(borders, borders[0], scale)
        below = np.searchsorted(places, np.arange(CELLS)).astype(codes.dtype)
        crossed = np.zeros(CELLS, bool)
        crossed[places] = True
        for begin in range(0, len(flat), CHUNK):
            chunk = flat[begin : begin + CHUNK]
            cells = _cells(chunk, borders[0], scale)
            own = below[cells]
            unsure = np.flatnonzero(crossed[cells])
            own[unsure] = np.searchsorted(borders, chunk[unsure])
            codes[begin : begin + CHUNK] = own
    return codes, _squared_error(flat, centroids, codes) / len(flat)


def _cells(values: np.ndarray, low: np.floating, scale: np.floating) -> np.ndarray:
    with np.errstate(over="ignore"):
        shifted = (values - low) * scale
    return np.asarray(np.clip(shifted, 0, CELLS - 1, out=shifted), np.intp)


def _squared_error(flat: np.ndarray, centroids: np.ndarray, codes: np.ndarray) -> float:
    total, exactly = 0.0, centroids.astype(np.float64)
    for begin in range(0, len(flat), CHUNK):
        off = flat[begin : begin + CHUNK] - exactly[codes[begin : begin + CHUNK]]
        total += float(off @ off)
    return total
