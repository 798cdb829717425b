"""What of a network an int8 file computes in int8: the candidate's QuantSpec, checked against its operators."""

from __future__ import annotations

from dataclasses import dataclass

from mobilekit.cost.work import QUANTISED
from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.types import Candidate, Network, Untraced
from mobilekit.types.plan import WEIGHTS_IN_INT8, Activations, QuantSpec

COMPUTING = frozenset({"conv", "conv_transpose", "linear", "add", "mul", "max_pool", "avg_pool", "global_pool"})
"""Kinds of operators that do not just move data."""


@dataclass(frozen=True)
class Selection:
    """How an int8 file treats activations, and which operators of the network stay in float."""

    activations: Activations
    kept_float: frozenset[str]
    """Empty: nothing is kept back, so that operators need not be found in the file."""
    sought: frozenset[str] = frozenset()
    """Those of them that compute: one that the exporter has put into another may be on the wrong side."""


def selection(candidate: Candidate | Untraced) -> Selection:
    """What the candidate's QuantSpec asks of an int8 file; without one, all that the runtime can, statically.

    An operator of a kind that no spec lists (an activation that fuses with nothing, a softmax) goes with what is
    around it: it stays in float beside an operator that does.

    Raises BadInputError where the spec names operators that the network does not have, UnsupportedError where it asks
    for int8 at an operator that its treatment of activations does not reach, and where it names none at all.
    """
    if isinstance(candidate, Untraced) or candidate.quant is None:
        return Selection("static", frozenset())
    spec, network = candidate.quant, candidate.network
    kinds = {operator.name: operator.kind for operator in network.operators}
    unknown = sorted(set(spec.operators) - set(kinds))
    if unknown:
        raise BadInputError(f"the QuantSpec names operators that the network does not have: {', '.join(unknown)}")
    reached = WEIGHTS_IN_INT8.get(spec.activations, QUANTISED)
    asked = {name for name, precision in spec.operators.items() if precision == "int8"}
    if not asked:
        raise UnsupportedError("the QuantSpec names no operator for int8: export the network in float instead")
    if spec.activations != "static":
        beyond = sorted(f"{name} ({kinds[name]})" for name in asked if kinds[name] not in reached)
        if beyond:
            treatment = "dynamic" if spec.activations == "dynamic" else "weight-only"
            raise UnsupportedError(f"{treatment} int8 is for operators with weights, not for {', '.join(beyond)}")
        kept = frozenset(name for name in kinds if kinds[name] in reached and name not in asked)
    else:
        kept = _with_neighbours(network, spec, asked)
    return Selection(spec.activations, kept, frozenset(name for name in kept if kinds[name] in COMPUTING))


def _with_neighbours(network: Network, spec: QuantSpec, asked: set[str]) -> frozenset[str]:
    """Operators that stay in float in a static file: those that were not asked for, and what belongs to them."""
    kept = {
        o.name for o in network.operators if o.name not in asked and (o.kind in QUANTISED or o.name in spec.operators)
    }
    around: dict[str, set[str]] = {operator.name: set(operator.inputs) for operator in network.operators}
    for operator in network.operators:
        for source in operator.inputs:
            around.get(source, set()).add(operator.name)
    for operator in network.operators:
        if operator.name not in asked and around[operator.name] & kept:
            kept.add(operator.name)
    return frozenset(kept)
