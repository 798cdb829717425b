"""A profile in words: the device, what its predictions are worth, and where every figure is from."""

from __future__ import annotations

from collections.abc import Iterator

from mobilekit.types import CostTable, DeviceProfile


def explained(profile: DeviceProfile) -> str:
    """Lines for people.

    >>> from mobilekit import profiles
    >>> explained(profiles.load("host")).splitlines()[0]
    'host: this machine (host)'
    """
    return "\n".join(_lines(profile))


def _lines(profile: DeviceProfile) -> Iterator[str]:
    yield f"{profile.name}: {profile.soc} ({profile.kind})"
    memory = "memory not stated" if profile.memory_mb is None else f"{profile.memory_mb} MB"
    yield f"  {profile.cores} cores, {memory}, {', '.join(profile.compute_units)}"
    for entry in profile.runtimes:
        written = f", files written as {entry.writes}" if entry.writes else ""
        yield f"  runs {entry.name} on the {entry.processor} in {', '.join(entry.precisions)}{written}"
    if profile.weak:
        yield f"  low confidence: {profile.weak}"
    for table in profile.tables:
        yield from _table(table)
    if profile.provenance:
        yield "sources:"
    for source in dict.fromkeys(profile.provenance):
        yield f"  {source.source} (version {source.version}, {source.date}; {source.licence})"


def _table(table: CostTable) -> Iterator[str]:
    where = f", {table.cores} cores" if table.cores else ""
    yield f"{table.title}{where} ({table.basis}):"
    if table.weak:
        yield f"  low confidence: {table.weak}"
    yield f"  {len(table.kinds)} kinds of operators, {table.overhead_us:.1f} us a run beside them"
    if table.validation is None:
        yield "  own error: not checked"
    else:
        v = table.validation
        yield (
            f"  own error: median {v.median_error:.1%}, mean {v.mean_error:.1%}, {v.within_10:.0%} of {v.cases} cases "
            f"within 10 % ({v.method})"
        )
        yield f"  80 % interval: x{table.low:.2f} to x{table.high:.2f}, which held {v.coverage:.0%} of the cases"
    if table.fusions:
        yield f"  runs as one kernel: {', '.join(table.fusions)}"
    for source in table.provenance:
        yield f"  from {source.source} (version {source.version}, {source.date}; {source.licence})"
