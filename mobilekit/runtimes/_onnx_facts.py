"""What an ONNX file says about itself: its inputs, outputs and operators per precision."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mobilekit.documents import short
from mobilekit.errors import BadInputError
from mobilekit.types import FileFacts, TensorSpec

LAYOUTS = {2: "NC", 3: "NCL", 4: "NCHW", 5: "NCDHW"}
NOT_COMPUTING = frozenset(
    (
        *(
            "QuantizeLinear",
            "DequantizeLinear",
            "DynamicQuantizeLinear",
            "Constant",
            "ConstantOfShape",
            "Identity",
            "Cast",
            "CastLike",
        ),
        *("Shape", "Size", "Gather", "Range", "Expand", "Reshape", "Flatten", "Squeeze", "Unsqueeze"),
        *("Transpose", "Slice", "Split"),
    )
)
FUSED = frozenset(
    (
        *("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool"),
        *("Sigmoid", "LeakyRelu", "Softmax", "Resize"),
    )
)
"""Operators that ONNX Runtime replaces by an integer kernel between DequantizeLinear and QuantizeLinear."""
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
INTEGER = frozenset({"ConvInteger", "MatMulInteger"})
"""Operators on integers themselves, behind DynamicQuantizeLinear; what makes float of their sums belongs to them."""
SUMS = ("Gemm", "MatMul")
"""Operators whose integer kernel can write float."""
ABSORBED = ("Relu", "Clip")
"""Activations that vanish into the quantise node behind them: it clamps by itself."""


def describe(path: Path) -> FileFacts:
    """Read a file back. Raises BadInputError where it is no ONNX file."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if path.exists() and not path.is_file():
        raise BadInputError(f"cannot read {path} as an ONNX file (it is no plain file); export it again")
    try:
        # The structure says it all: a file of somebody else's may name any path as that of its weights.
        graph = onnx.load(str(path), load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise BadInputError(f"cannot read {path} as an ONNX file ({short(str(error))}); export it again") from None
    constants = {tensor.name for tensor in graph.initializer}
    try:
        return FileFacts(
            inputs=tuple(_spec(value) for value in graph.input if value.name not in constants),
            outputs=tuple(_spec(value) for value in graph.output),
            operators=count(graph),
            weights=weights(graph),
        )
    except (LookupError, ValueError) as error:  # a node without inputs, a type that there is not
        raise BadInputError(f"{path} is a damaged ONNX file ({short(str(error))}); export it again") from None


def _spec(value: Any) -> TensorSpec:
    from onnx import helper

    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return TensorSpec(name=value.name, shape=shape, dtype=dtype, layout=LAYOUTS.get(len(shape), ""))


def count(graph: Any) -> dict[str, int]:
    """Computing nodes per precision of their arithmetic.

    A node is int8 when it is of a type that ONNX Runtime fuses, all the data and weights that it reads come from
    DequantizeLinear, and all that reads its output is QuantizeLinear (behind a clamp that vanishes into it), or it is a
    linear layer that writes an output of the network; or when it is one of the operators on integers.
    """
    return _Reading(graph).operators()


def weights(graph: Any) -> dict[str, int]:
    """Nodes with constant weights, per precision that these are stored in."""
    return _Reading(graph).weights()


class _Reading:
    """A graph with the writer and the readers of every tensor."""

    def __init__(self, graph: Any) -> None:
        from onnx import TensorProto

        self.nodes = list(graph.node)
        self.producer = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        types = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.INT8: "int8"}
        types[TensorProto.UINT8] = "int8"
        self.constants = {t.name: types.get(t.data_type, "other") for t in graph.initializer}

    def operators(self) -> dict[str, int]:
        """Computing nodes per precision."""
        parts = self._parts_of_integer_operators()
        counts: Counter[str] = Counter()
        for node in self.nodes:
            if node.op_type in NOT_COMPUTING or id(node) in parts or _hands_on(node) or self._vanishes(node):
                continue
            # Files of other tools may hold half-float weights.
            halves = any(self.constants.get(name) == "fp16" for name in node.input)
            counts["int8" if self._is_int8(node) else "fp16" if halves else "fp32"] += 1
        return dict(sorted(counts.items()))

    def weights(self) -> dict[str, int]:
        """Nodes with constant weights per precision of these."""
        stored = [self._stored(n.input[1]) for n in self.nodes if n.op_type in WEIGHTED | INTEGER and len(n.input) > 1]
        return dict(sorted(Counter(precision for precision in stored if precision).items()))

    def _stored(self, name: str) -> str | None:
        """Precision of a constant, in front of its dequantise node where it has one; None: it is computed."""
        source = self.producer.get(name)
        if source is not None and source.op_type == "DequantizeLinear":
            name = source.input[0]
        return self.constants.get(name)

    def _is_int8(self, node: Any) -> bool:
        if node.op_type in INTEGER:
            return True
        return _has_kernel(node) and self._quantised_before(node) and self._quantised_after(node)

    def _vanishes(self, node: Any) -> bool:
        """A clamp between an int8 node and the quantise node behind it."""
        source = self.producer.get(node.input[0]) if node.op_type in ABSORBED else None
        fused = source is not None and source.op_type in FUSED and self._quantised_before(source)
        return fused and self._quantised_after(node)

    def _quantised_after(self, node: Any) -> bool:
        following = self.readers.get(node.output[0], [])
        if node.op_type in SUMS and not following:
            return True
        if len(following) == 1 and following[0].op_type in ABSORBED:
            following = self.readers.get(following[0].output[0], [])
        return bool(following) and all(reader.op_type == "QuantizeLinear" for reader in following)

    def _quantised_before(self, node: Any) -> bool:
        read = list(node.input)
        if node.op_type in WEIGHTED:
            read = read[:2]  # the bias is int32 in some files and float in others
        elif node.op_type not in ("Add", "Mul", "Concat"):
            read = read[:1]
        sources = [self.producer.get(name) for name in read]
        return all(source is not None and source.op_type == "DequantizeLinear" for source in sources)

    def _parts_of_integer_operators(self) -> set[int]:
        """Nodes that make float of integer sums: the cast, the scales and the bias."""
        parts: set[int] = set()
        for node in self.nodes:
            if node.op_type not in INTEGER:
                continue
            following = self.readers.get(node.output[0], [])
            while len(following) == 1 and following[0].op_type in ("Cast", "Mul"):
                step = following[0]
                parts.add(id(step))
                scales = [self.producer.get(name) for name in step.input[1:]]
                parts.update(id(s) for s in scales if s is not None and s.op_type == "Mul" and self._is_scale(s))
                following = self.readers.get(step.output[0], [])
                if step.op_type == "Mul":
                    break
            if len(following) == 1 and following[0].op_type == "Add" and following[0].input[1] in self.constants:
                parts.add(id(following[0]))
        return parts

    def _is_scale(self, node: Any) -> bool:
        sources = [self.producer.get(name) for name in node.input]
        return any(source is not None and source.op_type == "DynamicQuantizeLinear" for source in sources)


def _hands_on(node: Any) -> bool:
    """A Max of one tensor, which keeps two nodes apart."""
    return node.op_type == "Max" and len(node.input) == 1


def _has_kernel(node: Any) -> bool:
    """Whether the type, and for Resize the mode, is one that ONNX Runtime replaces."""
    mode = next((a.s for a in node.attribute if a.name == "mode"), b"nearest")
    return node.op_type in FUSED and (node.op_type != "Resize" or mode == b"nearest")
