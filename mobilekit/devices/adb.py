"""An Android device, reached through the adb program."""

from __future__ import annotations

import hashlib
import struct
import tempfile
from functools import partial
from pathlib import Path

from mobilekit.devices import _facts, _session
from mobilekit.devices._adb_client import Client, find, is_serial, program
from mobilekit.devices._adb_job import Facts, Job
from mobilekit.devices._session import DeviceError, Reply, Trouble
from mobilekit.errors import BadInputError, one_line
from mobilekit.types import BenchRequest, BenchResult, DeviceInfo, DeviceSettings, Origin

PROPERTIES = ("ro.kernel.qemu", "ro.boot.qemu", "ro.hardware.virtual_device")
"""1 on Android's emulators."""
MACHINES = {
    3: ("x86", ("i686", "x86_64")),
    40: ("arm", ("armv7l", "armv8l", "aarch64")),
    62: ("x86_64", ("x86_64",)),
    183: ("aarch64", ("aarch64",)),
}
"""e_machine of an ELF file -> its name, and what `uname -m` says where it runs (ELF specification, gABI 4.1)."""
GIVE_RUNNER = (
    "give a measuring program for its processor ({}) with --runner, as docs/bench_protocol.md describes, "
    "or put a python3 with numpy and the runtimes on its PATH"
)


class Adb:
    """Times models on an Android device: `adb` for the only one that is connected, `adb:SERIAL`, `adb:HOST:PORT`.

    >>> Adb("127.0.0.1:5555").name
    'adb:127.0.0.1:5555'
    """

    takes: tuple[str, ...] = ("runner",)
    folder = "/data/local/tmp/mobilekit"
    """On the device; all of ours is in there."""

    def __init__(self, address: str = "", settings: DeviceSettings | None = None) -> None:
        if address and not is_serial(address):
            raise BadInputError(
                f"'{one_line(address, 60)}' is no serial of an Android device: write adb:SERIAL, as in `adb devices`, "
                "or adb:HOST:PORT"
            )
        if settings is not None and settings.wheels is not None:
            raise BadInputError("on an Android device nothing is installed: leave out --wheels, and give a --runner")
        self.runner = Path(settings.runner) if settings is not None and settings.runner is not None else None
        if self.runner is not None and not self.runner.is_file():
            raise BadInputError(f"the runner '{self.runner}' is no file: give the path of a program or Python script")
        self.serial = address
        self.name = f"adb:{address}" if address else "adb"

    @classmethod
    def visible(cls) -> list[str]:
        """Every device that adb sees, usable or not."""
        try:
            entries = Client(program(), "").devices()
        except (DeviceError, OSError):
            return []
        return [f"adb:{entry.serial}" for entry in entries if is_serial(entry.serial)]

    @classmethod
    def unavailable(cls) -> str | None:
        """What to install where there is no adb."""
        try:
            program()
        except DeviceError as error:
            return f"{error.trouble.message}: {error.trouble.remedy}"
        return None

    def info(self) -> DeviceInfo:
        """What the device is. Raises DeviceError, with what helps, where it cannot be asked."""
        client = find(self.serial)
        with Job(client, self.folder) as job, _scratch() as folder:
            script = Path(folder, "facts.sh")
            script.write_text(_facts.COLLECT, encoding="utf-8")
            job.copy({}, {script.name: script})
            lines = job.script("facts")
        return _facts.parse("\n".join(lines), self.name, "android", _origin(client), _versions(lines))

    def run(self, request: BenchRequest) -> BenchResult:
        """Time the request's models on the device, as `_session.run` says."""
        try:
            client = find(self.serial)
            device = _session.Identity(self.name, _origin(client))
        except DeviceError as error:
            return _session.run(request, _session.Identity(self.name, "device"), partial(_refuse, error.trouble))
        return _session.run(request, device, partial(self._start, client))

    def _start(self, client: Client, request: BenchRequest, timeout: float) -> Reply:
        program = "_runner.py"
        if self.runner is not None:
            program = "runner.py" if self.runner.suffix == ".py" else "runner"
        paths = _names(request)
        with Job(client, self.folder, set(paths.values())) as job, _scratch() as folder:
            self._fits(job.facts)
            asked = Path(folder, "request.json")
            text = _session.request_text(request, lambda path: f"{self.folder}/models/{paths[path]}")
            asked.write_text(text, encoding="utf-8")
            files = {asked.name: asked}
            if self.runner is None:
                files |= {script.name: script for script in _session.SCRIPTS}
            else:
                files[program] = self.runner
            job.copy({name: Path(path) for path, name in paths.items()}, files)
            return job.measure(timeout, program)

    def _fits(self, facts: Facts) -> None:
        """Whether the program can run on the device. Raises DeviceError with what to give instead."""
        remedy = GIVE_RUNNER.format(facts.architecture)
        scripted = self.runner is None or self.runner.suffix == ".py"
        if scripted and not facts.python:
            raise DeviceError(Trouble("there is no python3 on the device", remedy))
        if self.runner is None and not facts.numpy:
            raise DeviceError(Trouble("the python3 on the device has no numpy", remedy))
        if self.runner is None or scripted:
            return
        with self.runner.open("rb") as file:
            header = file.read(20)
        if header[:4] == b"\x7fELF" and len(header) == 20:
            (machine,) = struct.unpack("<H" if header[5] == 1 else ">H", header[18:])
            name, where = MACHINES.get(machine, (f"another processor ({machine})", ()))
            if facts.architecture not in where:
                message = f"the runner '{self.runner}' is built for {name}, but the device is {facts.architecture}"
                raise DeviceError(Trouble(message, remedy))


def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mobilekit-")


def _refuse(trouble: Trouble, *_: object) -> Reply:
    """In place of a start that is not possible."""
    raise DeviceError(trouble)


def _origin(client: Client) -> Origin:
    """Whether a device is a real one: an emulator says so, or its serial does."""
    output = client.call("shell", "; ".join(f"getprop {name}" for name in PROPERTIES) + "; echo end")
    words = output.text.split()
    if "end" not in words:  # an emulator that is lost now must not become a device
        raise DeviceError(client.complaint(output))
    return "emulator" if client.serial.startswith("emulator-") or "1" in words else "device"


def _versions(lines: list[str]) -> dict[str, str]:
    """Runtime name -> version, of the packages that the device's python3 has."""
    said = dict(words[1:] for line in lines if len(words := line.split(" ")) == 3 and words[0] == "version")
    return {
        runtime: next(said[package] for package in packages if package in said)
        for runtime, packages in _session.PACKAGES.items()
        if said.keys() & set(packages)
    }


def _names(request: BenchRequest) -> dict[str, str]:
    """File of this machine -> what it is called on the device: after its content. Raises OSError."""
    names = {}
    for model in request.models:
        for path, suffix in ((model.path, model.runtime), *((path, "bin") for path in model.inputs)):
            with Path(path).open("rb") as file:
                names[path] = f"{hashlib.file_digest(file, 'sha256').hexdigest()}.{suffix}"
    return names
