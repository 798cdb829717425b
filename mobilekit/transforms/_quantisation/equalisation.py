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
from mobilekit.network.layer_calls import CallGraph, Layer, clipped_at, out_dim, rectifies
from mobilekit.network.nodes import argument, op_name, shape_of
from mobilekit.transforms._criteria.subject import run
from mobilekit.transforms._quantisation.recording import calls_of, chosen
from mobilekit.types import Calibration, Network

SWEEPS = 100
CONVERGED = 1e-3
"""Largest change of a channel's scale, as a logarithm, in the last sweep."""
STEEPEST = 1e4
"""A channel is scaled by this much at most in one sweep: what is nearly dead stays finite."""
IMAGES = 256
BATCH = 64
POOLS = frozenset({"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"})
RESIZES = frozenset({"upsample_nearest2d", "upsample_bilinear2d"})
PASSES = frozenset({"dropout", "identity", "contiguous", "clone", "leaky_relu"}) | POOLS | RESIZES
"""Functions f, channel by channel, with f(s x) = s f(x) for s > 0."""
VIEWS = frozenset({"flatten", "view", "reshape", "squeeze"})


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels; each is `repeat` of its input features (a flattened map)."""

    layer: str
    repeat: int


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
        weight = _layer(equal, pair.layer).weight
        peak = weight.new_zeros(weight.shape[out_dim(_layer(equal, pair.layer))])
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
    layer = _layer(module, pair.layer)
    with torch.no_grad():
        written = layer.weight.movedim(out_dim(layer), 0).flatten(1).abs().amax(dim=1)
        read = torch.stack([_read(_layer(module, r.layer), r.repeat) for r in pair.readers]).amax(dim=0)
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
            _multiply(_layer(module, reader.layer), reader.repeat, scale)
    return float(scale.log().abs().max())


def _read(layer: Layer, repeat: int) -> torch.Tensor:
    """Largest magnitude of the weights that read each input channel."""
    weight = layer.weight.abs()
    if isinstance(layer, nn.Linear):
        return weight.amax(dim=0).reshape(-1, repeat).amax(dim=1)
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.flatten(1).amax(dim=1)
    rows = weight.flatten(2).amax(dim=2)
    return rows.reshape(layer.groups, -1, rows.shape[1]).amax(dim=1).flatten()


def _multiply(layer: Layer, repeat: int, scale: torch.Tensor) -> None:
    """Multiply the weights that read each input channel by its scale."""
    if isinstance(layer, nn.Linear):
        layer.weight *= scale.repeat_interleave(repeat)
    elif isinstance(layer, nn.ConvTranspose2d):
        layer.weight *= scale[:, None, None, None]
    else:
        each = scale.reshape(layer.groups, 1, -1).expand(-1, layer.out_channels // layer.groups, -1)
        layer.weight *= each.reshape(layer.out_channels, -1)[:, :, None, None]


def _peaks(module: nn.Module, path: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Largest output of each channel of a layer over the inputs."""
    layer = _layer(module, path)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    return torch.stack(
        [given.movedim(axis, 0).flatten(1).amax(dim=1) for _, _, given in calls_of(module, [layer], inputs)]
    ).amax(dim=0)


def _layer(module: nn.Module, path: str) -> Layer:
    layer = module.get_submodule(path)
    assert isinstance(layer, Layer)  # noqa: S101  (as the graph's calls found them)
    return layer


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
            flat = _flattened(user, repeat) if op_name(user) in VIEWS else None
            if call is not None and user.args[0] is node:
                self.readers.append(Reader(call.path, repeat))
            elif bound is not None:
                self.bound = min(self.bound, bound)
                self.follow(user, repeat)
            elif rectifies(user) or (op_name(user) in PASSES and user.args[0] is node) or _keeps(user, node):
                self.follow(user, repeat)
            elif flat is not None:
                self.follow(user, flat)
            elif self.reason is None:
                what = "the network's output" if user.op == "output" else f"{op_name(user)} at {user.name}"
                self.reason = f"{what} reads it, which scaled channels would change"


def _flattened(node: fx.Node, repeat: int) -> int | None:
    """Features a channel after a view of (N, C, H, W) as (N, C x H x W) or of (N, C, 1, 1) as (N, C)."""
    before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
    if before == after:
        return repeat
    if len(before) == 4 and after == (before[0], math.prod(before[1:])):
        return math.prod(before[2:])
    return None


def _keeps(node: fx.Node, data: fx.Node) -> bool:
    """A mean over the map, padding with zeros, or a PReLU."""
    name = op_name(node)
    if node.args[:1] != (data,):
        return False
    if name == "mean":
        rank, dims = len(shape_of(data)), argument(node, 1, "dim")
        return rank == 4 and isinstance(dims, list | tuple) and {int(str(d)) % rank for d in dims} == {2, 3}
    if name in ("pad", "constant_pad_nd"):
        where = 3 if name == "pad" else 2
        sides = argument(node, 1, "pad")
        plain = name != "pad" or argument(node, 2, "mode", "constant") == "constant"
        zero = argument(node, where, "value") in (None, 0)
        return plain and zero and isinstance(sides, list | tuple) and len(sides) <= 4 and len(shape_of(data)) == 4
    return name == "prelu"
