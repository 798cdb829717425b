"""The state of one run, and the two things that every stage does: measure files and export candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from mobilekit import bench
from mobilekit.errors import MobilekitError, UnsupportedError
from mobilekit.exportable import Exportable, of_workload
from mobilekit.files import disk
from mobilekit.interfaces import Runtime
from mobilekit.pipeline.request import Job
from mobilekit.pipeline.stages import Stages
from mobilekit.store import Store
from mobilekit.transforms import int8
from mobilekit.types import (
    BenchModel,
    Calibration,
    Candidate,
    DeviceInfo,
    ExportJob,
    ExportOptions,
    Failure,
    Measurement,
    Network,
    Precision,
    Untraced,
    Value,
)


class Recorded(Value):
    """A measurement and the line of measurements.jsonl that holds it."""

    measurement: Measurement
    line: int


@dataclass(frozen=True)
class Run:
    """A job with its folder and its stages."""

    job: Job
    store: Store
    stages: Stages
    info: DeviceInfo | None = None
    """What the device is; None: there is none, or it was not asked."""

    @property
    def float_precision(self) -> Precision:
        """What an unquantised network runs in: the first precision of the profile's entry."""
        return self.job.entry.precisions[0]

    @property
    def export_options(self) -> ExportOptions:
        """Files are for the processor of the device, else of the profile: phones and boards have Arm ones."""
        known = self.info.target if self.info else None
        return ExportOptions(target=known or ("host" if self.job.profile.kind == "host" else "arm"))

    def start(self, network: Network) -> Candidate:
        """The original as a candidate."""
        return self.job.workload.candidate(network)

    def export(
        self, candidate: Candidate, runtime: Runtime, precision: Precision, path: Path, *, timed_only: bool = False
    ) -> None:
        """Write a file, calibrated where it is int8; with `timed_only` its weights do not matter."""
        precision, workload = written(precision, runtime), self.job.workload
        with disk(path):
            if timed_only:
                batches = workload.calibration_arrays()
                runtime.export(ExportJob(candidate, precision, str(path), batches, self.export_options))
            else:
                runtime.export(export_job(candidate, precision, path, of_workload(workload), self.export_options))

    def measure(
        self,
        models: Sequence[BenchModel],
        checked: Callable[[Measurement], Measurement] = lambda measurement: measurement,
        **settings: Unpack[bench.Settings],
    ) -> list[Recorded]:
        """Time models in turn and keep the raw samples. Raises MobilekitError when one of them does not run.

        `checked` sees each measurement before it is kept.
        """
        device = self.job.device
        if device is None:
            raise UnsupportedError("no device was given to measure on")
        protocol: bench.Settings = {**bench.COMPARE, **settings}
        if self.job.request.cool_to_c is not None:
            protocol |= {"cool_to_c": self.job.request.cool_to_c, "cool_seconds": bench.COOL_SECONDS}
        result = bench.measure(device, models, **protocol)
        for failure in result.failures:
            self.stages.fail(failure)
        if len(result.measurements) < len(models):
            first = result.failures[0] if result.failures else None
            reason = f"{first.subject}: {first.message} ({first.remedy})" if first else "the device sent no samples"
            raise MobilekitError(f"{device.name} could not measure every model: {reason}")
        kept = [checked(measurement) for measurement in result.measurements]
        return [Recorded(measurement=m, line=self.store.append("measurements.jsonl", m)) for m in kept]

    def fail(self, stage: str, subject: str, error: MobilekitError, remedy: str) -> None:
        """A failure that the run survives."""
        self.stages.fail(Failure(stage=stage, subject=subject, message=str(error), remedy=remedy))


def written(precision: Precision, runtime: Runtime) -> Precision:
    """The precision of the file that runs in this one: a format without half precision is written in float32, and the
    device's runtime rounds it when it loads the file."""
    return precision if precision in runtime.precisions else runtime.precisions[0]


def export_job(
    candidate: Candidate | Untraced,
    precision: Precision,
    path: Path,
    source: Exportable,
    options: ExportOptions | None = None,
) -> ExportJob:
    """What a runtime is asked for: an int8 file is calibrated, and its weights are prepared (`int8.for_file`)."""
    options = options or ExportOptions()
    if precision != "int8":
        return ExportJob(candidate, precision, str(path), options=options)
    # what is rounded for int8 is no better a start for coarser forms of weights
    ready = for_int8(candidate, source) if options.weights == "int8" else candidate
    return ExportJob(ready, precision, str(path), source.calibration_arrays(), options)


def for_int8(candidate: Candidate | Untraced, source: Exportable) -> Candidate | Untraced:
    """What int8 files are written from: weights prepared, and ranges of activations in the QuantSpec."""
    if isinstance(candidate, Untraced):
        return candidate
    return int8.for_file(candidate, Calibration(tuple(batch for (batch,) in source.calibration)))


def bench_model(name: str, path: Path, runtime: str) -> BenchModel:
    """A file to time."""
    return BenchModel(name=name, path=str(path), runtime=runtime)
