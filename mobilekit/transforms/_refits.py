"""Fits grouped substitutes to a layer's own output on calibration inputs: least squares, then gradient steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mobilekit.errors import BadInputError
from mobilekit.transforms._criteria.calls import sampled
from mobilekit.transforms._criteria.moments import RIDGES, TINY
from mobilekit.transforms._criteria.subject import Reader, working_copy
from mobilekit.transforms._links import INPUT, WEIGHTED, Link, sources
from mobilekit.transforms._projections import Kernels
from mobilekit.transforms._wiring import at_tap, composed
from mobilekit.types import Calibration

FOLDS = 5
MOST_STEPS, FEWEST_STEPS = 200, 20
WORK = 10**12
"""Multiply-accumulates that the gradient steps of a layer may take: steps are counted from it."""
RATE = 0.02
"""Of Adam's first step, relative to the root mean square of each weight; falls to zero as a cosine."""


@dataclass(frozen=True)
class Windows:
    """What the old layer reads on calibration inputs: sums over sampled windows (inputs x taps), float64.

    Centred where the layer has a bias: a free bias takes up every mean. `fitted` and `held` are two parts of the rows,
    `gram` is over all of them.
    """

    gram: Tensor
    fitted: Tensor
    held: Tensor
    mean: Tensor


def windows(module: nn.Module, path: str, calibration: Calibration) -> Windows:
    """Sample what the layer at this path reads; every fifth image is held back to choose a ridge.

    Raises UnsupportedError where the layer reads too much to be fitted or is not seen running, and BadInputError for
    inputs that are not finite.
    """
    if not all(bool(batch.isfinite().all()) for batch in calibration.inputs):
        raise BadInputError("the calibration inputs hold values that are not finite")
    images, centred = max(len(batch) for batch in calibration.inputs), False
    sums: list[tuple[int, Tensor, Tensor]] = []
    for _, rows in sampled(working_copy(module), [Reader(f"{path}.weight", 1, 0)], calibration):
        centred = rows.bias is not None
        turn = rows.images if images > 1 else torch.arange(len(rows.images))
        folds = min(FOLDS, images) if images > 1 else FOLDS
        back = (turn % folds == folds - 1).to(rows.inputs.device)
        for place, part in enumerate((rows.inputs[~back].cpu(), rows.inputs[back].cpu())):
            if len(sums) <= place:
                sums.append((0, torch.zeros_like(part[:1]).sum(0), part.new_zeros(part.shape[1], part.shape[1])))
            count, total, gram = sums[place]
            sums[place] = (count + len(part), total + part.sum(0), gram + part.T @ part)
    sums.append((sums[0][0] + sums[1][0], sums[0][1] + sums[1][1], sums[0][2] + sums[1][2]))
    fitted, held, gram = (_centred(*part) if centred else part[2] for part in sums)
    if not bool(gram.isfinite().all()):
        raise BadInputError(f"what '{path}' reads on the calibration inputs is not finite")
    return Windows(gram, fitted, held, sums[2][1] / max(1, sums[2][0]))


def _centred(count: int, total: Tensor, gram: Tensor) -> Tensor:
    return gram - torch.outer(total, total) / max(1, count)


def error(missing: Tensor, gram: Tensor) -> Tensor:
    """Squared error of the outputs for what the kernel lacks (N, C, taps)."""
    flat = missing.flatten(1)
    return ((flat @ gram) * flat).sum()


# ---------------------------------------------------------------- least squares


def least_squares(goal: Tensor, links: Sequence[Link], kernels: Kernels, given: Windows, centre: int) -> Kernels:
    """The last weights on the way to each output, fitted to the old outputs; the others stay.

    `goal` is the old kernel (N, C, taps). Each group of outputs is a system of its own. A ridge holds the weights
    near the given ones and is chosen on the rows held back; a group that no ridge improves there stays.
    """
    found = {name: kernel.clone() for name, kernel in kernels.items()}
    inputs, taps = goal.shape[1:]
    values = composed(links, kernels, inputs, centre)
    for name, rows, outputs, basis in _systems(links, found, values, (taps, centre)):
        missing = (goal - at_tap(values[links[-1].layer], taps, centre))[outputs].flatten(1)
        correction = _correction(missing, basis, given)
        if correction is not None:
            found[name][rows] += correction.reshape(found[name][rows].shape)
    return found


def _systems(
    links: Sequence[Link], kernels: Kernels, values: dict[str, Tensor], place: tuple[int, int]
) -> Iterator[tuple[str, list[int], list[int], Tensor]]:
    """Weights that write outputs, group by group: their layer, its rows, their outputs, and what they multiply.

    The last is (inputs of a row, old inputs x taps).
    """
    by_name = {link.layer: link for link in links}
    wanted: dict[tuple[str, int], tuple[list[int], list[int]]] = {}
    for output, writer in enumerate(writers(links, kernels)):
        # a channel that passes is weighed by the layer behind it
        name, row = (links[-1].layer, output) if by_name[writer[0]].kind == "slice" else writer
        share = len(kernels[name]) // by_name[name].groups
        rows, outputs = wanted.setdefault((name, row // share), ([], []))
        rows.append(row)
        outputs.append(output)
    before = _read_by(links)
    for (name, group), (rows, outputs) in wanted.items():
        kernel, read = kernels[name], values[before[name]]
        inside = kernel.shape[1]
        part = read[group * inside : (group + 1) * inside]
        if by_name[name].spatial and part.shape[2] == 1:  # the window of each channel that it reads
            basis = torch.einsum("ic,tu->itcu", part[..., 0], torch.eye(place[0], dtype=part.dtype))
            yield name, rows, outputs, basis.flatten(2).flatten(0, 1)
        else:
            yield name, rows, outputs, at_tap(part, *place).flatten(1)


def _read_by(links: Sequence[Link]) -> dict[str, str]:
    return {link.layer: reads[0] for link, reads in zip(links, sources(links), strict=True)}


def writers(links: Sequence[Link], kernels: Kernels) -> list[tuple[str, int]]:
    """For each output the layer, and its row, that writes it: behind it channels are only moved or scaled."""
    made: dict[str, list[tuple[str, int]]] = {INPUT: []}
    for link, reads in zip(links, sources(links), strict=True):
        if link.kind == "concat":
            made[link.layer] = [each for name in reads for each in made[name]]
        elif link.kind == "shuffle":
            part = made[reads[0]]
            share = len(part) // link.groups
            made[link.layer] = [part[group * share + i] for i in range(share) for group in range(link.groups)]
        elif link.kind == "slice":
            made[link.layer] = [(link.layer, row) for row in range(link.width or 0)]
        elif link.groups == len(kernels[link.layer]) > 1 and not link.spatial and kernels[link.layer].shape[1] == 1:
            made[link.layer] = made[reads[0]]
        else:
            made[link.layer] = [(link.layer, row) for row in range(len(kernels[link.layer]))]
    return made[links[-1].layer]


def _correction(missing: Tensor, basis: Tensor, given: Windows) -> Tensor | None:
    """What to add to the weights (rows, inputs of a row), or None where nothing is gained."""

    def products(gram: Tensor) -> tuple[Tensor, Tensor]:
        read = basis @ gram
        return read @ basis.T, read @ missing.T

    def solved(inner: Tensor, cross: Tensor, share: float) -> Tensor:
        penalised = inner.clone()
        penalised.diagonal().add_(max(share * float(inner.diagonal().mean()), TINY))
        solution: Tensor = torch.linalg.solve(penalised, cross).T
        return solution

    fitted, (inner, cross) = products(given.fitted), products(given.held)
    changes = {}
    for share in RIDGES:
        correction = solved(*fitted, share)
        changes[share] = float(((correction @ inner) * correction).sum() - 2 * (correction * cross.T).sum())
    best = min(changes, key=lambda share: changes[share])
    return solved(*products(given.gram), best) if changes[best] < 0 else None


# ---------------------------------------------------------------- gradient steps


def trained(goal: Tensor, links: Sequence[Link], kernels: Kernels, given: Windows, centre: int) -> Kernels:
    """All weights after Adam on the mean squared error of the old outputs, or the given ones where none are better.

    `goal` is the old kernel (N, C, taps). The error on the sampled windows is a quadratic form of the kernel that the
    links amount to, so that every step sees all of them, in float64 and without a draw.
    """
    outputs, inputs, taps = goal.shape
    weights = {link.layer: kernels[link.layer].clone().requires_grad_() for link in links if link.kind in WEIGHTED}
    cost = 3 * outputs * (inputs * taps) ** 2
    steps = max(FEWEST_STEPS, min(MOST_STEPS, WORK // cost))
    whole = error(goal, given.gram).clamp(min=TINY)
    rates = [{"params": [w], "lr": RATE * float(w.detach().square().mean().sqrt() + TINY)} for w in weights.values()]
    adam = torch.optim.Adam(rates)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    best, least = {name: w.detach().clone() for name, w in weights.items()}, float("inf")
    with torch.enable_grad():
        for step in range(steps + 1):
            effective = at_tap(composed(links, weights, inputs, centre)[links[-1].layer], taps, centre)
            loss = error(goal - effective, given.gram) / whole
            if float(loss.detach()) < least:
                best, least = {name: w.detach().clone() for name, w in weights.items()}, float(loss.detach())
            if step < steps:
                adam.zero_grad()
                torch.autograd.backward(loss)
                adam.step()
                schedule.step()
    return best
