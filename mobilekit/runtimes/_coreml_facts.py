"""What a Core ML package says about itself: its inputs, outputs and operators per precision."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mobilekit.documents import short
from mobilekit.errors import BadInputError
from mobilekit.runtimes._job import quiet
from mobilekit.types import FileFacts, TensorSpec

LAYOUTS = {4: "NCHW", 2: "NC"}
NOT_COMPUTING = frozenset(
    (
        *("const", "cast", "identity", "shape", "reshape", "transpose", "squeeze", "expand_dims", "flatten2d"),
        *("slice_by_index", "slice_by_size", "split", "gather", "stack", "range_1d", "fill", "quantize", "dequantize"),
    )
)
WEIGHTED = frozenset({"conv", "conv_transpose", "linear"})
NAMES = {"FLOAT32": "fp32", "FLOAT16": "fp16", "INT8": "int8", "UINT8": "int8"}


def describe(path: Path) -> FileFacts:
    """Read a package back. Raises BadInputError where it is none."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    with quiet(native=True):
        import coremltools

        try:
            description = coremltools.utils.load_spec(str(path))
        except (OSError, DecodeError, ValueError, RuntimeError) as error:
            said = short(str(error))
            raise BadInputError(f"cannot read {path} as a Core ML package ({said}); export it again") from None
    functions = description.mlProgram.functions
    if "main" not in functions:
        raise BadInputError(f"{path} holds no ML Program; export it again")
    try:
        return _facts(functions["main"])
    except (LookupError, ValueError) as error:  # a value that nothing writes, a type that there is not
        raise BadInputError(f"{path} is a damaged Core ML package ({short(str(error))}); export it again") from None


def _facts(main: Any) -> FileFacts:
    block = main.block_specializations[main.opset]
    written = {value.name: value for operation in block.operations for value in operation.outputs}
    return FileFacts(
        inputs=tuple(_spec(value) for value in main.inputs),
        outputs=tuple(_spec(written[name]) for name in block.outputs),
        operators=_count(block),
        weights=_weights(block),
    )


def _type(value: Any) -> str:
    from coremltools.proto import MIL_pb2

    return str(MIL_pb2.DataType.Name(value.type.tensorType.dataType))


def _spec(value: Any) -> TensorSpec:
    shape = tuple(int(size.constant.size) for size in value.type.tensorType.dimensions)
    return TensorSpec(name=value.name, shape=shape, dtype=_type(value).lower(), layout=LAYOUTS.get(len(shape), ""))


def _count(block: Any) -> dict[str, int]:
    """Computing operators: int8 where a weight is unpacked from int8, else by the type of what they write."""
    unpacked = {
        value.name
        for operation in block.operations
        if operation.type.startswith("constexpr_")
        for value in operation.outputs
    }
    counts: Counter[str] = Counter()
    for operation in block.operations:
        if operation.type in NOT_COMPUTING or operation.type.startswith("constexpr_"):
            continue
        read = {binding.name for argument in operation.inputs.values() for binding in argument.arguments}
        counts["int8" if read & unpacked else NAMES.get(_type(operation.outputs[0]), "other")] += 1
    return dict(sorted(counts.items()))


def _weights(block: Any) -> dict[str, int]:
    """Convolutions and linear layers per type that their weights are stored in."""
    written = {value.name: operation for operation in block.operations for value in operation.outputs}
    counts: Counter[str] = Counter()
    for operation in block.operations:
        if operation.type in WEIGHTED:
            source = written[operation.inputs["weight"].arguments[0].name]
            unpacked = source.type.startswith("constexpr_")
            counts["int8" if unpacked else NAMES.get(_type(source.outputs[0]), "other")] += 1
    return dict(sorted(counts.items()))
