"""The command line's contract: documents on stdout, one sentence on stderr for bad input, and the exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_devices import write_onnx

from conftest import TINY, quick_command
from mobilekit import cli, profiles
from mobilekit.cost.build import Built
from mobilekit.interfaces import Device
from mobilekit.types import DeviceProfile, Failure


class Done(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], host_profile: object, tmp_path: Path
) -> Cli:
    """Run a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: object) -> Done:
        monkeypatch.setattr("sys.argv", ["mobilekit", *map(str, arguments)])
        monkeypatch.setattr(cli.errors, "_file", None)  # the property would keep this test's stream when undone
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capfd.readouterr()
        code = left.value.code
        return Done(code if isinstance(code, int) else int(code or 0), captured.out, captured.err)

    return invoke


def one_sentence(done: Done, code: int = 2) -> str:
    assert done.code == code, done
    assert done.out == ""
    assert done.err.startswith("mobilekit: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    assert "Traceback" not in done.err
    assert "not foreseen" not in done.err
    return done.err.strip()


def profile_text(**changes: object) -> str:
    return json.dumps({**json.loads(profiles.dump(profiles.load("host"))), **changes})


def priced(**rows: dict[str, float]) -> dict[str, object]:
    """A cost table of these coefficients."""
    facts = {"low": 0.9, "high": 1.1, "samples": 3, "median_error": 0.1, "max_macs": 1e9, "max_bytes": 1e9}
    kinds = {name: {"coefficients": coefficients, **facts} for name, coefficients in rows.items()}
    return {"runtime": "onnx", "precision": "fp32", "threads": 1, "overhead_us": 100, "kinds": kinds}


LAYERS = """model,type,k,stride,groups,cin,cout,out_w,out_h,out_c,in_elems,out_elems
small,Convolution,3,2,1,3,16,16,16,16,3072,4096
small,InnerProduct,0,0,0,4096,10,1,1,10,4096,10
large,Convolution,3,1,1,3,16,32,32,16,3072,16384
large,Convolution,1,1,1,16,64,32,32,64,16384,65536
"""
"""Two networks as `profile predict --layers` reads them."""

# ---------------------------------------------------------------- bad input

DICT = (
    TINY
    + "\nclass Wrapped(Net):\n    def forward(self, x):\n        return {'out': super().forward(x)}\nmodel = Wrapped\n"
)
FILES = {
    "empty.py": "x = 1\n",
    "dict.py": DICT,
    "nan.py": TINY + "\ndef calibration_data():\n    return [torch.full((1, 1, 16, 16), float('nan'))]\nmodel = Net\n",
    "fresh.py": TINY + "\nmodel = Net\n",
    "weights.py": TINY,  # its weights are damaged
    "weights.safetensors": "not tensors at all",
    "wrong.json": profile_text(cores="two"),
    "misspelt.json": profile_text(coers=2),
    "broken.json": "{",
    "tables.json": profile_text(runtimes=[]),
    "negative.json": profile_text(tables=[priced(dense={"calls": 1, "macs": -1})]),
    "layers.csv": LAYERS,
}
BAD = {
    "missing file": ("absent.py --profile host --latency-ms 5", "'absent.py' does not exist"),
    "missing module": ("no.such_module --profile host --latency-ms 5", "'no.such_module' does not exist"),
    "no model": ("empty.py --profile host --latency-ms 5", r"does not define model\(\)"),
    "dict output": ("dict.py --profile host --latency-ms 5", "returns dict: it must return one tensor"),
    "nan inputs": ("nan.py --profile host --latency-ms 5", "values that are not finite"),
    "damaged weights": ("weights.py --profile host --latency-ms 5", r"model\(\) in 'weights.py' fails: "),
    "zero": ("fresh.py --profile host --latency-ms 0", "--latency-ms must be a number above 0, not '0'"),
    "negative": ("fresh.py --profile host --latency-ms -3", "--latency-ms must be a number above 0, not '-3'"),
    "text": ("fresh.py --profile host --latency-ms abc", "--latency-ms must be a number above 0, not 'abc'"),
    "nan budget": ("fresh.py --profile host --speedup nan", "--speedup must be a number above 0, not 'nan'"),
    "infinite": ("fresh.py --profile host --speedup inf", "--speedup must be a number above 0"),
    "size": ("fresh.py --profile host --size-mb 0", "--size-mb must be a number above 0"),
    "drop": ("fresh.py --profile host --max-drop -1", "--max-drop must be a number of at least 0"),
    "both": ("fresh.py --profile host --latency-ms 3 --speedup 2", "give --latency-ms or --speedup, not both"),
    "no profile": ("fresh.py --latency-ms 3", "Missing option '--profile'"),
    "unknown profile": ("fresh.py --profile hots --latency-ms 3", r"unknown profile 'hots' \(did you mean 'host'\?\)"),
    "absent profile": ("fresh.py --profile absent.json --latency-ms 3", "'absent.json' cannot be read: no such file"),
    "wrong field": ("fresh.py --profile wrong.json --latency-ms 3", "'wrong.json' is wrong at cores: .*'two'"),
    "misspelt field": ("fresh.py --profile misspelt.json --latency-ms 3", "coers: there is no such field"),
    "no JSON": ("fresh.py --profile broken.json --latency-ms 3", "'broken.json' is not JSON"),
    "no runtimes": ("fresh.py --profile tables.json --latency-ms 3", "wrong at runtimes"),
    "unknown runtime": (
        "fresh.py --profile host --latency-ms 3 --runtime ncnn",
        "'host' does not run ncnn: choose one of onnx, tflite",
    ),
    "runtime not on device": ("fresh.py --profile host --latency-ms 3 --runtime coreml", "does not run coreml"),
    "unknown device": ("fresh.py --profile host --latency-ms 3 --device fax", "'fax'.* choose one of .*host"),
    "device address": ("fresh.py --profile host --latency-ms 3 --device host:7", "takes no address"),
    "seed": ("fresh.py --profile host --latency-ms 3 --seed x", "'--seed'"),
    "negative seed": ("fresh.py --profile host --latency-ms 3 --seed -1", "'--seed'"),
    "unknown option": ("fresh.py --profile host --latency 3", "--latency"),
    "no workload": ("", "Missing argument"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_plan(case: str, run: Cli, tmp_path: Path) -> None:
    arguments, sentence = BAD[case]
    for name, text in FILES.items():
        Path(name).write_text(text, encoding="utf-8")
    before = {path.name for path in tmp_path.iterdir()}
    done = run("plan", *arguments.split(), "--out", "out/deep")
    assert re.search(sentence, one_sentence(done)), done.err
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == before


def test_the_output_folder_is_a_file(run: Cli) -> None:
    Path("fresh.py").write_text(FILES["fresh.py"], encoding="utf-8")
    Path("out").write_text("mine")
    for command in (
        ("plan", "fresh.py", "--profile", "host", "--latency-ms", 3, "--out", "out"),
        ("export", "fresh.py", "--to", "onnx", "--out", "out"),
    ):
        assert "is a file: give another --out" in one_sentence(run(*command))
    inside = run("plan", "fresh.py", "--profile", "host", "--latency-ms", 3, "--out", "out/deep")
    assert "'out/deep' is a file: give another --out" in one_sentence(inside)
    assert Path("out").read_text() == "mine"


def test_the_output_folder_holds_what_is_not_ours(run: Cli) -> None:
    Path("fresh.py").write_text(FILES["fresh.py"], encoding="utf-8")
    Path("checkpoints").mkdir()
    Path("checkpoints", "epoch1.pt").write_text("precious")
    done = run("plan", "fresh.py", "--profile", "host", "--latency-ms", 3, "--out", ".")
    assert "'checkpoints'" in one_sentence(done)
    assert Path("checkpoints", "epoch1.pt").read_text() == "precious"


def test_a_disk_that_cannot_be_written(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("fresh.py").write_text(FILES["fresh.py"], encoding="utf-8")
    arguments = ("plan", "fresh.py", "--profile", "host", "--latency-ms", 3, "--out")
    assert "cannot write '/proc/mobilekit'" in one_sentence(run(*arguments, "/proc/mobilekit"), 1)
    monkeypatch.setattr("mobilekit.store.LEAST_FREE_BYTES", 2**60)
    assert "MB free and a run needs" in one_sentence(run(*arguments, "out"), 1)
    assert not Path("out").exists()


def test_a_disk_that_fills_up(tiny: Path, host_profile: object, tmp_path: Path) -> None:
    """Files beyond 60 kB cannot be written: the exported original has 115."""
    out = tmp_path / "out"
    command = quick_command("plan", str(tiny), "--profile", "host", "--speedup", "2", "--out", str(out))
    command[2] = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n" + command[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith("mobilekit: ")]
    assert len(said) == 1
    assert "original.onnx" in said[0]
    assert "Traceback" not in done.stderr
    assert not (out / "checkpoints" / "original.onnx").exists()
    assert not [path for path in out.rglob(".*") if path.name != ".mobilekit"]


OTHERS = {
    "export without format": ("export fresh.py --to , --out out", "names no format"),
    "export to an unknown format": ("export fresh.py --to onnx,ncnn --out out", "'ncnn'.*choose one of .*onnx"),
    "export in an unknown precision": ("export fresh.py --to onnx --precision int4 --out out", "fp32, fp16 or int8"),
    "export in a precision without": ("export fresh.py --to onnx --precision fp16 --out out", "not in fp16"),
    "export of nothing": ("export absent.py --to onnx --out out", "does not exist"),
    "measure nothing": ("measure absent.onnx", "'absent.onnx' does not exist"),
    "measure no model": ("measure fresh.py", "holds no model files"),
    "measure an empty folder": ("measure .", "holds no model files"),
    "measure with no threads": ("measure absent.onnx --threads 0", "'--threads'"),
    "measure with a thousand threads": ("measure absent.onnx --threads 100000", "'--threads'"),
    "measure when it is no number": ("measure model.onnx --cool-to nan", "'--cool-to'"),
    "measure when it is endlessly warm": ("measure model.onnx --cool-to inf", "'--cool-to'"),
    "measure below the absolute zero": ("measure model.onnx --cool-to -300", "'--cool-to'"),
    "measure on no device": ("measure model.onnx --devices ,", "--devices names no device"),
    "measure on a device without a name": ("measure model.onnx --device=", "unknown device ''"),
    "plan on a device without a name": (
        "plan fresh.py --profile raspberry-pi-4 --speedup 2 --device=",
        "unknown device ''",
    ),
    "measure on an unknown device": ("measure model.onnx --device fax", "'fax'.*choose one of .*host"),
    "compare one": ("report compare .", "Missing argument"),
    "compare nothing": ("report compare . nowhere", "holds no report.json"),
    "compare a missing file": ("report compare nowhere .", "'nowhere' does not exist"),
    "report of too much": ("report a b", "Got unexpected extra argument"),
    "report of nothing": ("report .", "holds no report.json"),
    "report of something else": ("report other", "the report 'other/report.json' is wrong: "),
    "apply nothing": ("apply absent.json fresh.py --out out", "the plan 'absent.json' cannot be read"),
    "apply no plan": ("apply fresh.py fresh.py --out out", "the plan 'fresh.py' is not JSON"),
    "apply another document": ("apply other/report.json fresh.py --out out", "the plan 'other/report.json' is wrong: "),
    "show an unknown profile": ("profile show nope", "unknown profile 'nope'"),
    "validate a wrong profile": ("profile validate wrong.json", "wrong at cores"),
    "predict an unknown profile": ("profile predict nope fresh.py", "unknown profile 'nope'"),
    "validate a negative price": ("profile validate negative.json", r"tables\[0\].kinds.dense.coefficients.macs: .*-1"),
    "plot what has no prices": ("profile show host --plot steps.png", "'host' has no prices to draw"),
    "build on an unknown device": ("profile build --device fax --out own.json", "'fax'.*choose one of .*host"),
    "build with no threads": ("profile build --out own.json --threads 0", "--threads takes whole numbers .*'0'"),
    "build with odd threads": ("profile build --out own.json --threads 1,x", "--threads takes whole numbers .*'1,x'"),
    "fit to nothing": ("profile fit --measurements a.csv --layers b.csv --device x --out own.json", "'a.csv'"),
    "fit without a device": ("profile fit --measurements a.csv --layers b.csv --out own.json", "'--device'"),
    "predict for an unknown runtime": (
        "profile predict host fresh.py --runtime ncnn",
        "no prices for ncnn: it has onnx",
    ),
    "predict in fp16": ("profile predict host fresh.py --precision fp16", "no prices for fp16: it has onnx fp32"),
    "predict nothing": ("profile predict host absent.py", "does not exist"),
    "predict nothing at all": ("profile predict host", "takes a WORKLOAD, or --layers CSV with --network NAME"),
    "predict two things": ("profile predict host fresh.py --layers layers.csv --network small", "takes a WORKLOAD, or"),
    "predict no network of a table": ("profile predict host --layers layers.csv", "takes a WORKLOAD, or"),
    "predict an unknown network": (
        "profile predict host --layers layers.csv --network smal",
        r"no network 'smal' \(did you mean 'small'\?\): it has large, small",
    ),
    "predict from no table": ("profile predict host --layers absent.csv --network small", "'absent.csv'"),
    "anchor without a figure": ("profile predict host fresh.py --anchor fresh.py", "--anchor is NETWORK=MS"),
    "anchor on nothing": ("profile predict host fresh.py --anchor =3", "--anchor is NETWORK=MS"),
    "anchor on no time": ("profile predict host fresh.py --anchor fresh.py=0", "--anchor is NETWORK=MS .*above 0"),
    "anchor on an unknown network": (
        "profile predict host --layers layers.csv --network small --anchor huge=3",
        "no network 'huge'",
    ),
    "unknown command": ("plann x", "plann"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_bad_input_of_other_commands(case: str, run: Cli) -> None:
    for name, text in FILES.items():
        Path(name).write_text(text, encoding="utf-8")
    if "model.onnx" in OTHERS[case][0]:
        Path("model.onnx").write_text("x")
    Path("other").mkdir()
    Path("other", "report.json").write_text("[1]")
    arguments, sentence = OTHERS[case]
    assert re.search(sentence, one_sentence(run(*arguments.split()))), case
    assert not Path("out").exists()


def test_what_was_not_foreseen_is_a_sentence_too(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[str]:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(profiles, "names", broken)
    done = run("profile", "list")
    assert (done.code, done.out) == (1, "")
    assert done.err == "mobilekit: ZeroDivisionError: a b (not foreseen: MOBILEKIT_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("MOBILEKIT_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main()


# ---------------------------------------------------------------- documents


def test_profiles(run: Cli) -> None:
    listed = run("profile", "list", "--json")
    assert listed.code == 0
    assert "host" in [profile["name"] for profile in json.loads(listed.out)]
    assert listed.err == ""
    rows = run("profile", "list").out.splitlines()
    assert rows[0].split() == ["name", "kind", "SoC", "prices", "own", "error", "confidence"]
    (host,) = [row for row in rows if row.split()[0] == "host"]
    assert "measured at first use" in host
    assert json.loads(run("profile", "show", "host", "--json").out)["name"] == "host"
    Path("own.json").write_text(profile_text(name="own"))
    assert run("profile", "validate", "own.json").out == "own: valid\n"


def test_a_profile_is_explained(run: Cli) -> None:
    checked = {
        "method": "five-fold", "cases": 40, "median_error": 0.04, "mean_error": 0.05, "within_5": 0.6, "within_10": 0.9,
        "coverage": 0.8,
    }  # fmt: skip
    table = {**priced(dense={"macs": 1}), "validation": checked, "low": 0.9, "high": 1.2, "fusions": ["conv+relu"]}
    Path("own.json").write_text(profile_text(name="own", tables=[table]))
    shown = run("profile", "show", "own.json").out
    for words in ("own: this machine", "median 4.0%", "90% of 40 cases", "x0.90 to x1.20, which held 80%", "conv+relu"):
        assert words in shown
    assert "low confidence" not in shown
    Path("own.json").write_text(profile_text(name="own", tables=[priced(dense={"macs": 1})]))
    assert "low confidence: its prices were never checked" in run("profile", "show", "own.json").out


def test_what_channels_cost_is_drawn(run: Cli) -> None:
    Path("own.json").write_text(profile_text(name="own", tables=[priced(dense={"calls": 1, "macs16": 1e-4})]))
    done = run("profile", "show", "own.json", "--plot", "steps.png")
    assert done.code == 0, done.err
    assert Path("steps.png").read_bytes().startswith(b"\x89PNG")


def test_a_build(run: Cli, host_profile: DeviceProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def timed(device: Device, _runtimes: object, _template: object, seconds: float, *rest: Any) -> Built:
        asked.append((device.name, seconds, list(rest[1])))
        failure = Failure(stage="profile", subject="onnx fp16", message="no kernels", remedy="none")
        return Built(host_profile, [{"samples_ms": [1.0]}], [failure])

    monkeypatch.setattr("mobilekit.cost.build.build", timed)
    done = run("profile", "build", "--out", "deep/own.json", "--quick", "--threads", "1, 4")
    assert done.code == 0, done.err
    assert "onnx fp32, 1 thread: 16 rows, left-out median error not measured" in done.out
    assert done.out.endswith("profile: deep/own.json\n")
    assert "onnx fp16: no kernels; none" in done.err
    assert profiles.load(Path("deep/own.json")) == host_profile
    assert json.loads(Path("deep/own.samples.jsonl").read_text()) == {"samples_ms": [1.0]}
    assert run("profile", "build", "--out", "own.json").code == 0
    (quick, slow) = asked
    assert quick[0] == slow[0] == "host"
    assert 0 < quick[1] <= 60 < slow[1] <= 600
    assert (quick[2], slow[2]) == ([1, 4], [1])


def test_a_prediction(run: Cli) -> None:
    Path("fresh.py").write_text(FILES["fresh.py"], encoding="utf-8")
    done = run("profile", "predict", "host", "fresh.py", "--json")
    assert done.code == 0
    document = json.loads(done.out)
    assert set(document) >= {"latency_ms", "low_ms", "high_ms", "basis", "extrapolated", "operators"}
    assert 0 < document["low_ms"] <= document["latency_ms"] <= document["high_ms"]
    assert document["basis"] == "kernel table"
    assert {line["precision"] for line in document["operators"]} == {"fp32"}
    eight = json.loads(run("profile", "predict", "host", "fresh.py", "--precision", "int8", "--json").out)
    assert {"quantize", "dequantize"} <= {line["kind"] for line in eight["operators"]}
    assert {line["precision"] for line in eight["operators"] if line["kind"] == "conv"} == {"int8"}
    text = run("profile", "predict", "host", "fresh.py", "--runtime", "tflite").out
    assert "predicted in tflite" in text
    assert "not measured" in text


def test_a_prediction_is_anchored_on_a_measurement(run: Cli) -> None:
    Path("fresh.py").write_text(FILES["fresh.py"], encoding="utf-8")
    own = json.loads(run("profile", "predict", "host", "fresh.py", "--anchor", "fresh.py=7.5", "--json").out)
    assert own["latency_ms"] == pytest.approx(7.5)
    assert own["basis"] == "anchored"
    assert "7.500 ms predicted" in run("profile", "predict", "host", "fresh.py", "--anchor", "fresh.py=7.5").out


def test_a_network_of_a_layers_table_is_predicted(run: Cli) -> None:
    Path("layers.csv").write_text(LAYERS)
    rows = {"dense": {"macs": 1e-3}, "linear": {"macs": 1e-2}}
    Path("own.json").write_text(profile_text(name="own", tables=[priced(**rows)]))
    arguments = ("profile", "predict", "own.json", "--layers", "layers.csv", "--network")
    small = json.loads(run(*arguments, "small", "--json").out)
    macs = 27 * 16 * 16 * 16, 4096 * 10
    assert 1000 * small["latency_ms"] == pytest.approx(100 + 1e-3 * macs[0] + 1e-2 * macs[1])
    assert small["size_bytes"] is None
    done = run(*arguments, "large")
    assert "extrapolated, outside what was timed: 2 pointwise" in done.out
    half = json.loads(run(*arguments, "large", "--anchor", f"small={small['latency_ms'] / 2}", "--json").out)
    full = json.loads(run(*arguments, "large", "--json").out)
    assert half["latency_ms"] == pytest.approx(full["latency_ms"] / 2)


def test_export_and_measure(run: Cli) -> None:
    Path("fresh.py").write_text(FILES["fresh.py"], encoding="utf-8")
    done = run("export", "fresh.py", "--to", "onnx", "--precision", "int8", "--out", "models", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["failures"] == []
    (model,) = document["models"]
    assert (model["path"], model["precision"], model["parity"]["status"]) == (
        "models/fresh.int8.onnx",
        "int8",
        "executed",
    )
    assert model["facts"]["operators"]["int8"] > 0
    assert sorted(path.name for path in Path("models").iterdir()) == ["fresh.int8.onnx", "golden.bin", "manifest.json"]
    for target in ("models", "models/fresh.int8.onnx"):
        done = run("measure", target, "--runs", 12, "--json")
        assert done.code == 0, done.err
        document = json.loads(done.out)
        assert document["failures"] == []
        (measured,) = document["measurements"]
        assert (measured["model"], measured["origin"], len(measured["samples_ms"])) == ("fresh.int8.onnx", "host", 12)
    assert "fresh.int8.onnx" in run("measure", "models", "--runs", 12).out


def test_measuring_a_damaged_file(run: Cli) -> None:
    Path("broken.onnx").write_text("no graph")
    done = run("measure", "broken.onnx", "--runs", 12, "--json")
    assert done.code == 1
    document = json.loads(done.out)
    assert document["measurements"] == []
    assert document["failures"][0]["subject"] == "broken.onnx"
    assert done.err.startswith("broken.onnx: ")
    assert done.err.count("\n") == 1


def test_plan_report_and_apply(run: Cli, tiny: Path, quick: None) -> None:
    arguments = ("plan", tiny, "--profile", "host", "--runtime", "onnx", "--out", "out")
    done = run(*arguments, "--speedup", 1.3, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == json.loads(Path("out", "report.json").read_text())
    assert json.loads(done.out)["verdict"] == "met"
    Path("out", "report.html").unlink()
    report = run("report", "out")
    assert report.out == f"{Path('out', 'report.html').resolve()}\n"
    assert Path("out", "report.html").exists()
    shutil.copytree("out", "compare")
    assert run("report", "./compare").out == f"{Path('compare', 'report.html').resolve()}\n"
    compared = run("report", "compare", "out", "./compare", "--json")
    assert compared.code == 0, compared.err
    pairs = json.loads(compared.out)["pairs"]
    assert {"original", "result"} <= {pair["role"] for pair in pairs}
    assert {pair["verdict"] for pair in pairs} == {"no difference shown"}
    assert "result on host: no difference shown" in run("report", "compare", "out", "compare").out
    rows = json.loads(done.out)["precisions"]
    assert {row["precision"] for row in rows} <= {"fp32", "int8"}
    assert len(rows) >= 7
    applied = run("apply", "out/plan.json", tiny, "--out", "again", "--json")
    assert applied.code == 0, applied.err
    rows = [json.loads(text)["plan"] for text in (done.out, applied.out)]
    assert [(r["transform"], r["where"]) for r in rows[0]] == [(r["transform"], r["where"]) for r in rows[1]]
    unreachable = run(*arguments, "--latency-ms", 0.0001)
    assert unreachable.code == 3
    assert "budget unreachable" in unreachable.out
    assert "best reachable" in unreachable.out
    assert "plan.json" in {path.name for path in Path("out").iterdir()}


def test_dry_runs(run: Cli, tiny: Path, quick: None) -> None:
    arguments = ("plan", tiny, "--profile", "host", "--dry-run", "--json")
    done = run(*arguments, "--speedup", 2)
    assert done.code == 0, done.err
    assert json.loads(done.out)["verdict"] is None
    assert Path("mobilekit-out", "tiny", "plan.json").exists()  # the folder where none is named
    assert run(*arguments, "--latency-ms", 0.0001).code == 3


def test_help_and_module(run: Cli) -> None:
    done = run("plan", "--help")
    assert done.code == 0
    assert "--latency-ms" in done.out
    module = subprocess.run([sys.executable, "-m", "mobilekit", "--help"], capture_output=True, text=True, check=True)
    assert "profile" in module.stdout


def test_what_a_workload_prints_is_not_on_stdout(run: Cli) -> None:
    noisy = (
        FILES["fresh.py"]
        + "\nprint('hello')\n_model = model\n\ndef model():\n    print('building')\n    return _model()\n"
    )
    Path("noisy.py").write_text(noisy, encoding="utf-8")
    done = run("plan", "noisy.py", "--profile", "host", "--speedup", 1.1, "--dry-run", "--out", "noisy-out", "--json")
    assert json.loads(done.out)["dry_run"] is True
    assert "hello" in done.err


def test_formats_that_cannot_be_written_do_not_stop_the_others(run: Cli) -> None:
    Path("fresh.py").write_text(FILES["fresh.py"], encoding="utf-8")
    done = run("export", "fresh.py", "--to", "onnx,coreml", "--precision", "fp16", "--out", "half", "--json")
    assert done.code == 1
    document = json.loads(done.out)
    assert [model["runtime"] for model in document["models"]] == ["coreml"]
    assert [failure["subject"] for failure in document["failures"]] == ["onnx fp16"]
    assert "onnx files are written in fp32, int8, not in fp16" in done.err


def test_ctrl_c_is_one_sentence(tmp_path: Path) -> None:
    write_onnx(tmp_path / "net.onnx")
    command = [sys.executable, "-m", "mobilekit", "measure", str(tmp_path / "net.onnx"), "--mlperf"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("mobilekit-*/stdout")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == b""
    assert b"stopped" in err
    assert err.count(b"\n") == 1
    assert not list(tmp_path.glob("mobilekit-*"))
