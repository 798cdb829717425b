"""Runs the main job on both bundled workloads and prints measured ratio, accuracy and seconds in one table.

    .venv/bin/python benchmarks/main_job.py [--only NAME] [--out DIR]

Finished runs in DIR are not repeated (each is started with --resume). The table and the figures behind it are written
to benchmarks/results/main_job.md and main_job.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FASHION, PHOTOS = "mobilekit.workloads.fashion_mnist", "mobilekit.workloads.efficientnet_lite0"
HOST = ("--profile", "host")
RUNS = {
    "fashion-onnx-4x": ["plan", FASHION, *HOST, "--speedup", "4", "--runtime", "onnx"],
    "photos-onnx-2x": ["plan", PHOTOS, *HOST, "--speedup", "2", "--runtime", "onnx", "--no-train"],
    "photos-tflite-2x": ["plan", PHOTOS, *HOST, "--speedup", "2", "--runtime", "tflite", "--train-minutes", "8"],
    "fashion-unreachable": ["plan", FASHION, *HOST, "--latency-ms", "0.0001", "--runtime", "onnx"],
    "demo-3x": ["demo"],
}
PACKAGES = ("torch", "onnxruntime", "ai-edge-litert", "litert-torch", "coremltools", "numpy")


def run(name: str, arguments: list[str], out: Path) -> dict[str, object]:
    """One command in a process of its own; its report.json, cut to the figures of the table."""
    command = ["mobilekit", *arguments, "--out", str(out / name), "--json"]
    if arguments[0] == "plan":
        command.append("--resume")
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        return {"name": name, "command": shown(command, out), "exit": done.returncode, "error": done.stderr[-500:]}
    report = json.loads(done.stdout)
    return {
        "name": name,
        "command": shown(command, out),
        "exit": done.returncode,
        "seconds": round(sum(stage["seconds"] for stage in report["stages"])),
        **{key: report[key] for key in ("created_at", "verdict", "ratio", "ratio_interval", "best_reachable_ms")},
        **{
            key: report[key]
            for key in ("accuracy_kind", "data", "baseline", "result", "rounds", "failures", "warnings")
        },
        "models": [
            {key: model[key] for key in ("path", "precision", "size_bytes", "parity", "operators", "accuracy")}
            | {"median_ms": [row["median_ms"] for row in model["measurements"]]}
            for model in report["models"]
        ],
    }


def shown(command: list[str], out: Path) -> str:
    """The command as a user types it."""
    return " ".join(command).replace(str(out), "OUT")


def row(figures: dict[str, object]) -> str:
    """A line of the table; what was not measured is a dash."""
    before, after = figures.get("baseline") or {}, figures.get("result") or {}
    assert isinstance(before, dict)
    assert isinstance(after, dict)

    def number(value: object, form: str) -> str:
        return format(value, form) if isinstance(value, int | float) else "-"

    cells = [
        f"`{figures['command']}`",
        str(figures.get("verdict", figures.get("error"))),
        number(figures.get("ratio"), ".2f"),
        f"{number(before.get('latency_ms'), '.3f')} -> {number(after.get('latency_ms'), '.3f')}",
        f"{number(before.get('accuracy'), '.4f')} -> {number(after.get('accuracy'), '.4f')}",
        number(figures.get("best_reachable_ms"), ".3f"),
        number(figures.get("seconds"), "d"),
        str(figures["exit"]),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=sorted(RUNS), action="append", help="run these only")
    parser.add_argument("--out", type=Path, default=Path("mobilekit-out/benchmark"), help="folder of the runs")
    arguments = parser.parse_args()
    cells = [run(name, RUNS[name], arguments.out) for name in RUNS if name in (arguments.only or RUNS)]
    versions = {package: version(package) for package in PACKAGES}
    head = "| command | verdict | ratio | CPU ms | accuracy | best reachable ms | seconds | exit |"
    lines = [head, "|---|---|---|---|---|---|---|---|", *(row(figures) for figures in cells)]
    conditions = f"{platform.machine()}, Python {platform.python_version()}, " + ", ".join(
        f"{package} {number}" for package, number in versions.items()
    )
    text = "\n".join([f"Made by `benchmarks/main_job.py` on {datetime.now(UTC):%Y-%m-%d}; {conditions}.", "", *lines])
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "main_job.md").write_text(text + "\n", encoding="utf-8")
    (RESULTS / "main_job.json").write_text(json.dumps({"versions": versions, "runs": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
