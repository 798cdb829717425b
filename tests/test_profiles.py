import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mobilekit import profiles
from mobilekit.errors import BadInputError
from mobilekit.types import DeviceProfile


@pytest.fixture
def document() -> dict[str, Any]:
    kind = {
        "coefficients": {"calls": 1, "macs": 1e-4}, "low": 0.9, "high": 1.1, "samples": 3, "median_error": 0.1,
        "max_macs": 10, "max_bytes": 10,
    }  # fmt: skip
    table = {"runtime": "onnx", "precision": "fp32", "threads": 1, "overhead_us": 1, "kinds": {"dense": kind}}
    made: dict[str, Any] = json.loads(profiles.dump(profiles.load("host")))
    made["tables"] = [table]
    return made


def message(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "device.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInputError) as caught:
        profiles.load(path)
    said = str(caught.value)
    assert "\n" not in said
    assert str(path) in said
    return said


def test_every_shipped_profile_loads_and_is_named_after_its_file() -> None:
    assert "host" in profiles.names()
    for name in profiles.names():
        assert profiles.load(name).name == name


def test_host_template_promises_nothing_that_was_not_measured() -> None:
    host = profiles.load("host")
    assert host.tables == ()
    assert host.validation_error is None
    assert {entry.name for entry in host.runtimes} == {"onnx", "tflite"}


def test_dump_reads_back_equal(tmp_path: Path, document: dict[str, Any]) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    first = profiles.load(path)
    path.write_text(profiles.dump(first))
    assert profiles.load(str(path)) == first
    assert first.tables[0].kinds["dense"].coefficients == {"calls": 1, "macs": 1e-4}


def test_unknown_name_says_the_nearest_and_where_the_others_are() -> None:
    with pytest.raises(BadInputError, match=r"unknown profile 'hsot' \(did you mean 'host'\?\).*profile list"):
        profiles.load("hsot")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cores": 0}, "wrong at cores: .*greater than or equal to 1, got 0"),
        ({"colour": "red"}, "wrong at colour: there is no such field"),
        ({"runtimes": []}, "wrong at runtimes: "),
        ({"kind": "toaster"}, "wrong at kind: .*'host'.*got 'toaster'"),
        ({"name": ""}, "wrong at name: "),
    ],
)
def test_wrong_field_is_named(tmp_path: Path, document: dict[str, Any], change: dict[str, Any], said: str) -> None:
    assert re.search(said, message(tmp_path, json.dumps({**document, **change})))


def test_wrong_nested_field_has_its_path(tmp_path: Path, document: dict[str, Any]) -> None:
    document["tables"][0]["kinds"]["dense"]["low"] = -1
    assert "tables[0].kinds.dense.low" in message(tmp_path, json.dumps(document))


@pytest.mark.parametrize("wrong", [-1, "NaN", "Infinity"])
def test_a_price_that_is_none_is_refused(tmp_path: Path, document: dict[str, Any], wrong: object) -> None:
    document["tables"][0]["kinds"]["dense"]["coefficients"]["macs"] = wrong
    text = json.dumps(document).replace('"NaN"', "NaN").replace('"Infinity"', "Infinity")
    assert "tables[0].kinds.dense.coefficients.macs" in message(tmp_path, text)


def test_an_older_form_of_prices_is_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    document["tables"][0]["kinds"]["dense"] |= {"us_per_mac": 1e-4}
    assert "tables[0].kinds.dense.us_per_mac: there is no such field" in message(tmp_path, json.dumps(document))
    assert "wrong at schema_version" in message(tmp_path, json.dumps({**document, "schema_version": 1}))


@pytest.mark.parametrize(("errors", "said"), [([], "never checked"), ([0.3, 0.2], "off by 20%"), ([0.3, 0.1], None)])
def test_a_profile_says_why_it_is_weak(document: dict[str, Any], errors: list[float], said: str | None) -> None:
    facts = {"method": "m", "cases": 9, "mean_error": 0.1, "within_5": 0.5, "within_10": 0.5, "coverage": 0.8}
    made = [{**document["tables"][0], "validation": {**facts, "median_error": error}} for error in errors]
    weak = DeviceProfile.model_validate({**document, "tables": made or document["tables"]}).weak
    assert (weak is None) == (said is None)
    assert said is None or said in str(weak)
    assert "no prices" in str(profiles.load("host").weak)


def test_missing_field_is_named(tmp_path: Path, document: dict[str, Any]) -> None:
    del document["soc"]
    assert "wrong at soc: the field is missing" in message(tmp_path, json.dumps(document))


def test_further_wrong_fields_are_counted(tmp_path: Path, document: dict[str, Any]) -> None:
    assert "and 1 more wrong field)" in message(tmp_path, json.dumps({**document, "cores": 0, "kind": "x"}))


def test_table_of_a_runtime_that_is_not_listed(tmp_path: Path, document: dict[str, Any]) -> None:
    document["tables"][0]["runtime"] = "onyx"
    assert "tables[0].runtime: 'onyx'" in message(tmp_path, json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "hello", b"\xff\xfe{", "[" * 100_000])
def test_what_is_not_json(tmp_path: Path, text: str | bytes) -> None:
    assert "is not JSON" in message(tmp_path, text)


def test_json_of_something_else(tmp_path: Path) -> None:
    assert "is wrong: " in message(tmp_path, "[1, 2]")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such file"):
        profiles.load(tmp_path / "absent.json")
    with pytest.raises(BadInputError, match="is a directory"):
        profiles.load(str(tmp_path) + "/")


def test_cache_path_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOBILEKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profiles.cache_path("a").parent == tmp_path / "mobilekit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profiles.cache_path("a").parent == tmp_path / ".cache" / "mobilekit"
    monkeypatch.setenv("MOBILEKIT_CACHE", str(tmp_path / "own"))
    assert profiles.cache_path("a").parent == tmp_path / "own"


def test_cache_path_keeps_keys_apart() -> None:
    keys = ["A; onnx 1.2", "A; onnx 1-2", "a; onnx 1.2", "", "/../x", "x" * 500]
    paths = [profiles.cache_path(key) for key in keys]
    assert len({str(path).lower() for path in paths}) == len(keys)
    assert len({path.parent for path in paths}) == 1
    assert all(len(path.name) < 100 for path in paths)


def test_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, mobilekit.profiles as p; p.load('host'); print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
