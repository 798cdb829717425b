"""The networks that are timed to learn a device's prices: small ones like real ones, random or the same every time."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from mobilekit.cost.basics import RUNG, basics, borders, channel_ladder
from mobilekit.cost.draws import LARGEST_MAP, LARGEST_WIDTH, LEAST_MAP, LEAST_WIDTH, SIZES, Deep, Draw, finish
from mobilekit.cost.families import DEEP, FAMILIES
from mobilekit.cost.sketches import Sketch
from mobilekit.errors import BadInputError
from mobilekit.types import Network, OperatorShape

__all__ = ["LIMITS", "RUNG", "basics", "borders", "channel_ladder", "pool", "random_network"]

LIMITS = {"macs": 60e6, "activation_bytes": 5e6, "weight_bytes": 6e6}
"""Largest multiply-accumulates of a network, bytes of one tensor, and bytes of all weights, in float32.

Nine runs of ten then take less than 2 ms on one core of a present server CPU (grouped convolutions up to 25). The
largest tensor of MobileNetV2, 96 maps of 112 x 112, is 4.8 MB.
"""
WHOLE = {"macs": 800e6, "activation_bytes": 13e6, "weight_bytes": 80e6}
"""The same of whole networks: a ResNet-18 has twice the multiply-accumulates and half of the weights."""
WHOLE_LEAST = 80e6
"""Multiply-accumulates of the smallest whole networks."""
WHOLE_SIZES = (96, 128, 160, 192, 224, 224, 224, 224)
"""Sides of the pictures that whole networks read."""
WHOLE_MOST = (30, 80)
"""Operators of whole networks, at most."""
LEAST_MACS, LEAST_BUDGET = 0.05e6, 0.1e6
LEAST_OPERATORS = 3
AIM = 0.6
"""Share of the budget that is aimed at."""
TRIES = 2000


def random_network(rng: random.Random, budget_macs: float) -> Network:
    """A network of a random family with at most `budget_macs` multiply-accumulates, mostly not far below.

    3 to 14 operators, batch 1, square input; within `LIMITS`. The same state of `rng` gives the same network.
    Raises BadInputError for a budget under 100,000.
    """
    return _draw(rng, rng.choice(list(FAMILIES)), budget_macs)


def pool(seed: int, count: int) -> list[Network]:
    """Candidates for timing: families in turn, each network with a name of its own.

    Budgets run from 0.1 to 60 million multiply-accumulates, large ones more often: the operators of networks for
    pictures of 224 pixels have millions each. The first networks of a larger pool of the same seed are those of a
    smaller one.
    """
    rng = random.Random(seed)  # noqa: S311 -- sampling, no secret
    families = list(FAMILIES)
    low, high = math.log(LEAST_BUDGET), math.log(LIMITS["macs"])
    networks = []
    for number in range(count):
        budget = math.exp(rng.triangular(low, high, high))
        network = _draw(rng, families[number % len(families)], budget)
        networks.append(network.model_copy(update={"name": f"{network.name}-{seed}-{number}"}))
    return networks


def wholes(seed: int, count: int) -> list[Network]:
    """Random networks of the depth and size of those that people run, families in turn, each with a name of its own.

    What passes from operator to operator there (layouts, caches, weights that come from memory) is not in short
    networks. Budgets run from 80 to 800 million multiply-accumulates.
    """
    rng = random.Random(seed)  # noqa: S311 -- sampling, no secret
    low, high = math.log(WHOLE_LEAST), math.log(WHOLE["macs"])
    networks = []
    for number in range(count):
        network = _draw(rng, DEEP[number % len(DEEP)].__name__, math.exp(rng.uniform(low, high)), whole=True)
        networks.append(network.model_copy(update={"name": f"whole-{network.name}-{seed}-{number}"}))
    return networks


def _draw(rng: random.Random, family: str, budget_macs: float, whole: bool = False) -> Network:
    """Draw networks of the family until one fits, each time with layers as wide as the last one suggests."""
    if not budget_macs >= LEAST_BUDGET:
        raise BadInputError(f"a network of {budget_macs:g} multiply-accumulates is too small to be drawn at random")
    limits = WHOLE if whole else LIMITS
    most = min(budget_macs, limits["macs"])
    factor = 2 ** rng.uniform(-2, 0)
    for attempt in range(TRIES):
        size = rng.choice(WHOLE_SIZES) if whole else _size(rng, most)
        wide = min(max(factor * math.sqrt(most) / size, LEAST_WIDTH), LARGEST_WIDTH)
        sketch = Sketch(family, 3 if whole else rng.choice((3, 3, 3, 3, 1, 2, 6, 16)), (size, size))
        draw = Deep(rng, size, wide, rng.randint(*WHOLE_MOST)) if whole else Draw(rng, size, wide)
        finish(draw, sketch, FAMILIES[family](draw, sketch))
        network = sketch.network()
        shapes = [network.shape(operator) for operator in network.operators]
        macs = sum(shape.macs for shape in shapes)
        # At first close below the budget, so that a pool is spread as its budgets are; later anything that fits.
        least = max(LEAST_MACS, most / 3 if attempt < 30 else 0)
        if least <= macs <= most and LEAST_OPERATORS <= len(shapes) <= draw.most and _small(shapes, limits):
            return network
        # Work grows with the square of the width; half of what is missing, for every draw is different.
        factor *= min(max((AIM * most / macs) ** 0.25, 0.5), 2.0) if _small(shapes, limits) else 0.8
        factor = min(max(factor, 1 / 64), 64.0)
    raise BadInputError(f"no {family} network of at most {budget_macs:g} multiply-accumulates was found")


def _size(rng: random.Random, most_macs: float) -> int:
    """The side of the input: mostly one of real networks; small enough that a narrow layer is affordable."""
    largest = min(LARGEST_MAP, math.sqrt(most_macs / 12))
    if rng.random() < 0.75:
        return rng.choice([size for size in SIZES if size <= largest])
    return round(math.exp(rng.uniform(math.log(LEAST_MAP), math.log(largest))))


def _small(shapes: Sequence[OperatorShape], limits: Mapping[str, float]) -> bool:
    tensors = [shape.out_channels * shape.out_size[0] * shape.out_size[1] for shape in shapes]
    weights = sum(shape.weights for shape in shapes)
    return 4 * max(tensors) <= limits["activation_bytes"] and 4 * weights <= limits["weight_bytes"]
