"""What a run is asked for, checked before anything is written."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from mobilekit import __version__, documents, profiles, registry
from mobilekit.errors import BadInputError
from mobilekit.interfaces import Device, Runtime
from mobilekit.types import Budget, DeviceProfile, DeviceSettings, Plan, RuntimeEntry
from mobilekit.workload import Workload, load

DEFAULT_TRAIN_SECONDS = 300.0
DEFAULT_QAT_DROP = 0.3
MOST_PLANS = 32
"""Of a front."""


@dataclass(frozen=True)
class Request:
    """One job: what to compress, for which device, within what."""

    workload: str
    profile: str
    budget: Budget
    runtime: str | None = None
    device: str | None = None
    seed: int = 0
    settings: DeviceSettings = field(default_factory=DeviceSettings)
    """What the user says about the device, and about `devices`."""
    devices: tuple[str, ...] = ()
    """Further devices that measure the final files."""
    cool_to_c: float | None = None
    """Every measurement waits until the device is no hotter, at most five minutes; None: it does not wait."""
    train: bool = True
    train_seconds: float = DEFAULT_TRAIN_SECONDS
    """For all trainings of the run together."""
    pareto: int | None = None
    """Plans to make along the front of latency and damage."""
    qat_drop: float = DEFAULT_QAT_DROP
    """Points of expected accuracy that int8 may cost after the training; where it costs more, the network is trained
    with rounding (quantisation-aware)."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not (math.isfinite(self.train_seconds) and self.train_seconds > 0):
            raise BadInputError(f"a training of {self.train_seconds} seconds was asked for: give more than zero")
        if self.pareto is not None and not 2 <= self.pareto <= MOST_PLANS:
            raise BadInputError(f"--pareto takes a number of plans from 2 to {MOST_PLANS}, not {self.pareto}")
        if not (math.isfinite(self.qat_drop) and self.qat_drop >= 0):
            raise BadInputError(f"int8 may cost {self.qat_drop} points: it must be a number of at least 0")


@dataclass(frozen=True)
class Job:
    """A request whose parts have been found to exist."""

    request: Request
    workload: Workload
    profile: DeviceProfile
    runtime: Runtime
    entry: RuntimeEntry
    device: Device | None
    others: tuple[Device, ...] = ()
    """Further devices that measure the final files."""

    @property
    def key(self) -> str:
        """Identifies everything that a stage's result depends on, apart from the machine's mood."""
        # which devices measure in the end changes nothing before: a resumed run may name others
        request = replace(self.request, workload=self.workload.key, devices=())
        profile = self.profile.model_dump_json()  # a file of the user's may change under its name
        parts = (request, profile, self.runtime.name, self.device.name if self.device else None, __version__)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def open_job(request: Request) -> Job:
    """Load and check everything a request names. Raises BadInputError before anything is written."""
    profile = profiles.load(request.profile)
    name = request.runtime or profile.runtimes[0].name
    entry = profile.runtime(name)
    if entry is None:
        known = ", ".join(e.name for e in profile.runtimes)
        raise BadInputError(f"the profile '{profile.name}' does not run {name}: choose one of {known}")
    runtime = registry.runtime(entry.format)
    reason = runtime.unavailable()
    if reason:
        raise BadInputError(reason)
    spec = request.device if request.device is not None else ("host" if profile.kind == "host" else None)
    found = registry.devices((*([] if spec is None else [spec]), *request.devices), request.settings)
    main = [] if spec is None else [found.pop(0)]
    return Job(
        request=replace(request, runtime=name, device=spec),
        workload=load(request.workload, request.seed),
        profile=profile,
        runtime=runtime,
        entry=entry,
        device=main[0] if main else None,
        others=tuple(found),
    )


def request_of(plan: Plan, workload: str | None = None) -> Request:
    """The request that a saved plan answers."""
    return Request(
        workload=workload or plan.workload,
        profile=plan.profile,
        budget=plan.budget,
        runtime=plan.runtime,
        device=plan.device,
        seed=plan.seed,
        train=plan.train,
        train_seconds=plan.train_seconds,
    )


def read_plan(path: Path) -> Plan:
    """A plan.json. Raises BadInputError in one sentence for a file that is none."""
    return documents.read(path, Plan, f"the plan '{path}'")
