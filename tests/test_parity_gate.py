"""A file that differs from its network is not shipped: what is tried, what is recorded, and which operator is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import mobilekit as mk
from mobilekit import evaluate, registry
from mobilekit.cli import app
from mobilekit.drift import first_fall, node_values
from mobilekit.errors import MobilekitError
from mobilekit.pipeline.shipping import failed_check
from mobilekit.probes import probes
from mobilekit.types import ExportJob, Parity, ParityCheck

KINDS = ["calibration", "random", "zeros", "constant", "saturating"]
EXECUTED = [name for name in ("onnx", "tflite") if not registry.runtime(name).unavailable()]
Damage = Callable[[Path], None]


class Branched(nn.Module):
    """Four layers with weights, a residual sum, and a batch norm that exporters fold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = self.stem(image)
        return self.head((torch.relu(self.left(found)) + self.right(found)).mean((2, 3)))


class Heads(Branched):
    """Two outputs, which no plan takes."""

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        found = self.stem(image)
        return {"left": torch.relu(self.left(found)), "right": self.right(found)}


def made(kind: type[nn.Module] = Branched) -> nn.Module:
    torch.manual_seed(0)
    module = kind()
    module(torch.from_numpy(images(16, 0)))
    return module.eval()


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 12, 12), dtype=np.float32)


def exported(to: str, precision: str, out: Path, kind: type[nn.Module] = Branched) -> mk.ExportedModel:
    example = torch.zeros(1, 3, 12, 12)
    return mk.export(made(kind), example, to=[to], precision=precision, calibration=[images(60, 1)], out=out)[0]


# ---------------------------------------------------------------- healthy files


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("to", EXECUTED)
def test_a_healthy_file_passes_with_every_kind(to: str, precision: str, tmp_path: Path) -> None:
    parity = exported(to, precision, tmp_path).parity
    assert [check.kind for check in parity.checks] == KINDS
    assert [check.samples for check in parity.checks] == [60, 8, 1, 2, 2]
    assert parity.checks[0].sqnr_db == parity.sqnr_db == parity.checks[0].judged_db
    if precision == "fp32":
        assert all(check.judged_db is None or check.judged_db > 90 for check in parity.checks)
    assert all(math.isfinite(check.max_abs_error) for check in parity.checks)


@given(st.integers(1, 5), st.floats(-1e3, 1e3, width=32), st.floats(0.125, 1e3, width=32))
def test_probes_stay_in_range(count: int, low: float, width: float) -> None:
    real = np.random.default_rng(0).uniform(low, low + width, (count, 2, 3)).astype(np.float32)
    found = probes((real, real))
    for kind, arrays in found.items():
        assert len(arrays) == 2
        assert all(array.dtype == np.float32 and array.shape[1:] == (2, 3) for array in arrays)
        assert all(np.isfinite(array).all() for array in arrays)
        if kind in ("random", "constant"):
            assert all(array.min() >= real.min() and array.max() <= real.max() for array in arrays)
    assert not found["zeros"][0].any()
    assert {float(v) for v in found["constant"][0].ravel()} == {float(real.min()), float(real.max())}
    assert np.abs(found["saturating"][0]).max() <= 10 * np.abs(real).max() * (1 + 1e-6)
    assert not np.array_equal(found["random"][0], found["random"][1])  # of two inputs
    np.testing.assert_array_equal(found["random"][0], probes((real,))["random"][0])  # seeded


# ---------------------------------------------------------------- damaged files


def scale_onnx(shape: tuple[int, ...], factor: float) -> Damage:
    """One weight of a file, told by its shape, times a factor."""

    def damage(path: Path) -> None:
        import onnx
        from onnx import numpy_helper

        model = onnx.load(str(path))
        (tensor,) = (t for t in model.graph.initializer if tuple(t.dims) == shape and t.data_type == 1)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
        path.write_bytes(model.SerializeToString())

    return damage


def scale_tflite(shape: tuple[int, ...], factor: float) -> Damage:
    def damage(path: Path) -> None:
        from mobilekit.runtimes._tflite_tables import packed, unpacked

        model = unpacked(path.read_bytes())
        graph = model.subgraphs[0]
        stored = [t for t in graph.tensors if tuple(t.shape) == shape and model.buffers[t.buffer].data is not None]
        (tensor,) = stored
        values = np.asarray(model.buffers[tensor.buffer].data, np.uint8).view(np.float32) * np.float32(factor)
        model.buffers[tensor.buffer].data = values.view(np.uint8)
        path.write_bytes(packed(model))

    return damage


def damaged(monkeypatch: pytest.MonkeyPatch, to: str, damage: Damage) -> None:
    """Files of the format come out with this damage."""
    kind = type(registry.runtime(to))
    export = kind.export

    def broken(self: object, job: ExportJob) -> None:
        export(self, job)
        damage(Path(job.path))

    monkeypatch.setattr(kind, "export", broken)


CASES = {
    "onnx stem": ("onnx", scale_onnx((8, 3, 3, 3), 3.0), "stem.0", "behind the input"),
    "onnx branch": ("onnx", scale_onnx((8, 8, 3, 3), 0.5), "left", "dB before it"),
    "onnx shortcut": ("onnx", scale_onnx((8, 8, 1, 1), -1.0), "right", "dB before it"),
    "onnx head": ("onnx", scale_onnx((4, 8), 1.01), "head", "dB before it"),
    "tflite stem": ("tflite", scale_tflite((8, 3, 3, 3), 3.0), "stem.0", "behind the input"),
    "tflite branch": ("tflite", scale_tflite((8, 3, 3, 8), 0.5), "left", "dB before it"),
    "tflite shortcut": ("tflite", scale_tflite((8, 1, 1, 8), -1.0), "right", "dB before it"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_file_is_refused_and_its_operator_named(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to, damage, operator, before = CASES[case]
    if to not in EXECUTED:
        pytest.skip(f"nothing runs {to} here")
    damaged(monkeypatch, to, damage)
    with pytest.raises(MobilekitError) as caught:
        exported(to, "fp32", tmp_path)
    said = str(caught.value)
    assert "dB to the PyTorch network on calibration inputs, less than 60; the first operator where it falls is" in said
    named = said.partition("where it falls is ")[2].partition(":")[0]
    assert named.startswith(f"{operator} (")
    assert before in said
    assert list(tmp_path.glob("*.*")) == []


def test_a_damaged_int8_file_is_refused_and_its_operator_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(path: Path) -> None:
        import onnx
        from onnx import numpy_helper

        model = onnx.load(str(path))
        (tensor,) = (t for t in model.graph.initializer if t.name.startswith("left.weight") and "scale" in t.name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(20), tensor.name))
        path.write_bytes(model.SerializeToString())

    damaged(monkeypatch, "onnx", damage)
    with pytest.raises(MobilekitError, match=r"on calibration inputs, less than 10; .*where it falls is left \("):
        exported("onnx", "int8", tmp_path)
    assert list(tmp_path.glob("*.*")) == []


def test_a_damaged_head_of_two_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged(monkeypatch, "onnx", scale_onnx((8, 8, 1, 1), 1.1))
    with pytest.raises(MobilekitError, match=r"PyTorch network in right on calibration inputs.*falls is right"):
        exported("onnx", "fp32", tmp_path, Heads)


WORKLOAD = """
import torch
from tests.test_parity_gate import images, made
def model(): return made()
def example_input(): return torch.zeros(1, 3, 12, 12)
def calibration_data(): return [torch.from_numpy(images(30, 1))]
"""


def test_a_damaged_file_is_a_failure_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = tmp_path / "net.py", tmp_path / "out"
    path.write_text(WORKLOAD)
    damaged(monkeypatch, "onnx", scale_onnx((4, 8), 2.0))
    to = ",".join(EXECUTED)
    done = CliRunner().invoke(app, ["export", str(path), "--to", to, "--out", str(out), "--json"])
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert [row["runtime"] for row in document["models"]] == [name for name in EXECUTED if name != "onnx"]
    (failure,) = document["failures"]
    assert (failure["stage"], failure["subject"]) == ("export", "net.onnx")
    assert "head" in failure["message"]
    assert failure["remedy"]
    assert not (out / "net.onnx").exists()


def test_a_file_may_fail_at_the_edges_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clamp just above what calibration inputs reach."""
    with torch.no_grad():
        most = made()(torch.from_numpy(images(60, 1))).abs().max().numpy() * np.float32(1.01)

    def clamp(path: Path) -> None:
        import onnx
        from onnx import helper, numpy_helper

        model = onnx.load(str(path))
        result = model.graph.output[0].name
        for node in model.graph.node:
            node.output[:] = ["unclamped" if name == result else name for name in node.output]
        model.graph.initializer.extend([numpy_helper.from_array(-most, "low"), numpy_helper.from_array(most, "high")])
        model.graph.node.append(helper.make_node("Clip", ["unclamped", "low", "high"], [result]))
        path.write_bytes(model.SerializeToString())

    damaged(monkeypatch, "onnx", clamp)
    with pytest.raises(MobilekitError, match=r"dB to the PyTorch network on (random|constant) inputs, less than 60"):
        exported("onnx", "fp32", tmp_path)


# ---------------------------------------------------------------- the gate


def row(kind: str, judged: float | None) -> ParityCheck:
    return ParityCheck(
        kind=kind, output="output", sqnr_db=judged, judged_db=judged, cosine=None, top1_agreement=None,
        max_abs_error=0.0, samples=1,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_judged_on_calibration_inputs_alone(kind: str) -> None:
    parity = Parity(status="executed", checks=(row(kind, 5.0),))
    assert (failed_check(parity, "int8") is not None) == (kind == "calibration")
    assert failed_check(parity, "fp32") is not None
    assert failed_check(Parity(status="executed", checks=(row(kind, None),)), "fp32") is None


class Given:
    """A runtime whose files do this."""

    execution = "executed"

    def __init__(self, session: Callable[[list[np.ndarray]], list[np.ndarray]]) -> None:
        self.session = session

    def open(self, path: Path) -> object:
        return self.session


def test_an_output_of_zeros_must_stay_zero() -> None:
    module = nn.Conv2d(1, 1, 1)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    real = [(np.ones((2, 1, 3, 3), np.float32),)]
    right = evaluate.file_parity(Given(lambda given: [given[0] * 0]), Path("a"), module, real)  # type: ignore[arg-type]
    wrong = evaluate.file_parity(Given(lambda given: [given[0]]), Path("a"), module, real)  # type: ignore[arg-type]
    assert failed_check(right, "fp32") is None
    assert failed_check(wrong, "fp32") is not None


def test_values_that_are_not_finite_at_the_edges_are_refused() -> None:
    module = nn.Identity()

    def session(given: list[np.ndarray]) -> list[np.ndarray]:
        return [np.where(np.abs(given[0]) > 5, np.float32(np.inf), given[0])]

    real = [(np.random.default_rng(0).uniform(-1, 1, (4, 3)).astype(np.float32),)]
    with pytest.raises(MobilekitError, match="gives values that are not finite on saturating inputs"):
        evaluate.file_parity(Given(session), Path("a.onnx"), module, real)  # type: ignore[arg-type]


def test_a_network_that_overflows_itself_is_not_held_against_the_file() -> None:
    class Grows(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return torch.exp(values * 20)

    def session(given: list[np.ndarray]) -> list[np.ndarray]:
        return [np.exp(given[0] * 20)]

    real = [(np.linspace(-4, 4, 12, dtype=np.float32).reshape(4, 3),)]
    with np.errstate(over="ignore"):
        found = evaluate.file_parity(Given(session), Path("a"), Grows(), real)  # type: ignore[arg-type]
    assert [check.kind for check in found.checks] == KINDS[:-1]


# ---------------------------------------------------------------- drift


def test_what_nodes_compute() -> None:
    module, sample = made(), (images(1, 3),)
    values = node_values(module, sample)
    with torch.no_grad():
        wanted = module(torch.from_numpy(sample[0])).numpy()
    np.testing.assert_allclose(values[-1].value, wanted, rtol=1e-5)
    exact = {one.node: (one.value,) for one in values}
    assert first_fall(module, sample, exact, 60) is None
    assert first_fall(module, sample, {}, 60) is not None
