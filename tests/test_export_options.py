"""Opsets, oldest iOS, an open batch and int8 at both ends: each read back from the file, and executed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from typer.testing import CliRunner

import mobilekit as mk
from mobilekit import pipeline, registry
from mobilekit.cli import app
from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.types import WeightForm

SIZE = 12
ANYWHERE = {name: not registry.runtime(name).unavailable() for name in ("onnx", "tflite", "coreml")}


class Mixed(nn.Module):
    """Operators that opset 18, 19 or 20 changed: reductions, resize, split, pad, gelu, mish."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.after, self.last = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = nn.functional.gelu(self.norm(self.first(image)))
        up = nn.functional.interpolate(nn.functional.max_pool2d(x, 2), scale_factor=2, mode="bilinear")
        near = nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), scale_factor=2)
        x = nn.functional.hardswish(self.depthwise(nn.functional.pad(x + up + near, (1, 1, 0, 0))))[:, :, :, 1:-1]
        left, right = x.chunk(2, 1)
        x = torch.cat([left.relu(), nn.functional.silu(right)], 1)
        pooled = self.last(self.after(x.mean((2, 3))))
        return torch.softmax(pooled, 1) + nn.functional.mish(self.last(x.amax((2, 3)))) + x.sum((2, 3))[:, :4]


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


class Scored(nn.Module):
    """Two inputs, two outputs, one of them a map."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(5, 4)

    def forward(self, image: torch.Tensor, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.relu(self.image(image) * self.vector(vector)[:, :, None, None])
        return {"map": found, "mean": found.mean((2, 3))}


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, SIZE, SIZE), dtype=np.float32)


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = kind()
    if kind is not Scored:
        module(torch.from_numpy(images(16, 0)))
    return module.eval()


def exported(kind: type[nn.Module], to: str, precision: str, out: Path, **options: object) -> mk.ExportedModel:
    given, example = images(60, 1), torch.zeros(1, 3, SIZE, SIZE)
    return mk.export(
        made(kind), example, to=[to], precision=precision, calibration=[given], out=out,
        options=mk.ExportOptions(**options),
    )[0]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("kind", [small, Mixed])
@pytest.mark.parametrize("opset", range(17, 23))
def test_every_opset_is_valid_and_right(opset: int, kind: type[nn.Module], precision: str, tmp_path: Path) -> None:
    import onnx

    model = exported(kind, "onnx", precision, tmp_path, opset=opset)
    proto = onnx.load(model.path)
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == opset
    assert model.parity.status == "executed"
    assert model.parity.sqnr_db is not None
    assert model.parity.sqnr_db > (90 if precision == "fp32" else 20)


def test_what_opset_17_lacks_is_named(tmp_path: Path) -> None:
    class Grown(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return nn.functional.interpolate(image, scale_factor=0.5, mode="bilinear", antialias=True)

    example = torch.zeros(1, 3, SIZE, SIZE)
    (model,) = mk.export(Grown(), example, to=["onnx"], out=tmp_path, options=mk.ExportOptions(opset=18))
    assert model.parity.status == "executed"
    with pytest.raises(MobilekitError, match="opset 17 has no Resize as the network needs it: use --opset 18 or newer"):
        mk.export(Grown(), example, to=["onnx"], out=tmp_path / "17", options=mk.ExportOptions(opset=17))
    assert not list((tmp_path / "17").glob("*.onnx"))


@pytest.mark.skipif(not ANYWHERE["coreml"], reason="coremltools is missing")
@pytest.mark.parametrize("ios", [15, 16, 17, 18])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_ios_has_its_specification(ios: int, precision: str, tmp_path: Path) -> None:
    import coremltools

    if ios < 17 and precision == "int8":
        with pytest.raises(
            MobilekitError, match=f"iOS {ios} cannot compute in int8: ask for iOS 17 or newer, or for fp16"
        ):
            exported(small, "coreml", precision, tmp_path, ios=ios)
        return
    model = exported(small, "coreml", precision, tmp_path, ios=ios)
    # https://apple.github.io/coremltools/docs-guides/source/target-conversion-formats.html
    assert coremltools.utils.load_spec(model.path).specificationVersion == {15: 6, 16: 7, 17: 8, 18: 9}[ios]
    assert set(model.facts.operators) <= {"int8", "fp16"} if precision == "int8" else {precision}
    assert precision in model.facts.operators
    assert model.facts.weights == {precision: 2}
    assert model.parity.status == "evaluated"


# ---------------------------------------------------------------- an open batch


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("kind", [small, Mixed])
def test_an_open_batch_runs_whole_batches(kind: type[nn.Module], precision: str, tmp_path: Path) -> None:
    import onnxruntime

    model = exported(kind, "onnx", precision, tmp_path, dynamic_batch=True)
    assert model.facts.inputs[0].shape == (-1, 3, SIZE, SIZE)
    assert model.facts.outputs[0].shape == (-1, 4)
    session, opened = onnxruntime.InferenceSession(model.path), registry.runtime("onnx").open(Path(model.path))
    for count in (1, 2, 5):
        batch = images(count, 7)
        with torch.no_grad():
            wanted = made(kind)(torch.from_numpy(batch)).numpy()
        (found,) = session.run(None, {"input": batch})
        np.testing.assert_allclose(found, wanted, atol=1e-4 if precision == "fp32" else 0.2 * np.abs(wanted).max())
        np.testing.assert_array_equal(opened([batch])[0], found)


def test_an_open_batch_of_several_tensors(tmp_path: Path) -> None:
    examples = (torch.zeros(1, 3, SIZE, SIZE), torch.zeros(1, 5))
    options = mk.ExportOptions(dynamic_batch=True, opset=17)
    (model,) = mk.export(made(Scored), examples, to=["onnx"], out=tmp_path, options=options)
    assert [tensor.shape[0] for tensor in (*model.facts.inputs, *model.facts.outputs)] == [-1] * 4
    for count in (1, 2, 5):
        given = images(count, 7), np.random.default_rng(count).standard_normal((count, 5), dtype=np.float32)
        with torch.no_grad():
            wanted = made(Scored)(*map(torch.from_numpy, given))
        for found, reference in zip(
            registry.runtime("onnx").open(Path(model.path))(given), wanted.values(), strict=True
        ):
            np.testing.assert_allclose(found, reference.numpy(), atol=1e-5)


@pytest.mark.skipif(not ANYWHERE["coreml"], reason="coremltools is missing")
def test_an_open_batch_in_a_package(tmp_path: Path) -> None:
    import coremltools

    model = exported(small, "coreml", "fp16", tmp_path, dynamic_batch=True)
    assert model.facts.inputs[0].shape == (-1, 3, SIZE, SIZE)
    assert model.facts.outputs[0].shape == (-1, 4)
    given = coremltools.utils.load_spec(model.path).description.input[0].type.multiArrayType
    assert (given.shapeRange.sizeRanges[0].lowerBound, given.shapeRange.sizeRanges[0].upperBound) == (1, 64)


def test_a_batch_in_the_code_cannot_be_left_open(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.reshape(1, -1)

    with pytest.raises(MobilekitError, match=r"network\.onnx: "):
        mk.export(
            Fixed(), torch.zeros(1, 3, SIZE, SIZE), to=["onnx"], out=tmp_path,
            options=mk.ExportOptions(dynamic_batch=True),
        )  # fmt: skip
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.skipif(not ANYWHERE["tflite"], reason="litert-torch is missing")
def test_an_open_batch_is_refused_in_tflite(tmp_path: Path) -> None:
    with pytest.raises(MobilekitError, match="TFLite files are written with batch 1"):
        exported(small, "tflite", "fp32", tmp_path, dynamic_batch=True)


# ---------------------------------------------------------------- int8 at both ends


@pytest.mark.skipif(not ANYWHERE["tflite"], reason="litert-torch is missing")
def test_int8_at_both_ends(tmp_path: Path) -> None:
    model = exported(small, "tflite", "int8", tmp_path, io="int8")
    for tensor in (*model.facts.inputs, *model.facts.outputs):
        assert tensor.dtype == "int8"
        assert tensor.scale is not None
        assert tensor.scale > 0
        assert tensor.zero_point is not None
    assert model.parity.status == "executed"
    assert model.parity.sqnr_db is not None
    assert model.parity.sqnr_db > 20
    plain = exported(small, "tflite", "int8", tmp_path / "plain")
    assert (plain.facts.inputs[0].dtype, plain.facts.outputs[0].dtype) == ("float32", "float32")


@pytest.mark.parametrize(
    ("to", "precision"), [("onnx", "int8"), ("onnx", "fp32"), ("tflite", "fp32"), ("coreml", "int8")]
)
def test_int8_ends_are_refused_by_name(to: str, precision: str, tmp_path: Path) -> None:
    if not ANYWHERE[to]:
        pytest.skip(f"nothing writes {to} here")
    with pytest.raises(
        MobilekitError, match="files take and give float32: int8 at both ends is for static TFLite int8"
    ):
        exported(small, to, precision, tmp_path, io="int8")


# ---------------------------------------------------------------- asking


@pytest.mark.parametrize("bad", [{"opset": 16}, {"opset": 23}, {"ios": 14}, {"ios": 19}, {"io": "uint8"}, {"other": 1}])
def test_options_have_bounds(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        mk.ExportOptions(**bad)


WORKLOAD = """
import torch
from torch import nn
def model(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
def example_input(): return torch.zeros(1, 3, 8, 8)
"""


def asked(folder: Path, *more: str) -> tuple[int, str, object]:
    path = folder / "net.py"
    path.write_text(WORKLOAD)
    done = CliRunner().invoke(app, ["export", str(path), "--out", str(folder / "out"), "--json", *more])
    return (
        done.exit_code,
        str(done.exception),
        json.loads(done.stdout)["models"] if done.stdout.startswith("{") else None,
    )


def test_options_of_the_command(tmp_path: Path) -> None:
    import onnx

    code, _, rows = asked(tmp_path, "--to", "onnx", "--opset", "18", "--dynamic-batch")
    assert code == 0
    assert rows[0]["facts"]["inputs"][0]["shape"] == [-1, 3, 8, 8]  # type: ignore[index]
    assert onnx.load(tmp_path / "out" / "net.onnx").opset_import[0].version == 18


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--to", "onnx", "--ios", "17"), "--ios is for coreml files: add coreml to --to"),
        (("--to", "coreml", "--opset", "17"), "--opset is for onnx files"),
        (("--to", "onnx", "--io", "uint8"), "--io is one of float, int8, not 'uint8'"),
    ],
)
def test_options_that_fit_nothing_are_bad_input(more: tuple[str, ...], said: str, tmp_path: Path) -> None:
    code, error, _ = asked(tmp_path, *more)
    assert code != 0
    assert re.search(re.escape(said), error)


@pytest.mark.parametrize("more", [("--opset", "16"), ("--opset", "23"), ("--ios", "14"), ("--ios", "19")])
def test_bounds_of_the_command(more: tuple[str, ...], tmp_path: Path) -> None:
    assert asked(tmp_path, "--to", "onnx,coreml", *more)[0] == 2


def test_bad_input_error_is_what_the_command_raises(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(WORKLOAD)
    done = CliRunner().invoke(app, ["export", str(path), "--to", "onnx", "--ios", "17", "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, BadInputError)


# ---------------------------------------------------------------- processors of int8 ONNX files


@pytest.mark.parametrize(("target", "dtype"), [("x86", np.uint8), ("arm", np.int8)])
def test_activations_are_signed_where_the_processor_is_arm(target: str, dtype: type, tmp_path: Path) -> None:
    import onnx

    model = exported(small, "onnx", "int8", tmp_path, target=target)
    assert model.parity.sqnr_db > 20
    graph = onnx.load(model.path).graph
    zeros = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"}
    found = {onnx.numpy_helper.to_array(tensor).dtype for tensor in graph.initializer if tensor.name in zeros}
    assert found == {np.dtype(dtype)}
    assert model.facts.operators["int8"] > 0


# ---------------------------------------------------------------- packed weights of packages


@pytest.mark.skipif(not ANYWHERE["coreml"], reason="coremltools is missing")
@pytest.mark.parametrize(
    ("form", "ios", "least_db"),
    [("int8", 7, 30), ("int4", 9, 12), ("palette8", 7, 40), ("palette6", 7, 28), ("palette4", 7, 15)],
)
def test_weights_of_a_package_are_packed(form: WeightForm, ios: int, least_db: float, tmp_path: Path) -> None:
    import coremltools

    order = pipeline.Order(("coreml",), "int8", mk.ExportOptions(weights=form), activations="float")
    Path(tmp_path, "net.py").write_text(DRAWN, encoding="utf-8")
    (model,), failures = pipeline.export_workload(str(tmp_path / "net.py"), order, tmp_path, pipeline.Listener())
    assert not failures
    assert coremltools.utils.load_spec(model.path).specificationVersion == ios
    assert model.facts.weights == {form: 2}
    assert model.parity.status == "evaluated"
    assert model.parity.sqnr_db > least_db


@pytest.mark.parametrize("to", [name for name in ("onnx", "tflite") if ANYWHERE[name]])
def test_forms_of_weights_that_a_format_has_not_are_refused(to: str, tmp_path: Path) -> None:
    with pytest.raises(MobilekitError, match="store quantised weights as int8: palette4 is for Core ML"):
        exported(small, to, "int8", tmp_path, weights="palette4")


@pytest.mark.skipif(not ANYWHERE["coreml"], reason="coremltools is missing")
def test_coarse_weights_and_int8_arithmetic_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(MobilekitError, match="int4 weights go with float activations"):
        exported(small, "coreml", "int8", tmp_path, weights="int4")


DRAWN = """
import torch
from torch import nn


def model():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64))
    return nn.Sequential(*layers)


def example_input():
    return torch.zeros(1, 3, 16, 16)


def calibration_data():
    return [torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))]
"""
