"""Channels of one tensor brought closer to each other, for int8 has one scale for all of them.

As SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) does in front of linear layers, here for the streams of a CNN:
what layers, additions and functions in between hand on, up to the layers that read it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from mobilekit.network.folding import check_same
from mobilekit.network.grids import along
from mobilekit.network.layer_calls import CallGraph, out_dim
from mobilekit.network.nodes import op_name, shape_of
from mobilekit.transforms._criteria.subject import run
from mobilekit.transforms._quantisation.recording import Activation, activations, unchanged
from mobilekit.transforms._quantisation.scaling import VIEWS, Reader, flattened, layer_at, multiply, passes_scale
from mobilekit.types import Network

MIGRATED = 0.5
"""Part of a channel's range, as a logarithm, that moves into the weights which read it (the paper's alpha)."""
STEEPEST = 1e3
"""A channel's range counts as at least that part of the largest: what is nearly dead stays finite."""


@dataclass
class Stream:
    """Tensors whose channels can be scaled only together: the layers that write them, and those that read them."""

    writers: list[str] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    reason: str | None = None
    """Why the channels cannot be scaled, from the first place that was met."""

    @property
    def layers(self) -> list[str]:
        """Paths of all layers whose weights are scaled."""
        return [*self.writers, *(reader.layer for reader in self.readers)]


def smooth(
    module: nn.Module, network: Network, inputs: Sequence[torch.Tensor], left: Collection[str] = ()
) -> nn.Module:
    """A copy with the same outputs, where the channels of each stream have ranges that are more alike.

    Channel i of a stream is divided by sqrt(r_i / max r), with r_i its largest magnitude over the inputs (N, C, H, W),
    and what reads it is multiplied by that. Streams that a clamp bounds, that leave the network, or that anything else
    reads stay as they are, and so do those of the layers `left` (paths). `module` has its batch norms folded. Raises
    UnsupportedError where outputs change after all, BadInputError where the module cannot be traced or run.
    """
    smoothed = copy.deepcopy(module).eval()
    found = [
        stream
        for stream in streams(module, network)
        if stream.reason is None and stream.readers and not set(left).intersection(stream.layers)
    ]
    ranges = _ranges(module, network, found, inputs)
    with torch.no_grad():
        for stream, largest in zip(found, ranges, strict=True):
            if largest is not None and bool(largest.isfinite().all()):
                _scale(smoothed, stream, largest)
    check_same(smoothed, module, inputs[0][:1], "channels cannot be scaled")
    return smoothed


def streams(module: nn.Module, network: Network) -> list[Stream]:
    """All streams of a module, in the order of the layers that write first."""
    graph = CallGraph(module, network)
    found, seen = [], set[fx.Node]()
    for call in graph.calls:
        if call.node not in seen:
            growth = _Growth(graph)
            growth.from_(call.node)
            seen |= set(growth.repeats)
            found.append(growth.stream)
    return found


def _scale(module: nn.Module, stream: Stream, largest: torch.Tensor) -> None:
    most = float(largest.max())
    if most <= 0:
        return
    scale = torch.where(largest > 0, (largest / most).clamp(min=1 / STEEPEST) ** MIGRATED, 1.0)
    for path in stream.writers:
        layer = layer_at(module, path)
        layer.weight /= along(scale, layer.weight, out_dim(layer))
        if layer.bias is not None:
            layer.bias /= scale
    for reader in stream.readers:
        multiply(layer_at(module, reader.layer), reader.repeat, scale)


def _ranges(
    module: nn.Module, network: Network, found: Sequence[Stream], inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Largest magnitude of each stream's channels over the inputs; None where nothing of it ran."""
    peaks: list[torch.Tensor | None] = [None] * len(found)

    follows = activations(module, network)

    def note(index: int, layer: nn.Module, tensor: torch.Tensor, repeat: int) -> None:
        channels = -1 if isinstance(layer, nn.Linear) else 1
        values = tensor.detach().abs().movedim(channels, 0).flatten(1).amax(dim=1).reshape(-1, repeat).amax(dim=1)
        before = peaks[index]
        peaks[index] = values if before is None else torch.maximum(before, values)

    def reads(index: int, repeat: int) -> Callable[[nn.Module, Any], None]:
        return lambda layer, given: note(index, layer, given[0], repeat)

    def writes(index: int, act: Activation) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        return lambda layer, _given, output: note(index, layer, act(output), 1)

    handles = []
    for index, stream in enumerate(found):
        for reader in stream.readers:
            layer = module.get_submodule(reader.layer)
            handles.append(layer.register_forward_pre_hook(reads(index, reader.repeat)))
        for path in stream.writers:
            act = follows.get(path, unchanged)
            handles.append(module.get_submodule(path).register_forward_hook(writes(index, act)))
    try:
        with torch.no_grad():
            for batch in inputs:
                run(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return peaks


class _Growth:
    """Finds the stream around one tensor: back to everything that writes it, on to everything that reads it."""

    def __init__(self, graph: CallGraph) -> None:
        self.graph = graph
        self.calls = {call.node: call for call in graph.calls}
        self.stream = Stream()
        self.repeats: dict[fx.Node, int] = {}
        """Tensors of the stream -> features a channel."""

    def from_(self, node: fx.Node) -> None:
        """Visit the node's tensor and all that have to be scaled with it."""
        waiting: Mapping[fx.Node, int] = {node: 1}
        while waiting:
            self.repeats.update(waiting)
            beside: dict[fx.Node, int] = {}
            for each, repeat in waiting.items():
                beside.update(self._sources(each, repeat))
                beside.update(self._users(each, repeat))
            waiting = {each: repeat for each, repeat in beside.items() if each not in self.repeats}

    def _sources(self, node: fx.Node, repeat: int) -> dict[fx.Node, int]:
        """What the tensor is made of, where scaling it means scaling that."""
        call = self.calls.get(node)
        if call is not None:
            self.stream.writers.append(call.path)
            if call.groups > 1 and isinstance(self.graph.module.get_submodule(call.path), nn.ConvTranspose2d):
                self._refuse("a transposed convolution of several groups shares its channels' weights")
            return {}
        if _is_sum(node):
            return dict.fromkeys(node.all_input_nodes, repeat)
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if source is not None and passes_scale(node, source):
            return {source: repeat}
        if source is not None and op_name(node) in VIEWS and flattened(node, 1) is not None:
            return {source: 1 if len(shape_of(source)) == 4 else repeat}
        self._refuse(f"{op_name(node)} at {node.name} writes it")
        return {}

    def _users(self, node: fx.Node, repeat: int) -> dict[fx.Node, int]:
        """The tensors that are scaled with this one, which they are made of."""
        found = {}
        for user in node.users:
            call = self.calls.get(user)
            flat = flattened(user, repeat) if op_name(user) in VIEWS else None
            if call is not None and user.args[0] is node:
                self.stream.readers.append(Reader(call.path, repeat))
            elif _is_sum(user) or passes_scale(user, node):
                found[user] = repeat
            elif flat is not None:
                found[user] = flat
            else:
                self._refuse(f"{'the output' if user.op == 'output' else op_name(user)} reads it")
        return found

    def _refuse(self, reason: str) -> None:
        self.stream.reason = self.stream.reason or reason


def _is_sum(node: fx.Node) -> bool:
    """Whether the node adds tensors of the same shape, as a residual block does."""
    parts = node.args[:2]
    tensors = [each for each in parts if isinstance(each, fx.Node)]
    plain = op_name(node) in ("add", "sub") and len(tensors) == len(parts) == 2
    return plain and all(shape_of(each) == shape_of(node) for each in tensors)
