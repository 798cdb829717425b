"""In which precision a file runs every operator of the result, and why where that is not the file's own."""

from __future__ import annotations

from mobilekit.cost.work import QUANTISED
from mobilekit.types import Candidate, ExportedModel, Operator, Precision, PrecisionRow, QuantSpec

WEIGHTS_ONLY = "its weights are stored in int8, and it computes in float"
NO_FORM = "there is no int8 form of its kind"
NOT_REACHED = "int8 with ranges taken at every inference reaches convolutions and linear layers only"
LEFT = "the plan leaves it in float"


def precision_rows(candidate: Candidate, model: ExportedModel) -> tuple[PrecisionRow, ...]:
    """The operators of the candidate's network in the order in which they run, as `model` was asked to run them.

    What was read back from the file is a count (`FileFacts.operators`): operators have other names there.
    """
    rows = []
    for operator in candidate.network.operators:
        reason = None
        if model.precision == "int8" and candidate.quant is not None:
            reason = _in_float(operator, candidate.quant, model)
        precision = model.precision if reason is None else _floating(model)
        name = operator.module or operator.name
        rows.append(PrecisionRow(name=name, kind=operator.kind, precision=precision, reason=reason))
    return tuple(rows)


def _floating(model: ExportedModel) -> Precision:
    """What the rest of an int8 file computes in: half precision where the file has such operators (Core ML)."""
    return "fp16" if "fp16" in model.facts.operators else "fp32"


def _in_float(operator: Operator, spec: QuantSpec, model: ExportedModel) -> str | None:
    """Why an operator of an int8 file computes in float; None: it does not."""
    if spec.operators.get(operator.name) == "int8":
        return WEIGHTS_ONLY if spec.activations == "float" else model.not_int8.get(operator.name)
    if operator.kind not in QUANTISED:
        return NO_FORM
    return model.not_int8.get(operator.name) or (NOT_REACHED if spec.activations == "dynamic" else LEFT)
