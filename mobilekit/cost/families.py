"""Families of convolutional networks: a few operators of each, at random sizes, for timing."""

from __future__ import annotations

from collections.abc import Callable

from mobilekit.cost.draws import ALONE, LARGEST_WIDTH, LEAST_MAP, Draw, entry, shortcut, squeezed
from mobilekit.cost.sketches import Sketch, Tensor

Family = Callable[[Draw, Sketch], Tensor]
"""Adds layers to an empty sketch, and gives the tensor that the network's last layers go on from."""


def plain(draw: Draw, sketch: Sketch) -> Tensor:
    """VGG and LeNet: convolutions and pools, then linear layers over the flattened map."""
    x, kernel = entry(draw, sketch), draw.rng.choice((3, 3, 3, 5))
    activation = draw.activation()
    for _ in draw.repeats(sketch, 3):
        late = draw.chance(0.35)  # PyTorch's own example: relu(max_pool2d(conv(x)))
        x = sketch.conv(x, draw.width(), kernel, activation=None if late else activation)
        if draw.stride(x, 1.0) == 2:
            window = draw.rng.choice(((2, 2), (2, 2), (3, 2)))
            x = sketch.avg_pool(x, *window) if draw.chance(0.2) else sketch.max_pool(x, *window, ceil=draw.chance(0.3))
        if late:
            x = sketch.activation(x, draw.rng.choice(ALONE))
    if draw.chance(0.6) and x.width * x.size[0] ** 2 <= 12_544:
        x = sketch.linear(sketch.linear(x, draw.width(2), "relu"), draw.rng.choice((10, 100)))
    return x


def residual(draw: Draw, sketch: Sketch) -> Tensor:
    """ResNet's basic block, with a convolution in the shortcut where the shape changes; some with gates."""
    x = entry(draw, sketch)
    squeeze, activation = draw.chance(0.2), draw.rng.choice(("relu", "relu", "relu", "silu", None))
    for _ in draw.repeats(sketch, 8 if squeeze else 4):
        stride = draw.stride(x)
        width = x.width if stride == 1 and draw.chance(0.7) else draw.width()
        y = sketch.conv(x, draw.width(), 3, stride, activation=activation or "relu")
        y = sketch.conv(y, width, 3, activation=None)
        if squeeze:
            y = squeezed(draw, sketch, y)
        x = sketch.add(y, shortcut(sketch, x, y, stride), activation)
    return x


def bottleneck(draw: Draw, sketch: Sketch) -> Tensor:
    """ResNet's and RegNet's block of three convolutions, the middle one dense or grouped."""
    x, grouped, squeeze = entry(draw, sketch), draw.chance(0.5), draw.chance(0.35)
    for _ in draw.repeats(sketch, 9 if squeeze else 5):
        stride = draw.stride(x)
        groups = draw.rng.choice((2, 3, 4, 8, 16, 32)) if grouped else 1
        middle = max(1, round(draw.width() / groups)) * groups
        width = x.width if stride == 1 and draw.chance(0.6) else draw.width(1.5)
        y = sketch.conv(sketch.conv(x, middle), middle, 3, stride, groups)
        if squeeze:
            y = squeezed(draw, sketch, y)
        y = sketch.conv(y, width, activation=None)
        x = sketch.add(y, shortcut(sketch, x, y, stride), draw.rng.choice(("relu", "relu", None)))
    return x


def inverted(draw: Draw, sketch: Sketch) -> Tensor:
    """MobileNetV2's, MobileNetV3's, MnasNet's and EfficientNet's block."""
    x = entry(draw, sketch)
    function = draw.rng.choice(("relu", "relu6", "relu6", "hardswish", "hardswish", "silu", "silu"))
    squeeze = draw.chance(0.6)
    for _ in draw.repeats(sketch, 8 if squeeze else 4):
        stride, kernel = draw.stride(x), draw.rng.choice((3, 3, 3, 5, 5, 7))
        expansion = draw.rng.choice((1, 2, 3, 4, 6))
        hidden = min(x.width * expansion, LARGEST_WIDTH) if draw.chance(0.6) else draw.width(2)
        y = x if expansion == 1 else sketch.conv(x, hidden, activation=function)
        y = sketch.depthwise(y, kernel, stride, function)
        if squeeze:
            y = squeezed(draw, sketch, y)
        same = stride == 1 and draw.chance(0.6)
        y = sketch.conv(y, x.width if same else draw.width(), activation=None)
        x = sketch.add(x, y) if same else y
    return x


def separable(draw: Draw, sketch: Sketch) -> Tensor:
    """MobileNetV1: depthwise and pointwise convolutions in turn."""
    x, function = entry(draw, sketch), draw.rng.choice(("relu", "relu", "relu6", "hardswish", None))
    for _ in draw.repeats(sketch, 2, most=5):
        x = sketch.depthwise(x, draw.rng.choice((3, 3, 3, 5, 7)), draw.stride(x), function)
        x = sketch.conv(x, draw.width(1.5), activation=function)
    return x


def fire(draw: Draw, sketch: Sketch) -> Tensor:
    """SqueezeNet: a squeeze, two expansions side by side, at times a pool in front."""
    x = entry(draw, sketch)
    for _ in draw.repeats(sketch, 5):
        if draw.stride(x, 0.5) == 2:
            x = sketch.max_pool(x, *draw.rng.choice(((2, 2), (3, 2))), ceil=draw.chance(0.5))
        late = draw.chance(0.35)
        squeezed, expanded = sketch.conv(x, draw.width(0.7)), draw.width()
        function = None if late else "relu"
        one = sketch.conv(squeezed, expanded, activation=function)
        three = sketch.conv(squeezed, expanded, 3, activation=function)
        x = sketch.concat(one, three)
        if late:
            x = sketch.activation(x, draw.rng.choice(ALONE))
    return x


def dense(draw: Draw, sketch: Sketch) -> Tensor:
    """DenseNet: a batch norm in front of each convolution, then what there was and what was made of it."""
    x = entry(draw, sketch)
    for _ in draw.repeats(sketch, 4):
        y = sketch.batch_norm(x, "relu")
        if draw.chance(0.6):
            y = sketch.conv(y, draw.width(1.5))
        x = sketch.concat(x, sketch.conv(y, draw.width(0.6), 3, activation=None))
        if draw.stride(x) == 2 and len(sketch) < draw.most - 4:
            x = sketch.avg_pool(sketch.conv(sketch.batch_norm(x, "relu"), draw.width(), activation=None))
    return x


def preactivation(draw: Draw, sketch: Sketch) -> Tensor:
    """ResNet's second version: functions and batch norms of their own in front of the convolutions."""
    x = entry(draw, sketch)
    for _ in draw.repeats(sketch, 4):
        function = draw.rng.choice(ALONE)
        y = sketch.batch_norm(x, "relu") if draw.chance(0.4) else sketch.activation(x, function)
        y = sketch.conv(y, draw.width(), draw.rng.choice((1, 3)))
        x = sketch.add(x, sketch.conv(y, x.width, 3, activation=None))
    return x


def inception(draw: Draw, sketch: Sketch) -> Tensor:
    """GoogLeNet: branches of several kernels and a pool side by side."""
    x = entry(draw, sketch)
    for _ in draw.repeats(sketch, 9):
        if draw.stride(x, 0.1) == 2:
            x = sketch.max_pool(x, 3, 2, ceil=draw.chance(0.5))
        a = sketch.conv(x, draw.width(0.7))
        b = sketch.conv(sketch.conv(x, draw.width(0.7)), draw.width(), 3)
        branches = [a, b]
        if draw.chance(0.6):
            branches.append(sketch.conv(sketch.conv(x, draw.width(0.4)), draw.width(0.5), draw.rng.choice((3, 5))))
        if draw.chance(0.8):
            pool = sketch.max_pool if draw.chance(0.5) else sketch.avg_pool
            branches.append(sketch.conv(pool(x, 3, 1), draw.width(0.5)))
        x = sketch.concat(*branches)
    return sketch.activation(x, draw.rng.choice(ALONE)) if draw.chance(0.3) else x


def shuffle_halves(draw: Draw, sketch: Sketch) -> Tensor:
    """ShuffleNet v2: half of the channels pass, or both halves are made anew where the map is halved."""
    x, kernel = entry(draw, sketch), draw.rng.choice((3, 3, 5))
    for _ in draw.repeats(sketch, 7, most=2):
        if draw.stride(x, 0.4) == 2:
            half = draw.width()
            left = sketch.conv(sketch.depthwise(x, kernel, 2, None), half)
            right, stride = x, 2
        else:
            if x.width % 2 or draw.chance(0.4):
                x = sketch.conv(x, 2 * draw.width(0.5))
            half, stride = x.width // 2, 1
            left, right = sketch.split(x, half)
        y = sketch.depthwise(sketch.conv(right, half), kernel, stride, None)
        x = sketch.shuffle(sketch.concat(left, sketch.conv(y, half)), 2)
    return x


def shuffle_groups(draw: Draw, sketch: Sketch) -> Tensor:
    """ShuffleNet v1: grouped pointwise convolutions with a shuffle between them."""
    groups = draw.rng.choice((2, 3, 4, 8))
    x = entry(draw, sketch)
    x = sketch.conv(x, max(1, round(draw.width(1.5) / groups)) * groups)
    for _ in draw.repeats(sketch, 5, most=2):
        middle = max(1, round(draw.width(0.7) / groups)) * groups
        y = sketch.shuffle(sketch.conv(x, middle, groups=groups), groups)
        stride = draw.stride(x)
        y = sketch.conv(sketch.depthwise(y, 3, stride, None), x.width, groups=groups, activation=None)
        x = sketch.add(x, y, "relu") if stride == 1 else sketch.concat(sketch.avg_pool(x, 3, 2), y)
    return x


def encoder_decoder(draw: Draw, sketch: Sketch) -> Tensor:
    """U-Net: down, up again, the earlier map beside the enlarged one (or added to it, as in a feature pyramid)."""
    high = entry(draw, sketch)
    if high.size[0] % 2:  # what is halved and doubled has to fit what it was
        high = sketch.resize(high)
    pooled = draw.chance(0.5)
    low = sketch.max_pool(high) if pooled else high
    low = sketch.conv(low, draw.width(), 3, 1 if pooled else 2)
    if draw.chance(0.5):
        low = sketch.conv(low, draw.width(), 3)
    added = draw.chance(0.25)
    width = high.width if added else draw.width(0.7)
    if draw.chance(0.5):
        up = sketch.conv_transpose(low, width)
    else:
        up = sketch.resize(sketch.conv(low, width, activation=None))
    return sketch.conv(sketch.add(up, high) if added else sketch.concat(up, high), draw.width(0.7), 3)


def stem(draw: Draw, sketch: Sketch) -> Tensor:
    """The first layers of classifiers: large kernels with stride 2 over a picture, a pool or a cheap block behind."""
    x = sketch.conv(sketch.input, draw.width(), draw.rng.choice((3, 3, 3, 5, 7)), 2, activation=draw.activation())
    if draw.chance(0.4):
        x = sketch.max_pool(sketch.pad(x) if draw.chance(0.5) else x, 3, 2)
    elif draw.chance(0.5):
        x = sketch.depthwise(x, 3, 1, "relu6")
    x = sketch.conv(x, draw.width(), draw.rng.choice((1, 3)), draw.stride(x), activation=draw.activation())
    if draw.chance(0.2):
        x = sketch.max_pool(x, 3, 2) if x.size[0] >= 2 * LEAST_MAP else x
    return x


def classifier(draw: Draw, sketch: Sketch) -> Tensor:
    """The last layers of classifiers: a wide convolution, a mean, one to three linear layers, a softmax."""
    x = sketch.conv(entry(draw, sketch), draw.width(2), activation=draw.activation())
    if draw.chance(0.5):
        x = sketch.conv(x, draw.width(3), activation=draw.activation())
    x = sketch.global_pool(x)
    if draw.chance(0.2):  # MobileNetV3 has a convolution behind the mean
        x = sketch.conv(x, draw.width(4), activation="hardswish")
    for _ in range(draw.rng.randint(0, 2)):
        x = sketch.linear(x, draw.width(4), draw.rng.choice(("relu", "hardswish", None)))
    x = sketch.linear(x, draw.rng.choice((10, 37, 100, 101, 365, 1000, draw.width(), draw.width(3))))
    return sketch.softmax(x) if draw.chance(0.6) else x


def picture(draw: Draw, sketch: Sketch) -> Tensor:
    """Super-resolution and segmentation: few channels on large maps, enlarged or classified at the end."""
    x = entry(draw, sketch)
    for _ in draw.repeats(sketch, 1, most=4):
        x = sketch.conv(x, draw.width(), draw.rng.choice((1, 3, 3, 5)), activation=draw.activation())
    ending = draw.rng.random()
    if ending < 0.3:
        x = sketch.conv_transpose(x, draw.rng.choice((1, 3, 8, 12, 16)), draw.rng.choice((2, 2, 4)))
    elif ending < 0.6:
        x = sketch.resize(x, draw.rng.choice((2, 2, 3, 4)))
    elif ending < 0.8:
        x = sketch.softmax(sketch.conv(x, draw.rng.choice((2, 5, 19, 21)), activation=None))
    return x


FAMILIES: dict[str, Family] = {
    family.__name__: family
    for family in (
        *(plain, residual, inverted, separable, bottleneck, fire, dense, inception),
        *(shuffle_halves, encoder_decoder, classifier, stem, picture, shuffle_groups, preactivation),
    )
}
"""Name -> family, in the order in which a pool takes turns."""

DEEP = (plain, residual, inverted, separable, bottleneck, fire, inverted, dense, inception, shuffle_halves, bottleneck)
"""The families that go on and on: whole networks are drawn of them."""
