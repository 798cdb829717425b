"""The MobileNetV2 of the benchmarks, trained on Fashion-MNIST."""

import torch
from pictures import *  # noqa: F403
from pictures import trained


def model() -> torch.nn.Module:
    """The network with its weights."""
    return trained("mobilenet")
