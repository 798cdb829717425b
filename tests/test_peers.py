"""The comparison with peers: which strength a peer gets, and what the table says of the rows that are there."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import peer_cells
import peer_methods
import peers_report
from peer_cells import Cell, Search
from torch import nn

from mobilekit.errors import UnsupportedError
from mobilekit.network import trace
from mobilekit.types import Candidate

ASKED = Cell("resnet", "onnx", "uniform_l1", "int8", 4.0, 0, 3.0)


def network() -> Candidate:
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(1, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    ).eval()
    example = torch.zeros(1, 1, 28, 28)
    return Candidate(module, example, trace(module, example, "small"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A machine that takes as long as there are multiply-accumulates, and a bit; the sizes that it was asked for."""
    asked: list[int] = []
    start = network()

    def ratio(_peer: Any, subject: Candidate, _cell: Cell, _base: Path, _seconds: float = 0.0) -> float:
        asked.append(subject.network.macs)
        return 2 * start.network.macs / (subject.network.macs + 0.01 * start.network.macs)

    monkeypatch.setattr(peer_cells, "start_of", lambda _: start)
    monkeypatch.setattr(peer_cells, "original", lambda *_: tmp_path)
    monkeypatch.setattr(peer_cells, "untrained_ratio", ratio)
    monkeypatch.setattr(peer_cells, "measured_profile", lambda _device, template, _: (template, []))
    return asked


def test_the_strength_is_that_of_the_largest_network_that_is_fast_enough(measured: list[int]) -> None:
    found = Search(ASKED, ()).run()
    assert found["ratio"] >= ASKED.speedup
    tried = [one for one in found["tried"] if one["ratio"] >= ASKED.speedup]
    assert found["macs"] == max(one["macs"] for one in tried)
    # a network with four channels more everywhere is too slow
    start = network()
    wider = peer_methods.uniform_l1(start, found["part"] / peer_cells.PARTS + 8 / 64, 4)
    macs = trace(wider, start.example_input, "wider").macs
    assert 2 * start.network.macs / (macs + 0.01 * start.network.macs) < ASKED.speedup
    assert len(measured) == len(set(measured)) <= peer_cells.MOST_TRIED


def test_a_strength_that_another_search_measured_is_not_measured_again(measured: list[int]) -> None:
    first = Search(ASKED, ()).run()
    before = len(measured)
    again = Search(ASKED, first["tried"]).run()
    assert len(measured) == before
    assert again["macs"] == first["macs"]


def test_a_strength_is_turned_up_where_it_is_no_longer_fast_enough(measured: list[int]) -> None:
    found = Search(ASKED, ()).run()
    assert peer_cells.confirmed(ASKED, found)["part"] == found["part"]
    weaker = {**found, "part": found["part"] + 8}
    stronger = peer_cells.confirmed(ASKED, weaker)
    assert stronger["untrained_ratio"] >= ASKED.speedup
    assert found["part"] <= stronger["part"] < weaker["part"]
    with pytest.raises(UnsupportedError, match="times at most"):
        peer_cells.confirmed(replace(ASKED, speedup=1000.0), found)


def test_a_speedup_out_of_reach_is_said(measured: list[int]) -> None:
    found = Search(Cell("resnet", "onnx", "uniform_l1", "int8", 1000.0, 0, 3.0), ()).run()
    assert "times at most" in found["failure"]
    assert len(measured) <= peer_cells.MOST_TRIED


@pytest.mark.parametrize("name", [name for name, peer in peer_methods.peers().items() if peer.shrink is not None])
def test_every_peer_makes_the_network_smaller_and_leaves_the_start_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_pruning")
    start = peer_cells.lab.candidate(network().module, "small")
    before = {key: value.clone() for key, value in start.module.state_dict().items()}
    shrink = peer_methods.peers()[name].shrink
    assert shrink is not None
    smaller = shrink(start, 0.5, 8)
    assert trace(smaller, start.example_input, "smaller").macs < start.network.macs
    assert smaller(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert all(torch.equal(value, before[key]) for key, value in start.module.state_dict().items())
    widths = [layer.out_channels for layer in smaller.modules() if isinstance(layer, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)


# ---------------------------------------------------------------- the table


def rows(accuracies: Mapping[str, Sequence[float]], speedup: float = 4.0, ratio: float = 4.1) -> dict[str, Any]:
    """Rows of resnet in onnx: a method's accuracy for each seed."""
    found = {}
    for method, values in accuracies.items():
        precision = "own" if method == peer_cells.OURS else "int8"
        for seed, accuracy in enumerate(values):
            cell = Cell("resnet", "onnx", method, precision, speedup, seed, 3.0)
            found[cell.key] = {**vars(cell), "accuracy": accuracy, "ratio": ratio, "seconds": 120.0}
    return found


def every(ours: Sequence[float], others: float, **accuracies: Sequence[float]) -> dict[str, Any]:
    """Rows of all methods: mobilekit's, those that are named, and the other peers at one accuracy for each seed."""
    rest = {name: [others] * len(ours) for name in peer_methods.peers()}
    return rows({peer_cells.OURS: ours, **rest, **accuracies})


def place(known: Mapping[str, Any]) -> peers_report.Place:
    return peers_report.Place(peers_report.Results(known, 3.0), "resnet", "onnx")


def test_the_mean_over_seeds_decides_and_the_best_peer_is_named() -> None:
    known = every([0.90, 0.91, 0.92], 0.9, netadapt=[0.93, 0.95, 0.94])
    here = place(known)
    assert here.wins(4.0) is False
    assert "behind by 3.00 points; best peer netadapt" in here.verdict(4.0)
    assert "preliminary" not in here.verdict(4.0)
    assert "94.00 ± 1.00 (3) at 4.10x int8" in peers_report.text(known, 3.0)


def test_missing_seeds_are_called_preliminary_and_missing_cells_not_run() -> None:
    here = place(every([0.92], 0.90))
    assert here.wins(4.0) is True
    assert "preliminary" in here.verdict(4.0)
    assert here.wins(2.0) is None
    assert here.point("netadapt", 2.0).shown() == "not run"


def test_nothing_is_decided_before_every_method_has_run() -> None:
    here = place(rows({name: [0.92] for name in (peer_cells.OURS, "uniform_l1")}))
    assert here.wins(4.0) is here.passes() is None
    assert "not decided: not run: torch_pruning_group_norm, " in here.verdict(4.0)
    assert "0 of the 0 points that are decided" in peers_report.text(here.results.known, 3.0)


def test_files_that_are_too_slow_do_not_count() -> None:
    known = every([0.90], 0.89)
    known |= rows({"netadapt": [0.99]}, ratio=3.7)
    assert place(known).wins(4.0) is True
    known |= rows({peer_cells.OURS: [0.99]}, ratio=3.7)
    assert place(known).wins(4.0) is False
    assert "too slow" in place(known).verdict(4.0)


def test_other_minutes_are_other_results() -> None:
    known = rows({peer_cells.OURS: [0.92]})
    assert not peers_report.Results(known, 0.1).trained


def test_a_peer_is_judged_in_its_better_precision() -> None:
    known = every([0.90], 0.80)
    cell = Cell("resnet", "onnx", "uniform_l1", "fp32", 4.0, 0, 3.0)
    known[cell.key] = {**vars(cell), "accuracy": 0.91, "ratio": 4.0, "seconds": 90.0}
    assert place(known).wins(4.0) is False


@pytest.mark.parametrize(
    ("ours", "quick", "expected"),
    [(0.921, 0.5, True), (0.915, 0.905, False), (0.915, 0.911, True), (0.905, 0.905, False)],
)
def test_at_four_times_a_point_more_or_the_same_accuracy_much_sooner(ours: float, quick: float, expected: bool) -> None:
    known = every([ours], 0.90, uniform_l1=[0.911]) | rows({peer_cells.OURS: [quick]}, 5.2, 5.4)
    assert place(known).passes() is expected


def test_a_reason_takes_the_place_of_a_figure() -> None:
    known = rows({peer_cells.OURS: [0.92]})
    known["strength resnet onnx uniform_l1 int8 4x"] = {"failure": "it reaches 3.10 times at most, in int8"}
    here = place(known)
    for method in ("uniform_l1", "width_scratch"):
        assert here.point(method, 4.0).shown() == "it reaches 3.10 times at most, in int8"
