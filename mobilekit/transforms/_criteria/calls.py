"""Watches the calls of weighted layers in a forward, and samples what they read and give as rows of a matrix.

Calls of functions are watched rather than modules: a layer's own padding, functions called in a forward and layers
used twice are then seen as they run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mobilekit.errors import UnsupportedError
from mobilekit.transforms._criteria.subject import Reader, batches, run
from mobilekit.types import Calibration

SIGNATURES = {
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose2d": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "linear": ("input", "weight", "bias"),
}
FEWEST_ROWS = 10_000
ROWS_A_COLUMN = 4
"""Sampled output positions: enough that the least squares of a wide layer stay well determined."""
MOST_COLUMNS = 8192
"""A Gram matrix of this many columns takes 0.5 GB, and a re-fit holds a few of them."""


def function_name(func: Callable[..., Any]) -> str:
    """The function's name without the underscores of private and in-place forms."""
    return getattr(func, "__name__", "").strip("_")


def arguments(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments by name of a call of a weighted function; None where it is another function."""
    names = SIGNATURES.get(function_name(func))
    return None if names is None else {**dict(zip(names, args, strict=False)), **kwargs}


@dataclass(frozen=True)
class Rows:
    """Sampled output positions of one call of a layer, float64.

    `inputs` (rows, columns) is what the layer reads there, unfolded in the order of `as_matrix`; `outputs`
    (rows, outputs) is what it gives; `images` (rows,) says where in the batch; `bias` is the parameter that the call
    added.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    images: torch.Tensor
    bias: torch.Tensor | None


def as_matrix(weight: torch.Tensor, out_dim: int) -> torch.Tensor:
    """A weight as float64 (outputs, inputs x taps)."""
    return weight.detach().movedim(out_dim, 0).flatten(1).double()


def as_weight(matrix: torch.Tensor, like: torch.Tensor, out_dim: int) -> torch.Tensor:
    """The weight whose `as_matrix` this is, in the shape and type of `like`."""
    return matrix.reshape(like.movedim(out_dim, 0).shape).movedim(0, out_dim).to(like.dtype)


def sampled(module: nn.Module, readers: Sequence[Reader], calibration: Calibration) -> Iterator[tuple[str, Rows]]:
    """Rows of every call of the readers, batch after batch, in the order of the forward.

    The positions depend on the seed, the reader, the batch and the call alone: two modules whose layers give maps of
    the same sizes are sampled at the same places. What comes after the last of the calls is not run. Raises
    UnsupportedError where a reader is not seen running.
    """
    names = {id(module.get_parameter(reader.name)): reader.name for reader in readers}
    for reader in readers:
        columns = as_matrix(module.get_parameter(reader.name), reader.out_dim).shape[1]
        if columns > MOST_COLUMNS:
            raise UnsupportedError(
                f"{reader.name} cannot be re-fitted: it reads {columns} values at once, and {MOST_COLUMNS} are the most"
            )
    last: int | None = None
    for index, batch in enumerate(batches(module, calibration)):
        if last is None:
            last = _calls_in_all(module, names, batch[:1])
        calls = _Calls(names, len(calibration.inputs), (calibration.seed, index), last)
        with torch.no_grad(), calls, suppress(_AllSeen):
            run(module, batch)
        yield from calls.found


def _calls_in_all(module: nn.Module, names: dict[int, str], example: torch.Tensor) -> int:
    """Calls of these weights in one forward. Raises UnsupportedError where one of them is not called."""
    calls = _Calls(names, 1, (0, 0))
    with torch.no_grad(), calls:
        run(module, example)
    missing = sorted(set(names.values()) - {name for name, _ in calls.found})
    if missing:
        raise UnsupportedError(f"{missing[0]} cannot be re-fitted: no call with this weight is seen in the forward")
    return len(calls.found)


class _AllSeen(BaseException):
    """Ends a forward from which nothing else is wanted; no handler of the user's forward is meant to catch it."""


class _Calls(TorchFunctionMode):
    """Samples the calls whose weight is one of those asked for; ends the forward after so many of them."""

    def __init__(
        self, names: dict[int, str], batches_in_all: int, key: tuple[int, int], last: int | None = None
    ) -> None:
        super().__init__()
        self.names, self.batches_in_all, self.key, self.last = names, batches_in_all, key, last
        self.found: list[tuple[str, Rows]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = arguments(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        name = self.names.get(id(given["weight"])) if given is not None else None
        if name is not None and given is not None:
            self.found.append((name, self._rows(name, function_name(func), given, result)))
            if len(self.found) == self.last:
                raise _AllSeen
        return result

    def _rows(self, name: str, function: str, given: dict[str, Any], result: torch.Tensor) -> Rows:
        windows = _windows(function, given)
        output = result[:, :, None, None] if function == "linear" else result
        count, _, height, width = output.shape
        columns = windows.padded.shape[1] * len(windows.down) * len(windows.right)
        quota = -(-max(FEWEST_ROWS, ROWS_A_COLUMN * columns) // self.batches_in_all)
        turn = sum(known == name for known, _ in self.found)
        place = _places(count * height * width, quota, (*self.key, name, turn)).to(output.device)
        image, y, x = place // (height * width), place // width % height, place % width
        bias = given.get("bias")  # one that the forward computes cannot be fitted
        return Rows(
            inputs=windows.at(image, y, x).double(),
            outputs=output[image, :, y, x].double(),
            images=image,
            bias=bias if isinstance(bias, nn.Parameter) else None,
        )


def _places(total: int, quota: int, key: tuple[Any, ...]) -> torch.Tensor:
    """Which of `total` positions are sampled: all of them, or `quota` without repetition, fixed by the key."""
    if total <= quota:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    return torch.randperm(total, generator=generator)[:quota]


@dataclass(frozen=True)
class _Windows:
    """A layer's input with its padding, and where the taps of a window lie from the window's corner."""

    padded: torch.Tensor
    stride: tuple[int, int]
    down: torch.Tensor
    right: torch.Tensor

    def at(self, image: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The windows of these output positions, (positions, channels x taps)."""
        rows = (y * self.stride[0])[:, None] + self.down
        columns = (x * self.stride[1])[:, None] + self.right
        found = self.padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return found.permute(0, 3, 1, 2).flatten(1)


def _windows(function: str, given: dict[str, Any]) -> _Windows:
    data, weight = given["input"].detach(), given["weight"]
    if function == "linear":
        one = torch.zeros(1, dtype=torch.long, device=data.device)
        return _Windows(data[:, :, None, None], (1, 1), one, one)
    kernel, dilation = tuple(weight.shape[2:]), _pair(given.get("dilation", 1))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    taps = [d * torch.arange(k, device=data.device) for d, k in zip(dilation, kernel, strict=True)]
    stride, padding = _pair(given.get("stride", 1)), given.get("padding", 0)
    if function == "conv_transpose2d":
        # a correlation of the input with zeros between its values, whose taps are met in the other order
        extra = _pair(given.get("output_padding", 0))
        before = [r - p for r, p in zip(reach, _pair(padding), strict=True)]
        data = _spread(data, stride)
        padded = functional.pad(data, [before[1], before[1] + extra[1], before[0], before[0] + extra[0]])
        return _Windows(padded, (1, 1), taps[0].flip(0), taps[1].flip(0))
    if padding == "same":
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(p, p) for p in _pair(0 if padding == "valid" else padding)]
    return _Windows(functional.pad(data, [*sides[1], *sides[0]]), stride, taps[0], taps[1])


def _spread(data: torch.Tensor, stride: tuple[int, int]) -> torch.Tensor:
    """The map with stride - 1 zeros between neighbours."""
    count, channels, height, width = data.shape
    wide = data.new_zeros(count, channels, (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1)
    wide[:, :, :: stride[0], :: stride[1]] = data
    return wide


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[-1])) if isinstance(value, list | tuple) else (int(value), int(value))
