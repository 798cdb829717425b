"""Finds residual blocks with an identity for a shortcut in a Network, and says why others cannot go. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mobilekit.errors import UnsupportedError
from mobilekit.transforms._naming import split
from mobilekit.types import INPUT_GROUP, Network, Operator, within

INPUT = "input"
"""In `Operator.inputs`: the network's input."""
IDEMPOTENT = ("relu", "relu6")
"""Activations that change nothing where they have been applied before."""
KEEPING = ("max_pool", "concat", "shuffle", "slice")
"""Kinds whose outputs are values that they read."""


@dataclass(frozen=True)
class Block:
    """The residual block at a module path: operators `first` to `last`, a sum, are all that it is."""

    path: str
    source: str
    """The operator whose output the block reads; INPUT for the network's input."""
    first: int
    last: int

    def holds(self, position: int) -> bool:
        """Whether the operator at this position goes with the block."""
        return self.first <= position <= self.last

    def owns(self, name: str) -> bool:
        """Whether a module, parameter or buffer of this name is part of the block."""
        return within(name, self.path)


def blocks(network: Network) -> tuple[dict[str, Block], dict[str, str]]:
    """Blocks by module path, and sums by module path, or by their name where that is taken, with what is in the way."""
    graph = _Graph(network)
    found: dict[str, Block] = {}
    faults: list[tuple[Operator, str, str]] = []
    for add in (o for o in network.operators if o.kind == "add" and len(o.inputs) == 2):
        path = add.module
        try:
            source, behind = graph.branch(add)
            path = graph.path(add, behind)
            block = Block(path, source, min(behind), graph.positions[add.name])
            graph.check(block, behind)
            found[path] = block
        except UnsupportedError as error:
            faults.append((add, path, str(error)))
    refused: dict[str, str] = {}
    for add, path, reason in faults:
        taken = not path or path in found or path in refused
        refused[add.name if taken else path] = reason
    return found, refused


class _Graph:
    """Which operator reads which."""

    def __init__(self, network: Network) -> None:
        self.network, self.operators = network, network.operators
        self.positions = {operator.name: position for position, operator in enumerate(network.operators)}

    def branch(self, add: Operator) -> tuple[str, set[int]]:
        """What the shortcut hands on as it is, and the operators between that and the sum.

        Raises UnsupportedError where neither side of the sum is made of the other one alone.
        """
        one, two = add.inputs
        if one == two:
            raise UnsupportedError("its sum adds a tensor to itself")
        for source, other in ((one, two), (two, one)):
            behind, met = self._behind(other, source)
            if source not in met:
                continue
            more = behind & self._behind(source, None)[0]
            if more or INPUT in met - {source}:
                name = self.operators[max(more)].name if more else "the network's input"
                raise UnsupportedError(f"its branch reads more than the block's input ({name})")
            return source, behind
        raise UnsupportedError("its shortcut is no identity: operators stand on both sides of the sum")

    def _behind(self, name: str, stop: str | None) -> tuple[set[int], set[str]]:
        """Operators that make this tensor, back to `stop`, and where the way back ended."""
        found: set[int] = set()
        met: set[str] = set()
        left = [name]
        while left:
            current = left.pop()
            position = self.positions.get(current)
            if current == stop or position is None:
                met.add(current)
            elif position not in found:
                found.add(position)
                left.extend(self.operators[position].inputs)
        return found, met

    def path(self, add: Operator, behind: set[int]) -> str:
        """The smallest module that holds the sum and its branch. Raises UnsupportedError where that is the model."""
        parts = add.module.split(".")
        for position in behind:
            other = self.operators[position].module.split(".")
            same = [a == b for a, b in zip(parts, other, strict=False)]
            parts = parts[: (*same, False).index(False)]
        path = ".".join(parts)
        if not path:
            raise UnsupportedError("it is no module of its own: its sum is part of the model's own forward")
        return path

    def check(self, block: Block, behind: set[int]) -> None:
        """Raises UnsupportedError where the block is more than branch and sum, or an identity cannot replace it."""
        reason = next(self._faults(block, behind), None)
        if reason is not None:
            raise UnsupportedError(reason)

    def _faults(self, block: Block, behind: set[int]) -> Iterator[str]:
        add = self.operators[block.last]
        others = (o for position, o in enumerate(self.operators) if position not in behind and o is not add)
        for operator in others:
            if within(operator.module, block.path):
                if operator.kind == "activation" and operator.inputs == (add.name,):
                    yield self._changed(operator)
                yield f"it is no module of its own: '{block.path}' holds {operator.name} too"
            inside = [name for name in operator.inputs if self.positions.get(name) in behind]
            if inside:
                yield f"{operator.name} reads {inside[0]}, which is inside it"
        if len(behind) < block.last - block.first:
            yield "it is no module of its own: other operators run between those of its branch"
        if len(behind) + 1 == len(self.operators):
            yield "nothing else is in the network"
        if not self._same_shape(block.source, add):
            yield "its output has another shape, or channels of other layers, than its input"
        if split(add.name)[0] in ("sub", "sub_") and add.inputs[0] != block.source:
            yield "its sum takes the block's input away"
        if add.activation is not None and not self._follows(block.source, add.activation):
            yield self._changed(add)

    def _same_shape(self, source: str, add: Operator) -> bool:
        made_by = None if source == INPUT else self.operators[self.positions[source]]
        size = self.network.input_shape[2:] if made_by is None else made_by.out_size
        groups = (INPUT_GROUP,) if made_by is None else made_by.out_groups
        channels = add.in_groups == add.out_groups == groups and add.in_repeat == 1
        return channels and tuple(size) == add.in_size == add.out_size

    def _follows(self, name: str, activation: str) -> bool:
        """Whether a tensor comes out of this activation, so that another one changes nothing."""
        position = self.positions.get(name)
        if position is None or activation not in IDEMPOTENT:
            return False
        operator = self.operators[position]
        if operator.activation is not None or operator.kind not in KEEPING:
            return operator.activation == activation
        return all(self._follows(before, activation) for before in operator.inputs)

    @staticmethod
    def _changed(operator: Operator) -> str:
        return f"the {operator.activation or 'function'} behind its sum would change what comes past it"
