"""What `mobilekit doctor` found: versions, abilities, and the devices that are there."""

from __future__ import annotations

from typing import Literal

from mobilekit.types.device import DeviceInfo
from mobilekit.types.values import Value


class Ability(Value):
    """Something that can be done, or not, and what helps."""

    what: str
    state: str
    remedy: str
    """Empty where nothing needs to be done; else the command that installs what is missing, or what to do."""


class PackageState(Value):
    """A package that mobilekit needs, as its own metadata say, and the version that is here."""

    name: str
    extra: str | None
    """The extra that needs it; None: mobilekit itself."""
    version: str | None
    needed: str
    """Versions that this mobilekit asks for (">=1.23"); empty: any."""
    state: Literal["ok", "missing", "outside"]
    remedy: str


class Machine(Value):
    """The machine and the programs that the job runs with."""

    mobilekit: str
    python: str
    system: str
    packages: tuple[PackageState, ...]


class DeviceState(Value):
    """A device that was asked: what it is, or why it did not say."""

    device: str
    info: DeviceInfo | None
    problem: str
    advice: tuple[Ability, ...]
    """What would disturb a measurement there now."""


class Health(Value):
    """All of it."""

    machine: Machine
    abilities: tuple[Ability, ...]
    devices: tuple[DeviceState, ...]
