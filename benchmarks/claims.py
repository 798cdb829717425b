"""Claims of the papers, reproduced in kind on Fashion-MNIST.

    .venv/bin/python benchmarks/claims.py [--only NAME]... [--report]

Each cell (claim, seed) is computed once and appended to benchmarks/results/claims.samples.jsonl; a run that was stopped
goes on. The table is benchmarks/results/claims.md. All cells take about an hour and a half of one core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lab
import torch
from method_list import pruned
from torch import nn

from mobilekit.packing import pack, unpack
from mobilekit.training.distillation import Distillation, Mix
from mobilekit.training.hooks import Labels
from mobilekit.training.job import Recipe
from mobilekit.training.shared import Compression, deep_compression
from mobilekit.training.sparse import Schedule, dense_sparse_dense, prune_gradually
from mobilekit.workloads import fashion_mnist

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
EPOCH = 468
"""Steps of 128 images in a pass over the 60,000."""
DSD_SPARSITY, DSD_STEPS = 0.6, 2 * EPOCH
"""Of each phase."""
DSD_RATE = 0.03
PRUNED = {"features": 0.85, "classifier": 0.95}
"""Sparsity of VGG's convolutions and linear layers: the linear layers have most of the parameters."""
PRUNING_STEPS = 8 * EPOCH
LENET = {"conv1.weight": 0.34, "conv2.weight": 0.88, "fc1.weight": 0.94, "fc2.weight": 0.81}
"""Sparsity of LeNet-5's layers, those of table 3 of arXiv:1510.00149 but for fc1 (0.92 there)."""
LENET_CONV_BITS, LENET_LINEAR_BITS = 6, 4
LENET_STEPS = 6 * EPOCH
KEPT = 5 / 8
"""Channels that LASSO and L1 leave of each group."""
NARROW = 1 / 2
"""The same for distillation, where more is lost."""
TUNING_STEPS = 400

Cell = dict[str, Any]


def dsd(seed: int) -> Cell:
    """A trained LeNet-5, the same after more dense training, and after sparse and dense training of that length."""
    dense = lab.trained("lenet", seed)
    recipe = {"optimiser": "sgd", "learning_rate": DSD_RATE, "weight_decay": 5e-4}
    longer = lab.tuned_plainly(dense, Labels(fashion_mnist.loss), 2 * DSD_STEPS, seed, **recipe)
    found = dense_sparse_dense(
        dense, Labels(fashion_mnist.loss), lab.job(seed), DSD_SPARSITY, Recipe(steps=DSD_STEPS, **recipe)
    )
    assert found.sparse is not None
    return {
        "dense": lab.accuracy(dense),
        "dense longer": lab.accuracy(longer),
        "sparse": lab.accuracy(found.sparse.module),
        "dsd": lab.accuracy(found.module),
    }


def pruning(seed: int) -> Cell:
    """A VGG-16 whose weights are cut gradually until a ninth or less is left."""
    dense = lab.trained("vgg", seed)
    sparsity = {
        name: amount
        for name, parameter in dense.named_parameters()
        for part, amount in PRUNED.items()
        if name.startswith(part) and parameter.ndim > 1 and parameter.shape[1] > 1 and parameter.shape[0] > 10
    }
    recipe = Recipe(steps=PRUNING_STEPS, **lab.FROM_SCRATCH)
    found = prune_gradually(dense, Labels(fashion_mnist.loss), lab.job(seed), Schedule(sparsity), recipe)
    before, after = lab.weight_count(dense), lab.weight_count(found.module)
    return {
        "dense": lab.accuracy(dense),
        "pruned": lab.accuracy(found.module),
        "parameters": before,
        "left": after,
        "times": before / after,
    }


def compression(seed: int) -> Cell:
    """LeNet-5 after pruning, sharing and Huffman codes: bytes of the package beside those of the float file."""
    dense = lab.trained("lenet", seed)
    how = Compression(schedule=Schedule(LENET), conv_bits=LENET_CONV_BITS, linear_bits=LENET_LINEAR_BITS, example=None)
    teacher = Distillation(dense, dense, Mix(), fashion_mnist.loss)
    found = deep_compression(dense, teacher, lab.job(seed), how, Recipe(steps=LENET_STEPS // 2))
    with tempfile.TemporaryDirectory() as folder:
        whole = lab.exported(lab.candidate(dense, "lenet"), "onnx", "fp32", Path(folder, "dense"))
        small = lab.exported(lab.candidate(found.shared.module, "lenet"), "onnx", "fp32", Path(folder, "small"))
        made = pack(small)
        unpack(Path(made.package), Path(folder, "again.onnx"))
        assert Path(folder, "again.onnx").read_bytes() == small.read_bytes()
        return {
            "dense": lab.accuracy(dense),
            "compressed": lab.accuracy(found.shared.module),
            "file accuracy": lab.file_accuracy("onnx", Path(folder, "again.onnx")),
            "bytes": whole.stat().st_size,
            "package bytes": Path(made.package).stat().st_size,
            "times": whole.stat().st_size / Path(made.package).stat().st_size,
            "zip": made.zip_ratio,
            "zstd": made.zstd_ratio,
        }


def selection(name: str) -> Cell:
    """LASSO with reconstruction beside L1 at the same widths, which is the same latency, before any fine-tuning."""
    start = lab.candidate(lab.trained(name), name)
    modules = {
        "l1": pruned(start, KEPT)[0],
        "l1 refitted": pruned(start, KEPT, repair="least_squares")[0],
        "lasso": pruned(start, KEPT, criterion="lasso")[0],
    }
    widths = {key: [group.width for group in found.network.groups.values()] for key, found in modules.items()}
    assert widths["l1"] == widths["lasso"] == widths["l1 refitted"]
    return {"whole": lab.accuracy(start.module), **{key: lab.accuracy(found.module) for key, found in modules.items()}}


def distillation(seed: int) -> Cell:
    """One pruned network after the same number of steps with labels alone, and with the original as a teacher."""
    teacher = lab.trained("resnet")
    student = pruned(lab.candidate(teacher, "resnet"), NARROW)[0].module
    ways: dict[str, Callable[[], nn.Module]] = {
        "labels": lambda: lab.tuned_plainly(student, Labels(fashion_mnist.loss), TUNING_STEPS, seed),
        "soft targets": lambda: lab.tuned(student, teacher, TUNING_STEPS, seed),
        "hints": lambda: lab.tuned(student, teacher, TUNING_STEPS, seed, Mix(hints=1.0)),
        "attention": lambda: lab.tuned(student, teacher, TUNING_STEPS, seed, Mix(attention=100.0)),
    }
    return {"untrained": lab.accuracy(student), **{name: lab.accuracy(way()) for name, way in ways.items()}}


CELLS: dict[str, tuple[Callable[..., Cell], Sequence[Any]]] = {
    "dsd": (dsd, SEEDS),
    "pruning": (pruning, SEEDS[:1]),
    "compression": (compression, SEEDS[:1]),
    "selection": (selection, ("resnet", "vgg")),
    "distillation": (distillation, SEEDS),
}


def points(values: Sequence[float]) -> str:
    """Mean of fractions in percent, with the standard deviation where there are several."""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return mean + (f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else "")


def gathered(known: dict[str, Cell], claim: str) -> dict[str, list[float]]:
    """Figure -> its values over the seeds at hand."""
    cells = [known[key] for key in (f"{claim}-{case}" for case in CELLS[claim][1]) if key in known]
    return {name: [cell[name] for cell in cells] for name in (cells[0] if cells else {}) if name != "key"}


def verdict(holds: bool) -> str:
    """In a word."""
    return "holds" if holds else "does not hold"


def differences(figures: dict[str, list[float]], better: str, worse: str) -> list[float]:
    """Seed by seed."""
    return [a - b for a, b in zip(figures[better], figures[worse], strict=True)]


def lines(known: dict[str, Cell]) -> list[str]:
    """A row for each claim that was computed: what was found, and whether it holds."""
    rows = []
    if found := gathered(known, "dsd"):
        gain, over = differences(found, "dsd", "dense"), differences(found, "dsd", "dense longer")
        text = (
            f"LeNet-5: dense {points(found['dense'])} %, sparse at {DSD_SPARSITY:.0%} {points(found['sparse'])} %, "
            f"dense again {points(found['dsd'])} % ({points(gain)} points more); as many dense steps alone reach "
            f"{points(found['dense longer'])} % (DSD minus that: {points(over)} points)"
        )
        rows.append(("DSD ends at or above the dense baseline", text, verdict(statistics.fmean(gain) >= 0)))
    if found := gathered(known, "pruning"):
        text = (
            f"VGG-16 x0.125: {found['parameters'][0]:,} parameters, {found['left'][0]:,} left "
            f"(1/{found['times'][0]:.1f}); "
            f"{points(found['dense'])} % before, {points(found['pruned'])} % after"
        )
        holds = min(found["times"]) >= 9 and statistics.fmean(differences(found, "pruned", "dense")) >= 0
        rows.append(("9 times fewer parameters without loss", text, verdict(holds)))
    if found := gathered(known, "compression"):
        text = (
            f"LeNet-5: {found['bytes'][0]:,.0f} bytes of ONNX, packages of "
            + ", ".join(f"{size:,.0f}" for size in found["package bytes"])
            + " bytes ("
            + ", ".join(f"{times:.1f}" for times in found["times"])
            + f" times smaller); {points(found['dense'])} % before, {points(found['file accuracy'])} % unpacked"
        )
        drop = statistics.fmean(differences(found, "dense", "file accuracy"))
        rows.append(("35 times smaller within 0.3 points", text, verdict(min(found["times"]) >= 35 and drop <= 0.003)))
    for number, name in enumerate(CELLS["selection"][1]):
        if found := gathered(known, "selection"):
            cell = {key: values[number] for key, values in found.items() if number < len(values)}
            if cell:
                text = (
                    f"{name}, {KEPT:.0%} of all channels: whole {100 * cell['whole']:.2f} %, "
                    f"L1 {100 * cell['l1']:.2f} %, L1 with re-fitted readers {100 * cell['l1 refitted']:.2f} %, "
                    f"LASSO {100 * cell['lasso']:.2f} %"
                )
                claim = "LASSO with reconstruction beats L1 before fine-tuning at the same widths"
                rows.append((claim, text, verdict(cell["lasso"] > cell["l1"])))
    if found := gathered(known, "distillation"):
        text = f"ResNet with {NARROW:.0%} of its channels, {TUNING_STEPS} steps: " + ", ".join(
            f"{name} {points(values)} %" for name, values in found.items()
        )
        gain = differences(found, "soft targets", "labels")
        text += f"; soft targets are {points(gain)} points above labels"
        rows.append(("Distillation beats plain fine-tuning at the same latency", text, verdict(min(gain) > 0)))
    return ["| claim | found | verdict |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


def main() -> None:
    """Compute what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=sorted(CELLS), action="append", help="these claims only")
    parser.add_argument("--report", action="store_true", help="compute nothing")
    parser.add_argument("--samples", type=Path, default=RESULTS / "claims.samples.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = lab.Cells(arguments.samples)
    for claim in (name for name in CELLS if name in (arguments.only or CELLS) and not arguments.report):
        compute, cases = CELLS[claim]
        for case in cases:
            cells.compute(f"{claim}-{case}", lambda compute=compute, case=case: compute(case))
    text = "\n".join([lab.made_by("benchmarks/claims.py"), "", *lines(cells.known())])
    print(text)
    (RESULTS / "claims.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
