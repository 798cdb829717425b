"""Everything that an app needs to check model files against `manifest.json`: NumPy, JSON and a digest."""

import hashlib
import json
from pathlib import Path

import numpy as np


def load(folder: Path) -> tuple[dict, list[np.ndarray], list[np.ndarray]]:
    """The manifest, and the golden inputs and outputs: float32 (samples, ...)."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["schema"] == 2, "made by another version"
    golden = manifest["golden"]
    blob = (folder / golden["path"]).read_bytes()
    assert hashlib.sha256(blob).hexdigest() == golden["sha256"], "golden vectors are damaged"

    def values(tensor: dict) -> np.ndarray:
        count = int(np.prod(tensor["shape"]))
        return np.frombuffer(blob, "<f4", count, tensor["offset"]).reshape(tensor["shape"])

    return manifest, [values(t) for t in golden["inputs"]], [values(t) for t in golden["outputs"]]


def to_file(sample: np.ndarray, tensor: dict) -> np.ndarray:
    """A golden input sample (1, ...) as the file takes it: its layout, its quantised type."""
    if tensor["layout"] == "NHWC":
        sample = sample.transpose(0, 2, 3, 1)
    dtype = np.dtype(tensor["dtype"])
    if tensor["scale"] is not None:
        limits = np.iinfo(dtype)
        sample = np.clip(np.round(sample / tensor["scale"]) + tensor["zero_point"], limits.min, limits.max)
    return np.ascontiguousarray(sample, dtype)


def from_file(value: np.ndarray, tensor: dict) -> np.ndarray:
    """What the file gave as the golden outputs are written: float32, channels first."""
    if tensor["scale"] is not None:
        value = (value.astype(np.float32) - tensor["zero_point"]) * np.float32(tensor["scale"])
    return value.transpose(0, 3, 1, 2) if tensor["layout"] == "NHWC" else value


def largest_error(folder: Path, model: dict, run) -> float:
    """Largest difference to the golden outputs; `run` takes a file's inputs by name and gives its outputs by name."""
    assert hashlib.sha256((folder / model["path"]).read_bytes()).hexdigest() == model["sha256"], "another model"
    manifest, inputs, outputs = load(folder)
    worst = 0.0
    for i in range(manifest["golden"]["samples"]):
        feed = {t["name"]: to_file(x[i : i + 1], t) for t, x in zip(model["inputs"], inputs, strict=True)}
        found = run(feed)
        for tensor, expected in zip(model["outputs"], outputs, strict=True):
            got = from_file(found[tensor["name"]], tensor)
            worst = max(worst, float(np.abs(got - expected[i : i + 1]).max()))
    return worst
