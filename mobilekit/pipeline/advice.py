"""What would disturb a measurement on a device now, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

from mobilekit.types import Ability, DeviceInfo

LOW_PERCENT = 20.0
"""Below this many phones save power by themselves."""
WARM_BATTERY_C = 40.0
"""Phones slow down and stop charging from about here on, to spare the battery."""
HOT_C = 75.0
"""Raspberry Pis begin to slow down at 80, most phones' chips between 80 and 95 degrees."""
LITTLE_FREE = 0.15
"""Of all memory; with less, the system begins to swap."""
GOVERNOR = "echo performance | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor"
NOT_ROOTED = "nothing, unless the phone is rooted: the warm-up lasts until its times are stable"
COOL_PHONE = "let it cool down, out of its case and with the screen off, then ask again"
COOL_BOARD = "let it cool down, give it a fan or a stronger power supply, then ask again"


def advice(info: DeviceInfo) -> Iterator[Ability]:
    """Rows of what, state and remedy; none where the device says nothing that would disturb."""
    yield from _governors(info)
    if info.throttled:
        remedy = COOL_PHONE if _phone(info) else COOL_BOARD
        yield Ability(what="throttling", state=info.throttling or "", remedy=remedy)
    hottest = max(info.temperatures_c.items(), key=lambda zone: zone[1], default=None)
    if hottest is not None and hottest[1] >= HOT_C:
        state = f"{hottest[0]}: {hottest[1]:.1f} °C"
        yield Ability(what="heat", state=state, remedy="let it cool down before measuring")
    yield from _battery(info)
    yield from _memory(info)


def _phone(info: DeviceInfo) -> bool:
    return info.os.startswith("Android")


def _governors(info: DeviceInfo) -> Iterator[Ability]:
    changing = {c.governor for c in info.clusters if c.governor is not None and c.governor != "performance"}
    if not changing:
        return
    phone = info.os.startswith("Android")
    remedy = (
        "a phone that is not rooted cannot change it: warm-up runs until the times are stable" if phone else GOVERNOR
    )
    yield Ability(what="frequency governor", state=", ".join(sorted(changing)), remedy=remedy)


def _battery(info: DeviceInfo) -> Iterator[Ability]:
    battery = info.battery
    if battery is None:
        return
    if battery.percent is not None and battery.percent < LOW_PERCENT:
        yield Ability(what="battery", state=f"{battery.percent:.0f} %", remedy="charge it to 50 % or more first")
    if battery.charging:
        remedy = "charging warms it: wait until it is full, or connect it without a cable"
        yield Ability(what="battery", state="charging", remedy=remedy)
    if battery.temperature_c is not None and battery.temperature_c >= WARM_BATTERY_C:
        state = f"{battery.temperature_c:.1f} °C"
        yield Ability(what="battery", state=state, remedy="let it cool down before measuring")


def _memory(info: DeviceInfo) -> Iterator[Ability]:
    free, total = info.free_memory_mb, info.memory_mb
    if free is None or not total or free >= LITTLE_FREE * total:
        return
    swapped = f", {info.swap_used_mb} MB swapped out" if info.swap_used_mb else ""
    remedy = "end other programs: a model that is swapped out is timed with the storage"
    yield Ability(what="memory", state=f"{free} of {total} MB free{swapped}", remedy=remedy)
