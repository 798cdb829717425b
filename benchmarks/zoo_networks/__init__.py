"""Architectures with the block structures of their papers at a fraction of their width, each in a minute's reach."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo_networks import classic, connected, maps, mobile, rebuilt


class Entry(NamedTuple):
    """How a network is made, and its input's height and width."""

    make: Callable[[], nn.Module]
    side: int = 64
    rebuilt: bool = False
    """Re-parameterised once its batch norms are settled."""
    trained: bool = False
    """It comes with weights."""


NETWORKS: dict[str, Entry] = {
    "alexnet": Entry(classic.alexnet, 96),
    "vgg16_bn": Entry(classic.vgg16_bn),
    "squeezenet": Entry(classic.squeezenet, 96),
    "googlenet": Entry(classic.googlenet),
    "inception_v3": Entry(classic.inception_v3, 96),
    "densenet": Entry(classic.densenet),
    "resnet18": Entry(classic.resnet18),
    "resnet50": Entry(partial(classic.bottlenecks, "plain")),
    "wide_resnet": Entry(classic.wide_resnet, 32),
    "resnext50": Entry(partial(classic.bottlenecks, "resnext")),
    "se_resnet50": Entry(partial(classic.bottlenecks, "se")),
    "cbam_resnet50": Entry(partial(classic.bottlenecks, "cbam")),
    "res2net50": Entry(partial(classic.bottlenecks, "res2net")),
    "regnet_x": Entry(partial(classic.regnet, squeeze=False)),
    "regnet_y": Entry(partial(classic.regnet, squeeze=True)),
    "xception": Entry(classic.xception),
    "csp_darknet": Entry(connected.csp_darknet),
    "peleenet": Entry(connected.peleenet),
    "nasnet": Entry(connected.NasNet, 32),
    "hrnet": Entry(connected.HrNet),
    "mobilenet_v1": Entry(mobile.mobilenet_v1),
    "mobilenet_v2": Entry(partial(mobile.inverted_residuals, mobile.V2, nn.ReLU6)),
    "mobilenet_v3_small": Entry(partial(mobile.mobilenet_v3, mobile.V3_SMALL)),
    "mobilenet_v3_large": Entry(partial(mobile.mobilenet_v3, mobile.V3_LARGE)),
    "mnasnet": Entry(partial(mobile.inverted_residuals, mobile.MNASNET, nn.ReLU)),
    "mcunet": Entry(partial(mobile.inverted_residuals, mobile.MCUNET, nn.ReLU6)),
    "efficientnet_b0": Entry(mobile.efficientnet),
    "efficientnet_v2": Entry(partial(mobile.efficientnet, fused=2)),
    "efficientnet_lite0": Entry(mobile.efficientnet_lite0, 96, trained=True),
    "shufflenet_v1": Entry(mobile.shufflenet_v1),
    "shufflenet_v2": Entry(mobile.shufflenet_v2),
    "ghostnet": Entry(mobile.ghostnet),
    "fbnet": Entry(mobile.fbnet),
    "mixnet": Entry(mobile.mixnet),
    "repvgg_training": Entry(rebuilt.repvgg),
    "repvgg": Entry(rebuilt.repvgg, rebuilt=True),
    "mobileone_training": Entry(rebuilt.mobileone),
    "mobileone": Entry(rebuilt.mobileone, rebuilt=True),
    "convnext": Entry(rebuilt.convnext),
    "poolformer": Entry(rebuilt.poolformer),
    "mobilevit": Entry(rebuilt.mobilevit),
    "vit_hybrid": Entry(rebuilt.vit_hybrid),
    "unet": Entry(maps.unet),
    "unet_bilinear": Entry(maps.BilinearUNet),
    "linknet": Entry(maps.LinkNet),
    "fcn": Entry(maps.fcn),
    "deeplab_v3": Entry(maps.deeplab_v3),
    "lraspp": Entry(maps.LiteSegmenter),
    "yolo": Entry(maps.yolo),
    "espcn": Entry(maps.espcn, 32),
    "fast_style": Entry(maps.fast_style),
}


def build(name: str, inputs: Tensor) -> nn.Module:
    """The network in eval mode, the same each time; `inputs` (N, 3, side, side) settle its batch norms.

    Batch norms that have seen no data let activations fade, and int8 leaves nothing of them.
    """
    entry = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = entry.make()
        if entry.trained:
            return module.eval()
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            elif isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # the mean of all batches
                nn.init.uniform_(layer.weight, 0.8, 1.2)  # exporters drop a factor of one, which no training leaves
                nn.init.normal_(layer.bias, std=0.1)
        module.train()
        with torch.no_grad():
            for _ in range(2):
                module(inputs)
    return rebuilt.rebuilt(module).eval() if entry.rebuilt else module.eval()
