"""The manifest: what apps read is enough to run the files, and what is wrong with one is said in a sentence."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import manifest_reader
import networks
import numpy as np
import onnxruntime
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import nn

from mobilekit import manifest, pipeline, schemas
from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.exportable import of_module
from mobilekit.store import Store
from mobilekit.types import ExportedModel, FileFacts, Parity, Preprocessing, QuantSpec, TensorSpec

Runner = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class Halves(nn.Module):
    """A map out of a map, so that layouts matter at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = networks.conv_bn(3, 8, stride=2)
        self.last = nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.stem(x))


@pytest.fixture(scope="module", params=["fp32", "int8"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX and TFLite files of a small network, with their manifest."""
    out = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = networks.settled(Halves())
        batch = torch.randn(8, 3, 16, 16).numpy()
    pipeline.export(
        net, networks.example(), to=["onnx", "tflite"], precision=request.param, calibration=[batch], out=out
    )
    return out


def onnx_runner(path: Path) -> Runner:
    session = onnxruntime.InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(None, feed), strict=True))


def tflite_runner(path: Path) -> Runner:
    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()

    def run(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for details in interpreter.get_input_details():
            interpreter.set_tensor(details["index"], feed[details["name"]])
        interpreter.invoke()
        return {d["name"]: interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()}

    return run


RUNNERS = {"onnx": onnx_runner, "tflite": tflite_runner}


def test_an_app_needs_nothing_else(exported: Path) -> None:
    found, _, _ = manifest_reader.load(exported)
    assert {model["runtime"] for model in found["models"]} == set(RUNNERS)
    for model in found["models"]:
        run = RUNNERS[model["runtime"]](exported / model["path"])
        error = manifest_reader.largest_error(exported, model, run)
        assert error <= model["tolerance"]
        assert error <= model["parity"]["max_abs_error"] * 1.01 + 1e-6
        assert model["tolerance"] < 0.5


def test_the_reader_notices_a_file_that_computes_something_else(exported: Path) -> None:
    found, _, _ = manifest_reader.load(exported)
    for model in found["models"]:
        run = RUNNERS[model["runtime"]](exported / model["path"])
        shifted = lambda feed, run=run: {name: np.roll(value, 1, -1) for name, value in run(feed).items()}  # noqa: E731
        assert manifest_reader.largest_error(exported, model, shifted) > model["tolerance"]


def test_the_reader_is_short_and_knows_nothing_of_mobilekit() -> None:
    text = Path(manifest_reader.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    tree = ast.parse(text)
    whole = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert whole | parts == {"hashlib", "json", "pathlib", "numpy"}


def test_a_written_manifest_is_valid_and_reads_back(exported: Path) -> None:
    document = json.loads((exported / "manifest.json").read_text(encoding="utf-8"))
    schema = json.loads(Path(schemas.__file__).with_name("manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(document)
    read = manifest.read(exported)
    assert json.loads(read.model_dump_json(by_alias=True)) == document
    assert manifest.read(exported / "manifest.json") == read
    for wrong in ({"schema": 1}, {"schema": 2, "golden": None}, {"models": 3}):
        assert list(jsonschema.Draft202012Validator(schema).iter_errors({**document, **wrong}))


@pytest.mark.parametrize("name", schemas.DOCUMENTS)
def test_committed_schemas_are_those_of_the_types(name: str) -> None:
    path = Path(schemas.__file__).with_name(f"{name}.schema.json")
    assert path.read_text(encoding="utf-8") == schemas.generated(name), "run scripts/write_schemas.py"


# ---------------------------------------------------------------- several inputs and outputs


def model_of(inputs: int, outputs: int, error: float | None = 0.5) -> ExportedModel:
    def ends(kind: str, count: int) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=f"{kind}{i}", shape=(1, 2), dtype="float32", layout="NC") for i in range(count))

    return ExportedModel(
        path="/somewhere/net.onnx",
        runtime="onnx",
        precision="int8",
        sha256="0" * 64,
        size_bytes=3,
        facts=FileFacts(inputs=ends("in", inputs), outputs=ends("out", outputs), operators={"int8": 1}),
        parity=Parity(status="executed" if error is not None else "structure-only", max_abs_error=error),
    )


def written(tmp_path: Path, **changes: Any) -> Path:
    inputs = {"image": np.arange(6 * 12, dtype=np.float32).reshape(6, 3, 2, 2), "age": np.ones((6, 2), np.float64)}
    outputs = {"box": np.full((6, 4), -7.0, np.float32), "map": np.zeros((6, 1, 2, 2)), "row": np.zeros((6, 2, 3))}
    workload = of_module(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 4, 4), [], "net")
    settings: dict[str, Any] = {"models": [model_of(2, 3)], "inputs": inputs, "outputs": outputs, **changes}
    spec = QuantSpec(operators={"0": "int8"})
    return manifest.write(Store(tmp_path), source=workload, quantisation=spec, **settings)


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    written(tmp_path)
    read = manifest.read(tmp_path)
    assert [(t.name, t.offset, t.shape, t.layout) for t in (*read.golden.inputs, *read.golden.outputs)] == [
        ("image", 0, (4, 3, 2, 2), "NCHW"),
        ("age", 192, (4, 2), "NC"),
        ("box", 224, (4, 4), "NC"),
        ("map", 288, (4, 1, 2, 2), "NCHW"),
        ("row", 352, (4, 2, 3), "NCL"),
    ]
    assert read.golden.size_bytes == (tmp_path / "golden.bin").stat().st_size == 448
    found, inputs, outputs = manifest_reader.load(tmp_path)
    assert inputs[0].ravel().tolist() == list(range(48))
    assert (outputs[0] == -7).all()
    assert found["models"][0]["quantisation"]["operators"] == {"0": "int8"}
    assert read.models[0].tolerance == pytest.approx(2 * 0.5 + 1e-4 * 7)


def test_vectors_of_another_network_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(MobilekitError, match="not for the 1 inputs and 1 outputs"):
        written(tmp_path, models=[model_of(1, 1)])
    assert not list(tmp_path.iterdir())


def test_what_was_not_run_has_no_tolerance(tmp_path: Path) -> None:
    written(tmp_path, models=[model_of(2, 3, error=None)])
    assert manifest.read(tmp_path).models[0].tolerance is None


# ---------------------------------------------------------------- what is wrong with one

Change = Callable[[dict[str, Any]], None]


def at(*keys: str | int, to: Any) -> Change:
    def change(document: dict[str, Any]) -> None:
        inner: Any = document
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to

    return change


WRONG: dict[str, tuple[Change, str]] = {
    "unknown schema": (at("schema", to=3), "wrong at schema: input should be 2, got 3"),
    "older schema": (at("schema", to=1), "wrong at schema: input should be 2, got 1"),
    "unknown key": (at("extra", to=1), "wrong at extra: there is no such field"),
    "golden outside": (at("golden", "path", to="../golden.bin"), "wrong at golden.path"),
    "golden absolute": (at("golden", "path", to="/etc/passwd"), "wrong at golden.path"),
    "golden is the parent": (at("golden", "path", to=".."), "wrong at golden.path"),
    "model outside": (at("models", 0, "path", to="..\\net.onnx"), r"wrong at models\[0\].path"),
    "model is golden": (at("models", 0, "path", to="golden.bin"), "a file is listed twice"),
    "golden missing": (at("golden", "path", to="absent.bin"), "golden vectors 'absent.bin' .* no such file"),
    "other sha256": (at("golden", "sha256", to="0" * 64), r"is not the file that .* states \(size and sha256\)"),
    "other size": (at("golden", "size_bytes", to=449), r"is not the file that .* states \(size and sha256\)"),
    "beyond the end": (at("golden", "inputs", 0, "offset", to=300), "ends behind the file's 448 bytes"),
    "huge shape": (at("golden", "inputs", 0, "shape", to=[4, 2**30, 2**30]), "ends behind the file's 448 bytes"),
    "negative shape": (at("golden", "inputs", 0, "shape", to=[4, -1]), r"wrong at golden.inputs\[0\].shape\[1\]"),
    "other samples": (at("golden", "samples", to=3), "does not hold 3 samples"),
    "no inputs": (at("golden", "inputs", to=[]), "wrong at golden.inputs"),
    "not for the files": (at("models", 0, "inputs", to=[]), "not for the 0 inputs and 3 outputs"),
    "wrong preprocessing": (at("preprocessing", to={"std": [0]}), r"wrong at preprocessing.std\[0\]"),
    "tolerance is no number": (at("models", 0, "tolerance", to="NaN"), r"wrong at models\[0\].tolerance"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_manifest_is_one_sentence(case: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    document = json.loads(path.read_text(encoding="utf-8"))
    change, said = WRONG[case]
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BadInputError, match=said) as caught:
        manifest.read(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert re.match("the manifest '|'golden.bin'|the golden vectors", str(caught.value))


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("name", ["golden.bin", "net.onnx"])
def test_links_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    written(folder)
    outside = tmp_path / name
    outside.write_bytes((folder / "golden.bin").read_bytes())
    (folder / name).unlink(missing_ok=True)
    os.symlink(outside, folder / name)
    with pytest.raises(BadInputError, match=f"its file '{name}' is a link that leaves the folder"):
        manifest.read(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "golden.bin").unlink()
    os.symlink(tmp_path / "golden.bin", tmp_path / "golden.bin")
    with pytest.raises(BadInputError, match=r"the golden vectors 'golden.bin' .* cannot be read"):
        manifest.read(tmp_path)


def test_a_damaged_golden_file_is_noticed(tmp_path: Path) -> None:
    written(tmp_path)
    blob = bytearray((tmp_path / "golden.bin").read_bytes())
    blob[100] ^= 1
    (tmp_path / "golden.bin").write_bytes(blob)
    with pytest.raises(BadInputError, match="is not the file that"):
        manifest.read(tmp_path)


# ---------------------------------------------------------------- preprocessing


def test_preprocessing_keeps_what_it_does_not_know() -> None:
    said = {
        "mean": [0.5, 0.5, 0.5],
        "std": [1, 1, 1],
        "channel_order": "RGB",
        "background": {"colour": ["black", None]},
    }
    kept = json.loads(Preprocessing.model_validate(said).model_dump_json())
    assert {key: value for key, value in kept.items() if value is not None} == said


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": [0.5], "std": [1, 1]},
        {"channels": 3, "channel_order": "gray"},
        {"std": [-1.0]},
        {"mean": []},
        {"input_range": [255, 0]},
        {"input_size": [0, 224]},
        {"input_size": 224},
        {"layout": "CHW"},
        {"crop": "left"},
        {"resize": {}},
        {"resize": {"size": [8, 8], "shorter_side": 8}},
        {"resize": {"shorter_side": 8, "interpolation": "cubist"}},
    ],
)
def test_preprocessing_that_says_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Preprocessing.model_validate(wrong)


@pytest.mark.parametrize("name", ["fashion_mnist", "efficientnet_lite0"])
def test_the_bundled_workloads_state_theirs(name: str) -> None:
    module = importlib.import_module(f"mobilekit.workloads.{name}")
    stated = Preprocessing.model_validate(module.preprocessing())
    assert None not in (stated.mean, stated.std, stated.input_range, stated.input_size, stated.resize, stated.crop)
