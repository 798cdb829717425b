"""The published latencies that come with mobilekit, as pools that a device with few measurements borrows from."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mobilekit.cost.fit import Range, amounts
from mobilekit.cost.layers import read_layers
from mobilekit.cost.parameters import totals
from mobilekit.cost.pool import Pool, Published
from mobilekit.cost.published import Row, Setup, combined, read_measurements
from mobilekit.cost.work import parts
from mobilekit.types import OperatorShape, Precision, Provenance

DATA = "data"
FEWEST = 3
"""Networks that a set-up needs to have a say."""
SAME = 0.05
"""Networks whose priced work differs by less than this share are one network under two names."""
SUFFIX = "_int8"
"""What ncnn's list adds to the name of a network in int8."""

PROVENANCE = Provenance(
    source="prices of other devices, fitted to Tencent/ncnn benchmark/README.md and benchmark/models/*.param",
    version="f4e9a78",
    date="2026-11-22",
    licence="BSD-3-Clause",
)


class Kind(NamedTuple):
    """Set-ups whose prices are alike: those of one processor ("cpu", "gpu") and one precision."""

    processor: str
    precision: Precision


FLOAT_CPU = Kind("cpu", "fp32")


def kind_of(setup: Setup) -> Kind:
    """The pool that a set-up borrows from; NPUs, of which too few networks have layers, borrow from GPUs."""
    return Kind("gpu" if setup.processor.lower() in ("gpu", "npu") else "cpu", setup.kept_as)


@lru_cache(maxsize=8)
def published(kind: Kind) -> Published:
    """The shipped latencies of one kind; repeats of a set-up are combined."""
    of: dict[Setup, list[Row]] = {}
    for row in _rows():
        if kind_of(row.setup) == kind:
            of.setdefault(row.setup, []).append(row)
    times = {setup: {_plain(timed.network): timed.us for timed in combined(rows)} for setup, rows in of.items()}
    times = {setup: own for setup, own in times.items() if len(own) >= FEWEST}
    networks = tuple(sorted({name for own in times.values() for name in own}))
    of_parameters = _amounts()
    us = np.array([[own.get(name, np.nan) for name in networks] for own in times.values()])
    return Published(tuple(times), networks, np.array([of_parameters[name] for name in networks]), us)


@lru_cache(maxsize=128)
def pool(kind: Kind, unknown: frozenset[str] = frozenset()) -> Pool:
    """Prices of the shipped set-ups of one kind, as if nobody had ever timed the `unknown` networks."""
    base = None if kind == FLOAT_CPU else pool(FLOAT_CPU, unknown).mean
    return Pool(published(kind).without(unknown), base)


@lru_cache(maxsize=1)
def ranges() -> dict[str, Range]:
    """Row of a cost table -> sizes of the pool's operators, their bytes as of float32."""
    found: dict[str, Range] = {}
    for part in (part for operators in _layers().values() for shape in operators for part in parts(shape)):
        found[part.row] = found.get(part.row, Range()).over(dict(amounts(part, "fp32")))
    return found


def twins(kind: Kind, work: np.ndarray) -> frozenset[str]:
    """Networks of the pool that are the one with this much of every parameter, whatever it is called."""
    prices = pool(kind).mean
    others = published(kind)
    apart = np.abs(others.amounts - work) @ prices / max(float(work @ prices), 1e-12)
    return frozenset(name for name, far in zip(others.networks, apart, strict=True) if far < SAME)


@lru_cache(maxsize=1)
def _rows() -> list[Row]:
    with _file("measurements.csv.gz") as path:
        return read_measurements(path)


@lru_cache(maxsize=1)
def _layers() -> dict[str, tuple[OperatorShape, ...]]:
    with _file("layers.csv.gz") as path:
        return {_plain(name): operators for name, operators in read_layers(path).items()}


@lru_cache(maxsize=1)
def _amounts() -> dict[str, np.ndarray]:
    return {name: totals(operators) for name, operators in _layers().items()}


def _file(name: str) -> AbstractContextManager[Path]:
    return resources.as_file(resources.files("mobilekit.cost") / DATA / name)


def _plain(network: str) -> str:
    return network.removesuffix(SUFFIX)
