"""The Python of a board that measures: one that imports the runtimes, or one that gets them from a folder of wheels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mobilekit import documents
from mobilekit.devices._session import PACKAGES, DeviceError, Trouble
from mobilekit.devices._ssh_client import Client
from mobilekit.devices._ssh_folder import CACHE, Folder
from mobilekit.errors import BadInputError, one_line
from mobilekit.types import Value

PROBE = Path(__file__).with_name("_ssh_probe.py")
INSTALL = Path(__file__).with_name("_ssh_install.py")
VENV = f"{CACHE}/venv"
CANDIDATES = (f"{VENV}/bin/python", "python3")
OLDEST = (3, 9)
INSTALL_SECONDS = 900.0
WHEEL = re.compile(r"[A-Za-z0-9._+!-]{1,200}\.whl")
NO_PROGRAM = (126, 127)
"""Exit codes of a shell that finds no such program, or none that it can start."""


class Python(Value):
    """A Python of the device, as it says itself."""

    program: str
    python: str
    machine: str
    runtimes: dict[str, str]
    """Runtime name -> version of what it imports."""

    @property
    def usable(self) -> bool:
        """Whether the measuring script runs on it."""
        numbers = re.findall(r"\d{1,4}", self.python)[:2]
        return tuple(map(int, numbers)) >= OLDEST


async def find(client: Client, wanted: Iterable[str] = ()) -> Python:
    """The device's Python with most of the wanted runtimes; of several the first. Raises DeviceError for none."""
    found = [python for program in CANDIDATES if (python := await _probed(client, program)) is not None]
    if not found:
        raise DeviceError(
            Trouble(
                f"there is no python3 on {client.address.account}",
                "install it there (`sudo apt install python3`), or give a measuring program for its processor with "
                "--runner",
            )
        )
    usable = [python for python in found if python.usable]
    if not usable:
        raise DeviceError(
            Trouble(
                f"Python {found[0].python} on {client.address.account} is too old: 3.9 or later is needed",
                "install a later one there, or give a measuring program for its processor with --runner",
            )
        )
    names = set(wanted) or set(PACKAGES)
    return max(usable, key=lambda python: len(names & set(python.runtimes)))


async def _probed(client: Client, program: str) -> Python | None:
    done = await client.run([program, "-"], PROBE.read_bytes())
    lines = [line for line in done.out.splitlines() if line.startswith("mobilekit {")]
    if done.code in NO_PROGRAM or not lines:
        return None
    try:
        said = documents.parse(lines[-1].removeprefix("mobilekit ").encode(), _Said, "the device's Python")
    except BadInputError as error:
        trouble = Trouble(str(error), f"see what `{client.address.command('ssh')} {program} --version` says")
        raise DeviceError(trouble) from error
    runtimes = {name: one_line(version, 40) for name, version in said.runtimes.items() if name in PACKAGES}
    return Python(program=program, python=one_line(said.python, 20), machine=said.machine[:40], runtimes=runtimes)


class _Said(Value):
    python: str
    machine: str
    runtimes: dict[str, str]


def missing(client: Client, python: Python, runtime: str) -> Trouble:
    """That a runtime is not there, and both ways to bring it."""
    package = PACKAGES[runtime][0]
    version, machine = ".".join(python.python.split(".")[:2]), python.machine
    plain = re.fullmatch(r"3\.\d{1,2}", version) and re.fullmatch(r"[a-z0-9_]{3,20}", machine)
    platforms = [f"--platform manylinux{tag}_{machine}" for tag in ("2014", "_2_27", "_2_28")]
    options = " ".join(["--only-binary=:all:", f"--python-version {version}", *platforms, ""]) if plain else ""
    return Trouble(
        f"{package} is not installed on {client.address.account} for {python.program} (Python {version})",
        f"run there `python3 -m venv ~/{VENV} && ~/{VENV}/bin/pip install numpy {package}`; or, where it has no "
        f"internet, run here `pip download {options}-d wheels pip numpy {package}` and give --wheels wheels",
    )


async def install(client: Client, folder: Folder, wheels: Path, runtimes: Iterable[str]) -> None:
    """Install runtimes from wheels into our own virtual environment there. Raises DeviceError."""
    files = [path for path in sorted(wheels.glob("*.whl")) if WHEEL.fullmatch(path.name)]
    names = {re.sub(r"[-_.]+", "-", path.name.partition("-")[0]).lower() for path in files}
    packages = [next((p for p in PACKAGES[runtime] if p in names), PACKAGES[runtime][0]) for runtime in runtimes]
    base = await _probed(client, "python3")
    if base is None:
        raise DeviceError(
            Trouble(f"there is no python3 on {client.address.account}", "install it there (`sudo apt install python3`)")
        )
    for path in files:
        if path.stem.endswith("any") or path.stem.endswith(base.machine):
            await folder.copy(path, "wheels")
    words = ["python3", "-", VENV, f"{folder.path}/wheels", "numpy", *packages]
    done = await client.run(words, INSTALL.read_bytes(), INSTALL_SECONDS)
    if done.code != 0:
        said = [line for line in done.err.splitlines() if line.strip()] or [f"it ended with code {done.code}"]
        errors = [line for line in said if line.startswith("ERROR")] or said
        hint = missing(client, base, next(iter(runtimes))).remedy
        raise DeviceError(
            Trouble(
                f"the wheels in {wheels} could not be installed on {client.address.account}: "
                f"{one_line(errors[-1].removeprefix('ERROR: '), 200)}",
                f"look whether they are for Python {base.python} on {base.machine}: {hint}",
            )
        )
