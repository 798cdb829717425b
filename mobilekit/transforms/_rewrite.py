"""Replaces a layer of a Network by a chain of layers, as a trace of the changed module would give it. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mobilekit.errors import UnsupportedError
from mobilekit.types import Axis, ChannelGroup, Network, Operator, Precision, Producer

NODES = {"conv": "conv2d", "linear": "linear"}
"""Kind of an operator -> how torch.export names its nodes."""
NARROW = "has one channel only"
"""Why a trace refuses to prune a group of width 1."""


@dataclass(frozen=True)
class Link:
    """One layer of a chain: a dense or depthwise convolution, or a linear layer.

    `layer` is its name inside the chain's `nn.Sequential` ("0"); `width` its output channels, None for the channels
    that the old layer wrote. `groups` above 1 make it depthwise and have to be its channel count. `activation` is the
    function that is fused behind it. `vectors` are further parameters and buffers with one value an output channel,
    named as in the Sequential ("0.bias", or "1.weight" and "1.running_var" of a batch norm behind it).
    """

    layer: str
    kind: Literal["conv", "linear"]
    width: int | None
    out_size: tuple[int, int] = (1, 1)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str | None = None
    vectors: tuple[str, ...] = ()


@dataclass
class _Chain:
    """What the new layers bring into the network."""

    operators: list[Operator] = field(default_factory=list)
    groups: dict[str, ChannelGroup] = field(default_factory=dict)
    axes: dict[str, dict[int, Axis]] = field(default_factory=dict)


def replaceable(network: Network, module_path: str) -> Operator:
    """The operator of the dense convolution or linear layer at this path, where a chain can take its place.

    Raises UnsupportedError for a path without such a layer, for layers that are used several times or do more than
    one operator, and for weights that something else reads too.
    """
    there = [o for o in network.operators if o.module == module_path] if module_path else []
    found = [o for o in there if o.kind in NODES]
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
    """The network with the layer at `module_path` replaced by an `nn.Sequential` of these layers.

    The last link writes the old channels; the old bias goes to it, and what was fused into the layer stays fused
    into it. Operators are renumbered and channel groups renamed as a trace would name them. A visible padding
    operator behind a layer whose own forward pads by no zeros at all may be numbered differently: a Network does not
    show such nodes.

    Raises UnsupportedError where `replaceable` does, and for links that do not fit each other or the layer.
    """
    old = replaceable(network, module_path)
    position = network.operators.index(old)
    names, renamed = _numbered(network, position, links)
    chain = _chain(network, old, links, names)
    written = sum(1 for link, operator in zip(links, chain.operators, strict=True) if not operator.depthwise)
    labels = _labels(network, position, f"{module_path}.{links[-1].layer}", shift=written - 1)
    operators = (
        *(_renamed(o, renamed, labels) for o in network.operators[:position]),
        *(_renamed(o, {}, labels) for o in chain.operators),
        *(_renamed(o, {**renamed, old.name: names[-1]}, labels) for o in network.operators[position + 1 :]),
    )
    return network.model_copy(
        update={
            "operators": operators,
            "groups": _groups(network, position, chain, (labels, renamed)),
            "axes": _axes(network, old, chain, labels),
            "precisions": _precisions(network, old, names, renamed),
        }
    )


# ---------------------------------------------------------------- names


def _split(name: str) -> tuple[str, int]:
    """A node's name without its number, and the number: conv2d, conv2d_1, conv2d_2."""
    base, _, number = name.rpartition("_")
    return (base, int(number)) if base and number.isdecimal() else (name, 0)


def _joined(base: str, number: int) -> str:
    return f"{base}_{number}" if number else base


def _numbered(network: Network, position: int, links: Sequence[Link]) -> tuple[list[str], dict[str, str]]:
    """Names of the links' operators, and old name -> new name of the later operators whose number changes.

    Numbers move by as many nodes as the chain adds, so that nodes which are no operators keep their place.
    """
    old_base = _split(network.operators[position].name)[0]
    following: dict[str, int] = {}
    for base in {NODES[link.kind] for link in links} | {old_base}:
        earlier = [_split(o.name)[1] + 1 for o in network.operators[:position] if _split(o.name)[0] == base]
        own = _split(network.operators[position].name)[1] if base == old_base else None
        following[base] = own if own is not None else max(earlier, default=0)
    moved = {base: sum(NODES[link.kind] == base for link in links) - (base == old_base) for base in following}
    names = []
    for link in links:
        base = NODES[link.kind]
        names.append(_joined(base, following[base]))
        following[base] += 1
    renamed = {}
    for operator in network.operators[position + 1 :]:
        base, number = _split(operator.name)
        if moved.get(base):
            renamed[operator.name] = _joined(base, number + moved[base])
    return names, renamed


def _labels(network: Network, position: int, last: str, shift: int) -> dict[str, str]:
    """Old name -> new name of the channel groups that are called otherwise now.

    A group is named after the first weight that writes it; one that no weight writes has a number in order of
    appearance, which moves with the groups that the chain adds in front of it.
    """
    old = network.operators[position]
    (written,) = old.out_groups
    labels = {}
    if network.groups[written].producers[0].parameter == f"{old.module}.weight":
        labels[written] = last
    for label in list(network.groups)[_cut(network, position) :]:
        number = re.fullmatch(r"<(\d+)>", label)
        if number:
            labels[label] = f"<{int(number[1]) + shift}>"
    return labels


def _cut(network: Network, position: int) -> int:
    """How many groups appear before the operator at this position does: groups are kept in order of appearance."""
    before = {group for o in network.operators[:position] for group in (*o.in_groups, *o.out_groups)}
    before.update(network.operators[position].in_groups)
    seen = {group for o in network.operators for group in (*o.in_groups, *o.out_groups)}
    return next((i for i, group in enumerate(network.groups) if group in seen - before), len(network.groups))


def _renamed(operator: Operator, names: Mapping[str, str], labels: Mapping[str, str]) -> Operator:
    return operator.model_copy(
        update={
            "name": names.get(operator.name, operator.name),
            "inputs": tuple(names.get(name, name) for name in operator.inputs),
            "in_groups": _relabelled(operator.in_groups, labels),
            "out_groups": _relabelled(operator.out_groups, labels),
        }
    )


def _relabelled(groups: tuple[str, ...], labels: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(labels.get(group, group) for group in groups)


# ---------------------------------------------------------------- the new layers


def _chain(network: Network, old: Operator, links: Sequence[Link], names: Sequence[str]) -> _Chain:
    """Operators, groups and axes of the new layers; outer groups have their old names still."""
    _check_links(old, links)
    chain = _Chain()
    inputs, size = Axis(groups=old.in_groups, repeat=old.in_repeat), old.in_size
    source = old.inputs
    for link, name in zip(links, names, strict=True):
        path = f"{old.module}.{link.layer}"
        known = {**network.groups, **chain.groups}
        wide = sum(known[group].width for group in inputs.groups) * inputs.repeat
        depthwise = _is_depthwise(link, path, wide)
        outputs = inputs if depthwise else Axis(groups=old.out_groups if link is links[-1] else (path,))
        chain.axes[f"{path}.weight"] = {0: inputs} if depthwise else {1: inputs, 0: outputs}
        vectors = [f"{old.module}.{vector}" for vector in link.vectors]
        if link is links[-1] and f"{old.module}.bias" in network.axes:
            vectors.insert(0, f"{path}.bias")
        chain.axes.update({vector: {0: outputs} for vector in vectors})
        if not depthwise and link.width is not None:
            written = (Producer(parameter=f"{path}.weight", dim=0),)
            refused = NARROW if link.width == 1 else None
            chain.groups[path] = ChannelGroup(width=link.width, refused=refused, producers=written)
        chain.operators.append(
            Operator(
                name=name,
                kind=link.kind,
                module=path,
                inputs=source,
                in_groups=inputs.groups,
                out_groups=outputs.groups,
                in_size=size,
                out_size=link.out_size,
                in_repeat=inputs.repeat,
                kernel=link.kernel,
                stride=link.stride,
                groups=link.groups,
                depthwise=depthwise,
                activation=old.activation if link is links[-1] else link.activation,
            )
        )
        inputs, size, source = outputs, link.out_size, (name,)
    return chain


def _check_links(old: Operator, links: Sequence[Link]) -> None:
    place = f"'{old.module}' cannot be replaced by this chain"
    if not links or links[-1].width is not None or any(link.width is None for link in links[:-1]):
        raise UnsupportedError(f"{place}: the last layer, and no other, has to write the old channels")
    if links[-1].groups > 1 or links[-1].activation:
        raise UnsupportedError(f"{place}: its last layer has to be dense and without an activation of its own")
    if links[-1].out_size != old.out_size:
        raise UnsupportedError(f"{place}: it gives a map of {links[-1].out_size} instead of {old.out_size}")
    if len({link.layer for link in links}) < len(links):
        raise UnsupportedError(f"{place}: two of its layers have the same name")
    if any(link.kind != old.kind for link in links):
        raise UnsupportedError(f"{place}: a {old.kind} layer becomes {old.kind} layers only")


def _is_depthwise(link: Link, path: str, in_channels: int) -> bool:
    if link.groups == 1:
        return False
    if not link.groups == link.width == in_channels:
        raise UnsupportedError(f"'{path}' cannot be a convolution of {link.groups} groups: dense or depthwise only")
    return True


# ---------------------------------------------------------------- the network around them


def _groups(
    network: Network, position: int, chain: _Chain, names: tuple[Mapping[str, str], Mapping[str, str]]
) -> dict[str, ChannelGroup]:
    """All groups in order of appearance, with the new layer among the producers."""
    labels, renamed = names
    old, last = network.operators[position], f"{chain.operators[-1].module}.weight"

    def mended(group: ChannelGroup) -> ChannelGroup:
        producers = tuple(
            producer.model_copy(update={"parameter": last})
            if producer.parameter == f"{old.module}.weight"
            else producer
            for producer in group.producers
        )
        return group.model_copy(update={"producers": producers, "refused": _reworded(group.refused, renamed)})

    known = [(labels.get(label, label), mended(group)) for label, group in network.groups.items()]
    cut = _cut(network, position)
    return dict([*known[:cut], *chain.groups.items(), *known[cut:]])


def _reworded(reason: str | None, renamed: Mapping[str, str]) -> str | None:
    """A refusal with the present names of the operators that it names; what a model's own forward said is kept."""
    if reason is None or reason.startswith("the model's forward fails"):
        return reason
    return re.sub(r"(?<=\bat )\w+|^\w+(?= reads )", lambda found: renamed.get(found[0], found[0]), reason)


def _axes(network: Network, old: Operator, chain: _Chain, labels: Mapping[str, str]) -> dict[str, dict[int, Axis]]:
    """Axes of all parameters; the new ones stand where the old weight stood."""
    axes: dict[str, dict[int, Axis]] = {}
    for name, dims in network.axes.items():
        if name == f"{old.module}.weight":
            axes.update(chain.axes)
        elif name != f"{old.module}.bias":
            axes[name] = dims
    return {
        name: {dim: axis.model_copy(update={"groups": _relabelled(axis.groups, labels)}) for dim, axis in dims.items()}
        for name, dims in axes.items()
    }


def _precisions(
    network: Network, old: Operator, names: Sequence[str], renamed: Mapping[str, str]
) -> dict[str, Precision]:
    """Precisions under the new names; the new layers run in the old one's."""
    kept = {renamed.get(name, name): value for name, value in network.precisions.items() if name != old.name}
    own = network.precisions.get(old.name)
    return kept if own is None else {**kept, **dict.fromkeys(names, own)}
