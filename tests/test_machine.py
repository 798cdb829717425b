"""What the measuring script reads of a machine, on copies of the files that real systems have."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilekit.devices import _session


def script() -> Any:
    spec = importlib.util.spec_from_file_location("machine_under_test", _session.MACHINE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MACHINE = script()


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    return root


# ---------------------------------------------------------------- CPUs

CPUS = "sys/devices/system/cpu/cpu{}/{}"
PIXEL = dict(enumerate([250] * 4 + [620] * 2 + [1024] * 2))
ONE_PRIME = dict(enumerate([300] * 4 + [810] * 3 + [1024]))


def capacities(given: dict[int, int]) -> dict[str, object]:
    return {CPUS.format(cpu, "cpu_capacity"): value for cpu, value in given.items()}


def test_clusters_come_from_capacities(tmp_path: Path) -> None:
    root = tree(tmp_path, capacities(PIXEL))
    assert MACHINE.clusters(list(PIXEL), root) == [[6, 7], [4, 5], [0, 1, 2, 3]]
    assert MACHINE.clusters([0, 6], root) == [[6], [0]]


def test_clusters_come_from_frequencies_where_there_are_no_capacities(tmp_path: Path) -> None:
    mhz = {0: 1_800_000, 1: 1_800_000, 2: 2_350_000, 3: 2_400_000}  # one turns a little faster than its neighbour
    root = tree(tmp_path, {CPUS.format(cpu, "cpufreq/cpuinfo_max_freq"): value for cpu, value in mhz.items()})
    assert MACHINE.clusters([0, 1, 2, 3], root) == [[3, 2], [0, 1]]


def test_a_machine_that_says_nothing_is_one_cluster(tmp_path: Path) -> None:
    assert MACHINE.clusters([0, 1, 2], tmp_path) == [[0, 1, 2]]
    for cores in ("any", "big", "little"):
        assert MACHINE.of_cluster(cores, 1, [0, 1, 2], tmp_path) == [0, 1, 2]


def test_big_and_little_cores(tmp_path: Path) -> None:
    root = tree(tmp_path, capacities(ONE_PRIME))
    cpus = list(ONE_PRIME)
    assert MACHINE.of_cluster("any", 1, cpus, root) == cpus
    assert MACHINE.of_cluster("big", 1, cpus, root) == [7]
    assert MACHINE.of_cluster("big", 2, cpus, root) == [7, 4, 5, 6]
    assert MACHINE.of_cluster("big", 6, cpus, root) == [7, 4, 5, 6]  # never a little one
    assert MACHINE.of_cluster("little", 1, cpus, root) == [0, 1, 2, 3]


@given(st.dictionaries(st.integers(0, 15), st.integers(1, 1024), min_size=1), st.integers(1, 16))
def test_every_cpu_is_in_one_cluster(tmp_path_factory: pytest.TempPathFactory, given: dict[int, int], n: int) -> None:
    root = tree(tmp_path_factory.mktemp("cpus"), capacities(given))
    cpus = sorted(given)
    found = MACHINE.clusters(cpus, root)
    assert sorted(cpu for cluster in found for cpu in cluster) == cpus
    big, little = (MACHINE.of_cluster(cores, n, cpus, root) for cores in ("big", "little"))
    if len(found) > 1:
        assert min(given[cpu] for cpu in big) > max(given[cpu] for cpu in little)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not pin")
def test_it_is_pinned_to_the_cluster(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    root = tree(tmp_path, capacities({cpu: 1024 if cpu == allowed[-1] else 250 for cpu in allowed}))
    try:
        assert MACHINE.pin(1, "big", root) == [allowed[-1]]
        assert os.sched_getaffinity(0) == {allowed[-1]}
    finally:
        os.sched_setaffinity(0, allowed)


# ---------------------------------------------------------------- heat

ZONE = "sys/class/thermal/thermal_zone{}/temp"


def test_the_hottest_zone_counts_and_nonsense_does_not(tmp_path: Path) -> None:
    zones = {0: 41_500, 1: 63_250, 2: -274_000, 3: 900_000, 4: "nonsense"}
    assert MACHINE.temperature_c(tree(tmp_path, {ZONE.format(n): value for n, value in zones.items()})) == 63.25


def test_without_a_zone_nobody_waits(tmp_path: Path) -> None:
    assert MACHINE.temperature_c(tmp_path) is None
    assert MACHINE.cool_down(30.0, 60.0, tmp_path) < 1.0
    hot = tree(tmp_path, {ZONE.format(0): 70_000})
    assert MACHINE.cool_down(None, 60.0, hot) < 1.0
    assert MACHINE.cool_down(70.0, 60.0, hot) < 1.0


def test_it_waits_until_it_is_cool_and_no_longer_than_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = tree(tmp_path, {ZONE.format(0): 70_000})
    monkeypatch.setattr(MACHINE, "COOLING_STEP", 0.1)
    assert 0.3 <= MACHINE.cool_down(50.0, 0.3, hot) < 5.0

    def cooler(seconds: float) -> None:
        waits.append(seconds)
        tree(tmp_path, {ZONE.format(0): 70_000 - 8_000 * len(waits)})

    waits: list[float] = []
    monkeypatch.setattr(MACHINE.time, "sleep", cooler)
    MACHINE.cool_down(50.0, 60.0, hot)
    assert len(waits) == 3


def test_a_clock_that_is_set_changes_no_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = tree(tmp_path, {ZONE.format(0): 70_000})
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0.2 <= MACHINE.cool_down(50.0, 0.2, hot) < 5.0


PI = "sys/devices/platform/soc/soc:firmware/get_throttled"
COOLING = "sys/class/thermal/cooling_device{}/{}"


def cooling(number: int, kind: str, state: int, most: int) -> dict[str, object]:
    return {COOLING.format(number, name): v for name, v in (("type", kind), ("cur_state", state), ("max_state", most))}


@pytest.mark.parametrize(
    ("word", "held", "said"),
    [("0", False, "throttled=0x0"), ("50000", False, "throttled=0x50000"), ("50005", True, "throttled=0x50005")],
)
def test_a_raspberry_pi_says_whether_it_is_held_down(tmp_path: Path, word: str, held: bool, said: str) -> None:
    found = MACHINE.Throttling(tree(tmp_path, {PI: word}))
    assert (found.seen, found.words()) == (held, said)


def test_cooling_devices_that_slow_down_count_and_fans_do_not(tmp_path: Path) -> None:
    root = tree(tmp_path, {**cooling(0, "pwm-fan", 3, 4), **cooling(1, "thermal-cpufreq-0", 0, 5)})
    found = MACHINE.Throttling(root)
    assert (found.seen, found.words()) == (False, "thermal-cpufreq-0 0 of 5")
    tree(tmp_path, cooling(1, "thermal-cpufreq-0", 2, 5))
    found.look()
    tree(tmp_path, cooling(1, "thermal-cpufreq-0", 0, 5))
    found.look()
    assert found.seen  # for a while, between two looks
    assert found.words() == "thermal-cpufreq-0 0 of 5"


def test_counters_of_a_processor_count_from_now_on(tmp_path: Path) -> None:
    counter = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    found = MACHINE.Throttling(tree(tmp_path, {counter: 7}))
    assert (found.seen, found.words()) == (False, None)
    tree(tmp_path, {counter: 8})
    found.look()
    assert found.seen


def test_a_machine_that_does_not_say_is_not_known_to_be_held_down(tmp_path: Path) -> None:
    found = MACHINE.Throttling(tree(tmp_path, cooling(0, "Fan", 1, 1)))
    found.look()
    assert (found.seen, found.words()) == (None, None)


# ---------------------------------------------------------------- memory


def test_a_container_may_have_less_memory_than_the_machine(tmp_path: Path) -> None:
    assert MACHINE.free_memory(tmp_path) is None
    root = tree(tmp_path, {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB"})
    assert MACHINE.free_memory(root) == 4_096_000
    tree(root, {"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": 10})
    assert MACHINE.free_memory(root) == 4_096_000
    tree(root, {"sys/fs/cgroup/memory.max": 1000})
    assert MACHINE.free_memory(root) == 990


# ---------------------------------------------------------------- energy

RAPL = "sys/class/powercap/intel-rapl:{}/{}"
BATTERY = "sys/class/power_supply/battery/{}"


def zone(number: str, name: str, energy: int) -> dict[str, object]:
    values = {"name": name, "energy_uj": energy, "max_energy_range_uj": 1_000_000}
    return {RAPL.format(number, key): value for key, value in values.items()}


def test_packages_are_added_up_over_the_counters_end(tmp_path: Path) -> None:
    parts = {**zone("0", "package-0", 100), **zone("0:0", "core", 5), **zone("1", "package-1", 999_000)}
    meter = MACHINE.meter(tree(tmp_path, {**parts, **zone("2", "psys", 1)}))
    meter.start()
    tree(tmp_path, {**zone("0", "package-0", 4_100), **zone("0:0", "core", 900), **zone("1", "package-1", 1_000)})
    assert meter.spent_mj() == 4.0 + 2.0


def test_a_counter_that_stands_still_tells_nothing(tmp_path: Path) -> None:
    meter = MACHINE.meter(tree(tmp_path, zone("0", "package-0", 100)))
    meter.start()
    assert meter.spent_mj() is None


def battery(status: str, **values: int) -> dict[str, object]:
    known = {"type": "Battery", "status": status, "current_now": -500_000, "voltage_now": 4_000_000, **values}
    return {BATTERY.format(name): value for name, value in known.items()}


def test_a_battery_tells_current_times_voltage_times_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = MACHINE.meter(tree(tmp_path, battery("Discharging")))
    now = [100.0]
    monkeypatch.setattr(MACHINE, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    meter.start()
    tree(tmp_path, battery("Discharging", current_now=-1_500_000))
    now[0] += 4.0
    meter.look()
    assert meter.spent_mj() == pytest.approx(1e3 * 4.0 * (2.0 + 6.0) / 2)
    tree(tmp_path, battery("Charging"))
    now[0] += 1.0
    meter.look()
    assert meter.spent_mj() is None  # the charger gives what it wants


def test_a_charging_battery_is_no_meter(tmp_path: Path) -> None:
    assert MACHINE.meter(tmp_path) is None
    assert MACHINE.meter(tree(tmp_path, battery("Charging"))) is None
    assert MACHINE.meter(tree(tmp_path, battery("Discharging"))) is not None
    assert MACHINE.meter(tree(tmp_path, battery("Discharging", current_now=0))) is None
