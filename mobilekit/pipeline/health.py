"""What this machine can export, run and measure, and what the devices say that are there."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

import mobilekit
from mobilekit import registry
from mobilekit.errors import MobilekitError, first_line, one_line
from mobilekit.interfaces import Device, Progress
from mobilekit.pipeline.advice import advice
from mobilekit.types import Ability, DeviceInfo, DeviceState, Health, Machine, PackageState

EXTRAS = (None, "tflite", "coreml", "ssh", "adb")
"""Whose packages are looked at; the others are for development and for workloads."""
ELSEWHERE = "measure it in an app on an iPhone or Mac, then: mobilekit import RESULT.json --into DIR"
HOW = {
    "executed": "executed by the format's own engine",
    "evaluated": "evaluated: mobilekit computes what the file says with PyTorch, not with the format's own engine",
}


def examine(asked: Sequence[str] = ()) -> Health:
    """Everything that `mobilekit doctor` shows.

    The devices that can be seen and those of `asked` are all asked at the same time; one that cannot be reached is a
    row of its own. Raises BadInputError where one of `asked` can be no device.
    """
    kinds = registry.device_kinds()
    seen = {kind: [] if found.unavailable() else found.visible() for kind, found in kinds.items()}
    for spec in asked:
        registry.device(spec)
    specs = list(dict.fromkeys(["host", *(spec for found in seen.values() for spec in found), *asked]))
    with ThreadPoolExecutor(max_workers=len(specs)) as pool:
        states = list(pool.map(_state, specs))
    here = states[0].info
    return Health(
        machine=_machine(),
        abilities=(*_formats(here), *_measuring(kinds, seen, here), *_keys(kinds)),
        devices=tuple(states),
    )


def install_emulator(progress: Progress) -> None:
    """Install what `--device emulated-arm64` needs. Raises MobilekitError where that cannot be done here."""
    from mobilekit.devices import emulated_arm64

    emulated_arm64.install(progress)


# ---------------------------------------------------------------- the machine


def _machine() -> Machine:
    return Machine(
        mobilekit=mobilekit.__version__,
        python=platform.python_version(),
        system=platform.platform(),
        packages=tuple(_packages()),
    )


def _packages() -> Iterator[PackageState]:
    """What mobilekit's own metadata ask for, beside what is installed; nothing where it runs from a bare folder."""
    try:
        lines = metadata.requires("mobilekit") or []
    except metadata.PackageNotFoundError:
        return
    for extra in EXTRAS:
        for line in lines:
            try:
                requirement = Requirement(line)
            except InvalidRequirement:
                continue
            if _belongs(requirement, extra):
                yield _package(requirement, extra)


def _belongs(requirement: Requirement, extra: str | None) -> bool:
    if requirement.marker is None:
        return extra is None
    if extra is not None and requirement.marker.evaluate({"extra": ""}):
        return False
    return requirement.marker.evaluate({"extra": extra or ""})


def _package(requirement: Requirement, extra: str | None) -> PackageState:
    name, needed = requirement.name, str(requirement.specifier)
    try:
        version: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    fits = version is not None and _within(version, requirement.specifier)
    install = f'pip install "{name}{needed}"' if version or extra is None else f'pip install "mobilekit[{extra}]"'
    return PackageState(
        name=name,
        extra=extra,
        version=version,
        needed=needed,
        state="ok" if fits else "outside" if version else "missing",
        remedy="" if fits else install,
    )


def _within(version: str, specifier: SpecifierSet) -> bool:
    """Builds of a version ("2.13.0+cpu") and candidates of it count as the version."""
    return specifier.contains(version, prereleases=True)


# ---------------------------------------------------------------- abilities


def _formats(here: DeviceInfo | None) -> Iterator[Ability]:
    for name in registry.names("runtimes"):
        runtime = registry.runtime(name)
        reason = runtime.unavailable() or ""
        yield Ability(what=f"write {name} files", state="missing" if reason else "ready", remedy=reason)
        yield Ability(what=f"run {name} files", state="missing" if reason else HOW[runtime.execution], remedy=reason)
        if here is not None and name not in here.versions:
            yield Ability(what=f"measure {name} files", state="not on this machine", remedy=reason or ELSEWHERE)


def _measuring(
    kinds: dict[str, type[Device]], seen: dict[str, list[str]], here: DeviceInfo | None
) -> Iterator[Ability]:
    for kind, found in kinds.items():
        reason = found.unavailable() or ""
        if reason:
            state = "missing"
        elif kind == "host" and here is not None:
            versions = ", ".join(f"{runtime} {version}" for runtime, version in sorted(here.versions.items()))
            state = f"{here.soc}, {here.cores} cores; {versions or 'no runtime'}"
            reason = "" if versions else "pip install mobilekit"
        else:
            none = f"ready; none is seen: name one with --device {kind}:..."
            state = f"ready; there now: {', '.join(seen[kind])}" if seen[kind] else none
        yield Ability(what=f"measure on {kind}", state=one_line(state, 300), remedy=reason)


def _keys(kinds: dict[str, type[Device]]) -> Iterator[Ability]:
    """Without the client's tools a board's key cannot be looked at and accepted."""
    if "ssh" in kinds:
        missing = [name for name in ("ssh-keygen", "ssh-keyscan") if shutil.which(name) is None]
        remedy = f"{missing[0]} is not installed: sudo apt install openssh-client" if missing else ""
        yield Ability(what="make and accept ssh keys", state="missing" if missing else "ready", remedy=remedy)


# ---------------------------------------------------------------- devices


def _state(spec: str) -> DeviceState:
    try:
        info = registry.device(spec).info()
    except (MobilekitError, OSError) as error:
        said = one_line(str(error) if isinstance(error, MobilekitError) else first_line(error), 380)
        return DeviceState(device=spec, info=None, problem=said or type(error).__name__, advice=())
    return DeviceState(device=spec, info=info, problem="", advice=tuple(advice(info)))
