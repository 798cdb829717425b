"""Measurements that a phone app shared: they enter the folder once, and what is wrong with one changes nothing."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from test_cli import Cli, one_sentence, run  # noqa: F401  (a fixture)
from test_reports import sample_report

import mobilekit as mk
from mobilekit import pipeline, schemas
from mobilekit.errors import BadInputError, StorageError
from mobilekit.pipeline import summary
from mobilekit.store import Store
from mobilekit.types import Report, SharedResult

GOLDEN = Path(__file__).with_name("data") / "shared_result.json"
SHA256 = "9f3c" * 16
"""Of a model in the sample report."""


def example(**changes: Any) -> dict[str, Any]:
    return {**json.loads(GOLDEN.read_text(encoding="utf-8")), "model_sha256": SHA256, **changes}


def told(folder: Path, document: Any) -> Path:
    path = folder / "result.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plan's folder whose report has one model."""
    report = sample_report()
    made = tmp_path / "out"
    summary.render(Store(made), report.model_copy(update={"models": report.models[1:2]}))
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "report.json").read_text(encoding="utf-8"))["models"][0]["measurements"])


# ---------------------------------------------------------------- the document


def test_the_example_is_what_the_schema_says() -> None:
    schema = json.loads(Path(schemas.__file__).with_name("shared_result.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    document = json.loads(GOLDEN.read_text(encoding="utf-8"))
    validator.validate(document)
    read = SharedResult.model_validate_json(GOLDEN.read_bytes())
    assert read.device.name == "Google Pixel 4 (SM8150)"
    for change in WRONG.values():
        if isinstance(change[0], dict) and not change[2:]:
            assert list(validator.iter_errors({**document, **change[0]})), change


# ---------------------------------------------------------------- what comes in


def test_a_result_enters_like_any_measurement(folder: Path) -> None:
    before = rows(folder)
    made = pipeline.import_result(told(folder.parent, example()), folder)
    (*kept, row) = rows(folder)
    assert kept == before
    assert row == json.loads(made.row.model_dump_json())
    assert (row["device"], row["origin"], row["threads"]) == ("Google Pixel 4 (SM8150)", "device", 1)
    cpu, wall = example()["cpu_samples_ms"], example()["samples_ms"]
    assert (row["median_ms"], row["clock"], row["min_ms"]) == (pytest.approx(3.395), "cpu", min(cpu))
    assert (row["wall_median_ms"], row["samples"]) == (pytest.approx(3.405), len(wall))
    (line,) = (folder / "measurements.jsonl").read_text(encoding="utf-8").splitlines()
    raw = json.loads(line)
    assert (raw["samples_ms"], raw["cpu_samples_ms"], raw["warmup"], raw["load_ms"]) == (wall, cpu, 5, 12.5)
    assert (raw["thermal_before"], raw["thermal_after"], raw["temperature_before_c"]) == ("none", "light", 29.5)
    assert (raw["app"], raw["versions"]) == ("Mobilekit Bench 1.0.0", {"onnx": "1.23.0", "os": "Android 13"})
    for name in ("report.html", "report.md"):
        assert "Google Pixel 4 (SM8150)" in (folder / name).read_text(encoding="utf-8")
    assert Report.model_validate_json((folder / "report.json").read_bytes()).models[0].measurements[-1] == made.row


def test_without_cpu_times_wall_time_is_shown_as_such(folder: Path) -> None:
    made = pipeline.import_result(told(folder.parent, example(cpu_samples_ms=None, origin="emulator")), folder)
    assert (made.row.clock, made.row.median_ms, made.row.wall_median_ms) == ("wall", *[pytest.approx(3.405)] * 2)
    assert made.row.origin == "emulator"
    assert mk.Measurement.model_validate_json((folder / "measurements.jsonl").read_text()).median_ms == pytest.approx(
        3.405
    )


def test_another_run_of_the_same_file_is_another_row(folder: Path) -> None:
    pipeline.import_result(told(folder.parent, example()), folder)
    pipeline.import_result(told(folder.parent, example(started_at="2026-05-04T11:15:30+02:00")), folder)
    pipeline.import_result(told(folder.parent, example(compute_unit="gpu")), folder)
    assert [row["line"] for row in rows(folder)][-3:] == [1, 2, 3]
    assert "Google Pixel 4 (SM8150), gpu" in (folder / "report.md").read_text(encoding="utf-8")


def test_a_line_whose_report_was_not_written_is_completed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("the disk is full")

    result = told(folder.parent, example())
    with monkeypatch.context() as patch:
        patch.setattr(summary, "render", full)
        with pytest.raises(StorageError):
            pipeline.import_result(result, folder)
    assert pipeline.import_result(result, folder).row.line == 1
    assert len((folder / "measurements.jsonl").read_text().splitlines()) == 1
    with pytest.raises(BadInputError, match="already"):
        pipeline.import_result(result, folder)


def test_a_folder_of_exported_files_takes_results_too(tmp_path: Path) -> None:
    import torch

    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
    (model,) = pipeline.export(net, torch.zeros(1, 1, 8, 8), to=["onnx"], out=tmp_path / "models")
    result = told(tmp_path, example(model_sha256=model.sha256))
    made = pipeline.import_result(result, tmp_path / "models")
    assert (made.report, made.model, made.row.clock) == (None, "network.onnx", "wall")
    assert not (tmp_path / "models" / "report.json").exists()
    with pytest.raises(BadInputError, match="already"):
        pipeline.import_result(result, tmp_path / "models")


def test_a_resumed_run_keeps_it(tiny: Path, quick: None, tmp_path: Path) -> None:
    request = pipeline.Request(str(tiny), "host", mk.Budget(speedup=1.3), "onnx")
    report = pipeline.run(request, tmp_path / "out", pipeline.Listener())
    main = next(m for m in report.models if m.path == report.result.path)
    pipeline.import_result(told(tmp_path, example(model_sha256=main.sha256)), tmp_path / "out")
    again = pipeline.run(request, tmp_path / "out", pipeline.Listener(), resume=True)
    kept = next(m for m in again.models if m.path == main.path)
    assert [row.device for row in kept.measurements if row.origin == "device"] == ["Google Pixel 4 (SM8150)"]
    assert kept.measurements[:-1] == main.measurements


# ---------------------------------------------------------------- what does not

FEW = [3.0] * 9
WRONG: dict[str, tuple[Any, ...]] = {
    # the sentence; a third entry: the JSON Schema cannot say it
    "another schema": ({"schema": 2}, "wrong at schema: input should be 1, got 2"),
    "from here": ({"origin": "host"}, "wrong at origin: input should be 'device' or 'emulator'"),
    "few samples": ({"samples_ms": FEW, "cpu_samples_ms": None}, "wrong at samples_ms: .* at least 10 items"),
    "a negative sample": ({"samples_ms": [*FEW, -1.0]}, r"wrong at samples_ms\[9\]: .* greater than 0, got -1.0"),
    "a zero": ({"samples_ms": [*FEW, 0]}, r"wrong at samples_ms\[9\]: .* greater than 0"),
    "an hour": ({"samples_ms": [*FEW, 3.6e6]}, r"wrong at samples_ms\[9\]: .*less than or equal to 600000"),
    "no number": ({"samples_ms": [*FEW, math.nan]}, r"wrong at samples_ms\[9\]", "NaN is no JSON"),
    "infinite": ({"load_ms": math.inf}, "wrong at load_ms", "Infinity is no JSON"),
    "text for a number": ({"load_ms": "12.5"}, "wrong at load_ms: input should be a valid number"),
    "nothing": ({"samples_ms": None}, "wrong at samples_ms"),
    "no threads": ({"threads": 0}, "wrong at threads"),
    "half a thread": ({"threads": 1.5}, "wrong at threads"),
    "fewer CPU times": ({"cpu_samples_ms": FEW}, "they differ in number", "two fields"),
    "no version": ({"versions": {"tflite": "2"}}, "versions does not hold that of the runtime 'onnx'", "two fields"),
    "no versions": ({"versions": {}}, "wrong at versions"),
    "no digest": ({"model_sha256": "../../etc/passwd"}, "wrong at model_sha256"),
    "local time": ({"started_at": "2026-05-04T10:15:30"}, "wrong at started_at: .*timezone", "a format"),
    "a number of seconds": ({"started_at": 1777882530}, "wrong at started_at"),
    "an escape": ({"compute_unit": "cpu\u001b[2J"}, "wrong at compute_unit"),
    "a long name": ({"runtime": "o" * 201}, "wrong at runtime"),
    "a misspelt key": ({"sample_ms": [1.0]}, "wrong at sample_ms: there is no such field"),
    "boiling": ({"thermal_before": {"temperature_c": 2000.0}}, "wrong at thermal_before.temperature_c"),
    "no phone": ({"device": "Pixel"}, "wrong at device"),
    "another runtime": (
        {"runtime": "tflite", "versions": {"tflite": "2"}},
        r"says that models/fashion_mnist-int8.onnx was run by tflite: it is of onnx",
        "of the folder",
    ),
    "another model": ({"model_sha256": "0" * 64}, "none of the 1 models", "of the folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_results_change_nothing(case: str, folder: Path) -> None:
    change, said = WRONG[case][:2]
    result = told(folder.parent, example(**change))
    before = files(folder.parent)
    with pytest.raises(BadInputError, match=said) as caught:
        pipeline.import_result(result, folder)
    assert len(str(caught.value).splitlines()) == 1
    assert files(folder.parent) == before


TEXTS: dict[str, str] = {"empty": "", "cut off": GOLDEN.read_text(encoding="utf-8")[:300], "nested": "[" * 100_000}


@pytest.mark.parametrize("case", TEXTS)
def test_what_is_no_document_is_refused(case: str, folder: Path) -> None:
    before = files(folder)
    with pytest.raises(BadInputError, match=r"the result '.*result.json' is not JSON"):
        pipeline.import_result(told(folder.parent, TEXTS[case]), folder)
    assert files(folder) == before


Damage = Callable[[Path], object]
FOLDERS: dict[str, tuple[Damage, str]] = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "is no folder"),
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], "holds neither report.json nor manifest.json"),
    "report of another schema": (lambda f: (f / "report.json").write_text('{"schema": 2}'), "wrong at schema"),
    "an infinite time": (
        lambda f: (f / "report.json").write_text(
            (f / "report.json").read_text().replace('"seconds": ', '"seconds": 1e999, "x": ', 1)
        ),
        r"wrong at stages\[0\].seconds",
    ),
    "lines that are a link": (
        lambda f: os.symlink(f.parent / "elsewhere", f / "measurements.jsonl"),
        "'.*measurements.jsonl' is a link, which is not written through",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_take_nothing(case: str, folder: Path) -> None:
    damage, said = FOLDERS[case]
    result = told(folder.parent, example())
    damage(folder)
    before = files(folder.parent)
    with pytest.raises(BadInputError, match=said):
        pipeline.import_result(result, folder)
    assert files(folder.parent) == before
    assert not (folder.parent / "elsewhere").exists()


# ---------------------------------------------------------------- the command


def test_the_command(run: Cli, folder: Path) -> None:  # noqa: F811
    result = told(folder.parent, example())
    done = run("import", result, "--into", folder, "--json")
    assert (done.code, done.err) == (0, "")
    document = json.loads(done.out)
    assert document["row"] == rows(folder)[-1]
    assert document["model"] == "models/fashion_mnist-int8.onnx"
    said = one_sentence(run("import", result, "--into", folder))
    assert re.search(r"is in '.*out' already \(line 1 of measurements.jsonl\): nothing was changed", said)
    done = run("import", told(folder.parent, example(threads=4)), "--into", folder)
    assert "Google Pixel 4 (SM8150) (device): median 3.395 ms cpu time" in done.out
    assert "'absent.json' cannot be read" in one_sentence(run("import", "absent.json", "--into", folder))
