"""What two networks compute on the way to their outputs, compared: hints and attention maps."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mobilekit.errors import BadInputError, UnsupportedError


class Watch:
    """Keeps the outputs of submodules by path while it is entered; of several calls, the last one's.

    Outputs are copied: an activation that works in place would change them. What is no tensor is left out.
    """

    def __init__(self, module: nn.Module, points: Sequence[str]) -> None:
        self.module, self.points = module, points
        self.seen: dict[str, torch.Tensor] = {}

    def __enter__(self) -> dict[str, torch.Tensor]:
        """Begin to watch."""
        self._handles = [
            self.module.get_submodule(point).register_forward_hook(self._keeper(point)) for point in self.points
        ]
        return self.seen

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End."""
        for handle in self._handles:
            handle.remove()

    def _keeper(self, point: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                self.seen.pop(point, None)  # so that the order is that of the last calls
                self.seen[point] = output.clone()

        return keep


def outputs_at(module: nn.Module, points: Sequence[str], example: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of submodules in eval mode without gradients, in the order of their last calls."""
    module = copy.deepcopy(module).eval()
    with torch.no_grad(), Watch(module, points) as seen:
        module(example)
    return seen


def matching_points(student: nn.Module, teacher: nn.Module, example: torch.Tensor) -> tuple[str, ...]:
    """Paths of submodules that both networks have and whose maps have the same height and width, for comparing them.

    Of each size the last one in the student's order, which is the end of a stage; maps of one pixel are left out.
    `example` is an input (N, C, H, W). Raises UnsupportedError where there is none.
    """
    theirs = {path for path, _ in teacher.named_modules()}
    both = [path for path, _ in student.named_modules() if path and path in theirs]
    ours, wanted = (outputs_at(module, both, example) for module in (student, teacher))
    last: dict[tuple[int, ...], str] = {}
    for path, found in ours.items():
        size = tuple(found.shape[2:])
        if found.ndim == 4 and size != (1, 1) and path in wanted and tuple(wanted[path].shape[2:]) == size:
            last[size] = path
    if not last:
        raise UnsupportedError("student and teacher have no maps of the same size at the same module path")
    return tuple(last.values())


def attention_map(features: torch.Tensor) -> torch.Tensor:
    """Where a map (N, C, H, W) is active: the mean of squares over channels, of length one, (N, H W).

    Zagoruyko and Komodakis 2017 (arXiv:1612.03928), F_sum^2. Raises UnsupportedError for what is no map.
    """
    if features.ndim != 4:
        raise UnsupportedError(f"attention is transferred between maps (N, C, H, W), not {tuple(features.shape)}")
    return functional.normalize(features.pow(2).mean(dim=1).flatten(1), dim=1)


def attention_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared distance of two attention maps, the mean over the batch, a scalar from 0 to 2.

    Maps of different sizes are averaged down to the smaller one.
    """
    student, teacher = _alike(student, teacher)
    return (attention_map(student) - attention_map(teacher)).pow(2).sum(dim=1).mean()


class Hints(nn.Module):
    """Small layers that make a student's features as wide as the teacher's (FitNets, Romero et al. 2015).

    `ours` and `theirs` are example features by path, (N, C, H, W) or (N, C): 1 x 1 convolutions or linear layers
    without bias; an identity where the widths agree, as a pruned network's channels are the teacher's still.
    Raises UnsupportedError for other features.
    """

    def __init__(self, ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.points = tuple(ours)
        # a name of a submodule may hold no dots
        self.adapters = nn.ModuleList([_adapter(point, ours[point], theirs[point]) for point in self.points])

    def forward(self, student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean squared error of adapted and wanted features, the mean over the points (arXiv:1412.6550, eq. 3)."""
        errors = []
        for point, adapter in zip(self.points, self.adapters, strict=True):
            found, wanted = _alike(adapter(student[point]), teacher[point])
            errors.append(functional.mse_loss(found, wanted))
        return torch.stack(errors).mean()


def checked_points(student: nn.Module, teacher: nn.Module, points: Sequence[str]) -> tuple[str, ...]:
    """The points themselves. Raises BadInputError where there are none or a network lacks one."""
    if not points:
        raise BadInputError("no feature points were given: name modules that both networks have")
    for name, module in (("student", student), ("teacher", teacher)):
        paths = {path for path, _ in module.named_modules()}
        missing = [point for point in points if point not in paths]
        if missing:
            raise BadInputError(f"the {name} has no module '{missing[0]}' whose features could be compared")
    return tuple(points)


def _adapter(point: str, ours: torch.Tensor, theirs: torch.Tensor) -> nn.Module:
    if ours.ndim != theirs.ndim or ours.ndim not in (2, 4):
        raise UnsupportedError(
            f"the features at '{point}' are {tuple(ours.shape)} and {tuple(theirs.shape)}: hints need (N, C, H, W) "
            "or (N, C) in both networks"
        )
    width, wanted = ours.shape[1], theirs.shape[1]
    if width == wanted:
        return nn.Identity()
    return nn.Linear(width, wanted, bias=False) if ours.ndim == 2 else nn.Conv2d(width, wanted, 1, bias=False)


def _alike(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both maps averaged down to the smaller height and width."""
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return functional.adaptive_avg_pool2d(student, size), functional.adaptive_avg_pool2d(teacher, size)
