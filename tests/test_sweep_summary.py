"""The summary of a sweep: escaped, measured and predicted apart, and the worst said first."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

from mobilekit.reports import _sweep as report
from mobilekit.types import Failure, Interval, ModelFigures
from mobilekit.types.sweep import CellRow, NamedBudget, SweepSummary

EVIL = "<script>alert('1')</script> & \"q\" | `x` [a](javascript:b) ]]> \u202egnp\x00 {{ 7*7 }}"


def row(number: int, **changes: Any) -> CellRow:
    """A measured cell."""

    def figures(latency: float | None, accuracy: float | None, size: int | None) -> ModelFigures:
        return ModelFigures(latency_ms=latency, accuracy=accuracy, size_bytes=size, macs=1000, params=10)

    before, after = 2.0, 2.0 / (1 + number)
    found = CellRow(
        name=f"net__host__{number}x__seed0",
        folder=f"cells/net__host__{number}x__seed0",
        key="0" * 64,
        workload="net.py",
        profile="host",
        runtime="onnx",
        budget=NamedBudget(speedup=number),
        seed=0,
        device="host",
        machine="Some CPU",
        verdict="met",
        accuracy_kind="the workload's evaluate()",
        baseline=figures(before, 0.93, 2_000_000),
        result=figures(after, 0.93 - 0.01 * number, 500_000),
        ratio=1 + number,
        ratio_interval=(0.9 + number, 1.1 + number),
        predicted_baseline_ms=Interval(low=1.5, value=1.9, high=2.4, basis="kernel table"),
        predicted_latency_ms=Interval(low=0.77, value=0.88, high=0.99, basis="kernel table"),
        attempts=1,
        seconds=61.0,
    )
    return found.model_copy(update=changes)


def summary(*rows: CellRow) -> SweepSummary:
    return SweepSummary(
        mobilekit_version="0", created_at="2026-01-01T00:00:00+00:00", spec="spec.toml", engine="local", dry_run=False,
        cells=rows,
    )  # fmt: skip


def test_hostile_names_are_shown_and_nothing_more() -> None:
    failure = Failure(stage=EVIL, subject=EVIL, message=EVIL, remedy=EVIL)
    bad = row(
        1,
        workload=EVIL,
        profile=EVIL,
        runtime=EVIL,
        machine=EVIL,
        accuracy_kind=EVIL,
        budget=NamedBudget(name=EVIL[:60]),
    )
    found = summary(bad, row(2, failure=failure, workload=EVIL)).model_copy(update={"spec": EVIL, "warnings": (EVIL,)})
    page, text, picture = report.html(found), report.markdown(found), report.svg(found)
    for shown in (page, text, picture):
        assert "<script" not in shown
        assert "\u202e" not in shown
        assert "\x00" not in shown
        assert "49" not in shown.replace("{{ 7*7 }}", "")
    assert not re.search(r"(?<!\\)\](?=\(javascript)", text)
    assert all(line.count("|") - line.count("\\|") in (6, 9, 10) for line in text.splitlines() if line.startswith("|"))
    ET.fromstring(picture)  # noqa: S314 -- our own file
    assert "&lt;script&gt;" in page
    one, two = (f"cells/net__host__{i}x__seed0/report.html" for i in (1, 2))
    anchors = ["#cells", "#measured", "#predicted", "#failures", "#conduct"]
    assert re.findall(r'(?:href|src)="([^"]*)"', page) == [*anchors, one, two, one, two, one, two, two, one, two]


def test_measured_and_predicted_share_no_column() -> None:
    rows = [row(1), row(2, verdict="unreachable", best_reachable_ms=0.44, best_reachable_basis="predicted"),
            row(3, verdict="unreachable", best_reachable_ms=0.55, best_reachable_basis="measured")]  # fmt: skip
    text = report.markdown(summary(*rows))
    measured, predicted = (
        text.split("## Measured")[1].split("## Predicted")[0],
        text.split("## Predicted")[1].split("## How")[0],
    )
    assert "0.550 ms" in measured
    assert "0.550 ms" not in predicted
    for figure in ("0.440 ms", "0.880 ms", "1.90 ms"):
        assert figure in predicted
        assert figure not in measured
    for figure in ("1.00 ms", "92.00 %", "500 kB"):
        assert figure in measured
        assert figure not in predicted
    assert "2.00 (1.90 to 2.10)" in text.split("## Measured")[0]


def test_what_was_not_measured_is_not_drawn() -> None:
    assert report.svg(summary(row(1, result=None, ratio=None))) == ""
    assert report.svg(summary()) == ""
    one = report.svg(summary(row(1), row(2, machine="another CPU"), row(3)))
    assert one.count('class="title"') == 2  # latencies of two machines are not compared
    assert one.count('class="measured"') == 3


def test_the_worst_decides_what_is_said_first() -> None:
    failure = Failure(stage="cell", subject="x", message="m", remedy="r")
    found = summary(row(1), row(2, verdict=None), row(3, verdict="missed"), row(4, failure=failure))
    assert found.counts == {"met": 1, "not judged": 1, "missed": 1, "failed": 1}
    assert report.headline(found) == "4 cells: 1 met, 1 not judged, 1 missed and 1 failed"
    assert '<header class="unreachable">' in report.html(found)
    assert '<header class="met">' in report.html(summary(row(1)))
