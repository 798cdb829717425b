"""What the figures rest on: raw samples, conditions, what went wrong, and where it all came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mobilekit import stats
from mobilekit.reports import _words as words
from mobilekit.reports._blocks import (
    Block,
    Bullets,
    Cell,
    Columns,
    Fold,
    Group,
    Section,
    Strip,
    Strips,
    Text,
    num,
    table,
)
from mobilekit.reports._figures import MOST_DOTS
from mobilekit.types import DeviceInfo, Report

MOST_MS = 1e12
Samples = Mapping[str, Sequence[float]]


def samples(report: Report) -> Section:
    """Every single run behind the latencies, device by device."""
    title = "Raw samples"
    kind = "CPU" if report.budget.clock == "cpu" else "wall"
    main = _drawn(report.samples, f"{kind} time of every run" + (f" on {report.device}" if report.devices else ""))
    blocks: list[Block | Fold] = list(main or (Text("Not measured: there are no samples.", "quiet"),))
    for row in report.devices:
        found = _drawn(row.samples, "Time of every run")
        if found:
            blocks.append(Fold(f"Raw samples on {row.device}", found))
        else:
            blocks.append(Text(f"On {row.device} nothing was timed: there are no samples.", "quiet"))
    return Section("samples", title, tuple(blocks))


def _drawn(found: Samples, caption: str) -> tuple[Block, ...]:
    """Samples on one scale, closer, and in numbers; nothing where there are none."""
    # a report.json of somebody else may hold any number
    usable = {name: tuple(s for s in values if math.isfinite(s) and abs(s) < MOST_MS) for name, values in found.items()}
    usable = {name: values for name, values in usable.items() if values}
    if not usable:
        return ()
    rows = [
        (
            Cell(name),
            num(f"{len(values):,}"),
            num(words.number(min(values))),
            num(words.number(stats.median(values))),
            num(words.number(stats.percentile(values, 90))),
            num(words.number(max(values))),
        )
        for name, values in usable.items()
    ]
    strips = tuple(Strip(name, values, stats.median(values)) for name, values in usable.items())
    thinned = f" (evenly thinned to at most {MOST_DOTS} dots)" if max(map(len, usable.values())) > MOST_DOTS else ""
    heads = ("Model", "Samples", "Min (ms)", "Median (ms)", "p90 (ms)", "Max (ms)")
    return (
        Strips(f"{caption}, measured, on one scale; from top to bottom in the order of the runs{thinned}", strips),
        Strips("The same closer: each on its own scale, which does not begin at zero", strips, closer=True),
        table(heads, rows, "The same in numbers, measured"),
    )


def conditions(report: Report) -> Section:
    """What the measurements were made on and how."""
    nothing = "No conditions were recorded: nothing was measured."
    groups = [_pairs("Protocol and state", ("Condition", "Value"), _recorded(report.conditions), nothing)]
    if report.device_info:
        groups.append(_pairs("Device", ("Device", "Value"), _facts(report.device_info), ""))
    blocks: list[Block | Columns | Fold] = [Columns(tuple(groups))]
    for row in report.devices:
        parts = [_pairs("Protocol and state", ("Condition", "Value"), _recorded(row.conditions), nothing)]
        if row.info:
            parts.append(_pairs("Device", ("Device", "Value"), _facts(row.info), ""))
        blocks.append(Fold(f"Conditions on {row.device}", (Columns(tuple(parts)),)))
    if report.extrapolated:
        title = "Predicted outside the sampled range (extrapolated)"
        blocks.append(Bullets(title, _capped(report.extrapolated)))
    return Section("conditions", "Conditions of measurement", tuple(blocks))


def _recorded(found: Mapping[str, str]) -> dict[str, str]:
    return {words.spaced(name): value or "not known" for name, value in found.items()}


def _facts(info: DeviceInfo) -> dict[str, str]:
    """What a device says of itself; what it does not say has no row, but for what every one has."""
    facts = {
        "name": info.name,
        "kind": f"{info.kind} (measured on: {info.origin})",
        "processor": info.soc or "not known",
        "architecture": info.architecture or "",
        "cores": str(info.cores),
    }
    for number, cluster in enumerate(info.clusters, 1):
        parts = [
            f"CPU {', '.join(map(str, cluster.cpus))}" if cluster.cpus else "",
            cluster.core or "",
            f"up to {words.plain(cluster.max_mhz)} MHz" if cluster.max_mhz is not None else "",
            f"governor {cluster.governor}" if cluster.governor else "",
        ]
        facts[f"cluster {number}"] = "; ".join(part for part in parts if part)
    facts["memory"] = "not known" if info.memory_mb is None else f"{info.memory_mb:,} MB"
    facts["system"] = info.os or "not known"
    facts["throttling"] = info.throttling or ""
    degrees = [f"{zone} {words.plain(value)} °C" for zone, value in info.temperatures_c.items()]
    facts["temperatures"] = ", ".join(degrees)
    facts["battery"] = _battery(info)
    return {name: value for name, value in facts.items() if value}


def _battery(info: DeviceInfo) -> str:
    if info.battery is None:
        return ""
    parts = [
        f"{words.plain(info.battery.percent)} %" if info.battery.percent is not None else "",
        {None: "", True: "charging", False: "not charging"}[info.battery.charging],
        f"{words.plain(info.battery.temperature_c)} °C" if info.battery.temperature_c is not None else "",
    ]
    return ", ".join(part for part in parts if part)


def _pairs(title: str, heads: tuple[str, str], facts: dict[str, str], nothing: str) -> Group:
    rows = [(Cell(name), Cell(value)) for name, value in facts.items()]
    return (title, "", (table(heads, rows) if rows else Text(nothing, "quiet"),))


def _capped(items: Sequence[str], most: int = 60) -> tuple[str, ...]:
    rest = (f"{len(items) - most} more in report.json",) if len(items) > most else ()
    return (*items[:most], *rest)


def troubles(report: Report) -> Section:
    """What did not work, and what deserves doubt."""
    blocks: list[Block] = []
    if report.failures:
        rows = [
            (Cell(f.stage), Cell(f.subject, "code"), Cell(f.message), Cell(f.remedy or words.DASH))
            for f in report.failures
        ]
        heads = ("Stage", "Subject", "What happened", "What to do")
        blocks.append(table(heads, rows, "Failures", "no remedy known"))
    if report.measured_warnings:
        rows = [
            (Cell(words.spaced(w.kind.replace("-", " "))), Cell(w.subject, "code"), Cell(w.message), Cell(w.advice))
            for w in report.measured_warnings
        ]
        blocks.append(table(("Warning", "Measured", "What was seen", "What to do"), rows, "Measurements to be doubted"))
    if report.warnings:
        blocks.append(Bullets("Warnings", _capped(report.warnings)))
    if not blocks:
        blocks.append(Text("No failures and no warnings.", "quiet"))
    return Section("troubles", "Warnings and failures", tuple(blocks))


def origin(report: Report) -> Section:
    """How long it took, with which versions and seed."""
    versions = dict(report.device_info.versions) if report.device_info else {}
    facts = {"mobilekit": report.mobilekit_version, **versions, "random seed": str(report.seed)}
    facts["report made"] = words.moment(report.created_at)
    groups = [_pairs("Versions and seed", ("Software", "Version"), facts, "")]
    if report.stages:
        rows = [
            (Cell(s.name), num(words.seconds(s.seconds)), Cell("resumed, time of the earlier run" if s.resumed else ""))
            for s in report.stages
        ]
        rows.append((Cell("all stages"), num(words.seconds(sum(s.seconds for s in report.stages))), Cell("")))
        groups.insert(0, ("Stages", "", (table(("Stage", "Time", "Note"), rows),)))
    return Section("stages", "Stages and versions", (Columns(tuple(groups)),))
