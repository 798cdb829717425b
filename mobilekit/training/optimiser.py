"""The optimiser of a recipe over a module's parameters."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from mobilekit.errors import BadInputError
from mobilekit.training.job import Recipe, State
from mobilekit.types import within

Group = dict[str, Any]


def parameter_groups(module: nn.Module, recipe: Recipe, without: Collection[nn.Parameter] = ()) -> list[Group]:
    """Parameters that are trained, those with the same factor on the learning rate together, as `factor` of a group."""
    left_out = {id(parameter) for parameter in without}
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in left_out:
            groups.setdefault(recipe.rate(name), []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


def optimiser(groups: list[Group], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser; `set_rate` gives its learning rate before every step."""
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(
            groups, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
        )
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


def set_rate(chosen: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this learning rate times its factor."""
    for group in chosen.param_groups:
        group["lr"] = rate * group["factor"]


def moments(chosen: torch.optim.Optimizer) -> State:
    """What the optimiser remembers, by a parameter's number."""
    whole = chosen.state_dict()["state"]
    return {
        f"{place}.{name}": value
        for place, values in whole.items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def restore_moments(chosen: torch.optim.Optimizer, kept: State) -> None:
    """Go on with what `moments` gave; it takes the layout in memory of the parameters."""
    parameters = [parameter for group in chosen.param_groups for parameter in group["params"]]
    for key, tensor in kept.items():
        place, _, name = key.partition(".")
        parameter = parameters[int(place)]
        same = tensor.shape == parameter.shape and tensor.ndim > 0  # the counter of steps is a number of its own
        chosen.state[parameter][name] = torch.empty_like(parameter).copy_(tensor) if same else tensor.clone()


def freeze(module: nn.Module, recipe: Recipe) -> None:
    """Parameters with the rate zero get no gradient. Raises BadInputError for paths that name nothing."""
    names = [name for name, _ in module.named_parameters()]
    for path in recipe.rates:
        if path and not any(within(name, path) for name in names):
            raise BadInputError(f"the network has no parameter at '{path}', whose learning rate was given")
    for name, parameter in module.named_parameters():
        if recipe.rate(name) == 0:
            parameter.requires_grad = False
