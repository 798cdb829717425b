"""Networks whose structure is in how their layers are connected: CSP, PeleeNet, NASNet, HRNet."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from network_blocks import Linear, conv
from torch import Tensor, nn

from zoo_networks.classic import separable, top


class CrossStage(nn.Module):
    """Half of the channels pass a stage of residual blocks, the other half goes around (CSPNet, arXiv:1911.11929)."""

    def __init__(self, inputs: int, outputs: int, depth: int, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        half = outputs // 2
        self.main, self.side = conv(inputs, half, act=act), conv(inputs, half, act=act)
        body = (nn.Sequential(conv(half, half, act=act), conv(half, half, 3, act=act)) for _ in range(depth))
        self.blocks = nn.Sequential(*(Linear(each, residual=True) for each in body))
        self.join = conv(2 * half, outputs, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat((self.blocks(self.main(x)), self.side(x)), dim=1))


def csp_darknet() -> nn.Module:
    """CSPDarknet with leaky ReLU, as in YOLOv4 (arXiv:2004.10934)."""

    def leaky() -> nn.Module:
        return nn.LeakyReLU(0.1)

    layers: list[nn.Module] = [conv(3, 8, 3, act=leaky)]
    width = 8
    for outputs, depth in ((16, 1), (32, 2), (64, 2), (96, 1)):
        layers += [conv(width, outputs, 3, 2, act=leaky), CrossStage(outputs, outputs, depth, leaky)]  # type: ignore[arg-type]
        width = outputs
    return nn.Sequential(*layers, top(width))


class PeleeStem(nn.Module):
    """PeleeNet's cheap beginning: a strided convolution beside a pool."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = conv(3, width, 3, 2)
        self.branch = nn.Sequential(conv(width, width // 2), conv(width // 2, width, 3, 2))
        self.pool, self.last = nn.MaxPool2d(2, 2), conv(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cat([self.branch(x), self.pool(x)], 1))


class TwoWayDense(nn.Module):
    """PeleeNet's dense layer: what is there, beside 3 x 3 and twice 3 x 3."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        half = growth // 2
        self.near = nn.Sequential(conv(inputs, growth), conv(growth, half, 3))
        self.far = nn.Sequential(conv(inputs, growth), conv(growth, half, 3), conv(half, half, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.near(x), self.far(x)], 1)


def peleenet() -> nn.Module:
    """Wang et al. 2018, arXiv:1804.06882."""
    layers: list[nn.Module] = [PeleeStem(16)]
    width = 16
    for index, depth in enumerate((2, 3, 2)):
        for _ in range(depth):
            layers.append(TwoWayDense(width, 16))
            width += 16
        layers += [conv(width, width), *([nn.AvgPool2d(2, 2)] if index < 2 else [])]
    return nn.Sequential(*layers, top(width))


class Cell(nn.Module):
    """A NASNet-like cell: two inputs, sums of separable convolutions, pools and identities, all beside each other."""

    def __init__(self, before: int, inputs: int, width: int, stride: int, before_stride: int) -> None:
        super().__init__()
        self.fit0, self.fit1 = conv(before, width, 1, before_stride), conv(inputs, width)
        self.five0, self.three0 = self._branch(width, 5, stride), self._branch(width, 3, stride)
        self.five1, self.three1 = self._branch(width, 5, stride), self._branch(width, 3, stride)
        self.average = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        self.largest = nn.MaxPool2d(3, stride, 1)

    @staticmethod
    def _branch(width: int, kernel: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.ReLU(), separable(width, width, kernel, stride), nn.ReLU(), separable(width, width, kernel)
        )

    def forward(self, before: Tensor, x: Tensor) -> Tensor:
        a, b = self.fit0(before), self.fit1(x)
        made = [
            self.five0(b) + self.three0(a),
            self.five1(a) + self.three1(a),
            self.average(b) + self.largest(a),
            self.average(a) + self.average(a),
        ]
        return torch.cat(made, 1)


class NasNet(nn.Module):
    """Cells that read the two before them (Zoph et al. 2018, arXiv:1707.07012)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, 3, 2, act=None)
        plan = ((16, 16, 8, 1, 1), (16, 32, 12, 2, 1), (32, 48, 12, 1, 2), (48, 48, 16, 2, 1))
        self.cells = nn.ModuleList(Cell(*each) for each in plan)
        self.top = nn.Sequential(nn.ReLU(), top(64))

    def forward(self, x: Tensor) -> Tensor:
        before = x = self.stem(x)
        for cell in self.cells:
            before, x = x, cell(before, x)
        return self.top(x)


class Exchange(nn.Module):
    """HRNet's module: residual blocks at every resolution, then every resolution gets the sum of all."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Linear(nn.Sequential(conv(w, w, 3), conv(w, w, 3, act=None)), residual=True) for w in widths
        )
        self.fuse = nn.ModuleList(
            nn.ModuleList(self._path(a, b, widths) for a in range(len(widths))) for b in range(len(widths))
        )

    @staticmethod
    def _path(source: int, target: int, widths: tuple[int, ...]) -> nn.Module:
        if source == target:
            return nn.Identity()
        if source > target:
            factor = 2 ** (source - target)
            return nn.Sequential(
                conv(widths[source], widths[target], act=None), nn.Upsample(scale_factor=factor, mode="nearest")
            )
        steps: list[nn.Module] = []
        for index in range(source, target):
            last = index == target - 1
            outputs = widths[target] if last else widths[source]
            steps.append(conv(widths[source], outputs, 3, 2, act=None if last else nn.ReLU))
        return nn.Sequential(*steps)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [block(each) for block, each in zip(self.blocks, maps, strict=True)]
        found = []
        for paths in self.fuse:
            total = paths[0](maps[0])  # type: ignore[index]
            for path, each in zip(list(paths)[1:], maps[1:], strict=True):  # type: ignore[call-overload]
                total = total + path(each)
            found.append(F.relu(total))
        return found


class HrNet(nn.Module):
    """Resolutions side by side, each begun at the last one's end, upsampled and joined (arXiv:1908.07919)."""

    def __init__(self, widths: tuple[int, ...] = (12, 24, 48)) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 12, 3, 2), conv(12, widths[0], 3))
        self.down = nn.ModuleList(conv(a, b, 3, 2) for a, b in pairwise(widths))
        self.stages = nn.ModuleList(Exchange(widths[: n + 2]) for n in range(len(widths) - 1))
        self.last = nn.Sequential(conv(sum(widths), 32), nn.Conv2d(32, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for down, stage in zip(self.down, self.stages, strict=True):
            maps = stage([*maps, down(maps[-1])])
        size = maps[0].shape[2:]
        wide = [F.interpolate(each, size=size, mode="bilinear", align_corners=False) for each in maps[1:]]
        return self.last(torch.cat([maps[0], *wide], 1))
