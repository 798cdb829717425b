"""A compressed network for other classes: a head that keeps what it knows, and fine-tuning with a slower backbone."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.training.hooks import Hook, Labels
from mobilekit.training.job import Recipe, Trained, TrainingJob
from mobilekit.training.loop import train
from mobilekit.training.masks import KeptMasks, Masks

Filling = Literal["zero", "random"]
BACKBONE_RATE = 0.1


@dataclass(frozen=True)
class NewHead:
    """The layer that gives the classes, and what becomes of it."""

    path: str
    """Of a linear layer or an ungrouped convolution; `find_head` finds it."""
    classes: tuple[int | None, ...]
    """For each new class the index of the old class that it coincides with; None: there is none."""
    new: Filling = "zero"
    """How classes without an old one begin: all logits zero, or random weights as large as the old ones' are."""

    def __post_init__(self) -> None:
        """Check what can be checked without the network."""
        if not self.classes:
            raise BadInputError("the new head has no classes: give one at least")
        if self.new not in ("zero", "random"):
            raise BadInputError(f"'{self.new}' is no start for new classes: give zero or random")


def find_head(module: nn.Module, example: torch.Tensor) -> str:
    """The path of the layer whose output is the network's output, but for its shape.

    `example` is an input (N, C, H, W). Raises UnsupportedError where the output is computed from no linear layer's or
    convolution's output directly (a softmax lies behind it, say).
    """
    module = copy.deepcopy(module).eval()
    called: list[tuple[str, torch.Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda _, __, output, path=path: called.append((path, output.clone())))
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        result = module(example)
    for handle in handles:
        handle.remove()
    if called and isinstance(result, torch.Tensor):
        path, output = called[-1]
        if output.numel() == result.numel() and torch.equal(output.flatten(), result.flatten()):
            return path
    raise UnsupportedError("the output is not that of a linear layer or convolution: name the layer that is the head")


def replace_head(module: nn.Module, head: NewHead, seed: int = 0) -> nn.Module:
    """A copy whose head gives the new classes; those that coincide with old ones have their weights.

    Raises BadInputError where there is no such layer or old class, UnsupportedError where the layer is no head.
    """
    module = copy.deepcopy(module)
    try:
        old = module.get_submodule(head.path)
    except AttributeError as error:
        raise BadInputError(f"the network has no module '{head.path}'") from error
    if not (isinstance(old, nn.Linear) or (isinstance(old, nn.Conv2d) and old.groups == 1)) or old is module:
        raise UnsupportedError(f"'{head.path}' is no linear layer or ungrouped convolution inside the network")
    count = old.weight.shape[0]
    wrong = [index for index in head.classes if index is not None and not 0 <= index < count]
    if wrong:
        raise BadInputError(f"the old head has the classes 0 to {count - 1}, not {wrong[0]}")
    layer = copy.deepcopy(old)
    if isinstance(layer, nn.Linear):
        layer.out_features = len(head.classes)
    else:
        layer.out_channels = len(head.classes)
    generator = torch.Generator().manual_seed(seed)
    layer.weight = _rows(old.weight, head, generator)
    if old.bias is not None:
        layer.bias = _rows(old.bias, replace(head, new="zero"), generator)
    module.set_submodule(head.path, layer)
    return module


def transfer(
    module: nn.Module,
    head: NewHead,
    job: TrainingJob,
    recipe: Recipe | None = None,
    backbone_rate: float = BACKBONE_RATE,
    hooks: Sequence[Hook] = (),
) -> Trained:
    """Fine-tune a copy to the head's classes, with a smaller learning rate before the head (0: only the head).

    Targets are indices of the new classes, or whatever the job's loss takes. Weights that are zero before the head, as
    pruning leaves them, stay zero; shared values stay shared with a `shared.Codebooks` of them among the `hooks`. A
    recipe's own rates win over `backbone_rate`. Raises as `replace_head` and `train` do.
    """
    if not (math.isfinite(backbone_rate) and backbone_rate >= 0):
        raise BadInputError(f"the backbone's factor on the learning rate is {backbone_rate}: it must be zero or more")
    fresh = replace_head(module, head, job.seed)
    recipe = recipe or Recipe()
    recipe = replace(recipe, rates={"": backbone_rate, head.path: 1.0, **recipe.rates})
    kept = Masks.of_zeros(fresh).kept.items()
    before = Masks({name: mask for name, mask in kept if name != f"{head.path}.weight" and not bool(mask.all())})
    return train(fresh, Labels(job.loss), job, recipe, (*hooks, KeptMasks(before)))


def _rows(old: torch.Tensor, head: NewHead, generator: torch.Generator) -> nn.Parameter:
    """Rows of the new classes in the old tensor's type and on its device, to be trained."""
    values = torch.zeros((len(head.classes), *old.shape[1:]))
    if head.new == "random":
        scale = float(old.detach().float().square().mean().sqrt())
        values = scale * torch.randn(values.shape, generator=generator)
    values = values.to(old)
    for row, index in enumerate(head.classes):
        if index is not None:
            values[row] = old.detach()[index]
    return nn.Parameter(values)


def coinciding(old: Sequence[str], new: Sequence[str]) -> tuple[int | None, ...]:
    """`NewHead.classes` from the classes' names, compared without case.

    >>> coinciding(["cat", "dog"], ["Dog", "horse"])
    (1, None)
    """
    known = {name.casefold(): index for index, name in reversed(list(enumerate(old)))}
    return tuple(known.get(name.casefold()) for name in new)
