"""Fronts of plans, the fastest plan within a drop, and data that is no good, on the tiny workload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mobilekit as mk
from mobilekit import pipeline
from mobilekit.errors import BadInputError
from mobilekit.pipeline import dual, options
from mobilekit.types import Plan


def run(workload: Path, out: Path, budget: mk.Budget, *, dry: bool = False, **more: object) -> mk.Report:
    request = pipeline.Request(str(workload), "host", budget, "onnx", **more)  # type: ignore[arg-type]
    return pipeline.run(request, out, pipeline.Listener(), dry=dry)


def test_a_front_of_plans(tiny: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    levers = ("channel_pruning", "group_convolution", "low_rank", "int8")
    monkeypatch.setattr(options, "SEARCHED", levers)  # the quick machine leaves some out
    report = run(tiny, out, mk.Budget(), pareto=5)
    told = {row.transform for row in (*report.plan, *report.rejected)}
    assert told <= set(levers)
    assert {"channel_pruning", "group_convolution", "low_rank"} <= told
    rows = report.frontier
    assert 3 <= len(rows) <= 5
    assert report.verdict is None
    assert "training" not in [stage.name for stage in report.stages]
    assert [stage.name for stage in report.stages].count("damage") == 1  # one pass for all of them
    predicted = [row.predicted_ms for row in rows]
    assert predicted == sorted(predicted)
    for row in rows:
        plan = Plan.model_validate_json((out / row.plan).read_bytes())
        assert plan.estimate.latency_ms == row.predicted_ms
        assert plan.together is not None
        assert (plan.together.damage, plan.together.agreement) == (row.damage, row.agreement)
        assert row.judged == plan.together.when
        assert row.target_ms is None or plan.estimate.latency_ms <= row.target_ms * 1.0001
        assert row.measured_ms is not None
        assert row.measured_ms > 0
        assert row.damage is not None
        assert row.agreement is not None
        assert 0 <= row.agreement <= 1
    kept = [row for row in rows if not row.beaten]
    assert kept
    order = sorted(kept, key=lambda row: row.measured_ms or 0)
    damages = [row.damage for row in order]
    assert damages == sorted(damages, reverse=True)
    for name in ("report.html", "report.md"):
        text = (out / name).read_text(encoding="utf-8").replace("<wbr>", "")
        assert rows[0].plan in text
        assert "before any training" in text
        assert rows[0].judged in text
    applied = pipeline.apply(out / rows[0].plan, str(tiny), tmp_path / "applied", pipeline.Listener())
    assert applied.result.latency_ms == pytest.approx(rows[0].measured_ms, rel=0.02)
    assert len(applied.plan) == rows[0].options


def test_a_dry_front_is_predicted(tiny: Path, quick: None, tmp_path: Path) -> None:
    rows = run(tiny, tmp_path / "out", mk.Budget(), dry=True, pareto=3).frontier
    assert rows
    assert all(row.measured_ms is None and row.ratio is None for row in rows)


@pytest.mark.parametrize("count", [-1, 0, 1, 33])
def test_a_number_that_makes_no_front(count: int) -> None:
    with pytest.raises(BadInputError, match="--pareto takes a number of plans from 2 to 32"):
        pipeline.Request("x.py", "host", mk.Budget(), pareto=count)


def test_a_drop_that_is_kept(tiny: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual, "PLANS", 2)
    report = run(tiny, tmp_path / "out", mk.Budget(max_drop=20.0))
    (finding,) = report.findings
    assert finding.found == pytest.approx(100 * (report.baseline.accuracy - report.result.accuracy))
    assert report.verdict == "met"
    assert finding.found <= 20
    trials = sorted(path.name for path in (tmp_path / "out" / "trials").iterdir())
    told = [warning for warning in report.warnings if warning.startswith("trial of plans/plan-")]
    assert 1 <= len(trials) == len(told) <= 2
    for name in trials:
        own = json.loads((tmp_path / "out" / "trials" / name / "report.json").read_text())
        assert own["findings"][0]["item"] == "max_drop"
        assert any(f"plans/{name}.json" in line for line in told)


@pytest.mark.slow
def test_a_smaller_drop_is_slower(tiny: Path, quick: None, tmp_path: Path) -> None:
    careful = run(tiny, tmp_path / "careful", mk.Budget(max_drop=1.0))
    bold = run(tiny, tmp_path / "bold", mk.Budget(max_drop=60.0))
    for report, most in ((careful, 1.0), (bold, 60.0)):
        drop = 100 * (report.baseline.accuracy - report.result.accuracy)
        (finding,) = report.findings
        assert finding.found == pytest.approx(drop)
        assert report.verdict == ("met" if drop <= most else "missed")
    assert careful.verdict == "met"
    assert bold.result.latency_ms <= careful.result.latency_ms < careful.baseline.latency_ms
    assert 1 <= len(list((tmp_path / "careful" / "trials").iterdir())) <= 4


# ---------------------------------------------------------------- data that is no good


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ("return torch.zeros(64, 1, 16, 16).split(32)", "all calibration inputs are alike"),
        pytest.param("return [stripes(2, 1)[0]]", "2 calibration inputs", marks=pytest.mark.slow),
    ],
)
def test_poor_calibration_is_survived(change: str, warning: str, tiny: Path, quick: None, tmp_path: Path) -> None:
    path = tmp_path / "poor.py"
    path.write_text(tiny.read_text().replace("return stripes(64, 1)[0].split(32)", change), encoding="utf-8")
    (tmp_path / "weights.safetensors").write_bytes(tiny.with_name("weights.safetensors").read_bytes())
    report = run(path, tmp_path / "out", mk.Budget(speedup=3))
    assert report.verdict in ("met", "missed")
    assert any(warning in text for text in report.warnings)


def test_one_class_of_training_data_is_survived(tiny: Path, quick: None, tmp_path: Path) -> None:
    path = tmp_path / "single.py"
    source = tiny.read_text().replace(
        "return zip(images.split(32), target.split(32))", "return [(images[target == 1], target[target == 1])]"
    )
    path.write_text(source, encoding="utf-8")
    (tmp_path / "weights.safetensors").write_bytes(tiny.with_name("weights.safetensors").read_bytes())
    report = run(path, tmp_path / "out", mk.Budget(speedup=4))
    assert report.verdict == "met"
    assert report.result.accuracy is not None
    assert any("class" in text for text in report.warnings)
