"""`manifest.json`: what an app needs to know about the files beside it, with golden vectors to test itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilekit.store import Store
from mobilekit.types import ExportedModel

GOLDEN = "golden.bin"
GOLDEN_SAMPLES = 4


def write(
    store: Store,
    models: Sequence[ExportedModel],
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    *,
    preprocessing: dict[str, Any] | None,
    labels: Sequence[str] | None,
) -> Path:
    """Write the manifest and the golden vectors into the store of the models' folder.

    `inputs` and `outputs` (N, ...) are float32 of the PyTorch candidate, by name and laid out as PyTorch has them;
    up to four samples are kept, little-endian, C order, one tensor after the other, inputs first. Where there are
    several, their places are listed with their names.
    """
    blob = b""
    places: list[list[dict[str, Any]]] = [[], []]
    for ends, listed in zip((inputs, outputs), places, strict=True):
        for name, values in ends.items():
            kept = np.ascontiguousarray(values[:GOLDEN_SAMPLES], dtype="<f4")
            listed.append({"name": name, "offset": len(blob), "shape": list(kept.shape)})
            blob += kept.tobytes()
    given, results = (listed if len(listed) > 1 else listed[0] for listed in places)
    store.write(GOLDEN, lambda path: path.write_bytes(blob))
    manifest = {
        "schema": 1,
        "models": [
            {
                "path": Path(model.path).name,
                "runtime": model.runtime,
                "precision": model.precision,
                "sha256": model.sha256,
                "size_bytes": model.size_bytes,
                "inputs": [tensor.model_dump() for tensor in model.facts.inputs],
                "outputs": [tensor.model_dump() for tensor in model.facts.outputs],
                "operators": model.facts.operators,
            }
            for model in models
        ],
        "preprocessing": preprocessing,
        "labels": list(labels) if labels is not None else None,
        "golden": {
            "path": GOLDEN,
            "sha256": hashlib.sha256(blob).hexdigest(),
            "dtype": "float32, little-endian",
            "inputs": given,
            "outputs": results,
            "layout": "as PyTorch has it: NCHW for maps",
            "of": "the PyTorch network that the files were exported from",
        },
    }
    return store.write_text("manifest.json", json.dumps(manifest, indent=2) + "\n")
