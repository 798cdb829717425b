"""Networks made for servers, from AlexNet to Xception, with the blocks of their papers at a fraction of the width."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from network_blocks import Branches, Residual, Squeeze, conv, head, plain
from torch import Tensor, nn

CLASSES = 100
top = partial(head, classes=CLASSES)


# ---------------------------------------------------------------- chains


def alexnet() -> nn.Module:
    """Krizhevsky 2014, arXiv:1404.5997: large windows, overlapping pools, three linear layers with dropout."""
    return nn.Sequential(
        plain(3, 24, 11, 4, padding=2), nn.MaxPool2d(3, 2),
        plain(24, 64, 5), nn.MaxPool2d(3, 2),
        plain(64, 96, 3), plain(96, 64, 3), plain(64, 64, 3), nn.AdaptiveAvgPool2d((2, 2)),
        nn.Flatten(), nn.Dropout(), nn.Linear(256, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, CLASSES),
    )  # fmt: skip


def vgg16_bn() -> nn.Module:
    """Simonyan and Zisserman 2015, arXiv:1409.1556, with batch norms."""
    layers: list[nn.Module] = []
    width = 3
    for outputs in (8, 8, 0, 16, 16, 0, 32, 32, 32, 0, 64, 64, 64, 0, 64, 64, 64):
        layers.append(conv(width, outputs, 3) if outputs else nn.MaxPool2d(2))
        width = outputs or width
    linear = [nn.Linear(width * 16, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, CLASSES)]
    return nn.Sequential(*layers, nn.Flatten(), *linear)


# ---------------------------------------------------------------- branches


def squeezenet() -> nn.Module:
    """Iandola et al. 2016, arXiv:1602.07360, version 1.1: pools over the end, a convolution as classifier."""

    def fire(inputs: int, squeeze: int, expand: int) -> nn.Module:
        return nn.Sequential(plain(inputs, squeeze), Branches(plain(squeeze, expand), plain(squeeze, expand, 3)))

    pool = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
    return nn.Sequential(
        plain(3, 32, 3, 2, padding=0), pool(), fire(32, 8, 32), fire(64, 8, 32),
        pool(), fire(64, 16, 48), fire(96, 16, 48), fire(96, 24, 64), nn.Dropout(),
        plain(128, CLASSES), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def googlenet() -> nn.Module:
    """Szegedy et al. 2015, arXiv:1409.4842, with batch norms in place of its normalisation over channels."""

    def inception(inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pooled: int) -> nn.Module:
        return Branches(
            conv(inputs, one),
            nn.Sequential(conv(inputs, three[0]), conv(*three, 3)),
            nn.Sequential(conv(inputs, five[0]), conv(*five, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv(inputs, pooled)),
        )

    pool = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
    return nn.Sequential(
        conv(3, 16, 7, 2), pool(), conv(16, 16), conv(16, 48, 3), pool(),
        inception(48, 16, (24, 32), (4, 8), 8), inception(64, 32, (32, 48), (8, 24), 16), pool(),
        inception(120, 48, (24, 52), (4, 12), 16), inception(128, 40, (28, 56), (6, 16), 16), top(128),
    )  # fmt: skip


class Rectangle(nn.Sequential):
    """Convolutions of a height and a width of their own, one after the other, each with batch norm and ReLU."""

    def __init__(self, widths: Sequence[int], kernels: Sequence[tuple[int, int]]) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in zip(widths, widths[1:], kernels, strict=False):
            padding = (kernel[0] // 2, kernel[1] // 2)
            layer = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False)
            layers += [layer, nn.BatchNorm2d(outputs, eps=0.001), nn.ReLU()]
        super().__init__(*layers)


class PooledConv(nn.Module):
    """Inception's pooling branch: an average over the neighbourhood, in the forward itself, and a convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.project = conv(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))


def inception_v3() -> nn.Module:
    """Szegedy et al. 2016, arXiv:1512.00567: its five kinds of modules, without the head that only trains."""

    def down(inputs: int, three: int, double: Sequence[int]) -> nn.Module:
        second = nn.Sequential(conv(inputs, double[0]), conv(double[0], double[1], 3), conv(double[1], double[2], 3, 2))
        return Branches(conv(inputs, three, 3, 2), second, nn.MaxPool2d(3, 2, 1))

    def first(inputs: int) -> nn.Module:
        five = nn.Sequential(conv(inputs, 6), conv(6, 8, 5))
        double = nn.Sequential(conv(inputs, 8), conv(8, 12, 3), conv(12, 12, 3))
        return Branches(conv(inputs, 8), five, double, PooledConv(inputs, 8))

    def tall(inputs: int, middle: int) -> nn.Module:
        seven = Rectangle((inputs, middle, middle, 24), ((1, 1), (1, 7), (7, 1)))
        twice = Rectangle((inputs, *[middle] * 4, 24), ((1, 1), (7, 1), (1, 7), (7, 1), (1, 7)))
        return Branches(conv(inputs, 24), seven, twice, PooledConv(inputs, 24))

    def last(inputs: int) -> nn.Module:
        def forked(*before: nn.Module) -> nn.Module:
            fork = Branches(Rectangle((24, 24), ((1, 3),)), Rectangle((24, 24), ((3, 1),)))
            return nn.Sequential(*before, fork)

        two = forked(conv(inputs, 24)), forked(conv(inputs, 28), conv(28, 24, 3))
        return Branches(conv(inputs, 20), *two, PooledConv(inputs, 12))

    return nn.Sequential(
        conv(3, 8, 3, 2), conv(8, 8, 3), conv(8, 16, 3), nn.MaxPool2d(3, 2), first(16), first(36),
        down(36, 24, (8, 12, 12)), tall(72, 16), tall(96, 20), down(96, 32, (16, 24, 24)), last(152), top(128),
    )  # fmt: skip


def densenet() -> nn.Module:
    """Huang et al. 2017, arXiv:1608.06993: batch norm first, bottlenecks, transitions that halve."""

    def before(inputs: int, outputs: int, kernel: int = 1) -> nn.Sequential:
        layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), layer)

    layers: list[nn.Module] = [conv(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1)]
    width = 16
    for block, depth in enumerate((3, 4, 4)):
        if block:
            layers += [before(width, width // 2), nn.AvgPool2d(2)]
            width //= 2
        for _ in range(depth):
            layers.append(Branches(nn.Identity(), nn.Sequential(before(width, 32), before(32, 8, 3))))
            width += 8
    return nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU(), top(width))


# ---------------------------------------------------------------- residual networks


def resnet18() -> nn.Module:
    """He et al. 2016, arXiv:1512.03385: basic blocks."""
    layers: list[nn.Module] = [conv(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1)]
    width = 16
    for outputs in (16, 32, 64, 96):
        for stride in (1 if outputs == 16 else 2, 1):
            body = nn.Sequential(conv(width, outputs, 3, stride), conv(outputs, outputs, 3, act=None))
            layers.append(Residual(body, width, outputs, stride))
            width = outputs
    return nn.Sequential(*layers, top(width))


class SqueezeLinear(nn.Module):
    """SENet's gate: linear layers, views, and an expansion to the map's shape (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(4, width // 16)
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        count, channels, _, _ = x.size()
        gate = self.layers(F.adaptive_avg_pool2d(x, 1).view(count, channels)).view(count, channels, 1, 1)
        return x * gate.expand_as(x)


class BlockAttention(nn.Module):
    """Attention over channels, then over places, each from an average and a maximum (CBAM, arXiv:1807.06521)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(width, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, width, 1, bias=False))
        self.places = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))
        both = torch.cat([torch.mean(x, dim=1, keepdim=True), torch.amax(x, dim=1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.places(both))


class Scales(nn.Module):
    """Res2Net's middle: parts of the channels, each also seeing what was made of the one before (arXiv:1904.01169)."""

    def __init__(self, width: int, scales: int = 4) -> None:
        super().__init__()
        self.part = width // scales
        self.layers = nn.ModuleList(conv(self.part, self.part, 3) for _ in range(scales - 1))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.part, 1)
        made = [parts[0]]
        for index, layer in enumerate(self.layers, start=1):
            made.append(layer(parts[index] if index == 1 else parts[index] + made[-1]))
        return torch.cat(made, 1)


def bottlenecks(kind: str = "plain") -> nn.Module:
    """ResNet-50's blocks (stride in the 3 x 3 convolution), ResNeXt's (arXiv:1611.05431), SENet's and their kin."""
    layers: list[nn.Module] = [conv(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1)]
    width = 16
    for outputs, depth in ((64, 2), (96, 2), (128, 1)):
        for index in range(depth):
            stride, middle = 2 if index == 0 and outputs > 64 else 1, outputs // 4
            groups = 8 if kind == "resnext" else 1
            middle = outputs // 2 if kind == "resnext" else middle
            layer = Scales(middle) if kind == "res2net" and stride == 1 else conv(middle, middle, 3, stride, groups)
            gate: dict[str, type[nn.Module]] = {"se": SqueezeLinear, "cbam": BlockAttention}
            gates = [gate[kind](outputs)] if kind in gate else []
            body = nn.Sequential(conv(width, middle), layer, conv(middle, outputs, act=None), *gates)
            layers.append(Residual(body, width, outputs, stride))
            width = outputs
    return nn.Sequential(*layers, top(width))


class Wide(nn.Module):
    """A pre-activation block with dropout; where the shapes differ, the shortcut starts behind the first ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.drop = nn.Dropout(0.3)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ready = F.relu(self.norm1(x), inplace=True)
        y = self.conv2(self.drop(F.relu(self.norm2(self.conv1(ready)), inplace=True)))
        return y + (x if self.shortcut is None else self.shortcut(ready))


def wide_resnet() -> nn.Module:
    """Zagoruyko and Komodakis 2016, arXiv:1605.07146: depth 10, width 3."""
    blocks = [Wide(8, 24, 1), Wide(24, 24, 1), Wide(24, 48, 2), Wide(48, 96, 2)]
    last = [nn.BatchNorm2d(96), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(96, CLASSES)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), *blocks, *last)


def regnet(squeeze: bool) -> nn.Module:
    """Radosavovic et al. 2020, arXiv:2003.13678: X without, Y with squeeze and excite."""
    layers: list[nn.Module] = [conv(3, 16, 3, 2)]
    before = 16
    for depth, width in ((1, 16), (1, 32), (2, 64), (2, 96)):
        for index in range(depth):
            stride = 2 if index == 0 else 1
            gate = [Squeeze(width, before // 4, nn.Sigmoid)] if squeeze else []
            middle = conv(width, width, 3, stride, groups=width // 8)
            body = nn.Sequential(conv(before, width), middle, *gate, conv(width, width, act=None))
            layers.append(Residual(body, before, width, stride))
            before = width
    return nn.Sequential(*layers, top(before))


# ---------------------------------------------------------------- separable, searched, of many scales


def separable(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A depthwise and a pointwise convolution with one batch norm, no function between them."""
    depthwise = nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=inputs, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


class XceptionBlock(nn.Module):
    """ReLU and separable convolutions beside a shortcut, which is a convolution where the block strides."""

    def __init__(self, inputs: int, outputs: int, depth: int, stride: int) -> None:
        super().__init__()
        widths = [inputs, *[outputs] * depth]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.ReLU(), separable(a, b)]
        self.body = nn.Sequential(*layers, *([nn.MaxPool2d(3, 2, 1)] if stride > 1 else []))
        self.skip = None if inputs == outputs and stride == 1 else conv(inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + (x if self.skip is None else self.skip(x))


def xception() -> nn.Module:
    """Chollet 2017, arXiv:1610.02357."""
    blocks = [XceptionBlock(16, 32, 2, 2), XceptionBlock(32, 64, 2, 2), XceptionBlock(64, 64, 3, 1)]
    ends = [XceptionBlock(64, 96, 2, 2), separable(96, 128), nn.ReLU()]
    return nn.Sequential(conv(3, 8, 3, 2), conv(8, 16, 3), *blocks, *ends, top(128))
