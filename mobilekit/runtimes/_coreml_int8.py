"""Writes a QuantSpec into a Core ML program: quantise and dequantise operations around what runs in int8.

coremltools' own `linear_quantize_activations` runs the model on macOS to find ranges; these come from the QuantSpec,
and operators of the program are found by what they compute, as in the other formats (`_tracing`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mobilekit.errors import UnsupportedError
from mobilekit.runtimes import _mil_program
from mobilekit.runtimes._job import calibration_samples, quiet, ranges_of, telling_sample
from mobilekit.runtimes._selection import Selection
from mobilekit.runtimes._tracing import FileNode, kept_nodes, node_values, operator_values, tensor_ranges
from mobilekit.types import ExportJob, Range

if TYPE_CHECKING:
    import torch

    from mobilekit.runtimes._mil_evaluator import Evaluator

INT8_KINDS = frozenset({"conv", "linear", "add", "max_pool", "avg_pool"})
"""MIL operators that compute in int8 between dequantise and quantise, as coremltools' own quantiser places these."""
DATA = ("x", "y")
"""Parameters of such an operator that are no weights."""
CLAMPS = frozenset({"relu", "relu6", "clip", "leaky_relu"})
"""They go together with the operator before them, so that nothing is rounded between."""
HANDING_ON = frozenset({"cast", "identity", "reshape", "squeeze", "expand_dims", "transpose"})
HALF_TOLERANCE = 2e-2
"""Largest difference of a tensor in half precision from the module's, as a fraction of its largest value."""
MOST_SAMPLES = 16
"""Samples that tensors which are no tensors of the module are measured on: the evaluator is slow."""
LEVELS = 255


class Scale(NamedTuple):
    """int8 = round(value / step) + zero."""

    step: float
    zero: int


class Placement(NamedTuple):
    """What of a program becomes int8."""

    scales: dict[str, Scale]
    """Tensors that are rounded."""
    float_weights: list[str]
    """Names of the constants that stay as they are."""


def placement(model: Any, job: ExportJob, module: torch.nn.Module, choice: Selection) -> Placement:
    """Where int8 goes in a converted model (a coremltools MLModel in half precision).

    Raises UnsupportedError as `kept_nodes`, and where a weight is shared by operators of which only some stay in float.
    """
    if choice.activations == "float" and not choice.kept_float:
        return Placement({}, [])
    from mobilekit.runtimes._mil_evaluator import Evaluator

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "float.mlpackage")
        with quiet():
            model.save(str(path))
        evaluator = Evaluator(_mil_program.read(path))
        names, sample = [tensor.name for tensor in evaluator.program.inputs], telling_sample(job)
        found = evaluator.tensors(dict(zip(names, sample, strict=True)))
        tensors = {name: (value,) for name, value in found.items()}
        left: set[str] = set()
        if choice.kept_float:
            nodes = [
                FileNode(o.name, tuple(o.reads()), tuple(out.name for out in o.outputs)) for o in evaluator.operations
            ]
            left = kept_nodes(choice, nodes, tensors, operator_values(module, sample[0]), HALF_TOLERANCE)
        scales: dict[str, Scale] = {}
        if choice.activations == "static":
            rounded = _rounded(evaluator, set(tensors), left)
            known = tensor_ranges(tensors, node_values(module, sample), ranges_of(job, module), HALF_TOLERANCE)
            missing = rounded - known.keys()
            if missing:
                samples = calibration_samples(job, MOST_SAMPLES)
                runs = (evaluator.tensors(dict(zip(names, each, strict=True))) for each in samples)
                known |= _measured(runs, missing)
            scales = {name: _scale(*known[name]) for name in sorted(rounded)}
        return Placement(scales, _weights(evaluator.operations, left))


def with_rounded_tensors(model: Any, scales: Mapping[str, Scale]) -> Any:
    """The model with a quantise and a dequantise operation behind each of these tensors, for all that read it."""
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.helper import block_context_manager
    from coremltools.models import utils

    @block_context_manager  # type: ignore[untyped-decorator]
    def place(block: Any) -> None:
        variables = {variable.name: variable for variable in block.inputs.values()}
        variables |= {output.name: output for operation in block.operations for output in operation.outputs}
        for name, scale in scales.items():
            _place(block, variables[name], scale)

    class Rounding(AbstractGraphPass):  # type: ignore[misc]  # coremltools is untyped
        """Places the operations in every function."""

        def apply(self, prog: Any) -> None:
            for function in prog.functions.values():
                place(function)

    with quiet(native=True):
        return utils._apply_graph_pass(model, Rounding())


def _place(block: Any, variable: Any, scale: Scale) -> None:
    from coremltools.converters.mil.mil import Builder, types

    operations = list(block.operations)
    after = operations.index(variable.op) + 1 if variable.op is not None else 0
    behind = operations[after] if after < len(operations) else None
    numbers = {
        "scale": types.nptype_from_builtin(variable.dtype)(scale.step),
        "zero_point": np.int8(scale.zero),
        "before_op": behind,
    }
    stored = Builder.quantize(input=variable, output_dtype="int8", **numbers)
    back = Builder.dequantize(input=stored, **numbers)
    block.replace_uses_of_var_after_op(anchor_op=back.op, old_var=variable, new_var=back)


def _rounded(evaluator: Evaluator, computed: set[str], left: set[str]) -> set[str]:
    """Tensors that are rounded, of all that are `computed`: what operators in int8 read and write, behind a clamp.

    What only leads to an output of the network is not: the output is float anyway.
    """
    operations, outputs = evaluator.operations, {output.name for output in evaluator.program.outputs}
    readers: dict[str, list[_mil_program.Operation]] = {}
    for operation in operations:
        for name in operation.reads():
            readers.setdefault(name, []).append(operation)

    def leads_out(name: str) -> bool:
        following = readers.get(name, [])
        return name in outputs or (
            bool(following) and all(each.kind in HANDING_ON and leads_out(each.name) for each in following)
        )

    found: set[str] = set()
    for operation in operations:
        if operation.kind not in INT8_KINDS or operation.name in left:
            continue
        read = [name for parameter in DATA for name in operation.arguments.get(parameter, ())]
        if not computed.issuperset(read):  # a constant is added: that stays in float
            continue
        result, following = operation.name, readers.get(operation.name, [])
        if len(following) == 1 and following[0].kind in CLAMPS:
            result = following[0].name
        found.update(read)
        if not leads_out(result):
            found.add(result)
    return found


def _weights(operations: Iterable[_mil_program.Operation], left: set[str]) -> list[str]:
    """Constants that operators in float read as their weights."""
    owners: dict[str, set[bool]] = {}
    names: dict[str, list[str]] = {}
    for operation in operations:
        for name in operation.arguments.get("weight", ()):
            owners.setdefault(name, set()).add(operation.name in left)
            names.setdefault(name, []).append(operation.name)
    mixed = [", ".join(names[name]) for name, sides in owners.items() if len(sides) > 1]
    if mixed:
        raise UnsupportedError(f"these operators share weights, and only some stay in float: {mixed[0]}")
    return sorted(name for name, sides in owners.items() if True in sides)


def _scale(low: float, high: float) -> Scale:
    """The grid of 256 values over a range, zero among them; a step that half precision can hold."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = max(float(np.float16((high - low) / LEVELS)), float(np.finfo(np.float16).tiny))
    return Scale(step, int(np.clip(round(-128 - low / step), -128, 127)))


def _measured(runs: Iterable[dict[str, np.ndarray]], names: set[str]) -> dict[str, Range]:
    found: dict[str, Range] = {}
    for values in runs:
        for name in names:
            low, high = float(values[name].min()), float(values[name].max())
            before = found.get(name, (low, high))
            found[name] = (min(low, before[0]), max(high, before[1]))
    return found
