"""`manifest.json`: what an app needs to know about the files beside it, with golden vectors to test itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from mobilekit import __version__, documents
from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.store import Store
from mobilekit.types import ExportedModel, Golden, GoldenTensor, Manifest, ManifestModel, QuantSpec

if TYPE_CHECKING:
    from mobilekit.exportable import Exportable

NAME = "manifest.json"
GOLDEN = "golden.bin"
GOLDEN_SAMPLES = 4
LAYOUTS = {2: "NC", 3: "NCL", 4: "NCHW", 5: "NCDHW"}
ALLOWANCE = (2.0, 1e-4)
"""An app's tolerance: so many times the largest error that was measured, and this share of the largest golden output.
Another processor's kernels add in another order, and round int8 halves the other way."""


def write(
    store: Store,
    models: Sequence[ExportedModel],
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    source: Exportable,
    *,
    quantisation: QuantSpec | None,
) -> Path:
    """Write the manifest and the golden vectors into the store of the models' folder.

    `inputs` (N, ...) and `outputs` (N, ...) are float32 of the PyTorch candidate, maps NCHW, by name, in the order of
    the network's arguments and results, which is also that of the files' tensors. Up to four samples are kept,
    little-endian, C order, one tensor after the other, inputs first. `quantisation` is that of the int8 files. Raises
    MobilekitError where the vectors are not for these files.
    """
    held = [np.ascontiguousarray(a[:GOLDEN_SAMPLES], dtype="<f4") for a in (*inputs.values(), *outputs.values())]
    offsets = [sum(array.nbytes for array in held[:index]) for index in range(len(held))]
    tensors = [
        GoldenTensor(name=name, offset=offset, shape=array.shape, layout=LAYOUTS.get(array.ndim, ""))
        for name, offset, array in zip((*inputs, *outputs), offsets, held, strict=True)
    ]
    blob = b"".join(array.tobytes() for array in held)
    largest = max(float(np.abs(array).max()) for array in held[len(inputs) :])
    try:
        manifest = Manifest(
            mobilekit_version=__version__,
            models=tuple(_entry(model, largest, quantisation) for model in models),
            preprocessing=source.preprocessing,
            labels=source.labels,
            golden=Golden(
                path=GOLDEN,
                sha256=hashlib.sha256(blob).hexdigest(),
                size_bytes=len(blob),
                samples=len(held[0]),
                inputs=tuple(tensors[: len(inputs)]),
                outputs=tuple(tensors[len(inputs) :]),
                of="the PyTorch network that the files were exported from",
            ),
        )
    except ValidationError as error:
        raise MobilekitError(f"{NAME} cannot be written: it {documents.sentence(error)}") from error
    store.write(GOLDEN, lambda path: path.write_bytes(blob))
    return store.write_text(NAME, manifest.model_dump_json(indent=2, by_alias=True) + "\n")


def read(path: Path) -> Manifest:
    """The checked manifest of a folder, or in a file; its golden vectors are there, and are those that it states.

    Raises BadInputError in one sentence for what is no manifest that this version reads, for a file of it that leads
    out of the folder, and where the golden vectors are missing or others.
    """
    path = path / NAME if path.is_dir() else path
    subject = f"the manifest '{path}'"
    manifest = documents.read(path, Manifest, subject)
    folder = os.path.dirname(os.path.realpath(path))
    for name in (manifest.golden.path, *(model.path for model in manifest.models)):
        if os.path.dirname(os.path.realpath(path.parent / name)) != folder:  # a loop of links is for the next step
            raise BadInputError(f"{subject} is not to be used: its file '{name}' is a link that leaves the folder")
    golden = manifest.golden
    content = documents.content(path.parent / golden.path, f"the golden vectors '{golden.path}' of {subject}")
    if len(content) != golden.size_bytes or hashlib.sha256(content).hexdigest() != golden.sha256:
        raise BadInputError(
            f"'{golden.path}' is not the file that {subject} states (size and sha256): export the models again"
        )
    return manifest


def _entry(model: ExportedModel, largest: float, quantisation: QuantSpec | None) -> ManifestModel:
    """A file's entry; `largest` is the largest absolute golden output."""
    error = model.parity.max_abs_error
    return ManifestModel(
        path=Path(model.path).name,
        runtime=model.runtime,
        precision=model.precision,
        sha256=model.sha256,
        size_bytes=model.size_bytes,
        inputs=model.facts.inputs,
        outputs=model.facts.outputs,
        operators=model.facts.operators,
        parity=model.parity,
        tolerance=None if error is None else ALLOWANCE[0] * error + ALLOWANCE[1] * largest,
        quantisation=quantisation if model.precision == "int8" else None,
    )
