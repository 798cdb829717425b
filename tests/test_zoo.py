"""Architectures through the whole chain: trace, price, prune, int8, three formats, parity."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import torch
import zoo
import zoo_networks
import zoo_report

from mobilekit import registry
from mobilekit.errors import UnsupportedError

FAST = ("espcn", "repvgg")
"""Unlike each other, and small: a pixel shuffle behind tanh, and a chain that residual branches were folded into."""
REFUSES = {"convnext": "prune", "shufflenet_v1": "prune"}
"""Networks with a step that is known to be refused, with a reason: all of their channels are tied to something."""
WRITERS = [name for name in ("onnx", "tflite", "coreml") if registry.runtime(name).unavailable() is None]


def check(name: str) -> None:
    """Every step passes but for the refusals that are known."""
    row = zoo.carried_through(name)
    assert set(row["steps"]) == set(zoo.STEPS)
    for step, found in row["steps"].items():
        if step.partition(" ")[0] in set(registry.names("runtimes")) - set(WRITERS):
            continue
        if REFUSES.get(name) == step:
            assert not found["ok"]
            assert not found["defect"]
            assert found["remedy"]
            continue
        assert found["ok"], f"{name}, {step}: {found['reason']}"
        if found.get("status") in ("executed", "evaluated"):
            assert found["sqnr_db"] is None or found["sqnr_db"] >= (60 if step.endswith("fp32") else 10)


@pytest.mark.parametrize("name", FAST)
def test_a_few_architectures_pass_every_step(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in zoo_networks.NETWORKS if name not in FAST])
def test_every_architecture_passes_every_step(name: str) -> None:
    check(name)


def test_there_are_enough() -> None:
    assert len(zoo_networks.NETWORKS) >= 50


@pytest.mark.parametrize("name", ["repvgg", "mobileone"])
def test_both_forms_of_a_rebuilt_network_compute_the_same(name: str) -> None:
    images = zoo.crops(zoo_networks.NETWORKS[name].side)[: zoo.CROPS]
    trained, single = zoo_networks.build(f"{name}_training", images), zoo_networks.build(name, images)
    with torch.inference_mode():
        torch.testing.assert_close(single(images), trained(images), rtol=1e-3, atol=1e-4)
    assert sum(p.numel() for p in single.parameters()) < sum(p.numel() for p in trained.parameters())


# ---------------------------------------------------------------- the run itself


def row(**steps: object) -> dict[str, object]:
    return {"parameters": 7, "seconds": 1.0, "steps": steps}


def test_a_failure_is_a_row_with_a_reason_and_a_remedy() -> None:
    own = zoo.failed("prune", UnsupportedError("all is tied"))
    assert (own["ok"], own["reason"], own["defect"]) == (False, "all is tied", False)
    assert own["remedy"] == zoo.REMEDIES["prune"]
    defect = zoo.failed("onnx fp32", ZeroDivisionError("division by zero"))
    assert (defect["reason"], defect["defect"]) == ("ZeroDivisionError: division by zero", True)
    gate = zoo.failed("tflite int8", UnsupportedError("x has 3.0 dB to the PyTorch network, less than 10"))
    assert gate["remedy"] == zoo.REMEDIES["int8"]


def test_a_step_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> zoo.Row:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(zoo, "exported", broken)
    monkeypatch.setattr(zoo, "priced", broken)
    found = zoo.carried_through("espcn")
    assert set(found["steps"]) == set(zoo.STEPS)
    assert [step for step, each in found["steps"].items() if each["ok"]] == ["trace", "prune"]
    assert not zoo.passes(found)


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["zoo.py", "run", "--samples", str(tmp_path / "zoo.jsonl"), "--networks", "unet", "espcn"]
    good = {step: {"ok": True} for step in zoo.STEPS}
    known = {"unet": row(**good), "espcn": row(**{**good, "trace": {"ok": False}})}
    monkeypatch.setattr(sys, "argv", arguments)
    assert zoo.wanted(zoo.parsed(), {}) == ["unet", "espcn"]
    assert zoo.wanted(zoo.parsed(), known) == []
    monkeypatch.setattr(sys, "argv", [*arguments[:4], "--again"])
    again = zoo.wanted(zoo.parsed(), known)
    assert "unet" not in again
    assert "espcn" in again


def test_the_page_names_every_failure() -> None:
    good = {
        "trace": {"ok": True, "operators": 5}, "price": {"ok": True, "ms": 0.5}, "prune": {"ok": True, "left": 0.5},
        **{f"{r} {p}": {"ok": True, "status": "executed", "sqnr_db": 90.0} for r, p in zoo.FILES},
    }  # fmt: skip
    bad = {**good, "coreml int8": zoo.failed("coreml int8", UnsupportedError("no | such layer"))}
    read = {**good, "coreml fp32": {"ok": True, "status": "structure-only", "sqnr_db": None}}
    rows = {"unet": row(**bad), "espcn": row(**read)}
    text = zoo_report.written(json.loads(json.dumps(rows)))
    assert "**1 of 2 architectures pass every step** (50%)" in text
    assert "| unet * | 7 | 5 | 0.50 | 50% | 90 | 90 | 90 | 90 | 90 | **fails** | 1 |" in text
    assert "| espcn | 7 | 5 | 0.50 | 50% | 90 | 90 | read | 90 | 90 | 90 | 1 |" in text
    assert f"| unet | coreml int8 | no \\| such layer | {zoo.REMEDIES['coreml']} |" in text
    assert "Not computed yet: alexnet" in text
