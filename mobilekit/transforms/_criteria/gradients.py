"""First-order Taylor importance (Molchanov et al. 2019, arXiv:1906.10771)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.transforms._criteria.batch_norm import gammas
from mobilekit.transforms._criteria.subject import Subject, batches, run, working_copy
from mobilekit.types import Calibration


def taylor(subject: Subject) -> torch.Tensor:
    """Squared sum of weight x gradient over the group's producers and scales, mean over the batches, (channels,).

    First-order importance of a group of weights (Molchanov et al. 2019, arXiv:1906.10771, equation 8).
    The loss is the workload's where there are labels (cross entropy where it has none of its own), else the cross
    entropy to labels drawn from the model's own output by the calibration's seed.
    Raises UnsupportedError where there are no calibration inputs, no classes to draw from, or no gradient.
    """
    data = subject.data("taylor")
    with torch.inference_mode(mode=False), torch.enable_grad():
        module = working_copy(subject.module).requires_grad_(requires_grad=False)
        parts = _parts(Subject(module, subject.network, subject.group, subject.width))
        tensors = [part.requires_grad_() for part, _, _ in parts]
        total = torch.zeros(subject.channels, dtype=torch.float64)
        reached = False
        generator = torch.Generator().manual_seed(data.seed)
        for index, batch in enumerate(batches(module, data)):
            loss = _loss(run(module, batch), data, index, generator)
            if not loss.requires_grad:
                continue
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
            sums = torch.zeros_like(total)
            for (part, dim, entries), gradient in zip(parts, gradients, strict=True):
                if gradient is not None:
                    reached = True
                    product = (part.detach() * gradient).to("cpu", torch.float64).movedim(dim, 0)
                    sums += product[entries].flatten(1).sum(dim=1)
            total += sums**2
    if not reached:
        raise UnsupportedError(f"{subject.group} cannot be pruned by taylor: no gradient of the loss reaches it")
    return total / len(data.inputs)


def _parts(subject: Subject) -> list[tuple[torch.nn.Parameter, int, torch.Tensor]]:
    """Parameters that make the channels: axis, and entries of each channel along it, int64 (channels, entries)."""
    found = [
        (subject.module.get_parameter(p.parameter), p.dim, torch.arange(subject.channels)[:, None])
        for p in subject.network.groups[subject.group].producers
    ]
    return found + [(gamma, 0, entries) for gamma, entries in gammas(subject)]


def _loss(output: torch.Tensor, data: Calibration, index: int, generator: torch.Generator) -> torch.Tensor:
    """The loss of one batch, a scalar."""
    if data.targets is None:
        return functional.cross_entropy(output, _drawn(output.detach(), generator))
    if len(data.targets) != len(data.inputs):
        raise BadInputError(f"there are {len(data.inputs)} calibration batches and {len(data.targets)} of targets")
    target: Any = data.targets[index]
    if isinstance(target, torch.Tensor):
        target = target.to(output.device)
    try:
        loss: torch.Tensor = (data.loss or functional.cross_entropy)(output, target)
    except Exception as error:  # the loss is the user's code
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInputError(f"the loss fails on the calibration batch {index + 1}: {reason}") from error
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise BadInputError("the loss must be a tensor with one value to take gradients of")
    return loss.reshape(())


def _drawn(output: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Labels drawn from the softmax over axis 1 of an output (N, K, ...): int64 (N, ...)."""
    if output.ndim < 2 or output.shape[1] < 2:
        raise UnsupportedError(
            f"taylor needs labels and a loss: the output {tuple(output.shape)} has no classes to draw labels from"
        )
    chances = output.float().softmax(dim=1).movedim(1, -1).cpu()
    if not bool(chances.isfinite().all()):
        raise BadInputError("the model's output on the calibration inputs is not finite")
    drawn = torch.multinomial(chances.reshape(-1, output.shape[1]), 1, generator=generator)
    return drawn.reshape(chances.shape[:-1]).to(output.device)
