"""A cell's folder: what it holds beside a run's files, and how it travels between machines that share no disk."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path, PurePosixPath

from mobilekit.errors import BadInputError
from mobilekit.files import DISK_ERRORS, appearing

JOB, FAILURE, LOG = "cell.json", "failure.json", "log.txt"


def as_bytes(folder: Path) -> bytes:
    """The folder's files and folders as a tar archive. Links are left out: a run makes none."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                continue
            archive.add(path, path.relative_to(folder).as_posix(), recursive=False)
    return stream.getvalue()


def from_bytes(content: bytes, folder: Path) -> None:
    """Put the folder that `as_bytes` packed in the place of `folder`, whole or not at all.

    Raises BadInputError for what is no such archive, and for a member that is a link, a device, or leads outside.
    """
    with appearing(folder) as draft:
        draft.mkdir()
        try:
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
                for member in archive:
                    _extract(archive, member, draft)
        except OSError as error:
            if error.errno in DISK_ERRORS:
                raise
            raise BadInputError(f"it is no archive of a cell's folder ({error.strerror or error})") from error
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise BadInputError(f"it is no archive of a cell's folder ({error})") from error


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, draft: Path) -> None:
    """Written by hand and not by `extract`: only names and contents count, never modes, owners or links."""
    parts = PurePosixPath(member.name).parts
    strange = not parts or member.name.startswith("/") or ".." in parts or any(c in member.name for c in "\\:\0")
    if strange or not (member.isreg() or member.isdir()):
        raise BadInputError(f"'{member.name}' is a link or leads out of the cell's folder")
    target = draft.joinpath(*parts)
    stream = archive.extractfile(member) if member.isreg() else None
    if stream is None:
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(stream.read())
