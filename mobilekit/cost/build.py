"""Builds a device's profile: times sketches on it and fits its cost tables."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from mobilekit import profiles
from mobilekit.cost import fusions
from mobilekit.cost.adapt import most_telling
from mobilekit.cost.basics import basics, borders, channel_ladder, large
from mobilekit.cost.channels import channel_multiple
from mobilekit.cost.measure import Sample, Timer, Variant, joined
from mobilekit.cost.sampling import pool, wholes
from mobilekit.cost.tables import candidate, fitted, observed, speed_of
from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.files import appearing
from mobilekit.interfaces import Device, Progress, Runtime
from mobilekit.types import (
    CostTable,
    DeviceInfo,
    DeviceProfile,
    Failure,
    Network,
    Provenance,
    RuntimeEntry,
)

BATCH = 48
"""Sketches of a request, in each variant."""
QUICK_BATCH = 96
"""The same where time is short: every request starts the runtimes anew."""
CHOICE = 3 * BATCH
"""Networks like real ones that are drawn for each batch, which is chosen from them."""
SEED = 20
TARGET_ERROR = 0.025
"""Median left-out error at which sampling stops."""
FIT_SHARE = 0.15
"""Share of the time that is kept for fitting; no later estimate of it is better than a guess from the last fit."""
LONG = 300.0
"""Seconds from which layers of large networks are timed too."""
LEAST_BATCHES = 10
"""Batches before the error is believed."""
WHOLES = 66
"""Whole networks that are timed where time is long."""
WHOLE_BATCH = 11
"""Whole networks of a request."""
AGAIN = 6
"""Whole networks of earlier requests that are timed again with each batch: those that were disturbed all the time."""


class Built(NamedTuple):
    """A measured profile, its raw samples (one JSON-able dict per sketch), and what did not work."""

    profile: DeviceProfile
    samples: list[dict[str, object]]
    failures: list[Failure]


def key(info: DeviceInfo) -> str:
    """What a measured profile depends on: the processor and the versions of the runtimes.

    >>> key(DeviceInfo(name="host", kind="host", origin="host", soc="A1", cores=2, memory_mb=None, os="Linux",
    ...                versions={"onnx": "1.23"}))
    'A1; onnx 1.23'
    """
    kind = [] if info.origin == "host" else [info.kind]
    return "; ".join([*kind, info.soc, *(f"{name} {version}" for name, version in sorted(info.versions.items()))])


def build(
    device: Device,
    runtimes: Sequence[Runtime],
    template: DeviceProfile,
    seconds: float = 60.0,
    progress: Progress | None = None,
    threads: Sequence[int] = (1,),
) -> Built:
    """Time sketches on the device for at most about `seconds` and fit its prices.

    First the basic sketches, which show every kind of operator; then, batch by batch, those of a pool of networks like
    real ones that the fitted tables are least sure of, until the time is over or the median left-out error of every
    table is at most TARGET_ERROR. `template` gives name, kind, compute units, and the runtimes and precisions to time;
    the rest of the profile is measured. A runtime or precision that does not work is a Failure. Raises MobilekitError
    where nothing could be timed at all.
    """
    report = progress or (lambda _stage, _fraction: None)
    report("profile", 0.0)
    info = device.info()
    if info.origin == "emulator":
        raise BadInputError(f"'{device.name}' is an emulator, whose times are no latency: build a profile of a device")
    template = _template(template, info)
    variants, failures = _variants(runtimes, template, threads)
    timer = Timer(device, time.monotonic() + seconds * (1 - FIT_SHARE), failures, target=info.target or "arm")
    survey = _Survey(timer, variants, seconds, report)
    survey.run()
    tables = survey.tables()
    if not tables:
        reasons = "; ".join(f"{f.subject}: {f.message}" for f in failures[:3]) or "no runtime was asked for"
        raise MobilekitError(f"no operator could be timed on {device.name} ({reasons})")
    for variant in variants:
        if not any(_is_of(table, variant) for table in tables):
            failures.append(_failure(str(variant), "no sketch could be timed", "look at the other failures"))
    entries, evidence = _entries(template, survey)
    errors = [table.validation.median_error for table in tables if table.validation is not None]
    profile = template.model_copy(
        update={
            "soc": info.soc,
            "cores": info.cores,
            "memory_mb": info.memory_mb,
            "runtimes": entries,
            "tables": tuple(tables),
            "provenance": _provenance(info, survey, evidence),
            "validation_error": sum(errors) / len(errors) if errors else None,
            "key": key(info),
        }
    )
    report("profile", 1.0)
    return Built(profile, [sample.record() for sample in survey.samples], failures)


def save(profile: DeviceProfile, records: Iterable[dict[str, object]], path: Path) -> Path:
    """Write the profile to `path` and the raw samples beside it as JSON lines; returns the samples' path.

    Each file appears whole or not at all. Raises StorageError where the folder cannot be written.
    """
    raw = path.with_suffix(".samples.jsonl")
    with appearing(raw) as draft:
        draft.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    with appearing(path) as draft:  # last: whoever sees the profile finds its samples
        draft.write_text(profiles.dump(profile), encoding="utf-8")
    return raw


# ---------------------------------------------------------------- what to time


def _template(template: DeviceProfile, info: DeviceInfo) -> DeviceProfile:
    """For a device other than this machine: its own kind and name, and the runtimes that it says it has.

    Raises MobilekitError where it has none.
    """
    if info.origin == "host":
        return template
    entries = tuple(entry for entry in template.runtimes if entry.name in info.versions)
    if not entries:
        wanted = " or ".join(entry.name for entry in template.runtimes)
        raise MobilekitError(
            f"'{info.name}' has no runtime to time ({wanted}): `mobilekit doctor` says what to install"
        )
    name = re.sub(r"[^a-z0-9]+", "-", info.soc.lower()).strip("-") or info.kind
    kind = {"android": "android", "ios": "ios"}.get(info.kind, "linux-board")
    return template.model_copy(update={"name": name, "kind": kind, "runtimes": entries})


def _variants(
    runtimes: Sequence[Runtime], template: DeviceProfile, threads: Sequence[int]
) -> tuple[list[Variant], list[Failure]]:
    """Runtimes and precisions that both the device and this machine know."""
    variants, failures = [], []
    for runtime in runtimes:
        entry = template.runtime(runtime.name)
        reason = runtime.unavailable()
        if entry is None:
            failures.append(
                _failure(runtime.name, f"the profile {template.name} does not list it", "add it to the profile")
            )
        elif reason is not None:
            failures.append(_failure(runtime.name, reason, "install what is missing and build the profile again"))
        else:
            known = [p for p in entry.precisions if p in runtime.precisions]
            variants += [Variant(runtime, p, count) for p in known for count in threads]
    return variants, failures


def _failure(subject: str, message: str, remedy: str) -> Failure:
    return Failure(stage="profile", subject=subject, message=message, remedy=remedy)


def _is_of(table: CostTable, variant: Variant) -> bool:
    return (table.runtime, table.precision, table.threads) == (
        variant.runtime.name,
        variant.precision,
        variant.threads,
    )


@dataclass
class _Survey:
    """The samples of a device while they grow, and what the runtimes were seen to fuse."""

    timer: Timer
    variants: Sequence[Variant]
    seconds: float
    report: Progress
    samples: list[Sample] = field(default_factory=list)
    whole: list[Network] = field(default_factory=list)
    fused: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    evidence: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Probes, basic sketches, then adaptive batches until the time is over or the error small enough."""
        if not self.variants:
            return
        self._learn_fusions()
        long = self.seconds >= LONG
        first = [*basics(), *borders(), *channel_ladder(), *(large() if long else ())]
        size = BATCH if long else QUICK_BATCH
        waiting = [first[at : at + size] for at in range(0, len(first), size)]
        self.whole = wholes(SEED, WHOLES) if long else []
        waiting += [self.whole[at : at + WHOLE_BATCH] for at in range(0, len(self.whole), WHOLE_BATCH)]
        batches = 0
        for networks in waiting:
            if not self._time_for_another(batches) or not self._batch(networks):
                return  # A device that answers nothing is not asked again until the time is over.
            batches += 1
        while self._time_for_another(batches):
            drawn = pool(SEED + batches, CHOICE)
            chosen = self._next(drawn, self.variants[batches % len(self.variants)])
            self._batch([*(drawn[index] for index in chosen), *self._disturbed()])
            batches += 1
            if batches >= LEAST_BATCHES and batches % 4 == 0 and self._error() <= TARGET_ERROR:
                break

    def tables(self) -> list[CostTable]:
        """A cost table for each variant that could be timed."""
        return fitted(self.samples, self.fused)

    def _learn_fusions(self) -> None:
        asked = fusions.probes()
        networks = list({n.name: n for probe in asked for n in (probe.without, probe.with_it)}.values())
        single = [variant for variant in self.variants if variant.threads == self.variants[0].threads]
        profiles_ = self.timer.time(single, networks, profile=True)
        for variant in single:
            own = [s for s in profiles_ if (s.runtime, s.precision) == (variant.runtime.name, variant.precision)]
            found, words = fusions.learned(asked, own)
            self.fused[variant.runtime.name, variant.precision] = found
            self.evidence += [f"{variant}: {line}" for line in words]

    def _time_for_another(self, batches: int) -> bool:
        spent = self.seconds * (1 - FIT_SHARE) - self.timer.left
        return batches == 0 or self.timer.left > spent / batches

    def _batch(self, networks: Sequence[Network]) -> bool:
        """Time the networks; whether any could be."""
        timed = self.timer.time(self.variants, networks)
        self.samples = joined([*self.samples, *timed])
        self.report("profile", min(0.99, max(0.0, 1 - self.timer.left / max(self.seconds, 1e-9))))
        return bool(timed)

    def _disturbed(self) -> list[Network]:
        """Whole networks that were timed, in some variant, at no moment when the machine was undisturbed."""
        speed = speed_of(self.samples)
        names = {s.network.name for s in self.samples if not s.steady(speed)}
        return [network for network in self.whole if network.name in names][:AGAIN]

    def _next(self, drawn: Sequence[Network], variant: Variant) -> list[int]:
        """The candidates that the variant's table is least sure of; the variants take turns."""
        key = variant.runtime.name, variant.precision, variant.threads
        own = [s for s in self.samples if (s.runtime, s.precision, s.threads) == key]
        fused = self.fused.get((variant.runtime.name, variant.precision), ())
        timed = observed(own, fused, speed_of(self.samples))
        if not timed:
            return list(range(BATCH))
        return most_telling(timed, [candidate(n, variant.precision, fused) for n in drawn], BATCH)

    def _error(self) -> float:
        """The largest median left-out error of the tables as they are now."""
        checked = [table.validation.median_error for table in self.tables() if table.validation is not None]
        return max(checked, default=1.0)


# ---------------------------------------------------------------- facts around the tables


def _entries(template: DeviceProfile, survey: _Survey) -> tuple[tuple[RuntimeEntry, ...], list[str]]:
    """The template's runtimes with the channel multiples that the ladder supports, and the evidence in words."""
    entries, evidence = [], []
    speed = speed_of(survey.samples)
    for entry in template.runtimes:
        own = [s for s in survey.samples if s.runtime == entry.name and s.threads == survey.variants[0].threads]
        if own:
            multiple, words = channel_multiple(own, speed)
            evidence.append(f"{entry.name}: channel multiple {multiple} ({words})")
            entries.append(entry.model_copy(update={"channel_multiple": multiple}))
        else:
            entries.append(entry)
    return tuple(entries), evidence


def _provenance(info: DeviceInfo, survey: _Survey, evidence: Sequence[str]) -> tuple[Provenance, ...]:
    date = datetime.now(UTC).date().isoformat()
    versions = ", ".join(f"{name} {version}" for name, version in sorted(info.versions.items()))
    counted = f"{len(survey.samples)} runs of sketches timed on {info.name} ({info.soc}, {info.os})"
    missing = f"{survey.timer.unsupported} could not be written"
    origin = {"version": versions, "date": date, "licence": "measured by this machine's owner"}
    return (
        Provenance(source=f"{counted}; {missing}", **origin),
        *(Provenance(source=line, **origin) for line in [*evidence, *survey.evidence]),
    )
