"""CPUs of one kind: grouped from what the kernel says of each, and named by their makers' part numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mobilekit.types import Cluster

SAME_SPEED = 0.95
"""CPUs of one kind whose highest frequencies are so near to each other are one cluster: makers of x86 processors rank
every core with a frequency of its own."""

ARM, BROADCOM, HISILICON, NVIDIA, QUALCOMM, SAMSUNG, APPLE, AMPERE = (
    0x41, 0x42, 0x48, 0x4E, 0x51, 0x53, 0x61, 0xC0,
)  # fmt: skip
NAMES: dict[tuple[int, int], str] = {
    **{
        (ARM, part): name
        for part, name in {
            0xB76: "ARM1176", 0xC05: "Cortex-A5", 0xC07: "Cortex-A7", 0xC08: "Cortex-A8", 0xC09: "Cortex-A9",
            0xC0D: "Cortex-A17", 0xC0E: "Cortex-A17", 0xC0F: "Cortex-A15", 0xD01: "Cortex-A32", 0xD02: "Cortex-A34",
            0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD06: "Cortex-A65", 0xD07: "Cortex-A57",
            0xD08: "Cortex-A72", 0xD09: "Cortex-A73", 0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1",
            0xD0D: "Cortex-A77", 0xD0E: "Cortex-A76AE", 0xD40: "Neoverse-V1", 0xD41: "Cortex-A78",
            0xD42: "Cortex-A78AE", 0xD43: "Cortex-A65AE", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510",
            0xD47: "Cortex-A710", 0xD48: "Cortex-X2", 0xD49: "Neoverse-N2", 0xD4A: "Neoverse-E1",
            0xD4B: "Cortex-A78C", 0xD4C: "Cortex-X1C", 0xD4D: "Cortex-A715", 0xD4E: "Cortex-X3",
            0xD4F: "Neoverse-V2", 0xD80: "Cortex-A520", 0xD81: "Cortex-A720", 0xD82: "Cortex-X4",
            0xD83: "Neoverse-V3AE", 0xD84: "Neoverse-V3", 0xD85: "Cortex-X925", 0xD87: "Cortex-A725",
            0xD89: "Cortex-A720AE", 0xD8C: "C1-Ultra", 0xD8E: "Neoverse-N3", 0xD90: "C1-Premium",
        }.items()
    },
    (BROADCOM, 0x100): "Brahma-B53",
    (HISILICON, 0xD01): "Kunpeng 920",
    (HISILICON, 0xD40): "Cortex-A76",
    (NVIDIA, 0x000): "Denver",
    (NVIDIA, 0x003): "Denver 2",
    (NVIDIA, 0x004): "Carmel",
    (QUALCOMM, 0x001): "Oryon",
    (QUALCOMM, 0x201): "Kryo",
    (QUALCOMM, 0x205): "Kryo",
    (QUALCOMM, 0x211): "Kryo",
    (QUALCOMM, 0x800): "Kryo 2xx Gold",
    (QUALCOMM, 0x801): "Kryo 2xx Silver",
    (QUALCOMM, 0x802): "Kryo 3xx Gold",
    (QUALCOMM, 0x803): "Kryo 3xx Silver",
    (QUALCOMM, 0x804): "Kryo 4xx Gold",
    (QUALCOMM, 0x805): "Kryo 4xx Silver",
    (SAMSUNG, 0x001): "Exynos M1",
    (SAMSUNG, 0x002): "Exynos M3",
    (SAMSUNG, 0x003): "Exynos M4",
    (SAMSUNG, 0x004): "Exynos M5",
    (APPLE, 0x022): "Icestorm",
    (APPLE, 0x023): "Firestorm",
    (APPLE, 0x024): "Icestorm",
    (APPLE, 0x025): "Firestorm",
    (APPLE, 0x028): "Icestorm",
    (APPLE, 0x029): "Firestorm",
    (APPLE, 0x032): "Blizzard",
    (APPLE, 0x033): "Avalanche",
    (AMPERE, 0xAC3): "Ampere-1",
    (AMPERE, 0xAC4): "Ampere-1A",
}  # fmt: skip
"""(implementer, part) of the main identification register -> name. Facts from Linux, arch/arm64/include/asm/cputype.h,
and from the tables of util-linux's lscpu."""


@dataclass
class Cpu:
    """What the kernel says of one CPU; frequencies in MHz."""

    index: int
    implementer: int | None = None
    part: int | None = None
    capacity: int | None = None
    """Relative speed at the highest frequency, 1024 for the fastest CPU."""
    min_mhz: float | None = None
    max_mhz: float | None = None
    limit_mhz: float | None = None
    """Highest frequency that is allowed now."""
    now_mhz: float | None = None
    governor: str | None = None

    @property
    def kind(self) -> tuple[int, int, int]:
        """Equal for CPUs of one make; those that nothing is known of are alike."""
        return self.implementer or -1, -1 if self.part is None else self.part, self.capacity or -1

    @property
    def speed(self) -> tuple[float, float]:
        """The faster, the larger."""
        return self.capacity or 0, self.max_mhz or 0


def clusters(cpus: Iterable[Cpu]) -> tuple[Cluster, ...]:
    """CPUs of one make and about the same highest frequency, the fastest first."""
    groups: list[list[Cpu]] = []
    for cpu in sorted(cpus, key=lambda cpu: (*cpu.speed, *cpu.kind, -cpu.index), reverse=True):
        group = next((group for group in groups if _alike(group[0], cpu)), None)
        if group is None:
            groups.append([cpu])
        else:
            group.append(cpu)
    return tuple(map(_cluster, groups))


def _alike(first: Cpu, cpu: Cpu) -> bool:
    if first.max_mhz is None or cpu.max_mhz is None:
        return first.kind == cpu.kind and first.max_mhz == cpu.max_mhz
    # capacities follow from frequencies, so that near ones do not part CPUs of the same make
    return first.kind[:2] == cpu.kind[:2] and cpu.max_mhz >= SAME_SPEED * first.max_mhz


def _cluster(group: list[Cpu]) -> Cluster:
    first = group[0]
    named = (first.implementer or 0, -1 if first.part is None else first.part)
    now = [cpu.now_mhz for cpu in group if cpu.now_mhz is not None]
    lowest = [cpu.min_mhz for cpu in group if cpu.min_mhz is not None]
    governors = sorted({cpu.governor for cpu in group if cpu.governor})
    return Cluster(
        cpus=tuple(sorted(cpu.index for cpu in group)),
        core=NAMES.get(named),
        min_mhz=min(lowest, default=None),
        max_mhz=first.max_mhz,
        now_mhz=max(now, default=None),
        governor=", ".join(governors) or None,
    )
