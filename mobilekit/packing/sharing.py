"""A tensor of few distinct values as Deep Compression stores it (arXiv:1510.00149): codebook, gaps and indices.

A row: form u8 (0 dense, 1 sparse), width u8, distinct values u16, the most frequent one's index u16, bytes of the gaps
u32; the codebook, ascending as unsigned integers; the gaps; the indices, both of the latter Huffman blocks. Dense: the
indices of all values, no gaps. Sparse: the indices of the values that are not the most frequent one (zero, where
weights were pruned), and how many of that one lie before each. Longer gaps than 254 take fillers: 255 is a gap of 255
with no value behind it.
"""

from __future__ import annotations

import struct

import numpy as np

from mobilekit.errors import BadInputError
from mobilekit.packing import huffman

MOST = huffman.ALPHABET
SAMPLE = 1 << 16
FILLER = 255
HEAD = struct.Struct("<BBHHI")
DENSE, SPARSE = 0, 1


def encode(data: bytes, width: int) -> bytes | None:
    """The shorter form of values of 1, 2 or 4 bytes; None where more than 4096 differ or a value is cut off.

    Values are compared by their bits, so that NaN and minus zero come back as they were.
    """
    if not data or len(data) % width:
        return None
    values = np.frombuffer(data, f"<u{width}")
    if len(np.unique(values[:SAMPLE])) > MOST:
        return None
    book = np.unique(values)
    if len(book) > MOST:
        return None
    codes = np.searchsorted(book, values).astype(np.uint16)
    usual = int(np.bincount(codes).argmax())
    places = np.flatnonzero(codes != usual)
    found = [(DENSE, b"", huffman.encode(codes))]
    if len(places) < len(codes) // 2:
        found.append((SPARSE, huffman.encode(_gaps(places)), huffman.encode(codes[places])))
    form, gaps, indices = min(found, key=lambda one: len(one[1]) + len(one[2]))
    return HEAD.pack(form, width, len(book), usual, len(gaps)) + book.tobytes() + gaps + indices


def decode(coded: bytes, size: int) -> bytes:
    """The `size` bytes that were encoded; BadInputError where they cannot have been."""
    if len(coded) < HEAD.size:
        raise _damaged("it is cut off")
    form, width, distinct, usual, gap_bytes = HEAD.unpack_from(coded)
    at = HEAD.size + distinct * width
    if form not in {DENSE, SPARSE} or width not in {1, 2, 4} or size % width or usual >= distinct > 0:
        raise _damaged("its numbers contradict each other")
    if at + gap_bytes > len(coded) or not 1 <= distinct <= MOST:
        raise _damaged("its numbers contradict each other")
    book, count = np.frombuffer(coded, f"<u{width}", distinct, HEAD.size), size // width
    indices = huffman.decode(coded[at + gap_bytes :], count)
    if len(indices) and int(indices.max()) >= distinct:
        raise _damaged("an index is beyond the codebook")
    if form == DENSE:
        if len(indices) != count or gap_bytes:
            raise _damaged("values are missing")
        return bytes(book[indices].tobytes())
    places = _places(huffman.decode(coded[at : at + gap_bytes], count + count // FILLER + 1))
    if len(places) != len(indices) or (len(places) and int(places[-1]) >= count):
        raise _damaged("values lie beyond its end")
    values = np.full(count, book[usual])
    values[places] = book[indices]
    return values.tobytes()


def _gaps(places: np.ndarray) -> np.ndarray:
    """Relative positions of ascending places, with fillers."""
    gaps = np.diff(places, prepend=-1) - 1
    fillers = gaps // FILLER
    ends = np.cumsum(fillers + 1) - 1
    symbols = np.full(int(ends[-1]) + 1 if len(ends) else 0, FILLER, np.uint8)
    symbols[ends] = gaps % FILLER
    return symbols


def _places(symbols: np.ndarray) -> np.ndarray:
    """The ascending places that such gaps lead to."""
    last = symbols < FILLER
    return np.asarray((np.cumsum(symbols, dtype=np.int64) + np.cumsum(last) - 1)[last])


def _damaged(why: str) -> BadInputError:
    return BadInputError(f"a shared tensor is damaged: {why}")
