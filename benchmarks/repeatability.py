"""Measures the same files five times while other processes load the machine: how far apart are the ratios?

    .venv/bin/python benchmarks/repeatability.py measure report

Each time is `mobilekit measure FILES --baseline FILE --json`, processes of its own. Half of the load works all the
time, the other half in bursts; the first stage without them shows the machine as it is. Raw samples are appended to
results/repeatability.samples.jsonl: what is there is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mobilekit import registry
from mobilekit.stats import median, percentile, spread

HERE = Path(__file__).parent
SAMPLES = HERE / "results" / "repeatability.samples.jsonl"
PAGE = HERE / "results" / "repeatability.md"
FILES = Path("mobilekit-out/repeatability")
PACKAGES = ("mobilekit", "torch", "onnxruntime", "ai-edge-litert", "numpy")
NETWORKS = {"resnet": "mobilekit.workloads.fashion_mnist", "lite0": "mobilekit.workloads.efficientnet_lite0"}
REPEATS = 5
CLAIM = 0.07
STATES = ("loaded", "without")
EXPORTS = (("fp32", "onnx,tflite"), ("int8", "onnx"))
SHOWN = ("file", "other load", "ratios to the baseline", "spread", "widest 90 % interval", "at full speed", "spread")
MILLISECONDS = ("medians ms", "spread")
Row = dict[str, Any]


def main() -> None:
    """Carry out the steps that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=("measure", "report", "burn"))
    steps = parser.parse_args().steps
    if steps == ["burn"]:
        burn()
    if "measure" in steps:
        measure()
    if "report" in steps:
        PAGE.write_text(page(rows()) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- load


def burn() -> None:
    """What a loading process does, for ever: products of matrices that fit into a cache, or copies of large arrays; all
    the time, or in bursts (`BURN` says which)."""
    import numpy as np

    number = int(os.environ["BURN"])
    chance = random.Random(number)  # noqa: S311 (a pattern of load)
    small, large = np.ones((256, 256), np.float32), np.ones(8_000_000, np.float32)
    while True:
        end = time.monotonic() + chance.uniform(0.2, 3.0)
        work = chance.random() < 0.5
        while time.monotonic() < end:
            small @ small if work else large.copy()
        if number % 2:
            time.sleep(chance.uniform(0.2, 3.0))


@contextlib.contextmanager
def load(state: str) -> Iterator[int]:
    """As many busy processes as there are CPUs, where that is the state."""
    count = (os.cpu_count() or 1) if state == "loaded" else 0
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [sys.executable, str(Path(__file__).resolve()), "burn"]
    burning = [subprocess.Popen(command, env={**os.environ, **one, "BURN": str(number)}) for number in range(count)]
    try:
        time.sleep(1.0 if count else 0.0)
        yield count
    finally:
        for process in burning:
            process.kill()
            process.wait()


# ---------------------------------------------------------------- measuring


def command(*arguments: object) -> str:
    """What the mobilekit command prints. Raises CalledProcessError where it fails."""
    line = [sys.executable, "-m", "mobilekit", *map(str, arguments)]
    return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout


def exported(name: str) -> Path:
    """A network's files: float32 in both runtimes, and int8."""
    folder = FILES / name
    for precision, formats in EXPORTS:
        if not (folder / precision / "manifest.json").exists():
            command("export", NETWORKS[name], "--to", formats, "--precision", precision, "--out", folder / precision)
    return folder


def measure() -> None:
    """All networks in both states, five times each."""
    known = {(row["network"], row["state"], row["repeat"]) for row in rows()}
    for name in NETWORKS:
        folder = exported(name)
        (baseline,) = (folder / "fp32").glob("*.onnx")
        for state in STATES:
            for repeat in range(REPEATS):
                if (name, state, repeat) in known:
                    continue
                with load(state) as busy:
                    document = json.loads(command("measure", folder, "--baseline", baseline, "--json"))
                row = {"network": name, "state": state, "repeat": repeat, "busy": busy, **kept(document)}
                with SAMPLES.open("a", encoding="utf-8") as lines:
                    print(json.dumps(row), file=lines)
                print(name, state, repeat, row["ratios"], file=sys.stderr, flush=True)


def kept(document: Mapping[str, Any]) -> Row:
    """Of the command's document what the page needs, and the raw samples."""
    lists = ("cpu_samples_ms", "samples_ms", "reference_ms")
    return {
        "ratios": {row["model"]: [row["ratio"], *row["interval"]] for row in document["ratios"]},
        "failures": document["failures"],
        "warnings": sorted({f"{row['subject']}: {row['kind']}" for row in document["warnings"]}),
        "measurements": [
            {
                "model": m["model"],
                "started_at": m["started_at"],
                "cpus": m["cpus"],
                **{name: [round(ms, 4) for ms in m[name]] for name in lists},
            }
            for m in document["measurements"]
        ],
    }


def rows() -> list[Row]:
    """What has been measured."""
    if not SAMPLES.exists():
        return []
    return [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- the page


def page(found: list[Row]) -> str:
    """The page as Markdown."""
    numbers = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    worst = {state: max((s for _, s in spreads(found, state)), default=float("nan")) for state in STATES}
    verdict = "holds" if worst["loaded"] <= CLAIM else "does not hold"
    return "\n\n".join([
        f"Made by `.venv/bin/python benchmarks/repeatability.py measure report` on {datetime.now(UTC):%Y-%m-%d}; "
        f"{registry.device('host').info().soc}, {os.cpu_count()} CPUs; {numbers}.",
        f"`mobilekit measure FILES --baseline FILE`, {REPEATS} times, each time a process of its own, while "
        f"{max((row['busy'] for row in found), default=0)} processes load the machine: one without a pause, one in "
        "bursts of 0.2 to 3 s, with products of matrices or copies of large arrays. Ratios are of CPU time, paired "
        "round by round; a spread is that of the largest over the smallest of the five. The machine is shared with "
        "others, whose load nobody controls.",
        f"That ratios on the loaded machine agree within {CLAIM:.0%} **{verdict}**: the largest spread is "
        f"{worst['loaded']:.1%} (without the loading processes {worst['without']:.1%}).",
        "At full speed: the ratio of the times that one round of ten stayed under.",
        table(found),
    ])  # fmt: skip


def spreads(found: list[Row], state: str) -> Iterator[tuple[tuple[str, str], float]]:
    """(network, file) and the spread of its ratios."""
    for network in NETWORKS:
        chosen = [row for row in found if (row["network"], row["state"]) == (network, state)]
        for name in chosen[0]["ratios"] if chosen else ():
            yield (network, name), spread([row["ratios"][name][0] for row in chosen])


def table(found: list[Row]) -> str:
    """A line for each file and state."""
    lines = [[*SHOWN, *MILLISECONDS], ["---"] * len(SHOWN + MILLISECONDS)]
    for state in STATES:
        for (network, name), apart in spreads(found, state):
            chosen = [row for row in found if (row["network"], row["state"]) == (network, state)]
            ratios = [row["ratios"][name] for row in chosen]
            own = [samples(row, name) for row in chosen]
            fast = [percentile(ms, 10) / percentile(samples(row), 10) for row, ms in zip(chosen, own, strict=True)]
            medians = [median(ms) for ms in own]
            low, high = max(((low, high) for _, low, high in ratios), key=lambda ends: ends[1] / ends[0])
            lines.append([
                f"{network} {name}",
                f"{chosen[0]['busy']} processes" if chosen[0]["busy"] else "none of ours",
                " ".join(f"{ratio:.3f}" for ratio, _, _ in ratios),
                f"{apart:.1%}",
                f"{low:.3f} to {high:.3f}",
                " ".join(f"{ratio:.3f}" for ratio in fast),
                f"{spread(fast):.1%}",
                " ".join(f"{ms:.3f}" for ms in medians),
                f"{spread(medians):.1%}",
            ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def samples(row: Row, name: str | None = None) -> list[float]:
    """CPU milliseconds of a file, or of the baseline."""
    found = row["measurements"]
    return next(m["cpu_samples_ms"] for m in found if name is None or m["model"] == name)


if __name__ == "__main__":
    main()
