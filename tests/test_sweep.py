"""Sweeps: what they are asked for, that one bad cell harms no other, that a killed one goes on, and the summary."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobilekit import cli, pipeline, profiles
from mobilekit.errors import BadInputError
from mobilekit.pipeline import _sweep_cell
from mobilekit.pipeline import sweep as sweeps
from mobilekit.pipeline._sweep_engines import Ended
from mobilekit.pipeline._sweep_spec import cells_of, read_spec
from mobilekit.types import Failure
from mobilekit.types.sweep import NamedBudget, SweepSpec, SweepSummary

ROOT = Path(__file__).parent.parent
NET = """
import torch
from torch import nn

def model():
    torch.manual_seed(SEED)
    convolutions = nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

def example_input():
    return torch.zeros(1, 3, 24, 24)

SEED = 0
"""
ONCE = """
from pathlib import Path

def first_time():
    mark = Path(__file__).with_suffix(".seen")
    return not mark.exists() and not mark.write_text("x") == 0
"""
SPEC: dict[str, Any] = {
    "workloads": ["net.py"],
    "profiles": ["board.json"],
    "budgets": [{"latency_ms": 50}],
    "dry_run": True,
}


def board() -> str:
    """A shipped profile that runs float32 only: one exported file a cell and not two."""
    profile = profiles.load("raspberry-pi-4")
    entry = profile.runtimes[0].model_copy(update={"precisions": ("fp32",)})
    tables = tuple(table for table in profile.tables if (table.runtime, table.precision) == (entry.name, "fp32"))
    return profiles.dump(profile.model_copy(update={"name": "board", "runtimes": (entry,), "tables": tables}))


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Here:
    """In place of processes: the same job in this process, one cell after the other."""

    slots = 1
    crowded = False

    def __init__(self, *_: object) -> None:
        self.folders: list[Path] = []

    def submit(self, folder: Path) -> None:
        self.folders.append(folder)

    def next(self) -> Ended:
        folder, began, code = self.folders.pop(), time.monotonic(), 1
        try:
            _sweep_cell.carry_out(folder)
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        except Exception as error:  # noqa: BLE001 -- a process would end by it, whatever it is
            print(error)
        return Ended(folder.name, code, time.monotonic() - began)

    def close(self) -> None:
        assert not self.folders


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process: torch is loaded once."""
    monkeypatch.setattr(sweeps, "_engine", Here)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Done]:
    """The command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    Path("net.py").write_text(NET)
    Path("board.json").write_text(board())

    def invoke(*arguments: object) -> Done:
        monkeypatch.setattr("sys.argv", ["mobilekit", "sweep", *map(str, arguments)])
        monkeypatch.setattr(cli.errors, "_file", None)  # the property would keep this test's stream when undone
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capfd.readouterr()
        return Done(int(left.value.code or 0), captured.out, captured.err)

    return invoke


def toml(value: object) -> str:
    """JSON's texts, numbers, booleans and arrays are TOML's too."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def write_spec(**changes: Any) -> Path:
    """spec.toml in the present folder; a change to None leaves the key out."""
    found = {key: value for key, value in {**SPEC, **changes}.items() if value is not None}
    path = Path("spec.toml")
    path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in found.items()), encoding="utf-8")
    return path


def cells(out: str = "out") -> dict[str, dict[str, Any]]:
    """The rows of sweep.json by workload."""
    return {row["workload"]: row for row in json.loads(Path(out, "sweep.json").read_text())["cells"]}


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---------------------------------------------------------------- the specification

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no workloads": ({"workloads": []}, "wrong at workloads: "),
    "workloads left out": ({"workloads": None}, "wrong at workloads: the field is missing"),
    "one workload as a text": ({"workloads": "net.py"}, "wrong at workloads: .*, got 'net.py'"),
    "absent workload": (
        {"workloads": ["net.py", "absent.py"]},
        r"wrong at workloads\[1\]: '.*absent.py' does not exist",
    ),
    "unknown profile": (
        {"profiles": ["hots"]},
        r"wrong at profiles\[0\]: unknown profile 'hots' \(did you mean 'host'",
    ),
    "absent profile": ({"profiles": ["host", "own.json"]}, r"wrong at profiles\[1\]: .*own.json' cannot be read"),
    "unknown runtime": (
        {"runtimes": ["onnx"]},
        r"runtimes\[0\]: the profile 'board' does not run onnx, but ncnn",
    ),
    "unknown device": ({"device": "fax"}, "wrong at device: .*'fax'.*choose one of .*host"),
    "no budgets": ({"budgets": []}, "wrong at budgets: "),
    "a text for a number": ({"budgets": [{"speedup": "2"}]}, r"wrong at budgets\[0\].speedup: .*number, got '2'"),
    "true for a number": ({"budgets": [{"speedup": True}]}, r"wrong at budgets\[0\].speedup: .*got 'True'"),
    "zero": ({"budgets": [{}, {"latency_ms": 0}]}, r"wrong at budgets\[1\].latency_ms: .*greater than 0"),
    "both": ({"budgets": [{"latency_ms": 3, "speedup": 2}]}, r"budgets\[0\]: give latency_ms or speedup, not both"),
    "an unknown field of a budget": ({"budgets": [{"faster": 2}]}, r"budgets\[0\].faster: there is no such field"),
    "an unknown key": ({"budget": [{"speedup": 2}]}, "wrong at budget: there is no such field"),
    "twice the same": ({"profiles": ["host", "host"]}, "profiles holds 'host' twice"),
    "twice the same budget": ({"budgets": [{"speedup": 2}, {"speedup": 2.0, "name": "x"}]}, "budgets holds .* twice"),
    "a broken seed": ({"seeds": [0, 1.5]}, r"wrong at seeds\[1\]: .*integer"),
    "a negative seed": ({"seeds": [-1]}, r"wrong at seeds\[0\]: "),
    "no minutes": ({"train_minutes": 0}, "wrong at train_minutes: "),
    "minutes without training": ({"train": False, "train_minutes": 2}, "train_minutes is for runs that train"),
    "a number for a truth": ({"dry_run": 1}, "wrong at dry_run: "),
}


def one_sentence(done: Done, code: int = 2) -> str:
    assert done.code == code, done
    assert done.out == ""
    assert done.err.startswith("mobilekit: ")
    assert done.err.count("\n") == 1
    assert "not foreseen" not in done.err
    return done.err


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_specification(case: str, run: Callable[..., Done], here: None) -> None:
    changes, sentence = BAD[case]
    said = one_sentence(run(write_spec(**changes), "--out", "out"))
    assert "'spec.toml'" in said
    assert re.search(sentence, said), said
    assert not Path("out").exists()


FILES = {
    "absent": (None, "'spec.toml' cannot be read: No such file"),
    "no TOML": (b"workloads = [", "'spec.toml' is not TOML: invalid value"),
    "no text": (b"\xff\xfe\x00", "'spec.toml' is not text in UTF-8"),
    "a huge number": (b"seeds = [" + b"9" * 5000 + b"]", "'spec.toml' is not TOML"),
    "deep": (b"x = " + b"[" * 5000, "'spec.toml' is not TOML"),
    "a date": (b"workloads = [2020-01-01]\nprofiles = 2020-01-01", "wrong at profiles: .*array"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_specification(case: str, run: Callable[..., Done]) -> None:
    content, sentence = FILES[case]
    if content is not None:
        Path("spec.toml").write_bytes(content)
    assert re.search(sentence, one_sentence(run("spec.toml", "--out", "out")))
    assert not Path("out").exists()


OPTIONS = {
    "no engine": ("--engine dask", "--engine is local or ray, not 'dask'"),
    "address of no cluster": ("--ray-address auto", "--ray-address is for --engine ray"),
    "CPUs of no cluster": ("--cpus-per-cell 2", "--cpus-per-cell is for --engine ray"),
    "no jobs": ("--jobs 0", "'--jobs'"),
    "nobody answers": ("--engine ray --ray-address 127.0.0.1:1", "no Ray cluster answers at '127.0.0.1:1'"),
    "no address": ("--engine ray --ray-address nonsense", "the Ray cluster at 'nonsense' cannot be used: "),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_wrong_options(case: str, run: Callable[..., Done]) -> None:
    options, sentence = OPTIONS[case]
    done = run(write_spec(), "--out", "out", *options.split())
    assert done.code == 2
    assert sentence in done.err.splitlines()[-1]
    assert not Path("out").exists()


def test_ray_that_is_not_installed(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run(write_spec(), "--out", "out", "--engine", "ray")
    assert done.code == 2
    assert 'pip install "mobilekit[ray]"' in done.err.splitlines()[-1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from([*SweepSpec.model_fields, "other"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "speedup"]), inner),
            max_leaves=6,
        ),
    )
)
def test_any_document_is_read_or_refused_in_one_sentence(tmp_path: Path, found: dict[str, Any]) -> None:
    path = tmp_path / "spec.toml"

    def shown(value: object) -> str:
        text = toml(value)
        return re.sub(r"\bNaN\b", "nan", re.sub(r"\bInfinity\b", "inf", text)).replace("null", "1979-05-27")

    path.write_text("\n".join(f"{key} = {shown(value)}" for key, value in found.items()), encoding="utf-8")
    said = ""
    try:
        assert read_spec(path).workloads
    except BadInputError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 600


NAMES = st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=6, unique=True)


@settings(max_examples=30, deadline=None)
@given(NAMES, NAMES.map(lambda names: ["net", *(n.replace("/", ".").replace("\0", "") + "x" for n in names)]))
def test_folders_are_plain_and_different_for_any_names(budgets: list[str], modules: list[str]) -> None:
    modules = sorted(set(modules))
    spec = SweepSpec(
        workloads=tuple(modules),
        profiles=("raspberry-pi-4", "pixel-4"),
        budgets=tuple(NamedBudget(name=name, speedup=2 + i) for i, name in enumerate(budgets)),
        seeds=(0, 7),
    )
    found = cells_of(spec, Path("spec.toml"))
    assert len({cell.name for cell in found}) == len(modules) * 2 * len(budgets) * 2 == len(found)
    for cell in found:
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", cell.name)
        assert len(cell.name) <= 240


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("a/net.py", "b/net.py", "b/other.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(NET)
    workloads = ["a/net.py", "b/net.py", "b/other.py"]
    spec = SweepSpec.model_validate(
        {**SPEC, "profiles": ["raspberry-pi-4"], "workloads": workloads, "runtimes": ["ncnn"]}
    )
    found = cells_of(spec, tmp_path / "spec.toml")
    assert [cell.name for cell in found] == [
        f"{name}__raspberry-pi-4__ncnn__50ms__seed0" for name in ("a-net", "b-net", "other")
    ]
    assert [cell.job.workload for cell in found] == [str(tmp_path / name) for name in workloads]


def test_the_committed_example() -> None:
    path = ROOT / "docs" / "sweep.toml"
    found = cells_of(read_spec(path), path)
    assert len(found) == 12
    assert found[0].name == "fashion_mnist__pixel-4__quick__seed0"
    page = (ROOT / "docs" / "sweep.md").read_text()
    assert found[0].name in page
    assert all(f"| `{key}` |" in page for key in SweepSpec.model_fields)


# ---------------------------------------------------------------- cells in this process


def test_a_failing_cell_is_tried_twice_and_stops_no_other(run: Callable[..., Done], here: None) -> None:
    Path("bad.py").write_text("raise RuntimeError('no [red] <b>weights</b>')")
    Path("leaves.py").write_text(NET + "def example_input(): raise SystemExit(0)")
    Path("flaky.py").write_text(NET + ONCE + "assert not first_time(), 'not yet'")
    names = ["bad.py", "leaves.py", "flaky.py", "net.py"]
    done = run(write_spec(workloads=names), "--out", "out", "--json")
    assert done.code == 1
    assert json.loads(done.out) == json.loads(Path("out", "sweep.json").read_text())
    found = cells()
    assert list(found) == names
    assert {name: row["attempts"] for name, row in found.items()} == dict(zip(names, (2, 2, 2, 1), strict=True))
    assert {name for name, row in found.items() if row["failure"]} == {"bad.py", "leaves.py"}
    assert "no [red] <b>weights</b>" in found["bad.py"]["failure"]["message"]
    assert "SystemExit" in found["leaves.py"]["failure"]["message"]
    assert found["flaky.py"]["predicted_latency_ms"]["value"] > 0
    assert found["flaky.py"]["runtime"] == "ncnn"
    assert done.err.count("is tried once more") == 3
    assert "4/4 " in done.err
    assert [row["workload"] for row in lines("out/cells.jsonl")] == names
    assert one_sentence(run("spec.toml", "--out", "out")).endswith("--resume goes on with it, or give another --out\n")

    def made() -> dict[str, int]:
        return {name: Path("out", row["folder"], "cell.json").stat().st_mtime_ns for name, row in cells().items()}

    before = made()
    Path("bad.py").write_text(NET.replace("SEED = 0", "SEED = 1"))
    Path("net.py").write_text(NET.replace("SEED = 0", "SEED = 2"))  # finished, but with other weights
    changed = run(write_spec(workloads=[name for name in names if name != "leaves.py"]), "--out", "out", "--resume")
    assert changed.code == 0, changed
    assert "3 cells, 1 of them finished before" in changed.err
    assert {name for name, at in made().items() if at != before[name]} == {"bad.py", "net.py"}
    assert [row["failure"] for row in cells().values()] == [None] * 3


def test_measured_cells_and_their_summary(
    run: Callable[..., Done], here: None, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = [{"name": "swift", "speedup": 1.2}, {"latency_ms": 1e-4}]
    spec = write_spec(profiles=["host"], runtimes=["onnx"], budgets=budgets, dry_run=None)
    done = run(spec, "--out", "out")
    assert done.code == 3, done.err
    summary = SweepSummary.model_validate_json(Path("out", "sweep.json").read_bytes())
    assert [row.outcome for row in summary.cells] == ["met", "unreachable"]
    assert [row.name.split("__")[3] for row in summary.cells] == ["swift", "0.0001ms"]
    for row in summary.cells:
        own = json.loads(Path("out", row.folder, "report.json").read_text())
        assert (own["verdict"], own["ratio"], own["seed"]) == (row.verdict, row.ratio, row.seed)
        assert row.result is not None
        assert (own["result"]["latency_ms"], own["result"]["accuracy"]) == (row.result.latency_ms, row.result.accuracy)
        assert row.machine
    met, unreachable = summary.cells
    assert met.ratio is not None
    assert met.ratio > 1.2
    assert unreachable.best_reachable_basis == "measured"
    assert "2 cells: 1 met and 1 unreachable" in done.out
    picture = ET.fromstring(Path("out", "sweep.svg").read_text())  # noqa: S314 -- our own file
    assert len([node for node in picture.iter() if node.get("class") == "measured"]) == 1  # the unreachable has none
    assert 'class="original"' in Path("out", "sweep.html").read_text()
    assert "(sweep.svg)" in Path("out", "sweep.md").read_text()

    # killed before the last measurement; then the device goes away, which is a failure of the cell
    for kept in Path("out", met.folder, "checkpoints").glob("measure*"):
        kept.unlink()
    Path("out", "cells.jsonl").write_text(Path("out", "cells.jsonl").read_text().split("\n", 1)[1])
    gone = Failure(stage="measure", subject="result", message="the device is gone", remedy="plug it in")
    monkeypatch.setattr("mobilekit.devices.host.Host.run", _gone(gone))
    lost = run("spec.toml", "--out", "out", "--resume")
    assert lost.code == 1
    rows = json.loads(Path("out", "sweep.json").read_text())["cells"]
    assert "the device is gone" in rows[0]["failure"]["message"]
    assert (rows[0]["attempts"], rows[1]["failure"]) == (2, None)
    stages = json.loads(Path("out", met.folder, "report.json").read_text())["stages"]
    assert {row["name"] for row in stages if row["resumed"]} >= {"network", "original", "export onnx fp32"}


def _gone(failure: Failure) -> Callable[[object, Any], Any]:
    """Measures all but the result."""
    from conftest import computed_run
    from mobilekit.types import BenchResult

    def measure(_: object, request: Any) -> Any:
        if any(model.name == "result" for model in request.models):
            return BenchResult(measurements=(), failures=(failure,))
        return computed_run(_, request)

    return measure


def test_a_folder_with_other_files_is_left_alone(run: Callable[..., Done], here: None) -> None:
    Path("out").mkdir()
    Path("out", "sweep.json").write_text("precious")
    for options in ([], ["--resume"]):
        assert "'out/sweep.json' is there already" in one_sentence(run(write_spec(), "--out", "out", *options))
    assert Path("out", "sweep.json").read_text() == "precious"
    assert [path.name for path in Path("out").iterdir()] == ["sweep.json"]


def test_cells_that_may_disturb_each_other_are_warned_of(
    run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crowd(Here):
        slots = 2
        crowded = True

    monkeypatch.setattr(sweeps, "_engine", Crowd)
    Path("bad.py").write_text("raise RuntimeError")
    arguments = {"workloads": ["bad.py"], "profiles": ["host"], "seeds": [0, 1]}
    quiet = run(write_spec(**arguments), "--out", "dry")
    loud = run(write_spec(**arguments, dry_run=None), "--out", "out")
    assert "disturbs their latencies" not in quiet.err
    assert "disturbs their latencies" in " ".join(loud.err.split())
    found = json.loads(Path("out", "sweep.json").read_text())
    assert "disturbs their latencies" in found["warnings"][0]
    assert [cell["disturbed"] for cell in found["cells"]] == [True, True]
    assert "disturbs their latencies" in Path("out", "sweep.html").read_text()


# ---------------------------------------------------------------- real processes


def test_a_killed_process_is_tried_once_more(run: Callable[..., Done]) -> None:
    kill = "import os, signal\nprint('going')\nif first_time():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    Path("net.py").write_text(ONCE + kill + NET)
    done = run(write_spec(), "--out", "out", "--jobs", 2)
    assert done.code == 0, done.err
    assert "failed and is tried once more: the cell's process was killed by SIGKILL" in " ".join(done.err.split())
    found = cells()["net.py"]
    assert (found["attempts"], found["failure"]) == (2, None)
    assert found["predicted_latency_ms"]["value"] > 0
    log = Path("out", found["folder"], "log.txt").read_text()
    assert log.count("--- ") == 2
    assert "stage: original" in log
    assert "going" in log
    assert "going" not in done.out + done.err


def test_a_killed_sweep_takes_its_cells_with_it_and_goes_on(run: Callable[..., Done], tmp_path: Path) -> None:
    beat = "    Path(__file__).with_suffix('.beat').write_text(str(time.time()))\n    time.sleep(0.02)\n"
    Path("net.py").write_text("import time\nfrom pathlib import Path\nwhile True:\n" + beat)
    command = [sys.executable, "-m", "mobilekit", "sweep", str(write_spec()), "--out", "out"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    try:
        wait_for(lambda: Path("net.beat").exists())
    finally:
        driver.kill()
        driver.wait()
    wait_for(lambda: time.time() - Path("net.beat").stat().st_mtime > 1)  # the cell's process is gone too
    assert not Path("out", "sweep.json").exists()
    Path("net.py").write_text(NET)
    Path("out", "cells", ".draft.x").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "_engine", Here)
        done = run("spec.toml", "--out", "out", "--resume")
    assert done.code == 0, done.err
    assert cells()["net.py"]["attempts"] == 1
    assert [path.name for path in Path("out", "cells").iterdir()] == ["net__board__50ms__seed0"]


def wait_for(holds: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_python_interface_needs_no_command_line(run: Callable[..., Done], here: None) -> None:
    heard: list[tuple[str, float]] = []
    listener = pipeline.Listener(lambda stage, fraction: heard.append((stage, fraction)))
    found = sweeps.sweep(write_spec(seeds=[3]), Path("out"), listener)
    assert [cell.seed for cell in found.cells] == [3]
    assert heard == [("cells", 0.0), ("cells", 1.0)]
    assert SweepSummary.model_validate_json(Path("out", "sweep.json").read_bytes()) == found
