"""Golden vectors on a device: what a file is fed there, and how close its outputs are to the PyTorch network's."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mobilekit import documents, manifest
from mobilekit.errors import BadInputError
from mobilekit.types import ManifestModel, Measurement, Parity, TensorData, TensorSpec


@dataclass(frozen=True)
class Vectors:
    """Those of one model file."""

    entry: ManifestModel
    inputs: tuple[np.ndarray, ...]
    """(N, ...) for each of the file's inputs, in its own layout and type."""
    outputs: tuple[np.ndarray, ...]
    """(N, ...) float32 of the PyTorch network, as PyTorch has them."""


def of(path: Path) -> Vectors | None:
    """The golden vectors of a model file from the manifest beside it; None where there is none, or not of this file.

    Raises BadInputError for a manifest that is not to be used, and for a file that is not the one that it describes.
    """
    if not (path.parent / manifest.NAME).exists():
        return None
    found = manifest.read(path.parent)
    entry = next((model for model in found.models if model.path == path.name), None)
    if entry is None:
        return None
    if not path.is_file():  # a folder: a Core ML package, which is for another kind of device
        return None
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != entry.sha256:
        raise BadInputError(f"'{path}' is not the file that the manifest beside it describes (sha256)")
    golden = found.golden
    blob = documents.content(path.parent / golden.path, f"the golden vectors '{golden.path}'")
    held = [
        np.frombuffer(blob, "<f4", int(np.prod(tensor.shape)), tensor.offset).reshape(tensor.shape)
        for tensor in (*golden.inputs, *golden.outputs)
    ]
    split = len(golden.inputs)
    fed = tuple(to_file(values, spec) for values, spec in zip(held[:split], entry.inputs, strict=True))
    return Vectors(entry, fed, tuple(held[split:]))


def write(vectors: Vectors, folder: Path, stem: str) -> tuple[str, ...]:
    """Write the inputs as the files that a BenchModel names; returns their paths."""
    paths = []
    for number, values in enumerate(vectors.inputs):
        path = folder / f"{stem}-{number}.bin"
        path.write_bytes(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())
        paths.append(str(path))
    return tuple(paths)


def compared(vectors: Vectors, measurement: Measurement) -> tuple[Measurement, str | None]:
    """The measurement with the parity of the outputs that came with it, and what is wrong with them, in words.

    One that was compared on the device already is left as it is.
    """
    if measurement.parity is not None:
        return measurement, None
    if not measurement.outputs:
        return measurement, f"{measurement.device} returned no outputs to compare"
    bare = measurement.model_copy(update={"outputs": ()})
    try:
        parity = judged(vectors, measurement.outputs)
    except BadInputError as error:
        return bare, str(error)
    return bare.model_copy(update={"parity": parity}), excess(vectors, parity)


def judged(vectors: Vectors, outputs: Sequence[TensorData]) -> Parity:
    """The device's outputs beside the golden ones; of several the one that is furthest, with the largest error of all.

    Raises BadInputError where they are not the file's outputs, or not finite.
    """
    from mobilekit.evaluate import parity

    specs = vectors.entry.outputs
    if len(outputs) != len(specs):
        raise BadInputError(f"the device returned {len(outputs)} outputs, and the file has {len(specs)}")
    named = {output.name: output for output in outputs}
    rows = []
    for spec, output, expected in zip(specs, outputs, vectors.outputs, strict=True):
        found = from_file(named.get(spec.name, output), spec, expected.shape)
        if not np.isfinite(found).all():
            raise BadInputError(f"the output {spec.name} is not finite on this device")
        rows.append((spec.name, parity(expected, found)))
    name, worst = min(rows, key=lambda row: float("inf") if row[1].sqnr_db is None else row[1].sqnr_db)
    note = f"of the output {name}, the furthest of {len(rows)}" if len(rows) > 1 else ""
    largest = max(row.max_abs_error or 0.0 for _, row in rows)
    return worst.model_copy(update={"max_abs_error": largest, "note": note})


def excess(vectors: Vectors, parity: Parity) -> str | None:
    """In words, that these outputs are further from the golden ones than those of a sound device; or None."""
    tolerance, error = vectors.entry.tolerance, parity.max_abs_error
    if tolerance is None or error is None or error <= tolerance:
        return None
    return f"its outputs differ from the golden ones by up to {error:.3g}, and the manifest allows {tolerance:.3g}"


# ---------------------------------------------------------------- layouts and types


def to_file(values: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Golden inputs (N, ...) as a file takes them: its layout, its quantised type. Raises BadInputError for no type."""
    laid = values.transpose(0, 2, 3, 1) if spec.layout == "NHWC" else values
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError as error:
        raise BadInputError(
            f"the manifest says that {spec.name} is of a type that there is not: {documents.short(spec.dtype)}"
        ) from error
    if spec.scale is not None:
        limits = np.iinfo(dtype)
        laid = np.clip(np.round(laid / spec.scale) + (spec.zero_point or 0), limits.min, limits.max)
    return np.ascontiguousarray(laid, dtype)


def from_file(output: TensorData, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    """What a device returned as the golden outputs are written: float32 (N, ...), channels first.

    Raises BadInputError where it is not a tensor of this type and shape.
    """
    refusal = f"the device returned something else than the file's output {spec.name}"
    if output.dtype != spec.dtype:
        raise BadInputError(f"{refusal}: {documents.short(output.dtype)} in place of {spec.dtype}")
    try:
        values = np.frombuffer(base64.b64decode(output.data, validate=True), np.dtype(spec.dtype).newbyteorder("<"))
    except (binascii.Error, ValueError, TypeError) as error:
        raise BadInputError(f"{refusal}: {documents.short(str(error))}") from error
    last = spec.layout == "NHWC" and len(shape) == 4
    own = (shape[0], *shape[2:], shape[1]) if last else shape
    if values.size != np.prod(own):
        raise BadInputError(f"{refusal}: {values.size} values in place of {np.prod(own)}")
    real = values.astype(np.float32)
    if spec.scale is not None:
        real = (real - (spec.zero_point or 0)) * np.float32(spec.scale)
    real = real.reshape(own)
    return np.ascontiguousarray(real.transpose(0, 3, 1, 2)) if last else real
