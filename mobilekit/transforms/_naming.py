"""What a trace would call things after a layer was replaced: operators, channel groups, and the reasons of refusals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mobilekit.transforms._links import NODES, Link, Unit, fresh, mapped
from mobilekit.types import ChannelGroup, Network, Operator

LATE = re.compile(
    r"the model's forward fails|has one channel only|no weight produces it|it is the network's output|.* also reads "
)
"""Reasons that a trace gives after it has seen all operators."""
LAYERS = ("conv", "conv_transpose", "linear")
MAKES = ("shuffle", "slice", "transpose", "reshape", "other")
"""Kinds whose operators open a group for what they give, unless they work on each channel alone."""
Labels = Mapping[str, tuple[str, ...]]


def numbered(network: Network, position: int, links: Sequence[Link]) -> tuple[list[str], dict[str, str]]:
    """Names of the links' operators, and old name -> new name of the later operators whose number changes.

    Numbers move by as many nodes as the links add, so that nodes which are no operators keep their place.
    """
    old_base = split(network.operators[position].name)[0]
    following: dict[str, int] = {}
    for base in {NODES[link.kind] for link in links} | {old_base}:
        earlier = [split(o.name)[1] + 1 for o in network.operators[:position] if split(o.name)[0] == base]
        own = split(network.operators[position].name)[1] if base == old_base else None
        following[base] = own if own is not None else max(earlier, default=0)
    moved = {base: sum(NODES[link.kind] == base for link in links) - (base == old_base) for base in following}
    names = []
    for link in links:
        base = NODES[link.kind]
        names.append(joined(base, following[base]))
        following[base] += 1
    renamed = {}
    for operator in network.operators[position + 1 :]:
        base, number = split(operator.name)
        if moved.get(base):
            renamed[operator.name] = joined(base, number + moved[base])
    return names, renamed


def split(name: str) -> tuple[str, int]:
    """A node's name without its number, and the number: conv2d, conv2d_1, conv2d_2."""
    base, _, number = name.rpartition("_")
    return (base, int(number)) if base and number.isdecimal() else (name, 0)


def joined(base: str, number: int) -> str:
    return f"{base}_{number}" if number else base


def labels(network: Network, position: int, unit: Unit) -> dict[str, tuple[str, ...]]:
    """Old name -> new names of the channel groups that are called otherwise now.

    A group is named after the first weight that writes it; one that no weight writes has a number in order of
    appearance, which moves with the groups that the unit adds in front of it.
    """
    old = network.operators[position]
    (written,) = old.out_groups
    found: dict[str, tuple[str, ...]] = {}
    for label in list(network.groups)[cut(network, position) :]:
        number = re.fullmatch(r"<(\d+)>", label)
        if number:
            found[label] = (f"<{int(number[1]) + unit.born - 1}>",)
    first = opened(network, position)
    for index in range(unit.born):
        found[fresh(index)] = (f"<{first + index}>",)
    producers = network.groups[written].producers
    if unit.written != old.out_groups:
        found[written] = mapped(unit.written, found)
    elif producers[0].parameter == f"{old.module}.weight":
        if unit.writer is not None:
            found[written] = (unit.writer.rpartition(".")[0],)
        elif len(producers) > 1:
            found[written] = (label_of(network, producers[1].parameter),)
        elif unit.own is not None:
            found[written] = (f"<{first + unit.own[1]}>",)
    return found


def label_of(network: Network, parameter: str) -> str:
    """A group's name by its first weight: the layer's path, where no other group has it."""
    layer = parameter.rpartition(".")[0]
    others = sum(g.producers[0].parameter.rpartition(".")[0] == layer for g in network.groups.values() if g.producers)
    return layer if layer and not others else parameter


def cut(network: Network, position: int) -> int:
    """How many groups appear before the operator at this position does: groups are kept in order of appearance."""
    before = {group for o in network.operators[:position] for group in (*o.in_groups, *o.out_groups)}
    before.update(network.operators[position].in_groups)
    seen = {group for o in network.operators for group in (*o.in_groups, *o.out_groups)}
    return next((i for i, group in enumerate(network.groups) if group in seen - before), len(network.groups))


def opened(network: Network, position: int) -> int:
    """How many channel groups a trace opens before this operator writes its own; the input's is the first."""
    count, seen = 1, set()
    for operator in network.operators[:position]:
        new = 0
        if operator.kind in LAYERS and not operator.depthwise:
            new = int(operator.groups > 1 or operator.module not in seen)  # weights used again write their group
            seen.add(operator.module)
        elif operator.kind in MAKES:
            new = int(operator.in_groups != operator.out_groups)
        count = max(count + new, _highest((*operator.in_groups, *operator.out_groups)) + 1)
    return max(count, _highest(network.operators[position].in_groups) + 1)


def _highest(groups: tuple[str, ...]) -> int:
    numbers = [re.fullmatch(r"<(\d+)>", group) for group in groups]
    return max((int(number[1]) for number in numbers if number), default=-1)


# ---------------------------------------------------------------- reasons


def reworded(reason: str | None, renamed: Mapping[str, str]) -> str | None:
    """A refusal with the present names of the operators that it names; what a model's own forward said is kept."""
    if reason is None or reason.startswith("the model's forward fails"):
        return reason
    return re.sub(r"(?<=\bat )\w+|^\w+(?= reads )", lambda found: renamed.get(found[0], found[0]), reason)


def reason_read(network: Network, name: str, position: int, reason: str) -> str | None:
    """Why a group must not change that the unit at this position reads: the first reason that a trace meets stays.

    None: the group's own reason stays.
    """
    return reason if met_at(network, name, network.groups[name]) > position else None


def reason_written(network: Network, name: str, position: int, unit: Unit) -> str | None:
    """Why the old group must not change once no dense layer writes it; None: the group's own reason stays.

    Where channels are joined (a sum), the reason of those that appeared first stays.
    """
    if unit.own is None:
        return None
    group, old = network.groups[name], network.operators[position]
    met = met_at(network, name, group)
    if met < position:
        return None
    if met < len(network.operators) and group.producers[0].parameter != f"{old.module}.weight":
        sums = (i for i, o in enumerate(network.operators) if i > position and name in o.out_groups)
        first = next((i for i in sums if len(network.operators[i].inputs) > 1), len(network.operators))
        if met < first:
            return None
    return unit.own[0]


def met_at(network: Network, name: str, group: ChannelGroup) -> int:
    """Position of the operator for which a trace refuses the group; behind all of them for none or a late reason.

    -1 where it cannot be told.
    """
    reason, operators = group.refused, network.operators
    if reason is None or LATE.match(reason):
        return len(operators)
    found = re.search(r"\bat (\w+)", reason) or re.match(r"(\w+) reads weights", reason)
    if found:
        places = [i for i, o in enumerate(operators) if o.name == found[1]]
        if not places:  # a split, whose pieces are the operators
            places = [i for i, o in enumerate(operators) if o.kind == "slice" and name in o.in_groups]
    else:
        places = [i for i, o in enumerate(operators) if _fixes(o, reason) and name in (*o.in_groups, *o.out_groups)]
    return min(places, default=-1)


def _fixes(operator: Operator, reason: str) -> bool:
    grouped = operator.groups > 1 and not operator.depthwise and operator.kind in LAYERS
    return grouped and f"({operator.groups} groups) fixes it" in reason
