"""What the runtime's own profile of an exported file says about the prices of the kinds of its operators."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mobilekit.cost.price import INSIDE, PricedLine
from mobilekit.types import KindFactor, OperatorTime, Precision

KIND_SPREAD = 0.15
"""Relative error that the kinds of a table's operators have of their own, beside what all of them have in common."""
OPERATOR_SPREAD = 0.3
"""Relative error that a single operator has beside its kind's: what few operators say about their kind."""
MOST_OFF = 2.0
"""Factor either way to which a kind is believed to be off: more is a kernel that belongs to something else."""
UNSURE_US = 1.0
"""Microseconds to which a kernel's time is known: profilers count whole ones, and their own time is estimated."""

WEIGHTED = "weighted"
LAYOUT = "layout"
BORDER = "border"
FAMILIES: tuple[tuple[str, str], ...] = (
    (r"quantize|^convert", BORDER),
    (r"conv|gemm|matmul|fully.?connected|fullyconnected", WEIGHTED),
    (r"reorder|transpose|reshape|flatten|squeeze|copy", LAYOUT),
    (r"global.?average|^mean|reducemean", "global_pool"),
    (r"max.?pool", "max_pool"),
    (r"average.?pool", "avg_pool"),
    (r"concat", "concat"),
    (r"softmax", "softmax"),
    (r"resize|upsample", "resize"),
    (r"add|^sum", "add"),
    (r"relu|clip|clamp|swish|sigmoid|gelu|silu|tanh|^elu", "activation"),
    (r"mul", "mul"),
)
"""What a kernel's kind is called in ONNX Runtime and in LiteRT with XNNPACK -> the kind of operator; the first that
fits. A 1 x 1 convolution is a fully connected kernel in XNNPACK: all that have weights are one family."""
MEMBERS = {WEIGHTED: ("conv", "linear", "conv_transpose"), BORDER: ("quantize", "dequantize")}
"""Families of several kinds of operators."""


class Profiled(NamedTuple):
    """A file's kernels as profiled, and what one run of the whole file takes without the profiler, microseconds."""

    kernels: Sequence[OperatorTime]
    us: float


def profiling_us(files: Sequence[Profiled]) -> float:
    """What the runtime's profiler adds to each kernel, microseconds.

    The profiled runs are slower than the others by a factor (it was another moment) and by this much a kernel: the
    least squares of that over the files. Two or three files do not tell the two apart well, but no kernel takes less
    than the profiler: more than the quickest kernel's time it cannot be.
    """
    from scipy.optimize import nnls

    known = [file for file in files if file.kernels]
    if not known:
        return 0.0
    total = np.array([sum(kernel.median_us for kernel in file.kernels) for file in known])
    explained = np.array([[file.us, len(file.kernels)] for file in known]) / np.maximum(total, 1e-9)[:, None]
    quickest = min(kernel.median_us for file in known for kernel in file.kernels)
    return min(float(nnls(explained, np.ones(len(known)))[0][1]), quickest)


def times_us(
    lines: Sequence[PricedLine], kernels: Sequence[OperatorTime], profiler_us: float, file: Path | None = None
) -> dict[str, float]:
    """Microseconds of each operator that the profile tells apart, by the name of its line; the profiler's are off.

    A file's kernels bear names of their own, so that they are matched by their order: those that have weights with the
    network's layers, and of the other kinds those of which there are as many kernels as operators. What changes a
    layout belongs to the operator that it is done for, and an activation that the network has in another operator to
    that one. `file` is an ONNX file, which ONNX Runtime runs in another order than it was written in.
    """
    ordered = _in_file_order(kernels, file) if file is not None else list(kernels)
    families = [_family(kernel.kind) for kernel in ordered]
    owners = _owners(lines, families)
    alone = any(line.kind == "activation" for line in lines)
    found: dict[str, float] = {}
    waiting, last = 0.0, ""
    for kernel, family, owner in zip(ordered, families, owners, strict=True):
        us = max(kernel.median_us - profiler_us, 0.0)
        if owner:
            found[owner], last, waiting = us + waiting, owner, 0.0
        elif family == LAYOUT:
            waiting += us
        elif family == "activation" and last and not alone:
            found[last + INSIDE] = found.get(last + INSIDE, 0.0) + us
    return _shared_out(lines, found)


def _shared_out(lines: Sequence[PricedLine], times: dict[str, float]) -> dict[str, float]:
    """The times, each of an operator and of what is inside of it: as priced where one kernel did both."""
    inside = {line.name: line.us for line in lines if line.kind == "inside"}
    found = dict(times)
    for line in lines:
        name = line.name + INSIDE
        if line.name in times and name not in times and inside.get(name):
            share = line.us / (line.us + inside[name])
            found[line.name], found[name] = share * times[line.name], (1 - share) * times[line.name]
        elif line.name in times and name in times and not inside.get(name):
            found[line.name] += found.pop(name)  # a kernel of its own that is priced with the operator
    return found


def kind_factors(lines: Sequence[PricedLine], times: Mapping[str, float]) -> tuple[KindFactor, ...]:
    """How far each kind's prices are off, against those of all operators that the profile tells apart.

    The factor of a row is its operators' measured over predicted time, divided by that of all of them, and shrunk: the
    logarithm is multiplied by the share of its variance that is the kind's own and not that of few operators or of
    kernels that are too short for the profiler (the mean of a normal distribution known from noisy values).
    """
    known = [line for line in lines if line.us > 0 and times.get(line.name, 0.0) > 0]
    if not known:
        return ()
    common = sum(times[line.name] for line in known) / sum(line.us for line in known)
    rows: dict[tuple[Precision, str], list[PricedLine]] = {}
    for line in known:
        rows.setdefault((line.precision, line.row), []).append(line)
    found = []
    for (precision, row), own in sorted(rows.items()):
        measured = sum(times[line.name] for line in own)
        off = math.log(measured / (common * sum(line.us for line in own)))
        off = min(max(off, -math.log(MOST_OFF)), math.log(MOST_OFF))
        noise = OPERATOR_SPREAD**2 / len(own) + (UNSURE_US * len(own) / measured) ** 2
        trust = KIND_SPREAD**2 / (KIND_SPREAD**2 + noise)
        found.append(KindFactor(precision=precision, row=row, factor=math.exp(trust * off), operators=len(own)))
    return tuple(found)


# ---------------------------------------------------------------- which kernel is whose


def _family(kind: str) -> str:
    return next((family for pattern, family in FAMILIES if re.search(pattern, kind.lower())), "")


def _owners(lines: Sequence[PricedLine], families: Sequence[str]) -> list[str]:
    """The line of each kernel, "" where it is nobody's or not known whose."""
    owners = [""] * len(families)
    for family in set(families) - {LAYOUT, ""}:
        kinds = MEMBERS.get(family, (family,))
        places = [place for place, other in enumerate(families) if other == family]
        names = [line.name for line in lines if line.kind in kinds]
        if len(places) == len(names):
            for place, name in zip(places, names, strict=True):
                owners[place] = name
    return owners


def _in_file_order(kernels: Sequence[OperatorTime], file: Path) -> list[OperatorTime]:
    """The kernels in the order in which an ONNX file has the nodes that they are named after; others behind the kernel
    that they ran behind."""
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    places = {name: place for place, node in enumerate(graph.node) for name in (node.name, *node.output)}
    keys, last = [], -1
    for kernel in kernels:
        name = re.sub(r"(_nchwc|_token_\d+)+$", "", kernel.name.removeprefix("fused "))
        last = places.get(name, last)
        keys.append(last)
    return [kernel for _, kernel in sorted(zip(keys, kernels, strict=True), key=lambda pair: pair[0])]
