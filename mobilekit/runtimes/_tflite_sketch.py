"""Builds a TFLite model of a network's structure with random weights, for timing it without the network's weights."""

from __future__ import annotations

from collections import Counter

from mobilekit.errors import UnsupportedError
from mobilekit.runtimes import _tflite_activations as activations
from mobilekit.runtimes._shape import plain
from mobilekit.runtimes._tflite_layers import build
from mobilekit.runtimes._tflite_windows import Step
from mobilekit.runtimes._tflite_writer import Activation, Writer
from mobilekit.types import Network, Operator, OperatorShape

INPUT = "input"
FOLDING = ("conv", "linear")
"""Kinds into whose weights the converter folds a factor in front of them."""


def int8_refusal(shape: OperatorShape) -> str | None:
    """Why an operator is not int8 in TFLite files; None: it is.

    Found by quantising one of each. A float-only activation behind an int8 convolution is no refusal: the
    convolution runs in int8, and a sketch holds the activation's way through float32 with it.
    """
    if shape.kind == "other":
        return "ai-edge-quantizer leaves operators of unknown kind in float32"
    if shape.kind == "activation" and plain(shape.activation) not in (None, *activations.INT8):
        return f"ai-edge-quantizer leaves {shape.activation} in float32 where it stands alone"
    return None


def sketch(network: Network) -> bytes:
    """The network as a flatbuffer of batch 1 with channels last, as the exporter writes it.

    Each operator runs in its precision of the network: a quantise or dequantise operator stands where it differs
    from what is read, shared by all who read that. Input and output are float32, as in exported files, but for
    operators of kind quantize and dequantize. Raises UnsupportedError for an operator that cannot be built.
    """
    return _Sketch(network).content()


class _Sketch:
    """The walk over the operators."""

    def __init__(self, network: Network) -> None:
        self.network, self.writer = network, Writer()
        self.readers: dict[str, list[Operator]] = {}
        for operator in network.operators:
            for source in dict.fromkeys(operator.inputs):
                self.readers.setdefault(source, []).append(operator)
        self.results: dict[str, Activation] = {}
        self.casts: dict[str, Activation] = {}
        self.taken: Counter[str] = Counter()

    def content(self) -> bytes:
        """The whole file."""
        if not self.network.operators:
            raise UnsupportedError(f"the network {self.network.name} has no operators, so there is nothing to build")
        source = self._input()
        for operator in self.network.operators:
            self._add(operator)
        outputs = [self._output(o) for o in self.network.operators if o.name not in self.readers]
        return self.writer.tables.file([source.index], outputs)

    def _input(self) -> Activation:
        batch, channels, *sizes = self.network.input_shape
        dims = (batch, *sizes, channels) if sizes else (batch, channels)
        int8 = all(operator.kind == "dequantize" for operator in self.readers.get(INPUT, ()))
        self.results[INPUT] = self.writer.activation(INPUT, dims, int8)
        self._note_readers(INPUT, int8)
        return self.results[INPUT]

    def _add(self, operator: Operator) -> None:
        shape, int8 = self.network.shape(operator), self.network.precision(operator) == "int8"
        if self.network.precision(operator) not in ("fp32", "int8"):
            precision = self.network.precision(operator)
            raise UnsupportedError(
                f"{operator.name} is planned in {precision}: TFLite files are written in fp32 and int8"
            )
        missing = [name for name in operator.inputs if name not in self.results]
        if missing or not operator.inputs:
            raise UnsupportedError(
                f"{operator.name} reads {missing or 'nothing'}, which no operator in front of it writes"
            )
        readers = self.readers.get(operator.name, [])
        inputs = tuple(self._given(name, _reads_int8(operator, int8)) for name in operator.inputs)
        first = 0
        if operator.kind == "slice":
            first = self._next_channels(operator.inputs[0], inputs[0].dims[-1], shape.out_channels)
        self.writer.begin(operator.name, int8)
        result = build(
            self.writer,
            Step(
                name=operator.name,
                shape=shape,
                inputs=inputs,
                feeds_linear=bool(readers) and all(reader.kind == "linear" for reader in readers),
                feeds_weights=len(readers) == 1 and readers[0].kind in FOLDING,
                first_channel=first,
                writes_output=not readers,
            ),
        )
        self.results[operator.name] = result
        self._note_readers(operator.name, result.int8)

    def _note_readers(self, name: str, int8: bool) -> None:
        """Whether the tensor is read by one operator alone, and as it is."""
        readers = self.readers.get(name, [])
        if len(readers) == 1 and _reads_int8(readers[0], self.network.precision(readers[0]) == "int8") == int8:
            self.writer.private.add(self.results[name].index)

    def _given(self, name: str, int8: bool) -> Activation:
        """What an operator wrote, in the precision of who reads it."""
        result = self.results[name]
        if result.int8 == int8:
            return result
        if name not in self.casts:
            self.writer.begin("" if name == INPUT else name, int8)
            self.casts[name] = self.writer.cast(result, int8)
        return self.casts[name]

    def _next_channels(self, source: str, channels: int, width: int) -> int:
        """Slices of one source follow each other; one that does not fit behind the others is taken from the end."""
        first = min(self.taken[source], channels - width)
        self.taken[source] += width
        return max(first, 0)

    def _output(self, operator: Operator) -> int:
        result = self.results[operator.name]
        return (result if operator.kind == "quantize" else self._given(operator.name, False)).index


def _reads_int8(operator: Operator, int8: bool) -> bool:
    """Quantize and dequantize are borders themselves: what they read does not depend on the plan."""
    return {"quantize": False, "dequantize": True}.get(operator.kind, int8)
