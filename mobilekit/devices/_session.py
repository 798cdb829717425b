"""One measurement as every kind of device carries it out: all that differs is how the runner is started there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mobilekit import documents
from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.types import (
    BenchModel,
    BenchRequest,
    BenchResult,
    Failure,
    Measurement,
    OperatorTime,
    Origin,
    RunnerMeasurement,
    RunnerRequest,
    RunnerResult,
    TensorData,
)

RUNNER = Path(__file__).with_name("_runner.py")
PROFILER = Path(__file__).with_name("_litert_profiler.py")
MACHINE = Path(__file__).with_name("_runner_machine.py")
MODELS = Path(__file__).with_name("_runner_models.py")
SCRIPTS = (RUNNER, PROFILER, MACHINE, MODELS)
"""All that has to lie beside the runner wherever that is copied."""
PACKAGES = {"onnx": ("onnxruntime",), "tflite": ("ai-edge-litert", "tflite-runtime")}
"""Runtime name -> the packages that bring it, best first."""
STAGE = re.compile(r"^(?:load \d+|warm \d+|rounds|operators|done)$", re.MULTILINE)
"""What the measuring script says; native libraries may print lines of their own."""
SIGNAL_REMEDIES = {
    "SIGKILL": "the system may have run out of memory: measure fewer or smaller models at once",
    "SIGSEGV": "the runtime crashed: try another version of it, or export the file again",
    "SIGABRT": "the runtime crashed: try another version of it, or export the file again",
}

NO_ROOM = ("No space left on device", "Disk quota exceeded", "File too large")
"""How a program that could not write its result says so."""


class Trouble(NamedTuple):
    """What went wrong with a device, and what helps."""

    message: str
    remedy: str


class DeviceError(MobilekitError):
    """The device could not be reached or made ready: nothing was measured."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(f"{trouble.message}: {trouble.remedy}")
        self.trouble = trouble


class Identity(NamedTuple):
    """A device as measurements name it."""

    name: str
    origin: Origin


@dataclass(frozen=True)
class Reply:
    """What a measuring process left: the bytes of its result (None: it wrote none) and how it ended."""

    document: bytes | None
    stage: str
    returncode: int
    timed_out: bool = False
    stderr: str = ""
    lost: Trouble | None = None
    """Why nothing is known of its end: the connection was lost."""

    @property
    def ended_early(self) -> bool:
        """Whether the process did not come to its own end."""
        return self.timed_out or self.lost is not None or self.returncode != 0

    @property
    def culprit(self) -> int | None:
        """Index of the one model that the process was loading or warming up when it crashed."""
        stage, _, index = self.stage.partition(" ")
        crashed = self.returncode != 0 and not self.timed_out and self.lost is None
        return int(index) if crashed and stage in ("load", "warm") else None

    @property
    def how(self) -> str:
        """How it ended, in words."""
        if self.lost is not None:
            return f"is out of reach: {self.lost.message}"
        if self.timed_out:
            return "was stopped because its time was over"
        if self.returncode < 0:
            return f"was ended by {signal_name(self.returncode)}"
        return f"ended with code {self.returncode} ({self.stderr or 'no message'})"

    @property
    def remedy(self) -> str:
        """What to do about an early end."""
        if self.lost is not None:
            return self.lost.remedy
        if self.timed_out:
            return "allow more time (timeout_seconds), or measure fewer models at once"
        if any(words in self.stderr for words in NO_ROOM):
            return "free some space on the disk of the device that measures"
        return SIGNAL_REMEDIES.get(signal_name(self.returncode), "run the command again")


Start = Callable[[BenchRequest, float], Reply]
"""Run the measuring program on a request, within so many seconds. Raises DeviceError or OSError where it cannot."""


def run(request: BenchRequest, device: Identity, start: Start) -> BenchResult:
    """Time the request's models with a device's way to start the measuring program.

    A file that is missing, cannot be loaded or crashes its runtime becomes a Failure and the others are measured. When
    the time is over, the process is killed or the connection lost, the rounds finished until then are kept, as far as
    they came over, and a Failure says so.
    """
    hashes, failures = hash_all(request.models)
    waiting = [model for model in request.models if model.path in hashes and model.runtime in PACKAGES]
    measurements: list[Measurement] = []
    deadline = time.monotonic() + request.timeout_seconds
    while waiting:
        asked = request.model_copy(update={"models": tuple(waiting)})
        try:
            reply = start(asked, max(0.0, deadline - time.monotonic()))
        except DeviceError as error:
            failures.append(_unmeasured(device.name, error.trouble))
            break
        except OSError as error:
            failures.append(_unmeasured(device.name, _not_started(error)))
            break
        if reply.culprit is not None and reply.culprit < len(waiting):
            failures.append(_crash(reply, waiting[reply.culprit].name))
            waiting.pop(reply.culprit)
            continue
        result = assemble(reply.document, asked, hashes, device)
        measurements += result.measurements
        failures += result.failures
        if reply.ended_early:
            failures += _unfinished(reply, asked, result)
        break
    return BenchResult(measurements=tuple(measurements), failures=tuple(failures))


def request_text(request: BenchRequest, place: Callable[[str], str]) -> str:
    """REQUEST.json; `place` says where a file of this machine, a model or its inputs, lies on the device."""
    models = [
        model.model_copy(update={"path": place(model.path), "inputs": tuple(map(place, model.inputs))})
        for model in request.models
    ]
    asked = RunnerRequest.model_validate({**dict(request), "models": tuple(models)})
    return asked.model_dump_json(by_alias=True)


def last_stage(output: str) -> str:
    """What the measuring script said last that it does."""
    stages = STAGE.findall(output)
    return stages[-1] if stages else "start"


def signal_name(returncode: int) -> str:
    """The name of the signal that a negative exit code stands for."""
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


# ---------------------------------------------------------------- from the reply to the result


def assemble(document: bytes | None, request: BenchRequest, hashes: dict[str, str], device: Identity) -> BenchResult:
    """Turn what the measuring program wrote, which is not trusted, into validated values.

    `hashes` is sha256 by model path. A document that does not validate becomes a Failure.
    """
    if document is None:
        return BenchResult(measurements=())
    try:
        found = documents.parse(document, RunnerResult, "the measuring program's answer")
        indices = [entry.index for entry in found.measurements] + [entry.index for entry in found.failures]
        if max(indices, default=0) >= len(request.models):
            raise BadInputError("the measuring program's answer is of a model that it was not asked for")
    except BadInputError as error:
        remedy = "run the measurement again; with a --runner of your own, check it against docs/bench_protocol.md"
        return BenchResult(measurements=(), failures=(_unmeasured(device.name, Trouble(str(error), remedy)),))
    failures = tuple(
        Failure(stage=f.stage, subject=request.models[f.index].name, message=f.message, remedy=f.remedy)
        for f in found.failures
    )
    return BenchResult(measurements=tuple(_measurements(found, request, hashes, device)), failures=failures)


def _measurements(
    found: RunnerResult, request: BenchRequest, hashes: dict[str, str], device: Identity
) -> Iterator[Measurement]:
    conditions = found.conditions
    for entry in found.measurements:
        if not (entry.samples_ms or entry.outputs):  # ended before the first round was complete
            continue
        model = request.models[entry.index]
        versions = {
            name: version
            for name, version in conditions.versions.items()
            if name == model.runtime or name not in PACKAGES
        }
        yield Measurement(
            model=model.name,
            path=model.path,
            sha256=hashes[model.path],
            runtime=model.runtime,
            device=device.name,
            origin=device.origin,
            threads=request.threads,
            compute_unit=conditions.compute_unit,
            temperature_before_c=conditions.temperature_before_c,
            temperature_after_c=conditions.temperature_after_c,
            thermal_before=conditions.thermal_before,
            thermal_after=conditions.thermal_after,
            throttled=conditions.throttled,
            cool_to_c=request.cool_to_c,
            waited_seconds=conditions.waited_seconds,
            started_at=conditions.started_at.isoformat(timespec="seconds"),
            versions=versions,
            cpus=conditions.cpus,
            **_of_the_model(entry),
        )


def _of_the_model(entry: RunnerMeasurement) -> dict[str, Any]:
    same = ("samples_ms", "cpu_samples_ms", "reference_ms", "load_ms", "first_run_ms", "warmup", "peak_memory_mb")
    return {
        **{name: getattr(entry, name) for name in (*same, "stable", "energy_mj", "instructions")},
        "operators": tuple(OperatorTime(**dict(operator)) for operator in entry.operators),
        "outputs": tuple(TensorData(**dict(output)) for output in entry.outputs),
    }


def hash_all(models: tuple[BenchModel, ...]) -> tuple[dict[str, str], list[Failure]]:
    """sha256 by path of the files that can be measured here, and a failure for each of the others."""
    hashes: dict[str, str] = {}
    failures = []
    for model in models:
        message, remedy = "", "check the path, or export the model again"
        if model.runtime not in PACKAGES:
            message = f"{' and '.join(PACKAGES)} files can be measured, not {model.runtime} ones"
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


def _unmeasured(device: str, trouble: Trouble) -> Failure:
    return Failure(stage="measure", subject=device, message=trouble.message, remedy=trouble.remedy)


def _not_started(error: OSError) -> Trouble:
    return Trouble(
        f"the measuring process could not be started or read: {error.strerror or error}",
        f"make sure that there is room in {tempfile.gettempdir()} and that it can be written",
    )


def _crash(reply: Reply, subject: str) -> Failure:
    verb = {"load": "loaded", "warm": "ran"}[reply.stage.partition(" ")[0]]
    return Failure(
        stage="load" if verb == "loaded" else "measure",
        subject=subject,
        message=f"the measuring process {reply.how} while it {verb} the file",
        remedy=SIGNAL_REMEDIES.get(signal_name(reply.returncode), "run the file by itself"),
    )


def _unfinished(reply: Reply, request: BenchRequest, result: BenchResult) -> list[Failure]:
    """A row for each model that was to be measured and was not finished."""
    counts = {measurement.model: len(measurement.samples_ms) for measurement in result.measurements}
    known = {failure.subject for failure in result.failures}
    stage = "operators" if reply.stage.startswith("operators") else "measure"
    return [
        Failure(
            stage=stage,
            subject=model.name,
            message=f"the measuring process {reply.how}; {counts.get(model.name, 0)} rounds were kept",
            remedy=reply.remedy,
        )
        for model in request.models
        if model.name not in known
    ]
