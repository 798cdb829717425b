"""What devices say of themselves: the script in real shells, and its reader on texts of several kinds of devices.

The texts in `data/facts` are written by hand after the formats of the kernel, getprop and dumpsys; none is recorded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mobilekit import registry
from mobilekit.devices import _facts, host
from mobilekit.devices._cores import Cpu, clusters
from mobilekit.types import Battery, DeviceInfo

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The first draw reads the constants of all modules: seconds on a busy machine."""
FACTS = Path(__file__).parent / "data" / "facts"
SHELLS = [
    [path, *rest]
    for path, *rest in ((shutil.which(name), *rest) for name, *rest in (["dash"], ["busybox", "sh"], ["mksh"], ["sh"]))
    if path
]


def read(name: str) -> DeviceInfo:
    return parse((FACTS / f"{name}.txt").read_text(encoding="utf-8"))


def parse(text: str) -> DeviceInfo:
    return _facts.parse(text, "ssh:pi@board", "ssh", "device", {"onnx": "1.19.2"})


def sections(**bodies: str) -> str:
    return "".join(f"\n@@{name}\n{body}" for name, body in bodies.items())


# ---------------------------------------------------------------- texts of devices


def test_a_raspberry_pi() -> None:
    info = read("raspberry_pi_4")
    assert (info.name, info.kind, info.origin, info.versions) == ("ssh:pi@board", "ssh", "device", {"onnx": "1.19.2"})
    assert (info.soc, info.model) == ("bcm2711", "Raspberry Pi 4 Model B Rev 1.1")
    assert (info.cores, info.memory_mb, info.free_memory_mb, info.swap_used_mb) == (4, 3977, 3389, 0)
    assert info.os == "Debian GNU/Linux 11 (bullseye), Linux 6.1.21-v8+"
    assert info.architecture == "aarch64"
    (cluster,) = info.clusters
    assert (cluster.cpus, cluster.core, cluster.governor) == ((0, 1, 2, 3), "Cortex-A72", "ondemand")
    assert (cluster.min_mhz, cluster.max_mhz, cluster.now_mhz) == (600, 1500, 600)
    assert info.temperatures_c == {"cpu-thermal": 48.3}
    assert info.throttling == "under-voltage, throttled"
    assert info.throttled
    assert info.battery is None


@pytest.mark.parametrize(
    ("said", "words", "now"),
    [
        ("0", "none", False),
        ("throttled=0x0", "none", False),
        ("throttled=0x4", "throttled", True),
        ("50000", "none now; since it was started: under-voltage, throttled", False),
        ("e0008", "soft temperature limit", True),
        ("error=1 error_msg=Command not registered", None, False),
    ],
)
def test_what_a_raspberry_pi_says_of_throttling(said: str, words: str | None, now: bool) -> None:
    info = parse(sections(raspberry=said))
    assert (info.throttling, info.throttled) == (words, now)


def test_a_jetson() -> None:
    info = read("jetson_orin_nano")
    assert (info.soc, info.model) == ("tegra234", "NVIDIA Jetson Orin Nano Developer Kit")
    assert [(c.core, len(c.cpus), c.max_mhz) for c in info.clusters] == [("Cortex-A78AE", 6, 1510.4)]
    assert info.temperatures_c == {
        "cpu-thermal": 51.2, "gpu-thermal": 50.6, "soc0-thermal": 49.8, "soc1-thermal": 50.0, "tj-thermal": 51.2,
    }  # fmt: skip
    assert info.swap_used_mb == 104
    assert info.throttling == "none"  # the fan turns, which is no throttling
    hot = (FACTS / "jetson_orin_nano.txt").read_text().replace("device1/cur_state:0", "device1/cur_state:3")
    assert parse(hot).throttling == "thermal-cpufreq-0 cools at step 3 of 11"


def test_a_phone() -> None:
    info = read("pixel_6")
    assert (info.soc, info.model) == ("Google GS101", "Google Pixel 6")
    assert info.os.startswith("Android 14 (API 34), Linux 5.10")
    assert [(c.core, c.cpus, c.max_mhz, c.governor) for c in info.clusters] == [
        ("Cortex-X1", (6, 7), 2802, "sched_pixel"),
        ("Cortex-A76", (4, 5), 2253, "sched_pixel"),
        ("Cortex-A55", (0, 1, 2, 3), 1803, "sched_pixel"),
    ]
    # not what the service remembers, no voltages, no shares, no sensors that are not fitted
    assert info.temperatures_c == {
        "BIG": 63.0, "MID": 58.0, "LITTLE": 55.0, "G3D": 52.0, "VIRTUAL-SKIN": 41.3, "battery": 36.1,
    }  # fmt: skip
    assert info.throttling == "thermal status moderate; CPU 4, 5 held at 1999 of 2253 MHz"
    assert info.battery == Battery(percent=76, charging=True, temperature_c=36.1)


def test_a_container_says_little() -> None:
    info = read("x86_container")
    assert (info.soc, info.model, info.architecture, info.cores) == ("AMD EPYC", None, "x86_64", 2)
    (cluster,) = info.clusters
    assert (cluster.cpus, cluster.core, cluster.max_mhz, cluster.governor) == ((0, 1), None, None, None)
    assert (info.temperatures_c, info.throttling, info.battery) == ({}, None, None)


def test_a_laptop_has_a_battery_and_its_mouse_does_not_count() -> None:
    power = """/sys/class/power_supply/hidpp_battery_0/type:Battery
/sys/class/power_supply/BAT0/type:Battery
/sys/class/power_supply/AC:001/type:Mains
/sys/class/power_supply/hidpp_battery_0/scope:Device
/sys/class/power_supply/hidpp_battery_0/capacity:5
/sys/class/power_supply/BAT0/capacity:81
/sys/class/power_supply/BAT0/status:Discharging
/sys/class/power_supply/BAT0/temp:312
"""
    assert parse(sections(power=power)).battery == Battery(percent=81, charging=False, temperature_c=31.2)


def test_names_of_32_bit_arm_are_no_processors() -> None:
    cpuinfo = (
        "processor\t: 0\nmodel name\t: ARMv7 Processor rev 4 (v7l)\nCPU implementer\t: 0x41\nCPU part\t: 0xd03\n\n"
    )
    info = parse(sections(cpuinfo=cpuinfo + "Hardware\t: Allwinner sun8i Family\n"))
    assert (info.soc, info.cores, info.clusters[0].core) == ("Allwinner sun8i Family", 1, "Cortex-A53")


def test_degrees_and_thousandths() -> None:
    temperatures = (("a", 41), ("a", 41000), ("b", -300000), ("c", 0), ("d", 500), ("e", "N/A"), ("f", 2**63))
    thermal = "".join(
        f"/sys/class/thermal/thermal_zone{i}/type:{name}\n/sys/class/thermal/thermal_zone{i}/temp:{value}\n"
        for i, (name, value) in enumerate(temperatures)
    )
    assert parse(sections(thermal=thermal)).temperatures_c == {"a": 41.0, "a 2": 41.0}


# ---------------------------------------------------------------- clusters


def test_makers_frequencies_of_single_cores_do_not_part_them() -> None:
    ranked = [Cpu(i, max_mhz=4800 + 25 * (i % 3), capacity=1024 - i % 3) for i in range(8)]
    assert [cluster.cpus for cluster in clusters(ranked)] == [tuple(range(8))]
    prime = [Cpu(0, 0x41, 0xD0D, max_mhz=2841), *(Cpu(i, 0x41, 0xD0D, max_mhz=2419) for i in (1, 2, 3))]
    assert [cluster.cpus for cluster in clusters(prime)] == [(0,), (1, 2, 3)]


MAKES = st.tuples(
    st.sampled_from([None, 0x41, 0x51]),
    st.sampled_from([None, 0, 0xD03, 0xD44]),
    st.sampled_from([None, 250, 251, 1024]),
    st.none() | st.floats(1, 5000),
)


@UNTIMED
@given(st.lists(MAKES, max_size=20))
def test_every_cpu_is_in_one_cluster(makes: list[tuple[int | None, int | None, int | None, float | None]]) -> None:
    cpus = [Cpu(index, *made, max_mhz=most) for index, (*made, most) in enumerate(makes)]
    found = clusters(cpus)
    assert sorted(index for cluster in found for index in cluster.cpus) == list(range(len(cpus)))
    for cluster in found:
        assert len({cpus[index].kind[:2] for index in cluster.cpus}) == 1
        assert cluster.max_mhz in {cpus[index].max_mhz for index in cluster.cpus}


# ---------------------------------------------------------------- hostile texts


def check(info: DeviceInfo) -> None:
    """Bounded, one line each, and what it was read from."""
    texts = [info.soc, info.os, info.model or "", info.throttling or "", info.architecture or ""]
    texts += [*info.temperatures_c, *(cluster.governor or "" for cluster in info.clusters)]
    assert all(len(text) <= 200 and (text.isprintable() or not text) for text in texts), texts
    assert 1 <= info.cores <= _facts.MOST_CPUS
    assert all(-40 <= value <= 150 for value in info.temperatures_c.values())
    assert len(info.temperatures_c) <= 128
    assert DeviceInfo.model_validate_json(info.model_dump_json()) == info


LINES = st.sampled_from(
    [line for path in sorted(FACTS.glob("*.txt")) for line in path.read_text(encoding="utf-8").splitlines()]
)
NUMBERS = st.one_of(st.integers().map(str), st.floats().map(str), st.sampled_from(["", "٣", "1e400", "-0", "9" * 5000]))


@UNTIMED
@given(
    st.lists(
        st.one_of(LINES, st.text(), st.tuples(LINES, NUMBERS).map(lambda two: two[0].split(":")[0] + ":" + two[1]))
    )
)
def test_any_text_is_read_without_an_error(lines: list[str]) -> None:
    check(parse("\n".join(lines)))


@UNTIMED
@given(st.text())
def test_versions_are_cleaned(text: str) -> None:
    info = _facts.parse("", "x", "ssh", "device", {"onnx": text, text: "1"})
    assert all(part.isprintable() and len(part) <= 60 for pair in info.versions.items() for part in pair)


def test_megabytes_of_text_are_read_in_bounds() -> None:
    bodies = {
        "cpuinfo": "".join(f"processor\t: {i}\nCPU implementer\t: 0x41\n\n" for i in range(100_000)),
        "thermal": "".join(
            f"/sys/class/thermal/thermal_zone{i}/type:z\n/sys/class/thermal/thermal_zone{i}/temp:40000\n"
            for i in range(9000)
        ),
    }
    for name, body in bodies.items():
        check(parse(sections(**{name: body})))
    check(parse("@@model\n" + "\x1b[2J" * 1_000_000))
    check(parse("@@properties\nro.product.model=" + "x" * 3_000_000))
    check(parse("@@thermalservice\nCurrent temperatures from HAL:\n" + "Temperature{mType=0" * 100_000))
    check(parse("@@thermalservice\nCurrent temperatures from HAL:\n" + "Temperature{" + " mType=0," * 100_000))
    check(parse(10 * "@@cpus\n" + "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor:\x1b[2J\n"))


# ---------------------------------------------------------------- the script


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: Path(shell[0]).name)
def test_the_script_runs_in_this_shell(shell: list[str], tmp_path: Path) -> None:
    """As an argument and on standard input alike; with an Android's commands, one of which reads its standard input."""
    commands = {
        "getprop": 'case $1 in ro.soc.model) echo "SM8250";; ro.soc.manufacturer) echo Qualcomm;; esac',
        "dumpsys": 'cat; case $1 in battery) echo "  level: 50";; *) echo "Thermal Status: 0";; esac',
        "vcgencmd": 'echo "throttled=0x2"',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    given_so = [
        subprocess.run([*shell, "-c", _facts.COLLECT], capture_output=True, text=True, env=environment, check=True),
        subprocess.run(
            [*shell, "-s"], input=_facts.COLLECT, capture_output=True, text=True, env=environment, check=True
        ),
    ]
    for done in given_so:
        assert done.stderr == ""
        assert done.stdout.endswith("@@end\n")
        info = parse(done.stdout)
        assert info.soc == "Qualcomm SM8250"
        assert info.battery == Battery(percent=50)
        assert info.architecture == os.uname().machine
        if Path("/proc/cpuinfo").exists():
            assert info.cores == os.cpu_count()
            assert info.throttling is not None


def test_the_host_says_what_its_kernel_says() -> None:
    info = registry.device("host").info()
    assert info.cores == os.cpu_count()
    assert info.memory_mb == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**6
    assert sorted(cpu for cluster in info.clusters for cpu in cluster.cpus) == list(range(info.cores))
    assert info.architecture == os.uname().machine
    assert info.os.endswith(os.uname().release)


@pytest.mark.parametrize("reason", ["no /proc", "no shell"])
def test_a_host_without_proc_or_shell_says_what_the_platform_says(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "no shell":
        monkeypatch.setenv("PATH", "/nowhere")
    else:
        monkeypatch.setattr(host, "_collected", lambda: "")
    info = registry.device("host").info()
    assert info.cores == os.cpu_count()
    assert info.memory_mb
    assert info.architecture == os.uname().machine
    assert info.soc
    assert info.soc != "unknown"
    assert info.clusters == ()
    check(info)
