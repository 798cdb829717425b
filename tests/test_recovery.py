"""Recovery in the pipeline: the time given, the best weights, the cost of int8, odd data, several processes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_jobs import launched

import mobilekit as mk
from conftest import TINY
from mobilekit import registry
from mobilekit.errors import BadInputError
from mobilekit.evaluate import outputs
from mobilekit.network import trace
from mobilekit.pipeline import Request, recovery
from mobilekit.pipeline.lessons import Judgement, lessons_of
from mobilekit.pipeline.recovery import Recovered
from mobilekit.pipeline.request import open_job
from mobilekit.pipeline.run import Run
from mobilekit.pipeline.stages import Stages
from mobilekit.store import Store
from mobilekit.training import distillation
from mobilekit.types import Candidate, Option
from mobilekit.workload import Workload

INT8 = Option(transform="int8", where="network", settings={"calibration": "min-max"})


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(distillation, "FEWEST_STEPS", 30)
    monkeypatch.setattr(distillation, "MOST_STEPS", 30)


def variant(folder: Path, tiny: Path, *more: str) -> Path:
    """The tiny workload with other functions."""
    path = folder / "tiny.py"
    path.write_text(TINY + "\n" + "\n".join(more) + "\n", encoding="utf-8")
    (folder / "weights.safetensors").write_bytes((tiny.parent / "weights.safetensors").read_bytes())
    return path


def started(workload: Path, out: Path, **more: Any) -> Run:
    """A run that has come to its training."""
    request = Request(str(workload), "host", mk.Budget(), "onnx", **{"train_seconds": 60.0, **more})
    store = Store(out)
    store.prepare("key", resume=True)
    return Run(open_job(request), store, Stages(store, "key", lambda _stage, _fraction: None))


def candidate(run: Run, *options: Option) -> Candidate:
    workload = run.job.workload
    found = workload.candidate(trace(workload.module, workload.example_input, workload.name))
    for option in options:
        found = registry.transform(option.transform).apply(found, option)
    return found


def pruned(run: Run) -> list[Option]:
    """Half of the channels of two groups."""
    network = trace(run.job.workload.module, run.job.workload.example_input, "tiny")
    groups = [name for name, group in network.groups.items() if group.refused is None][:2]
    settings = {"criterion": "l1"}
    return [
        Option(transform="channel_pruning", where=name, settings={"width": network.groups[name].width // 2, **settings})
        for name in groups
    ]


def recover(run: Run, start: Candidate, remaining: Callable[[str, float], None] = lambda *_: None) -> Any:
    return recovery.recover(run, start, remaining)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# ---------------------------------------------------------------- distillation


def test_a_pruned_network_comes_closer_to_the_original(tiny: Path, tmp_path: Path) -> None:
    run = started(tiny, tmp_path)
    original = copy.deepcopy(run.job.workload.module)
    start = candidate(run, *pruned(run))
    before = copy.deepcopy(start.module)
    left: list[tuple[str, float]] = []
    found, recovered = recover(run, start, lambda stage, seconds: left.append((stage, seconds)))
    told = recovered.training
    inputs = torch.cat(run.job.workload.calibration)
    judgement = Judgement(inputs, outputs(original, inputs))
    assert told.distance == pytest.approx(judgement.distance(found.module), rel=1e-3)
    assert told.start_distance == pytest.approx(judgement.distance(before), rel=1e-3)
    assert told.distance < 0.7 * told.start_distance
    assert (told.steps, told.kept_step > 0, told.judged, told.processes) == (30, True, len(inputs), 1)
    assert 1e-4 <= told.learning_rate <= 1e-2
    assert "where the loss began to rise" in told.rate_note
    assert recovered.rounding is None
    assert same(run.job.workload.module, original)
    assert recovered.warnings == ("the training had time for 30 steps only: give more --train-minutes",)
    assert set(recovered.conditions) == {"training"}
    assert "30 steps" in recovered.conditions["training"]
    assert {stage for stage, _ in left} == {"training"}
    assert left[-1][1] == 0
    assert [seconds for _, seconds in left] == sorted((seconds for _, seconds in left), reverse=True)
    assert all(0 <= seconds <= 60 for _, seconds in left)


def test_the_same_seed_and_steps_give_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    runs = [started(tiny, tmp_path / name) for name in ("one", "other")]
    results = [recover(run, candidate(run, *pruned(run))) for run in runs]
    assert same(results[0][0].module, results[1][0].module)


def test_a_finished_training_is_taken_from_the_folder(tiny: Path, tmp_path: Path) -> None:
    first = started(tiny, tmp_path)
    found, recovered = recover(first, candidate(first, *pruned(first), INT8))
    again = started(tiny, tmp_path)
    resumed, told = recover(again, candidate(again, *pruned(again), INT8))
    assert same(found.module, resumed.module)
    assert told == recovered
    assert all(row.resumed for row in again.stages.rows)


def test_without_training_or_reason_nothing_is_done(tiny: Path, tmp_path: Path) -> None:
    run = started(tiny, tmp_path / "a", train=False)
    start = candidate(run, *pruned(run), INT8)
    assert recover(run, start) == (start, Recovered())
    run = started(tiny, tmp_path / "b")
    start = candidate(run)
    assert recover(run, start) == (start, Recovered())
    assert run.stages.rows == []


def test_a_training_that_makes_it_worse_is_undone(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mobilekit.training import rate_range

    deadly = dict.fromkeys(rate_range.SANE, (3.0, 3.0))  # no network survives this learning rate
    monkeypatch.setattr(rate_range, "SANE", deadly)
    run = started(tiny, tmp_path)
    start = candidate(run, *pruned(run)[:1])
    before = copy.deepcopy(start.module)
    found, recovered = recover(run, start)
    assert recovered.training.kept_step == 0
    assert same(found.module, before)
    assert any("no better" in text for text in recovered.warnings)


# ---------------------------------------------------------------- int8


LOUD = """
def model():
    net = Net()
    net.load_state_dict(load_file(Path(__file__).with_name("weights.safetensors")))
    with torch.no_grad():  # the same function, with a few channels so loud that 8 bits leave the others little
        for block, (quiet, loud) in ((net.one, (0.02, 30.0)), (net.two, (0.02, 30.0))):
            factor = torch.full((block.first[1].num_features,), quiet)
            factor[:1] = loud
            block.first[1].weight *= factor
            block.first[1].bias *= factor
            block.second[0].weight /= factor[None, :, None, None]
            block.first[2] = nn.Hardtanh(0.0, 1000.0)  # channels in front of a bound cannot be scaled back
    return net
"""


def test_int8_that_costs_little_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    run = started(tiny, tmp_path, qat_drop=5.0)
    start = candidate(run, INT8)
    found, recovered = recover(run, start)
    told = recovered.rounding
    assert found.module is start.module
    assert told.after is None
    assert told.cost.drop == told.cost.float_points - told.cost.int8_points
    assert told.cost.drop <= 5.0
    assert recovered.warnings == ()
    assert recovered.training is None
    assert "not trained with rounding" in recovered.conditions["loss by int8"]
    assert [row.name for row in run.stages.rows] == ["int8 check"]


def test_int8_that_costs_much_is_trained_with_rounding(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FEWEST_STEPS", "MOST_STEPS"):
        monkeypatch.setattr(distillation, name, 60)
    run = started(variant(tmp_path, tiny, LOUD), tmp_path / "out", qat_drop=1.0)
    original = copy.deepcopy(run.job.workload.module)
    start = candidate(run, INT8)
    found, recovered = recover(run, start)
    told = recovered.rounding
    assert told.cost.drop > 5
    assert told.steps == 60
    assert told.kept
    assert told.after.int8_points > told.cost.int8_points + 1
    assert same(run.job.workload.module, original)
    assert found.module is not original
    assert found.history == start.history
    assert found.module.state_dict().keys() == original.state_dict().keys()
    assert ("more than the 1 that are allowed" in " ".join(recovered.warnings)) == (
        told.cost.float_points - told.after.int8_points > 1
    )
    assert f"{told.after.int8_points:.2f} after 60 steps of training with rounding: kept" in told.in_words
    again = started(tmp_path / "tiny.py", tmp_path / "out", qat_drop=1.0)
    resumed, _ = recover(again, candidate(again, INT8))
    assert all(row.resumed for row in again.stages.rows)
    assert same(found.module, resumed.module)
    # the file that is shipped is the one that was judged
    path = tmp_path / "net.onnx"
    run.export(found, run.job.runtime, "int8", path)
    from mobilekit.evaluate import SessionModule

    inputs = torch.cat(run.job.workload.calibration)
    judgement = Judgement(inputs, outputs(original, inputs))
    assert judgement.points(SessionModule(run.job.runtime.open(path))) == pytest.approx(told.after.int8_points)


def test_the_time_is_shared_where_both_are_needed(tiny: Path, tmp_path: Path) -> None:
    run = started(variant(tmp_path, tiny, LOUD), tmp_path / "out", qat_drop=0.0)
    _, recovered = recover(run, candidate(run, *pruned(run)[:1], INT8))
    names = [row.name for row in run.stages.rows]
    assert names == ["training", "int8 check", "int8 training"]
    assert recovered.training.steps < 30 or recovered.rounding.steps == 30
    assert set(recovered.conditions) == {"training", "loss by int8"}


# ---------------------------------------------------------------- odd data


def workload(images: torch.Tensor, target: torch.Tensor, calibration: torch.Tensor | None) -> Workload:
    """A small network with these data; without calibration inputs it is trained on those of `images`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = net.append(nn.Linear(4, 3)).eval()
    return Workload(
        spec="net", name="net", key="", module=net, example_input=images[:1],
        calibration=(images if calibration is None else calibration,), trusted=True, held_back=(),
        train_data=None if calibration is None else lambda: list(zip(images.split(4), target.split(4), strict=True)),
        labelled=calibration is not None, evaluate=None, loss=None, preprocessing=None, labels=None,
        accuracy_kind="", data="",
    )  # fmt: skip


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, 1, 8, 8), generator=torch.Generator().manual_seed(seed))


def test_what_is_kept_back_is_not_trained_on() -> None:
    every = images(40)
    lessons = lessons_of(workload(every, torch.arange(40) % 3, every[:16][torch.randperm(16)]))
    batches = list(lessons.batches())
    given = torch.cat([inputs for inputs, _ in batches])
    labels = torch.cat([target for _, target in batches])
    assert not any(torch.equal(image, held) for image in given for held in lessons.held)
    kept = [row for row in range(40) if not any(torch.equal(every[row], held) for held in lessons.held)]
    assert len(kept) == 24
    assert {int(label) for label in labels} == {0, 1, 2}
    for image, label in zip(given, labels, strict=True):
        row = next(row for row in kept if torch.equal(every[row], image))
        assert int(label) == row % 3


def test_inputs_that_are_all_there_are_trained_on_and_judged_with_a_warning() -> None:
    every = images(16)
    lessons = lessons_of(workload(every, torch.arange(16) % 3, every))
    assert sum(len(inputs) for inputs, _ in lessons.batches()) == 16
    assert any("the training saw too" in text for text in lessons.all_warnings(judged=True))
    assert not any("the training saw too" in text for text in lessons.all_warnings(judged=False))


@pytest.mark.parametrize("count", [1, 4, 7, 8, 33])
def test_calibration_inputs_alone_are_split_where_there_are_enough(count: int) -> None:
    every = images(count)
    lessons = lessons_of(workload(every, torch.zeros(count), None))
    given = torch.cat(list(lessons.batches()))
    assert len(given) + (len(lessons.held) if count >= 8 else 0) == count
    assert min(len(batch) for batch in lessons.batches()) >= min(2, count)
    warned = " ".join(lessons.all_warnings(judged=True))
    assert (f"only {count} calibration inputs" in warned) == (count < 16)
    assert ("the training saw too" in warned) == (count < 8)


@pytest.mark.parametrize(
    ("every", "target", "said", "hopeless"),
    [
        (torch.full((16, 1, 8, 8), 0.5), torch.arange(16) % 3, "all training images are the same", True),
        (torch.arange(16.0).reshape(16, 1, 1, 1).expand(16, 1, 8, 8), torch.arange(16) % 3, "of one colour", False),
        (images(16), torch.full((16,), 2), "all of class 2", False),
    ],
)  # fmt: skip
def test_data_that_teaches_little_is_said(every: torch.Tensor, target: torch.Tensor, said: str, hopeless: bool) -> None:
    lessons = lessons_of(workload(every, target, images(32, seed=5)))
    assert any(said in text for text in lessons.warnings)
    assert lessons.hopeless == hopeless
    healthy = lessons_of(workload(images(16), torch.arange(16) % 3, images(32, seed=5)))
    assert healthy.warnings == []


@pytest.mark.parametrize(
    ("more", "said", "trained"),
    [
        ("def calibration_data(): return [stripes(3, 1)[0]]", "only 3 calibration inputs", True),
        (
            "def train_data(): return [(torch.zeros(8, 1, 16, 16), torch.zeros(8).long())]",
            "all training images are the same",
            False,
        ),
        (
            "def train_data():\n  images, target = stripes(64, 2)\n  return [(images[1::4], target[1::4])]",
            "all of class 1",
            True,
        ),
    ],
)
def test_odd_data_are_survived_with_a_warning(more: str, said: str, trained: bool, tiny: Path, tmp_path: Path) -> None:
    run = started(variant(tmp_path, tiny, more), tmp_path / "out")
    start = candidate(run, *pruned(run))
    before = copy.deepcopy(start.module)
    found, recovered = recover(run, start)
    assert any(said in text for text in recovered.warnings)
    assert run.stages.failures == []
    assert same(found.module, before) != trained
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.module.state_dict().values())


def test_points_are_what_the_original_expects() -> None:
    wanted = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=np.float32))
    inputs = torch.eye(2).reshape(2, 1, 1, 2)

    def chosen(*rows: list[float]) -> nn.Module:
        layer = nn.Linear(2, 3, bias=False)
        layer.weight.data = torch.tensor(rows).T
        return nn.Sequential(nn.Flatten(), layer)

    judgement = Judgement(inputs, wanted)
    assert judgement.points(chosen([9.0, 0.0, 0.0], [0.0, 0.0, 9.0])) == pytest.approx(65)
    assert judgement.points(chosen([0.0, 9.0, 0.0], [0.0, 0.0, 9.0])) == pytest.approx(40)
    unlabelled = Judgement(inputs, wanted, labelled=False)
    assert unlabelled.points(chosen([9.0, 0.0, 0.0], [0.0, 0.0, 9.0])) == pytest.approx(100)
    assert unlabelled.points(chosen([0.0, 9.0, 0.0], [0.0, 0.0, 9.0])) == pytest.approx(50 * (2 / 7 + 1))
    assert judgement.points(chosen([math.nan, 0.0, 0.0], [0.0, 0.0, 9.0])) == 0
    single = Judgement(inputs, np.array([[1.0], [2.0]], dtype=np.float32))
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0]])
    assert single.points(nn.Sequential(nn.Flatten(), layer)) == pytest.approx(100)


# ---------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_seconds": 0.0}, "more than zero"),
        ({"train_seconds": math.inf}, "more than zero"),
        ({"qat_drop": -0.1}, "at least 0"),
        ({"qat_drop": math.nan}, "at least 0"),
    ],
)
def test_requests_that_make_no_sense(changes: dict[str, float], said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        Request("tiny.py", "host", mk.Budget(), **changes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--train-minutes", "0"], "--train-minutes must be a number above 0"),
        (["--train-minutes", "soon"], "not 'soon'"),
        (["--qat-drop", "-1"], "--qat-drop must be a number of at least 0"),
    ],
)
def test_options_that_make_no_sense(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilekit import cli

    monkeypatch.setattr("sys.argv", ["mobilekit", "plan", "tiny.py", "--profile", "host", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_minutes_and_points_reach_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from mobilekit import cli, pipeline

    seen: list[Request] = []

    def stop(request: Request, *_: object, **__: object) -> None:
        seen.append(request)
        raise BadInputError("stopped")

    monkeypatch.setattr(pipeline, "run", stop)
    base = ["mobilekit", "plan", "tiny.py", "--profile", "host"]
    for more in ([], ["--train-minutes", "1.5", "--qat-drop", "0"]):
        monkeypatch.setattr("sys.argv", base + more)
        with pytest.raises(SystemExit):
            cli.main()
    assert [(request.train_seconds, request.qat_drop) for request in seen] == [(300.0, 0.3), (90.0, 0.0)]


def test_the_bar_shows_the_time_that_a_stage_says_is_left() -> None:
    from rich.progress import Progress

    from mobilekit.cli.terminal import LeftColumn

    bars = Progress(LeftColumn())
    known, other = bars.add_task("training", total=1.0, remaining=95.0), bars.add_task("original", total=1.0)
    column = LeftColumn()
    assert column.render(bars.tasks[known]).plain == "1:35 left"
    assert column.render(bars.tasks[other]).plain.endswith(" left")
    bars.update(known, completed=1.0)
    assert column.render(bars.tasks[known]).plain == ""


# ---------------------------------------------------------------- several processes


SCRIPT = """
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import test_recovery as tests
from safetensors.torch import save_file
from mobilekit.pipeline.teaching import together
from mobilekit.training import distillation, loop

distillation.FEWEST_STEPS = distillation.MOST_STEPS = 30
tests.torch.set_num_threads(1)
workload, out = Path(sys.argv[2]), Path(sys.argv[3])
finish = loop._Run.result

def result(self):  # what this process has after each training
    found = finish(self)
    weights = {name: value.contiguous() for name, value in found.module.state_dict().items()}
    save_file(weights, out / f"{self.workers.rank}-{found.steps}.st")
    return found

loop._Run.result = result
run = tests.started(workload, out / "run", qat_drop=0.0) if os.environ["RANK"] == "0" else None
job = run.job if run else tests.open_job(tests.Request(str(workload), "host", tests.mk.Budget(), "onnx"))
with together(job):
    assert run is not None, "only the first process tells the story"
    found, recovered = tests.recover(run, tests.candidate(run, *tests.pruned(run), tests.INT8))
    (out / "told.json").write_text(json.dumps([recovered.training.model_dump(), recovered.rounding.model_dump()]))
"""


def test_both_processes_train_and_the_first_tells(tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = launched(str(script), str(Path(__file__).parent), str(variant(tmp_path, tiny, LOUD)), str(tmp_path))
    assert done.returncode == 0, done.stderr
    training, rounding = json.loads((tmp_path / "told.json").read_text())
    assert training["processes"] == 2
    assert rounding["after"] is not None
    weights = {path.name: load_file(path) for path in tmp_path.glob("*.st")}
    steps = {name.partition("-")[2] for name in weights}
    assert len(weights) == 2 * len(steps) >= 2
    for step in steps:
        ours, theirs = weights[f"0-{step}"], weights[f"1-{step}"]
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not list(tmp_path.glob("run/**/*rank*"))


@pytest.mark.slow
def test_the_command_in_two_processes(tiny: Path, tmp_path: Path) -> None:
    """The whole job: rank 0 alone plans, measures, writes and prints; one JSON document is on stdout."""
    arguments = ["plan", str(tiny), "--profile", "host", "--speedup", "2.5", "--runtime", "onnx", "--json"]
    arguments += ["--train-minutes", "0.1", "--out", str(tmp_path / "out")]
    done = launched("-m", "mobilekit", *arguments, timeout=1200)
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert done.returncode == 0 or report["verdict"] != "met", done.stderr
    assert report["models"]
