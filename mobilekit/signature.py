"""What goes into a network and what comes out of it: float32 tensors in order, each with a name.

A forward may return a tensor, or a tuple, list or dict of tensors, nested as one likes: they are flattened in the order
of `torch.utils._pytree`. The keys of dicts are the names of outputs; where there is none, `output` or `output_0`,
`output_1` and so on.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from mobilekit.errors import BadInputError

INPUT, OUTPUT = "input", "output"
"""Names where there is one tensor without a name of its own."""
PLAIN = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def input_names(module: nn.Module, count: int) -> tuple[str, ...]:
    """Names of a network's inputs: `input` for one; for several, those of forward's parameters."""
    if count == 1:
        return (INPUT,)
    parameters = list(inspect.signature(module.forward).parameters.values())[:count]
    if len(parameters) == count and all(parameter.kind in PLAIN for parameter in parameters):
        return tuple(parameter.name for parameter in parameters)
    return tuple(f"{INPUT}_{number}" for number in range(count))


def named_outputs(result: object, inputs: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """What a forward returned, flat and by name, in order. No name is that of one of the `inputs`.

    Raises BadInputError where something in it is no floating-point tensor, and where there is nothing.
    """
    if isinstance(result, torch.Tensor):
        leaves: list[tuple[tuple[Any, ...], Any]] = [((), result)]
    else:
        leaves, _ = pytree.tree_flatten_with_path(result)
    found: dict[str, torch.Tensor] = {}
    for path, value in leaves:
        name = _name(path)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            kind = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
            raise BadInputError(
                f"the model returns {kind} as {name}: it must return float tensors alone, or tuples, lists or dicts of "
                "them (wrap it in a module that gives what you deploy)"
            )
        if name in inputs:
            name = f"{name}_{OUTPUT}"
        if name in found:
            raise BadInputError(f"two outputs of the model would be called {name}: give the keys of its dicts names")
        found[name] = value
    if not found:
        raise BadInputError("the model returns nothing: it must return at least one tensor")
    return found


def _name(path: tuple[Any, ...]) -> str:
    """The keys on the way to a tensor, as an identifier: Core ML takes no other names."""
    words = [str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", "")))) for step in path]
    joined = re.sub(r"\W+", "_", "_".join(words), flags=re.ASCII)
    return joined if joined and not joined[0].isdigit() else f"{OUTPUT}_{joined}".rstrip("_")


class Flat(nn.Module):
    """A network that gives a tuple of tensors, whatever it returned them in."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the network and flatten what it returns."""
        return tuple(pytree.tree_leaves(self.network(*inputs)))
