"""What a criterion looks at: one coupled channel group, the parameters around it and the calibration inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import torch
from torch import nn

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.types import Axis, Calibration, Network

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Reader:
    """A weight that reads the group along its input axis (a consumer), and writes along `out_dim`."""

    name: str
    in_dim: int
    out_dim: int


@dataclass(frozen=True)
class Subject:
    """One channel group of a module; `width` of its channels are to stay. The module is only read."""

    module: nn.Module
    network: Network
    group: str
    width: int
    calibration: Calibration | None = None

    @property
    def channels(self) -> int:
        """Channels that the group has now."""
        return self.network.groups[self.group].width

    @cached_property
    def filters(self) -> list[torch.Tensor]:
        """Each producer as float64 (channels, weights of one filter), on the CPU."""
        found = []
        for producer in self.network.groups[self.group].producers:
            weight = self.module.get_parameter(producer.parameter).detach().to("cpu", torch.float64)
            found.append(weight.movedim(producer.dim, 0).flatten(1))
        return found

    @property
    def dead(self) -> torch.Tensor:
        """Which channels have nothing but zeros in every producer, bool (channels,)."""
        return torch.stack([(weights == 0).all(dim=1) for weights in self.filters]).all(dim=0)

    @property
    def readers(self) -> list[Reader]:
        """Weights that read the group, each once (tied weights share a tensor).

        Raises UnsupportedError where no weight does.
        """
        out_dims = {p.parameter: p.dim for group in self.network.groups.values() for p in group.producers}
        found: dict[int, Reader] = {}
        for name, axes in self.network.axes.items():
            for dim, axis in axes.items():
                if name in out_dims and dim != out_dims[name] and self.group in axis.groups:
                    found.setdefault(id(self.module.get_parameter(name)), Reader(name, dim, out_dims[name]))
        if not found:
            raise UnsupportedError(f"{self.group} cannot be re-fitted: no layer with weights reads it")
        return list(found.values())

    def entries(self, axis: Axis) -> torch.Tensor:
        """Entries of a parameter's axis that belong to each channel of the group, int64 (channels, entries)."""
        found, offset = [], 0
        for group in axis.groups:
            width = self.network.groups[group].width
            if group == self.group:
                starts = (offset + torch.arange(width)) * axis.repeat
                found.append(starts[:, None] + torch.arange(axis.repeat))
            offset += width
        return torch.cat(found, dim=1)

    def data(self, purpose: str) -> Calibration:
        """The calibration inputs. Raises UnsupportedError where there are none."""
        if self.calibration is None or not self.calibration.inputs:
            raise UnsupportedError(f"{self.group} cannot be pruned with {purpose}: it needs calibration inputs")
        if not all(bool(batch.isfinite().all()) for batch in self.calibration.inputs):
            raise BadInputError("the calibration inputs hold values that are not finite")
        return self.calibration

    def check_finite(self) -> None:
        """Raises BadInputError where a parameter over the group holds a value that is not finite."""
        for name, axes in self.network.axes.items():
            if any(self.group in axis.groups for axis in axes.values()):
                tensor: torch.Tensor = attrgetter(name)(self.module)
                if not bool(tensor.isfinite().all()):
                    raise BadInputError(f"{name} holds values that are not finite: its channels cannot be ranked")


def working_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode to run: in float32 where the module is in half precision, whose sums are too coarse."""
    twin = copy.deepcopy(module).eval()
    if any(p.dtype in HALVES for p in twin.parameters()):
        twin = twin.float()
    return twin


def batches(module: nn.Module, calibration: Calibration) -> Iterator[torch.Tensor]:
    """The calibration inputs (N, C, H, W) on the module's device and in its type."""
    like = next(module.parameters())
    for batch in calibration.inputs:
        yield batch.detach().to(like.device, like.dtype, copy=True)


def run(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The module's output. Raises BadInputError where its forward fails, or gives something else than a tensor."""
    try:
        output = module(batch)
    except UnsupportedError:
        raise
    except Exception as error:  # the user's forward may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInputError(f"the model fails on the calibration inputs: {reason}") from error
    if not isinstance(output, torch.Tensor):
        raise BadInputError(f"the model returns {type(output).__name__} and no tensor on the calibration inputs")
    return output
