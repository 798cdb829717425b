"""Finds plugins by file name: `transforms/low_rank.py` holds `class LowRank`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, cast

from mobilekit.errors import BadInputError, one_line
from mobilekit.interfaces import Device, ReportWriter, Runtime, Transform
from mobilekit.types import DeviceSettings


def names(room: str) -> list[str]:
    """Plugin names of a room ("transforms", "runtimes", "reports", "devices"), sorted.

    Files whose name begins with an underscore are the room's own and no plugins.
    """
    package = importlib.import_module(f"mobilekit.{room}")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def _load(room: str, name: str) -> Any:
    known = names(room)
    if name not in known:
        raise BadInputError(f"unknown {room[:-1]} '{name}': choose one of {', '.join(known)}")
    module = importlib.import_module(f"mobilekit.{room}.{name}")
    return getattr(module, "".join(part.capitalize() for part in name.split("_")))


def transform(name: str) -> Transform:
    """The lever of this name.

    >>> transform("channel_pruning").name
    'channel_pruning'
    """
    return cast(Transform, _load("transforms", name)())


def runtime(name: str) -> Runtime:
    """The runtime of this name.

    >>> runtime("onnx").suffix
    '.onnx'
    """
    return cast(Runtime, _load("runtimes", name)())


def report_writer(name: str) -> ReportWriter:
    """The report writer of this name."""
    return cast(ReportWriter, _load("reports", name)())


def device_kinds() -> dict[str, type[Device]]:
    """The class of every kind of device, by what it is called in a specification.

    >>> device_kinds()["host"].visible()
    ['host']
    """
    return {name.replace("_", "-"): cast("type[Device]", _load("devices", name)) for name in names("devices")}


def device(spec: str, settings: DeviceSettings | None = None) -> Device:
    """The device of a specification: its kind, then what that kind needs after a colon (`host`, `ssh:pi@board`).

    Dashes in a kind are underscores in its file's name. Raises BadInputError for an unknown kind, a wrong address and
    settings that this kind has no use for.
    """
    kind, _, address = spec.partition(":")
    known = [name.replace("_", "-") for name in names("devices")]
    if kind not in known:
        raise BadInputError(f"unknown device '{one_line(kind, 60)}': choose one of {', '.join(known)}")
    made = cast(Device, _load("devices", kind.replace("-", "_"))(address, settings or DeviceSettings()))
    unused = sorted(name for name, _ in _given(settings) if name not in made.takes)
    if unused:
        raise BadInputError(f"the device '{kind}' has no use for --{unused[0]}: leave it out")
    return made


def devices(specs: Sequence[str], settings: DeviceSettings | None = None) -> list[Device]:
    """The devices of these specifications, each with those of the settings that it has a use for.

    Raises BadInputError as `device` does, for one that is named twice, and for settings that none of them uses.
    """
    twice = next((spec for spec in specs if specs.count(spec) > 1), None)
    if twice is not None:
        raise BadInputError(f"the device '{twice}' is named twice")
    given = dict(_given(settings))
    found = []
    for spec in specs:
        takes = device(spec).takes
        found.append(device(spec, DeviceSettings(**{name: text for name, text in given.items() if name in takes})))
    unused = sorted(set(given) - {name for one in found for name in one.takes})
    if unused and found:
        raise BadInputError(f"none of the devices has a use for --{unused[0]}: leave it out")
    return found


def _given(settings: DeviceSettings | None) -> list[tuple[str, str]]:
    return [(name, text) for name, text in (settings or DeviceSettings()) if text is not None]
