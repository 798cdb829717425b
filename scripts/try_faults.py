"""Tries what goes wrong with devices and writes down what a user sees: docs/reliability.md.

    python scripts/try_faults.py [--only ssh] [--out docs/reliability.md]

Needs adb and sshd (`scripts/device_tools.sh .venv`, then .venv/device-tools in front of PATH), and a C compiler for the
clock.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fault_places
from fault_places import CLOCK, Place, exports, hooks
from test_devices import write_onnx

from mobilekit import __version__

SECONDS = 90.0
STAGES = ("load", "warm", "rounds", "operators")
PER_OPERATOR = """
import sys
from mobilekit import registry
from mobilekit.types import BenchModel, BenchRequest, DeviceSettings
model = BenchModel(name="net.onnx", path=sys.argv[2], runtime="onnx")
asked = BenchRequest(models=(model,), runs=2000, max_seconds=6.0, per_operator=True, timeout_seconds=60.0)
device = registry.device(sys.argv[1])
found = device.run(asked)
print(found.model_dump_json())
sys.exit(0 if found.measurements else 1)
"""
HOSTILE = {
    "no JSON at all": "not JSON \x1b[31m",
    "numbers that are none": '{"schema": 1, "conditions": {}, "measurements": [{"index": 0, "samples_ms": [NaN, -1]}]}',
    "a model that was not asked for": json.dumps(
        {
            "schema": 1,
            "conditions": {"started_at": "2026-01-02T03:04:05+00:00", "versions": {}, "compute_unit": "cpu"},
            "measurements": [{"index": 7, "load_ms": 1.0, "samples_ms": [1.0] * 12}],
            "failures": [],
        }
    ),
    "brackets a million deep": "[" * 1_000_000,
}
NAMES = {
    "ssh": ("ssh:pi@board;touch /tmp/owned", "ssh:$(touch /tmp/owned)@board", "ssh:-oProxyCommand=id@board"),
    "adb": ("adb:$(touch /tmp/owned)", "adb:-s other", "adb:a;reboot"),
    "host": ("host:7", "nowhere;id"),
}


@dataclass
class Seen:
    """What came of one fault."""

    kind: str
    fault: str
    how: str
    said: str
    code: int
    kept: int | None
    """Rounds of the measurement that was disturbed; None: there could be none."""
    running: int
    """Processes on the device ten seconds later."""
    left: int
    """Folders of jobs there."""
    again: bool | None
    """Whether the same device measures afterwards; None: it was not asked to."""


class Command:
    """A command of mobilekit, in a process of its own, as a user starts it."""

    def __init__(self, place: Place, *arguments: str, program: str | None = None, **environment: str) -> None:
        before = place.setup or "pass"
        body = program or "from mobilekit.cli import main; sys.argv[0] = 'mobilekit'; main()"
        self.out, self.err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 -- closed by `end`
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import sys\n{before}\n{body}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=self.err,
            env={**os.environ, "COLUMNS": "200", **place.environment, **environment},
            start_new_session=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        try:
            code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return code, texts[0], texts[1]


def measure(place: Place, model: Path, *more: str, **environment: str) -> Command:
    """`mobilekit measure` on the place."""
    return Command(place, "measure", str(model), "--device", place.spec, "--json", *more, **environment)


def reached(place: Place, stage: str, command: Command) -> bool:
    """Wait until the measuring program is there; of the rounds until some are kept."""
    end = time.monotonic() + SECONDS
    while stage not in place.stages:
        if time.monotonic() > end or command.process.poll() is not None:
            return False
        time.sleep(0.05)
    time.sleep(4.5 if stage == "rounds" else 0.3)
    return True


def outcome(place: Place, fault: str, how: str, command: Command, again: Callable[[], bool] | None) -> Seen:
    """What the user saw, and what is left."""
    code, out, err = command.end()
    deadline = time.monotonic() + 10
    while place.processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    running, left = len(place.processes()), len(place.left())
    said, kept = words(out, err)
    place.clean()
    place.forget()
    worked = again() if again else None
    place.clean()
    place.forget()
    return Seen(place.kind, fault, how, said, code, kept, running, left, worked)


def words(out: str, err: str) -> tuple[str, int | None]:
    """The first sentence that a user is told, and the rounds that were kept."""
    try:
        document: dict[str, Any] = json.loads(out)
    except ValueError:
        lines = [line for line in err.splitlines() if line.strip()]
        return (lines[-1] if lines else "nothing: the command itself was killed"), None
    said = "; ".join(f"{row['message']}; {row['remedy']}" for row in document["failures"][:1])
    kept = sum(len(row["samples_ms"]) for row in document["measurements"])
    return said or "nothing: it was measured", kept


# ---------------------------------------------------------------- faults of every kind of device


def stages(place: Place, model: Path) -> Iterator[Seen]:
    """kill -9 of each side, and a broken connection, at every stage."""

    def again() -> bool:
        code, out, _ = measure(place, model, "--runs", "12").end()
        return code == 0 and bool(json.loads(out)["measurements"])

    def begun(stage: str) -> Command:
        if stage == "operators":
            return Command(place, place.spec, str(model), program=PER_OPERATOR)
        return measure(place, model)

    acts: dict[str, Callable[[Command], None]] = {
        "the measuring program is killed (-9)": lambda _: kill(place.processes()),
        "the command is killed (-9)": lambda command: kill([command.process.pid]),
    }
    if place.kind != "host":
        acts["the connection breaks"] = lambda _: place.cut()
    for fault, act in acts.items():
        for stage in STAGES:
            command = begun(stage)
            if reached(place, stage, command):
                act(command)
            yield outcome(place, fault, f"at stage {stage}", command, again)


def kill(processes: list[int]) -> None:
    """As `kill -9` does."""
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def clock(place: Place, model: Path) -> Iterator[Seen]:
    """The device's clock is set forth and back by a month while it measures."""
    compiler = shutil.which("cc")
    if compiler is None:
        print("the clock is not moved: there is no compiler", file=sys.stderr)
        return
    library, moved = place.root / "clock.so", place.root / "time"
    build = [compiler, "-shared", "-fPIC", "-o", str(library), "-x", "c", "-", "-ldl"]
    subprocess.run(build, input=CLOCK.encode(), check=True)
    for fault, days in (("the device's clock jumps forth", 30), ("the device's clock jumps back", -30)):
        moved.write_text("0")
        environment = {"FAULT_PRELOAD": str(library), "FAULT_CLOCK": str(moved)}
        with on_device(place, environment):
            command = measure(place, model, **(environment if place.kind == "host" else {}))
            if reached(place, "rounds", command):
                moved.write_text(str(86400 * days))
            yield outcome(place, fault, f"by {days:+} days in the rounds", command, None)


class on_device:  # noqa: N801 -- reads as a statement
    """Environment of what runs on a board or phone, for a while."""

    def __init__(self, place: Place, environment: dict[str, str]) -> None:
        self.place, self.environment = place, {**hooks(place.root), **environment}

    def __enter__(self) -> None:
        self.put(self.environment)

    def __exit__(self, *_: object) -> None:
        self.put(hooks(self.place.root))

    def put(self, environment: dict[str, str]) -> None:
        if self.place.kind == "ssh":
            self.place.machine.profile(exports(environment))
        elif self.place.kind == "adb":
            python = self.place.root / "bin" / "python3"
            python.write_text(f'#!/bin/sh\n{exports(environment)}\nexec "{sys.executable}" "$@"\n')


def broken_copy(place: Place, model: Path) -> Iterator[Seen]:
    """The connection breaks while a model goes over."""
    if place.kind == "host":
        return
    large = write_onnx(model.with_name("large.onnx"), channels=512, depth=5, size=8)
    command = measure(place, large, "--runs", "12")
    if place.kind == "adb":
        place.machine.faults.drop_after_bytes = 2_000_000
    else:
        end = time.monotonic() + SECONDS
        while not any(path.is_file() for path in place.jobs.rglob("*")) and time.monotonic() < end:
            time.sleep(0.005)
        place.cut()
    size = large.stat().st_size / 1e6
    yield outcome(place, "the connection breaks", f"while {size:.0f} MB are copied", command, None)


def full_disk(place: Place, model: Path) -> Iterator[Seen]:
    """No room for models or results."""
    fault = "the device's disk is full"
    if place.kind == "adb":
        place.machine.faults.room = 1000
        shutil.rmtree(place.jobs.parent, ignore_errors=True)
        yield outcome(place, fault, "its sync service has 1,000 bytes left", measure(place, model), None)
        place.machine.faults.room = None
    elif place.kind == "ssh":
        place.machine.profile(exports(hooks(place.root)) + "\ntrap '' XFSZ\nulimit -f 64")
        yield outcome(place, fault, "files above 32 kB cannot be written", measure(place, model), None)
        place.machine.profile(exports(hooks(place.root)))
    elif os.getuid() == 0:
        small = place.root / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)], check=True)
        try:
            (small / "fill").write_bytes(b"x" * 8 * 1024)
            yield outcome(place, fault, "TMPDIR has two blocks left", measure(place, model, TMPDIR=str(small)), None)
        finally:
            subprocess.run(["umount", str(small)], check=True)


def wrong_device(place: Place, model: Path) -> Iterator[Seen]:
    """No runtime, and programs for another processor."""
    bare = f"{place.root}/bare/bin/python"
    if not Path(bare).exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", f"{place.root}/bare"], check=True)
    if place.kind == "ssh":
        place.machine.python(bare)
        yield outcome(place, "the runtime is missing", "a Python without packages", measure(place, model), None)
        place.machine.python(None)
        yield outcome(place, "there is no Python", "no python3 on its PATH", measure(place, model), None)
        place.machine.python(sys.executable)
    if place.kind == "adb":
        python = place.root / "bin" / "python3"
        python.write_text(f'#!/bin/sh\nexec "{bare}" "$@"\n')
        yield outcome(place, "the runtime is missing", "a Python without packages", measure(place, model), None)
        with on_device(place, {}):
            pass
    if place.kind != "host":
        program = place.root / "arm"
        program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xb7\x00\x01\x00\x00\x00" + bytes(40))
        command = measure(place, model, "--runner", str(program))
        yield outcome(place, "wrong architecture", "--runner is a program for aarch64", command, None)


def hostile(place: Place, model: Path) -> Iterator[Seen]:
    """Answers that nobody should trust, and names that hold shell commands."""
    for what, text in HOSTILE.items() if place.kind != "host" else ():
        program = place.root / "program.py"
        program.write_text(
            f"import sys\nopen(sys.argv[-1], 'w').write({text!r} if {len(text)} < 9999 else '[' * {len(text)})\n"
        )
        command = measure(place, model, "--runner", str(program))
        yield outcome(place, "hostile JSON from the device", what, command, None)
    for name in NAMES[place.kind]:
        command = Command(place, "measure", str(model), "--device", name)
        seen = outcome(place, "a device's name with shell characters", f"`--device '{name}'`", command, None)
        if Path("/tmp/owned").exists():  # noqa: S108
            raise SystemExit(f"the name {name!r} was carried out")
        yield seen


# ---------------------------------------------------------------- the page

HEAD = """# What goes wrong, and what you see

Made by `python scripts/try_faults.py` on {date} with mobilekit {version}: every fault below was really caused, on this
machine, on a board behind a real sshd, and on an Android device behind the real adb client (the device is a small
program that speaks adb's protocol; the shell on it is real). "Kept" are the rounds of the disturbed measurement that
were not lost, "running" the measuring processes that the device still had ten seconds later, "left" the folders of jobs
there, "again" whether the same device measured afterwards.

"""
TAIL = """
A folder that a killed command left on a device is removed by the first measurement there that finds it a day old; on
this machine it is a `mobilekit-*` in the temporary folder, which the system clears.
Stages of `mobilekit plan` that were finished before a fault are kept, and `--resume` goes on from them
(`tests/test_pipeline.py` kills runs at every stage).
"""


def page(rows: list[Seen]) -> str:
    """The whole page."""
    lines = [HEAD.format(date=datetime.now(UTC).date(), version=__version__)]
    for kind, title in (
        ("host", "This machine"),
        ("ssh", "A board behind ssh"),
        ("adb", "An Android device behind adb"),
    ):
        lines += [f"## {title}\n", "| fault | how | what the user sees | exit | kept | running | left | again |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        for row in (row for row in rows if row.kind == kind):
            kept = "" if row.kept is None else str(row.kept)
            again = {True: "yes", False: "**no**", None: ""}[row.again]
            cells = (row.fault, row.how, shown(row.said), row.code, kept, row.running, row.left, again)
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines) + TAIL


def shown(text: str) -> str:
    """Without what differs from run to run, and what tears a table apart."""
    text = re.sub(r"/\S*/(mobilekit-\w+|faults-\w+)\S*", "DIR", text)
    text = re.sub(r"127\.0\.0\.1:\d+", "BOARD", text)
    text = re.sub(r"-p \d+|port \d+", "-p PORT", text)
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def main() -> None:
    """Try everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("host", "ssh", "adb"))
    parser.add_argument("--out", type=Path, default=fault_places.ROOT / "docs" / "reliability.md")
    given = parser.parse_args()
    rows: list[Seen] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        model = write_onnx(Path(folder, "net.onnx"), channels=64, depth=4, size=48)
        for kind, place_of in (("host", fault_places.host), ("ssh", fault_places.board), ("adb", fault_places.phone)):
            if given.only not in (None, kind):
                continue
            with place_of(Path(folder, kind)) as place:
                trials = stages, clock, broken_copy, full_disk, wrong_device, hostile
                for seen in (seen for trial in trials for seen in trial(place, model)):
                    print(seen, flush=True)
                    rows.append(seen)
    bad = [row for row in rows if row.running or row.again is False]
    text = page(rows)
    given.out.write_text(text, encoding="utf-8")
    print(f"{given.out}: {len(rows)} faults, {len(bad)} with something wrong")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
