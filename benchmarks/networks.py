"""Architectures that no price was fitted to: plain modules with random weights and the layer shapes of their papers.

    python benchmarks/networks.py

traces them all, prints their multiply-accumulates beside the published ones, and fails where they differ by more than
3 %. Two differ more for a stated reason (`Entry.note`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from network_blocks import Branches, Residual, ShuffleUnit, Squeeze, UNet, conv, head, inverted, plain
from torch import Tensor, nn

TOLERANCE = 0.03


# ---------------------------------------------------------------- residual networks


def resnet18() -> nn.Module:
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for outputs in (64, 128, 256, 512):
        for stride in (1 if outputs == 64 else 2, 1):
            body = nn.Sequential(conv(width, outputs, 3, stride), conv(outputs, outputs, 3, act=None))
            layers.append(Residual(body, width, outputs, stride))
            width = outputs
    return nn.Sequential(*layers, head(width))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for outputs, depth in ((256, 3), (512, 4), (1024, 6), (2048, 3)):
        for index in range(depth):
            stride, middle = 2 if index == 0 and outputs > 256 else 1, outputs // 4
            body = nn.Sequential(conv(width, middle), conv(middle, middle, 3, stride), conv(middle, outputs, act=None))
            layers.append(Residual(body, width, outputs, stride))
            width = outputs
    return nn.Sequential(*layers, head(width))


def regnet(depths: Sequence[int], widths: Sequence[int], group: int, squeeze: bool) -> nn.Module:
    layers: list[nn.Module] = [conv(3, 32, 3, 2)]
    before = 32
    for depth, width in zip(depths, widths, strict=True):
        for index in range(depth):
            stride = 2 if index == 0 else 1
            gate = [Squeeze(width, before // 4, nn.Sigmoid)] if squeeze else []
            middle = conv(width, width, 3, stride, groups=width // group)
            body = nn.Sequential(conv(before, width), middle, *gate, conv(width, width, act=None))
            layers.append(Residual(body, before, width, stride))
            before = width
    return nn.Sequential(*layers, head(before))


# ---------------------------------------------------------------- depthwise networks


def mobilenet_v1() -> nn.Module:
    layers: list[nn.Module] = [conv(3, 32, 3, 2)]
    width = 32
    for outputs, stride in [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)] + [(512, 1)] * 5 + [
        (1024, 2), (1024, 1)
    ]:  # fmt: skip
        layers += [conv(width, width, 3, stride, groups=width), conv(width, outputs)]
        width = outputs
    return nn.Sequential(*layers, head(width))


def mobilenet_v2() -> nn.Module:
    layers: list[nn.Module] = [conv(3, 32, 3, 2, act=nn.ReLU6)]
    width = 32
    for factor, outputs, depth, first in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    ):  # fmt: skip
        for index in range(depth):
            layers.append(inverted((width, width * factor, outputs), 3, first if index == 0 else 1, nn.ReLU6))
            width = outputs
    return nn.Sequential(*layers, conv(width, 1280, act=nn.ReLU6), head(1280))


def mnasnet_b1() -> nn.Module:
    layers = [conv(3, 32, 3, 2), conv(32, 32, 3, groups=32), conv(32, 16, act=None)]
    modules: list[nn.Module] = list(layers)
    width = 16
    for kernel, factor, outputs, depth, first in (
        (3, 3, 24, 3, 2), (5, 3, 40, 3, 2), (5, 6, 80, 3, 2), (3, 6, 96, 2, 1), (5, 6, 192, 4, 2), (3, 6, 320, 1, 1)
    ):  # fmt: skip
        for index in range(depth):
            modules.append(inverted((width, width * factor, outputs), kernel, first if index == 0 else 1, nn.ReLU))
            width = outputs
    return nn.Sequential(*modules, conv(width, 1280), head(1280))


def mobilenet_v3_large() -> nn.Module:
    layers: list[nn.Module] = [conv(3, 16, 3, 2, act=nn.Hardswish)]
    width = 16
    for kernel, hidden, outputs, squeeze, act, stride in (
        (3, 16, 16, 0, nn.ReLU, 1), (3, 64, 24, 0, nn.ReLU, 2), (3, 72, 24, 0, nn.ReLU, 1),
        (5, 72, 40, 24, nn.ReLU, 2), (5, 120, 40, 32, nn.ReLU, 1), (5, 120, 40, 32, nn.ReLU, 1),
        (3, 240, 80, 0, nn.Hardswish, 2), (3, 200, 80, 0, nn.Hardswish, 1), (3, 184, 80, 0, nn.Hardswish, 1),
        (3, 184, 80, 0, nn.Hardswish, 1), (3, 480, 112, 120, nn.Hardswish, 1), (3, 672, 112, 168, nn.Hardswish, 1),
        (5, 672, 160, 168, nn.Hardswish, 2), (5, 960, 160, 240, nn.Hardswish, 1), (5, 960, 160, 240, nn.Hardswish, 1),
    ):  # fmt: skip
        gate = Squeeze(hidden, squeeze, nn.Hardsigmoid) if squeeze else None
        layers.append(inverted((width, hidden, outputs), kernel, stride, act, gate))
        width = outputs
    return nn.Sequential(*layers, conv(width, 960, act=nn.Hardswish), head(960, 1280))


def shufflenet_v2() -> nn.Module:
    layers: list[nn.Module] = [conv(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1)]
    width = 24
    for outputs, depth in ((116, 4), (232, 8), (464, 4)):
        for index in range(depth):
            layers.append(ShuffleUnit(width, outputs, 2 if index == 0 else 1))
            width = outputs
    return nn.Sequential(*layers, conv(width, 1024), head(1024))


def efficientnet_lite0() -> nn.Module:
    """The bundled workload, with its trained weights."""
    from mobilekit.workloads import efficientnet_lite0

    return efficientnet_lite0.model()


# ---------------------------------------------------------------- concatenating networks


def squeezenet() -> nn.Module:
    def fire(inputs: int, squeeze: int, expand: int) -> nn.Module:
        return nn.Sequential(plain(inputs, squeeze), Branches(plain(squeeze, expand), plain(squeeze, expand, 3)))

    pool = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
    return nn.Sequential(
        plain(3, 64, 3, 2, padding=0), pool(), fire(64, 16, 64), fire(128, 16, 64),
        pool(), fire(128, 32, 128), fire(256, 32, 128),
        pool(), fire(256, 48, 192), fire(384, 48, 192), fire(384, 64, 256), fire(512, 64, 256),
        plain(512, 1000), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def googlenet() -> nn.Module:
    def inception(inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pooled: int) -> nn.Module:
        return Branches(
            plain(inputs, one),
            nn.Sequential(plain(inputs, three[0]), plain(*three, 3)),
            nn.Sequential(plain(inputs, five[0]), plain(*five, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), plain(inputs, pooled)),
        )

    pool = partial(nn.MaxPool2d, 3, 2, ceil_mode=True)
    return nn.Sequential(
        plain(3, 64, 7, 2), pool(), plain(64, 64), plain(64, 192, 3), pool(),
        inception(192, 64, (96, 128), (16, 32), 32), inception(256, 128, (128, 192), (32, 96), 64), pool(),
        inception(480, 192, (96, 208), (16, 48), 64), inception(512, 160, (112, 224), (24, 64), 64),
        inception(512, 128, (128, 256), (24, 64), 64), inception(512, 112, (144, 288), (32, 64), 64),
        inception(528, 256, (160, 320), (32, 128), 128), pool(),
        inception(832, 256, (160, 320), (32, 128), 128), inception(832, 384, (192, 384), (48, 128), 128),
        head(1024),
    )  # fmt: skip


def densenet121() -> nn.Module:
    def before(inputs: int, outputs: int, kernel: int = 1) -> nn.Sequential:
        layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), layer)

    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for depth in (6, 12, 24, 16):
        if width > 64:
            layers += [before(width, width // 2), nn.AvgPool2d(2)]
            width //= 2
        for _ in range(depth):
            layers.append(Branches(nn.Identity(), nn.Sequential(before(width, 128), before(128, 32, 3))))
            width += 32
    return nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU(), head(width))


# ---------------------------------------------------------------- large maps


def vgg11() -> nn.Module:
    """Its convolutions with a global pool in place of the three large linear layers."""
    layers: list[nn.Module] = []
    width = 3
    for outputs in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        layers.append(plain(width, outputs, 3) if outputs else nn.MaxPool2d(2))
        width = outputs or width
    return nn.Sequential(*layers, head(width))


# ---------------------------------------------------------------- all of them


class Entry(NamedTuple):
    """How a network is made, where its layers are from, its published multiply-accumulates in millions."""

    make: Callable[[], nn.Module]
    paper: str
    published: float | None
    source: str = "paper"
    note: str = ""
    """Why the traced figure may differ by more than 3 %."""
    side: int = 224


TORCHVISION = "torchvision, `_ops` of its weights"
NETWORKS = {
    "resnet18": Entry(resnet18, "He et al. 2016, arXiv:1512.03385", 1814, TORCHVISION),
    "resnet50": Entry(resnet50, "arXiv:1512.03385, stride in the 3 x 3 convolution", 4089, TORCHVISION),
    "regnet_x_400mf": Entry(
        partial(regnet, (1, 2, 7, 12), (32, 64, 160, 384), 16, squeeze=False),
        "Radosavovic et al. 2020, arXiv:2003.13678",
        400,
    ),
    "regnet_y_400mf": Entry(
        partial(regnet, (1, 3, 6, 6), (48, 104, 208, 440), 8, squeeze=True), "arXiv:2003.13678", 400
    ),
    "mobilenet_v1": Entry(mobilenet_v1, "Howard et al. 2017, arXiv:1704.04861", 569),
    "mobilenet_v2": Entry(mobilenet_v2, "Sandler et al. 2018, arXiv:1801.04381", 300),
    "mnasnet_b1": Entry(mnasnet_b1, "Tan et al. 2019, arXiv:1807.11626, without squeeze and excite", 314, TORCHVISION),
    "mobilenet_v3_large": Entry(mobilenet_v3_large, "Howard et al. 2019, arXiv:1905.02244", 219),
    "shufflenet_v2": Entry(shufflenet_v2, "Ma et al. 2018, arXiv:1807.11164", 146),
    "efficientnet_lite0": Entry(
        efficientnet_lite0,
        "Tan and Le 2019, arXiv:1905.11946, in its Lite variant",
        407,
        "README of the Lite checkpoints",
        "the trained weights fix every shape: convolutions and the linear layer have 385 M",
    ),
    "squeezenet": Entry(squeezenet, "Iandola et al. 2016, arXiv:1602.07360, version 1.1", 349, TORCHVISION),
    "googlenet": Entry(
        googlenet,
        "Szegedy et al. 2015, arXiv:1409.4842",
        1500,
        'paper, "1.5 billion"',
        "its table 1 counts 34 M for the first convolution: 7 x 7 x 3 x 64 at 112 x 112 are 118 M",
    ),
    "densenet121": Entry(densenet121, "Huang et al. 2017, arXiv:1608.06993", 2834, TORCHVISION),
    "vgg11": Entry(
        vgg11,
        "Simonyan and Zisserman 2015, arXiv:1409.1556, with a global pool and one linear layer",
        7485,
        f"{TORCHVISION}: 7609, of which three linear layers are 124",
    ),
    "unet": Entry(UNet, "Ronneberger et al. 2015, arXiv:1505.04597, a quarter of its channels", None, "none", side=128),
}


def example(name: str) -> Tensor:
    """The network's input: float32 (1, 3, side, side)."""
    side = NETWORKS[name].side
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def build(name: str, settle: bool = True) -> nn.Module:
    """The network in eval mode, the same each time.

    `settle` runs noise through it until its batch norms hold that noise's statistics, so that activations stay near
    one in size however deep it is: int8 files are compared with the network. It costs seconds and changes no shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = NETWORKS[name].make()
        if name == "efficientnet_lite0":
            return module.eval()
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            elif isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # the mean of all batches
                nn.init.uniform_(layer.weight, 0.8, 1.2)  # exporters drop a factor of one, which no training leaves
                nn.init.normal_(layer.bias, std=0.1)
        if settle:
            module.train()
            with torch.no_grad():
                for _ in range(2):
                    module(torch.randn(8, 3, NETWORKS[name].side, NETWORKS[name].side))
        return module.eval()


def main() -> None:
    """Print the table; fail where a network is not what it is called."""
    from mobilekit.network import trace

    torch.set_num_threads(1)
    wrong = []
    print("| network | M MACs | published | difference | operators | layers of | source of the published figure |")
    print("|---|---|---|---|---|---|---|")
    for name, entry in NETWORKS.items():
        network = trace(build(name, settle=False), example(name), name)
        macs = network.macs / 1e6
        difference = macs / entry.published - 1 if entry.published else 0.0
        shown = f"{entry.published:.0f} | {difference:+.1%}" if entry.published else "- | -"
        source = f"{entry.source}{': ' if entry.note else ''}{entry.note}"
        print(f"| {name} | {macs:.1f} | {shown} | {len(network.operators)} | {entry.paper} | {source} |", flush=True)
        if abs(difference) > TOLERANCE and not entry.note:
            wrong.append(name)
    if wrong:
        raise SystemExit(f"multiply-accumulates differ by more than {TOLERANCE:.0%}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
