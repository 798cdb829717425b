"""What a report page is made of, before it is HTML or Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from mobilekit.reports._words import DASH

Tone = Literal["", "number", "code", "good", "bad", "warn", "quiet"]
Basis = Literal["measured", "predicted"]
LONGEST_WORD = 12
SENTENCE = 60
"""Characters from which an entry of a table takes several lines of a narrow screen."""
MOST_ROWS = 400
"""Rows of one table that a page shows; report.json has all of them."""


@dataclass(frozen=True)
class Cell:
    """One entry of a table; `title` is the longer text that a pointer shows."""

    text: str
    tone: Tone = ""
    title: str = ""

    @property
    def unbroken(self) -> bool:
        """Whether a word in it is so long that it has to be broken somewhere, lest it widens the page."""
        apart = r"[\s/_.\-]+" if self.tone == "code" else r"\s+"  # paths and names of modules may be broken in between
        return any(len(word) > LONGEST_WORD for word in re.split(apart, self.text))


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first cell of a row names it. `key` is the legend of the dash."""

    kind: ClassVar[str] = "table"
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    key: str = "not measured"
    listed: bool = False
    """Whether a narrow screen shows every row as a list, whatever is in it: none of it may be out of sight."""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers, and are therefore aligned to the right."""
        tones = [{row[i].tone for row in self.rows if row[i].text} for i in range(len(self.columns))]
        return tuple(bool(column) and column <= {"number", "quiet"} for column in tones)

    @property
    def form(self) -> Literal["plain", "list", "scroll"]:
        """How a narrow screen shows it: figures fit there in four columns and texts in three. A wider table with
        sentences in it becomes a list for every row; one of short entries is scrolled sideways, rows under each other,
        so that they can be compared."""
        if self.listed:
            return "list"
        if len(self.columns) <= 3 + all(self.numeric[1:]):
            return "plain"
        long = any(len(cell.text) > SENTENCE for row in self.rows for cell in row[1:] if cell.tone != "code")
        return "list" if long else "scroll"

    @property
    def legend(self) -> str:
        """What a dash in this table means; empty where there is none."""
        return f"{DASH} {self.key}" if any(c.text == DASH for row in self.rows for c in row) else ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Bullets:
    """A list of texts that came from the run."""

    kind: ClassVar[str] = "bullets"
    title: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """A value before and after; None: that side does not have it. A sum has no bar: it would dwarf the others."""

    label: str
    before: float | None
    after: float | None
    is_sum: bool = False


@dataclass(frozen=True)
class Bars:
    """Before and after as bars on one scale that starts at zero. All of it measured, or all predicted."""

    kind: ClassVar[str] = "bars"
    caption: str
    basis: Basis
    bars: tuple[Bar, ...]
    unit: str
    note: str = ""
    head: str = "Operator"
    """What a bar stands for."""

    @property
    def sides(self) -> tuple[bool, bool]:
        """Whether there is anything before, and after."""
        return any(b.before is not None for b in self.bars), any(b.after is not None for b in self.bars)

    @property
    def top(self) -> float:
        """The largest value that has a bar; positive."""
        drawn = [b for b in self.bars if not b.is_sum]
        return max([*(b.before or 0 for b in drawn), *(b.after or 0 for b in drawn), 1e-9])


@dataclass(frozen=True)
class Strip:
    """Raw samples in the order in which they were taken."""

    label: str
    samples: tuple[float, ...]
    median: float


@dataclass(frozen=True)
class Strips:
    """Raw samples of several models on one scale that starts at zero, or, with `closer`, each on a scale of its own."""

    kind: ClassVar[str] = "strips"
    caption: str
    strips: tuple[Strip, ...]
    closer: bool = False


@dataclass(frozen=True)
class Step:
    """Predicted and measured latency of one round; `low` to `high` is the prediction's interval where known."""

    label: str
    predicted: float
    measured: float | None
    target: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Steps:
    """Predictions against measurements, a line a round."""

    kind: ClassVar[str] = "steps"
    caption: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Dot:
    """A network in a picture of accuracy over latency."""

    label: str
    latency_ms: float
    accuracy: float
    original: bool
    spoken: str
    """Its name for those who do not see the picture."""


@dataclass(frozen=True)
class Scatter:
    """Accuracy over latency, from the worst to the best there is."""

    kind: ClassVar[str] = "scatter"
    caption: str
    basis: Basis
    """Of the latencies."""
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Spot:
    """An operator in the map of precisions."""

    precision: str
    spoken: str
    """What a pointer shows."""


@dataclass(frozen=True)
class Map:
    """All operators of a network in the order in which they run, a row for each of its parts."""

    kind: ClassVar[str] = "map"
    caption: str
    rows: tuple[tuple[str, tuple[Spot, ...]], ...]
    legend: tuple[tuple[str, str, str], ...]
    """Precision, the sign that stands for it, and how many operators have it."""

    @property
    def signs(self) -> dict[str, str]:
        """Precision -> what is written in a spot of it."""
        return {precision: sign for precision, sign, _ in self.legend}


Block = Table | Text | Bullets | Bars | Strips | Steps | Scatter | Map


@dataclass(frozen=True)
class Fold:
    """What is long, or one of many, and folded away until asked for."""

    kind: ClassVar[str] = "fold"
    summary: str
    blocks: tuple[Block | Fold | Columns, ...]


Group = tuple[str, Basis | Literal[""], tuple[Block | Fold, ...]]
"""Title, what its figures are where they are all of one sort, and content."""


@dataclass(frozen=True)
class Columns:
    """Titled groups that stand beside each other where there is room."""

    kind: ClassVar[str] = "columns"
    groups: tuple[Group, ...]

    @property
    def lopsided(self) -> bool:
        """Whether a group is no more than a sentence, so that its column would be empty."""
        return any(len(blocks) == 1 and isinstance(blocks[0], Text) for _, _, blocks in self.groups)


@dataclass(frozen=True)
class Section:
    """A titled part of the page."""

    anchor: str
    title: str
    blocks: tuple[Block | Fold | Columns, ...]


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    label: str
    value: str
    note: str
    basis: Basis | Literal[""] = "measured"


@dataclass(frozen=True)
class Verdict:
    """What is said first."""

    state: Literal["met", "missed", "unreachable", "open"]
    word: str
    headline: str
    sentences: tuple[str, ...]
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    facts: tuple[tuple[str, str], ...]
    verdict: Verdict
    troubles: str
    """How much went wrong; empty where nothing did."""
    sections: tuple[Section, ...]
    footer: str


def table(columns: Iterable[str], rows: Iterable[Iterable[Cell | str]], caption: str = "", key: str = "") -> Table:
    """A table; strings become plain cells, and what exceeds `MOST_ROWS` rows is counted instead of shown."""
    heads = tuple(columns)
    cells = [tuple(c if isinstance(c, Cell) else Cell(c) for c in row) for row in rows]
    left_out = len(cells) - MOST_ROWS
    if left_out > 0:
        rest = Cell(f"{left_out:,} more in report.json", "quiet")
        cells = [*cells[:MOST_ROWS], (rest, *[Cell("")] * (len(heads) - 1))]
    return Table(heads, tuple(cells), caption, key or "not measured")


def num(text: str, title: str = "") -> Cell:
    """A cell that holds a number."""
    return Cell(text, "quiet" if text.startswith("not ") else "number", title)
