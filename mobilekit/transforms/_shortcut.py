"""Looks at a residual block in a module: what a network cannot tell about whether an identity can replace it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mobilekit.errors import UnsupportedError
from mobilekit.transforms._surgery import evaluated, hooked
from mobilekit.types import within

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with: by position, and by name."""
ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6}
"""Those that a block may have behind its sum, by the names that a network has for them."""


class Passing(nn.Identity):
    """An identity for blocks that are called with settings beside the tensor (a rate of stochastic depth)."""

    def forward(self, x: torch.Tensor, *settings: object, **named: object) -> torch.Tensor:  # type: ignore[override]
        """What was given, (N, C, H, W)."""
        return x


def identity_for(module: nn.Module, path: str, activation: str | None, example_input: torch.Tensor) -> nn.Identity:
    """An identity for the place of the residual block at this path; `activation` follows its sum.

    Raises UnsupportedError for a block with hooks, with another name or weights that something else holds too, which
    is not called once with one tensor to give one of the same shape, or whose activation is not its own.
    """
    block = _block_at(module, path)
    place = f"'{path}' cannot be removed"
    call = _call_of(module, block, place, example_input)
    if activation is not None and not _own_activation(block, activation, call):
        raise UnsupportedError(f"{place}: the {activation} behind its sum is not its own, or changes what it reads")
    plain = len(call[0]) == 1 and not call[1]
    return (nn.Identity() if plain else Passing()).train(block.training)


def _block_at(module: nn.Module, path: str) -> nn.Module:
    place = f"'{path}' cannot be removed"
    modules: dict[str, nn.Module] = dict(module.named_modules(remove_duplicate=False))
    if path not in modules:
        raise UnsupportedError(f"{place}: the module has no part of this name")
    block = modules[path]
    if hooked(block):
        raise UnsupportedError(f"{place}: hooks are registered on it")
    if sum(other is block for other in modules.values()) > 1:
        raise UnsupportedError(f"{place}: the module has it under several names")
    own = {id(tensor) for tensor in (*block.parameters(), *block.buffers())}
    outside = (m for name, m in modules.items() if not within(name, path))
    if any(id(t) in own for m in outside for t in (*m._parameters.values(), *m._buffers.values())):
        raise UnsupportedError(f"{place}: its weights are shared with another layer")
    return block


def _call_of(module: nn.Module, block: nn.Module, place: str, example_input: torch.Tensor) -> Call:
    """What the block is given when the module runs. Raises UnsupportedError where an identity cannot be called so."""
    calls: list[Call] = []
    results: list[object] = []

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in given), named))

    handles = (
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.register_forward_hook(lambda _, __, result: results.append(result)),
    )
    try:
        with evaluated(module):
            module(example_input)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != 1:
        raise UnsupportedError(f"{place}: the model's forward calls it {len(calls)} times")
    (given, named), result = calls[0], results[0]
    tensors = [value for value in (*given, *named.values()) if isinstance(value, torch.Tensor)]
    if len(tensors) != 1 or not given or tensors[0] is not given[0]:
        raise UnsupportedError(f"{place}: it is not called with one tensor, as its first argument")
    if not isinstance(result, torch.Tensor) or result.shape != tensors[0].shape:
        raise UnsupportedError(f"{place}: it does not give one tensor of the shape that it reads")
    return calls[0]


def _own_activation(block: nn.Module, activation: str, call: Call) -> bool:
    """Whether the block's outputs come out of the activation, tried on numbers, and what it reads does too."""
    ((x, *settings), named), function = call, ACTIVATIONS[activation]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    with evaluated(block):
        outputs = block(noise, *settings, **named)
    return bool(torch.equal(function(outputs), outputs)) and bool(torch.equal(function(x), x))
