"""What all families of random networks draw: sizes, functions, first and last layers, gates and shortcuts."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mobilekit.cost.sketches import Sketch, Tensor

MOST = 14
"""Operators of a network."""
LEAST_MAP, LARGEST_MAP = 4, 224
LEAST_WIDTH, LARGEST_WIDTH = 3, 1280
LIKELY = 12
"""Four widths of five are at least so wide: narrower layers are rare in networks that anyone runs."""
STAGE = 56
"""Side of the maps that the first blocks of most classifiers work on."""
SIZES = (4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224)
"""Sides of maps in networks for inputs of 28 to 224 pixels."""
GATES = ("hardsigmoid", "sigmoid")
ALONE = ("relu", "relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid", "tanh")


@dataclass
class Draw:
    """The random choices of a piece of a network.

    `size` is its input's side, `wide` the width that its layers scatter under, `most` how many operators it may have.
    """

    rng: random.Random
    size: int
    wide: float
    most: int = MOST

    def chance(self, share: float) -> bool:
        """True in this share of the cases."""
        return self.rng.random() < share

    def width(self, times: float = 1.0) -> int:
        """A channel count: 55 % are multiples of 16, a third of 8 or 4, the rest is as pruning may leave it."""
        wish = max(self.wide * times * 2 ** self.rng.uniform(-2, 0.5), LIKELY if self.chance(0.8) else 1)
        share = self.rng.random()
        multiple = 16 if share < 0.55 else self.rng.choice((4, 8)) if share < 0.88 else 1
        width = max(1, round(wish / multiple)) * multiple
        return min(max(width, LEAST_WIDTH), LARGEST_WIDTH)

    def activation(self) -> str | None:
        """A function that follows convolutions, the common ones more often; in one case of ten none does."""
        functions = ("relu", "relu", "relu", "relu", "relu6", "relu6", "hardswish", "silu", "sigmoid", None)
        return self.rng.choice(functions)

    def stride(self, x: Tensor, share: float = 0.3) -> int:
        """2 in this share of the cases where the map can be halved."""
        return 2 if x.size[0] >= 2 * LEAST_MAP and self.chance(share) else 1

    def repeats(self, sketch: Sketch, operators: int, most: int = 3) -> range:
        """How often a block of so many operators follows; two places are kept for the classifier."""
        return range(self.rng.randint(1, min(self._room(sketch, operators), most)))

    def _room(self, sketch: Sketch, operators: int) -> int:
        return max(1, (self.most - 2 - len(sketch)) // operators)


@dataclass
class Deep(Draw):
    """The random choices of a whole network: maps shrink to a few pixels, and widths grow as they do.

    `wide` is for maps of STAGE pixels.
    """

    pace: float = 0.3
    _side: int = STAGE

    def width(self, times: float = 1.0) -> int:
        """As of a piece, at the map where it stands."""
        return super().width(times * STAGE / self._side)

    def stride(self, x: Tensor, share: float = 0.3) -> int:
        """2 on pictures, and as often behind them that the last maps have a few pixels."""
        share = 1.0 if x.size[0] > 2 * STAGE else 0.7 if x.size[0] > STAGE else self.pace
        stride = super().stride(x, share)
        self._side = x.size[0] // stride
        return stride

    def repeats(self, sketch: Sketch, operators: int, most: int = 3) -> range:
        """As often as there is room."""
        room = self._room(sketch, operators)
        self.pace = min(0.5, 4 / room)
        return range(room)


def entry(draw: Draw, sketch: Sketch) -> Tensor:
    """The first layer: real networks read few channels, and what converts their layout or precision is small there."""
    kernel = draw.rng.choice((1, 3))
    stride = draw.stride(sketch.input, 0.4)
    return sketch.conv(sketch.input, draw.width(0.7), kernel, stride, activation=draw.activation())


def finish(draw: Draw, sketch: Sketch, x: Tensor) -> None:
    """Few numbers at the end, as real networks have: a classifier, a mean of each map, or a map of few channels."""
    if x.size == (1, 1):
        return
    room, share = draw.most - len(sketch), draw.rng.random()
    if share < 0.35 and room:
        sketch.conv(x, draw.rng.choice((1, 2, 4, 8, 10, 16, 21)), draw.rng.choice((1, 1, 3)), activation=None)
    elif share < 0.7 and room > 1:
        classes = sketch.linear(sketch.global_pool(x), draw.rng.choice((2, 5, 10, 10, 100, 101, 1000)))
        if draw.chance(0.3) and room > 2:
            sketch.softmax(classes)
    elif room:
        sketch.global_pool(x)


def squeezed(draw: Draw, sketch: Sketch, x: Tensor) -> Tensor:
    """A squeeze-excite block of one of the published forms."""
    reduced = max(x.width // draw.rng.choice((4, 4, 8, 16)), 4)
    if draw.chance(0.3):
        reduced = max(reduced // 4 * 4, 4)
    return sketch.squeeze_excite(x, reduced, draw.rng.choice(GATES), linear=draw.chance(0.2))


def shortcut(sketch: Sketch, x: Tensor, like: Tensor, stride: int) -> Tensor:
    """The block's input in the shape of what it made."""
    if (x.width, x.size) == (like.width, like.size):
        return x
    return sketch.conv(x, like.width, stride=stride, activation=None)
