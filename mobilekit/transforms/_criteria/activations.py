"""Average percentage of zeros behind a group's producers (APoZ, Hu et al. 2016, arXiv:1607.03250)."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from mobilekit.errors import UnsupportedError
from mobilekit.transforms._criteria.calls import arguments, function_name
from mobilekit.transforms._criteria.subject import Subject, batches, run, working_copy

Layout = tuple[tuple[bool, int], ...]
"""Axis 1 of a tensor in order: whether the stretch is the group's, and its length."""
CUT_AT_ZERO = frozenset({"relu", "relu6", "hardswish"})
BOUNDED = {"hardtanh": ("input", "min_val"), "clamp": ("input", "min"), "clamp_min": ("input", "min")}
CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})


def apoz(subject: Subject) -> torch.Tensor:
    """Share of the activations that are not zero (Hu et al. 2016, arXiv:1607.03250), float64 (channels,).

    Channels with more zeros go first. Zeros are counted after every ReLU-like function (one that gives exact zeros
    below a bound) behind the group's producers, over all calibration inputs and positions. Functions called in a
    forward count as layers do: the calls are watched, not only the modules.
    Raises UnsupportedError where there are no calibration inputs or no such activation.
    """
    data = subject.data("apoz")
    module = working_copy(subject.module)
    producers = {id(module.get_parameter(p.parameter)) for p in subject.network.groups[subject.group].producers}
    watch = _Watch(producers, subject.channels)
    with torch.no_grad():
        for batch in batches(module, data):
            with watch:
                run(module, batch)
    if not watch.values:
        raise UnsupportedError(f"{subject.group} cannot be pruned by apoz: no ReLU-like activation is behind it")
    return 1 - watch.zeros / watch.values


class _Watch(TorchFunctionMode):
    """Follows the group's channels through every call of a forward and counts zeros behind activations."""

    def __init__(self, producers: set[int], channels: int) -> None:
        super().__init__()
        self.producers, self.channels = producers, channels
        self.zeros = torch.zeros(channels, dtype=torch.float64)
        self.values = 0
        self._layouts: MutableMapping[torch.Tensor, Layout] = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.ndim >= 2:
            layout = self._layout(func, args, kwargs, result)
            if layout is not None:
                self._layouts[result] = layout
                if _gives_zeros(func, args, kwargs):
                    self._count(result, layout)
        return result

    def _layout(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor
    ) -> Layout | None:
        given = arguments(func, args, kwargs)
        if given is not None:
            if id(given["weight"]) in self.producers:
                return ((True, self.channels),)
            return self._known(given["input"]) if _depthwise(given, result) else None
        if function_name(func) in CONCATENATIONS:
            parts = list(args[0] if args else kwargs["tensors"])
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            if dim % result.ndim == 1 and any(self._known(part) for part in parts):
                return tuple(s for part in parts for s in self._known(part) or ((False, part.shape[1]),))
            return None
        # the trace has refused groups whose channels anything else rearranges: what keeps axis 1 keeps its channels
        for tensor in (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)):
            layout = self._known(tensor)
            if layout and sum(length for _, length in layout) == result.shape[1]:
                return layout
        return None

    def _known(self, tensor: Any) -> Layout | None:
        return self._layouts.get(tensor) if isinstance(tensor, torch.Tensor) else None

    def _count(self, result: torch.Tensor, layout: Layout) -> None:
        offset = 0
        for ours, length in layout:
            if ours:
                part = result.narrow(1, offset, length).movedim(1, 0).flatten(1)
                self.zeros += (part == 0).sum(dim=1).to("cpu", torch.float64)
                self.values += part.shape[1]
            offset += length


def _gives_zeros(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = function_name(func)
    if name in BOUNDED:
        bound = {**dict(zip(BOUNDED[name], args, strict=False)), **kwargs}.get(BOUNDED[name][1])
        return isinstance(bound, int | float) and bound == 0
    return name in CUT_AT_ZERO


def _depthwise(given: dict[str, Any], result: torch.Tensor) -> bool:
    return bool(given.get("groups", 1) == given["input"].shape[1] == result.shape[1] > 1)
