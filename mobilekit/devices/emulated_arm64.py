"""A 64-bit Arm processor, emulated: runs files with Arm's builds of their runtimes, and never tells a latency."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobilekit.devices import _arm64_install, _arm64_root, _beside_host, _process, _session
from mobilekit.errors import BadInputError
from mobilekit.types import BenchRequest, BenchResult, DeviceInfo, DeviceSettings, Failure, Measurement

REMEDY_TIME = "measure on a board (--device ssh:USER@HOST) or a phone (--device adb)"
TIMELESS: dict[str, Any] = {
    "samples_ms": (), "cpu_samples_ms": (), "reference_ms": (), "operators": (), "load_ms": None, "first_run_ms": None,
    "warmup": None, "stable": None, "peak_memory_mb": None, "energy_mj": None, "cpus": (), "throttled": None,
    "temperature_before_c": None, "temperature_after_c": None, "thermal_before": None, "thermal_after": None,
    "waited_seconds": None, "cool_to_c": None,
}  # fmt: skip
"""What was taken of this machine and its emulator, and says nothing about an Arm processor."""
ASKED: dict[str, Any] = {
    "cores": "any", "warmup": 0, "warm_until_stable": False, "runs": 1, "least_runs": 0, "least_seconds": 0.0,
    "cool_to_c": None, "cool_seconds": 0.0, "return_outputs": True, "reference": False, "per_operator": False,
    "threads": 1,
}  # fmt: skip
"""One run, and the outputs: more runs would be the same again. One thread, as there is one core: threads that wait for
others spin, and their instructions would be counted as the model's."""


def install(progress: Callable[[str, float], None]) -> None:
    """Install what this device needs. Raises MobilekitError, in one sentence, where that cannot be done here."""
    _arm64_install.install(progress)


class EmulatedArm64:
    """One Cortex-A76 under QEMU's user mode: outputs beside this machine's, and instructions of a run.

    >>> EmulatedArm64().name
    'emulated-arm64'
    """

    name = "emulated-arm64"
    takes: tuple[str, ...] = ()

    def __init__(self, address: str = "", settings: DeviceSettings | None = None) -> None:
        if address:
            raise BadInputError(
                f"the device '{self.name}' takes no address, but got '{address}': write just '{self.name}'"
            )

    @classmethod
    def visible(cls) -> list[str]:
        """The emulated machine, once it is installed."""
        return [] if cls.unavailable() else [cls.name]

    @classmethod
    def unavailable(cls) -> str | None:
        """Why it cannot be started, with the command that installs it."""
        lacking = _arm64_root.missing()
        return None if lacking is None else ": ".join(lacking)

    def info(self) -> DeviceInfo:
        """What is emulated. Raises DeviceError where it is not installed."""
        found = _found()
        return DeviceInfo(
            name=self.name,
            kind="emulator",
            origin="emulator",
            soc=f"{_arm64_root.CPU_NAME}, emulated by {found.qemu}",
            cores=1,
            memory_mb=None,
            os=f"Debian {found.suite} (arm64), Python {found.python}",
            versions={name: version for name, version in found.versions.items() if name in _session.PACKAGES},
            architecture="aarch64",
        )

    def run(self, request: BenchRequest) -> BenchResult:
        """Run each model once, whatever the request says of runs, and compare its outputs with this machine's.

        Measurements hold no samples. Times of operators, and instructions where they cannot be counted, are Failures.
        """
        asked = request.model_copy(update=ASKED)
        result = _session.run(asked, _session.Identity(self.name, "emulator"), _start)
        compared, failures = _beside_host.compared(result.measurements, asked)
        found = _arm64_root.installed()
        unit = f"{_arm64_root.CPU_NAME}, emulated by {found.qemu}" if found else "emulated"
        timeless = {**TIMELESS, "compute_unit": unit, **({} if request.return_outputs else {"outputs": ()})}
        measurements = tuple(measurement.model_copy(update=timeless) for measurement in compared)
        refusals = [*_refused(request, measurements), *_uncounted(measurements)]
        return BenchResult(measurements=measurements, failures=(*result.failures, *failures, *refusals))


def _found() -> _arm64_root.Installed:
    """What is installed. Raises DeviceError where something is missing."""
    reason, found = _arm64_root.missing(), _arm64_root.installed()
    if reason is not None or found is None:
        gone = ("the emulated Arm machine is gone", _arm64_root.COMMAND)
        raise _session.DeviceError(_session.Trouble(*(reason or gone)))
    return found


def _start(request: BenchRequest, timeout: float) -> _session.Reply:
    """Run the measuring script in it. Raises DeviceError where it is not installed."""
    found, place = _found(), _arm64_root.folder()
    with tempfile.TemporaryDirectory(prefix="mobilekit-") as folder:
        counts = None if found.without_counter else Path(folder) / "counts"
        python = _arm64_root.python(place, found.python, counts)
        return _process.start(request, timeout, python, _arm64_root.environment(place, counts))


def _refused(request: BenchRequest, measurements: tuple[Measurement, ...]) -> list[Failure]:
    """Why the operators were not timed, where that was asked for."""
    message = "an emulator's times say nothing about a processor: its operators were not timed"
    return [
        Failure(stage="operators", subject=measurement.model, message=message, remedy=REMEDY_TIME)
        for measurement in measurements
        if request.per_operator
    ]


def _uncounted(measurements: tuple[Measurement, ...]) -> list[Failure]:
    """Why instructions were not counted."""
    found = _arm64_root.installed()
    reason = found.without_counter if found else ""
    return [
        Failure(
            stage="instructions",
            subject=measurement.model,
            message=f"its instructions were not counted: {reason or 'the run behind the outputs did not end'}",
            remedy=f"sudo apt install qemu-user gcc, then {_arm64_root.COMMAND}",
        )
        for measurement in measurements
        if measurement.instructions is None
    ]
