"""Writes the operators of a sketch one by one: activations in float32 or int8, random weights, borders, clamps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobilekit.runtimes._tflite_tables import Quantisation, Tables

TO_NCHW, TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
# What ai-edge-quantizer demands of int8 operators (algorithms/uniform_quantize/common_quantize.py): some write in the
# scale that they read, some in a scale of their own that never changes; any other writes what its readers want.
SAME_SCALE = frozenset(
    ("MAX_POOL_2D", "AVERAGE_POOL_2D", "PAD", "PADV2", "RESHAPE", "RESIZE_NEAREST_NEIGHBOR", "SLICE", "TRANSPOSE")
)
FIXED: dict[str, Quantisation] = {"LOGISTIC": (1 / 256, -128), "SOFTMAX": (1 / 256, -128), "TANH": (1 / 128, 0)}
CHOSEN = frozenset(("CONCATENATION", "SELECT"))
"""Operators whose inputs have to have the scale of their output."""
LOWEST = -128
CLAMPED_AT_SIX: Quantisation = (6 / 255, LOWEST)
SCALE = 0.05
"""int8 activations reach from -6.4 to 6.35, those that cannot be negative from 0 to 6.4, roughly."""
BIAS = 0.1
"""Keeps activations away from zero however deep the network is: subnormal numbers are slow."""


@dataclass(frozen=True)
class Activation:
    """A tensor on its way through the network: (1, height, width, channels), or (1, channels) for a vector."""

    index: int
    dims: tuple[int, ...]
    int8: bool

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.dims)


class Writer:
    """The tables of one file while operators are added; `begin` says whose they are and what they run in."""

    def __init__(self) -> None:
        self.tables = Tables()
        self.int8 = False
        self.private: set[int] = set()
        """Tensors that a single operator reads in the precision in which they are written."""
        self._operator = ""
        self._names: dict[str, int] = {}
        self._random = np.random.default_rng(0)
        self._activations = 0

    def begin(self, operator: str, int8: bool) -> None:
        """Name what follows after this operator."""
        self._operator, self.int8 = operator, int8

    # ------------------------------------------------------------ tensors

    def activation(
        self, part: str, dims: Sequence[int], int8: bool, quantisation: Quantisation | None = None
    ) -> Activation:
        """A tensor that is computed, named after the operator; in int8 with a scale that no other has."""
        name, dims = self._name(part), tuple(dims)
        if not int8:
            return Activation(self.tables.tensor(name, dims, "FLOAT32"), dims, False)
        scale, zero = quantisation or self.signed()
        facts = (np.array([scale]), np.array([zero]), 0)
        return Activation(self.tables.tensor(name, dims, "INT8", facts), dims, True)

    def signed(self) -> Quantisation:
        """A scale of its own for numbers of both signs."""
        self._activations += 1
        return SCALE / (1 + self._activations / 1000), 0

    def unsigned(self) -> Quantisation:
        """A scale of its own for numbers that cannot be negative."""
        return self.signed()[0] / 2, LOWEST

    def integers(self, part: str, values: Any) -> int:
        """A constant of sizes, axes or pads."""
        data = np.array(values, np.int32)
        return self.tables.tensor(self._name(part), data.shape, "INT32", data=data)

    def constant(self, part: str, dims: tuple[int, ...], value: float, int8: bool | None = None) -> int:
        """A constant that holds one value everywhere, in the precision of the operator unless `int8` says which."""
        if not (self.int8 if int8 is None else int8):
            return self.tables.tensor(self._name(part), dims, "FLOAT32", data=np.full(dims, value, np.float32))
        number = 127 if value > 0 else LOWEST
        facts = (np.array([value / number]), np.array([0]), 0)
        return self.tables.tensor(self._name(part), dims, "INT8", facts, np.full(dims, number, np.int8))

    def weights(
        self, dims: tuple[int, ...], axis: int, source: Activation, float_bias: bool = False
    ) -> tuple[int, int]:
        """Weight and bias that keep the size of what they are applied to; in int8 one scale per output channel."""
        tables, count = self.tables, dims[axis]
        names = self._name("weight"), self._name("bias")
        reach = math.sqrt(3 * count / math.prod(dims))
        if not self.int8:
            weight = (2 * self._random.random(dims, np.float32) - 1) * np.float32(reach)
            bias = np.full(count, BIAS, np.float32)
            return (
                tables.tensor(names[0], dims, "FLOAT32", data=weight),
                tables.tensor(names[1], (count,), "FLOAT32", data=bias),
            )
        scales, zeros = np.full(count, reach / 127, np.float32), np.zeros(count, np.int64)
        steps = scales * np.float32(tables.quantisation(source.index)[0])
        whole = self._random.integers(-127, 128, dims, np.int8)
        weight_index = tables.tensor(names[0], dims, "INT8", (scales, zeros, axis), whole)
        if float_bias:
            return weight_index, tables.tensor(names[1], (count,), "FLOAT32", data=np.full(count, BIAS, np.float32))
        bias = np.round(BIAS / steps).astype(np.int32)
        return weight_index, tables.tensor(names[1], (count,), "INT32", (steps, zeros, 0), bias)

    def _name(self, part: str) -> str:
        name = f"{self._operator}/{part}" if self._operator else part
        self._names[name] = self._names.get(name, 0) + 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"

    # ------------------------------------------------------------ operators

    def apply(self, code: str, inputs: Sequence[Activation | int], dims: Sequence[int], **options: Any) -> Activation:
        """Add an operator that writes a tensor of these sizes."""
        quantisation = FIXED.get(code)
        if code in SAME_SCALE and self.int8:
            quantisation = next(self.tables.quantisation(x.index) for x in inputs if isinstance(x, Activation))
        output = self.activation(code.lower(), dims, self.int8, quantisation)
        self.write(code, inputs, output, **options)
        return output

    def write(self, code: str, inputs: Sequence[Activation | int], output: Activation, **options: Any) -> None:
        """Add an operator that writes this tensor."""
        indices = [x.index if isinstance(x, Activation) else x for x in inputs]
        self.tables.operator(code, indices, output.index, **options)

    def transposed(self, source: Activation, order: Sequence[int]) -> Activation:
        """The axes in another order."""
        dims = [source.dims[axis] for axis in order]
        return self.apply("TRANSPOSE", [source, self.integers("order", order)], dims)

    def reshaped(self, source: Activation, dims: tuple[int, ...]) -> Activation:
        """The same numbers in other sizes."""
        shape = np.array(dims, np.int32)
        return self.apply("RESHAPE", [source, self.integers("shape", dims)], dims, newShape=shape)

    def cast(self, source: Activation, int8: bool, quantisation: Quantisation | None = None) -> Activation:
        """The same numbers in the other precision, or in int8 with another scale."""
        code = "QUANTIZE" if int8 else "DEQUANTIZE"
        output = self.activation(code.lower(), source.dims, int8, quantisation)
        self.write(code, [source], output)
        return output

    def to_scale(self, source: Activation, quantisation: Quantisation) -> Activation:
        """An int8 tensor in this scale: written so where nobody else reads it and its operator can, else converted."""
        if self.tables.quantisation(source.index) == quantisation:
            return source
        if source.index in self.private and self._free(source):
            self.tables.requantise(source.index, quantisation)
            return source
        return self.cast(source, True, quantisation)

    def _free(self, source: Activation) -> bool:
        """Whether the operator that writes the tensor may write any scale."""
        code = self.tables.makers.get(source.index, ("", None))[0]
        return bool(code) and code not in SAME_SCALE and code not in FIXED and code not in CHOSEN

    def makes(self, source: Activation, *codes: str) -> bool:
        """Whether one of these operators writes the tensor."""
        return self.tables.makers.get(source.index, ("", None))[0] in codes

    def clamps(self, source: Activation) -> bool:
        """Whether the operator that writes the tensor holds a ReLU or ReLU6, or is one."""
        operator = self.tables.makers.get(source.index, ("", None))[1]
        return self.makes(source, "RELU", "RELU6") or bool(
            getattr(getattr(operator, "builtinOptions", None), "fusedActivationFunction", 0)
        )

    def can_clamp(self, source: Activation) -> bool:
        """Whether the operator that writes the tensor has room for a clamp; the converter gives concatenations none."""
        operator = self.tables.makers.get(source.index, ("", None))[1]
        room = getattr(getattr(operator, "builtinOptions", None), "fusedActivationFunction", None) == 0
        return room and not self.makes(source, "CONCATENATION")

    def clamp(self, source: Activation, code: str, own: bool = True) -> Activation:
        """RELU or RELU6: held by the operator in front where it can and is `own`, as the converter fuses it."""
        quantisation = CLAMPED_AT_SIX if code == "RELU6" else None
        if own and self.can_clamp(source):
            maker, operator = self.tables.makers[source.index]
            operator.builtinOptions.fusedActivationFunction = getattr(self.tables.fb.ActivationFunctionType, code)
            if maker == "TRANSPOSE_CONV":
                operator.opcodeIndex = self.tables.codes.setdefault((maker, 4), len(self.tables.codes))
            if self.int8 and self._free(source):
                self.tables.requantise(source.index, quantisation or self.unsigned())
            self._add_name(source)
            return source
        output = self.activation(code.lower(), source.dims, self.int8, quantisation or self.unsigned())
        self.write(code, [source], output)
        return output

    def _add_name(self, source: Activation) -> None:
        """Let a tensor also bear the name of the operator that was fused into the one that writes it."""
        tensor = self.tables.tensors[source.index]
        if not tensor.name.decode().startswith(f"{self._operator}/"):
            tensor.name = f"{tensor.name.decode()};{self._operator}".encode()
