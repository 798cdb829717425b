"""Weights that share few values, and their training: Deep Compression (Han, Mao, Dally 2016, arXiv:1510.00149)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from mobilekit.errors import BadInputError
from mobilekit.network import trace
from mobilekit.network.folding import fold_batch_norms
from mobilekit.packing import cluster
from mobilekit.training.hooks import Hook, Loss, weights
from mobilekit.training.job import Phases, Recipe, State, Trained, TrainingJob
from mobilekit.training.loop import train
from mobilekit.training.masks import Masks, Schedule
from mobilekit.training.sparse import prune_gradually

Start = Literal["quantile", "linear", "density", "gaussian"]
CONV_BITS, LINEAR_BITS = 8, 5
"""Widths of the codes in the paper (section 5)."""
TUNING_RATE = 3e-4
"""Learning rate of centroids, which lie about as far from each other as the usual rate moves them in a few steps."""


@dataclass(frozen=True)
class Book:
    """Values that one weight's entries share."""

    centroids: torch.Tensor
    """(k,), of the weight's type; ascending when they were found."""
    codes: torch.Tensor
    """Index of each entry's centroid, int64 in the weight's shape."""

    def weight(self) -> torch.Tensor:
        """Each entry's centroid, in the weight's shape."""
        return self.centroids[self.codes]


@dataclass(frozen=True)
class Shared:
    """A module whose weights hold the values of their books, and nothing else."""

    module: nn.Module
    books: Mapping[str, Book]
    trained: Trained | None = None
    """What fine-tuning did; None: there was none."""


def clusters_of(module: nn.Module, conv_bits: int = CONV_BITS, linear_bits: int = LINEAR_BITS) -> dict[str, int]:
    """How many values each weight may share, from the widths of codes in convolutions and linear layers."""
    for bits in (conv_bits, linear_bits):
        if not 1 <= bits <= 16:
            raise BadInputError(f"codes are 1 to 16 bits wide, not {bits}")
    linear = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Linear)}
    return {name: 1 << (linear_bits if id(w) in linear else conv_bits) for name, w in weights(module).items()}


def share(module: nn.Module, clusters: int | Mapping[str, int], start: Start = "linear") -> Shared:
    """A copy whose convolution and linear weights have at most so many values each, by one-dimensional k-means.

    `clusters` is one number, or one for each weight by name; weights without a number stay. Zeros stay zeros, and zero
    counts as a value. Fold batch norms first (`network.folding`): exporters scale every channel by them, which would
    part the values again. Raises BadInputError for unknown names and as `packing.cluster` does, UnsupportedError where
    there are no weights.
    """
    module = copy.deepcopy(module)
    found = weights(module)
    counts = dict(clusters) if isinstance(clusters, Mapping) else dict.fromkeys(found, clusters)
    unknown = [name for name in counts if name not in found]
    if unknown:
        raise BadInputError(f"'{unknown[0]}' is no weight of a convolution or linear layer that may be changed")
    books = {}
    for name, count in counts.items():
        weight = found[name].detach()
        book = cluster(weight.float().cpu().numpy(), count, start, keep_zero=True)
        centroids = torch.from_numpy(book.centroids).to(weight)
        books[name] = Book(centroids, torch.from_numpy(book.codes.astype("int64")).to(weight.device))
        with torch.no_grad():
            found[name].copy_(books[name].weight())
    return Shared(module, books)


def centroid_gradient(gradient: torch.Tensor, codes: torch.Tensor, count: int) -> torch.Tensor:
    """Gradient of each of `count` centroids: the sum of the gradients of the entries that share it (eq. 3)."""
    sums = torch.bincount(codes.flatten(), weights=gradient.detach().flatten().double(), minlength=count)
    return sums.to(gradient.dtype)


class Codebooks(Hook):
    """Trains the shared values in place of the weights: codes stay, and entries at zero stay at zero."""

    def __init__(self, books: Mapping[str, Book]) -> None:
        self.books = dict(books)

    def attach(self, module: nn.Module) -> None:
        """Find the weights; those that the recipe freezes are left alone."""
        found = {name: module.get_parameter(name) for name in self.books}
        self.weights = {name: weight for name, weight in found.items() if weight.requires_grad}
        self._take({name: self.books[name] for name in self.weights})

    def restore(self, state: State) -> None:
        """Take kept values and codes."""
        self._take({name: Book(state[f"centroids.{name}"], state[f"codes.{name}"].long()) for name in self.weights})

    def parameters(self) -> Iterable[nn.Parameter]:
        """The shared values."""
        return self.values.values()

    def replaced(self) -> Iterable[nn.Parameter]:
        """The weights that share them."""
        return self.weights.values()

    def before_update(self) -> None:
        """Hand the weights' gradients to the values they share."""
        for name, value in self.values.items():
            gradient = self.weights[name].grad
            if gradient is None:  # the forward did not use this layer
                continue
            value.grad = centroid_gradient(gradient, self.codes[name], len(value))
            value.grad[self.zero[name]] = 0.0

    def after_step(self, step: int, fraction: float) -> None:
        """Write the values into the weights."""
        for name, book in self.settled().items():
            self.weights[name].copy_(book.weight())

    def state(self) -> State:
        """Values and codes."""
        held = self.settled()
        codes = {f"codes.{name}": book.codes.to(torch.int32) for name, book in held.items()}
        return {**{f"centroids.{name}": book.centroids for name, book in held.items()}, **codes}

    def settled(self) -> dict[str, Book]:
        """The books as they are now."""
        return {name: Book(value.detach().clone(), self.codes[name]) for name, value in self.values.items()}

    def _take(self, books: Mapping[str, Book]) -> None:
        self.values = {name: nn.Parameter(book.centroids.detach().clone()) for name, book in books.items()}
        self.codes = {name: book.codes for name, book in books.items()}
        self.zero = {name: book.centroids == 0 for name, book in books.items()}


def fine_tune_codebook(
    shared: Shared, objective: Loss, job: TrainingJob, recipe: Recipe | None = None, hooks: Sequence[Hook] = ()
) -> Shared:
    """Train the shared values of a copy, and what shares none (biases, batch norms); entries keep their codes.

    A value's gradient is the sum of those of its entries. Zeros stay zeros. Raises as `train` does.
    """
    module = copy.deepcopy(shared.module)
    hook = Codebooks(shared.books)
    recipe = recipe or Recipe(learning_rate=TUNING_RATE)
    trained = train(module, objective, job, recipe, (*hooks, hook))
    return Shared(module, {**shared.books, **hook.settled()}, trained)


@dataclass(frozen=True)
class Compression:
    """How far Deep Compression goes."""

    schedule: Schedule = field(default_factory=lambda: Schedule(0.7))
    conv_bits: int = CONV_BITS
    linear_bits: int = LINEAR_BITS
    start: Start = "linear"
    """What Han et al. found best for accuracy."""
    tuning_rate: float = TUNING_RATE
    example: torch.Tensor | None = None
    """An input (N, ...), to fold batch norms with before values are shared; None: they stay."""


@dataclass(frozen=True)
class Compressed:
    """A module with pruned, shared weights; `mobilekit pack` adds the Huffman codes to its file."""

    shared: Shared
    masks: Masks
    """Which entries are not zero."""
    pruned: Trained | None
    """What pruning did; None where an earlier run had finished it."""


def deep_compression(
    module: nn.Module, objective: Loss, job: TrainingJob, how: Compression, recipe: Recipe | None = None
) -> Compressed:
    """Prune a copy, let its weights share values, and fine-tune these (Han, Mao, Dally 2016, arXiv:1510.00149).

    Half of the job's time goes to pruning and half to fine-tuning, or the recipe's steps to each. The last step of
    the paper, Huffman codes, is that of `packing.pack`, on the exported file. Raises as `prune_gradually` and `share`
    do, and BadInputError where batch norms are to be folded and the module cannot be traced.
    """
    recipe, phases = recipe or Recipe(), Phases(job, 2)
    pruned: Trained | None = None
    if not phases.over(0):
        sparse = prune_gradually(module, objective, phases.job(0), how.schedule, recipe)
        module, pruned = sparse.module, sparse.trained
    if how.example is not None:
        module = fold_batch_norms(module, trace(module, how.example))
    counts = clusters_of(module, how.conv_bits, how.linear_bits)
    shared = share(module, counts, how.start)
    slower = replace(recipe, learning_rate=how.tuning_rate)
    tuned = fine_tune_codebook(shared, objective, phases.job(1), slower)
    return Compressed(tuned, Masks({name: book.weight() != 0 for name, book in tuned.books.items()}), pruned)
