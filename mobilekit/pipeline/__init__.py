"""The verbs: plan, build, apply, export, measure, report, and the host's profile."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mobilekit import exportable, registry
from mobilekit.cost.published import Selection
from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.pipeline import exporting, summary
from mobilekit.pipeline.comparing import compare_results
from mobilekit.pipeline.exporting import Order, export_workload
from mobilekit.pipeline.fitting import FitSummary, fit_profile
from mobilekit.pipeline.health import examine, install_emulator
from mobilekit.pipeline.listener import Listener
from mobilekit.pipeline.measuring import Measured, Timing, measure_files
from mobilekit.pipeline.pricing import build_profile, predict
from mobilekit.pipeline.request import Request, open_job, read_plan, request_of
from mobilekit.pipeline.sharing import Imported, import_result
from mobilekit.pipeline.steps import draw_steps
from mobilekit.pipeline.story import Course, tell
from mobilekit.store import Store
from mobilekit.types import (
    Budget,
    DeviceSettings,
    ExportedModel,
    ExportOptions,
    Measurement,
    Plan,
    Precision,
    Report,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = [
    "FitSummary",
    "Imported",
    "Listener",
    "Measured",
    "Order",
    "Request",
    "Selection",
    "Timing",
    "apply",
    "build",
    "build_profile",
    "compare_results",
    "draw_steps",
    "examine",
    "export",
    "export_workload",
    "fit_profile",
    "import_result",
    "install_emulator",
    "measure",
    "measure_files",
    "plan",
    "predict",
    "rerender",
    "run",
]


def run(request: Request, out: Path, listener: Listener, *, resume: bool = False, dry: bool = False) -> Report:
    """The whole job: plan, build, measure, report. What `mobilekit plan` does."""
    return tell(open_job(request), out, listener, Course(dry=dry), resume=resume)


def plan(
    workload: str,
    profile: str,
    budget: Budget,
    *,
    runtime: str | None = None,
    seed: int = 0,
) -> Plan:
    """What would be done to the workload, with reasons. Nothing is changed, trained or measured on a device.

    >>> import mobilekit as mk
    >>> p = mk.plan("mobilekit.workloads.fashion_mnist", profile="host", budget=mk.Budget(speedup=2))
    >>> p.runtime
    'onnx'
    """
    request = Request(workload=workload, profile=profile, budget=budget, runtime=runtime, seed=seed)
    with tempfile.TemporaryDirectory(prefix="mobilekit-") as folder:
        tell(open_job(request), Path(folder), Listener(), Course(dry=True))
        return read_plan(Path(folder, "plan.json"))


def build(made: Plan, out: str | Path, *, listener: Listener | None = None) -> Report:
    """Carry a plan out: measure it untrained, correct it where it does not fit, train, export, check, measure.

    >>> import mobilekit as mk
    >>> report = mk.build(p, out="build")  # doctest: +SKIP
    """
    job = open_job(request_of(made))
    return tell(job, Path(out), listener or Listener(), Course(given=made))


def apply(
    plan_file: Path,
    workload: str,
    out: Path,
    listener: Listener,
    *,
    settings: DeviceSettings | None = None,
    devices: Sequence[str] = (),
) -> Report:
    """Replay a saved plan exactly as it is on a workload. What `mobilekit apply` does."""
    made = read_plan(plan_file)
    request = replace(request_of(made, workload), settings=settings or DeviceSettings(), devices=tuple(devices))
    job = open_job(request)
    return tell(job, out, listener, Course(given=made, correct=False))


def export(  # noqa: PLR0913 -- the keywords are the contract
    module: torch.nn.Module,
    example_input: torch.Tensor | Sequence[torch.Tensor],
    *,
    to: Sequence[str],
    precision: Precision = "fp32",
    calibration: Sequence[np.ndarray | Sequence[np.ndarray]] = (),
    out: str | Path = "models",
    options: ExportOptions | None = None,
) -> list[ExportedModel]:
    """Write a module, as it is, in these formats, and compare each file with it.

    `example_input` is a float32 tensor (1, C, H, W), or a tensor or tuple of tensors of 2 to 5 axes, batch 1, for
    other networks; `calibration` are float32 batches (an array for each input): int8 ranges come from them, and the
    comparison is made on them. The module returns a tensor, or a tuple, list or dict of tensors. Raises BadInputError
    for an unknown format and MobilekitError where one cannot be written or differs from the module. `options` are the
    opset, the oldest iOS, an open batch and int8 inputs and outputs; without them opset 20, iOS 16, batch 1, float32.

    >>> import mobilekit as mk, torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    >>> [m.parity.status for m in mk.export(net, torch.zeros(1, 3, 16, 16), to=["onnx"], out=tmp)]
    ['executed']
    """
    source = exportable.of_module(module, example_input, calibration, "network")
    order = Order(tuple(to), precision, options or ExportOptions())
    written, failures = exporting.export(source, order, Path(out), Listener().progress)
    if failures:
        raise MobilekitError(f"{failures[0].subject}: {failures[0].message}")
    return written


def measure(path: str | Path, device: str = "host", *, threads: int = 1, runs: int | None = None) -> Measurement:
    """Time one model file on a device. Raises MobilekitError where it does not run there, or computes something else.

    Where a manifest lies beside the file, its outputs on the device are compared with the golden ones: `parity`.

    >>> import mobilekit as mk
    >>> mk.measure(model_file, device="host", runs=10).median_ms > 0
    True
    """
    if Path(path).is_dir() and Path(path).suffix != ".mlpackage":
        raise BadInputError(f"'{path}' is a folder: give one model file")
    found = measure_files([Path(path)], [registry.device(device)], Timing(threads=threads, runs=runs))
    if not found.sound:
        failure = found.failures[0]
        raise MobilekitError(f"{path} could not be measured: {failure.message}; {failure.remedy}")
    return found.measurements[0]


def rerender(folder: Path) -> Report:
    """Write report.html and report.md again from a folder's report.json."""
    report = summary.read_report(folder)
    summary.render(Store(folder), report)
    return report
