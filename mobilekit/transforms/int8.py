"""Post-training quantisation to int8 (Jacob et al. 2018, arXiv:1712.05877), as a QuantSpec that runtimes realise.

Weights can be prepared for it: cross-layer equalisation and bias correction (Nagel et al. 2019, arXiv:1906.04721),
learned rounding (Nagel et al. 2020, arXiv:2004.10568). Files are written from weights whose channels are smoothed and
whose rounding errors make up for each other (GPTQ, Frantar et al. 2022, arXiv:2210.17323), with corrected biases.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

from mobilekit.cost.work import QUANTISED, quantised
from mobilekit.errors import UnsupportedError
from mobilekit.types import At, Calibration, Candidate, Network, Option, Precision, QuantSpec, RuntimeEntry
from mobilekit.types.plan import WEIGHTS_IN_INT8, Activations

if TYPE_CHECKING:
    from mobilekit.transforms._quantisation import Preparation

WHOLE = "network"
"""The place of an option for all operators."""
ROUNDINGS = ("nearest", "learned")
PREPARING = ("equalise", "correct_bias", "rounding")


class Int8:
    """Runs every operator of a quantisable kind in int8: weights symmetric per channel, activations per tensor.

    An option for one operator, by its name, adds int8 there to what is int8 already.

    Settings of an option: `calibration`, "min-max"; `float`, names of operators that stay in float, with commas between
    them; `activations`, "static" takes their ranges from calibration inputs, "dynamic" at every inference (for
    convolutions and linear layers), "float" leaves them in float and only stores weights in int8: such operators stay
    in fp32 in the network, since that is what they compute in. `equalise`, true scales channels between layers so that
    none is much larger than the others; `correct_bias`, true takes what rounding the weights shifts off the biases;
    `rounding`, "learned" chooses for every weight between the two values next to it ("nearest" where it is missing).
    The last two take their inputs from `Candidate.calibration`, and all layers with weights must become int8 for them.
    All of it is written into float weights, and in learned rounding these lie on the grid that the runtimes round to:
    train before, not after.
    """

    name = "int8"
    changes: Literal["structure", "precision"] = "precision"
    at: At = "network"

    def options(self, network: Network, entry: RuntimeEntry) -> list[Option]:
        """The whole network in int8, where the runtime has int8 on this device."""
        if "int8" not in entry.precisions or not quantised(network):
            return []
        return [Option(transform=self.name, where=WHOLE, settings={"calibration": "min-max"})]

    def refusals(self, network: Network, entry: RuntimeEntry) -> dict[str, str]:
        """Why int8 is not offered."""
        if "int8" not in entry.precisions:
            return {WHOLE: f"{entry.name} on this device has no int8"}
        if not quantised(network):
            return {WHOLE: "no operator of the network has an int8 form"}
        return {}

    def fitted(self, network: Network, option: Option) -> Option:
        """The option itself: what int8 loses is got back in training."""
        return option

    def bare(self, option: Option) -> Option:
        """The option itself."""
        return option

    def predict(self, network: Network, option: Option) -> Network:
        """The same network with the operators that compute in int8 after the option.

        Raises UnsupportedError where the option is not this lever's or asks for what no runtime does.
        """
        spec = _asked(network, option)
        kept = network.precisions
        if option.where == WHOLE:
            kept = {name: precision for name, precision in kept.items() if precision != "int8"}
        if spec.activations == "float":
            return network.with_precisions(kept)
        return network.with_precisions({**kept, **{n: p for n, p in spec.operators.items() if p == "int8"}})

    def apply(self, candidate: Candidate, option: Option) -> Candidate:
        """Write the QuantSpec; weights stay in float, the runtimes calibrate and round when they export.

        Prepared weights are those of a copy of the module with the same layers, names and trace. Raises
        UnsupportedError where `predict` does, where one operator would treat activations unlike those that are int8
        already, where a setting needs calibration inputs that the candidate has not, and where no two layers can be
        equalised; BadInputError where weights or inputs are not finite.
        """
        spec = _asked(candidate.network, option)
        if option.where != WHOLE and candidate.quant is not None:
            spec = _together(candidate.quant, spec)
        after = candidate.after(option, quant=spec, network=self.predict(candidate.network, option))
        if not any(option.settings.get(key) in (True, "learned") for key in PREPARING):
            return after
        _refuse_rounding_of_float(candidate.network, spec, option)
        from mobilekit.transforms._quantisation import prepared

        module = prepared(candidate.module, candidate.network, _preparation(option), candidate.calibration)
        return replace(after, module=module)


def for_file(candidate: Candidate, calibration: Calibration) -> Candidate:
    """The candidate as an int8 file is written from it: weights prepared, ranges of activations in its QuantSpec.

    The same network with the same layers (`_quantisation.rounded_for_file`); the module of a float file stays as it
    is. Where weights cannot be prepared (no layer in int8, batch norms that cannot be folded) the module is the
    candidate's own. Without calibration inputs that are all finite it is the candidate itself.
    """
    if candidate.quant is None or not calibration.inputs:
        return candidate
    if not all(bool(batch.isfinite().all()) for batch in calibration.inputs):
        return candidate
    from mobilekit.transforms._quantisation.once import prepared_once

    module, ranges = prepared_once(candidate, calibration, layers_in_int8(candidate))
    return replace(candidate, module=module, quant=candidate.quant.model_copy(update={"ranges": ranges}))


def layers_in_int8(candidate: Candidate) -> frozenset[str]:
    """Paths of the layers whose weights an int8 file of this candidate rounds."""
    if candidate.quant is None:
        return frozenset()
    asked = candidate.quant.operators
    kinds = WEIGHTS_IN_INT8["float"]
    return frozenset(o.module for o in candidate.network.operators if o.kind in kinds and asked.get(o.name) == "int8")


def _preparation(option: Option) -> Preparation:
    from mobilekit.transforms._quantisation import Preparation

    settings = option.settings
    return Preparation(
        equalise=settings.get("equalise") is True,
        correct_bias=settings.get("correct_bias") is True,
        rounding="learned" if settings.get("rounding") == "learned" else "nearest",
    )


def _asked(network: Network, option: Option) -> QuantSpec:
    """What the option alone puts into int8. Raises UnsupportedError for an option that cannot be carried out."""
    if option.transform != Int8.name:
        raise UnsupportedError(f"int8 cannot carry out an option of {option.transform}")
    _check_settings(option)
    activations = option.settings.get("activations", "static")
    if activations not in get_args(Activations):
        listed = ", ".join(get_args(Activations))
        raise UnsupportedError(f"int8 cannot treat activations as {activations!r}: only as one of {listed}")
    left = _left_in_float(network, option)
    reached = WEIGHTS_IN_INT8.get(str(activations), QUANTISED)
    able = [operator.name for operator in network.operators if operator.kind in reached]
    if option.where != WHOLE:
        _check_place(network, option, able, left)
        able = [option.where]
    operators: dict[str, Precision] = {name: "int8" for name in able if name not in left}
    if not operators:
        raise UnsupportedError("no operator of the network has an int8 form, or all of them are to stay in float")
    # Kinds that have no int8 form of their own go with what is around them unless they are named.
    operators.update(dict.fromkeys(left, "fp32"))
    return QuantSpec(operators=operators, activations=activations)


def _check_settings(option: Option) -> None:
    calibration = option.settings.get("calibration", "min-max")
    if calibration != "min-max":
        raise UnsupportedError(f"int8 cannot calibrate by '{calibration}': only by min-max")
    for key in ("equalise", "correct_bias"):
        value = option.settings.get(key, False)
        if not isinstance(value, bool):
            raise UnsupportedError(f"int8 cannot be prepared with {key} {value!r}: true or false")
    rounding = option.settings.get("rounding", "nearest")
    if rounding not in ROUNDINGS:
        raise UnsupportedError(f"int8 cannot round by {rounding!r}: only {' or '.join(ROUNDINGS)}")


def _left_in_float(network: Network, option: Option) -> list[str]:
    """The operators that the option names to stay in float."""
    listed = option.settings.get("float", "")
    if not isinstance(listed, str):
        raise UnsupportedError(f"int8 cannot leave {listed!r} in float: give operator names with commas between them")
    left = [name.strip() for name in listed.split(",") if name.strip()]
    unknown = sorted(set(left) - {operator.name for operator in network.operators})
    if unknown:
        raise UnsupportedError(f"int8 cannot leave in float what the network does not have: {', '.join(unknown)}")
    return left


def _check_place(network: Network, option: Option, able: list[str], left: list[str]) -> None:
    """Refuse a place that is no operator with an int8 form."""
    kinds = {operator.name: operator.kind for operator in network.operators}
    if option.where not in kinds:
        raise UnsupportedError(f"int8 takes the whole network or one of its operators, not {option.where}")
    if option.where not in able:
        treatment = option.settings.get("activations", "static")
        raise UnsupportedError(
            f"{option.where} is of kind {kinds[option.where]}, which has no int8 form with {treatment} activations"
        )
    if left:
        raise UnsupportedError(f"int8 of {option.where} alone leaves all others as they are: it takes no list in float")


def _together(before: QuantSpec, added: QuantSpec) -> QuantSpec:
    """What is int8 already and what comes to it."""
    if before.activations != added.activations:
        raise UnsupportedError(
            f"int8 with {added.activations} activations cannot join operators with {before.activations} ones"
        )
    return added.model_copy(update={"operators": {**before.operators, **added.operators}})


def _refuse_rounding_of_float(network: Network, spec: QuantSpec, option: Option) -> None:
    """Learned rounding and bias correction work on all layers: refuse where one of them stays in float."""
    if option.settings.get("rounding") != "learned" and option.settings.get("correct_bias") is not True:
        return
    layers = [o.name for o in network.operators if o.kind in WEIGHTS_IN_INT8["float"]]
    left = [name for name in layers if spec.operators.get(name) != "int8"]
    if left:
        raise UnsupportedError(
            f"int8 rounds with care where all layers become int8, and {', '.join(left)} would stay in float"
        )
