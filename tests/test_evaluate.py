"""Figures of closeness against their definitions, written out a second time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from mobilekit import evaluate
from mobilekit.errors import MobilekitError, UnsupportedError
from mobilekit.workload import Workload

LOGITS = hnp.arrays(np.float32, (5, 4), elements=st.floats(-20, 20, width=32))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def workload(**changes: Any) -> Workload:
    inputs = (torch.from_numpy(np.random.default_rng(0).standard_normal((150, 1, 6, 6)).astype(np.float32)),)
    given: dict[str, Any] = {
        **{"spec": "net", "name": "net", "key": "", "module": net().eval(), "example_input": torch.zeros(1, 1, 6, 6)},
        **{"calibration": inputs, "held_back": inputs, "trusted": True, "labelled": False, "data": "made up"},
        **dict.fromkeys(("train_data", "evaluate", "loss", "preprocessing", "labels")),
        "accuracy_kind": "agreement",
    }
    return Workload(**{**given, **changes})


# ---------------------------------------------------------------- divergence


@given(LOGITS, LOGITS)
def test_divergence_of_classes_is_the_mean_kl(first: np.ndarray, second: np.ndarray) -> None:
    total = 0.0
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        p = [math.exp(v) / sum(math.exp(w) for w in a) for v in a]
        q = [math.exp(v) / sum(math.exp(w) for w in b) for v in b]
        total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)
    assert evaluate.divergence(first, second) == pytest.approx(total / len(first), rel=1e-5, abs=1e-9)


@given(LOGITS)
def test_equal_outputs_do_not_diverge(outputs: np.ndarray) -> None:
    assert evaluate.divergence(outputs, outputs) == pytest.approx(0, abs=1e-12)
    assert evaluate.divergence(outputs, outputs + 3) == pytest.approx(0, abs=1e-9)  # softmax does not see it


def test_divergence_of_maps_is_a_relative_error() -> None:
    reference = np.full((2, 1, 2, 2), 2.0, np.float32)
    assert evaluate.divergence(reference, reference * 1.5) == pytest.approx(0.25)
    assert evaluate.divergence(reference, np.zeros_like(reference)) == pytest.approx(1.0)
    one = np.array([[1.0], [2.0]], np.float32)
    assert evaluate.divergence(one, one * 2) == pytest.approx(1.0)


def test_huge_logits_do_not_overflow() -> None:
    far = np.array([[3e38, -3e38]], np.float32)
    assert math.isfinite(evaluate.divergence(far, far))
    assert evaluate.divergence(far, -far) > 1e38


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_are_the_worst(bad: float) -> None:
    outputs = np.zeros((3, 4), np.float32)
    broken = outputs.copy()
    broken[1, 2] = bad
    assert evaluate.divergence(outputs, broken) == evaluate.NOT_FINITE


# ---------------------------------------------------------------- agreement and parity


def test_agreement() -> None:
    first = np.array([[1, 2, 3], [3, 2, 1], [0, 5, 0], [9, 0, 0]], np.float32)
    second = np.array([[0, 0, 1], [0, 0, 1], [0, 1, 0], [1, 0, 0]], np.float32)
    assert evaluate.top1_agreement(first, second) == 0.75
    maps = np.zeros((1, 2, 2, 2), np.float32)
    other = maps.copy()
    other[0, 1, 0, 0] = 1
    assert evaluate.top1_agreement(maps, other) == 0.75


@given(LOGITS, st.floats(0.001, 1))
def test_parity_follows_its_definitions(reference: np.ndarray, scale: float) -> None:
    other = reference + np.float32(scale) * np.sin(np.arange(reference.size, dtype=np.float32)).reshape(5, 4)
    found = evaluate.parity(reference, other)
    a, b = reference.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    assert found.samples == 5
    assert found.status == "executed"
    assert found.max_abs_error == pytest.approx(max(abs(a - b)))
    if a.any():
        ratio = sum(v * v for v in a) / sum((v - w) ** 2 for v, w in zip(a, b, strict=True))
        assert found.sqnr_db == pytest.approx(10 * math.log10(ratio), abs=1e-6)
        assert found.cosine == pytest.approx(sum(a * b) / math.sqrt(sum(a * a) * sum(b * b)), abs=1e-9)
    else:
        assert found.sqnr_db is None
        assert found.cosine is None


def test_bit_exact_parity() -> None:
    outputs = np.ones((2, 3), np.float32)
    found = evaluate.parity(outputs, outputs)
    assert found.sqnr_db is None
    assert found.max_abs_error == 0
    assert found.top1_agreement == 1
    assert found.cosine == pytest.approx(1)


class File:
    """A runtime whose files give these outputs."""

    def __init__(self, outputs: Any, execution: str = "executed") -> None:
        self.outputs, self.execution = outputs, execution

    def open(self, path: Path) -> Any:
        if isinstance(self.outputs, Exception):
            raise self.outputs
        return self.outputs


def test_parity_of_a_file() -> None:
    module, batch = net().eval(), np.random.default_rng(1).standard_normal((70, 1, 6, 6)).astype(np.float32)

    def session(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        with torch.inference_mode():
            return [module(torch.from_numpy(inputs[0])).numpy() + np.float32(0.5)]

    found = evaluate.file_parity(File(session), Path("a.onnx"), module, [(batch[:30],), (batch[30:],)])  # type: ignore[arg-type]
    assert (found.status, found.samples) == ("executed", 70)
    assert found.max_abs_error == pytest.approx(0.5, rel=1e-4)


def test_a_file_that_is_not_run_by_its_own_engine_is_evaluated() -> None:
    zeros = np.zeros((2, 1, 6, 6), np.float32)
    module = net().eval()
    runtime = File(lambda batches: [evaluate.outputs(module, torch.from_numpy(batches[0]))], "evaluated")
    found = evaluate.file_parity(runtime, Path("a"), module, [(zeros,)])  # type: ignore[arg-type]
    assert (found.status, found.samples, found.sqnr_db) == ("evaluated", 2, None)


def test_a_file_that_cannot_run_here_is_structure_only() -> None:
    found = evaluate.file_parity(File(UnsupportedError("not here")), Path("a"), net(), [])  # type: ignore[arg-type]
    assert (found.status, found.note, found.sqnr_db) == ("structure-only", "not here", None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_file_with_nan_is_refused(bad: float) -> None:
    runtime = File(lambda batches: [np.full((len(batches[0]), 3), bad, np.float32)])
    with pytest.raises(MobilekitError, match=r"a\.onnx gives values that are not finite"):
        evaluate.file_parity(runtime, Path("a.onnx"), net(), [(np.zeros((2, 1, 6, 6), np.float32),)])  # type: ignore[arg-type]


# ---------------------------------------------------------------- accuracy


def test_without_evaluate_it_is_the_agreement_with_the_original() -> None:
    own = workload()
    other = net()
    with torch.no_grad():
        other[4].bias[1] += 0.05  # type: ignore[union-attr,index]
    inputs = torch.cat(own.calibration)
    with torch.inference_mode():
        agree = (own.module(inputs).argmax(1) == other(inputs).argmax(1)).float().mean().item()
    assert evaluate.accuracy(own, own.module) == 1.0
    assert evaluate.accuracy(own, other) == pytest.approx(agree)


@pytest.mark.parametrize("value", [0.75, np.float32(0.75), torch.tensor(0.75), torch.tensor([0.75])])
def test_evaluate_may_return_any_number(value: Any) -> None:
    assert evaluate.accuracy(workload(evaluate=lambda _: value), net()) == 0.75


@pytest.mark.parametrize("value", [None, "good", math.nan, math.inf, {"top1": 0.5}, torch.ones(3)])
def test_evaluate_that_returns_no_number(value: Any) -> None:
    with pytest.raises(MobilekitError, match=r"^evaluate\(\) of 'net' returned "):
        evaluate.accuracy(workload(evaluate=lambda _: value), net())


def test_evaluate_that_raises() -> None:
    def broken(_: nn.Module) -> float:
        raise FileNotFoundError("no images in /data")

    with pytest.raises(MobilekitError, match=r"^evaluate\(\) of 'net' fails: no images in /data$"):
        evaluate.accuracy(workload(evaluate=broken), net())


def test_a_file_looks_like_a_module_to_evaluate() -> None:
    def judge(model: nn.Module) -> float:
        device = next(model.parameters()).device  # what evaluation loops do
        model.eval()
        return float(model(torch.ones(3, 1, 6, 6).to(device)).sum())

    session = evaluate.SessionModule(lambda batches: [np.full((len(batches[0]), 2), 0.5, np.float32)])
    assert evaluate.accuracy(workload(evaluate=judge), session) == 3.0


def test_evaluate_cannot_change_the_network() -> None:
    own = workload(evaluate=lambda model: float(model.train()(torch.ones(2, 1, 6, 6)).sum() * 0))
    module = own.module.eval()
    evaluate.accuracy(own, module)
    assert not module.training


def test_outputs_are_batched_and_float() -> None:
    module = net().eval()
    inputs = torch.randn(130, 1, 6, 6)
    with torch.inference_mode():
        whole = module(inputs).numpy()
    np.testing.assert_allclose(evaluate.outputs(module, inputs), whole, atol=1e-6)
