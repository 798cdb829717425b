"""Damages that were not measured, from those that were: of other strengths at a place, and of combinations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from mobilekit.planner.offers import ORDER, Found, Offer, by_method

POWER = 2.0
"""Of the strength, that a damage grows by where one strength alone was measured: what is removed enters outputs
linearly, and the divergence squares it."""
POWERS = (1.0, 6.0)
LEAST = 1e-7
TRUST = 0.3
"""Weight of the belief that damages add up, beside one measured combination."""

Strength = Callable[[Offer], float]


def completed(offers: Sequence[Offer], strength: Strength, assumed: float) -> list[Offer]:
    """Every offer with a damage where a like one at its place was measured; for the others the search counts
    `assumed`, so that it takes them where nothing else is fast enough.

    A power law of the strength (above 0, at most 1) runs through the measured ones: between two of them it is exact
    at both, beyond them it goes on as between the nearest two.
    """
    found: list[Offer] = []
    for alike in by_method(offers).values():
        known = sorted((strength(o), o.damage) for o in alike if o.damage is not None)
        for offer in alike:
            if not known:
                found.append(replace(offer, assumed=assumed))
            elif offer.damage is not None:
                found.append(offer)
            else:
                found.append(replace(offer, damage=_between(known, strength(offer)), interpolated=True))
    return found


def _between(known: Sequence[tuple[float, float]], strength: float) -> float:
    points = [(math.log(s), math.log(max(d, LEAST))) for s, d in known]
    at = math.log(strength)
    if len(points) == 1:
        return math.exp(points[0][1] + POWER * (at - points[0][0]))
    index = next((i for i, (s, _) in enumerate(points) if s >= at), len(points) - 1)
    (s0, d0), (s1, d1) = points[max(index, 1) - 1], points[max(index, 1)]
    slope = (d1 - d0) / (s1 - s0) if s1 > s0 else POWER
    if not s0 <= at <= s1:  # noise between two measurements must not be carried far
        slope = min(max(slope, POWERS[0]), POWERS[1])
    near = (s0, d0) if abs(at - s0) < abs(at - s1) else (s1, d1)
    return math.exp(near[1] + slope * (at - near[0]))


@dataclass(frozen=True)
class Parts:
    """Summed damage of a choice by what it changes, and what was measured of all of it together."""

    channels: float
    blocks: float
    layers: float
    precision: float
    measured: float

    @property
    def each(self) -> np.ndarray:
        """The sums, shape (4,)."""
        return np.array([self.channels, self.blocks, self.layers, self.precision])

    @staticmethod
    def of(found: Found, measured: float) -> Parts:
        """The parts of a search's answer."""
        by = dict.fromkeys(ORDER, 0.0)
        for offer in found.choice.values():
            by[offer.transform.at] += offer.damage or 0.0
        return Parts(by["channels"], by["block"], by["layer"], found.start.damage, measured)


@dataclass(frozen=True)
class Correction:
    """Factors on the damages of each kind, so that they add up to what combinations were measured to do.

    Widths, layers and precisions do not only add: a pruned network has less to spare for int8.
    """

    channels: float = 1.0
    blocks: float = 1.0
    layers: float = 1.0
    precision: float = 1.0

    def of(self, offer: Offer) -> Offer:
        """The offer as the search should see it."""
        factors = dict(zip(ORDER, (self.channels, self.blocks, self.layers), strict=True))
        return replace(offer, factor=factors[offer.transform.at])


def correction(seen: Sequence[Parts]) -> Correction:
    """Factors by non-negative least squares of relative errors, pulled towards one."""
    rows = [parts.each / max(parts.measured, LEAST) for parts in seen if parts.each.sum() > LEAST]
    if not rows:
        return Correction()
    pull, kinds = math.sqrt(TRUST), len(rows[0])
    # the pull counts where a kind took part: what was not seen keeps its factor
    matrix = np.vstack([np.array(rows), pull * np.eye(kinds)])
    factors, _ = nnls(matrix, np.array([*([1.0] * len(rows)), *([pull] * kinds)]))
    return Correction(*(float(min(max(factor, 0.01), 100.0)) for factor in factors))
