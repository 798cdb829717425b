"""What a measuring program reads and writes: types, schemas, examples and mobilekit's own program say the same."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import ValidationError
from test_devices import write_onnx, write_tflite

from mobilekit import schemas
from mobilekit.devices import _session
from mobilekit.types import BenchModel, BenchRequest, RunnerRequest, RunnerResult

DATA = Path(__file__).with_name("data")
PAGE = Path(__file__).parent.parent / "docs" / "bench_protocol.md"


def validator(name: str) -> Any:
    schema = json.loads(Path(schemas.__file__).with_name(f"{name}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def golden(name: str) -> dict[str, Any]:
    return dict(json.loads((DATA / f"{name}.json").read_text(encoding="utf-8")))


def test_the_examples_are_what_the_schemas_and_types_say() -> None:
    validator("runner_request").validate(golden("runner_request"))
    validator("runner_result").validate(golden("runner_result"))
    request = RunnerRequest.model_validate(golden("runner_request"))
    result = RunnerResult.model_validate_json((DATA / "runner_result.json").read_bytes())
    assert json.loads(request.model_dump_json(by_alias=True)) == golden("runner_request")
    indices = {entry.index for entry in (*result.measurements, *result.failures)}
    assert indices == set(range(len(request.models)))
    (output,) = result.measurements[0].outputs
    values = np.frombuffer(base64.b64decode(output.data), "<f4").reshape(output.shape)
    assert values.tolist() == [[0.25, 0.75]]


def test_what_is_written_for_a_program_is_what_the_schema_says() -> None:
    model = BenchModel(name="a", path="/here/a.onnx", runtime="onnx", inputs=("/here/x.bin",))
    asked = json.loads(_session.request_text(BenchRequest(models=(model,)), lambda path: path.replace("here", "there")))
    validator("runner_request").validate(asked)
    assert set(asked) == set(golden("runner_request")), "every key is always there"
    assert asked["models"][0]["path"] == "/there/a.onnx"
    assert asked["models"][0]["inputs"] == ["/there/x.bin"]


def test_mobilekits_own_program(tmp_path: Path) -> None:
    paths = write_onnx(tmp_path / "a.onnx"), write_tflite(tmp_path / "b.tflite"), tmp_path / "c.onnx"
    paths[2].write_bytes(b"damaged")
    models = tuple(BenchModel(name=path.stem, path=str(path), runtime=path.suffix[1:]) for path in paths)
    request = BenchRequest(models=models, runs=10, max_seconds=2.0, per_operator=True)
    (tmp_path / "request.json").write_text(_session.request_text(request, str), encoding="utf-8")
    command = [sys.executable, str(_session.RUNNER), str(tmp_path / "request.json"), str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    validator("runner_result").validate(json.loads(text))
    result = RunnerResult.model_validate_json(text)
    assert [entry.index for entry in result.measurements] == [0, 1]
    assert [(entry.stage, entry.index) for entry in result.failures] == [("load", 2)]
    said = [line for line in done.stdout.splitlines() if _session.STAGE.fullmatch(line)]
    assert said == ["load 0", "load 1", "load 2", "warm 0", "warm 1", "rounds", "operators", "done"]


def changed(**changes: Any) -> dict[str, Any]:
    document = golden("runner_result")
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = document
        for part in parents:
            place = place[int(part) if part.isdigit() else part]
        place[last] = value
    return document


WRONG = {
    "schema": changed(schema=2),
    "a key of their own": changed(more=1),
    "no time zone or date": changed(conditions__started_at=5),
    "words over two lines": changed(conditions__compute_unit="cpu\nand more"),
    "too hot": changed(conditions__temperature_before_c=1000.0),
    "negative": changed(measurements__0__samples_ms=[-1.0]),
    "longer than ten minutes": changed(measurements__0__samples_ms=[1e9]),
    "text": changed(measurements__0__samples_ms=["1"]),
    "a stage of their own": changed(failures__0__stage="elsewhere"),
    "index": changed(measurements__0__index=-1),
    "no result": {},
}


@pytest.mark.parametrize("name", WRONG)
def test_schema_and_type_refuse_the_same(name: str) -> None:
    assert list(validator("runner_result").iter_errors(WRONG[name]))
    with pytest.raises(ValidationError):
        RunnerResult.model_validate_json(json.dumps(WRONG[name]))


def test_the_page_names_every_key() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in ("runner_request", "runner_result"):
        schema = validator(name).schema
        parts = [schema, *schema["$defs"].values()]
        for key in {key for part in parts for key in part["properties"]}:
            assert f"`{key}`" in page or f".{key}`" in page or f"[].{key}`" in page, f"{key} is missing in {PAGE}"
