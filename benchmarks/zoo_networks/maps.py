"""Networks that give maps or boxes: segmentation, detection, super-resolution, style, denoising."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from network_blocks import Residual, UNet, conv, inverted
from torch import Tensor, nn

from zoo_networks.connected import CrossStage

# ---------------------------------------------------------------- up again


def unet() -> nn.Module:
    """Ronneberger et al. 2015, arXiv:1505.04597: transposed convolutions on the way up."""
    return UNet((8, 16, 32, 48))


class BilinearUNet(nn.Module):
    """U-Net with bilinear upsampling, padded to the size of what it is joined with."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32, 32)) -> None:
        super().__init__()
        pairs = list(zip((3, *widths), widths, strict=False))
        self.down = nn.ModuleList(nn.Sequential(conv(a, b, 3), conv(b, b, 3)) for a, b in pairs)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.join = nn.ModuleList(conv(a + b, a, 3) for a, b in reversed(pairs[1:]))
        self.last = nn.Conv2d(widths[0], 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        across: list[Tensor] = []
        for index, level in enumerate(self.down):
            x = level(self.pool(x) if index else x)
            across.append(x)
        for join, beside in zip(self.join, reversed(across[:-1]), strict=True):
            x = self.up(x)
            rows, columns = beside.shape[2] - x.shape[2], beside.shape[3] - x.shape[3]
            x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
            x = join(torch.cat([beside, x], dim=1))
        return self.last(x)


class LinkNet(nn.Module):
    """Residual encoder, decoders of transposed 3 x 3 convolutions with an output padding, sums in place of joins."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1))
        widths = (16, 32, 64)
        self.down = nn.ModuleList(self._stage(a, b) for a, b in zip((16, *widths), widths, strict=False))
        self.up = nn.ModuleList(self._decoder(b, a) for a, b in pairwise(widths))
        self.last = nn.Sequential(self._wider(16, 8), conv(8, 8, 3), nn.ConvTranspose2d(8, 4, 2, 2))

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Module:
        stride = 1 if inputs == outputs else 2
        body = nn.Sequential(conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3, act=None))
        return Residual(body, inputs, outputs, stride)

    @staticmethod
    def _wider(inputs: int, outputs: int) -> nn.Module:
        layer = nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, output_padding=1, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())

    def _decoder(self, inputs: int, outputs: int) -> nn.Module:
        middle = inputs // 4
        return nn.Sequential(conv(inputs, middle), self._wider(middle, middle), conv(middle, outputs))

    def forward(self, x: Tensor) -> Tensor:
        first = self.down[0](self.stem(x))
        second = self.down[1](first)
        third = self.down[2](second)
        x = self.up[1](third) + second
        return self.last(self.up[0](x) + first)


# ---------------------------------------------------------------- segmentation


def dilated(inputs: int, outputs: int, rate: int) -> nn.Sequential:
    """A 3 x 3 convolution whose taps are `rate` apart, with batch norm and ReLU."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=rate, dilation=rate, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Segmenter(nn.Module):
    """A backbone whose last stage is dilated, a head, and bilinear upsampling to the input's size."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            conv(3, 16, 3, 2), conv(16, 24, 3, 2), self._block(24, 48, 2), self._block(48, 64, 1, rate=2)
        )
        self.head = head

    @staticmethod
    def _block(inputs: int, outputs: int, stride: int, rate: int = 1) -> nn.Module:
        second = dilated(outputs, outputs, rate)[:2]
        return Residual(nn.Sequential(conv(inputs, outputs, 3, stride), second), inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.backbone(x))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: three rates, 1 x 1, and the whole map's mean stretched over it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv(inputs, outputs), *(dilated(inputs, outputs, r) for r in (2, 3, 5))])
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(inputs, outputs))
        self.project = nn.Sequential(conv(5 * outputs, outputs), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        whole = F.interpolate(self.whole(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*(branch(x) for branch in self.branches), whole], 1))


def fcn() -> nn.Module:
    """Long et al. 2015, arXiv:1411.4038, over a dilated residual backbone."""
    return Segmenter(nn.Sequential(conv(64, 16, 3), nn.Dropout(0.1), nn.Conv2d(16, 6, 1)))


def deeplab_v3() -> nn.Module:
    """Chen et al. 2017, arXiv:1706.05587."""
    return Segmenter(nn.Sequential(Pyramid(64, 24), conv(24, 24, 3), nn.Conv2d(24, 6, 1)))


class LiteSegmenter(nn.Module):
    """MobileNetV3's segmentation head: a gated deep branch and a shallow one (arXiv:1905.02244)."""

    def __init__(self) -> None:
        super().__init__()
        self.high = nn.Sequential(conv(3, 8, 3, 2, act=nn.Hardswish), inverted((8, 32, 16), 3, 2, nn.ReLU))
        deep = [inverted((16, 64, 24), 5, 2, nn.Hardswish), inverted((24, 96, 40), 5, 2, nn.Hardswish)]
        self.low = nn.Sequential(*deep)
        self.main = conv(40, 24)
        self.scale = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(40, 24, 1, bias=False), nn.Sigmoid())
        self.low_classes, self.high_classes = nn.Conv2d(16, 6, 1), nn.Conv2d(24, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.high(x)
        low = self.low(high)
        y = self.main(low) * self.scale(low)
        y = F.interpolate(y, size=high.shape[-2:], mode="bilinear", align_corners=False)
        y = self.low_classes(high) + self.high_classes(y)
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


# ---------------------------------------------------------------- detection


class Yolo(nn.Module):
    """CSP backbone, pooled at several sizes, a path up with nearest upsampling, two heads read as one tensor."""

    def __init__(self, classes: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 3, 2, act=nn.SiLU), conv(8, 16, 3, 2, act=nn.SiLU))
        self.early = nn.Sequential(conv(16, 32, 3, 2, act=nn.SiLU), CrossStage(32, 32, 1))
        self.late = nn.Sequential(conv(32, 64, 3, 2, act=nn.SiLU), CrossStage(64, 64, 1))
        self.before, self.after = conv(64, 32, act=nn.SiLU), conv(128, 64, act=nn.SiLU)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.lateral, self.up = conv(64, 32, act=nn.SiLU), nn.Upsample(scale_factor=2.0, mode="nearest")
        self.join = CrossStage(64, 32, 1)
        self.heads = nn.ModuleList(nn.Conv2d(width, 5 + classes, 1) for width in (32, 64))

    def forward(self, x: Tensor) -> Tensor:
        early = self.early(self.stem(x))
        x = self.before(self.late(early))
        one = self.pool(x)
        two = self.pool(one)
        late = self.after(torch.cat([x, one, two, self.pool(two)], 1))
        near = self.join(torch.cat([self.up(self.lateral(late)), early], 1))
        found = [head(each).flatten(2) for head, each in zip(self.heads, (near, late), strict=True)]
        rows = torch.cat(found, 2)
        places, scores = rows.split([4, rows.shape[1] - 4], 1)
        return torch.cat([places, scores.sigmoid()], 1)


def yolo() -> nn.Module:
    """Redmon et al. 2016, arXiv:1506.02640, in the form of its fifth version."""
    return Yolo()


# ---------------------------------------------------------------- pictures


def espcn() -> nn.Module:
    """Shi et al. 2016, arXiv:1609.05158: super-resolution by a convolution and a pixel shuffle."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.Tanh(), nn.Conv2d(32, 24, 3, padding=1), nn.Tanh(),
        nn.Conv2d(24, 12, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip


class Reflected(nn.Sequential):
    """A convolution behind a reflected border, with instance norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, act: bool = True) -> None:
        layers = [nn.ReflectionPad2d(kernel // 2), nn.Conv2d(inputs, outputs, kernel, stride)]
        super().__init__(*layers, nn.InstanceNorm2d(outputs, affine=True), *([nn.ReLU()] if act else []))


class StyleBlock(nn.Module):
    """A residual block of two such convolutions, no function behind the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(Reflected(width, width, 3), Reflected(width, width, 3, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def fast_style() -> nn.Module:
    """Johnson et al. 2016, arXiv:1603.08155: style transfer with instance norms and reflected borders."""
    return nn.Sequential(
        Reflected(3, 8, 9), Reflected(8, 16, 3, 2), Reflected(16, 32, 3, 2), StyleBlock(32), StyleBlock(32),
        nn.Upsample(scale_factor=2, mode="nearest"), Reflected(32, 16, 3),
        nn.Upsample(scale_factor=2, mode="nearest"), Reflected(16, 8, 3), nn.ReflectionPad2d(4), nn.Conv2d(8, 3, 9),
    )  # fmt: skip
