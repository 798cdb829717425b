"""Sweeps on a real Ray cluster of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from test_sweep import NET, ONCE, Done, cells, run, write_spec

__all__ = ["run"]


# JAX, which LiteRT's converter brings, warns of forks; what Ray forks here executes another program at once
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_cells_on_a_cluster(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It loses its Ray worker the first time."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps its clusters' token there
    kill = "import os, signal, time\nif first_time():\n    os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(60)\n"
    Path("net.py").write_text(ONCE + kill + NET)
    done = run(write_spec(), "--out", "out", "--engine", "ray", "--cpus-per-cell", 1)
    assert done.code == 0, done.err
    assert not ray.is_initialized()
    found = cells()
    assert (found["net.py"]["attempts"], found["net.py"]["failure"]) == (2, None)
    assert "failed and is tried once more: the cell's Ray task was lost" in " ".join(done.err.split())
    folder = Path("out", found["net.py"]["folder"])
    own = json.loads((folder / "report.json").read_text())
    assert own["predicted_latency_ms"] == found["net.py"]["predicted_latency_ms"]
    assert "stage: original" in (folder / "log.txt").read_text()
    assert (folder / "checkpoints" / "original.onnx").stat().st_size > 0
    assert json.loads(Path("out", "sweep.json").read_text())["engine"] == "ray"
