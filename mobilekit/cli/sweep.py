"""The command of many runs at once: sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from mobilekit.cli.terminal import JsonFlag, documents, errors, listening
from mobilekit.errors import BadInputError

if TYPE_CHECKING:
    from mobilekit.types.sweep import SweepSummary

EXIT_CODES = {"failed": 1, "unreachable": 3, "missed": 3}
"""The first outcome that occurred decides; none of them: 0."""


def sweep(  # noqa: PLR0913, PLR0917 -- the options are the contract
    spec: Annotated[Path, typer.Argument(metavar="SPEC.toml", help="Workloads, profiles, budgets: see docs/sweep.md.")],
    out: Annotated[Path | None, typer.Option("--out", help="Output folder [default: mobilekit-out/SPEC].")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            min=1,
            help="Most cells at once [default: 1; with ray as many as fit]. Cells that are measured on one device at "
            "the same time disturb each other: keep 1 unless nothing is measured.",
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="local: processes of this machine; ray: a cluster.")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", help="The Ray cluster [default: RAY_ADDRESS, else a local one for this sweep]."),
    ] = None,
    cpus_per_cell: Annotated[
        int | None, typer.Option("--cpus-per-cell", min=1, help="CPUs that Ray sets aside for a cell [default: 1].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep that is in --out.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run workloads x profiles x budgets, each in a process of its own, and sum them up."""
    known: dict[str, Literal["local", "ray"]] = {"local": "local", "ray": "ray"}
    if engine not in known:
        raise BadInputError(f"--engine is local or ray, not '{engine}'")
    if engine == "local" and (ray_address is not None or cpus_per_cell is not None):
        given = "--ray-address" if ray_address is not None else "--cpus-per-cell"
        raise BadInputError(f"{given} is for --engine ray")
    folder = out or Path("mobilekit-out") / spec.stem

    from mobilekit.pipeline import sweep as sweeps

    where = sweeps.Where(known[engine], jobs, ray_address, cpus_per_cell or 1)
    with listening() as listener:
        summary = sweeps.sweep(spec, folder, listener, where, resume=resume)
    if as_json:
        print((folder / "sweep.json").read_text(encoding="utf-8"))
    else:
        _show(summary, folder)
    raise typer.Exit(next((code for outcome, code in EXIT_CODES.items() if outcome in summary.counts), 0))


def _show(summary: SweepSummary, folder: Path) -> None:
    from mobilekit.reports import _sweep as report

    table = Table("cell", "outcome", box=None)
    for row in summary.cells:
        table.add_row(row.name, Text(report.in_words(row)))  # a text: what failed may hold brackets
    documents().print(table)
    print(report.headline(summary))
    print(f"summary: {(folder / 'sweep.html').resolve()}")
    for row in summary.cells:
        if row.failure is not None:
            said = f"{row.name}: {row.failure.message}; {row.failure.remedy}"
            errors.print(said, style="red", markup=False, soft_wrap=True)
