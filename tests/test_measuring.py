"""`mobilekit measure` as a whole: repeats, baselines, cooling, and parity on the device, with small real files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from torch import nn

from mobilekit import bench, manifest, pipeline
from mobilekit.bench import golden
from mobilekit.devices.host import Host
from mobilekit.errors import BadInputError
from mobilekit.pipeline import Timing, measure_files
from mobilekit.types import BenchRequest, BenchResult, ExportOptions, Failure, Measurement, Precision, TensorData

Answer = Callable[[BenchRequest], BenchResult]


class Maps(nn.Module):
    """A map out of a map and a row, so that layouts matter at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = networks.conv_bn(3, 8, stride=2)
        self.last = nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.last(self.stem(x))
        return y, y.mean((2, 3))


def files_of(out: Path, to: list[str], precision: Precision, options: ExportOptions) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = networks.settled(Maps())
        batch = torch.randn(8, 3, 16, 16).numpy()
    pipeline.export(net, networks.example(), to=to, precision=precision, calibration=[batch], out=out, options=options)
    return out


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files_of(tmp_path_factory.mktemp("fp32"), ["onnx", "tflite"], "fp32", ExportOptions())


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes and gives int8."""
    return files_of(tmp_path_factory.mktemp("int8"), ["tflite"], "int8", ExportOptions(io="int8"))


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    quick: bench.Settings = {"least_seconds": 0.1, "max_seconds": 4.0, "runs": 12, "least_runs": 12}
    monkeypatch.setattr(bench, "FILES", {**bench.FILES, **quick})


def kinds(found: pipeline.Measured) -> set[str]:
    return {warning.kind for warning in found.warnings}


# ---------------------------------------------------------------- parity on the device


@pytest.mark.parametrize(("given", "files", "least_db"), [("exported", 2, 60.0), ("quantised", 1, 15.0)])
def test_outputs_on_the_device_are_compared_with_the_golden_ones(
    given: str, files: int, least_db: float, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(given)
    found = measure_files([folder], [Host()])
    assert found.failures == []
    assert found.sound
    assert len(found.measurements) == files
    stated = {model.path: model for model in manifest.read(folder).models}
    for measurement in found.measurements:
        parity, tolerance = measurement.parity, stated[measurement.model].tolerance
        assert parity is not None
        assert (parity.status, parity.samples) == ("executed", 4)
        assert parity.max_abs_error is not None
        assert tolerance is not None
        assert parity.max_abs_error <= tolerance
        assert parity.sqnr_db is None or parity.sqnr_db > least_db
        assert "the furthest of 2" in parity.note
        assert measurement.outputs == ()


def test_inputs_are_fed_in_the_files_own_type_and_layout(exported: Path, quantised: Path) -> None:
    found = {path.name: golden.of(path) for folder in (exported, quantised) for path in folder.glob("*.*lite")}
    found |= {path.name: golden.of(path) for path in exported.glob("*.onnx")}
    fed = {name: vectors.inputs[0] for name, vectors in found.items() if vectors is not None}
    assert {name: (values.shape, values.dtype) for name, values in fed.items()} == {
        "network.onnx": ((4, 3, 16, 16), np.float32),
        "network.tflite": ((4, 16, 16, 3), np.float32),
        "network.int8.tflite": ((4, 16, 16, 3), np.int8),
    }


def answering(monkeypatch: pytest.MonkeyPatch, change: Callable[[Measurement], Measurement]) -> None:
    """The host, whose answers are changed on the way."""
    run: Callable[[Host, BenchRequest], BenchResult] = Host.run

    def changed(self: Host, request: BenchRequest) -> BenchResult:
        result = run(self, request)
        return result.model_copy(update={"measurements": tuple(change(m) for m in result.measurements)})

    monkeypatch.setattr(Host, "run", changed)


def with_outputs(**changes: Any) -> Callable[[Measurement], Measurement]:
    def change(measurement: Measurement) -> Measurement:
        outputs = tuple(output.model_copy(update=changes) for output in measurement.outputs)
        return measurement.model_copy(update={"outputs": outputs})

    return change


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "AAAA"}, "0 values|in place of|buffer size"),
        ({"data": "no base64!"}, "something else than the file's output"),
        ({"dtype": "float64"}, "float64 in place of"),
        ({"dtype": "nonsense\x1b[31m"}, "in place of"),
    ],
)
def test_outputs_that_are_none_are_a_failure(
    exported: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    answering(monkeypatch, with_outputs(**changes))
    (file,) = exported.glob("*.onnx")
    found = measure_files([file], [Host()], Timing(runs=3))
    (failure,) = found.failures
    assert failure.stage == "parity"
    assert pytest.importorskip("re").search(said, failure.message)
    assert not found.sound
    assert found.measurements[0].parity is None


def test_a_device_that_computes_something_else_is_found_out(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(output: TensorData) -> TensorData:
        import base64

        values = np.frombuffer(base64.b64decode(output.data), output.dtype)
        return output.model_copy(update={"data": base64.b64encode(np.roll(values, 1).tobytes()).decode()})

    answering(monkeypatch, lambda m: m.model_copy(update={"outputs": tuple(map(shifted, m.outputs))}))
    (file,) = exported.glob("*.tflite")
    found = measure_files([file], [Host()], Timing(runs=3))
    (failure,) = found.failures
    assert (failure.stage, failure.subject) == ("parity", file.name)
    assert "differ from the golden ones" in failure.message
    assert not found.sound
    parity = found.measurements[0].parity
    assert parity is not None
    assert parity.max_abs_error is not None
    assert parity.max_abs_error > 0.1


def test_values_that_are_not_finite_are_a_failure(exported: Path) -> None:
    (file,) = exported.glob("*.onnx")
    vectors = golden.of(file)
    assert vectors is not None
    import base64

    outputs = [
        TensorData(
            name=spec.name,
            shape=values.shape,
            dtype="float32",
            data=base64.b64encode(np.full_like(values, np.nan).tobytes()).decode(),
        )
        for spec, values in zip(vectors.entry.outputs, vectors.outputs, strict=True)
    ]
    with pytest.raises(BadInputError, match="not finite"):
        golden.judged(vectors, outputs)
    with pytest.raises(BadInputError, match="returned 1 outputs, and the file has 2"):
        golden.judged(vectors, outputs[:1])


def test_a_file_that_is_not_the_manifests_is_said_and_measured(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    (first,) = folder.glob("*.onnx")
    with first.open("ab") as file:
        file.write(b"\x92\x03\x00")  # an unknown field of the format, which readers skip
    found = measure_files([first], [Host()], Timing(runs=3))
    (failure,) = found.failures
    assert (failure.stage, failure.subject) == ("parity", first.name)
    assert "is not the file that the manifest beside it describes" in failure.message
    assert "--no-parity" in failure.remedy
    assert len(found.measurements) == 1
    assert not found.sound
    assert measure_files([first], [Host()], Timing(runs=3, parity=False)).sound


def test_a_manifest_that_is_none_is_said(exported: Path, tmp_path: Path) -> None:
    (file,) = exported.glob("*.onnx")
    shutil.copy(file, tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}', encoding="utf-8")
    found = measure_files([tmp_path], [Host()], Timing(runs=3))
    assert [failure.stage for failure in found.failures] == ["parity"]
    assert len(found.measurements) == 1
    (tmp_path / "manifest.json").unlink()
    found = measure_files([tmp_path], [Host()], Timing(runs=3))
    assert found.sound
    assert found.measurements[0].parity is None


# ---------------------------------------------------------------- what is asked of the device


class Asked:
    """A host that answers at once and keeps what it was asked."""

    def __init__(self, temperatures: tuple[float | None, ...] = ()) -> None:
        self.requests: list[BenchRequest] = []
        self.temperatures = list(temperatures)
        self.factors = {"a": 1.0, "b": 2.0, "c": 3.0}
        self.drifts = [1.0]
        self.ratios = [1.0]
        self.lost: dict[str, int] = {}
        """Name -> sessions after which it no longer runs."""

    def samples(self, name: str) -> tuple[float, ...]:
        number = len(self.requests) - 1
        beside = 1.0 if name == "a" else self.ratios[number % len(self.ratios)]
        return (self.factors[name] * self.drifts[number % len(self.drifts)] * beside,) * 60

    def __call__(self, _: Host, request: BenchRequest) -> BenchResult:
        self.requests.append(request)
        temperature = self.temperatures.pop(0) if self.temperatures else None
        names = {model.path: Path(model.path).stem for model in request.models}
        return BenchResult(
            measurements=tuple(
                Measurement(
                    model=model.name,
                    path=model.path,
                    sha256="0" * 64,
                    runtime="onnx",
                    device="host",
                    origin="host",
                    threads=request.threads,
                    samples_ms=self.samples(names[model.path]),
                    cpu_samples_ms=self.samples(names[model.path]),
                    reference_ms=(5.0,) * 60,
                    load_ms=1.0,
                    compute_unit="cpu",
                    temperature_before_c=temperature,
                    cool_to_c=request.cool_to_c,
                    started_at="2026-01-01T00:00:00+00:00",
                    versions={},
                )
                for model in request.models
                if len(self.requests) <= self.lost.get(names[model.path], 1000)
            )
        )


@pytest.fixture
def three(tmp_path: Path) -> Path:
    folder = tmp_path / "three"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.onnx").write_bytes(b"never opened")
    return folder


def asking(monkeypatch: pytest.MonkeyPatch, *temperatures: float | None) -> Asked:
    asked = Asked(temperatures)
    monkeypatch.setattr(Host, "run", lambda host, request: asked(host, request))  # noqa: PLW0108 (binds the host)
    return asked


def test_the_defaults_are_those_of_the_protocol(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    asked = asking(monkeypatch)
    measure_files([three / "a.onnx"], [Host()])
    measure_files([three], [Host()])
    measure_files([three], [Host()], Timing(mlperf=True))
    one, many, mlperf = asked.requests
    assert (one.warm_until_stable, one.least_runs, one.least_seconds) == (True, 50, 5.0)
    assert (many.least_runs, many.least_seconds) == (50, 5.0)
    assert (mlperf.warm_until_stable, mlperf.least_runs, mlperf.least_seconds) == (True, 1024, 60.0)
    assert mlperf.max_seconds > 600


def test_options_reach_the_device(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asking(monkeypatch)
    measure_files([three], [Host()], Timing(threads=2, runs=7, cores="big", cool_to_c=45.0))
    (request,) = asked.requests
    assert (request.threads, request.runs, request.cores, request.cool_to_c) == (2, 7, "big", 45.0)
    assert (request.least_runs, request.warm_until_stable, request.cool_seconds) == (0, False, bench.COOL_SECONDS)
    assert [Path(model.path).stem for model in request.models] == ["a", "b", "c"]


def test_one_by_one_each_file_waits_until_it_is_as_cool_as_the_first(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asking(monkeypatch, 41.0, 44.0, 43.0)
    found = measure_files([three], [Host()], Timing(one_by_one=True))
    assert [[Path(model.path).stem for model in request.models] for request in asked.requests] == [["a"], ["b"], ["c"]]
    assert [request.cool_to_c for request in asked.requests] == [None, 43.0, 43.0]
    assert len(found.measurements) == 3
    asked = asking(monkeypatch, 41.0)
    measure_files([three], [Host()], Timing(one_by_one=True, cool_to_c=35.0))
    assert [request.cool_to_c for request in asked.requests] == [35.0] * 3
    asked = asking(monkeypatch)
    measure_files([three], [Host()], Timing(one_by_one=True))
    assert [request.cool_to_c for request in asked.requests] == [None] * 3  # no temperature can be read


def test_ratios_are_to_the_baseline(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asking(monkeypatch)
    found = measure_files([three], [Host()], Timing(baseline=three / "b.onnx"))
    assert [Path(model.path).stem for model in asked.requests[0].models] == ["b", "a", "c"]
    assert [(row.model, row.ratio, row.baseline) for row in found.ratios] == [
        ("a.onnx", 0.5, "b.onnx"),
        ("c.onnx", 1.5, "b.onnx"),
    ]
    assert [row.fast_ratio for row in found.ratios] == [0.5, 1.5]
    assert all(low <= row.ratio <= high for row in found.ratios for low, high in [row.interval])
    assert len(asked.requests) == found.ratios[0].sessions == 3
    assert [len(measurement.samples_ms) for measurement in found.measurements] == [180] * 3


def test_sessions_go_on_until_the_ratios_are_known(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asking(monkeypatch)
    asked.ratios = [1.0, 1.2, 0.9, 1.1, 0.8]
    found = measure_files([three], [Host()], Timing(baseline=three / "a.onnx"))
    assert len(asked.requests) == found.ratios[0].sessions == 8
    asked.requests.clear()
    found = measure_files([three], [Host()], Timing(baseline=three / "a.onnx", runs=40))
    assert len(asked.requests) == found.ratios[0].sessions == 1


def test_a_file_that_fails_in_a_later_session_keeps_its_rounds(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asking(monkeypatch)
    asked.lost = {"c": 1}
    found = measure_files([three], [Host()], Timing(baseline=three / "a.onnx"))
    assert [(m.model, len(m.samples_ms)) for m in found.measurements] == [
        ("a.onnx", 180),
        ("b.onnx", 180),
        ("c.onnx", 60),
    ]
    assert [(row.model, row.sessions) for row in found.ratios] == [("b.onnx", 3), ("c.onnx", 1)]
    asked.requests.clear()
    asked.lost = {"a": 1}
    found = measure_files([three], [Host()], Timing(baseline=three / "a.onnx"))
    assert [row.sessions for row in found.ratios] == [1, 1]


def test_repeats_are_processes_of_their_own_whose_spread_is_told(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asking(monkeypatch)
    asked.drifts = [1.0, 1.2, 1.1]
    found = measure_files([three], [Host()], Timing(repeat=3))
    assert len(asked.requests) == 3
    assert len(found.measurements) == 9
    first, second, _ = found.repeats
    assert (first.model, first.medians_ms, first.ratios) == ("a.onnx", (1.0, 1.2, 1.1), ())
    assert first.median_spread == pytest.approx(0.2)
    assert (second.beside, second.ratios, second.ratio_spread) == ("a.onnx", (2.0, 2.0, 2.0), 0.0)
    assert [w.subject for w in found.warnings if w.kind == "spread"] == ["a.onnx", "b.onnx", "c.onnx"]
    assert found.sound  # a spread is no failure
    asked.drifts = [1.0]
    assert "spread" not in kinds(measure_files([three], [Host()], Timing(repeat=3)))


def test_a_file_alone_repeats_beside_the_reference(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking(monkeypatch)
    (row,) = measure_files([three / "b.onnx"], [Host()], Timing(repeat=2)).repeats
    assert (row.beside, row.ratios) == ("the reference product", (0.4, 0.4))


@pytest.mark.parametrize(
    ("timing", "said"),
    [
        ({"mlperf": True, "runs": 3}, "leave out --runs"),
        ({"one_by_one": True, "baseline": Path("b.onnx")}, "leave out --one-by-one"),
    ],
)
def test_options_that_contradict_each_other_are_refused(timing: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        Timing(**timing)


def test_a_baseline_has_to_be_another_model_file(three: Path) -> None:
    with pytest.raises(BadInputError, match="compared with itself"):
        measure_files([three / "a.onnx"], [Host()], Timing(baseline=three / "a.onnx"))
    with pytest.raises(BadInputError, match="no model file"):
        measure_files([three], [Host()], Timing(baseline=three))


def test_rounds_that_were_promised_and_are_missing_are_told(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking(monkeypatch)
    found = measure_files([three], [Host()], Timing(mlperf=True))
    assert kinds(found) == {"few-rounds"}
    assert "only 60 of the 1024 rounds" in found.warnings[0].message


# ---------------------------------------------------------------- the command


def test_the_document_and_the_table_hold_the_same(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mobilekit.cli import app

    (baseline,) = exported.glob("*.onnx")
    arguments = ["measure", str(exported), "--runs", "12", "--repeat", "2", "--baseline", str(baseline)]
    assert not app([*arguments, "--json"], standalone_mode=False)
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"measurements", "failures", "warnings", "ratios", "repeats"}
    assert [m["parity"]["status"] for m in document["measurements"][:2]] == ["executed"] * 2
    assert all(m["first_run_ms"] > 0 for m in document["measurements"])
    assert {w["kind"] for w in document["warnings"]} >= {"few-rounds"}
    assert len(document["ratios"]) == 1
    assert len(document["repeats"]) == 2
    assert not app(arguments, standalone_mode=False)
    said = capsys.readouterr()
    for word in ("load ms", "first run ms", "peak MB", "parity", "dB", "90 % interval", "spread"):
        assert word in said.out
    assert "only 12 rounds were timed" in said.err


def test_wrong_outputs_are_exit_code_1(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mobilekit.cli import app

    folder = tmp_path / "strict"
    shutil.copytree(exported, folder)
    document = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for model in document["models"]:
        model["tolerance"] = 1e-12
    (folder / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    (file,) = folder.glob("*.onnx")
    assert app(["measure", str(file), "--runs", "3"], standalone_mode=False) == 1
    assert "the manifest allows 1e-12" in capsys.readouterr().err
    with pytest.raises(BadInputError, match="any, big or little"):
        app(["measure", str(file), "--cores", "huge"], standalone_mode=False)


# ---------------------------------------------------------------- several devices


class Second(Host):
    """This machine once more, under another name."""

    name = "second"


def test_a_device_on_which_nothing_was_measured_is_no_success(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking(monkeypatch)
    failure = Failure(stage="measure", subject="second", message="it is gone", remedy="look for it")
    lost = BenchResult(measurements=(), failures=(failure,))
    assert measure_files([three], [Host(), Second()]).sound
    monkeypatch.setattr(Second, "run", lambda device, request: lost)
    found = measure_files([three], [Host(), Second()])
    assert len(found.measurements) == 3
    assert (found.silent, found.sound) == (["second"], False)


def test_interrupt_ends_all_devices(exported: Path) -> None:
    at_work: list[Path] = []

    def children() -> list[Path]:
        lines = {folder: folder / "cmdline" for folder in Path("/proc").glob("[0-9]*")}
        found = []
        for folder, line in lines.items():
            with contextlib.suppress(OSError):
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if parent == str(os.getpid()) and b"_runner.py" in line.read_bytes():
                    found.append(folder)
        return found

    def interrupt() -> None:
        while len(children()) < 2:
            time.sleep(0.02)
        at_work.extend(children())
        time.sleep(0.3)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    # what a shell starts in the background ignores the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begin = time.monotonic()
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            measure_files([exported], [Host(), Second()], Timing(mlperf=True))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 50, "rounds go on for a minute"
    assert len(at_work) == 2
    assert children() == []


def test_a_manifest_with_a_type_that_there_is_not(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    text = (folder / manifest.NAME).read_text(encoding="utf-8")
    (folder / manifest.NAME).write_text(
        text.replace('"dtype": "float32",\n          "layout": "N', '"dtype": "banana",\n          "layout": "N')
    )
    found = measure_files([folder], [Host()], Timing(runs=3))
    assert found.measurements
    assert {failure.stage for failure in found.failures} == {"parity"}
    assert "banana" in found.failures[0].message
    assert not found.sound
