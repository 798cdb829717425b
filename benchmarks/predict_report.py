"""What the comparison of predicted and measured latency says: figures, a table, a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

COLOURS = {"onnx": "tab:blue", "tflite": "tab:orange"}
MARKERS = {"fp32": "o", "int8": "^"}
BAND = 0.10


class Row(NamedTuple):
    """A network in a runtime and a precision, predicted and measured; milliseconds on one thread."""

    network: str
    runtime: str
    precision: str
    macs: int
    predicted_ms: float
    low_ms: float
    high_ms: float
    extrapolated: int
    """Operators outside the range of the profile's samples."""
    measured_ms: float
    """At the reference speed of the profile."""
    cpu_ms: float
    """As measured, at whatever speed the machine had."""
    passes: int
    """Those in which the machine was undisturbed; 0: what was measured is brought to that speed, and less sure."""
    repeat: float | None
    """The last undisturbed pass over the first."""

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_ms / self.measured_ms - 1

    @property
    def covered(self) -> bool:
        """Whether the measured time is inside the interval."""
        return self.low_ms <= self.measured_ms <= self.high_ms


class Summary(NamedTuple):
    """Errors without their sign, as shares; `repeat` are the same figures of one pass against the other."""

    cases: int
    median_error: float
    mean_error: float
    within_5: float
    within_10: float
    coverage: float
    median_repeat: float | None
    repeat_within_10: float | None


def summaries(rows: Sequence[Row]) -> dict[str, Summary]:
    """Of each runtime and precision, and of all."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(f"{row.runtime} {row.precision}", []).append(row)
    return {name: _summary(part) for name, part in {**parts, "all": list(rows)}.items() if part}


def _summary(rows: Sequence[Row]) -> Summary:
    errors = [abs(row.error) for row in rows]
    repeats = [abs(row.repeat - 1) for row in rows if row.repeat is not None]
    return Summary(
        cases=len(rows),
        median_error=statistics.median(errors),
        mean_error=statistics.fmean(errors),
        within_5=_share([error <= 0.05 for error in errors]),
        within_10=_share([error <= BAND for error in errors]),
        coverage=_share([row.covered for row in rows]),
        median_repeat=statistics.median(repeats) if repeats else None,
        repeat_within_10=_share([repeat <= BAND for repeat in repeats]) if repeats else None,
    )


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def markdown(result: dict[str, Any], rows: Sequence[Row]) -> str:
    """The whole result as a page."""
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    lines = [
        f"Made by `{result['command']}` on {result['date']}; measured on {', '.join(result['measured'])}; "
        f"{result['cpu']}, one thread; profile `{result['profile']}`; {versions}.",
        "",
        "Predicted and measured are milliseconds. Measured is the mean over passes of the median CPU time of the "
        "rounds in which the machine was undisturbed, as the reference matrix product around each run shows; a star "
        "marks what was undisturbed in no pass: its rounds are brought to that speed by the product's time. Repeat is "
        "the last undisturbed pass over the first, minus one: smaller errors cannot be told from noise.",
        "",
        "| part | cases | median error | mean error | within 5 % | within 10 % | in the interval | median repeat |",
        "|---|---|---|---|---|---|---|---|",
        *(_summary_line(name, Summary(**figures)) for name, figures in result["summary"].items()),
        "",
        "| network | runtime | precision | M MACs | predicted | interval | measured | error | repeat | extrapolated |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
    ]
    if result["missing"]:
        lines += ["", *(f"* {name}: {reason}" for name, reason in result["missing"].items())]
    return "\n".join(lines) + "\n"


def _summary_line(name: str, summary: Summary) -> str:
    shares = (summary.within_5, summary.within_10, summary.coverage)
    cells = [name, str(summary.cases), f"{summary.median_error:.1%}", f"{summary.mean_error:.1%}"]
    return _cells([*cells, *(f"{share:.0%}" for share in shares), _percent(summary.median_repeat)])


def _line(row: Row) -> str:
    cells = [row.network, row.runtime, row.precision, f"{row.macs / 1e6:.0f}", f"{row.predicted_ms:.3f}"]
    cells += [f"{row.low_ms:.3f} to {row.high_ms:.3f}{'' if row.covered else ' (missed)'}"]
    cells.append(f"{row.measured_ms:.3f}{'' if row.passes else '*'}")
    repeat = "-" if row.repeat is None else f"{row.repeat - 1:+.1%}"
    return _cells([*cells, f"{row.error:+.1%}", repeat, str(row.extrapolated or "-")])


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Predicted over measured on logarithmic axes with a band of 10 %; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    if not rows:
        return
    figure = Figure(figsize=(6.4, 6.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    every = [value for row in rows for value in (row.measured_ms, row.predicted_ms)]
    ends = [min(every) / 1.3, max(every) * 1.3]
    axes.fill_between(ends, [e * (1 - BAND) for e in ends], [e * (1 + BAND) for e in ends], color="0.9", label="±10 %")
    axes.plot(ends, ends, color="0.6", linewidth=0.8)
    for runtime, precision in dict.fromkeys((row.runtime, row.precision) for row in rows):
        part = [row for row in rows if (row.runtime, row.precision) == (runtime, precision)]
        predicted = [row.predicted_ms for row in part]
        below, above = [r.predicted_ms - r.low_ms for r in part], [r.high_ms - r.predicted_ms for r in part]
        style = {"fmt": MARKERS[precision], "color": COLOURS[runtime], "markersize": 5, "elinewidth": 0.6}
        measured = [row.measured_ms for row in part]
        axes.errorbar(measured, predicted, [below, above], label=f"{runtime} {precision}", alpha=0.8, **style)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured, ms", ylabel="predicted, ms")
    axes.set_aspect("equal")
    axes.legend(frameon=False)
    figure.savefig(path)
