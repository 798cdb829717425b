"""mobilekit beside other ways to the same speed: same network, data, minutes of training and seeds, cell by cell.

    .venv/bin/python benchmarks/peers.py run [--quick] [--networks NAME]... [--methods NAME]... [--limit-minutes N]
    .venv/bin/python benchmarks/peers.py report

`run` computes what is missing, each cell (network, runtime, method, precision, speedup, seed) in a process of its own,
and appends it to benchmarks/results/peers.samples.jsonl: stopped, it loses the cell under way and goes on with it the
next time. A full run takes many hours of two quiet cores. `report` writes benchmarks/results/peers.md from the lines
that are there. Run it from the project's root.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import lab
import peers_report
import torch
from peer_cells import NETWORKS, OURS, WORK, Cell, Row, precisions
from peer_methods import peers

from mobilekit.errors import MobilekitError, first_line
from mobilekit.workloads import fashion_mnist

RESULTS = Path(__file__).parent / "results"
SPEEDUPS = (4.0, 2.0, 8.0)
"""The one that is asked most of comes first."""
SEEDS = (0, 1, 2)
MINUTES = 1.0


def main() -> None:
    """Compute what is missing, or write the table."""
    arguments = parsed()
    cells = lab.Cells(arguments.samples)
    if arguments.command == "report":
        text = peers_report.text(cells.known(), arguments.train_minutes)
        print(text)
        arguments.samples.with_name("peers.md").write_text(text + "\n", encoding="utf-8")
        return
    try:
        fashion_mnist.full_split("test")  # the bundled sample would make rows of another kind
    except MobilekitError as error:
        raise SystemExit(str(error)) from None
    until = time.monotonic() + 60 * arguments.limit_minutes
    for cell in wanted(arguments):
        if time.monotonic() > until:
            lab.say("the time is over: the next run goes on here")
            return
        compute(cell, cells, arguments)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--runtimes", nargs="+", choices=lab.RUNTIMES, default=lab.RUNTIMES)
    parser.add_argument("--methods", nargs="+", choices=(OURS, *peers()), default=(OURS, *peers()))
    parser.add_argument("--speedups", nargs="+", type=float, default=SPEEDUPS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="the first network and the first seed only")
    parser.add_argument("--train-minutes", type=float, default=MINUTES, help="of each training, short ones included")
    parser.add_argument("--threads", type=int, default=2, help="that a training may use")
    parser.add_argument("--limit-minutes", type=float, default=float("inf"), help="start no cell after these")
    parser.add_argument("--again", action="store_true", help="repeat cells that failed")
    parser.add_argument("--samples", type=Path, default=RESULTS / "peers.samples.jsonl")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.networks, arguments.seeds = arguments.networks[:1], arguments.seeds[:1]
    return arguments


def wanted(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Cells in the order in which they are computed: those that are compared follow each other.

    mobilekit is also asked for what the peers are asked for and `QUICKER` times more, where it need not be more
    accurate than they are but as accurate.
    """
    for seed in arguments.seeds:
        for network in arguments.networks:
            for runtime in arguments.runtimes:
                for speedup in arguments.speedups:
                    for method in arguments.methods:
                        yield Cell(network, runtime, method, "own", speedup, seed, arguments.train_minutes)
                if OURS in arguments.methods and peers_report.CHECKED in arguments.speedups:
                    quicker = peers_report.CHECKED * peers_report.QUICKER
                    yield Cell(network, runtime, OURS, "own", quicker, seed, arguments.train_minutes)


def compute(cell: Cell, cells: lab.Cells, arguments: argparse.Namespace) -> None:
    """A cell and what it rests on, unless they are there."""
    place = (cell.network, cell.runtime)

    def known(key: str, name: str, *given: Any) -> Row:
        found = cells.known().get(key)
        if found is None or ("failure" in found and arguments.again):
            lab.say(key)
            found = apart(arguments.threads, name, *given)
            cells.add(key, found)
        return found

    if cell.method == OURS:
        known(cell.key, OURS, cell)
        return
    about = known(f"quantised {cell.network} {cell.runtime}", "quantised", *place)
    for precision in precisions(about) if "failure" not in about else ("int8",):
        one = Cell(*place, cell.method, precision, cell.speedup, cell.seed, cell.minutes)
        found: Row | None = None
        if peers()[cell.method].shrink is not None:
            earlier = one.strength_key.rpartition(" ")[0]
            tried = [
                each for key, row in cells.known().items() if key.startswith(earlier) for each in row.get("tried", ())
            ]
            found = known(one.strength_key, "strength", one, tried)
            if "failure" in found:
                continue  # it cannot be so fast: the report says why
        known(one.key, "peer", one, found, arguments.threads)


def apart(threads: int, name: str, *given: Any) -> Row:
    """A piece of work in a fresh process; whatever goes wrong there becomes a row that says so."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(work, threads, name, given).result()
        except BrokenProcessPool:
            return {"failure": "its process was killed"}


def work(threads: int, name: str, given: tuple[Any, ...]) -> Row:
    """In the fresh process."""
    torch.set_num_threads(threads)
    try:
        return WORK[name](*given)
    except MobilekitError as error:
        return {"failure": str(error)}
    except Exception as error:  # noqa: BLE001 -- a peer may fail in any way, and the others go on
        lab.say(traceback.format_exc())
        return {"failure": f"{type(error).__name__}: {first_line(error)}"}


if __name__ == "__main__":
    main()
