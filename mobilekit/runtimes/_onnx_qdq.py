"""Puts quantise and dequantise nodes into a graph, where onnxruntime's static quantiser would put them."""

from __future__ import annotations

from collections import Counter

import numpy as np

from mobilekit.runtimes._onnx_graph import INPUT, Graph, Node, weight_limit

INT8_TYPES = (
    *("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Softmax"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Split"),
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"),
)
"""ONNX operators that ONNX Runtime runs in int8 (or removes) between quantise nodes.

Found by optimising one of each."""
BARRIER = "Max"
"""With one input it hands that on. ONNX Runtime removes identities, and not this one."""
WEIGHTED = frozenset({"Conv", "Gemm"})
CLAMPS = frozenset({"Relu", "Clip"})
PASSING = frozenset(
    {"MaxPool", "AveragePool", "Resize", "Split", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"}
)
"""They keep the scale of what they read."""
RANGES = {
    **dict.fromkeys(CLAMPS, (0.0, 6.0)),
    **dict.fromkeys(("Sigmoid", "HardSigmoid", "Softmax"), (0.0, 1.0)),
}
"""Operator that wrote a tensor -> its least and largest value; others hold both signs."""
SIGNED = (-6.4, 6.35)


def quantise(graph: Graph, operators: set[str], outputs: list[str]) -> None:
    """Let the nodes of these operators run in int8: unsigned activations, signed weights a scale per channel.

    As in onnxruntime.quantization (QDQQuantizer), a tensor is quantised once and all its readers read it
    dequantised; clamps vanish into the quantise node behind them; a node that only moves data stays in float where
    nothing in front of it is int8, unless it reads the network's input. `outputs` are the graph's output tensors.
    """
    marks = _Marks(graph, operators, outputs)
    marks.fill()
    nodes: list[Node] = []
    if INPUT in marks.sources:
        nodes += _pair(graph, marks, INPUT)
    for node in graph.nodes:
        if node.name in marks.removed:
            continue
        int8 = node.operator in operators and node.op in INT8_TYPES
        reads = [_dequantised(name) if name in marks.sources else name for name in node.inputs]
        if int8 and node.op in WEIGHTED:
            nodes += _weights(graph, node, marks.scale(node.inputs[0])[0])
            reads[1:] = [f"{name}_dequantized" for name in node.inputs[1:]]
        elif node.op in WEIGHTED and node.inputs[0] in marks.sources:
            # as in `_onnx_int8`: without it, ONNX Runtime rounds these weights too
            nodes.append(Node(BARRIER, f"{node.name}/float", node.operator, reads[:1], [f"{reads[0]}_float"]))
            reads[0] = f"{reads[0]}_float"
        elif int8 and node.op in ("Add", "Mul"):
            nodes += [_constant(graph, name) for name in node.inputs if name in graph.constants]
            reads = [f"{name}_dequantized" if name in graph.constants else name for name in reads]
        writes = [_raw(name) if name in marks.sources and name in outputs else name for name in node.outputs]
        nodes.append(Node(node.op, node.name, node.operator, reads, writes, node.attributes))
        for name in node.outputs:
            if name in marks.sources:
                nodes += _pair(graph, marks, name, name in outputs)
    graph.nodes = nodes


class _Marks:
    """Which tensors are quantised, each with the tensor whose scale it shares (itself where it has its own)."""

    def __init__(self, graph: Graph, operators: set[str], outputs: list[str]) -> None:
        self.graph, self.operators, self.outputs = graph, operators, outputs
        self.sources: dict[str, str] = {}
        self.removed: set[str] = set()
        self.readers = Counter(name for node in graph.nodes for name in set(node.inputs))
        self.writers = {name: node for node in graph.nodes for name in node.outputs}
        self.origins = {name: node.op for name, node in self.writers.items()}
        self.order = {name: i for i, name in enumerate(graph.shapes)}
        self.ranges: dict[str, tuple[float, float]] = {}

    def fill(self) -> None:
        """Visit the nodes in order, as the quantiser does: what a node does depends on those in front of it."""
        for node in self.graph.nodes:
            if node.operator not in self.operators or node.op not in INT8_TYPES:
                continue
            if node.op in CLAMPS:
                self._clamp(node)
            elif node.op in PASSING:
                self._pass_on(node)
            elif node.op in WEIGHTED:
                # as in `_onnx_int8`: a linear layer that writes an output of the network writes it in float
                sums = node.op == "Gemm" and node.outputs[0] in self.outputs and not self.readers[node.outputs[0]]
                self._mark(node.inputs[0], *([] if sums else node.outputs[:1]))
            else:
                self._mark(*node.inputs, *node.outputs)

    def scale(self, tensor: str) -> tuple[float, int]:
        """Scale and zero point of a quantised tensor."""
        low, high = self._range(tensor)
        return (high - low) / 255, round(-low * 255 / (high - low))

    def owner(self, tensor: str) -> str:
        """The tensor whose scale and zero point this one shares."""
        source = self.sources[tensor]
        return tensor if source == tensor else self.owner(source)

    def _range(self, tensor: str) -> tuple[float, float]:
        """Least and largest value. No two tensors have the same by chance, and older ones have more.

        A concatenation's range covers what it joins, so that it is mostly that of one part: that part is copied as
        it is, the others are converted, as in calibrated files.
        """
        owner = self.owner(tensor)
        if owner not in self.ranges:
            low, high = RANGES.get(self.origins.get(owner, ""), SIGNED)
            wide = 2000 / (1000 + self.order[owner])
            self.ranges[owner] = (low * wide, high * wide)
            parts = self.writers[owner].inputs if self.origins.get(owner) == "Concat" else []
            if parts and all(part in self.sources for part in parts):
                lows, highs = zip(*(self._range(part) for part in parts), strict=True)
                self.ranges[owner] = (min(lows), max(highs))
        return self.ranges[owner]

    def _mark(self, *tensors: str) -> None:
        for tensor in tensors:
            if tensor in self.order:
                self.sources.setdefault(tensor, tensor)

    def _clamp(self, node: Node) -> None:
        source, result = node.inputs[0], node.outputs[0]
        if source == INPUT:
            self._mark(source)
        if source not in self.sources:
            return
        writer = self.writers.get(source)
        if writer is not None and self.readers[source] == 1 and source not in self.outputs:
            writer.outputs[writer.outputs.index(source)] = result
            self.writers[result] = writer
            self.removed.add(node.name)
            del self.sources[source]
        self._mark(result)

    def _pass_on(self, node: Node) -> None:
        source = node.inputs[0]
        if node.op == "Split" or source == INPUT:
            self._mark(source)
        if source in self.sources:
            self.sources.update(dict.fromkeys(node.outputs, source))


def _pair(graph: Graph, marks: _Marks, tensor: str, is_output: bool = False) -> list[Node]:
    """The quantise and dequantise node behind a tensor."""
    scale, zero = marks.scale(tensor)
    owner = marks.owner(tensor)
    numbers = [graph.constant(f"{owner}_scale", scale), graph.constant(f"{owner}_zero", zero, np.uint8)]
    operator = "" if tensor == INPUT else tensor.partition("/")[0]
    place, _, number = tensor.partition("/out")
    result = tensor if is_output else _dequantised(tensor)
    raw, low = _raw(tensor) if is_output else tensor, f"{tensor}_quantized"
    return [
        Node("QuantizeLinear", f"{place}/quantize{number}", operator, [raw, *numbers], [low]),
        Node("DequantizeLinear", f"{place}/dequantize{number}", operator, [low, *numbers], [result]),
    ]


def _dequantised(tensor: str) -> str:
    return f"{tensor}_dequantized"


def _raw(tensor: str) -> str:
    """What an output of the graph is called before it is quantised."""
    return f"{tensor}_float"


def _weights(graph: Graph, node: Node, input_scale: float) -> list[Node]:
    """int8 weight and int32 bias in place of the float ones, behind dequantise nodes."""
    weight, *rest = node.inputs[1:]
    shape = graph.weights.pop(weight)
    scales = np.full(shape[0], weight_limit(shape) / 127, np.float32)
    graph.constants[weight] = graph.random.integers(-127, 128, shape, np.int8)
    nodes = [_dequantise(graph, node, weight, scales)]
    for bias in rest:
        scales = scales * np.float32(input_scale)
        graph.constants[bias] = np.round(graph.constants[bias] / scales).astype(np.int32)
        nodes.append(_dequantise(graph, node, bias, scales))
    return nodes


def _dequantise(graph: Graph, node: Node, name: str, scales: np.ndarray) -> Node:
    zeros = np.zeros_like(scales, graph.constants[name].dtype)
    numbers = [graph.constant(f"{name}_scale", scales), graph.constant(f"{name}_zero", zeros, zeros.dtype.type)]
    return Node(
        "DequantizeLinear", f"{name}_dequantize", node.operator, [name, *numbers], [_dequantised(name)], {"axis": 0}
    )


def _constant(graph: Graph, name: str) -> Node:
    """A positive number that an operator reads beside its data, as one byte."""
    value = graph.constants[name]
    numbers = [graph.constant(f"{name}_scale", value.max() / 255), graph.constant(f"{name}_zero", 0, np.uint8)]
    graph.constants[name] = np.full_like(value, 255, np.uint8)
    operator = name.partition("/")[0]
    return Node("DequantizeLinear", f"{name}_dequantize", operator, [name, *numbers], [_dequantised(name)])
