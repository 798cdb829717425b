"""Devices to try faults on: this machine, a board behind a real sshd, a phone behind the real adb client."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

HOOK = """
import builtins, os, sys, time

# Tells which stage a measuring program has reached, and waits there for what is done to it.
FILE, plain = os.environ.get("FAULT_STAGES"), builtins.print
PRELOAD = os.environ.pop("FAULT_PRELOAD", "")
if PRELOAD and any("_runner" in word for word in sys.orig_argv):  # only the measuring program sees another clock
    os.environ["LD_PRELOAD"] = PRELOAD
    os.execv(sys.executable, sys.orig_argv)

def told(*words, **named):
    plain(*words, **named)
    stage = str(words[0]).split(" ")[0] if words else ""
    if FILE and stage in ("load", "warm", "rounds", "operators") and "runner" in sys.argv[0]:
        with open(FILE, "a") as file:
            file.write(stage + "\\n")
        time.sleep(2 if stage != "rounds" else 0)

builtins.print = told
"""
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

/* The system's clock is off by the seconds in a file; the monotonic one is not touched, as when a clock is set. */
static long offset(void) {
    long seconds = 0;
    FILE *file = fopen(getenv("FAULT_CLOCK"), "r");
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += offset();
    return code;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (where) *where = precise.tv_sec;
    return precise.tv_sec;
}
"""
"""A library that a compiler makes, to be loaded in front of a program."""


@dataclass
class Place:
    """A device, and where what runs on it can be seen."""

    kind: str
    spec: str
    root: Path
    jobs: Path
    """What is empty when nothing is measured."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of the command on this side."""
    machine: Any = None
    """The board or the phone."""
    setup: str = ""
    """Python that the command runs first."""

    @property
    def stages(self) -> list[str]:
        """The stages that the measuring program has reached."""
        path = self.root / "stages"
        return path.read_text().split() if path.exists() else []

    def forget(self) -> None:
        """Before the next fault."""
        (self.root / "stages").unlink(missing_ok=True)

    def processes(self) -> list[int]:
        """What measures in the place, and what was started by it."""
        mark = f"FAULT_STAGES={self.root}/stages".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes()
                inside = mark in (folder / "environ").read_bytes().split(b"\0")
                if inside and words and (b"runner" in words or b"program" in words):
                    found.append(int(folder.name))
        return found

    def left(self) -> list[str]:
        """Names of the jobs' folders that are there."""
        name = "mobilekit-*" if self.kind == "host" else "*"
        return sorted(path.name for path in self.jobs.glob(name)) if self.jobs.is_dir() else []

    def clean(self) -> None:
        """Remove what a fault left, so that the next one starts from nothing."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if self.jobs.is_dir():
            for path in self.jobs.glob("*"):
                shutil.rmtree(path, ignore_errors=True)

    def cut(self) -> None:
        """Break the connection, at once."""
        if self.kind == "adb":
            self.machine.disconnect()
        else:
            for session in self.machine.sessions():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(session, signal.SIGKILL)


def hooks(root: Path) -> dict[str, str]:
    """Environment of a measuring program that tells its stages."""
    folder = root / "hooks"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(HOOK)
    return {"PYTHONPATH": str(folder), "FAULT_STAGES": str(root / "stages")}


@contextlib.contextmanager
def host(root: Path) -> Iterator[Place]:
    """This machine."""
    scratch = root / "tmp"
    scratch.mkdir(parents=True)
    yield Place("host", "host", root, scratch, {"TMPDIR": str(scratch), **hooks(root)})


@contextlib.contextmanager
def board(root: Path) -> Iterator[Place]:
    """A Linux board: a real sshd on loopback."""
    from board import Board

    root.mkdir(parents=True)
    made = Board(root / "board")
    made.profile(exports(hooks(root)))
    made.start()
    try:
        environment = {"HOME": str(made.user)}
        yield Place("ssh", f"ssh:{made.address}", root, made.home / ".cache/mobilekit/jobs", environment, made)
    finally:
        made.stop()


def exports(environment: dict[str, str]) -> str:
    """Lines of shell."""
    return "\n".join(f"export {name}='{text}'" for name, text in environment.items())


@contextlib.contextmanager
def phone(root: Path) -> Iterator[Place]:
    """An Android device: the adb protocol spoken by a small daemon, to the real adb client."""
    from adb_daemon import AdbDaemon

    (root / "bin").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {"ANDROID_ADB_SERVER_PORT": port, "HOME": str(root)}
    adb = {**os.environ, **environment}
    python = root / "bin" / "python3"
    python.write_text(f'#!/bin/sh\n{exports(hooks(root))}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    folder = root / "device"
    with AdbDaemon() as made:
        made.path = f"{root / 'bin'}:{made.path}"
        subprocess.run(["adb", "start-server"], check=True, capture_output=True, env=adb)
        try:
            setup = f"from mobilekit.devices.adb import Adb; Adb.folder = {str(folder)!r}"
            yield Place("adb", f"adb:{made.serial}", root, folder / "jobs", environment, made, setup)
        finally:
            subprocess.run(["adb", "kill-server"], check=False, capture_output=True, env=adb)
