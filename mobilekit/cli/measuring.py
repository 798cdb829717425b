"""The command that times model files: measure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mobilekit.cli.terminal import (
    CoolTo,
    DeviceSpec,
    JsonFlag,
    Runner,
    Wheels,
    device_settings,
    documents,
    errors,
    figure,
    listed,
)
from mobilekit.errors import BadInputError
from mobilekit.types import Cores, Measurement, Parity

if TYPE_CHECKING:
    from mobilekit.pipeline import Measured

CORES: dict[str, Cores] = {"any": "any", "big": "big", "little": "little"}


def measure(  # noqa: PLR0913, PLR0917 -- the options are the contract
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A model file, or a folder that holds some.")],
    device: DeviceSpec = None,
    devices: Annotated[
        str | None, typer.Option("--devices", help="Several devices, commas between: all at the same time.")
    ] = None,
    runner: Runner = None,
    wheels: Wheels = None,
    threads: Annotated[int, typer.Option("--threads", min=1, max=1024, help="Threads of the runtime.")] = 1,
    runs: Annotated[
        int | None, typer.Option("--runs", min=1, help="Most rounds [default: at least 50, and 5 s].")
    ] = None,
    mlperf: Annotated[bool, typer.Option("--mlperf", help="At least 1,024 rounds and 60 s.")] = False,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="FILE", help="Runs in turn with the files: ratios to it.")
    ] = None,
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Measure so many times, and say how well the figures repeat.")
    ] = 1,
    cores: Annotated[str, typer.Option("--cores", help="Cluster of CPUs: any, big or little.")] = "any",
    cool_to: CoolTo = None,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="Each file in a process of its own, with time to cool down between.")
    ] = False,
    parity: Annotated[
        bool, typer.Option("--parity/--no-parity", help="Compare outputs on the device with a manifest's golden ones.")
    ] = True,
    as_json: JsonFlag = False,
) -> None:
    """Time model files on a device, in turn, with raw samples."""
    if cores not in CORES:
        raise BadInputError(f"--cores is any, big or little, not '{cores}'")

    if device is not None and devices is not None:
        raise BadInputError("give --device or --devices, not both")

    from mobilekit import pipeline, registry

    specs = listed(devices) or ("host" if device is None else device,)
    chosen = registry.devices(specs, device_settings(runner, wheels))
    timing = pipeline.Timing(
        threads, runs, mlperf, repeat, CORES[cores], cool_to, one_by_one, baseline, parity
    )  # fmt: skip
    found = pipeline.measure_files([path], chosen, timing)
    if as_json:
        names = ("measurements", "failures", "warnings", "ratios", "repeats")
        print(json.dumps({name: [value.model_dump(mode="json") for value in getattr(found, name)] for name in names}))
    else:
        for table in _tables(found):
            documents().print(table)
        for warning in found.warnings:
            errors.print(f"{warning}", style="yellow", markup=False, soft_wrap=True)
    for failure in found.failures:
        said = f"{failure.subject}: {failure.message}; {failure.remedy}"
        errors.print(said, style="red", markup=False, soft_wrap=True)
    if not found.sound:
        raise typer.Exit(1)


def _tables(found: Measured) -> Iterator[Table]:
    rows = Table(
        "file", "device", "origin", "CPU median ms", "p90", "min", "wall median", "to reference", "runs", "load ms",
        "first run ms", "peak MB", "mJ", "parity", box=None,
    )  # fmt: skip
    untimed = [measurement for measurement in found.measurements if not measurement.samples_ms]
    for measurement in found.measurements:
        if measurement.samples_ms:
            rows.add_row(*_cells(measurement))
    if rows.row_count or not untimed:
        yield rows
    if untimed:
        rows = Table("file", "device", "origin", "latency", "instructions", "parity", "beside this machine", box=None)
        for measurement in untimed:
            rows.add_row(*_untimed_cells(measurement))
        yield rows
    if found.ratios:
        rows = Table(
            "file",
            "device",
            "time to the baseline's",
            "90 % interval",
            "at full speed",
            "baseline",
            "sessions",
            box=None,
        )
        for ratio in found.ratios:
            low, high = ratio.interval
            rows.add_row(
                ratio.model,
                ratio.device,
                f"{ratio.ratio:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{ratio.fast_ratio:.3f}",
                ratio.baseline,
                str(ratio.sessions),
            )
        yield rows
    if found.repeats:
        rows = Table("file", "device", "medians ms", "spread", "ratios", "spread", "to", box=None)
        for row in found.repeats:
            rows.add_row(
                row.model, row.device, " ".join(f"{ms:.3f}" for ms in row.medians_ms), f"{row.median_spread:.1%}",
                " ".join(f"{ratio:.3f}" for ratio in row.ratios),
                "" if row.ratio_spread is None else f"{row.ratio_spread:.1%}", row.beside if row.ratios else "",
            )  # fmt: skip
        yield rows


def _cells(measurement: Measurement) -> Iterator[str]:
    from mobilekit import bench

    row = bench.row(measurement, "cpu", 0)
    cpu = row.median_ms if row.clock == "cpu" else None
    yield from (row_text for row_text in (measurement.model, measurement.device, measurement.origin))
    yield from (figure(value, ".3f") for value in (cpu, row.p90_ms, row.min_ms, row.wall_median_ms))
    yield figure(row.reference_ratio, ".4f")
    yield str(row.samples)
    yield from (figure(value, ".2f") for value in (row.load_ms, row.first_run_ms))
    yield from (figure(value, ".1f") for value in (row.peak_memory_mb, row.energy_mj))
    yield _closeness(row.parity)


def _untimed_cells(measurement: Measurement) -> Iterator[str]:
    """Of an emulator: what it counted, and how close its outputs are."""
    counted = measurement.instructions
    yield from (measurement.model, measurement.device, measurement.origin, "not measured")
    yield "not counted" if counted is None else f"{counted:,}"
    yield from (_closeness(measurement.parity), _closeness(measurement.beside_host))


def _closeness(parity: Parity | None) -> str:
    if parity is None:
        return "not compared"
    return "bit for bit" if parity.sqnr_db is None else f"{parity.sqnr_db:.1f} dB"
