"""From the samples of a device to its cost tables: float first, int8 with what stays float already priced."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from mobilekit.cost.draws import MOST
from mobilekit.cost.fit import Observation, amounts, table
from mobilekit.cost.lines import Line, lines
from mobilekit.cost.measure import Sample, in_precision, undisturbed_ms
from mobilekit.types import CostTable, Network, Precision

Fused = Mapping[tuple[str, str], Collection[str]]
"""(runtime, precision) -> fusions."""

SHARE_WEIGHT = 1.0
"""Weight of all operators of a sample beside the sample: they say which kernel is dear, it says what really passed."""
LEAST_SHARE = 0.03
"""Part of a run below which a kernel's time is mostly noise."""
FEW = 20
"""Profiled samples below which they do not tell what profiling costs."""
WHOLE_WEIGHT = 3.0
"""Weight of a network as deep as real ones: it shows what passes between operators, and there are few of them."""
UNSTEADY = 0.1
"""Weight of a sample whose rounds were all disturbed: kernels slow down by different factors."""


def fitted(samples: Sequence[Sample], fused: Fused) -> list[CostTable]:
    """A cost table for every runtime, precision and thread count that was timed.

    An int8 file's operators that stay in float are priced by the float table of the same runtime and threads, and
    only the rest of its time is what its int8 operators share.
    """
    speed = speed_of(samples)
    found: list[CostTable] = []
    variants = dict.fromkeys((s.runtime, s.threads, s.precision) for s in samples)
    for runtime, threads, precision in sorted(variants, key=lambda v: (v[0], v[1], v[2] == "int8")):
        own = [s for s in samples if (s.runtime, s.threads, s.precision) == (runtime, threads, precision)]
        fusions = tuple(fused.get((runtime, precision), ()))
        floats = next((t for t in found if (t.runtime, t.threads, t.precision) == (runtime, threads, "fp32")), None)
        observations = observed(own, fusions, speed, floats)
        if observations:
            made = table(observations, runtime, precision, threads=threads)
            found.append(made.model_copy(update={"fusions": fusions, "reference_ms": speed}))
    return found


def speed_of(samples: Sequence[Sample]) -> float | None:
    """The reference product's time in milliseconds at which samples say their price; None where they have none."""
    return undisturbed_ms(ms for sample in samples for ms in sample.reference_ms)


def observed(
    samples: Sequence[Sample], fusions: Collection[str], speed: float | None, floats: CostTable | None = None
) -> list[Observation]:
    """What the samples say of operators in their own precision, at the reference's `speed` (milliseconds).

    `floats` prices what runs in float inside an int8 file; without it that counts as free.
    """
    found = []
    profiling_us = _profiling_us(samples, speed)
    for sample in samples:
        every = lines(sample.network, fusions)
        own = [line for line in every if line.precision == sample.precision]
        known = sum(_us(line, floats) for line in every if line.precision != sample.precision) if floats else 0.0
        us = sample.us(speed)
        if known < 0.9 * us:
            real = len(sample.network.operators) > MOST
            weight = (WHOLE_WEIGHT if real else 1.0) * (1.0 if sample.steady(speed) else UNSTEADY)
            whole = Observation.of_lines(own, sample.precision, us)
            whole = whole._replace(known_us=known, weight=weight, group=sample.network.name, real=real)
            shares = sample.shares(profiling_us)
            found += [whole, *_operators(whole, own, shares)]
    return found


def _profiling_us(samples: Sequence[Sample], speed: float | None) -> float:
    """What a runtime's profiler adds to each kernel, microseconds: the profiled runs are slower by a factor (it was
    another moment) and by this much a kernel."""
    from scipy.optimize import nnls

    known = [s for s in samples if s.kernels]
    if len(known) < FEW:
        return 0.0
    total = np.array([sum(kernel.median_us for kernel in s.kernels) for s in known])
    explained = np.array([[s.us(speed), len(s.kernels)] for s in known]) / total[:, None]
    return float(nnls(explained, np.ones(len(known)))[0][1])


def _operators(whole: Observation, own: Sequence[Line], shares: Mapping[str, float]) -> list[Observation]:
    """The operators of a sample one by one, where the runtime's profile says which part of the run is whose.

    The profile was taken at another moment and slows the run down: only the parts are taken from it.
    """
    found = []
    for line in own:
        share = shares.get(line.name, 0.0)
        if share >= LEAST_SHARE:
            weight = SHARE_WEIGHT * min(whole.weight, 1.0) * share
            # the share of the time holds that share of the overhead
            found.append(Observation(line.parts, whole.precision, share * whole.us, weight, whole.group, runs=share))
    return found


def candidate(network: Network, precision: Precision, fusions: Collection[str]) -> Observation:
    """What timing the network would tell of operators in this precision; nothing is known of the time yet."""
    own = [line for line in lines(in_precision(network, precision), fusions) if line.precision == precision]
    return Observation.of_lines(own, precision, 1.0)


def _us(line: Line, prices: CostTable) -> float:
    total = 0.0
    for part in line.parts:
        model = prices.kinds.get(part.row)
        if model is not None:
            total += sum(model.coefficients.get(name, 0.0) * amount for name, amount in amounts(part, line.precision))
    return total
