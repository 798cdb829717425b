"""Canonical Huffman codes of limited length for alphabets of up to 4096 symbols, in bulk.

Symbols are split into streams that are coded one after the other and decoded side by side: a step looks up the next
symbol of every stream in one table. A stream has 512 symbols, or 1024, 2048, 4096 where that leaves 64 streams or more.
Codes have at most 15 bits, so that a table entry (symbol and length) has 16.

A block: symbols u32, alphabet u16, bytes of the lengths u16, the lengths (zlib); then, for each 2^22 symbols, the bits
of each stream (u16) and all their bits, the first one highest, in u16 with the higher byte first. The other numbers
are little-endian. A block of one distinct symbol has lengths and nothing else.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from mobilekit.errors import BadInputError

LIMIT = 15
ALPHABET = 1 << 12
SHORTEST, LONGEST = 512, 4096
"""Symbols a stream; the bits of the longest, 15 at most for each symbol, fit into 16 bits."""
SIDE_BY_SIDE = 64
"""Streams that a block has at least before they grow: a step takes no longer for as many."""
GROUP = 1024 * LONGEST
HEAD = struct.Struct("<IHH")


def code_lengths(counts: np.ndarray, limit: int = LIMIT) -> np.ndarray:
    """Lengths (n,) uint8 of the optimal prefix code of at most `limit` bits for symbols that occur so often.

    0 for a symbol that does not occur; 1 for a single one. By package-merge (Larmore and Hirschberg 1990, "A fast
    algorithm for optimal length-limited Huffman codes", JACM 37/3). Raises BadInputError where that many symbols need
    more bits.
    """
    lengths = np.zeros(len(counts), np.uint8)
    used = np.flatnonzero(counts)
    if len(used) > 1 << limit:
        raise BadInputError(f"{len(used)} symbols have no prefix code of at most {limit} bits")
    if len(used) < 2:
        lengths[used] = 1
        return lengths
    order = used[np.argsort(counts[used], kind="stable")]
    weights = np.asarray(counts, np.int64)[order]
    merged, single = weights, [np.ones(len(order), bool)]
    for _ in range(limit - 1):
        packages = merged[0 : len(merged) - 1 : 2] + merged[1::2]
        rank = np.argsort(both := np.concatenate([weights, packages]), kind="stable")
        merged = both[rank]
        single.append(rank < len(order))
    taken = 2 * len(order) - 2
    for flags in reversed(single):
        alone = int(np.count_nonzero(flags[:taken]))
        lengths[order[:alone]] += 1
        taken = 2 * (taken - alone)
    return lengths


def canonical(lengths: np.ndarray) -> np.ndarray:
    """Codes (n,) int64 of these lengths: ascending by length, then by symbol; 0 for symbols of length 0."""
    order, own = _ordered(lengths)
    spaces = np.left_shift(1, LIMIT - own)
    codes = np.zeros(len(lengths), np.int64)
    codes[order] = (np.cumsum(spaces) - spaces) >> (LIMIT - own)
    return codes


def encode(symbols: np.ndarray) -> bytes:
    """A block that holds these symbols (n,), integers from 0 to 4095.

    Raises BadInputError for others, and for 2^32 symbols and more.
    """
    flat = np.asarray(symbols)
    if flat.ndim != 1 or (flat.size and flat.dtype.kind not in "iu"):
        raise BadInputError("Huffman codes are made for a row of integers")
    if len(flat) >= 1 << 32 or (len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < ALPHABET):
        raise BadInputError(f"Huffman codes are made for fewer than 2^32 symbols from 0 to {ALPHABET - 1}")
    counts = np.bincount(flat) if len(flat) else np.zeros(0, np.int64)
    lengths = code_lengths(counts)
    table = zlib.compress(lengths.tobytes(), 9)
    parts = [HEAD.pack(len(flat), len(lengths), len(table)), table]
    if np.count_nonzero(counts) > 1:
        codes = canonical(lengths)
        length = stream_length(len(flat))
        groups = (flat[begin : begin + GROUP] for begin in range(0, len(flat), GROUP))
        parts += [_written(group, lengths, codes, length) for group in groups]
    return b"".join(parts)


def stream_length(count: int) -> int:
    """Symbols of each stream but the last, of so many in the block."""
    length = SHORTEST
    while length < LONGEST and count >= 2 * length * SIDE_BY_SIDE:
        length *= 2
    return length


def _written(symbols: np.ndarray, lengths: np.ndarray, codes: np.ndarray, length: int) -> bytes:
    width = lengths[symbols].astype(np.int64)
    ends = np.cumsum(width)
    starts = ends - width
    sizes = np.diff(np.append(starts[::length], ends[-1])).astype("<u2")
    window = codes[symbols] << (32 - width - (starts & 15))  # 32 bits from the start of the word that a code begins in
    word = starts >> 4
    total = -(-int(ends[-1]) // 16)
    # codes share no bits: their sum is their union, and below 2^16 it is exact in float64
    high = np.bincount(word, weights=window >> 16, minlength=total + 1)
    low = np.bincount(word + 1, weights=window & 0xFFFF, minlength=total + 1)
    return sizes.tobytes() + (high + low)[:total].astype(">u2").tobytes()


def decode(block: bytes, most: int) -> np.ndarray:
    """The symbols (n,) uint16 of a block; n is at most `most`, which is checked before memory is taken.

    Raises BadInputError for a block that `encode` cannot have made.
    """
    count, lengths, at = _head(block, most)
    used = np.flatnonzero(lengths)
    if len(used) <= 1:
        if at != len(block) or bool(len(used)) != bool(count):
            raise _damaged("its length is wrong")
        return np.full(count, used[0] if len(used) else 0, np.uint16)
    table = _table(lengths)
    if (len(block) - at) * 8 < count:
        raise _damaged("it is shorter than its symbols")
    symbols = np.empty(count, np.uint16)
    for begin in range(0, count, GROUP):
        part = symbols[begin : begin + GROUP]
        at = _read(block, at, table, part, stream_length(count))
    if at != len(block):
        raise _damaged("its length is wrong")
    return symbols


def _head(block: bytes, most: int) -> tuple[int, np.ndarray, int]:
    """Number of symbols, lengths of the codes, and where the bits begin."""
    if len(block) < HEAD.size:
        raise _damaged("it is cut off")
    count, alphabet, size = HEAD.unpack_from(block)
    if count > most or alphabet > ALPHABET:
        raise _damaged("it claims more symbols than fit")
    stream = zlib.decompressobj()
    try:
        lengths = stream.decompress(block[HEAD.size : HEAD.size + size], alphabet + 1)
    except zlib.error as error:
        raise _damaged("its code lengths cannot be read") from error
    found = np.frombuffer(lengths, np.uint8)
    if not stream.eof or stream.unused_data or len(found) != alphabet or np.any(found > LIMIT):
        raise _damaged("its code lengths are wrong")
    return count, found, HEAD.size + size


def _table(lengths: np.ndarray) -> np.ndarray:
    """(2^15,) uint16: symbol * 16 + length for whatever 15 bits begin with its code."""
    order, own = _ordered(lengths)
    spaces = np.left_shift(1, LIMIT - own)
    if spaces.sum() != 1 << LIMIT:
        raise _damaged("its code lengths are of no prefix code")
    return np.repeat((order << 4 | own).astype(np.uint16), spaces)


def _read(block: bytes, at: int, table: np.ndarray, symbols: np.ndarray, length: int) -> int:
    """Decode a group into `symbols`; where the next one begins."""
    streams, steps = -(-len(symbols) // length), min(length, len(symbols))
    if len(block) - at < 2 * streams:
        raise _damaged("it is cut off")
    sizes = np.frombuffer(block, "<u2", streams, at).astype(np.int64)
    at += 2 * streams
    ends = np.cumsum(sizes)
    words = -(-int(ends[-1]) // 16)
    if len(block) - at < 2 * words:
        raise _damaged("it is cut off")
    # damaged streams run past their ends, by a whole stream at most: there lie zeros
    padded = np.zeros(words + length * LIMIT // 16 + 2, np.uint32)
    padded[:words] = np.frombuffer(block, ">u2", words, at)
    windows = padded[:-1] << np.uint32(16) | padded[1:]
    place = (ends - sizes).astype(np.uint32)
    found = np.empty((steps, streams), np.uint16)
    for row in found:
        window = windows.take(place >> 4)
        window >>= 17 - (place & 15)
        window &= (1 << LIMIT) - 1
        table.take(window, out=row, mode="clip")
        place += row & 15
    rest = len(symbols) - (streams - 1) * length
    place[-1] = ends[-1] - sizes[-1] + int((found[:rest, -1] & 15).sum())  # the last stream is shorter
    if not np.array_equal(place, ends):
        raise _damaged("its bits are no sequence of codes")
    symbols[:] = (found >> 4).T.ravel()[: len(symbols)]
    return at + 2 * words


def _ordered(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbols that occur, by length and then by symbol, and their lengths (int64)."""
    used = np.flatnonzero(lengths)
    order = used[np.argsort(lengths[used], kind="stable")]
    return order, lengths[order].astype(np.int64)


def _damaged(why: str) -> BadInputError:
    return BadInputError(f"a Huffman block is damaged: {why}")
