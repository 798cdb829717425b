"""Boards behind ssh: addresses, and everything else against a real sshd on loopback."""

from __future__ import annotations

import contextlib
import ensurepip
import hashlib
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from board import Board, executable, free_port, wait_for
from hypothesis import given
from hypothesis import strategies as st
from test_devices import write_onnx, write_tflite

from mobilekit import registry
from mobilekit.devices import _session, _ssh_address, _ssh_client
from mobilekit.devices._ssh_address import Address
from mobilekit.devices.ssh import Ssh
from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.types import BenchModel, BenchRequest, BenchResult, DeviceSettings, Failure

devices = pytest.mark.devices
NAME = re.compile(r"[A-Za-z0-9._-]+")

# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("pi@raspberrypi", Address("pi", "raspberrypi", None)),
        ("pi@raspberrypi.local:2222", Address("pi", "raspberrypi.local", 2222)),
        ("jetson", Address(None, "jetson", None)),
        ("root@10.0.0.7:22", Address("root", "10.0.0.7", 22)),
        ("pi@[fe80::1%eth0]:2222", Address("pi", "fe80::1%eth0", 2222)),
        ("[::1]", Address(None, "::1", None)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert _ssh_address.parse(text) == address
    assert registry.device(f"ssh:{text}").name == f"ssh:{text}"


@pytest.mark.parametrize(
    "text",
    ["", "@", "pi@", "@board", "pi@board:", "pi@board:0", "pi@board:65536", "pi@board:1x", "pi@fe80::1", "pi@[]",
     "-x@b", "pi@-oProxyCommand=id", "pi;id@board", "$(id)@board", "pi@`id`", "pi@board;reboot", "pi@bo ard", "a@b@c",
     "pi@board\n", "pi@[::1", "pi@[zz::1]", "pi@[::1]x", "pi@böard", "pi@board/../x", "p" * 70 + "@b"],
)  # fmt: skip
def test_other_addresses_are_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(BadInputError, match=r"write ssh:USER@HOST") as caught:
        registry.device(f"ssh:{text}")
    assert "\n" not in str(caught.value)


@given(st.one_of(st.text(), st.text(alphabet=string.printable), st.text(alphabet="aZ09_@:.[]%$;- \n")))
def test_an_address_is_plain_or_refused(text: str) -> None:
    try:
        address = _ssh_address.parse(text)
    except BadInputError:
        return
    assert re.fullmatch(r"[A-Za-z0-9._:%-]+", address.host)
    assert not address.host.startswith("-")
    assert address.user is None or (NAME.fullmatch(address.user) and not address.user.startswith("-"))
    assert address.port is None or 1 <= address.port <= 65535


@given(
    st.none() | st.from_regex(_ssh_address.USER, fullmatch=True),
    st.from_regex(r"[a-z0-9]{1,20}(\.[a-z]{1,5})?", fullmatch=True),
    st.none() | st.integers(1, 65535),
)
def test_an_address_is_read_as_it_was_meant(user: str | None, host: str, port: int | None) -> None:
    text = f"{user}@{host}" if user else host
    assert _ssh_address.parse(f"{text}:{port}" if port else text) == Address(user, host, port)


def test_settings_that_name_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="is no file"):
        Ssh("pi@board", DeviceSettings(runner=str(tmp_path / "absent")))
    with pytest.raises(BadInputError, match="holds no wheels"):
        Ssh("pi@board", DeviceSettings(wheels=str(tmp_path)))


def test_no_word_that_a_shell_could_read_otherwise_is_sent() -> None:
    for word in ("a b", "a;b", "$(id)", "`id`", "a'b", "", "a\nb", "~", "*", "a>b"):
        assert not _ssh_client.WORD.fullmatch(word)


# ---------------------------------------------------------------- the board


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    """Runs, and is empty. All that was started there is gone afterwards, and so are the files of the job."""
    found = Board(tmp_path / "board")
    monkeypatch.setenv("HOME", str(found.user))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    found.start()
    try:
        yield found
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not found.running(), "the end of all sessions", 10.0)
        assert found.running() == []
        assert found.jobs() == []
    finally:
        for pid in found.running():
            os.kill(pid, signal.SIGKILL)
        found.stop()


@contextlib.contextmanager
def connected(board: Board, **settings: str) -> Iterator[Ssh]:
    device = Ssh(board.address, DeviceSettings(**settings))
    try:
        yield device
    finally:
        device.close()


@pytest.fixture
def onnx_file(tmp_path: Path) -> BenchModel:
    return BenchModel(name="small", path=str(write_onnx(tmp_path / "it's; a $(name).onnx")), runtime="onnx")


@pytest.fixture
def tflite_file(tmp_path: Path) -> BenchModel:
    return BenchModel(name="lite", path=str(write_tflite(tmp_path / "lite.tflite")), runtime="tflite")


def quick(*models: BenchModel, **options: object) -> BenchRequest:
    return BenchRequest.model_validate({"models": models, "runs": 12, "warmup": 1, "max_seconds": 5, **options})


def endless(*models: BenchModel) -> BenchRequest:
    return quick(*models, runs=1_000_000, max_seconds=60)


def only(result: BenchResult) -> Failure:
    assert result.measurements == ()
    (failure,) = result.failures
    assert failure.message
    assert failure.remedy
    return failure


@contextlib.contextmanager
def meanwhile(device: Ssh, request: BenchRequest) -> Iterator[list[BenchResult]]:
    """Measure on another thread; the list holds the result behind the block."""
    found: list[BenchResult] = []
    thread = threading.Thread(target=lambda: found.append(device.run(request)))
    thread.start()
    try:
        yield found
    finally:
        thread.join(90)
        assert not thread.is_alive()


@devices
def test_what_a_board_is(board: Board) -> None:
    with connected(board) as device:
        info = device.info()
    assert (info.name, info.kind, info.origin) == (f"ssh:{board.address}", "linux-board", "device")
    assert info.cores == os.cpu_count()
    assert info.architecture == os.uname().machine
    assert set(info.versions) == {"onnx", "tflite"}


@devices
def test_both_runtimes_are_measured_and_nothing_stays(
    board: Board, onnx_file: BenchModel, tflite_file: BenchModel
) -> None:
    with connected(board) as device:
        result = device.run(quick(onnx_file, tflite_file, per_operator=True))
        again = device.run(quick(onnx_file))
        sessions = len(board.sessions())
    assert result.failures == again.failures == ()
    for measured, model in zip(
        (*result.measurements, *again.measurements), (onnx_file, tflite_file, onnx_file), strict=True
    ):
        assert len(measured.samples_ms) == 12
        assert measured.sha256 == hashlib.sha256(Path(model.path).read_bytes()).hexdigest()
        assert (measured.device, measured.origin, measured.path) == (device.name, "device", model.path)
    assert all(measured.operators for measured in result.measurements)
    assert sessions > 0
    log = (board.root / "sshd.log").read_text()
    assert log.count("Accepted publickey") == 1  # one connection for everything
    (runner,) = (board.home / ".cache/mobilekit").glob("runner-*")
    assert {path.name for path in runner.glob("*.py")} == {path.name for path in _session.SCRIPTS}
    kept = {path.name for path in (board.home / ".cache/mobilekit").iterdir()}
    assert kept == {"jobs", runner.name}


@devices
def test_outputs_on_the_board_are_those_of_this_machine(
    board: Board, onnx_file: BenchModel, tflite_file: BenchModel, tmp_path: Path
) -> None:
    import numpy as np

    values = np.random.default_rng(1).standard_normal((2, 3, 16, 16)).astype("<f4")
    (tmp_path / "golden.bin").write_bytes(values.tobytes())
    fed = [model.model_copy(update={"inputs": (str(tmp_path / "golden.bin"),)}) for model in (onnx_file, tflite_file)]
    request = quick(*fed, return_outputs=True)
    with connected(board) as device:
        there = device.run(request)
    here = registry.device("host").run(request)
    assert there.failures == here.failures == ()
    for one, other in zip(there.measurements, here.measurements, strict=True):
        assert one.outputs
        assert one.outputs == other.outputs


@devices
def test_a_model_is_sent_once(board: Board, onnx_file: BenchModel) -> None:
    with connected(board) as device:
        device.run(quick(onnx_file))
        (copy,) = board.jobs()[0].glob("*.onnx")
        before = copy.stat()
        device.run(quick(onnx_file))
        after = copy.stat()
        assert (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns)
        changed = write_onnx(Path(onnx_file.path), channels=4)
        device.run(quick(onnx_file))
        (copy,) = board.jobs()[0].glob("*.onnx")  # the other one has gone
        assert copy.read_bytes() == changed.read_bytes()
        assert len(list(board.jobs()[0].iterdir())) == 1


@devices
def test_a_damaged_program_is_copied_again(board: Board, onnx_file: BenchModel) -> None:
    with connected(board) as device:
        assert device.run(quick(onnx_file)).failures == ()
        (script,) = (board.home / ".cache/mobilekit").glob("runner-*/_runner.py")
        script.write_text(script.read_text()[:1000])
        assert device.run(quick(onnx_file)).failures == ()
        assert script.read_bytes() == _session.RUNNER.read_bytes()


@devices
def test_jobs_of_killed_clients_are_removed_after_a_day(board: Board) -> None:
    jobs = board.home / ".cache/mobilekit/jobs"
    for name, age in (("old", 25 * 3600), ("young", 3600)):
        (jobs / name).mkdir(parents=True)
        (jobs / name / "model.onnx").write_bytes(b"0")
        os.utime(jobs / name, (time.time() - age,) * 2)
    with connected(board) as device:
        device.info()
    assert [job.name for job in board.jobs()] == ["young"]
    (jobs / "young" / "model.onnx").unlink()
    (jobs / "young").rmdir()


# ---------------------------------------------------------------- who is there


@devices
def test_an_unknown_host_is_not_trusted(board: Board, onnx_file: BenchModel) -> None:
    (board.user / ".ssh/known_hosts").unlink()
    with connected(board) as device:
        failure = only(device.run(quick(onnx_file)))
        with pytest.raises(MobilekitError, match="ssh-keyscan -p") as caught:
            device.info()
    assert "not in ~/.ssh/known_hosts" in failure.message
    assert f"ssh-keyscan -p {board.port} 127.0.0.1" in failure.remedy
    assert f"ssh -p {board.port} {board.address.rpartition(':')[0]}" in failure.remedy
    assert "\n" not in str(caught.value)
    assert not (board.user / ".ssh/known_hosts").exists()
    assert "Accepted" not in (board.root / "sshd.log").read_text()


@devices
@pytest.mark.parametrize("lines", ["StrictHostKeyChecking no\n", "UserKnownHostsFile none\n"])
def test_a_configuration_does_not_turn_the_check_off(board: Board, onnx_file: BenchModel, lines: str) -> None:
    (board.user / ".ssh/known_hosts").unlink()
    (board.user / ".ssh/config").write_text(lines)
    with connected(board) as device:
        assert "not in ~/.ssh/known_hosts" in only(device.run(quick(onnx_file))).message


@devices
def test_another_host_key_is_not_accepted(board: Board, onnx_file: BenchModel) -> None:
    board.key("other_key", board.root)
    board.know("other_key")
    with connected(board) as device:
        failure = only(device.run(quick(onnx_file)))
    assert "another host key" in failure.message
    assert f"ssh-keygen -R '[127.0.0.1]:{board.port}'" in failure.remedy
    assert "Accepted" not in (board.root / "sshd.log").read_text()


@devices
def test_no_key_is_accepted(board: Board, onnx_file: BenchModel) -> None:
    (board.root / "authorized_keys").write_text("")
    with connected(board) as device:
        failure = only(device.run(quick(onnx_file)))
    assert "accepts none of your keys" in failure.message
    assert f"ssh-copy-id -p {board.port}" in failure.remedy


@devices
def test_the_users_configuration_names_host_port_user_and_key(board: Board, onnx_file: BenchModel) -> None:
    user = board.address.partition("@")[0]
    (board.user / ".ssh/id_ed25519").rename(board.user / "elsewhere")
    (board.user / ".ssh/config").write_text(
        f"Host shelf\n HostName 127.0.0.1\n Port {board.port}\n User {user}\n IdentityFile {board.user}/elsewhere\n"
    )
    device = Ssh("shelf")
    assert device.run(quick(onnx_file)).failures == ()
    device.close()


@devices
def test_a_key_of_the_agent_is_used(board: Board, onnx_file: BenchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(board.root / "agent")], stdout=subprocess.DEVNULL)
    try:
        wait_for((board.root / "agent").exists, "the agent")
        monkeypatch.setenv("SSH_AUTH_SOCK", str(board.root / "agent"))
        key = board.user / ".ssh/id_ed25519"
        subprocess.run(["ssh-add", "-q", str(key)], check=True, stdin=subprocess.DEVNULL)
        key.unlink()
        with connected(board) as device:
            assert device.run(quick(onnx_file)).failures == ()
    finally:
        agent.kill()
        agent.wait()


@devices
@pytest.mark.parametrize(
    ("profile", "config", "message"),
    [
        ("echo welcome", "", "prints something when a session begins"),
        ("exit 3", "", "takes no files"),
        ("", "Subsystem sftp /nowhere", "takes no files"),
        ("", "MaxSessions 1", "refused to open a session"),
    ],
)
def test_sessions_that_are_of_no_use(
    board: Board, onnx_file: BenchModel, profile: str, config: str, message: str
) -> None:
    board.stop()
    board.profile(profile)
    board.start(config)
    with connected(board) as device:
        assert message in only(device.run(quick(onnx_file))).message


@devices
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("known_hosts", "nonsense\n", "list of known hosts cannot be read"),
        ("config", "Port nonsense\n", "~/.ssh/config cannot be read"),
        ("config", "Ciphers aes128-cbc\n", "share no cipher"),
        ("id_ed25519", "nonsense\n", "key cannot be read"),
    ],
)
def test_files_of_the_user_that_are_of_no_use(
    board: Board, onnx_file: BenchModel, name: str, content: str, message: str
) -> None:
    (board.user / ".ssh" / name).write_text(content)
    with connected(board) as device:
        assert message in only(device.run(quick(onnx_file))).message


@devices
def test_hashed_names_of_hosts_and_a_key_with_a_passphrase(board: Board, onnx_file: BenchModel) -> None:
    known = board.user / ".ssh/known_hosts"
    subprocess.run(
        ["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert "127.0.0.1" not in known.read_text()
    with connected(board) as device:
        assert device.info().cores
    key = str(board.user / ".ssh/id_ed25519")
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", key], check=True, stdout=subprocess.DEVNULL)
    with connected(board) as device:
        assert "ssh-add" in only(device.run(quick(onnx_file))).remedy


@devices
def test_nobody_answers(board: Board, onnx_file: BenchModel) -> None:
    port = free_port()
    for address, message in (
        (f"pi@127.0.0.1:{port}", "no ssh server answers"),
        ("pi@no.such.invalid", "no host is called"),
    ):
        device = Ssh(address)
        assert message in only(device.run(quick(onnx_file))).message
        device.close()


# ---------------------------------------------------------------- faults


@devices
def test_the_connection_is_lost_and_finished_rounds_are_kept(board: Board, onnx_file: BenchModel) -> None:
    with connected(board) as device:
        with meanwhile(device, endless(onnx_file)) as found:
            wait_for(lambda: list(board.home.glob(".cache/mobilekit/jobs/*/result.json")), "the first rounds")
            time.sleep(1)
            for pid in board.sessions():
                os.kill(pid, signal.SIGKILL)
        (result,) = found
        (measured,) = result.measurements
        assert len(measured.samples_ms) > 10
        (failure,) = result.failures
        assert "was lost" in failure.message
        assert f"{len(measured.samples_ms)} rounds were kept" in failure.message
        wait_for(lambda: not board.running("_runner.py"), "the end of the program")
        assert board.jobs() == []
        assert device.run(quick(onnx_file)).failures == ()  # connects again


@devices
def test_the_board_is_gone_for_good_and_polled_rounds_are_kept(board: Board, onnx_file: BenchModel) -> None:
    with connected(board) as device, meanwhile(device, endless(onnx_file)) as found:
        wait_for(lambda: list(board.home.glob(".cache/mobilekit/jobs/*/result.json")), "the first rounds")
        time.sleep(5)  # a look at it every three seconds
        board.stop()
    (result,) = found
    assert len(result.measurements[0].samples_ms) > 10
    assert "was lost" in result.failures[0].message
    board.start()
    for job in board.jobs():  # the next client removes it after a day
        os.utime(job, (0, 0))
    with connected(board) as device:
        device.info()


@devices
def test_a_peer_that_falls_silent_is_noticed(
    board: Board, onnx_file: BenchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ssh_client, "KEEPALIVE_SECONDS", 1.0)
    with connected(board) as device:
        stopped: list[int] = []
        begin = time.monotonic()
        with meanwhile(device, endless(onnx_file)) as found:
            wait_for(lambda: list(board.home.glob(".cache/mobilekit/jobs/*/result.json")), "the first rounds")
            stopped = board.sessions()
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            silent = time.monotonic()
        assert time.monotonic() - silent < 20
        assert time.monotonic() - begin < 60
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)
        assert "was lost" in found[0].failures[0].message
        assert len(found[0].measurements[0].samples_ms) > 10


@devices
def test_a_killed_program_costs_two_seconds(board: Board, onnx_file: BenchModel) -> None:
    with connected(board) as device:
        with meanwhile(device, endless(onnx_file)) as found:
            wait_for(lambda: list(board.home.glob(".cache/mobilekit/jobs/*/result.json")), "the first rounds")
            for pid in board.running("_runner.py"):
                os.kill(pid, signal.SIGKILL)
        (measured,) = found[0].measurements
        (failure,) = found[0].failures
    assert measured.samples_ms
    assert "was ended by SIGKILL" in failure.message
    assert "memory" in failure.remedy


@devices
def test_time_is_over_on_the_board_too(board: Board, onnx_file: BenchModel) -> None:
    with connected(board) as device:
        result = device.run(endless(onnx_file).model_copy(update={"timeout_seconds": 6.0}))
        assert board.running("_runner.py") == []
    assert len(result.measurements[0].samples_ms) > 10
    assert "its time was over" in result.failures[0].message


CLIENT = """
import sys, threading, _thread, time
from mobilekit.devices.ssh import Ssh
from mobilekit.types import BenchModel, BenchRequest
device = Ssh(sys.argv[1])
model = BenchModel(name="m", path=sys.argv[2], runtime="onnx")
device.run(BenchRequest(models=(model,), runs=1000000, max_seconds=60))
"""


@devices
def test_nothing_stays_of_a_client_that_says_no_goodbye(board: Board, onnx_file: BenchModel) -> None:
    code = CLIENT.replace("runs=1000000", "runs=12")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, board.address, onnx_file.path], check=True, capture_output=True
    )
    assert done.stderr == b""
    assert board.jobs() == []


@devices
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_runs_on_when_the_client_ends(board: Board, onnx_file: BenchModel, end: signal.Signals) -> None:
    client = subprocess.Popen([sys.executable, "-c", CLIENT, board.address, onnx_file.path], stderr=subprocess.PIPE)
    wait_for(lambda: list(board.home.glob(".cache/mobilekit/jobs/*/result.json")), "the first rounds")
    client.send_signal(end)
    _, said = client.communicate(timeout=30)
    wait_for(lambda: not board.running(), "the end of the program", 10.0)
    if end == signal.SIGINT:
        assert said.decode().splitlines()[-1] == "KeyboardInterrupt"
        assert board.jobs() == []
    for job in board.jobs():  # of a killed client: the next one removes it after a day
        os.utime(job, (0, 0))
    with connected(board) as device:
        device.info()


@devices
def test_a_full_disk(board: Board, tmp_path: Path) -> None:
    # files larger than 200 blocks of 512 bytes cannot be written, as with a quota; the measuring scripts can
    board.profile("trap '' XFSZ\nulimit -f 200")
    path = write_onnx(tmp_path / "large.onnx", channels=128, depth=3)
    assert path.stat().st_size > 200 * 512
    with connected(board) as device:
        failure = only(device.run(quick(BenchModel(name="large", path=str(path), runtime="onnx"))))
        assert "MB" in failure.message
        assert "free some space" in failure.remedy
        assert not list(board.jobs()[0].glob("*.onnx"))
        small = BenchModel(name="small", path=str(write_onnx(tmp_path / "small.onnx")), runtime="onnx")
        assert device.run(quick(small)).failures == ()


@devices
@pytest.mark.skipif(os.getuid() != 0, reason="only root makes file systems")
@pytest.mark.parametrize("room", ["32k", "1m"])
def test_a_disk_without_room(board: Board, tmp_path: Path, room: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(board.home)], check=False)
    if done.returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        (board.home / "tmp").mkdir()
        path = write_onnx(tmp_path / "large.onnx", channels=256, depth=3)
        assert path.stat().st_size > 2**20
        with connected(board) as device:
            failure = only(device.run(quick(BenchModel(name="large", path=str(path), runtime="onnx"))))
        assert "disk" in failure.message
        assert "is full" in failure.message
        assert "free some space" in failure.remedy
        assert board.jobs() == []
    finally:
        subprocess.run(["umount", "-l", str(board.home)], check=True)


@devices
@pytest.mark.skipif(os.getuid() != 0, reason="only root makes file systems")
def test_a_disk_that_fills_up_in_the_middle(board: Board, onnx_file: BenchModel) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(board.home)], check=False)
    if done.returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        (board.home / "tmp").mkdir()
        with connected(board) as device:
            with meanwhile(device, endless(onnx_file)) as found:
                wait_for(lambda: list(board.home.glob(".cache/mobilekit/jobs/*/result.json")), "the first rounds")
                with contextlib.suppress(OSError), (board.home / "large").open("wb", buffering=0) as large:
                    while True:
                        large.write(bytes(4096))
            (failure,) = found[0].failures
            assert len(found[0].measurements[0].samples_ms) > 10
            assert "No space left on device" in failure.message
            assert "free some space" in failure.remedy
            (board.home / "large").unlink()
            assert device.run(quick(onnx_file)).failures == ()
        assert board.jobs() == []
    finally:
        subprocess.run(["umount", "-l", str(board.home)], check=True)


@devices
def test_a_home_folder_that_cannot_be_written(board: Board, onnx_file: BenchModel) -> None:
    (board.home / ".cache").write_text("a file where a folder should be")
    with connected(board) as device:
        failure = only(device.run(quick(onnx_file)))
    assert "cache/mobilekit" in failure.message + failure.remedy
    (board.home / ".cache").unlink()


# ---------------------------------------------------------------- Pythons and programs


def bare_python(folder: Path) -> Path:
    """A Python without packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


@devices
def test_no_python(board: Board, onnx_file: BenchModel) -> None:
    board.python(None)
    with connected(board) as device:
        failure = only(device.run(quick(onnx_file)))
        assert device.info().versions == {}
    assert "there is no python3" in failure.message
    assert "--runner" in failure.remedy


@devices
def test_an_old_python(board: Board, onnx_file: BenchModel) -> None:
    says = """printf 'mobilekit {"python": "3.7.3", "machine": "armv7l", "runtimes": {}}\\n'"""
    executable(board.root / "bin/python3", f"#!/bin/sh\ncat > /dev/null\n{says}\n")
    with connected(board) as device:
        assert "Python 3.7.3" in only(device.run(quick(onnx_file))).message


@devices
def test_a_hostile_python(board: Board, onnx_file: BenchModel) -> None:
    executable(board.root / "bin/python3", "#!/bin/sh\ncat > /dev/null\nprintf 'mobilekit {\"python\": []}\\n'\n")
    with connected(board) as device:
        assert "the device's Python" in only(device.run(quick(onnx_file))).message


@devices
def test_a_missing_runtime_costs_its_own_models(
    board: Board, onnx_file: BenchModel, tflite_file: BenchModel, tmp_path: Path
) -> None:
    bare = bare_python(tmp_path / "bare")
    site = next((tmp_path / "bare/lib").glob("python3*/site-packages"))
    import numpy
    import onnxruntime

    for package in (numpy, onnxruntime):
        folder = Path(str(package.__file__)).parent
        for part in folder.parent.glob(f"{folder.name}*"):
            (site / part.name).symlink_to(part)
    board.python(str(bare))
    with connected(board) as device:
        result = device.run(quick(onnx_file, tflite_file))
    assert [measured.model for measured in result.measurements] == ["small"]
    (failure,) = result.failures
    assert failure.subject == "lite"
    assert "ai-edge-litert is not installed" in failure.message
    assert "pip install numpy ai-edge-litert" in failure.remedy
    assert "--wheels" in failure.remedy


def write_wheel(folder: Path, name: str, files: dict[str, str]) -> None:
    """A small pure wheel."""
    about = f"{name}-9.9.dist-info"
    files = files | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{about}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-9.9-py3-none-any.whl", "w") as wheel:
        for path, text in (files | {f"{about}/RECORD": record}).items():
            wheel.writestr(path, text)


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """Packages that are no more than their names: what is tested is that they are installed."""
    folder = tmp_path / "wheels; rm -rf $HOME"
    folder.mkdir()
    write_wheel(folder, "numpy", {"numpy/__init__.py": ""})
    write_wheel(folder, "onnxruntime", {"onnxruntime/__init__.py": ""})
    (pip,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    shutil.copy(pip, folder)
    (folder / "other-1.0-cp39-cp39-manylinux2014_riscv64.whl").write_bytes(b"for another processor")
    return folder


@devices
def test_wheels_are_installed_without_internet(
    board: Board, onnx_file: BenchModel, wheels: Path, tmp_path: Path
) -> None:
    board.python(str(bare_python(tmp_path / "bare")))
    board.profile(
        "export PIP_INDEX_URL=http://127.0.0.1:9 http_proxy=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9"
    )
    with connected(board, wheels=str(wheels)) as device:
        device.run(quick(onnx_file))
        assert device.info().versions == {"onnx": "9.9"}
        assert not list(board.jobs()[0].glob("wheels/other*"))
    assert (board.home / ".cache/mobilekit/venv/bin/python").exists()
    log = (board.root / "sshd.log").read_text()
    assert log.count("Accepted publickey") == 1
    with connected(board) as device:  # is there to stay
        assert device.info().versions == {"onnx": "9.9"}


@devices
def test_wheels_that_do_not_fit_leave_nothing_half(
    board: Board, onnx_file: BenchModel, wheels: Path, tmp_path: Path
) -> None:
    board.python(str(bare_python(tmp_path / "bare")))
    for pip in wheels.glob("pip-*.whl"):  # the one that comes with Python does
        pip.unlink()
    (wheels / "onnxruntime-9.9-py3-none-any.whl").rename(wheels / "onnxruntime-9.9-cp27-none-any.whl")
    with connected(board, wheels=str(wheels)) as device:
        failure = only(device.run(quick(onnx_file)))
    assert "could not be installed" in failure.message
    assert "pip download" in failure.remedy
    assert not (board.home / ".cache/mobilekit/venv").exists()


RUNNER = """#!/bin/sh
printf '%s' '{"schema": 1, "conditions": {"started_at": "2026-01-01T00:00:00Z", "versions": {"onnx": "7"},
 "compute_unit": "npu", "cpus": []}, "failures": [],
 "measurements": [{"index": 0, "load_ms": 1.0, "samples_ms": [2.0, 2.0, 3.0]}]}' > "$2"
"""


@devices
def test_a_runner_of_the_users_own(board: Board, onnx_file: BenchModel, tmp_path: Path) -> None:
    board.python(None)
    runner = executable(tmp_path / "my $(runner)", RUNNER)
    with connected(board, runner=str(runner)) as device:
        result = device.run(quick(onnx_file))
        assert result.failures == ()
        assert result.measurements[0].samples_ms == (2.0, 2.0, 3.0)
        assert result.measurements[0].compute_unit == "npu"
        wait_for(lambda: not board.running("sleep"), "the end of the watch", 5.0)


@devices
def test_a_runner_in_python(board: Board, onnx_file: BenchModel, tmp_path: Path) -> None:
    document = {
        "schema": 1,
        "conditions": {"started_at": "2026-01-01T00:00:00Z", "versions": {}, "compute_unit": "cpu", "cpus": []},
        "measurements": [{"index": 0, "load_ms": 1.0, "samples_ms": [4.0]}],
        "failures": [],
    }
    runner = tmp_path / "runner.py"
    runner.write_text(f"import sys\nopen(sys.argv[2], 'w').write({json.dumps(json.dumps(document))})\n")
    with connected(board, runner=str(runner)) as device:
        assert device.run(quick(onnx_file)).measurements[0].samples_ms == (4.0,)


@devices
def test_a_runner_that_hangs_is_ended(board: Board, onnx_file: BenchModel, tmp_path: Path) -> None:
    runner = executable(tmp_path / "hangs", "#!/bin/sh\nexec sleep 1000\n")
    with connected(board, runner=str(runner)) as device:
        result = device.run(quick(onnx_file, timeout_seconds=1.0))
        assert "its time was over" in result.failures[0].message
        wait_for(lambda: not board.running("sleep"), "the end of the runner", 10.0)


@devices
def test_a_runner_for_another_processor(board: Board, onnx_file: BenchModel, tmp_path: Path) -> None:
    runner = tmp_path / "runner"
    runner.write_bytes(b"\x7fELF" + bytes(60))
    with connected(board, runner=str(runner)) as device:
        failure = only(device.run(quick(onnx_file)))
    assert "cannot be started" in failure.message
    assert "processor" in failure.remedy


@devices
def test_a_runner_ends_with_a_client_that_is_killed(board: Board, onnx_file: BenchModel, tmp_path: Path) -> None:
    runner = executable(tmp_path / "hangs", "#!/bin/sh\nexec sleep 1000\n")
    code = CLIENT.replace("Ssh(sys.argv[1])", "Ssh(sys.argv[1], DeviceSettings(runner=sys.argv[3]))")
    code = code.replace("BenchRequest\n", "BenchRequest, DeviceSettings\n", 1)
    client = subprocess.Popen([sys.executable, "-c", code, board.address, onnx_file.path, str(runner)])
    try:
        wait_for(lambda: board.running("sleep 1000"), "the runner")
    finally:
        client.kill()
        client.wait()
    wait_for(lambda: not board.running(), "the end of the runner", 10.0)
    for job in board.jobs():  # the next client removes it after a day
        os.utime(job, (0, 0))
    with connected(board) as device:
        device.info()
