"""What a Linux system says of the machine: its CPUs, heat, memory and energy; stands alone beside `_runner.py`.

Whatever the system does not say is None, on every other system all of it. `root` is the folder of /proc and /sys.
"""

# The rules below want Python 3.11; boards have 3.9.
# ruff: noqa: B905, UP045

from __future__ import annotations

import contextlib
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

ROOT = Path("/")
ALIKE = 0.9
"""A CPU with at least this share of the speed of a cluster's fastest belongs to it: single cores of a cluster may turn
a little faster than the others."""
COOLED_BY_SLOWING = ("thermal-cpufreq", "cpufreq", "cpu", "processor")
"""How the types of cooling devices begin that hold frequencies down; others are fans."""
HELD_DOWN_NOW = 0xF
"""Bits of the Raspberry Pi's word: under-voltage, frequency capped, throttled, soft temperature limit."""
COOLING_STEP = 1.0
"""Seconds between two looks at the temperature."""
CONTAINERS = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of a container's memory, in both versions of control groups."""
BATTERY_STEP = 0.5
"""Seconds between two looks at a battery's power."""

COUNTED_RUNS = 2
"""Whose instructions are counted, the fewer of which count: anything else in the process only adds some."""

Word = Optional[str]


def text(path: Path) -> str | None:
    """A file's words, or None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return None


def integer(path: Path) -> int | None:
    """A file's whole number, or None."""
    try:
        return int(text(path) or "")
    except ValueError:
        return None


# ---------------------------------------------------------------- CPUs


def busy_ticks(root: Path) -> dict[int, int]:
    """Clock ticks that each CPU has worked since boot."""
    ticks = {}
    for line in (root / "proc/stat").read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, _idle, _iowait, *rest = (int(value) for value in fields[:8])
            ticks[int(name[3:])] = user + nice + system + sum(rest)
    return ticks


def clusters(cpus: list[int], root: Path = ROOT) -> list[list[int]]:
    """CPUs of one speed together, the fastest first: by what the system calls their capacity (Arm), else by their
    highest frequency. One cluster where it says neither."""
    folder = root / "sys/devices/system/cpu"
    speeds: dict[int, int] = {}
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        said = {cpu: integer(folder / f"cpu{cpu}" / name) for cpu in cpus}
        speeds = {cpu: value for cpu, value in said.items() if value}
        if len(speeds) == len(cpus):
            break
    else:
        return [list(cpus)]
    found: list[list[int]] = []
    for cpu in sorted(cpus, key=lambda cpu: -speeds[cpu]):
        if not found or speeds[cpu] < ALIKE * speeds[found[-1][0]]:
            found.append([])
        found[-1].append(cpu)
    return found


def of_cluster(cores: str, threads: int, cpus: list[int], root: Path = ROOT) -> list[int]:
    """Those of the CPUs that are meant by "big", "little" or "any".

    Little ones are the slowest cluster. Big ones are the fastest, and the next where it has fewer CPUs than threads
    (many phones have one CPU that is faster than the other big ones), but never the slowest.
    """
    found = clusters(cpus, root)
    if cores == "any" or len(found) < 2:
        return list(cpus)
    if cores == "little":
        return found[-1]
    chosen = list(found[0])
    for cluster in found[1:-1]:
        if len(chosen) < threads:
            chosen += cluster
    return chosen


def pin(threads: int, cores: str = "any", root: Path = ROOT) -> list[int]:
    """Bind this process to the `threads` least busy CPUs of these cores that it may use; empty where the system has no
    such call."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    allowed = of_cluster(cores, threads, sorted(os.sched_getaffinity(0)), root)
    try:
        before = busy_ticks(root)
        time.sleep(0.05)
        after = busy_ticks(root)
        allowed.sort(key=lambda cpu: after[cpu] - before[cpu])
    except (OSError, ValueError, KeyError):
        pass
    chosen = allowed[:threads]
    try:
        os.sched_setaffinity(0, chosen)
    except OSError:
        return []
    return chosen


# ---------------------------------------------------------------- heat


def temperature_c(root: Path = ROOT) -> float | None:
    """The hottest readable thermal zone in degrees Celsius."""
    readings = [integer(zone) for zone in (root / "sys/class/thermal").glob("thermal_zone*/temp")]
    return max((value / 1000 for value in readings if value is not None and 0 < value < 150_000), default=None)


def cool_down(limit_c: float | None, seconds: float, root: Path = ROOT) -> float:
    """Wait until no zone is hotter than the limit, at most so long; returns the seconds that it took.

    It does not wait where no zone can be read: `temperature_c` says so.
    """
    start, waited = time.monotonic(), 0.0
    while limit_c is not None:
        now = temperature_c(root)
        if now is None or now <= limit_c or waited >= seconds:
            break
        time.sleep(min(COOLING_STEP, seconds - waited))
        waited = time.monotonic() - start
    return waited


class Throttling:
    """Whether the system has held its frequencies down since this was made, as far as it says."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.counted = self._count()
        self.seen: bool | None = None
        self.look()

    def look(self) -> None:
        """Take notice of what it says now."""
        said = [held for held in (self._firmware()[0], self._cooling()[0], self._counter()) if held is not None]
        if said:
            self.seen = bool(self.seen) or any(said)

    def words(self) -> Word:
        """What it says now, in its own words."""
        return self._firmware()[1] or self._cooling()[1]

    def _firmware(self) -> tuple[bool | None, Word]:
        """A Raspberry Pi's word (its bits from 16 on are those since it was started)."""
        said = text(self.root / "sys/devices/platform/soc/soc:firmware/get_throttled")
        try:
            bits = int(said or "", 16)
        except ValueError:
            return None, None
        return bool(bits & HELD_DOWN_NOW), f"throttled={bits:#x}"

    def _cooling(self) -> tuple[bool | None, Word]:
        """States of the kernel's devices that cool by slowing down."""
        states = []
        for device in sorted((self.root / "sys/class/thermal").glob("cooling_device*")):
            kind, state, most = (
                text(device / "type") or "",
                integer(device / "cur_state"),
                integer(device / "max_state"),
            )
            if kind.lower().startswith(COOLED_BY_SLOWING) and state is not None and state >= 0:
                states.append((state, f"{kind} {state} of {most if most is not None else '?'}"))
        if not states:
            return None, None
        return any(state for state, _ in states), max(states)[1][:200]

    def _count(self) -> int | None:
        """How often an x86 processor has throttled itself."""
        counters = (self.root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count")
        counts = [count for count in map(integer, counters) if count is not None]
        return sum(counts) if counts else None

    def _counter(self) -> bool | None:
        now = self._count()
        return None if now is None or self.counted is None else now > self.counted


# ---------------------------------------------------------------- memory


def peak_memory_mb(reset: bool = False, root: Path = ROOT) -> float | None:
    """Largest resident memory of this process so far in MB (10^6 bytes).

    Linux: VmHWM, which starts anew with the program; ru_maxrss still holds the size of the parent that forked us.
    """
    if reset:
        with contextlib.suppress(OSError):
            (root / "proc/self/clear_refs").write_text("5", encoding="ascii")
    for line in (text(root / "proc/self/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest * (1 if sys.platform == "darwin" else 1024) / 1e6


def free_memory(root: Path = ROOT) -> int | None:
    """Bytes that this process can take before the system, or its container, runs out."""
    found = []
    for line in (text(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    for limit, used in CONTAINERS:
        most, now = integer(root / limit), integer(root / used)  # no number: the limit is "max"
        if most is not None and now is not None:
            found.append(most - now)
    return max(0, min(found)) if found else None


# ---------------------------------------------------------------- energy


class Rapl:
    """The energy counters of an x86 processor's packages (running average power limit)."""

    seconds = 2.0
    """For how long to measure: the counters change every millisecond."""

    def __init__(self, zones: list[Path]) -> None:
        self.zones = zones
        self.before: list[int | None] = []

    def start(self) -> None:
        """Begin to count."""
        self.before = self._read()

    def look(self) -> None:
        """Nothing to do between two runs."""

    def spent_mj(self) -> float | None:
        """Millijoules since `start`."""
        spent = 0.0
        for zone, before, after in zip(self.zones, self.before, self._read()):
            if before is None or after is None:
                return None
            most = integer(zone / "max_energy_range_uj") or 0
            spent += (after - before if after >= before else after + most - before) / 1e3
        return spent if spent > 0 else None

    def _read(self) -> list[int | None]:
        return [integer(zone / "energy_uj") for zone in self.zones]


class Battery:
    """The power that a discharging battery gives: with a charger plugged in it says nothing of the load."""

    seconds = 6.0
    """For how long to measure: fuel gauges renew their figures about once a second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begin = self.looked = 0.0
        self.watts: list[float | None] = []

    def start(self) -> None:
        """Begin to count."""
        self.begin, self.watts = time.monotonic(), []
        self.looked = float("-inf")
        self.look()

    def look(self) -> None:
        """Read the power now, if the last reading is some time ago."""
        if time.monotonic() - self.looked >= BATTERY_STEP:
            self.looked = time.monotonic()
            self.watts.append(self._watts())

    def spent_mj(self) -> float | None:
        """Millijoules since `start`: mean power times time; None where it was charged or gave no figure."""
        known = [watts for watts in self.watts if watts]
        if not known or len(known) < len(self.watts):
            return None
        return 1e3 * sum(known) / len(known) * (time.monotonic() - self.begin)

    def _watts(self) -> float | None:
        if text(self.folder / "status") != "Discharging":
            return None
        power = integer(self.folder / "power_now")
        if power is not None:
            return abs(power) / 1e6
        current, voltage = integer(self.folder / "current_now"), integer(self.folder / "voltage_now")
        return None if current is None or voltage is None else abs(current * voltage) / 1e12


def meter(root: Path = ROOT) -> Rapl | Battery | None:
    """What tells energy here: the processor's own counters, else a battery that runs down."""
    packages = [
        zone
        for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
        if (text(zone / "name") or "").startswith("package") and integer(zone / "energy_uj") is not None
    ]
    if packages:
        return Rapl(packages)
    for folder in sorted((root / "sys/class/power_supply").glob("*")):
        if text(folder / "type") == "Battery":
            battery = Battery(folder)
            battery.start()
            if battery.spent_mj() is not None:
                return battery
    return None


# ---------------------------------------------------------------- instructions


class Instructions:
    """Counts instructions where an emulator writes how many it has carried out into a file: numbers of 64 bits, one
    for each of its threads."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_RDONLY)

    def of(self, run: Callable[[], object]) -> int:
        """Instructions of one run, without those of calling it."""
        with_nothing = min(self._between(lambda: None) for _ in range(COUNTED_RUNS))
        return max(0, min(self._between(run) for _ in range(COUNTED_RUNS)) - with_nothing)

    def _between(self, run: Callable[[], object]) -> int:
        before = self._read()
        run()
        return self._read() - before

    def _read(self) -> int:
        data = os.pread(self.file, 1 << 16, 0)
        return sum(struct.unpack(f"<{len(data) // 8}Q", data))


def instructions() -> Instructions | None:
    """What counts instructions here, or None: MOBILEKIT_INSTRUCTIONS names the emulator's file."""
    path = os.environ.get("MOBILEKIT_INSTRUCTIONS")
    return Instructions(path) if path else None
