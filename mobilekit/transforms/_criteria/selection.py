"""Criteria that choose channels by what the group's readers lose: LASSO and greedy second-order removal.

Both work on the Gram matrix of each reader's unfolded inputs over sampled output positions. Readers count alike:
each one's error is relative to the energy that the group gives to its output.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mobilekit.transforms._criteria.calls import as_matrix, sampled
from mobilekit.transforms._criteria.moments import TINY, Moments
from mobilekit.transforms._criteria.subject import Reader, Subject, working_copy

SWEEPS, TOLERANCE = 200, 1e-7
HALVINGS = 40
RIDGE, FEW_ROWS = 1e-6, 1e-2
"""Relative ridge of the greedy removal, and its part that grows with the square of columns over rows: where a layer
reads more values than there are rows, everything fits and a smaller ridge would rank noise."""


@dataclass(frozen=True)
class Gram:
    """A reader in numbers, float64: its weights (outputs, columns), the Gram matrix of its inputs (columns, columns)
    over so many rows, and the columns of each channel, int64 (channels, columns of one)."""

    weights: torch.Tensor
    inputs: torch.Tensor
    rows: int
    columns: torch.Tensor

    def contributions(self) -> torch.Tensor:
        """Products of what each two channels give to the output, summed over positions, (channels, channels)."""
        products = (self.weights.T @ self.weights) * self.inputs
        flat = self.columns.flatten()
        count, each = self.columns.shape
        return products[flat][:, flat].reshape(count, each, count, each).sum(dim=(1, 3))


def grams(subject: Subject, criterion: str) -> list[Gram]:
    """Every reader of the group. Raises UnsupportedError where there is no data or nothing to re-fit."""
    data, readers = subject.data(criterion), subject.readers
    module = working_copy(subject.module)
    moments = {reader.name: Moments() for reader in readers}
    for name, rows in sampled(module, readers, data):
        moments[name].add(rows)
    return [_gram(subject, module, reader, moments[reader.name]) for reader in readers]


def _gram(subject: Subject, module: torch.nn.Module, reader: Reader, moments: Moments) -> Gram:
    weight = module.get_parameter(reader.name)
    entries = subject.entries(subject.network.axes[reader.name][reader.in_dim])
    taps = weight[0, 0].numel()
    columns = (entries[:, :, None] * taps + torch.arange(taps)).flatten(1)
    return Gram(as_matrix(weight, reader.out_dim).cpu(), moments.products()[0].cpu(), moments.count, columns)


# ---------------------------------------------------------------- LASSO


def lasso(subject: Subject) -> torch.Tensor:
    """Channel selection by LASSO (He, Zhang, Sun 2017, arXiv:1707.06168), scores (channels,).

    One factor a channel scales what it gives to every reader; the factors approximate the readers' outputs under an
    L1 penalty, which is raised until `subject.width` of them are not zero. The score is the size of what is left of
    the channel. Raises UnsupportedError as `grams` does.
    """
    total = np.zeros((subject.channels, subject.channels))
    for gram in grams(subject, "lasso"):
        products = gram.contributions().numpy()
        total += products / max(products.sum(), np.finfo(float).tiny)
    live = (~subject.dead).numpy() & (np.diag(total) > 0)
    scores = np.zeros(subject.channels)
    if live.any():
        part = total[np.ix_(live, live)]
        scores[live] = np.abs(factors(part, subject.width)) * np.sqrt(np.diag(part))
    return torch.from_numpy(scores)


def factors(products: np.ndarray, count: int) -> np.ndarray:
    """Factors (channels,) of the LASSO whose penalty leaves `count` of them, or the fewest above `count`.

    `products` (channels, channels) holds the inner products of the channels' contributions; the sum of all
    contributions is what the scaled ones approximate.
    """
    strongest = float(np.abs(products.sum(axis=1)).max())
    low, inside = 0.0, np.ones(len(products))
    if count >= len(products) or strongest == 0:
        return inside
    high = strongest * 1e-6
    found = descend(products, high, inside)
    while np.count_nonzero(found) > count:
        low, inside, high = high, found, high * 2
        found = descend(products, high, inside)
    for _ in range(HALVINGS):
        if np.count_nonzero(found) == count:
            return found
        middle = (low + high) / 2
        tried = descend(products, middle, inside)
        if np.count_nonzero(tried) > count:
            low, inside = middle, tried
        else:
            high, found = middle, tried
    return inside


def descend(products: np.ndarray, penalty: float, start: np.ndarray) -> np.ndarray:
    """Minimise |sum of contributions - scaled contributions|^2 / 2 + penalty * |factors|_1 by coordinate descent.

    Each step is exact (soft thresholding) and updates all residual products at once (Friedman et al. 2010).
    """
    beta = start.copy()
    residual = products.sum(axis=1) - products @ beta
    sizes = np.diag(products)
    for _ in range(SWEEPS):
        largest = 0.0
        for i in np.flatnonzero(sizes > 0):
            pull = residual[i] + sizes[i] * beta[i]
            new = np.sign(pull) * max(abs(pull) - penalty, 0.0) / sizes[i]
            change = new - beta[i]
            if change:
                residual -= products[:, i] * change
                beta[i] = new
                largest = max(largest, abs(change))
        if largest < TOLERANCE:
            break
    return beta


# ---------------------------------------------------------------- greedy removal


def reconstruction(subject: Subject) -> torch.Tensor:
    """Greedy removal of the channel that the re-fitted readers miss least, scores (channels,).

    The rise of the squared error when a channel goes and all others are re-fitted is exact in each step: Optimal
    Brain Surgeon over the block of columns of a channel (Frantar, Alistarh 2022, arXiv:2208.11580), on the readers
    as in ThiNet (Luo et al. 2017, arXiv:1707.06342). Removed channels have negative scores, earlier ones lower; for
    the others the score is the rise that their removal would bring. Raises UnsupportedError as `grams` does.
    """
    readers = [_Surgeon(gram) for gram in grams(subject, "reconstruction")]
    free = subject.dead | torch.stack([reader.silent for reader in readers]).all(dim=0)
    scores = torch.zeros(subject.channels, dtype=torch.float64)
    alive = torch.ones(subject.channels, dtype=torch.bool)
    for turn in range(subject.channels - subject.width):
        rises = _rises(readers, alive)
        victim = int(torch.where(free & alive, -1.0, rises).argmin())
        scores[victim] = turn - subject.channels
        alive[victim] = False
        for reader in readers:
            reader.remove(victim)
    return torch.where(alive, _rises(readers, alive), scores)


def _rises(readers: list[_Surgeon], alive: torch.Tensor) -> torch.Tensor:
    left = alive.nonzero().flatten()
    rises = torch.full(alive.shape, float("inf"), dtype=torch.float64)
    rises[left] = torch.stack([reader.rises(left) for reader in readers]).sum(dim=0)
    return rises


class _Surgeon:
    """One reader's weights and inverse Gram matrix, kept up to date while channels are removed."""

    def __init__(self, gram: Gram) -> None:
        size = len(gram.inputs)
        share = RIDGE + FEW_ROWS * min(1.0, size / gram.rows) ** 2
        penalised = gram.inputs.clone()
        penalised.diagonal().add_(max(share * float(gram.inputs.diagonal().mean()), TINY))
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(penalised))
        self.weights, self.columns = gram.weights.clone(), gram.columns
        own = gram.contributions()
        self.silent = own.diagonal() == 0
        self.energy = max(float(own.sum()), torch.finfo(torch.float64).tiny)

    def rises(self, channels: torch.Tensor) -> torch.Tensor:
        """Rise of the squared error, relative to the energy, when one of the channels goes: (channels,)."""
        columns = self.columns[channels]
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        weights = self.weights[:, columns].permute(1, 2, 0)
        solved: torch.Tensor = torch.linalg.solve(blocks, weights)
        return (weights * solved).sum(dim=(1, 2)) / self.energy

    def remove(self, channel: int) -> None:
        """Take the channel away and re-fit the others: a downdate of the inverse, no new inversion."""
        columns = self.columns[channel]
        across = self.inverse[columns]
        solved = torch.linalg.solve(across[:, columns], across)
        self.weights -= self.weights[:, columns] @ solved
        self.inverse -= across.T @ solved
        self.weights[:, columns] = 0
