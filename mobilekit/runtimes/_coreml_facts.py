"""What a Core ML package says about itself: its inputs, outputs and operators per precision."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from mobilekit.errors import BadInputError
from mobilekit.runtimes._mil_program import Operation, Program, TensorType, read
from mobilekit.types import FileFacts, TensorSpec

LAYOUTS = {2: "NC", 3: "NCL", 4: "NCHW", 5: "NCDHW"}
NOT_COMPUTING = frozenset(
    (
        *("cast", "identity", "shape", "reshape", "transpose", "squeeze", "expand_dims", "flatten2d"),
        *("slice_by_index", "slice_by_size", "split", "gather", "stack", "range_1d", "fill", "quantize", "dequantize"),
    )
)
WEIGHTED = frozenset({"conv", "conv_transpose", "linear"})
DTYPES = {"fp32": "float32", "fp16": "float16", "fp64": "float64"}
NAMES = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "uint8": "int8", "int4": "int4", "uint4": "int4"}
DATA = {
    "constexpr_affine_dequantize": "quantized_data",
    "constexpr_blockwise_shift_scale": "data",
    "constexpr_sparse_blockwise_shift_scale": "nonzero_data",
    "constexpr_cast": "source_val",
    "dequantize": "input",
}
"""Operation that unpacks weights -> the parameter that holds them."""


def describe(path: Path) -> FileFacts:
    """Read a package back. Raises BadInputError where it is none."""
    program = read(path)
    facts = _Facts(program)
    try:
        operators, weights = facts.operators(), facts.weights()
    except (LookupError, ValueError, StopIteration):
        raise BadInputError(f"{path} has operators without what they need, such as weights; export it again") from None
    return FileFacts(
        inputs=tuple(_spec(tensor) for tensor in program.inputs),
        outputs=tuple(_spec(tensor) for tensor in program.outputs),
        operators=operators,
        weights=weights,
    )


def _spec(tensor: TensorType) -> TensorSpec:
    shape = tuple(-1 if size is None else size for size in tensor.shape)
    dtype = DTYPES.get(tensor.elements, tensor.elements)
    return TensorSpec(name=tensor.name, shape=shape, dtype=dtype, layout=LAYOUTS.get(len(shape), ""))


class _Facts:
    """Counts over one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.writers = {output.name: each for each in program.operations for output in each.outputs}
        self.readers: dict[str, list[str]] = {}
        for each in program.operations:
            for name in each.reads():
                self.readers.setdefault(name, []).append(each.kind)
        self.fixed = set(program.constants)
        for each in program.operations:
            if all(name in self.fixed for name in each.reads()):
                self.fixed |= {output.name for output in each.outputs}

    def operators(self) -> dict[str, int]:
        """Computing operators: int8 where `_is_int8` says so, else by the type of what they write."""
        counts: Counter[str] = Counter()
        int8: set[str] = set()
        for each in self.program.operations:
            if each.kind in NOT_COMPUTING or each.name in self.fixed:
                continue
            if self._is_int8(each, int8):
                int8.add(each.name)
                counts["int8"] += 1
            else:
                precision = NAMES.get(each.outputs[0].elements, "other")
                counts[precision if precision in DTYPES else "other"] += 1
        return dict(sorted(counts.items()))

    def _is_int8(self, operation: Operation, int8: set[str]) -> bool:
        """Whether an operator has int8 weights, or int8 on every side.

        One without weights is int8 where everything that it reads was int8 before, or where it stands between an int8
        operator that only it reads and a quantise operator: it is part of that operator's kernel then.
        """
        if operation.kind in WEIGHTED and operation.arguments["weight"][0] in self.fixed:
            return self._stored(operation.arguments["weight"][0]).endswith("int8")
        sources = [name for name in operation.reads() if name not in self.fixed]
        kinds = [self.writers[name].kind if name in self.writers else "input" for name in sources]
        if sources and all(kind == "dequantize" for kind in kinds):
            return True
        quantised = self.readers.get(operation.name, [])
        return (
            len(sources) == 1
            and sources[0] in int8
            and len(self.readers[sources[0]]) == 1
            and bool(quantised)
            and all(kind == "quantize" for kind in quantised)
        )

    def weights(self) -> dict[str, int]:
        """Convolutions and linear layers by how their weights are stored; weights that are computed are left out."""
        sources = [each.arguments["weight"][0] for each in self.program.operations if each.kind in WEIGHTED]
        return dict(sorted(Counter(self._stored(name) for name in sources if name in self.fixed).items()))

    def _stored(self, name: str) -> str:
        """How a constant is stored: int8, int4, palette4 (16 values), fp16; "sparse" before it where zeros are not."""
        if name in self.program.constants:
            return NAMES.get(self.program.constants[name].type.elements, "other")
        writer = self.writers[name]
        if writer.kind == "constexpr_sparse_to_dense":
            return f"sparse-{self._stored(writer.arguments['nonzero_data'][0])}"
        if writer.kind in ("constexpr_lut_to_dense", "constexpr_lut_to_sparse"):
            return f"palette{self._index_bits(writer)}"
        if writer.kind in DATA:
            return self._stored(writer.arguments[DATA[writer.kind]][0])
        return NAMES.get(writer.outputs[0].elements, "other")

    def _index_bits(self, operation: Operation) -> int:
        """Bits of an index into a look-up table: (entries,) in iOS 16, (*blocks, entries, vector) in iOS 18."""
        name = operation.arguments["lut"][0]
        constant = self.program.constants.get(name)
        if constant is None:
            writer = self.writers[name]
            shape = next(output.shape for output in writer.outputs if output.name == name)
        else:
            shape = constant.type.shape
        entries = shape[-2] if len(shape) > 1 else shape[0]
        return round(math.log2(entries or 1))
