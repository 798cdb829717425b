"""Networks that are built without torch: equal to traced ones, and nothing in them that does not fit together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mobilekit.cost.families import FAMILIES
from mobilekit.cost.sampling import basics, borders, channel_ladder, pool
from mobilekit.cost.sketches import Sketch
from mobilekit.errors import BadInputError
from mobilekit.network import trace
from mobilekit.types import Network, Operator


def numbers(network: Network) -> list[Any]:
    """What prices read: every operator's shape, what it reads (by position), how a map is flattened in front of it."""
    place = {operator.name: index for index, operator in enumerate(network.operators)} | {"input": -1}
    return [(network.shape(o), [place[name] for name in o.inputs], o.in_repeat, o.depthwise) for o in network.operators]


# ---------------------------------------------------------------- the builder against tracing


def resnet(s: Sketch) -> None:
    x = s.conv(s.input, 8, 3)
    x = s.add(s.conv(s.conv(x, 8, 3), 8, 3, activation=None), x, "relu")
    y = s.conv(s.conv(x, 12, 3, 2), 12, 3, activation=None)
    x = s.add(y, s.conv(x, 12, stride=2, activation=None), "relu")
    x = s.add(s.conv(s.conv(x, 12, 3), 12, 3, activation=None), x, "relu")
    s.linear(s.global_pool(x), 5)


def mobilenet_v2(s: Sketch) -> None:
    x = s.conv(s.input, 6, 3, 2)
    x = s.conv(s.depthwise(s.conv(x, 18, activation="relu6"), activation="hardswish"), 8, activation=None)
    y = s.conv(s.depthwise(s.conv(x, 24, activation="relu6"), activation="hardswish"), 8, activation=None)
    s.linear(s.global_pool(s.conv(s.add(x, y), 12)), 5)


def squeezenet(s: Sketch) -> None:
    x = s.conv(s.input, 8, 3, 2)
    x = s.conv(x, 4)
    x = s.max_pool(s.concat(s.conv(x, 6), s.conv(x, 6, 3)))
    x = s.conv(x, 5)
    s.linear(s.global_pool(s.concat(s.conv(x, 7), s.conv(x, 7, 3))), 5)


def densenet(s: Sketch) -> None:
    x = s.conv(s.input, 8, 3)
    for growth in (4, 5):
        x = s.concat(x, s.conv(s.batch_norm(x, "relu"), growth, 3, activation=None))
    s.linear(s.global_pool(s.batch_norm(x, "relu")), 5)


def inception(s: Sketch) -> None:
    x = s.conv(s.input, 8, 3)
    a = s.conv(x, 4)
    b = s.conv(s.conv(x, 6), 8, 3)
    c = s.conv(s.conv(x, 3), 5, 5)
    d = s.conv(s.avg_pool(x, 3, 1), 7)
    s.linear(s.global_pool(s.conv(s.concat(a, b, c, d), 10)), 5)


def squeeze_conv(s: Sketch) -> None:
    x = s.squeeze_excite(s.conv(s.input, 8, 3), 4)
    x = s.squeeze_excite(s.conv(x, 10, 3), 4)
    s.linear(s.global_pool(x), 5)


def squeeze_linear(s: Sketch) -> None:
    x = s.squeeze_excite(s.conv(s.input, 8, 3), 4, "sigmoid", linear=True)
    s.linear(s.global_pool(s.conv(x, 10, 3)), 5)


def vgg(s: Sketch) -> None:
    x = s.max_pool(s.conv(s.input, 8, 3))
    x = s.max_pool(s.conv(x, 12, 3))
    s.linear(s.linear(x, 10, "relu"), 5)


def resnext(s: Sketch) -> None:
    x = s.conv(s.conv(s.input, 8, 3), 12)
    s.linear(s.global_pool(s.conv(s.conv(x, 12, 3, groups=3), 9)), 5)


def unet(s: Sketch) -> None:
    high = s.conv(s.input, 8, 3)
    deep = s.conv(high, 12, 3, 2)
    wide = s.resize(s.conv(deep, 5, 3))
    x = s.concat(s.conv_transpose(deep, 6), high, wide)
    s.conv(s.conv(x, 10, 3), 2, activation=None)


def shufflenet_v2(s: Sketch) -> None:
    left, right = s.split(s.conv(s.input, 8, 3, 2), 4)
    y = s.conv(s.depthwise(s.conv(right, 4), activation=None), 4)
    s.linear(s.global_pool(s.conv(s.shuffle(s.concat(left, y), 2), 10)), 5)


TRACED = (
    *(resnet, mobilenet_v2, squeezenet, densenet, inception, squeeze_conv, squeeze_linear, vgg, resnext, unet),
    shufflenet_v2,
)


@pytest.mark.parametrize("fill", TRACED, ids=lambda fill: fill.__name__)
def test_a_sketch_has_the_numbers_of_the_traced_module(fill: Callable[[Sketch], None]) -> None:
    sketch = Sketch(fill.__name__, 3, (networks.SIDE, networks.SIDE))
    fill(sketch)
    traced = trace(networks.build(fill.__name__), networks.example())
    assert numbers(sketch.network()) == numbers(traced)
    assert sketch.network().input_shape == traced.input_shape


class Replay(torch.nn.Module):
    """A sketch as PyTorch layers with random weights: refuses whatever does not fit together."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        tensors = {"input": x}
        for operator in self.network.operators:
            tensors[operator.name] = self.run(operator, [tensors[name] for name in operator.inputs])
        return tensors[self.network.operators[-1].name]

    def run(self, operator: Operator, read: list[Tensor]) -> Tensor:
        shape, x = self.network.shape(operator), read[0]
        (kernel, _), (stride, _) = shape.kernel, shape.stride
        assert x.shape[2:] in ((), operator.in_size) or operator.in_size == (1, 1)
        if operator.kind == "conv":
            weight = torch.rand(shape.out_channels, shape.in_channels // shape.groups, kernel, kernel) - 0.5
            y = F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=shape.groups)
        elif operator.kind == "linear":
            y = x.flatten(1) @ torch.rand(shape.in_channels, shape.out_channels)
        elif operator.kind == "conv_transpose":
            weight = torch.rand(shape.in_channels, shape.out_channels, kernel, kernel)
            y = F.conv_transpose2d(x, weight, stride=stride, padding=(kernel - stride) // 2)
        elif operator.kind in ("max_pool", "avg_pool"):
            pooling = F.max_pool2d if operator.kind == "max_pool" else F.avg_pool2d
            padding = kernel // 2 if kernel % 2 and not operator.ceil else 0
            y = pooling(x, kernel, stride, padding, ceil_mode=operator.ceil)
        elif operator.kind == "mul":
            y = x * (read[1] if read[1].dim() == x.dim() else read[1][:, :, None, None])
        elif operator.kind == "slice":
            siblings = [o.name for o in self.network.operators if o.kind == "slice" and o.inputs == operator.inputs]
            widths = [self.network.width(o.out_groups) for o in self.network.operators if o.name in siblings]
            y = x.split(widths, 1)[siblings.index(operator.name)]
        else:
            y = self.simple(operator, read)
        flat = operator.out_size == (1, 1) and y.dim() == 2
        assert tuple(y.shape[1:]) == (shape.out_channels, *(() if flat else shape.out_size)), operator.name
        return y

    def simple(self, operator: Operator, read: list[Tensor]) -> Tensor:
        x, shape = read[0], self.network.shape(operator)
        known: dict[str, Callable[[], Tensor]] = {
            "add": lambda: x + read[1],
            "activation": x.relu,
            "batch_norm": lambda: x * torch.rand(shape.in_channels, 1, 1),
            "softmax": lambda: x.softmax(1),
            "global_pool": lambda: x.mean((2, 3), keepdim=True),
            "resize": lambda: F.interpolate(x, size=shape.out_size),
            "pad": lambda: F.pad(x, (1, 1, 1, 1), value=0.5),
            "transpose": lambda: x.transpose(2, 3),
            "concat": lambda: torch.cat(read, 1),
            "shuffle": lambda: F.channel_shuffle(x, shape.groups),
        }
        return known[operator.kind]()


@pytest.fixture(scope="module")
def sampled() -> list[Network]:
    return pool(seed=1, count=5 * len(FAMILIES))


@pytest.mark.parametrize("family", FAMILIES)
def test_random_networks_run_as_real_layers(family: str, sampled: list[Network]) -> None:
    for network in [n for n in sampled if n.name.startswith(f"{family}-")]:
        with torch.inference_mode():
            assert torch.isfinite(Replay(network)(torch.rand(network.input_shape))).all()


def test_fixed_networks_run_as_real_layers() -> None:
    for network in [*basics(), *channel_ladder(), *borders()]:
        with torch.inference_mode():
            assert torch.isfinite(Replay(network)(torch.rand(network.input_shape))).all(), network.name


# ---------------------------------------------------------------- what does not fit together


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda s: s.conv(s.input, 8, groups=4), "divided into 4 groups"),
        (lambda s: s.add(s.conv(s.input, 8), s.input), "cannot be added"),
        (lambda s: s.mul(s.input, s.conv(s.input, 6, stride=2)), "cannot be multiplied"),
        (lambda s: s.concat(s.input, s.max_pool(s.input)), "different sizes"),
        (lambda s: s.shuffle(s.input, 4), "shuffled in 4 groups"),
        (lambda s: s.split(s.input, 6), "is no split"),
        (lambda s: s.max_pool(s.global_pool(s.input)), "nothing is left"),
    ],
)
def test_the_builder_refuses_what_does_not_fit(wrong: Callable[[Sketch], Any], message: str) -> None:
    sketch = Sketch("wrong", 6, (8, 8))
    with pytest.raises(BadInputError, match=message):
        wrong(sketch)


def test_only_the_last_operator_can_be_renamed() -> None:
    sketch = Sketch("names", 3, (8, 8))
    first = sketch.conv(sketch.input, 4)
    sketch.conv(first, 4)
    with pytest.raises(BadInputError, match="not the last operator"):
        sketch.rename(first, "other")
