"""The package file: a fixed head, a table of contents, coded pieces. `docs/packing.md` describes it.

Nothing in a package is believed before it is checked: the digest first, then that all sizes agree with each other and
with the length of the file, and that names stay inside the folder they are unpacked to.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, BinaryIO, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mobilekit.errors import BadInputError
from mobilekit.packing import codings, tensors

MAGIC = b"\x89MKP\r\n\x1a\n"
"""As PNG's: transfers that drop the eighth bit or rewrite line ends are noticed at once."""
VERSION = 1
HEAD = struct.Struct("<8sHHIQ32s")
MOST_CONTENTS = 1 << 24
"""Bytes of the table of contents, unpacked."""
CHUNK = 1 << 20
FORBIDDEN = frozenset("/\\:") | {chr(code) for code in (*range(32), 127)}
STRICT = ConfigDict(strict=True, frozen=True, extra="forbid")

Size = Annotated[int, Field(ge=0, lt=1 << 63)]
PieceSize = Annotated[int, Field(ge=0, le=tensors.MOST)]


class Piece(NamedTuple):
    """Bytes of a file that are coded together; `gap` bytes of the rest lie before a tensor."""

    gap: Size
    size: PieceSize
    coding: str
    coded: Size


class Entry(BaseModel):
    """One file: its tensors in order, and the rest of its bytes, which are coded apart and lie around them."""

    model_config = STRICT
    path: str
    size: Size
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    rest: tuple[Piece, ...]
    tensors: tuple[Piece, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """In the order of the payload."""
        return self.rest + self.tensors


class Contents(BaseModel):
    """What a package holds: one file of that name, or a folder of that name with files in it."""

    model_config = STRICT
    name: str
    folder: bool
    size: Size
    files: Annotated[tuple[Entry, ...], Field(min_length=1)]


def write(stream: BinaryIO, contents: Contents, payload: list[bytes]) -> None:
    """Write a package; `payload` holds the coded pieces in order. Raises BadInputError where its names are no good."""
    check(contents, sum(map(len, payload)))
    text = contents.model_dump_json().encode()
    if len(text) > MOST_CONTENTS:
        raise BadInputError("the model has too many pieces for a package")
    table = zlib.compress(text, 9)
    digest = hashlib.sha256(table)
    for part in payload:
        digest.update(part)
    stream.write(HEAD.pack(MAGIC, VERSION, 0, len(table), sum(map(len, payload)), digest.digest()))
    stream.write(table)
    stream.writelines(payload)


def read(stream: BinaryIO) -> Contents:
    """The checked contents; afterwards the stream stands where the payload begins.

    Raises BadInputError for what is no package, is damaged or cut off, or contradicts itself.
    """
    length = os.fstat(stream.fileno()).st_size
    head = stream.read(HEAD.size)
    if not head or not MAGIC.startswith(head[: len(MAGIC)]):
        raise BadInputError("it is no mobilekit package")
    if len(head) < HEAD.size:
        raise BadInputError("it is cut off")
    _, version, reserved, table_size, payload_size, digest = HEAD.unpack(head)
    if version != VERSION:
        raise BadInputError(f"its format version is {version}, and this mobilekit knows {VERSION} only")
    if reserved or length > HEAD.size + table_size + payload_size:
        raise BadInputError("it is damaged: something is wrong with its head or behind its end")
    if length < HEAD.size + table_size + payload_size:
        raise BadInputError("it is cut off")
    found = hashlib.sha256()
    while chunk := stream.read(CHUNK):
        found.update(chunk)
    if found.digest() != digest:
        raise BadInputError("it is damaged: its SHA-256 is not the one that it states")
    stream.seek(HEAD.size)
    contents = _contents(stream.read(table_size))
    check(contents, payload_size)
    return contents


def _contents(table: bytes) -> Contents:
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(table, MOST_CONTENTS + 1)
        if len(text) > MOST_CONTENTS or not unpacker.eof or unpacker.unused_data:
            raise BadInputError("its table of contents is too long or cut off")
        return Contents.model_validate_json(text)
    except (zlib.error, ValidationError) as error:
        raise BadInputError("its table of contents cannot be read") from error


def check(contents: Contents, payload: int) -> None:
    """BadInputError with one sentence unless sizes agree and names stay inside."""
    if sum(piece.coded for entry in contents.files for piece in entry.pieces) != payload:
        raise BadInputError("its pieces do not add up to its length")
    if sum(entry.size for entry in contents.files) != contents.size:
        raise BadInputError("its files do not add up to the size that it states")
    for entry in contents.files:
        if sum(piece.size for piece in entry.pieces) != entry.size:
            raise BadInputError("the pieces of a file do not add up to its size")
        if any(piece.gap for piece in entry.rest) or sum(p.gap for p in entry.tensors) > sum(
            p.size for p in entry.rest
        ):
            raise BadInputError("its tensors lie outside of their file")
        if any(piece.size > codings.largest(piece.coded) for piece in entry.pieces):
            raise BadInputError("it claims to hold more than its bytes can")
    _check_names(contents)


def _check_names(contents: Contents) -> None:
    paths = [entry.path for entry in contents.files]
    if not contents.folder and paths != [contents.name]:
        raise BadInputError("it holds other files than the one that it names")
    for path in [contents.name, *paths]:
        check_path(path, parts=contents.folder and path != contents.name)
    folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    if len(set(paths)) < len(paths) or folders & set(paths):
        raise BadInputError("it holds a file twice")


def check_path(path: str, *, parts: bool) -> None:
    """BadInputError for a name, or a path of several parts, that is no plain file name on every system."""
    for part in path.split("/") if parts else [path]:
        try:
            long = len(part.encode()) > 255
        except UnicodeEncodeError:
            long = True
        if part in {"", ".", ".."} or FORBIDDEN & set(part) or long:
            said = ascii(part[:60])
            raise BadInputError(f"the name {said} would leave the output folder or is no file name everywhere")


def restored(stream: BinaryIO, entry: Entry, payload: int) -> Iterator[bytes]:
    """The bytes of a file whose pieces begin at `payload`, piece by piece, in order."""
    rest = _rest(stream, entry, payload)
    held = b""
    at = payload + sum(piece.coded for piece in entry.rest)
    for piece in entry.tensors:
        wanted = piece.gap
        while wanted:
            held = held or next(rest)
            yield held[:wanted]
            wanted, held = max(0, wanted - len(held)), held[wanted:]
        yield _piece(stream, piece, at)
        at += piece.coded
    yield held
    yield from rest


def _rest(stream: BinaryIO, entry: Entry, at: int) -> Iterator[bytes]:
    for piece in entry.rest:
        if piece.size:
            yield _piece(stream, piece, at)
        at += piece.coded


def _piece(stream: BinaryIO, piece: Piece, at: int) -> bytes:
    stream.seek(at)
    return codings.decode(piece.coding, stream.read(piece.coded), piece.size)
