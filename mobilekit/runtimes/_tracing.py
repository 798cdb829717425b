"""Finds the operators of a network in an exported file: by the values of its tensors, not by their names.

Exporters fold batch norms, fuse activations, rename and reorder, and no two do it alike. What a tensor holds after
one sample tells without doubt which operator wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mobilekit.errors import UnsupportedError
from mobilekit.runtimes._selection import Selection
from mobilekit.types import Range

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-3
"""Largest difference of two float computations of one tensor, as a fraction of its largest value."""
INPUT = "input"
"""What a walk calls the network's input where it says whose output a tensor is."""


@dataclass(frozen=True)
class FileNode:
    """A node of an exported graph: its key in the file, the tensors that it reads and those that it writes."""

    key: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class NodeValue:
    """What a node of the module's graph computes for one sample."""

    node: str
    value: np.ndarray


@dataclass(frozen=True)
class OperatorValue:
    """A tensor on the way through an operator (before or after its batch norm, its activation, a view)."""

    operator: str
    value: np.ndarray


def node_values(module: torch.nn.Module, sample: Sequence[np.ndarray]) -> list[NodeValue]:
    """Every tensor of the module's graph for one sample (an array for each input), inputs included, in order."""
    return [NodeValue(node.name, value) for node, value in _recorded(_program(module, sample), sample)]


def operator_values(module: torch.nn.Module, sample: np.ndarray) -> list[OperatorValue]:
    """What every operator of the traced module computes for one sample (1, C, H, W), in order."""
    from mobilekit.network.rules import follow

    program = _program(module, (sample,))
    sources = follow(program).sources
    return [
        OperatorValue(sources[node], value)
        for node, value in _recorded(program, (sample,))
        if sources.get(node, INPUT) != INPUT
    ]


def _program(module: torch.nn.Module, sample: Sequence[np.ndarray]) -> torch.export.ExportedProgram:
    import torch

    from mobilekit.network.observation import exported

    return exported(module, tuple(torch.from_numpy(array) for array in sample))


def _recorded(
    program: torch.export.ExportedProgram, sample: Sequence[np.ndarray]
) -> list[tuple[torch.fx.Node, np.ndarray]]:
    import torch

    from mobilekit.network.observation import watched

    found: list[tuple[torch.fx.Node, np.ndarray]] = []
    inputs = tuple(torch.from_numpy(array) for array in sample)
    watched(program, inputs, lambda node, value: found.append((node, value.detach().float().numpy().copy())))
    return found


def tensor_ranges(
    tensors: Mapping[str, Sequence[np.ndarray]],
    values: Iterable[NodeValue],
    ranges: Mapping[str, Range],
    tolerance: float = TOLERANCE,
) -> dict[str, Range]:
    """Tensors of a file -> what the nodes of the module's graph that compute the same range over.

    `tensors` and `values` are of one sample, as in `kept_nodes`. Several nodes with the same values: what covers all
    of them. Tensors that no node computes miss.
    """
    known = [(one.node, one.value) for one in values if one.node in ranges]
    found: dict[str, Range] = {}
    for name, nodes in _matches(tensors, known, tolerance).items():
        if nodes:
            lows, highs = zip(*(ranges[node] for node in nodes), strict=True)
            found[name] = (min(lows), max(highs))
    return found


def kept_nodes(
    selection: Selection,
    nodes: Sequence[FileNode],
    tensors: Mapping[str, Sequence[np.ndarray]],
    values: list[OperatorValue],
    tolerance: float = TOLERANCE,
) -> set[str]:
    """Keys of the nodes that belong to the operators which stay in float as `selection` says.

    `tensors` holds for each tensor of the file its value for the sample that gave `values`, in every layout that may
    be meant. A node that writes none of the known values is a step on the way to the next one that does.
    Raises UnsupportedError where an operator that has to be found is not in the file, and where a tensor might be that
    of an operator which stays in float as well as of one which does not.
    """
    owners = _matches(tensors, [(one.operator, one.value) for one in values], tolerance)
    found: set[str] = set().union(*owners.values())
    lost = sorted(selection.sought - found)
    if lost:
        raise UnsupportedError(f"these operators are not to be found in the exported file: {', '.join(lost)}")
    readers: dict[str, list[FileNode]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    belongs: dict[str, set[str]] = {}
    for node in reversed(nodes):
        own: set[str] = set().union(*(owners.get(name, set()) for name in node.outputs))
        after = [belongs[reader.key] for name in node.outputs for reader in readers.get(name, ())]
        belongs[node.key] = own or set().union(*after)
    for node in nodes:
        if not belongs[node.key]:  # behind the last operator: a change of layout
            before = [belongs[n.key] for n in nodes if set(n.outputs) & set(node.inputs)]
            belongs[node.key] = set().union(*before)
    return {node.key for node in nodes if _is_kept(belongs[node.key], selection.kept_float)}


def _is_kept(operators: set[str], kept_float: frozenset[str]) -> bool:
    if operators & kept_float and operators - kept_float:
        raise UnsupportedError(
            "the exported file has one tensor for operators of which some stay in float and some do not: "
            + ", ".join(sorted(operators))
        )
    return bool(operators & kept_float)


def _matches(
    tensors: Mapping[str, Sequence[np.ndarray]], values: Iterable[tuple[str, np.ndarray]], tolerance: float
) -> dict[str, set[str]]:
    """Which of the named values each tensor holds, in one of its layouts."""
    by_shape: dict[tuple[int, ...], list[tuple[str, np.ndarray]]] = {}
    for name, value in values:
        flat = _squeezed(value)
        by_shape.setdefault(flat.shape, []).append((name, flat))
    found: dict[str, set[str]] = {}
    for tensor, layouts in tensors.items():
        for form in layouts:
            array = _squeezed(form)
            same = {name for name, value in by_shape.get(array.shape, ()) if _equal(array, value, tolerance)}
            found.setdefault(tensor, set()).update(same)
    return found


def _squeezed(value: np.ndarray) -> np.ndarray:
    """Without axes of size one: a pooled map and the vector made of it are the same numbers."""
    return value.squeeze()


def _equal(left: np.ndarray, right: np.ndarray, tolerance: float) -> bool:
    size = max(float(np.abs(right).max(initial=0.0)), 1e-12)
    return bool(np.abs(left - right).max(initial=0.0) <= tolerance * size)
