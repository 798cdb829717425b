"""Where a model file holds constant tensors: initialisers of ONNX by their names, elsewhere blocks by what they hold.

What is found only decides how well a file is packed: every byte comes back wherever the borders lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mobilekit.errors import BadInputError

WIDTHS = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 10: 2, 16: 2}
"""Bytes a value by ONNX's number of the type: float32, uint8, int8, (u)int16, int32, float16, bfloat16."""
LEAST = 1024
"""Bytes of a tensor that is coded by itself."""
MOST = 1 << 26
"""Bytes that are coded at a time, which bounds the memory that unpacking takes."""
BLOCK = 4096
BYTES_RUN = 64 * BLOCK
"""Single bytes are coded in runs of this length: another tensor has other frequencies."""
LIKE = 0.5


class Span(NamedTuple):
    """A piece of a file that holds values of one width, in bytes."""

    start: int
    size: int
    width: int


def spans(data: bytes, *, onnx: bool) -> list[Span]:
    """Spans in the order of the file; they do not overlap, and what lies between them is no tensor."""
    known = list(_initialisers(data)) if onnx else []
    found: list[Span] = []
    at = 0
    for span in [*known, Span(len(data), 0, 1)]:
        found += _scanned(data, at, span.start)
        found += _pieces(span)
        at = span.start + span.size
    return found


def _pieces(span: Span) -> Iterator[Span]:
    for start in range(span.start, span.start + span.size, MOST):
        yield Span(start, min(MOST, span.start + span.size - start), span.width)


# ---------------------------------------------------------------- ONNX


def _initialisers(data: bytes) -> Iterator[Span]:
    """Initialisers and constants that lie in the file as raw bytes or packed floats, in the file's order.

    Raises BadInputError for weights in other files: a package of this file alone would not restore the model.
    """
    import onnx

    try:
        model = onnx.load_model_from_string(data)
    except Exception:  # noqa: BLE001 -- the parser's own errors; a file that is no ONNX is packed as any other
        return
    at = 0
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise BadInputError(
                f"the model keeps '{tensor.name}' in another file, which would not be packed: save it in one file"
            )
        width = WIDTHS.get(tensor.data_type)
        raw = tensor.raw_data or np.array(tensor.float_data, "<f4").tobytes()
        if width is None or len(raw) < LEAST:
            continue
        start = data.find(raw, at)
        if start >= 0:
            yield Span(start, len(raw), width)
            at = start + len(raw)


def _tensors(graph: Any) -> Iterator[Any]:
    """As the file lists them: nodes, with the graphs inside them, come before initialisers."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
    yield from graph.initializer


# ---------------------------------------------------------------- any file


class _Kind(NamedTuple):
    """What a block holds: values of so many bytes; few different ones, or None."""

    width: int
    book: frozenset[int] | None


def _scanned(data: bytes, start: int, stop: int) -> Iterator[Span]:
    """Runs of blocks that hold the same kind of values."""
    begin = at = -(-start // 4) * 4  # formats align numbers to their size in the file
    run: _Kind | None = None
    while at + BLOCK <= stop:
        kind = _kind(data[at : at + BLOCK])
        joined = _joined(run, kind, at - begin) if run else kind
        if run and not joined:
            yield Span(begin, at - begin, run.width)
            begin = at
        run = joined or kind
        at += BLOCK
    if run:
        yield Span(begin, at - begin, run.width)


def _joined(run: _Kind, kind: _Kind, size: int) -> _Kind | None:
    """The run with one block more; None where it ends before that block."""
    if run.width != kind.width or (run.book is None) != (kind.book is None):
        return None
    if run.book is None or kind.book is None:
        return run if size < (BYTES_RUN if run.width == 1 else MOST) else None
    if size >= MOST or len(run.book & kind.book) < LIKE * len(kind.book):
        return None  # another tensor with another codebook
    return _Kind(run.width, run.book | kind.book)


def _kind(block: bytes) -> _Kind:
    """By the bits that an order-0 code would take for words with a codebook, and for bytes."""
    words, counts = np.unique(np.frombuffer(block, "<u4"), return_counts=True)
    planes = np.frombuffer(block, np.uint8).reshape(-1, 4)
    if len(words) <= BLOCK // 8:
        own, by_bytes = _bits(counts) + 32 * len(words), _bits(np.bincount(planes.ravel()))
        if own < by_bytes:
            return _Kind(4, frozenset(words.tolist()))
    distinct = [len(np.unique(plane)) for plane in planes.T]
    # the byte of sign and exponent takes far fewer values than those of the mantissa
    if distinct[3] < distinct[0] / 2 and distinct[3] < distinct[1] / 2:
        return _Kind(4, None)
    if max(distinct[1], distinct[3]) < min(distinct[0], distinct[2]) / 2:
        return _Kind(2, None)
    return _Kind(1, None)


def _bits(counts: np.ndarray) -> float:
    own = counts[counts > 0]
    return float(-(own * np.log2(own / own.sum())).sum())
