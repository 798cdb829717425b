"""The cost table of one device set-up, from the latencies of a few networks and the prices of similar devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mobilekit.cost import fit
from mobilekit.cost.parameters import ROWS, expanded, totals
from mobilekit.cost.pool import Pool, Times
from mobilekit.cost.published import Setup, TimedNetwork
from mobilekit.cost.shipped import FEWEST, Kind, kind_of, pool, published, ranges, twins
from mobilekit.cost.work import BYTES
from mobilekit.errors import BadInputError
from mobilekit.types import CostTable, KindModel, OperatorShape, Precision, Provenance, Validation

METHOD = "leave one network out, unknown to all devices"
BORROWED = 5.0
"""How many cases the errors that similar devices show on the same networks count for in an interval."""
TAILS = (0.1, 0.9)
GPU_RUNTIMES = ("vulkan", "opencl", "gpu", "nnapi", "npu")
"""Words that already say, in a runtime's name, that it does not run on the CPU."""


class Errors(NamedTuple):
    """Left-out errors, log of measured over predicted time.

    `own` are this set-up's, shape (networks,); `others` and their `weights` those of other devices on the same
    networks, each of shape (networks, set-ups) with NaN where nobody measured.
    """

    own: np.ndarray
    others: np.ndarray
    weights: np.ndarray


def table(
    setup: Setup,
    timed: Sequence[TimedNetwork],
    layers: Mapping[str, Sequence[OperatorShape]],
    provenance: Sequence[Provenance] = (),
) -> CostTable:
    """Prices such that each network's operators add up to its latency, held to those of similar published set-ups.

    Every network has to have its operators in `layers`. The validation is of each network by a fit to the others, with
    that network taken out of every device of the pool as well; the interval holds 80 % of those errors and of the
    errors that similar devices show on the same networks. Raises BadInputError for fewer than 3 networks.
    """
    if len(timed) < FEWEST:
        raise BadInputError(f"{len(timed)} timed networks are too few to fit prices to: {FEWEST} are needed")
    kind = kind_of(setup)
    times = Times(np.array([totals(layers[t.network]) for t in timed]), np.array([t.us for t in timed]))
    errors = left_out(setup, kind, times)
    values = _values(pool(kind), times, setup.device)
    observations = [fit.Observation.of(layers[t.network], setup.kept_as, t.us) for t in timed]
    rows = dict.fromkeys((*ROWS, *(part.row for o in observations for part in o.parts)))
    made = fit.assembled(
        (_runtime(setup), setup.kept_as, _threads(setup)),
        observations,
        expanded(values, setup.kept_as, rows),
        np.exp(-errors.own),
        METHOD,
    )
    low, high = interval(errors)
    return made.model_copy(
        update={
            "kinds": {name: _with_pool(name, model, made.precision, (low, high)) for name, model in made.kinds.items()},
            "low": low,
            "high": high,
            "cores": setup.cores if setup.cores in ("big", "little", "all") else "",
            "basis": "fitted",
            "validation": _validation(errors),
            "provenance": tuple(provenance),
        }
    )


def left_out(setup: Setup, kind: Kind, times: Times) -> Errors:
    """What a fit to the other networks gets wrong of each, when no device of the pool knows it either."""
    known = published(kind)
    count = len(times.us)
    own, others, weights = np.zeros(count), [], []
    for number in range(count):
        same = twins(kind, times.amounts[number])
        # A network that nobody else timed: how wrong others are is seen on one that they did time.
        unknown = same or frozenset({known.networks[number % len(known.networks)]})
        without = pool(kind, unknown)
        rest = Times(np.delete(times.amounts, number, axis=0), np.delete(times.us, number))
        values = _values(without, rest, setup.device)
        own[number] = np.log(times.us[number] / (times.amounts[number] @ values))
        column = known.networks.index(min(unknown))
        others.append(np.log(known.us[:, column] / (without.prices @ known.amounts[column])))
        # Errors of other processors say nothing of how wide an NPU's are.
        weights.append(without.closeness(rest, setup.device) * (setup.processor.lower() != "npu"))
    return Errors(own, np.array(others), np.array(weights))


def interval(errors: Errors, without: int | None = None) -> tuple[float, float]:
    """Factors around a price that hold 80 % of the errors; `without` leaves one of the set-up's networks out."""
    count = len(errors.own)
    kept = np.array([number for number in range(count) if number != without])
    there = ~np.isnan(errors.others[kept])
    weights = np.where(there, errors.weights[kept], 0.0)
    total = weights.sum()
    logs = np.concatenate([errors.own[kept], errors.others[kept][there]])
    share = np.concatenate([np.ones(len(kept)), BORROWED * weights[there] / total if total else weights[there]])
    low, high = np.quantile(logs, TAILS, weights=share, method="inverted_cdf")
    # Few cases do not reach their own quantiles.
    wider = float(np.sqrt(1 + 4 / share.sum()))
    return float(np.exp(min(low, 0.0) * wider)), float(np.exp(max(high, 0.0) * wider))


def _validation(errors: Errors) -> Validation:
    inside = []
    for number, error in enumerate(np.exp(errors.own)):
        low, high = interval(errors, number)
        inside.append(low <= error <= high)
    whole = fit.validation(np.exp(-errors.own), METHOD)
    return whole.model_copy(update={"coverage": float(np.mean(inside))})


def _values(lender: Pool, times: Times, device: str) -> np.ndarray:
    return lender.fitted(times, lender.prior(times, device))


def _with_pool(row: str, model: KindModel, precision: Precision, around: tuple[float, float]) -> KindModel:
    """No operator is known better than the networks that it was in; sizes are as of this device and of its lenders."""
    others, share = ranges().get(row, fit.Range()), BYTES[precision] / BYTES["fp32"]
    others = others._replace(min_bytes=others.min_bytes * share, max_bytes=others.max_bytes * share)
    own = fit.Range(model.min_macs, model.max_macs, model.min_bytes, model.max_bytes) if model.samples else fit.Range()
    reach = {"low": min(model.low, around[0]), "high": max(model.high, around[1])}
    return model.model_copy(update={**reach, **own.with_range(others).limits()})


def _runtime(setup: Setup) -> str:
    name = setup.runtime.lower()
    plain = setup.processor == "cpu" or any(word in name for word in GPU_RUNTIMES)
    return name if plain else f"{name}-{setup.processor}"


def _threads(setup: Setup) -> int:
    return int(setup.threads) if setup.threads.isdigit() and int(setup.threads) > 0 else 1
