"""Which chains of layers low-rank methods make of a layer, which ranks suit it, and what they cost. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mobilekit.transforms._links import Link, macs
from mobilekit.types import OperatorShape

__all__ = ["METHODS", "Ranks", "full_ranks", "links", "macs", "offered_ranks", "saves_enough", "unsuited"]

FRACTIONS = (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8)
"""Offered ranks, in parts of the full rank."""
LEAST_SAVING = 0.2
"""Share of the layer's multiply-accumulates that an offered rank saves at least."""
Ranks = dict[str, int]


@dataclass(frozen=True)
class Method:
    """A decomposition: the widths between its layers, and which layers carry the kernel's rows and columns."""

    widths: tuple[str, ...]
    """Names of the ranks that are the widths between the layers."""
    carriers: tuple[int, int]
    depthwise: tuple[int, ...] = ()


METHODS: dict[str, Method] = {
    "svd": Method(("rank",), (0, 0)),
    "spatial": Method(("rank",), (0, 1)),
    "tucker2": Method(("rank_in", "rank"), (1, 1)),
    "cp": Method(("rank", "rank", "rank"), (1, 2), depthwise=(1, 2)),
}


def full_ranks(shape: OperatorShape, method: str) -> Ranks:
    """The ranks at which the method can give any layer of this shape exactly.

    For cp it is the bound that holds for every tensor: its entries divided by its longest axis.
    """
    inputs, outputs, (height, width) = shape.in_channels, shape.out_channels, shape.kernel
    if method == "spatial":
        return {"rank": min(inputs * height, outputs * width)}
    if method == "tucker2":
        return {"rank": outputs, "rank_in": inputs}
    if method == "cp":
        return {"rank": inputs * outputs * height * width // max(inputs, outputs, height, width)}
    return {"rank": min(inputs, outputs)}


def links(shape: OperatorShape, method: str, ranks: Ranks) -> tuple[Link, ...]:
    """The layers that take the place of one of this shape."""
    plan = METHODS[method]
    widths = [*(ranks[name] for name in plan.widths), None]
    kind: Literal["conv", "linear"] = "linear" if shape.kind == "linear" else "conv"
    chain = []
    for index, width in enumerate(widths):
        here = [carrier == index for carrier in plan.carriers]
        done = [carrier <= index for carrier in plan.carriers]
        chain.append(
            Link(
                layer=str(index),
                kind=kind,
                width=width,
                out_size=_pair(shape.out_size, shape.in_size, done),
                kernel=_pair(shape.kernel, (1, 1), here),
                stride=_pair(shape.stride, (1, 1), here),
                groups=ranks["rank"] if index in plan.depthwise else 1,
            )
        )
    return tuple(chain)


def _pair(these: tuple[int, int], others: tuple[int, int], taken: list[bool]) -> tuple[int, int]:
    return (these[0] if taken[0] else others[0], these[1] if taken[1] else others[1])


def unsuited(shape: OperatorShape, method: str) -> str | None:
    """Why the method cannot be used on a layer of this shape, or None."""
    if shape.kind not in ("conv", "linear"):
        return f"it is a {shape.kind} layer"
    if shape.groups > 1:
        return f"it is a convolution of {shape.groups} groups"
    if 1 in (shape.in_channels, shape.out_channels):
        return "one of its sides has one channel only"
    return _wrong_kernel(shape, method) or _too_small(shape, method)


def _wrong_kernel(shape: OperatorShape, method: str) -> str | None:
    size = f"{shape.kernel[0]} x {shape.kernel[1]}"
    pointwise = shape.kernel == (1, 1)
    if method == "svd":
        return None if pointwise else f"svd is for linear and pointwise layers, and its kernel is {size}"
    if method == "tucker2":
        return "tucker2 is for layers with a kernel, and it has none" if pointwise else None
    return f"{method} divides a kernel into rows and columns, and its kernel is {size}" if 1 in shape.kernel else None


def _too_small(shape: OperatorShape, method: str) -> str | None:
    if saves_enough(shape, method, dict.fromkeys(full_ranks(shape, method), 1)):
        return None
    return f"it is so small that even rank 1 by {method} saves less than {LEAST_SAVING:.0%}"


def saves_enough(shape: OperatorShape, method: str, ranks: Ranks) -> bool:
    """Whether these ranks save the share that makes them worth trying."""
    return macs(shape, links(shape, method, ranks)) <= (1 - LEAST_SAVING) * shape.macs


def offered_ranks(shape: OperatorShape, method: str, multiple: int) -> list[Ranks]:
    """Ranks worth trying, largest first: fractions of the full rank, each a multiple of `multiple`.

    Where none of them saves enough, the smallest multiple is tried.
    """
    full = full_ranks(shape, method)
    rounded = [
        {name: max(multiple, round(rank * part / multiple) * multiple) for name, rank in full.items()}
        for part in FRACTIONS
    ]
    rounded.append(dict.fromkeys(full, multiple))
    found: list[Ranks] = []
    for ranks in rounded:
        fits = all(ranks[name] <= full[name] for name in full) and saves_enough(shape, method, ranks)
        last = ranks is rounded[-1]
        if fits and ranks not in found and not (last and found):
            found.append(ranks)
    return found
