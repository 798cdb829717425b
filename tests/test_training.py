"""The training loop and distillation on small real networks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_jobs import killed, launched

from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.training import distillation
from mobilekit.training.distillation import State, TrainingJob, distil
from mobilekit.training.hooks import Labels
from mobilekit.training.job import Recipe
from mobilekit.training.loop import train
from mobilekit.training.workers import ALONE, Workers

STEPS = 60


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "FEWEST_STEPS", STEPS)
    monkeypatch.setattr(distillation, "MOST_STEPS", STEPS)


def net(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, 3),
    ).eval()  # fmt: skip


def images(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 1, 8, 8, generator=generator) for _ in range(count)]


def labelled() -> list[tuple[Tensor, Tensor]]:
    teacher = net(8, 0)
    with torch.no_grad():
        return [(batch, teacher(batch).argmax(1)) for batch in images()]


def job(**changes: Any) -> TrainingJob:
    known: dict[str, Any] = {
        "batches": labelled,
        "labelled": True,
        "loss": None,
        "seconds": 5.0,
        "seed": 0,
        "load": lambda: None,
        "save": lambda _: None,
        "progress": lambda _: None,
    }
    return TrainingJob(**{**known, **changes})


def agreement(student: nn.Module, teacher: nn.Module) -> float:
    inputs = torch.cat(images())
    with torch.no_grad():
        return float((student(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean())


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_loss_falls_and_the_inputs_stay() -> None:
    student, teacher = net(4, 5), net(8, 0)
    kept = copy.deepcopy(student), copy.deepcopy(teacher)
    fractions: list[float] = []
    found = distil(student, teacher, job(progress=fractions.append))
    assert found.last_loss < found.first_loss
    assert found.steps == STEPS
    assert same(student, kept[0])
    assert same(teacher, kept[1])
    assert not student.training
    assert not teacher.training
    assert not found.module.training
    assert agreement(found.module, teacher) > agreement(student, teacher)
    assert all(0 <= fraction <= 1 for fraction in fractions)
    assert fractions[-1] == 1.0


def test_labels_are_not_needed() -> None:
    student, teacher = net(4, 5), net(8, 0)
    found = distil(student, teacher, job(batches=images, labelled=False))
    assert found.last_loss < found.first_loss
    assert agreement(found.module, teacher) > agreement(student, teacher)


def test_the_teacher_stays_in_eval_mode_even_if_given_in_train_mode() -> None:
    teacher = net(8, 0).train()
    before = copy.deepcopy(teacher)
    distil(net(4, 5), teacher, job())
    assert teacher.training
    assert same(teacher, before)


def test_maps_are_distilled_too() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    found = distil(student, teacher, job(batches=images, labelled=False))
    assert found.last_loss < found.first_loss


def test_the_users_loss_is_used() -> None:
    seen = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append((output.shape, target.shape))
        return nn.functional.cross_entropy(output, target, label_smoothing=0.1)

    distil(net(4, 5), net(8, 0), job(loss=loss))
    assert seen == [((16, 3), (16,))] * STEPS


def test_same_seed_same_weights() -> None:
    runs = [distil(net(4, 5), net(8, 0), job(seed=seed)).module for seed in (3, 3)]
    assert same(*runs)


# ---------------------------------------------------------------- resume


def interrupted(at: int) -> list[State]:
    """States saved by a training that ended at a step."""
    return killed(lambda **changes: distil(net(4, 5), net(8, 0), job(**changes)), at)


@pytest.mark.parametrize("at", [2, 7, 40])
def test_a_killed_training_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(distillation, "CHECKPOINT_SECONDS", -1.0)
    kept = interrupted(at)
    assert len(kept) == at
    calls: list[float] = []
    found = distil(net(4, 5), net(8, 0), job(load=lambda: kept[-1], progress=calls.append))
    assert len(calls) == STEPS - at
    assert found.steps == STEPS
    assert found.last_loss < found.first_loss
    whole = distil(net(4, 5), net(8, 0), job())
    assert found.first_loss == whole.first_loss
    assert agreement(found.module, net(8, 0)) >= 0.8 * agreement(whole.module, net(8, 0))


def test_a_finished_training_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    last: list[State] = []
    whole = distil(net(4, 5), net(8, 0), job(save=last.append))
    again = distil(net(4, 5), net(8, 0), job(load=lambda: last[-1], batches=lambda: pytest.fail("trained again")))
    assert same(whole.module, again.module)
    assert (again.steps, again.first_loss, again.last_loss) == (whole.steps, whole.first_loss, whole.last_loss)


def test_a_resumed_training_has_the_rest_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(distillation, "FEWEST_STEPS", 10)
    monkeypatch.setattr(distillation, "MOST_STEPS", STEPS)
    state = interrupted(2)[-1]
    found = distil(net(4, 5), net(8, 0), job(load=lambda: state, seconds=1e6))
    assert found.steps == STEPS


# ---------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_nan() -> None:
    poisoned = [(torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(MobilekitError, match=r"^train_data\(\) gave 21 batches in a row that hold no finite numbers$"):
        distil(net(4, 5), net(8, 0), job(batches=lambda: poisoned))
    with pytest.raises(MobilekitError, match=r"^the training loss is nan at step 1: "):
        distil(net(4, 5), net(8, 0), job(loss=lambda output, _: output.sum() * float("nan")))


def test_no_data() -> None:
    with pytest.raises(MobilekitError, match="gave no batches"):
        distil(net(4, 5), net(8, 0), job(batches=list))


def raising() -> Iterable[Any]:
    yield from labelled()[:1]
    raise OSError("disk is gone")


def bad_loss(_: Tensor, __: Tensor) -> Tensor:
    raise ValueError("shapes differ")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batches": raising}, r"^train_data\(\) fails: disk is gone$"),
        ({"loss": bad_loss}, r"^the training step 1 fails: shapes differ"),
        ({"batches": lambda: [(torch.zeros(4, 1, 8, 8),)]}, r"train_data\(\) must give \(input, target\) pairs"),
        ({"batches": images}, r"train_data\(\) must give \(input, target\) pairs"),
        ({"batches": lambda: [(torch.zeros(4, 3, 8, 8), torch.zeros(4).long())]}, "^the training step 1 fails: "),
    ],
)
def test_the_users_code_fails_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MobilekitError, match=sentence) as caught:
        distil(net(4, 5), net(8, 0), job(**changes))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the loop itself


def dropping(seed: int = 5) -> nn.Module:
    """Batch norm and dropout: state beside the weights, and random numbers in every step."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def shuffled() -> list[tuple[Tensor, Tensor]]:
    """Batches in an order drawn from the global random numbers, as users' data loaders do."""
    data = labelled()
    return [data[place] for place in torch.randperm(len(data))]


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("at", [1, 7, 29])
def test_with_a_fixed_number_of_steps_a_killed_training_ends_as_an_uninterrupted_one(optimiser: Any, at: int) -> None:
    recipe = Recipe(steps=30, optimiser=optimiser, learning_rate=0.01, checkpoint_seconds=-1.0)
    whole = train(dropping(), Labels(), job(batches=shuffled), recipe)
    kept = killed(lambda **changes: train(dropping(), Labels(), job(batches=shuffled, **changes), recipe), at)
    calls: list[float] = []
    torch.manual_seed(99)  # what came before in the process must not matter
    again = train(
        dropping(8), Labels(), job(batches=shuffled, load=lambda: kept[-1], progress=calls.append), recipe
    )  # fmt: skip
    assert len(calls) == 30 - at
    assert same(whole.module, again.module)
    assert (whole.first_loss, whole.last_loss) == (again.first_loss, again.last_loss)


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    train(dropping_like(), Labels(), job(batches=shuffled), Recipe(steps=2))
    assert torch.equal(torch.rand(3), wanted)


def dropping_like() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return dropping()


def test_one_step_of_sgd_is_the_gradient_at_the_warm_ups_first_rate() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    inputs, target = labelled()[0]
    weight = module[1].weight.detach().clone()
    nn.functional.cross_entropy(module(inputs), target).backward()
    gradient = module[1].weight.grad.clone()
    recipe = Recipe(steps=1, optimiser="sgd", learning_rate=0.5, weight_decay=0.0, clip=1e9)
    train(module, Labels(), job(batches=lambda: [(inputs, target)]), recipe)
    torch.testing.assert_close(module[1].weight.detach(), weight - 0.1 * 0.5 * gradient)


def test_the_gradients_norm_is_clipped() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    before = torch.cat([each.detach().flatten().clone() for each in module.parameters()])
    recipe = Recipe(steps=1, optimiser="sgd", learning_rate=1.0, weight_decay=0.0, clip=0.01, warmup=0.0)
    train(module, Labels(), job(), recipe)
    moved = torch.cat([each.detach().flatten() for each in module.parameters()]) - before
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    recipe = Recipe(warmup=0.2)
    assert recipe.schedule(0.0) == pytest.approx(0.1)
    assert recipe.schedule(0.1) == pytest.approx(0.55)
    assert recipe.schedule(0.2) == 1.0
    assert recipe.schedule(0.6) == pytest.approx(0.5)
    assert recipe.schedule(1.0) == pytest.approx(0.0, abs=1e-12)


def test_rates_by_path_freeze_and_slow() -> None:
    module = dropping()
    before = copy.deepcopy(module)
    rates = {"": 0.1, "0": 0.0, "1": 0.0, "6.bias": 1.0}
    recipe = Recipe(steps=1, optimiser="sgd", learning_rate=1.0, weight_decay=0.0, warmup=0.0, rates=rates)
    assert [recipe.rate(name) for name in ("6.weight", "0.weight", "6.bias", "60.weight")] == [0.1, 0.0, 1.0, 0.1]
    train(module, Labels(), job(), recipe)
    for place in (0, 1):  # frozen, the batch norm's statistics too
        assert same(module[place], before[place])
    assert not torch.equal(module[6].weight, before[6].weight)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_frozen_parameters_stay() -> None:
    module = dropping()
    module[0].weight.requires_grad_(requires_grad=False)
    before = copy.deepcopy(module)
    train(module, Labels(), job(), Recipe(steps=3))
    assert torch.equal(module[0].weight, before[0].weight)
    assert not module[0].weight.requires_grad
    assert not torch.equal(module[0].bias, before[0].bias)
    for parameter in module.parameters():
        parameter.requires_grad_(requires_grad=False)
    with pytest.raises(BadInputError, match="nothing to train"):
        train(module, Labels(), job(), Recipe(steps=3))


def test_a_gradient_that_is_not_finite() -> None:
    def root(module: nn.Module, inputs: Tensor, _: Any) -> Tensor:
        return (module(inputs) * 0).sum().sqrt()  # a finite loss of an infinite slope

    with pytest.raises(MobilekitError, match=r"^the gradient is not finite at step 1: "):
        train(dropping(), root, job(), Recipe(steps=2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "one is the least"),
        ({"learning_rate": float("nan")}, "learning rate is nan"),
        ({"learning_rate": -1.0}, "above zero"),
        ({"clip": 0.0}, "gradient clip is 0"),
        ({"warmup": 1.0}, "fractions"),
        ({"weight_decay": -1.0}, "weight decay is -1"),
        ({"optimiser": "adam"}, "no optimiser"),
        ({"rates": {"0": -0.5}}, "zero or more"),
        ({"steps": 1, "rates": {"7": 1.0}}, "no parameter at '7'"),
    ],
)
def test_recipes_that_make_no_sense(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        train(dropping(), Labels(), job(), Recipe(**changes))


def test_no_time_and_no_labels_are_refused() -> None:
    with pytest.raises(BadInputError, match="more than zero"):
        train(dropping(), Labels(), job(seconds=0.0), Recipe())
    with pytest.raises(MobilekitError, match="needs labels"):
        train(dropping(), Labels(), job(batches=images, labelled=False), Recipe(steps=1))


# ---------------------------------------------------------------- the best weights


def weight_of(module: nn.Module) -> float:
    return float(module[6].weight.detach().sum())


@pytest.mark.parametrize("wanted", ["start", "middle", "end"])
def test_the_best_weights_are_kept(wanted: str) -> None:
    module = dropping()
    figures: list[float] = []
    seen: list[float] = []

    def judge(judged: nn.Module) -> float:
        assert not judged.training
        seen.append(weight_of(judged))
        figures.append({"start": 1.0, "middle": abs(len(seen) - 5.0), "end": -1.0}[wanted] * len(seen))
        return figures[-1]

    found = train(module, Labels(), job(judge=judge), Recipe(steps=16))
    best = min(range(len(figures)), key=lambda place: figures[place])
    assert len(seen) == 9
    assert weight_of(found.module) == seen[best]
    assert found.kept_step == 2 * best == {"start": 0, "middle": 8, "end": 16}[wanted]
    assert (found.figure, found.start_figure) == (figures[best], figures[0])
    assert len(set(seen)) == 9


def test_a_killed_training_keeps_the_best_weights_from_before() -> None:
    def judge(module: nn.Module) -> float:
        return abs(float(module[6].bias.detach()[0]) - 0.05)

    recipe = Recipe(steps=24, learning_rate=0.05, checkpoint_seconds=-1.0, find_rate=True, echo=2)
    teacher = net(8, 0)

    def run(**changes: Any) -> Any:
        return distil(dropping(), teacher, job(batches=shuffled, judge=judge, **changes), recipe=recipe)

    whole = run()
    kept = killed(run, 17)
    again = run(load=lambda: kept[-1])
    assert same(whole.module, again.module)
    assert (whole.kept_step, whole.figure, whole.start_figure, whole.learning_rate) == (
        again.kept_step, again.figure, again.start_figure, again.learning_rate
    )  # fmt: skip


def test_a_review_ends_the_training_sooner() -> None:
    asked: list[nn.Module] = []

    def review(module: nn.Module) -> float:
        asked.append(module)
        return 0.7

    fractions: list[float] = []
    found = train(dropping(), Labels(), job(review=review, progress=fractions.append), Recipe(steps=40))
    assert (found.steps, len(asked)) == (28, 1)
    assert not asked[0].training
    assert fractions[-1] == 1.0
    assert fractions == sorted(fractions)
    assert train(dropping(), Labels(), job(review=lambda _: 1.0), Recipe(steps=40)).steps == 40


# ---------------------------------------------------------------- the learning rate


class Point(nn.Module):
    """A point that is to go to zero: far from it large steps help, near to it they throw it out."""

    def __init__(self, distance: float) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.linspace(-distance, distance, 8))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.place.expand(len(inputs), 8)


def test_the_rate_follows_from_how_far_the_network_is_from_its_goal() -> None:
    def loss(module: nn.Module, inputs: Tensor, _: Any) -> Tensor:
        return module(inputs).square().mean()

    recipe = Recipe(steps=1, find_rate=True)
    found = [train(Point(distance), loss, job(), recipe) for distance in (1e-3, 0.03, 0.03, 3.0)]
    rates = [each.learning_rate for each in found]
    assert rates[0] == 1e-4  # the bounds
    assert rates[0] < rates[1] == rates[2] < rates[3] == 1e-2
    assert all("where the loss began to rise" in each.rate_note for each in found[:3])


def test_where_there_is_no_time_the_usual_rate_is_taken() -> None:
    recipe = Recipe(find_rate=True, fewest_steps=1, most_steps=1, learning_rate=0.002)
    found = distil(net(4, 5), net(8, 0), job(seconds=1e-3), recipe=recipe)
    assert found.learning_rate == 0.002
    assert "too little time" in found.rate_note
    assert found.steps == 1


def test_the_search_for_a_rate_does_not_train() -> None:
    recipes = [Recipe(steps=1, find_rate=find, learning_rate=1e-9) for find in (True, False)]
    teacher = net(8, 0)
    searched, not_searched = (distil(net(4, 5), teacher, job(), recipe=recipe) for recipe in recipes)
    assert searched.first_loss == not_searched.first_loss  # the same batch, and the same weights


# ---------------------------------------------------------------- numbers that are not finite


class Poisoned(Labels):
    """A loss that is no number in some of its calls."""

    def __init__(self, when: Any) -> None:
        super().__init__()
        self.when, self.calls = when, 0

    def __call__(self, module: nn.Module, inputs: Tensor, target: Any) -> Tensor:
        self.calls += 1
        loss = super().__call__(module, inputs, target)
        return loss * float("nan") if self.when(self.calls) else loss


@pytest.mark.parametrize("judged", [False, True])
def test_a_loss_that_was_nan_once_goes_on_from_earlier_weights(judged: bool) -> None:
    judge = (lambda module: -float(module[6].weight.detach().norm())) if judged else None
    found = train(dropping(), Poisoned(lambda call: call == 30), job(judge=judge), Recipe(steps=40))
    assert found.steps == 40
    assert any("not finite 1 times" in text for text in found.warnings)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.module.state_dict().values())
    assert train(dropping(), Labels(), job(), Recipe(steps=40)).warnings == ()


def test_a_loss_that_stays_nan_ends_the_training_with_the_best_weights() -> None:
    seen: list[tuple[float, float]] = []

    def judge(module: nn.Module) -> float:
        seen.append((float(module[6].weight.detach().norm()), weight_of(module)))
        return -seen[-1][0]

    module = dropping()
    found = train(module, Poisoned(lambda call: call > 50), job(judge=judge), Recipe(steps=80, learning_rate=0.02))
    assert found.steps == 50
    assert any("stopped after 50 steps: the training loss is nan" in text for text in found.warnings)
    assert weight_of(found.module) == max(seen)[1]
    assert found.kept_step is not None
    assert 0 < found.kept_step <= 50
    plain = train(dropping(), Poisoned(lambda call: call > 50), job(), Recipe(steps=80))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in plain.module.state_dict().values())


def test_batches_without_finite_numbers_are_left_out() -> None:
    data = labelled()
    broken = data[1][0].clone()
    broken[0, 0, 0, 0] = float("inf")
    with_broken = train(dropping(), Labels(), job(batches=lambda: [data[0], (broken, data[1][1])]), Recipe(steps=6))
    without = train(dropping(), Labels(), job(batches=lambda: data[:1]), Recipe(steps=6))
    assert same(with_broken.module, without.module)
    assert with_broken.warnings == ("5 training batches held no finite numbers and were left out",)


def test_a_single_sample_at_the_end_of_a_pass_is_left_out() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    inputs, target = labelled()[0]
    with_rest = [(inputs, target), (inputs[:1], target[:1])]
    assert train(flat, Labels(), job(batches=lambda: with_rest), Recipe(steps=4)).steps == 4


# ---------------------------------------------------------------- several processes


TOGETHER = """
import sys

sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import save_file
from test_training import together_trained
from mobilekit.errors import MobilekitError
from mobilekit.training.workers import connected

workers = connected()
torch.set_num_threads(1)
for name in ("adamw", "sgd"):
    module = together_trained(name, workers)
    save_file(module.state_dict(), f"{sys.argv[2]}/{name}-{workers.rank}")
try:
    together_trained("sgd", workers, fails=workers.rank == 1)
except MobilekitError as error:
    print(f"[{workers.rank}: {error}]", flush=True)
assert workers.agreed(workers.rank) == 0
"""


def together_trained(optimiser: Any, workers: Workers, *, fails: bool = False, pairs: bool = False) -> nn.Module:
    """No batch norm: its statistics are those of a process's own batch."""
    torch.manual_seed(3 + workers.rank)  # the first process's weights count
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    data = labelled()
    if pairs:
        inputs, target = (torch.cat(parts) for parts in zip(*data, strict=True))
        data = list(zip(inputs.split(32), target.split(32), strict=True))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if fails:
            raise ValueError("only here")
        return nn.functional.cross_entropy(output, target)

    recipe = Recipe(steps=7, optimiser=optimiser, learning_rate=0.01, clip=0.5)
    return train(module, Labels(loss), job(batches=lambda: data, workers=workers), recipe).module


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TOGETHER, encoding="utf-8")
    done = launched(str(script), str(Path(__file__).parent), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "[1: the training step 1 fails: only here]" in done.stdout
    assert "[0: the training step 1 fails in another process]" in done.stdout
    for name in ("adamw", "sgd"):
        first, second = (load_file(tmp_path / f"{name}-{rank}") for rank in (0, 1))
        alone = together_trained(name, ALONE, pairs=True).state_dict()
        for key, tensor in alone.items():
            assert torch.equal(first[key], second[key])
            torch.testing.assert_close(first[key], tensor, rtol=1e-4, atol=1e-6)
