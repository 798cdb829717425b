"""Fills README's marked blocks: command help from the command line, figures from benchmarks/results/.

.venv/bin/python scripts/fill_readme.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
WIDTH = 100


def help_text() -> str:
    """`mobilekit --help` and `mobilekit plan --help`, as printed on a terminal of 100 columns."""
    environment = {**os.environ, "COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH)}
    blocks = []
    for arguments in ([], ["plan"]):
        command = [sys.executable, "-m", "mobilekit", *arguments, "--help"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        shown = done.stdout.replace("python -m mobilekit", "mobilekit").strip()
        blocks.append(f"```\n$ {' '.join(['mobilekit', *arguments, '--help'])}\n{shown}\n```")
    return "\n\n".join(blocks)


def blocks() -> dict[str, str]:
    """Name of each marked block -> its text."""
    found = {"help": help_text()}
    if (RESULTS / "main_job.md").exists():
        found["results"] = (RESULTS / "main_job.md").read_text(encoding="utf-8").strip()
    if (RESULTS / "demo.txt").exists():
        found["demo"] = f"```\n{(RESULTS / 'demo.txt').read_text(encoding='utf-8').strip()}\n```"
    if (RESULTS / "predict.md").exists():
        found["predict"] = summary(RESULTS / "predict.md", 1)
    if (RESULTS / "claims.md").exists():
        found["claims"] = summary(RESULTS / "claims.md", 1)
    if (RESULTS / "published.md").exists():
        blocks_table = summary(RESULTS / "blocks.md", 1)
        found["published"] = f"{summary(RESULTS / 'published.md', 1)}\n\n{blocks_table}"
    return found


def summary(path: Path, tables: int) -> str:
    """The line that says how a result was made, and its first tables."""
    lines = path.read_text(encoding="utf-8").splitlines()
    made = next(line for line in lines if "benchmarks/" in line)
    found: list[list[str]] = []
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append(line)
    return "\n\n".join([made, *("\n".join(table) for table in found[:tables])])


def filled(text: str, found: dict[str, str]) -> str:
    """README with its blocks replaced."""
    for name, block in found.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text = re.sub(pattern, lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8"), blocks()), encoding="utf-8")
