"""The whole job on a tiny workload: what it leaves, that it repeats, and that it survives being killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import mobilekit as mk
from conftest import TINY, quick_command, quicken
from mobilekit import pipeline
from mobilekit.pipeline import options
from mobilekit.planner.offers import Found
from mobilekit.types import BenchResult, Failure, Together

PRUNING = mk.Budget(speedup=4)
"""More than int8 alone brings on the computed machine."""
KEYS = {
    "schema", "workload", "profile", "device", "seed", "budget", "verdict", "best_reachable_ms", "baseline", "result",
    "accuracy_kind", "predicted_latency_ms", "rounds", "plan", "rejected", "models", "stages", "failures",
}  # fmt: skip
FIGURES = {"latency_ms", "accuracy", "size_bytes", "macs", "params"}


def run(tiny: Path, out: Path, budget: mk.Budget = PRUNING, **more: Any) -> mk.Report:
    course = {name: more.pop(name) for name in ("resume", "dry") if name in more}
    listener = more.pop("listener", pipeline.Listener())
    request = pipeline.Request(str(tiny), more.pop("profile", "host"), budget, more.pop("runtime", "onnx"), **more)
    return pipeline.run(request, out, listener, **course)


def command(*arguments: str, **named: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(quick_command(*arguments, **named), capture_output=True, text=True, check=False)


def read(out: Path, name: str = "report.json") -> Any:
    return json.loads((out / name).read_text(encoding="utf-8"))


def lines(out: Path, name: str) -> list[Any]:
    path = out / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names(report: mk.Report) -> list[str]:
    return [stage.name for stage in report.stages]


@pytest.fixture(scope="module")
def finished(tiny: Path, host_profile: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose budget needs pruning, int8 and training."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        run(tiny, out)
    return out


# ---------------------------------------------------------------- what a run leaves


def test_the_report_keeps_its_keys(finished: Path, tiny: Path) -> None:
    report = read(finished)
    assert set(report) >= KEYS
    assert (report["schema"], report["workload"], report["profile"], report["seed"]) == (1, str(tiny), "host", 0)
    assert set(report["baseline"]) >= FIGURES
    assert set(report["result"]) >= FIGURES | {"runtime", "precision", "path"}
    assert set(report["predicted_latency_ms"]) == {"low", "value", "high", "basis"}
    assert all(set(r) >= {"predicted_ms", "measured_ms"} for r in report["rounds"])
    assert all(set(r) == {"transform", "where", "reason", "saved_ms", "damage"} for r in report["plan"])
    assert all(set(r) == {"transform", "where", "reason"} for r in report["rejected"])
    assert all(set(r) >= {"name", "seconds"} for r in report["stages"])
    assert all(set(r) == {"stage", "subject", "message", "remedy"} for r in report["failures"])
    for model in report["models"]:
        keys = {"path", "runtime", "precision", "size_bytes", "sha256", "parity", "operators", "measurements"}
        assert set(model) >= keys
        parity = {"status", "sqnr_db", "cosine", "top1_agreement", "max_abs_error", "samples"}
        assert set(model["parity"]) >= parity
        for row in model["measurements"]:
            known = {"device", "origin", "threads", "median_ms", "p90_ms", "min_ms", "samples", "file", "line"}
            assert set(row) >= known


def test_the_budget_is_met_by_pruning_and_int8(finished: Path) -> None:
    report = read(finished)
    assert report["verdict"] == "met"
    assert {row["transform"] for row in report["plan"]} == {"channel_pruning", "int8"}
    assert report["baseline"]["latency_ms"] >= 4 * report["result"]["latency_ms"]
    assert report["result"]["macs"] < report["baseline"]["macs"]
    assert report["result"]["params"] < report["baseline"]["params"]
    assert report["result"]["precision"] == "int8"
    assert (finished / report["result"]["path"]).stat().st_size == report["result"]["size_bytes"]
    assert (finished / report["baseline"]["path"]).stat().st_size == report["baseline"]["size_bytes"]
    assert report["ratio"] >= 4
    low, high = report["ratio_interval"]
    assert low <= report["ratio"] <= high
    assert any(char.isdigit() for row in report["plan"] for char in row["reason"])


def test_files_are_what_the_report_says(finished: Path) -> None:
    report = read(finished)
    for model in report["models"]:
        content = (finished / model["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == model["sha256"]
        assert len(content) == model["size_bytes"]
        assert model["parity"]["status"] == "executed"
    assert [model["precision"] for model in report["models"]] == ["int8", "fp32"]
    expected = {model["path"] for model in report["models"]} | {"models/manifest.json", "models/golden.bin"}
    assert {str(path.relative_to(finished)) for path in (finished / "models").iterdir()} == expected
    assert not list(finished.rglob(".*.tmp"))


def test_golden_vectors_reproduce(finished: Path) -> None:
    manifest = read(finished, "models/manifest.json")
    golden = manifest["golden"]
    blob = (finished / "models" / golden["path"]).read_bytes()
    assert hashlib.sha256(blob).hexdigest() == golden["sha256"]
    parts = []
    for part in (*golden["inputs"], *golden["outputs"]):
        count = int(np.prod(part["shape"]))
        parts.append(np.frombuffer(blob, "<f4", count, part["offset"]).reshape(part["shape"]))
    inputs, outputs = parts
    assert len(blob) == inputs.nbytes + outputs.nbytes
    assert manifest["labels"] == ["-", "/", "|", "\\"]
    stated = {key: value for key, value in manifest["preprocessing"].items() if value is not None}
    assert stated == {"mean": [0.0], "std": [1.0]}
    for model in manifest["models"]:
        path = finished / "models" / model["path"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == model["sha256"]
        session = onnxruntime.InferenceSession(str(path))
        name = model["inputs"][0]["name"]
        found = np.concatenate([session.run(None, {name: inputs[i : i + 1]})[0] for i in range(len(inputs))])
        assert list(inputs.shape[1:]) == list(model["inputs"][0]["shape"][1:])
        np.testing.assert_allclose(found, outputs, rtol=0, atol=model["tolerance"])
        assert model["tolerance"] <= (1e-3 if model["precision"] == "fp32" else 0.2) * float(np.abs(outputs).max())
        assert (model["quantisation"] is None) == (model["precision"] == "fp32")


def test_measurements_recompute_from_raw_samples(finished: Path) -> None:
    report, raw = read(finished), lines(finished, "measurements.jsonl")
    rows = [row for model in report["models"] for row in model["measurements"]]
    assert rows
    for row in rows:
        line = raw[row["line"] - 1]
        samples = line["cpu_samples_ms" if row["clock"] == "cpu" else "samples_ms"]
        assert row["median_ms"] == pytest.approx(statistics.median(samples))
        assert row["min_ms"] == pytest.approx(min(samples))
        assert row["p90_ms"] == pytest.approx(float(np.percentile(samples, 90)))
        assert row["samples"] == len(samples)
        assert row["wall_median_ms"] == pytest.approx(statistics.median(line["samples_ms"]))
    result = next(m for m in report["models"] if m["path"] == report["result"]["path"])
    assert report["result"]["latency_ms"] == pytest.approx(result["measurements"][0]["median_ms"])
    assert raw[result["measurements"][0]["line"] - 1]["sha256"] == result["sha256"]
    before, after = report["samples"]["original"], report["samples"]["result"]
    ratios = [a / b for a, b in zip(before, after, strict=True)]
    assert report["ratio"] == pytest.approx(statistics.median(ratios))


def test_what_is_missing_on_the_machine_is_a_row(finished: Path) -> None:
    failures = read(finished)["failures"]
    assert [row["subject"] for row in failures] == ["coreml files", "tflite files"]
    assert lines(finished, "failures.jsonl") == failures


def test_other_forms_are_there(finished: Path) -> None:
    assert "<html" in (finished / "report.html").read_text()
    assert (finished / "report.md").read_text().startswith("#")
    assert mk.Plan.model_validate_json((finished / "plan.json").read_bytes()).runtime == "onnx"


def test_the_same_seed_gives_the_same_plan(finished: Path, tiny: Path, quick: None, tmp_path: Path) -> None:
    again = run(tiny, tmp_path / "out")
    assert (tmp_path / "out" / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()
    kept = read(finished)
    assert [row.measured_ms for row in again.rounds] == [row["measured_ms"] for row in kept["rounds"]]
    assert [row.sha256 for row in again.models] == [row["sha256"] for row in kept["models"]]


# ---------------------------------------------------------------- other courses


def test_int8_alone_where_it_suffices(tiny: Path, quick: None, tmp_path: Path) -> None:
    report = run(tiny, tmp_path / "out", mk.Budget(speedup=1.3))
    assert report.verdict == "met"
    assert [row.transform for row in report.plan] == ["int8"]
    assert "training" not in names(report)
    assert len(report.rounds) == 1
    assert report.result.macs == report.baseline.macs
    assert all("not needed" in row.reason for row in report.rejected if "keeping" in row.reason)


@pytest.mark.parametrize("better", ["float", "int8"])
def test_the_rival_that_does_least_as_a_whole_is_taken(
    better: str, tiny: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damages of single options mislead where they do not add up: combinations of either kind are measured."""
    kinds = []

    def measured(_run: object, _prices: object, _name: str, found: Found) -> Together:
        kinds.append("int8" if "int8" in found.start.network.precisions.values() else "float")
        return Together(damage=0.01 if kinds[-1] == better else 2.0, agreement=None)

    monkeypatch.setattr(options, "combination", measured)
    report = run(tiny, tmp_path / "out", mk.Budget(speedup=3), dry=True)
    assert set(kinds) == {"float", "int8"}
    assert ("int8" in [row.transform for row in report.plan]) == (better == "int8")
    assert report.rejected


def test_a_dry_run_stops_at_the_plan(tiny: Path, quick: None, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tiny.parent.iterdir() if path.is_file()}
    out = tmp_path / "out"
    report = run(tiny, out, dry=True)
    assert report.verdict is None
    assert (report.rounds, report.models, report.result.latency_ms, report.baseline.latency_ms) == ((), (), None, None)
    assert report.plan
    assert not (out / "measurements.jsonl").exists()
    assert list((out / "models").iterdir()) == []
    assert {"training", "measure", "round 1"}.isdisjoint(names(report))
    assert all(path.read_bytes() == content for path, content in before.items())
    assert run(tiny, out, mk.Budget(latency_ms=1e-4), dry=True).verdict == "unreachable"


def test_an_unreachable_budget_ends_before_training(tiny: Path, quick: None, tmp_path: Path) -> None:
    report = run(tiny, tmp_path / "out", mk.Budget(latency_ms=1e-4))
    assert report.verdict == "unreachable"
    assert report.best_reachable_ms is not None
    assert report.best_reachable_ms > 0
    assert {"training", "damage", "measure"}.isdisjoint(names(report))
    assert report.models == ()
    assert report.plan


def test_no_budget_changes_nothing_and_can_be_resumed(tiny: Path, quick: None, tmp_path: Path) -> None:
    report = run(tiny, tmp_path / "out", mk.Budget())
    assert (report.verdict, report.plan) == (None, ())
    assert report.rounds[0].target_ms is None
    again = run(tiny, tmp_path / "out", mk.Budget(), resume=True)
    assert all(stage.resumed for stage in again.stages)
    assert again.rounds == report.rounds


@pytest.mark.slow
def test_without_training(tiny: Path, quick: None, finished: Path, tmp_path: Path) -> None:
    report = run(tiny, tmp_path / "out", train=False)
    assert "training" not in names(report)
    assert report.verdict == "met"
    assert [row.where for row in report.plan] == [row["where"] for row in read(finished)["plan"]]


def test_a_plan_is_replayed_as_it_is(tiny: Path, quick: None, finished: Path, tmp_path: Path) -> None:
    plan = mk.Plan.model_validate_json((finished / "plan.json").read_bytes())
    weaker = plan.model_copy(update={"chosen": plan.chosen[:1]})  # its budget is missed, and it is not corrected
    (tmp_path / "plan.json").write_text(weaker.model_dump_json())
    report = pipeline.apply(tmp_path / "plan.json", str(tiny), tmp_path / "out", pipeline.Listener())
    assert [(row.transform, row.where) for row in report.plan] == [
        (plan.chosen[0].option.transform, plan.chosen[0].option.where)
    ]
    assert report.verdict == "missed"
    assert len(report.rounds) == 1
    assert report.result.macs < report.baseline.macs


def test_the_verbs_of_the_python_interface(tiny: Path, quick: None, tmp_path: Path) -> None:
    plan = mk.plan(str(tiny), profile="host", budget=PRUNING)
    assert "predicted" in str(plan)
    report = mk.build(plan, out=tmp_path / "out")
    assert report.verdict == "met"
    assert all(row.damage is not None for row in report.plan)  # also where the given plan was made again
    measured = mk.measure(tmp_path / "out" / report.models[0].path)
    assert measured.samples_ms


# ---------------------------------------------------------------- what goes wrong on the way


def variant(folder: Path, tiny: Path, *more: str) -> Path:
    """The tiny workload with other functions."""
    path = folder / "tiny.py"
    path.write_text(TINY + "\n" + "\n".join(more) + "\n", encoding="utf-8")
    (folder / "weights.safetensors").write_bytes((tiny.parent / "weights.safetensors").read_bytes())
    return path


def test_training_that_fails_leaves_the_untrained_network(tiny: Path, quick: None, tmp_path: Path) -> None:
    workload = variant(tmp_path, tiny, "def loss(output, target): return output.sum() * float('nan')")
    report = run(workload, tmp_path / "out")
    failure = next(row for row in report.failures if row.stage == "training")
    assert "loss is nan at step 1" in failure.message
    assert report.verdict == "met"
    again = run(workload, tmp_path / "out", resume=True)
    assert again.failures == report.failures


def test_evaluate_that_cannot_judge_files(tiny: Path, quick: None, tmp_path: Path) -> None:
    workload = variant(tmp_path, tiny, "def evaluate(model): return 0.5 if isinstance(model, Net) else model.stem")
    report = run(workload, tmp_path / "out", mk.Budget(speedup=1.3))
    assert report.verdict == "met"
    assert report.baseline.accuracy == 0.5
    assert report.result.accuracy is None  # the module's figure is not the file's
    assert [row.stage for row in report.failures].count("accuracy") == 2


def test_without_data_only_what_keeps_the_shape(tiny: Path, quick: None, tmp_path: Path) -> None:
    workload = variant(tmp_path, tiny, "del calibration_data, train_data, evaluate")
    report = run(workload, tmp_path / "out", mk.Budget(speedup=1.3))
    assert [row.transform for row in report.plan] == ["int8"]
    assert any("not to be trusted" in text for text in report.warnings)
    assert report.accuracy_kind.startswith("top-1 agreement")


def no_last_measurement(before: Callable[[object, Any], BenchResult]) -> Callable[[object, Any], BenchResult]:
    def measure(self: object, request: Any) -> BenchResult:
        if any(model.name == "result" for model in request.models):
            gone = Failure(stage="measure", subject="result", message="the device is gone", remedy="plug it in")
            return BenchResult(measurements=(), failures=(gone,))
        return before(self, request)

    return measure


def test_a_result_that_cannot_be_measured_is_no_success(
    tiny: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mobilekit import cli
    from mobilekit.devices.host import Host

    monkeypatch.setattr(Host, "run", no_last_measurement(Host.run))
    arguments = ["plan", str(tiny), "--profile", "host", "--speedup", "1.3", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["mobilekit", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    assert "the device is gone" in capsys.readouterr().out
    assert read(tmp_path / "out")["verdict"] is None


def test_a_failed_last_measurement_is_made_again_by_a_resumed_run(
    tiny: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilekit.devices.host import Host

    whole = Host.run
    monkeypatch.setattr(Host, "run", no_last_measurement(whole))
    assert run(tiny, tmp_path / "out").verdict is None
    monkeypatch.setattr(Host, "run", whole)
    again = run(tiny, tmp_path / "out", resume=True)
    assert again.verdict is not None
    assert [row.name for row in again.stages if not row.resumed] == ["measure"]


# ---------------------------------------------------------------- resume


def test_a_finished_run_does_nothing_again(tiny: Path, quick: None, finished: Path, tmp_path: Path) -> None:
    before = read(finished)
    stamps = {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").iterdir()}
    again = run(tiny, finished, resume=True)
    assert all(stage.resumed for stage in again.stages)
    assert stamps == {path: path.stat().st_mtime_ns for path in (finished / "checkpoints").iterdir()}
    after = read(finished)
    for report in (before, after):
        for name in ("created_at", "stages"):
            report.pop(name)
    assert before == after


def test_another_request_is_not_resumed(tiny: Path, quick: None, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out", dry=True)
    assert all(stage.resumed for stage in run(tiny, tmp_path / "out", dry=True, resume=True).stages)
    assert not any(stage.resumed for stage in run(tiny, tmp_path / "out", dry=True, resume=True, seed=1).stages)
    assert not any(stage.resumed for stage in run(tiny, tmp_path / "out", dry=True, seed=1).stages)


def test_a_damaged_checkpoint_is_done_again(tiny: Path, quick: None, tmp_path: Path) -> None:
    first = run(tiny, tmp_path / "out", dry=True)
    damages = tmp_path / "out" / "checkpoints" / "damage.json"
    kept = json.loads(damages.read_text())
    for damaged in ("{", json.dumps({**kept, "value": 3}), json.dumps({**kept, "value": {"seconds": 1, "value": {}}})):
        damages.write_text(damaged)
        again = run(tiny, tmp_path / "out", dry=True, resume=True)
        assert [stage.name for stage in again.stages if not stage.resumed] == ["damage"]
        assert again.plan == first.plan


def check_resumed(out: Path, finished: Path, stamps: dict[str, int], report: Any) -> None:
    """The resumed run ended as the one that was not disturbed, without doing finished stages again."""
    assert (out / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()
    stages = {stage["name"]: stage["resumed"] for stage in report["stages"]}
    expected = read(finished)
    assert list(stages) == [stage["name"] for stage in expected["stages"]]
    assert {name for name, resumed in stages.items() if resumed} == set(stamps)
    for name, stamp in stamps.items():
        assert (out / "checkpoints" / f"{name}.json").stat().st_mtime_ns == stamp
    assert report["verdict"] == expected["verdict"]
    assert report["failures"] == expected["failures"] == lines(out, "failures.jsonl")
    assert [row["precision"] for row in report["models"]] == [row["precision"] for row in expected["models"]]
    assert not [path for folder in ("models", "checkpoints") for path in (out / folder).glob(".*")]
    for model in report["models"]:
        assert hashlib.sha256((out / model["path"]).read_bytes()).hexdigest() == model["sha256"]


def kept_stages(out: Path) -> dict[str, int]:
    paths = [path for path in (out / "checkpoints").glob("*.json") if path.stem != "training-key"]
    return {path.stem: path.stat().st_mtime_ns for path in paths}


MOMENTS = [
    ("training", "0.6"),
    ("round 1", "0.5"),
    pytest.param(("network", "end"), marks=pytest.mark.slow),
    pytest.param(("original", "0.4"), marks=pytest.mark.slow),
    pytest.param(("original", "end"), marks=pytest.mark.slow),
    pytest.param(("damage", "0.5"), marks=pytest.mark.slow),
    pytest.param(("plan", "end"), marks=pytest.mark.slow),
    pytest.param(("round 2", "end"), marks=pytest.mark.slow),
    pytest.param(("training", "end"), marks=pytest.mark.slow),
    pytest.param(("accuracy", "end"), marks=pytest.mark.slow),
    pytest.param(("export onnx int8", "end"), marks=pytest.mark.slow),
    pytest.param(("export onnx fp32", "0.0"), marks=pytest.mark.slow),
    pytest.param(("measure", "0.5"), marks=pytest.mark.slow),
    pytest.param(("measure", "end"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("die", MOMENTS, ids=" ".join)
def test_a_killed_run_is_resumed(die: tuple[str, str], tiny: Path, quick: None, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["plan", str(tiny), "--profile", "host", "--speedup", "4", "--runtime", "onnx", "--out", str(out)]
    killed = command(*arguments, die=die)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    stamps = kept_stages(out)
    assert die[0] not in stamps
    started: list[tuple[str, float]] = []
    listener = pipeline.Listener(lambda stage, fraction: started.append((stage, fraction)))
    run(tiny, out, resume=True, listener=listener)
    check_resumed(out, finished, stamps, read(out))
    if die == ("training", "0.6"):
        assert min(fraction for stage, fraction in started if stage == "training" and fraction > 0) > 0.55


@pytest.mark.slow
@pytest.mark.parametrize("after", ["original", "damage", "round 1", "training", "accuracy", "export onnx int8"])
def test_a_process_group_killed_from_outside(
    after: str, tiny: Path, quick: None, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["plan", str(tiny), "--profile", "host", "--speedup", "4", "--runtime", "onnx", "--out", str(out)]
    with subprocess.Popen(
        quick_command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while not (out / "checkpoints" / f"{after}.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    stamps = kept_stages(out)
    resumed = command(*arguments, "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    check_resumed(out, finished, stamps, json.loads(resumed.stdout))


# ---------------------------------------------------------------- on the real machine


def test_the_real_machine(tiny: Path, host_profile: object, tmp_path: Path) -> None:
    """Every runtime that is installed, measured; the figures are this machine's and only their relations are known."""
    out = tmp_path / "out"
    arguments = ["plan", str(tiny), "--profile", "host", "--speedup", "1.2", "--runtime", "onnx"]
    done = command(*arguments, "--out", str(out), "--json", computed=False)
    report = json.loads(done.stdout)
    assert report == read(out)
    assert done.returncode == {"met": 0, "missed": 3, "unreachable": 3}[report["verdict"]], done.stderr
    assert "Traceback" not in done.stderr
    assert set(report) >= KEYS
    raw = lines(out, "measurements.jsonl")
    assert all(row["origin"] == "host" for row in raw)
    for model in report["models"]:
        assert (out / model["path"]).exists()
        for row in model["measurements"]:
            assert row["median_ms"] == pytest.approx(statistics.median(raw[row["line"] - 1]["cpu_samples_ms"]))
    if report["verdict"] != "unreachable":
        assert report["ratio"] > 0
        assert {model["runtime"] for model in report["models"]} >= {"onnx"}
        assert (report["verdict"] == "met") == all(row["met"] for row in report["findings"])
