"""Inputs that an exported file is tried on beside real ones: random ones, and those at the edges."""

from __future__ import annotations

import numpy as np

from mobilekit.exportable import Arrays
from mobilekit.types import ProbeKind

RANDOM = 8
"""Samples of noise."""
SATURATING = 2
FACTOR = 10.0
"""How far beyond the range of real inputs the saturating ones go."""


def probes(real: Arrays) -> dict[ProbeKind, Arrays]:
    """A float32 batch of each kind for every input of a network, in the range of its real inputs (N, ...).

    Noise is uniform between the smallest and the largest real value and seeded; constants are those two values;
    saturating inputs are noise of ten times the size.
    """
    return {
        "random": tuple(_noise(array, number, RANDOM) for number, array in enumerate(real)),
        "zeros": tuple(np.zeros((1, *array.shape[1:]), np.float32) for array in real),
        "constant": tuple(_constants(array) for array in real),
        "saturating": tuple(
            np.float32(FACTOR) * _noise(array, len(real) + number, SATURATING) for number, array in enumerate(real)
        ),
    }


def _noise(real: np.ndarray, seed: int, count: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.uniform(real.min(), real.max(), (count, *real.shape[1:])).astype(np.float32)


def _constants(real: np.ndarray) -> np.ndarray:
    shape = real.shape[1:]
    return np.stack([np.full(shape, real.min(), np.float32), np.full(shape, real.max(), np.float32)])
