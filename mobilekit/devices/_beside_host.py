"""Outputs of another device beside those of this machine, which runs the same files on the same inputs."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mobilekit import documents, registry
from mobilekit.devices.host import Host
from mobilekit.errors import BadInputError
from mobilekit.types import BenchModel, BenchRequest, Failure, Measurement, Parity, TensorData, TensorSpec

if TYPE_CHECKING:
    import numpy as np

REMEDY = "run the file on this machine by itself (--device host), or on a board"


def compared(measurements: Sequence[Measurement], request: BenchRequest) -> tuple[list[Measurement], list[Failure]]:
    """The measurements with `beside_host`, and why it is missing in those without.

    The request is that of the device: it has to return outputs.
    """
    if not measurements:
        return [], []
    paths = {measurement.path for measurement in measurements}
    models = {model.path: model for model in request.models if model.path in paths}
    here = Host().run(request.model_copy(update={"models": tuple(models.values())}))
    own = {measurement.path: measurement for measurement in here.measurements}
    reasons = {failure.subject: failure.message for failure in here.failures}
    found, failures = [], []
    for measurement in measurements:
        try:
            if measurement.path not in own:
                raise BadInputError(f"this machine did not run it: {reasons.get(measurement.model, 'no reason given')}")
            parity = _parity(models[measurement.path], own[measurement.path], measurement)
            found.append(measurement.model_copy(update={"beside_host": parity}))
        except BadInputError as error:
            message = f"its outputs were not compared with this machine's: {error}"
            failures.append(Failure(stage="parity", subject=measurement.model, message=message, remedy=REMEDY))
            found.append(measurement)
    return found, failures


def _parity(model: BenchModel, own: Measurement, other: Measurement) -> Parity:
    """Of several outputs the one that is furthest, with the largest error of all. Raises BadInputError."""
    import numpy as np

    from mobilekit.evaluate import parity

    if [output.name for output in own.outputs] != [output.name for output in other.outputs] or not own.outputs:
        raise BadInputError("it returned other outputs than this machine")
    specs = _specs(model, own.outputs)
    rows = []
    for expected, found in zip(own.outputs, other.outputs, strict=True):
        if (expected.shape, expected.dtype) != (found.shape, found.dtype):
            raise BadInputError(f"its output {documents.short(found.name)} has another shape or type than here")
        here, there = (_values(output, specs.get(expected.name)) for output in (expected, found))
        if not (np.isfinite(here).all() and np.isfinite(there).all()):
            raise BadInputError(f"the output {documents.short(found.name)} is not finite")
        rows.append((expected.name, parity(here, there)))
    name, worst = min(rows, key=lambda row: float("inf") if row[1].sqnr_db is None else row[1].sqnr_db)
    largest = max(row.max_abs_error or 0.0 for _, row in rows)
    notes = [f"of the output {name}, the furthest of {len(rows)}"] if len(rows) > 1 else []
    versions = [measurement.versions.get(model.runtime) for measurement in (other, own)]
    notes += [f"{model.runtime} {versions[0]} beside {versions[1]} here"] if versions[0] != versions[1] else []
    return worst.model_copy(update={"max_abs_error": largest, "note": "; ".join(notes)})


def _specs(model: BenchModel, outputs: Sequence[TensorData]) -> dict[str, TensorSpec]:
    """How quantised outputs are meant; the file is only looked into for those: an error is beside real values, without
    the zero point, which would flatter it."""
    if all(output.dtype.startswith("float") for output in outputs):
        return {}
    specs = registry.runtime(model.runtime).describe(Path(model.path)).outputs
    return {output.name: spec for output, spec in zip(outputs, specs, strict=False)}


def _values(output: TensorData, spec: TensorSpec | None) -> np.ndarray:
    """An output as real numbers, the samples first. Raises BadInputError where it is not of its own shape and type."""
    import numpy as np

    try:
        raw = np.frombuffer(base64.b64decode(output.data, validate=True), np.dtype(output.dtype).newbyteorder("<"))
        values = raw.astype(np.float64).reshape(output.shape)
    except (binascii.Error, ValueError, TypeError) as error:
        raise BadInputError(f"the output {documents.short(output.name)} cannot be read: {error}") from error
    if spec is not None and spec.scale is not None:
        values = (values - (spec.zero_point or 0)) * spec.scale
    return values
