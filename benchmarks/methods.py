"""Every method on the same trained network and data: accuracy, size, multiply-accumulates, measured latency.

    .venv/bin/python benchmarks/methods.py compress [--network NAME] [--only METHOD]...
    .venv/bin/python benchmarks/methods.py measure
    .venv/bin/python benchmarks/methods.py report

`compress` applies each method, fine-tunes it for the same number of steps, and keeps its files; `measure` times them in
turn with the original's and wants a quiet machine; `report` writes benchmarks/results/methods.md. Each cell (network,
method) is computed once and appended to benchmarks/results/methods.samples.jsonl; a run that was stopped goes on.
About an hour of one core for the bundled ResNet, half of that for the VGG-16.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lab
import method_list
import torch

from mobilekit.errors import MobilekitError
from mobilekit.packing import pack
from mobilekit.types import Candidate, Precision

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- begin methods -->", "<!-- end methods -->"
ORIGINAL = "original"
FILES = lab.CACHE / "methods"
SECONDS = 2.5
"""Of rounds in turn with the original, for each file."""
CLEAR = 1.05
"""Ratio from which a file is called faster: repeats differ by some percent more than the intervals."""

Cell = dict[str, Any]


def compress(network: str, method: method_list.Method) -> Cell:
    """One method on one network: accuracies, sizes and files, or why it was refused."""
    start = lab.candidate(lab.trained(network), network)
    torch.manual_seed(0)
    try:
        found = method.make(start)
    except MobilekitError as error:
        return {"network": network, "method": method.name, "refused": str(error)}
    last = found.after or found.before
    cell: Cell = {
        "network": network,
        "method": method.name,
        "places": found.places,
        "macs": last.network.macs,
        "weights": lab.weight_count(last.module),
        "files": {},
    }
    for stage, subject in (("before", found.before), ("after", found.after)):
        if subject is not None:
            cell[stage] = lab.accuracy(subject.module)
    for runtime in lab.RUNTIMES if method.timed else lab.RUNTIMES[:1]:
        cell["files"][runtime] = written(last, runtime, method.precision, FILES / network / method.key)
    if method.precision == "int8" and found.after is not None:
        # what a file of the network before its fine-tuning gives, for a float module says nothing of its int8 form
        early = written(found.before, "onnx", "int8", FILES / network / f"{method.key}-before")
        cell["before"] = early.get("accuracy")
    return cell


def compress_all(networks: Sequence[str], only: Sequence[str] | None, cells: lab.Cells) -> None:
    """Every method that is asked for; one that fails stops none of the others and is tried again the next time."""
    for network in networks:
        for method in method_list.methods(network):
            if only and not any(part in method.name for part in only):
                continue
            try:
                cells.compute(
                    f"{network} {method.key}", lambda network=network, method=method: compress(network, method)
                )
            except Exception:  # noqa: BLE001 -- whatever it is, the next method is tried
                lab.say(traceback.format_exc())


def written(subject: Candidate, runtime: str, precision: Precision, path: Path) -> Cell:
    """A file's size, download size and accuracy, or why there is none."""
    try:
        file = lab.exported(subject, runtime, precision, path)
        package = pack(file)
        size = Path(package.package).stat().st_size
        Path(package.package).unlink()
        # the int8 accuracy of the table is the ONNX file's; float files give what the module gives
        accuracy = lab.file_accuracy(runtime, file) if precision == "int8" else None
    except MobilekitError as error:
        return {"failure": str(error)}
    return {"path": str(file), "bytes": file.stat().st_size, "packed": size, "accuracy": accuracy}


def measure(cells: lab.Cells, times: lab.Cells) -> None:
    """Time every file that is there beside its original's."""
    timed = {f"{network} {m.key}" for network in lab.SUBJECTS for m in method_list.methods(network) if m.timed}
    for key, cell in cells.known().items():
        if key not in timed:
            continue
        for runtime, file in cell.get("files", {}).items():
            if "path" not in file:
                continue
            original = cells.known()[f"{cell['network']} {ORIGINAL}"]["files"][runtime]["path"]
            times.compute(
                f"{key} {runtime}",
                lambda file=file, original=original, runtime=runtime: lab.compared(
                    Path(original), Path(file["path"]), runtime, SECONDS
                ),
            )


# ---------------------------------------------------------------- the table

HEAD = (
    "| method | paper | accuracy % | after tuning | M MACs | weights k | ONNX kB | packed kB | ONNX ms | "
    "times faster | TFLite ms | times faster |"
)


def table(network: str, cells: dict[str, Cell], times: dict[str, Cell]) -> list[str]:
    """A row for each method; what was refused or failed says why."""
    rows = [HEAD, "|---|---|" + "--:|" * 10]
    for method in method_list.methods(network):
        cell = cells.get(f"{network} {method.key}")
        if cell is None:
            continue
        if "refused" in cell:
            refusal = f"refused: {cell['refused']}"
            rows.append(f"| {method.name} | {method.paper} | {refusal} |" + " |" * 9)
            continue
        files = cell["files"]
        onnx = files["onnx"]
        figures = [
            *(percent(value) for value in accuracies(cell, method)),
            f"{cell['macs'] / 1e6:.2f}",
            f"{cell['weights'] / 1e3:.0f}",
            *(f"{onnx[name] / 1e3:.0f}" if name in onnx else "-" for name in ("bytes", "packed")),
            *(part for runtime in lab.RUNTIMES for part in timed(times.get(f"{network} {method.key} {runtime}"))),
        ]
        rows.append(f"| {method.name} | {method.paper} | {' | '.join(figures)} |")
    return rows


def accuracies(cell: Cell, method: method_list.Method) -> tuple[float | None, float | None]:
    """Before fine-tuning and after it (None: there was none): of the int8 file where there is one."""
    before, after = cell.get("before"), cell.get("after")
    if method.precision == "int8":
        found = cell["files"]["onnx"].get("accuracy")
        return (found, None) if after is None else (before, found)
    return before, after


def percent(value: float | None) -> str:
    """A fraction in percent; a dash where there is none."""
    return "-" if value is None else f"{100 * value:.2f}"


def timed(found: Cell | None) -> list[str]:
    """Milliseconds, and the ratio with its interval."""
    if found is None:
        return ["-", "-"]
    return [f"{found['ms']:.3f}", f"{found['ratio']:.2f} ({found['low']:.2f}-{found['high']:.2f})"]


def overview(cells: dict[str, Cell], times: dict[str, Cell]) -> list[str]:
    """The table of docs/methods.md: what each method is for, and what it did to the bundled network."""
    rows = ["| method | paper | for | accuracy % before tuning, after | really faster in |", "|---|---|---|---|---|"]
    for method in method_list.methods("resnet"):
        cell = cells.get(f"resnet {method.key}")
        if cell is None or method.key == ORIGINAL:
            continue
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""
        if "refused" in cell:
            rows.append(f"| {method.name} | {paper} | {method.saves} | refused: {cell['refused']} | - |")
            continue
        keys = {name: f"resnet {method.key} {name}" for name in lab.RUNTIMES}
        ratios = {name: times[key] for name, key in keys.items() if key in times}
        faster = [f"{name} x{found['ratio']:.2f}" for name, found in ratios.items() if found["low"] > CLEAR]
        slower = [f"{name} x{found['ratio']:.2f}" for name, found in ratios.items() if found["high"] < 1 / CLEAR]
        real = ", ".join(faster) or ("none" if ratios else "-")
        real += f" (slower: {', '.join(slower)})" if slower else ""
        accuracy = ", ".join(percent(value) for value in accuracies(cell, method))
        rows.append(f"| {method.name} | {paper} | {method.saves} | {accuracy} | {real} |")
    return rows


def notes(network: str, cells: dict[str, Cell]) -> list[str]:
    """What failed or was refused at some places, method by method."""
    found = []
    for method in method_list.methods(network):
        cell = cells.get(f"{network} {method.key}", {})
        for runtime, file in cell.get("files", {}).items():
            if "failure" in file:
                found.append(f"* {method.name}, {runtime}: {file['failure']}")
        if cell.get("places"):
            found.append(f"* {method.name}: {cell['places']}")
    return found


def report(cells: dict[str, Cell], times: dict[str, Cell]) -> str:
    """The page."""
    text = [lab.made_by("benchmarks/methods.py compress, measure, report"), "", method_list.CONDITIONS]
    for network in lab.SUBJECTS:
        if f"{network} {ORIGINAL}" in cells:
            text += ["", f"## {network}", "", *table(network, cells, times), "", *notes(network, cells)]
    return "\n".join(text) + "\n"


def main() -> None:
    """Do the asked step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("compress", "measure", "report"))
    parser.add_argument("--network", choices=tuple(lab.SUBJECTS), action="append", help="these networks only")
    parser.add_argument("--only", action="append", help="methods with this in their names only")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = lab.Cells(arguments.results / "methods.samples.jsonl")
    times = lab.Cells(arguments.results / "methods.times.jsonl")
    if arguments.step == "compress":
        compress_all(arguments.network or ("resnet", "vgg"), arguments.only, cells)
    elif arguments.step == "measure":
        measure(cells, times)
    else:
        text = report(cells.known(), times.known())
        (arguments.results / "methods.md").write_text(text, encoding="utf-8")
        print(text)
        page = DOCS.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        rows = "\n".join(overview(cells.known(), times.known()))
        DOCS.write_text(f"{before}{BEGIN}\n{rows}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
