"""Exported files: what was asked for, what was read back, how close it is to the module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mobilekit.types.plan import Candidate
from mobilekit.types.values import Precision, RuntimeName, Value

if TYPE_CHECKING:
    import numpy as np


class Parity(Value):
    """How close an exported file's outputs are to the PyTorch candidate's."""

    status: Literal["executed", "evaluated", "structure-only", "unchecked"]
    """Run by the format's own engine; carried out by mobilekit; only read back (`note` says why); not even that."""
    sqnr_db: float | None = None
    """None with status executed or evaluated: the outputs are bit for bit equal, so that the ratio is infinite."""
    cosine: float | None = None
    top1_agreement: float | None = None
    max_abs_error: float | None = None
    samples: int = 0
    note: str = ""


class TensorSpec(Value):
    """A model file's input or output as an app sees it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    scale: float | None = None
    zero_point: int | None = None


class FileFacts(Value):
    """What was read back from a written model file."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    operators: dict[str, int]
    """Precision of the arithmetic -> number of computing operators, counted in the file."""
    weights: dict[str, int] = Field(default_factory=dict)
    """Precision of the stored weights -> number of operators that read them: int8 weights behind a dequantise node
    are computed with in float. (Core ML counts such operators as int8 in `operators` too: it has no other int8.)"""


class ExportedModel(Value):
    """A model file that was written and reopened."""

    path: str
    runtime: RuntimeName
    precision: Precision
    sha256: str
    size_bytes: int
    facts: FileFacts
    parity: Parity


@dataclass(frozen=True)
class ExportJob:
    """What a runtime is asked to write.

    `calibration` are input batches (N, C, H, W) float32 that fix int8 ranges; empty for float precisions.
    """

    candidate: Candidate
    precision: Precision
    path: str
    calibration: tuple[np.ndarray, ...] = field(default=())
