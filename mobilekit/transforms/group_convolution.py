"""Group-convolution substitution: a trained dense convolution becomes a small graph of grouped and pointwise ones."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

from mobilekit.errors import UnsupportedError
from mobilekit.transforms._links import Link
from mobilekit.transforms._rewrite import parted_refusal, replaceable, replaced
from mobilekit.transforms._substitutes import (
    GROUPED,
    LEAST_SAVING,
    METHODS,
    links,
    saving,
    strengths,
    unsuited,
    wrong,
)
from mobilekit.types import At, Candidate, Network, Operator, OperatorShape, Option, RuntimeEntry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mobilekit.transforms._surgery import Geometry

FITS = ("weights", "least_squares", "layer_wise")


class GroupConvolution:
    """Replaces a dense convolution by one of the blocks that mobile networks are made of, started from its weights.

    * `depthwise_separable`, `multiplier`: depthwise k x k with so many filters a channel, then 1 x 1 (MobileNet,
      arXiv:1704.04861), by SVD of each channel's kernels (Guo et al. 2018, arXiv:1808.05517);
    * `inverted_residual`, `expansion`: 1 x 1 to so many times the channels, depthwise k x k, 1 x 1 (MobileNet V2,
      arXiv:1801.04381);
    * `shuffle_v1`, `groups` and `expansion`: grouped 1 x 1, shuffle, depthwise k x k, grouped 1 x 1 (ShuffleNet,
      arXiv:1707.01083);
    * `shuffle_v2`: one half of the channels passes, the other goes through 1 x 1, depthwise k x k, 1 x 1; both are
      concatenated and shuffled (ShuffleNet V2, arXiv:1807.11164). Where the stride or the width changes, both
      branches read everything, as in the paper's unit of stride 2;
    * `interleaved`, `groups`: grouped k x k, permutation, grouped 1 x 1 (IGCV, arXiv:1707.02725). It is the one method
      for 1 x 1 layers too;
    * `fire`, `squeeze`: 1 x 1 to so many channels, then 1 x 1 and k x k side by side, half of the outputs each
      (SqueezeNet, arXiv:1602.07360).

    All layers inside are linear: the batch norm and activation behind the old layer stay behind the new ones, and no
    residual sum is added, because the old layer's output had none and the start would be worse by the whole input.
    shuffle_v2 and fire end in one weight a channel (a depthwise 1 x 1 layer): it carries the old bias, and runtimes
    fold the batch norm and activation into it, which they cannot into a concatenation.

    `fit` is "weights" (the projection of the weights alone; where it is missing), "least_squares" (the last weights
    fitted to the old layer's output on calibration inputs) or "layer_wise" (from there, Adam on all of them; the best
    on the calibration inputs is kept).
    """

    name = "group_convolution"
    changes: Literal["structure", "precision"] = "structure"
    at: At = "layer"

    def options(self, network: Network, entry: RuntimeEntry) -> list[Option]:
        """Each suitable layer by each method, at strengths that save at least 20 % of its multiply-accumulates.

        A runtime's entry holds no prices: `planner.worth` turns down what a profile's tables say saves no time, or
        cannot price. Outside of the CPU only methods are offered that need no grouped convolutions but depthwise ones.
        """
        return [
            Option(transform=self.name, where=operator.module, settings={"method": method, **found})
            for operator in network.operators
            if _refusal(network, operator, entry) is None
            for method in METHODS
            for found in _offered(network, operator, method, entry)
        ]

    def refusals(self, network: Network, entry: RuntimeEntry) -> dict[str, str]:
        """Convolutions that cannot be substituted, with the reason."""
        refused: dict[str, str] = {}
        for operator in (o for o in network.operators if o.kind == "conv"):
            reason = _refusal(network, operator, entry)
            if reason is not None:
                refused.setdefault(operator.module or operator.name, reason)
        return refused

    def fitted(self, network: Network, option: Option) -> Option:
        """The last weights fitted to the old layer's output."""
        return option.model_copy(update={"settings": {**option.settings, "fit": "least_squares"}})

    def bare(self, option: Option) -> Option:
        """The projection of the weights alone."""
        kept = {name: value for name, value in option.settings.items() if name != "fit"}
        return option.model_copy(update={"settings": kept})

    def predict(self, network: Network, option: Option) -> Network:
        """The network with the new layers in the old one's place.

        Raises UnsupportedError where the option is not this lever's, its settings are unknown or do not fit the
        layer, and where the layer cannot be replaced.
        """
        return replaced(network, option.where, _checked(network, option)[1])

    def apply(self, candidate: Candidate, option: Option) -> Candidate:
        """Project the layer's weights onto the new layers, and fit these to its output where the option asks for it.

        Raises UnsupportedError where `predict` does, for a fit without calibration inputs, and where the module shows
        what a network cannot: hooks, shared weights, a class that computes something else than its convolution, a
        dilated kernel without a tap where the 1 x 1 layer reads. Raises BadInputError for weights or calibration
        inputs that are not finite.
        """
        import torch

        from mobilekit.transforms import _surgery as surgery
        from mobilekit.transforms._wiring import wired

        network, path = candidate.network, option.where
        shape, chain = _checked(network, option)
        after = self.predict(network, option)
        module = copy.deepcopy(candidate.module)
        layer = surgery.layer_at(module, path)
        if not isinstance(layer, torch.nn.Conv2d):
            raise UnsupportedError(f"'{path}' cannot be replaced: it is a {type(layer).__name__}, no convolution")
        geometry = surgery.geometry_of(module, path, shape, candidate.example_input)
        centre = _centre(path, shape, chain, geometry)
        kernels, shift = _kernels(candidate, option, (layer, chain, centre))
        new = wired(layer, geometry, chain, kernels)
        last = new.get_submodule(chain[-1].layer)
        if shift is not None and isinstance(last.bias, torch.nn.Parameter):
            fitted = last.bias.detach().double() + shift.to(last.bias.device)
            last.bias = torch.nn.Parameter(fitted.to(last.bias), requires_grad=last.bias.requires_grad)
        surgery.put(module, path, new, candidate.example_input)
        quant = candidate.quant and candidate.quant.model_copy(update={"operators": after.precisions})
        return candidate.after(option, module=module, network=after, quant=quant)


def _kernels(
    candidate: Candidate, option: Option, at: tuple[nn.Conv2d, tuple[Link, ...], int]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The new weights by layer, and what to add to the bias (N,) where they were fitted."""
    import torch

    from mobilekit.transforms._projections import projected
    from mobilekit.transforms._refits import least_squares, trained, windows
    from mobilekit.transforms._surgery import kernel_of
    from mobilekit.transforms._wiring import at_tap, composed

    layer, chain, centre = at
    kernel = torch.from_numpy(kernel_of(layer)).double()
    kernels = projected(kernel, chain, str(option.settings["method"]), centre)
    fit = option.settings.get("fit", "weights")
    if fit == "weights":
        return kernels, None
    if candidate.calibration is None or not candidate.calibration.inputs:
        raise UnsupportedError(f"'{option.where}' cannot be fitted by {fit}: it needs calibration inputs")
    given, goal = windows(candidate.module, option.where, candidate.calibration), kernel.flatten(2)
    kernels = least_squares(goal, chain, kernels, given, centre)
    if fit == "layer_wise":
        kernels = trained(goal, chain, kernels, given, centre)
    effective = composed(chain, kernels, goal.shape[1], centre)[chain[-1].layer]
    return kernels, (goal - at_tap(effective, goal.shape[2], centre)).flatten(1) @ given.mean


def _centre(path: str, shape: OperatorShape, chain: tuple[Link, ...], geometry: Geometry) -> int:
    """The tap of the old kernel, counted along the rows, that falls on the place where a 1 x 1 layer reads."""
    if not _beside(chain):
        return 0
    down, right = geometry.rows[0], geometry.columns[0]
    if down % geometry.dilation[0] or right % geometry.dilation[1]:
        raise UnsupportedError(f"'{path}' cannot be replaced: no tap of its dilated kernel falls on the place itself")
    tap = (down // geometry.dilation[0], right // geometry.dilation[1])
    if any(at >= size for at, size in zip(tap, shape.kernel, strict=True)):
        raise UnsupportedError(f"'{path}' cannot be replaced: its padding is wider than its kernel")
    return tap[0] * shape.kernel[1] + tap[1]


def _beside(chain: tuple[Link, ...]) -> bool:
    """Whether channels that moved over the map are joined with channels that did not."""
    return any(link.layer in ("passing", "pointwise") for link in chain[:-1])


def _refusal(network: Network, operator: Operator, entry: RuntimeEntry) -> str | None:
    """Why the layer is offered by no method, or None."""
    shape = network.shape(operator)
    reasons = [unsuited(shape, method) for method in METHODS]
    if all(reasons):
        return reasons[0]
    try:
        replaceable(network, operator.module)
    except UnsupportedError as error:
        return str(error)
    if any(_offered(network, operator, method, entry) for method in METHODS):
        return None
    if shape.kernel == (1, 1):
        sides = f"{shape.in_channels} to {shape.out_channels} channels"
        return f"it is 1 x 1, which interleaved groups alone can replace, and of {sides} 2 or 4 groups save too little"
    return f"no method saves {LEAST_SAVING:.0%} of its {shape.macs} multiply-accumulates"


def _offered(network: Network, operator: Operator, method: str, entry: RuntimeEntry) -> list[dict[str, int]]:
    """Strengths of the method that are worth trying there."""
    shape = network.shape(operator)
    if method in GROUPED and entry.processor != "cpu":
        return []
    if unsuited(shape, method) or _misplaced(network, operator, method):
        return []
    tried = strengths(shape, method, entry.channel_multiple)
    return [found for found in tried if saving(shape, method, found) >= LEAST_SAVING]


def _misplaced(network: Network, operator: Operator, method: str) -> str | None:
    """Why the method cannot be used where the layer stands, or None."""
    if method == "fire":
        return parted_refusal(network, operator)
    before = next((o for o in network.operators if o.name in operator.inputs), None)
    inside = network.input_shape[2:] if before is None else before.out_size
    if method == "shuffle_v2" and tuple(inside) != operator.in_size:
        return "it puts zeros around its map itself, and two branches would read it"
    return None


def _checked(network: Network, option: Option) -> tuple[OperatorShape, tuple[Link, ...]]:
    """The layer's shape and the new layers. Raises UnsupportedError for an option that cannot be carried out."""
    if option.transform != GroupConvolution.name:
        raise UnsupportedError(f"group_convolution was given an option of {option.transform}")
    method, fit = option.settings.get("method"), option.settings.get("fit", "weights")
    if not isinstance(method, str) or method not in METHODS:
        raise UnsupportedError(f"group_convolution has no method '{method}': choose one of {', '.join(METHODS)}")
    if fit not in FITS:
        raise UnsupportedError(f"group_convolution has no fit '{fit}': choose one of {', '.join(FITS)}")
    operator = replaceable(network, option.where)
    shape = network.shape(operator)
    reason = unsuited(shape, method) or _misplaced(network, operator, method) or wrong(shape, method, option.settings)
    if reason is not None:
        raise UnsupportedError(f"'{option.where}' cannot be replaced by {method}: {reason}")
    unknown = set(option.settings) - {"method", "fit", *METHODS[method]}
    if unknown:
        raise UnsupportedError(f"{method} at '{option.where}' has no setting '{min(unknown)}'")
    whole = {name: int(str(option.settings[name])) for name in METHODS[method]}
    return shape, links(shape, method, whole)
