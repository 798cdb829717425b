"""Shared weights in training: gradients of centroids, few values for good, and small packages of real files."""

from __future__ import annotations

import copy
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import build, example
from torch import Tensor, nn
from training_jobs import data, job, killed, net

from mobilekit import registry
from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.network import trace
from mobilekit.network.folding import fold_batch_norms
from mobilekit.packing import pack
from mobilekit.training.hooks import Labels, weights
from mobilekit.training.job import Recipe
from mobilekit.training.masks import Masks, Schedule
from mobilekit.training.shared import (
    Compression,
    centroid_gradient,
    clusters_of,
    deep_compression,
    fine_tune_codebook,
    share,
)
from mobilekit.types import Candidate, ExportJob
from mobilekit.workloads import fashion_mnist

FEW = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def values(module: nn.Module) -> dict[str, int]:
    """Distinct values of each weight, by their bits."""
    return {name: len(np.unique(w.detach().numpy().view(np.uint32))) for name, w in weights(module).items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------- sharing and its gradient


@FEW
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_the_gradient_of_a_centroid_is_the_sum_of_its_members(rows: int, columns: int, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    gradient = generator.standard_normal((rows, columns)).astype(np.float32)
    codes = generator.integers(0, count, (rows, columns))
    expected = [gradient[codes == code].astype(np.float64).sum() for code in range(count)]
    found = centroid_gradient(torch.from_numpy(gradient), torch.from_numpy(codes), count)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_step_moves_centroids_by_the_gradient_of_autograd() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    shared = share(module, 5)
    book = shared.books["1.weight"]
    centroids = book.centroids.clone().requires_grad_()
    inputs, target = data()[0]
    logits = nn.functional.linear(inputs.flatten(1), centroids[book.codes], shared.module[1].bias.detach())
    nn.functional.cross_entropy(logits, target).backward()
    how = Recipe(steps=1, optimiser="sgd", learning_rate=0.3, warmup=0.0, weight_decay=0.5, clip=1e9)
    found = fine_tune_codebook(shared, Labels(), job(batches=lambda: [(inputs, target)]), how)
    expected = (centroids - 0.3 * centroids.grad).detach()
    torch.testing.assert_close(found.books["1.weight"].centroids, expected)
    torch.testing.assert_close(found.module[1].weight.detach(), expected[book.codes])


@pytest.mark.parametrize("start", ["quantile", "linear", "density"])
def test_sharing_gives_every_entry_its_nearest_value_and_keeps_zeros(start: Any) -> None:
    module = net()
    Masks.smallest(module, 0.6).apply(module)
    before = copy.deepcopy(module)
    found = share(module, 6, start)
    assert same(module, before)
    assert all(count <= 6 for count in values(found.module).values())
    for name, weight in weights(module).items():
        old, new = weight.detach().numpy(), found.module.get_parameter(name).detach().numpy()
        np.testing.assert_array_equal(old == 0, new == 0)
        centroids = np.unique(new)
        nearest = np.abs(old[..., None] - centroids[centroids != 0]).min(-1)
        np.testing.assert_allclose(np.abs(old - new)[old != 0], nearest[old != 0], atol=1e-7)
    assert torch.equal(found.module[3].bias, module[3].bias)


def test_numbers_of_values_by_kind_and_by_name() -> None:
    assert clusters_of(net(), 4, 2) == {"0.weight": 16, "3.weight": 16, "7.weight": 4}
    found = values(share(net(), {"3.weight": 3}).module)
    assert found == {**values(net()), "3.weight": 3}


# ---------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_fine_tuned_weights_share_few_values_and_zeros_stay(optimiser: Any) -> None:
    module = net()
    Masks.smallest(module, 0.6).apply(module)
    shared = share(module, 6)
    before = copy.deepcopy(shared)
    how = Recipe(steps=30, learning_rate=5e-3, optimiser=optimiser)
    found = fine_tune_codebook(shared, Labels(), job(), how)
    assert same(shared.module, before.module)
    assert found.trained is not None
    assert found.trained.last_loss < found.trained.first_loss
    assert all(count <= 6 for count in values(found.module).values())
    for name, weight in weights(found.module).items():
        book = found.books[name]
        assert torch.equal(weight.detach(), book.centroids[book.codes])
        assert torch.equal(book.codes, shared.books[name].codes)
        assert not torch.equal(book.centroids, shared.books[name].centroids)
        zero = module.get_parameter(name) == 0
        assert bool((weight[zero] == 0).all())
    assert not torch.equal(found.module[7].bias, module[7].bias)  # what shares no values is trained as usual


def test_frozen_weights_and_tied_ones() -> None:
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 3))
    tied[3].weight = tied[1].weight
    shared = share(tied, 8)
    assert set(shared.books) == {"1.weight", "4.weight"}
    found = fine_tune_codebook(shared, Labels(), job(), Recipe(steps=5, rates={"4": 0.0}))
    assert found.module[3].weight is found.module[1].weight
    assert values(found.module)["1.weight"] <= 8
    assert torch.equal(found.module[4].weight, shared.module[4].weight)
    assert set(found.books) == {"1.weight", "4.weight"}
    for parameter in tied.parameters():
        parameter.requires_grad_(requires_grad=False)
    with pytest.raises(UnsupportedError, match="no convolution or linear layer"):
        share(tied, 8)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: share(net(), 0), "between 1 and"),
        (lambda: share(net(), {"1.weight": 4}), r"'1\.weight' is no weight"),
        (lambda: share(net(), 4, "random"), "no start"),  # type: ignore[arg-type]
        (lambda: clusters_of(net(), 17, 5), "1 to 16 bits"),
        (lambda: Compression(schedule=Schedule(0.5, end=0.0)), "cannot grow"),
        (lambda: deep_compression(net(), Labels(), job(), Compression(Schedule(1.0))), "below 1"),
    ],
)
def test_what_is_refused(act: Callable[[], Any], said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        act()


# ---------------------------------------------------------------- batch norms


@pytest.mark.parametrize("name", ["vgg", "resnet", "densenet", "mobilenet_v2", "shared", "unet"])
def test_folding_keeps_the_outputs(name: str) -> None:
    module = build(name)
    before = copy.deepcopy(module)
    folded = fold_batch_norms(module, trace(module, example()))
    inputs = torch.randn(4, *example().shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(folded(inputs), module(inputs), rtol=1e-3, atol=1e-4)
    assert same(module, before)
    left = {path for path, layer in folded.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    if name in ("resnet", "mobilenet_v2"):
        assert not left
    if name == "densenet":  # a batch norm in front of its convolution has no layer to be folded into
        assert left


def test_a_batch_norm_stays_where_something_else_reads_the_layer() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4, bias=False)
            self.last = nn.BatchNorm1d(4, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.last(self.linear((y + self.norm(y)).mean((2, 3))))

    torch.manual_seed(0)
    odd = Odd()
    odd(torch.randn(16, 3, 5, 5) * 3 + 1)  # statistics that are not the initial ones
    odd.eval()
    folded = fold_batch_norms(odd, trace(odd, torch.zeros(1, 3, 5, 5)))
    assert isinstance(folded.norm, nn.BatchNorm2d)
    assert isinstance(folded.last, nn.Identity)
    assert folded.linear.bias is not None
    assert folded.linear.bias.requires_grad
    inputs = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(folded(inputs), odd(inputs), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the whole sequence


@pytest.mark.parametrize("at", [5, 12, 13, 20])
def test_a_killed_compression_ends_as_an_uninterrupted_one(at: int) -> None:
    how = Compression(Schedule(0.6, every=3), conv_bits=3, linear_bits=2, example=torch.zeros(1, 1, 8, 8))
    recipe = Recipe(steps=12, checkpoint_seconds=-1.0)
    whole = deep_compression(net(), Labels(), job(), how, recipe)
    kept = killed(lambda **changes: deep_compression(net(), Labels(), job(**changes), how, recipe), at)
    calls: list[float] = []
    again = deep_compression(net(), Labels(), job(load=lambda: dict(kept[-1]), progress=calls.append), how, recipe)
    assert len(calls) == 24 - at
    assert same(whole.shared.module, again.shared.module)
    assert (again.pruned is None) == (at > 12)
    for name, book in whole.shared.books.items():
        assert torch.equal(book.centroids, again.shared.books[name].centroids)
        assert torch.equal(whole.masks.kept[name], again.masks.kept[name])


def exported(module: nn.Module, path: Path) -> Path:
    example = fashion_mnist.example_input()
    candidate = Candidate(module=module, example_input=example, network=trace(module, example))
    registry.runtime("onnx").export(ExportJob(candidate=candidate, precision="fp32", path=str(path)))
    return path


def small() -> nn.Module:
    """49 thousand weights, not trained."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 128, 3, 2, 1),
        nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1152, 10),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("build", [small, pytest.param(fashion_mnist.model, marks=pytest.mark.slow)])
def test_a_network_becomes_a_file_of_few_values_that_packs_small(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    images, labels = next(iter(fashion_mnist.train_data()))
    batches = list(zip(images.split(32), labels.split(32), strict=True))
    recipe = Recipe(steps=30 if build is small else 10, learning_rate=3e-3 if build is small else 1e-3)
    how = Compression(
        Schedule(0.8, end=0.5, every=1), conv_bits=5, linear_bits=4, example=fashion_mnist.example_input()
    )
    found = deep_compression(build(), Labels(fashion_mnist.loss), job(batches=lambda: batches), how, recipe)
    module = found.shared.module
    counts = clusters_of(module, 5, 4)
    cut = fold_batch_norms(build(), trace(build(), fashion_mnist.example_input()))
    Masks.smallest(cut, 0.8).apply(cut)
    cut = share(cut, counts).module
    with torch.no_grad():
        assert fashion_mnist.loss(module(images), labels) < 0.8 * fashion_mnist.loss(cut(images), labels)
    assert all(count <= counts[name] for name, count in values(module).items())
    for name, weight in weights(module).items():
        assert float((weight == 0).float().mean()) == pytest.approx(0.8, abs=0.5 / weight.numel() + 1e-9), name
    path = exported(module, tmp_path / "net.onnx")
    held = [onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    large = [array for array in held if array.dtype == np.float32 and array.ndim > 1]
    assert len(large) == len(counts)
    assert all(len(np.unique(array)) <= 32 for array in large)
    package = pack(path)
    assert package.packed_bytes < 0.85 * len(gzip.compress(path.read_bytes(), 9))
    assert package.packed_bytes < 0.1 * package.original_bytes
