"""Gates: a factor a channel, trained towards zero to find channels that can go, and folded away afterwards.

A gate on a layer's output is a factor on the rows of its weight and on its bias (or on the scale and shift of the
batch norm behind it), so it is put there as a parametrisation: the forward stays as it is, whatever its author wrote.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.interfaces import Keep
from mobilekit.network.nodes import op_name
from mobilekit.types import ChannelGroup, Network

WEIGHTED = ("conv2d", "conv_transpose2d", "linear")


class ChannelGate(nn.Module):
    """Parametrisation that multiplies a tensor along one axis by the gate of a channel group, shape (channels,)."""

    def __init__(self, gate: nn.Parameter, group: str, dim: int) -> None:
        super().__init__()
        self.gate, self.group, self.dim = gate, group, dim

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with (channels,) entries along `dim`, scaled."""
        shape = [1] * tensor.ndim
        shape[self.dim] = -1
        return tensor * self.gate.reshape(shape).to(tensor.dtype)


@dataclass(frozen=True)
class Scales:
    """The tensors, with their channel axes, that together scale what a weighted layer gives."""

    tensors: tuple[tuple[str, int], ...]
    refused: str | None = None


def add_gates(module: nn.Module, network: Network) -> nn.Module:
    """A copy of the module with a gate of ones behind every prunable channel group: it gives the same outputs.

    `network` is the module's trace. The gate stands behind the layer that writes the group, and behind its batch norm
    where one follows directly; several layers that write one group share its gate, because their channels go
    together. Trained with `gate_penalty` (network slimming, Liu et al. 2017, arXiv:1708.06519, with a factor of its
    own as in Gate Decorator, You et al. 2019, arXiv:1909.08174), gates of channels that are not needed fall to zero.
    Groups that can have no gate are left out; `gate_refusals` says why.
    Raises UnsupportedError where no group can have one, and where the module has gates already.
    """
    if any(True for _ in _gates(module)):
        raise UnsupportedError("the module has gates already: fold or remove them first")
    places, refused = _places(module, network)
    if not places:
        raise UnsupportedError(
            f"no channel group can have a gate: {next(iter(refused.values()), 'none can be pruned')}"
        )
    gated = copy.deepcopy(module)
    for group, tensors in places.items():
        like = gated.get_parameter(tensors[0][0])
        gate = nn.Parameter(torch.ones(network.groups[group].width, dtype=like.dtype, device=like.device))
        for name, dim in tensors:
            path, _, leaf = name.rpartition(".")
            parametrize.register_parametrization(gated.get_submodule(path), leaf, ChannelGate(gate, group, dim))
    return gated


def gate_refusals(module: nn.Module, network: Network) -> dict[str, str]:
    """Channel groups that get no gate, each with its reason."""
    return _places(module, network)[1]


def gate_penalty(module: nn.Module, strength: float) -> torch.Tensor:
    """`strength` times the L1 norm of all gates: a scalar with a gradient, to be added to a training loss.

    Raises UnsupportedError for a module without gates, BadInputError for a strength below zero.
    """
    if not strength >= 0:
        raise BadInputError(f"the gates' penalty has the strength {strength}: it must be zero or more")
    return strength * torch.stack([gate.abs().sum() for gate in _gate_of_group(module).values()]).sum()


def gate_importance(module: nn.Module, group: str) -> torch.Tensor:
    """The size of the gate of each channel of the group, float64 (channels,): higher is more important.

    Raises UnsupportedError where the group has no gate.
    """
    gates = _gate_of_group(module)
    if group not in gates:
        raise UnsupportedError(f"{group} has no gate: the gated channel groups are {', '.join(gates)}")
    found = gates[group].detach().to("cpu", torch.float64).abs()
    if not bool(found.isfinite().all()):
        raise BadInputError(f"the gate of {group} holds values that are not finite")
    return found


def gate_keep(module: nn.Module, removed: float) -> Keep:
    """Channels to keep when this share (0 to below 1) of all gated channels goes, those with the smallest gates first.

    Gates of all groups are compared with each other; each group keeps its most important channel. The result goes to
    `mobilekit.network.shrink` with the folded module and its trace. Groups that lose nothing are left out.
    Raises UnsupportedError for a module without gates, BadInputError for a share out of range.
    """
    if not 0 <= removed < 1:
        raise BadInputError(f"a share of {removed} of the channels cannot go: it must be 0 or more and below 1")
    scores = {group: gate_importance(module, group) for group in _gate_of_group(module)}
    ranked = sorted((float(value), group, i) for group, values in scores.items() for i, value in enumerate(values))
    gone = {(group, i) for _, group, i in ranked[: int(removed * len(ranked))]}
    keep: Keep = {}
    for group, values in scores.items():
        stays = [i for i in range(len(values)) if (group, i) not in gone] or [int(values.argmax())]
        if len(stays) < len(values):
            keep[group] = stays
    return keep


def fold_gates(module: nn.Module) -> nn.Module:
    """A copy without gates whose weights, biases and batch norms have them multiplied in: the same outputs.

    Raises UnsupportedError for a module without gates.
    """
    return _without(module, folded=True)


def remove_gates(module: nn.Module) -> nn.Module:
    """A copy without gates, with the weights as they are under them. Raises UnsupportedError as `fold_gates` does."""
    return _without(module, folded=False)


def _without(module: nn.Module, folded: bool) -> nn.Module:
    _gate_of_group(module)
    plain = copy.deepcopy(module)
    for owner, leaf, _ in list(_gates(plain)):
        # a copy shares the class that parametrisation made for it, and removal would take the weight from both
        kind = type(owner)
        owner.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        parametrize.remove_parametrizations(owner, leaf, leave_parametrized=folded)
    return plain


def _gates(module: nn.Module) -> Iterator[tuple[nn.Module, str, ChannelGate]]:
    for owner in module.modules():
        if parametrize.is_parametrized(owner) and isinstance(owner.parametrizations, nn.ModuleDict):
            for leaf, steps in owner.parametrizations.items():
                found = [step for step in steps.children() if isinstance(step, ChannelGate)]
                yield from ((owner, leaf, step) for step in found[:1])


def _gate_of_group(module: nn.Module) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for _, _, step in _gates(module):
        found.setdefault(step.group, step.gate)
    if not found:
        raise UnsupportedError("the module has no gates: add_gates puts them in")
    return found


# ---------------------------------------------------------------- where gates go


def _places(module: nn.Module, network: Network) -> tuple[dict[str, tuple[tuple[str, int], ...]], dict[str, str]]:
    """The tensors to scale for each prunable group, and why other groups have none."""
    like = next(module.parameters(), torch.zeros(()))
    scales = scales_of(module, torch.zeros(network.input_shape, dtype=like.dtype, device=like.device))
    held = owners(module)
    places: dict[str, tuple[tuple[str, int], ...]] = {}
    refused: dict[str, str] = {}
    for name, group in network.groups.items():
        found = dict.fromkeys(t for p in group.producers if p.parameter in scales for t in scales[p.parameter].tensors)
        reason = group.refused or _reason(group, scales) or _shared(found, held)
        if reason is None:
            places[name] = tuple(found)
        else:
            refused[name] = reason
    return places, refused


def _reason(group: ChannelGroup, scales: Mapping[str, Scales]) -> str | None:
    for producer in group.producers:
        if producer.parameter not in scales:
            return f"no layer that uses {producer.parameter} as it is was seen"
        if scales[producer.parameter].refused:
            return scales[producer.parameter].refused
    return None


def _shared(tensors: Mapping[tuple[str, int], None], held: Mapping[str, int]) -> str | None:
    return next((f"{name} is shared between layers" for name, _ in tensors if held.get(name, 0) != 1), None)


def owners(module: nn.Module) -> dict[str, int]:
    """How many places of the module hold each parameter."""
    counts: dict[int, int] = {}
    names: dict[str, int] = {}
    for path, owner in module.named_modules():
        for leaf, tensor in owner._parameters.items():
            if tensor is not None:
                counts[id(tensor)] = counts.get(id(tensor), 0) + 1
                names[f"{path}.{leaf}" if path else leaf] = id(tensor)
    return {name: counts[key] for name, key in names.items()}


def scales_of(module: nn.Module, example_input: torch.Tensor) -> dict[str, Scales]:
    """Weight of each convolution or linear layer -> the tensors that scale its output's channels.

    Those of the batch norm where nothing but a batch norm reads the output, else the weight's own output axis and
    the bias. Raises BadInputError where torch.export cannot trace the module.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(module, (example_input,))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInputError(f"the model cannot be traced by torch.export: {reason}") from error
    names = program.graph_signature.inputs_to_parameters
    found: dict[str, Scales] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or op_name(node) not in WEIGHTED:
            continue
        weight = _parameter(node, 1, names)
        if weight is not None:
            scales = _scales(node, weight, names)
            known = found.setdefault(weight, scales)
            if known != scales:
                found[weight] = Scales((), f"{weight} is used several times, and not with the same batch norm")
    return found


def _scales(node: fx.Node, weight: str, names: Mapping[str, str]) -> Scales:
    norms = [user for user in node.users if op_name(user) == "batch_norm"]
    if norms and len(norms) == len(node.users):
        tensors = [(_parameter(norm, place, names), 0) for norm in norms for place in (1, 2)]
    else:
        grouped = op_name(node) == "conv_transpose2d" and len(node.args) > 6 and node.args[6] != 1
        if grouped:
            return Scales((), f"{weight} belongs to a grouped transposed convolution")
        tensors = [(weight, 1 if op_name(node) == "conv_transpose2d" else 0)]
        if len(node.args) > 2 and node.args[2] is not None:
            tensors.append((_parameter(node, 2, names), 0))
    named = tuple(dict.fromkeys((name, dim) for name, dim in tensors if name is not None))
    if len(named) < len(set(tensors)):
        return Scales((), f"the batch norm or bias behind {weight} has no parameters that could be scaled")
    return Scales(named)


def _parameter(node: fx.Node, place: int, names: Mapping[str, str]) -> str | None:
    value = node.args[place] if len(node.args) > place else None
    return names.get(value.name) if isinstance(value, fx.Node) else None
