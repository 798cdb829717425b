"""`mobilekit doctor`: what can be done here, what the devices say, and what helps; through the command line."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import mobilekit.devices
from mobilekit import cli, registry

FACTS = Path(__file__).parent / "data" / "facts"
BOARD = f'''
from pathlib import Path

from mobilekit.devices import _facts
from mobilekit.devices._session import DeviceError, Trouble
from mobilekit.errors import BadInputError


class Board:
    """Answers with a text of a device; `lost` cannot be reached, `broken` breaks the connection."""

    takes = ()

    def __init__(self, address="", settings=None):
        if not address.isidentifier():
            raise BadInputError("this is no board: write board:NAME")
        self.address, self.name = address, "board:" + address

    @classmethod
    def visible(cls):
        return ["board:lost", "board:pixel_6", "board:no serial"]

    @classmethod
    def unavailable(cls):
        return None

    def info(self):
        if self.address == "lost":
            raise DeviceError(Trouble("the board is off", "switch it on"))
        if self.address == "broken":
            raise ConnectionResetError(104, "Connection reset by peer")
        text = Path({str(FACTS)!r}, self.address + ".txt").read_text()
        return _facts.parse(text, self.name, "board", "device", {{"onnx": "1.19.2"}})
'''
MISSING = '''
class Telegraph:
    """A kind of device whose program is not installed."""

    takes = ()

    @classmethod
    def visible(cls):
        raise AssertionError("what is missing cannot look")

    @classmethod
    def unavailable(cls):
        return "telegraph is not installed: sudo apt install telegraph"
'''
EMULATED = """
from mobilekit.errors import MobilekitError

INSTALLED = []


def install(progress):
    if INSTALLED:
        raise MobilekitError("there is no room for the emulator in /tmp: free 600 MB")
    progress("unpacking", 0.5)
    INSTALLED.append("emulator")


class EmulatedArm64:
    takes = ()

    @classmethod
    def visible(cls):
        return []

    @classmethod
    def unavailable(cls):
        return None if INSTALLED else "the emulator is not installed: mobilekit doctor --install-emulator"
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        assert self.code == 0, self
        return json.loads(self.out)


Doctor = Callable[..., Done]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Doctor:
    """Run `mobilekit doctor` in this process; what is attached to this machine is not looked at."""
    for kind in registry.device_kinds().values():
        monkeypatch.setattr(kind, "visible", classmethod(lambda _: []))

    def invoke(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["mobilekit", "doctor", *arguments])
        monkeypatch.setattr(cli.errors, "_file", None)  # the property would keep this test's stream when undone
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capfd.readouterr()
        return Done(int(left.value.code or 0), captured.out, captured.err)

    return invoke


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """Puts a further kind of device beside the real ones."""
    before = dict(sys.modules)
    monkeypatch.setattr(mobilekit.devices, "__path__", [str(tmp_path), *mobilekit.devices.__path__])

    def put(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        sys.modules.pop(f"mobilekit.devices.{name}", None)

    yield put
    for name in {name for name in sys.modules if name.startswith("mobilekit.devices.")}:
        if before.get(name) is not sys.modules[name]:
            del sys.modules[name]
            sys.modules |= {name: before[name]} if name in before else {}


def ability(document: Any, what: str) -> tuple[str, str]:
    (row,) = [row for row in document["abilities"] if row["what"] == what]
    return row["state"], row["remedy"]


def state(document: Any, device: str) -> Any:
    (row,) = [row for row in document["devices"] if row["device"] == device]
    return row


# ---------------------------------------------------------------- this machine


def test_one_document(doctor: Doctor) -> None:
    document = doctor("--json").document
    assert set(document) == {"machine", "abilities", "devices"}
    assert all(set(row) == {"what", "state", "remedy"} for row in document["abilities"])
    assert ability(document, "write onnx files") == ability(document, "write tflite files") == ("ready", "")
    assert ability(document, "run onnx files")[0].startswith("executed")
    how = ability(document, "run coreml files")[0]
    assert how.startswith("executed" if sys.platform == "darwin" else "evaluated")
    assert "import RESULT.json" in ability(document, "measure coreml files")[1]
    info = registry.device("host").info()
    assert info.versions["onnx"] in ability(document, "measure on host")[0]
    assert document["devices"][0]["device"] == "host"
    assert document["devices"][0]["info"]["soc"] == info.soc


def test_versions_are_those_that_are_installed_beside_those_that_are_asked_for(doctor: Doctor) -> None:
    machine = doctor("--json").document["machine"]
    assert machine["mobilekit"] == mobilekit.__version__
    packages = {(row["name"], row["extra"]): row for row in machine["packages"]}
    for name, extra in (
        ("torch", None),
        ("onnxruntime", None),
        ("ai-edge-litert", "tflite"),
        ("coremltools", "coreml"),
    ):
        row = packages[name, extra]
        assert row["version"] == metadata.version(name)
        assert any(line.startswith(name + row["needed"]) for line in metadata.requires("mobilekit") or [])
        assert (row["state"], row["remedy"]) == ("ok", "")
    assert not {extra for _, extra in packages} & {"dev", "ray", "zoo", "distributed"}


def test_what_is_missing_or_too_old_is_named_with_its_command(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=99", "not-there-at-all>=1", "nor-this>=2; extra == 'tflite'", "numpy; extra == 'tflite'", "&%"]
    monkeypatch.setattr(metadata, "requires", lambda _: lines)
    rows = doctor("--json").document["machine"]["packages"]
    assert [(row["name"], row["extra"], row["state"], row["remedy"]) for row in rows] == [
        ("torch", None, "outside", 'pip install "torch>=99"'),
        ("not-there-at-all", None, "missing", 'pip install "not-there-at-all>=1"'),
        ("nor-this", "tflite", "missing", 'pip install "mobilekit[tflite]"'),
        ("numpy", "tflite", "ok", ""),
    ]
    assert 'pip install "mobilekit[tflite]"' in doctor().out


def test_a_folder_that_was_never_installed_has_no_metadata(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert doctor("--json").document["machine"]["packages"] == []
    assert doctor().code == 0


@pytest.mark.parametrize("width", [80, 160])
def test_people_read_sections(
    doctor: Doctor, width: int, room: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    room("board", BOARD)
    monkeypatch.setattr("mobilekit.cli.doctor.documents", lambda: Console(width=width))
    done = doctor("--device", "board:raspberry_pi_4")
    lines = done.out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("    ")) <= width
    command = (
        "    frequency governor: echo performance | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor"
    )
    assert command in lines  # in one piece, to be copied
    headings = [line for line in lines if line and not line.startswith(" ")]
    devices = ["host", "board:lost", "board:pixel_6", "board:no serial", "board:raspberry_pi_4"]
    assert headings == ["This machine", "What it can do", *(f"Device {name}" for name in devices)]
    text = " ".join(done.out.split())
    assert "CPU 4-5, Cortex-A76, 400 to 2253 MHz, now 1197, governor sched_pixel" in text
    assert "battery 76 %, charging, 36.1 °C" in text
    assert "BIG 63.0 °C, MID 58.0 °C, LITTLE 55.0 °C, G3D 52.0 °C and 2 cooler zones" in text
    assert "not reached: the board is off" in text


# ---------------------------------------------------------------- devices


def test_each_device_is_a_row_and_none_is_a_crash(doctor: Doctor, room: Callable[[str, str], None]) -> None:
    room("board", BOARD)
    room("telegraph", MISSING)
    document = doctor("--json", "--device", "board:broken", "--device", "board:pixel_6").document
    assert [row["device"] for row in document["devices"]] == [
        "host", "board:lost", "board:pixel_6", "board:no serial", "board:broken",
    ]  # fmt: skip
    lost = state(document, "board:lost")
    assert (lost["info"], lost["advice"]) == (None, [])
    assert lost["problem"].startswith("the board is off")
    assert "Connection reset" in state(document, "board:broken")["problem"]
    assert "write board:NAME" in state(document, "board:no serial")["problem"]
    phone = state(document, "board:pixel_6")
    assert phone["problem"] == ""
    assert [cluster["core"] for cluster in phone["info"]["clusters"]] == ["Cortex-X1", "Cortex-A76", "Cortex-A55"]
    assert "board:pixel_6" in ability(document, "measure on board")[0]
    missing = ("missing", "telegraph is not installed: sudo apt install telegraph")
    assert ability(document, "measure on telegraph") == missing


def test_advice_names_what_disturbs_and_what_helps(doctor: Doctor, room: Callable[[str, str], None]) -> None:
    room("board", BOARD)
    document = doctor("--json", "--device", "board:raspberry_pi_4", "--device", "board:x86_container").document
    board = {row["what"]: row for row in state(document, "board:raspberry_pi_4")["advice"]}
    assert set(board) == {"frequency governor", "throttling"}
    assert "scaling_governor" in board["frequency governor"]["remedy"]
    assert board["throttling"]["state"] == "under-voltage, throttled"
    phone = {row["what"]: row for row in state(document, "board:pixel_6")["advice"]}
    assert set(phone) == {"frequency governor", "throttling", "battery"}
    assert "sudo" not in phone["frequency governor"]["remedy"]
    assert phone["battery"]["state"] == "charging"
    assert state(document, "board:x86_container")["advice"] == []


def test_an_empty_hot_phone_without_memory(doctor: Doctor, room: Callable[[str, str], None], tmp_path: Path) -> None:
    text = (FACTS / "pixel_6.txt").read_text(encoding="utf-8")
    changes = {"level: 76": "level: 9", "temperature: 361": "temperature: 431", "mValue=63.0": "mValue=91.0",
               "status: 2": "status: 3", "3120448 kB": " 310000 kB"}  # fmt: skip
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "hot.txt").write_text(text, encoding="utf-8")
    room("board", BOARD.replace(repr(str(FACTS)), repr(str(tmp_path))))
    found = state(doctor("--json", "--device", "board:hot").document, "board:hot")["advice"]
    told = [(row["what"], row["state"]) for row in found]
    assert ("heat", "BIG: 91.0 °C") in told
    assert [words for what, words in told if what == "battery"] == ["9 %", "43.1 °C"]
    assert ("memory", "317 of 7948 MB free, 2148 MB swapped out") in told
    assert all(row["remedy"] for row in found)


@pytest.mark.parametrize("spec", ["teapot", "host:7", "board:"])
def test_a_device_that_cannot_be_one_is_bad_input(doctor: Doctor, room: Callable[[str, str], None], spec: str) -> None:
    room("board", BOARD)
    done = doctor("--device", spec)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("mobilekit: ")
    assert done.err.count("\n") == 1


# ---------------------------------------------------------------- the emulator


def test_the_emulator_is_installed_and_then_shown(doctor: Doctor, room: Callable[[str, str], None]) -> None:
    room("emulated_arm64", EMULATED)
    before = doctor("--json").document
    assert ability(before, "measure on emulated-arm64")[1].endswith("mobilekit doctor --install-emulator")
    after = doctor("--install-emulator", "--json")
    assert ability(after.document, "measure on emulated-arm64")[0].startswith("ready")
    again = doctor("--install-emulator", "--json")
    assert (again.code, again.out) == (1, "")
    assert "free 600 MB" in again.err


# ---------------------------------------------------------------- through the real clients


@pytest.mark.devices
def test_a_board_behind_ssh(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from board import Board

    board = Board(tmp_path / "board")
    monkeypatch.setenv("HOME", str(board.user))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    board.start()
    try:
        document = doctor("--json", "--device", f"ssh:{board.address}").document
    finally:
        board.stop()
    found, here = state(document, f"ssh:{board.address}"), document["devices"][0]["info"]
    assert (found["problem"], found["info"]["origin"]) == ("", "device")
    assert [found["info"][key] for key in ("soc", "cores", "memory_mb", "os", "versions")] == [
        here[key] for key in ("soc", "cores", "memory_mb", "os", "versions")
    ]
    gone = doctor("--json", "--device", f"ssh:{board.address}").document
    assert "no ssh server answers" in state(gone, f"ssh:{board.address}")["problem"]


@pytest.mark.devices
def test_a_phone_behind_adb_is_seen(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adb_daemon import AdbDaemon

    from mobilekit.devices.adb import Adb

    monkeypatch.undo()  # look at what is attached after all
    monkeypatch.setattr(Adb, "folder", str(tmp_path / "device"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free.getsockname()[1]))
    try:
        with AdbDaemon() as phone:
            subprocess.run(["adb", "connect", phone.serial], check=True, capture_output=True)
            document = doctor("--json").document
    finally:
        subprocess.run(["adb", "kill-server"], check=True, capture_output=True)
    assert ability(document, "measure on adb") == (f"ready; there now: adb:{phone.serial}", "")
    found = state(document, f"adb:{phone.serial}")
    assert found["problem"] == ""
    assert found["info"]["cores"] == document["devices"][0]["info"]["cores"]
