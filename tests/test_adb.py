"""Android devices: through the real adb client to a small device of our own, with what goes wrong on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from adb_daemon import MODERN, AdbDaemon
from test_devices import rows, write_onnx

from mobilekit import documents, registry
from mobilekit.devices import _adb_client, _adb_job
from mobilekit.devices._session import DeviceError
from mobilekit.devices.adb import Adb
from mobilekit.errors import BadInputError
from mobilekit.types import BenchModel, BenchRequest, BenchResult, DeviceSettings

real = pytest.mark.devices

NATIVE = r"""
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <pthread.h>
#include <stdlib.h>

/* A measuring program of a device: times a loop in place of a network. */
static void *watch(void *unused) {
    char rest[256];
    while (read(0, rest, sizeof rest) > 0) {}
    _exit(4);
}

static double now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

int main(int count, char **words) {
    pthread_t thread;
    if (count > 1 && !strcmp(words[1], "--watch-stdin")) pthread_create(&thread, 0, watch, 0);
    FILE *request = fopen(words[count - 2], "r");
    if (!request) return 1;
    fclose(request);
    puts("rounds"); fflush(stdout);
    FILE *result = fopen(words[count - 1], "w");
    fputs("{\"schema\": 1, \"failures\": [], \"conditions\": {\"started_at\": \"2026-01-02T03:04:05+00:00\",", result);
    fputs(" \"versions\": {\"loop\": \"1\"}, \"compute_unit\": \"cpu\"},", result);
    fputs(" \"measurements\": [{\"index\": 0, \"load_ms\": 0.5, \"samples_ms\": [", result);
    for (int run = 0; run < 20; run++) {
        double start = now(CLOCK_MONOTONIC);
        for (volatile int i = 0; i < 100000; i++) {}
        fprintf(result, "%s%.6f", run ? ", " : "", now(CLOCK_MONOTONIC) - start);
    }
    fputs("]}]}", result);
    return fclose(result);
}
"""
ANSWER = {
    "schema": 1,
    "conditions": {"started_at": "2026-01-02T03:04:05+00:00", "versions": {"loop": "1"}, "compute_unit": "cpu"},
    "measurements": [{"index": 0, "load_ms": 0.5, "samples_ms": 12 * [1.5]}],
    "failures": [],
}
STUBBORN = """
    #!/bin/sh
    # A program that neither watches its input nor ends, and has a child in a session of its own.
    if [ "$1" = --watch-stdin ]; then shift; fi
    cat > "$2" << 'END'
    {answer}
    END
    echo rounds
    setsid sleep 1000 &
    sleep 1000
    """


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An adb server of our own, which knows no other devices and no keys of the user."""
    assert shutil.which("adb"), "adb is missing: run these tests with `make test-devices`"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("ANDROID_SERIAL", raising=False)
        subprocess.run(["adb", "start-server"], check=True, capture_output=True)
        yield
        subprocess.run(["adb", "kill-server"], check=True, capture_output=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /data/local/tmp/mobilekit."""
    monkeypatch.setattr(Adb, "folder", str(tmp_path / "device"))
    return tmp_path / "device"


@pytest.fixture
def make(server: None, folder: Path, tmp_path: Path) -> Iterator[Callable[..., AdbDaemon]]:
    """Makes devices whose python3 has the runtimes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    script(programs / "python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    made: list[AdbDaemon] = []

    def one(features: tuple[str, ...] = MODERN) -> AdbDaemon:
        device = AdbDaemon(features)
        device.path = f"{programs}:{device.path}"
        made.append(device.__enter__())
        return device

    yield one
    for device in made:
        subprocess.run(["adb", "disconnect", device.serial], check=False, capture_output=True)
        device.__exit__()
    assert not running(folder)


@pytest.fixture
def phone(make: Callable[..., AdbDaemon]) -> AdbDaemon:
    return make()


@pytest.fixture
def model(tmp_path: Path) -> BenchModel:
    return BenchModel(name="small", path=str(write_onnx(tmp_path / "small.onnx")), runtime="onnx")


TOOLS = ("cat", "chmod", "du", "find", "grep", "kill", "mkdir", "mv", "rm", "sed", "setsid", "sha256sum", "sleep",
         "tail", "timeout", "touch", "tr", "uname")  # fmt: skip
"""What is used on the device."""


@pytest.fixture
def android(phone: AdbDaemon, tmp_path: Path) -> AdbDaemon:
    """A device with the shell and the commands of Android, and nothing else but a python3."""
    shell, box = shutil.which("mksh"), shutil.which("toybox")
    if shell is None or box is None:
        pytest.skip("mksh and toybox are missing: `make test-devices` installs them where it can")
    there = tmp_path / "system"
    there.mkdir()
    (there / "sh").symlink_to(shell)
    for tool in TOOLS:
        (there / tool).symlink_to(box)
    phone.path = f"{tmp_path / 'bin'}:{there}"
    return phone


def script(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
    path.chmod(0o755)
    return path


def stubborn(folder: Path) -> Path:
    return script(folder / "stubborn", STUBBORN.replace("{answer}", json.dumps(ANSWER)))


def measure(device: AdbDaemon, *models: BenchModel, runner: Path | None = None, **changes: object) -> BenchResult:
    asked = {"runs": 12, "max_seconds": 20.0, "warmup": 1, "timeout_seconds": 60.0, "reference": False, **changes}
    settings = DeviceSettings(runner=str(runner) if runner else None)
    return Adb(device.serial, settings).run(BenchRequest(models=models, **asked))


def running(folder: Path) -> list[str]:
    """Command lines of what still runs of a job, or was started by one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            ours = f"{folder}/jobs" in command.decode(errors="replace") + os.readlink(entry / "cwd")
        except OSError:
            continue
        if ours:
            found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found


def gone(folder: Path, seconds: float = 10.0) -> bool:
    """Whether everything of a job ends within so many seconds."""
    return waited(lambda: not running(folder), seconds)


def waited(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def jobs(folder: Path) -> list[Path]:
    return list((folder / "jobs").glob("*"))


def while_measuring(device: AdbDaemon, folder: Path, act: Callable[[], object]) -> threading.Thread:
    """Do something when the measuring program has written its first result."""

    def watch() -> None:
        if waited(lambda: list(folder.glob("jobs/*/result.json"))):
            act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


# ---------------------------------------------------------------- what is said before anything is asked


@pytest.mark.parametrize(
    "address", ["", "emulator-5554", "R58M12ABCDE", "127.0.0.1:5555", "[fe80::1%eth0]:5555", "pi.local:5555"]
)
def test_addresses(address: str) -> None:
    device = registry.device(f"adb:{address}" if address else "adb")
    assert device.name == (f"adb:{address}" if address else "adb")


@pytest.mark.parametrize(
    "address", ["-s", "a b", "a;reboot", "$(reboot)", "a\nb", "é", "a" * 200, "127.0.0.1:", "h:123456", "a:b"]
)
def test_wrong_addresses_are_one_sentence(address: str) -> None:
    with pytest.raises(BadInputError) as caught:
        registry.device(f"adb:{address}")
    assert "Android device" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_it_has_no_use_for(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="leave out --wheels"):
        Adb("", DeviceSettings(wheels=str(tmp_path)))
    with pytest.raises(BadInputError, match="is no file"):
        Adb("", DeviceSettings(runner=str(tmp_path / "none")))


def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, serial: str = "") -> BenchResult:
    """What comes of a measurement where `adb devices` prints these lines."""
    text = f"List of devices attached\n{lines}\n"
    script(tmp_path / "adb", f"#!/bin/sh\ncat << 'END'\n{text}END\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(_adb_client, "SETTLE_SECONDS", 0.0)
    file = write_onnx(tmp_path / "m.onnx")
    return Adb(serial).run(BenchRequest(models=(BenchModel(name="m", path=str(file), runtime="onnx"),)))


STATES = {
    "": ("no Android device is connected", "USB debugging"),
    "A1\tunauthorized": ("does not trust this computer yet", "allow USB debugging"),
    "A1\tauthorizing": ("does not trust this computer yet", "allow USB debugging"),
    "A1\toffline": ("'A1' is offline", "adb reconnect"),
    "A1\tno permissions (missing udev rules?); see [http://developer.android.com]": ("may not talk", "plugdev"),
    "A1\trecovery": ("in the state 'recovery'", "adb reboot"),
    "A1\tdevice\nB2\tdevice": ("2 Android devices are connected: A1, B2", "--device adb:A1"),
    "A1\tdevice": ("the connection to the device 'A1' failed", "cable"),
    "A;reboot\tdevice": ("characters that no serial has", "another device"),
}


@pytest.mark.parametrize("lines", STATES)
def test_devices_that_cannot_be_used(lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = seen(tmp_path, monkeypatch, lines)
    assert result.measurements == ()
    (failure,) = result.failures
    message, remedy = STATES[lines]
    assert message in failure.message
    assert remedy in failure.remedy
    assert (failure.stage, failure.subject) == ("measure", "adb")


def test_a_serial_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = seen(tmp_path, monkeypatch, "A1\tdevice\nB2\toffline", serial="C3")
    assert result.failures[0].message == "no Android device 'C3' is connected: adb sees only A1, B2"
    assert result.failures[0].subject == "adb:C3"


def test_without_adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "adbutils", None)
    with pytest.raises(DeviceError, match="adb was not found") as caught:
        Adb().info()
    assert "mobilekit[adb]" in caught.value.trouble.remedy


def test_an_adb_that_cannot_be_started(tmp_path: Path) -> None:
    (tmp_path / "adb").write_bytes(b"\x00no program")
    (tmp_path / "adb").chmod(0o755)
    with pytest.raises(DeviceError, match="cannot be started"):
        _adb_client.Client(str(tmp_path / "adb"), "A1").devices()


def test_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen(tmp_path, monkeypatch, "A1\tdevice\n-x\tdevice\nB2\tunauthorized")
    assert Adb.visible() == ["adb:A1", "adb:B2"]
    assert Adb.unavailable() is None
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "adbutils", None)
    assert Adb.visible() == []
    assert "apt install adb" in str(Adb.unavailable())


def test_an_adb_that_hangs_is_ended(tmp_path: Path) -> None:
    slow = script(tmp_path / "adb", "#!/bin/sh\nsleep 1000\n")
    with pytest.raises(DeviceError, match="did not answer within 0 s"):
        _adb_client.Client(str(slow), "A1").call("devices", seconds=0.2)


def test_a_flood_is_ended(tmp_path: Path) -> None:
    flood = script(tmp_path / "adb", "#!/bin/sh\nexec yes\n")
    with pytest.raises(DeviceError, match="more than 1 MiB"):
        _adb_client.Client(str(flood), "A1").call("shell", "true")


# ---------------------------------------------------------------- measuring


@real
def test_measures_with_the_devices_python(phone: AdbDaemon, folder: Path, model: BenchModel) -> None:
    result = measure(phone, model, reference=True, per_operator=True)
    assert result.failures == ()
    (found,) = result.measurements
    assert len(found.samples_ms) == len(found.reference_ms) == 12
    assert (found.device, found.origin) == (f"adb:{phone.serial}", "device")
    assert found.operators
    assert "onnx" in found.versions
    assert jobs(folder) == []


PROPERTIES = {
    "ro.soc.manufacturer": "Google",
    "ro.soc.model": "Tensor G3",
    "ro.product.manufacturer": "Google",
    "ro.product.model": "Pixel 8",
    "ro.build.version.release": "14",
    "ro.build.version.sdk": "34",
}


@real
def test_what_the_device_is(phone: AdbDaemon, folder: Path, tmp_path: Path) -> None:
    cases = "".join(f"{key}) echo '{value}' ;;\n" for key, value in PROPERTIES.items())
    script(tmp_path / "bin" / "getprop", f"#!/bin/sh\ncase $1 in\n{cases}*) echo ;;\nesac\n")
    info = Adb(phone.serial).info()
    assert (info.kind, info.origin, info.name) == ("android", "device", f"adb:{phone.serial}")
    assert (info.soc, info.model) == ("Google Tensor G3", "Google Pixel 8")
    assert info.os.startswith("Android 14 (API 34)")
    assert info.architecture == os.uname().machine
    here = registry.device("host").info()
    assert info.versions == here.versions
    assert info.memory_mb == here.memory_mb
    assert jobs(folder) == []


@real
def test_the_only_device_needs_no_serial(phone: AdbDaemon, model: BenchModel) -> None:
    measure(phone, model)
    request = BenchRequest(models=(model,), runs=10, reference=False)
    result = Adb().run(request)
    assert [m.device for m in result.measurements] == ["adb"]


@real
def test_a_model_is_copied_once(phone: AdbDaemon, folder: Path, model: BenchModel) -> None:
    assert measure(phone, model).failures == ()
    (kept,) = (folder / "models").iterdir()
    first = kept.stat()
    assert measure(phone, model).failures == ()
    assert kept.stat().st_ino == first.st_ino
    kept.write_bytes(b"damaged")
    assert measure(phone, model).failures == ()
    assert kept.read_bytes() == Path(model.path).read_bytes()


@real
@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles a program")
def test_measures_with_a_native_program(phone: AdbDaemon, folder: Path, tmp_path: Path, model: BenchModel) -> None:
    (tmp_path / "native.c").write_text(NATIVE, encoding="utf-8")
    program = tmp_path / "na ti've"
    subprocess.run(["gcc", "-O1", "-pthread", "-o", program, tmp_path / "native.c"], check=True)
    result = measure(phone, model, runner=program)
    assert result.failures == ()
    assert len(result.measurements[0].samples_ms) == 20
    assert result.measurements[0].versions == {"loop": "1"}
    assert jobs(folder) == []


@real
def test_names_do_not_reach_the_devices_shell(phone: AdbDaemon, tmp_path: Path, model: BenchModel) -> None:
    name = "a b;touch hit $(touch hit) `touch hit` '\" -x.onnx"
    hostile = shutil.copy(model.path, tmp_path / name)
    result = measure(phone, BenchModel(name=name, path=str(hostile), runtime="onnx"))
    assert result.failures == ()
    assert not list(tmp_path.rglob("hit"))
    assert not any("hit" in service for service in phone.services)


@real
def test_an_emulator_is_told_from_a_device(phone: AdbDaemon, tmp_path: Path, model: BenchModel) -> None:
    script(tmp_path / "bin" / "getprop", '#!/bin/sh\nif [ "$1" = ro.boot.qemu ]; then echo 1; else echo; fi\n')
    assert measure(phone, model).measurements[0].origin == "emulator"


@real
def test_an_old_device(make: Callable[..., AdbDaemon], folder: Path, tmp_path: Path, model: BenchModel) -> None:
    old = make(("cmd",))
    assert len(measure(old, model).measurements[0].samples_ms) == 12
    broken = script(tmp_path / "broken", "#!/bin/sh\necho said >&2\nexit 3\n")
    result = measure(old, model, runner=broken)
    assert "ended with code 3 (said)" in result.failures[0].message
    thread = while_measuring(old, folder, old.disconnect)
    result = measure(old, model, runner=stubborn(tmp_path))
    thread.join()
    assert len(result.measurements[0].samples_ms) == 12
    assert "broke while it measured" in result.failures[0].message
    assert not any(service.startswith("shell,") for service in old.services)
    assert jobs(folder) == []
    assert gone(folder)


@real
def test_the_shell_and_commands_of_android(android: AdbDaemon, folder: Path, tmp_path: Path, model: BenchModel) -> None:
    old, young = folder / "jobs" / "old", folder / "jobs" / "young"
    for made in (old, young):
        made.mkdir(parents=True)
    unused, recent = folder / "models" / "unused.onnx", folder / "models" / "recent.onnx"
    unused.parent.mkdir()
    for large in (unused, recent):
        large.write_bytes(bytes(110 * 10**6))
    os.utime(unused, (time.time() - 600, time.time() - 600))
    three_days_ago = time.time() - 3 * 86400
    os.utime(old, (three_days_ago, three_days_ago))
    assert len(measure(android, model).measurements[0].samples_ms) == 12
    assert jobs(folder) == [young]
    assert not unused.exists(), "there is more than 200 MB"
    recent.unlink()
    (kept,) = (folder / "models").iterdir()
    assert time.time() - kept.stat().st_mtime < 3600
    first = kept.stat().st_ino
    thread = while_measuring(android, folder, android.disconnect)
    result = measure(android, model, runner=stubborn(tmp_path))
    thread.join()
    assert kept.stat().st_ino == first, "it was copied again"
    assert len(result.measurements[0].samples_ms) == 12
    assert "broke while it measured" in result.failures[0].message
    assert jobs(folder) == [young]
    assert gone(folder)
    assert "onnx" in Adb(android.serial).info().versions


@real
def test_two_devices_at_the_same_time(make: Callable[..., AdbDaemon], folder: Path, model: BenchModel) -> None:
    devices = make(), make()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda device: measure(device, model, timeout_seconds=1e300), devices))
    assert [result.failures for result in results] == [(), ()]
    assert jobs(folder) == []


@real
def test_a_slow_device(phone: AdbDaemon, model: BenchModel) -> None:
    phone.faults.delay = 0.05
    assert measure(phone, model).failures == ()


# ---------------------------------------------------------------- what goes wrong


@real
def test_which_of_several_devices(make: Callable[..., AdbDaemon], model: BenchModel) -> None:
    first, second = make(), make()
    assert measure(first, model).failures == measure(second, model).failures == ()
    result = Adb().run(BenchRequest(models=(model,)))
    assert "2 Android devices are connected" in result.failures[0].message
    assert first.serial in result.failures[0].message


@real
def test_nobody_at_the_address(server: None, folder: Path, model: BenchModel) -> None:
    result = Adb("127.0.0.1:1").run(BenchRequest(models=(model,)))
    assert "Connection refused" in result.failures[0].message
    assert "over the network" in result.failures[0].remedy


@real
def test_unauthorized(phone: AdbDaemon, model: BenchModel) -> None:
    phone.faults.unauthorized = True
    result = measure(phone, model)
    assert "does not trust this computer yet" in result.failures[0].message
    assert "allow USB debugging" in result.failures[0].remedy


@real
def test_offline(phone: AdbDaemon, model: BenchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_adb_client, "SETTLE_SECONDS", 0.5)
    assert measure(phone, model).failures == ()
    phone.faults.answers_nothing = True
    phone.disconnect()
    result = measure(phone, model)
    assert "is offline" in result.failures[0].message
    assert "unplug it" in result.failures[0].remedy


@real
def test_connection_breaks_while_a_model_is_copied(phone: AdbDaemon, folder: Path, tmp_path: Path) -> None:
    large = write_onnx(tmp_path / "large.onnx", channels=128, depth=6)
    phone.faults.drop_after_bytes = 200_000
    result = measure(phone, BenchModel(name="large", path=str(large), runtime="onnx"))
    assert result.measurements == ()
    assert rows(result) == [("measure", f"adb:{phone.serial}")]
    assert "connection" in result.failures[0].message
    assert jobs(folder) == []
    assert not list(folder.glob("models/*"))


@real
@pytest.mark.parametrize("stays", [False, True], ids=["python", "stubborn"])
def test_connection_breaks_while_it_measures(
    stays: bool, phone: AdbDaemon, folder: Path, tmp_path: Path, model: BenchModel
) -> None:
    thread = while_measuring(phone, folder, phone.disconnect)
    changes = {"runner": stubborn(tmp_path)} if stays else {"runs": 10**6, "max_seconds": 50.0}
    result = measure(phone, model, **changes)
    thread.join()
    assert len(result.measurements[0].samples_ms) >= 10
    assert rows(result) == [("measure", "small")]
    assert "broke while it measured" in result.failures[0].message
    assert "rounds were kept" in result.failures[0].message
    assert jobs(folder) == []
    assert gone(folder)


@real
def test_adbs_server_is_restarted_while_it_measures(
    phone: AdbDaemon, folder: Path, tmp_path: Path, model: BenchModel
) -> None:
    """As other programs do that bring an adb of their own."""
    thread = while_measuring(phone, folder, lambda: subprocess.run(["adb", "kill-server"], check=True))
    result = measure(phone, model, runner=stubborn(tmp_path))
    thread.join()
    assert len(result.measurements[0].samples_ms) == 12
    assert "broke while it measured" in result.failures[0].message
    assert jobs(folder) == []
    assert gone(folder)


@real
def test_a_device_that_does_not_come_back(
    phone: AdbDaemon, folder: Path, tmp_path: Path, model: BenchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_adb_job, "RECONNECT_SECONDS", 1.0)
    monkeypatch.setattr(_adb_job, "GRACE_SECONDS", 1)

    def lose() -> None:
        phone.faults.refuses = True
        phone.disconnect()

    thread = while_measuring(phone, folder, lose)
    begin = time.monotonic()
    result = measure(
        phone,
        model,
        runner=script(
            tmp_path / "sleeps", STUBBORN.replace("setsid sleep 1000 &", "").replace("{answer}", json.dumps(ANSWER))
        ),
        timeout_seconds=5.0,
    )
    thread.join()
    assert time.monotonic() - begin < 60
    assert result.measurements == ()
    assert "did not come back within 1 s" in result.failures[0].message
    assert gone(folder, 20.0)  # the device's own time limit


@real
@pytest.mark.parametrize("room", [1_000, 10_000])  # less than the script that removes a job; enough for it
def test_a_full_device(room: int, phone: AdbDaemon, folder: Path, model: BenchModel) -> None:
    phone.faults.room = room
    result = measure(phone, model)
    assert result.measurements == ()
    assert "is full" in result.failures[0].message
    assert "free some of it" in result.failures[0].remedy
    assert jobs(folder) == []


@real
def test_the_program_is_killed(phone: AdbDaemon, folder: Path, model: BenchModel) -> None:
    def kill() -> None:
        for entry in Path("/proc").glob("[0-9]*"):
            words = (entry / "cmdline").read_bytes().split(b"\0") if (entry / "cmdline").exists() else []
            if words[:1] == [sys.executable.encode()] and any(str(folder).encode() in word for word in words):
                os.kill(int(entry.name), signal.SIGKILL)

    thread = while_measuring(phone, folder, kill)
    result = measure(phone, model, runs=10**6, max_seconds=50.0)
    thread.join()
    assert len(result.measurements[0].samples_ms) > 10
    assert "was ended by SIGKILL" in result.failures[0].message
    assert "memory" in result.failures[0].remedy
    assert jobs(folder) == []


@real
def test_time_is_over(phone: AdbDaemon, folder: Path, model: BenchModel) -> None:
    result = measure(phone, model, runs=10**6, max_seconds=50.0, timeout_seconds=6.0)
    assert len(result.measurements[0].samples_ms) > 10
    assert "its time was over" in result.failures[0].message
    assert jobs(folder) == []
    assert gone(folder)


WATCHER = """
    #!/bin/sh
    if [ "$1" = --watch-stdin ]; then shift; exec 5<&0; (cat <&5 > /dev/null; kill -9 $$) & fi
    echo started > "$2"
    exec sleep 1000
    """


@real
@pytest.mark.parametrize("native", [False, True], ids=["python", "native"])
def test_who_asked_is_killed(native: bool, phone: AdbDaemon, folder: Path, tmp_path: Path, model: BenchModel) -> None:
    """Nothing goes on running; what is left of the job is removed when it is old."""
    request = BenchRequest(models=(model,), runs=10**6, max_seconds=90.0, timeout_seconds=100.0).model_dump_json()
    settings = DeviceSettings(runner=str(script(tmp_path / "watcher", WATCHER)) if native else None)
    code = textwrap.dedent(f"""
        from mobilekit.devices.adb import Adb
        from mobilekit.types import BenchRequest, DeviceSettings
        Adb.folder = {str(folder)!r}
        settings = DeviceSettings.model_validate_json({settings.model_dump_json()!r})
        Adb({phone.serial!r}, settings).run(BenchRequest.model_validate_json({request!r}))
    """)
    client = subprocess.Popen([sys.executable, "-c", code])
    assert waited(lambda: list(folder.glob("jobs/*/result.json")))
    client.kill()
    client.wait()
    assert gone(folder)
    (left,) = jobs(folder)
    young = folder / "jobs" / "young"
    young.mkdir()
    old = time.time() - 3 * 86400
    os.utime(left, (old, old))
    assert measure(phone, model).failures == ()
    assert jobs(folder) == [young]


@real
def test_interrupted(phone: AdbDaemon, folder: Path, tmp_path: Path, model: BenchModel) -> None:
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    thread = while_measuring(phone, folder, lambda: signal.pthread_kill(main_thread, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        measure(phone, model, runner=stubborn(tmp_path))
    thread.join()
    assert jobs(folder) == []
    assert gone(folder)


@real
def test_the_starting_script_is_killed(phone: AdbDaemon, folder: Path, tmp_path: Path, model: BenchModel) -> None:
    """As a system does that is out of memory: everything at once, so that nobody writes an exit code."""

    def kill() -> None:
        for command in phone.commands:
            if command.poll() is None:
                os.killpg(command.pid, signal.SIGKILL)

    thread = while_measuring(phone, folder, kill)
    result = measure(phone, model, runner=stubborn(tmp_path))
    thread.join()
    assert len(result.measurements[0].samples_ms) == 12
    assert "was ended by SIGKILL" in result.failures[0].message
    assert jobs(folder) == []
    assert gone(folder)


HOSTILE = {
    "nothing": b"",
    "no JSON": b"\x00\xff{",
    "deep": b"[" * 100_000,
    "another model": json.dumps({**ANSWER, "measurements": [{**ANSWER["measurements"][0], "index": 7}]}).encode(),  # type: ignore[index]
    "not a number": json.dumps(ANSWER).replace("1.5", "NaN", 1).encode(),
    "negative": json.dumps(ANSWER).replace("1.5", "-1.5", 1).encode(),
    "more": json.dumps({**ANSWER, "more": 1}).encode(),
}


@real
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers(name: str, phone: AdbDaemon, folder: Path, tmp_path: Path, model: BenchModel) -> None:
    phone.faults.bent["result.json"] = HOSTILE[name]
    quick = script(tmp_path / "quick", '#!/bin/sh\nshift\ntouch "$2"\n')
    result = measure(phone, model, runner=quick)
    assert result.measurements == ()
    assert "the measuring program's answer" in result.failures[0].message
    assert "docs/bench_" in result.failures[0].remedy
    assert jobs(folder) == []


@real
def test_an_answer_without_end(
    phone: AdbDaemon, folder: Path, tmp_path: Path, model: BenchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MOST_BYTES", 2**20)
    phone.faults.bent["result.json"] = bytes(4 * 2**20)
    quick = script(tmp_path / "quick", '#!/bin/sh\nshift\ntouch "$2"\n')
    result = measure(phone, model, runner=quick)
    assert "more than 1 MiB" in result.failures[0].message


@real
def test_programs_that_cannot_run_there(phone: AdbDaemon, folder: Path, tmp_path: Path, model: BenchModel) -> None:
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xb7\x00" + bytes(44)
    foreign = tmp_path / "foreign"
    foreign.write_bytes(header if os.uname().machine != "aarch64" else header.replace(b"\xb7", b"\x3e"))
    result = measure(phone, model, runner=foreign)
    assert "is built for" in result.failures[0].message
    result = measure(phone, model, runner=script(tmp_path / "lost", "#!/no/such/shell\n"))
    assert "cannot be started on the device" in result.failures[0].message
    assert os.uname().machine in result.failures[0].remedy
    assert jobs(folder) == []


@real
@pytest.mark.parametrize("without", ["python3", "numpy"])
def test_a_device_without_python(without: str, phone: AdbDaemon, tmp_path: Path, model: BenchModel) -> None:
    python = tmp_path / "bin" / "python3"
    if without == "numpy":
        script(python, "#!/bin/sh\nexit 1\n")
    else:
        python.unlink()
        phone.path = str(tmp_path / "bin")
        for name in ("sh", "mkdir", "find", "touch", "du", "uname", "sha256sum", "sed", "rm", "grep", "tail", "cat"):
            (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    result = measure(phone, model)
    assert without in result.failures[0].message
    assert "--runner" in result.failures[0].remedy
