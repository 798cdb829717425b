"""Normalisations, reductions and orderings of ML Programs.

Sources: coremltools/converters/mil/mil/ops/defs, normalization.py, reduction.py and tensor_operation.py of iOS15 to
iOS17. local_response_norm leaves open where an even number of channels lies: as in PyTorch, from whose operator it is
converted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from mobilekit.runtimes._mil_constants import along
from mobilekit.runtimes._mil_table import Arguments, Run, Table

OPERATORS = Table()


@OPERATORS.operator("batch_norm", "x mean variance gamma beta epsilon")
def batch_norm(given: Arguments) -> torch.Tensor:
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta, each for every channel (axis 1)."""
    moments = given.tensor("mean"), given.tensor("variance")
    factors = given.optional("gamma"), given.optional("beta")
    return F.batch_norm(given.tensor(), *moments, *factors, eps=given.number("epsilon", 1e-5))


@OPERATORS.operator("instance_norm", "x gamma beta epsilon")
def instance_norm(given: Arguments) -> torch.Tensor:
    """The same with mean and variance of each sample and channel."""
    x = given.tensor()
    axes = list(range(2, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    result = (x - mean) * torch.rsqrt(variance + given.number("epsilon", 1e-5))
    return _scaled(given, result, lambda factor: along(factor, x, 1))


@OPERATORS.operator("layer_norm", "x axes gamma beta epsilon")
def layer_norm(given: Arguments) -> torch.Tensor:
    """The same with mean and variance over the given axes, and factors of the shape of those axes."""
    x = given.tensor()
    axes = [axis % x.ndim for axis in given.integers("axes", range(x.ndim))]
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    result = (x - mean) * torch.rsqrt(variance + given.number("epsilon", 1e-5))
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    return _scaled(given, result, lambda factor: factor.reshape(shape))


def _scaled(given: Arguments, result: torch.Tensor, shaped: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    gamma, beta = given.optional("gamma"), given.optional("beta")
    result = result if gamma is None else result * shaped(gamma)
    return result if beta is None else result + shaped(beta)


@OPERATORS.operator("l2_norm", "x epsilon")
def l2_norm(given: Arguments) -> torch.Tensor:
    """x over the root of (epsilon + sum of squares of the last three axes)."""
    x = given.tensor()
    return x * torch.rsqrt(torch.square(x).sum((-3, -2, -1), keepdim=True) + given.number("epsilon", 1e-6))


@OPERATORS.operator("local_response_norm", "x size alpha beta k")
def local_response_norm(given: Arguments) -> torch.Tensor:
    """x / (k + alpha / size * sum of squares over `size` neighbouring channels) ** beta."""
    factors = given.number("alpha", 1e-4), given.number("beta", 0.75), given.number("k", 1.0)
    return F.local_response_norm(given.tensor(), given.integer("size"), *factors)


def _product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keep)
    return x


REDUCTIONS: dict[str, Callable[[torch.Tensor, list[int], bool], torch.Tensor]] = {
    "reduce_l1_norm": lambda x, axes, keep: torch.sum(torch.abs(x), axes, keep),
    "reduce_l2_norm": lambda x, axes, keep: torch.sqrt(torch.sum(torch.square(x), axes, keep)),
    "reduce_log_sum": lambda x, axes, keep: torch.log(torch.sum(x, axes, keep)),
    "reduce_log_sum_exp": lambda x, axes, keep: torch.logsumexp(x.float(), axes, keep),
    "reduce_max": torch.amax,
    "reduce_mean": lambda x, axes, keep: torch.mean(x.float(), axes, keep),
    "reduce_min": torch.amin,
    "reduce_prod": _product,
    "reduce_sum": torch.sum,
    "reduce_sum_square": lambda x, axes, keep: torch.sum(torch.square(x), axes, keep),
}


def _reduction(reduce: Callable[[torch.Tensor, list[int], bool], torch.Tensor]) -> Run:
    def run(given: Arguments) -> torch.Tensor:
        """All axes where none are given."""
        x = given.tensor()
        return reduce(x, given.integers("axes", range(x.ndim)), given.flag("keep_dims"))

    return run


for _kind, _reduce in REDUCTIONS.items():
    OPERATORS.operator(_kind, "x axes keep_dims")(_reduction(_reduce))


@OPERATORS.operator("reduce_argmax", "x axis keep_dims output_dtype")
def reduce_argmax(given: Arguments) -> torch.Tensor:
    """Index of the largest element along an axis; which one of equals is not defined."""
    return torch.argmax(given.tensor(), given.integer("axis", -1), given.flag("keep_dims"))


@OPERATORS.operator("reduce_argmin", "x axis keep_dims output_dtype")
def reduce_argmin(given: Arguments) -> torch.Tensor:
    """Index of the smallest element along an axis; which one of equals is not defined."""
    return torch.argmin(given.tensor(), given.integer("axis", -1), given.flag("keep_dims"))


def _sorted(given: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements in order along an axis, the largest first unless `ascending`, and their indices."""
    axis, descending = given.integer("axis", -1), not given.flag("ascending")
    values, indices = torch.sort(given.tensor(), dim=axis, descending=descending, stable=True)
    return values, indices


@OPERATORS.operator("argsort", "x axis ascending")
def argsort(given: Arguments) -> torch.Tensor:
    """Indices that sort the elements along an axis, the largest first unless `ascending`."""
    return _sorted(given)[1]


@OPERATORS.operator("topk", "x k axis ascending sort return_indices output_indices_dtype")
def topk(given: Arguments) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The k largest elements along an axis (the smallest with `ascending`; k = -1: all), sorted, and their indices."""
    values, indices = _sorted(given)
    axis, count = given.integer("axis", -1), given.integer("k", 1)
    count = values.shape[axis] if count < 0 else count
    first = values.narrow(axis, 0, count)
    return (first, indices.narrow(axis, 0, count)) if given.flag("return_indices", True) else first


@OPERATORS.operator("cumsum", "x axis exclusive reverse")
def cumsum(given: Arguments) -> torch.Tensor:
    """Running sum along an axis, from its end with `reverse`, without the element itself with `exclusive`."""
    x, axis = given.tensor(), given.integer("axis", 0)
    result = torch.cumsum(x.flip(axis) if given.flag("reverse") else x, axis)
    if given.flag("exclusive"):
        before = torch.zeros_like(result.narrow(axis, 0, 1))
        result = torch.cat([before, result.narrow(axis, 0, x.shape[axis] - 1)], axis)
    return result.flip(axis) if given.flag("reverse") else result
