"""What a walk over an exported graph has found so far: operators, the channels of each tensor, axes of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mobilekit.errors import BadInputError
from mobilekit.network.channels import ChannelGroups, Layout
from mobilekit.network.nodes import (
    argument,
    gives_tensors,
    module_path,
    node_argument,
    op_name,
    result_of,
    shape_of,
    size_of,
    tensors_in,
)
from mobilekit.types import Producer

SPLITS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"})


@dataclass
class Draft:
    """An operator before its channel groups have their final names."""

    name: str
    kind: str
    module: str
    inputs: tuple[str, ...]
    in_layout: Layout
    out_layout: Layout
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    depthwise: bool = False
    activation: str | None = None
    ceil: bool = False


class Walk:
    """The books that the rules of the operators keep while a graph is walked in order."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.graph = program.graph
        signature = program.graph_signature
        self.weights: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        """Placeholder name -> parameter or buffer name."""
        self.user_inputs = set(signature.user_inputs)
        self.channels = ChannelGroups()
        self.layouts: dict[fx.Node, Layout] = {}
        self.sources: dict[fx.Node, str] = {}
        """Node -> name of the operator whose output it is (free nodes pass it on)."""
        self.axes: dict[str, dict[int, Layout]] = {}
        self.operators: dict[str, Draft] = {}
        self.producers: dict[int, list[Producer]] = {}
        self.result_shapes: list[tuple[int, ...]] = []
        self.absorbed: set[fx.Node] = set()
        """Nodes that are part of an operator which an earlier node has entered."""
        self._pieces: dict[fx.Node, list[fx.Node]] = {}
        """Nodes that give several tensors -> the data they were made of."""
        self._explained: set[tuple[fx.Node, fx.Node]] = set()
        """Parameters with the nodes whose reading of them the axes account for."""

    # ------------------------------------------------------------ layouts

    def data(self, node: fx.Node) -> list[fx.Node]:
        """The node's inputs that depend on the network's input, in order."""
        return [n for n in tensors_in(node) if n in self.layouts]

    def layout(self, node: fx.Node) -> Layout:
        """Channels of a tensor; one that was computed from constants alone keeps its size."""
        if node not in self.layouts:
            width = (*shape_of(node), 1, 1)[1]
            self.layouts[node] = Layout((self.channels.new(width, "it is computed from constants"),))
        return self.layouts[node]

    def begin(self, node: fx.Node) -> None:
        """Take in the network's input."""
        shape = shape_of(node)
        if len(shape) < 2:
            raise BadInputError(f"the model's input has shape {shape}: a batch axis and a channel axis are needed")
        self.layouts[node] = Layout((self.channels.new(shape[1], "it is the network's input"),))
        self.sources[node] = "input"

    def end(self, node: fx.Node) -> None:
        """Take in the network's outputs: their channels are what the caller counts on."""
        for result in tensors_in(node):
            self.result_shapes.append(shape_of(result))
            if result in self.layouts:
                self.channels.refuse(self.layouts[result], "it is the network's output")

    def pass_on(self, node: fx.Node, data: fx.Node, layout: Layout | None = None) -> None:
        """The node costs nothing: it is its input in another form."""
        self.layouts[node] = layout or self.layout(data)
        if data in self.sources:
            self.sources[node] = self.sources[data]

    def unknown(self, node: fx.Node, what: str, kind: str = "other") -> None:
        """Refuse every channel group that goes in, and price the node as movement of its data."""
        if not gives_tensors(node):  # a size, or an assertion that export put in
            return
        data = self.data(node)
        if isinstance(node.meta["val"], torch.Tensor):
            self.as_it_is(node, data, what, kind)
        else:
            self._pieces[node] = data
            for source in data:
                self.channels.refuse(self.layouts[source], _needs(what, node))

    def piece(self, node: fx.Node) -> None:
        """One of the tensors that an unknown operator gave; a piece of the channels is a slice."""
        whole = node.args[0]
        if isinstance(whole, fx.Node) and whole in self._pieces and gives_tensors(node):
            data = self._pieces[whole]
            along_channels = op_name(whole) in SPLITS and argument(whole, 2, "dim", 0) in (1, 1 - len(shape_of(node)))
            self.as_it_is(node, data, op_name(whole), "slice" if along_channels else "other", at=whole)

    def as_it_is(
        self, node: fx.Node, data: list[fx.Node], what: str, kind: str, at: fx.Node | None = None, **facts: Any
    ) -> None:
        """Enter an operator that reads `data` and whose channels, on both sides, must not change."""
        shape, reason = shape_of(node), _needs(what, at or node)
        for source in data:
            self.channels.refuse(self.layouts[source], reason)
        width = shape[1] if len(shape) > 1 else sum(shape) or 1
        self.layouts[node] = Layout((self.channels.new(width, reason),))
        if data:
            self.operator(node, kind, data, **facts)

    def same_channels(self, node: fx.Node, kind: str, **facts: Any) -> None:
        """Enter an operator that works on each channel alone."""
        data, result = node_argument(node, 0), result_of(node)
        if result is None:
            self.unknown(node, f"{op_name(node)} with indices")
        else:
            self.layouts[result] = self.layout(data)
            self.operator(result, kind, [data], **facts)

    def check(self, node: fx.Node) -> None:
        """Refuse what the rules followed wrongly: a layout that does not add up to the tensor's axis 1."""
        shape = shape_of(node)
        if node in self.layouts and len(shape) > 1 and self.channels.width(self.layouts[node]) != shape[1]:
            reason = f"{op_name(node)} at {node.name} changes its channels in an unknown way"
            self.channels.refuse(self.layouts[node], reason)
            for source in self.data(node):
                self.channels.refuse(self.layouts[source], reason)
            self.layouts[node] = Layout((self.channels.new(shape[1], reason),))
            if node.name in self.operators:
                self.operators[node.name].out_layout = self.layouts[node]

    # ------------------------------------------------------------ parameters

    def axis(self, reader: fx.Node, parameter: fx.Node, dim: int, layout: Layout) -> None:
        """State that this axis of the parameter runs over these channels where `reader` reads it."""
        name = self.weights.get(parameter.name)
        if name is None:
            reason = f"{reader.name} reads weights that are computed and no parameter of the module"
            self.channels.refuse(layout, reason)
            if parameter in self.layouts:  # computed from the network's input
                self.channels.refuse(self.layouts[parameter], reason)
            return
        self._explained.add((parameter, reader))
        known = self.axes.setdefault(name, {}).setdefault(dim, layout)
        if known is not layout:
            self.channels.join(known, layout, f"the shared layer {name}")

    def produced(self, reader: fx.Node, weight: fx.Node, dim: int) -> Layout:
        """Output channels of a weight: a new group, or the one it already has where a layer is used twice."""
        name = self.weights.get(weight.name)
        known = self.axes.get(name or "", {}).get(dim)
        if known is not None:
            self.axis(reader, weight, dim, known)
            return known
        group = self.channels.new(shape_of(weight)[dim])
        layout = Layout((group,))
        self.axis(reader, weight, dim, layout)
        if name is not None:
            self.producers.setdefault(group, []).append(Producer(parameter=name, dim=dim))
        return layout

    def refuse_unexplained(self) -> None:
        """Refuse the channels of parameters that something else reads too (a norm over a filter, for instance)."""
        for parameter in self.graph.nodes:
            name = self.weights.get(parameter.name) if parameter.op == "placeholder" else None
            for reader in parameter.users if name in self.axes else ():
                if (parameter, reader) not in self._explained and gives_tensors(reader):
                    for layout in self.axes[name or ""].values():
                        self.channels.refuse(layout, f"{op_name(reader)} at {reader.name} also reads {name}")

    # ------------------------------------------------------------ operators

    def fusable(self, data: fx.Node) -> Draft | None:
        """The operator that made `data`, where nothing else reads it, nor any free form of it on the way."""
        source = self.sources.get(data)
        node = data
        while len(node.users) == 1:
            if node.name == source:
                return self.operators.get(source)
            before = [n for n in node.all_input_nodes if self.sources.get(n) == source]
            if not before:
                return None
            node = before[0]
        return None

    def operator(self, node: fx.Node, kind: str, data: list[fx.Node], **facts: Any) -> None:
        """Enter an operator that reads `data` and gives the node's tensor."""
        weight = facts.pop("weight", None)
        path = self.weights.get(weight.name, "").rpartition(".")[0] if isinstance(weight, fx.Node) else ""
        layouts = [self.layout(n) for n in data]
        joined = Layout(tuple(g for layout in layouts for g in layout.groups), layouts[0].repeat)
        self.operators[node.name] = Draft(
            name=node.name,
            kind=kind,
            module=path or module_path(node),
            inputs=tuple(self.sources[n] for n in data if n in self.sources),
            in_layout=joined if kind == "concat" else layouts[0],
            out_layout=self.layouts[node],
            in_size=size_of(data[0]),
            out_size=size_of(node),
            **facts,
        )
        self.sources[node] = node.name


def _needs(what: str, node: fx.Node) -> str:
    return f"{what} at {node.name} needs its channels as they are"
