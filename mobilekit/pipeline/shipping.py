"""Writes the files of the settled plan, checks each against PyTorch, and measures them."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field
from torch import nn

from mobilekit import manifest, registry
from mobilekit.bench import golden
from mobilekit.cost.work import QUANTISED
from mobilekit.drift import Fall, first_fall
from mobilekit.errors import MobilekitError, StorageError
from mobilekit.evaluate import SessionModule, accuracy, file_parity, named_results
from mobilekit.exportable import Exportable, of_workload
from mobilekit.files import disk
from mobilekit.interfaces import Runtime
from mobilekit.pipeline.measuring import PARITY, WRONG_OUTPUTS
from mobilekit.pipeline.original import file_size
from mobilekit.pipeline.paired import VERDICT, Sessions, paired, profiled
from mobilekit.pipeline.run import Recorded, Run, bench_model, export_job, for_int8
from mobilekit.signature import OUTPUT, input_names
from mobilekit.store import Store
from mobilekit.types import (
    Candidate,
    ExportedModel,
    ExportOptions,
    Measurement,
    Parity,
    ParityCheck,
    Precision,
    Untraced,
    Value,
)

PARITY_SAMPLES = 64
LEAST_SQNR_DB: dict[Precision, float] = {"fp32": 60.0, "fp16": 30.0, "int8": 10.0}
"""Files below are not shipped. Healthy ones reach 100, 45 and 18 dB or more; broken int8 conversions give 2 to 5."""


# ---------------------------------------------------------------- files


class Shipped(Value):
    """An exported file that passed."""

    model: ExportedModel
    accuracy: float | None
    """Of the file itself; None where it cannot be run here."""


def export_all(run: Run, candidate: Candidate) -> list[Shipped]:
    """The candidate in every runtime of this machine: the planned one first, so that the main file is early."""
    names = [run.job.runtime.name, *(n for n in registry.names("runtimes") if n != run.job.runtime.name)]
    jobs: list[tuple[Runtime, Precision]] = []
    for name in names:
        runtime = registry.runtime(name)
        reason = runtime.unavailable()
        if reason:
            run.fail("export", f"{name} files", MobilekitError(reason), reason)
            continue
        precisions: list[Precision] = ["fp16" if name == "coreml" else runtime.precisions[0]]
        if candidate.quant is not None:
            precisions.insert(0, "int8")
        jobs += [(runtime, precision) for precision in precisions]
    shipped = []
    for runtime, precision in jobs:
        subject = file_name(run.job.workload.name, runtime, precision)
        try:
            shipped.append(_shipped(run, candidate, runtime, precision))
        except StorageError:
            raise
        except MobilekitError as error:  # not kept as finished: a resumed run tries again
            run.fail("export", subject, error, "use another runtime or precision; the other files are not affected")
    source = of_workload(run.job.workload)
    write_manifest(Store(run.store.path("models")), candidate, [s.model for s in shipped], source)
    return shipped


def _shipped(run: Run, candidate: Candidate, runtime: Runtime, precision: Precision) -> Shipped:
    stage = f"export {runtime.name} {precision}"
    return run.stages.run(stage, Shipped, lambda: _ship(run, candidate, runtime, precision))


def _ship(run: Run, candidate: Candidate, runtime: Runtime, precision: Precision) -> Shipped:
    workload = run.job.workload
    path = run.store.path("models", file_name(workload.name, runtime, precision))
    model = write_checked(candidate, runtime, precision, path, of_workload(workload), run.export_options)
    found = None
    if model.parity.status == "executed":
        try:
            found = accuracy(workload, SessionModule(runtime.open(Path(model.path))))
        except StorageError:
            raise
        except MobilekitError as error:  # it worked on the module: the file may still be used
            run.fail("accuracy", Path(model.path).name, error, "let evaluate(model) only call the model on batches")
    relative = str(Path(model.path).relative_to(run.store.folder))
    return Shipped(model=model.model_copy(update={"path": relative}), accuracy=found)


def file_name(name: str, runtime: Runtime, precision: Precision) -> str:
    """`net.onnx`, `net.int8.onnx`: a format's float file has the plain name."""
    return name + (".int8" if precision == "int8" else "") + runtime.suffix


def write_checked(
    candidate: Candidate | Untraced,
    runtime: Runtime,
    precision: Precision,
    path: Path,
    source: Exportable,
    options: ExportOptions | None = None,
) -> ExportedModel:
    """Write a file, reopen it and compare it with the module on calibration inputs, random ones and at the edges.

    Raises MobilekitError, and leaves no file, where the comparison falls below `LEAST_SQNR_DB`: of a float file on any
    kind of inputs; of an int8 file on calibration inputs, since others may leave the ranges that these fixed.
    """
    with disk(path):
        runtime.export(export_job(candidate, precision, path, source, options))
    try:
        parity = file_parity(runtime, path, candidate.module, source.calibration_arrays(PARITY_SAMPLES))
        failed = failed_check(parity, precision)
        if failed is not None:
            fall = _fall(runtime, path, candidate.module, source, LEAST_SQNR_DB[precision])
            raise MobilekitError(_said(path, failed, LEAST_SQNR_DB[precision]) + (f"; {fall}" if fall else ""))
        return ExportedModel(
            path=str(path),
            runtime=runtime.name,
            precision=precision,
            sha256=file_sha256(path),
            size_bytes=file_size(path),
            facts=runtime.describe(path),
            parity=parity,
            not_int8=not_int8(candidate, runtime) if precision == "int8" else {},
        )
    except MobilekitError:
        _remove(path)
        raise


def not_int8(candidate: Candidate | Untraced, runtime: Runtime) -> dict[str, str]:
    """Operators of a kind that has an int8 form which stay in float in this runtime's file, and why."""
    if isinstance(candidate, Untraced) or candidate.quant is None or candidate.quant.activations != "static":
        return {}
    asked, network = candidate.quant.operators, candidate.network
    found = {}
    for operator in network.operators:
        if asked.get(operator.name) == "int8":
            reason = runtime.supports(network.shape(operator), "int8")
            if reason:
                found[operator.name] = reason
        elif operator.kind in QUANTISED:
            found[operator.name] = "left in float: rounding it harms more than it saves"
    return found


def failed_check(parity: Parity, precision: Precision) -> ParityCheck | None:
    """The first kind of inputs on which a file is too far from the network; None: it may be shipped."""
    judged = [check for check in parity.checks if check.kind == "calibration" or precision != "int8"]
    least = LEAST_SQNR_DB[precision]
    return next((check for check in judged if check.judged_db is not None and check.judged_db < least), None)


def _said(path: Path, failed: ParityCheck, least: float) -> str:
    where = "" if failed.output == OUTPUT else f" in {failed.output}"
    found = f"{path.name} has {failed.judged_db:.1f} dB to the PyTorch network{where}"
    return f"{found} on {failed.kind} inputs, less than {least:.0f}"


def _fall(runtime: Runtime, path: Path, module: nn.Module, source: Exportable, least_db: float) -> Fall | None:
    """The operator where a failed file departs from the network on its first calibration input, if it can be found."""
    sample = source.calibration_arrays(1)[0]
    try:
        return first_fall(module, sample, runtime.tensors(path, sample), least_db)
    except MobilekitError:
        return None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_manifest(
    store: Store, candidate: Candidate | Untraced, models: list[ExportedModel], source: Exportable
) -> None:
    """Describe the files for apps, with golden vectors of the module that they were written from."""
    module, quantisation = candidate.module, None
    if any(model.precision == "int8" for model in models):
        prepared = for_int8(candidate, source)
        quantisation = prepared.quant if isinstance(prepared, Candidate) else None
    batches = source.calibration_arrays(manifest.GOLDEN_SAMPLES)
    inputs = tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))
    manifest.write(
        store,
        models,
        dict(zip(input_names(module, len(inputs)), inputs, strict=True)),
        named_results(module, inputs),
        source,
        quantisation=quantisation,
    )


def file_sha256(path: Path) -> str:
    """sha256 of a file; of a package folder, over its files in order of name, names included."""
    digest = hashlib.sha256()
    if path.is_dir():
        for part in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(part.relative_to(path).as_posix().encode() + b"\0")
            digest.update(part.read_bytes())
    else:
        digest.update(path.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- the last measurement


class FinalRuns(Value):
    """The measurement that the verdict rests on, the other files', and the profiler's times per operator."""

    sessions: Sessions = ()
    """Original and result, in each session in turn."""
    others: dict[str, Recorded] = Field(default_factory=dict)
    profiled: tuple[Recorded, ...] = ()
    peak_memory_mb: float | None = None
    """Only measured where the budget limits it: it takes a process of its own."""


def measure_all(run: Run, shipped: list[Shipped]) -> FinalRuns:
    """Original and result in turn, for the verdict; then every other file that the device runs; then operators."""
    result = result_of(run, [s.model for s in shipped])
    if run.job.device is None or result is None:
        return FinalRuns()
    try:
        runnable = {entry.format for entry in run.job.profile.runtimes}
        models = [s.model for s in shipped if s.model.runtime in runnable]
        return run.stages.run("measure", FinalRuns, lambda: measured_files(run, result, models))
    except StorageError:
        raise
    except MobilekitError as error:  # not kept as finished: a resumed run measures again
        run.fail("measure", result.path, error, "run again with --resume: everything before is kept")
        return FinalRuns()


def measured_files(run: Run, result: ExportedModel, models: Sequence[ExportedModel]) -> FinalRuns:
    """Original and result in turn on the run's device; then the others of `models`; then what their kernels take.

    Raises MobilekitError where original or result does not run there; for the rest that is a failure beside them.
    """
    path = run.store.path(result.path)
    sessions, _ = paired(run, "measure", "result", path, VERDICT)
    run.stages.progress("measure", 0.8)
    others: dict[str, Recorded] = {}
    kernels: tuple[Recorded, ...] = ()
    peak: float | None = None
    try:
        others = compared_files(run, models)
        run.stages.progress("measure", 0.9)
        kernels = profiled(run, "result", path)
        if run.job.request.budget.peak_memory_mb is not None:
            alone = bench_model("result", path, run.job.runtime.name)
            peak = run.measure([alone], runs=20)[0].measurement.peak_memory_mb
    except StorageError:
        raise
    except MobilekitError as error:
        run.fail("measure", "files beside the result", error, "measure them alone: mobilekit measure FILE")
    return FinalRuns(sessions=sessions, others=others, profiled=kernels, peak_memory_mb=peak)


def compared_files(run: Run, models: Sequence[ExportedModel]) -> dict[str, Recorded]:
    """The files in turn, fed the golden inputs: each with the parity of its outputs on the run's device.

    Wrong outputs are a failure beside it. Raises MobilekitError where one does not run there.
    """
    with tempfile.TemporaryDirectory(prefix="mobilekit-") as folder:
        vectors, files = {}, []
        for number, model in enumerate(models):
            path = run.store.path(model.path)
            file = bench_model(model.path, path, model.runtime)
            found = golden.of(path)
            if found is not None:
                vectors[str(path)] = found
                file = file.model_copy(update={"inputs": golden.write(found, Path(folder), str(number))})
            files.append(file)

        def checked(measurement: Measurement) -> Measurement:
            if measurement.path not in vectors:
                return measurement
            found, wrong = golden.compared(vectors[measurement.path], measurement)
            if wrong is not None:
                run.fail(PARITY, measurement.model, MobilekitError(f"{measurement.device}: {wrong}"), WRONG_OUTPUTS)
            return found

        recorded = run.measure(files, checked, return_outputs=bool(vectors))
    return {model.path: one for model, one in zip(models, recorded, strict=True)}


def result_of(run: Run, models: Iterable[ExportedModel]) -> ExportedModel | None:
    """The file that answers the budget: the planned runtime, in int8 where the plan says so."""
    own = [m for m in models if m.runtime == run.job.runtime.name]
    return next((m for m in own if m.precision == "int8"), own[0] if own else None)
