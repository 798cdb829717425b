"""What a TFLite file says about itself: its inputs, outputs and operators per precision."""

from __future__ import annotations

import struct
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from mobilekit.documents import short
from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.types import FileFacts, TensorSpec

LAYOUTS = {2: "NC", 3: "NCL", 4: "NHWC", 5: "NCDHW"}
NOT_COMPUTING = frozenset(
    (
        *("QUANTIZE", "DEQUANTIZE", "RESHAPE", "SQUEEZE", "EXPAND_DIMS", "TRANSPOSE", "SHAPE", "CAST", "FILL"),
        *("SLICE", "STRIDED_SLICE", "SPLIT", "SPLIT_V", "GATHER", "PACK", "UNPACK", "RANGE", "BROADCAST_TO"),
    )
)


def schema() -> Any:
    """The generated classes of the file format. Raises UnsupportedError where the package is missing."""
    try:
        from ai_edge_litert import schema_py_generated
    except ModuleNotFoundError:
        raise UnsupportedError('TFLite files need ai-edge-litert: pip install "mobilekit[tflite]"') from None
    return schema_py_generated


@cache
def _names(enum: str) -> dict[int, str]:
    members = vars(getattr(schema(), enum)).items()
    return {value: name for name, value in members if isinstance(value, int)}


def describe(path: Path) -> FileFacts:
    """Read a file back. Raises BadInputError where it is no TFLite file."""
    if path.exists() and not path.is_file():
        raise BadInputError(f"cannot read {path} as a TFLite file (it is no plain file); export it again")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInputError(f"cannot read {path} ({error}); export it again") from None
    if content[4:8] != b"TFL3":
        raise BadInputError(f"{path} is not a TFLite file; export it again")
    try:
        model = schema().Model.GetRootAs(content, 0)
        graph = model.Subgraphs(0)
        tensors = [graph.Tensors(i) for i in range(graph.TensorsLength())]
        reading = _Reading(model, graph, tensors)
        return FileFacts(
            inputs=tuple(_spec(tensors[i]) for i in graph.InputsAsNumpy()),
            outputs=tuple(_spec(tensors[i]) for i in graph.OutputsAsNumpy()),
            operators=reading.counts(),
            weights=reading.weights(),
        )
    except (struct.error, LookupError, TypeError, ValueError, AttributeError) as error:
        raise BadInputError(f"{path} is a damaged TFLite file ({short(str(error))}); export it again") from None


def _spec(tensor: Any) -> TensorSpec:
    shape = tuple(int(n) for n in tensor.ShapeAsNumpy()) if tensor.ShapeLength() else ()
    if tensor.ShapeSignatureLength():  # of other tools' files: ours are static
        shape = tuple(int(n) for n in tensor.ShapeSignatureAsNumpy())
    quantised = tensor.Quantization()
    has_scale = quantised is not None and quantised.ScaleLength() > 0
    return TensorSpec(
        name=tensor.Name().decode(),
        shape=shape,
        dtype=_names("TensorType")[tensor.Type()].lower(),
        layout=LAYOUTS.get(len(shape), ""),
        scale=float(quantised.Scale(0)) if has_scale else None,
        zero_point=int(quantised.ZeroPoint(0)) if has_scale else None,
    )


PRECISIONS = {"INT8": "int8", "UINT8": "int8", "FLOAT32": "fp32", "FLOAT16": "fp16"}
WEIGHTED = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"})
"""Operators whose second input is a weight."""


class _Reading:
    """A file's operators by name, with the types of what they read and write."""

    def __init__(self, model: Any, graph: Any, tensors: list[Any]) -> None:
        self.types = [_names("TensorType")[tensor.Type()] for tensor in tensors]
        self.operators = []
        self.sources: dict[int, tuple[str, list[int]]] = {}
        for i in range(graph.OperatorsLength()):
            operator = graph.Operators(i)
            code = model.OperatorCodes(operator.OpcodeIndex())
            name = _names("BuiltinOperator")[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
            inputs = [operator.Inputs(j) for j in range(operator.InputsLength())]
            outputs = [operator.Outputs(j) for j in range(operator.OutputsLength())]
            self.operators.append((name, inputs, outputs))
            self.sources.update(dict.fromkeys(outputs, (name, inputs)))

    def counts(self) -> dict[str, int]:
        """Computing operators per type of what they write (or, for comparisons, of what they read).

        One that reads int8 weights and writes floats quantises its input by itself: its arithmetic is int8.
        """
        found: Counter[str] = Counter()
        for name, inputs, outputs in self.operators:
            if name in NOT_COMPUTING:
                continue
            kinds = [self.types[end] for end in (outputs[0], *inputs) if end >= 0]
            precision = next((PRECISIONS[kind] for kind in kinds if kind in PRECISIONS), "other")
            found["int8" if name in WEIGHTED and self.types[inputs[1]] == "INT8" else precision] += 1
        return dict(sorted(found.items()))

    def weights(self) -> dict[str, int]:
        """Operators with weights per type that these are stored in."""
        found: Counter[str] = Counter()
        for name, inputs, _ in self.operators:
            if name in WEIGHTED:
                source, read = self.sources.get(inputs[1], ("", []))
                stored = read[0] if source == "DEQUANTIZE" else inputs[1]
                found[PRECISIONS.get(self.types[stored], "other")] += 1
        return dict(sorted(found.items()))
