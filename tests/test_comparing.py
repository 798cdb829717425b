"""Comparing two results: what is said of timings, and what is not said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reports import DeviceInfo, measured, models, sample_report

from mobilekit import registry
from mobilekit.errors import BadInputError
from mobilekit.pipeline import compare_results
from mobilekit.significance import autocorrelation_time, block_medians, judge
from mobilekit.types import Budget, Cluster, ComparedPair, Measurement, Report


def session(
    generator: np.random.Generator, middle: float = 1.0, count: int = 400, memory: float = 0.9, noise: float = 0.03
) -> list[float]:
    """Samples that remember the one before them, with a slow one now and then, as measured ones do."""
    walk = np.empty(count)
    walk[0] = generator.normal(0, noise)
    for i, push in enumerate(generator.normal(0, noise * np.sqrt(1 - memory**2), count - 1), 1):
        walk[i] = memory * walk[i - 1] + push
    found = middle * np.exp(walk)
    found[generator.random(count) < 0.02] *= 2.5
    return [float(sample) for sample in found]


def sessions(
    generator: np.random.Generator, number: int, middle: float = 1.0, apart: float = 0.02
) -> list[list[float]]:
    """Several sessions, each of which has a speed of its own."""
    return [session(generator, middle * float(np.exp(generator.normal(0, apart)))) for _ in range(number)]


# ---------------------------------------------------------------- the judgement


@pytest.mark.parametrize("number", [1, 3, 5])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=5, deadline=None)
def test_the_same_samples_show_no_difference(number: int, seed: int) -> None:
    same = sessions(np.random.default_rng(seed), number)
    found = judge(same, same)
    assert found.verdict == "no difference shown"
    assert found.ratio == 1.0
    assert found.interval[0] <= 1 <= found.interval[1]


@given(seed=st.integers(0, 10_000), number=st.integers(1, 6), factor=st.floats(0.5, 2.0))
@settings(max_examples=15, deadline=None)
def test_swapping_the_sides_swaps_the_judgement(seed: int, number: int, factor: float) -> None:
    generator = np.random.default_rng(seed)
    first, second = sessions(generator, number), sessions(generator, 7 - number, factor)
    forth, back = judge(first, second), judge(second, first)
    assert back.ratio == pytest.approx(1 / forth.ratio)
    assert back.interval == pytest.approx((1 / forth.interval[1], 1 / forth.interval[0]))
    assert (back.p_value, back.threshold) == (forth.p_value, forth.threshold)
    assert back.units == forth.units[::-1]
    swapped = {"faster": "slower", "slower": "faster", "no difference shown": "no difference shown"}
    assert back.verdict == swapped[forth.verdict]


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e4))
@settings(max_examples=10, deadline=None)
def test_the_unit_of_time_does_not_matter(seed: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    first, second = sessions(generator, 4), sessions(generator, 4, 1.1)
    scaled = judge([[scale * s for s in one] for one in first], [[scale * s for s in one] for one in second])
    assert scaled.verdict == judge(first, second).verdict
    assert scaled.ratio == pytest.approx(judge(first, second).ratio)


@pytest.mark.parametrize("number", [1, 5])
def test_a_fifth_slower_is_slower(number: int) -> None:
    generator = np.random.default_rng(3)
    found = [judge(sessions(generator, number, 1.0, 0.01), sessions(generator, number, 1.2, 0.01)) for _ in range(10)]
    verdicts = [judgement.verdict for judgement in found]
    assert verdicts.count("slower") >= 9
    assert "faster" not in verdicts


@pytest.mark.parametrize(("number", "most"), [(1, 1), (5, 4)])
def test_alike_sessions_are_seldom_called_different(number: int, most: int) -> None:
    """Five sessions: at most the 5 % of the test, here with room for chance in 40 tries."""
    generator = np.random.default_rng(11)
    found = [judge(sessions(generator, number), sessions(generator, number)).verdict for _ in range(40)]
    assert sum(verdict != "no difference shown" for verdict in found) <= most


def test_a_restless_session_hides_what_it_cannot_show() -> None:
    """Half of each session at another speed: a fifth slower may be that other speed."""
    generator = np.random.default_rng(5)
    first, second = ([session(generator, m, 100) + session(generator, 1.3 * m, 100)] for m in (1.0, 1.2))
    found = judge(first, second)
    assert found.threshold_basis == "within"
    assert found.verdict == "no difference shown"


def test_too_few_samples_are_not_ranked() -> None:
    found = judge([[1.0, 1.1, 1.0]], [[2.0, 2.1, 2.0]])
    assert (found.p_value, found.verdict) == (None, "no difference shown")


@pytest.mark.parametrize("samples", [[], [[]], [[0.0, 0.0, 0.0]]])
def test_what_cannot_be_judged_is_refused(samples: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"no samples|too coarse"):
        judge(samples, [[1.0, 1.0]])


def test_blocks_are_longer_where_samples_remember_more() -> None:
    generator = np.random.default_rng(1)
    quick, slow = (session(generator, count=2000, memory=memory) for memory in (0.0, 0.95))
    assert autocorrelation_time(quick) < 2
    assert 15 < autocorrelation_time(slow) < 100
    assert len(block_medians(slow)) < len(block_medians(quick)) <= 20


# ---------------------------------------------------------------- measurements in files


def measurement(samples: list[float], **changes: Any) -> Measurement:
    facts = {
        "model": "net.onnx", "path": "net.onnx", "sha256": "ab" * 32, "runtime": "onnx", "device": "host",
        "origin": "host", "threads": 1, "samples_ms": tuple(samples), "cpu_samples_ms": tuple(samples), "load_ms": 1.0,
        "compute_unit": "cpu", "started_at": "2026-11-14T09:26:41+00:00", "versions": {"onnx": "1.31.1"},
    }  # fmt: skip
    return Measurement.model_validate({**facts, **changes})


def document(path: Path, *measurements: Measurement) -> Path:
    """What `mobilekit measure --json` prints, with a field that a later version may add."""
    text = {"measurements": [json.loads(m.model_dump_json()) for m in measurements], "failures": [], "later": 1}
    path.write_text(json.dumps(text))
    return path


def only_pair(first: Path, second: Path) -> ComparedPair:
    found = compare_results(first, second)
    assert len(found.pairs) == 1
    return found.pairs[0]


def test_two_documents_are_compared(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    first = document(tmp_path / "a.json", measurement(session(generator, 1.0)))
    second = document(tmp_path / "b.json", measurement(session(generator, 1.3), model="other.onnx"))
    pair = only_pair(first, second)
    assert (pair.verdict, pair.role, pair.clock) == ("slower", "net.onnx and other.onnx", "cpu")
    assert pair.first.median_ms == pytest.approx(1.0, rel=0.05)
    assert "times slower" in pair.reason
    assert only_pair(second, first).verdict == "faster"
    assert only_pair(first, first).verdict == "no difference shown"


def test_lines_of_measurements_are_sessions(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    paths = []
    for name, middle in (("a", 1.0), ("b", 1.1)):
        lines = [measurement(s).model_dump_json() for s in sessions(generator, 5, middle, apart=0.005)]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n")
    pair = only_pair(*paths)
    assert (pair.first.sessions, pair.second.sessions) == (5, 5)
    assert pair.times is not None
    assert pair.times.unit == "sessions"
    assert pair.verdict == "slower"


def test_a_slower_machine_is_not_a_slower_file(tmp_path: Path) -> None:
    """Every sample and the reference product beside it took 1.4 times as long."""
    samples = session(np.random.default_rng(0))
    calm = measurement(samples, reference_ms=tuple(4 * s for s in samples))
    busy = [1.4 * s for s in samples]
    loaded = measurement(busy, reference_ms=tuple(4 * s for s in busy))
    pair = only_pair(document(tmp_path / "a.json", calm), document(tmp_path / "b.json", loaded))
    assert pair.times is not None
    assert pair.times.verdict == "slower"
    assert pair.verdict == "no difference shown"
    assert "the machine itself was not equally fast" in pair.reason


def test_conditions_that_differ_are_said(tmp_path: Path) -> None:
    samples = session(np.random.default_rng(0))
    first = document(tmp_path / "a.json", measurement(samples))
    changed = measurement(
        samples, threads=4, device="adb:1", origin="device", versions={"onnx": "1.29.0"}, compute_unit="gpu",
        throttled=True,
    )  # fmt: skip
    found = compare_results(first, document(tmp_path / "b.json", changed))
    said = {row.what: (row.first, row.second) for row in found.conditions}
    assert said["threads"] == ("1", "4")
    assert said["device"] == ("host", "adb:1")
    assert said["version of onnx"] == ("1.31.1", "1.29.0")
    assert said["compute unit"] == ("cpu", "gpu")
    assert said["frequencies held down"] == (None, "yes")
    assert found.pairs[0].clock == "wall"  # CPU time adds up threads
    assert not compare_results(first, first).conditions


def test_an_emulator_is_not_timed(tmp_path: Path) -> None:
    changes = {"cpu_samples_ms": (), "origin": "emulator", "instructions": 41_000_000}
    one = document(tmp_path / "a.json", measurement([], **changes))
    pair = only_pair(one, one)
    assert (pair.verdict, pair.times, pair.first.median_ms) == ("not timed", None, None)
    assert "41,000,000 and 41,000,000 instructions" in pair.reason


def test_what_only_one_side_measured_is_said(tmp_path: Path) -> None:
    samples = session(np.random.default_rng(0))
    both = [measurement(samples), measurement(samples, model="x.tflite", runtime="tflite")]
    found = compare_results(document(tmp_path / "a.json", *both), document(tmp_path / "b.json", both[0]))
    assert [row.what for row in found.unpaired] == ["x.tflite in tflite on host"]
    assert [pair.role for pair in found.pairs] == ["net.onnx"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.json", "[1]", "holds no measurements"),
        ("a.json", "{}", "holds no measurements"),
        ("a.json", '{"measurements": []}', "holds no measurements"),
        ("a.json", "no", "is not JSON"),
        ("a.json", '{"measurements": [{"model": 1}]}', "is wrong at measurements"),
        ("a.jsonl", "{}\n", "line 1 of"),
        ("missing.json", None, "does not exist"),
    ],
)
def test_what_is_no_result_is_refused_in_one_sentence(
    tmp_path: Path, name: str, text: str | None, sentence: str
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInputError, match=sentence):
        compare_results(path, path)


def test_samples_that_are_no_times_are_refused(tmp_path: Path) -> None:
    path = document(tmp_path / "a.json", measurement([1.0, -1.0]))
    with pytest.raises(BadInputError, match="no times"):
        compare_results(path, path)


# ---------------------------------------------------------------- folders of plans


def folder(path: Path, generator: np.random.Generator, factor: float = 1.0, **changes: Any) -> Path:
    """A plan's folder: four sessions of original and result in turn, and one of a TFLite file."""
    path.mkdir()
    lines = []
    for i in range(4):
        started = {"started_at": f"2026-11-14T09:2{i}:00+00:00"}
        lines += [
            measurement(session(generator, 1.3), model="original", **started),
            measurement(session(generator, 0.4 * factor), model="result", **started),
        ]
    lines.append(measurement(session(generator, 9.0), model="original"))  # of a round: not beside the result
    lines.append(measurement(session(generator, 0.6), model="x.tflite", runtime="tflite"))
    (path / "measurements.jsonl").write_text("".join(line.model_dump_json() + "\n" for line in lines))
    rows = list(models()[:3])
    rows[0] = rows[0].model_copy(update={"measurements": ()})
    rows[1] = rows[1].model_copy(update={"measurements": tuple(measured(0.4, 2 * i + 2) for i in range(4))})
    rows[2] = rows[2].model_copy(update={"measurements": (measured(0.6, 10),)})
    report = sample_report(models=tuple(rows), **changes)
    (path / "report.json").write_text(registry.report_writer("json").render(report))
    return path


def test_two_plans_are_compared(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    base = sample_report()
    calm = DeviceInfo.model_validate({**base.device_info.model_dump(), "clusters": ()}) if base.device_info else None
    assert calm is not None
    slow = calm.model_copy(update={"clusters": (Cluster(cpus=(0, 1), governor="powersave"),), "soc": "another"})
    first = folder(tmp_path / "a", generator)
    second = folder(tmp_path / "b", generator, 1.25, device_info=slow, plan=base.plan[1:], verdict="missed")
    found = compare_results(first, second / "report.json")
    assert [(pair.role, pair.verdict) for pair in found.pairs] == [
        ("original", "no difference shown"),
        ("result", "slower"),
        ("tflite int8", "no difference shown"),
    ]
    assert [pair.first.sessions for pair in found.pairs] == [4, 4, 1]
    said = {row.what: (row.first, row.second) for row in found.conditions}
    assert said["processor of host"] == ("AMD EPYC 7R13", "another")
    assert said["governor of host"] == (None, "powersave")
    figures = {row.what: (row.first, row.second) for row in found.figures}
    assert figures["verdict"] == ("met", "missed")
    assert [(row.what, row.second) for row in found.levers] == [("channel_pruning stage1 (4 coupled modules)", None)]
    assert json.loads(found.model_dump_json())["pairs"][1]["verdict"] == "slower"


def test_a_report_that_names_missing_lines_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", np.random.default_rng(4))
    (path / "measurements.jsonl").unlink()
    with pytest.raises(BadInputError, match=r"line 2 of measurements\.jsonl, which is not there"):
        compare_results(path, path)
    assert Report.model_validate_json((path / "report.json").read_text())


def test_a_device_of_one_result_only_is_no_condition_that_differs(tmp_path: Path) -> None:
    other = sample_report().device_info
    assert other is not None
    generator = np.random.default_rng(5)
    first = folder(tmp_path / "a", generator)
    second = folder(tmp_path / "b", generator, device_info=other.model_copy(update={"name": "ssh:pi@board"}))
    assert not [row for row in compare_results(first, second).conditions if " of ssh:pi@board" in row.what]


def test_a_limit_of_memory_is_said(tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    budget = Budget(peak_memory_mb=12)
    found = compare_results(*(folder(tmp_path / name, generator, budget=budget) for name in ("a", "b")))
    assert next(row.first for row in found.figures if row.what == "asked") == "12 MB of memory at the peak"
