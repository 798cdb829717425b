"""Finds the few operators that an int8 file leaves in float because rounding there harms most and saves little."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mobilekit.sensitivity import Reference, int8_damages
from mobilekit.types import Network

SHARE_OF_DAMAGE = 0.2
"""An operator that is spared causes at least so much of all that rounding of activations harms."""
SHARE_OF_WORK = 0.05
"""Of the multiply-accumulates; all that is spared does no more."""
LEAST_DAMAGE = 0.002
"""Below it, nothing is worth a border between precisions."""
SAMPLES = 32


def spared(network: Network, module: torch.nn.Module, batches: Sequence[torch.Tensor]) -> list[str]:
    """Names of the operators, each with those that write what it reads; empty where int8 harms evenly or not much.

    `batches` are calibration inputs (N, C, H, W), of which 32 are looked at. In networks with narrow depthwise
    convolutions at the start, the stem's output alone may cause half of all damage.
    """
    inputs = torch.cat(list(batches))
    chosen = np.linspace(0, len(inputs) - 1, min(SAMPLES, len(inputs))).round().astype(int)
    damages = int8_damages(network, Reference(module, inputs[torch.from_numpy(chosen)]), lambda _: None)
    whole, macs = sum(damages.values()), {o.name: network.shape(o).macs for o in network.operators}
    if whole < LEAST_DAMAGE:
        return []
    reads = {operator.name: operator.inputs for operator in network.operators}
    left: set[str] = set()
    for name in sorted(damages, key=lambda name: (-damages[name], name)):
        if damages[name] < SHARE_OF_DAMAGE * whole:
            break
        group = left | {name, *(source for source in reads[name] if source in macs)}
        if sum(macs[each] for each in group) <= SHARE_OF_WORK * network.macs:
            left = group
    return sorted(left)
