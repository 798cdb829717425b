"""Measures the final files on further devices, all of them at the same time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from mobilekit.errors import MobilekitError, StorageError
from mobilekit.interfaces import Device
from mobilekit.pipeline.run import Recorded, Run
from mobilekit.pipeline.shipping import FinalRuns, Shipped, compared_files, measured_files, result_of
from mobilekit.pipeline.together import on_each
from mobilekit.types import DeviceInfo, ExportedModel, Value


class FurtherRuns(Value):
    """What one more device measured."""

    device: str
    info: DeviceInfo
    final: FinalRuns = Field(default_factory=FinalRuns)


def measure_elsewhere(run: Run, shipped: list[Shipped]) -> list[FurtherRuns]:
    """Original and result in turn, and the other files, on every further device.

    A device that cannot be reached or does not run the files is a failure of its own; a resumed run asks it again.
    """
    if not run.job.others or not shipped:
        return []
    found = on_each(run.job.others, lambda device: _measure_on(run, device, shipped))
    return [one for one in found if one is not None]


def _measure_on(run: Run, device: Device, shipped: list[Shipped]) -> FurtherRuns | None:
    # names of devices hold what file names must not; the digest tells apart those that are alike without it
    stage = f"measure on {re.sub(r'[^A-Za-z0-9.]+', '-', device.name)}"
    if not stage.endswith(f" {device.name}"):
        stage += f" {hashlib.sha256(device.name.encode()).hexdigest()[:6]}"
    there = replace(run, job=replace(run.job, device=device, others=()), stages=run.stages.told_as(stage))
    try:
        return run.stages.run(stage, FurtherRuns, lambda: _measured(there, device, shipped))
    except StorageError:
        raise
    except MobilekitError as error:  # not kept as finished: a resumed run tries again
        run.fail("measure", device.name, error, "run again with --resume: everything else is kept")
        return None


def _measured(run: Run, device: Device, shipped: list[Shipped]) -> FurtherRuns:
    info = device.info()
    run = replace(run, info=info)
    models = [s.model for s in shipped]
    known = [model for model in models if not info.versions or model.runtime in info.versions]
    if info.origin == "emulator":
        return FurtherRuns(device=device.name, info=info, final=_untimed(run, known))
    result = result_of(run, known)
    if result is None:
        wanted = run.job.runtime.name
        raise MobilekitError(f"it does not run {wanted} files: install that runtime there (`mobilekit doctor`)")
    return FurtherRuns(device=device.name, info=info, final=measured_files(run, result, known))


def _untimed(run: Run, models: Sequence[ExportedModel]) -> FinalRuns:
    """What an emulator says of the files: not how long they take. One that does not run there costs only itself."""
    others: dict[str, Recorded] = {}
    for model in models:
        try:
            others |= compared_files(run, [model])
        except StorageError:
            raise
        except MobilekitError:  # its failure is kept
            continue
    return FinalRuns(others=others)
