"""Ways to damage files and to make them up, for tests."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import random
import tarfile
import zlib
from pathlib import Path
from typing import Any

from mobilekit.packing.container import HEAD, MAGIC, VERSION

WORDS = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\0\x80", b"\0\0\0\x10", b"\x01\0\0\0")
PATHS = (
    "../../x",
    "../secret.json",
    "/etc/passwd",
    "..",
    ".",
    "a/../../b",
    "C:\\x",
    "\\\\host\\x",
    "x\0y",
    "~/x",
    "%2e%2e/x",
)
VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30, -(10**30), 10**400,
    0.0, -0.0, 0.5, 1e-320, 1e-9, 1e9, 1e300, 1.7e308, -1.7e308, math.nan, math.inf, -math.inf,
    None, True, False, "", " ", "x", "0", "-1", "nan", "\ud800", "\u202e", "\x1b[2J", "<script>", "é" * 5000,
    [], {}, [None], [[]], {"": {}}, [1e308] * 20, ["x"] * 3, *PATHS,
)  # fmt: skip


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Cut off, with flipped bits, with other numbers, with parts twice or elsewhere, or something else entirely."""
    way = rng.randrange(7)
    if way == 0 or len(data) < 8:
        return data[: rng.randrange(len(data) + 1)]
    changed = bytearray(data)
    if way == 1:
        for _ in range(rng.choice((1, 1, 3, 30))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way in (2, 3):
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(len(data) - 4)
            changed[at : at + 4] = rng.choice(WORDS)
    elif way == 4:
        start, to, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice((1, 4, 16, 200))
        changed[to : to + size] = data[start : start + size]
    elif way == 5:
        at = rng.randrange(len(data))
        changed[at:at] = data[: rng.choice((1, 7, 100))]
    else:
        changed = bytearray(
            rng.choice((b"", b"\0" * 64, b"\xff" * 64, b"PK\x03\x04", b"[" * 100_000, b'{"a":' * 50_000))
        )
    return bytes(changed)


def twisted(rng: random.Random, document: Any) -> str:
    """JSON text of the document with one to three wrong places."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 2, 3))):
        holders = list(_holders(document))
        if not holders:
            break
        holder = rng.choice(holders)
        key = rng.choice(list(holder) if isinstance(holder, dict) else list(range(len(holder))))
        way = rng.randrange(8)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            holder[rng.choice(("", "extra", "__class__", "schema", *PATHS))] = holder.pop(key)
        elif way == 2 and isinstance(holder, list):
            holder *= rng.choice((0, 2, 40))
        elif way == 3 and isinstance(holder[key], int | float):
            holder[key] *= rng.choice((-1, 1e3, 1e12, 1e-12, 0))
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))  # a later change must not reach the next case
    return json.dumps(document)


def _holders(document: Any) -> Any:
    """Objects and lists that hold something, at any depth."""
    if isinstance(document, dict | list) and document:
        yield document
        for value in document.values() if isinstance(document, dict) else document:
            yield from _holders(value)


def text(rng: random.Random, document: Any) -> bytes:
    """A JSON file that is wrong in what it says, or damaged."""
    if rng.random() < 0.8:
        return twisted(rng, document).encode()
    return damaged(rng, json.dumps(document).encode())


def put(rng: random.Random, path: Path, content: bytes, root: Path) -> None:
    """Write it, or once in a while put something else than a file in its place."""
    way = rng.randrange(40)
    path.unlink(missing_ok=True)
    if way == 0:
        os.symlink(
            rng.choice((root / "secret.json", root / "absent", path, Path("/dev/zero"), Path("/etc/passwd"))), path
        )
    elif way == 1:
        path.mkdir()
    elif way == 2:
        os.mkfifo(path)
    elif way > 3:
        path.write_bytes(content)


# ---------------------------------------------------------------- single formats


def resigned(rng: random.Random, package: bytes) -> bytes:
    """A package whose table of contents or payload lies, under a digest that fits."""
    _, _, _, table_size, payload_size, _ = HEAD.unpack(package[: HEAD.size])
    table = json.loads(zlib.decompress(package[HEAD.size : HEAD.size + table_size]))
    payload = package[HEAD.size + table_size :]
    wrong = json.dumps(table)
    if rng.random() < 0.7:
        wrong = twisted(rng, table)
    if rng.random() < 0.4:
        payload = damaged(rng, payload)
        if rng.random() < 0.7:  # of the right length, so that it is looked at
            payload = (payload + bytes(payload_size))[:payload_size]
    packed = zlib.compress(wrong.encode())
    digest = hashlib.sha256(packed + payload).digest()
    return HEAD.pack(MAGIC, VERSION, 0, len(packed), len(payload), digest) + packed + payload


def archive(rng: random.Random) -> bytes:
    """A tar archive with members that lead out, are links or devices, or come twice."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as made:
        for _ in range(rng.randrange(1, 5)):
            member = tarfile.TarInfo(rng.choice(("a", "a/b", "a/b/c", "report.json", "b/", "é", "x" * 300, *PATHS)))
            kinds = (tarfile.REGTYPE,) * 5 + (
                tarfile.DIRTYPE,
                tarfile.SYMTYPE,
                tarfile.LNKTYPE,
                tarfile.FIFOTYPE,
                tarfile.CHRTYPE,
            )
            member.type = rng.choice(kinds)
            member.linkname = rng.choice(("", "a", "/etc/passwd", "../../secret.json"))
            member.size = rng.choice((0, 3, 600)) if member.isreg() else 0
            member.mode = rng.choice((0o644, 0o777, 0o4755, 0))
            made.addfile(member, io.BytesIO(bytes(member.size)))
    return stream.getvalue()


def model(rng: random.Random, source: Path) -> bytes:
    """A model file that is damaged, or an ONNX file that is whole and says something absurd."""
    if source.suffix != ".onnx" or rng.random() < 0.5:
        return damaged(rng, source.read_bytes())
    return _absurd_onnx(rng, source)


def _absurd_onnx(rng: random.Random, source: Path) -> bytes:
    import onnx

    made = onnx.load(str(source))
    graph = made.graph
    extent = rng.choice((0, -1, 1, 2**20, 2**31, 2**40, 2**62))
    way = rng.randrange(8)
    if way == 0:
        rng.choice(rng.choice((graph.input, graph.output))).type.tensor_type.shape.dim[
            rng.randrange(2)
        ].dim_value = extent
    elif way == 1:
        rng.choice(graph.initializer).dims[:] = [extent]
    elif way == 2:
        tensor = rng.choice(graph.initializer)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        for key, value in (("location", rng.choice(PATHS)), ("offset", str(extent)), ("length", str(extent))):
            tensor.external_data.add(key=key, value=value)
    elif way == 3:
        node = rng.choice(graph.node)
        del rng.choice((node.input, node.output))[:]
    elif way == 4:
        for end in (graph.input, graph.output)[rng.randrange(2) :]:
            del end[:]
    elif way == 5:
        graph.input[0].type.tensor_type.elem_type = rng.choice((0, 7, 8, 16, 23, 999))
    elif way == 6:
        rng.choice(graph.node).op_type = rng.choice(("Loop", "If", "Nonsense", "", "ConstantOfShape", "Softmax"))
    else:
        attributes = [a for node in graph.node for a in node.attribute if a.ints]
        if attributes:
            rng.choice(attributes).ints[0] = rng.choice((-1, 0, 2**31, 2**62))
    return bytes(made.SerializeToString())
