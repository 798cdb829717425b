"""A measuring process on this machine: started, watched, and ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mobilekit.devices import _session
from mobilekit.types import BenchRequest


def start(
    request: BenchRequest, timeout: float, python: Sequence[str], environment: Mapping[str, str] | None = None
) -> _session.Reply:
    """Run the measuring script on a request; kills it, and all that it started, when it is not done in time.

    `python` is the command that runs Python scripts; `environment` replaces that of this process.
    """
    with tempfile.TemporaryDirectory(prefix="mobilekit-") as folder:
        where = Path(folder)
        text = _session.request_text(request, lambda path: str(Path(path).resolve()))
        (where / "request.json").write_text(text, encoding="utf-8")
        paths = [str(where / "request.json"), str(where / "result.json")]
        with (where / "stdout").open("wb") as out, (where / "stderr").open("wb") as err:
            process = subprocess.Popen(
                # standard input: a pipe that ends when this process does, however it ends
                [*python, str(_session.RUNNER), "--watch-stdin", *paths],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                cwd=folder,
                env=None if environment is None else dict(environment),
                start_new_session=True,
            )
            try:
                process.wait(timeout)
                timed_out = False
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:  # also on Ctrl-C, which a process group of its own does not receive
                _kill(process)
        output = (where / "stdout").read_text(encoding="utf-8", errors="replace")
        errors = (where / "stderr").read_text(encoding="utf-8", errors="replace").splitlines()
        return _session.Reply(
            document=_read(where / "result.json"),
            stage=_session.last_stage(output),
            returncode=process.returncode,
            timed_out=timed_out,
            stderr=errors[-1][:500] if errors else "",
        )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children. Those of a process that has ended are in its group still."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
