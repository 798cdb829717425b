"""Matrix products and attention of ML Programs.

Sources: coremltools/converters/mil/mil/ops/defs, linear.py of iOS15 and iOS17, iOS18/transformers.py.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from mobilekit.runtimes._mil_table import Arguments, Table

OPERATORS = Table()


@OPERATORS.operator("linear", "x weight bias")
def linear(given: Arguments) -> torch.Tensor:
    """x (*, K) times the transposed weight (N, K), plus bias."""
    return F.linear(given.tensor(), given.tensor("weight"), given.optional("bias"))


@OPERATORS.operator("matmul", "x y transpose_x transpose_y")
def matmul(given: Arguments) -> torch.Tensor:
    """Product of matrices on the last two axes, others broadcast; transposing does nothing to a vector."""
    factors = [
        factor.mT if given.flag(f"transpose_{name}") and factor.ndim > 1 else factor
        for name, factor in (("x", given.tensor("x")), ("y", given.tensor("y")))
    ]
    return torch.matmul(*factors)


@OPERATORS.operator("einsum", "values equation")
def einsum(given: Arguments) -> torch.Tensor:
    """Sum of products in Einstein's notation; MIL allows matrix products with broadcast axes only."""
    return torch.einsum(given.text("equation"), *given.tensors("values"))


@OPERATORS.operator("scaled_dot_product_attention", "query key value attn_mask")
def attention(given: Arguments) -> torch.Tensor:
    """softmax(query key' / sqrt(E) + mask) value; where a mask of truth values is false, nothing is looked at."""
    query, key, value = (given.tensor(name) for name in ("query", "key", "value"))
    scores = torch.matmul(query, key.mT) / math.sqrt(query.shape[-1])
    mask = given.optional("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, -1), value)
