"""The emulated Arm machine: where it lies, whether it is whole, and how a program is started in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from mobilekit import documents, profiles
from mobilekit.errors import BadInputError
from mobilekit.types import Value

LAYOUT = 1
"""Of the folder: one of another layout is made anew."""
CPU = "cortex-a76"
"""The processor that is emulated: that of a Raspberry Pi 5 and of phones of 2019, with int8 dot products and fp16."""
CPU_NAME = "Cortex-A76"
QEMU = ("qemu-aarch64", "qemu-aarch64-static")
"""Its user mode; the first can load the plugin that counts instructions."""
COMMAND = "mobilekit doctor --install-emulator"
COUNTER_BYTES = 4096
QEMU_SECONDS = 20.0


class Installed(Value):
    """What was installed, written when all of it works."""

    layout: int
    suite: str
    """Debian's release of the root."""
    python: str
    """As in python3.11."""
    qemu: str
    """What QEMU says is its version; another QEMU may load no plugins, or others."""
    asked: dict[str, str]
    """The versions that this machine had then; of one that was never built for arm64 another is in `versions`."""
    versions: dict[str, str]
    """Runtime name -> version, and that of numpy."""
    without_counter: str = ""
    """Why instructions cannot be counted; empty: they can."""


def folder() -> Path:
    """Where everything lies."""
    return profiles.cache_folder() / "arm64"


def installed() -> Installed | None:
    """What is installed here, or None: nothing, or something of another version of mobilekit."""
    path = folder() / "installed.json"
    if not path.is_file():
        return None
    try:
        found = documents.read(path, Installed, "the emulated machine's description")
    except BadInputError:
        return None
    return found if found.layout == LAYOUT else None


def qemu() -> str | None:
    """The path of QEMU's user mode, or None."""
    return next((path for name in QEMU if (path := shutil.which(name))), None)


def qemu_version(program: str) -> str:
    """Such as "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)" after the name of the program; empty where it does not run."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, timeout=QEMU_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    said = done.stdout.decode(errors="replace").partition("\n")[0]
    return f"{Path(program).name} {said.rpartition(' version ')[2].strip()}" if done.returncode == 0 else ""


def missing() -> tuple[str, str] | None:
    """Why no program can be started in it, and the command that helps; None where nothing is missing."""
    if not sys.platform.startswith("linux"):
        return "Arm is emulated by QEMU's user mode, which needs Linux", "measure on a Debian machine"
    found, program = installed(), qemu()
    if found is None:
        return "the emulated Arm machine is not installed", COMMAND
    if program is None:
        return f"{QEMU[0]} is not installed", COMMAND
    if qemu_version(program) != found.qemu:
        return "QEMU is another one than when the emulated Arm machine was installed", COMMAND
    return None


def python(place: Path, version: str, counts: Path | None = None) -> list[str]:
    """The command that runs Python in the machine that lies in `place`.

    Files that are in its root hide those of this machine of the same path; all others are this machine's, so that
    models and results need not be copied. Instructions are counted into the file `counts`, which is made here.
    """
    program, root = qemu() or QEMU[0], place / "root"
    plugin = []
    if counts is not None:
        counts.write_bytes(bytes(COUNTER_BYTES))
        paths = [str(path).replace(",", ",,") for path in (place / "counter.so", counts)]  # QEMU's way to quote
        plugin = ["-plugin", f"{paths[0]},counts={paths[1]}"]
    return [program, "-cpu", CPU, "-L", str(root), *plugin, str(root / "usr/bin" / f"python{version}")]


def environment(place: Path, counts: Path | None = None) -> dict[str, str]:
    """All variables that a program in it sees: none of this machine's, whose libraries are not Arm's.

    Without random hashes the interpreter carries out the same instructions every time.
    """
    known = {
        "PATH": "/usr/bin",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(place / "packages"),
        "PYTHONNOUSERSITE": "1",
        "PYTHONHASHSEED": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    return known if counts is None else {**known, "MOBILEKIT_INSTRUCTIONS": str(counts)}
