"""Replaces a layer of a Network by other layers, as a trace of the changed module would give it. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mobilekit.errors import UnsupportedError
from mobilekit.transforms._links import WEIGHTED, Link, Unit, mapped, unit
from mobilekit.transforms._naming import Labels, cut, labels, numbered, reason_read, reason_written, reworded
from mobilekit.types import Axis, ChannelGroup, Network, Operator, Precision

__all__ = ["Link", "parted_refusal", "replaceable", "replaced"]


def replaceable(network: Network, module_path: str) -> Operator:
    """The operator of the dense convolution or linear layer at this path, where other layers can take its place.

    Raises UnsupportedError for a path without such a layer, for layers that are used several times or do more than
    one operator, and for weights that something else reads too.
    """
    there = [o for o in network.operators if o.module == module_path] if module_path else []
    found = [o for o in there if o.kind in WEIGHTED]
    if not found:
        kinds = " and ".join(sorted({o.kind for o in there}))
        known = f"the operators there are {kinds}" if kinds else "the network has no such layer"
        raise UnsupportedError(f"'{module_path}' cannot be replaced by a chain of layers: {known}")
    if len(found) > 1:
        raise UnsupportedError(f"'{module_path}' cannot be replaced: its weights are used {len(found)} times")
    if len(there) > 1:
        more = next(o.kind for o in there if o not in found)
        raise UnsupportedError(f"'{module_path}' cannot be replaced: its forward does more than the layer ({more})")
    if found[0].groups > 1:
        raise UnsupportedError(f"'{module_path}' cannot be replaced: it is a convolution of {found[0].groups} groups")
    _check_parameters(network, module_path)
    return found[0]


def _check_parameters(network: Network, path: str) -> None:
    own = {name for name in network.axes if name.rpartition(".")[0] == path or name.startswith(f"{path}.")}
    weight = f"{path}.weight"
    if weight not in own or set(network.axes[weight]) != {0, 1} or own - {weight, f"{path}.bias"}:
        raise UnsupportedError(f"'{path}' cannot be replaced: it does not hold one weight, and a bias at most")
    if not any(producer.parameter == weight for group in network.groups.values() for producer in group.producers):
        raise UnsupportedError(f"'{path}' cannot be replaced: its weight does not write channels of its own")
    readers = (group.refused for group in network.groups.values() if group.refused)
    if any(reason.endswith((f"also reads {weight}", f"also reads {path}.bias")) for reason in readers):
        raise UnsupportedError(f"'{path}' cannot be replaced: something else reads its weights too")


def replaced(network: Network, module_path: str, links: Sequence[Link]) -> Network:
    """The network with the layer at `module_path` replaced by a module of these layers.

    The last link gives the old channels; the old bias goes to it, and what was fused into the layer stays fused
    into it. Operators are renumbered and channel groups renamed as a trace would name them; groups that grouped
    convolutions, shuffles and slices fix are refused in the trace's words. A visible padding operator behind a layer
    whose own forward pads by no zeros at all may be numbered differently: a Network does not show such nodes.

    Raises UnsupportedError where `replaceable` does, and for links that do not fit each other or the layer.
    """
    old = replaceable(network, module_path)
    position = network.operators.index(old)
    names, renamed = numbered(network, position, links)
    new = unit(network, old, links, names)
    reason = None if new.written == old.out_groups else parted_refusal(network, old)
    if reason is not None:
        raise UnsupportedError(f"'{module_path}' cannot be replaced by a concatenation: {reason}")
    known = labels(network, position, new)
    operators = (
        *(relabelled(o, renamed, known) for o in network.operators[:position]),
        *(relabelled(o, {}, known) for o in new.operators),
        *(relabelled(o, {**renamed, old.name: names[-1]}, known) for o in network.operators[position + 1 :]),
    )
    return network.model_copy(
        update={
            "operators": operators,
            "groups": _groups(network, position, new, (known, renamed)),
            "axes": _axes(network, old, new, known),
            "precisions": _precisions(network, old, names, renamed),
        }
    )


def parted_refusal(network: Network, old: Operator) -> str | None:
    """Why the channels that this operator writes cannot come in parts (a concatenation), or None.

    They cannot where they are joined with other channels, which would have to be cut in the same parts.
    """
    group = network.groups[old.out_groups[0]]
    others = [p.parameter for p in group.producers if p.parameter != f"{old.module}.weight"]
    if others:
        return f"its channels are added to those of {others[0].rpartition('.')[0] or others[0]}"
    return None if group.refused == "it is the network's output" else group.refused


def relabelled(operator: Operator, names: Mapping[str, str], known: Labels) -> Operator:
    """The operator with the present names of operators and channel groups."""
    return operator.model_copy(
        update={
            "name": names.get(operator.name, operator.name),
            "inputs": tuple(names.get(name, name) for name in operator.inputs),
            "in_groups": mapped(operator.in_groups, known),
            "out_groups": mapped(operator.out_groups, known),
        }
    )


def _groups(
    network: Network, position: int, new: Unit, names: tuple[Labels, Mapping[str, str]]
) -> dict[str, ChannelGroup]:
    """All groups in order of appearance: the new ones, and the old ones with their present producers and reasons."""
    known, renamed = names
    old = network.operators[position]
    (written,) = old.out_groups
    parted = new.written != old.out_groups
    found = [
        (name, _mended(network, (name, position), new, renamed))
        for name in network.groups
        if not (parted and name == written)
    ]
    inner = list(new.groups.items())
    if parted:
        outside = network.groups[written].refused
        inner = [
            (name, g.model_copy(update={"refused": outside or g.refused}) if name in new.written else g)
            for name, g in inner
        ]
    place = cut(network, position)
    every = [*found[:place], *inner, *found[place:]]
    return {mapped((name,), known)[0]: group for name, group in every}


def _mended(network: Network, at: tuple[str, int], new: Unit, renamed: Mapping[str, str]) -> ChannelGroup:
    """An old group, given by its name and the position of the replaced operator, as it is now."""
    name, position = at
    group, old = network.groups[name], network.operators[position]
    weight, producers = f"{old.module}.weight", group.producers
    if new.writer is not None:
        mended = {"parameter": new.writer}
        producers = tuple(p.model_copy(update=mended) if p.parameter == weight else p for p in producers)
    else:
        producers = tuple(p for p in producers if p.parameter != weight)
    refused = None
    if name in new.refused:
        refused = reason_read(network, name, position, new.refused[name])
    if refused is None and name in old.out_groups:
        refused = reason_written(network, name, position, new)
    return group.model_copy(update={"producers": producers, "refused": refused or reworded(group.refused, renamed)})


def _axes(network: Network, old: Operator, new: Unit, known: Labels) -> dict[str, dict[int, Axis]]:
    """Axes of all parameters; the new ones stand where the old weight stood."""
    axes: dict[str, dict[int, Axis]] = {}
    for name, dims in network.axes.items():
        if name == f"{old.module}.weight":
            axes.update(new.axes)
        elif name != f"{old.module}.bias":
            axes[name] = dims
    return {
        name: {dim: axis.model_copy(update={"groups": mapped(axis.groups, known)}) for dim, axis in dims.items()}
        for name, dims in axes.items()
    }


def _precisions(
    network: Network, old: Operator, names: Sequence[str], renamed: Mapping[str, str]
) -> dict[str, Precision]:
    """Precisions under the new names; the new layers run in the old one's."""
    kept = {renamed.get(name, name): value for name, value in network.precisions.items() if name != old.name}
    own = network.precisions.get(old.name)
    return kept if own is None else {**kept, **dict.fromkeys(names, own)}
