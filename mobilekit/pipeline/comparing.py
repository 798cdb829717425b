"""Compares two results: what differs between their conditions, and which timings are faster beyond doubt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mobilekit import significance
from mobilekit.pipeline._compared_sources import Key, Source, read_source
from mobilekit.pipeline._compared_words import compared_figures, compared_levers, compared_surroundings, reason
from mobilekit.types import (
    ComparedPair,
    ComparedResults,
    Difference,
    Measurement,
    RatioTest,
    TimedSide,
)
from mobilekit.types.comparison import Shown

ORDER = {"original": 0, "result": 1}
"""Of the pairs; files follow as they come."""
Sides = tuple[list[Measurement], list[Measurement]]
Clock = Callable[[Measurement], tuple[float, ...]]


def compare_results(first: Path, second: Path) -> ComparedResults:
    """What the second result is beside the first. What `mobilekit report compare` does.

    Raises BadInputError in one sentence for a path that holds no result.
    """
    a, b = read_source(first), read_source(second)
    wall = any(s.report is not None and s.report.budget.clock == "wall" for s in (a, b))
    keys = sorted(_matched(a, b), key=lambda pair: ORDER.get(pair[0].role, len(ORDER)))
    pairs = tuple(_pair(keys_of, (a.measured[keys_of[0]], b.measured[keys_of[1]]), wall) for keys_of in keys)
    conditions = dict.fromkeys([*compared_surroundings(a.report, b.report), *(d for p in pairs for d in p.differences)])
    return ComparedResults(
        first=a.name,
        second=b.name,
        conditions=tuple(conditions),
        pairs=pairs,
        unpaired=_unpaired(a, b, keys),
        figures=compared_figures(a.report, b.report),
        levers=compared_levers(a, b),
    )


# ---------------------------------------------------------------- what is compared with what


def _matched(a: Source, b: Source) -> list[tuple[Key, Key]]:
    """Measurements of the same role, runtime, device and compute unit; what is left over where there is no choice."""
    found = [(key, key) for key in a.measured if key in b.measured]
    left = [[key for key in s.measured if (key, key) not in found] for s in (a, b)]
    same = [(x, y) for x in left[0] for y in left[1] if x[:2] == y[:2]]
    found += [(x, y) for x, y in same if sum(p[0] == x for p in same) == 1 and sum(p[1] == y for p in same) == 1]
    if len(a.measured) == len(b.measured) == 1 and not (a.report or b.report):
        return [(next(iter(a.measured)), next(iter(b.measured)))]
    return found


def _unpaired(a: Source, b: Source, keys: Sequence[tuple[Key, Key]]) -> tuple[Difference, ...]:
    alone = [[key for key in s.measured if all(pair[i] != key for pair in keys)] for i, s in enumerate((a, b))]
    in_first = (Difference(what=_named(key), first="measured", second=None) for key in alone[0])
    in_second = (Difference(what=_named(key), first=None, second="measured") for key in alone[1])
    return (*in_first, *in_second)


def _named(key: Key) -> str:
    unit = "" if key.compute_unit == "cpu" else f", {key.compute_unit}"
    return f"{key.role} in {key.runtime} on {key.device}{unit}"


# ---------------------------------------------------------------- one pair


def _pair(keys: tuple[Key, Key], sides: Sides, wall: bool) -> ComparedPair:
    every = [*sides[0], *sides[1]]
    on_cpu = not wall and all(m.threads == 1 and m.cpu_samples_ms for m in every)
    clock: Clock = (lambda m: m.cpu_samples_ms) if on_cpu else (lambda m: m.samples_ms)
    times = _tested(sides, clock)
    reference = None
    if on_cpu and all(len(m.reference_ms) == len(m.cpu_samples_ms) and min(m.reference_ms) > 0 for m in every):
        reference = _tested(sides, _to_reference)
    told = _side(sides[0], clock), _side(sides[1], clock)
    first, second = keys
    return ComparedPair(
        role=first.role if first.role == second.role else f"{first.role} and {second.role}",
        runtime=first.runtime,
        device=first.device if first.device == second.device else f"{first.device} and {second.device}",
        origin=sides[0][0].origin,
        clock="cpu" if on_cpu else "wall",
        first=told[0],
        second=told[1],
        times=times,
        to_reference=reference,
        verdict=_verdict(times, reference),
        reason=reason(times, reference, told),
        differences=tuple(_differences(sides)),
    )


def _to_reference(measurement: Measurement) -> tuple[float, ...]:
    pairs = zip(measurement.cpu_samples_ms, measurement.reference_ms, strict=True)
    return tuple(sample / reference for sample, reference in pairs)


def _tested(sides: Sides, clock: Clock) -> RatioTest | None:
    """None where a side has no samples, or a clock that is too coarse for them."""
    try:
        found = significance.judge(*([clock(m) for m in side] for side in sides))
    except ValueError:
        return None
    return RatioTest(
        ratio=found.ratio,
        interval=found.interval,
        p_value=found.p_value,
        unit=found.unit,
        units=found.units,
        threshold=found.threshold,
        threshold_basis=found.threshold_basis,
        verdict=found.verdict,
    )


def _verdict(times: RatioTest | None, reference: RatioTest | None) -> Shown:
    if times is None:
        return "not timed"
    if reference is not None and reference.verdict != times.verdict:
        return "no difference shown"
    return times.verdict


def _side(measurements: list[Measurement], clock: Clock) -> TimedSide:
    from mobilekit.stats import median

    samples = [sample for m in measurements for sample in clock(m)]
    return TimedSide(
        model=measurements[0].model,
        median_ms=median(samples) if samples else None,
        samples=len(samples),
        sessions=len(measurements),
        instructions=measurements[0].instructions,
    )


def _differences(sides: Sides) -> Iterable[Difference]:
    """Conditions that are not alike on both sides of a pair."""
    facts: dict[str, Callable[[Measurement], str | None]] = {
        "device": lambda m: m.device,
        "origin": lambda m: m.origin,
        "runtime": lambda m: m.runtime,
        "threads": lambda m: str(m.threads),
        "compute unit": lambda m: m.compute_unit,
        "measured by": lambda m: m.app or "mobilekit",
        "pinned to CPUs": lambda m: "yes" if m.cpus else "no",
        "frequencies held down": lambda m: None if m.throttled is None else "yes" if m.throttled else "no",
    }
    for what, fact in facts.items():
        yield from _unlike(what, *({fact(m) for m in side} for side in sides))
    for name in sorted({name for side in sides for m in side for name in m.versions}):
        yield from _unlike(f"version of {name}", *({m.versions.get(name) for m in side} for side in sides))


def _unlike(what: str, first: set[str | None], second: set[str | None]) -> Iterable[Difference]:
    if first != second:
        told = (", ".join(sorted(known)) if (known := {f for f in found if f}) else None for found in (first, second))
        yield Difference(what=what, first=next(told), second=next(told))
