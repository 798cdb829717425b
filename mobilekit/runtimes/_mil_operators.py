"""The one table of the evaluator's operators, and what a program has that is not in it."""

from __future__ import annotations

from mobilekit.runtimes import (
    _mil_constants,
    _mil_elementwise,
    _mil_normalisation,
    _mil_products,
    _mil_resizing,
    _mil_selection,
    _mil_shapes,
    _mil_windows,
)
from mobilekit.runtimes._mil_program import Program
from mobilekit.runtimes._mil_table import Operator

OPERATORS: dict[str, Operator] = {
    **_mil_constants.OPERATORS,
    **_mil_elementwise.OPERATORS,
    **_mil_normalisation.OPERATORS,
    **_mil_products.OPERATORS,
    **_mil_resizing.OPERATORS,
    **_mil_selection.OPERATORS,
    **_mil_shapes.OPERATORS,
    **_mil_windows.OPERATORS,
}
"""MIL's name -> what is computed."""


def missing(program: Program) -> list[str]:
    """Operators, and parameters of known ones ("conv (parameter fused_relu)"), that would have to be left out."""
    found = set()
    for operation in program.operations:
        operator = OPERATORS.get(operation.kind)
        if operator is None:
            found.add(operation.kind)
            continue
        unknown = operation.arguments.keys() - operator.parameters
        found |= {f"{operation.kind} (parameter {parameter})" for parameter in unknown}
    return sorted(found)
