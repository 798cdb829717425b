"""The cells of the comparison with peers: each is computed alone, on the same terms for every method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lab
import numpy as np
import torch
from peer_methods import NetAdapt, Peer, peers, written
from torch import nn

from mobilekit import profiles, registry
from mobilekit.errors import UnsupportedError
from mobilekit.evaluate import use_quicker_threads
from mobilekit.pipeline import Listener, Request, run
from mobilekit.pipeline.pricing import measured_profile
from mobilekit.types import Budget, Candidate, Precision
from mobilekit.workloads import fashion_mnist

OURS = "mobilekit"
NETWORKS = ("resnet", "mobilenet", "vgg")
PACKAGES = (*lab.PACKAGES, "torch-pruning")
FILES = lab.CACHE / "peers"
WORKLOADS = Path(__file__).parent / "workloads"
PARTS = 32
"""Strengths are shares of channels in these parts."""
MOST_TRIED = 9
"""Files that the search for a strength measures at most."""
CLOSE = 1.05
"""A network this little faster than asked for is good enough; one further off is looked for on a finer grid."""
SEARCH_SECONDS, FINAL_SECONDS = 3.0, 10.0
SLACK = 0.95
"""Measured speedups repeat within some percent: a file this far below what was asked for still counts."""
SEARCH_IMAGES = 64
"""Calibrate files of the search: latency does not depend on the ranges."""
SAMPLES_KEPT = 200
LOSS_IN_INT8, GAIN_IN_INT8 = 0.005, 1.1
"""Where int8 costs more accuracy, or gains less speed, than this on the original, peers get float files too."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One training: a network, where it runs, by which method, how fast it has to be, which seed, how long."""

    network: str
    runtime: str
    method: str
    precision: str
    """`own` where the method chooses by itself."""
    speedup: float
    seed: int
    minutes: float

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        place = f"{self.network} {self.runtime} {self.method} {self.precision}"
        return f"{place} {self.speedup:g}x seed {self.seed} {self.minutes:g} min"

    @property
    def strength_key(self) -> str:
        """The name of the strength at which the method's files are as fast as asked: without training and seed."""
        method = peers()[self.method].shapes_of or self.method
        return f"strength {self.network} {self.runtime} {method} {self.precision} {self.speedup:g}x"

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return FILES / "".join(letter if letter.isalnum() else "-" for letter in self.key)


def start_of(network: str) -> Candidate:
    """The trained network that every method starts from."""
    return lab.candidate(lab.trained(network), network)


def original(network: str, runtime: str) -> Path:
    """The file that speedups are over: the trained network in fp32."""
    path = (FILES / network / "original").with_suffix(registry.runtime(runtime).suffix)
    return path if path.exists() else lab.exported(start_of(network), runtime, "fp32", path)


def machine() -> Row:
    """What a result was made on and with."""
    return {
        "machine": registry.device("host").info().soc,
        "versions": {package: version(package) for package in PACKAGES},
        "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }


# ---------------------------------------------------------------- before any training


def quantised(network: str, runtime: str) -> Row:
    """What int8 alone does to the trained network: by this the precisions of peers are chosen."""
    start, base = start_of(network), original(network, runtime)
    file = lab.exported(start, runtime, "int8", FILES / network / "int8", list(fashion_mnist.calibration_data()))
    found = lab.compared(base, file, runtime, FINAL_SECONDS)
    accuracy = {"accuracy": lab.file_accuracy(runtime, base), "int8_accuracy": lab.file_accuracy(runtime, file)}
    return {"network": network, "runtime": runtime, **accuracy, **found, **machine()}


def precisions(found: Mapping[str, Any]) -> tuple[Precision, ...]:
    """Those that peers are tried in."""
    lost, ratio = found["accuracy"] - found["int8_accuracy"], found["ratio"]
    return ("int8", "fp32") if lost > LOSS_IN_INT8 or ratio < GAIN_IN_INT8 else ("int8",)


@dataclass(frozen=True)
class Tried:
    """A strength as it was measured."""

    part: int
    """Channels that stay, in parts of PARTS."""
    grid: int
    macs: int
    params: int
    ratio: float


class Search:
    """The strength at which a peer's files are just fast enough, as measured: the largest network that is."""

    def __init__(self, cell: Cell, known: Iterable[Mapping[str, Any]]) -> None:
        self.cell, self.peer = cell, peers()[cell.method]
        self.start, self.base = start_of(cell.network), original(cell.network, cell.runtime)
        self.known = {(one["macs"], one["params"]): one["ratio"] for one in known}
        self.tried: list[Tried] = []
        self.measured = 0

    def run(self) -> Row:
        """Bisection, on finer grids of widths where the runtime's own multiple does not come close."""
        entry = measured_profile(registry.device("host"), profiles.load("host"), lambda *_: None)[0].runtime(
            self.cell.runtime
        )
        assert entry is not None
        multiple = entry.channel_multiple
        best: Tried | None = self._at(PARTS, multiple)
        if best is not None and best.ratio < self.cell.speedup:
            best = self._bisected([grid for grid in (multiple, multiple // 2, multiple // 4) if grid])
        row = {"measured": self.measured, "tried": [asdict(one) for one in self.tried]}
        if best is None:
            best = max(self.tried, key=lambda one: one.ratio)
            if best.ratio < SLACK * self.cell.speedup:
                return {**row, "failure": f"it reaches {best.ratio:.2f} times at most, in {self.cell.precision}"}
        return {**row, **asdict(best)}

    def _bisected(self, grids: Sequence[int]) -> Tried | None:
        best: Tried | None = None
        for grid in grids:
            low, high = best.part if best else 0, PARTS
            while high - low > 1 and self.measured < MOST_TRIED:
                middle = (low + high) // 2
                one = self._at(middle, grid)
                if one.ratio < self.cell.speedup:
                    high = middle
                    continue
                low = middle
                if best is None or one.macs > best.macs:
                    best = one
            if best is not None and best.ratio <= CLOSE * self.cell.speedup:
                break
        return best

    def _at(self, part: int, grid: int) -> Tried:
        module = self.peer.shrink(self.start, part / PARTS, grid) if self.peer.shrink else self.start.module
        subject = lab.candidate(module, self.cell.network)
        params = sum(parameter.numel() for parameter in module.parameters())
        ratio = self.known.get((subject.network.macs, params))
        if ratio is None:
            ratio = untrained_ratio(self.peer, subject, self.cell, self.base)
            self.known[subject.network.macs, params] = ratio
            self.measured += 1
        self.tried.append(Tried(part, grid, subject.network.macs, params, ratio))
        lab.say(f"  {part}/{PARTS} of the channels in multiples of {grid}: {ratio:.2f}x")
        return self.tried[-1]


def confirmed(cell: Cell, found: Mapping[str, Any]) -> Row:
    """The strength as it is measured now, for longer; a step more of it until that is as fast as the cell asks.

    Machines change their speed from minute to minute, and int8 and float gain unlike by it.
    """
    peer, start, base = peers()[cell.method], start_of(cell.network), original(cell.network, cell.runtime)
    assert peer.shrink is not None
    measured: dict[int, float] = {}
    grid, fastest = found["grid"], (0.0, 0)
    for part in range(found["part"], 0, -1):
        subject = lab.candidate(peer.shrink(start, part / PARTS, grid), cell.network)
        macs = subject.network.macs
        if macs not in measured:
            measured[macs] = untrained_ratio(peer, subject, cell, base, FINAL_SECONDS)
            lab.say(f"  {part}/{PARTS} of the channels in multiples of {grid}: {measured[macs]:.2f}x")
        fastest = max(fastest, (measured[macs], part))
        if measured[macs] >= cell.speedup:
            break
    ratio, part = fastest
    if ratio < SLACK * cell.speedup:
        raise UnsupportedError(f"it reaches {ratio:.2f} times at most, in {cell.precision}")
    return {"part": part, "grid": grid, "untrained_ratio": ratio}


def untrained_ratio(peer: Peer, subject: Candidate, cell: Cell, base: Path, seconds: float = SEARCH_SECONDS) -> float:
    """How many times faster than the original a network's file is, whatever its weights."""
    path = cell.folder.with_name(cell.folder.name + "-untrained")
    images = [fashion_mnist.calibration_data()[0][:SEARCH_IMAGES]]
    file = written(peer, subject, cell.runtime, cell.precision, path, images)
    return lab.timed(base, file, cell.runtime, seconds).ratio


def strength(cell: Cell, known: Sequence[Mapping[str, Any]]) -> Row:
    """The strength of a peer that makes its untrained file as fast as the cell asks.

    `known` are strengths that earlier searches for other speedups have measured.
    """
    return {**Search(cell, known).run(), **machine()}


# ---------------------------------------------------------------- trainings


def by_peer(cell: Cell, found: Mapping[str, Any] | None, threads: int) -> Row:
    """A peer's network at the strength that was found, trained, written, and judged by its file."""
    began, peer, start = time.monotonic(), peers()[cell.method], start_of(cell.network)
    base, seconds, notes = original(cell.network, cell.runtime), 60 * cell.minutes, Row()
    torch.manual_seed(cell.seed)
    if peer.shrink is None:

        def timed(module: nn.Module) -> float:
            return untrained_ratio(peer, lab.candidate(module, cell.network), cell, base)

        adapted = NetAdapt(cell.runtime, cell.precision, cell.speedup, cell.seed, seconds, timed)
        module = adapted.run(start).module
        notes = {"short_seconds": adapted.spent, "short_steps": adapted.steps, "history": adapted.history}
    else:
        assert found is not None
        notes = confirmed(cell, found)
        module = peer.shrink(start, notes["part"] / PARTS, notes["grid"])
    if threads > 1:
        use_quicker_threads(module, lab.calibration().inputs[0])
    seconds -= notes.get("short_seconds", 0.0)
    tuned = lab.tuned_for(module, seconds, cell.seed, **peer.recipe)
    notes |= {"recipe": dict(peer.recipe), "training_seconds": seconds, "steps": tuned.steps}
    subject = lab.candidate(tuned.module, cell.network)
    file = written(peer, subject, cell.runtime, cell.precision, cell.folder / cell.method)
    notes |= {"float_accuracy": lab.accuracy(tuned.module), "macs": subject.network.macs}
    notes["params"] = sum(parameter.numel() for parameter in tuned.module.parameters())
    return {**judged(cell, file), **notes, "seconds": time.monotonic() - began}


def by_mobilekit(cell: Cell) -> Row:
    """What `mobilekit plan` makes of the workload for the same minutes of training; a run that was killed goes on."""
    began, out = time.monotonic(), cell.folder / "run"
    request = Request(
        workload=str(WORKLOADS / f"{cell.network}.py"),
        profile="host",
        budget=Budget(speedup=cell.speedup),
        runtime=cell.runtime,
        seed=cell.seed,
        train_seconds=60 * cell.minutes,
    )
    report = run(request, out, Listener(say=lab.say), resume=True)
    if report.result.path is None:
        best = math.nan if report.best_reachable_ms is None else report.best_reachable_ms
        raise UnsupportedError(f"{report.verdict}: the fastest that was measured takes {best:.3f} ms")
    stages = {stage.name: round(stage.seconds, 1) for stage in report.stages}
    return {
        **judged(cell, out / report.result.path),
        "verdict": report.verdict,
        "own_ratio": report.ratio,
        "rounds": len(report.rounds),
        "plan": [f"{row.transform} {row.where}" for row in report.plan],
        "file_precision": report.result.precision,
        "macs": report.result.macs,
        "params": report.result.params,
        "training_seconds": stages.get("training", 0.0),
        "stages": stages,
        "failures": [f"{failure.subject}: {failure.message}" for failure in report.failures],
        "seconds": time.monotonic() - began,
    }


def judged(cell: Cell, file: Path) -> Row:
    """Accuracy of the file, and its speed beside the original's, both run in turn."""
    found = lab.timed(original(cell.network, cell.runtime), file, cell.runtime, FINAL_SECONDS)
    before, after = found.baseline.cpu_samples_ms, found.candidate.cpu_samples_ms
    shown = np.linspace(0, len(after) - 1, min(len(after), SAMPLES_KEPT)).astype(int)
    return {
        **asdict(cell),
        "accuracy": lab.file_accuracy(cell.runtime, file),
        "ratio": found.ratio,
        "low": found.interval[0],
        "high": found.interval[1],
        "ms": float(np.median(after)),
        "original_ms": float(np.median(before)),
        "rounds_timed": len(after),
        "samples_us": [[round(1000 * before[i], 1), round(1000 * after[i], 1)] for i in shown],
        "bytes": file.stat().st_size,
        **machine(),
    }


WORK: dict[str, Callable[..., Row]] = {
    "quantised": quantised,
    "strength": strength,
    "peer": by_peer,
    OURS: by_mobilekit,
}
"""What a process of its own computes, by name."""
