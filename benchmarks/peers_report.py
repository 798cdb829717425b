"""The table of the comparison with peers, from the lines that `benchmarks/peers.py run` has written."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lab
from peer_cells import FINAL_SECONDS, GAIN_IN_INT8, LOSS_IN_INT8, NETWORKS, OURS, PARTS, SAMPLES_KEPT, SLACK
from peer_methods import FINE_TUNING, FROM_SCRATCH, PRUNING_STEPS, NetAdapt, peers

from mobilekit.pipeline import trial
from mobilekit.workloads import fashion_mnist

SPEEDUPS = (2.0, 4.0, 8.0)
CHECKED, QUICKER, POINTS = 4.0, 1.3, 0.01
"""At this speedup mobilekit is to be so many times faster at the best peer's accuracy, or so much more accurate."""
SEEDS = 3

Row = Mapping[str, Any]


def text(known: Mapping[str, Row], minutes: float) -> str:
    """The whole document: a point without cells says so."""
    results = Results(known, minutes)
    places = [Place(results, network, runtime) for network in NETWORKS for runtime in lab.RUNTIMES]
    lines = [f"# mobilekit and its peers, training of {minutes:g} min each", "", *head(results), ""]
    lines += [*summary(places), ""]
    for place in places:
        lines += [*place.lines(), ""]
    return "\n".join(lines).rstrip()


# ---------------------------------------------------------------- what was found


@dataclass(frozen=True)
class Point:
    """A method at a speedup: the seeds whose file is fast enough, those whose is not, and why there are no others."""

    fit: tuple[Row, ...]
    slow: tuple[Row, ...]
    reasons: tuple[str, ...]

    @property
    def ran(self) -> bool:
        """Whether there is anything to say."""
        return bool(self.fit or self.slow or self.reasons)

    @property
    def accuracy(self) -> float:
        """Mean of the seeds that count."""
        return statistics.fmean(row["accuracy"] for row in self.fit)

    @property
    def ratio(self) -> float:
        """Mean measured speedup of the seeds that count."""
        return statistics.fmean(row["ratio"] for row in self.fit)

    def shown(self) -> str:
        """The entry of the table."""
        if self.fit:
            spread = f" ± {100 * statistics.stdev(row['accuracy'] for row in self.fit):.2f}" if self.fit[1:] else ""
            used = "/".join(sorted({str(row.get("file_precision", row["precision"])) for row in self.fit}))
            found = f"{100 * self.accuracy:.2f}{spread} ({len(self.fit)}) at {self.ratio:.2f}x {used}"
            return found + (f"; {len(self.slow)} too slow" if self.slow else "")
        if self.slow:
            return f"too slow: {100 * self.slow[0]['accuracy']:.2f} at {self.slow[0]['ratio']:.2f}x"
        return "; ".join(self.reasons) or "not run"


class Results:
    """Rows by what they are about."""

    def __init__(self, known: Mapping[str, Row], minutes: float) -> None:
        self.known, self.minutes = known, minutes
        suffix = f" {minutes:g} min"
        self.trained = [row for key, row in known.items() if key.endswith(suffix) and "accuracy" in row]

    def point(self, network: str, runtime: str, method: str, speedup: float) -> Point:
        """A peer's is that of the precision in which it is more accurate."""
        found = [self._of(network, runtime, method, precision, speedup) for precision in ("own", "int8", "fp32")]
        fit = [point for point in found if point.fit]
        if fit:
            return max(fit, key=lambda point: point.accuracy)
        reasons = tuple(dict.fromkeys(reason for point in found for reason in point.reasons))
        return Point((), tuple(row for point in found for row in point.slow), reasons)

    def _of(self, network: str, runtime: str, method: str, precision: str, speedup: float) -> Point:
        asked = (network, runtime, method, precision, speedup)
        rows = [
            row
            for row in self.trained
            if tuple(row[part] for part in ("network", "runtime", "method", "precision", "speedup")) == asked
        ]
        fit = tuple(row for row in rows if row["ratio"] >= SLACK * speedup)
        shapes = peers()[method].shapes_of or method if method != OURS else OURS
        keys = [f"{network} {runtime} {method} {precision} {speedup:g}x "]
        keys.append(f"strength {network} {runtime} {shapes} {precision} {speedup:g}x")
        reasons = (row["failure"] for key, row in self.known.items() if key.startswith(tuple(keys)) if "failure" in row)
        return Point(fit, tuple(row for row in rows if row not in fit), tuple(dict.fromkeys(reasons)))

    def conditions(self) -> Iterable[str]:
        """Machines and versions of all rows: more than one of either makes rows unlike."""
        for name in ("machine", "versions"):
            found = {str(row[name]) for row in self.known.values() if name in row}
            yield f"{name}: {'; '.join(sorted(found)) or 'none yet'}"


@dataclass(frozen=True)
class Place:
    """A network in a runtime."""

    results: Results
    network: str
    runtime: str

    def point(self, method: str, speedup: float) -> Point:
        """A method here."""
        return self.results.point(self.network, self.runtime, method, speedup)

    def best_peer(self, speedup: float) -> tuple[str, Point] | None:
        """The most accurate of those that are fast enough."""
        found = [(name, self.point(name, speedup)) for name in peers()]
        return max((one for one in found if one[1].fit), key=lambda one: one[1].accuracy, default=None)

    def lead(self, speedup: float) -> float | None:
        """By how much mobilekit is more accurate than the best peer, a fraction; None where one of them is not fast
        enough, or a method has not run."""
        ours, best = self.point(OURS, speedup), self.best_peer(speedup)
        if best is None or not ours.fit or self.missing(speedup):
            return None
        return ours.accuracy - best[1].accuracy

    def wins(self, speedup: float) -> bool | None:
        """Whether mobilekit is the most accurate, or the only one that is fast enough. None: not decided yet, for a
        method has not run."""
        lead = self.lead(speedup)
        if lead is not None:
            return lead > 0
        ours, peer = bool(self.point(OURS, speedup).fit), self.best_peer(speedup) is not None
        return ours if ours != peer and not self.missing(speedup) else None

    def missing(self, speedup: float) -> list[str]:
        """Methods that were not run."""
        return [name for name in (OURS, *peers()) if not self.point(name, speedup).ran]

    def complete(self, speedup: float) -> bool:
        """Every method has its seeds or cannot be so fast."""
        points = [self.point(name, speedup) for name in (OURS, *peers())]
        return all(len(point.fit) + len(point.slow) >= SEEDS or (point.ran and not point.fit) for point in points)

    def lines(self) -> list[str]:
        """The table and what it says."""
        about = self.results.known.get(f"quantised {self.network} {self.runtime}", {})
        title = f"## {self.network}, {self.runtime}"
        lines = [title, ""]
        if "accuracy" in about:
            lines += [
                f"The original: {100 * about['accuracy']:.2f} %; int8 alone: {100 * about['int8_accuracy']:.2f} % at "
                f"{about['ratio']:.2f}x.",
                "",
            ]
        lines.append("| method | " + " | ".join(f"{speedup:g}x" for speedup in SPEEDUPS) + " |")
        lines.append("|---" * (1 + len(SPEEDUPS)) + "|")
        for name in (OURS, *peers()):
            shown = (self.point(name, speedup).shown() for speedup in SPEEDUPS)
            paper = f" (arXiv:{peers()[name].paper})" if name != OURS else ""
            lines.append(f"| {name}{paper} | {' | '.join(shown)} |")
        lines += ["", *(f"* {self.verdict(speedup)}" for speedup in SPEEDUPS), f"* {self.check()}"]
        return lines

    def verdict(self, speedup: float) -> str:
        """Whether mobilekit is the most accurate, and by how much."""
        lead, best, ours = self.lead(speedup), self.best_peer(speedup), self.point(OURS, speedup)
        preliminary = "" if self.complete(speedup) else f" (preliminary: not all methods have {SEEDS} seeds)"
        if missing := self.missing(speedup):
            return f"{speedup:g}x: not decided: not run: {', '.join(missing)}"
        if lead is not None and best is not None:
            word = "wins by" if lead > 0 else "ties, by" if lead == 0 else "does not win: it is behind by"
            return f"{speedup:g}x: mobilekit {word} {100 * abs(lead):.2f} points; best peer {best[0]}{preliminary}"
        won = self.wins(speedup)
        if won is None:
            return f"{speedup:g}x: nothing is fast enough; mobilekit: {ours.shown()}"
        if won:
            return f"{speedup:g}x: mobilekit wins: no peer can be so fast"
        return f"{speedup:g}x: mobilekit does not win: {ours.shown()}"

    def check(self) -> str:
        """At the checked speedup: clearly more accurate, or clearly faster at the best peer's accuracy."""
        found = self.passes()
        asked = f"{CHECKED:g}x: {100 * POINTS:.1f} points above the best peer, or {QUICKER:g}x faster at its accuracy"
        return f"{asked}: {'not decided' if found is None else 'yes' if found else 'no'}{self._quicker()}"

    def passes(self) -> bool | None:
        """None: not decided yet."""
        lead = self.lead(CHECKED)
        if lead is None:
            return self.wins(CHECKED)
        return lead >= POINTS or any(ours.ratio >= QUICKER * peer.ratio for ours, peer in self._as_accurate())

    def _as_accurate(self) -> list[tuple[Point, Point]]:
        """mobilekit at any speedup where it reaches the accuracy of the best peer at the checked one."""
        best = self.best_peer(CHECKED)
        ours = [self.point(OURS, speedup) for speedup in (*SPEEDUPS, CHECKED * QUICKER)]
        return [(one, best[1]) for one in ours if best is not None and one.fit and one.accuracy >= best[1].accuracy]

    def _quicker(self) -> str:
        found = self._as_accurate()
        if not found:
            return ""
        most = max(ours.ratio / peer.ratio for ours, peer in found)
        return f" (as accurate as the best peer at up to {most:.2f} times its speed)"


# ---------------------------------------------------------------- in words


def summary(places: Sequence[Place]) -> list[str]:
    """How many points mobilekit wins."""
    points = [(place, speedup) for place in places for speedup in SPEEDUPS]
    wins = [won for place, speedup in points if (won := place.wins(speedup)) is not None]
    checks = [passed for place in places if (passed := place.passes()) is not None]
    complete = sum(place.complete(speedup) for place, speedup in points)
    return [
        f"mobilekit's mean accuracy is the highest at {sum(wins)} of the {len(wins)} points that are decided, of "
        f"{len(points)} in all ({complete} of them with {SEEDS} seeds of every method that can be so fast). At "
        f"{CHECKED:g}x it is {100 * POINTS:.1f} points above the best peer, or {QUICKER:g} times faster at its "
        f"accuracy, in {sum(checks)} of {len(checks)} cases."
    ]


def head(results: Results) -> list[str]:
    """What was done, so that the table can be judged."""
    words = f"""\
Made by `benchmarks/peers.py` on the full Fashion-MNIST: 60,000 training images and all 10,000 test images.
An entry is the mean accuracy of the exported files on all test images in %, ± the standard deviation over seeds,
(seeds), at the measured speedup over the fp32 original in the same runtime: both files run in turn for
{FINAL_SECONDS:g} seconds on one thread of the host, in CPU time.

* Every method starts from the same trained network and trains for the same seconds on the same batches of
  {fashion_mnist.TRAIN_BATCH}, in the order of the seed. What comes before (planning, search of strengths) is not
  counted. Trainings ran on the CPU; the code sends those of the peers to a GPU where there is one, which was not run.
* mobilekit distils from the original. Its planning tries combinations by at most {trial.MOST_STEPS} training steps
  each, whose weights are thrown away: like all of the planning they are not counted.
  {_in_all(results.trained)}
* A file counts from {SLACK:.0%} of the speedup that was asked for: measured ratios repeat within some percent.
* Peers have one knob. Before any training it is set by bisection so that the untrained file is just as fast as asked,
  as measured: shares of channels in {PARTS} parts, widths in multiples that the runtime likes, and in halves or
  quarters of those where that comes closer. Right before the training it is measured once more, and turned up by
  steps until it is as fast then; where it never is, its fastest file is trained, if that one counts. Where the
  original is fast enough in int8 nothing is pruned, and it is trained all the same.
* Peers are quantised to int8. Where int8 costs the original more than {100 * LOSS_IN_INT8:g} points or makes it less
  than {GAIN_IN_INT8:g} times faster they are tried in fp32 too, and the better precision counts: chosen by the test
  images, which favours the peers.
* Peers train on labels with the workload's loss: {_recipe(FINE_TUNING)}, cosine to zero; the scaled network from
  scratch with {_recipe(FROM_SCRATCH)}.
* Torch-Pruning prunes globally, in {PRUNING_STEPS} steps, importances anew before each. Its networks are quantised by
  `onnxruntime.quantization` (static, QDQ, per channel, U8S8) and `ai_edge_quantizer` (static_wi8_ai8), the others by
  mobilekit's exporters; all are calibrated on the same images.
* NetAdapt takes {NetAdapt.ITERATIONS} iterations, {NetAdapt.SHORT_SHARE:.0%} of the training time for its short
  trainings, the prices of the host's profile as its lookup table, and a measurement after every iteration.
* Raw samples are in `peers.samples.jsonl`: {SAMPLES_KEPT} rounds of each final measurement, evenly chosen.
"""
    return [*words.splitlines(), *(f"* {line}." for line in results.conditions())]


def _in_all(trained: Sequence[Row]) -> str:
    """How long whole cells took, for what is not counted differs."""
    ours = [row["seconds"] for row in trained if row["method"] == OURS]
    others = [row["seconds"] for row in trained if row["method"] != OURS]
    if not ours or not others:
        return ""
    return (
        f"In all a cell of mobilekit took {statistics.median(ours) / 60:.1f} minutes (median), one of a peer "
        f"{statistics.median(others) / 60:.1f}, the search of its strength aside."
    )


def _recipe(recipe: Mapping[str, Any]) -> str:
    return f"{recipe['optimiser']}, rate {recipe['learning_rate']:g}, decay {recipe['weight_decay']:g}"
