"""Simulated weights of few bits: 2 to 8, ternary (TWN, arXiv:1605.04711), binary (XNOR-Net, arXiv:1603.05279)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.types import At, Candidate, Network, Operator, Option, RuntimeEntry

if TYPE_CHECKING:
    from mobilekit.network.grids import Grid
    from mobilekit.network.layer_calls import Layer

KINDS = ("conv", "linear", "conv_transpose")
FEWEST_BITS, MOST_BITS = 2, 8
NAMED = ("ternary", "binary")
NATIVE = "no runtime here executes weights of fewer than 8 bits: {} can be simulated for study, and no time is saved"


class LowBit:
    """Puts weights on a grid of few values and leaves them in float: a simulation, for study and for smaller packages.

    `where` is the path of a layer, or "network" for all. Settings of an option: `bits`, a whole number from 2 to 8, or
    "ternary" or "binary" (`network.grids.snapped` describes each, with a scale for every output channel); `ends`, true
    takes the first and the last layer of the network too (false where it is missing: both lose most; for a layer that
    is named it says nothing). Activations stay as they are.

    What it is for: to see what accuracy is left, also after training (`training.quantisation_aware`), and files that
    `mobilekit pack` makes smaller, because it stores tensors of few distinct values as codebook and indices. What it
    is not for: latency. Files keep float weights (int8 ones where the int8 lever follows), and every operator costs
    what it did. So no option is ever offered.
    """

    name = "low_bit"
    changes: Literal["structure", "precision"] = "precision"
    at: At = "layer"

    def options(self, network: Network, entry: RuntimeEntry) -> list[Option]:
        """Nothing: no runtime gets faster by it."""
        return []

    def refusals(self, network: Network, entry: RuntimeEntry) -> dict[str, str]:
        """Every layer with weights: that fewer bits are simulated there and nothing runs faster."""
        layers = dict.fromkeys(o.module or o.name for o in network.operators if o.kind in KINDS)
        refused = {place: NATIVE.format("they") for place in layers}
        return {"network": NATIVE.format("they"), **refused} if refused else {"network": "it has no layer with weights"}

    def fitted(self, network: Network, option: Option) -> Option:
        """The option itself: its weights are fitted to the old ones without inputs."""
        return option

    def bare(self, option: Option) -> Option:
        """The option itself."""
        return option

    def predict(self, network: Network, option: Option) -> Network:
        """The network as it is: simulated weights change no operator.

        Raises UnsupportedError where the option is not this lever's, or its settings or its place are unknown.
        """
        _checked(network, option)
        return network

    def apply(self, candidate: Candidate, option: Option) -> Candidate:
        """Round the weights to the grid; biases and batch norms stay.

        Raises UnsupportedError where `predict` does and where a named layer's weights are computed; BadInputError for
        weights that are not finite.
        """
        grid, paths = _checked(candidate.network, option)
        module = copy.deepcopy(candidate.module)
        done: set[int] = set()
        for path in paths:
            layer = _layer(module, path)
            if layer is None and option.where != "network":
                raise UnsupportedError(f"'{path}' cannot have {_words(grid)} weights: they are no parameter of a layer")
            if layer is not None and id(layer.weight) not in done:
                done.add(id(layer.weight))
                _round(layer, path, grid)
        if not done:
            raise UnsupportedError(f"low_bit finds no layer for {_words(grid)} weights: none holds its weights itself")
        return candidate.after(option, module=module, network=self.predict(candidate.network, option))


def _layer(module: object, path: str) -> Layer | None:
    from torch import nn

    from mobilekit.network.layer_calls import Layer

    assert isinstance(module, nn.Module)  # noqa: S101
    try:
        layer = module.get_submodule(path)
    except AttributeError:  # a function of a forward
        return None
    return layer if isinstance(layer, Layer) and isinstance(layer.weight, nn.Parameter) else None


def _round(layer: Layer, path: str, grid: Grid) -> None:
    import torch

    from mobilekit.network.grids import snapped
    from mobilekit.network.layer_calls import out_dim

    if not bool(layer.weight.isfinite().all()):
        raise BadInputError(f"the weights of '{path}' hold values that are not finite")
    with torch.no_grad():
        layer.weight.copy_(snapped(layer.weight.double(), out_dim(layer), grid))


def _words(grid: Grid) -> str:
    return f"{grid}-bit" if isinstance(grid, int) else grid


def _checked(network: Network, option: Option) -> tuple[Grid, list[str]]:
    """The grid and the layers. Raises UnsupportedError for an option that cannot be carried out."""
    if option.transform != LowBit.name:
        raise UnsupportedError(f"low_bit was given an option of {option.transform}")
    unknown = set(option.settings) - {"bits", "ends"}
    if unknown:
        raise UnsupportedError(f"low_bit has no setting '{min(unknown)}': only bits and ends")
    ends = option.settings.get("ends", False)
    if not isinstance(ends, bool):
        raise UnsupportedError(f"low_bit cannot take the ends {ends!r}: true or false")
    grid = _grid(option.settings.get("bits"))
    layers = [operator for operator in network.operators if operator.kind in KINDS]
    if option.where != "network":
        chosen = [layer.module for layer in layers if layer.module == option.where]
        if not chosen:
            raise UnsupportedError(f"low_bit finds no layer with weights at '{option.where}'")
        return grid, chosen
    chosen = _inner(layers, ends)
    if not chosen:
        raise UnsupportedError(
            "low_bit finds no layer with weights between the first and the last one: set ends to true"
        )
    return grid, chosen


def _inner(layers: list[Operator], ends: bool) -> list[str]:
    paths = list(dict.fromkeys(layer.module for layer in layers))
    outer = set() if ends or not layers else {layers[0].module, layers[-1].module}
    return [path for path in paths if path not in outer]


def _grid(bits: object) -> Grid:
    if bits == "ternary":
        return "ternary"
    if bits == "binary":
        return "binary"
    if isinstance(bits, bool) or not isinstance(bits, int) or not FEWEST_BITS <= bits <= MOST_BITS:
        raise UnsupportedError(
            f"low_bit cannot make weights of {bits!r} bits: {FEWEST_BITS} to {MOST_BITS}, ternary or binary"
        )
    return bits
