"""An ONNX graph while it is put together, and the place in it where one operator of a network is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mobilekit.errors import UnsupportedError
from mobilekit.types import OperatorShape

INPUT = "input"
"""Name of the graph's only input."""
OPSET, IR_VERSION = 20, 10
FLAT, MAP = 2, 4
"""Ranks of tensors: (1, C) and (1, C, H, W)."""


@dataclass
class Node:
    """One ONNX node; `operator` is the operator of the network that it belongs to, "" for none."""

    op: str
    name: str
    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Graph:
    """Nodes in order. A tensor is named after the node that writes it: `NODE/out`, `NODE/out_1` and so on."""

    input_shape: tuple[int, ...]
    input_type: type[np.generic] = np.float32
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Weights that are still to be drawn: name -> shape (outputs first)."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __post_init__(self) -> None:
        self.shapes[INPUT] = self.input_shape

    def add(
        self, node: str, op: str, inputs: list[str], shapes: list[tuple[int, ...]], **attributes: Any
    ) -> tuple[str, ...]:
        """Append the node `OPERATOR` or `OPERATOR/PART` with an output of each shape; gives their names."""
        outputs = [f"{node}/out{f'_{i}' if i else ''}" for i in range(len(shapes))]
        self.shapes.update(zip(outputs, shapes, strict=True))
        self.nodes.append(Node(op, node, node.partition("/")[0], list(inputs), outputs, attributes))
        return tuple(outputs)

    def constant(self, name: str, values: Any, dtype: type[np.generic] = np.float32) -> str:
        """Keep an array under the name; gives the name."""
        self.constants[name] = np.asarray(values, dtype)
        return name

    def sign(self) -> None:
        """Let all unsigned 8-bit numbers, zero points among them, be signed ones: the same values, 128 less."""
        for name, array in self.constants.items():
            if array.dtype == np.uint8:
                self.constants[name] = (array.astype(np.int16) - 128).astype(np.int8)

    def model(self, outputs: list[str], output_type: type[np.generic] = np.float32) -> Any:
        """The graph as an onnx.ModelProto with opset 20; float weights are drawn now."""
        from onnx import helper, numpy_helper

        for name, shape in self.weights.items():
            self.constants[name] = self._drawn(shape)
        given = [_value(INPUT, self.shapes[INPUT], self.input_type)]
        results = [_value(name, self.shapes[name], output_type) for name in outputs]
        nodes = [helper.make_node(n.op, n.inputs, n.outputs, name=n.name, **n.attributes) for n in self.nodes]
        tensors = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        made = helper.make_graph(nodes, "sketch", given, results, tensors)
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    def _drawn(self, shape: tuple[int, ...]) -> np.ndarray:
        """Uniform weights that keep the variance of what they read: no depth ends in infinities or subnormals."""
        limit = np.float32(weight_limit(shape))
        values = self.random.random(shape, np.float32)
        values -= np.float32(0.5)
        values *= 2 * limit
        return values


@dataclass(frozen=True)
class Place:
    """Where an operator is written: its graph, name and shape, the tensors it reads, and whether it is int8."""

    graph: Graph
    name: str
    shape: OperatorShape
    sources: tuple[str, ...]
    int8: bool

    def node(self, op: str, inputs: list[str], shape: tuple[int, ...], part: str = "", **attributes: Any) -> str:
        """Append a node with one output; the operator's main node has no `part`. Gives the output."""
        name = f"{self.name}/{part}" if part else self.name
        return self.graph.add(name, op, inputs, [shape], **attributes)[0]

    def constant(self, part: str, values: Any, dtype: type[np.generic] = np.float32) -> str:
        """Keep an array that belongs to the operator; gives its name."""
        return self.graph.constant(f"{self.name}/{part}", values, dtype)

    def weights(self, shape: tuple[int, ...], count: int) -> list[str]:
        """Names of a weight of this shape and of a bias of `count` values."""
        self.graph.weights[f"{self.name}/weight"] = shape
        return [f"{self.name}/weight", self.constant("bias", np.full(count, 0.1))]

    def refuse(self, why: str) -> UnsupportedError:
        """The error for an operator that cannot be written."""
        return UnsupportedError(f"operator {self.name} ({self.shape.kind}) cannot be written for ONNX Runtime: {why}")

    def reshaped(self, source: str, shape: tuple[int, ...], part: str = "reshape") -> str:
        """The tensor in another shape with as many entries, behind a Reshape where it has another."""
        found = self.graph.shapes[source]
        if found == shape:
            return source
        if math.prod(found) != math.prod(shape):
            raise self.refuse(f"it reads {shape[1:]} where {found[1:]} is given")
        wanted = self.constant(f"{part}_shape", shape, np.int64)
        return self.node("Reshape", [source, wanted], shape, part, allowzero=1)

    def map(self, index: int = 0, padded: bool = False) -> str:
        """The index-th source as a map of the operator's in_channels and in_size.

        `padded`: in_size may be larger than the map, by a padding that runtimes fold into the operator.
        """
        source = self.sources[index]
        found = self.graph.shapes[source]
        if padded and len(found) == MAP and found[1] == self.shape.in_channels:
            return source
        return self.reshaped(source, (1, self.shape.in_channels, *self.shape.in_size), f"reshape_{index}")

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """Shape of the map that the operator gives."""
        return (1, self.shape.out_channels, *self.shape.out_size)


def weight_limit(shape: tuple[int, ...]) -> float:
    """The largest weight of a layer whose weight has this shape (outputs first)."""
    return math.sqrt(3 / math.prod(shape[1:]))


def _value(name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))
