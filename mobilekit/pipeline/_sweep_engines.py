"""Where the cells of a sweep run: in processes of this machine, or as tasks of a Ray cluster."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from mobilekit.errors import BadInputError, first_line
from mobilekit.pipeline import _sweep_folders
from mobilekit.pipeline._sweep_folders import LOG, as_bytes, from_bytes

MODULE = "mobilekit.pipeline._sweep_cell"
POLL_SECONDS = 0.2
STOP_SECONDS = 8.0
CONNECT_SECONDS = 5.0
"""Ray itself waits minutes for an address at which nobody answers, and then ends the program."""
MISSING = '--engine ray needs Ray, which is not installed: pip install "mobilekit[ray]"'


@dataclass(frozen=True)
class Ended:
    """How an attempt at a cell ended; its folder says what came of it."""

    name: str
    code: int | None
    """Of the process; negative: the signal that killed it. None: it was lost with its machine or its worker."""
    seconds: float
    lost: str = ""
    """What the cluster says of a lost one."""

    @property
    def how(self) -> str:
        """In words; empty where the process ended by itself and without an error."""
        if self.code is None:
            return self.lost
        if self.code < 0:
            try:
                name = signal.Signals(-self.code).name
            except ValueError:
                name = f"signal {-self.code}"
            return f"the cell's process was killed by {name}"
        return f"the cell's process ended with code {self.code}" if self.code else ""


class Engine(Protocol):
    """Something that carries out cells. Each lies in a folder that holds its cell.json and what it left so far."""

    slots: int | None
    """Most cells at once; None: the cluster decides."""
    crowded: bool
    """Whether several cells may run on one machine at the same time."""

    def submit(self, folder: Path) -> None:
        """Begin an attempt."""
        ...

    def next(self) -> Ended:
        """Wait for one that has ended; its folder is in its place when this returns."""
        ...

    def close(self) -> None:
        """Stop what still runs and give back what was taken."""
        ...


class CellProcess:
    """An attempt in a process of its own. It ends when its standard input is closed, also by our own death."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.started = time.monotonic()
        # The module is looked for where this mobilekit was found, never in the present folder, whose files may have the
        # names of anything. A session of its own: Ctrl-C reaches it through the closed pipe and not a second time.
        command = [sys.executable, "-P", "-m", MODULE, str(folder)]
        with (folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"--- {datetime.now(UTC).isoformat(timespec='seconds')}, process of {os.getpid()}\n")
            log.flush()
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def running(self, seconds: float) -> bool:
        """Whether it still runs after so many seconds."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def ended(self) -> Ended:
        """Wait for its end."""
        code = self.process.wait()
        self._close()
        return Ended(self.name, code, time.monotonic() - self.started)

    def stop(self) -> None:
        """Ask it to stop, and kill it where it does not."""
        self._close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _close(self) -> None:
        assert self.process.stdin is not None  # noqa: S101 -- it was asked for
        self.process.stdin.close()


class Local:
    """Processes of this machine, at most `jobs` at once."""

    def __init__(self, jobs: int) -> None:
        self.slots: int | None = jobs
        self.crowded = jobs > 1
        self.running: list[CellProcess] = []

    def submit(self, folder: Path) -> None:
        """Start a process."""
        self.running.append(CellProcess(folder))

    def next(self) -> Ended:
        """Wait for the first process that ends."""
        while True:
            for process in self.running:
                if not process.running(POLL_SECONDS / len(self.running)):
                    self.running.remove(process)
                    return process.ended()

    def close(self) -> None:
        """Stop the processes that still run."""
        while self.running:
            self.running.pop().stop()


def on_worker(name: str, content: bytes) -> tuple[int | None, float, bytes]:
    """What a Ray task does: the cell's folder on this machine's disk, its process, and the folder as bytes again.

    Gives the process's code and seconds, and the folder.
    """
    with tempfile.TemporaryDirectory(prefix="mobilekit-") as place:
        folder = Path(place, name)
        from_bytes(content, folder)
        process = CellProcess(folder)
        try:
            ended = process.ended()
        finally:
            process.stop()
        return ended.code, ended.seconds, as_bytes(folder)


class OnRay:
    """Tasks of a Ray cluster: the one at `address`, that which RAY_ADDRESS names, or a local one of our own."""

    def __init__(self, address: str | None, cpus: int, jobs: int | None) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError:
            raise BadInputError(MISSING) from None
        self.ray = ray
        self.slots = jobs
        self.own = not ray.is_initialized()
        if self.own:
            _connect(ray, address or os.environ.get("RAY_ADDRESS") or None)
        rooms = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        if max(rooms, default=0) < cpus:
            self.close()
            raise BadInputError(
                f"no machine of the Ray cluster has {cpus} CPUs for a cell, the largest has {max(rooms, default=0):g}: "
                "give a smaller --cpus-per-cell"
            )
        self.crowded = jobs != 1 and max(rooms) // cpus > 1
        # Sent as they are and not by name: the package that they lie in would load torch into every worker.
        for module in (sys.modules[__name__], _sweep_folders):
            ray.cloudpickle.register_pickle_by_value(module)
        # No retries of Ray's own: those of the sweep are the same on every engine, and are counted.
        self.task = ray.remote(num_cpus=cpus, max_retries=0)(on_worker)
        self.waiting: dict[Any, tuple[Path, float]] = {}

    def submit(self, folder: Path) -> None:
        """Send the folder to the cluster."""
        self.waiting[self.task.remote(folder.name, as_bytes(folder))] = (folder, time.monotonic())

    def next(self) -> Ended:
        """Wait for the first task that ends, and put the folder that it sends in place."""
        (reference, *_), _ = self.ray.wait(list(self.waiting), num_returns=1)
        folder, began = self.waiting.pop(reference)
        try:
            code, seconds, content = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            cause = first_line(getattr(error, "cause", None) or error)
            said = f"the cell's Ray task was lost: {cause}"
            return Ended(folder.name, None, time.monotonic() - began, said)
        try:
            from_bytes(content, folder)
        except BadInputError as error:
            return Ended(folder.name, None, seconds, f"the worker's answer is not to be trusted: {error}")
        return Ended(folder.name, code, seconds)

    def close(self) -> None:
        """Leave the cluster; one of our own ends, with all that runs on it."""
        if self.own:
            self.ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody was asked whether Ray may report home
    local: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    _answers(address)
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at '{address}' cannot be used" if address else "no local Ray cluster could be started"
        raise BadInputError(f"{where}: {first_line(error)}") from error


def _answers(address: str | None) -> None:
    """Raise BadInputError where nobody listens at HOST:PORT; what has another form is Ray's to judge."""
    host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
    host = host.strip("[]")  # of IPv6
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise BadInputError(f"no Ray cluster answers at '{address}': {said}") from error
