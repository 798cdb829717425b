"""Block removal: a residual block whose shortcut is the identity becomes the identity (depth pruning).

Residual networks behave like ensembles of shallower ones, so that single blocks can go without the others failing
(Veit, Wilber, Belongie 2016, arXiv:1605.06431); whole layers save more time than as many channels in many layers
(Elkerdawy et al. 2020, arXiv:2011.14356), because every operator costs its call, however narrow it is.
"""

from __future__ import annotations

import copy
from typing import Literal

from mobilekit.errors import UnsupportedError
from mobilekit.transforms._bypass import bypassed, renumbered
from mobilekit.transforms._residual import Block, blocks
from mobilekit.types import At, Candidate, Network, Option, RuntimeEntry, within


class BlockRemoval:
    """Replaces `act(x + f(x))` by `x`.

    The block has to be a module of its own that reads one tensor; its branch may hold anything that stays inside of
    it (squeeze and excite, sums, concatenations). An activation behind the sum has to be ReLU or ReLU6, and to have
    been applied to `x` before, so that it would change nothing. There are no settings. Batch norms behind the block
    are left as they are.
    """

    name = "block_removal"
    changes: Literal["structure", "precision"] = "structure"
    at: At = "block"

    def options(self, network: Network, entry: RuntimeEntry) -> list[Option]:
        """Each block that can go. One that holds another goes with it: the inner one's option is refused then."""
        return [Option(transform=self.name, where=path, settings={}) for path in _judged(network)[0]]

    def refusals(self, network: Network, entry: RuntimeEntry) -> dict[str, str]:
        """Residual sums that stay, with the reason: the block's module path, or the name of the sum's operator."""
        found, refused = _judged(network)
        return refused if found or refused else {"network": "it has no sum of a tensor and what is made of it"}

    def fitted(self, network: Network, option: Option) -> Option:
        """The option itself: no weights are left to fit."""
        return option

    def bare(self, option: Option) -> Option:
        """The option itself."""
        return option

    def predict(self, network: Network, option: Option) -> Network:
        """The network with the block's input in the place of its output.

        Raises UnsupportedError where the option is not this lever's, has settings, or names no block that can go.
        """
        return _without(network, option)[1]

    def apply(self, candidate: Candidate, option: Option) -> Candidate:
        """Put an identity in the block's place.

        Raises UnsupportedError where `predict` does, and where the module shows what a network cannot: hooks on the
        block, several calls or paths, weights that others share, more inputs than one, an activation behind the sum
        that is not the block's own, a forward that reads the block's attributes.
        """
        from mobilekit.transforms._shortcut import identity_for
        from mobilekit.transforms._surgery import put

        block, after = _without(candidate.network, option)
        module = copy.deepcopy(candidate.module)
        activation = candidate.network.operators[block.last].activation
        identity = identity_for(module, block.path, activation, candidate.example_input)
        put(module, block.path, identity, candidate.example_input)
        quant = candidate.quant and candidate.quant.model_copy(update={"operators": after.precisions})
        return candidate.after(option, module=module, network=after, quant=quant)


def _judged(network: Network) -> tuple[dict[str, Block], dict[str, str]]:
    """Blocks that can go by module path, and the places of the other sums with their reasons."""
    found, refused = blocks(network)
    for path, block in list(found.items()):
        try:
            renumbered(network, block)
        except UnsupportedError as error:
            del found[path]
            refused[path] = str(error)
    return found, refused


def _without(network: Network, option: Option) -> tuple[Block, Network]:
    """The block, and the network without it. Raises UnsupportedError for an option that cannot be carried out."""
    if option.transform != BlockRemoval.name:
        raise UnsupportedError(f"block_removal was given an option of {option.transform}")
    place = f"'{option.where}' cannot be removed"
    if option.settings:
        raise UnsupportedError(f"{place}: block_removal has no setting '{min(option.settings)}'")
    found, refused = blocks(network)
    if option.where not in found:
        inside = any(within(operator.module, option.where) for operator in network.operators)
        unknown = "it is no residual block" if inside else "the network has no such module"
        raise UnsupportedError(f"{place}: {refused.get(option.where, unknown)}")
    try:
        return found[option.where], bypassed(network, found[option.where])
    except UnsupportedError as error:
        raise UnsupportedError(f"{place}: {error}") from error
