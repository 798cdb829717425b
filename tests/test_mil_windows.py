"""Convolutions and pools of the evaluator against loops over windows, and against PyTorch where MIL follows it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("coremltools")
from mil_programs import Build, carried_out, computed, mb

FEW = settings(
    deadline=None,
    max_examples=5,
    phases=(Phase.explicit, Phase.generate),  # shrinking would save hundreds of programs
    suppress_health_check=list(HealthCheck),
)
"""Examples are lists of cases: saving a program takes longer than carrying it out."""
PAD_TYPES = ("valid", "same", "same_lower", "custom")
Pads = list[tuple[int, int]]


def numbers(shape: Sequence[int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32)


def stated_pads(kind: str, sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int], custom: Pads) -> Pads:
    """`same`: as much as ceil(size / stride) windows need; an odd element to the end, with same_lower to the start."""
    if kind == "custom":
        return custom
    pads = []
    for size, span, stride in zip(sizes, spans, strides, strict=True):
        before = after = 0
        while kind != "valid" and (size + before + after - span) // stride + 1 < math.ceil(size / stride):
            if (before + after) % 2 == (1 if kind == "same" else 0):
                before += 1
            else:
                after += 1
        pads.append((before, after))
    return pads


def patches(
    x: np.ndarray, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Pads, fill: float
) -> np.ndarray:
    """Every window of (N, C, *D): (N, C, *windows, *kernel)."""
    x = np.pad(x, [(0, 0), (0, 0), *pads], constant_values=fill)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    counts = [(n - span) // s + 1 for n, span, s in zip(x.shape[2:], spans, strides, strict=True)]
    found = np.empty((*x.shape[:2], *counts, *kernel), x.dtype)
    for place in itertools.product(*map(range, counts)):
        cut = tuple(
            slice(i * s, i * s + span, d) for i, s, span, d in zip(place, strides, spans, dilations, strict=True)
        )
        found[(slice(None), slice(None), *place)] = x[(slice(None), slice(None), *cut)]
    return found


@st.composite
def window_cases(draw: st.DrawFn, dilated: bool) -> dict[str, Any]:
    axes = draw(st.integers(1, 3))

    def each(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes))

    kernel, strides = each(1, 4), each(1, 3)
    dilations = each(1, 2) if dilated else [1] * axes
    # As large as the window at least, so that `valid` gives something.
    sizes = [(k - 1) * d + 1 + more for k, d, more in zip(kernel, dilations, each(0, 4), strict=True)]
    pads = [(min(a, k - 1), min(b, k - 1)) for a, b, k in zip(each(0, 2), each(0, 2), kernel, strict=True)]
    return {
        "kernel": kernel,
        "strides": strides,
        "dilations": dilations,
        "sizes": sizes,
        "pads": pads,
        "pad_type": draw(st.sampled_from(PAD_TYPES)),
        "seed": draw(st.integers(0, 99)),
    }


def spans_of(case: dict[str, Any]) -> list[int]:
    return [(k - 1) * d + 1 for k, d in zip(case["kernel"], case["dilations"], strict=True)]


def pads_of(case: dict[str, Any]) -> Pads:
    return stated_pads(case["pad_type"], case["sizes"], spans_of(case), case["strides"], case["pads"])


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    """Parameters that convolutions and pools share; `pad` is given for custom padding only."""
    shared = {"strides": case["strides"], "pad_type": case["pad_type"]}
    return shared | ({"pad": [n for pair in case["pads"] for n in pair]} if case["pad_type"] == "custom" else {})


def check(cases: list[tuple[Build, np.ndarray, np.ndarray]], folder: Path) -> None:
    """Operators of one input each against what is expected, from one package."""
    found = computed({str(i): (build, [x]) for i, (build, x, _) in enumerate(cases)}, folder / "windows.mlpackage")
    for i, (_, _, expected) in enumerate(cases):
        (result,) = found[str(i)]
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@FEW
@given(st.lists(st.tuples(window_cases(dilated=True), st.integers(1, 3), st.booleans()), min_size=4, max_size=6))
def test_convolutions(tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[dict[str, Any], int, bool]]) -> None:
    cases = []
    for case, groups, biased in drawn:
        x = numbers((2, 2 * groups, *case["sizes"]), case["seed"])
        weight = numbers((3 * groups, 2, *case["kernel"]), case["seed"] + 1)
        bias = numbers((3 * groups,), case["seed"] + 2) if biased else None
        windows = patches(x, case["kernel"], case["strides"], case["dilations"], pads_of(case), 0.0)
        axes = len(case["kernel"])
        summed = []
        for group in range(groups):
            own = windows[:, 2 * group : 2 * group + 2], weight[3 * group : 3 * group + 3]
            kernel_axes = [1, *range(2 + axes, 2 + 2 * axes)], [1, *range(2, 2 + axes)]
            summed.append(np.moveaxis(np.tensordot(*own, kernel_axes), -1, 1))
        expected = np.concatenate(summed, 1) + (0 if bias is None else bias.reshape(-1, *[1] * axes))

        def build(
            x: Any, case: dict[str, Any] = case, weight: Any = weight, bias: Any = bias, groups: int = groups
        ) -> Any:
            dilations = {"dilations": case["dilations"], "groups": groups}
            return mb.conv(
                x=x, weight=weight, **({} if bias is None else {"bias": bias}), **options_of(case), **dilations
            )

        cases.append((build, x, expected))
    check(cases, tmp_path_factory.mktemp("conv"))


def pool(name: str, case: dict[str, Any], **more: Any) -> Build:
    return lambda x: getattr(mb, name)(x=x, kernel_sizes=case["kernel"], **options_of(case), **more)


@FEW
@given(st.lists(st.tuples(window_cases(dilated=False), st.booleans()), min_size=4, max_size=6))
def test_pools(tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[dict[str, Any], bool]]) -> None:
    cases = []
    for case, excluded in drawn:
        x = numbers((2, 3, *case["sizes"]), case["seed"])
        axes = tuple(range(2 + len(case["kernel"]), 2 + 2 * len(case["kernel"])))

        def windows(values: np.ndarray, fill: float, case: dict[str, Any] = case) -> np.ndarray:
            return patches(values, case["kernel"], case["strides"], case["dilations"], pads_of(case), fill)

        counted = windows(np.ones_like(x), 0.0 if excluded else 1.0).sum(axes)
        mean = windows(x, 0.0).sum(axes) / counted
        cases.append((pool("max_pool", case), x, windows(x, -math.inf).max(axes)))
        cases.append((pool("avg_pool", case, exclude_padding_from_average=excluded), x, mean))
    check(cases, tmp_path_factory.mktemp("pool"))


@FEW
@given(
    st.lists(
        st.tuples(st.integers(2, 4), st.integers(1, 3), st.integers(0, 1), st.integers(4, 9), st.booleans()),
        min_size=4,
        max_size=8,
    )
)
def test_ceil_mode_is_pytorchs(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, int, int, int, bool]]
) -> None:
    cases = []
    for kernel, stride, pad, size, excluded in drawn:
        # MIL's rule differs from PyTorch's where a window without padding begins beyond the input.
        if pad == 0 and any(math.ceil((n - kernel) / stride) * stride >= n for n in (size, size + 1)):
            continue
        x = numbers((1, 2, size, size + 1), size)
        case = {"kernel": [kernel] * 2, "strides": [stride] * 2, "pad_type": "custom", "pads": [(pad, pad)] * 2}
        tensor = torch.from_numpy(x)
        largest = F.max_pool2d(tensor, kernel, stride, pad, ceil_mode=True).numpy()
        mean = F.avg_pool2d(tensor, kernel, stride, pad, ceil_mode=True, count_include_pad=not excluded).numpy()
        cases.append((pool("max_pool", case, ceil_mode=True), x, largest))
        averaged = pool("avg_pool", case, ceil_mode=True, exclude_padding_from_average=excluded)
        cases.append((averaged, x, mean))
    if cases:
        check(cases, tmp_path_factory.mktemp("ceil"))


def spread_out(
    x: np.ndarray, weight: np.ndarray, strides: Sequence[int], dilations: Sequence[int], groups: int
) -> np.ndarray:
    """A transposed convolution by its definition: every input element adds its multiple of the kernel."""
    spans = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    lengths = [(n - 1) * s + span for n, s, span in zip(x.shape[2:], strides, spans, strict=True)]
    result = np.zeros((len(x), weight.shape[1] * groups, *lengths), np.float32)
    per_group, out = x.shape[1] // groups, weight.shape[1]
    for channel in range(x.shape[1]):
        group = channel // per_group
        for place in itertools.product(*map(range, x.shape[2:])):
            area = tuple(
                slice(i * s, i * s + span, d) for i, s, span, d in zip(place, strides, spans, dilations, strict=True)
            )
            value = x[(slice(None), channel, *place)]
            into = (slice(None), slice(group * out, group * out + out), *area)
            result[into] += np.multiply.outer(value, weight[channel])
    return result


@FEW
@given(st.lists(st.tuples(window_cases(dilated=True), st.integers(1, 2)), min_size=4, max_size=5))
def test_transposed_convolutions(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[dict[str, Any], int]]
) -> None:
    cases = []
    for case, groups in drawn:
        kind = case["pad_type"] if case["pad_type"] != "same_lower" else "valid"
        sizes = [min(size, 4) for size in case["sizes"]]
        x = numbers((2, 2 * groups, *sizes), case["seed"])
        weight, bias = numbers((2 * groups, 3, *case["kernel"]), case["seed"] + 1), numbers((3 * groups,), 5)
        full = spread_out(x, weight, case["strides"], case["dilations"], groups)
        cut = [slice(None), slice(None)]
        for i, length in enumerate(full.shape[2:]):
            before, after = case["pads"][i] if kind == "custom" else (0, 0)
            if kind == "same":
                wanted = sizes[i] * case["strides"][i]
                full = np.pad(full, [(0, max(wanted - length, 0) if axis == i + 2 else 0) for axis in range(full.ndim)])
                before = max(length - wanted, 0) // 2
                after = full.shape[i + 2] - wanted - before
            cut.append(slice(before, full.shape[i + 2] - after))
        expected = full[tuple(cut)] + bias.reshape(-1, *[1] * len(sizes))
        if not expected.size:
            continue

        def build(
            x: Any,
            case: dict[str, Any] = case,
            kind: str = kind,
            weight: Any = weight,
            bias: Any = bias,
            groups: int = groups,
        ) -> Any:
            options = options_of(case | {"pad_type": kind}) | {"dilations": case["dilations"], "groups": groups}
            return mb.conv_transpose(x=x, weight=weight, bias=bias, **options)

        cases.append((build, x, expected))
    if cases:
        check(cases, tmp_path_factory.mktemp("transposed"))


@pytest.mark.parametrize(("padding", "extra"), [(1, 0), (1, 1), (2, 1)])
def test_transposed_convolution_of_a_given_output_shape_is_pytorchs(padding: int, extra: int, tmp_path: Path) -> None:
    x, weight, bias = numbers((1, 4, 5, 6), 0), numbers((4, 3, 3, 4), 1), numbers((3,), 2)
    tensors = [torch.from_numpy(each) for each in (x, weight, bias)]
    expected = F.conv_transpose2d(*tensors, stride=2, padding=padding, output_padding=extra).numpy()

    def build(x: Any) -> Any:
        pad = {"pad_type": "custom", "pad": [padding] * 4, "strides": [2, 2]}
        return mb.conv_transpose(x=x, weight=weight, bias=bias, output_shape=expected.shape, **pad)

    np.testing.assert_allclose(carried_out(build, [x], tmp_path)[0], expected, rtol=1e-4, atol=1e-5)
