"""Networks that are re-parameterised after training (RepVGG, MobileOne), in both forms, and those with attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from network_blocks import Squeeze, conv, inverted
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from zoo_networks.classic import CLASSES, top

# ---------------------------------------------------------------- several branches while training, one after


class Rebuilt(nn.Module):
    """Convolutions of k x k and 1 x 1 and a batch norm of the input, added; `rebuild` makes them one convolution.

    RepVGG (Ding et al. 2021, arXiv:2101.03697) has one branch of k x k, MobileOne (Vasu et al. 2023, arXiv:2206.04040)
    several, and works depthwise and pointwise in turn.
    """

    def __init__(self, widths: tuple[int, int], kernel: int, stride: int = 1, groups: int = 1, copies: int = 1) -> None:
        super().__init__()
        inputs, outputs = widths
        self.inputs, self.kernel, self.stride, self.groups = inputs, kernel, stride, groups
        sizes = [kernel] * copies + ([1] if kernel > 1 else [])
        self.branches = nn.ModuleList(conv(inputs, outputs, size, stride, groups, act=None) for size in sizes)
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.single: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.single is not None:
            return F.relu(self.single(x))
        total = sum(branch(x) for branch in self.branches)
        return F.relu(total if self.skip is None else total + self.skip(x))

    def rebuild(self) -> None:
        """Replace the branches by the convolution that computes the same."""
        layers = [(layer.weight, norm) for layer, norm in self.branches]  # type: ignore[misc]
        if self.skip is not None:
            per_group = self.inputs // self.groups
            same = torch.eye(per_group).repeat(self.groups, 1)[:, :, None, None]
            layers.append((same, self.skip))
        width, amount = self.branches[0][0].weight.shape[0], self.kernel // 2  # type: ignore[index]
        single = nn.Conv2d(self.inputs, width, self.kernel, self.stride, amount, groups=self.groups)
        with torch.no_grad():
            single.weight.zero_()
            single.bias.zero_()  # type: ignore[union-attr]
            for kernel, norm in layers:
                numbers = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
                weight, bias = fuse_conv_bn_weights(kernel, None, *numbers)
                missing = (self.kernel - weight.shape[-1]) // 2
                single.weight += F.pad(weight, [missing] * 4)
                single.bias += bias
        self.single, self.branches, self.skip = single, nn.ModuleList(), None


def rebuilt(module: nn.Module) -> nn.Module:
    """The module in the form that it is deployed in."""
    for layer in module.modules():
        if isinstance(layer, Rebuilt):
            layer.rebuild()
    return module


def repvgg() -> nn.Module:
    """Ding et al. 2021, arXiv:2101.03697, as it is trained."""
    layers: list[nn.Module] = [Rebuilt((3, 16), 3, 2)]
    width = 16
    for outputs, depth in ((24, 2), (48, 2), (96, 2)):
        for index in range(depth):
            layers.append(Rebuilt((width, outputs), 3, 2 if index == 0 else 1))
            width = outputs
    return nn.Sequential(*layers, top(width))


def mobileone() -> nn.Module:
    """Vasu et al. 2023, arXiv:2206.04040, as it is trained."""
    layers: list[nn.Module] = [Rebuilt((3, 16), 3, 2, copies=2)]
    width = 16
    for outputs, stride in ((24, 2), (24, 1), (48, 2), (48, 1), (96, 2)):
        layers.append(Rebuilt((width, width), 3, stride, groups=width, copies=2))
        layers.append(Rebuilt((width, outputs), 1, copies=2))
        width = outputs
    return nn.Sequential(*layers, top(width))


# ---------------------------------------------------------------- after transformers


class MapNorm(nn.LayerNorm):
    """Layer norm over the channels of a map, by moving them last and back (torchvision's LayerNorm2d)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """A 7 x 7 depthwise convolution, then a layer norm and linear layers with channels last; a scale a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """Liu et al. 2022, arXiv:2201.03545."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 4, 4), MapNorm(16, eps=1e-6)]
    width = 16
    for outputs, depth in ((16, 2), (32, 2), (64, 2)):
        if outputs != width:
            layers += [MapNorm(width, eps=1e-6), nn.Conv2d(width, outputs, 2, 2)]
        layers += [ConvNextBlock(outputs) for _ in range(depth)]
        width = outputs
    last = [nn.AdaptiveAvgPool2d(1), MapNorm(width, eps=1e-6), nn.Flatten(), nn.Linear(width, CLASSES)]
    return nn.Sequential(*layers, *last)


class PoolBlock(nn.Module):
    """Average over the neighbourhood (without the padding) less the place itself; then convolutions as an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.mlp = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1))
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 0.5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.scale1[:, None, None] * (self.pool(y) - y)
        return x + self.scale2[:, None, None] * self.mlp(self.norm2(x))


def poolformer() -> nn.Module:
    """Yu et al. 2022, arXiv:2111.11418."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 7, 4, 2)]
    width = 16
    for outputs in (16, 32, 64):
        if outputs != width:
            layers.append(nn.Conv2d(width, outputs, 3, 2, 1))
        layers += [PoolBlock(outputs) for _ in range(2)]
        width = outputs
    return nn.Sequential(*layers, nn.GroupNorm(1, width), top(width))


class Attention(nn.Module):
    """Self-attention of several heads over tokens (N, tokens, width), and an MLP; layer norms first."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        parts = self.mix(self.norm1(x)).reshape(count, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5, dim=-1)
        x = x + self.project((weights @ value).transpose(1, 2).reshape(count, tokens, width))
        return x + self.mlp(self.norm2(x))


class MobileVitBlock(nn.Module):
    """Convolutions around attention between the same places of all 2 x 2 patches; joined with what came in."""

    def __init__(self, width: int, tokens: int, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.near = nn.Sequential(conv(width, width, 3, act=nn.SiLU), nn.Conv2d(width, tokens, 1, bias=False))
        self.far = nn.Sequential(Attention(tokens), Attention(tokens), nn.LayerNorm(tokens))
        self.back, self.join = conv(tokens, width, act=nn.SiLU), conv(2 * width, width, 3, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        y = self.near(x)
        count, width, height, length = y.shape
        p, rows, columns = self.patch, height // self.patch, length // self.patch
        y = y.reshape(count * width * rows, p, columns, p).transpose(1, 2)
        y = y.reshape(count, width, rows * columns, p * p).transpose(1, 3).reshape(count * p * p, rows * columns, width)
        y = self.far(y)
        y = y.reshape(count, p * p, rows * columns, width).transpose(1, 3).reshape(count * width * rows, columns, p, p)
        y = y.transpose(1, 2).reshape(count, width, height, length)
        return self.join(torch.cat((x, self.back(y)), 1))


def mobilevit() -> nn.Module:
    """Mehta and Rastegari 2022, arXiv:2110.02178: inverted residuals, then attention inside the deeper stages."""
    layers = [
        conv(3, 8, 3, 2, act=nn.SiLU), inverted((8, 32, 16), 3, 2, nn.SiLU), inverted((16, 64, 24), 3, 2, nn.SiLU),
        MobileVitBlock(24, 32), inverted((24, 96, 32), 3, 2, nn.SiLU), MobileVitBlock(32, 40),
    ]  # fmt: skip
    return nn.Sequential(*layers, conv(32, 96, act=nn.SiLU), top(96))


class TokenStage(nn.Module):
    """A convolutional stem, a class token and learned places in front of plain attention (a small ViT hybrid)."""

    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        stem = [conv(3, 16, 3, 2), conv(16, 32, 3, 2), Squeeze(32, 8, nn.Sigmoid), conv(32, 48, 3, 2)]
        self.stem, self.embed = nn.Sequential(*stem), nn.Conv2d(48, width, 1)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.5)
        self.places = nn.Parameter(torch.randn(1, places + 1, width) * 0.2)
        self.blocks = nn.Sequential(*(Attention(width) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(self.stem(x)).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.token.expand(x.shape[0], -1, -1), tokens), dim=1) + self.places
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def vit_hybrid() -> nn.Module:
    """Xiao et al. 2021, arXiv:2106.14881: a ViT whose patches come from convolutions, for 64 x 64."""
    return TokenStage(48, 64)
