"""Sparse training: schedules and mask updates against numpy, exact sparsity, weights that stay at zero."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training_jobs import data, job, killed, net

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.training.distillation import Distillation, Mix
from mobilekit.training.hooks import Labels, weights
from mobilekit.training.job import Recipe, State, TrainingJob
from mobilekit.training.loop import train
from mobilekit.training.masks import GrowingMasks, KeptMasks, Masks, Schedule, Surgery, cubic, surgery
from mobilekit.training.sparse import Penalised, dense_sparse_dense, l1_penalty, prune_dynamically, prune_gradually
from mobilekit.workloads import fashion_mnist

FEW = settings(max_examples=60, deadline=None)
RECIPE = Recipe(steps=24, learning_rate=1e-3)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def zeros(module: nn.Module) -> dict[str, int]:
    return {name: int((weight == 0).sum()) for name, weight in weights(module).items()}


def wanted(module: nn.Module, sparsity: float) -> dict[str, int]:
    return {name: round(sparsity * weight.numel()) for name, weight in weights(module).items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------- arithmetic


@FEW
@given(st.floats(-0.5, 1.5), st.floats(0, 0.5), st.floats(0, 0.99))
def test_the_cubic_schedule_is_that_of_the_paper(fraction: float, initial: float, final: float) -> None:
    t, begin, updates, every = np.clip(fraction, 0, 1) * 400, 0.0, 40, 10
    expected = final + (initial - final) * (1 - (t - begin) / (updates * every)) ** 3
    assert cubic(fraction, final, initial) == pytest.approx(expected, abs=1e-12)


def test_the_schedules_part_of_a_training() -> None:
    schedule = Schedule(0.8, begin=0.2, end=0.6)
    assert [schedule.part(at) for at in (0.0, 0.2, 0.6, 1.0)] == [0.0, 0.0, 1.0, 1.0]
    assert schedule.part(0.4) == pytest.approx(1 - 0.5**3)


@FEW
@given(st.data())
def test_surgery_has_two_thresholds(drawn: st.DataObject) -> None:
    count = drawn.draw(st.integers(1, 40))
    values = np.array(drawn.draw(st.lists(st.integers(-9, 9), min_size=count, max_size=count)), np.float32)
    kept = np.array(drawn.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    low = drawn.draw(st.integers(0, 9))
    high = low + drawn.draw(st.integers(0, 4))
    expected = [
        False if abs(w) < low else True if abs(w) >= high else bool(k) for w, k in zip(values, kept, strict=True)
    ]
    assert surgery(torch.from_numpy(values), torch.from_numpy(kept), low, high).tolist() == expected


@FEW
@given(st.integers(1, 60), st.floats(0, 0.999), st.integers(0, 5))
def test_the_smallest_are_cut_and_exactly_so_many(size: int, sparsity: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(size, 1)
    with torch.no_grad():
        layer.weight.mul_(4).round_()  # many magnitudes are equal
    kept = Masks.smallest(layer, sparsity).kept["weight"].numpy()
    magnitude = layer.weight.detach().abs().numpy()
    assert (~kept).sum() == min(round(sparsity * size), size - 1)
    if not kept.all():
        assert magnitude[~kept].max() <= magnitude[kept].min()


def test_the_l1_penalty_is_the_sum_of_magnitudes_and_has_their_gradient() -> None:
    module = net()
    total = sum(float(np.abs(w.detach().numpy().astype(np.float64)).sum()) for w in weights(module).values())
    term = l1_penalty(module, 0.25)
    assert float(term.detach()) == pytest.approx(0.25 * total, rel=1e-5)
    term.backward()
    torch.testing.assert_close(module[0].weight.grad, 0.25 * module[0].weight.detach().sign())
    assert module[1].weight.grad is None
    assert module[3].bias.grad is None


def test_only_weights_of_layers_are_masked_and_shared_ones_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.PReLU(4), nn.BatchNorm1d(4))
    assert set(weights(module)) == {"0.weight", "2.weight"}
    module[2].weight = module[0].weight
    assert set(weights(module)) == {"0.weight"}
    module[0].weight.requires_grad_(requires_grad=False)
    with pytest.raises(UnsupportedError, match="no convolution or linear layer"):
        weights(module)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("recipe", [prune_gradually, prune_dynamically])
def test_pruned_weights_are_exactly_zero_in_exactly_the_sparsity(recipe: Callable[..., Any], optimiser: Any) -> None:
    module = net()
    before = copy.deepcopy(module)
    how = Recipe(steps=24, learning_rate=1e-2, optimiser=optimiser)
    found = recipe(module, Labels(), job(), Schedule(0.8, every=3), how)
    assert same(module, before)
    assert zeros(found.module) == wanted(module, 0.8)
    for name, weight in weights(found.module).items():
        assert torch.equal(weight != 0, found.masks.kept[name])
        assert not np.signbit(weight.detach().numpy()[weight.detach().numpy() == 0]).any()  # minus zero packs badly
        assert found.masks.sparsity[name] == pytest.approx(0.8, abs=0.5 / weight.numel() + 1e-9)
    assert not any(bool((p == 0).all()) for n, p in found.module.named_parameters() if n.endswith("bias"))
    assert found.trained.last_loss < found.trained.first_loss


def test_sparsity_grows_along_the_schedule_and_what_is_cut_stays_cut() -> None:
    module = net()
    masks: list[dict[str, Tensor]] = []

    class Watching(GrowingMasks):
        def after_step(self, step: int, fraction: float) -> None:
            super().after_step(step, fraction)
            masks.append({name: kept.clone() for name, kept in self.kept.items()})
            assert zeros(module) == {name: int((~kept).sum()) for name, kept in self.kept.items()}

    train(module, Labels(), job(), Recipe(steps=20), (Watching(module, Schedule(0.6, begin=0.2, end=0.8, every=4)),))
    for step, found in enumerate(masks, start=1):
        changed = max(at for at in range(step + 1) if at % 4 == 0 or at >= 16)
        part = 1 - (1 - np.clip((changed / 20 - 0.2) / 0.6, 0, 1)) ** 3
        for kept in found.values():
            assert int((~kept).sum()) == round(0.6 * part * kept.numel())
    for earlier, later in itertools.pairwise(masks):
        assert not any(bool((later[name] & ~earlier[name]).any()) for name in later)


def test_a_weight_that_was_cut_wrongly_grows_again_under_surgery_only() -> None:
    """The weight that the task needs starts as the smallest; its gradient is what brings it back."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, generator=generator)

    def fit(module: nn.Module, batch: Tensor, _: Any) -> Tensor:
        return (module(batch)[:, 0] - 3 * batch[:, 0]).pow(2).mean()

    found = {}
    for name, recipe in (("gradual", prune_gradually), ("dynamic", prune_dynamically)):
        layer = nn.Linear(8, 1, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[0.01, *[0.3] * 7]]))
        how = Recipe(steps=120, learning_rate=0.02, optimiser="sgd", momentum=0.0, weight_decay=0.0, warmup=0.0)
        schedule = Schedule(0.5, end=0.1, every=1)
        found[name] = recipe(layer, fit, job(batches=lambda: [inputs], labelled=False), schedule, how)
    assert not found["gradual"].masks.kept["weight"][0, 0]
    assert found["dynamic"].masks.kept["weight"][0, 0]
    assert found["dynamic"].regrown > 0
    assert found["dynamic"].trained.last_loss < 0.1 * found["gradual"].trained.last_loss


def test_surgery_runs_with_masked_weights_and_updates_all_of_them() -> None:
    module = net()
    hook = Surgery(module, Schedule(0.7, end=0.99, every=2))
    seen: list[bool] = []

    def objective(inner: nn.Module, inputs: Tensor, target: Any) -> Tensor:
        seen.append(all(bool((inner.get_parameter(n)[~kept] == 0).all()) for n, kept in hook.kept.items()))
        return Labels()(inner, inputs, target)

    class Behind(KeptMasks):
        """Between two steps the cut weights are there."""

        def after_step(self, step: int, fraction: float) -> None:
            if step == 8:
                cut = {n: module.get_parameter(n)[~kept] for n, kept in hook.kept.items()}
                assert all(len(values) > 0 and bool((values != 0).all()) for values in cut.values())

    train(module, objective, job(), Recipe(steps=10), (hook, Behind(Masks({}))))  # only to look
    assert all(seen)
    assert zeros(module) == wanted(module, 0.7)


def test_dense_again_from_exactly_zero_at_a_tenth_of_the_rate() -> None:
    module = net()
    starts: list[State] = []

    def objective(inner: nn.Module, inputs: Tensor, target: Any) -> Tensor:
        starts.append({name: weight.detach().clone() for name, weight in weights(inner).items()})
        return Labels()(inner, inputs, target)

    how = Recipe(steps=12, optimiser="sgd", learning_rate=0.05, weight_decay=0.0, momentum=0.0, clip=1e9)
    found = dense_sparse_dense(module, objective, job(), 0.6, how)
    assert found.sparse is not None
    assert zeros(found.sparse.module) == wanted(module, 0.6)
    assert len(starts) == 24
    for name, kept in found.masks.kept.items():
        for step in range(13):  # every forward of the sparse phase, and the first of the dense one
            assert torch.equal(starts[step][name] == 0, ~kept)
        revived = found.module.get_parameter(name)[~kept]
        assert float((revived != 0).float().mean()) > 0.5
    assert torch.equal(starts[12]["7.weight"], found.sparse.module[7].weight)
    inner, (inputs, target) = copy.deepcopy(found.sparse.module).train(), data()[0]
    nn.functional.cross_entropy(inner(inputs), target).backward()
    step = 0.1 * 0.1 * 0.05 * inner[7].weight.grad  # the warm-up's first rate of a tenth of the rate
    torch.testing.assert_close(starts[13]["7.weight"], starts[12]["7.weight"] - step, rtol=1e-4, atol=1e-7)


def test_sparsity_by_name_and_frozen_weights() -> None:
    module = net()
    found = prune_gradually(module, Labels(), job(), Schedule({"3.weight": 0.5}), RECIPE)
    assert zeros(found.module) == {**zeros(module), "3.weight": round(0.5 * 315)}
    module[0].weight.requires_grad_(requires_grad=False)
    found = prune_gradually(module, Labels(), job(), Schedule(0.5), RECIPE)
    assert set(found.masks.kept) == {"3.weight", "7.weight"}
    assert torch.equal(found.module[0].weight, module[0].weight)
    slow = Recipe(steps=4, rates={"3": 0.0})
    found = prune_gradually(module, Labels(), job(), Schedule(0.5), slow)
    assert set(found.masks.kept) == {"7.weight"}
    assert torch.equal(found.module[3].weight, module[3].weight)


def test_masks_of_zeros_keep_a_sparse_network_sparse() -> None:
    sparse = net()
    Masks.smallest(sparse, 0.9).apply(sparse)
    assert zeros(sparse) == wanted(sparse, 0.9)
    held = copy.deepcopy(sparse)
    train(held, Labels(), job(), RECIPE, (KeptMasks(Masks.of_zeros(sparse)),))
    assert zeros(held) == zeros(sparse)
    train(sparse, Labels(), job(), RECIPE)
    assert sum(zeros(sparse).values()) < sum(zeros(held).values()) / 2


def test_pruning_takes_a_teacher_and_its_hints() -> None:
    teacher = net(7)
    objective = Distillation(net(), teacher, Mix(hints=1.0, attention=1.0, points=("2", "4")), example=data()[0][0])
    found = prune_dynamically(net(), objective, job(), Schedule(0.7, every=3), RECIPE)
    assert zeros(found.module) == wanted(found.module, 0.7)
    assert found.trained.last_loss < found.trained.first_loss


def test_l1_regularisation_leaves_smaller_weights() -> None:
    plain, driven = net(), net()
    train(plain, Labels(), job(), RECIPE)
    train(driven, Penalised(Labels(), 0.01), job(), RECIPE)
    with torch.no_grad():
        assert l1_penalty(driven, 1.0) < 0.95 * l1_penalty(plain, 1.0)


# ---------------------------------------------------------------- resume


RECIPES: dict[str, Callable[[TrainingJob, Recipe], Any]] = {
    "gradual": lambda job, how: prune_gradually(net(), Labels(), job, Schedule(0.7, every=3), how),
    "dynamic": lambda job, how: prune_dynamically(net(), Labels(), job, Schedule(0.7, every=3), how),
    "dense sparse dense": lambda job, how: dense_sparse_dense(net(), Labels(), job, 0.6, how),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("at", [3, 10, 12, 13, 20])
def test_a_killed_training_ends_as_an_uninterrupted_one(name: str, at: int) -> None:
    how = Recipe(steps=12 if name.startswith("dense") else 24, checkpoint_seconds=-1.0)
    whole = RECIPES[name](job(), how)
    kept = killed(lambda **changes: RECIPES[name](job(**changes), how), at)
    fractions: list[float] = []
    again = RECIPES[name](job(load=lambda: dict(kept[-1]), progress=fractions.append), how)
    assert len(fractions) == 24 - at
    assert fractions[-1] == 1.0
    assert same(whole.module, again.module)
    assert all(torch.equal(kept, again.masks.kept[key]) for key, kept in whole.masks.kept.items())
    assert getattr(whole, "regrown", 0) == getattr(again, "regrown", 0)


# ---------------------------------------------------------------- what is refused, and a real network


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan"), float("inf")])
def test_sparsities_that_make_no_sense(sparsity: float) -> None:
    for recipe in (prune_gradually, prune_dynamically):
        with pytest.raises(BadInputError, match="from 0 to below 1"):
            recipe(net(), Labels(), job(), Schedule(sparsity), RECIPE)
    with pytest.raises(BadInputError, match="from 0 to below 1"):
        dense_sparse_dense(net(), Labels(), job(), sparsity, RECIPE)


def test_other_input_that_makes_no_sense() -> None:
    with pytest.raises(BadInputError, match=r"'9\.weight' is no weight"):
        Masks.smallest(net(), {"9.weight": 0.5})
    with pytest.raises(BadInputError, match="penalty is -1"):
        Penalised(Labels(), -1.0)
    with pytest.raises(BadInputError, match="cannot grow"):
        Schedule(0.5, begin=0.8, end=0.5)
    with pytest.raises(BadInputError, match="every 0 steps"):
        Schedule(0.5, every=0)
    broken = net()
    with torch.no_grad():
        broken[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(BadInputError, match=r"3\.weight holds numbers that are not finite"):
        Masks.smallest(broken, 0.5)


def fashion() -> list[tuple[Tensor, Tensor]]:
    images, labels = next(iter(fashion_mnist.train_data()))
    return list(zip(images.split(32), labels.split(32), strict=True))


@pytest.mark.parametrize("recipe", [prune_gradually, prune_dynamically])
def test_fashion_mnist_recovers_from_pruning(recipe: Callable[..., Any]) -> None:
    batches = fashion()
    cut = fashion_mnist.model()
    Masks.smallest(cut, 0.8).apply(cut)
    how = Recipe(steps=8, learning_rate=1e-3)
    found = recipe(fashion_mnist.model(), Labels(fashion_mnist.loss), job(batches=lambda: batches),
                   Schedule(0.8, end=0.3, every=1), how)  # fmt: skip
    assert zeros(found.module) == wanted(found.module, 0.8)
    images, labels = batches[0]
    with torch.no_grad():
        assert fashion_mnist.loss(found.module(images), labels) < fashion_mnist.loss(cut(images), labels)
