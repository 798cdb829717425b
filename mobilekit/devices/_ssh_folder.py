"""What mobilekit keeps on a board: measuring programs by their content, and the files of one job, which go with it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mobilekit.devices import _ssh_troubles
from mobilekit.devices._session import DeviceError, Trouble
from mobilekit.devices._ssh_client import Client
from mobilekit.documents import MOST_BYTES

if TYPE_CHECKING:
    import asyncssh

CACHE = ".cache/mobilekit"
"""In the home folder, where both files and programs of an ssh session begin: no name of the device's is needed."""
JOBS = f"{CACHE}/jobs"
STALE_SECONDS = 24 * 3600.0
"""A job that nobody has touched for so long is of a client that was killed."""

AT_ONCE = 8
"""Files that are on their way together: each costs some six answers of the board, however small it is."""


class Folder:
    """A job's folder on the board, and the measuring programs beside all jobs."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.path = f"{JOBS}/{secrets.token_hex(8)}"
        self.home = ""
        """The home folder's own path; it is the device's word, and never part of a command."""
        self._sent: set[str] = set()

    @property
    def _files(self) -> asyncssh.SFTPClient:
        return self.client.files

    async def open(self) -> None:
        """Make it where it is not there, and remove those of clients that were killed. Raises DeviceError."""
        async with self._writing():
            self.home = str(await self._files.realpath("."))
            if await self._files.isdir(self.path):
                await self._files.utime(self.path)
                return
            self._sent.clear()
            for folder in (*(str(parent) for parent in _parents(JOBS)), self.path):
                if not await self._files.isdir(folder):
                    await self._files.mkdir(folder, _private())
        with self.client.told():
            await self._sweep()

    async def _sweep(self) -> None:
        now = (await self._files.stat(self.path)).mtime or 0  # by the device's clock, which may be years off
        for entry in await self._files.readdir(JOBS):
            name = str(entry.filename)
            changed = now if entry.attrs.mtime is None else entry.attrs.mtime
            if name not in (".", "..") and "/" not in name and now - changed > STALE_SECONDS:
                await self._files.rmtree(f"{JOBS}/{name}", ignore_errors=True)

    async def remove(self) -> None:
        """Remove it with all that is in it. Raises DeviceError."""
        self._sent.clear()
        with self.client.told():
            await self._files.rmtree(self.path, ignore_errors=True)

    # ------------------------------------------------------------ programs

    async def program(self, label: str, contents: Mapping[str, bytes]) -> str:
        """Folder with exactly these files, which is there from an earlier job or is written now. Raises DeviceError."""
        together = hashlib.sha256()
        for name, content in sorted(contents.items()):
            together.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
        place = f"{CACHE}/{label}-{together.hexdigest()[:12]}"
        if await self._holds(place, contents):
            return place
        draft = f"{self.path}/program"
        async with self._writing(sum(map(len, contents.values()))):
            await self._files.rmtree(place, ignore_errors=True)  # of a disk that was full, or tampered with
            await self._files.mkdir(draft, _private())
            for name, content in contents.items():
                await self._write(f"{draft}/{name}", content)
                await self._files.chmod(f"{draft}/{name}", 0o700)
            with _tolerated():  # another client has written it in the meantime
                await self._files.rename(draft, place)
            await self._files.rmtree(draft, ignore_errors=True)
        if not await self._holds(place, contents):
            raise DeviceError(
                Trouble(
                    f"a file that was copied to {self.client.address.account} reads back otherwise",
                    f"check its disk, and remove ~/{CACHE} there",
                )
            )
        return place

    async def _holds(self, place: str, contents: Mapping[str, bytes]) -> bool:
        with self.client.told():
            for name, content in contents.items():
                if await self._read(f"{place}/{name}", len(content)) != content:
                    return False
        return True

    # ------------------------------------------------------------ files of the job

    async def send(self, paths: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Copy files (path here, ending of the name there) that are not there yet; those of earlier calls go.

        Returns path here -> path there, which is made of the file's content. Raises DeviceError, and OSError for a
        file that cannot be read here.
        """
        names = {}
        for path, ending in paths:
            with open(path, "rb") as file:
                names[path] = hashlib.file_digest(file, "sha256").hexdigest() + ending
        for name in self._sent - set(names.values()):  # the next models need the room
            with self.client.told(), _tolerated():
                await self._files.remove(f"{self.path}/{name}")
            self._sent.discard(name)
        new = list({name: Path(path) for path, name in names.items() if name not in self._sent}.items())
        for start in range(0, len(new), AT_ONCE):
            sending = (self._send(path, name) for name, path in new[start : start + AT_ONCE])
            for ended in await asyncio.gather(*sending, return_exceptions=True):
                if ended is not None:
                    raise ended
        return {path: f"{self.home}/{self.path}/{name}" for path, name in names.items()}

    async def _send(self, path: Path, name: str) -> None:
        there = f"{self.path}/{name}"
        async with self._writing(path.stat().st_size):
            await self._files.put(str(path), f"{there}.part")
            await self._files.rename(f"{there}.part", there)
        self._sent.add(name)

    async def copy(self, path: Path, folder: str) -> None:
        """Copy a file under its own name into a folder of the job. Raises DeviceError."""
        async with self._writing(path.stat().st_size):
            if not await self._files.isdir(f"{self.path}/{folder}"):
                await self._files.mkdir(f"{self.path}/{folder}", _private())
            await self._files.put(str(path), f"{self.path}/{folder}/{path.name}")

    async def write(self, name: str, content: bytes) -> None:
        """Write a file of the job. Raises DeviceError."""
        async with self._writing(len(content)):
            await self._write(f"{self.path}/{name}", content)

    async def _write(self, path: str, content: bytes) -> None:
        async with self._files.open(path, "wb") as file:
            await file.write(content)

    async def discard(self, *names: str) -> None:
        """Remove files of the job that may be there."""
        for name in names:
            with self.client.told(), _tolerated():
                await self._files.remove(f"{self.path}/{name}")

    async def changed(self, name: str) -> tuple[int, int] | None:
        """Size and time of a file of the job, to tell a new one by; None where there is none. Raises DeviceError."""
        with self.client.told(), _tolerated():
            found = await self._files.stat(f"{self.path}/{name}")
            return found.size or 0, found.mtime or 0
        return None

    async def read(self, name: str) -> bytes | None:
        """A file of the job, or None where there is none or one larger than any result. Raises DeviceError."""
        with self.client.told():
            return await self._read(f"{self.path}/{name}", MOST_BYTES)

    async def _read(self, path: str, most: int) -> bytes | None:
        """A file of at most so many bytes, or None."""
        with _tolerated():
            async with self._files.open(path, "rb") as file:
                content = await file.read(most + 1)
                return content if isinstance(content, bytes) and len(content) <= most else None
        return None

    @contextlib.asynccontextmanager
    async def _writing(self, size: int = 0) -> AsyncIterator[None]:
        """Says why the device does not take a file: an ssh server says no more than that it failed."""
        import asyncssh

        with self.client.told():
            try:
                yield
            except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection):
                raise
            except asyncssh.SFTPError as error:
                free = None
                with contextlib.suppress(asyncssh.SFTPError):
                    room = await self._files.statvfs(".")
                    free = room.bavail * room.frsize
                trouble = _ssh_troubles.storage(error, self.client.address, free, size)
                raise DeviceError(trouble) from error


def _parents(path: str) -> list[str]:
    """The folder and those that it is in, the outermost first."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _private() -> asyncssh.SFTPAttrs:
    import asyncssh

    return asyncssh.SFTPAttrs(permissions=0o700)


def _tolerated() -> contextlib.suppress:
    """Passes over what says that a file is not there, or cannot be had; not that the connection is gone."""
    import asyncssh

    kinds = (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath, asyncssh.SFTPFailure, asyncssh.SFTPPermissionDenied)
    return contextlib.suppress(*kinds)
