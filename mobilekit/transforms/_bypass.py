"""Takes a residual block out of a Network, as a trace gives it where an identity stands in its place. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise

from mobilekit.errors import UnsupportedError
from mobilekit.transforms._links import NARROW, mapped
from mobilekit.transforms._naming import LAYERS, MAKES, joined, label_of, met_at, opened, reworded, split
from mobilekit.transforms._residual import Block
from mobilekit.transforms._rewrite import relabelled
from mobilekit.types import ChannelGroup, Network, Operator

NODES = {"relu": ("relu", "clamp_min"), "relu6": ("hardtanh", "relu6", "clamp")}
"""An activation -> how torch.export names its nodes, where that is not the activation's own name."""
VIEWS = ("view", "reshape")
OUTPUT = "it is the network's output"


def bypassed(network: Network, block: Block) -> Network:
    """The network without the block: what read its sum reads what the block read.

    Later operators and channel groups are renumbered. Refusals that came from the block's operators are lifted, down
    to the next reason that a trace meets; one that a model's own forward gave is kept, because a Network does not say
    which of its modules gave it. Raises UnsupportedError where nodes that are no operators leave the new numbers open.
    """
    names = renumbered(network, block)
    known = _labels(network, block)
    sum_ = network.operators[block.last]
    left = tuple(
        relabelled(operator, {**names, sum_.name: block.source}, known)
        for position, operator in enumerate(network.operators)
        if not block.holds(position)
    )
    operators = _with_norm(left, block.source)
    here = {operator.name for operator in operators}
    inside = {operator.name for operator in network.operators[block.first : block.last + 1]}
    precisions = {names.get(n, n): value for n, value in network.precisions.items() if n not in inside}
    return network.model_copy(
        update={
            "operators": operators,
            "groups": _groups(network, block, names, known),
            "axes": {
                name: {
                    dim: axis.model_copy(update={"groups": mapped(axis.groups, known)}) for dim, axis in dims.items()
                }
                for name, dims in network.axes.items()
                if not block.owns(name)
            },
            "precisions": {name: value for name, value in precisions.items() if name in here},
        }
    )


def _with_norm(operators: tuple[Operator, ...], source: str) -> tuple[Operator, ...]:
    """A batch norm behind the block becomes part of the layer in front of it, where nothing else reads that."""
    place = next((i for i, operator in enumerate(operators) if operator.name == source), None)
    readers = [i for i, operator in enumerate(operators) if source in operator.inputs]
    if place is None or len(readers) != 1:
        return operators
    layer, norm = operators[place], operators[readers[0]]
    if layer.kind not in LAYERS or layer.activation or norm.kind != "batch_norm":
        return operators
    whole = layer.model_copy(update={"activation": norm.activation})
    left = [whole if o is layer else relabelled(o, {norm.name: source}, {}) for o in operators if o is not norm]
    return _with_norm(tuple(left), source)


# ---------------------------------------------------------------- numbers of operators


def renumbered(network: Network, block: Block) -> dict[str, str]:
    """Old name -> new name of later operators, and of nodes that refusals name, whose number changes.

    Raises UnsupportedError where it cannot be told how many nodes of a name go with the block.
    """
    nodes = sorted((*_named(network), *((i, *split(o.name)) for i, o in enumerate(network.operators))))
    gone = {base: _gone(network, block, base, nodes) for base in {b for i, b, _ in nodes if i > block.last}}
    later = ((base, number) for i, base, number in nodes if i > block.last and gone[base])
    return {joined(base, number): joined(base, number - gone[base]) for base, number in later}


def _named(network: Network) -> Iterator[tuple[int, str, int]]:
    """Nodes that are no operators and that refusals name (a chunk, whose pieces are the operators)."""
    operators = {operator.name for operator in network.operators}
    seen: set[str] = set()
    for position, operator in enumerate(network.operators):
        for group in operator.out_groups:
            found = re.search(r"\bat (\w+) needs its", network.groups[group].refused or "")
            if found and operator.kind in MAKES and found[1] not in operators | seen:
                seen.add(found[1])
                yield position, *split(found[1])


def _gone(network: Network, block: Block, base: str, nodes: list[tuple[int, str, int]]) -> int:
    """How many nodes of this name go with the block: operators, and what is fused into them.

    A node's number counts those before it, so that two numbers say how many hidden ones are between them. Raises
    UnsupportedError where these can be inside as well as outside.
    """
    same = [(-1, -1), *((position, number) for position, other, number in nodes if other == base)]
    gone = 0
    for (before, start), (after, end) in pairwise(same):
        if after < block.first or before > block.last:
            continue
        least, most = _share(network, block, base, (before, after, end - start - 1))
        if least != most:
            shown = f"a network does not show how many '{base}' nodes go with it"
            raise UnsupportedError(f"{shown}, and {joined(base, end)} behind it is numbered by them")
        gone += least + block.holds(after)
    return gone


def _share(network: Network, block: Block, base: str, span: tuple[int, int, int]) -> tuple[int, int]:
    """How many of the hidden nodes between two operators go with the block: no fewer, and no more."""
    before, after, hidden = span
    if hidden == 0 or (block.holds(before) and block.holds(after)):
        return hidden, hidden
    if base == "batch_norm":
        return _norms(network, block, span)
    fused = [position for position in range(before + 1, after + 1) if _fused(network.operators[position], base)]
    inside = sum(block.holds(position) for position in fused)
    if hidden <= len(fused):
        return max(0, hidden - len(fused) + inside), min(inside, hidden)
    return (0, 0) if not inside and _direct(network, block) else (0, hidden)


def _fused(operator: Operator, base: str) -> bool:
    """Whether a node that may have this name is part of the operator."""
    fused = operator.activation if operator.kind != "activation" else None
    named = fused is not None and base.removesuffix("_") in NODES.get(fused, (fused,))
    return named or (operator.kind == "shuffle" and base in VIEWS)


def _norms(network: Network, block: Block, span: tuple[int, int, int]) -> tuple[int, int]:
    """As `_share`, of batch norms that are part of layers: axes stand in the order in which they are met."""
    before, after, hidden = span
    norms = [name.rpartition(".")[0] for name in network.axes if name.endswith(".running_mean")]
    modules = [network.operators[position].module for position in (before, after) if position >= 0]
    if not set(modules) <= set(norms):
        return 0, hidden
    start = norms.index(modules[0]) + 1 if before >= 0 else 0
    between = norms[start : norms.index(modules[-1])]
    own = sum(block.owns(norm) for norm in between)
    return (own, own) if len(between) == hidden else (0, hidden)


def _direct(network: Network, block: Block) -> bool:
    """Whether maps go from operator to operator in the block as they are, with no views or slices in between."""
    sizes = {operator.name: operator.out_size for operator in network.operators}
    own = network.operators[block.first : block.last + 1]
    same = all(sizes.get(name, o.in_size) == o.in_size for o in own for name in o.inputs[:1])
    return same and all(o.kind not in MAKES and o.out_size != (1, 1) and o.in_repeat == 1 for o in own)


# ---------------------------------------------------------------- channel groups


def _labels(network: Network, block: Block) -> dict[str, tuple[str, ...]]:
    """Old name -> new name of the channel groups that are called otherwise now."""
    first, last = opened(network, block.first), opened(network, block.last)
    found: dict[str, tuple[str, ...]] = {}
    for label, group in network.groups.items():
        number = re.fullmatch(r"<(\d+)>", label)
        if number and int(number[1]) >= last:
            found[label] = (f"<{int(number[1]) - (last - first)}>",)
        elif group.producers and block.owns(group.producers[0].parameter) and not _goes(network, block, label):
            others = [p.parameter for p in group.producers if not block.owns(p.parameter)]
            position = next(i for i, o in enumerate(network.operators) if label in o.out_groups)
            found[label] = (label_of(network, others[0]) if others else f"<{opened(network, position)}>",)
    return found


def _goes(network: Network, block: Block, label: str) -> bool:
    """Whether the block alone has these channels."""
    at = [i for i, o in enumerate(network.operators) if label in (*o.in_groups, *o.out_groups)]
    given = label in network.operators[block.last].out_groups
    return bool(at) and not given and all(block.holds(position) for position in at)


def _groups(
    network: Network, block: Block, names: Mapping[str, str], known: Mapping[str, tuple[str, ...]]
) -> dict[str, ChannelGroup]:
    """The groups that stay, with their present names, producers and reasons."""
    groups: dict[str, ChannelGroup] = {}
    for label, group in network.groups.items():
        if _goes(network, block, label):
            continue
        producers = tuple(p for p in group.producers if not block.owns(p.parameter))
        reason = _next_reason(network, block, label) if _lifted(network, block, label) else group.refused
        update = {"producers": producers, "refused": reworded(reason, names)}
        groups[mapped((label,), known)[0]] = group.model_copy(update=update)
    return groups


def _lifted(network: Network, block: Block, label: str) -> bool:
    """Whether the group is refused for something that the block does."""
    reason = network.groups[label].refused or ""
    watched = re.search(r" also reads ([\w.]+)$", reason)
    return block.owns(watched[1]) if watched else block.holds(met_at(network, label, network.groups[label]))


def _next_reason(network: Network, block: Block, label: str) -> str | None:
    """Why the group must not change once the block is gone: the first reason that a trace meets behind it."""
    for operator in network.operators[block.last + 1 :]:
        reason = _reason_of(network, operator, label)
        if reason is not None:
            return reason
    if label in network.operators[-1].out_groups:
        return OUTPUT
    return NARROW if network.groups[label].width == 1 else None


def _reason_of(network: Network, operator: Operator, label: str) -> str | None:
    """Why this operator refuses the group, as far as a Network tells: other groups are refused for it too."""
    touched = {*operator.in_groups, *operator.out_groups}
    for other in network.operators:
        if other.name in operator.inputs:
            touched.update(other.out_groups)
    if label not in touched:
        return None
    if operator.kind in LAYERS and operator.groups > 1 and not operator.depthwise:
        what = "transposed convolution" if operator.kind == "conv_transpose" else "convolution"
        return f"a grouped {what} ({operator.groups} groups) fixes it"
    makes = operator.kind in MAKES and operator.in_groups != operator.out_groups
    for other_label in sorted(touched - {label}):
        reason = network.groups[other_label].refused or ""
        given = makes and other_label in operator.out_groups and reason.endswith("needs its channels as they are")
        if given or re.search(rf"\bat {operator.name}\b", reason):
            return reason
    return None
