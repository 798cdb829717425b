"""Where an exported graph calls layers that own their weights, and what each call's output goes through."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from mobilekit.errors import BadInputError, first_line
from mobilekit.network.nodes import argument, op_name, shape_of
from mobilekit.types import Network

Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
FUNCTIONS: dict[str, tuple[type[nn.Module], int]] = {
    "conv2d": (nn.Conv2d, 4),
    "conv_transpose2d": (nn.ConvTranspose2d, 4),
    "linear": (nn.Linear, 2),
}
"""Function -> the layer that calls it, and the rank of its output."""


@dataclass(frozen=True)
class LayerCall:
    """The only call of a convolution, transposed convolution or linear layer whose weights nothing else reads."""

    path: str
    node: fx.Node
    groups: int


class CallGraph:
    """The exported graph of a module in eval mode, and the calls of its layers in the order of the forward.

    The module itself is not changed. Raises BadInputError where torch.export cannot trace it.
    """

    def __init__(self, module: nn.Module, network: Network) -> None:
        self.module = module
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
        example = torch.zeros(network.input_shape, dtype=like.dtype, device=like.device)
        try:
            with torch.no_grad():
                self.program = torch.export.export(copy.deepcopy(module).eval(), (example,))
        except Exception as error:
            raise BadInputError(f"the model cannot be traced by torch.export: {first_line(error)}") from error
        signature = self.program.graph_signature
        self.names: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        """Placeholder -> parameter or buffer."""
        modules = [each for _, each in module.named_modules(remove_duplicate=False)]
        self._holders = Counter(id(p) for each in modules for p in each._parameters.values() if p is not None)
        self._places = Counter(id(each) for each in modules)
        self.calls = tuple(self._layer_calls())

    def called(self, node: fx.Node) -> LayerCall | None:
        """The layer that this node is the call of."""
        return next((call for call in self.calls if call.node is node), None)

    def only_place(self, path: str) -> bool:
        """Whether the module at this path has no other path, and shares no parameter."""
        own = self.module.get_submodule(path)
        return self._places[id(own)] == 1 and all(
            self._holders[id(p)] == 1 for p in own._parameters.values() if p is not None
        )

    def owner(self, node: object, leaf: str) -> str | None:
        """Path of the module whose `leaf` this placeholder is, where the graph reads it once; else None."""
        if not isinstance(node, fx.Node) or len(node.users) != 1:
            return None
        path, _, name = self.names.get(node.name, "").rpartition(".")
        return path if name == leaf and path else None

    def _layer_calls(self) -> Iterator[LayerCall]:
        for node in self.program.graph.nodes:
            kind, rank = FUNCTIONS.get(op_name(node), (None, 0)) if node.op == "call_function" else (None, 0)
            if kind is None or len(shape_of(node)) != rank:
                continue
            path = self.owner(argument(node, 1, "weight"), "weight")
            if path is None or not self.only_place(path):
                continue
            layer, bias = self.module.get_submodule(path), argument(node, 2, "bias")
            known = layer.bias is None if bias is None else self.owner(bias, "bias") == path
            if isinstance(layer, kind) and known:
                yield LayerCall(path, node, int(getattr(layer, "groups", 1)))


def out_dim(layer: nn.Module) -> int:
    """The axis of the layer's weight that runs over its output channels (of one group)."""
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0


def clipped_at(node: fx.Node) -> float | None:
    """Upper bound of a clamp between zero and a number (ReLU6); None for any other function."""
    if op_name(node) == "relu6":
        return 6.0
    if op_name(node) not in ("hardtanh", "clamp"):
        return None
    default = (-1.0, 1.0) if op_name(node) == "hardtanh" else (None, None)
    low, high = argument(node, 1, "min", default[0]), argument(node, 2, "max", default[1])
    fits = isinstance(low, int | float) and low == 0 and isinstance(high, int | float) and high > 0
    return float(high) if fits and isinstance(high, int | float) else None


def rectifies(node: fx.Node) -> bool:
    """Whether the node is a ReLU, in any of its forms."""
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if op_name(node) == "clamp_min":
        return isinstance(low, int | float) and low == 0
    return op_name(node) == "relu" or (op_name(node) == "clamp" and low == 0 and low is not None and high is None)
