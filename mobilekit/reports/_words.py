"""Numbers and strings as people read them: sensible digits, units, and words for what is not there."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import datetime

from mobilekit.types import Budget

DASH = "—"
LONGEST = 1200
"""Characters of one message that a page shows; report.json has all of it."""

ABSURD = 1e15
"""From here on a number has an exponent: only a report.json of somebody else holds such ones."""

# C0 and C1 controls break XML; bidirectional overrides can make a path read as another one.
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def clean(text: str) -> str:
    """The text with control and direction-changing characters made visible as U+FFFD."""
    return _UNSAFE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def shorten(text: str, longest: int = LONGEST) -> str:
    """The text, cut with an ellipsis where it is longer than `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def middle(text: str, longest: int) -> str:
    """The text with its middle left out: names of operators differ at both ends."""
    if len(text) <= longest:
        return text
    tail = (longest - 1) // 2
    return text[: longest - 1 - tail] + "…" + text[-tail:]


def number(value: float | None, digits: int = 3, missing: str = DASH) -> str:
    """Significant digits without an exponent (below `ABSURD`), with a real minus sign.

    >>> number(0.41549), number(1234.5), number(9.996), number(None)
    ('0.415', '1,230', '10.0', '—')
    """
    if value is None or not math.isfinite(value):
        return missing
    if value == 0:
        return "0"
    if abs(value) >= ABSURD:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}".replace("-", "−")


def ms(value: float | None, missing: str = "not measured") -> str:
    """Milliseconds with their unit."""
    text = number(value, missing="")
    return f"{text} ms" if text else missing


def plain(value: float) -> str:
    """A figure that a person typed: no digits that were not asked for."""
    return f"{value:,.10g}".replace("-", "−")


def size(count: float | None, missing: str = "not measured") -> str:
    """Bytes in kB or MB (powers of 1000)."""
    if count is None:
        return missing
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count:.0f} bytes"


def count_of(value: int) -> str:
    """A large count with its multiplier."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{number(value / scale)} {unit}"
    return str(value)


def seconds(value: float) -> str:
    """A duration."""
    if 0 < value < 0.01:
        return "under 0.01 s"
    if value < 60:
        return f"{number(value)} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def score(value: float | None, missing: str = "not measured") -> str:
    """An accuracy: a percentage where it is a fraction, else the number that the workload returned."""
    if value is None or not math.isfinite(value):
        return missing
    return f"{value * 100:.2f} %" if 0 <= value <= 1 else number(value, 4)


def score_change(before: float | None, after: float | None, missing: str = DASH) -> str:
    """The fall or rise of an accuracy, in points of a percentage where it is a fraction."""
    if before is None or after is None or not math.isfinite(after - before):
        return missing
    fraction = 0 <= before <= 1 and 0 <= after <= 1
    delta = (after - before) * (100 if fraction else 1)
    text = f"{delta:+.2f}".replace("-", "−") if fraction else number(delta, 4)
    return f"{text} points" if fraction else text


def change(before: float | None, after: float | None) -> str:
    """Relative change in percent."""
    if not before or after is None or not math.isfinite(after / before):
        return DASH
    return f"{(after / before - 1) * 100:+.1f} %".replace("-", "−")


def amount(text: str, unit: str) -> str:
    """A figure with its unit, in the singular where it is one."""
    return f"{text} {unit.removesuffix('s') if text == '1' and unit == 'points' else unit}".strip()


def faster(ratio: float) -> str:
    """How many times faster, or slower where it is."""
    return f"{number(ratio)} times faster" if ratio >= 1 or ratio <= 0 else f"{number(1 / ratio)} times slower"


def brief_ms(value: float | None, missing: str = DASH) -> str:
    """Milliseconds of one operator without the unit: no digits below 0.1 microseconds."""
    if value is not None and 0 < abs(value) < 0.00005:
        return "under 0.0001"
    if value is not None and 0.00005 <= abs(value) < 0.1:
        return f"{value:.4f}".replace("-", "−")
    return number(value, missing=missing)


def times(value: float | None, missing: str = "not measured") -> str:
    """How many times faster."""
    text = number(value, missing="")
    return f"{text} times" if text else missing


def moment(text: str) -> str:
    """An ISO time to the minute; what is not one stays as it is."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = when.tzname() or ""
    return f"{when:%Y-%m-%d %H:%M} {zone}".strip()


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1] if parts else ""


def plural(count: int, noun: str) -> str:
    """`1 warning`, `2 warnings`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def clock(budget: Budget) -> str:
    """What the latencies of a budget are."""
    return f"{budget.statistic} of {'CPU' if budget.clock == 'cpu' else 'wall'} time"


def asked(budget: Budget) -> list[str]:
    """What the budget asks for, item by item; empty where it asks for nothing."""
    items: list[str] = []
    if budget.latency_ms is not None:
        items.append(f"at most {plain(budget.latency_ms)} ms")
    if budget.speedup is not None:
        items.append(f"{plain(budget.speedup)} times faster than the fp32 original")
    if budget.size_mb is not None:
        items.append(f"a file of at most {plain(budget.size_mb)} MB")
    if budget.peak_memory_mb is not None:
        items.append(f"at most {plain(budget.peak_memory_mb)} MB of memory at the peak")
    if budget.max_drop is not None:
        items.append(f"an accuracy loss of at most {amount(plain(budget.max_drop), 'points')}")
    return items


def spaced(name: str) -> str:
    """A name of ours as words: channel_pruning is channel pruning."""
    return name.replace("_", " ")


def unit_of(item: str) -> str:
    """The unit of a budget line, which its name tells; empty where it does not."""
    words = set(re.split(r"[^a-z]+", item.lower()))
    units: tuple[tuple[set[str], str], ...] = (
        ({"speedup", "ratio", "faster"}, "times"),
        ({"drop", "accuracy", "loss"}, "points"),
        ({"size", "mb", "memory"}, "MB"),
        ({"latency", "ms"}, "ms"),
    )
    return next((unit for names, unit in units if names & words), "")
