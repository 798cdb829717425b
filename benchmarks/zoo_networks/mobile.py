"""Networks made for phones, with the blocks of their papers at a fraction of the width and depth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from network_blocks import Linear, ShuffleUnit, Squeeze, conv, inverted
from torch import Tensor, nn

from zoo_networks.classic import top

Stage = tuple[int, int, int, int, int]
"""Kernel, expansion, output channels, blocks, stride of the first block."""


def mobilenet_v1() -> nn.Module:
    """Howard et al. 2017, arXiv:1704.04861."""
    layers: list[nn.Module] = [conv(3, 8, 3, 2)]
    width = 8
    for outputs, stride in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (96, 2), (96, 1)):
        layers += [conv(width, width, 3, stride, groups=width), conv(width, outputs)]
        width = outputs
    return nn.Sequential(*layers, top(width))


def inverted_residuals(stages: Sequence[Stage], act: type[nn.Module], last: int = 128, first: int = 8) -> nn.Module:
    """MobileNetV2's (arXiv:1801.04381), MnasNet's, ProxylessNAS's and MCUNet's form: stages of inverted residuals."""
    layers: list[nn.Module] = [conv(3, first, 3, 2, act=act)]
    width = first
    for kernel, factor, outputs, depth, stride in stages:
        for index in range(depth):
            layers.append(inverted((width, width * factor, outputs), kernel, stride if index == 0 else 1, act))
            width = outputs
    return nn.Sequential(*layers, conv(width, last, act=act), top(last))


V2 = ((3, 1, 8, 1, 1), (3, 6, 12, 2, 2), (3, 6, 16, 2, 2), (3, 6, 24, 1, 2), (3, 6, 32, 1, 1))
MNASNET = ((3, 1, 8, 1, 1), (3, 3, 12, 2, 2), (5, 3, 16, 2, 2), (5, 6, 24, 1, 2), (3, 6, 32, 1, 1))
MCUNET = ((3, 1, 8, 1, 1), (7, 3, 12, 2, 2), (3, 6, 16, 2, 2), (5, 4, 24, 2, 2), (7, 5, 32, 1, 1))

V3_SMALL = (
    (3, 8, 8, True, nn.ReLU, 2), (3, 36, 12, False, nn.ReLU, 2), (3, 44, 12, False, nn.ReLU, 1),
    (5, 48, 20, True, nn.Hardswish, 2), (5, 120, 20, True, nn.Hardswish, 1), (5, 60, 24, True, nn.Hardswish, 1),
)  # fmt: skip
V3_LARGE = (
    (3, 8, 8, False, nn.ReLU, 1), (3, 32, 12, False, nn.ReLU, 2), (3, 36, 12, False, nn.ReLU, 1),
    (5, 36, 20, True, nn.ReLU, 2), (5, 60, 20, True, nn.ReLU, 1), (3, 120, 40, False, nn.Hardswish, 2),
    (3, 100, 40, False, nn.Hardswish, 1), (3, 240, 56, True, nn.Hardswish, 1), (5, 336, 80, True, nn.Hardswish, 2),
)  # fmt: skip


def mobilenet_v3(blocks: Sequence[tuple[int, int, int, bool, type[nn.Module], int]]) -> nn.Module:
    """Howard et al. 2019, arXiv:1905.02244: hard-swish, squeeze and excite in some blocks, a head with a layer more."""
    layers: list[nn.Module] = [conv(3, 8, 3, 2, act=nn.Hardswish)]
    width = 8
    for kernel, hidden, outputs, squeeze, act, stride in blocks:
        gate = Squeeze(hidden, max(8, hidden // 4), nn.Hardsigmoid) if squeeze else None
        layers.append(inverted((width, hidden, outputs), kernel, stride, act, gate))
        width = outputs
    return nn.Sequential(*layers, conv(width, 144, act=nn.Hardswish), top(144, 192))


class StochasticDepth(nn.Module):
    """Drops the whole branch for some samples while training; an identity in eval (arXiv:1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class MobileInverted(nn.Module):
    """EfficientNet's block; `fused` has one dense convolution in place of expansion and depthwise (V2)."""

    def __init__(self, widths: tuple[int, int], kernel: int, factor: int, stride: int, fused: bool = False) -> None:
        super().__init__()
        inputs, outputs = widths
        hidden, act = inputs * factor, partial(nn.SiLU, inplace=True)
        if fused:
            layers = [conv(inputs, hidden, kernel, stride, act=act)]
        else:
            layers = [conv(inputs, hidden, act=act)] if factor > 1 else []
            depthwise = conv(hidden, hidden, kernel, stride, groups=hidden, act=act)
            layers += [depthwise, SqueezeSwish(hidden, max(1, inputs // 4))]  # type: ignore[list-item]
        self.layers = nn.Sequential(*layers, conv(hidden, outputs, act=None))
        self.drop = StochasticDepth(0.1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return self.drop(y) + x if self.residual else y


class SqueezeSwish(nn.Module):
    """EfficientNet's squeeze and excite, by a mean and SiLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))


B0 = ((3, 1, 8, 1, 1), (3, 6, 12, 2, 2), (5, 6, 16, 2, 2), (3, 6, 24, 1, 2), (5, 6, 32, 1, 1))


def efficientnet(fused: int = 0) -> nn.Module:
    """Tan and Le 2019, arXiv:1905.11946; V2 (arXiv:2104.00298) where the first `fused` stages are fused."""
    layers: list[nn.Module] = [conv(3, 8, 3, 2, act=nn.SiLU)]
    width = 8
    for number, (kernel, factor, outputs, depth, stride) in enumerate(B0):
        for index in range(depth):
            step = stride if index == 0 else 1
            layers.append(MobileInverted((width, outputs), kernel, factor, step, fused=number < fused))
            width = outputs
    return nn.Sequential(*layers, conv(width, 128, act=nn.SiLU), nn.Dropout(0.2), top(128))


def efficientnet_lite0() -> nn.Module:
    """The bundled workload, with its trained weights (arXiv:1905.11946 in its Lite variant)."""
    from mobilekit.workloads import efficientnet_lite0

    return efficientnet_lite0.model()


class ShuffleGroups(nn.Module):
    """ShuffleNetV1's unit: grouped pointwise convolutions around a shuffle; beside a pooled map where it strides."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, first: bool = False) -> None:
        super().__init__()
        made, hidden = outputs - (inputs if stride == 2 else 0), outputs // 4
        self.groups = groups
        self.first = conv(inputs, hidden, groups=1 if first else groups)
        self.second = nn.Sequential(
            conv(hidden, hidden, 3, stride, groups=hidden, act=None), conv(hidden, made, groups=groups, act=None)
        )
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        count, channels, height, width = y.shape
        y = y.view(count, self.groups, channels // self.groups, height, width)
        y = self.second(torch.transpose(y, 1, 2).contiguous().view(count, channels, height, width))
        return F.relu(x + y if self.pool is None else torch.cat([self.pool(x), y], 1))


def shufflenet_v1(groups: int = 4) -> nn.Module:
    """Zhang et al. 2018, arXiv:1707.01083."""
    layers: list[nn.Module] = [conv(3, 16, 3, 2), nn.MaxPool2d(3, 2, 1)]
    width = 16
    for index, outputs in enumerate((48, 96)):
        for number in range(2):
            stride = 2 if number == 0 else 1
            layers.append(ShuffleGroups(width, outputs, stride, groups, first=index == number == 0))
            width = outputs
    return nn.Sequential(*layers, top(width))


def shufflenet_v2() -> nn.Module:
    """Ma et al. 2018, arXiv:1807.11164."""
    layers: list[nn.Module] = [conv(3, 16, 3, 2), nn.MaxPool2d(3, 2, 1)]
    width = 16
    for outputs, depth in ((32, 2), (64, 3)):
        for index in range(depth):
            layers.append(ShuffleUnit(width, outputs, 2 if index == 0 else 1))
            width = outputs
    return nn.Sequential(*layers, conv(width, 128), top(128))


class Ghost(nn.Module):
    """Half of the output by a convolution, half by a cheap depthwise one of it, cut to the width that is asked."""

    def __init__(self, inputs: int, outputs: int, relu: bool = True) -> None:
        super().__init__()
        half = -(-outputs // 2)
        act = nn.ReLU if relu else None
        self.outputs = outputs
        self.primary, self.cheap = conv(inputs, half, act=act), conv(half, half, 3, groups=half, act=act)

    def forward(self, x: Tensor) -> Tensor:
        made = self.primary(x)
        return torch.cat([made, self.cheap(made)], 1)[:, : self.outputs, :, :]


class GhostBottleneck(nn.Module):
    """Two ghost modules, a strided depthwise convolution and a gate between them; a separable shortcut."""

    def __init__(self, widths: tuple[int, int, int], kernel: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        inputs, hidden, outputs = widths
        self.expand, self.project = Ghost(inputs, hidden), Ghost(hidden, outputs, relu=False)
        down = conv(hidden, hidden, kernel, stride, groups=hidden, act=None) if stride > 1 else nn.Identity()
        self.middle = nn.Sequential(down, Squeeze(hidden, hidden // 4, nn.Hardsigmoid) if squeeze else nn.Identity())
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride > 1:
            depthwise = conv(inputs, inputs, kernel, stride, groups=inputs, act=None)
            self.shortcut = nn.Sequential(depthwise, conv(inputs, outputs, act=None))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.middle(self.expand(x))) + self.shortcut(x)


def ghostnet() -> nn.Module:
    """Han et al. 2020, arXiv:1911.11907."""
    layers: list[nn.Module] = [conv(3, 8, 3, 2)]
    width = 8
    for kernel, hidden, outputs, squeeze, stride in (
        (3, 8, 8, False, 1), (3, 24, 12, False, 2), (3, 36, 12, False, 1), (5, 36, 20, True, 2), (5, 60, 20, True, 1),
        (3, 120, 40, False, 2), (3, 100, 40, False, 1),
    ):  # fmt: skip
        layers.append(GhostBottleneck((width, hidden, outputs), kernel, stride, squeeze))
        width = outputs
    return nn.Sequential(*layers, conv(width, 120), top(120, 160, nn.ReLU))


class Shuffle(nn.Module):
    """torch's own channel shuffle in one operator."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.shuffle = nn.ChannelShuffle(groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(x)


def fbnet() -> nn.Module:
    """Wu et al. 2019, arXiv:1812.03443: searched blocks of unlike kernels and expansions, some grouped and shuffled."""
    layers: list[nn.Module] = [conv(3, 8, 3, 2)]
    width = 8
    for kernel, factor, outputs, stride, groups in (
        (3, 1, 8, 1, 1), (3, 6, 12, 2, 1), (3, 1, 12, 1, 2), (5, 6, 16, 2, 1), (5, 3, 16, 1, 1),
        (5, 6, 24, 2, 1), (3, 1, 24, 1, 2), (5, 6, 32, 1, 1),
    ):  # fmt: skip
        hidden = width * factor
        shuffle = [Shuffle(groups)] if groups > 1 else []
        body = nn.Sequential(
            conv(width, hidden, groups=groups), *shuffle, conv(hidden, hidden, kernel, stride, groups=hidden),
            conv(hidden, outputs, groups=groups, act=None),
        )  # fmt: skip
        layers.append(Linear(body, residual=stride == 1 and width == outputs))
        width = outputs
    return nn.Sequential(*layers, conv(width, 128), top(128))


class MixedDepthwise(nn.Module):
    """Depthwise convolutions of several sizes, each over its part of the channels."""

    def __init__(self, width: int, stride: int, kernels: Sequence[int] = (3, 5, 7)) -> None:
        super().__init__()
        part = width // len(kernels)
        self.parts = [width - part * (len(kernels) - 1), *[part] * (len(kernels) - 1)]
        pairs = zip(self.parts, kernels, strict=True)
        self.layers = nn.ModuleList(nn.Conv2d(w, w, k, stride, k // 2, groups=w, bias=False) for w, k in pairs)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.parts, dim=1)
        return F.silu(self.norm(torch.cat([layer(p) for layer, p in zip(self.layers, parts, strict=True)], 1)))


def mixnet() -> nn.Module:
    """Tan and Le 2019, arXiv:1907.09595."""
    layers: list[nn.Module] = [conv(3, 8, 3, 2)]
    width = 8
    for factor, outputs, stride in ((3, 12, 2), (3, 12, 1), (6, 20, 2), (3, 20, 1), (6, 32, 2)):
        hidden = width * factor
        gate = SqueezeSwish(hidden, max(2, width // 2))
        body = nn.Sequential(
            conv(width, hidden, act=nn.SiLU), MixedDepthwise(hidden, stride), gate, conv(hidden, outputs, act=None)
        )
        layers.append(Linear(body, residual=stride == 1 and width == outputs))
        width = outputs
    return nn.Sequential(*layers, conv(width, 128), top(128))
