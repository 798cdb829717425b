"""Compares mobilekit's files with those of the plain exporters and the stock quantisers: latency, size, agreement.

    .venv/bin/python benchmarks/exports.py run [--networks NAME ...] [--seconds S]
    .venv/bin/python benchmarks/exports.py report

`run` writes each network's files in both ways and times each pair in turn on this machine, one thread; a pair that is
in benchmarks/results/exports.samples.jsonl is not repeated. `report` writes benchmarks/results/exports.md from the
lines. Core ML files are evaluated and not timed: nothing but Apple's systems runs them. Run it from the project's root.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lab
import numpy as np
import torch
import zoo
import zoo_networks
from peer_methods import stock_int8
from torch import nn

import mobilekit as mk
from mobilekit import registry
from mobilekit.evaluate import outputs, parity
from mobilekit.runtimes._job import quiet
from mobilekit.workload import load
from mobilekit.workloads import efficientnet_lite0, fashion_mnist

RESULTS = Path(__file__).parent / "results"
SAMPLES = RESULTS / "exports.samples.jsonl"
TESTED = 256
"""Inputs that agreement is counted on, at most; none of them calibrates."""


@dataclass(frozen=True)
class Subject:
    """A network with inputs to calibrate and others to judge on."""

    module: nn.Module
    calibration: tuple[torch.Tensor, ...]
    tested: torch.Tensor
    note: str

    @property
    def example(self) -> torch.Tensor:
        """One input."""
        return self.calibration[0][:1]


def seen_by(evaluate: Callable[[Any], float], classes: int) -> torch.Tensor:
    """The first inputs that an evaluation judges on."""
    batches: list[torch.Tensor] = []

    def note(batch: torch.Tensor) -> torch.Tensor:
        batches.append(batch)
        return torch.zeros(len(batch), classes)

    evaluate(note)
    return torch.cat(batches)[:TESTED]


def photographs() -> Subject:
    """EfficientNet-Lite0 with its ImageNet weights, on photographs."""
    workload = load("mobilekit.workloads.efficientnet_lite0")
    return Subject(workload.module, workload.calibration, seen_by(efficientnet_lite0.evaluate, 1000), "held-back crops")


def bundled() -> Subject:
    """The bundled ResNet on test images of Fashion-MNIST."""
    workload = load("mobilekit.workloads.fashion_mnist")
    return Subject(workload.module, workload.calibration, seen_by(fashion_mnist.evaluate, 10), "test images")


def mobilenet_v3() -> Subject:
    """A small MobileNetV3 at 96 pixels with random weights: its time and SQNR tell, its classes do not."""
    images = zoo.crops(96)
    settling, rest = images.chunk(2)
    module = zoo_networks.build("mobilenet_v3_small", settling)
    return Subject(module, (settling,), rest, "photo crops, random weights")


NETWORKS: dict[str, Callable[[], Subject]] = {
    "efficientnet_lite0": photographs,
    "fashion_mnist": bundled,
    "mobilenet_v3_small": mobilenet_v3,
}


def plain(subject: Subject, runtime: str, folder: Path) -> Path:
    """A float file as the exporter's own documentation shows it."""
    path = folder / f"plain{registry.runtime(runtime).suffix}"
    with quiet(native=True), torch.no_grad():
        if runtime == "onnx":
            program = torch.onnx.export(subject.module, (subject.example,), dynamo=True, verbose=False)
            assert program is not None
            program.save(str(path))
        elif runtime == "tflite":
            import litert_torch

            litert_torch.convert(subject.module, (subject.example,)).export(str(path))
        else:
            path = _core_ml(subject, path)
    return path


def _core_ml(subject: Subject, path: Path) -> Path:
    import coremltools

    program = torch.export.export(subject.module, (subject.example,)).run_decompositions({})
    coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS16, skip_model_load=True).save(
        str(path)
    )
    return path


def stock(subject: Subject, runtime: str, own_float: Path, folder: Path) -> Path:
    """The runtime's own quantiser with its own calibration, on mobilekit's float file; Core ML: its int8 weights."""
    path = folder / f"stock{registry.runtime(runtime).suffix}"
    samples = [image[None].numpy() for batch in subject.calibration for image in batch]
    with quiet(native=True):
        if runtime != "coreml":
            stock_int8(runtime, own_float, samples, path)
            return path
        import coremltools
        from coremltools.optimize import coreml

        model = coremltools.models.MLModel(str(own_float), skip_model_load=True)
        each = coreml.OpLinearQuantizerConfig(mode="linear_symmetric")
        coreml.linear_quantize_weights(model, coreml.OptimizationConfig(global_config=each)).save(str(path))
    return path


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a package."""
    return (
        sum(part.stat().st_size for part in path.rglob("*") if part.is_file()) if path.is_dir() else path.stat().st_size
    )


def judged(subject: Subject, runtime: str, path: Path) -> dict[str, Any]:
    """Bytes, and closeness to PyTorch on inputs that did not calibrate."""
    session = registry.runtime(runtime).open(path)
    found = parity(outputs(subject.module, subject.tested), session([subject.tested.numpy()])[0])
    return {"bytes": size(path), "sqnr_db": found.sqnr_db, "top1": found.top1_agreement, "samples": found.samples}


def pair(subject: Subject, runtime: str, precision: str, seconds: float) -> dict[str, Any]:
    """mobilekit's file beside the other one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batches = [batch.numpy() for batch in subject.calibration]

        def own(wanted: Any) -> Path:
            (model,) = mk.export(
                subject.module,
                subject.example,
                to=[runtime],
                precision=wanted,
                calibration=batches,
                out=folder / wanted,
            )
            return Path(model.path)

        float_precision = "fp16" if runtime == "coreml" else "fp32"
        float_file = own(float_precision)
        ours = own("int8") if precision == "int8" else float_file
        theirs = stock(subject, runtime, float_file, folder) if precision == "int8" else plain(subject, runtime, folder)
        row: dict[str, Any] = {
            "network": subject.note,
            "ours": judged(subject, runtime, ours),
            "operators": registry.runtime(runtime).describe(ours).operators,
            # a plain TFLite file takes channels first, which sessions of ours do not feed
            "theirs": judged(subject, runtime, theirs) if precision == "int8" else {"bytes": size(theirs)},
            "timed": None,
        }
        if runtime != "coreml":
            timed = lab.timed(theirs, ours, runtime, seconds)
            low, high = timed.interval
            row["timed"] = {
                "ours_ms": float(np.median(timed.candidate.cpu_samples_ms)),
                "theirs_ms": float(np.median(timed.baseline.cpu_samples_ms)),
                # the other way round: how much longer ours takes
                "ratio": 1 / timed.ratio,
                "low": 1 / high,
                "high": 1 / low,
            }
        return row


def table(known: dict[str, dict[str, Any]]) -> list[str]:
    """The rows of the report."""
    lines = [
        "| network | file | mobilekit ms | other ms | time, mobilekit / other | kB | SQNR dB | top-1 agreement |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = list(NETWORKS)
    for key, row in sorted(known.items(), key=lambda item: order.index(item[0].split()[0])):
        network, runtime, precision = key.split()
        ours, theirs, timed = row["ours"], row["theirs"], row["timed"]

        def both(name: str, form: str, scale: float = 1.0, ours: Any = ours, theirs: Any = theirs) -> str:
            shown = [format(end[name] / scale, form) if end.get(name) is not None else "-" for end in (ours, theirs)]
            return " / ".join(shown)

        time = "not timed | not timed | -"
        if timed:
            span = f"{timed['ratio']:.3f} ({timed['low']:.3f} to {timed['high']:.3f})"
            time = f"{timed['ours_ms']:.3f} | {timed['theirs_ms']:.3f} | {span}"
        cells = [network, f"{runtime} {precision}", time, both("bytes", ".0f", 1000), both("sqnr_db", ".1f")]
        lines.append("| " + " | ".join([*cells, both("top1", ".3f")]) + " |")
    return lines


def report() -> None:
    """Write the table."""
    known = lab.Cells(SAMPLES).known()
    text = [
        "# mobilekit's files beside those of plain exporters and stock quantisers",
        "",
        lab.made_by("benchmarks/exports.py run"),
        "",
        "Each pair was timed in turn in one run, CPU time of one thread, with the 90 % interval of the ratio: below 1,",
        "mobilekit's file is the faster one. kB, SQNR and agreement: mobilekit / the other. `fp32` (Core ML: fp16)",
        "beside `torch.onnx.export`, `litert_torch.convert` and `coremltools.convert` as their manuals show them;",
        "`int8` beside onnxruntime's `quantize_static` (QDQ, U8S8, a scale per channel, min-max), ai-edge-quantizer's",
        "static recipe with its own calibration, and coremltools' int8 weights, all three on mobilekit's float file.",
        "Judged on inputs that did not calibrate: held-back photo crops, test images, other crops. mobilenet_v3_small",
        "has random weights: its classes are near each other, and tell little. Core ML files were evaluated;",
        "mobilekit's int8 one computes in int8 (activations too), the stock one holds int8 weights alone.",
        "",
        *table(known),
        "",
    ]
    (RESULTS / "exports.md").write_text("\n".join(text), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "report"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seconds", type=float, default=10.0, help="for each pair")
    given = parser.parse_args(arguments)
    if given.verb == "run":
        torch.set_num_threads(1)
        for name in given.networks:
            subject = NETWORKS[name]()
            for runtime in ("onnx", "tflite", "coreml"):
                for precision in ("fp16" if runtime == "coreml" else "fp32", "int8"):
                    key = f"{name} {runtime} {precision}"
                    lab.Cells(SAMPLES).compute(
                        key, lambda r=runtime, p=precision, s=subject: pair(s, r, p, given.seconds)
                    )
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
