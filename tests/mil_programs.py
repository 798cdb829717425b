"""ML Programs built operator by operator with coremltools, saved to packages, for tests of the evaluator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilekit.runtimes._job import quiet
from mobilekit.runtimes._mil_evaluator import Evaluator
from mobilekit.runtimes._mil_program import read

with quiet(native=True):
    import coremltools
    from coremltools.converters.mil import Builder as mb  # noqa: N813  (its name in all of coremltools)
    from coremltools.converters.mil.mil import Function, Program, types

__all__ = ["Build", "carried_out", "computed", "coremltools", "inferred", "mb", "saved", "types", "write"]

Build = Callable[..., Any]
"""Takes MIL variables, or constants in their place, and returns a variable, or a tuple of them."""
TYPES = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32}


def saved(build: Build, inputs: Sequence[np.ndarray], path: Path, opset: str = "iOS18") -> Path:
    """A package whose program takes such inputs, x0, x1, ..., and is built as told: no pass changes it."""
    target = getattr(coremltools.target, opset)
    with quiet(native=True):
        given = {f"x{i}": mb.placeholder(each.shape, TYPES[each.dtype.name]) for i, each in enumerate(inputs)}
        with Function(given, opset_version=target) as function:
            found = build(*[function.inputs[name] for name in given])
            function.set_outputs(list(found) if isinstance(found, tuple | list) else [found])
        program = Program()
        program.add_function("main", function)
        write(program, path, target)
    return path


def write(program: Any, path: Path, target: Any) -> None:
    model = coremltools.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=target,
        compute_precision=coremltools.precision.FLOAT32,
        pass_pipeline=coremltools.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))


def written(result: Any) -> list[Any]:
    """Variables as a list, whether an operation has one or several."""
    return list(result) if isinstance(result, tuple | list) else [result]


def inferred(build: Build, inputs: Sequence[np.ndarray], opset: str = "iOS18") -> list[np.ndarray]:
    """What coremltools' own value inference computes when the inputs are constants."""
    target = getattr(coremltools.target, opset)
    with quiet(), np.errstate(all="ignore"), Function({}, opset_version=target):
        # Copies: coremltools infers thresholded_relu in the memory of its input.
        found = written(build(*[mb.const(val=each.copy()) for each in inputs]))
    assert all(result.val is not None for result in found), "coremltools infers no value here"
    return [np.asarray(result.val) for result in found]


def carried_out(build: Build, inputs: Sequence[np.ndarray], folder: Path, opset: str = "iOS18") -> list[np.ndarray]:
    """The outputs of a program, saved, read back and evaluated."""
    evaluator = Evaluator(read(saved(build, inputs, folder / "one.mlpackage", opset)))
    return list(evaluator.evaluate({f"x{i}": each for i, each in enumerate(inputs)}).values())


def computed(cases: dict[str, tuple[Build, list[np.ndarray]]], path: Path) -> dict[str, list[np.ndarray]]:
    """Results of many operators from one saved package: saving takes longer than anything else."""
    inputs: dict[int, np.ndarray] = {id(each): each for _, given in cases.values() for each in given}
    names: dict[str, list[str]] = {}

    def build(*placeholders: Any) -> Any:
        given = dict(zip(inputs, placeholders, strict=True))
        for case, (operator, arrays) in cases.items():
            names[case] = [result.name for result in written(operator(*(given[id(each)] for each in arrays)))]
        return mb.identity(x=placeholders[0])

    evaluator = Evaluator(read(saved(build, list(inputs.values()), path)))
    found = evaluator.tensors({f"x{i}": each for i, each in enumerate(inputs.values())})
    return {case: [found[name] for name in own] for case, own in names.items()}
