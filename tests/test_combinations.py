"""Combinations of options: fitted on some inputs, judged on others, after a trial of training where that is cheap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mobilekit as mk
from mobilekit import pipeline
from mobilekit.errors import MobilekitError
from mobilekit.pipeline import options, planning, trial
from mobilekit.planner.offers import Found


def planned(workload: Path, out: Path, speedup: float = 6.0, **more: Any) -> mk.Report:
    request = pipeline.Request(str(workload), "host", mk.Budget(speedup=speedup), "onnx", **more)
    return pipeline.run(request, out, pipeline.Listener(), dry=True)


def test_a_trial_of_training_comes_before_the_judgement(
    tiny: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "MOST_STEPS", 48)
    found: dict[bool, list[Found]] = {True: [], False: []}
    first = planning.corrected_by
    reports = {}
    for train in (True, False):

        def kept(run: Any, prices: Any, known: Any, one: Found, train: bool = train) -> Any:
            found[train].append(one)
            return first(run, prices, known, one)

        monkeypatch.setattr(planning, "corrected_by", kept)
        reports[train] = planned(tiny, tmp_path / str(train), 12.0, train=train)
    tried, plain = reports[True].together, reports[False].together
    assert tried is not None
    assert plain is not None
    assert (tried.steps, plain.steps) == (48, 0)
    assert "after a trial of 48 training steps" in str(tried)
    assert "before any training" in str(plain)
    # the first combination is the same one: damages of single options are those before training
    assert found[True][0].same_as(found[False][0])
    stages = [tmp_path / str(train) / "checkpoints" / "combination 1.json" for train in (True, False)]
    values = [mk.types.Together.model_validate(_value(stage)) for stage in stages]
    assert values[0].damage < values[1].damage


def _value(stage: Path) -> Any:
    value = json.loads(stage.read_text())["value"]
    return value.get("value", value)


def _fails(*_: object, **__: object) -> None:
    raise MobilekitError("the training step 1 fails")


@pytest.mark.parametrize(("name", "value"), [("MACS", 10**6), ("distil", _fails)], ids=["too large", "it fails"])
def test_what_cannot_be_tried_is_judged_before_any_training(
    name: str, value: object, tiny: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, name, value)
    report = planned(tiny, tmp_path / "out")
    assert report.together is not None
    assert report.together.steps == 0


def test_weights_are_fitted_on_other_inputs_than_damages_are_judged_on(
    tiny: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer with more inputs than there are samples fits these exactly, and its damage would look like none."""
    seen = []
    measure = options.damages

    def kept(candidate: Any, chosen: Any, apply: Any, reference: Any, progress: Any) -> Any:
        seen.append((torch.cat(candidate.calibration.inputs), reference.inputs))
        return measure(candidate, chosen, apply, reference, progress)

    monkeypatch.setattr(options, "damages", kept)
    planned(tiny, tmp_path / "out")
    ((fitted, judged),) = seen
    assert len(fitted) == len(judged) > 0
    assert not any(bool((one == judged).flatten(1).all(dim=1).any()) for one in fitted)


def test_one_plan_with_other_kinds_of_levers_is_looked_at(
    tiny: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks do much damage before training and little after it: some combination leaves one out."""
    monkeypatch.setattr(options, "SEARCHED", ("channel_pruning", "block_removal", "int8"))
    monkeypatch.setattr(planning, "HOPEFUL", 1e-5)  # widths cost this network next to nothing
    kinds: list[set[str]] = []
    measure = planning.corrected_by

    def kept(run: Any, prices: Any, known: Any, one: Found) -> Any:
        kinds.append({at for at, _ in one.choice})
        return measure(run, prices, known, one)

    monkeypatch.setattr(planning, "corrected_by", kept)
    planned(tiny, tmp_path / "out", 12.0)
    assert any("block" in each for each in kinds)
    assert any("block" not in each for each in kinds)


def test_options_that_ruin_the_network_are_left_out_where_others_suffice(
    tiny: Path, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[tuple[int, bool]] = []
    monkeypatch.setattr(options, "HOPELESS", 0.05)
    first = planning.search

    def kept(run: Any, prices: Any, known: options.Offered, target_ms: float, **more: Any) -> Any:
        if known.damages is not None:
            searched.append((len(known.offers), all((o.damage or 0) < 0.05 for o in known.offers)))
        return first(run, prices, known, target_ms, **more)

    monkeypatch.setattr(planning, "search", kept)
    report = planned(tiny, tmp_path / "out")
    assert searched[0][1]
    if len(searched) > 1 and not all(promising for _, promising in searched):  # the whole offer was needed
        assert max(count for count, _ in searched) > searched[0][0]
    assert report.plan
