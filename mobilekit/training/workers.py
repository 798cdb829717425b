"""Processes that train one network together, as Hugging Face accelerate starts them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import distributed

from mobilekit.errors import UnsupportedError

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""The others wait for the first process, which plans and measures before it trains."""


@dataclass(frozen=True)
class Workers:
    """This process among those that train together; alone where nothing else is said.

    Everybody must call the methods in the same order, as with all collective operations.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None
    """Where to train; None: where the module lies."""
    group: Any = None
    """Processes that talk over the network without a GPU; None: torch's default."""

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Set tensors to their means over the processes, in one message for each kind of number.

        Every process then holds the same bits.
        """
        if self.count == 1:
            return
        from accelerate.utils import reduce

        for dtype in {tensor.dtype for tensor in tensors}:
            own = [tensor for tensor in tensors if tensor.dtype == dtype]
            mean = reduce(torch.cat([tensor.detach().flatten() for tensor in own]), "mean")
            for tensor, part in zip(own, mean.split([tensor.numel() for tensor in own]), strict=True):
                tensor.detach().copy_(part.reshape(tensor.shape))

    def agreed(self, value: T) -> T:
        """What the first process gave, everywhere; any value that can be pickled."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, 0, group=self.group)
        return box[0]

    def share(self, batches: Iterator[T]) -> Iterator[T]:
        """Every `count`-th batch, beginning with that of the rank: nobody gets what another has."""
        return islice(batches, self.rank, None, self.count)


ALONE = Workers()


def connected() -> Workers:
    """The processes that `accelerate launch` (or torchrun) started; alone in a plain run.

    Raises UnsupportedError where several were started and accelerate is not installed.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return _joined() if several or "ACCELERATE_MIXED_PRECISION" in os.environ else ALONE


def not_started() -> str:
    """What to say where accelerate was asked for several processes and started one only; empty where it did not.

    `accelerate launch --cpu --num_processes 2` starts them by MPI, and one where no host file of MPI was given.
    """
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    if not asked or "WORLD_SIZE" in os.environ:
        return ""
    return (
        "accelerate was asked for several processes and started one: on CPUs it needs MPI; "
        "accelerate launch --multi_gpu or torchrun start them, without a GPU too"
    )


@functools.cache
def _joined() -> Workers:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise UnsupportedError(
            "training in several processes needs accelerate: pip install 'mobilekit[distributed]'"
        ) from error
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    count = int(state.num_processes)
    # Waiting on a GPU keeps a core busy, which would disturb what the first process measures.
    group = distributed.new_group(backend="gloo", timeout=PATIENCE) if count > 1 else None
    return Workers(int(state.process_index), count, state.device, group)
