"""The commands of device profiles: list, show, validate, build, fit, predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mobilekit.cli.terminal import JsonFlag, Runner, Wheels, device_settings, documents, figure, listening
from mobilekit.errors import BadInputError

if TYPE_CHECKING:
    from mobilekit.types import DeviceProfile

app = typer.Typer(
    help="Device profiles: list, show, validate, build, fit, predict.", no_args_is_help=True, rich_markup_mode=None
)
SHORT = 45
"""Characters of an SoC's description that a line of the list has room for; a longer one loses its clocks."""
Name = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A shipped profile, or a .json file.")]


@app.command("list")
def list_(as_json: JsonFlag = False) -> None:
    """The shipped profiles with their own prediction error."""
    from mobilekit import profiles

    known = [profiles.load(name) for name in profiles.names()]
    if as_json:
        print(json.dumps([p.model_dump(mode="json") for p in known], indent=2))
        return
    table = Table("name", "kind", "SoC", "prices", "own error", "confidence", box=None)
    for p in known:
        if not p.tables and p.kind == "host":
            table.add_row(p.name, p.kind, p.soc, ", ".join(r.name for r in p.runtimes), "measured at first use", "")
            continue
        soc = p.soc if len(p.soc) <= SHORT else p.soc.partition(" (")[0]
        priced = ", ".join(f"{r.name} {'/'.join(r.precisions)}" for r in p.runtimes)
        table.add_row(p.name, p.kind, soc, priced, figure(p.validation_error, ".1%"), _confidence(p))
    documents().print(table)


def _confidence(profile: DeviceProfile) -> str:
    """The word "low", or the set-ups of which that is true although others of the profile are good."""
    poor = [t for t in profile.tables if t.weak]
    if profile.weak or not poor:
        return "low" if profile.weak else ""
    several = {t.runtime for t in poor if len({o.threads for o in profile.tables if o.runtime == t.runtime}) > 1}
    return "low: " + ", ".join(
        f"{t.runtime} {t.precision}" + (f" on {t.threads}" if t.runtime in several else "") for t in poor
    )


@app.command()
def show(
    name: Name,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw what it learned of channels: a .png.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """One profile explained: the device, its tables with their errors, and where every figure is from."""
    from mobilekit import pipeline, profiles

    profile = profiles.load(name)
    if plot is not None:
        pipeline.draw_steps(profile, plot)
    print(profiles.dump(profile) if as_json else profiles.explained(profile))


@app.command()
def validate(name: Name) -> None:
    """Check a profile file; a bad one is refused with the field named."""
    from mobilekit import profiles

    print(f"{profiles.load(name).name}: valid")


@app.command()
def build(
    out: Annotated[Path, typer.Option("--out", help="File to write; the raw samples are written beside it.")],
    device: Annotated[str, typer.Option("--device", help="Device to time: host, ssh:USER@HOST, adb:SERIAL.")] = "host",
    runner: Runner = None,
    wheels: Wheels = None,
    quick: Annotated[bool, typer.Option("--quick", help="At most a minute instead of ten.")] = False,
    threads: Annotated[str, typer.Option("--threads", help="Thread counts, with commas between.")] = "1",
) -> None:
    """Time operators on a device and fit its cost tables."""
    from mobilekit import pipeline, registry

    counts = [int(part) if part.strip().isdigit() else 0 for part in threads.split(",")]
    if min(counts) < 1:
        raise BadInputError(f"--threads takes whole numbers above 0 with commas between, not '{threads}'")
    target = registry.device(device, device_settings(runner, wheels))
    with listening() as listener:
        built = pipeline.build_profile(target, out, listener, quick=quick, threads=counts)
    for table in built.tables:
        error = table.validation.median_error if table.validation else None
        print(f"{table.title}: {len(table.kinds)} rows, left-out median error {figure(error, '.1%')}")
    print(f"profile: {out}")


@app.command()
def fit(  # noqa: PLR0913, PLR0917 -- the options are the contract
    measurements: Annotated[Path, typer.Option("--measurements", help="CSV of networks' latencies.")],
    layers: Annotated[Path, typer.Option("--layers", help="CSV of the networks' layers.")],
    device: Annotated[str, typer.Option("--device", help="The device's name in the CSV.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    processor: Annotated[str | None, typer.Option("--processor", help="cpu, gpu or npu.")] = None,
    runtime: Annotated[str | None, typer.Option("--runtime", help="As the CSV names it.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="As the CSV names it.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads of the runs.")] = None,
    cores: Annotated[str | None, typer.Option("--cores", help="big, little or all.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Fit a profile to networks that anyone timed, borrowing what it lacks from similar devices."""
    from mobilekit import pipeline

    selection = pipeline.Selection(device, processor, runtime, precision, threads, cores)
    fitted = pipeline.fit_profile(measurements, layers, selection, out)
    if as_json:
        print(fitted.model_dump_json(indent=2))
    else:
        print(fitted)


@app.command()
def predict(  # noqa: PLR0913, PLR0917 -- the options are the contract
    name: Name,
    workload: Annotated[str | None, typer.Argument(help="Workload whose network is priced as it is.")] = None,
    layers: Annotated[Path | None, typer.Option("--layers", help="CSV of networks' layers, instead.")] = None,
    network: Annotated[str | None, typer.Option("--network", help="A network of that CSV.")] = None,
    anchor: Annotated[
        str | None, typer.Option("--anchor", metavar="NETWORK=MS", help="Measured latency of a related network.")
    ] = None,
    runtime: Annotated[str | None, typer.Option("--runtime", help="One that the profile has prices for.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="fp32, fp16 or int8.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Predicted latency of a workload's network, or of one of a layers table; nothing is measured."""
    from mobilekit import pipeline

    if (layers is None) != (network is None) or (workload is None) == (network is None):
        raise BadInputError("predict takes a WORKLOAD, or --layers CSV with --network NAME")
    subject = workload or network or ""
    with listening() as listener:
        estimate = pipeline.predict(
            name, subject, layers=layers, listener=listener, runtime=runtime, precision=precision, anchor=anchor
        )
    if as_json:
        print(estimate.model_dump_json(indent=2))
        return
    print(
        f"{estimate.latency_ms:.3f} ms predicted in {estimate.runtime} "
        f"({estimate.low_ms:.3f} to {estimate.high_ms:.3f}, {estimate.basis}); not measured"
    )
    if estimate.extrapolated:
        print(f"extrapolated, outside what was timed: {', '.join(estimate.extrapolated)}")
