"""The closed loop on a board behind a real sshd: a profile of it, and a plan that is measured there."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from board import Board, wait_for

from conftest import hasten
from mobilekit import profiles, registry
from mobilekit.cost import build as cost_build
from mobilekit.pipeline import Listener, Request, build_profile
from mobilekit.pipeline import run as carry_out
from mobilekit.types import Budget

pytestmark = pytest.mark.devices


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    """A board that runs; nothing of ours runs or lies in its jobs afterwards."""
    found = Board(tmp_path / "board")
    monkeypatch.setenv("HOME", str(found.user))
    monkeypatch.setenv("MOBILEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    found.start()
    try:
        yield found
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not found.running(), "the end of all sessions", 15.0)
        assert found.running() == []
        assert found.jobs() == []
    finally:
        for pid in found.running():
            os.kill(pid, signal.SIGKILL)
        found.stop()


def logins(board: Board) -> int:
    return (board.root / "sshd.log").read_text().count("Accepted publickey")


def test_a_profile_takes_one_connection_and_a_plan_measures_there(
    board: Board, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_build, "QUICK_BATCH", 48)  # more requests, as a slow board would need
    device = registry.device(f"ssh:{board.address}")
    built = build_profile(device, tmp_path / "board.json", Listener(), quick=True)
    assert logins(board) == 1
    assert built.kind == "linux-board"
    assert {(table.runtime, table.precision) for table in built.tables} >= {("onnx", "fp32"), ("onnx", "int8")}
    samples = (tmp_path / "board.samples.jsonl").read_text().splitlines()
    assert len(samples) > 48
    assert profiles.load(tmp_path / "board.json") == built
    del device

    hasten(monkeypatch.setattr)
    request = Request(
        str(tiny), str(tmp_path / "board.json"), Budget(speedup=1.2), "onnx", f"ssh:{board.address}", train=False
    )
    report = carry_out(request, tmp_path / "out", Listener())
    assert report.rounds
    assert report.device_info is not None
    assert report.device_info.kind == "linux-board"
    assert report.verdict in {"met", "missed"}
    rows = [row for model in report.models for row in model.measurements]
    assert {row.origin for row in rows} == {"device"}
    compared = [row.parity for row in rows if row.parity is not None]
    assert compared
    assert all(parity.sqnr_db is None or parity.sqnr_db > 15 for parity in compared)
