"""Final files on further devices, and settings of devices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mobilekit import profiles, registry
from mobilekit.devices.host import Host
from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.pipeline import Listener, Request
from mobilekit.pipeline import run as carry_out
from mobilekit.types import BenchRequest, BenchResult, Budget, DeviceInfo, DeviceProfile, DeviceSettings, Report


class Board(Host):
    """This machine under another name, as a board would be."""

    takes = ("wheels",)

    def __init__(self, address: str = "", settings: DeviceSettings | None = None) -> None:
        super().__init__()
        self.name = f"board:{address}"
        self.asked: list[BenchRequest] = []

    def info(self) -> DeviceInfo:
        return (
            super()
            .info()
            .model_copy(
                update={"name": self.name, "kind": "linux-board", "origin": "device", "architecture": "aarch64"}
            )
        )

    def run(self, request: BenchRequest) -> BenchResult:
        self.asked.append(request)
        found = super().run(request)
        renamed = [m.model_copy(update={"device": self.name, "origin": "device"}) for m in found.measurements]
        return found.model_copy(update={"measurements": tuple(renamed)})


class Lost(Board):
    """A board that nobody reaches."""

    def info(self) -> DeviceInfo:
        raise MobilekitError("it does not answer")


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> list[Board]:
    """Every device that is not the host is a board; those whose address is `lost` are out of reach."""
    made: list[Board] = []
    real: Callable[..., object] = registry._load

    def load(room: str, name: str) -> object:
        if room != "devices" or name == "host":
            return real(room, name)

        def make(address: str, settings: DeviceSettings) -> Board:
            made.append((Lost if address == "lost" else Board)(address, settings))
            return made[-1]

        return make

    monkeypatch.setattr(registry, "_load", load)
    names = registry.names
    monkeypatch.setattr(registry, "names", lambda room: [*names(room), *(["board"] if room == "devices" else [])])
    return made


def test_settings_reach_the_devices_that_use_them(boards: list[Board]) -> None:
    host, board = registry.devices(["host", "board:1"], DeviceSettings(wheels="w"))
    assert (host.name, board.name) == ("host", "board:1")
    with pytest.raises(BadInputError, match="no use for --wheels"):
        registry.device("host", DeviceSettings(wheels="w"))
    with pytest.raises(BadInputError, match="none of the devices has a use for --runner"):
        registry.devices(["host", "board:1"], DeviceSettings(runner="r"))
    with pytest.raises(BadInputError, match="named twice"):
        registry.devices(["board:1", "board:1"])


def test_unknown_device() -> None:
    with pytest.raises(BadInputError, match=r"unknown device '\\x1b\[31m': choose one of "):
        registry.device("\x1b[31m:x")


def test_further_devices_measure_the_final_files(tiny: Path, quick: None, boards: list[Board], tmp_path: Path) -> None:
    request = Request(
        str(tiny), "host", Budget(speedup=1.2), "onnx", train=False, devices=("board:1", "board:lost", "board:2")
    )
    report = carry_out(request, tmp_path / "out", Listener())
    assert [row.device for row in report.devices] == ["board:1", "board:2"]
    for row in report.devices:
        assert row.ratio is not None
        assert row.info is not None
        assert row.info.origin == "device"
        assert set(row.samples) == {"original", "result"}
    main = next(row for row in report.models if row.path == report.result.path)
    assert {m.device for m in main.measurements} == {"host", "board:1", "board:2"}
    lines = (tmp_path / "out" / "measurements.jsonl").read_text().splitlines()
    for measurement in main.measurements:
        stored = json.loads(lines[measurement.line - 1])
        assert (stored["device"], stored["sha256"]) == (measurement.device, main.sha256)
    assert {m.device for m in main.measurements if m.parity is not None} == {"host", "board:1", "board:2"}
    assert all(m.parity.sqnr_db > 20 for m in main.measurements if m.parity is not None)  # type: ignore[operator]
    (failure,) = [f for f in report.failures if f.stage == "measure"]
    assert failure.subject == "board:lost"
    assert failure.message == "it does not answer"

    again = Request(str(tiny), "host", Budget(speedup=1.2), "onnx", train=False, devices=("board:1", "board:3"))
    before = {board.name: len(board.asked) for board in boards}
    resumed = carry_out(again, tmp_path / "out", Listener(), resume=True)
    assert [row.device for row in resumed.devices] == ["board:1", "board:3"]
    assert resumed.devices[0] == report.devices[0]
    assert before["board:1"] > 0
    assert Report.model_validate_json((tmp_path / "out" / "report.json").read_bytes()) == resumed


@pytest.fixture
def board_profile(host_profile: DeviceProfile, tmp_path: Path) -> str:
    """What `profile build --device board:1` would have written."""
    path = tmp_path / "board.json"
    path.write_text(profiles.dump(host_profile.model_copy(update={"name": "board", "kind": "linux-board"})))
    return str(path)


def test_a_plan_measures_on_its_device(
    tiny: Path, quick: None, board_profile: str, boards: list[Board], tmp_path: Path
) -> None:
    request = Request(str(tiny), board_profile, Budget(speedup=1.2), "onnx", device="board:1", train=False)
    report = carry_out(request, tmp_path / "out", Listener())
    assert report.verdict == "met"
    assert report.device_info is not None
    assert report.device_info.architecture == "aarch64"
    origins = {m.origin for row in report.models for m in row.measurements}
    assert origins == {"device"}


def test_a_device_out_of_reach_is_noticed_before_anything_else(
    tiny: Path, board_profile: str, boards: list[Board], tmp_path: Path
) -> None:
    request = Request(str(tiny), board_profile, Budget(speedup=1.2), "onnx", device="board:lost", train=False)
    with pytest.raises(MobilekitError, match="does not answer"):
        carry_out(request, tmp_path / "out", Listener())
    dry = carry_out(request, tmp_path / "dry", Listener(), dry=True)
    assert dry.device_info is None
