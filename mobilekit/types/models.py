"""Exported files: what was asked for, what was read back, how close it is to the module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mobilekit.types.plan import Candidate, Untraced
from mobilekit.types.values import Precision, RuntimeName, Target, Value

if TYPE_CHECKING:
    import numpy as np
    import torch


ProbeKind = Literal["calibration", "random", "zeros", "constant", "saturating"]


class ParityCheck(Value):
    """A file beside the PyTorch candidate on inputs of one kind: of its outputs, the one that is furthest."""

    kind: ProbeKind
    """`calibration`: real inputs (noise where there are none). `random`: uniform in their range. `constant`: their
    smallest and their largest value everywhere. `saturating`: ten times as large as random ones."""
    output: str
    sqnr_db: float | None
    """None: bit for bit equal, or nothing but zeros."""
    judged_db: float | None
    """The error beside the larger of two powers, the output's own here and on calibration inputs: an output that is
    all but zero here has no SQNR to speak of. None: no error at all."""
    cosine: float | None
    top1_agreement: float | None
    max_abs_error: float
    samples: int


class Parity(Value):
    """How close an exported file's outputs are to the PyTorch candidate's on calibration inputs, and on others."""

    status: Literal["executed", "evaluated", "structure-only", "unchecked"]
    """Run by the format's own engine; carried out by mobilekit; only read back (`note` says why); not even that."""
    sqnr_db: float | None = None
    """None with status executed or evaluated: the outputs are bit for bit equal, so that the ratio is infinite."""
    cosine: float | None = None
    top1_agreement: float | None = None
    max_abs_error: float | None = None
    samples: int = 0
    note: str = ""
    checks: tuple[ParityCheck, ...] = ()
    """One for each kind of inputs, calibration inputs first; empty where the file was not run."""


class TensorSpec(Value):
    """A model file's input or output as an app sees it."""

    name: str
    shape: tuple[int, ...]
    """As the file has it; -1 for an axis that is left open."""
    dtype: str
    layout: str
    """Order of the file's axes, in the letters of PyTorch's order (NC, NCL, NCHW, NCDHW): what says NHWC has PyTorch's
    axis 1 last. Empty for other ranks, which are as PyTorch has them."""
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
    not_int8: dict[str, str] = Field(default_factory=dict)
    """Operators of a static int8 file's network that do not compute in int8, and why; empty without a trace."""


WeightForm = Literal["int8", "int4", "palette8", "palette6", "palette4", "palette2"]


class ExportOptions(Value):
    """How a file is written where there is a choice; what a format does not have is nothing to it.

    >>> ExportOptions(opset=17).io
    'float'
    """

    opset: int = Field(default=20, ge=17, le=22)
    """Of ONNX files."""
    ios: int | None = Field(default=None, ge=15, le=18)
    """The oldest iOS that runs Core ML files; None: 16, or 17 where they compute in int8."""
    target: Target = "host"
    """Processor that int8 ONNX files are for: unsigned activations where it is x86, signed ones where it is Arm."""
    dynamic_batch: bool = False
    """Whether the first axis of all inputs and outputs is left open; else it is 1."""
    weights: WeightForm = "int8"
    """How an int8 file stores weights. What is not int8 is for Core ML with float activations: `int4` has a scale for
    32 weights of a channel each, `palette4` an index of 4 bits into a table of k-means centres for each weight."""
    io: Literal["float", "int8"] = "float"
    """Type of an int8 file's inputs and outputs: float32, or int8 with the scales that the file states."""


@dataclass(frozen=True)
class ExportJob:
    """What a runtime is asked to write.

    `calibration` are float32 input batches that fix int8 ranges: an array, or a tuple of arrays where the network has
    several inputs; empty for float precisions.
    """

    candidate: Candidate | Untraced
    precision: Precision
    path: str
    calibration: tuple[np.ndarray | tuple[np.ndarray, ...], ...] = field(default=())
    options: ExportOptions = field(default_factory=ExportOptions)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """An example of each input of the network."""
        known = self.candidate
        return (known.example_input,) if isinstance(known, Candidate) else known.inputs
