"""Distillation's losses against direct formulas, students of other shapes, and transfer to other classes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import training_jobs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mobilekit.errors import BadInputError, MobilekitError, UnsupportedError
from mobilekit.training.distillation import Distillation, Mix, distil, soft_target_loss
from mobilekit.training.features import Hints, attention_loss, attention_map, matching_points
from mobilekit.training.hooks import weights
from mobilekit.training.job import Recipe, TrainingJob
from mobilekit.training.masks import KeptMasks, Masks
from mobilekit.training.transfer import NewHead, coinciding, find_head, replace_head, transfer
from mobilekit.workloads import fashion_mnist

FEW = settings(max_examples=40, deadline=None)
EXAMPLE = torch.zeros(2, 1, 8, 8)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


class Net(nn.Module):
    """Two stages that work in place, and a head."""

    def __init__(self, first: int, second: int, seed: int = 0, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.early = nn.Sequential(nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(inplace=True))
        self.late = nn.Sequential(nn.Conv2d(first, second, 3, 2, 1), nn.BatchNorm2d(second), nn.ReLU(inplace=True))
        self.head = nn.Linear(second, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(x)).mean((2, 3)))


def inputs() -> list[Tensor]:
    return list(torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1)).split(16))


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(batch, (batch[:, 0, :4].mean((1, 2)) > 0).long()) for batch in inputs()]


def job(**changes: Any) -> TrainingJob:
    return training_jobs.job(**{"batches": labelled, **changes})


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------- losses


@FEW
@given(st.integers(1, 5), st.integers(2, 6), st.floats(0.5, 10), st.integers(0, 999))
def test_soft_targets_are_the_divergence_times_the_squared_temperature(n: int, c: int, t: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    student, teacher = generator.standard_normal((2, n, c)) * 3

    def softened(logits: np.ndarray) -> np.ndarray:
        power = np.exp(logits / t - (logits / t).max(axis=1, keepdims=True))
        return np.asarray(power / power.sum(axis=1, keepdims=True))

    p, q = softened(teacher), softened(student)
    expected = t**2 * (p * np.log(p / q)).sum() / n
    found = soft_target_loss(torch.from_numpy(student), torch.from_numpy(teacher), t)
    assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@FEW
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
def test_attention_maps_are_normalised_sums_of_squares(n: int, c: int, h: int, w: int, seed: int) -> None:
    features = np.random.default_rng(seed).standard_normal((n, c, h, w)) + 0.1
    expected = (features**2).sum(1).reshape(n, -1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(attention_map(torch.from_numpy(features)).numpy(), expected, rtol=1e-7)
    other = np.random.default_rng(seed + 1).standard_normal((n, c + 2, h, w))
    theirs = (other**2).sum(1).reshape(n, -1)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    found = attention_loss(torch.from_numpy(features), torch.from_numpy(other))
    assert float(found) == pytest.approx(((expected - theirs) ** 2).sum(1).mean(), rel=1e-6, abs=1e-12)


def test_maps_of_other_sizes_are_averaged_down() -> None:
    big = torch.rand(2, 3, 8, 8)
    small = big.reshape(2, 3, 4, 2, 4, 2).mean((3, 5))
    assert float(attention_loss(big, small)) == pytest.approx(0.0, abs=1e-12)
    assert float(Hints({"a": big}, {"a": small})({"a": big}, {"a": small})) == pytest.approx(0.0, abs=1e-12)


def test_hints_compare_after_an_adapter() -> None:
    torch.manual_seed(0)
    ours, theirs = {"a": torch.randn(2, 3, 4, 4), "b": torch.randn(2, 5)}, {"a": torch.randn(2, 6, 4, 4)}
    theirs["b"] = torch.randn(2, 7)
    hints = Hints(ours, theirs)
    first, second = hints.adapters[0].weight.detach().numpy()[:, :, 0, 0], hints.adapters[1].weight.detach().numpy()
    maps = np.einsum("oc,nchw->nohw", first, ours["a"].numpy()) - theirs["a"].numpy()
    features = ours["b"].numpy() @ second.T - theirs["b"].numpy()
    expected = ((maps**2).mean() + (features**2).mean()) / 2
    assert float(hints(ours, theirs).detach()) == pytest.approx(expected, rel=1e-5)


def test_the_whole_loss_is_the_weighted_sum() -> None:
    student, teacher = Net(4, 6).eval(), Net(4, 6, seed=1).eval()
    batch, target = labelled()[0]
    mix = Mix(temperature=2.0, teacher=0.7, hints=0.3, attention=5.0, points=("early.0", "late"))
    found = Distillation(student, teacher, mix, example=EXAMPLE)(student, batch, target)
    with torch.no_grad():
        ours, theirs = ({"early.0": n.early[0](batch), "late": n.late(n.early(batch))} for n in (student, teacher))
        hints = sum(nn.functional.mse_loss(ours[p], theirs[p]) for p in ours) / 2
        maps = sum(attention_loss(ours[p], theirs[p]) for p in ours) / 2
        soft = soft_target_loss(student(batch), teacher(batch), 2.0)
        hard = nn.functional.cross_entropy(student(batch), target)
    assert float(found.detach()) == pytest.approx(float(0.7 * soft + 0.3 * hard + 0.3 * hints + 5.0 * maps), rel=1e-5)


def test_points_are_the_ends_of_stages_that_both_have() -> None:
    teacher, student = Net(6, 8), Net(4, 5)
    assert matching_points(student, teacher, EXAMPLE) == ("early.2", "late.2") or matching_points(
        student, teacher, EXAMPLE
    ) == ("early", "late")
    student.late[0] = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 5, 3, 2, 1))  # as a low-rank lever leaves it
    assert len(matching_points(student, teacher, EXAMPLE)) == 2
    with pytest.raises(UnsupportedError, match="no maps of the same size"):
        matching_points(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), teacher, EXAMPLE)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["hints", "attention"])
def test_features_come_closer_in_narrower_and_replaced_layers(kind: str) -> None:
    teacher, student = Net(6, 8, seed=3).eval(), Net(4, 5, seed=4).eval()
    student.late[0] = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Conv2d(3, 5, 3, 2, 1))
    kept = copy.deepcopy(student), copy.deepcopy(teacher)
    how = Recipe(steps=40, learning_rate=1e-2)
    mix = Mix(teacher=1.0, **{kind: 1.0})
    found = distil(student, teacher, job(batches=inputs, labelled=False), mix, how)
    assert same(student, kept[0])
    assert same(teacher, kept[1])
    assert found.last_loss < 0.8 * found.first_loss
    assert set(found.module.state_dict()) == set(student.state_dict())  # adapters are no part of the student
    assert not any(module._forward_hooks for module in found.module.modules())
    if kind == "attention":
        plain = distil(student, teacher, job(batches=inputs, labelled=False), Mix(), how)
        batch = torch.cat(inputs())
        with torch.no_grad():
            distances = [
                float(attention_loss(module.early(batch), teacher.early(batch)))
                for module in (found.module, plain.module)
            ]
        assert distances[0] < distances[1]


def test_a_killed_training_with_adapters_ends_as_an_uninterrupted_one() -> None:
    mix = Mix(hints=1.0, attention=1.0)
    how = Recipe(steps=12, checkpoint_seconds=-1.0)
    teacher = Net(6, 8, seed=3)
    whole = distil(Net(4, 5), teacher, job(), mix, how)
    kept = training_jobs.killed(lambda **changes: distil(Net(4, 5), teacher, job(**changes), mix, how), at=5)
    assert any(name.startswith("objective.") for name in kept[-1])
    assert same(whole.module, distil(Net(4, 5), teacher, job(load=lambda: kept[-1]), mix, how).module)


def test_a_sparse_student_stays_sparse() -> None:
    student = Net(4, 5)
    masks = Masks.smallest(student, 0.5)
    masks.apply(student)
    hooks = (KeptMasks(Masks.of_zeros(student)),)
    found = distil(student, Net(6, 8), job(), recipe=Recipe(steps=10), hooks=hooks)
    for name, weight in weights(found.module).items():
        assert torch.equal(weight != 0, masks.kept[name])


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"hints": -1.0}, BadInputError, "weight of hints is -1"),
        ({"attention": float("nan")}, BadInputError, "weight of attention is nan"),
        ({"temperature": 0.0}, BadInputError, "temperature is 0"),
        ({"teacher": 1.1}, BadInputError, "from 0 to 1"),
        ({"hints": 1.0, "points": ()}, BadInputError, "no feature points"),
        ({"hints": 1.0, "points": ("late.7",)}, BadInputError, r"student has no module 'late\.7'"),
        ({"attention": 1.0, "points": ("head",)}, UnsupportedError, r"between maps \(N, C, H, W\)"),
    ],
)
def test_mixes_that_make_no_sense(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        distil(Net(4, 5), Net(6, 8), job(), Mix(**changes), Recipe(steps=1))


def test_data_that_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(MobilekitError, match=r"^the features cannot be compared: ") as caught:
        distil(Net(4, 5), Net(6, 8), job(batches=lambda: [torch.zeros(2, 3, 8, 8)], labelled=False), Mix(hints=1.0))
    assert "\n" not in str(caught.value)


def test_fashion_mnist_student_learns_from_hints_and_attention() -> None:
    teacher = fashion_mnist.model()
    student = fashion_mnist.model()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in weights(student).values():
            weight.add_(0.5 * weight.std() * torch.randn_like(weight))
    images, labels = next(iter(fashion_mnist.train_data()))
    batches = list(zip(images.split(32), labels.split(32), strict=True))
    found = distil(
        student, teacher, job(batches=lambda: batches, loss=fashion_mnist.loss), Mix(hints=0.1, attention=1.0),
        Recipe(steps=8, learning_rate=1e-3),
    )  # fmt: skip
    assert found.last_loss < 0.9 * found.first_loss


# ---------------------------------------------------------------- transfer


def test_the_head_is_found_by_what_it_gives() -> None:
    assert find_head(Net(4, 5), EXAMPLE) == "head"
    pooled = nn.Sequential(nn.Conv2d(1, 4, 8), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten())
    assert find_head(pooled, EXAMPLE) == "2"
    with pytest.raises(UnsupportedError, match="name the layer"):
        find_head(nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Softmax(1)), EXAMPLE)


@pytest.mark.parametrize("head", ["linear", "conv"])
def test_classes_that_coincide_keep_their_logits(head: str) -> None:
    torch.manual_seed(0)
    module: nn.Module = Net(4, 5)
    if head == "conv":
        module = nn.Sequential(nn.Conv2d(1, 4, 8), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten())
    module.eval()
    path = find_head(module, EXAMPLE)
    batch = inputs()[0]
    with torch.no_grad():
        old = module(batch)
        new = replace_head(module, NewHead(path, (2, None, 0, None)))(batch)
        drawn = replace_head(module, NewHead(path, (None,) * 200, "random")).get_submodule(path).weight
    assert new.shape == (16, 4)
    torch.testing.assert_close(new[:, [0, 2]], old[:, [2, 0]])
    assert bool((new[:, [1, 3]] == 0).all())
    rms = float(module.get_submodule(path).weight.detach().square().mean().sqrt())
    assert float(drawn.detach().std()) == pytest.approx(rms, rel=0.15)
    assert module.get_submodule(path).weight.shape[0] == 3


def test_transfer_learns_new_classes_with_a_slow_backbone() -> None:
    module = Net(4, 6).eval()
    masks = Masks.smallest(module.late, 0.5)
    masks.apply(module.late)
    before = copy.deepcopy(module)
    how = Recipe(steps=60, learning_rate=2e-2)
    found = transfer(module, NewHead("head", (0, None)), job(), how, backbone_rate=0.1)
    assert same(module, before)
    assert found.last_loss < 0.9 * found.first_loss
    assert found.module.head.weight.shape == (2, 6)
    assert torch.equal(found.module.late[0].weight != 0, masks.kept["0.weight"])
    assert not torch.equal(found.module.early[0].weight, before.early[0].weight)
    only = transfer(module, NewHead("head", (0, None)), job(), how, backbone_rate=0.0)
    assert same(only.module.early, before.early)
    assert same(only.module.late, before.late)
    assert only.last_loss < only.first_loss


def test_the_backbones_first_step_is_a_tenth_of_the_heads() -> None:
    module = Net(4, 6).train()
    batch, target = labelled()[0]
    reference = copy.deepcopy(module)
    nn.functional.cross_entropy(reference(batch), target).backward()
    how = Recipe(steps=1, learning_rate=0.5, optimiser="sgd", weight_decay=0.0, warmup=0.0, clip=1e9)
    found = transfer(module, NewHead("head", (0, 1, 2)), job(batches=lambda: [(batch, target)]), how).module
    for path, factor in (("head.weight", 1.0), ("early.0.weight", 0.1)):
        old = reference.get_parameter(path)
        wanted = old.detach() - factor * 0.5 * old.grad
        torch.testing.assert_close(found.get_parameter(path).detach(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("head", "error", "said"),
    [
        (("head", ()), BadInputError, "no classes"),
        (("head", (3,)), BadInputError, "classes 0 to 2, not 3"),
        (("head", (-1,)), BadInputError, "not -1"),
        (("tail", (0,)), BadInputError, "no module 'tail'"),
        (("early", (0,)), UnsupportedError, "no linear layer"),
        (("head", (0,), "ones"), BadInputError, "no start for new classes"),
    ],
)
def test_heads_that_make_no_sense(head: tuple[Any, ...], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        replace_head(Net(4, 5), NewHead(*head))
    with pytest.raises(BadInputError, match="factor on the learning rate is -1"):
        transfer(Net(4, 5), NewHead("head", (0,)), job(), backbone_rate=-1.0)


def test_fashion_mnist_is_transferred_to_three_coarse_classes() -> None:
    names = fashion_mnist.labels()
    head = NewHead("classifier", coinciding(names, ["trouser", "shoe", "top"]))
    assert head.classes == (1, None, None)
    coarse = torch.tensor([2, 0, 2, 2, 2, 1, 2, 1, 2, 1])
    images, labels = next(iter(fashion_mnist.train_data()))
    batches = list(zip(images.split(32), coarse[labels].split(32), strict=True))
    found = transfer(fashion_mnist.model(), head, job(batches=lambda: batches), Recipe(steps=12, learning_rate=1e-2))
    assert found.last_loss < 0.5 * found.first_loss
