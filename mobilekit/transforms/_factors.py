"""The linear algebra of low-rank layers: kernels in, the kernels of the layers that replace them out. numpy only."""

from __future__ import annotations

import functools

import numpy as np
from scipy.linalg import eigh

from mobilekit.transforms._alternating import cp

Kernels = tuple[np.ndarray, ...]
REMEMBERED_BYTES = 32 * 2**20
"""Larger matrices are decomposed anew for every rank: keeping them costs more memory than it saves time."""
HOOI_SWEEPS = 10


def factors(kernel: np.ndarray, method: str, ranks: dict[str, int]) -> Kernels:
    """Kernels of the chain that replaces a layer.

    `kernel` has shape (N, C, kh, kw), or (N, C) for a linear layer; the results have the layout of the layers, in
    order, and the kernel's dtype.
    """
    if method == "svd":
        found = svd(kernel.reshape(kernel.shape[:2]), ranks["rank"])
        found = tuple(matrix.reshape(*matrix.shape, *kernel.shape[2:]) for matrix in found)
    elif method == "spatial":
        found = spatial(kernel, ranks["rank"])
    elif method == "tucker2":
        found = tucker2(kernel, ranks["rank"], ranks["rank_in"])
    else:
        a, b, rows, columns = cp(kernel, ranks["rank"])
        found = (b.T[:, :, None, None], rows.T[:, None, :, None], columns.T[:, None, None, :], a[:, :, None, None])
    return tuple(np.ascontiguousarray(part, dtype=kernel.dtype) for part in found)


def svd(matrix: np.ndarray, rank: int) -> Kernels:
    """(rank, C) and (N, rank), whose product is the nearest matrix of this rank (Eckart and Young 1936).

    The root of each singular value goes to either side, so that neither layer's weights are much larger.
    """
    left, values, right = _decomposed(matrix)
    root = np.sqrt(values[:rank])
    return root[:, None] * right[:rank], left[:, :rank] * root


def spatial(kernel: np.ndarray, rank: int) -> Kernels:
    """(rank, C, kh, 1) and (N, rank, 1, kw): the nearest pair of a column and a row convolution.

    Jaderberg et al. 2014, arXiv:1405.3866, scheme 2; the optimum is the SVD of the kernel as (C kh) x (N kw).
    """
    outputs, inputs, height, width = kernel.shape
    rows, columns = svd(_rearranged(kernel).T, rank)
    return rows.reshape(rank, inputs, height, 1), columns.reshape(outputs, width, rank).transpose(0, 2, 1)[:, :, None]


def _rearranged(kernel: np.ndarray) -> np.ndarray:
    """(C kh, N kw)."""
    outputs, inputs, height, width = kernel.shape
    return kernel.transpose(1, 2, 0, 3).reshape(inputs * height, outputs * width)


def tucker2(kernel: np.ndarray, rank: int, rank_in: int, sweeps: int = HOOI_SWEEPS) -> Kernels:
    """(rank_in, C, 1, 1), (rank, rank_in, kh, kw) and (N, rank, 1, 1).

    HOSVD on both channel axes, then sweeps of higher-order orthogonal iteration by TensorLy, none of which makes it
    worse (De Lathauwer et al. 2000; for convolutions Kim et al. 2016, arXiv:1511.06530).
    """
    from tensorly.decomposition import partial_tucker

    exact = kernel.astype(np.float64)
    taps = kernel.shape[2] * kernel.shape[3]
    # neither side can have more directions than the other one leaves; TensorLy would give fewer columns than asked
    ranks = [min(rank, rank_in * taps), min(rank_in, rank * taps)]
    outer, inner = np.zeros((len(exact), rank)), np.zeros((exact.shape[1], rank_in))
    if exact.any():  # TensorLy divides by the norm
        (_, found), _ = partial_tucker(exact, ranks, modes=[0, 1], n_iter_max=sweeps, tol=1e-7)
        outer[:, : ranks[0]], inner[:, : ranks[1]] = found
    return inner.T[:, :, None, None], _core(exact, outer, inner), outer[:, :, None, None]


def _core(kernel: np.ndarray, outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    core: np.ndarray = np.einsum("nchw,nr,cs->rshw", kernel, outer, inner, optimize=True)
    return core


def _leading(tensor: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """The leading left singular vectors of the tensor unfolded along an axis, as columns, largest first."""
    unfolded = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
    size = len(unfolded)
    _, vectors = eigh(unfolded @ unfolded.T, subset_by_index=(size - rank, size - 1))
    return np.asarray(vectors)[:, ::-1]


def _decomposed(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left vectors, singular values and right vectors. The last matrix is remembered: its ranks are tried in turn."""
    if matrix.nbytes > REMEMBERED_BYTES:
        return tuple(np.linalg.svd(matrix, full_matrices=False))
    return _remembered(matrix.tobytes(), matrix.shape, matrix.dtype.str)


@functools.lru_cache(maxsize=1)
def _remembered(values: bytes, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    matrix = np.frombuffer(values, dtype=dtype).reshape(shape)
    return tuple(np.linalg.svd(matrix, full_matrices=False))


def kept_energies(kernel: np.ndarray, method: str) -> np.ndarray:
    """Share of the squared norm that each rank 1, 2, ... keeps, for the methods where it follows from one SVD.

    For tucker2 both ranks are the same number, as far as each side has so many channels, and the share is that of
    HOSVD: the sweeps that follow can only keep more.
    """
    if method == "tucker2":
        exact = kernel.astype(np.float64)
        outer, inner = (_leading(exact, axis, exact.shape[axis]) for axis in (0, 1))
        energy = np.sum(_core(exact, outer, inner) ** 2, axis=(2, 3)).cumsum(axis=0).cumsum(axis=1)
        last = np.array(energy.shape) - 1
        kept = np.array([energy[tuple(np.minimum(rank, last))] for rank in range(max(energy.shape))])
    else:
        matrix = _rearranged(kernel).T if method == "spatial" else kernel.reshape(kernel.shape[:2])
        kept = np.cumsum(_decomposed(matrix)[1].astype(np.float64) ** 2)
    return np.asarray(kept / kept[-1])
