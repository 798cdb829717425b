"""Operators of the evaluator, read from a saved package, against coremltools' own value inference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")
from mil_programs import Build, computed, inferred, mb

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 4, 3, 6)).astype(np.float32)
Y = RANDOM.standard_normal((2, 4, 3, 6)).astype(np.float32)
ROW = RANDOM.standard_normal((3, 1)).astype(np.float32)
POSITIVE = np.abs(X) + np.float32(0.1)
WITHIN = np.tanh(X) * np.float32(0.9)
WHOLE = RANDOM.integers(-9, 9, (2, 4, 3, 6)).astype(np.int32)
DIVISOR = RANDOM.integers(1, 5, (2, 4, 3, 6)).astype(np.int32)
PER_CHANNEL = RANDOM.uniform(0.1, 1, 4).astype(np.float32)
MATRIX = RANDOM.standard_normal((5, 6)).astype(np.float32)
ORDERED = RANDOM.permutation(144).reshape(2, 4, 3, 6).astype(np.float32)


def unary(name: str) -> Build:
    return lambda x: getattr(mb, name)(x=x)


def binary(name: str) -> Build:
    return lambda x, y: getattr(mb, name)(x=x, y=y)


def logical(name: str) -> Build:
    return lambda x, y: getattr(mb, name)(x=mb.greater(x=x, y=0.1), y=mb.less(x=y, y=0.4))


def reduction(name: str, **options: Any) -> Build:
    return lambda x: getattr(mb, name)(x=x, **options)


INFERRED: dict[str, tuple[Build, list[np.ndarray]]] = {
    **{
        name: (unary(name), [X])
        for name in (
            *("abs", "atan", "ceil", "cos", "cosh", "erf", "exp", "exp2", "floor", "identity", "relu", "relu6"),
            *("round", "sigmoid", "sign", "sin", "sinh", "softplus", "softsign", "square", "tan", "tanh"),
        )
    },
    **{name: (unary(name), [WITHIN]) for name in ("acos", "asin", "atanh")},
    **{name: (unary(name), [POSITIVE]) for name in ("inverse", "log", "rsqrt", "sqrt")},
    **{
        name: (binary(name), [X, Y])
        for name in (
            *("add", "equal", "floor_div", "greater", "greater_equal", "less", "less_equal", "maximum", "minimum"),
            *("mod", "mul", "not_equal", "real_div", "sub"),
        )
    },
    **{f"{name} of integers": (binary(name), [WHOLE, DIVISOR]) for name in ("add", "floor_div", "mod", "mul", "sub")},
    **{f"{name} broadcast": (binary(name), [X, ROW]) for name in ("add", "greater", "maximum", "mul")},
    "pow": (binary("pow"), [POSITIVE, Y]),
    "round halves": (unary("round"), [np.arange(-3, 3.5, 0.5, dtype=np.float32)]),
    **{name: (logical(name), [X, Y]) for name in ("logical_and", "logical_or", "logical_xor")},
    "logical_not": (lambda x: mb.logical_not(x=mb.greater(x=x, y=0.1)), [X]),
    "inverse with epsilon": (lambda x: mb.inverse(x=x, epsilon=0.5), [POSITIVE]),
    "log with epsilon": (lambda x: mb.log(x=x, epsilon=0.5), [POSITIVE]),
    "rsqrt with epsilon": (lambda x: mb.rsqrt(x=x, epsilon=0.5), [POSITIVE]),
    "clip": (lambda x: mb.clip(x=x, alpha=-0.3, beta=0.8), [X]),
    "threshold": (lambda x: mb.threshold(x=x, alpha=0.2), [X]),
    "cast to int32": (lambda x: mb.cast(x=x, dtype="int32"), [X * 5]),
    "cast to bool": (lambda x: mb.cast(x=x, dtype="bool"), [WHOLE.astype(np.float32)]),
    "cast to fp16": (lambda x: mb.cast(x=x, dtype="fp16"), [X]),
    "clamped_relu": (lambda x: mb.clamped_relu(x=x, alpha=0.3, beta=0.7), [X]),
    "elu": (lambda x: mb.elu(x=x, alpha=0.6), [X]),
    **{
        f"gelu {mode}": (lambda x, mode=mode: mb.gelu(x=x, mode=mode), [X])
        for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
    },
    "leaky_relu": (lambda x: mb.leaky_relu(x=x, alpha=0.2), [X]),
    "linear_activation": (lambda x: mb.linear_activation(x=x, alpha=0.2, beta=-1.5), [X]),
    "prelu": (lambda x: mb.prelu(x=x, alpha=PER_CHANNEL), [X]),
    "scaled_tanh": (lambda x: mb.scaled_tanh(x=x, alpha=0.7, beta=1.5), [X]),
    "sigmoid_hard": (lambda x: mb.sigmoid_hard(x=x, alpha=0.3, beta=0.4), [X]),
    "softplus_parametric": (lambda x: mb.softplus_parametric(x=x, alpha=PER_CHANNEL, beta=PER_CHANNEL + 1), [X]),
    "softmax": (lambda x: mb.softmax(x=x, axis=1), [X]),
    "thresholded_relu": (lambda x: mb.thresholded_relu(x=x, alpha=0.4), [X]),
    "l2_norm": (lambda x: mb.l2_norm(x=x, epsilon=0.1), [X]),
    "layer_norm": (
        lambda x: mb.layer_norm(x=x, axes=[2, -1], gamma=Y[0, 0], beta=Y[1, 1], epsilon=0.1),
        [X],
    ),
    **{
        f"{name} {options}": (reduction(name, **options), [POSITIVE])
        for name in (
            *("reduce_l1_norm", "reduce_l2_norm", "reduce_log_sum", "reduce_log_sum_exp", "reduce_max", "reduce_mean"),
            *("reduce_min", "reduce_prod", "reduce_sum", "reduce_sum_square"),
        )
        for options in ({"axes": [1, -1]}, {"axes": [2], "keep_dims": True})
    },
    **{
        f"{name} {options}": (reduction(name, **options), [ORDERED])
        for name in ("reduce_argmax", "reduce_argmin")
        for options in ({"axis": 1}, {"axis": -1, "keep_dims": True})
    },
    **{
        f"argsort {ascending}": (lambda x, up=ascending: mb.argsort(x=x, axis=1, ascending=up), [ORDERED])
        for ascending in (True, False)
    },
    **{
        f"topk {ascending}": (lambda x, up=ascending: mb.topk(x=x, k=2, axis=1, ascending=up), [ORDERED])
        for ascending in (True, False)
    },
    **{f"cumsum reverse={r}": (lambda x, r=r: mb.cumsum(x=x, axis=1, reverse=r), [X]) for r in (True, False)},
    "linear": (lambda x: mb.linear(x=x, weight=MATRIX, bias=MATRIX[:, 0]), [X[0, 0]]),
    "matmul": (lambda x, y: mb.matmul(x=x, y=y, transpose_y=True), [X, Y]),
    "matmul transposed": (lambda x, y: mb.matmul(x=x, y=y, transpose_x=True), [X, Y]),
    "einsum": (
        lambda x, y: mb.einsum(values=[x, y], equation="nchw,nwhu->nchu"),
        [X, RANDOM.random((2, 6, 3, 5), np.float32)],
    ),
    "einsum broadcast": (
        lambda x, y: mb.einsum(values=[x, y], equation="chw,whr->chr"),
        [X[0], RANDOM.random((6, 1, 5), np.float32)],
    ),
    "attention": (
        lambda q, k: mb.scaled_dot_product_attention(query=q, key=k, value=k),
        [X, Y],
    ),
    "attention with mask": (
        lambda q, k: mb.scaled_dot_product_attention(
            query=q, key=k, value=k, attn_mask=np.eye(3, dtype=bool) | (np.arange(3) < 1)
        ),
        [X, Y],
    ),
    "attention with bias": (
        lambda q, k: mb.scaled_dot_product_attention(query=q, key=k, value=k, attn_mask=X[0, 0, :, :3]),
        [X, Y],
    ),
    "select": (lambda x, y: mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=y), [X, Y]),
    "band_part": (lambda x: mb.band_part(x=x, lower=1, upper=2), [X]),
    "band_part one side": (lambda x: mb.band_part(x=x, lower=-1, upper=0), [X]),
    "expand_dims": (lambda x: mb.expand_dims(x=x, axes=[0, -1, 2]), [X[0, 0]]),
    "squeeze": (lambda x: mb.squeeze(x=x, axes=[0, -2]), [X[:1, :, :1]]),
    "squeeze all": (lambda x: mb.squeeze(x=x), [X[:1, :, :1]]),
    "reshape": (lambda x: mb.reshape(x=x, shape=[2, -1, 3]), [X]),
    "reshape with zeros": (lambda x: mb.reshape(x=x, shape=[0, 12, 0]), [X.reshape(2, 12, 6)]),
    "reverse": (lambda x: mb.reverse(x=x, axes=[1, -1]), [X]),
    "reverse all": (lambda x: mb.reverse(x=x), [X]),
    "transpose": (lambda x: mb.transpose(x=x, perm=[0, -1, 1, 2]), [X]),
    "tile": (lambda x: mb.tile(x=x, reps=[1, 2, 1, 3]), [X]),
    "flatten2d": (lambda x: mb.flatten2d(x=x, axis=-2), [X]),
    "shape": (lambda x: mb.shape(x=x), [X]),
    "fill_like": (lambda x: mb.fill_like(ref_tensor=x, value=2.5), [X]),
    "concat": (lambda x, y: mb.concat(values=[x, y], axis=-2), [X, Y]),
    "stack": (lambda x, y: mb.stack(values=[x, y], axis=1), [X, Y]),
    "split": (lambda x: mb.split(x=x, num_splits=3, axis=-1), [X]),
    "split unequally": (lambda x: mb.split(x=x, split_sizes=[1, 3], axis=1), [X]),
    "pad": (lambda x: mb.pad(x=x, pad=[1, 2, 0, 3], mode="constant", constant_val=0.5), [X]),
    "pad reflected": (lambda x: mb.pad(x=x, pad=[2, 1, 3, 5], mode="reflect"), [X]),
    "pad replicated": (lambda x: mb.pad(x=x, pad=[1, 0, 2, 1, 3, 6], mode="replicate"), [X]),
    "slice_by_size": (lambda x: mb.slice_by_size(x=x, begin=[0, 1, -2, 2], size=[2, 3, 1, -1]), [X]),
    "slice": (lambda x: mb.slice_by_index(x=x, begin=[0, 1, 0, -5], end=[2, -1, 3, 6], stride=[1, 1, 2, 2]), [X]),
    "slice backwards": (
        lambda x: mb.slice_by_index(
            x=x, begin=[0, 3, 0, 5], end=[2, 0, 3, 0], stride=[1, -2, 1, -1], end_mask=[False] * 3 + [True]
        ),
        [X],
    ),
    "slice with masks": (
        lambda x: mb.slice_by_index(
            x=x,
            begin=[1, -1, 1, 3],
            end=[0, 0, 0, 4],
            begin_mask=[False, False, True, False],
            end_mask=[True, False, True, True],
            squeeze_mask=[True, True, False, False],
        ),
        [X],
    ),
    "slice_update": (
        lambda x, y: mb.slice_update(x=x, update=y, begin=[0, 1, 0, 0], end=[2, 4, 3, 6], stride=[1, 2, 1, 3]),
        [X, X[:, :2, :, :2] * 7],
    ),
    "gather": (lambda x: mb.gather(x=x, indices=np.array([[2, 0], [1, 2]], np.int32), axis=2), [X]),
    "gather one": (lambda x: mb.gather(x=x, indices=np.int32(3), axis=1), [X]),
    "gather in batches": (
        lambda x: mb.gather(x=x, indices=np.array([[2, 0, 1], [1, 2, 2]], np.int32), axis=2, batch_dims=1),
        [X],
    ),
    "gather_along_axis": (
        lambda x: mb.gather_along_axis(x=x, indices=np.array(DIVISOR[:, :, :, :2] % 3, np.int32), axis=2),
        [X[:, :, :, :2]],
    ),
    "quantize": (
        lambda x: mb.quantize(input=x, scale=np.float32(0.013), zero_point=np.int8(-7), output_dtype="int8"),
        [X],
    ),
    "quantize by channel": (
        lambda x: mb.quantize(
            input=x,
            scale=PER_CHANNEL / 99,
            zero_point=np.array([3, 0, 255, 128], np.uint8),
            output_dtype="uint8",
            axis=1,
        ),
        [X],
    ),
    "quantize halves": (
        lambda x: mb.quantize(input=x, scale=np.float32(1), zero_point=np.int8(3), output_dtype="int8"),
        [np.arange(-3, 3.5, 0.5, dtype=np.float32)],
    ),
    "quantize around zero": (lambda x: mb.quantize(input=x, scale=np.float32(0.02), output_dtype="int8"), [X]),
}
"""Name -> operator and inputs, where coremltools can tell the result."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[np.ndarray]]:
    return computed(INFERRED, tmp_path_factory.mktemp("mil") / "all.mlpackage")


@pytest.mark.parametrize("case", INFERRED)
def test_as_coremltools_infers(case: str, results: dict[str, list[np.ndarray]]) -> None:
    expected, found = inferred(*INFERRED[case]), results[case]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours.astype(np.float64), theirs.astype(np.float64), rtol=2e-5, atol=2e-6)
