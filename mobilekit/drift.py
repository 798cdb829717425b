"""Finds the operator at which an exported file departs from its network: by the values of its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx, nn

from mobilekit.errors import MobilekitError
from mobilekit.exportable import Arrays

FAR = 300.0
"""Stands for equal bit for bit."""


@dataclass(frozen=True)
class Fall:
    """An operator behind which the file is not the network any more."""

    operator: str
    before_db: float | None
    """Of what it reads; None: it reads the network's input alone."""
    behind_db: float

    def __str__(self) -> str:
        """A clause for people."""
        before = "behind the input" if self.before_db is None else f"{min(self.before_db, FAR):.0f} dB before it"
        return f"the first operator where it falls is {self.operator}: {before}, {self.behind_db:.1f} dB behind it"


@dataclass(frozen=True)
class NodeValue:
    """What a node of the network's graph computes for a sample."""

    node: str
    operator: str
    """The path of its module with its name in the graph; the latter alone outside of all modules."""
    value: np.ndarray
    reads: tuple[str, ...]


def first_fall(
    module: nn.Module, sample: Arrays, tensors: Mapping[str, Sequence[np.ndarray]], least_db: float
) -> Fall | None:
    """The first operator whose values, and those of all that follows from it, are less than `least_db` near the file's.

    `tensors` are the file's for the same sample, each in every layout that may be meant. A node whose values are not in
    the file (a batch norm was folded, an activation fused) is no fall where something that follows from it is right.
    None: there is no such operator. Raises MobilekitError where the module cannot be traced.
    """
    values = node_values(module, sample)
    closeness = {one.node: _closest(one.value, tensors) for one in values}
    followers: dict[str, set[str]] = {one.node: set() for one in values}
    for one in reversed(values):
        for read in one.reads:
            if read in followers:
                followers[read] |= {one.node} | followers[one.node]
    low = {node for node, found in closeness.items() if found is not None and found < least_db}
    right = {node for node, found in closeness.items() if found is not None and found >= least_db}
    for one in values:
        if one.node in low and not followers[one.node] & right:
            before = _behind(one, {value.node: value for value in values}, closeness, right)
            return Fall(one.operator, before, closeness[one.node] or 0.0)
    return None


def _behind(
    one: NodeValue, known: dict[str, NodeValue], closeness: dict[str, float | None], right: set[str]
) -> float | None:
    """The worst of the nearest nodes in front of a node whose values are in the file."""
    found: list[float] = []
    waiting, seen = list(one.reads), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in known:
            continue
        seen.add(name)
        if name in right:
            found.append(closeness[name] or 0.0)
        else:
            waiting.extend(known[name].reads)
    return min(found, default=None)


def node_values(module: nn.Module, sample: Arrays) -> list[NodeValue]:
    """What every node of the module's graph computes for a sample, in order: floating-point tensors alone.

    Raises MobilekitError where torch.export cannot trace the module.
    """
    given = tuple(torch.from_numpy(array) for array in sample)
    with torch.no_grad():
        try:
            program = torch.export.export(module, given)
        except Exception as error:
            raise MobilekitError(f"torch.export cannot trace the network: {error}") from error
        found: list[NodeValue] = []

        class Recorder(fx.Interpreter):
            """Keeps a copy of each tensor at once: forms in place write over it later."""

            def run_node(self, n: fx.Node) -> object:
                result: object = super().run_node(n)
                if n.op == "call_function" and isinstance(result, torch.Tensor) and result.is_floating_point():
                    value = result.detach().float().numpy().copy()
                    reads = tuple(node.name for node in n.all_input_nodes)
                    found.append(NodeValue(n.name, _label(n), value, reads))
                return result

        Recorder(program.module()).run(*given)
    return found


def _label(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]).removeprefix("L['self'].").strip(".") if stack else ""
    return f"{path} ({node.name})" if path and path != "L['self']" else node.name


def _closest(value: np.ndarray, tensors: Mapping[str, Sequence[np.ndarray]]) -> float | None:
    """SQNR in dB of the tensor that is nearest; None where there is nothing to compare, as with zeros alone."""
    wanted = value.squeeze().astype(np.float64)
    power = float(np.square(wanted).sum())
    if power == 0.0 or not math.isfinite(power):
        return None
    errors = [
        float(np.square(wanted - form).sum()) for form in _same_shape(tensors, wanted.shape) if np.isfinite(form).all()
    ]
    least = min(errors, default=math.inf)
    return FAR if least == 0.0 else 10 * math.log10(power / least) if math.isfinite(least) else -FAR


def _same_shape(tensors: Mapping[str, Sequence[np.ndarray]], shape: tuple[int, ...]) -> Iterable[np.ndarray]:
    for forms in tensors.values():
        for form in forms:
            if form.squeeze().shape == shape:
                yield form.squeeze()
