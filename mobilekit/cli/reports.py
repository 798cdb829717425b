"""The commands of reports: writing one again, and comparing two results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from mobilekit.cli.terminal import JsonFlag, documents, figure

if TYPE_CHECKING:
    from mobilekit.types import ComparedPair, ComparedResults, Difference

RENDER = "render"
"""The command that `mobilekit report DIR` stands for."""


class ReportGroup(typer.core.TyperGroup):
    """`report DIR` is a command without a name: what is no command's name is a folder (./compare is one too)."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name in front where there is none."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [RENDER, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=ReportGroup,
    help="Write a folder's report again (report DIR), or compare two results (report compare A B).",
    rich_markup_mode=None,
)


@app.command(RENDER)
def render(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a plan.")],
    open_it: Annotated[bool, typer.Option("--open", help="Show report.html in the browser.")] = False,
) -> None:
    """Write the report again from report.json; its name may be left out."""
    from mobilekit import pipeline

    pipeline.rerender(folder)
    page = (folder / "report.html").resolve()
    print(page)
    if open_it:
        typer.launch(page.as_uri())


@app.command()
def compare(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="Folder of a plan, or a file that measure --json printed.")
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="What is compared with it.")],
    as_json: JsonFlag = False,
) -> None:
    """Say which timings of B are faster or slower than those of A, and which show no difference."""
    from mobilekit import pipeline

    found = pipeline.compare_results(first, second)
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    _show(found)


# ---------------------------------------------------------------- what it prints


def _show(found: ComparedResults) -> None:
    out = documents()
    out.print(f"A: {found.first}\nB: {found.second}", markup=False, highlight=False, soft_wrap=True)
    _differences("Not alike, to be read first:", found.conditions)
    if found.pairs:
        out.print(_timings(found.pairs))
        for pair in found.pairs:
            said = f"{pair.role} on {pair.device}: {pair.verdict}: {pair.reason}"
            out.print(said, markup=False, highlight=False, soft_wrap=True)
        out.print(
            "ratio: median of A over median of B, with its 90 % interval. p: Mann-Whitney U over sessions or blocks."
        )
    else:
        out.print("Nothing to compare: no file of the same role was measured in both.")
    _differences("Measured in one of them only:", found.unpaired)
    _differences("The results:", found.figures)
    _differences("Levers that differ:", found.levers)


def _timings(pairs: Iterable[ComparedPair]) -> Table:
    table = Table(
        "what", "device", "A ms", "B ms", "clock", "sessions", "ratio", "90 % interval", "p", "B is", box=None
    )
    for pair in pairs:
        test = pair.times
        table.add_row(
            Text(pair.role),
            Text(f"{pair.device}, {pair.origin}" if pair.origin == "emulator" else pair.device),
            figure(pair.first.median_ms, ".4g"),
            figure(pair.second.median_ms, ".4g"),
            pair.clock,
            f"{pair.first.sessions}, {pair.second.sessions}",
            "" if test is None else f"{test.ratio:.3f}",
            "" if test is None else f"{test.interval[0]:.3f} to {test.interval[1]:.3f}",
            "" if test is None or test.p_value is None else f"{test.p_value:.2g}",
            pair.verdict,
        )
    return table


def _differences(title: str, rows: Iterable[Difference]) -> None:
    """A table, where there is anything to show."""
    table = Table("", "A", "B", box=None)
    for row in rows:
        table.add_row(Text(row.what), Text(row.first or "-"), Text(row.second or "-"))
    if table.row_count:
        documents().print(title)
        documents().print(table)
