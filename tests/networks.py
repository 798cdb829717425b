"""Small networks of real families, for tests: each takes float32 (1, 3, 16, 16) and is traced in under a second."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor, nn

SIDE = 16
SLOW_TO_TRACE = settings(
    deadline=None,
    max_examples=6,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking would trace hundreds of networks
    suppress_health_check=list(HealthCheck),
)


def example() -> Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def build(name: str) -> nn.Module:
    """A network with weights, and batch norm statistics, that are not the ones of a new layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return settled(NETWORKS[name]())


def settled(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias, 0, 0.3)
            nn.init.normal_(layer.running_mean, 0, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(layer.running_var, 0.5, 1.5)  # type: ignore[arg-type]
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    return module.eval()


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    padding = kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Head(nn.Module):
    """Global pool and classifier."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(inputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def headed(*layers: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(*layers, Head(width))


class Vgg(nn.Module):
    """Convolutions with bias and no batch norm; flattens a 4 x 4 map."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding="same"), nn.ReLU(), nn.MaxPool2d((2, 2), stride=(2, 2)),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(12 * 16, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, stride=stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        y += self.shortcut(x)
        return F.relu(y)


class Dense(nn.Module):
    """DenseNet's layer: batch norm first, then the input and what was made of it."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Inverted(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expand: int = 3) -> None:
        super().__init__()
        hidden = inputs * expand
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish(),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class SqueezeConv(nn.Module):
    """Squeeze and excite with 1 x 1 convolutions (MobileNetV3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean(dim=(2, 3), keepdim=True)
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(scale))))


class SqueezeLinear(nn.Module):
    """Squeeze and excite with linear layers and views (SENet)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        scale = self.layers(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
        return x * scale.expand_as(x)


class SqueezeResidual(nn.Module):
    """SENet's residual block: the gate in front of the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = conv_bn(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.excite = SqueezeLinear(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.excite(self.second(self.first(x))) + x)


class SqueezeSwish(SqueezeConv):
    """EfficientNet's squeeze and excite."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1))))) * x


class MobileInverted(nn.Module):
    """EfficientNet's block: MobileNetV2's with SiLU, and a gate in front of the projection."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        hidden = inputs * 3
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU(inplace=True),
            nn.Conv2d(hidden, hidden, 5, stride, 2, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.SiLU(),
            SqueezeSwish(hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.residual else self.layers(x)


class Fire(nn.Module):
    """SqueezeNet's block."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], dim=-3)


class Inception(nn.Module):
    """Four branches of different widths, one of them a pool."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.a = conv_bn(inputs, 4, 1)
        self.b = nn.Sequential(conv_bn(inputs, 6, 1), conv_bn(6, 8))
        self.c = nn.Sequential(conv_bn(inputs, 3, 1), conv_bn(3, 5, 5))
        self.d = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_bn(inputs, 7, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.a(x), self.b(x), self.c(x), self.d(x)), 1)


class Shuffle(nn.Module):
    """ShuffleNetV2's block: half of the channels pass, then both halves are interleaved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1),
            nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False), nn.BatchNorm2d(half),
            conv_bn(half, half, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        y = torch.cat((left, self.branch(right)), dim=1)
        b, c, h, w = y.shape
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


class ShuffleGroups(nn.Module):
    """ShuffleNetV1's unit: grouped pointwise convolutions around a shuffle; half the size beside a pooled map."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 2) -> None:
        super().__init__()
        made, hidden = outputs - (inputs if stride == 2 else 0), 4
        self.groups = groups
        self.first = conv_bn(inputs, hidden, 1, groups=groups)
        self.second = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.Conv2d(hidden, made, 1, groups=groups, bias=False), nn.BatchNorm2d(made),
        )  # fmt: skip
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        b, c, h, w = y.shape
        y = y.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        y = self.second(y)
        return F.relu(x + y if self.pool is None else torch.cat([self.pool(x), y], 1))


class UNet(nn.Module):
    """Encoder, decoder with a transposed convolution, the encoder's map beside it; gives a map."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = conv_bn(3, 8), conv_bn(8, 12, stride=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.wide = conv_bn(12, 5)
        self.join, self.last = conv_bn(6 + 8 + 5, 10), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        deep = self.deep(high)
        wide = F.interpolate(self.wide(deep), scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.last(self.join(torch.cat([self.up(deep), high[:, :, :16, :16], wide], 1)))


class SamePadConv(nn.Conv2d):
    """A convolution with a padding of its own, as in EfficientNet-Lite."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        total = max((-(-x.shape[-1] // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - x.shape[-1], 0)
        x = F.pad(x, [total // 2, total - total // 2, total // 2, total - total // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class HardCoded(nn.Module):
    """A size written into the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pool = conv_bn(3, 10), conv_bn(10, 32), nn.MaxPool2d(4)
        self.classifier = nn.Linear(512, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.b(self.a(x))).view(-1, 512))


class Shared(nn.Module):
    """One convolution used twice, another whose weight is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.tied = conv_bn(3, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.tied.weight = self.layer.weight
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layer(self.stem(x)))
        y = F.relu(self.tied(F.relu(self.layer(x))))
        return self.head(torch.cat([y, y], 1))


class Scaled(nn.Module):
    """Parameters with a value a channel in three forms, PReLU, a sum of a tensor with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.flat = nn.Parameter(torch.rand(8) + 0.5)
        self.places = nn.Parameter(torch.rand(16))
        self.prelu = nn.PReLU(8)
        nn.init.uniform_(self.prelu.weight, 0.1, 0.4)
        self.one = nn.PReLU()
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.a(x) * self.scale)
        x = x + x
        y = self.one(self.b(x)) * self.flat.view(1, -1, 1, 1).sigmoid() * self.places
        return self.head(x + y)


class ByHand(nn.Module):
    """Functions written out, numbers added, an attention map of one channel, pools in their short forms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.map = conv_bn(3, 8), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 1, 1)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.max_pool2d(self.a(x), 2), (2,)) if x.shape[-1] > 4 else x
        with torch.no_grad():
            x = x.to(torch.float32).contiguous(memory_format=torch.channels_last)
        y = self.b(x)
        y = F.dropout(y * F.relu6(y + 3) / 6, 0.1, self.training)
        y = y * torch.sigmoid(self.map(y)) - x
        return self.head(self.last(F.adaptive_max_pool2d(y, 2)))


class Sigmoids(nn.Module):
    """Functions that do not give zero for zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Sigmoid(),
            nn.ConstantPad2d(1, 0.7), nn.Conv2d(8, 9, 3), nn.Hardsigmoid(), nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(9, 7, 3), nn.Softplus(),
        )  # fmt: skip
        self.head = Head(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(1 - self.layers(x))


class Odds(nn.Module):
    """A map of constants beside the channels, a buffer scale, circular padding, both pools, BatchNorm1d on a map."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.register_buffer("gain", torch.rand(1, 8, 1, 1) + 0.5)
        self.b, self.up = nn.Conv2d(9, 6, 1), nn.Parameter(torch.randn(6, 5, 2, 2))
        self.norm, self.classifier = nn.BatchNorm1d(40), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.linspace(-1, 1, SIDE).expand(x.shape[0], 1, SIDE, SIDE)
        x = self.b(torch.cat([self.a(x) * self.gain, places], 1))[:, :, ::2, 1:9]
        x = torch.maximum(F.conv_transpose2d(x, self.up, stride=2), torch.zeros(()))
        x = torch.cat([F.adaptive_avg_pool2d(x, 2), F.adaptive_max_pool2d(x, (2, 2))], 1)
        return self.classifier(self.norm(x.flatten(1)))


class Watched(nn.Module):
    """Channels that something else depends on: softmax, the norm of a filter, a computed weight, a 3-D linear."""

    def __init__(self) -> None:
        super().__init__()
        self.soft, self.norm, self.plain = conv_bn(3, 8), nn.Conv2d(8, 8, 3, padding=1), conv_bn(8, 6)
        self.raw = nn.Parameter(torch.randn(7, 6, 1, 1))
        self.tokens, self.head = nn.Linear(16, 16), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.softmax(self.soft(x), 1)
        x = self.plain(self.norm(x) / self.norm.weight.norm())
        x = F.conv2d(x, self.raw * 2)
        return self.head(self.tokens(x.flatten(2).view(1, 7, 16, 16)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg": Vgg,
    "resnet": lambda: headed(conv_bn(3, 8), Residual(8, 8), Residual(8, 12, 2), Residual(12, 12), width=12),
    "densenet": lambda: headed(conv_bn(3, 8), Dense(8, 4), Dense(12, 5), nn.BatchNorm2d(17), nn.ReLU(), width=17),
    "mobilenet_v2": lambda: headed(
        conv_bn(3, 6, stride=2), Inverted(6, 8), Inverted(8, 8), conv_bn(8, 12, 1), width=12
    ),
    "squeeze_conv": lambda: headed(conv_bn(3, 8), SqueezeConv(8), conv_bn(8, 10), SqueezeConv(10), width=10),
    "squeeze_linear": lambda: headed(conv_bn(3, 8), SqueezeLinear(8), conv_bn(8, 10), width=10),
    "squeezenet": lambda: headed(conv_bn(3, 8, stride=2), Fire(8, 4, 6), nn.MaxPool2d(2), Fire(12, 5, 7), width=14),
    "senet": lambda: headed(conv_bn(3, 8), SqueezeResidual(8), SqueezeResidual(8), width=8),
    "efficientnet": lambda: headed(conv_bn(3, 6, stride=2), MobileInverted(6, 8, 2), MobileInverted(8, 8), width=8),
    "inception": lambda: headed(conv_bn(3, 8), Inception(8), conv_bn(24, 10, 1), width=10),
    "shufflenet_v2": lambda: headed(conv_bn(3, 8, stride=2), Shuffle(8), conv_bn(8, 10, 1), width=10),
    "shufflenet_v1": lambda: headed(
        conv_bn(3, 6), conv_bn(6, 8), ShuffleGroups(8, 16, 2), ShuffleGroups(16, 16), conv_bn(16, 10, 1), width=10
    ),
    "resnext": lambda: headed(conv_bn(3, 8), conv_bn(8, 12, 1), conv_bn(12, 12, groups=3), conv_bn(12, 9, 1), width=9),
    "unet": UNet,
    "same_pad": lambda: headed(
        SamePadConv(3, 8, 3, 2), nn.ReLU(), SamePadConv(8, 8, 3, 2, groups=8), SamePadConv(8, 10, 1), width=10
    ),
    "hard_coded": HardCoded,
    "shared": Shared,
    "scaled": Scaled,
    "by_hand": ByHand,
    "sigmoids": Sigmoids,
    "odds": Odds,
    "watched": Watched,
    "pre_activation": lambda: headed(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 9, 3), width=9
    ),
}
NOT_ZERO_FOR_ZERO = {"sigmoids"}
"""A channel with dead producers still gives a constant to its readers there."""


def blocks(kinds: list[tuple[str, int]]) -> nn.Module:
    """A network out of a random sequence: each block's kind and width."""
    layers: list[nn.Module] = [conv_bn(3, 6, stride=2)]
    width = 6
    for kind, wish in kinds:
        if kind == "conv":
            layers.append(conv_bn(width, wish))
            width = wish
        elif kind == "depthwise":
            layers.append(conv_bn(width, width, groups=width))
        elif kind == "residual":
            layers.append(Residual(width, width))
        elif kind == "inverted":
            layers.append(Inverted(width, width))
        elif kind == "squeeze":
            layers.append(SqueezeConv(width))
        elif kind == "fire":
            layers.append(Fire(width, 4, wish))
            width = 2 * wish
        else:
            layers.append(Dense(width, wish))
            width += wish
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return settled(headed(*layers, width=width))
