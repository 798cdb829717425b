"""What a device with Linux or Android is: one script that asks it, and one reader of what the script prints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mobilekit.devices import _thermal
from mobilekit.devices._cores import Cpu, clusters
from mobilekit.devices._thermal import plausible
from mobilekit.errors import one_line
from mobilekit.types import Battery, DeviceInfo, Origin

COLLECT = r"""
LC_ALL=C
PATH="$PATH:/usr/bin:/bin:/usr/sbin:/sbin:/system/bin:/opt/vc/bin"
export LC_ALL PATH
section() { printf '\n@@%s\n' "$1"; }
each() { grep -s '[^ ]' "$@" /dev/null 2>/dev/null </dev/null; }
limited() {
    command -v "$1" >/dev/null 2>&1 || return 0
    if command -v timeout >/dev/null 2>&1; then timeout 3 "$@"; else "$@"; fi 2>/dev/null </dev/null
}
section uname
uname -s
uname -r
uname -m
section cpuinfo
cat /proc/cpuinfo 2>/dev/null </dev/null
section meminfo
cat /proc/meminfo 2>/dev/null </dev/null
section cpus
for name in cpuinfo_min_freq cpuinfo_max_freq scaling_max_freq scaling_cur_freq scaling_governor; do
    each /sys/devices/system/cpu/cpu[0-9]*/cpufreq/$name
done
each /sys/devices/system/cpu/cpu[0-9]*/cpu_capacity
section thermal
each /sys/class/thermal/thermal_zone*/type
each /sys/class/thermal/thermal_zone*/temp
section cooling
for name in type cur_state max_state; do
    each /sys/class/thermal/cooling_device*/$name
done
section power
for name in type scope capacity status temp; do
    each /sys/class/power_supply/*/$name
done
section os
cat /etc/os-release 2>/dev/null </dev/null
section model
{ tr '\000' '\n' </proc/device-tree/model; } 2>/dev/null
section compatible
{ tr '\000' '\n' </proc/device-tree/compatible; } 2>/dev/null
section raspberry
cat /sys/devices/platform/soc/soc:firmware/get_throttled 2>/dev/null </dev/null || limited vcgencmd get_throttled
if command -v getprop >/dev/null 2>&1; then
    section properties
    for name in ro.soc.manufacturer ro.soc.model ro.product.manufacturer ro.product.model ro.hardware \
        ro.hardware.chipname ro.board.platform ro.build.version.release ro.build.version.sdk; do
        printf '%s=%s\n' $name "$(limited getprop $name)"
    done
    section battery
    limited dumpsys battery
    section thermalservice
    limited dumpsys thermalservice
fi
section end
"""
"""Asks a device what it is. Pass it to `sh -c` as one argument, or to `sh -s` on standard input.

A fixed text for dash, busybox, toybox and mksh; what is not there is skipped. It needs no rights and ends at once; a
command that hangs is ended after 3 seconds where there is `timeout`.
"""

MOST_CHARACTERS = 2_000_000
"""More is not read: what the script prints of a large server is some 500 kB."""
MOST_CPUS = 4096
MARK = re.compile(r"^@@([a-z]{2,20})[ \r]*$", re.MULTILINE)
FIELD = re.compile(r"([^:=]{1,80})[:=](.{0,400})")
NO_NAMES = re.compile(r"(?i)^(?:arm|aarch64)(?:v\d+)? processor\b|^unknown$|^0$")
"""Values of cpuinfo's "model name" that name no processor."""
SWITCHES = {"2": True, "3": False, "4": False, "5": False, "charging": True, "discharging": False,
            "not charging": False, "full": False}  # fmt: skip
"""A battery's status, in Android's numbers (BatteryManager) and in Linux's words."""


def parse(text: str, name: str, kind: str, origin: Origin, versions: Mapping[str, str]) -> DeviceInfo:
    """What COLLECT printed, as facts; the text is not trusted, and what it does not say is None or empty.

    `versions` are runtime name -> version, found out otherwise. Never raises: of a text that makes no sense, no cores
    are known (1 is said) and the processor is "unknown".
    """
    sections = _sections(text[:MOST_CHARACTERS])
    cpus = _cpus(sections)
    system = _System.of(sections)
    memory = _fields(sections.get("meminfo", ""))
    total, swap, swap_free = (_megabytes(memory.get(key)) for key in ("MemTotal", "SwapTotal", "SwapFree"))
    soc, model = _soc(sections), _model(sections)
    return DeviceInfo(
        name=name,
        kind=kind,
        origin=origin,
        soc=soc or model or system.machine or "unknown",
        cores=max(1, len(cpus)),
        memory_mb=total,
        os=_os(sections, system),
        versions={_word(key): _word(value) for key, value in list(versions.items())[:20]},
        model=model,
        architecture=system.machine,
        free_memory_mb=_megabytes(memory.get("MemAvailable")),
        swap_used_mb=None if swap is None or swap_free is None else max(0, swap - swap_free),
        clusters=clusters(cpus),
        temperatures_c=_thermal.temperatures(sections),
        throttling=_thermal.throttling(sections, cpus),
        battery=_battery(sections),
    )


# ---------------------------------------------------------------- lines


def _sections(text: str) -> dict[str, str]:
    """What stands between the marks; of a section that comes twice, the first."""
    parts = MARK.split(text)
    found: dict[str, str] = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(name, body)
    return found


def _fields(body: str) -> dict[str, str]:
    """`key : value` and `key=value` lines; the first of each key."""
    found: dict[str, str] = {}
    for line in body.splitlines():
        if match := FIELD.match(line):
            found.setdefault(match[1].strip(), match[2].strip().strip('"'))
    return found


def _word(text: str) -> str:
    return one_line(text, 60)


def _lines(body: str | None) -> list[str]:
    return [_word(line) for line in (body or "")[:4000].splitlines() if line.strip()]


def _megabytes(text: str | None) -> int | None:
    """Of "3884364 kB", in MB (10^6 bytes)."""
    value = plausible((text or "").removesuffix("kB").strip(), 0, 1e12)
    return None if value is None else int(value * 1024 // 10**6)


# ---------------------------------------------------------------- processor and system


class _System(NamedTuple):
    """What `uname` says."""

    name: str | None = None
    release: str | None = None
    machine: str | None = None

    @classmethod
    def of(cls, sections: Mapping[str, str]) -> _System:
        return cls(*_lines(sections.get("uname"))[:3])


def _cpus(sections: Mapping[str, str]) -> list[Cpu]:
    found: dict[int, Cpu] = {}

    def at(index: int) -> Cpu | None:
        if index >= MOST_CPUS:
            return None
        return found.setdefault(index, Cpu(index))

    cpu = None
    for line in sections.get("cpuinfo", "").splitlines():
        key, _, value = (part.strip() for part in line[:400].partition(":"))
        if key == "processor":
            index = plausible(value, 0, MOST_CPUS - 1)
            cpu = None if index is None else at(int(index))
        elif cpu is not None and key in ("CPU implementer", "CPU part") and re.fullmatch(r"0x[0-9a-f]{1,4}", value):
            setattr(cpu, key.removeprefix("CPU "), int(value, 16))
    online = bool(found)
    for index, key, value in _of_cpus(sections.get("cpus", "")):
        known = found.get(index) if online else at(index)  # CPUs that are off have no frequency worth telling
        if known is not None:
            _set(known, key, value)
    return list(found.values())


def _of_cpus(body: str) -> Iterator[tuple[int, str, str]]:
    for index, key, value in re.findall(
        r"^/sys/devices/system/cpu/cpu(\d{1,4})/(?:cpufreq/)?(\w+):(.{1,80})$", body, re.M
    ):
        yield int(index), key, value.strip()


MHZ = {
    "cpuinfo_min_freq": "min_mhz",
    "cpuinfo_max_freq": "max_mhz",
    "scaling_max_freq": "limit_mhz",
    "scaling_cur_freq": "now_mhz",
}


def _set(cpu: Cpu, key: str, value: str) -> None:
    if key in MHZ:
        kilohertz = plausible(value, 1000, 1e8)
        setattr(cpu, MHZ[key], None if kilohertz is None else kilohertz / 1000)
    elif key == "cpu_capacity":
        capacity = plausible(value, 1, 1e6)
        cpu.capacity = None if capacity is None else int(capacity)
    elif key == "scaling_governor" and re.fullmatch(r"[A-Za-z0-9_-]{1,30}", value):
        cpu.governor = value


def _soc(sections: Mapping[str, str]) -> str | None:
    """The chip: as Android, an x86 processor, the device tree or the kernel names it."""
    properties, info = _fields(sections.get("properties", "")), _fields(sections.get("cpuinfo", ""))
    maker, chip = properties.get("ro.soc.manufacturer", ""), properties.get("ro.soc.model", "")
    named = info.get("model name", "")
    compatible = _lines(sections.get("compatible"))
    candidates = (
        f"{maker} {chip}" if chip and maker.lower() not in chip.lower() else chip,
        properties.get("ro.hardware.chipname", "") or properties.get("ro.board.platform", ""),
        "" if NO_NAMES.match(named) else named,
        # the last is the chip: "raspberrypi,4-model-b", "brcm,bcm2711"; Hardware is wrong on every Raspberry Pi
        compatible[-1].rpartition(",")[2] if compatible else "",
        info.get("Hardware", ""),
    )
    return next((one_line(text, 120) for text in candidates if text.strip()), None)


def _model(sections: Mapping[str, str]) -> str | None:
    """The product."""
    properties = _fields(sections.get("properties", ""))
    maker, product = properties.get("ro.product.manufacturer", ""), properties.get("ro.product.model", "")
    if product:
        known = product.lower().startswith(maker.lower())
        return one_line(product if known else f"{maker} {product}", 120)
    tree = _lines(sections.get("model"))
    return (tree[0] if tree else one_line(_fields(sections.get("cpuinfo", "")).get("Model", ""), 120)) or None


def _os(sections: Mapping[str, str], system: _System) -> str:
    properties = _fields(sections.get("properties", ""))
    release, interface = properties.get("ro.build.version.release"), properties.get("ro.build.version.sdk")
    pretty = _fields(sections.get("os", "")).get("PRETTY_NAME")
    android = f"Android {release}" + (f" (API {interface})" if interface else "") if release else None
    kernel = " ".join(part for part in (system.name, system.release) if part)
    named = ", ".join(part for part in (android or pretty, kernel) if part)
    return one_line(named, 160) or "unknown"


# ---------------------------------------------------------------- battery


def _battery(sections: Mapping[str, str]) -> Battery | None:
    """As Android's battery service tells it, else as the kernel does."""
    said = _fields(sections.get("battery", ""))
    if said.get("present", "true") == "true" and "level" in said:
        level, scale = plausible(said["level"], 0, 1e6), plausible(said.get("scale", "100"), 1, 1e6)
        percent = None if level is None or scale is None or level > scale else 100 * level / scale
        return _battery_of(percent, said.get("status", ""), said.get("temperature", ""))
    supplies: dict[str, dict[str, str]] = {}
    pattern = r"^/sys/class/power_supply/([^/\n]{1,80})/(\w+):(.{1,80})$"
    for name, key, value in re.findall(pattern, sections.get("power", ""), re.MULTILINE):
        supplies.setdefault(name, {})[key] = value.strip()
    for supply in supplies.values():
        if supply.get("type") == "Battery" and supply.get("scope") != "Device":  # else of a mouse or a pen
            percent = plausible(supply.get("capacity", ""), 0, 100)
            return _battery_of(percent, supply.get("status", ""), supply.get("temp", ""))
    return None


def _battery_of(percent: float | None, status: str, tenths: str) -> Battery:
    """`tenths` of a degree Celsius is the unit of both."""
    temperature = plausible(tenths, -400, 1500)
    return Battery(
        percent=percent,
        charging=SWITCHES.get(status.lower()),
        temperature_c=None if temperature is None else temperature / 10,
    )
