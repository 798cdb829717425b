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
class OperatorValue:
    """A tensor on the way through an operator (before or after its batch norm, its activation, a view)."""

    operator: str
    value: np.ndarray


def operator_values(module: torch.nn.Module, sample: np.ndarray) -> list[OperatorValue]:
    """What every operator of the traced module computes for one sample (1, C, H, W), in order."""
    import torch

    from mobilekit.network.rules import follow

    given_input = torch.from_numpy(sample)
    with torch.no_grad():
        program = torch.export.export(module, (given_input,))
        walk = follow(program)
        signature, state = program.graph_signature, {**program.state_dict, **program.constants}
        lifted = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
        given = [state[lifted[name]].clone() if name in lifted else given_input.clone() for name in names]
        found: list[OperatorValue] = []

        class Recorder(torch.fx.Interpreter):
            """Keeps a copy of each tensor at once: forms in place write over it later."""

            def run_node(self, n: torch.fx.Node) -> object:
                result: object = super().run_node(n)
                if n in walk.sources and walk.sources[n] != INPUT and isinstance(result, torch.Tensor):
                    found.append(OperatorValue(walk.sources[n], result.detach().float().numpy().copy()))
                return result

        Recorder(program.graph_module).run(*given)
    return found


def kept_nodes(
    selection: Selection,
    nodes: Sequence[FileNode],
    tensors: Mapping[str, Sequence[np.ndarray]],
    values: list[OperatorValue],
) -> set[str]:
    """Keys of the nodes that belong to the operators which stay in float as `selection` says.

    `tensors` holds for each tensor of the file its value for the sample that gave `values`, in every layout that may
    be meant. A node that writes none of the known values is a step on the way to the next one that does.
    Raises UnsupportedError where an operator that has to be found is not in the file, and where a tensor might be that
    of an operator which stays in float as well as of one which does not.
    """
    owners = _owners(tensors, values)
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


def _owners(tensors: Mapping[str, Sequence[np.ndarray]], values: Iterable[OperatorValue]) -> dict[str, set[str]]:
    """Which operators may have written each tensor."""
    by_shape: dict[tuple[int, ...], list[OperatorValue]] = {}
    for one in values:
        by_shape.setdefault(_squeezed(one.value).shape, []).append(one)
    owners: dict[str, set[str]] = {}
    for name, layouts in tensors.items():
        for form in layouts:
            array = _squeezed(form)
            same = {one.operator for one in by_shape.get(array.shape, ()) if _equal(array, _squeezed(one.value))}
            owners.setdefault(name, set()).update(same)
    return owners


def _squeezed(value: np.ndarray) -> np.ndarray:
    """Without axes of size one: a pooled map and the vector made of it are the same numbers."""
    return value.squeeze()


def _equal(left: np.ndarray, right: np.ndarray) -> bool:
    size = max(float(np.abs(right).max(initial=0.0)), 1e-12)
    return bool(np.abs(left - right).max(initial=0.0) <= TOLERANCE * size)
