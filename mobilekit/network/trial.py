"""Finds channel groups whose removal breaks the module's own forward, by removing channels and running it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils import _pytree

from mobilekit.errors import BadInputError, first_line
from mobilekit.network.shrink import cut
from mobilekit.types import Network

Shapes = list[tuple[int, ...]]


def refuse_what_breaks(module: nn.Module, example_input: torch.Tensor, network: Network, shapes: Shapes) -> Network:
    """Remove channels and run: groups that make the forward raise, or give other `shapes`, are refused.

    All groups are cut in one run, each by another number of channels, so that code that needs two of them alike
    fails; a second run deals the numbers out the other way round. Where a run fails, halves are tried, down to
    single groups with one channel less: that run decides. Raises BadInputError where the module cannot be copied.
    """
    narrow = {name for name, group in network.groups.items() if group.refused is None and group.width == 1}
    reasons = dict.fromkeys(narrow, "has one channel only")
    names = [n for n, group in network.groups.items() if group.refused is None and n not in narrow]
    trials = _Trials(module, example_input, network, shapes)
    for order in (names, names[::-1]):
        left = [name for name in order if name not in reasons]
        for name, failure in trials.failures(left).items():
            reasons[name] = f"the model's forward fails with fewer channels here: {failure}"[:300]
    groups = {
        name: group.model_copy(update={"refused": reasons[name]}) if name in reasons else group
        for name, group in network.groups.items()
    }
    return network.model_copy(update={"groups": groups})


class _Trials:
    """Runs of copies of one module. Copies share the weights that are not cut, and hold buffers of their own."""

    def __init__(self, module: nn.Module, example_input: torch.Tensor, network: Network, shapes: Shapes) -> None:
        self.module, self.example, self.network, self.shapes = module, example_input, network, shapes

    def failures(self, names: list[str]) -> dict[str, str]:
        """Groups that cannot be cut, with what goes wrong; found by halving."""
        if not names:
            return {}
        if len(names) == 1:
            failure = self._run({names[0]: 1})
            return {names[0]: failure} if failure else {}
        amounts = {name: 1 + turn % (self.network.groups[name].width - 1) for turn, name in enumerate(names)}
        if self._run(amounts) is None:
            return {}
        middle = len(names) // 2
        return {**self.failures(names[:middle]), **self.failures(names[middle:])}

    def _run(self, amounts: dict[str, int]) -> str | None:
        """What goes wrong without the last channels of these groups, or None."""
        try:
            trial = copy.deepcopy(self.module, {id(p): p for p in self.module.parameters()})
        except Exception as error:
            raise BadInputError(f"the model cannot be copied (copy.deepcopy): {first_line(error)}") from error
        widths = {name: self.network.groups[name].width - amount for name, amount in amounts.items()}
        cut(trial, self.network, {name: range(width) for name, width in widths.items()})
        try:
            with torch.inference_mode():
                output = trial(self.example)
        except Exception as error:  # noqa: BLE001 -- the user's forward may raise anything
            return first_line(error)
        found = [tuple(t.shape) for t in _pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
        return None if found == self.shapes else f"the output's shape becomes {found} instead of {self.shapes}"
