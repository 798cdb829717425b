"""The machine that mobilekit runs on, as a device: models are timed in a separate process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from mobilekit.devices import _facts, _process, _session
from mobilekit.errors import BadInputError
from mobilekit.types import BenchRequest, BenchResult, DeviceInfo, DeviceSettings

FACTS_SECONDS = 15.0
"""The script that asks what this machine is takes some 30 ms."""


class Host:
    """Times models on this machine, one pinned CPU for each thread asked for.

    >>> Host().name
    'host'
    """

    name = "host"
    takes: tuple[str, ...] = ()

    def __init__(self, address: str = "", settings: DeviceSettings | None = None) -> None:
        if address:
            raise BadInputError(f"the device 'host' takes no address, but got '{address}': write just 'host'")

    @classmethod
    def visible(cls) -> list[str]:
        """This machine."""
        return [cls.name]

    @classmethod
    def unavailable(cls) -> str | None:
        """None: nothing is needed."""
        return None

    def info(self) -> DeviceInfo:
        """What this machine is."""
        found = _facts.parse(_collected(), self.name, "host", "host", _versions())
        # where there is no /proc, and in containers whose /proc tells of fewer or more CPUs
        platform_says = {
            "cores": os.cpu_count() or found.cores,
            "memory_mb": found.memory_mb or _memory_mb(),
            "architecture": found.architecture or platform.machine() or None,
        }
        if not found.clusters:
            platform_says |= {"soc": platform.processor() or platform.machine() or "unknown"}
            platform_says |= {"os": platform.platform()}
        return found.model_copy(update=platform_says)

    def run(self, request: BenchRequest) -> BenchResult:
        """Time the request's models in a process of its own, as `_session.run` says; of a process that is killed at
        most two seconds are lost."""
        return _session.run(request, _session.Identity(self.name, "host"), _start)


def _start(request: BenchRequest, timeout: float) -> _session.Reply:
    return _process.start(request, timeout, [sys.executable])


# ---------------------------------------------------------------- the machine


def _collected() -> str:
    """What the collecting script prints here; empty where it cannot run."""
    if not Path("/proc/cpuinfo").exists():
        return ""
    try:
        command = ["sh", "-c", _facts.COLLECT]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=FACTS_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def _memory_mb() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**6
    except (AttributeError, ValueError, OSError):
        return None


def _versions() -> dict[str, str]:
    versions = {}
    for runtime, packages in _session.PACKAGES.items():
        for package in reversed(packages):
            try:
                versions[runtime] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
    return versions
