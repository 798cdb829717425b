"""Devices to try faults on: this machine, a board behind a real sshd, a phone behind the real adb client."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


@dataclass
class Place:
    """A device, and where what runs on it can be seen."""

    kind: str
    spec: str
    root: Path
    """All that the device side keeps and starts lies or runs in here."""
    jobs: Path
    """What must be empty when nothing is measured."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of the command on this side."""

    def stage(self) -> str:
        """What the measuring program said last; "" where it says nothing yet."""
        said = ""
        for path in [*self.root.rglob("stdout"), *self.root.rglob("out")]:
            with contextlib.suppress(OSError):
                lines = path.read_text(errors="replace").split("\n")[:-1]
                said = lines[-1] if lines else said
        return said.partition(" ")[0]

    def processes(self) -> list[int]:
        """Measuring programs and what they started that run in the place."""
        mark = str(self.root).encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes()
                where = os.readlink(folder / "cwd").encode()
                if (
                    (mark in words or where.startswith(mark))
                    and b"runner" in words
                    and b"mobilekit measure" not in words
                ):
                    found.append(int(folder.name))
        return found

    def left(self) -> list[str]:
        """Names of the jobs' folders that are there."""
        return sorted(path.name for path in self.jobs.glob("*")) if self.jobs.is_dir() else []

    def cut(self) -> None:
        """Break the connection."""
        raise NotImplementedError

    def kill_program(self) -> None:
        """kill -9 of the measuring program."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def host(root: Path) -> Iterator[Place]:
    """This machine; its measuring processes keep their files below `root`."""
    scratch = root / "tmp"
    scratch.mkdir(parents=True)
    yield Place("host", "host", root, scratch, {"TMPDIR": str(scratch)})
