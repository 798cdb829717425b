"""How warm a device is and whether it slows itself down for it, read from what `_facts.COLLECT` printed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from mobilekit.devices._cores import Cpu
from mobilekit.errors import one_line

MOST_ZONES = 128
COLDEST_C, HOTTEST_C = -40.0, 150.0
"""What is read outside of this is no temperature of a device that works."""
ANDROID_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
"""PowerManager.THERMAL_STATUS_*, by number."""
NO_TEMPERATURES = {"-1", "6", "7", "8"}
"""Types of android.hardware.thermal that are voltages, currents and shares, or unknown."""
RASPBERRY = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
"""Bits of `get_throttled`; 16 places higher: since it was started. Source: Raspberry Pi's page on vcgencmd."""
SLOWS_DOWN = re.compile(r"(?i)cpu|processor|devfreq|gpu")
"""Cooling devices that cool by slowing down; fans and screens are others."""
HELD = 0.98
"""A CPU that may use less than this share of its highest frequency is held down."""


def plausible(text: str, least: float, most: float) -> float | None:
    """A plain decimal number within bounds, or None."""
    if not re.fullmatch(r"[+-]?\d{1,15}(?:\.\d{1,9})?", text, re.ASCII):
        return None
    value = float(text)
    return value if least <= value <= most else None


# ---------------------------------------------------------------- temperatures


def temperatures(sections: Mapping[str, str]) -> dict[str, float]:
    """Zone -> degrees Celsius, of Android's thermal service where it tells, else of the kernel's zones."""
    found: dict[str, float] = {}
    for name, value in _android_zones(sections) or list(_kernel_zones(sections)):
        if len(found) < MOST_ZONES:
            found[_fresh(name, found)] = round(value, 1)
    return found


def _android_zones(sections: Mapping[str, str]) -> list[tuple[str, float]]:
    """The readings of now; what the service remembers ("Cached temperatures") may be hours old."""
    _, _, body = sections.get("thermalservice", "").partition("Current temperatures from HAL:")
    body = body.partition("Current cooling devices")[0]
    rows = []
    for rest in body.split("Temperature{", MOST_ZONES)[1:]:
        line = rest[:300].partition("}")[0]
        kind, value, name = (re.search(rf"\b{key}=([^,]{{1,60}})", line) for key in ("mType", "mValue", "mName"))
        degrees = plausible(value[1], COLDEST_C, HOTTEST_C) if value else None
        if degrees and name and kind and kind[1] not in NO_TEMPERATURES:  # exactly 0: no sensor is fitted
            rows.append((name[1], degrees))
    return rows


def _kernel_zones(sections: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    zones = _numbered(sections.get("thermal", ""), "thermal_zone")
    for _, zone in sorted(zones.items()):
        degrees = _degrees(zone.get("temp", ""))
        if degrees is not None and "type" in zone:
            yield zone["type"], degrees


def _degrees(text: str) -> float | None:
    """Linux tells thousandths of a degree; drivers of some old phones tell degrees. What is between is dropped."""
    value = plausible(text, -1e9, 1e9)
    if not value:
        return None
    if abs(value) >= 1000:
        value /= 1000
    return value if COLDEST_C <= value <= HOTTEST_C else None


def _numbered(body: str, what: str) -> dict[int, dict[str, str]]:
    """Values by key of /sys/class/thermal/WHATn/KEY, by number."""
    found: dict[int, dict[str, str]] = {}
    pattern = rf"^/sys/class/thermal/{what}(\d{{1,4}})/(\w+):(.{{1,80}})$"
    for number, key, value in re.findall(pattern, body, re.MULTILINE):
        found.setdefault(int(number), {})[key] = value.strip()
    return found


def _fresh(name: str, taken: Mapping[str, float]) -> str:
    """The name, with a number where there are several of it."""
    plain = one_line(name, 60) or "zone"
    numbered = (plain if n == 1 else f"{plain} {n}" for n in range(1, len(taken) + 2))
    return next(candidate for candidate in numbered if candidate not in taken)


# ---------------------------------------------------------------- throttling


def throttling(sections: Mapping[str, str], cpus: Sequence[Cpu]) -> str | None:
    """Whether frequencies are held down, in words: None where nothing tells, "none" first where all say no."""
    told = [*_android_status(sections), *_raspberry(sections), *_cooling(sections), *_held(cpus)]
    now = [words for words in told if not words.startswith("none")]
    if now:
        return one_line("; ".join(now), 200)
    return max(told, key=len) if told else None


def _android_status(sections: Mapping[str, str]) -> Iterator[str]:
    status = re.search(r"Thermal Status:\s{0,8}(\d{1,2})\b", sections.get("thermalservice", ""), re.ASCII)
    if status and int(status[1]) < len(ANDROID_STATUS):
        number = int(status[1])
        yield f"thermal status {ANDROID_STATUS[number]}" if number else "none"


def _raspberry(sections: Mapping[str, str]) -> Iterator[str]:
    said = sections.get("raspberry", "").strip()[:40].removeprefix("throttled=").removeprefix("0x")
    if not re.fullmatch(r"[0-9a-fA-F]{1,8}", said):
        return
    bits = int(said, 16)
    now = [words for bit, words in RASPBERRY.items() if bits >> bit & 1]
    before = [words for bit, words in RASPBERRY.items() if bits >> (bit + 16) & 1]
    if now:
        yield ", ".join(now)
    else:
        yield "none now; since it was started: " + ", ".join(before) if before else "none"


def _cooling(sections: Mapping[str, str]) -> Iterator[str]:
    for _, device in sorted(_numbered(sections.get("cooling", ""), "cooling_device").items()):
        state = plausible(device.get("cur_state", ""), -1, 1e6)
        name = one_line(device.get("type", ""), 40)
        if state is None or not SLOWS_DOWN.search(name) or "fan" in name.lower():
            continue
        most = plausible(device.get("max_state", ""), 1, 1e6)
        of = f" of {most:.0f}" if most else ""
        yield f"{name} cools at step {state:.0f}{of}" if state > 0 else "none"


def _held(cpus: Sequence[Cpu]) -> Iterator[str]:
    """CPUs whose highest frequency is not allowed, by a limit on heat or by somebody's order."""
    groups: dict[tuple[float, float], list[int]] = {}
    for cpu in cpus:
        if cpu.limit_mhz and cpu.max_mhz:
            groups.setdefault((cpu.limit_mhz, cpu.max_mhz), []).append(cpu.index)
    for (limit, most), indices in sorted(groups.items()):
        if limit < HELD * most:
            named = ", ".join(map(str, sorted(indices)[:16]))
            yield f"CPU {named} held at {limit:.0f} of {most:.0f} MHz"
        else:
            yield "none"
