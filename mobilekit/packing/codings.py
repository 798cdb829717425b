"""How a piece of a file is stored: the shortest of several codings, each of which restores it bit for bit."""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mobilekit.errors import BadInputError
from mobilekit.packing import huffman, sharing

EXPANSION = 1100
SMALL = 1024
"""No piece grows by more than this factor and this many bytes when it is read; zlib never reaches it (1032)."""
SLICE = 1 << 16
FILTERS: list[dict[str, Any]] = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 23}]
"""Fixed, so that no package can ask for a larger dictionary."""
LEVEL = 6
"""Of zlib: 9 takes much longer on exponents and is hardly shorter."""
PLANE = struct.Struct("<BI")
CODINGS = ("stored", "zlib", "lzma", "huffman", "planes", "shared")
OF_PLANES = ("stored", "zlib", "huffman")


def encode(data: bytes, width: int) -> tuple[str, bytes]:
    """Name of the shortest coding and what it makes of values of `width` bytes (1, 2 or 4).

    Long data choose by two slices, for trying everything takes long.
    """
    names = [name for name in CODINGS if name != "planes" or width > 1]
    chosen, coded = _shortest(data, width, names)
    if coded is None:  # few distinct values in the slices, many elsewhere
        names.remove(chosen)
        chosen, coded = _shortest(data, width, names)
    if coded is None or len(coded) >= len(data):
        chosen, coded = "stored", data
    if len(data) > largest(len(coded)):  # a constant in one Huffman block is too good to be told from a lie
        chosen, coded = "zlib", zlib.compress(data, 9)
    return chosen, coded


def decode(name: str, coded: bytes, size: int) -> bytes:
    """The `size` bytes that were encoded; takes memory for those and no more. BadInputError where they cannot be."""
    if name not in CODINGS or not 0 <= size <= largest(len(coded)):
        raise BadInputError("a piece is damaged: its coding or its size is wrong")
    data = DECODERS[name](coded, size)
    if len(data) != size:
        raise BadInputError("a piece is damaged: its size is wrong")
    return data


def largest(coded: int) -> int:
    """Bytes that so many coded ones may stand for."""
    return EXPANSION * coded + SMALL


def _shortest(data: bytes, width: int, names: list[str]) -> tuple[str, bytes | None]:
    """The best of these codings, for two slices of long data, and what it makes of all data."""
    sample = data
    if len(data) > 2 * SLICE:
        middle = len(data) // 2 // SLICE * SLICE  # keeps values whole
        sample = data[:SLICE] + data[middle : middle + SLICE]
    made = {name: coded for name in names if (coded := _encoded(name, sample, width)) is not None}
    best = min(made, key=lambda name: len(made[name]))
    return best, made[best] if sample is data else _encoded(best, data, width)


def _encoded(name: str, data: bytes, width: int) -> bytes | None:
    """None: this coding is not for these data."""
    if name == "zlib":
        return zlib.compress(data, LEVEL)
    if name == "lzma":
        return lzma.compress(data, lzma.FORMAT_RAW, filters=FILTERS)
    if name == "huffman":
        return huffman.encode(np.frombuffer(data, np.uint8))
    if name == "planes":
        return None if len(data) % width else _planes(data, width)
    return sharing.encode(data, width) if name == "shared" else data


def _planes(data: bytes, width: int) -> bytes:
    """The first bytes of all values, then the second ones, and so on: exponents repeat, mantissas do not."""
    parts = [bytes([width])]
    for plane in np.frombuffer(data, np.uint8).reshape(-1, width).T:
        own = plane.tobytes()
        name, coded = _shortest(own, 1, list(OF_PLANES))
        held = own if coded is None else coded  # these codings are for all data: it never is
        parts += [PLANE.pack(OF_PLANES.index(name), len(held)), held]
    return b"".join(parts)


def _from_planes(coded: bytes, size: int) -> bytes:
    width = coded[0] if coded else 0
    if width not in {2, 4} or size % width:
        raise BadInputError("a piece is damaged: its bytes do not fit together")
    values, at = np.empty((size // width, width), np.uint8), 1
    for plane in range(width):
        if len(coded) - at < PLANE.size:
            raise BadInputError("a piece is damaged: it is cut off")
        code, length = PLANE.unpack_from(coded, at)
        at += PLANE.size
        if code >= len(OF_PLANES) or length > len(coded) - at:
            raise BadInputError("a piece is damaged: its bytes do not fit together")
        own = DECODERS[OF_PLANES[code]](coded[at : at + length], size // width)
        if len(own) != size // width:
            raise BadInputError("a piece is damaged: its size is wrong")
        values[:, plane] = np.frombuffer(own, np.uint8)
        at += length
    if at != len(coded):
        raise BadInputError("a piece is damaged: something follows it")
    return values.tobytes()


def _from_huffman(coded: bytes, size: int) -> bytes:
    symbols = huffman.decode(coded, size)
    if len(symbols) and int(symbols.max()) > 255:
        raise BadInputError("a piece is damaged: its symbols are no bytes")
    return symbols.astype(np.uint8).tobytes()


def _from_zlib(coded: bytes, size: int) -> bytes:
    return _from_stream(zlib.decompressobj(), "zlib", coded, size)


def _from_lzma(coded: bytes, size: int) -> bytes:
    return _from_stream(lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS), "lzma", coded, size)


def _from_stream(stream: Any, name: str, coded: bytes, size: int) -> bytes:
    """What one of the standard library's decompressors makes of the bytes: at most one more than the size."""
    try:
        data: bytes = stream.decompress(coded, size + 1)
    except (zlib.error, lzma.LZMAError) as error:
        raise BadInputError(f"a piece is damaged: {name} cannot read it") from error
    if not stream.eof or stream.unused_data:
        raise BadInputError("a piece is damaged: its size is wrong")
    return data


DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "stored": lambda coded, _: coded,
    "zlib": _from_zlib,
    "lzma": _from_lzma,
    "huffman": _from_huffman,
    "planes": _from_planes,
    "shared": sharing.decode,
}
