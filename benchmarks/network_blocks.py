"""Blocks that the networks of the validation are made of, and those networks that are one module of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 1000
Activation = Callable[[], nn.Module]


def conv(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: Activation | None = nn.ReLU
) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), *([act()] if act else []))


def plain(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, padding: int | None = None) -> nn.Sequential:
    """Convolution with bias and ReLU, from before batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 if padding is None else padding), nn.ReLU()
    )


def head(inputs: int, hidden: int = 0, act: Activation = nn.Hardswish, classes: int = CLASSES) -> nn.Sequential:
    """Global pool and classifier."""
    layers: list[nn.Module] = [nn.Linear(inputs, hidden), act()] if hidden else []
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers, nn.Linear(hidden or inputs, classes))


class Residual(nn.Module):
    """A shortcut around a body, and a ReLU behind the sum; the shortcut is a convolution where shapes differ."""

    def __init__(self, body: nn.Module, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Linear(nn.Module):
    """A body with a linear end, and the input added to it where the shapes allow (inverted residuals)."""

    def __init__(self, body: nn.Module, residual: bool) -> None:
        super().__init__()
        self.body, self.residual = body, residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Squeeze(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int, hidden: int, gate: Activation) -> None:
        super().__init__()
        self.reduce, self.expand, self.gate = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class Branches(nn.Module):
    """The outputs of several bodies, or the input itself (Identity), beside each other."""

    def __init__(self, *bodies: nn.Module) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([body(x) for body in self.bodies], 1)


def inverted(
    widths: tuple[int, int, int], kernel: int, stride: int, act: Activation, gate: nn.Module | None = None
) -> nn.Module:
    """MobileNetV2's block of input, hidden and output channels: expand, depthwise, perhaps squeeze, project."""
    inputs, hidden, outputs = widths
    body = [conv(inputs, hidden, act=act)] if hidden != inputs else []
    body.append(conv(hidden, hidden, kernel, stride, groups=hidden, act=act))
    gates = [gate] if gate else []
    return Linear(
        nn.Sequential(*body, *gates, conv(hidden, outputs, act=None)), residual=stride == 1 and inputs == outputs
    )


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit: halves of the channels, or both branches from the whole input where it strides."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, entry = outputs // 2, inputs if stride > 1 else outputs // 2
        self.branch = nn.Sequential(
            conv(entry, half), conv(half, half, 3, stride, groups=half, act=None), conv(half, half)
        )
        self.other: nn.Module | None = None
        if stride > 1:
            self.other = nn.Sequential(conv(inputs, inputs, 3, stride, groups=inputs, act=None), conv(inputs, half))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.other is None else (self.other(x), x)
        y = torch.cat((left, self.branch(right)), 1)
        batch, channels, height, width = y.shape
        return y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class UNet(nn.Module):
    """Down, up and across, with a quarter of the paper's channels and padded convolutions."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 128, 256)) -> None:
        super().__init__()
        pairs = list(zip((3, *widths), widths, strict=False))
        self.down = nn.ModuleList(nn.Sequential(conv(a, b, 3), conv(b, b, 3)) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in reversed(pairs[1:]))
        self.join = nn.ModuleList(nn.Sequential(conv(2 * a, a, 3), conv(a, a, 3)) for a, _ in reversed(pairs[1:]))
        self.last = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        across: list[Tensor] = []
        for level in self.down:
            x = level(F.max_pool2d(x, 2) if across else x)
            across.append(x)
        for up, join, beside in zip(self.up, self.join, reversed(across[:-1]), strict=True):
            x = join(torch.cat([beside, up(x)], 1))
        return self.last(x)
