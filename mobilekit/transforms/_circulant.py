"""The weight of a block-circulant layer: expanded from its defining vectors, and projected onto them."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize


class Circulant(nn.Module):
    """Parametrisation of a weight (N, C) or (N, C, 1, 1) by circulant blocks of side `block`.

    Row i, column j of a block is entry (i - j - 1) mod `block` of its vector; blocks at the edges are cropped. The
    vectors, shape (ceil(N / block), ceil(C / block), block), are the parameter that is stored and trained.
    """

    def __init__(self, shape: tuple[int, ...], block: int) -> None:
        super().__init__()
        self.shape, self.block = tuple(shape), block
        self.rows, self.columns = -(-shape[0] // block), -(-shape[1] // block)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (rows, columns, block) of blocks to the dense weight."""
        b = self.block
        # The vector repeated and cut into rows of b + 1 entries begins one entry later in every row. Copies and views
        # alone, which every exporter knows, and no table of indices that a file would have to hold.
        later = vectors.tile((1, 1, b + 1)).reshape(self.rows, self.columns, b, b + 1).narrow(3, 0, b)
        dense = later.flip(3).permute(0, 2, 1, 3).reshape(self.rows * b, self.columns * b)
        for axis, size in enumerate(self.shape[:2]):
            if dense.shape[axis] > size:
                dense = dense.narrow(axis, 0, size)
        return dense if len(self.shape) == 2 else dense.reshape(self.shape)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """The dense weight to the vectors of the nearest block-circulant one in the Frobenius norm.

        Each entry of a vector is the mean along its wrapped diagonal; a diagonal that is cropped away gets zero.
        """
        b = self.block
        row = torch.arange(self.shape[0], device=weight.device)[:, None]
        column = torch.arange(self.shape[1], device=weight.device)[None]
        slot = (((row // b) * self.columns + column // b) * b + (row - column - 1) % b).flatten()
        values = weight.detach().double().flatten()
        sums = values.new_zeros(self.rows * self.columns * b).index_add_(0, slot, values)
        counts = torch.zeros_like(sums).index_add_(0, slot, torch.ones_like(values))
        return (sums / counts.clamp(min=1)).reshape(self.rows, self.columns, b).to(weight.dtype)


def make_circulant(layer: nn.Module, block: int) -> None:
    """Project the weight of a linear layer or pointwise convolution, in place; a frozen weight stays frozen."""
    shape = tuple(layer.get_parameter("weight").shape)
    parametrize.register_parametrization(layer, "weight", Circulant(shape, block))


def expanded(module: nn.Module) -> nn.Module:
    """A copy in which circulant weights are plain parameters."""
    plain = copy.deepcopy(module)
    for layer in list(plain.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            steps = layer.parametrizations["weight"]  # type: ignore[index]
            if any(isinstance(step, Circulant) for step in steps.children()):  # type: ignore[union-attr]
                # a copy shares the class that parametrisation made for it, and removal would take the weight from both
                kind = type(layer)
                layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
                parametrize.remove_parametrizations(layer, "weight")
    return plain
