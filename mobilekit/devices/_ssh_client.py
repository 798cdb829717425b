"""A connection to a board through asyncssh: fixed words are run there, and what goes wrong is said with a remedy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mobilekit.devices import _ssh_troubles
from mobilekit.devices._session import DeviceError, Trouble
from mobilekit.devices._ssh_address import Address
from mobilekit.devices._ssh_troubles import LostError

if TYPE_CHECKING:
    import asyncssh

Result = TypeVar("Result")

CONNECT_SECONDS = 10.0
LOGIN_SECONDS = 20.0
KEEPALIVE_SECONDS, KEEPALIVES = 5.0, 3
"""A peer that is silent for so long, so many times in turn, is lost."""
WAKE_SECONDS = 0.2
END_SECONDS = 5.0
"""In which a process that was told to end does so."""
MOST_OUTPUT = 4 * 2**20
"""Bytes of what a program prints that are kept, the last ones."""
WORD = re.compile(r"[A-Za-z0-9._/-]+")
KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts")


class Background:
    """Runs coroutines on a thread of its own, for code that is not asynchronous."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="mobilekit ssh", daemon=True)
        self.thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Its result; on Ctrl-C it is cancelled, and has cleaned up when this returns."""
        ended = threading.Event()

        async def watched() -> Result:
            try:
                return await work
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(watched(), self.loop)
        try:
            while not futures.wait([future], WAKE_SECONDS).done:
                pass  # Ctrl-C reaches a thread beside the main one only when it wakes
            return future.result()
        except BaseException:
            future.cancel()
            ended.wait(2 * END_SECONDS)
            raise

    def stop(self) -> None:
        """End the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Output(NamedTuple):
    """What a program left: its exit code (a signal's number as a negative one) and the last that it printed."""

    code: int
    out: str
    err: str


class Client:
    """One connection to an account on a host, made when it is first needed and again when it is gone."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._connection: asyncssh.SSHClientConnection | None = None
        self._files: asyncssh.SFTPClient | None = None

    async def open(self) -> None:
        """Connect, unless that is done. Raises DeviceError."""
        if self._connection is not None and not self._connection.is_closed():
            return
        await self.close()
        connection = self._connection = await connect(self.address)
        try:
            self._files = await connection.start_sftp_client()
        except BaseException as error:
            silent = connection.is_closed()
            await self.close()
            if isinstance(error, Exception):
                raise _ssh_troubles.no_files(error, self.address, silent) from error
            raise

    async def close(self) -> None:
        """End the connection."""
        connection, self._connection, self._files = self._connection, None, None
        if connection is not None:
            connection.abort()
            with contextlib.suppress(Exception):
                await asyncio.wait_for(connection.wait_closed(), END_SECONDS)

    @property
    def files(self) -> asyncssh.SFTPClient:
        """Files of the open connection. Raises LostError where it is gone."""
        if self._files is None:
            raise LostError(_ssh_troubles.lost(self.address))
        return self._files

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Turns what asyncssh raises into DeviceError, or LostError."""
        try:
            yield
        except DeviceError:
            raise
        except Exception as error:
            raise _ssh_troubles.of(error, self.address) from error

    @contextlib.asynccontextmanager
    async def started(self, words: Sequence[str]) -> AsyncIterator[Running]:
        """A program that runs there, in the home folder; it is ended when the block is left.

        The words are joined by spaces for the account's login shell, whichever that is: none of them holds a character
        that any shell would treat in its own way.
        """
        wrong = [word for word in words if not WORD.fullmatch(word)]
        if wrong or self._connection is None:
            raise (
                LostError(_ssh_troubles.lost(self.address))
                if not wrong
                else ValueError(f"not a plain word: {wrong[0]}")
            )
        with self.told():
            process = await self._connection.create_process(" ".join(words), encoding=None)
        running = Running(process)
        try:
            yield running
        finally:
            await running.stop()

    async def run(self, words: Sequence[str], given: bytes = b"", seconds: float = 120.0) -> Output:
        """Run a program to its end with this on its standard input. Raises DeviceError, also when it takes too long."""
        async with self.started(words) as running:
            running.process.stdin.write(given)
            running.process.stdin.write_eof()
            if not await running.wait(seconds):
                raise DeviceError(
                    Trouble(
                        f"{words[0]} on {self.address.account} did not end within {seconds:.0f} s",
                        "check what keeps the device busy, or restart it",
                    )
                )
            if running.code is None:
                raise LostError(_ssh_troubles.lost(self.address))
            return Output(running.code, running.out(), running.err())


class Running:
    """A program on the device."""

    def __init__(self, process: asyncssh.SSHClientProcess[bytes]) -> None:
        self.process = process
        self._kept = (bytearray(), bytearray())
        streams = zip((process.stdout, process.stderr), self._kept, strict=True)
        self._work = [asyncio.create_task(_drain(stream, kept)) for stream, kept in streams]
        self._work.append(asyncio.create_task(process.wait_closed()))

    async def wait(self, seconds: float) -> bool:
        """Whether it ended, or was lost, within so many seconds."""
        _, pending = await asyncio.wait(self._work, timeout=seconds)
        return not pending

    @property
    def code(self) -> int | None:
        """Exit code, a signal's number as a negative one; None: it runs, or the connection was lost."""
        code = self.process.returncode
        # a login shell tells of a signal as 128 and its number
        return 128 - code if code is not None and 128 < code < 192 else code

    def out(self) -> str:
        """The last that it wrote to standard output."""
        return self._kept[0].decode("utf-8", errors="replace")

    def err(self) -> str:
        """The last that it wrote to standard error."""
        return self._kept[1].decode("utf-8", errors="replace")

    async def stop(self) -> None:
        """End it, and all that it started."""
        if not self.process.is_closing():
            with contextlib.suppress(OSError):  # its connection is gone
                self.process.stdin.write_eof()
                self.process.kill()
            await self.wait(END_SECONDS)
        self.process.close()
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)


async def _drain(stream: asyncssh.SSHReader[bytes], kept: bytearray) -> None:
    import asyncssh

    with contextlib.suppress(asyncssh.Error, OSError):  # the process then has no exit code
        while chunk := await stream.read(65536):
            kept += chunk
            del kept[:-MOST_OUTPUT]


async def connect(address: Address) -> asyncssh.SSHClientConnection:
    """A connection to a host whose key is known, with the user's keys, agent and configuration. Raises DeviceError."""
    try:
        import asyncssh
    except ImportError as error:
        raise DeviceError(_ssh_troubles.NO_CLIENT) from error

    account: dict[str, Any] = {"username": address.user or (), "port": address.port or ()}
    known = [False]
    try:
        options = await asyncssh.SSHClientConnectionOptions.construct(host=address.host, **account)
        files = options.known_hosts if isinstance(options.known_hosts, list) and options.known_hosts else KNOWN_HOSTS
        hosts = _known_hosts(files)

        def trusted(host: str, peer: str, port: int | None) -> Any:
            found = asyncssh.match_known_hosts(hosts, host, peer, port)
            known[0] = bool(found[0])
            return found

        return await asyncssh.connect(
            address.host,
            **account,
            known_hosts=trusted,  # always checked, whatever a configuration says
            connect_timeout=CONNECT_SECONDS,
            login_timeout=LOGIN_SECONDS,
            keepalive_interval=KEEPALIVE_SECONDS,
            keepalive_count_max=KEEPALIVES,
            x11_forwarding=False,
            agent_forwarding=False,
        )
    except asyncssh.HostKeyNotVerifiable as error:
        raise DeviceError(_ssh_troubles.host_key(address, known[0], str(error))) from error
    except DeviceError:
        raise
    except Exception as error:
        raise _ssh_troubles.of(error, address, connected=False) from error


def _known_hosts(files: Sequence[str]) -> asyncssh.SSHKnownHosts:
    """What those of the files hold that can be read; nothing is trusted where there is none. Raises DeviceError."""
    import asyncssh

    paths = [str(Path(file).expanduser()) for file in files]
    try:
        return asyncssh.read_known_hosts([path for path in paths if os.path.isfile(path) and os.access(path, os.R_OK)])
    except ValueError as error:
        trouble = Trouble(f"your list of known hosts cannot be read: {error}", "remove that line from the file")
        raise DeviceError(trouble) from error
