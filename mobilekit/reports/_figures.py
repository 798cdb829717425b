"""Pictures as inline SVG: text keeps its size while the rest follows the width of the page.

Horizontal positions are percentages of the width and vertical ones are pixels, so that a label is as
readable on a phone as on a desk. Colours come from the page's CSS: solid is measured, hollow is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from mobilekit.reports import _words as words
from mobilekit.reports._blocks import Bar, Bars, Dot, Scatter, Step, Steps, Strip, Strips

LEFT, RIGHT = 0.0, 100.0
"""Where the scale begins and ends, in percent of the width."""
LONGEST_LABEL, SHORT_LABEL = 26, 18
ROW = 34
MOST_DOTS = 400
STRIP_HEIGHT = 54
BEST, WORST = 14.0, 200.0
"""Vertical pixels of the best and the worst accuracy of a scatter."""
SCATTER_HEIGHT = 240


def draw(figure: Bars | Strips | Steps | Scatter) -> Markup:
    """The picture as one `<svg>` element, named by its caption and described with all of its figures."""
    if isinstance(figure, Bars):
        return _bars(figure)
    if isinstance(figure, Scatter):
        return _scatter(figure)
    if isinstance(figure, Steps):
        return _steps(figure)
    return closer(figure) if figure.closer else _strips(figure)


def ticks(top: float, most: int = 5) -> list[float]:
    """Round numbers from 0 to at most `top`."""
    if not top > 0:
        return [0.0]
    unit = 10 ** math.floor(math.log10(top / most))
    step = next(unit * k for k in (1, 2, 5, 10) if top / (unit * k) <= most)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def _x(value: float, top: float) -> str:
    return f"{LEFT + (RIGHT - LEFT) * value / top:.2f}%"


def _share(value: float, top: float) -> str:
    return f"{(RIGHT - LEFT) * value / top:.2f}%"


def _svg(kind: str, height: float, names: tuple[str, str], parts: Sequence[Markup]) -> Markup:
    """`names`: what the picture is, and what it says."""
    head = Markup('<svg class="{}" width="100%" height="{:.0f}" role="img" aria-label="{}"><desc>{}</desc>')
    return head.format(kind, height, *map(words.clean, names)) + Markup("").join(parts) + Markup("</svg>")


def _text(x: str, y: float, text: str, style: str = "") -> Markup:
    attribute = Markup(' class="{}"').format(style) if style else Markup("")
    return Markup('<text x="{}" y="{:g}"{}>{}</text>').format(x, y, attribute, words.clean(text))


def _line(x1: str, y1: float, x2: str, y2: float, style: str) -> Markup:
    markup = Markup('<line class="{}" x1="{}" y1="{:g}" x2="{}" y2="{:g}"/>')
    return markup.format(style, x1, y1, x2, y2)


def _axis(top: float, first: float, last: float, unit: str) -> list[Markup]:
    """Grid lines over the height from `first` to `last`, with their values below."""
    parts = []
    marks = ticks(top)
    for i, tick in enumerate(marks):
        x = _x(tick, top)
        label = words.plain(tick) + (f" {unit}" if i == len(marks) - 1 else "")
        parts.append(_line(x, first, x, last, "grid"))
        style = "tick start" if i == 0 else "tick end" if tick > 0.93 * top else "tick"
        parts.append(_text(x if i else "0%", last + 14, label, style))
    return parts


def _bars(figure: Bars) -> Markup:
    drawn = [bar for bar in figure.bars if not bar.is_sum]
    sums = [bar for bar in figure.bars if bar.is_sum]
    bottom = ROW * len(drawn) + 2
    parts = _axis(figure.top, 2, bottom, figure.unit)
    for i, bar in enumerate(drawn):
        parts += _bar(bar, ROW * i, figure)
    for i, bar in enumerate(sums):
        parts += _bar(bar, bottom + 24 + 20 * i, figure)
    height = bottom + 20 + (20 * len(sums) + 8 if sums else 0)
    spoken = "; ".join(f"{b.label}: {_values(b, figure, spoken=True)}" for b in figure.bars)
    return _svg("bars " + figure.basis, height, (figure.caption, spoken), parts)


def _bar(bar: Bar, y: float, figure: Bars) -> list[Markup]:
    label = words.middle(bar.label, LONGEST_LABEL)
    title = Markup("<title>{}</title>").format(
        words.clean(f"{bar.label}: {_values(bar, figure, spoken=True)} ({figure.basis})")
    )
    parts = [Markup("<g>"), title, _text("0%", y + 14, label, "start")]
    parts.append(_text("100%", y + 14, _values(bar, figure), "end value"))
    rect = Markup('<rect class="{}" x="{}" y="{:g}" width="{}" height="{:g}"/>')
    if bar.before is not None and not bar.is_sum:
        parts.append(rect.format("before", f"{LEFT:.2f}%", y + 19, _share(bar.before, figure.top), 11))
    if bar.after is not None and not bar.is_sum:
        parts.append(rect.format("after", f"{LEFT:.2f}%", y + 22, _share(bar.after, figure.top), 5))
    return [*parts, Markup("</g>")]


def _values(bar: Bar, figure: Bars, spoken: bool = False) -> str:
    """Both values, or the one of the only side that the picture has."""
    sides = zip(("before", "after"), (bar.before, bar.after), figure.sides, strict=True)
    found = [(name, _value(value, figure.unit)) for name, value, exists in sides if exists]
    if spoken:
        return ", ".join(f"{name} {text}" for name, text in found) + f" {figure.unit}"
    return f"{found[-1][1]} %" if figure.unit == "%" else " → ".join(text for _, text in found)


def _value(value: float | None, unit: str) -> str:
    return words.brief_ms(value, "none") if unit == "ms" else words.number(value, missing="none")


def _strips(figure: Strips) -> Markup:
    longest = max(max(s.samples) for s in figure.strips)
    # A single slow run must not squeeze all others into a corner: it is drawn at the edge and counted.
    top = max(min(longest, 1.6 * max(s.median for s in figure.strips)) * 1.04, 1e-9)
    row = STRIP_HEIGHT + 26
    height = row * len(figure.strips) + 22
    parts = _axis(top, 18, height - 20, "ms")
    for i, strip in enumerate(figure.strips):
        parts += _strip(strip, top, row * i, i)
    spoken = "; ".join(f"{s.label}: {len(s.samples)} samples, median {words.ms(s.median)}" for s in figure.strips)
    return _svg("strips", height, (figure.caption, spoken), parts)


def _strip(strip: Strip, top: float, y: float, index: int) -> list[Markup]:
    return _dots(strip, (0.0, top), y, index)


def _dots(strip: Strip, scale: tuple[float, float], y: float, index: int) -> list[Markup]:
    """Label, median and dots from `y` on; what is outside of the scale is drawn at its edge and counted."""
    low, high = scale
    step = max(1, math.ceil(len(strip.samples) / MOST_DOTS))
    beyond = sum(sample > high for sample in strip.samples)
    parts = [_text("0%", y + 13, words.middle(strip.label, SHORT_LABEL), "start strong")]
    note = f"median {words.ms(strip.median)}" + (f", {beyond:,} off scale" if beyond else "")
    parts.append(_text("100%", y + 13, note, "end value"))
    shown = strip.samples[::step]
    spacing = (STRIP_HEIGHT - 8) / max(1, len(shown) - 1)

    def place(value: float) -> str:
        return _x(min(max(value, low), high) - low, high - low)

    dot = Markup('<circle cx="{}" cy="{:.1f}" r="{:g}"/>')
    dots = [dot.format(place(sample), y + 24 + spacing * i, 2) for i, sample in enumerate(shown)]
    parts += [Markup('<g class="{}">').format("dots first" if index == 0 else "dots"), *dots, Markup("</g>")]
    x = place(strip.median)
    parts.append(_line(x, y + 19, x, y + 21 + STRIP_HEIGHT, "median"))
    return parts


def closer(figure: Strips) -> Markup:
    """Every strip on its own scale, from its fastest run to where all but a fiftieth are."""
    row = STRIP_HEIGHT + 52
    parts: list[Markup] = []
    for i, strip in enumerate(figure.strips):
        ordered = sorted(strip.samples)
        low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.98 * len(ordered)))]
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1e-9
        scale = (low - room, high + room)
        parts += _between(scale, row * i + 18, row * i + STRIP_HEIGHT + 24)
        parts += _dots(strip, scale, row * i, i)
    ends = ((s.label, words.ms(min(s.samples)), words.ms(max(s.samples))) for s in figure.strips)
    spoken = "; ".join(f"{label}: from {low} to {high}" for label, low, high in ends)
    return _svg("strips", row * len(figure.strips), (figure.caption, spoken), parts)


def _between(scale: tuple[float, float], first: float, last: float) -> list[Markup]:
    """Grid lines at round numbers of a scale that does not begin at zero."""
    low, high = scale
    step = next(iter(ticks(high - low, 4)[1:]), high - low)
    digits = max(0, 1 - math.floor(math.log10(step))) if step > 0 else 0
    parts = []
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        x = _x(i * step - low, high - low)
        parts.append(_line(x, first, x, last, "grid"))
        if i * step - low < 0.9 * (high - low):
            parts.append(_text(x, last + 14, f"{i * step:,.{digits}f}", "tick"))
    parts.append(_text("100%", last + 14, "ms", "tick end"))
    return parts


def _steps(figure: Steps) -> Markup:
    seen = [v for s in figure.steps for v in (s.predicted, s.measured, s.target, s.high) if v is not None]
    top = max(v for v in [*seen, 1e-9] if math.isfinite(v)) * 1.05
    row = 44
    height = row * len(figure.steps) + 22
    parts = _axis(top, 18, height - 20, "ms")
    for i, step in enumerate(figure.steps):
        parts += _step(step, top, row * i)
    spoken = "; ".join(f"{s.label}: {_step_values(s)}" for s in figure.steps)
    return _svg("steps", height, (figure.caption, spoken), parts)


def _step_values(step: Step) -> str:
    measured = f"{words.number(step.measured)} measured" if step.measured is not None else "not measured"
    return f"{words.number(step.predicted)} predicted, {measured}"


def _step(step: Step, top: float, y: float) -> list[Markup]:
    middle = y + 30
    parts = [_text("0%", y + 13, step.label, "start strong"), _text("100%", y + 13, _step_values(step), "end value")]
    parts.append(_line(f"{LEFT:g}%", middle, f"{RIGHT:g}%", middle, "base"))
    if step.target is not None:
        x = _x(step.target, top)
        parts.append(_line(x, middle - 11, x, middle + 11, "target"))
    if step.low is not None and step.high is not None:
        rect = Markup('<rect class="interval" x="{}" y="{:g}" width="{}" height="10" rx="5"/>')
        low = max(step.low, 0.0)
        parts.append(rect.format(_x(low, top), middle - 5, _share(max(step.high - low, 0.0), top)))
    circle = Markup('<circle class="{}" cx="{}" cy="{:g}" r="{:g}"/>')
    parts.append(circle.format("predicted", _x(step.predicted, top), middle, 5.5))
    if step.measured is not None:
        parts.append(circle.format("measured", _x(step.measured, top), middle, 4))
    return parts


def _scatter(figure: Scatter) -> Markup:
    top = max(dot.latency_ms for dot in figure.dots) * 1.08 or 1.0
    scores = sorted({dot.accuracy for dot in figure.dots})
    low, high = scores[0], scores[-1]
    parts = _axis(top, BEST, WORST + 10, "ms")
    for score in dict.fromkeys((high, low)):
        y = _depth(score, low, high)
        parts.append(_line("0%", y, "100%", y, "grid"))
        parts.append(_text("0%", y - 4, words.score(score), "start value"))
    for dot in sorted(figure.dots, key=lambda dot: not dot.original):
        parts.append(_dot(dot, figure, top, _depth(dot.accuracy, low, high)))
    return _svg("scatter", SCATTER_HEIGHT, (figure.caption, "; ".join(map(_dot_spoken, figure.dots))), parts)


def _depth(score: float, low: float, high: float) -> float:
    return (BEST + WORST) / 2 if high == low else WORST - (WORST - BEST) * (score - low) / (high - low)


def _dot_spoken(dot: Dot) -> str:
    return f"{dot.spoken}: {words.ms(dot.latency_ms)}, {words.score(dot.accuracy)}"


def _dot(dot: Dot, figure: Scatter, top: float, y: float) -> Markup:
    x, style = _x(dot.latency_ms, top), "original" if dot.original else figure.basis
    markup = Markup('<g><title>{}</title><circle class="{}" cx="{}" cy="{:.1f}" r="5"/>{}</g>')
    label = Markup("")
    if not dot.original:
        label = Markup('<text x="{}" y="{:.1f}" dx="8">{}</text>').format(x, y + 4, words.clean(dot.label))
    return markup.format(words.clean(_dot_spoken(dot)), style, x, y, label)
