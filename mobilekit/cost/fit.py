"""Fits cost tables to times that operators took together: sketches, published networks and published blocks alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mobilekit.cost.features import basis, features
from mobilekit.cost.lines import Line
from mobilekit.cost.work import Channels, Part, parts
from mobilekit.types import CostTable, KindModel, OperatorShape, Precision, RuntimeName, Validation

Term = tuple[str, str]
"""A row of a cost table and one of its features; ("", "calls") is a run's overhead."""
OVERHEAD: Term = ("", "calls")
RIDGE = 1e-4
"""Weight of keeping coefficients small, or near a prior's, against one observation's squared relative error."""
HUBER = 2.5
"""Residuals beyond this many typical ones count by their size and not by their square."""
ROUNDS = 3
FOLDS = 5
FEW = 200
"""Up to so many cases one of them moves the interval that it is judged by, so that it has to be left out."""
ENOUGH = 30
"""Real networks whose left-out errors make an interval."""
MOSTLY = 0.5
"""Share of an observation's time from which its error says something about one kind."""


class Observation(NamedTuple):
    """Operators that together took a time, in one runtime and precision."""

    parts: tuple[Part, ...]
    precision: Precision
    us: float
    weight: float = 1.0
    group: str = ""
    """Observations of one group are left out together (widths of one network, say)."""
    known_us: float = 0.0
    """The part of the time that is priced already: by another table, or measured apart."""
    runs: float = 1.0
    """How much of a run's overhead is in the time: its share, for an operator whose share of a run is known."""
    real: bool = False
    """Whether it is as deep as networks that people run: where enough are, their errors are the table's."""

    @classmethod
    def of(cls, shapes: Iterable[OperatorShape], precision: Precision, us: float) -> Observation:
        """Of fused operators in any order."""
        return cls(tuple(part for shape in shapes for part in parts(shape)), precision, us)

    @classmethod
    def of_lines(cls, found: Iterable[Line], precision: Precision, us: float) -> Observation:
        """Of a network's lines."""
        return cls(tuple(part for line in found for part in line.parts), precision, us)


class Design(NamedTuple):
    """The observations as a regression: amounts (observations, terms), times (observations) in microseconds."""

    terms: tuple[Term, ...]
    amounts: np.ndarray
    times: np.ndarray
    weights: np.ndarray
    known: np.ndarray
    """The part of each time that the amounts do not have to explain."""

    @classmethod
    def of(
        cls,
        observations: Sequence[Observation],
        chosen: Callable[[str], Collection[str]] = basis,
    ) -> Design:
        """One row an observation; terms in order of their first appearance. `chosen` names each row's features."""
        index: dict[Term, int] = {OVERHEAD: 0}
        rows: list[dict[int, float]] = []
        for observation in observations:
            row: dict[int, float] = defaultdict(float, {0: observation.runs})
            for part in observation.parts:
                kept = chosen(part.row)
                for feature, amount in amounts(part, observation.precision):
                    if feature not in kept:
                        continue
                    row[index.setdefault((part.row, feature), len(index))] += amount
            rows.append(row)
        matrix = np.zeros((len(rows), len(index)))
        for number, row in enumerate(rows):
            for column, amount in row.items():
                matrix[number, column] = amount
        times = np.array([o.us for o in observations])
        weights, known = np.array([o.weight for o in observations]), np.array([o.known_us for o in observations])
        return cls(tuple(index), matrix, times, weights, known)

    def only(self, chosen: np.ndarray) -> Design:
        """The chosen observations (indices or a mask)."""
        return Design(self.terms, self.amounts[chosen], self.times[chosen], self.weights[chosen], self.known[chosen])


def amounts(part: Part, precision: Precision) -> tuple[tuple[str, float], ...]:
    """Feature and amount of a part with plain channel counts; zeros are left out."""
    return _amounts(part.shape, precision, float(part.channels.inputs), float(part.channels.outputs))


@lru_cache(maxsize=100_000)
def _amounts(
    shape: OperatorShape, precision: Precision, inputs: float, outputs: float
) -> tuple[tuple[str, float], ...]:
    found = features(shape, precision, Channels(inputs, outputs))
    return tuple((name, float(amount)) for name, amount in found.items() if amount)


def solve(design: Design, prior: np.ndarray | None = None, strength: float = RIDGE) -> np.ndarray:
    """Coefficients >= 0, microseconds a unit, that minimise the relative error; shape (terms).

    Non-negative least squares on amounts / times against 1, reweighted so that outliers count by their size (Huber),
    with each coefficient held to `prior` (0 where none is given) by `strength` times the square of what it differs,
    measured by its largest share in an observation.
    """
    from scipy.linalg import solve_triangular
    from scipy.optimize import nnls

    relative = design.amounts / design.times[:, None]
    # The columns differ by nine powers of ten: without scaling the solver's tolerance swallows some.
    scale = relative.max(axis=0)
    scale[scale == 0] = 1.0
    relative = relative / scale
    count = relative.shape[1]
    target = np.zeros(count) if prior is None else prior * scale
    wanted = 1 - design.known / design.times
    weights = design.weights.copy()
    solution = np.zeros(count)
    for _ in range(ROUNDS):
        # The same least squares with as many rows as terms (Cholesky's factor of the normal equations): there are
        # thousands of observations, and the ridge keeps the squared condition number harmless.
        weighted = relative * weights[:, None]
        factor = np.linalg.cholesky(relative.T @ weighted + strength * np.eye(count))
        aim = solve_triangular(factor, weighted.T @ wanted + strength * target, lower=True)
        solution, _ = nnls(factor.T, aim, maxiter=30 * count)
        misfit = np.abs(relative @ solution - wanted)
        typical = 1.4826 * float(np.median(misfit)) + 1e-9
        weights = design.weights * np.minimum(1.0, HUBER * typical / np.maximum(misfit, 1e-12))
    return np.asarray(solution / scale, dtype=np.float64)


def left_out(design: Design, groups: Sequence[object]) -> np.ndarray:
    """Predicted over measured time of every observation by a fit to the other groups; shape (observations)."""
    labels = np.array([str(g) for g in groups])
    ratios = np.ones(len(design.times))
    for label in np.unique(labels):
        out = labels == label
        if out.all():
            continue
        coefficients = solve(design.only(~out))
        ratios[out] = (design.amounts[out] @ coefficients + design.known[out]) / design.times[out]
    return np.maximum(ratios, 1e-3)


def folds(observations: Sequence[Observation], count: int = FOLDS) -> list[int]:
    """A fold for each observation, the same for those of one group; groups take turns in order of appearance."""
    turn: dict[str, int] = {}
    return [
        turn.setdefault(o.group, len(turn)) % count if o.group else number % count
        for number, o in enumerate(observations)
    ]


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """Factors that hold 80 % of measured over predicted; 1 is always inside.

    Few samples do not reach their own quantiles: the width grows by sqrt(1 + 4/n), and a lone sample gets a factor
    of two either way.
    """
    if len(ratios) < 2:
        return 0.5, 2.0
    logs = -np.log(ratios)
    wider = float(np.sqrt(1 + 4 / len(ratios)))
    low, high = np.quantile(logs, [0.1, 0.9])
    return float(np.exp(min(low, 0.0) * wider)), float(np.exp(max(high, 0.0) * wider))


def validation(ratios: np.ndarray, method: str) -> Validation:
    """Errors of left-out predictions (predicted over measured), and how many the interval of the others holds."""
    errors = np.abs(ratios - 1)
    low, high = interval(ratios)
    inside = (low <= 1 / ratios) & (1 / ratios <= high)
    if len(ratios) <= FEW:
        inside = np.array([_inside(ratios, number) for number in range(len(ratios))])
    return Validation(
        method=method,
        cases=len(ratios),
        median_error=float(np.median(errors)),
        mean_error=float(np.mean(errors)),
        within_5=float(np.mean(errors <= 0.05)),
        within_10=float(np.mean(errors <= 0.10)),
        coverage=float(np.mean(inside)),
    )


def _inside(ratios: np.ndarray, number: int) -> bool:
    low, high = interval(np.delete(ratios, number))
    return bool(low <= 1 / ratios[number] <= high)


def table(
    observations: Sequence[Observation],
    runtime: RuntimeName,
    precision: Precision,
    *,
    threads: int = 1,
    method: str = "five-fold over timed sketches",
) -> CostTable:
    """The cost table of these observations, with its left-out errors and the interval that they imply.

    Raises ValueError for no observations.
    """
    if not observations:
        raise ValueError("no observations to fit")
    design = Design.of(observations)
    ratios = left_out(design, folds(observations))
    solution = solve(design)
    whole = [number for number, observation in enumerate(observations) if observation.runs >= 1]
    real = [number for number in whole if observations[number].real]
    surest = [number for number in real if design.weights[number] == design.weights[real].max()]
    if len(surest) >= ENOUGH:
        whole, method = surest, f"{method}, of those as deep as real networks"
        # Least squares of relative errors lean low, and more so the noisier the times are.
        lean = float(np.median(ratios[surest]))
        solution, ratios = solution / lean, ratios / lean
    coefficients = dict(zip(design.terms, solution, strict=True))
    made = assembled((runtime, precision, threads), observations, coefficients, ratios, method)
    if not whole or len(whole) == len(observations):
        return made
    # The table's own error is that of whole runs, of real networks if it can be; operators are told by their rows.
    low, high = interval(ratios[whole])
    return made.model_copy(update={"low": low, "high": high, "validation": validation(ratios[whole], method)})


def assembled(
    key: tuple[RuntimeName, Precision, int],
    observations: Sequence[Observation],
    coefficients: Mapping[Term, float],
    ratios: np.ndarray,
    method: str,
) -> CostTable:
    """A cost table from coefficients (microseconds a unit) and the left-out predictions of the observations.

    `key` is runtime, precision and threads; `ratios` is predicted over measured, shape (observations).
    """
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for (row, feature), coefficient in coefficients.items():
        if row and coefficient > 0:
            rows[row][feature] = coefficient
        elif row:
            rows[row] = rows[row]
    facts = _facts(observations, coefficients, ratios)
    low, high = interval(ratios)
    return CostTable(
        runtime=key[0],
        precision=key[1],
        threads=key[2],
        overhead_us=coefficients.get(OVERHEAD, 0.0),
        kinds={row: _model(rows[row], facts.get(row)) for row in rows},
        low=low,
        high=high,
        validation=validation(ratios, method) if len(ratios) > 1 else None,
    )


class Range(NamedTuple):
    """The least and the most MACs and bytes, read and written, of the operators of one row."""

    min_macs: float = np.inf
    max_macs: float = 0.0
    min_bytes: float = np.inf
    max_bytes: float = 0.0

    def over(self, found: Mapping[str, float]) -> Range:
        """With one more operator, given by its features."""
        macs, moved = found.get("macs", 0.0), found.get("in_bytes", 0.0) + found.get("out_bytes", 0.0)
        return self.with_range(Range(macs, macs, moved, moved))

    def with_range(self, other: Range) -> Range:
        """What holds both."""
        least = min(self.min_macs, other.min_macs), min(self.min_bytes, other.min_bytes)
        most = max(self.max_macs, other.max_macs), max(self.max_bytes, other.max_bytes)
        return Range(least[0], most[0], least[1], most[1])

    def limits(self) -> dict[str, float]:
        """The fields of a `KindModel`; nothing is inside where no operator was seen."""
        return {name: size if np.isfinite(size) else 0.0 for name, size in self._asdict().items()}


class _Seen(NamedTuple):
    """What the observations hold of one row."""

    samples: int = 0
    range: Range = Range()
    ratios: tuple[float, ...] = ()


def _facts(
    observations: Sequence[Observation], coefficients: Mapping[Term, float], ratios: np.ndarray
) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}
    for observation, ratio in zip(observations, ratios, strict=True):
        shares: dict[str, float] = defaultdict(float)
        sizes: dict[str, Range] = {}
        for part in observation.parts:
            found = dict(amounts(part, observation.precision))
            shares[part.row] += sum(coefficients.get((part.row, name), 0.0) * amount for name, amount in found.items())
            sizes[part.row] = sizes.get(part.row, Range()).over(found)
        total = sum(shares.values()) + observation.known_us or 1.0
        for row, size in sizes.items():
            old = seen.get(row, _Seen())
            telling = (float(ratio),) if shares[row] > MOSTLY * total else ()
            seen[row] = _Seen(old.samples + (observation.runs >= 1), old.range.with_range(size), old.ratios + telling)
    return seen


def _model(coefficients: dict[str, float], seen: _Seen | None) -> KindModel:
    told = np.array(seen.ratios if seen else ())
    sizes = (seen.range if seen else Range()).limits()
    low, high = interval(told)
    return KindModel(
        coefficients=coefficients,
        low=low,
        high=high,
        samples=seen.samples if seen else 0,
        median_error=float(np.median(np.abs(told - 1))) if len(told) else None,
        **sizes,
    )
