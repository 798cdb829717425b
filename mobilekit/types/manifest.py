"""What an app reads about the model files beside it: tensors, preprocessing, labels, golden vectors."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool, model_validator

from mobilekit.types.models import Parity, TensorSpec
from mobilekit.types.plan import QuantSpec
from mobilekit.types.values import NonNegative, Positive, Precision, RuntimeName, Value

FileName = Annotated[str, Field(pattern=r"^[^./\\:\x00-\x1f\x7f][^/\\:\x00-\x1f\x7f]*$", max_length=255)]
"""A plain name, so that no path leads out of the folder."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, lt=1 << 53)]
"""Bytes. Every reader of JSON holds integers up to 2^53."""
Extent = Annotated[int, Field(ge=1, lt=1 << 31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
FLOAT32_BYTES = 4
MOST_DIMENSIONS = 8
Interpolation = Literal["nearest", "bilinear", "bicubic", "area", "lanczos"]


class _Described(BaseModel):
    """A frozen value whose further keys are kept as they are: what a workload says beyond what is known here."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)


class Resize(_Described):
    """How a picture is scaled before it is cropped: to a length of its shorter side, or to a size."""

    shorter_side: Extent | None = None
    size: tuple[Extent, Extent] | None = None
    """Height and width."""
    interpolation: Interpolation | None = None
    antialias: StrictBool | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Resize:
        if (self.shorter_side is None) == (self.size is None):
            raise ValueError("give shorter_side or size, and not both")
        return self


class Preprocessing(_Described):
    """What is done to a picture before the network sees it: resize, crop, then (pixel - mean) / std.

    What is None was not stated. Further keys are kept.

    >>> Preprocessing(mean=[127.0], std=[128.0], input_range=[0, 255]).std
    (128.0,)
    """

    resize: Resize | None = None
    crop: Literal["centre", "none"] | None = None
    """How the resized picture is cut to `input_size`."""
    input_size: tuple[Extent, Extent] | None = None
    """Height and width that the network takes."""
    channels: Extent | None = None
    channel_order: Literal["RGB", "BGR", "gray"] | None = None
    input_range: tuple[Finite, Finite] | None = None
    """Least and largest value of a pixel that `mean` and `std` are meant for: 0 and 255, or 0 and 1."""
    mean: Annotated[tuple[Finite, ...], Field(min_length=1)] | None = None
    """One for each channel, in the channel order."""
    std: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    """One for each channel, in the channel order."""
    layout: Literal["NCHW", "NHWC"] | None = None
    """Of the result, before a model file's own layout is looked at."""

    @model_validator(mode="after")
    def _agree(self) -> Preprocessing:
        known = {"RGB": 3, "BGR": 3, "gray": 1}
        stated = {
            "channels": self.channels,
            "channel_order": known.get(self.channel_order or ""),
            "mean": None if self.mean is None else len(self.mean),
            "std": None if self.std is None else len(self.std),
        }
        counts = {name: count for name, count in stated.items() if count is not None}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"the numbers of channels contradict each other: {said}")
        if self.input_range is not None and not self.input_range[0] < self.input_range[1]:
            raise ValueError("input_range is the least and the largest value of a pixel, in this order")
        return self


class GoldenTensor(Value):
    """An input or output of the golden samples: float32, little-endian, C order, from `offset` of the file on."""

    name: str
    offset: Size
    shape: Annotated[tuple[Extent, ...], Field(min_length=1, max_length=MOST_DIMENSIONS)]
    """The samples come first."""
    dtype: Literal["float32"] = "float32"
    layout: str
    """NCHW for maps, NC for rows, empty for others."""

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.offset + FLOAT32_BYTES * math.prod(self.shape)


class Golden(Value):
    """Inputs and outputs of the PyTorch network that the files were exported from, in one binary file."""

    path: FileName
    sha256: Sha256
    size_bytes: Size
    samples: Extent
    inputs: Annotated[tuple[GoldenTensor, ...], Field(min_length=1)]
    outputs: Annotated[tuple[GoldenTensor, ...], Field(min_length=1)]
    of: str

    @model_validator(mode="after")
    def _inside(self) -> Golden:
        for tensor in (*self.inputs, *self.outputs):
            if tensor.end > self.size_bytes:
                raise ValueError(f"the golden tensor '{tensor.name}' ends behind the file's {self.size_bytes} bytes")
            if tensor.shape[0] != self.samples:
                raise ValueError(f"the golden tensor '{tensor.name}' does not hold {self.samples} samples")
        return self


class ManifestModel(Value):
    """A model file. Its inputs and outputs are in the order of the golden ones."""

    path: FileName
    runtime: RuntimeName
    precision: Precision
    sha256: Sha256
    """Of the file; of a package folder, over its files in order of name: each name, a zero byte, and its content."""
    size_bytes: Size
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    operators: dict[str, int]
    parity: Parity
    """How close this file's outputs are to the PyTorch network's, as measured where it was exported."""
    tolerance: NonNegative | None
    """Largest absolute difference to the golden outputs that is to be expected of a sound device; None: this file
    could not be run where it was exported."""
    quantisation: QuantSpec | None = None
    """Which operators are in int8 and how; None: a float file."""


class Manifest(BaseModel):
    """Everything that `manifest.json` holds (schema 2)."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())

    schema_number: Literal[2] = Field(default=2, alias="schema")
    mobilekit_version: str
    models: tuple[ManifestModel, ...]
    preprocessing: Preprocessing | None
    """None: the workload does not say."""
    labels: tuple[str, ...] | None
    """Names of the classes in the order of the output; None: the workload does not say."""
    golden: Golden

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        paths = [self.golden.path, *(model.path for model in self.models)]
        if len(set(paths)) < len(paths):
            raise ValueError("a file is listed twice")
        for model in self.models:
            ends = (len(model.inputs), len(model.outputs))
            if ends != (len(self.golden.inputs), len(self.golden.outputs)):
                raise ValueError(
                    f"the golden vectors are not for the {ends[0]} inputs and {ends[1]} outputs of its files"
                )
        return self
