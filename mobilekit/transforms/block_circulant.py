"""Block-circulant layers (CirCNN, Ding et al. 2017, arXiv:1708.08917): fewer numbers to store, but no less to do."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from mobilekit.errors import UnsupportedError
from mobilekit.transforms._links import mapped
from mobilekit.transforms._naming import LATE, LAYERS, opened, reworded
from mobilekit.transforms._rewrite import relabelled, replaceable
from mobilekit.types import At, Candidate, ChannelGroup, Network, Operator, Option, RuntimeEntry

if TYPE_CHECKING:
    import torch


class BlockCirculant:
    """Makes the weight of a linear layer or pointwise convolution block-circulant.

    The weight (N, C) is cut into blocks of `block` x `block` entries, and each block is replaced by the nearest
    circulant matrix in the Frobenius norm: the mean along every wrapped diagonal. Blocks at the edges are cropped
    where `block` does not divide N or C. The layer keeps its class; its weight is computed from the vectors that
    define the blocks (`torch.nn.utils.parametrize`), which are what is stored and trained.

    What it saves is bytes, not time: the paper multiplies by fast Fourier transforms, which no runtime here does for
    weights, so every runtime expands the vectors and multiplies with the dense matrix. ONNX and TFLite files hold the
    vectors, except that the ONNX exporter writes out layers of up to 8192 entries. ONNX Runtime expands them when it
    opens the file, and TFLite in every inference, which takes hundreds of times longer: export `dense(module)`
    there. No option is ever offered: the lever is for study, by an option that is written by hand. The channels around
    such a layer cannot be pruned any more, because no parameter runs over them.
    """

    name = "block_circulant"
    changes: Literal["structure", "precision"] = "structure"
    at: At = "layer"

    def options(self, network: Network, entry: RuntimeEntry) -> list[Option]:
        """Nothing: no runtime gets faster by it."""
        return []

    def refusals(self, network: Network, entry: RuntimeEntry) -> dict[str, str]:
        """Every layer with weights: why it does not suit, or that it does and no time would be saved."""
        refused: dict[str, str] = {}
        for operator in (o for o in network.operators if o.kind in LAYERS):
            shape = network.shape(operator)
            verdict = (
                f"its {shape.weights} weights could be made block-circulant, which saves bytes but no time: "
                "the runtimes multiply with the dense matrix"
            )
            if entry.name == "tflite":
                verdict += ", and TFLite would expand it in every inference"
            refused.setdefault(operator.module or operator.name, _unsuited(network, operator) or verdict)
        return refused or {"network": "it has no layer with weights"}

    def fitted(self, network: Network, option: Option) -> Option:
        """The option itself: its weights are fitted to the old ones without inputs."""
        return option

    def bare(self, option: Option) -> Option:
        """The option itself."""
        return option

    def predict(self, network: Network, option: Option) -> Network:
        """The network with this layer's weight computed: the same operators, and fixed channels on both sides of it.

        Raises UnsupportedError where the option is not this lever's, the layer is no linear layer or pointwise
        convolution with weights of its own, or the block is not a whole number from 2 to its longer side.
        """
        operator, block = _checked(network, option)
        return _computed(network, operator, block)

    def apply(self, candidate: Candidate, option: Option) -> Candidate:
        """Project the layer's weight onto block-circulant matrices.

        Raises UnsupportedError where `predict` does, where the layer has hooks, shared weights or is no plain layer,
        and where a trace of the result is not what `predict` says (a forward that reads the weight itself).
        Raises BadInputError for weights that are not finite.
        """
        from mobilekit.network import trace
        from mobilekit.transforms._circulant import make_circulant
        from mobilekit.transforms._surgery import layer_at

        after, block = self.predict(candidate.network, option), _checked(candidate.network, option)[1]
        module = copy.deepcopy(candidate.module)
        make_circulant(layer_at(module, option.where), block)
        if _facts(trace(module, candidate.example_input)) != _facts(after):
            raise UnsupportedError(
                f"'{option.where}' cannot be made block-circulant: the network around it does not come out as predicted"
            )
        quant = candidate.quant and candidate.quant.model_copy(update={"operators": after.precisions})
        return candidate.after(option, module=module, network=after, quant=quant)


def stored(outputs: int, inputs: int, block: int) -> int:
    """Numbers that define a block-circulant weight of this shape.

    >>> stored(512, 512, 8)
    32768
    """
    return -(-outputs // block) * -(-inputs // block) * block


def dense(module: torch.nn.Module) -> torch.nn.Module:
    """A copy whose block-circulant layers have plain weights of the same values: quicker where a runtime expands."""
    from mobilekit.transforms._circulant import expanded

    return expanded(module)


def _facts(network: Network) -> object:
    groups = [(name, group.width, group.refused is None, group.producers) for name, group in network.groups.items()]
    return network.operators, groups, network.axes


def _unsuited(network: Network, operator: Operator) -> str | None:
    """Why the layer cannot be made block-circulant by any block, or None."""
    shape = network.shape(operator)
    if operator.kind == "conv_transpose" or shape.kernel != (1, 1):
        kernel = f"{shape.kernel[0]} x {shape.kernel[1]}"
        return f"only linear layers and pointwise convolutions are suitable, and it is a {kernel} {operator.kind}"
    try:
        replaceable(network, operator.module)
    except UnsupportedError as error:
        return str(error)
    if min(shape.in_channels, shape.out_channels) < 2:
        return f"its weight of {shape.out_channels} x {shape.in_channels} has one row or one column only"
    return None


def _checked(network: Network, option: Option) -> tuple[Operator, int]:
    """The layer and the block. Raises UnsupportedError for an option that cannot be carried out."""
    if option.transform != BlockCirculant.name:
        raise UnsupportedError(f"block_circulant was given an option of {option.transform}")
    operator = replaceable(network, option.where)
    place = f"'{option.where}' cannot be made block-circulant"
    reason = _unsuited(network, operator)
    if reason is not None:
        raise UnsupportedError(f"{place}: {reason}")
    unknown = set(option.settings) - {"block"}
    if unknown:
        raise UnsupportedError(f"{place}: there is no setting '{min(unknown)}'")
    shape, block = network.shape(operator), option.settings.get("block")
    most = max(shape.in_channels, shape.out_channels)
    if isinstance(block, bool) or not isinstance(block, int) or not 2 <= block <= most:
        raise UnsupportedError(f"{place}: its blocks can have 2 to {most} rows, not {block}")
    return operator, block


# ---------------------------------------------------------------- the network as a trace would give it


def _computed(network: Network, operator: Operator, block: int) -> Network:
    """The network when the operator's weight is computed and no parameter: what `network.trace` makes of that."""
    position, weight = network.operators.index(operator), f"{operator.module}.weight"
    names = _renumbered(network, position, _added(network, operator, block))
    (written,) = operator.out_groups
    left = tuple(p for p in network.groups[written].producers if p.parameter != weight)
    labels = {written: (_label(network, position, written, left[0].parameter if left else None),)}
    reason = f"{operator.name} reads weights that are computed and no parameter of the module"
    groups: dict[str, ChannelGroup] = {}
    for name, group in network.groups.items():
        refused = group.refused
        if name in (*operator.in_groups, written) and _comes_later(network, name, position):
            refused = reason
        else:
            refused = reworded(refused, names)
        producers = left if name == written else group.producers
        update = {"refused": refused, "producers": producers}
        groups[mapped((name,), labels)[0]] = group.model_copy(update=update)
    return network.model_copy(
        update={
            "operators": tuple(relabelled(o, names, labels) for o in network.operators),
            "groups": groups,
            "axes": {
                name: {d: a.model_copy(update={"groups": mapped(a.groups, labels)}) for d, a in dims.items()}
                for name, dims in network.axes.items()
                if name != weight
            },
            "precisions": {names.get(name, name): value for name, value in network.precisions.items()},
        }
    )


def _added(network: Network, operator: Operator, block: int) -> dict[str, int]:
    """Graph nodes, by name, that compute the weight: they shift the numbers of later nodes of these names."""
    shape = network.shape(operator)
    crops = sum(size % block > 0 for size in (shape.out_channels, shape.in_channels))
    return {"tile": 1, "flip": 1, "permute": 1, "narrow": 1 + crops, "reshape": 2 + (operator.kind == "conv")}


def _renumbered(network: Network, position: int, added: Mapping[str, int]) -> dict[str, str]:
    """Old name -> new name of the later operators that are called like an added node."""
    renamed = {}
    for operator in network.operators[position + 1 :]:
        found = re.fullmatch(r"([a-z]+)(?:_(\d+))?", operator.name)
        if found and found[1] in added:
            renamed[operator.name] = f"{found[1]}_{int(found[2] or 0) + added[found[1]]}"
    return renamed


def _label(network: Network, position: int, group: str, producer: str | None) -> str:
    """The name of the operator's output group: that of its other producer, or else its number in the trace."""
    path = network.operators[position].module
    first = network.groups[group].producers[0].parameter
    if group not in (path, f"{path}.weight") or first != f"{path}.weight":
        return group
    if producer is not None:
        layer = producer.rpartition(".")[0]
        others = [g.producers[0].parameter.rpartition(".")[0] for g in network.groups.values() if g.producers]
        return layer if layer and layer not in others else producer
    return f"<{opened(network, position)}>"


def _comes_later(network: Network, group: str, position: int) -> bool:
    """Whether the group is open, or refused for something that a trace meets behind this operator."""
    reason = network.groups[group].refused
    if reason is None or LATE.match(reason):
        return True
    found = re.search(r"\bat (\w+)", reason) or re.match(r"(\w+) reads weights", reason)
    names = {found[1]} if found else set()
    if reason.endswith("fixes it"):  # the first grouped convolution over these channels
        grouped = (o for o in network.operators if o.groups > 1 and not o.depthwise)
        names = {o.name for o in grouped if group in (*o.in_groups, *o.out_groups)}
    places = [i for i, o in enumerate(network.operators) if o.name in names]
    return bool(places) and min(places) > position
