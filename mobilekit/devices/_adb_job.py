"""One measurement in a folder of its own on an Android device, which is removed again whatever happens."""

from __future__ import annotations

import contextlib
import re
import secrets
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from mobilekit import documents
from mobilekit.devices import _session
from mobilekit.devices._adb_client import CABLE, Client, end, shown
from mobilekit.devices._session import DeviceError, Reply, Trouble
from mobilekit.errors import one_line

SCRIPT = Path(__file__).with_name("_adb_job.sh")
RECONNECT_SECONDS = 20.0
"""How long a device that was lost is waited for."""
GRACE_SECONDS = 10
"""After the time that was asked for, the device ends the program by itself: nobody else did."""
LONGEST_SECONDS = 1e7
"""That `timeout` on a device is given."""
HASH_SECONDS = 300.0
CLIENT_GONE, TIME_OVER, TIMEOUT = 4, 5, 124
"""Exit codes of a measuring program whose standard input ended and whose time is over, and of `timeout`."""
CANNOT_RUN, NOT_FOUND = 126, 127
"""Exit codes of a shell."""
CACHED = re.compile(r"([0-9a-f]{64})  .*/\1(\.[a-z]+)")


class Facts(NamedTuple):
    """What a device says before a measurement."""

    architecture: str
    python: bool
    numpy: bool
    cached: frozenset[str]
    """Names in the folder of models whose content is what they say."""


class Job:
    """A folder on the device. Entering it makes it; leaving it ends what still runs and removes it."""

    def __init__(self, client: Client, folder: str, models: Iterable[str] = ()) -> None:
        self.client, self.folder = client, folder
        self.models = tuple(models)
        """Names in the folder of models that are wanted."""
        self.id = secrets.token_hex(8)
        self.where = f"{folder}/jobs/{self.id}"
        self.gone = False
        """Whether the device was waited for in vain."""

    def __enter__(self) -> Job:
        try:
            self._copy_script()
        except BaseException:
            with contextlib.suppress(DeviceError):  # the script that removes a job did not arrive
                self.client.call("shell", f"rm -rf {self.where}")
            raise
        try:
            self.facts = self._prepare()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _copy_script(self) -> None:
        wanted = "".join(f"# wanted {name}\n" for name in self.models)
        with tempfile.TemporaryDirectory(prefix="mobilekit-") as folder:
            script = Path(folder, "job.sh")
            script.write_text(SCRIPT.read_text(encoding="utf-8") + wanted, encoding="utf-8", newline="\n")
            self.client.push([script], f"{self.where}/{script.name}")

    def _close(self) -> None:
        # Out of reach: it ends the program by itself, and a later measurement removes what is old.
        with contextlib.suppress(DeviceError):
            self.again("remove")

    # ------------------------------------------------------------ calls

    def script(self, command: str, seconds: float = 60.0) -> list[str]:
        """The lines that a command of the job's script prints. Raises DeviceError where it did not come to its end."""
        output = self.client.call("shell", self._line(command), seconds=seconds)
        lines = output.text.splitlines()
        if "end" not in lines:
            raise DeviceError(self.client.complaint(output))
        return lines

    def again(self, command: str) -> list[str]:
        """The same, also where the connection broke in between and comes back."""
        try:
            return self.script(command)
        except DeviceError:
            self.back()
            return self.script(command)

    def back(self) -> None:
        """Wait for a device that was lost. Raises DeviceError where it does not come back."""
        if self.gone or not self.client.wait(RECONNECT_SECONDS):
            self.gone = True
            raise DeviceError(
                Trouble(
                    f"the connection to the device {shown(self.client.serial)} broke while it measured, and it did not "
                    f"come back within {RECONNECT_SECONDS:.0f} s",
                    CABLE,
                )
            )

    def _line(self, command: str) -> str:
        """A command for the device's shell: fixed words, our own path and random name, and numbers."""
        return f"sh {self.where}/job.sh {self.folder} {self.id} {command}"

    def _prepare(self) -> Facts:
        lines = self.script("prepare", HASH_SECONDS)
        words = dict(line.split(" ", 1) for line in lines if " " in line)
        cached = (CACHED.fullmatch(line.removeprefix("model ")) for line in lines if line.startswith("model "))
        return Facts(
            architecture=one_line(words.get("architecture", ""), 40),
            python="python" in words,
            numpy="numpy" in lines,
            cached=frozenset(found[1] + found[2] for found in cached if found is not None),
        )

    # ------------------------------------------------------------ measuring

    def copy(self, models: dict[str, Path], files: dict[str, Path]) -> None:
        """Bring models and their inputs, by their names in the cache, and other files by their names in the job."""
        missing = {name: path for name, path in models.items() if name not in self.facts.cached}
        for chosen, where in ((missing, f"{self.where}/new/"), (files, f"{self.where}/")):
            with tempfile.TemporaryDirectory(prefix="mobilekit-") as folder:
                links = [Path(folder, name) for name in chosen]
                for link, path in zip(links, chosen.values(), strict=True):
                    link.symlink_to(path.resolve())  # adb names a file on the device as it is named here
                if links:
                    self.client.push(links, where)

    def measure(self, seconds: float, program: str) -> Reply:
        """Run a program of the job's folder on its request, for at most so many seconds."""
        timed_out, code = self._attend(seconds, program)
        try:
            lines = self.again("stop")
            document = self._result() if "result" in lines else None
        except DeviceError as error:
            return Reply(document=None, stage="start", returncode=0, timed_out=False, lost=error.trouble)
        said = [line.removeprefix("err ").strip() for line in lines if line.startswith("err ")]
        reply = Reply(
            document=document,
            stage=_session.last_stage(
                "\n".join(line.removeprefix("out ") for line in lines if line.startswith("out "))
            ),
            returncode=0,
            timed_out=timed_out,
            stderr=one_line(next((line for line in reversed(said) if line), ""), 500),
        )
        return self._ended(reply, lines, code)

    def _attend(self, seconds: float, program: str) -> tuple[bool, int]:
        """Start the program and wait; whether its time was over, and adb's exit code.

        Its standard input is ours: it ends when this process does, however that ends.
        """
        seconds = min(seconds, LONGEST_SECONDS)
        # All that it starts has the job's name in its environment, by which it is found again.
        line = f"MOBILEKIT_JOB={self.id} " + self._line(f"run {int(seconds) + GRACE_SECONDS} {program}")
        quiet = subprocess.DEVNULL
        process = self.client.start("shell", line, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
        assert process.stdin is not None  # noqa: S101 (for mypy)
        try:
            return False, process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True, 0
        finally:
            end(process)
            process.stdin.close()

    def _result(self) -> bytes:
        """RESULT.json as it is now."""
        with tempfile.TemporaryDirectory(prefix="mobilekit-") as folder:
            file = Path(folder, "result.json")
            try:
                self.client.pull(f"{self.where}/result.json", file, documents.MOST_BYTES)
            except DeviceError:
                self.back()
                self.client.pull(f"{self.where}/result.json", file, documents.MOST_BYTES)
            return file.read_bytes()

    def _ended(self, reply: Reply, lines: list[str], code: int) -> Reply:
        """How the program ended: its exit code is in a file; adb's own also stands for a broken connection."""
        codes = [int(line[5:]) for line in lines if re.fullmatch(r"exit [0-9]{1,3}", line)]
        if reply.timed_out:
            return reply
        if not codes and 128 < code <= 192:  # the script itself was killed; a broken connection is 0 or 255
            codes = [code]
        if not codes or codes[0] == CLIENT_GONE:
            lost = Trouble(f"the connection to the device {shown(self.client.serial)} broke while it measured", CABLE)
            return replace(reply, lost=lost)
        if codes[0] in (TIME_OVER, TIMEOUT):
            return replace(reply, timed_out=True)
        if codes[0] in (CANNOT_RUN, NOT_FOUND):
            raise DeviceError(
                Trouble(
                    f"the measuring program cannot be started on the device: {reply.stderr or 'no reason is given'}",
                    f"give one for its processor ({self.facts.architecture}) with --runner",
                )
            )
        return replace(reply, returncode=codes[0] if codes[0] <= 128 else 128 - codes[0])
