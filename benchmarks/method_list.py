"""The methods of the benchmark, each with its paper and what it does to a trained network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import lab
import torch
from torch import nn

from mobilekit import registry
from mobilekit.errors import UnsupportedError
from mobilekit.network import trace
from mobilekit.training.distillation import Distillation, Mix
from mobilekit.training.hooks import Labels
from mobilekit.training.iterative import Limits, prune_iteratively
from mobilekit.training.job import Recipe
from mobilekit.training.shared import Compression, deep_compression
from mobilekit.training.sparse import Masks, Schedule, dense_sparse_dense, prune_dynamically, prune_gradually
from mobilekit.transforms.channel_pruning import sparsity_penalty
from mobilekit.types import Candidate, Option, Precision, RuntimeEntry
from mobilekit.workloads import fashion_mnist

STEPS = 150
"""Of fine-tuning, 128 images each: a third of a pass over the data."""
KEPT = 5 / 8
"""Channels that pruning leaves of each group."""
WORK = 0.5
"""Share of a layer's multiply-accumulates that low rank and substitution are asked to leave, nearly."""
SPARSITY = 0.8
RATE = 1e-4
TIME = "time, bytes, memory"
PACKAGE = "bytes of the download package"
"""Strength of the penalties that train sparsity into scales and gates."""
ENTRY = RuntimeEntry(name="tflite", precisions=("fp32", "int8"), channel_multiple=4)
CONDITIONS = f"""Each method is applied to the same trained network and fine-tuned for {STEPS} steps of 128 images by
distillation from it, unless its name says otherwise. Pruning leaves {KEPT:.0%} of the channels of every group; low rank
and substitution leave the layer's multiply-accumulates nearest to {WORK:.0%}, at every place where they are offered.
Accuracy is that of the module on all test images, for int8 that of the ONNX file. Latency is the median CPU time on one
thread of this machine, and how many times faster than the original's file in the same runtime, run in turn (90 %
interval); some methods whose files hold the same operators as another's (other criteria as L1, simulated weights as the
original) were not timed. kB are those of the ONNX file, and of the package that `mobilekit pack` makes of it."""


@dataclass(frozen=True)
class Made:
    """What a method made: before and after fine-tuning (None: there was none), and where it was refused."""

    before: Candidate
    after: Candidate | None = None
    places: str = ""


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    paper: str
    make: Callable[[Candidate], Made]
    precision: Precision = "fp32"
    saves: str = TIME
    """What it is for, before anything is measured."""
    timed: bool = True
    """False: its files hold the operators and shapes of another method's, which is timed."""

    @property
    def key(self) -> str:
        """The name as a file's."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())


def methods(network: str) -> list[Method]:
    """All of them on the ResNet; on the VGG those whose papers used one."""
    every = [*pruning(), *substitution(), *low_rank(), *quantisation(), *sparse(), *structured(), *training()]
    whole = Method("original", "", Made)
    if network == "resnet":
        return [whole, *every]
    return [whole, *(method for method in every if method.name in OF_VGG)]


OF_VGG = (
    *("pruning, L1", "pruning, APoZ", "pruning, batch-norm scale", "pruning, LASSO", "low rank, spatial"),
    *("low rank, Tucker-2", "static int8", f"gradual magnitude pruning, {SPARSITY:.0%}"),
    "Deep Compression, 80%, 8 and 5 bits",
)


# ---------------------------------------------------------------- shared steps


def tuned(start: Candidate, made: Candidate, mix: Mix | None = None) -> Candidate:
    """The candidate after fine-tuning by distillation from the start."""
    return replace(made, module=lab.tuned(made.module, start.module, STEPS, mix=mix))


def then_tuned(change: Callable[[Candidate], tuple[Candidate, str]]) -> Callable[[Candidate], Made]:
    """A change of structure followed by fine-tuning."""

    def make(start: Candidate) -> Made:
        changed, places = change(start)
        return Made(changed, tuned(start, changed), places)

    return make


def everywhere(start: Candidate, options: list[Option]) -> tuple[Candidate, str]:
    """All options one after another; what one makes impossible for the next is counted and named."""
    refused: list[str] = []
    for option in options:
        try:
            start = registry.transform(option.transform).apply(start, option)
        except UnsupportedError as error:
            refused.append(f"{option.where} ({error})")
    done = len(options) - len(refused)
    if not done:
        raise UnsupportedError(f"refused at all {len(options)} places: {refused[0]}" if refused else "nothing suits it")
    return start, f"{done} places" + (f"; refused at {'; '.join(refused)}" if refused else "")


def pruned(start: Candidate, share: float = KEPT, **settings: Any) -> tuple[Candidate, str]:
    """This share of the channels of every prunable group."""
    return everywhere(
        start,
        [
            Option(transform="channel_pruning", where=name, settings={"width": width, **settings})
            for name, group in start.network.groups.items()
            if group.refused is None and (width := max(4, round(group.width * share / 4) * 4)) < group.width
        ],
    )


def nearest(start: Candidate, lever: str, method: str, **settings: Any) -> tuple[Candidate, str]:
    """A lever's method at every place that it is offered, at the strength that leaves nearest to WORK of the layer."""
    plugin = registry.transform(lever)
    work = {operator.module: start.network.shape(operator).macs for operator in start.network.operators}
    best: dict[str, tuple[float, Option]] = {}
    for option in plugin.options(start.network, ENTRY):
        if option.settings["method"] != method:
            continue
        after = plugin.predict(start.network, option)
        saved = start.network.macs - after.macs
        off = abs(1 - saved / work[option.where] - WORK)
        if option.where not in best or off < best[option.where][0]:
            best[option.where] = off, option
    chosen = [option.model_copy(update={"settings": {**option.settings, **settings}}) for _, option in best.values()]
    return everywhere(start, chosen)


def retraced(start: Candidate, module: nn.Module) -> Candidate:
    """A candidate of a changed module."""
    return replace(start, module=module, network=trace(module, start.example_input, start.network.name))


# ---------------------------------------------------------------- pruning


def pruning() -> list[Method]:
    """By every criterion, to the same widths: the same latency."""

    def by(name: str, paper: str, **settings: Any) -> Method:
        change = then_tuned(lambda start: pruned(start, **settings))
        return Method(f"pruning, {name}", paper, change, timed=not settings)

    return [
        by("L1", "1608.08710"),
        by("L1, readers re-fitted", "1608.08710", repair="least_squares"),
        by("L1, batch norms refreshed", "1608.08710", recalibrate=True),
        by("L2", "1608.08710", criterion="l2"),
        by("geometric median", "1811.00250", criterion="geometric_median"),
        by("Taylor", "1906.10771", criterion="taylor"),
        by("APoZ", "1607.03250", criterion="apoz"),
        by("LASSO", "1707.06168", criterion="lasso"),
        by("reconstruction", "1707.06342", criterion="reconstruction"),
        Method("pruning, batch-norm scale", "1708.06519", slimming, timed=False),
        Method("pruning, gates", "1709.01507", gates, timed=False),
        Method("pruning, iterative with back-off", "1611.06440", iterative),
    ]


def slimming(start: Candidate) -> Made:
    """Training with the penalty on scales first, as in the paper; it counts as none of the fine-tuning."""

    def objective(module: nn.Module, inputs: torch.Tensor, target: Any) -> torch.Tensor:
        return fashion_mnist.loss(module(inputs), target) + sparsity_penalty(module, start.network, RATE)

    sparse = lab.tuned_plainly(start.module, objective, STEPS // 2)
    changed, places = pruned(replace(start, module=sparse), criterion="bn_scale")
    return Made(changed, tuned(start, changed), places)


def gates(start: Candidate) -> Made:
    """A trained gate behind every group, whose size is the importance."""
    from mobilekit.training.gates import add_gates, fold_gates, gate_penalty

    gated = add_gates(start.module, start.network)

    def objective(module: nn.Module, inputs: torch.Tensor, target: Any) -> torch.Tensor:
        return fashion_mnist.loss(module(inputs), target) + gate_penalty(module, RATE)

    learned = lab.tuned_plainly(gated, objective, STEPS // 2)
    changed, places = by_gates(start, learned, fold_gates(learned))
    return Made(changed, tuned(start, changed), places)


def by_gates(start: Candidate, gated: nn.Module, folded: nn.Module) -> tuple[Candidate, str]:
    """The folded network without the channels of the smallest gates."""
    from mobilekit.network import shrink
    from mobilekit.training.gates import gate_importance

    keep = {}
    for name, group in start.network.groups.items():
        width = max(4, round(group.width * KEPT / 4) * 4)
        if group.refused is None and width < group.width:
            keep[name] = sorted(gate_importance(gated, name).topk(width).indices.tolist())
    module = shrink(folded, start.network, keep)
    return retraced(start, module), f"{len(keep)} places"


def iterative(start: Candidate) -> Made:
    """A quarter of the channels, tuned and judged on training images; half of that where accuracy does not recover."""
    batches = [batch for batch, _ in zip(fashion_mnist.train_data(seed=77), range(16), strict=False)]

    def judge(subject: Candidate) -> float:
        with torch.inference_mode():
            right = [(subject.module(images).argmax(1) == targets).float().mean() for images, targets in batches]
        return float(torch.stack(right).mean())

    found = prune_iteratively(
        start,
        step=lambda subject, amount: pruned(subject, 1 - amount, repair="least_squares")[0],
        tune=lambda subject: replace(subject, module=lab.tuned(subject.module, start.module, STEPS // 2)),
        judge=judge,
        tolerance=0.02,
        limits=Limits(first=0.25, smallest=0.1, attempts=3),
    )
    history = "; ".join(
        f"{attempt.amount:.3g} {'kept' if attempt.accepted else 'given back'}" for attempt in found.history
    )
    return Made(start, found.best, f"{len(found.history)} steps of {STEPS // 2} (share of channels: {history})")


# ---------------------------------------------------------------- other structures


def substitution() -> list[Method]:
    """By every block, started from the weights and fitted to the old outputs."""
    papers = {
        "depthwise_separable": "1704.04861",
        "inverted_residual": "1801.04381",
        "shuffle_v1": "1707.01083",
        "shuffle_v2": "1807.11164",
        "interleaved": "1707.02725",
        "fire": "1602.07360",
    }

    def by(method: str, paper: str, fit: str) -> Method:
        change = then_tuned(lambda start: nearest(start, "group_convolution", method, fit=fit))
        return Method(f"substitution, {method.replace('_', ' ')}, {fit.replace('_', ' ')}", paper, change)

    layer_wise = by("depthwise_separable", papers["depthwise_separable"], "layer_wise")
    return [*(by(method, paper, "least_squares") for method, paper in papers.items()), layer_wise]


def low_rank() -> list[Method]:
    """By every decomposition."""
    papers = {
        "svd": ("SVD", "1404.0736"),
        "spatial": ("spatial", "1405.3866"),
        "tucker2": ("Tucker-2", "1511.06530"),
        "cp": ("CP", "1412.6553"),
    }
    return [
        Method(f"low rank, {name}", paper, then_tuned(lambda start, method=method: nearest(start, "low_rank", method)))
        for method, (name, paper) in papers.items()
    ]


def structured() -> list[Method]:
    """Block-circulant linear and pointwise layers."""

    def change(start: Candidate) -> tuple[Candidate, str]:
        places = registry.transform("block_circulant").refusals(start.network, ENTRY)
        options = [Option(transform="block_circulant", where=place, settings={"block": 4}) for place in places]
        return everywhere(start, options)

    return [Method("block-circulant, blocks of 4", "1708.08917", then_tuned(change), saves="bytes of a checkpoint")]


# ---------------------------------------------------------------- precision


def in_int8(start: Candidate, settings: Mapping[str, Any] | None = None) -> Candidate:
    """Static int8, or as the settings say."""
    option = Option(transform="int8", where="network", settings={"calibration": "min-max", **(settings or {})})
    return registry.transform("int8").apply(start, option)


def quantisation() -> list[Method]:
    """int8 in its forms, and fewer bits simulated."""

    def post(name: str, paper: str, **settings: Any) -> Method:
        saves = "bytes" if settings.get("activations") == "float" else TIME
        return Method(name, paper, lambda start: Made(in_int8(start, settings)), "int8", saves)

    return [
        post("static int8", "1712.05877"),
        post("static int8, equalised", "1906.04721", equalise=True),
        post("static int8, equalised, biases corrected", "1906.04721", equalise=True, correct_bias=True),
        post("static int8, learned rounding", "2004.10568", rounding="learned"),
        post("dynamic int8", "1712.05877", activations="dynamic"),
        post("weight-only int8", "1712.05877", activations="float"),
        Method("mixed precision: first and last layer in float", "1712.05877", mixed, "int8"),
        Method("int8, quantisation-aware training", "1712.05877", aware, "int8"),
        *(
            Method(
                f"{name} weights, simulated",
                paper,
                lambda start, bits=bits: low_bit(start, bits),
                saves=PACKAGE,
                timed=False,
            )
            for name, paper, bits in (
                ("4-bit", "1712.05877", 4),
                ("2-bit", "1712.05877", 2),
                ("ternary", "1605.04711", "ternary"),
                ("binary", "1603.05279", "binary"),
            )
        ),
    ]


def mixed(start: Candidate) -> Made:
    """The layers at both ends stay in float."""
    layers = [operator.name for operator in start.network.operators if operator.kind in ("conv", "linear")]
    return Made(in_int8(start, {"float": f"{layers[0]},{layers[-1]}"}))


def aware(start: Candidate) -> Made:
    """Trained with rounded weights and activations, then exported in int8."""
    from mobilekit.training.quantisation_aware import fake_quantised, settled

    rounded = fake_quantised(start.module, start.network, lab.calibration())
    trained = settled(lab.tuned(rounded, start.module, STEPS))
    return Made(in_int8(start), in_int8(retraced(start, trained)))


def low_bit(start: Candidate, bits: int | str) -> Made:
    """Weights of a few values: rounded, then trained with the rounding in place."""
    from mobilekit.training.quantisation_aware import Rounding, fake_quantised, settled

    option = Option(transform="low_bit", where="network", settings={"bits": bits})
    before = registry.transform("low_bit").apply(start, option)
    rounded = fake_quantised(start.module, start.network, lab.calibration(), Rounding(bits))
    return Made(before, retraced(start, settled(lab.tuned(rounded, start.module, STEPS))))


# ---------------------------------------------------------------- sparse training and sharing


def sparse() -> list[Method]:
    """Weights at zero: no runtime here runs them faster."""
    return [
        Method(
            f"gradual magnitude pruning, {SPARSITY:.0%}",
            "1710.01878",
            lambda start: cut(start, prune_gradually),
            saves=PACKAGE,
        ),
        Method(
            f"dynamic network surgery, {SPARSITY:.0%}",
            "1608.04493",
            lambda start: cut(start, prune_dynamically),
            saves=PACKAGE,
        ),
        Method("DSD, 60% and dense again", "1607.04381", redense, saves="nothing: it is for accuracy", timed=False),
        Method("Deep Compression, 80%, 8 and 5 bits", "1510.00149", compressed, saves=PACKAGE),
    ]


def cut(start: Candidate, prune: Callable[..., Any]) -> Made:
    """Weights cut at once (before) and during training (after)."""
    at_once = copy.deepcopy(start.module)
    Masks.smallest(at_once, SPARSITY).apply(at_once)
    teacher = Distillation(start.module, start.module, Mix(), fashion_mnist.loss)
    found = prune(start.module, teacher, lab.job(), Schedule(SPARSITY), Recipe(steps=STEPS))
    return Made(replace(start, module=at_once), replace(start, module=found.module))


def redense(start: Candidate) -> Made:
    """Before: sparse; after: dense again."""
    recipe = Recipe(steps=STEPS // 2)
    found = dense_sparse_dense(start.module, Labels(fashion_mnist.loss), lab.job(), 0.6, recipe)
    assert found.sparse is not None
    return Made(replace(start, module=found.sparse.module), replace(start, module=found.module))


def compressed(start: Candidate) -> Made:
    """Pruned, shared, its codebooks tuned."""
    teacher = Distillation(start.module, start.module, Mix(), fashion_mnist.loss)
    how = Compression(schedule=Schedule(SPARSITY), example=start.example_input)
    found = deep_compression(start.module, teacher, lab.job(), how, Recipe(steps=STEPS // 2))
    at_once = copy.deepcopy(start.module)
    Masks.smallest(at_once, SPARSITY).apply(at_once)
    return Made(replace(start, module=at_once), retraced(start, found.shared.module))


# ---------------------------------------------------------------- training


def training() -> list[Method]:
    """The L1 network of above, fine-tuned in other ways."""

    def by(name: str, paper: str, tune: Callable[[Candidate, Candidate], Candidate]) -> Method:
        def make(start: Candidate) -> Made:
            changed, places = pruned(start)
            return Made(changed, tune(start, changed), places)

        return Method(f"fine-tuning of L1, {name}", paper, make, saves="nothing: it is for accuracy", timed=False)

    def labels(_: Candidate, made: Candidate) -> Candidate:
        return replace(made, module=lab.tuned_plainly(made.module, Labels(fashion_mnist.loss), STEPS))

    return [
        by("labels alone", "", labels),
        by("soft targets and hints", "1412.6550", lambda start, made: tuned(start, made, Mix(hints=1.0))),
        by("soft targets and attention", "1612.03928", lambda start, made: tuned(start, made, Mix(attention=100.0))),
    ]
