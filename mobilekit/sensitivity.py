"""Measures what options cost: the divergence of the output from the original's on calibration inputs.

For classifiers the divergence is the mean rise of the cross entropy against the original's own soft labels: a change
of loss that needs no labels and has less noise than one against them (docs/decisions/0005-damage.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mobilekit.errors import MobilekitError
from mobilekit.evaluate import batch_size, classes, divergence, outputs, top1_agreement
from mobilekit.types import Candidate, Network, Option, within

MOST_SAMPLES, FEWEST_SAMPLES = 128, 16
PASSES = 24_000
"""Forward passes of one sample that measuring all options may take, whatever the network."""
MAC_BUDGET = 75 * 10**10
"""Multiply-accumulates that they may take, about a minute of one core: it fixes the number of samples, and unlike a
time limit it gives the same number on every machine."""
HOPELESS = 3.0
"""A divergence at which nothing is left of the network: the rest of the samples is not run."""
FIRST_SHARE = 4
"""The first quarter of the samples tells what is hopeless."""
UNITS = 8
"""A stretch of the network that is not run again holds at most an eighth of its layers."""
INT8_STEPS = 255
DIGITS = 6
"""The number of threads changes sums in the last digits, and must not change a plan."""


def passes_at_most(macs: int) -> int:
    """Forward passes of one sample that measuring a network of so many multiply-accumulates may take."""
    return min(PASSES, max(MAC_BUDGET // max(1, macs), 50 * FEWEST_SAMPLES))


def samples(macs: int, runs: float) -> int:
    """Calibration samples of each of so many runs: enough to rank options, few enough to try every option."""
    return int(max(FEWEST_SAMPLES, min(MOST_SAMPLES, passes_at_most(macs) / max(1.0, runs))))


@dataclass(frozen=True)
class Damage:
    """What one option does to the output, or why it cannot be applied."""

    value: float | None
    refused: str = ""
    agreement: float | None = None
    """Share of samples whose largest output is the original's; None where outputs have no classes."""
    passes: int = 0
    """Samples that were run; those whose first layers were not run again count by the share that was."""


class Reference:
    """The original's outputs on some inputs, and what stretches of it give, so that they are run once.

    `inputs` is (N, C, H, W). The module is not changed.
    """

    def __init__(self, module: nn.Module, inputs: torch.Tensor) -> None:
        self.module, self.inputs = module, inputs
        self.batches = list(torch.split(inputs, batch_size(inputs)))
        self.order: list[str] = []
        self.kept: dict[str, list[torch.Tensor]] = {}
        self.ranges: dict[str, tuple[float, float]] = {}
        self.outputs = self._record()

    def _record(self) -> np.ndarray:
        """Run the original once; remember the order of its layers and what units give."""
        leaves = [path for path, layer in self.module.named_modules() if path and not list(layer.children())]
        units = _units(self.module, max(1, len(leaves) // UNITS))
        given: dict[str, list[torch.Tensor]] = {path: [] for path in units}
        with _watching(self.module, {*leaves, *units}, lambda path, result: self._note(path, result, given)):
            found = outputs(self.module, self.inputs)
        # a unit that ran more than once a batch, or gave no tensor, is run anew each time
        self.kept = {path: results for path, results in given.items() if len(results) == len(self.batches)}
        self.order = list(dict.fromkeys(self.order))
        return found

    def _note(self, path: str, result: object, given: dict[str, list[torch.Tensor]]) -> None:
        self.order.append(path)
        if path in given:
            if isinstance(result, torch.Tensor):
                given[path].append(result)
            else:
                del given[path]

    def damage(self, module: nn.Module) -> Damage:
        """Divergence of the changed module's outputs; its layers in front of the first change are not run again.

        The module is left as it is.
        """
        skipped = self._unchanged(module)
        share = 1 - len([path for path in self.order if _inside(path, skipped)]) / max(1, len(self.order))
        first = max(1, len(self.batches) // FIRST_SHARE)
        with self._replayed(module, skipped) as run:
            found = run(0, first)
            value = divergence(self.outputs[: len(found)], found)
            if value < HOPELESS and first < len(self.batches):
                found = np.concatenate([found, run(first, len(self.batches))])
                value = divergence(self.outputs[: len(found)], found)
        same = top1_agreement(self.outputs[: len(found)], found) if classes(found) > 1 else None
        return Damage(round(value, DIGITS), agreement=same, passes=round(share * len(found)))

    def _unchanged(self, module: nn.Module) -> list[str]:
        """Units that hold what they held, and that run before anything that does not."""
        own, theirs = dict(self.module.named_modules()), dict(module.named_modules())
        changed = [path for path in self.order if path in own and not _same(own[path], theirs.get(path))]
        if not changed:
            return []
        place = {path: index for index, path in enumerate(self.order)}
        first = min(place[path] for path in changed)
        # the order notes a unit when it ends: one that ends before the first changed layer does not hold it
        return [path for path in self.kept if path in theirs and place[path] < first]

    @contextmanager
    def _replayed(self, module: nn.Module, skipped: Sequence[str]) -> Iterator[Callable[[int, int], np.ndarray]]:
        """A function that runs some batches, with the outputs of skipped units taken from the original's run."""
        current = [0]
        patched = [(module.get_submodule(path), self.kept[path]) for path in skipped]
        for unit, results in patched:
            unit.forward = lambda *_, kept=results, **__: kept[current[0]]

        def run(begin: int, end: int) -> np.ndarray:
            found = []
            with torch.inference_mode():
                for index in range(begin, end):
                    current[0] = index
                    found.append(module(self.batches[index]).float().cpu().numpy())
            return np.concatenate(found)

        try:
            yield run
        finally:
            for unit, _ in patched:
                del unit.__dict__["forward"]


def damages(
    candidate: Candidate,
    options: Sequence[Option],
    apply: Callable[[Candidate, Option], Candidate],
    reference: Reference,
    progress: Callable[[float], None],
) -> list[Damage]:
    """Damage of each option alone, before any training; an option that cannot be applied says why.

    Options re-fit what they change where they say so: the figures rank options, they do not forecast the accuracy
    after training.
    """
    found = []
    for index, option in enumerate(options):
        try:
            found.append(reference.damage(apply(candidate, option).module))
        except MobilekitError as error:
            found.append(Damage(None, str(error)))
        progress((index + 1) / len(options))
    return found


def int8_damages(network: Network, reference: Reference, progress: Callable[[float], None]) -> dict[str, float]:
    """Damage of int8 at each convolution and linear layer alone, by the operator's name.

    Simulated: the layer's input on an asymmetric grid of 256 values over the range that the inputs have. Its weights
    stay as they are: files hold weights whose rounding errors make up for each other, which leaves much less of an
    error than the inputs have (docs/decisions/0014). Operators without weights pass on values that were rounded
    before them.
    """
    module = copy.deepcopy(reference.module)
    names = [o.name for o in network.operators if _weighted(module, o.module)]
    ranges = _input_ranges(module, {o.module for o in network.operators if o.name in names}, reference.batches)
    found: dict[str, float] = {}
    for index, name in enumerate(names):
        with _rounded(module, {next(o.module for o in network.operators if o.name == name)}, ranges):
            found[name] = reference.damage(module).value or 0.0
        progress((index + 1) / len(names))
    return found


@contextmanager
def simulated_int8(
    module: nn.Module, network: Network, names: set[str], batches: Sequence[torch.Tensor]
) -> Iterator[None]:
    """These operators of the module in simulated int8, ranges from the batches (N, C, H, W); afterwards as it was.

    A layer in float behind an operator in int8 reads rounded values too.
    """
    rounded = [o for o in network.operators if network.reads_rounded(o, names)]
    paths = {o.module for o in rounded if _weighted(module, o.module)}
    with _rounded(module, paths, _input_ranges(module, paths, batches)):
        yield


@contextmanager
def _rounded(module: nn.Module, paths: set[str], ranges: Mapping[str, tuple[float, float]]) -> Iterator[None]:
    """The layers at these paths with inputs rounded within their ranges."""
    hooks = [
        module.get_submodule(path).register_forward_pre_hook(
            lambda _, given, at=ranges[path]: (_on_grid(given[0], *at), *given[1:])
        )
        for path in sorted(paths)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _weighted(module: nn.Module, path: str) -> bool:
    try:
        return bool(path) and isinstance(module.get_submodule(path), nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    except AttributeError:
        return False


def _input_ranges(
    module: nn.Module, paths: set[str], batches: Sequence[torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """Least and greatest input of each layer, zero included as the runtimes include it."""
    ranges = dict.fromkeys(paths, (0.0, 0.0))

    def note(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            low, high = ranges[path]
            ranges[path] = min(low, float(given[0].min())), max(high, float(given[0].max()))

        return hook

    hooks = [module.get_submodule(path).register_forward_pre_hook(note(path)) for path in paths]
    with torch.inference_mode():
        for batch in batches:
            module(batch)
    for hook in hooks:
        hook.remove()
    return ranges


def _on_grid(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    step = (high - low) / INT8_STEPS or 1.0
    zero = round(-low / step)
    return ((values / step).round() + zero).clamp(0, INT8_STEPS).sub(zero).mul(step)


# ---------------------------------------------------------------- stretches of a module


def _units(module: nn.Module, most: int) -> list[str]:
    """The outermost modules that hold at most so many layers each."""
    found: list[str] = []
    for path, part in module.named_modules():
        if not path or _inside(path, found):
            continue
        if sum(1 for each in part.modules() if not list(each.children())) <= most:
            found.append(path)
    return found


def _inside(path: str, units: Sequence[str]) -> bool:
    return any(within(path, unit) for unit in units)


@contextmanager
def _watching(module: nn.Module, paths: set[str], note: Callable[[str, object], None]) -> Iterator[None]:
    """Calls `note` with each of these modules' outputs."""
    handles = [
        module.get_submodule(path).register_forward_hook(lambda _, __, result, at=path: note(at, result))
        for path in sorted(paths)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(one: nn.Module, other: nn.Module | None) -> bool:
    """Whether two modules are of one class and hold the same numbers and settings."""
    if other is None or type(one) is not type(other) or one.extra_repr() != other.extra_repr():
        return False
    if len(other._forward_pre_hooks) != len(one._forward_pre_hooks):
        return False
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
