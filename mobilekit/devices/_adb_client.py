"""The adb program: found, started from argument lists with limits of time and size, and its complaints put in words."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from mobilekit.devices._session import DeviceError, Trouble
from mobilekit.errors import one_line

Process = subprocess.Popen[bytes]
SERIAL = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:%\[\]-]{0,127}")
"""Serial numbers, `emulator-5554`, `HOST:PORT`, names of wireless debugging, `[IPv6]:PORT`: never an option."""
NETWORK = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.%A-Za-z0-9]+\]):[0-9]{1,5}")
"""A serial that `adb connect` can be given."""
PATIENCE = 30.0
"""Seconds for a call that moves no files."""
MOST_TEXT = 2**20
"""Bytes of what a command prints."""
POLL = 0.02
CONNECT_SECONDS = 20.0
SETTLE_SECONDS = 3.0
"""A device that was just plugged in is offline at first."""

NO_ADB = Trouble(
    "the program adb was not found",
    "install it (Debian: apt install adb; anywhere: pip install 'mobilekit[adb]') or put it on the PATH",
)
CABLE = "check its cable or network and that its screen shows no question, then run the command again"


def is_serial(text: str) -> bool:
    """Whether a text can be the serial of a device; nothing else is handed to adb.

    >>> is_serial("emulator-5554"), is_serial("-s"), is_serial("127.0.0.1:none")
    (True, False, False)
    """
    return SERIAL.fullmatch(text) is not None and (":" not in text or NETWORK.fullmatch(text) is not None)


class Output(NamedTuple):
    """What a call of adb came to."""

    code: int
    text: str
    errors: str


class Entry(NamedTuple):
    """A line of `adb devices`."""

    serial: str
    state: str


def program() -> str:
    """Path of adb: the one on the PATH, else that of the package adbutils. Raises DeviceError where there is none."""
    found = shutil.which("adb")
    if found is not None:
        return found
    try:
        import adbutils
    except ImportError as error:
        raise DeviceError(NO_ADB) from error
    try:
        return str(adbutils.adb_path())
    except (adbutils.AdbError, OSError) as error:  # the package of a processor for which it brings no adb
        raise DeviceError(NO_ADB) from error


class Client:
    """adb bound to one device; an empty serial is none in particular."""

    def __init__(self, adb: str, serial: str) -> None:
        self.adb, self.serial = adb, serial

    def call(
        self, *arguments: str, seconds: float = PATIENCE, arriving: Path | None = None, most: int = MOST_TEXT
    ) -> Output:
        """Run adb to its end. Raises DeviceError when it takes longer than `seconds`, or when what it prints, or the
        file `arriving` that it writes, becomes larger than `most` bytes."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = self.start(*arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            deadline = time.monotonic() + seconds
            try:
                while process.poll() is None:
                    if time.monotonic() > deadline:
                        raise DeviceError(self.silent(seconds))
                    if _too_large(out.fileno(), err.fileno(), arriving, most):
                        raise DeviceError(self._flood(most))
                    time.sleep(POLL)
            finally:
                end(process)
            if _too_large(out.fileno(), err.fileno(), arriving, most):
                raise DeviceError(self._flood(most))
            return Output(process.returncode, _text(out.fileno()), _text(err.fileno()))

    def start(self, *arguments: str, stdin: int, stdout: int | IO[bytes], stderr: int | IO[bytes]) -> Process:
        """Start adb in a process group of its own: Ctrl-C does not reach it, nor a server that it starts."""
        chosen = ["-s", self.serial] if self.serial else []
        command = [self.adb, *chosen, *arguments]
        try:
            return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)
        except OSError as error:
            message = f"the program {shown(self.adb)} cannot be started: {error.strerror or error}"
            raise DeviceError(Trouble(message, NO_ADB.remedy)) from error

    def silent(self, seconds: float) -> Trouble:
        """What to say where adb does not come to an end."""
        return Trouble(f"the device {shown(self.serial)} did not answer within {seconds:.0f} s", CABLE)

    def _flood(self, most: int) -> Trouble:
        size = f"{most >> 20} MiB"
        return Trouble(
            f"the device {shown(self.serial)} sent more than {size} where little was asked",
            "check the device and the runner: nothing of ours answers so",
        )

    def push(self, files: Sequence[Path], where: str) -> None:
        """Copy files to a path on the device, or several into a folder that is there. Raises DeviceError."""
        size = sum(file.stat().st_size for file in files)
        output = self.call("push", *map(str, files), where, seconds=_allowed(size))
        if output.code != 0:
            raise DeviceError(self.complaint(output))

    def pull(self, where: str, file: Path, most: int) -> None:
        """Copy a file of at most so many bytes from the device. Raises DeviceError."""
        output = self.call("pull", where, str(file), seconds=_allowed(most), arriving=file, most=most)
        if output.code != 0:
            raise DeviceError(self.complaint(output))

    def complaint(self, output: Output) -> Trouble:
        """What a failed call says, as a sentence with a remedy."""
        lines = [
            line for line in (output.errors + "\n" + output.text).splitlines() if "rror" in line or "failed" in line
        ]
        said = one_line(lines[0] if lines else output.errors or output.text or "it said nothing", 300)
        name = shown(self.serial)
        if "No space left" in said:
            return Trouble(f"the storage of the device {name} is full", "free some of it, then run the command again")
        for state in ("unauthorized", "authorizing", "offline"):
            if state in said:
                return state_trouble(Entry(self.serial, state))
        if "ermission denied" in said or "ead-only file" in said:
            return Trouble(
                f"the device {name} lets nothing be written: {said}",
                "look at /data/local/tmp there with adb shell ls -l, and restart the device if it is read-only",
            )
        return Trouble(f"the connection to the device {name} failed: {said}", CABLE)

    # ------------------------------------------------------------ which device

    def devices(self) -> list[Entry]:
        """What adb sees."""
        output = Client(self.adb, "").call("devices")
        if output.code != 0:
            said = one_line(output.errors or output.text, 200)
            raise DeviceError(Trouble(f"adb does not work: {said}", "run `adb kill-server`, then the command again"))
        pairs = (line.split(maxsplit=1) for line in output.text.splitlines() if not line.startswith(("*", "List of")))
        return [Entry(pair[0], pair[1].strip()) for pair in pairs if len(pair) == 2]

    def connect(self) -> str:
        """Let adb connect to a device on the network, where the serial is its address; what adb says."""
        if not NETWORK.fullmatch(self.serial):
            return ""
        return Client(self.adb, "").call("connect", self.serial, seconds=CONNECT_SECONDS).text

    def wait(self, seconds: float) -> bool:
        """Whether the device is there (again) within so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if Entry(self.serial, "device") in self.devices():
                    return True
                if all(entry.serial != self.serial for entry in self.devices()):
                    self.connect()
            except DeviceError:
                pass  # adb itself hangs or was restarted: ask again
            if time.monotonic() > deadline:
                return False
            time.sleep(0.3)


def find(serial: str) -> Client:
    """The client of the device with this serial, or of the only one there is. Raises DeviceError with what helps."""
    adb = program()
    client = Client(adb, serial)
    entries = client.devices()
    said = ""
    if serial and all(entry.serial != serial for entry in entries):
        said = one_line(client.connect(), 200)
        entries = client.devices()
    chosen = [entry for entry in entries if serial in ("", entry.serial)]
    usable = [entry for entry in chosen if entry.state == "device"]
    if not chosen:
        raise DeviceError(_absent(serial, entries, said))
    if len(usable) > 1:
        raise DeviceError(_several(usable))
    best = (usable or chosen)[0]
    if not is_serial(best.serial):
        raise DeviceError(
            Trouble(
                f"the serial of the device, {shown(best.serial)}, has characters that no serial has",
                "use another device, or connect this one over the network and name its address",
            )
        )
    client = Client(adb, best.serial)
    if not usable and not (best.state in ("offline", "connecting") and client.wait(SETTLE_SECONDS)):
        raise DeviceError(state_trouble(best))
    return client


def _several(entries: list[Entry]) -> Trouble:
    listed = ", ".join(one_line(entry.serial, 60) for entry in entries[:5])
    return Trouble(
        f"{len(entries)} Android devices are connected: {listed}",
        f"say which one: --device adb:{one_line(entries[0].serial, 60)}",
    )


def _absent(serial: str, entries: list[Entry], said: str) -> Trouble:
    if not serial:
        return Trouble(
            "no Android device is connected",
            "connect one by cable with USB debugging switched on in its developer options; `adb devices` shows it then",
        )
    others = ", ".join(one_line(entry.serial, 60) for entry in entries[:5])
    seen = f"adb sees only {others}" if others else "adb sees none at all"
    return Trouble(
        f"no Android device {shown(serial)} is connected: {said or seen}",
        "check the serial with `adb devices` and the cable; over the network, that debugging by Wi-Fi is on and both "
        "are in one network",
    )


def state_trouble(entry: Entry) -> Trouble:
    """Why a device that adb sees cannot be used, and what helps."""
    name, state = shown(entry.serial), entry.state
    if state in ("unauthorized", "authorizing"):
        return Trouble(
            f"the device {name} does not trust this computer yet ({state})",
            "unlock it and allow USB debugging in the dialog it shows; if none appears, unplug it and plug it in again",
        )
    if state in ("offline", "connecting"):
        return Trouble(
            f"the device {name} is {state}: adb sees it but gets no answer",
            "unplug it and plug it in again, or run `adb reconnect`; if that does not help, `adb kill-server`",
        )
    if state.startswith("no permissions"):
        return Trouble(
            f"this user may not talk to the USB device {name}",
            "give access to it (Debian: apt install android-sdk-platform-tools-common, join the group plugdev), then "
            "plug it in again",
        )
    return Trouble(
        f"the device {name} is in the state {shown(state)}, in which nothing can be run",
        "start Android on it as usual (adb reboot)",
    )


def shown(text: str) -> str:
    """A device's own word in quotes, short and printable."""
    return f"'{one_line(text, 80)}'"


def end(process: Process) -> None:
    """End an adb client, which is a process group of its own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()


def _allowed(size: int) -> float:
    """Seconds for so many bytes: a slow cable or network brings 0.5 MB a second."""
    return PATIENCE + size / 5e5


def _too_large(out: int, err: int, arriving: Path | None, most: int) -> bool:
    if max(os.fstat(out).st_size, os.fstat(err).st_size) > MOST_TEXT:
        return True
    try:
        return arriving is not None and arriving.stat().st_size > most
    except OSError:
        return False


def _text(descriptor: int) -> str:
    return os.pread(descriptor, MOST_TEXT, 0).decode("utf-8", errors="replace").replace("\r\n", "\n")
