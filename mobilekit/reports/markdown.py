"""report.md: the same report as compact Markdown tables, for a pull request or a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mobilekit.reports import _page
from mobilekit.reports import _words as words
from mobilekit.reports._blocks import (
    Bars,
    Block,
    Bullets,
    Cell,
    Columns,
    Fold,
    Map,
    Page,
    Scatter,
    Steps,
    Strips,
    Table,
    Text,
)
from mobilekit.reports._blocks import num as _num
from mobilekit.reports._blocks import table as _as_table
from mobilekit.types import Report

WIDTH = 20
"""Characters of the longest bar."""
BINS = 30
_LEVELS = "▁▂▃▄▅▆▇█"


class Markdown:
    """Writes report.md in GitHub's dialect; every string of the report is escaped."""

    file_name = "report.md"

    def render(self, report: Report) -> str:
        """The report as Markdown text."""
        page = _page.page(report)
        parts = [*_head(page)]
        for section in page.sections:
            parts.append(f"## {section.title}")
            for block in section.blocks:
                parts += _block(block)
        parts.append(f"*{escape(page.footer)}*")
        return words.clean("\n\n".join(part for part in parts if part)) + "\n"


def escape(text: str) -> str:
    """The text as Markdown that shows it: one line, and nothing in it is markup.

    >>> escape("<b>a|b</b>")
    '&lt;b&gt;a\\\\|b&lt;/b&gt;'
    """
    text = " ".join(words.shorten(words.clean(text)).split())
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    # Underscores inside a word are no emphasis; without the backslash paths stay readable as plain text.
    text = re.sub(r"(?<![A-Za-z0-9_])_|_(?![A-Za-z0-9_])", r"\\_", text)
    text = re.sub(r"^([#+-])(?=\s|#|$)", r"\\\1", text)
    text = re.sub(r"^(\d+)([.)])(?=\s)", r"\1\\\2", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _head(page: Page) -> list[str]:
    verdict = page.verdict
    facts = " · ".join(f"{name}: {escape(value)}" for name, value in page.facts)
    parts = [f"# {verdict.word}: {escape(verdict.headline)}", facts]
    parts.append("\n".join(f"- {escape(sentence)}" for sentence in verdict.sentences))
    if page.troubles:
        parts.append(f"**{page.troubles}**, see [warnings and failures](#warnings-and-failures).")
    return parts


def _block(block: Block | Fold | Columns) -> list[str]:
    match block:
        case Columns():
            parts = []
            for title, basis, blocks in block.groups:
                parts += [
                    f"### {basis.capitalize()} {escape(title)}".replace("  ", " "),
                    *(part for inner in blocks for part in _block(inner)),
                ]
        case Fold():
            inside = (part for inner in block.blocks for part in _block(inner))
            parts = [f"<details><summary>{escape(block.summary)}</summary>", *inside, "</details>"]
        case Table():
            parts = _table(block)
        case Text():
            parts = [escape(block.text)]
        case Bullets():
            parts = [f"**{escape(block.title)}**", "\n".join(f"- {escape(item)}" for item in block.items)]
        case Bars():
            parts = _table(_bars(block))
        case Strips():
            parts = [] if block.closer else _table(_histograms(block))
        case Map():
            parts = _map(block)
        case Steps():
            parts = _steps(block)
        case Scatter():
            parts = []  # the table beside it says it all
    return parts


def _table(table: Table) -> list[str]:
    lines = [
        _row([escape(name) for name in table.columns]),
        _row(["---:" if numeric else "---" for numeric in table.numeric]),
        *(_row([_cell(cell) for cell in row]) for row in table.rows),
    ]
    caption = f"**{escape(table.caption)}**" if table.caption else ""
    return [caption, "\n".join(lines), table.legend]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    return f"**{text}**" if cell.tone in ("good", "bad", "warn") and text else text


def _bars(figure: Bars) -> Table:
    rows = []
    for bar in figure.bars:
        scale = 0 if bar.is_sum else WIDTH / max(figure.top, 1e-9)
        # a report.json of somebody else may hold any number
        full, whole = (round(min(WIDTH, max(0.0, scale * (value or 0)))) for value in (bar.after, bar.before))
        pale = max(0, whole - full)
        shown = words.brief_ms if figure.unit == "ms" else words.number
        values = (_num(shown(value)) for value in (bar.before, bar.after))
        rows.append((Cell(bar.label), *values, Cell("█" * full + "░" * pale)))
    unit = f"{figure.unit}, {figure.basis}" if figure.unit != "%" else "%"
    name = figure.head
    heads = (name, f"Before ({unit})", f"After ({unit})", "█ after, ░ before")
    caption = f"{figure.caption}. {figure.note}" if figure.note else figure.caption
    return _as_table(heads, rows, caption, "none" if all(figure.sides) else f"not {figure.basis}")


def _histograms(figure: Strips) -> Table:
    """How often each latency occurred, on one scale from zero."""
    top = max(min(max(s.samples), 1.6 * s.median) for s in figure.strips) * 1.04 or 1.0
    rows = []
    for strip in figure.strips:
        bins = [0] * BINS
        for sample in strip.samples:
            bins[int(min(BINS - 1, max(0.0, BINS * sample / top)))] += 1
        most = max(bins)
        marks = "".join(_LEVELS[min(7, count * 8 // most)] if count else "·" for count in bins)
        rows.append((Cell(strip.label), Cell(marks)))
    kind = figure.caption.partition(";")[0]
    heads = ("Model", f"0 to {words.ms(top)}, slower runs in the last place")
    return _as_table(heads, rows, kind)


def _map(figure: Map) -> list[str]:
    """A line for each part, a word for each operator."""
    signs = ", ".join(f"{sign}: {told}" for _, sign, told in figure.legend)
    rows = (
        (Cell(part, "code"), Cell(" ".join(figure.signs[spot.precision] for spot in spots)))
        for part, spots in figure.rows
    )
    return _table(_as_table(("Part", signs), rows, figure.caption))


def _steps(figure: Steps) -> list[str]:
    """The table of rounds says it all but the interval of the last prediction."""
    last = figure.steps[-1]
    measured = "not measured" if last.measured is None else f"measured {words.ms(last.measured)}"
    inside = ""
    if last.measured is not None and last.low is not None and last.high is not None:
        inside = ", inside the interval" if last.low <= last.measured <= last.high else ", outside the interval"
    interval = f" ({words.number(last.low)} to {words.number(last.high)})"
    return [f"{last.label}: predicted {words.ms(last.predicted)}{interval}, {measured}{inside}."]
