"""Accuracy of modules and of exported files, and how close a file's outputs are to the module's."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from mobilekit.errors import BadInputError, MobilekitError, UnsupportedError
from mobilekit.exportable import Arrays
from mobilekit.interfaces import Runtime, Session
from mobilekit.probes import probes
from mobilekit.signature import input_names, named_outputs
from mobilekit.types import Parity, ParityCheck, ProbeKind
from mobilekit.workload import Workload, sentence

NOT_FINITE = 1e6
"""Worse than any real divergence, and a number that JSON can hold."""
BATCH_ELEMENTS = 1_000_000
"""Input elements of one batch: larger ones fall out of the caches and cost page faults, not less time."""


class SessionModule(nn.Module):
    """An exported file of one input and one output as a module: the user's `evaluate(model)` judges the file itself."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        # Evaluation loops ask the first parameter for the device.
        self.nothing = nn.Parameter(torch.zeros(0), requires_grad=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Run the file on a float32 batch (N, C, H, W)."""
        (output,) = self.session([batch.detach().cpu().numpy()])
        return torch.from_numpy(output)


def accuracy(workload: Workload, module: nn.Module) -> float:
    """What the workload's `evaluate` returns, or agreement with the original on held-back inputs.

    Raises MobilekitError where `evaluate` fails or returns something that is no finite number.
    """
    if workload.evaluate is None:
        inputs = torch.cat(workload.held_back)
        reference, other = outputs(workload.module, inputs), outputs(module, inputs)
        if classes(reference) > 1:
            return top1_agreement(reference, other)
        return max(0.0, 1.0 - divergence(reference, other))
    try:
        with torch.inference_mode():
            found = workload.evaluate(module)
    except Exception as error:
        raise MobilekitError(f"evaluate() of '{workload.spec}' fails: {sentence(error)}") from error
    finally:
        module.eval()  # whatever the user's loop did
    try:
        value = float(found)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not math.isfinite(value):
        shown = " ".join(repr(found).split())[:80]
        raise MobilekitError(f"evaluate() of '{workload.spec}' returned {shown}, which is no accuracy")
    return value


def outputs(module: nn.Module, inputs: torch.Tensor) -> np.ndarray:
    """The module's outputs for inputs (N, C, H, W), in batches, without gradients."""
    size = batch_size(inputs)
    with torch.inference_mode():
        return np.concatenate([module(batch).float().cpu().numpy() for batch in torch.split(inputs, size)])


def named_results(module: nn.Module, inputs: Arrays) -> dict[str, np.ndarray]:
    """The module's outputs by name, each (N, ...), for a float32 array (N, ...) of each input.

    Raises BadInputError where the first axis of an output is not the batch.
    """
    names = input_names(module, len(inputs))
    tensors = [torch.from_numpy(array) for array in inputs]
    found: dict[str, list[np.ndarray]] = {}
    with torch.inference_mode():
        for batch in zip(*(torch.split(part, batch_size(tensors[0])) for part in tensors), strict=True):
            for name, value in named_outputs(module(*batch), names).items():
                if len(value) != len(batch[0]):
                    raise BadInputError(
                        f"the model returns {name} of {len(value)} rows for {len(batch[0])} samples: the first axis of "
                        "every output must be the batch"
                    )
                found.setdefault(name, []).append(value.float().cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def batch_size(inputs: torch.Tensor) -> int:
    """Samples that are run at once."""
    return min(64, max(4, BATCH_ELEMENTS // inputs[0].numel()))


def use_quicker_threads(module: nn.Module, inputs: torch.Tensor) -> int:
    """Let torch use one thread or all of them, whichever runs the module sooner just now; returns the number.

    On a machine whose other cores are busy, threads that wait for each other are several times slower than one.
    """
    everything = os.cpu_count() or 1
    inputs = inputs[: batch_size(inputs)]
    seconds = {}
    for threads in (everything, 1):
        torch.set_num_threads(threads)
        with torch.inference_mode():
            module(inputs)  # the first run with other threads pays for starting them
            started = time.monotonic()
            for _ in range(3):
                module(inputs)
            seconds[threads] = time.monotonic() - started
    best = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(best)
    return best


def classes(values: np.ndarray) -> int:
    """Entries along axis 1: with fewer than two there is nothing to be the largest of."""
    return values.shape[1] if values.ndim > 1 else 1


def top1_agreement(reference: np.ndarray, other: np.ndarray) -> float:
    """Share of samples whose largest value along axis 1 is at the same index (pixelwise for maps)."""
    return float((reference.argmax(axis=1) == other.argmax(axis=1)).mean())


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """How far outputs are from the original's: mean KL divergence for (N, classes), else relative squared error.

    Zero for equal outputs; `NOT_FINITE` where an output is not finite.
    """
    if not np.isfinite(other).all():
        return NOT_FINITE
    if reference.ndim == 2 and reference.shape[1] > 1:
        p, q = (_log_softmax(v.astype(np.float64)) for v in (reference, other))
        return float(max(0.0, (np.exp(p) * (p - q)).sum(axis=1).mean()))
    scale = max(float(np.square(reference, dtype=np.float64).sum()), np.finfo(np.float64).tiny)
    return float(np.square(reference - other, dtype=np.float64).sum() / scale)


def parity(reference: np.ndarray, other: np.ndarray, status: Literal["executed", "evaluated"] = "executed") -> Parity:
    """Compare a file's outputs with the module's; a ratio that would be infinite (bit-exact) is None."""
    ref, out = reference.astype(np.float64), other.astype(np.float64)
    error = np.square(ref - out).mean()
    norms = np.linalg.norm(ref) * np.linalg.norm(out)
    return Parity(
        status=status,
        sqnr_db=float(10 * np.log10(np.square(ref).mean() / error)) if error > 0 and np.any(ref) else None,
        cosine=float(np.vdot(ref, out) / norms) if norms > 0 else None,
        top1_agreement=top1_agreement(reference, other) if classes(reference) > 1 else None,
        max_abs_error=float(np.abs(ref - out).max()),
        samples=len(reference),
    )


def file_parity(runtime: Runtime, path: Path, module: nn.Module, inputs: Sequence[Arrays]) -> Parity:
    """Open a file, run it on batches and compare with the module.

    The status is what `runtime.execution` says, and structure-only, with the reason, where the file cannot run here.
    It is also tried on inputs at the edges (`probes`), one check for each kind. Of several outputs the one that is
    furthest from the module's decides, and is named in the note. Raises MobilekitError where an output is not finite on
    inputs for which the module's is.
    """
    try:
        session = runtime.open(path)
    except UnsupportedError as error:
        return Parity(status="structure-only", note=str(error))
    whole = tuple(np.concatenate(batches) for batches in zip(*inputs, strict=True))
    compared = _compared(path, session, module, "calibration", whole)
    rows, powers = {name: parity(*pair, runtime.execution) for name, pair in compared.items()}, _powers(compared)
    checks = [_check("calibration", compared, powers)]
    for kind, given in probes(whole).items():
        found = _compared(path, session, module, kind, given)
        if found:
            checks.append(_check(kind, found, powers))
    worst = min(rows, key=lambda name: _closeness(rows[name].sqnr_db))
    note = f"of the output {worst}, the furthest of {len(rows)}" if len(rows) > 1 else ""
    return rows[worst].model_copy(update={"note": note, "checks": tuple(checks)})


Compared = dict[str, tuple[np.ndarray, np.ndarray]]
"""Name of an output -> what the module gives and what the file gives."""


def _compared(path: Path, session: Session, module: nn.Module, kind: ProbeKind, given: Arrays) -> Compared:
    """Outputs for inputs of one kind; nothing where the module's own are not finite."""
    reference = named_results(module, given)
    if not all(np.isfinite(values).all() for values in reference.values()):
        return {}
    found = session(given)
    if not all(np.isfinite(values).all() for values in found):
        raise MobilekitError(f"{path.name} gives values that are not finite on {kind} inputs")
    return {name: (reference[name], values) for name, values in zip(reference, found, strict=True)}


def _powers(compared: Compared) -> dict[str, float]:
    return {name: float(np.square(reference, dtype=np.float64).mean()) for name, (reference, _) in compared.items()}


def _check(kind: ProbeKind, compared: Compared, powers: dict[str, float]) -> ParityCheck:
    """The output that is furthest, beside its power on calibration inputs."""
    checks = []
    own = _powers(compared)
    for name, (reference, found) in compared.items():
        row = parity(reference, found)
        power = max(own[name], powers[name])
        error = float(np.square(reference.astype(np.float64) - found).mean())
        judged = None if error == 0 else 10 * math.log10(max(power, sys.float_info.min) / error)
        figures = row.model_dump(include={"sqnr_db", "cosine", "top1_agreement", "max_abs_error", "samples"})
        checks.append(ParityCheck(kind=kind, output=name, judged_db=judged, **figures))
    return min(checks, key=lambda check: _closeness(check.judged_db))


def _closeness(ratio_db: float | None) -> float:
    return math.inf if ratio_db is None else ratio_db


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
