"""Writes what the zoo found: a table of networks and steps, then every failure with its reason and remedy."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import zoo_networks
from zoo import FILES, PROFILE, REMOVED, STEPS, passes

PACKAGES = ("mobilekit", "torch", "onnxruntime", "litert-torch", "ai-edge-litert", "ai-edge-quantizer", "coremltools")
TITLES = {"onnx": "ONNX", "tflite": "TFLite", "coreml": "Core ML"}
Row = dict[str, Any]


def written(rows: Mapping[str, Row]) -> str:
    """The page as Markdown; networks in the zoo's order, those without a row are said to be missing."""
    names = [name for name in zoo_networks.NETWORKS if name in rows]
    missing = [name for name in zoo_networks.NETWORKS if name not in rows]
    passed = [name for name in names if passes(rows[name])]
    numbers = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    parts = [
        f"Made by `.venv/bin/python benchmarks/zoo.py run, report` on {datetime.now(UTC):%Y-%m-%d}; one thread; "
        f"Python {platform.python_version()}, {numbers}.",
        f"**{len(passed)} of {len(names)} architectures pass every step** ({len(passed) / max(1, len(names)):.0%}): "
        f"trace, price, removal of {REMOVED:.0%} of the channels of every group that may be pruned, and six files of "
        "what is left, each compared with PyTorch on 32 crops of photographs.",
        "Networks have the blocks of their papers at a fraction of the width and depth, random weights (not "
        "EfficientNet-Lite0) and batch norms that have seen photographs. `price` is what the shipped profile "
        f"`{PROFILE}` predicts, in ms; `left` are the multiply-accumulates after pruning. A file's figure is its "
        "signal to noise ratio in dB: fp32 passes from 60, int8 from 10, as in `mobilekit plan`. `read` is a file that "
        "was written and read back and cannot be run here.",
    ]
    if missing:
        parts.append(f"Not computed yet: {', '.join(missing)}.")
    parts += [table(names, rows), failures(names, rows)]
    return "\n\n".join(parts)


def table(names: list[str], rows: Mapping[str, Row]) -> str:
    """A line a network."""
    files = [f"{TITLES[runtime]} {precision}" for runtime, precision in FILES]
    lines = [["network", "parameters", "operators", "price", "left", *files, "s"]]
    lines.append(["---"] * len(lines[0]))
    for name in names:
        row, steps = rows[name], rows[name]["steps"]
        traced, price, pruned = (steps.get(step, {}) for step in STEPS[:3])
        lines.append([
            f"{name}{'' if passes(row) else ' *'}",
            f"{row.get('parameters', 0):,}",
            shown(traced, lambda s: str(s["operators"])),
            shown(price, lambda s: f"{s['ms']:.2f}"),
            shown(pruned, lambda s: f"{s['left']:.0%}"),
            *(shown(steps.get(f"{runtime} {precision}", {}), decibels) for runtime, precision in FILES),
            f"{row.get('seconds', 0):.0f}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(step: Row, form: Any) -> str:
    """A step's figure, or that it failed or was not reached."""
    if not step:
        return "-"
    return form(step) if step["ok"] else "**fails**"


def decibels(step: Row) -> str:
    """A file's ratio to the PyTorch network."""
    if step["status"] not in ("executed", "evaluated"):
        return "read"
    return "equal" if step["sqnr_db"] is None else f"{step['sqnr_db']:.0f}"


def failures(names: list[str], rows: Mapping[str, Row]) -> str:
    """Every step that failed."""
    lines = [["network", "step", "reason", "remedy"], ["---"] * 4]
    for name in names:
        for step, found in rows[name]["steps"].items():
            if not found["ok"]:
                reason = " ".join(found["reason"].split()).replace("|", "\\|")
                lines.append([name, step, f"{'a defect: ' if found['defect'] else ''}{reason}", found["remedy"]])
    if len(lines) == 2:
        return "No step failed."
    return "## Failures\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
