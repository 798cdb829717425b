"""Second moments of a layer's unfolded inputs, and the least squares that they allow."""

from __future__ import annotations

import torch

from mobilekit.transforms._criteria.calls import Rows

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties on the change of the weights, relative to the mean square of the inputs. Any of them holds still what
the calibration inputs do not determine; the larger ones are for layers that read more values than there are rows."""
TINY = 1e-12
"""Least penalty, for inputs that are all zero."""


class Moments:
    """Sums of products of inputs (rows, columns) with themselves and with errors (rows, outputs).

    Rows of calls that add the same bias are centred together (a free bias takes up every mean); calls without a bias
    are not centred.
    """

    def __init__(self) -> None:
        self._parts: dict[int | None, _Part] = {}
        self.biases: dict[int, torch.Tensor] = {}

    @property
    def count(self) -> int:
        """Rows in all."""
        return sum(part.count for part in self._parts.values())

    def add(self, rows: Rows, error: torch.Tensor | None = None, chosen: torch.Tensor | None = None) -> None:
        """Take in the rows of one call, all or the `chosen` (bool); `error` is what their outputs lack."""
        key = None if rows.bias is None else id(rows.bias)
        if rows.bias is not None:
            self.biases[id(rows.bias)] = rows.bias
        inputs = rows.inputs
        error = inputs.new_zeros(len(inputs), 0) if error is None else error
        part = self._parts.setdefault(key, _Part(inputs.shape[1], error.shape[1], inputs))
        if chosen is None:
            part.add(inputs, error)
        else:
            part.add(inputs[chosen], error[chosen])

    def merge(self, other: Moments) -> None:
        """Take in all rows of the other."""
        for key, part in other._parts.items():
            if key in self._parts:
                self._parts[key].merge(part)
            else:
                self._parts[key] = part
        self.biases.update(other.biases)

    def products(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gram matrix of the inputs (columns, columns), and products of inputs and errors (columns, outputs)."""
        found = [part.products(centred=key is not None) for key, part in self._parts.items()]
        gram, cross = found[0]
        for other_gram, other_cross in found[1:]:
            gram, cross = gram + other_gram, cross + other_cross
        return gram, cross

    def correction(self, share: float) -> torch.Tensor:
        """What to add to the weights (outputs, columns) for the least squares with this ridge, relative."""
        gram, cross = self.products()
        penalised = gram.clone()
        penalised.diagonal().add_(max(share * float(gram.diagonal().mean()), TINY))
        return torch.cholesky_solve(cross, torch.linalg.cholesky(penalised)).T

    def offset(self, bias: torch.Tensor, correction: torch.Tensor) -> torch.Tensor:
        """What to add to this bias (outputs,) once the weights are corrected."""
        return self._parts[id(bias)].offset(correction)

    def change(self, correction: torch.Tensor, fitted: Moments) -> float:
        """Change of the squared error on these rows by a correction and offsets `fitted` to other rows."""
        total = 0.0
        for key, part in self._parts.items():
            total += float(((correction @ part.gram) * correction).sum() - 2 * (correction * part.cross.T).sum())
            if key is not None and key in fitted._parts and fitted._parts[key].count:
                offset = fitted._parts[key].offset(correction)
                left = part.errors - correction @ part.inputs
                total += float(part.count * offset.square().sum() - 2 * (offset * left).sum())
        return total


class _Part:
    """Plain sums over the rows of calls with one bias."""

    def __init__(self, columns: int, outputs: int, like: torch.Tensor) -> None:
        self.count = 0
        self.inputs, self.errors = like.new_zeros(columns), like.new_zeros(outputs)
        self.gram, self.cross = like.new_zeros(columns, columns), like.new_zeros(columns, outputs)

    def add(self, inputs: torch.Tensor, errors: torch.Tensor) -> None:
        self.count += len(inputs)
        self.inputs += inputs.sum(dim=0)
        self.errors += errors.sum(dim=0)
        self.gram += inputs.T @ inputs
        self.cross += inputs.T @ errors

    def merge(self, other: _Part) -> None:
        self.count += other.count
        for leaf in ("inputs", "errors", "gram", "cross"):
            getattr(self, leaf).add_(getattr(other, leaf))

    def offset(self, correction: torch.Tensor) -> torch.Tensor:
        return (self.errors - correction @ self.inputs) / max(1, self.count)

    def products(self, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if not centred or not self.count:
            return self.gram, self.cross
        mean = self.inputs / self.count
        return self.gram - torch.outer(self.inputs, mean), self.cross - torch.outer(mean, self.errors)


def best_correction(fit: Moments, held: Moments) -> torch.Tensor | None:
    """Least-squares correction from all rows, with the ridge that serves rows best which were not fitted.

    None where every ridge raises the squared error of the held-back rows: the inputs are too few to re-fit the layer.
    """
    tried = {}
    for share in RIDGES:
        change = held.change(fit.correction(share), fit)
        if change < 0:
            tried[share] = change
    if not tried:
        return None
    fit.merge(held)
    return fit.correction(min(tried, key=lambda share: tried[share]))
