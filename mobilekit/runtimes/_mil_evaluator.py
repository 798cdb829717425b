"""Carries out ML Programs number by number, where there is no Core ML to run them.

What is simulated: every operator as coremltools documents it; weights unpacked from the package's own file; half
precision, in that every constant, input and result whose type is fp16 is rounded to it (and overflows at 65,504).

What is not: inside an operator, sums are accumulated in float32 in PyTorch's order, while Apple's engines (CPU, GPU,
Neural Engine) accumulate in an order and a precision of their own, and may fuse operators without rounding between
them. Results on a device therefore differ in the last bits of fp16, and nothing here says which engine is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from mobilekit.errors import BadInputError, MobilekitError, UnsupportedError, first_line
from mobilekit.runtimes._mil_operators import OPERATORS, missing
from mobilekit.runtimes._mil_program import Operation, Program, TensorType
from mobilekit.runtimes._mil_table import Arguments

Value = torch.Tensor | str
HELD: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "fp16": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "int4": torch.int8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    **dict.fromkeys(("uint1", "uint2", "uint3", "uint4", "uint6", "uint8"), torch.uint8),
    "uint16": torch.int32,
    "uint32": torch.int64,
}
"""Type in the program -> the one that values are held in: PyTorch has few operators for others."""


class Evaluator:
    """A program that is ready to be carried out; constants are unpacked once, when it is made.

    Raises UnsupportedError, which names them all, where operators are not known, and BadInputError where a constant
    cannot be read.
    """

    def __init__(self, program: Program) -> None:
        lacking = missing(program)
        if lacking:
            raise UnsupportedError(
                f"mobilekit's evaluator of Core ML programs lacks {', '.join(lacking)}; "
                "check this file on macOS, where Core ML itself runs it"
            )
        self.program = program
        read = {name for operation in program.operations for name in operation.reads()}
        read |= {output.name for output in program.outputs}
        stored = {
            name: _held(constant.value(), constant.type) for name, constant in program.constants.items() if name in read
        }
        self.operations: list[Operation] = []
        """Those that depend on an input."""
        with torch.inference_mode():
            for operation in program.operations:
                if all(name in stored for name in operation.reads()):
                    stored.update(_carried_out(operation, stored))
                else:
                    self.operations.append(operation)
        self.unpacked = {name for name in stored if name not in program.constants}
        """Tensors that follow from constants alone."""
        kept = {name for operation in self.operations for name in operation.reads()}
        kept |= {output.name for output in program.outputs}
        self.constants = {name: value for name, value in stored.items() if name in kept}
        self.done_with = _last_reads(self.operations, {output.name for output in program.outputs})

    def evaluate(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The program's outputs, by name, for inputs by name; floats of any type are float32.

        Raises BadInputError for inputs of other names or shapes, or where an operation cannot be carried out.
        """
        values: dict[str, Value] = dict(self.constants)
        for index, written in self._steps(inputs, values):
            values.update(written)
            for name in self.done_with[index]:
                del values[name]
        return {output.name: _array(values[output.name]) for output in self.program.outputs}

    def tensors(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every tensor that depends on the inputs, by name, in the order of the program; otherwise as `evaluate`."""
        values: dict[str, Value] = dict(self.constants)
        found = {}
        for _, written in self._steps(inputs, values):
            values.update(written)
            found.update({name: _array(value) for name, value in written.items()})
        return found

    def weights(self) -> dict[str, np.ndarray]:
        """The constants that operations on inputs read, unpacked, by name; text is left out."""
        return {name: _array(value) for name, value in self.constants.items() if isinstance(value, torch.Tensor)}

    def _steps(
        self, inputs: dict[str, np.ndarray], values: dict[str, Value]
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """What each operation writes, in turn; the caller keeps `values` up to date. Index -1: the inputs."""
        with torch.inference_mode():
            yield -1, {tensor.name: _input(tensor, inputs) for tensor in self._known_inputs(inputs)}
            for index, operation in enumerate(self.operations):
                yield index, _carried_out(operation, values)

    def _known_inputs(self, inputs: dict[str, np.ndarray]) -> tuple[TensorType, ...]:
        wanted = {tensor.name for tensor in self.program.inputs}
        if inputs.keys() != wanted:
            raise BadInputError(f"the program takes the inputs {sorted(wanted)}, not {sorted(inputs)}")
        return self.program.inputs


def _held(value: np.ndarray | str, declared: TensorType) -> Value:
    if isinstance(value, str):
        return value
    wide = value.astype(np.int64) if value.dtype in (np.uint16, np.uint32, np.uint64) else value
    return _settled(torch.from_numpy(np.ascontiguousarray(wide)).reshape(value.shape), declared)


def _settled(value: torch.Tensor, declared: TensorType) -> torch.Tensor:
    """A value in the declared type. Raises MobilekitError where it has not the declared shape: a wrong operator."""
    shape = declared.shape
    if len(shape) != value.ndim or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        raise MobilekitError(
            f"{declared.name} is computed as {list(value.shape)} where the program declares {list(shape)}: "
            "mobilekit's evaluator is wrong here, please report it"
        )
    held = HELD.get(declared.elements)
    if held is None:
        raise UnsupportedError(f"mobilekit does not evaluate tensors of type {declared.elements} ({declared.name})")
    if declared.elements == "fp16":
        return value.half().float()
    return value.to(held)


def _input(declared: TensorType, inputs: dict[str, np.ndarray]) -> torch.Tensor:
    given = inputs[declared.name]
    shape = declared.shape
    if len(shape) != given.ndim or any(want not in (None, got) for want, got in zip(shape, given.shape, strict=True)):
        raise BadInputError(f"the input {declared.name} has shape {list(shape)}, not {list(given.shape)}")
    value = _held(given, declared)
    assert isinstance(value, torch.Tensor)  # noqa: S101  (an array does not become text)
    return value


def _carried_out(operation: Operation, values: dict[str, Value]) -> dict[str, torch.Tensor]:
    """What one operation writes."""
    given = {
        parameter: tuple(values[name] for name in names) for parameter, names in operation.arguments.items() if names
    }
    try:
        result = OPERATORS[operation.kind].run(Arguments(given))
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{operation.name} ({operation.kind}) cannot be carried out: {first_line(error)}; export the file again"
        ) from error
    results = result if isinstance(result, tuple) else (result,)
    pairs = zip(operation.outputs, results, strict=True)
    return {declared.name: _settled(value, declared) for declared, value in pairs}


def _last_reads(operations: list[Operation], kept: Iterable[str]) -> dict[int, list[str]]:
    """For each operation, the tensors that nobody reads after it. Index -1 is before the first."""
    last: dict[str, int] = {}
    for index, operation in enumerate(operations):
        last.update(dict.fromkeys(operation.reads(), index))
        last.update({output.name: index for output in operation.outputs})
    freed: dict[int, list[str]] = {index: [] for index in range(-1, len(operations))}
    for name, index in last.items():
        if name not in set(kept):
            freed[index].append(name)
    return freed


def _array(value: Value) -> np.ndarray:
    assert isinstance(value, torch.Tensor)  # noqa: S101  (text is no tensor of the program)
    return np.asarray(value.contiguous().numpy()).copy()
