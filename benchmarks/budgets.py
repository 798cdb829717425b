"""Random budgets, carried through without training: how many are met as judged, in how many rounds; and what is claimed
of those that are out of reach.

    .venv/bin/python benchmarks/budgets.py run [--networks NAME]... [--feasible N] [--unreachable N] [--limit-minutes N]
    .venv/bin/python benchmarks/budgets.py report

`run` first asks each network in each runtime for far too much, which gives the best that is within reach. Then it draws
speedups: those that are feasible log-uniformly between 1.1 and 0.9 of the best, those that are not between 1.15 and 4
times of it. Each goes through `mobilekit plan --no-train` and is appended to benchmarks/results/budgets.samples.jsonl:
stopped, it goes on with what is missing. What is claimed to be the best within reach is measured a second time, by the
files that the run left. Some three minutes a budget on a quiet machine. `report` writes benchmarks/results/budgets.md
from the lines that are there. Run it from the project's root.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lab

from mobilekit import bench, registry
from mobilekit.pipeline.paired import VERDICT
from mobilekit.types import BenchModel, Budget, Measurement

RESULTS = Path(__file__).parent / "results"
SAMPLES = RESULTS / "budgets.samples.jsonl"
WORK = Path("mobilekit-out/budgets")
NETWORKS = ("resnet", "vgg", "mobilenet")
FEASIBLE, UNREACHABLE = 20, 10
SEED = 20
TOO_MUCH = 1000.0
"""A speedup that no network reaches."""
FROM, TO = 1.1, 0.9
"""Feasible speedups, the upper one as a share of the best within reach."""
BEYOND = (1.15, 4.0)
"""Shares of the best for budgets that are out of reach."""
WORKLOAD = '''"""{name} with random weights: latency does not depend on them."""

import sys

sys.path.append({folder!r})

import lab
import torch

from mobilekit.workloads.fashion_mnist import calibration_data, example_input

__all__ = ["calibration_data", "example_input", "model"]


def model():
    torch.manual_seed(0)
    network = lab.SUBJECTS[{name!r}].make().train()
    with torch.no_grad():  # batch norms that have seen no data let activations fade, and int8 leaves nothing of them
        for _ in range(3):
            for batch in calibration_data():
                network(batch)
    return network.eval()
'''
Row = dict[str, Any]


def main() -> None:
    """Compute what is missing, or write the tables."""
    arguments = parsed()
    cells = lab.Cells(arguments.samples)
    if arguments.command == "report":
        text = written(list(cells.known().values()))
        print(text)
        arguments.samples.with_name("budgets.md").write_text(text + "\n", encoding="utf-8")
        return
    until = time.monotonic() + 60 * arguments.limit_minutes
    for key, pair, kind, budget in wanted(arguments, cells):
        if time.monotonic() > until:
            lab.say("the time is over: the next run goes on here")
            return
        cells.compute(key, lambda k=key, p=pair, d=kind, b=budget: carried_through(k, p, d, b))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--runtimes", nargs="+", choices=lab.RUNTIMES, default=lab.RUNTIMES)
    parser.add_argument("--feasible", type=int, default=FEASIBLE, help="how many budgets within reach")
    parser.add_argument("--unreachable", type=int, default=UNREACHABLE, help="how many out of reach")
    parser.add_argument("--samples", type=Path, default=SAMPLES)
    parser.add_argument("--limit-minutes", type=float, default=math.inf)
    return parser.parse_args()


# ---------------------------------------------------------------- budgets

Pair = tuple[str, str]
"""Network and runtime."""


def wanted(arguments: argparse.Namespace, cells: lab.Cells) -> Iterable[tuple[str, Pair, str, float]]:
    """Keys, networks, kinds and speedups in order. What is within reach is known once the first ones are done."""
    pairs = [(network, runtime) for network in arguments.networks for runtime in arguments.runtimes]
    for pair in pairs:
        yield " ".join(("best", *pair)), pair, "best", TOO_MUCH
    known = cells.known()
    best = {pair: known.get(" ".join(("best", *pair)), {}).get("claimed_ratio") for pair in pairs}
    pairs = [pair for pair in pairs if best[pair] is not None]  # a run that failed is in the table, and draws nothing
    if not pairs:
        return
    for kind, count in (("feasible", arguments.feasible), ("unreachable", arguments.unreachable)):
        for number in range(count):
            pair = pairs[number % len(pairs)]
            speedup = drawn(kind, number, best[pair])
            yield f"{kind} {number + 1} {' '.join(pair)}", pair, kind, speedup


def drawn(kind: str, number: int, best: float) -> float:
    """A speedup with three digits, log-uniform; the same for the same number and best."""
    share = random.Random(f"{SEED} {kind} {number}").random()  # noqa: S311
    low, high = (FROM, TO * best) if kind == "feasible" else (BEYOND[0] * best, BEYOND[1] * best)
    return float(f"{math.exp(math.log(low) + share * math.log(max(high, low) / low)):.3g}")


# ---------------------------------------------------------------- a run


def carried_through(key: str, pair: Pair, kind: str, speedup: float) -> Row:
    """One budget through `mobilekit plan --no-train`; where it is out of reach, the best is measured once more."""
    network, runtime = pair
    out = WORK / key.replace(" ", "-")
    arguments = ["plan", str(workload(network)), "--profile", "host", "--speedup", str(speedup), "--runtime", runtime]
    command = [sys.executable, "-m", "mobilekit", *arguments, "--no-train", "--resume", "--out", str(out), "--json"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row: Row = {"kind": kind, "network": network, "runtime": runtime, "speedup": speedup, "exit": done.returncode}
    row["seconds"] = round(time.monotonic() - started, 1)
    if done.returncode not in (0, 3):
        return {**row, "error": done.stderr.strip()[-500:]}
    report = json.loads(done.stdout)
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    row |= {name: report[name] for name in ("verdict", "created_at", "ratio", "ratio_interval", "sessions")}
    row["judged"] = next((finding["judged"] for finding in report["findings"] if finding["item"] == "speedup"), None)
    row["claimed_ratio"], row["claimed_ms"] = report["best_reachable_ratio"], report["best_reachable_ms"]
    row["rounds"] = [{name: found for name, found in each.items() if name != "kinds"} for each in report["rounds"]]
    row["stages"] = [stage["name"] for stage in report["stages"]]
    row["searched_within"] = plan["target_ms"] is None or plan["estimate"]["latency_ms"] <= plan["target_ms"]
    row["options"] = len(plan["chosen"])
    if report["verdict"] == "unreachable":
        row["again"] = measured_again(out, runtime)
    return row


def workload(network: str) -> Path:
    """The network's workload file."""
    path = WORK / f"{network}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(WORKLOAD.format(name=network, folder=str(Path(__file__).parent.resolve())), encoding="utf-8")
    return path


def measured_again(out: Path, runtime: str) -> Row:
    """The plan that is claimed to be the best within reach, beside the original: a new measurement of the files."""
    suffix = registry.runtime(runtime).suffix
    names = ("original", "best-within-reach")
    files = [BenchModel(name=n, path=str(out / "checkpoints" / f"{n}{suffix}"), runtime=runtime) for n in names]
    device, seconds = registry.device("host"), bench.SESSION * bench.COMPARE["max_seconds"]

    def session() -> Sequence[Measurement]:
        return bench.measure(device, files, **{**bench.COMPARE, "max_seconds": seconds}).measurements

    found = bench.repeat(session, VERDICT, Budget(speedup=TOO_MUCH), lambda _: None)
    return {"ratio": found.ratio, "interval": found.interval, "sessions": len(found.rounds)}


# ---------------------------------------------------------------- report


def written(rows: list[Row]) -> str:
    """The tables as Markdown."""
    feasible = [row for row in rows if row["kind"] == "feasible"]
    beyond = [row for row in rows if row["kind"] != "feasible"]
    parts = [lab.made_by("benchmarks/budgets.py run, report"), summary(feasible, beyond), "## Within reach"]
    heads = ("network", "runtime", "asked", "verdict", "judged end", "measured (90 %)", "rounds", "accepted in",
             "predicted / measured, last round", "s")  # fmt: skip
    parts.append(table(heads, [within(row) for row in feasible]))
    parts.append("## Out of reach")
    heads = ("network", "runtime", "asked", "verdict", "claimed best", "measured again (90 %)", "holds", "s")
    parts.append(table(heads, [out_of_reach(row) for row in beyond]))
    return "\n\n".join(parts)


def summary(feasible: list[Row], beyond: list[Row]) -> str:
    """The counts, and how far predictions were off."""
    met = [row for row in feasible if row.get("verdict") == "met"]
    rounds = [len(row["rounds"]) for row in feasible if row.get("rounds")]
    lines = [f"- {len(met)} of {len(feasible)} budgets within reach were met: the lower end of the paired ratio's 90 % "
             "interval is at least what was asked for."]  # fmt: skip
    if rounds:
        counts = ", ".join(f"{rounds.count(n)} in {n}" for n in sorted(set(rounds)))
        lines.append(f"- Rounds before training: {counts}.")
        for name, index in (("first", 0), ("last", -1)):
            off = [error(row["rounds"][index]) for row in feasible if row.get("rounds")]
            lines.append(
                f"- Predicted over measured ratio of the {name} round: off by {statistics.median(off):.1%} in the "
                f"median, at most {max(off):.1%}."
            )
        over = [row for row in met if not row["searched_within"]]
        lines.append(f"- Plans that were carried out although predicted over the search's target: {len(over)}.")
    refused = [
        r for r in beyond if r.get("verdict") == "unreachable" and not {"training", "measure"} & set(r["stages"])
    ]
    lines.append(f"- {len(refused)} of {len(beyond)} budgets out of reach were refused before training.")
    held = [row for row in refused if holds(row)]
    lines.append(f"- Of the best that they claim, {len(held)} were reached when measured again.")
    return "\n".join(lines)


def error(found: Row) -> float:
    """How far a round's predicted ratio is from the measured one, either way."""
    return math.expm1(abs(math.log(found["predicted_ratio"] / found["ratio"])))


def holds(row: Row) -> bool:
    """Whether the claim (a lower end) is reached by the second measurement's median."""
    return bool(row["again"]["ratio"] >= row["claimed_ratio"])


def within(row: Row) -> list[str]:
    """A line of the first table."""
    head = [row["network"], row["runtime"], f"{row['speedup']:g}", row.get("verdict") or row.get("error", "-")]
    if not row.get("rounds"):
        return [*head, *"------"]
    accepted = next((str(n) for n, found in enumerate(row["rounds"], 1) if found["accepted"]), "-")
    last = row["rounds"][-1]
    judged = "-" if row["judged"] is None else f"{row['judged']:.2f}"
    return [
        *head,
        judged,
        spanned(row["ratio"], row["ratio_interval"]),
        str(len(row["rounds"])),
        accepted,
        f"{last['predicted_ratio']:.2f} / {last['ratio']:.2f}",
        f"{row['seconds']:.0f}",
    ]


def out_of_reach(row: Row) -> list[str]:
    """A line of the second table."""
    head = [row["network"], row["runtime"], f"{row['speedup']:g}", row.get("verdict") or row.get("error", "-")]
    if "again" not in row:
        return [*head, *"---", f"{row['seconds']:.0f}"]
    again = row["again"]
    return [
        *head,
        f"{row['claimed_ratio']:.2f}",
        spanned(again["ratio"], again["interval"]),
        "yes" if holds(row) else "no",
        f"{row['seconds']:.0f}",
    ]


def spanned(ratio: float | None, interval: Sequence[float] | None) -> str:
    """A ratio with its interval."""
    return "-" if ratio is None or interval is None else f"{ratio:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def table(heads: Sequence[str], rows: list[list[str]]) -> str:
    """Rows as a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
