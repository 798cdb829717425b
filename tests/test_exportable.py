"""Networks that are only exported: several inputs and outputs, maps, one and three dimensions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import mobilekit as mk
from mobilekit import exportable, registry, workload
from mobilekit.cli import app
from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.signature import input_names, named_outputs

FORMATS = [name for name in ("onnx", "tflite", "coreml") if not registry.runtime(name).unavailable()]
EXECUTED = [name for name in FORMATS if name != "coreml"]


class Detector(nn.Module):
    """Two heads on one backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.boxes, self.scores = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.stem(image)
        boxes = self.boxes(found).flatten(2).reshape(len(image), 4, -1).transpose(1, 2)
        return {"boxes": boxes, "class scores": self.scores(found)}


class Described(nn.Module):
    """An image and a vector in."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector, self.last = nn.Conv2d(3, 8, 3), nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, image: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.image(image)).mean((2, 3)) + self.vector(vector))


class Segmenter(nn.Module):
    """A map out."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 5, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = torch.relu(self.down(image))
        return nn.functional.interpolate(self.up(found), scale_factor=2, mode="bilinear")


def sequence() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 4, 3),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 4, 3),
        nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip


IMAGE = (3, 16, 16)
NETWORKS = {
    "detector": (Detector, (IMAGE,), {"boxes": "NCL", "class_scores": "NCHW"}),
    "described": (Described, (IMAGE, (5,)), {"output": "NC"}),
    "segmenter": (Segmenter, (IMAGE,), {"output": "NCHW"}),
    "sequence": (sequence, ((3, 32),), {"output": "NC"}),
    "volume": (volume, ((2, 8, 8, 8),), {"output": "NC"}),
}
LAYOUTS = {1: "NC", 2: "NCL", 3: "NCHW", 4: "NCDHW"}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = NETWORKS[name][0]()
    module(*(torch.from_numpy(array) for array in batches(name, 0)))
    return module.eval()


def batches(name: str, seed: int, count: int = 20) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal((count, *shape), dtype=np.float32) for shape in NETWORKS[name][1])


def exported(name: str, to: str, precision: str, out: Path) -> mk.ExportedModel:
    given = batches(name, 1, count=100 if precision == "int8" else 20)
    examples = tuple(torch.from_numpy(array[:1]) for array in given)
    calibration = [given if len(given) > 1 else given[0]]
    return mk.export(made(name), examples, to=[to], precision=precision, calibration=calibration, out=out)[0]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_float_file_is_right_and_named(name: str, to: str, tmp_path: Path) -> None:
    model = exported(name, to, "fp32", tmp_path)
    channels_last = {"NCHW": "NHWC"} if to == "tflite" else {}
    shapes, outputs = NETWORKS[name][1:]
    wanted = [LAYOUTS[len(shape)] for shape in shapes]
    assert [tensor.layout for tensor in model.facts.inputs] == [channels_last.get(w, w) for w in wanted]
    assert [tensor.name for tensor in model.facts.inputs] == (["image", "vector"] if len(shapes) > 1 else ["input"])
    found = {tensor.name: tensor.layout for tensor in model.facts.outputs}
    assert list(found.items()) == [(key, channels_last.get(value, value)) for key, value in outputs.items()]
    if to in EXECUTED:
        assert model.parity.status == "executed"
        assert model.parity.sqnr_db is None or model.parity.sqnr_db > 90
        check_outputs(name, to, model.path, 1e-4)


def check_outputs(name: str, to: str, path: str, tolerance: float) -> None:
    """Run the file on other inputs than those that parity saw, and compare every output."""
    given = batches(name, 7, count=5)
    with torch.no_grad():
        wanted = named_outputs(made(name)(*(torch.from_numpy(array) for array in given)))
    found = registry.runtime(to).open(Path(path))(given)
    assert [values.shape for values in found] == [tuple(values.shape) for values in wanted.values()]
    for values, reference in zip(found, wanted.values(), strict=True):
        assert np.abs(values - reference.numpy()).max() < tolerance * float(reference.abs().max())


REFUSED = {("volume", "tflite"): "ai-edge-quantizer cannot quantise the network"}
"""The converter writes a three-dimensional max pool as a function of its own, which the quantiser does not follow."""


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_int8_is_right_or_refused(name: str, to: str, tmp_path: Path) -> None:
    if (name, to) in REFUSED:
        with pytest.raises(MobilekitError, match=REFUSED[name, to]):
            exported(name, to, "int8", tmp_path)
        assert list(tmp_path.iterdir()) == []
        return
    model = exported(name, to, "int8", tmp_path)
    assert model.facts.operators.get("int8", 0) > 0
    if to in EXECUTED:
        assert model.parity.sqnr_db is not None
        assert 20 < model.parity.sqnr_db < 80
        check_outputs(name, to, model.path, 0.2)


@pytest.mark.parametrize("name", ["detector", "described", "volume"])
def test_half_precision_packages(name: str, tmp_path: Path) -> None:
    if "coreml" not in FORMATS:
        pytest.skip("coremltools is missing")
    model = exported(name, "coreml", "fp16", tmp_path)
    assert set(model.facts.operators) == {"fp16"}
    assert [tensor.dtype for tensor in (*model.facts.inputs, *model.facts.outputs)] == ["float32"] * (
        len(NETWORKS[name][1]) + len(NETWORKS[name][2])
    )


BAD_BATCHES = {
    "a tuple of 2 tensors": lambda image, _: image,
    r"input tensors \(N, 5\), not \(20, 3, 16, 16\)": lambda image, _: (image, image),
    "gives 20 samples for one input and 3 for another": lambda image, vector: (image, vector[:3]),
    "values that are not finite": lambda image, vector: (image, vector * np.float32(np.nan)),
}


@pytest.mark.parametrize("said", BAD_BATCHES)
def test_calibration_has_a_batch_for_every_input(said: str, tmp_path: Path) -> None:
    examples = (torch.zeros(1, *IMAGE), torch.zeros(1, 5))
    given = BAD_BATCHES[said](*batches("described", 1))
    with pytest.raises(BadInputError, match=said):
        mk.export(made("described"), examples, to=["onnx"], precision="int8", calibration=[given], out=tmp_path)


def test_golden_vectors_of_several_tensors(tmp_path: Path) -> None:
    exported("detector", "onnx", "fp32", tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["golden"]
    assert (tmp_path / "golden.bin").stat().st_size > 0


# ---------------------------------------------------------------- names


def test_names_of_outputs() -> None:
    one = torch.zeros(1, 2)
    assert list(named_outputs(one)) == ["output"]
    assert list(named_outputs((one, [one, one]))) == ["output_0", "output_1_0", "output_1_1"]
    assert list(named_outputs({"a b": one, "c": (one, one)})) == ["a_b", "c_0", "c_1"]
    assert list(named_outputs({"mask": one}, inputs=("mask",))) == ["mask_output"]
    with pytest.raises(BadInputError, match="two outputs of the model would be called a_b"):
        named_outputs({"a b": one, "a_b": one})
    with pytest.raises(BadInputError, match=r"returns torch\.int64 as classes"):
        named_outputs({"classes": one.long()})
    with pytest.raises(BadInputError, match="returns NoneType as output_1"):
        named_outputs((one, None))
    with pytest.raises(BadInputError, match="nothing"):
        named_outputs({})


def test_names_of_inputs() -> None:
    class Any(nn.Module):
        def forward(self, *parts: torch.Tensor) -> torch.Tensor:
            return parts[0]

    assert input_names(Described(), 2) == ("image", "vector")
    assert input_names(Described(), 1) == ("input",)
    assert input_names(Any(), 2) == ("input_0", "input_1")


# ---------------------------------------------------------------- the command line

WORKLOAD = """
import torch
from tests.test_exportable import made, batches

def model(): return made("{name}")
def example_input(): return {example}
def calibration_data(): return [{batch}]
"""


def written(folder: Path, name: str) -> Path:
    shapes = NETWORKS[name][1]
    tensors = ", ".join(f"torch.zeros({(1, *shape)})" for shape in shapes)
    given = f"tuple(map(torch.from_numpy, batches('{name}', 1)))" + ("" if len(shapes) > 1 else "[0]")
    example = f"({tensors})" if len(shapes) > 1 else tensors
    path = folder / f"{name}.py"
    path.write_text(WORKLOAD.format(name=name, example=example, batch=given))
    return path


@pytest.mark.parametrize(("name", "precision"), [("described", "int8"), ("detector", "fp32"), ("sequence", "fp32")])
def test_the_command_exports_them(name: str, precision: str, tmp_path: Path) -> None:
    path, out = written(tmp_path, name), tmp_path / "models"
    asked = ["export", str(path), "--to", "onnx", "--precision", precision, "--out", str(out), "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["models"]
    assert row["parity"]["status"] == "executed"
    assert len(row["facts"]["inputs"]) == len(NETWORKS[name][1])
    assert [tensor["name"] for tensor in row["facts"]["outputs"]] == list(NETWORKS[name][2])


@pytest.mark.parametrize("name", ["described", "detector", "sequence"])
def test_a_plan_refuses_them_and_names_export(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="`mobilekit export` takes other networks too") as caught:
        workload.load(str(written(tmp_path, name)))
    assert "\n" not in str(caught.value)


def test_an_output_without_a_batch_is_refused() -> None:
    class Anchored(nn.Module):
        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return image, torch.arange(6.0).reshape(3, 2)

    with pytest.raises(BadInputError, match=r"output_1 of shape \(3, 2\) .* must be the batch"):
        exportable.of_module(Anchored(), torch.zeros(1, *IMAGE), [], "net")


@pytest.mark.parametrize("bad", [torch.zeros(1, 2, dtype=torch.int64), torch.zeros(3), (), np.zeros((1, 2)), [None]])
def test_bad_examples_are_refused(bad: object) -> None:
    with pytest.raises(BadInputError, match="must be a float32 tensor"):
        exportable.of_module(nn.Linear(2, 2), bad, [], "net")  # type: ignore[arg-type]


def test_a_session_wants_all_inputs(tmp_path: Path) -> None:
    for to in EXECUTED:
        model = exported("described", to, "fp32", tmp_path / to)
        with pytest.raises(BadInputError, match="takes 2 inputs, and 1 were given"):
            registry.runtime(to).open(Path(model.path))(batches("described", 1)[:1])


def test_an_input_that_nothing_reads_stays(tmp_path: Path) -> None:
    class Idle(nn.Module):
        def forward(self, image: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
            return image * 2

    examples = (torch.zeros(1, *IMAGE), torch.zeros(1, 5))
    for to in FORMATS:
        (model,) = mk.export(Idle(), examples, to=[to], out=tmp_path / to)
        assert [tensor.name for tensor in model.facts.inputs] == ["image", "unused"]
