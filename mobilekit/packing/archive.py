"""Pack a model into a small file for download, and get it back bit for bit."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict

from mobilekit.errors import BadInputError, StorageError
from mobilekit.files import appearing
from mobilekit.packing import codings, container, tensors
from mobilekit.packing.container import Contents, Entry, Piece

SUFFIX = ".mkpack"
FILES, FOLDER = (".onnx", ".tflite"), ".mlpackage"
ZSTD_LEVEL = 19
ZSTD_MODULES = ("compression.zstd", "zstandard")
NO_ZSTD = "neither Python's compression.zstd (3.14) nor the module zstandard is installed"


class FileDigest(BaseModel):
    """A file of the model."""

    model_config = ConfigDict(frozen=True)
    path: str
    size_bytes: int
    sha256: str


class Packed(BaseModel):
    """What `pack` made, beside what others make of the same bytes; ratios are original to packed bytes."""

    model_config = ConfigDict(frozen=True)
    model: str
    package: str
    original_bytes: int
    packed_bytes: int
    ratio: float
    zip_bytes: int
    """Deflate at level 9, for each file."""
    zip_ratio: float
    zstd_bytes: int | None
    zstd_ratio: float | None
    zstd_reason: str | None
    """Why there is no figure of zstd (level 19)."""
    files: tuple[FileDigest, ...]


class Unpacked(BaseModel):
    """What `unpack` restored; the digests were checked."""

    model_config = ConfigDict(frozen=True)
    package: str
    model: str
    size_bytes: int
    files: tuple[FileDigest, ...]


def pack(model: Path, out: Path | None = None) -> Packed:
    """Pack an .onnx or .tflite file or an .mlpackage folder; by default into a file beside it with .mkpack added.

    The package is read back before it appears. File times and modes and empty folders are not kept. Raises
    BadInputError for what is no such model, has its weights in other files, holds links or names that cannot be
    restored everywhere, and StorageError where the disk does not take the package.
    """
    parts = _model_files(model)
    target = model.with_name(model.name + SUFFIX) if out is None else out
    if target.is_dir():
        target /= model.name + SUFFIX
    inside, held = Path(os.path.realpath(target)), Path(os.path.realpath(model))
    if inside.is_dir() or inside == held or held in inside.parents:
        raise BadInputError(f"the package cannot be written to '{target}': give another file to --out")
    zstd = _zstd()
    entries: list[Entry] = []
    payload: list[bytes] = []
    zipped = zstd_bytes = 0
    for name, path in parts:
        data = _read(path)
        entry, coded = _coded(name, data, onnx=path.suffix.lower() == ".onnx")
        deflated = zlib.compress(data, 9)
        if len(deflated) < sum(map(len, coded)) and len(data) <= tensors.MOST:
            piece = Piece(0, len(data), "zlib", len(deflated))
            entry, coded = entry.model_copy(update={"rest": (piece,), "tensors": ()}), [deflated]
        entries.append(entry)
        payload += coded
        zipped += len(deflated)
        zstd_bytes += zstd(data) if zstd else 0
    total = sum(entry.size for entry in entries)
    contents = Contents(name=model.name, folder=model.is_dir(), size=total, files=tuple(entries))
    with appearing(target) as draft:
        with draft.open("wb") as stream:
            container.write(stream, contents, payload)
        with draft.open("rb") as stream:
            for _, chunks in _restored(stream, container.read(stream)):
                deque(chunks, maxlen=0)  # compares the digest at its end
    packed = target.stat().st_size
    return Packed(
        model=str(model),
        package=str(target),
        original_bytes=total,
        packed_bytes=packed,
        ratio=total / packed,
        zip_bytes=zipped,
        zip_ratio=total / zipped,
        zstd_bytes=zstd_bytes if zstd else None,
        zstd_ratio=total / zstd_bytes if zstd else None,
        zstd_reason=None if zstd else NO_ZSTD,
        files=_digests(contents),
    )


def unpack(package: Path, out: Path | None = None) -> Unpacked:
    """Restore a model; by default beside the package under its own name.

    `out` is the model's path, or a folder that exists, for the model to be put into. Another model that is there
    already is kept: only a file that `out` names is replaced. Raises BadInputError for what is no package or a damaged
    one, and StorageError where the disk does not take the model; nothing half-written is left.
    """
    try:
        if package.exists() and not package.is_file():
            raise BadInputError(f"cannot unpack '{package}': it is no plain file")
        stream = package.open("rb")
    except OSError as error:
        raise BadInputError(f"cannot read '{package}': {error.strerror}") from error
    with stream:
        try:
            contents = container.read(stream)
            target = _target(contents, package, out)
            with appearing(target) as draft:
                _room(target, contents.size)
                for entry, chunks in _restored(stream, contents):
                    path = draft / entry.path if contents.folder else draft
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("wb") as written:
                        written.writelines(chunks)
        except BadInputError as error:
            raise BadInputError(f"cannot unpack '{package}': {error}") from error
    return Unpacked(package=str(package), model=str(target), size_bytes=contents.size, files=_digests(contents))


# ---------------------------------------------------------------- packing


def _model_files(model: Path) -> list[tuple[str, Path]]:
    """The model's files with their names in the package."""
    suffix = model.suffix.lower()
    if not model.exists():
        raise BadInputError(f"there is no '{model}'")
    container.check_path(model.name, parts=False)
    if model.is_file() and suffix in FILES:
        return [(model.name, model)]
    if not model.is_dir() or suffix != FOLDER:
        raise BadInputError(f"'{model}' is no model to pack: give an .onnx or .tflite file or an .mlpackage folder")
    found = sorted(path for path in model.rglob("*") if path.is_symlink() or not path.is_dir())
    strange = [path for path in found if path.is_symlink() or not path.is_file()]
    if strange:
        raise BadInputError(f"'{strange[0]}' is a link or no plain file, which a package cannot hold")
    if not found:
        raise BadInputError(f"the folder '{model}' holds no files")
    parts = [(path.relative_to(model).as_posix(), path) for path in found]
    for name, _ in parts:
        container.check_path(name, parts=True)
    return parts


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInputError(f"cannot read '{path}': {error.strerror}") from error


def _coded(name: str, data: bytes, *, onnx: bool) -> tuple[Entry, list[bytes]]:
    """A file's entry, and its coded pieces in the order of the payload."""
    held: list[Piece] = []
    coded: list[bytes] = []
    around: list[bytes] = []
    at = 0
    for span in tensors.spans(data, onnx=onnx):
        around.append(data[at : span.start])
        held.append(_appended(coded, data[span.start : span.start + span.size], span.width, span.start - at))
        at = span.start + span.size
    remaining = b"".join([*around, data[at:]])
    before: list[bytes] = []
    pieces = [remaining[begin : begin + tensors.MOST] for begin in range(0, len(remaining), tensors.MOST)]
    rest = tuple(_appended(before, piece, 1, 0) for piece in pieces)
    digest = hashlib.sha256(data).hexdigest()
    return Entry(path=name, size=len(data), sha256=digest, rest=rest, tensors=tuple(held)), before + coded


def _appended(payload: list[bytes], data: bytes, width: int, gap: int) -> Piece:
    coding, coded = codings.encode(data, width)
    payload.append(coded)
    return Piece(gap, len(data), coding, len(coded))


def _zstd() -> Callable[[bytes], int] | None:
    """Bytes that zstd takes, where a module for it is installed."""
    for name in ZSTD_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        return lambda data, own=module: len(own.compress(data, ZSTD_LEVEL))  # type: ignore[misc]
    return None


# ---------------------------------------------------------------- unpacking


def _restored(stream: BinaryIO, contents: Contents) -> Iterator[tuple[Entry, Iterator[bytes]]]:
    """The files of a package that stands at its payload, with their bytes.

    These end in BadInputError where the digest is not the stated one.
    """
    at = stream.tell()
    for entry in contents.files:
        yield entry, _verified(container.restored(stream, entry, at), entry)
        at += sum(piece.coded for piece in entry.pieces)


def _verified(chunks: Iterator[bytes], entry: Entry) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != entry.sha256:
        raise BadInputError(f"what it holds of '{entry.path}' is not the file that was packed")


def _target(contents: Contents, package: Path, out: Path | None) -> Path:
    """Where the model is written, with nothing there that somebody might miss."""
    target = package.parent / contents.name if out is None else out
    if out is not None and out.is_dir() and out.suffix.lower() != FOLDER:
        target = out / contents.name
    named = target == out and target.is_file() and not contents.folder
    if os.path.realpath(target) == os.path.realpath(package):  # unlike resolve(), it takes a link to itself
        raise BadInputError("the model would replace the package: give --out")
    if (target.exists() or target.is_symlink()) and not named and not _same(target, contents):
        raise BadInputError(f"'{target}' exists and is another model: give another name to --out")
    return target


def _same(target: Path, contents: Contents) -> bool:
    """The model is there already, byte for byte."""
    if target.is_dir() != contents.folder or target.is_symlink():
        return False
    paths = [p for p in target.rglob("*") if not p.is_dir()] if contents.folder else [target]
    root = target if contents.folder else target.parent
    stated = {root / (entry.path if contents.folder else target.name): entry.sha256 for entry in contents.files}
    return set(paths) == set(stated) and all(hashlib.sha256(_read(path)).hexdigest() == stated[path] for path in paths)


def _room(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise StorageError(f"'{target}' takes {size} bytes and the disk has {free}: give another folder to --out")


def _digests(contents: Contents) -> tuple[FileDigest, ...]:
    return tuple(FileDigest(path=e.path, size_bytes=e.size, sha256=e.sha256) for e in contents.files)
