"""What two reports say of everything but timings, side by side; and why a verdict on timings is what it is."""

from __future__ import annotations

from collections.abc import Iterator

from mobilekit.pipeline._compared_sources import Source
from mobilekit.significance import ALPHA
from mobilekit.types import DeviceInfo, Difference, Option, RatioTest, Report, TimedSide

Told = dict[str, str | None]
_THRESHOLD = {
    "least": "and less than {:.0%} is not called a difference",
    "sessions": "and these sessions repeat to {:.1%} only",
    "within": "and in too few sessions to see how well they repeat, the quartiles of one are {:.1%} apart",
    "one session": "and in too few sessions to see how well they repeat, less than {:.0%} is not called a difference",
}


def not_timed(first: TimedSide, second: TimedSide) -> str:
    """What there is instead of times."""
    if first.instructions is None or second.instructions is None:
        return "a side has no samples of time that can be compared"
    counts = f"{first.instructions:,} and {second.instructions:,} instructions a run"
    return f"an emulator counted {counts}, which is no latency"


def reason(times: RatioTest | None, reference: RatioTest | None, sides: tuple[TimedSide, TimedSide]) -> str:
    """The verdict in a sentence with its figures."""
    if times is None:
        return not_timed(*sides)
    if reference is not None and reference.verdict != times.verdict:
        return (
            f"in milliseconds the second is {_shown(times)}, and over the reference product of the same rounds "
            f"{_shown(reference)}: the machine itself was not equally fast"
        )
    if times.verdict == "no difference shown":
        return _not_shown(times)
    return (
        f"the second is {_shown(times)}; {times.units[0]} and {times.units[1]} {times.unit} were ranked, "
        f"p = {times.p_value:.2g}"
    )


def _shown(test: RatioTest) -> str:
    if test.verdict == "no difference shown":
        return "not shown to differ"
    ratio = test.ratio if test.ratio >= 1 else 1 / test.ratio
    return f"{ratio:.3g} times {test.verdict}"


def _not_shown(test: RatioTest) -> str:
    apart = max(test.ratio, 1 / test.ratio) - 1
    if test.p_value is None:
        few = min(test.units)
        return f"only {few} {test.unit} know little enough of each other to be ranked: measure longer"
    if apart <= test.threshold:
        return f"the medians are {apart:.1%} apart, {_THRESHOLD[test.threshold_basis].format(test.threshold)}"
    if test.p_value >= ALPHA:
        ranked = f"{test.units[0]} and {test.units[1]} {test.unit}"
        return f"the ranks of {ranked} do not tell them apart (p = {test.p_value:.2g})"
    return f"the 90 % interval of the ratio, {test.interval[0]:.3g} to {test.interval[1]:.3g}, holds 1"


# ---------------------------------------------------------------- what is not a timing


def compared_surroundings(a: Report | None, b: Report | None) -> tuple[Difference, ...]:
    """How the devices of two reports differ, and the clock that was judged by."""
    if a is None or b is None:
        return ()
    first, second = _infos(a), _infos(b)
    shared = [name for name in first if name in second]  # one that only one of them knows differs in nothing
    return tuple(_apart(_surroundings(a, first, shared), _surroundings(b, second, shared)))


def _infos(report: Report) -> dict[str, DeviceInfo]:
    infos = (report.device_info, *(row.info for row in report.devices))
    return {info.name: info for info in infos if info is not None}


def _surroundings(report: Report, infos: dict[str, DeviceInfo], shared: list[str]) -> Told:
    told: Told = {"clock": report.budget.clock, "profile": report.profile}
    for name in shared:
        told |= {f"{what} of {name}": value for what, value in _of_device(infos[name]).items()}
    return told


def _of_device(info: DeviceInfo) -> Told:
    governors = sorted({cluster.governor for cluster in info.clusters if cluster.governor})
    return {
        "processor": info.soc or None,
        "cores": str(info.cores),
        "system": info.os or None,
        "governor": ", ".join(governors) or None,
        "throttling": info.throttling,
    }


def compared_figures(a: Report | None, b: Report | None) -> tuple[Difference, ...]:
    """What two reports say of their results; also what is alike, since one wants to read it."""
    if a is None or b is None:
        return ()
    first, second = _figures(a), _figures(b)
    return tuple(Difference(what=what, first=first[what], second=second[what]) for what in first)


def _figures(report: Report) -> Told:
    before, after, budget = report.baseline, report.result, report.budget
    asked = {"latency_ms": "ms", "speedup": "times faster", "size_mb": "MB", "max_drop": "points"}
    asked |= {"peak_memory_mb": "MB of memory at the peak"}
    limits = [f"{getattr(budget, name):g} {unit}" for name, unit in asked.items() if getattr(budget, name) is not None]
    return {
        "workload": report.workload,
        "asked": ", ".join(limits) or "nothing",
        "verdict": report.verdict or "not judged",
        "times faster than its original, measured": None if report.ratio is None else f"{report.ratio:.3g}",
        "accuracy of the original": None if before.accuracy is None else f"{before.accuracy:.4f}",
        "accuracy of the result": None if after.accuracy is None else f"{after.accuracy:.4f}",
        "size of the result": None if after.size_bytes is None else f"{after.size_bytes / 1000:.0f} kB",
        "MACs of the result": f"{after.macs:,}",
        "failures": str(len(report.failures)),
    }


def compared_levers(a: Source, b: Source) -> tuple[Difference, ...]:
    """Levers that one plan uses and the other does not, or with another strength."""
    return tuple(_apart(_levers(a), _levers(b)))


def _levers(source: Source) -> Told:
    if source.plan is not None:
        return {f"{c.option.transform} {c.option.where}": _settings(c.option) for c in source.plan.chosen}
    if source.report is not None:
        return {f"{row.transform} {row.where}": "used" for row in source.report.plan}
    return {}


def _settings(option: Option) -> str:
    return ", ".join(f"{name} {value}" for name, value in option.settings.items()) or "used"


def _apart(first: Told, second: Told) -> Iterator[Difference]:
    for what in dict.fromkeys((*first, *second)):
        if first.get(what) != second.get(what):
            yield Difference(what=what, first=first.get(what), second=second.get(what))
