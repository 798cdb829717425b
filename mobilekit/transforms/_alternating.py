"""CP decomposition of a convolution's kernel by alternating least squares. numpy only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.linalg import cho_factor, cho_solve

STARTS = 4
"""One from singular vectors, the others from fixed random numbers."""
TRIAL_SWEEPS, FINAL_SWEEPS = (4, 20), (8, 200)
"""Fewest and most sweeps of each start, and of the best one afterwards."""
WORK = 10**10
"""Multiply-accumulates that one kernel may take: sweeps are counted from it, so that machines agree."""
FIRST_PENALTY, LEAST_PENALTY, DECAY = 1e-2, 1e-6, 0.7
"""Weight of the terms' squared norms beside the squared relative error; falls from sweep to sweep."""

Factors = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def cp(kernel: np.ndarray, rank: int) -> Factors:
    """Factors (N, rank), (C, rank), (kh, rank), (kw, rank) whose outer products add up to the kernel, nearly.

    Lebedev et al. 2015, arXiv:1412.6553. There need not be a best CP approximation: terms that cancel each other can
    grow without bound while the error falls (de Silva and Lim 2008, arXiv:math/0607647). So the terms' norms are
    penalised, less from sweep to sweep and never not at all, and of several starts the one with the least penalised
    error is followed to the end. Deterministic. Each term's norm is spread evenly over its four factors.
    """
    scale = float(np.linalg.norm(kernel))
    if scale == 0:
        n, c, height, width = (np.zeros((size, rank)) for size in kernel.shape)
        return n, c, height, width
    tensor = kernel.astype(np.float64) / scale
    sweeps = WORK // (2 * kernel.size * rank + 4 * rank**2 * sum(kernel.shape) + 2 * rank**3)
    trials, rest = (int(np.clip(sweeps // part, *ends)) for part, ends in ((8, TRIAL_SWEEPS), (2, FINAL_SWEEPS)))
    tried = [_swept(tensor, start, 0, trials) for start in _starts(tensor, rank)]
    found = min(tried, key=lambda factors: _objective(tensor, factors))
    a, b, rows, columns = _swept(tensor, found, trials, rest)
    norms = np.linalg.norm(a, axis=0)
    even = (scale * norms) ** 0.25
    return a / np.where(norms > 0, norms, 1) * even, b * even, rows * even, columns * even


def relative_error(kernel: np.ndarray, factors: Factors) -> float:
    """Norm of what the factors miss, relative to the kernel's."""
    missed = kernel - np.einsum("nr,cr,hr,wr->nchw", *factors, optimize=True)
    return float(np.linalg.norm(missed) / np.linalg.norm(kernel))


def _starts(tensor: np.ndarray, rank: int) -> Iterator[Factors]:
    """Leading singular vectors of each unfolding, filled up with random columns; then random columns alone."""
    for start in range(STARTS):
        random = np.random.default_rng(start)
        a, b, rows, columns = (random.standard_normal((size, rank)) for size in tensor.shape)
        for axis, factor in enumerate((a, b, rows, columns) if start == 0 else ()):
            unfolded = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
            vectors = np.linalg.eigh(unfolded @ unfolded.T)[1][:, ::-1]
            factor[:, : min(rank, len(factor))] = vectors[:, :rank]
        yield a, _unit(b), _unit(rows), _unit(columns)


def _swept(tensor: np.ndarray, factors: Factors, first: int, count: int) -> Factors:
    """Sweeps of alternating least squares, each factor in turn; `first` of them have been made before.

    The factor at hand carries the terms' norms and the others have columns of norm 1, so that the penalty is the same
    sum in every update. Each sweep passes over the kernel twice: once contracted with the inputs' factor, which
    serves three of the updates, and once with the outputs'. The result has the norms in the first factor.
    """
    outputs, inputs, height, width = tensor.shape
    by_input = np.ascontiguousarray(tensor.transpose(0, 2, 3, 1)).reshape(-1, inputs)
    by_output = np.ascontiguousarray(tensor.transpose(1, 2, 3, 0)).reshape(-1, outputs)
    a, b, rows, columns = factors
    for sweep in range(first, first + count):
        penalty = max(LEAST_PENALTY, FIRST_PENALTY * DECAY**sweep)
        met = (by_output @ _unit(a)).reshape(inputs, height * width, -1)
        b = _unit(_solved(_met(met, rows, columns), (_unit(a), rows, columns), penalty))
        met = (by_input @ b).reshape(outputs, height * width, -1)
        a = _unit(_solved(_met(met, rows, columns), (b, rows, columns), penalty))
        taps = np.einsum("npr,nr->pr", met, a).reshape(height, width, -1)
        rows = _unit(_solved(np.einsum("hwr,wr->hr", taps, columns), (a, b, columns), penalty))
        columns = _unit(_solved(np.einsum("hwr,hr->wr", taps, rows), (a, b, rows), penalty))
        a = _solved(_met(met, rows, columns), (b, rows, columns), penalty)
    return a, b, rows, columns


def _met(met: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The kernel contracted with one channel factor (channels, kh kw, rank), contracted with the kernel's sides."""
    sides = (rows[:, None] * columns[None]).reshape(-1, rows.shape[1])
    contracted: np.ndarray = np.einsum("npr,pr->nr", met, sides)
    return contracted


def _solved(product: np.ndarray, others: tuple[np.ndarray, ...], penalty: float) -> np.ndarray:
    """The factor that is best beside the others: penalised least squares by its normal equations."""
    gram = np.prod([other.T @ other for other in others], axis=0)
    gram[np.diag_indices_from(gram)] += penalty
    return np.asarray(cho_solve(cho_factor(gram), product.T)).T


def _unit(factor: np.ndarray) -> np.ndarray:
    """The factor with columns of norm 1; a column of zeros stays."""
    norms = np.linalg.norm(factor, axis=0)
    scaled: np.ndarray = factor / np.where(norms > 0, norms, 1)
    return scaled


def _objective(tensor: np.ndarray, factors: Factors) -> float:
    return relative_error(tensor, factors) ** 2 + LEAST_PENALTY * float(np.sum(factors[0] ** 2))
