"""The machine that mobilekit runs on, as a device: models are timed in a separate process."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mobilekit.errors import BadInputError
from mobilekit.types import (
    BenchModel,
    BenchRequest,
    BenchResult,
    DeviceInfo,
    Failure,
    Measurement,
    Origin,
)

RUNNER = Path(__file__).with_name("_runner.py")
PACKAGES = {"onnx": ("onnxruntime",), "tflite": ("ai-edge-litert", "tflite-runtime")}
"""Runtime name -> the packages that bring it, best first."""
STAGE = re.compile(r"^(?:load \d+|warm \d+|rounds|operators|done)$", re.MULTILINE)
"""What the measuring script says; native libraries may print lines of their own."""
SIGNAL_REMEDIES = {
    "SIGKILL": "the system may have run out of memory: measure fewer or smaller models at once",
    "SIGSEGV": "the runtime crashed: try another version of it, or export the file again",
    "SIGABRT": "the runtime crashed: try another version of it, or export the file again",
}


class Host:
    """Times models on this machine, one pinned CPU for each thread asked for.

    >>> Host().name
    'host'
    """

    name = "host"

    def __init__(self, address: str = "") -> None:
        if address:
            raise BadInputError(f"the device 'host' takes no address, but got '{address}': write just 'host'")

    def info(self) -> DeviceInfo:
        """What this machine is."""
        return DeviceInfo(
            name=self.name,
            kind="host",
            origin="host",
            soc=_soc(),
            cores=os.cpu_count() or 1,
            memory_mb=_memory_mb(),
            os=platform.platform(),
            versions=_versions(),
        )

    def run(self, request: BenchRequest) -> BenchResult:
        """Time the request's models in a process of its own.

        A file that is missing, cannot be loaded or crashes its runtime becomes a Failure and the others are measured.
        When the time is over or the process is killed, the rounds finished until then are kept (at most two seconds
        of them are lost) and a Failure says so.
        """
        hashes, failures = _hash_all(request.models)
        waiting = [model for model in request.models if model.path in hashes and model.runtime in PACKAGES]
        measurements: list[Measurement] = []
        deadline = time.monotonic() + request.timeout_seconds
        while waiting:
            asked = request.model_copy(update={"models": tuple(waiting)})
            try:
                reply = _start(asked, max(0.0, deadline - time.monotonic()))
            except OSError as error:
                failures.append(_not_started(self.name, error))
                break
            if reply.culprit is not None and not reply.timed_out:
                failures.append(_crash(reply, waiting[reply.culprit].name))
                waiting.pop(reply.culprit)
                continue
            result = assemble(reply.document, asked, hashes, (self.name, "host"))
            measurements += result.measurements
            failures += result.failures
            if reply.ended_early:
                failures += _unfinished(reply, asked, measurements)
            break
        return BenchResult(measurements=tuple(measurements), failures=tuple(failures))


# ---------------------------------------------------------------- the process


@dataclass(frozen=True)
class Reply:
    """What a measuring process left: its result document (None: it wrote none) and how it ended."""

    document: dict[str, Any] | None
    stage: str
    returncode: int
    timed_out: bool
    stderr: str

    @property
    def ended_early(self) -> bool:
        """Whether the process did not come to its own end."""
        return self.timed_out or self.returncode != 0

    @property
    def culprit(self) -> int | None:
        """Index of the one model that the process was loading or warming up when it ended early."""
        stage, _, index = self.stage.partition(" ")
        return int(index) if self.ended_early and stage in ("load", "warm") else None

    @property
    def how(self) -> str:
        """How it ended, in words."""
        if self.timed_out:
            return "was stopped because its time was over"
        if self.returncode < 0:
            return f"was ended by {_signal_name(self.returncode)}"
        return f"ended with code {self.returncode} ({self.stderr or 'no message'})"


def _start(request: BenchRequest, timeout: float) -> Reply:
    """Run the measuring script on a request; kills it, and all that it started, when it is not done in time."""
    with tempfile.TemporaryDirectory(prefix="mobilekit-") as folder:
        where = Path(folder)
        (where / "request.json").write_text(_absolute(request).model_dump_json(), encoding="utf-8")
        command = [sys.executable, str(RUNNER), str(where / "request.json"), str(where / "result.json")]
        with (where / "stdout").open("wb") as out, (where / "stderr").open("wb") as err:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=folder, start_new_session=True
            )
            try:
                process.wait(timeout)
                timed_out = False
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:  # also on Ctrl-C, which a process group of its own does not receive
                _kill(process)
        output = (where / "stdout").read_text(encoding="utf-8", errors="replace")
        stages = STAGE.findall(output)
        errors = (where / "stderr").read_text(encoding="utf-8", errors="replace").splitlines()
        return Reply(
            document=_read(where / "result.json"),
            stage=stages[-1] if stages else "start",
            returncode=process.returncode,
            timed_out=timed_out,
            stderr=errors[-1][:500] if errors else "",
        )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children. Those of a process that has ended are in its group still."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
    process.wait()


def _absolute(request: BenchRequest) -> BenchRequest:
    models = [model.model_copy(update={"path": str(Path(model.path).resolve())}) for model in request.models]
    return request.model_copy(update={"models": tuple(models)})


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document


def _signal_name(returncode: int) -> str:
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


# ---------------------------------------------------------------- from the reply to the result


def assemble(
    document: dict[str, Any] | None, request: BenchRequest, hashes: dict[str, str], device: tuple[str, Origin]
) -> BenchResult:
    """Turn what the measuring script wrote into validated values.

    `hashes` is sha256 by model path, `device` the device's name and origin. A document that does not validate
    becomes a Failure.
    """
    if document is None:
        return BenchResult(measurements=())
    try:
        measurements = tuple(_measurements(document, request, hashes, device))
        failures = tuple(
            Failure(
                stage=entry["stage"],
                subject=request.models[entry["index"]].name,
                message=entry["message"],
                remedy=entry["remedy"],
            )
            for entry in document["failures"]
        )
    except (ValidationError, KeyError, IndexError, TypeError) as error:
        failure = Failure(
            stage="measure",
            subject=device[0],
            message=f"the measuring script's answer cannot be read: {' '.join(str(error).split())[:300]}",
            remedy="copy this version's measuring script to the device again",
        )
        return BenchResult(measurements=(), failures=(failure,))
    return BenchResult(measurements=measurements, failures=failures)


def _measurements(
    document: dict[str, Any], request: BenchRequest, hashes: dict[str, str], device: tuple[str, Origin]
) -> Iterator[Measurement]:
    conditions = document["conditions"]
    for entry in document["measurements"]:
        if not entry["samples_ms"]:  # ended before the first round was complete
            continue
        model = request.models[entry["index"]]
        versions = {
            name: version
            for name, version in conditions["versions"].items()
            if name == model.runtime or name not in PACKAGES
        }
        yield Measurement(
            model=model.name,
            path=model.path,
            sha256=hashes[model.path],
            runtime=model.runtime,
            device=device[0],
            origin=device[1],
            threads=request.threads,
            samples_ms=entry["samples_ms"],
            cpu_samples_ms=entry["cpu_samples_ms"],
            reference_ms=entry["reference_ms"],
            load_ms=entry["load_ms"],
            peak_memory_mb=conditions["peak_memory_mb"],
            compute_unit=conditions["compute_unit"],
            temperature_before_c=conditions["temperature_before_c"],
            temperature_after_c=conditions["temperature_after_c"],
            started_at=conditions["started_at"],
            versions=versions,
            cpus=conditions.get("cpus") or (),
            operators=entry["operators"],
        )


def _hash_all(models: tuple[BenchModel, ...]) -> tuple[dict[str, str], list[Failure]]:
    """sha256 by path of the files that can be measured here, and a failure for each of the others."""
    hashes: dict[str, str] = {}
    failures = []
    for model in models:
        message, remedy = "", "check the path, or export the model again"
        if model.runtime not in PACKAGES:
            message = f"this machine runs {' and '.join(PACKAGES)} files, not {model.runtime}"
            remedy = "measure this file on a device that runs it"
        else:
            try:
                if not stat.S_ISREG(os.stat(model.path).st_mode):  # a pipe would wait for its writer
                    raise OSError(errno.EINVAL, "it is no plain file")
                with Path(model.path).open("rb") as file:
                    hashes[model.path] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                message = f"{model.path} cannot be read: {error.strerror or error}"
        if message:
            failures.append(Failure(stage="load", subject=model.name, message=message, remedy=remedy))
    return hashes, failures


def _not_started(device: str, error: OSError) -> Failure:
    return Failure(
        stage="measure",
        subject=device,
        message=f"the measuring process could not be started or read: {error.strerror or error}",
        remedy=f"make sure that there is room in {tempfile.gettempdir()} and that it can be written",
    )


def _crash(reply: Reply, subject: str) -> Failure:
    verb = {"load": "loaded", "warm": "ran"}[reply.stage.partition(" ")[0]]
    return Failure(
        stage="load" if verb == "loaded" else "measure",
        subject=subject,
        message=f"the measuring process {reply.how} while it {verb} the file",
        remedy=SIGNAL_REMEDIES.get(_signal_name(reply.returncode), "run the file by itself"),
    )


def _unfinished(reply: Reply, request: BenchRequest, measurements: list[Measurement]) -> list[Failure]:
    """A row for each model that was to be measured and was not finished."""
    if reply.timed_out:
        remedy = "allow more time (timeout_seconds), or measure fewer models at once"
    else:
        remedy = SIGNAL_REMEDIES.get(_signal_name(reply.returncode), "run the command again")
    counts = {measurement.model: len(measurement.samples_ms) for measurement in measurements}
    known = {entry["index"] for entry in (reply.document or {}).get("failures", [])}
    stage = "operators" if reply.stage.startswith("operators") else "measure"
    return [
        Failure(
            stage=stage,
            subject=model.name,
            message=f"the measuring process {reply.how}; {counts.get(model.name, 0)} rounds were kept",
            remedy=remedy,
        )
        for index, model in enumerate(request.models)
        if index not in known
    ]


# ---------------------------------------------------------------- the machine


def _soc() -> str:
    """Name of the processor: x86 has "model name", Arm boards "Hardware" or the device tree's model."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, colon, value = line.partition(":")
            if colon:
                fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    try:
        tree = Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        tree = ""
    named = fields.get("model name") or tree or fields.get("Hardware") or fields.get("Model")
    return named or platform.processor() or platform.machine() or "unknown"


def _memory_mb() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**6
    except (AttributeError, ValueError, OSError):
        return None


def _versions() -> dict[str, str]:
    versions = {}
    for runtime, packages in PACKAGES.items():
        for package in reversed(packages):
            try:
                versions[runtime] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
    return versions
