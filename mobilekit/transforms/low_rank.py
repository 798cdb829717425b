"""Low-rank layers: a convolution or linear layer becomes a chain of cheaper ones, by linear algebra on its weights."""

from __future__ import annotations

import copy
from bisect import bisect_left
from typing import TYPE_CHECKING, Literal

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.transforms._chains import METHODS, Ranks, full_ranks, links, macs, offered_ranks, unsuited
from mobilekit.transforms._rewrite import Link, replaceable, replaced
from mobilekit.types import At, Candidate, Network, Operator, OperatorShape, Option, RuntimeEntry

if TYPE_CHECKING:
    import numpy as np

LAYERS = ("conv", "linear", "conv_transpose")


class LowRank:
    """Replaces a dense layer by a chain through few channels, without training and without random weights.

    * `svd`: two linear or pointwise layers (Denton et al. 2014, arXiv:1404.0736; Xue et al. 2013);
    * `spatial`: k x 1, then 1 x k (Jaderberg et al. 2014, arXiv:1405.3866);
    * `tucker2`: 1 x 1, k x k, 1 x 1 (Kim et al. 2016, arXiv:1511.06530);
    * `cp`: 1 x 1, k x 1 and 1 x k depthwise, 1 x 1 (Lebedev et al. 2015, arXiv:1412.6553).

    The settings name the method and its `rank`, and for tucker2 `rank_in`, the channels between the first two layers.
    """

    name = "low_rank"
    changes: Literal["structure", "precision"] = "structure"
    at: At = "layer"

    def options(self, network: Network, entry: RuntimeEntry) -> list[Option]:
        """Each suitable layer by each suitable method, at ranks that save at least 20 % of its work."""
        return [
            Option(transform=self.name, where=operator.module, settings={"method": method, **ranks})
            for operator in network.operators
            if _refusal(network, operator) is None
            for method in METHODS
            if unsuited(network.shape(operator), method) is None
            for ranks in offered_ranks(network.shape(operator), method, entry.channel_multiple)
        ]

    def refusals(self, network: Network, entry: RuntimeEntry) -> dict[str, str]:
        """Layers with weights that cannot be replaced, with the reason."""
        offered = {option.where for option in self.options(network, entry)}
        refused: dict[str, str] = {}
        for operator in (o for o in network.operators if o.kind in LAYERS):
            place = operator.module or operator.name
            if place not in offered:
                none_suits = f"no rank that is a multiple of {entry.channel_multiple} saves enough"
                refused.setdefault(place, _refusal(network, operator) or none_suits)
        return refused

    def fitted(self, network: Network, option: Option) -> Option:
        """The option itself: its weights are fitted to the old ones without inputs."""
        return option

    def bare(self, option: Option) -> Option:
        """The option itself."""
        return option

    def predict(self, network: Network, option: Option) -> Network:
        """The network with the chain in the layer's place.

        Raises UnsupportedError where the option is not this lever's, the layer cannot be replaced by this method,
        or the rank is above the full one or saves nothing.
        """
        return replaced(network, option.where, _checked(network, option)[1])

    def apply(self, candidate: Candidate, option: Option) -> Candidate:
        """Decompose the layer's weights into the chain's.

        Raises UnsupportedError where `predict` does, and where the module shows what a network cannot: hooks, a
        forward that reads the layer's attributes, a class that computes something else than its convolution.
        Raises BadInputError for weights that are not finite.
        """
        from mobilekit.transforms import _surgery as surgery
        from mobilekit.transforms._factors import factors

        network, path = candidate.network, option.where
        shape, chain = _checked(network, option)
        after = self.predict(network, option)
        module = copy.deepcopy(candidate.module)
        layer = surgery.layer_at(module, path)
        geometry = surgery.geometry_of(module, path, shape, candidate.example_input)
        ranks = {name: rank for name, rank in option.settings.items() if isinstance(rank, int)}
        kernels = factors(surgery.kernel_of(layer), str(option.settings["method"]), ranks)
        surgery.put(module, path, surgery.chain_of(layer, geometry, chain, kernels), candidate.example_input)
        quant = candidate.quant and candidate.quant.model_copy(update={"operators": after.precisions})
        return candidate.after(option, module=module, network=after, quant=quant)


def rank_for_energy(weight: np.ndarray, method: str, energy: float) -> int:
    """The smallest rank by which `method` keeps this share (above 0, at most 1) of the weight's squared norm.

    `weight` has shape (N, C, kh, kw), or (N, C) for svd. For tucker2 the rank is that of both sides, each at most its
    channels, and HOSVD's share counts. For cp the rank is searched by bisection over ALS solutions: their share
    need not grow with every rank, so that a smaller rank may keep it too.

    Raises BadInputError for weights that are not finite or zero and for an energy out of range, and UnsupportedError
    for an unknown method, a weight of another shape, and where ALS keeps that share at no rank.
    """
    import numpy as np

    from mobilekit.transforms._alternating import cp, relative_error
    from mobilekit.transforms._factors import kept_energies

    if method not in METHODS:
        raise UnsupportedError(f"there is no method '{method}': choose one of {', '.join(METHODS)}")
    if not 0 < energy <= 1:
        raise BadInputError(f"an energy is a share above 0 and at most 1, not {energy}")
    kernel = np.asarray(weight)
    pointwise = kernel.ndim == 2 or (kernel.ndim == 4 and kernel.shape[2:] == (1, 1))
    if not (pointwise if method == "svd" else kernel.ndim == 4):
        raise UnsupportedError(f"{method} cannot decompose a weight of shape {kernel.shape}")
    if not np.isfinite(kernel).all() or not kernel.any():
        raise BadInputError("the weight is zero or holds values that are not finite")
    kernel = kernel.astype(np.float64)
    if method != "cp":
        # sums of squares are exact to a few digits less than the numbers, and all energy has to be found at full rank
        return int(np.searchsorted(kept_energies(kernel, method), energy - 1e-12)) + 1
    full = kernel.size // max(kernel.shape)

    def kept(rank: int) -> float:
        return 1 - relative_error(kernel, cp(kernel, rank)) ** 2

    rank = bisect_left(range(1, full + 1), energy, key=kept) + 1
    if rank > full:
        raise UnsupportedError(f"alternating least squares keeps {energy:.4g} of the squared norm at no rank")
    return rank


def _refusal(network: Network, operator: Operator) -> str | None:
    """Why no method can replace the layer at any rank, or None."""
    shape = network.shape(operator)
    reasons = [unsuited(shape, method) for method in METHODS]
    if all(reasons):
        fitting = "svd" if operator.kind == "linear" or operator.kernel == (1, 1) else "tucker2"
        return reasons[list(METHODS).index(fitting)]
    try:
        replaceable(network, operator.module)
    except UnsupportedError as error:
        return str(error)
    return None


def _checked(network: Network, option: Option) -> tuple[OperatorShape, tuple[Link, ...]]:
    """The layer's shape and the chain. Raises UnsupportedError for an option that cannot be carried out."""
    if option.transform != LowRank.name:
        raise UnsupportedError(f"low_rank was given an option of {option.transform}")
    method = option.settings.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise UnsupportedError(f"low_rank has no method '{method}': choose one of {', '.join(METHODS)}")
    shape = network.shape(replaceable(network, option.where))
    reason = unsuited(shape, method)
    if reason is not None:
        raise UnsupportedError(f"'{option.where}' cannot be decomposed by {method}: {reason}")
    full = full_ranks(shape, method)
    unknown = set(option.settings) - {"method", *full}
    if unknown:
        raise UnsupportedError(f"{method} at '{option.where}' has no setting '{min(unknown)}'")
    ranks: Ranks = {}
    for name, most in full.items():
        rank = option.settings.get(name)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
            raise UnsupportedError(f"'{option.where}' by {method} can have a {name} of 1 to {most}, not {rank}")
        ranks[name] = rank
    chain = links(shape, method, ranks)
    if macs(shape, chain) >= shape.macs:
        raise UnsupportedError(f"'{option.where}' by {method} at rank {ranks['rank']} of {full['rank']} saves nothing")
    return shape, chain
