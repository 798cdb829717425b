"""The emulated Arm machine: what it says without QEMU, and (slow) real files in Arm's builds of the runtimes."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_devices import write_onnx, write_tflite
from test_machine import MACHINE

from mobilekit import bench, cli, registry
from mobilekit.devices import _arm64_install, _arm64_root, _beside_host
from mobilekit.devices._arm64_root import Installed
from mobilekit.devices.emulated_arm64 import EmulatedArm64, install
from mobilekit.devices.host import Host
from mobilekit.errors import BadInputError, MobilekitError, UnsupportedError
from mobilekit.pipeline import Timing, measure_files
from mobilekit.types import (
    BenchModel,
    BenchRequest,
    BenchResult,
    DeviceSettings,
    FileFacts,
    Measurement,
    TensorData,
    TensorSpec,
)

COMMAND = "mobilekit doctor --install-emulator"
FOUND = Installed(
    layout=_arm64_root.LAYOUT,
    suite="bookworm",
    python="3.11",
    qemu="qemu-aarch64 7.2.22",
    asked={},
    versions={"onnx": "1.31.1", "tflite": "2.3.0", "numpy": "2.3.5"},
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the machine would lie, in a cache that is empty."""
    monkeypatch.setenv("MOBILEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "arm64"


def request_of(*paths: Path, **changes: object) -> BenchRequest:
    models = tuple(BenchModel(name=p.name, path=str(p), runtime=p.suffix[1:]) for p in paths)
    return BenchRequest(models=models).model_copy(update=changes)


# ---------------------------------------------------------------- without the machine


def test_its_address_is_empty() -> None:
    assert registry.device("emulated-arm64").name == "emulated-arm64"
    with pytest.raises(BadInputError, match=r"takes no address, but got 'pi@board'"):
        registry.device("emulated-arm64:pi@board")
    with pytest.raises(BadInputError, match="--runner"):
        registry.device("emulated-arm64", DeviceSettings(runner="bench"))


def test_what_is_missing_is_said_with_the_command_that_installs_it(place: Path, tmp_path: Path) -> None:
    reason = EmulatedArm64.unavailable()
    assert reason is not None
    assert reason.endswith(COMMAND)
    assert EmulatedArm64.visible() == []
    with pytest.raises(MobilekitError, match=COMMAND):
        EmulatedArm64().info()
    result = EmulatedArm64().run(request_of(write_onnx(tmp_path / "net.onnx")))
    assert not result.measurements
    assert [failure.remedy for failure in result.failures] == [COMMAND]


@pytest.mark.parametrize("text", ["", "{", "{}", FOUND.model_copy(update={"layout": 0}).model_dump_json()])
def test_half_a_machine_or_one_of_another_version_is_none(place: Path, text: str) -> None:
    place.mkdir(parents=True)
    (place / "root").mkdir()
    (place / "installed.json").write_text(text, encoding="utf-8")
    assert _arm64_root.installed() is None
    assert COMMAND in str(EmulatedArm64.unavailable())


def test_another_qemu_than_it_was_installed_with(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.mkdir(parents=True)
    (place / "installed.json").write_text(FOUND.model_dump_json(), encoding="utf-8")
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    assert "qemu-aarch64 is not installed" in str(EmulatedArm64.unavailable())
    qemu = programs / "qemu-aarch64"
    qemu.write_text("#!/bin/sh\necho 'qemu-aarch64 version 7.2.22'\necho 'Copyright'\n", encoding="ascii")
    qemu.chmod(0o755)
    assert EmulatedArm64.unavailable() is None
    assert EmulatedArm64.visible() == ["emulated-arm64"]
    info = EmulatedArm64().info()
    assert (info.kind, info.origin, info.architecture, info.cores) == ("emulator", "emulator", "aarch64", 1)
    assert info.versions == {"onnx": "1.31.1", "tflite": "2.3.0"}
    qemu.write_text("#!/bin/sh\necho 'qemu-aarch64 version 10.0.2'\n", encoding="ascii")
    assert "QEMU is another one" in str(EmulatedArm64.unavailable())


def test_without_root_it_says_which_packages_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    with pytest.raises(UnsupportedError, match="sudo apt install qemu-user mmdebstrap gcc fakechroot fakeroot"):
        install(lambda stage, share: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UnsupportedError, match="no Debian"):
        install(lambda stage, share: None)
    assert not place.exists()


def test_a_step_that_fails_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(root: Path) -> str:
        root.mkdir()
        (root / "half").write_text("half", encoding="utf-8")
        raise MobilekitError("the Debian root for arm64 failed: mmdebstrap: E: no network")

    monkeypatch.setattr(_arm64_install, "tools", lambda: None)
    monkeypatch.setattr(_arm64_install, "make_root", broken)
    with pytest.raises(MobilekitError, match="no network"):
        install(lambda stage, share: None)
    assert list(place.parent.iterdir()) == []


def test_a_command_that_fails_is_one_sentence(tmp_path: Path) -> None:
    script = "import sys; print('I: begin\\nE: no room', file=sys.stderr); sys.exit(3)"
    with pytest.raises(MobilekitError, match=r"^the root failed: python\S*: E: no room$"):
        _arm64_install.run([sys.executable, "-c", script], "the root")
    with pytest.raises(MobilekitError, match="No such file"):
        _arm64_install.run([str(tmp_path / "none")], "the root")
    with pytest.raises(MobilekitError, match="more than 0 s"):
        _arm64_install.run([sys.executable, "-c", "import time; time.sleep(60)"], "the root", seconds=0.01)


# ---------------------------------------------------------------- instructions


class Counter:
    """A file as the plugin writes it: a number for each of 512 threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts = [0] * 512
        self.add(0, 7_000_000)

    def add(self, thread: int, count: int) -> None:
        self.counts[thread] += count
        self.path.write_bytes(struct.pack("<512Q", *self.counts))


def test_instructions_of_a_run_are_those_between_two_looks(tmp_path: Path) -> None:
    counter = Counter(tmp_path / "counts")
    noise = [5000, 40]  # of the same process, in the first of the runs

    def run() -> None:
        counter.add(0, 1_000_000 + noise.pop(0))
        counter.add(511, 2_000_000)

    assert MACHINE.Instructions(str(counter.path)).of(run) == 3_000_040
    assert noise == []


def test_without_a_counter_there_are_no_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOBILEKIT_INSTRUCTIONS", raising=False)
    assert MACHINE.instructions() is None
    (found,) = Host().run(request_of(write_onnx(tmp_path / "net.onnx"), runs=2)).measurements
    assert found.instructions is None
    Counter(tmp_path / "counts")
    monkeypatch.setenv("MOBILEKIT_INSTRUCTIONS", str(tmp_path / "counts"))
    (found,) = Host().run(request_of(write_onnx(tmp_path / "net.onnx"), runs=2)).measurements
    assert found.instructions == 0  # nobody counts here


# ---------------------------------------------------------------- a machine that is this one


@pytest.fixture
def alike(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the emulated Python this one: everything but the emulation."""
    found = FOUND.model_copy(update={"without_counter": "no C compiler is there"})
    monkeypatch.setattr(_arm64_root, "installed", lambda: found)
    monkeypatch.setattr(_arm64_root, "missing", lambda: None)
    monkeypatch.setattr(_arm64_root, "python", lambda *_: [sys.executable])
    monkeypatch.setattr(_arm64_root, "environment", lambda *_: dict(os.environ))


@pytest.mark.usefixtures("alike")
def test_nothing_of_an_emulated_run_is_a_time(tmp_path: Path) -> None:
    paths = write_onnx(tmp_path / "net.onnx"), write_tflite(tmp_path / "net.tflite")
    result = EmulatedArm64().run(request_of(*paths, runs=200, per_operator=True))
    assert [m.model for m in result.measurements] == ["net.onnx", "net.tflite"]
    for measurement in result.measurements:
        assert measurement.origin == "emulator"
        assert measurement.device == "emulated-arm64"
        assert measurement.median_ms is None
        assert measurement.outputs == ()
        timed = [name for name in Measurement.model_fields if name.endswith(("_ms", "_mj", "_mb", "_c", "_seconds"))]
        assert {name: getattr(measurement, name) or None for name in timed} == dict.fromkeys(timed)
        assert measurement.operators == ()
        assert measurement.beside_host is not None
        assert measurement.beside_host.sqnr_db is None  # the same runtime: bit for bit
        assert measurement.beside_host.samples == 1
        assert bench.warnings_about(measurement) == []
        row = bench.row(measurement, "cpu", 1)
        assert (row.median_ms, row.p90_ms, row.min_ms, row.wall_median_ms, row.samples) == (None, None, None, None, 0)
        assert row.beside_host == measurement.beside_host
    stages = sorted((failure.stage, failure.subject) for failure in result.failures)
    assert stages == sorted((stage, p.name) for stage in ("operators", "instructions") for p in paths)
    assert "no C compiler" in next(f.message for f in result.failures if f.stage == "instructions")


@pytest.mark.usefixtures("alike")
def test_outputs_stay_where_they_are_asked_for(tmp_path: Path) -> None:
    result = EmulatedArm64().run(request_of(write_onnx(tmp_path / "net.onnx"), return_outputs=True))
    (output,) = result.measurements[0].outputs
    assert output.shape == (1, 8, 16, 16)


@pytest.mark.usefixtures("alike")
def test_a_damaged_file_costs_only_itself(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    result = EmulatedArm64().run(request_of(bad, write_onnx(tmp_path / "net.onnx")))
    assert [m.model for m in result.measurements] == ["net.onnx"]
    assert result.measurements[0].beside_host is not None
    assert ("load", "bad.onnx") in [(failure.stage, failure.subject) for failure in result.failures]


@pytest.mark.usefixtures("alike")
def test_repeats_and_ratios_of_files_without_times(tmp_path: Path) -> None:
    first, second = (write_onnx(tmp_path / f"{name}.onnx", depth=depth) for name, depth in (("a", 1), ("b", 2)))
    timing = Timing(repeat=2, baseline=first)
    found = measure_files([second], [registry.device("emulated-arm64")], timing)
    assert len(found.measurements) == 4
    assert found.ratios == []
    assert found.repeats == []
    assert found.warnings == []


# ---------------------------------------------------------------- beside this machine


def output_of(values: np.ndarray, name: str = "out") -> TensorData:
    text = base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
    return TensorData(name=name, shape=values.shape, dtype=values.dtype.name, data=text)


def measured(outputs: Sequence[TensorData], version: str = "1") -> Measurement:
    return Measurement(
        model="net",
        path="net.onnx",
        sha256="0" * 64,
        runtime="onnx",
        device="d",
        origin="emulator",
        threads=1,
        samples_ms=(),
        cpu_samples_ms=(),
        compute_unit="cpu",
        started_at="2026-01-01T00:00:00+00:00",
        versions={"onnx": version},
        outputs=tuple(outputs),
    )


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> object:
    """Compares outputs (there, here) of one file."""

    def compared(there: Sequence[TensorData], here: Sequence[TensorData], version: str = "1") -> object:
        result = BenchResult(measurements=(measured(here, version),))
        monkeypatch.setattr(Host, "run", lambda *_: result)
        request = BenchRequest(models=(BenchModel(name="net", path="net.onnx", runtime="onnx"),))
        (found,), failures = _beside_host.compared([measured(there)], request)
        return found.beside_host, [failure.message for failure in failures]

    return compared


def test_the_furthest_output_decides(compare: object) -> None:
    values = np.random.default_rng(0).standard_normal((4, 10)).astype(np.float32)
    near, far = values + np.float32(1e-3), values + np.float32(0.1)
    there = [output_of(near, "a"), output_of(far, "b")]
    parity, messages = compare(there, [output_of(values, "a"), output_of(values, "b")], "2")  # type: ignore[operator]
    assert messages == []
    assert parity.sqnr_db == pytest.approx(10 * np.log10(np.square(values).mean() / 0.01), abs=0.05)
    assert parity.max_abs_error == pytest.approx(0.1, rel=1e-3)
    assert parity.samples == 4
    assert parity.note == "of the output b, the furthest of 2; onnx 1 beside 2 here"


def test_quantised_outputs_are_compared_as_real_numbers(compare: object, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TensorSpec(name="out", shape=(1, 4), dtype="int8", layout="NC", scale=0.5, zero_point=-100)
    facts = FileFacts(inputs=(), outputs=(spec,), operators={})
    monkeypatch.setattr(type(registry.runtime("onnx")), "describe", lambda *_: facts)
    here = np.array([[-100, -98, -96, -94]], np.int8)  # 0, 1, 2, 3
    there = np.array([[-100, -98, -96, -92]], np.int8)  # 0, 1, 2, 4
    parity, _ = compare([output_of(there)], [output_of(here)])  # type: ignore[operator]
    assert parity.max_abs_error == 1.0
    assert parity.sqnr_db == pytest.approx(10 * np.log10(14))


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (np.zeros((2, 3), np.float32), "another shape or type"),
        (np.zeros((1, 3), np.float16), "another shape or type"),
        (np.array([[0, np.nan, 0]], np.float32), "is not finite"),
        (None, "other outputs"),
    ],
)
def test_outputs_that_cannot_be_compared_are_a_failure(compare: object, there: np.ndarray | None, wanted: str) -> None:
    outputs = [] if there is None else [output_of(there)]
    parity, messages = compare(outputs, [output_of(np.ones((1, 3), np.float32))])  # type: ignore[operator]
    assert parity is None
    assert len(messages) == 1
    assert wanted in messages[0]


def test_nonsense_in_place_of_an_output(compare: object) -> None:
    right = output_of(np.ones((1, 3), np.float32))
    for data in ("no base64!", "AAAA"):
        parity, messages = compare([right.model_copy(update={"data": data})], [right])  # type: ignore[operator]
        assert parity is None
        assert "cannot be read" in messages[0]


# ---------------------------------------------------------------- the real machine

LIKE_FLOAT_DB = 90.0
"""Of one float32 network in two builds of a runtime, which only add in another order."""
LIKE_INT8_DB = 20.0
"""Int8 kernels of Arm and x86 round in other places, and what is near an edge falls to the other side."""


@pytest.fixture(scope="module")
def installed() -> list[str]:
    """What installing says; it takes a minute, each time anew: into the cache of this session."""
    if shutil.which("apt-get") is None:
        pytest.skip("the emulated machine is made of Debian packages")
    said: list[str] = []
    install(lambda stage, share: said.append(stage))
    return said


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network with what mobile networks are made of, as ONNX and TFLite in float32 and int8."""
    import torch

    import mobilekit as mk

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2, padding=1),
        torch.nn.ReLU6(),
        torch.nn.Conv2d(16, 16, 3, padding=1, groups=16),
        torch.nn.ReLU6(),
        torch.nn.Conv2d(16, 32, 1),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 10),
    ).eval()
    batches = [np.random.default_rng(seed).standard_normal((8, 3, 32, 32)).astype(np.float32) for seed in range(4)]
    folder = tmp_path_factory.mktemp("exported")
    for precision in ("fp32", "int8"):
        mk.export(
            net,
            torch.zeros(1, 3, 32, 32),
            to=["onnx", "tflite"],
            precision=precision,  # type: ignore[arg-type]
            calibration=batches,
            out=folder / precision,
        )
    return folder


@pytest.mark.slow
def test_installing_again_changes_nothing(installed: list[str]) -> None:
    assert EmulatedArm64.unavailable() is None
    marker = _arm64_root.folder() / "installed.json"
    before = marker.stat().st_mtime_ns
    said: list[str] = []
    install(lambda stage, share: said.append(stage))
    assert len(said) == 1
    assert "is there" in said[0]
    assert marker.stat().st_mtime_ns == before
    info = EmulatedArm64().info()
    assert set(info.versions) == {"onnx", "tflite"}
    leftovers = [path for path in marker.parent.parent.iterdir() if path.name.startswith(".arm64.")]
    assert leftovers == []


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_exported_files_on_arm(exported: Path) -> None:
    """Twice the same: instructions repeat, outputs are this machine's within what the precision explains."""
    paths = sorted(exported.rglob("*.onnx")) + sorted(exported.rglob("*.tflite"))
    assert len(paths) == 4
    first, second = (EmulatedArm64().run(request_of(*paths, return_outputs=True)) for _ in range(2))
    assert first.failures == ()
    outputs = {}
    for one, other in zip(first.measurements, second.measurements, strict=True):
        assert one.origin == "emulator"
        assert one.samples_ms == ()
        assert one.instructions is not None
        assert other.instructions is not None
        assert one.instructions > 100_000
        assert other.instructions == pytest.approx(one.instructions, rel=0.002)
        assert one.outputs == other.outputs
        assert one.beside_host is not None
        bound = LIKE_INT8_DB if "int8" in one.path else LIKE_FLOAT_DB
        assert one.beside_host.sqnr_db is None or one.beside_host.sqnr_db > bound
        outputs[one.path] = one.outputs[0].data
    assert len(set(outputs.values())) == 4  # the int8 files really compute something else than the float ones


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_int8_takes_fewer_instructions_and_arm_is_what_runs(tmp_path: Path, exported: Path) -> None:
    """The processor's int8 dot products are used: four times as wide as its float32."""
    import torch

    import mobilekit as mk

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(64, 128, 1), torch.nn.ReLU(), torch.nn.Conv2d(128, 64, 1)).eval()
    batches = [np.random.default_rng(0).standard_normal((4, 64, 28, 28)).astype(np.float32)]
    counts = {}
    for precision in ("fp32", "int8"):
        (written,) = mk.export(
            net,
            torch.zeros(1, 64, 28, 28),
            to=["tflite"],
            precision=precision,  # type: ignore[arg-type]
            calibration=batches,
            out=tmp_path / precision,
        )
        (found,) = EmulatedArm64().run(request_of(Path(written.path))).measurements
        assert found.instructions is not None
        counts[precision] = found.instructions
    products = 2 * 64 * 128 * 28 * 28
    assert products / 16 < counts["int8"] < 0.6 * counts["fp32"]
    assert counts["fp32"] > products / 4  # a vector instruction of NEON holds four float32 products


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_measure_shows_no_latency(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["mobilekit", "measure", str(exported / "int8"), "--device", "emulated-arm64", "--json"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    document = json.loads(capfd.readouterr().out)
    assert document["failures"] == []
    for measurement in document["measurements"]:
        assert measurement["samples_ms"] == []
        assert measurement["load_ms"] is None
        assert measurement["instructions"] > 0
        assert measurement["parity"]["samples"] > 1  # golden inputs beside the file: against PyTorch
        assert measurement["beside_host"]["samples"] == measurement["parity"]["samples"]
        assert re.match(r"Cortex-A76, emulated by qemu-aarch64 \d", measurement["compute_unit"])


def test_the_command_that_installs_it_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILEKIT_CACHE", str(tmp_path))
    with pytest.raises(MobilekitError) as refused:
        EmulatedArm64().info()
    assert str(refused.value).count("--install-emulator") == 1


def test_it_runs_one_thread_whatever_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BenchRequest] = []

    def run(asked: BenchRequest, *_: object) -> BenchResult:
        seen.append(asked)
        return BenchResult(measurements=(), failures=())

    monkeypatch.setattr("mobilekit.devices._session.run", run)
    EmulatedArm64().run(request_of(write_onnx(tmp_path / "net.onnx"), threads=4))
    assert [asked.threads for asked in seen] == [1]  # threads that wait spin: their instructions are not the model's
