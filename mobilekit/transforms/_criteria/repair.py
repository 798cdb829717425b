"""Least-squares reconstruction: a group's readers give their former outputs from the channels that are left.

The last step of channel pruning in He, Zhang, Sun 2017 (arXiv:1707.06168) and ThiNet (arXiv:1707.06342).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mobilekit.errors import BadInputError
from mobilekit.transforms._criteria.calls import Rows, as_matrix, as_weight, sampled
from mobilekit.transforms._criteria.moments import Moments, best_correction
from mobilekit.transforms._criteria.subject import Reader, Subject, working_copy

ROUNDING = 1e-12
"""Squared errors below this part of the outputs' squares come from rounding: there is nothing to fit."""
FOLDS = 5


def refit(slim: nn.Module, subject: Subject, kept: Sequence[int]) -> None:
    """Fit weights and biases of the readers in `slim`, the subject's module without the channels that are not kept.

    Readers are fitted in the order in which they run, each to the output of the module before pruning, from the
    inputs that it has in the pruned network after the repairs so far. A ridge, chosen on images that are not fitted,
    holds the weights near the old ones; a layer that the inputs cannot improve stays as it is. A bias is fitted
    where the layer has one; the others stay without.
    Raises UnsupportedError where there is no data or no reader, BadInputError where values are not finite.
    """
    data = subject.data("least-squares repair")
    targets: dict[str, list[torch.Tensor]] = {}
    for name, rows in sampled(working_copy(subject.module), subject.readers, data):
        targets.setdefault(name, []).append(rows.outputs)
    readers = {reader.name: reader for reader in subject.readers}
    twin, images = working_copy(slim), max(len(batch) for batch in data.inputs)
    for name, wanted in targets.items():
        reader = readers[name]
        outputs = _kept_outputs(subject, reader, kept)
        fit, held, lacking, energy = Moments(), Moments(), 0.0, 0.0
        for (_, rows), target in zip(sampled(twin, [reader], data), wanted, strict=True):
            goal = target if outputs is None else target[:, outputs]
            error = goal - rows.outputs
            back = _held_back(rows, images)
            fit.add(rows, error, ~back)
            held.add(rows, error, back)
            lacking, energy = lacking + float(error.square().sum()), energy + float(goal.square().sum())
        if lacking > ROUNDING * energy:
            _correct(twin, reader, fit, held)
    _take_over(slim, twin)


def _kept_outputs(subject: Subject, reader: Reader, kept: Sequence[int]) -> torch.Tensor | None:
    """Outputs that are left where the reader writes the group too (a layer used twice); None: all."""
    axis = subject.network.axes[reader.name].get(reader.out_dim)
    if axis is None or subject.group not in axis.groups:
        return None
    gone = torch.ones(subject.channels, dtype=torch.bool)
    gone[list(kept)] = False
    stays = torch.ones(subject.network.width(axis.groups) * axis.repeat, dtype=torch.bool)
    stays[subject.entries(axis)[gone].flatten()] = False
    return stays.nonzero().flatten()


def _held_back(rows: Rows, images: int) -> torch.Tensor:
    """Rows that choose the ridge, bool (rows,): those of every fifth image, or every fifth row of a single one."""
    turn = rows.images if images > 1 else torch.arange(len(rows.images), device=rows.images.device)
    folds = min(FOLDS, images) if images > 1 else FOLDS
    return turn % folds == folds - 1


def _correct(module: nn.Module, reader: Reader, fit: Moments, held: Moments) -> None:
    weight = module.get_parameter(reader.name)
    correction = best_correction(fit, held)
    if correction is None:
        return
    fitted = as_matrix(weight, reader.out_dim) + correction
    if not bool(fitted.isfinite().all()):
        raise BadInputError(f"the outputs of {reader.name} on the calibration inputs are not finite")
    with torch.no_grad():
        weight.copy_(as_weight(fitted, weight, reader.out_dim))
        for bias in fit.biases.values():
            bias.add_(fit.offset(bias, correction))


def _take_over(target: nn.Module, source: nn.Module) -> None:
    """Copy values in place: frozen parameters stay frozen, tied ones tied, and half precision half."""
    values = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if not torch.equal(parameter.to(values[name].dtype), values[name]):
                parameter.copy_(values[name])
