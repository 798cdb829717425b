"""Measured accuracy over measured latency, as inline SVG in the manner of the other pictures, or as a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from mobilekit.reports import _figures
from mobilekit.reports import _words as words
from mobilekit.reports._blocks import Dot, Scatter
from mobilekit.reports._figures import SCATTER_HEIGHT as HEIGHT

WIDTH = 720
"""Of the file; in a page the picture follows its width."""
CAPTION = 44
STYLE = """
svg { font: 12.5px sans-serif; } rect.paper { fill: #fff; } text { fill: #15191e; }
.title { font-weight: 600; font-size: 14px; }
.quiet, .tick { fill: #545c68; } .tick { font-size: 11.5px; text-anchor: middle; } .start { text-anchor: start; }
.end { text-anchor: end; } .grid { stroke: #dfe3e8; } .original { fill: #b4bcc7; } .measured { fill: #0a6a9c; }
"""


@dataclass(frozen=True)
class Point:
    """A measured network: the original of a cell or its result."""

    label: str
    latency_ms: float
    accuracy: float
    original: bool
    budget: str


@dataclass(frozen=True)
class Panel:
    """Points whose latencies may be compared: one workload, device, runtime and clock."""

    caption: str
    note: str
    points: tuple[Point, ...]


def draw(panel: Panel) -> Markup:
    """The picture as one `<svg>` element, with all of its figures in its accessible name."""
    dots = tuple(Dot(p.label, p.latency_ms, p.accuracy, p.original, _named(p)) for p in panel.points)
    return _figures.draw(Scatter(panel.caption, "measured", dots))


def _named(point: Point) -> str:
    return f"original of cell {point.label}" if point.original else f"cell {point.label} ({point.budget})"


def standalone(panels: Sequence[Panel]) -> str:
    """All panels below each other as an SVG file with colours of its own."""
    block = HEIGHT + CAPTION + 12
    parts = []
    for index, panel in enumerate(panels):
        y = index * block
        title = Markup('<text class="title" x="0" y="{}">{}</text>').format(y + 18, words.clean(panel.caption))
        note = f"{panel.note}; numbered: results, grey: originals; latency in ms, accuracy from worst to best"
        said = Markup('<text class="quiet" x="0" y="{}">{}</text>').format(y + 34, words.clean(note))
        parts += [
            title,
            said,
            Markup('<svg y="{}" width="{}" height="{}">').format(y + CAPTION, WIDTH, _figures.SCATTER_HEIGHT),
        ]
        parts += [draw(panel), Markup("</svg>")]
    height = block * len(panels)
    head = Markup('<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="{}" viewBox="-12 0 {} {}">')
    paper = Markup('<rect class="paper" x="-12" width="100%" height="100%"/>')
    style = Markup("<style>{}</style>").format(escape(STYLE))
    return str(
        head.format(WIDTH + 24, height, WIDTH + 24, height)
        + style
        + paper
        + Markup("").join(parts)
        + Markup("</svg>\n")
    )
