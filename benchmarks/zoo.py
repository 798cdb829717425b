"""The zoo: many architectures through the whole chain, one row each, every failure with its reason and a remedy.

    .venv/bin/python benchmarks/zoo.py run [--networks NAME ...] [--again] [--limit-minutes N]
    .venv/bin/python benchmarks/zoo.py report

`run` takes each network of `benchmarks/zoo_networks` through trace, price (the shipped profile of a phone), removal of
30 % of the channels, and six files: ONNX, TFLite and Core ML, each in fp32 and in int8, compared with PyTorch and held
to the limits that `mobilekit plan` ships by. A network's line is appended to benchmarks/results/zoo.samples.jsonl when
it is done: stopped, it goes on with what is missing. `--again` repeats the networks that are named, or else those that
did not pass. `report` writes benchmarks/results/zoo.md from the lines. Run it from the project's root.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import lab
import torch
import zoo_networks
from torch import Tensor
from torch.nn import functional

import mobilekit as mk
from mobilekit import profiles, registry
from mobilekit.cost.price import price
from mobilekit.errors import MobilekitError, UnsupportedError, first_line
from mobilekit.network import trace
from mobilekit.types import Calibration, Candidate, Network, Option
from mobilekit.workloads import efficientnet_lite0

RESULTS = Path(__file__).parent / "results"
SAMPLES = RESULTS / "zoo.samples.jsonl"
PROFILE = "pixel-4"
REMOVED = 0.3
"""Share of the channels of every group that may be pruned."""
CROPS = 32
LONGEST_SECONDS = 900.0
"""A network that takes longer is stopped, and its row says so."""
FILES = tuple((runtime, precision) for precision in ("fp32", "int8") for runtime in ("onnx", "tflite", "coreml"))
STEPS = ("trace", "price", "prune", *(f"{runtime} {precision}" for runtime, precision in FILES))
REMEDIES = {
    "trace": "write the forward without values that depend on the data",
    "price": "time the network itself: mobilekit measure",
    "prune": "use the levers that keep channels: int8, low rank",
    "onnx": "use another format: the other files are not affected",
    "tflite": "use another format: the other files are not affected",
    "coreml": "use another format: the other files are not affected",
    "int8": "keep this file in float, or train with quantisation (mobilekit plan does where it has data)",
    "network": "run it alone: benchmarks/zoo.py run --again --networks NAME",
}
"""What a user can do about a failed step, by its name or its last word."""
Row = dict[str, Any]


def main() -> None:
    """Compute what is missing, or write the table."""
    arguments = parsed()
    cells = lab.Cells(arguments.samples)
    if arguments.command == "run":
        compute(cells, wanted(arguments, cells.known()), 60 * arguments.limit_minutes)
        return
    from zoo_report import written

    text = written(cells.known())
    arguments.samples.with_name("zoo.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--networks", nargs="+", choices=tuple(zoo_networks.NETWORKS), metavar="NAME")
    parser.add_argument("--again", action="store_true", help="also what is there and was named, or did not pass")
    parser.add_argument("--samples", type=Path, default=SAMPLES)
    parser.add_argument("--limit-minutes", type=float, default=math.inf)
    return parser.parse_args()


def wanted(arguments: argparse.Namespace, known: Mapping[str, Row]) -> list[str]:
    """Networks to compute, in the zoo's order."""
    names = arguments.networks or list(zoo_networks.NETWORKS)
    if not arguments.again:
        return [name for name in names if name not in known]
    return [name for name in names if arguments.networks or name not in known or not passes(known[name])]


def passes(row: Row) -> bool:
    """Whether every step of a network's row did."""
    return all(row["steps"].get(step, {}).get("ok", False) for step in STEPS)


# ---------------------------------------------------------------- all networks


def compute(cells: lab.Cells, names: Iterable[str], seconds: float) -> None:
    """One network after the other in a process beside this one, so that a converter that crashes stops nothing."""
    until = time.monotonic() + seconds
    pool = None
    for name in names:
        if time.monotonic() > until:
            lab.say("the time is over: the next run goes on here")
            break
        lab.say(name)
        pool = pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            row = pool.submit(carried_through, name).result(LONGEST_SECONDS)
        except (BrokenProcessPool, TimeoutError) as error:
            ended = isinstance(error, BrokenProcessPool)
            reason = "the process ended" if ended else f"not done after {LONGEST_SECONDS:.0f} s"
            row = {"steps": {"network": failed("network", MobilekitError(reason))}}
            stop(pool)
            pool = None
        cells.add(name, row)
        lab.say(f"  {'passes' if passes(row) else 'fails'}")
    if pool is not None:
        pool.shutdown()


def stop(pool: ProcessPoolExecutor) -> None:
    """End the process of a network that takes too long, and nothing else."""
    for process in (pool._processes or {}).values():
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------- one network


def carried_through(name: str) -> Row:
    """A network's row: each step with what it found, or why it failed. Never raises."""
    torch.set_num_threads(1)
    started = time.monotonic()
    row: Row = {"steps": {}}
    steps = row["steps"]

    def step(key: str, work: Callable[[], Row]) -> bool:
        begun = time.monotonic()
        try:
            steps[key] = {"ok": True, **work()}
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is what the row is about
            steps[key] = failed(key, error)
        steps[key]["seconds"] = round(time.monotonic() - begun, 1)
        return bool(steps[key]["ok"])

    images = crops(zoo_networks.NETWORKS[name].side)
    module = zoo_networks.build(name, images[:CROPS])
    subject = Candidate(module, images[:1], _nothing(), calibration=Calibration((images[CROPS:],)))
    row["parameters"] = sum(parameter.numel() for parameter in module.parameters())
    found: dict[str, Candidate] = {}

    def traced() -> Row:
        found["original"] = found["last"] = replace(subject, network=trace(module, subject.example_input, name))
        network = found["last"].network
        return {"operators": len(network.operators), "macs": network.macs}

    def pruned() -> Row:
        found["last"] = without_channels(found["original"])
        return {"left": found["last"].network.macs / found["original"].network.macs}

    if step("trace", traced):
        step("price", lambda: priced(found["original"].network))
        step("prune", pruned)
    for runtime, precision in FILES if found else ():
        step(f"{runtime} {precision}", lambda r=runtime, p=precision: exported(found["last"], r, p))  # type: ignore[misc]
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


def failed(step: str, error: BaseException) -> Row:
    """What a row keeps of a failure. An error that is none of ours is a defect, and says so."""
    own = isinstance(error, MobilekitError)
    reason = str(error) if own else f"{type(error).__name__}: {first_line(error)}"
    first, _, last = step.partition(" ")
    gate = last == "int8" and " dB to the PyTorch network" in reason
    return {"ok": False, "reason": reason, "remedy": REMEDIES["int8" if gate else first], "defect": not own}


def _nothing() -> Network:
    return Network(name="", input_shape=(), operators=(), groups={}, axes={})


@functools.cache
def crops(side: int) -> Tensor:
    """Crops of photographs (2 * CROPS, 3, side, side), normalised: half settle batch norms, half calibrate."""
    images = torch.cat(list(efficientnet_lite0.calibration_data()))
    chosen = images[torch.linspace(0, len(images) - 1, 2 * CROPS).long()]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
    return functional.interpolate(chosen[order], size=(side, side), mode="bilinear", antialias=True)


def priced(network: Network) -> Row:
    """Milliseconds on a phone as its shipped profile predicts, and how many kinds of operators it never saw."""
    profile = profiles.load(PROFILE)
    runtime = profile.tables[0].runtime
    estimate = price(network, profile, runtime)
    if not (math.isfinite(estimate.latency_ms) and 0 < estimate.low_ms <= estimate.latency_ms <= estimate.high_ms):
        raise AssertionError(f"{estimate.low_ms} <= {estimate.latency_ms} <= {estimate.high_ms} ms is no prediction")
    return {"ms": estimate.latency_ms, "runtime": runtime, "extrapolated": len(estimate.extrapolated)}


def without_channels(start: Candidate) -> Candidate:
    """The network after the lever of channel pruning at every group that it may be used on.

    Raises UnsupportedError, with the reasons, where there is none, and AssertionError where the network that the lever
    predicts is not the one that tracing finds.
    """
    lever = registry.transform("channel_pruning")
    free = {name: group.width for name, group in start.network.groups.items() if group.refused is None}
    if not free:
        listed = dict.fromkeys(g.refused for g in start.network.groups.values() if g.refused and g.producers)
        reasons = listed or dict.fromkeys(g.refused for g in start.network.groups.values() if g.refused)
        raise UnsupportedError(f"no channels may be removed: {'; '.join(list(reasons)[:3])}")
    current = start
    for number, (name, width) in enumerate(free.items(), start=1):
        settings = {"width": max(1, round(width * (1 - REMOVED))), "recalibrate": number == len(free)}
        current = lever.apply(current, Option(transform=lever.name, where=name, settings=settings))
    check_prediction(current)
    return current


def check_prediction(candidate: Candidate) -> None:
    """Raise AssertionError where the candidate's network is not what tracing its module finds."""
    traced = trace(candidate.module, candidate.example_input)
    for own, other in zip(candidate.network.operators, traced.operators, strict=True):
        here, there = candidate.network.shape(own), traced.shape(other)
        if here != there or own.groups != other.groups:
            raise AssertionError(f"{own.name} is predicted as {here} with {own.groups} groups, and traced as {there}")


def exported(candidate: Candidate, runtime: str, precision: str) -> Row:
    """One file's parity, as `mobilekit.export` checks it. Raises MobilekitError where it would not be shipped."""
    assert candidate.calibration is not None
    batches = [batch.numpy() for batch in candidate.calibration.inputs]
    with tempfile.TemporaryDirectory() as folder:
        (model,) = mk.export(
            candidate.module,
            candidate.example_input,
            to=[runtime],
            precision=precision,  # type: ignore[arg-type]
            calibration=batches,
            out=folder,
        )
        parity = model.parity
        operators = model.facts.operators
    return {
        "status": parity.status,
        "sqnr_db": None if parity.sqnr_db is None else round(parity.sqnr_db, 2),
        "top1": parity.top1_agreement,
        "operators": dict(operators),
        "bytes": model.size_bytes,
    }


if __name__ == "__main__":
    sys.exit(main())
