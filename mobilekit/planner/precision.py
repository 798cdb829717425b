"""Assignments of precisions that are worth a search: float, int8, int8 where it is quicker, int8 where it is safe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from mobilekit.cost.work import QUANTISED
from mobilekit.planner.offers import Start
from mobilekit.types import Network, Option, Precision

LONGEST = 6
"""Operators in a row that change their precision together: a border costs as much as some of them save."""
LEAST_GAIN = 0.002
"""Share of the latency below which a change of precision is not worth a border."""
SPARED = (1, 2, 4, 8)
"""So many of the operators that rounding harms most are tried in float, with what writes their inputs."""

Latency = Callable[[Network], float]


def starts(
    network: Network, latency: Latency, damages: Mapping[str, float] | None = None, whole: float | None = None
) -> list[Start]:
    """The float network, then those in int8 that no other beats in both latency and damage.

    `damages` are those of rounding what single operators read, by name (None: not measured); `whole` is the measured
    damage of int8 on all of them, to which their sum is scaled (None: not measured). What an operator reads is rounded
    unless both it and all that write it are in float.
    """
    able = [operator.name for operator in network.operators if operator.kind in QUANTISED]
    own = {name: (damages or {}).get(name, 0.0) for name in able}
    if not any(own.values()):
        own = dict.fromkeys(able, 1.0 / max(1, len(able)))
        whole = whole or 0.0
    scale = 1.0 if whole is None else whole / sum(own.values()) if own else 0.0

    def start(int8: Iterable[str]) -> Start:
        precisions: dict[str, Precision] = {**network.precisions, **dict.fromkeys(int8, "int8")}
        names = {name for name, precision in precisions.items() if precision == "int8"}
        rounded = [operator.name for operator in network.operators if network.reads_rounded(operator, names)]
        return Start(network.with_precisions(precisions), scale * sum(own.get(name, 0.0) for name in rounded))

    if not able:
        return [Start(network)]
    quicker = quickest(start(able).network, latency)
    tried = [start(able), start(quicker)]
    if damages:
        harmful = sorted(quicker, key=lambda name: (-own[name], name))
        writers = {operator.name: operator.inputs for operator in network.operators}
        for count in SPARED:
            left = set(harmful[:count]).union(*(writers[name] for name in harmful[:count]))
            if set(quicker) - left:
                tried.append(start(set(quicker) - left))
    return [Start(network), *_undominated(tried, latency)]


def quickest(network: Network, latency: Latency) -> list[str]:
    """The operators in int8 once runs of them are flipped between int8 and float as long as that saves time."""
    able = [operator.name for operator in network.operators if operator.kind in QUANTISED]
    best, time = network, latency(network)
    for _ in range(2):
        before = time
        for first in range(len(able)):
            for length in range(1, min(LONGEST, len(able) - first) + 1):
                flipped = _flipped(best, able[first : first + length])
                found = latency(flipped)
                if found < time * (1 - LEAST_GAIN):
                    best, time = flipped, found
        if time == before:
            break
    return [name for name in able if best.precisions.get(name) == "int8"]


def _flipped(network: Network, names: Sequence[str]) -> Network:
    precisions = dict(network.precisions)
    for name in names:
        if precisions.pop(name, None) != "int8":
            precisions[name] = "int8"
    return network.with_precisions(precisions)


def _undominated(found: Sequence[Start], latency: Latency) -> list[Start]:
    """Those in int8 that no other beats in latency and damage, each assignment once."""
    rows: dict[frozenset[str], tuple[float, float, Start]] = {}
    for start in found:
        int8 = frozenset(name for name, precision in start.network.precisions.items() if precision == "int8")
        if int8:
            rows.setdefault(int8, (latency(start.network), start.damage, start))
    points = [(time, damage) for time, damage, _ in rows.values()]
    return [
        start
        for time, damage, start in rows.values()
        if not any(t <= time and d <= damage and (t, d) != (time, damage) for t, d in points)
    ]


def as_option(network: Network) -> Option | None:
    """The option of the int8 lever that gives the network its precisions; None where all of it is float."""
    int8 = {name for name, precision in network.precisions.items() if precision == "int8"}
    if not int8:
        return None
    left = [o.name for o in network.operators if o.kind in QUANTISED and o.name not in int8]
    settings: dict[str, str] = {"calibration": "min-max"}
    if left:
        settings["float"] = ",".join(left)
    return Option(transform="int8", where="network", settings={**settings})
