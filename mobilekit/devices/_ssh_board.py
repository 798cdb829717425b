"""What one board is used for, from the first connection to the last: facts, runtimes and measurements."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

from mobilekit import __version__
from mobilekit.devices import _facts, _session, _ssh_python, _ssh_troubles
from mobilekit.devices._session import DeviceError, Reply, Trouble
from mobilekit.devices._ssh_address import Address
from mobilekit.devices._ssh_client import Background, Client, Running
from mobilekit.devices._ssh_folder import Folder
from mobilekit.devices._ssh_troubles import LostError
from mobilekit.errors import BadInputError, one_line
from mobilekit.types import BenchRequest, DeviceSettings

Result = TypeVar("Result")

WATCH = Path(__file__).with_name("_ssh_watch.sh")
POLL_SECONDS = 3.0
"""Between two looks at the result file: the program replaces it every two seconds."""
MOST_POLLED = 4 * 2**20
"""A larger result, which holds outputs, is fetched at the end only."""
AGAIN_SECONDS = 2.0
"""After which a lost board is asked for what it still has."""
GRACE_SECONDS = 5
ENDINGS = {"onnx": ".onnx", "tflite": ".tflite"}
REQUEST, RESULT = "request.json", "result.json"


class Board:
    """A board and what is kept of it between calls: the connection, the job's folder, its Python.

    Raises BadInputError for settings that name no runner or no wheels.
    """

    def __init__(self, address: Address, settings: DeviceSettings) -> None:
        self.runner = Path(settings.runner) if settings.runner is not None else None
        if self.runner is not None and not self.runner.is_file():
            raise BadInputError(f"the runner '{self.runner}' is no file: give the path of a program or Python script")
        self.wheels = Path(settings.wheels) if settings.wheels is not None else None
        if self.wheels is not None and not any(self.wheels.glob("*.whl")):
            raise BadInputError(f"'{self.wheels}' holds no wheels: give the folder that `pip download` filled")
        self.client = Client(address)
        self.folder = Folder(self.client)
        self._python: _ssh_python.Python | None = None
        self._background: Background | None = None
        self._lock = threading.RLock()

    def run(self, work: Callable[[Board], Coroutine[Any, Any, Result]]) -> Result:
        """Do something with the connected board; where it was interrupted, nothing stays there."""
        with self._lock:
            if self._background is None:
                self._background = Background()
            try:
                return self._background.run(self._connected(work))
            except (DeviceError, OSError):
                raise
            except BaseException:
                self.close()
                raise

    async def _connected(self, work: Callable[[Board], Coroutine[Any, Any, Result]]) -> Result:
        for attempt in range(2):
            try:
                await self.client.open()
                await self.folder.open()
                return await work(self)
            except LostError:  # of a connection that was idle for long: the second one is new
                await self.client.close()
                if attempt:
                    raise
        raise AssertionError

    def close(self) -> None:
        """Remove the job's folder and end the connection."""
        with self._lock:
            background, self._background = self._background, None
            if background is None:
                return
            with contextlib.suppress(Exception):
                background.run(self._leave())
            background.stop()

    async def _leave(self) -> None:
        with contextlib.suppress(DeviceError):
            await self.folder.remove()
        await self.client.close()

    # ------------------------------------------------------------ what it is

    async def facts(self) -> tuple[str, dict[str, str]]:
        """What the collecting script prints, and the versions of the runtimes that its Python imports."""
        said = await self.client.run(["sh", "-s"], _facts.COLLECT.encode())
        try:
            versions = (await _ssh_python.find(self.client)).runtimes
        except LostError:
            raise
        except DeviceError:  # it has no Python: no runtimes either, but it is there
            versions = {}
        return said.out, versions

    async def absent(self, runtimes: Iterable[str]) -> dict[str, Trouble]:
        """The runtimes among these that the board does not have, and cannot get, with what helps.

        Raises DeviceError where none of them can be used.
        """
        if self.runner is not None:
            return {}
        wanted = set(runtimes)
        if self._python is None or wanted - set(self._python.runtimes):
            self._python = await self._python_for(wanted)
        python = self._python
        return {name: _ssh_python.missing(self.client, python, name) for name in wanted - set(python.runtimes)}

    async def _python_for(self, wanted: set[str]) -> _ssh_python.Python:
        python = await _ssh_python.find(self.client, wanted)
        lacking = wanted - set(python.runtimes)
        if lacking and self.wheels is not None:
            await _ssh_python.install(self.client, self.folder, self.wheels, sorted(wanted))
            python = await _ssh_python.find(self.client, wanted)
        return python

    # ------------------------------------------------------------ a measurement

    async def measure(self, request: BenchRequest, timeout: float) -> Reply:
        """Run the measuring program on a request; ends it when it is not done in time. Raises DeviceError."""
        places = await self.folder.send(_files(request))
        text = _session.request_text(request, lambda path: places[path])
        await self.folder.discard(RESULT)
        await self.folder.write(REQUEST, text.encode())
        words = [*await self._program(timeout), f"{self.folder.path}/{REQUEST}", f"{self.folder.path}/{RESULT}"]
        watch = _Watch(self.folder)
        timed_out = False
        async with self.client.started(words) as running:
            follower = asyncio.create_task(watch.follow())
            try:
                timed_out = not await running.wait(timeout)
            finally:
                follower.cancel()
                await asyncio.gather(follower, return_exceptions=True)
        if running.code is None and not timed_out:
            return await self._after_loss(running, watch)
        return await self._reply(running, watch, timed_out)

    async def _program(self, timeout: float) -> list[str]:
        """The words in front of the two paths."""
        if self.runner is None:
            python = self._python or await self._python_for(set())
            scripts = {path.name: path.read_bytes() for path in _session.SCRIPTS}
            place = await self.folder.program(f"runner-{__version__}", scripts)
            return [python.program, f"{place}/{_session.RUNNER.name}", "--watch-stdin"]
        name = "program.py" if self.runner.suffix == ".py" else "program"
        contents = {name: self.runner.read_bytes(), "watch.sh": WATCH.read_bytes()}
        place = await self.folder.program("custom", contents)
        start = [(await _ssh_python.find(self.client)).program] if name == "program.py" else []
        return ["sh", f"{place}/watch.sh", str(int(timeout) + GRACE_SECONDS), *start, f"{place}/{name}"]

    async def _reply(self, running: Running, watch: _Watch, timed_out: bool) -> Reply:
        try:
            await watch.look(everything=True)
            await self.folder.discard(REQUEST, RESULT)
        except LostError:
            return await self._after_loss(running, watch)
        code = running.code if running.code is not None else 0
        if self.runner is not None and code in _ssh_python.NO_PROGRAM:
            said = _last_line(running)
            trouble = Trouble(
                f"the measuring program {self.runner} cannot be started on {self.client.address.account}: {said}",
                "give one that is made for its processor (`mobilekit doctor --device` tells which)",
            )
            raise DeviceError(trouble)
        return _reply(running, watch, code, timed_out=timed_out)

    async def _after_loss(self, running: Running, watch: _Watch) -> Reply:
        """Connect once more for what the board has finished, and leave nothing there."""
        trouble = _ssh_troubles.lost(self.client.address)
        await self.client.close()
        await asyncio.sleep(AGAIN_SECONDS)
        with contextlib.suppress(DeviceError):
            await self.client.open()
            await watch.look(everything=True)
            await self.folder.remove()
        return _reply(running, watch, 0, lost=trouble)


class _Watch:
    """Keeps the latest copy of the result file while the connection lives."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.document: bytes | None = None
        self._seen: tuple[int, int] | None = None

    async def follow(self) -> None:
        with contextlib.suppress(DeviceError):  # the program's own end tells of a lost connection
            while True:
                await asyncio.sleep(POLL_SECONDS)
                await self.look()

    async def look(self, everything: bool = False) -> None:
        found = await self.folder.changed(RESULT)
        if found is None or (not everything and (found == self._seen or found[0] > MOST_POLLED)):
            return
        self.document = await self.folder.read(RESULT) or self.document
        self._seen = found


def _files(request: BenchRequest) -> list[tuple[str, str]]:
    """Path and ending of the copy's name for all files that a request names."""
    files = [(model.path, ENDINGS.get(model.runtime, ".model")) for model in request.models]
    return files + [(path, ".bin") for model in request.models for path in model.inputs]


def _last_line(running: Running) -> str:
    lines = running.err().splitlines()
    return one_line(lines[-1], 500) if lines else ""


def _reply(running: Running, watch: _Watch, code: int, timed_out: bool = False, lost: Trouble | None = None) -> Reply:
    return Reply(
        document=watch.document,
        stage=_session.last_stage(running.out()),
        returncode=code,
        timed_out=timed_out,
        stderr=_last_line(running),
        lost=lost,
    )
