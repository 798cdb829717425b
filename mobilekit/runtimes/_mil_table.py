"""What an operator of the evaluator is: the parameters that it understands, and a function from them to its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Result = torch.Tensor | tuple[torch.Tensor, ...]


class Arguments:
    """What one operation was given, by parameter. Constants among them are tensors too, and text is text.

    Readers of one parameter take what MIL says is its default where the program leaves it out.
    """

    def __init__(self, given: dict[str, tuple[torch.Tensor | str, ...]]) -> None:
        self.given = given

    def __contains__(self, parameter: str) -> bool:
        return parameter in self.given

    def tensor(self, parameter: str = "x") -> torch.Tensor:
        """A tensor that the operation cannot be without. Raises ValueError where it is missing."""
        (value,) = self.tensors(parameter)
        return value

    def tensors(self, parameter: str) -> tuple[torch.Tensor, ...]:
        """All tensors of a parameter that takes several."""
        values = self.given.get(parameter, ())
        found = tuple(value for value in values if isinstance(value, torch.Tensor))
        if not found or len(found) != len(values):
            raise ValueError(f"it has no {parameter}")
        return found

    def optional(self, parameter: str) -> torch.Tensor | None:
        """A tensor, or None where the operation goes without."""
        return self.tensor(parameter) if parameter in self.given else None

    def integers(self, parameter: str, default: Sequence[int] | None = None) -> list[int]:
        """A vector of numbers as integers."""
        if default is not None and parameter not in self.given:
            return list(default)
        return [int(value) for value in self.tensor(parameter).reshape(-1).tolist()]

    def integer(self, parameter: str, default: int | None = None) -> int:
        """One integer."""
        (value,) = self.integers(parameter, None if default is None else [default])
        return value

    def number(self, parameter: str, default: float | None = None) -> float:
        """One number."""
        if default is not None and parameter not in self.given:
            return default
        return float(self.tensor(parameter).item())

    def flag(self, parameter: str, default: bool = False) -> bool:
        """One truth value."""
        return bool(self.tensor(parameter).item()) if parameter in self.given else default

    def text(self, parameter: str, default: str = "") -> str:
        """A word, such as a mode."""
        (value,) = self.given.get(parameter, (default,))
        if not isinstance(value, str):
            raise TypeError(f"{parameter} is no text")
        return value


Run = Callable[[Arguments], Result]


@dataclass(frozen=True)
class Operator:
    """A function, and the parameters that it takes into account: others are refused rather than ignored."""

    parameters: frozenset[str]
    run: Run


class Table(dict[str, Operator]):
    """Operators by MIL's names."""

    def operator(self, kind: str, parameters: str) -> Callable[[Run], Run]:
        """Enter the decorated function under MIL's name, with its parameters separated by spaces."""

        def enter(run: Run) -> Run:
            self[kind] = Operator(frozenset(parameters.split()), run)
            return run

        return enter

    def simple(self, functions: dict[str, Callable[..., torch.Tensor]], parameters: str = "x") -> None:
        """Enter functions of tensors alone, which take the parameters in this order."""
        names = parameters.split()
        for kind, function in functions.items():
            self.operator(kind, parameters)(_called(function, names))


def _called(function: Callable[..., torch.Tensor], names: list[str]) -> Run:
    return lambda given: function(*(given.tensor(name) for name in names))
