"""Cross-layer equalisation (Nagel et al. 2019, arXiv:1906.04721, section 4.1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from mobilekit.network.folding import check_same, random_input
from mobilekit.network.grids import along
from mobilekit.network.layer_calls import CallGraph, clipped_at, out_dim
from mobilekit.network.nodes import op_name
from mobilekit.transforms._criteria.subject import run
from mobilekit.transforms._quantisation.recording import calls_of, chosen
from mobilekit.transforms._quantisation.scaling import (
    VIEWS,
    Reader,
    flattened,
    layer_at,
    multiply,
    passes_scale,
    read_magnitudes,
)
from mobilekit.types import Calibration, Network

SWEEPS = 100
CONVERGED = 1e-3
"""Largest change of a channel's scale, as a logarithm, in the last sweep."""
STEEPEST = 1e4
"""A channel is scaled by this much at most in one sweep: what is nearly dead stays finite."""
IMAGES = 256
BATCH = 64


@dataclass(frozen=True)
class Pair:
    """A layer, all layers that read it, and the lowest bound that clips its output in between (ReLU6)."""

    layer: str
    readers: tuple[Reader, ...]
    bound: float = math.inf


@dataclass(frozen=True)
class Equalised:
    """The equalised module, the pairs that were scaled, and why other layers were left."""

    module: nn.Module
    pairs: tuple[Pair, ...]
    refused: dict[str, str]


def equalise(module: nn.Module, network: Network, calibration: Calibration | None) -> Equalised:
    """Scale channels between layers, so that what a layer writes and what its readers multiply it with are alike.

    Channel i of a layer is divided by s_i = sqrt(r1_i / r2_i), and its readers' weights are multiplied by it: r1 and
    r2 are the largest magnitudes of the channel's weights in the layer and in its readers. That leaves the function as
    it is where there are only positive-homogeneous functions of one channel between them. Pairs are visited in turn
    until nothing changes. Behind a ReLU6, a channel that reaches the bound on the calibration inputs is left alone,
    and others are scaled so far only that none does; without calibration inputs such pairs are refused.
    `module` has its batch norms folded. Raises UnsupportedError where its outputs for calibration inputs (random
    numbers without them) change after all.
    """
    equal = copy.deepcopy(module).eval()
    pairs, refused = _pairs(equal, network)
    inputs = chosen(equal, calibration, IMAGES, BATCH) if calibration is not None and calibration.inputs else []
    example = inputs[0] if inputs else random_input(module, network)
    with torch.no_grad():
        run(equal, example)  # what fails here fails for the user's inputs, in a sentence
    ready: list[tuple[Pair, torch.Tensor]] = []
    for pair in pairs:
        weight = layer_at(equal, pair.layer).weight
        peak = weight.new_zeros(weight.shape[out_dim(layer_at(equal, pair.layer))])
        if math.isfinite(pair.bound):
            if not inputs:
                refused[pair.layer] = f"its output is clipped at {pair.bound:g}, and there are no calibration inputs"
                continue
            peak = _peaks(equal, pair.layer, inputs)
            if bool((peak >= pair.bound).all()):
                refused[pair.layer] = f"all its channels are clipped at {pair.bound:g} on the calibration inputs"
                continue
        ready.append((pair, peak))
    for _ in range(SWEEPS):
        changes = [_scale(equal, pair, peak) for pair, peak in ready]
        if max(changes, default=0.0) < CONVERGED:
            break
    check_same(equal, module, example, "layers cannot be equalised")
    return Equalised(equal, tuple(pair for pair, _ in ready), refused)


# ---------------------------------------------------------------- scaling


def _scale(module: nn.Module, pair: Pair, peak: torch.Tensor) -> float:
    """Equalise one pair in place, its clipped peaks too; the largest logarithm of a scale."""
    layer = layer_at(module, pair.layer)
    with torch.no_grad():
        written = layer.weight.movedim(out_dim(layer), 0).flatten(1).abs().amax(dim=1)
        read = torch.stack([read_magnitudes(layer_at(module, r.layer), r.repeat) for r in pair.readers]).amax(dim=0)
        alive = (written > 0) & (read > 0)
        ones = torch.ones_like(read)
        scale = (written / read.where(alive, ones)).sqrt().clamp(1 / STEEPEST, STEEPEST)
        if math.isfinite(pair.bound):
            scale = torch.where(peak >= pair.bound, ones, scale.maximum(peak / pair.bound * 1.0001))
        scale = torch.where(alive, scale, ones)
        peak /= scale
        layer.weight /= along(scale, layer.weight, out_dim(layer))
        if layer.bias is not None:
            layer.bias /= scale
        for reader in pair.readers:
            multiply(layer_at(module, reader.layer), reader.repeat, scale)
    return float(scale.log().abs().max())


def _peaks(module: nn.Module, path: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Largest output of each channel of a layer over the inputs."""
    layer = layer_at(module, path)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    return torch.stack(
        [given.movedim(axis, 0).flatten(1).amax(dim=1) for _, _, given in calls_of(module, [layer], inputs)]
    ).amax(dim=0)


# ---------------------------------------------------------------- finding pairs


def _pairs(module: nn.Module, network: Network) -> tuple[list[Pair], dict[str, str]]:
    """Pairs in the order of the forward, and the reason for every layer that makes none."""
    graph, refused = CallGraph(module, network), {}
    pairs = []
    for call in graph.calls:
        if call.groups > 1 and isinstance(module.get_submodule(call.path), nn.ConvTranspose2d):
            refused[call.path] = "a transposed convolution of several groups shares its channels' weights"
            continue
        search = _Search(graph)
        search.follow(call.node, 1)
        if search.reason is None and search.readers:
            pairs.append(Pair(call.path, tuple(search.readers), search.bound))
        else:
            refused[call.path] = search.reason or "nothing reads its output"
    return pairs, refused


class _Search:
    """Follows a layer's output to all layers that read it."""

    def __init__(self, graph: CallGraph) -> None:
        self.graph = graph
        self.readers: list[Reader] = []
        self.bound = math.inf
        self.reason: str | None = None
        """Why the channels cannot be scaled, from the first place that was met."""

    def follow(self, node: fx.Node, repeat: int) -> None:
        """Visit everything that reads the node, whose tensor has `repeat` features a channel."""
        for user in node.users:
            call = self.graph.called(user)
            bound = clipped_at(user)
            flat = flattened(user, repeat) if op_name(user) in VIEWS else None
            if call is not None and user.args[0] is node:
                self.readers.append(Reader(call.path, repeat))
            elif bound is not None:
                self.bound = min(self.bound, bound)
                self.follow(user, repeat)
            elif passes_scale(user, node):
                self.follow(user, repeat)
            elif flat is not None:
                self.follow(user, flat)
            elif self.reason is None:
                what = "the network's output" if user.op == "output" else f"{op_name(user)} at {user.name}"
                self.reason = f"{what} reads it, which scaled channels would change"
