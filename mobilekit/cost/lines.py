"""What a network is priced by: its operators line by line, and the conversions between precisions."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mobilekit.cost.features import L2_BYTES, weight_bytes
from mobilekit.cost.work import BYTES, FREE, FRESH, FUSED, MOVES, PASSES, Amount, Channels, Part, parts
from mobilekit.types import Network, Operator, OperatorShape, Precision

HOSTS = frozenset({"conv", "linear", "conv_transpose"})
"""Kinds that an operator behind them may run inside of."""


class Line(NamedTuple):
    """One operator, or one conversion at a border between precisions, and what a cost table prices of it."""

    name: str
    kind: str
    module: str
    precision: Precision
    parts: tuple[Part, ...]


class Held(NamedTuple):
    """A tensor in the form it has: precision, elements, the kind of the operator that wrote it ("" where it has an
    activation), and whether any part of it was moved and not computed."""

    precision: Precision
    elements: Amount
    kind: str
    moved: bool = False


def lines(
    network: Network, fusions: Collection[str] = (), widths: Mapping[str, Amount] | None = None
) -> tuple[Line, ...]:
    """Every operator in order, and a conversion in front of the first reader that needs one.

    Where an int8 operator reads a float tensor, or the other way round, a conversion is added as a line of its own
    (kind "quantize" or "dequantize"), once a tensor; the network's input and output are float. `fusions` are those of
    a cost table. Weights beyond the second-level cache are one more line ("cold"): real networks read them from further
    away in every run. `widths` replaces the channel groups' widths, by arrays of one shape if need be.
    """
    return tuple(_Walk(network, fusions, widths).lines())


class _Walk:
    def __init__(self, network: Network, fusions: Collection[str], widths: Mapping[str, Amount] | None) -> None:
        self.network, self.fusions = network, fusions
        self.widths = {name: float(group.width) for name, group in network.groups.items()} | dict(widths or {})
        self.readers = _readers(network)
        self.source: dict[str, str] = {"input": "input"}
        self.held = {"input": Held("fp32", float(math.prod(network.input_shape[1:])), "input")}
        self.converted: set[str] = set()
        self.unread: set[str] = set()

    def lines(self) -> list[Line]:
        found: list[Line] = []
        for operator in self.network.operators:
            found += self._visit(operator)
        # What nobody reads is an output of the network, and outputs are float.
        outputs = [tensor for tensor in self.held if tensor in self.unread and self.held[tensor].precision == "int8"]
        found += [_conversion(tensor, self.held[tensor]) for tensor in outputs]
        return found + from_memory(found)

    def _visit(self, operator: Operator) -> list[Line]:
        inputs = [self.source[name] for name in operator.inputs if name in self.source]
        if operator.kind in FREE and inputs:
            # Nothing runs here: the tensor goes on in the form it has.
            self.source[operator.name] = inputs[0]
            return [Line(operator.name, operator.kind, operator.module, self.held[inputs[0]].precision, ())]
        precision = self.network.precision(operator)
        found = []
        for tensor in inputs:
            self.unread.discard(tensor)
            held = self.held[tensor]
            if (held.precision == "int8") != (precision == "int8") and tensor not in self.converted:
                self.converted.add(tensor)
                found.append(_conversion(tensor, held))
        channels = Channels(self._width(operator.in_groups) * operator.in_repeat, self._width(operator.out_groups))
        moved = any(self.held[tensor].moved for tensor in inputs)
        pieces = self._pieces(operator, channels, self._place(operator, moved))
        found.append(Line(operator.name, operator.kind, operator.module, precision, pieces))
        self.source[operator.name] = operator.name
        elements = channels.outputs * operator.out_size[0] * operator.out_size[1]
        # What has its own activation is finished: nothing else can run inside it.
        moved = operator.kind in MOVES or (moved and operator.kind in PASSES)
        self.held[operator.name] = Held(precision, elements, "" if operator.activation else operator.kind, moved)
        self.unread.add(operator.name)
        return found

    def _pieces(self, operator: Operator, channels: Channels, place: str) -> tuple[Part, ...]:
        if isinstance(channels.inputs, float) and isinstance(channels.outputs, float):
            return _plain_parts(operator, channels, place)
        return tuple(parts(self.network.shape(operator), channels, place))

    def _place(self, operator: Operator, moved: bool) -> str:
        """Which of its rows prices the operator here."""
        if operator.kind == "shuffle":
            return "" if moved else FRESH
        return FUSED if self._fused(operator) else ""

    def _width(self, groups: tuple[str, ...]) -> Amount:
        return sum([self.widths[group] for group in groups], 0.0)

    def _fused(self, operator: Operator) -> bool:
        """Whether it runs inside an operator that it alone reads."""
        if f"conv>{operator.kind}" not in self.fusions:
            return False
        for name in operator.inputs:
            tensor = self.source.get(name, "")
            if not tensor or self.readers.get(tensor) != 1 or self.held[tensor].kind not in HOSTS:
                continue
            if self.held[tensor].precision == self.network.precision(operator):
                return True
        return False


@lru_cache(maxsize=200_000)
def _plain_parts(operator: Operator, channels: Channels, place: str) -> tuple[Part, ...]:
    """A search walks networks that share their operators: the same tuple each time, by which prices are found."""
    shape = operator.shape(int(channels.inputs), int(channels.outputs))
    return tuple(parts(shape, channels, place))


def from_memory(found: list[Line]) -> list[Line]:
    """The weights that do not stay in the second-level cache from one run to the next, a line for each precision."""
    held: dict[Precision, Amount] = {}
    for line in found:
        for part in line.parts:
            held[line.precision] = held.get(line.precision, 0.0) + weight_bytes(part, line.precision)
    total = sum(held.values())
    cold = []
    for precision, own in held.items():
        excess = own * np.maximum(1 - L2_BYTES / np.maximum(total, 1.0), 0.0) / BYTES[precision]
        if np.any(excess):
            cold.append(Line("weights from memory", "cold", "", precision, _passing("cold", excess)))
    return cold


def _readers(network: Network) -> dict[str, int]:
    """How many operators read each tensor, directly or behind operators that are free."""
    source: dict[str, str] = {}
    counts: dict[str, int] = {}
    for operator in network.operators:
        tensors = {source.get(name, name) for name in operator.inputs}
        if operator.kind in FREE and operator.inputs:
            source[operator.name] = source.get(operator.inputs[0], operator.inputs[0])
            continue
        for tensor in tensors:
            counts[tensor] = counts.get(tensor, 0) + 1
    return counts


def _conversion(tensor: str, held: Held) -> Line:
    kind = "dequantize" if held.precision == "int8" else "quantize"
    return Line(f"{kind} {tensor}", kind, "", "int8", _passing(kind, held.elements))


def _passing(kind: str, elements: Amount) -> tuple[Part, ...]:
    """What passes over so many elements, of a network's own or of an array of assignments."""
    return _plain_passing(kind, elements) if isinstance(elements, float) else _new_passing(kind, elements)


def _new_passing(kind: str, elements: Amount) -> tuple[Part, ...]:
    return tuple(parts(OperatorShape(kind=kind, in_channels=1, out_channels=1), Channels(elements, elements)))


_plain_passing = lru_cache(maxsize=20_000)(_new_passing)
"""As `_plain_parts`: the same tuple each time."""
