"""Layers that take the place of one layer, a chain or a small graph, and the operators that they are. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mobilekit.errors import UnsupportedError
from mobilekit.types import Axis, ChannelGroup, Network, Operator, OperatorShape, Producer

NODES = {"conv": "conv2d", "linear": "linear", "shuffle": "channel_shuffle", "slice": "narrow", "concat": "cat"}
"""Kind of a link -> how torch.export names its nodes."""
WEIGHTED = ("conv", "linear")
INPUT = "<input>"
"""In `Link.reads`: what the old layer reads."""
NARROW = "has one channel only"
"""Why a trace refuses to prune a group of width 1."""


@dataclass(frozen=True)
class Link:
    """One of the new layers: a convolution, a linear layer, or a movement of channels.

    `layer` is its name inside the new module ("0"); `width` its output channels, None for the channels that the old
    layer wrote. A convolution has `groups`; a shuffle exchanges its `groups` with the channels in each (Zhang et al.
    2018, arXiv:1707.01083); a slice takes `width` channels from `start` on; a concatenation joins what it reads.
    `reads` names links before it, or INPUT; empty: the link just before, and INPUT for the first.

    `activation` is the function that is fused behind it. `vectors` are further parameters and buffers with one value
    an output channel, named as in the module ("0.bias", or "1.weight" and "1.running_var" of a batch norm behind it).
    `spatial` marks the layers that move over the map as the old one did: its padding and dilation go to them.
    """

    layer: str
    kind: Literal["conv", "linear", "shuffle", "slice", "concat"]
    width: int | None
    out_size: tuple[int, int] = (1, 1)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str | None = None
    vectors: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    start: int = 0
    spatial: bool = False


def sources(links: Sequence[Link]) -> list[tuple[str, ...]]:
    """What each link reads, by name."""
    before = [INPUT, *(link.layer for link in links)]
    return [link.reads or (before[index],) for index, link in enumerate(links)]


def macs(shape: OperatorShape, links: Sequence[Link]) -> int:
    """Multiply-accumulates of one inference of the links in the layer's place."""
    widths, total = {INPUT: shape.in_channels}, 0
    for link, reads in zip(links, sources(links), strict=True):
        widths[link.layer] = shape.out_channels if link.width is None else link.width
        if link.kind in WEIGHTED:
            taps = link.kernel[0] * link.kernel[1] * link.out_size[0] * link.out_size[1]
            total += widths[reads[0]] // link.groups * widths[link.layer] * taps
    return total


@dataclass
class Unit:
    """What the new layers bring into a network; groups of the network have their old names still."""

    operators: list[Operator] = field(default_factory=list)
    groups: dict[str, ChannelGroup] = field(default_factory=dict)
    """New channel groups in order; those that no weight writes are called by `fresh`."""
    axes: dict[str, dict[int, Axis]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Old groups that the new layers read and that must not change for it -> why."""
    written: tuple[str, ...] = ()
    """Groups of the channels that the last layer writes."""
    writer: str | None = None
    """The weight that writes the old group now; None: no dense layer does."""
    born: int = 0
    """Groups that a trace opens for the new layers."""
    own: tuple[str, int] | None = None
    """Where no weight writes the old group: why it must not change, and how many groups were opened before it."""


def fresh(number: int) -> str:
    """What the group is called that the unit opens as this one (0, 1, ...), until the trace's number is known."""
    return f"<new {number}>"


@dataclass(frozen=True)
class _Value:
    """A tensor inside the unit: its channels, map size, and the operators that made it."""

    axis: Axis
    size: tuple[int, int]
    made_by: tuple[str, ...]


def unit(network: Network, old: Operator, links: Sequence[Link], names: Sequence[str]) -> Unit:
    """The operators, groups and axes of the links in the old operator's place.

    Raises UnsupportedError for links that do not fit each other or the layer.
    """
    _check(old, links)
    build = _Build(network, old, links)
    for index, name in enumerate(names):
        build.add(index, name)
    found = build.unit
    found.written = found.operators[-1].out_groups
    for name, group in found.groups.items():
        if group.width == 1 and group.refused is None:
            found.groups[name] = group.model_copy(update={"refused": NARROW})
    return found


def _check(old: Operator, links: Sequence[Link]) -> None:
    place = f"'{old.module}' cannot be replaced by this chain"
    if not links or links[-1].width is not None or any(link.width is None for link in links[:-1]):
        raise UnsupportedError(f"{place}: the last layer, and no other, has to write the old channels")
    if links[-1].kind not in WEIGHTED or links[-1].activation:
        raise UnsupportedError(f"{place}: its last layer has to have weights, and no activation of its own")
    if links[-1].out_size != old.out_size:
        raise UnsupportedError(f"{place}: it gives a map of {links[-1].out_size} instead of {old.out_size}")
    if len({link.layer for link in links}) < len(links):
        raise UnsupportedError(f"{place}: two of its layers have the same name")
    if any(link.kind in WEIGHTED and link.kind != old.kind for link in links):
        raise UnsupportedError(f"{place}: a {old.kind} layer becomes {old.kind} layers only")


class _Build:
    """Follows the links as a trace follows the module made of them."""

    def __init__(self, network: Network, old: Operator, links: Sequence[Link]) -> None:
        self.network, self.old, self.links, self.unit = network, old, links, Unit()
        self.reads = sources(links)
        self.values = {INPUT: _Value(Axis(groups=old.in_groups, repeat=old.in_repeat), old.in_size, old.inputs)}
        self.outputs = network.width(old.out_groups)
        widths = {INPUT: network.width(old.in_groups) * old.in_repeat}
        for link, reads in zip(links, self.reads, strict=True):
            if any(name not in widths for name in reads):
                raise UnsupportedError(f"'{old.module}.{link.layer}' cannot be there: it reads what comes after it")
            widths[link.layer] = self.outputs if link.width is None else link.width
        self.widths = widths
        self.last = max(i for i in range(len(links)) if not self._depthwise(i))
        """The link whose channels leave the unit: depthwise ones behind it pass them on."""

    def _depthwise(self, index: int) -> bool:
        link, inside = self.links[index], self.widths[self.reads[index][0]]
        return link.kind == "conv" and 1 < link.groups == inside == self.widths[link.layer]

    def add(self, index: int, name: str) -> None:
        """Take in one link, whose operator has this name."""
        link, read = self.links[index], [self.values[source] for source in self.reads[index]]
        axis = self._axis(index, name, read)
        known, last = self.values[self.reads[index][0]], index == len(self.links) - 1
        self.unit.operators.append(
            Operator(
                name=name,
                kind=link.kind,
                module=self._path(link) if link.kind in WEIGHTED else self.old.module,
                inputs=tuple(source for value in read for source in value.made_by),
                in_groups=tuple(group for value in read for group in value.axis.groups),
                out_groups=axis.groups,
                in_size=known.size,
                out_size=link.out_size,
                in_repeat=known.axis.repeat,
                kernel=link.kernel,
                stride=link.stride,
                groups=link.groups,
                depthwise=self._depthwise(index),
                activation=self.old.activation if last else link.activation,
            )
        )
        self.values[link.layer] = _Value(axis, link.out_size, (name,))

    def _path(self, link: Link) -> str:
        return f"{self.old.module}.{link.layer}"

    def _axis(self, index: int, name: str, read: Sequence[_Value]) -> Axis:
        """The channels that the link gives, with what it says of those that it reads."""
        link, inputs = self.links[index], read[0].axis
        if link.kind == "concat":
            return Axis(groups=tuple(group for value in read for group in value.axis.groups))
        if link.kind in ("shuffle", "slice"):
            what = "a shuffle" if link.kind == "shuffle" else "a slice"
            return self._fixed(index, inputs, f"{what} of the channels at {name} needs its channels as they are")
        path, weight = self._path(link), f"{self._path(link)}.weight"
        if self._depthwise(index):
            outputs = inputs
            self.unit.axes[weight] = {0: inputs}
        elif link.groups > 1:
            width, inside = self.widths[link.layer], self.widths[self.reads[index][0]]
            if width % link.groups or inside % link.groups:
                sides = f"{inside} and {width} channels"
                raise UnsupportedError(f"'{path}' cannot be a convolution of {link.groups} groups between {sides}")
            outputs = self._fixed(index, inputs, f"a grouped convolution ({link.groups} groups) fixes it")
        else:
            outputs = self._written(index, path)
            self.unit.axes[weight] = {1: inputs, 0: outputs}
        vectors = [f"{self.old.module}.{vector}" for vector in link.vectors]
        if index == len(self.links) - 1 and f"{self.old.module}.bias" in self.network.axes:
            vectors.insert(0, f"{path}.bias")
        self.unit.axes.update({vector: {0: outputs} for vector in vectors})
        return outputs

    def _written(self, index: int, path: str) -> Axis:
        """Channels that a dense layer writes: the old ones for the last, else its own."""
        self.unit.born += 1
        if index == self.last:
            self.unit.writer = f"{path}.weight"
            return Axis(groups=self.old.out_groups)
        producer = Producer(parameter=f"{path}.weight", dim=0)
        self.unit.groups[path] = ChannelGroup(width=self.widths[self.links[index].layer], producers=(producer,))
        return Axis(groups=(path,))

    def _fixed(self, index: int, inputs: Axis, reason: str) -> Axis:
        """Channels that no parameter runs over: those that are read must not change either."""
        for name in inputs.groups:
            group = self.unit.groups.get(name)
            if group is None:
                self.unit.refused.setdefault(name, reason)
            elif group.refused is None:
                self.unit.groups[name] = group.model_copy(update={"refused": reason})
        number, self.unit.born = self.unit.born, self.unit.born + 1
        if index == self.last:
            self.unit.own = (reason, number)
            return Axis(groups=self.old.out_groups)
        width = self.widths[self.links[index].layer]
        self.unit.groups[fresh(number)] = ChannelGroup(width=width, refused=reason)
        return Axis(groups=(fresh(number),))


def mapped(groups: tuple[str, ...], labels: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Channel groups under their new names; one that was cut in parts becomes several."""
    return tuple(name for group in groups for name in labels.get(group, (group,)))
