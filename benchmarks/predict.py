"""Checks predicted latency on real networks that no price was fitted to: exports, measures, predicts.

    .venv/bin/python benchmarks/predict.py export  --models DIR     # an hour, once: files that exist are kept
    .venv/bin/python benchmarks/predict.py measure --models DIR     # 10 minutes, on a quiet machine
    .venv/bin/python benchmarks/predict.py predict --models DIR [--profile host|FILE]

Networks are those of `networks.py`, each in every runtime and precision of the host. `measure` appends raw samples to
results/predict.samples.jsonl and leaves out what that file holds already; `predict` writes results/predict.json,
predict.md and predict.png.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import torch
import typer
from networks import NETWORKS, build, example
from predict_report import Row, markdown, plot, summaries

import mobilekit
from mobilekit import bench, network, profiles, registry
from mobilekit.cost.measure import SAME_SPEED, at_speed, in_precision, undisturbed_ms
from mobilekit.cost.price import price
from mobilekit.errors import MobilekitError
from mobilekit.stats import median
from mobilekit.types import BenchModel, DeviceProfile, Measurement, Network, Precision

RESULTS = Path(__file__).parent / "results"
RUNTIMES = ("onnx", "tflite")
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
PASSES = range(1, 9)
"""Every case is measured once in each pass, until ENOUGH of its passes saw the machine undisturbed."""
ENOUGH = 2
"""Undisturbed passes of a case: they are minutes apart, so that their difference shows what noise is left."""
CALIBRATION_SAMPLES = 4
PACKAGES = ("mobilekit", "torch", "onnx", "onnxruntime", "ai-edge-litert", "litert-torch", "ai-edge-quantizer", "numpy")

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False, rich_markup_mode=None)
Models = Annotated[Path, typer.Option(help="folder of the exported networks")]
Only = Annotated[list[str] | None, typer.Option(help="these networks only")]
Samples = Annotated[Path, typer.Option(help="raw samples, JSON lines")]


class Case(NamedTuple):
    """A network in a runtime and a precision."""

    network: str
    runtime: str
    precision: Precision

    def __str__(self) -> str:
        return " ".join(self)

    def file(self, models: Path) -> Path:
        """Where the exported file lies."""
        marker = ".int8" if self.precision == "int8" else ""
        return models / self.network / f"network{marker}{registry.runtime(self.runtime).suffix}"


def cases(only: Sequence[str] | None) -> list[Case]:
    """Every network in every runtime and precision; raises BadParameter for a name that is none."""
    unknown = sorted(set(only or ()) - set(NETWORKS))
    if unknown:
        raise typer.BadParameter(f"unknown network '{unknown[0]}': choose from {', '.join(NETWORKS)}")
    return [Case(name, r, p) for r in RUNTIMES for name in only or NETWORKS for p in PRECISIONS]


# ---------------------------------------------------------------- export


@app.command()
def export(models: Models, only: Only = None) -> None:
    """Write the networks' files. One that cannot be written is noted in DIR/failures.json and tried again next time."""
    torch.set_num_threads(1)
    models.mkdir(parents=True, exist_ok=True)
    failures = _failures(models)
    for case in cases(only):
        failures.pop(str(case), None)
        if case.file(models).exists():
            continue
        started = time.monotonic()
        try:
            said = _exported(case, models)
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is a row and the next file is tried
            traceback.print_exc()
            failures[str(case)] = said = f"{type(error).__name__}: {error}"
        print(f"{case}: {said} ({time.monotonic() - started:.0f} s)", flush=True)
        (models / "failures.json").write_text(json.dumps(failures, indent=1), encoding="utf-8")


def _failures(models: Path) -> dict[str, str]:
    """Case -> why its last export failed."""
    path = models / "failures.json"
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return known


def _exported(case: Case, models: Path) -> str:
    """Export through the public function, which runs the file and compares it with the module on the same noise."""
    noise = torch.randn(
        CALIBRATION_SAMPLES, *example(case.network).shape[1:], generator=torch.Generator().manual_seed(1)
    )
    (written,) = mobilekit.export(
        build(case.network),
        example(case.network),
        to=[case.runtime],
        precision=case.precision,
        calibration=[noise.numpy()],
        out=models / case.network,
    )
    return f"{written.size_bytes / 1e6:.1f} MB, {written.parity.sqnr_db or 0:.0f} dB to the module"


# ---------------------------------------------------------------- measure


@app.command()
def measure(
    models: Models,
    only: Only = None,
    samples: Samples = RESULTS / "predict.samples.jsonl",
    rounds: Annotated[int, typer.Option(help="rounds of each case in each pass")] = 30,
    seconds: Annotated[float, typer.Option(help="most seconds of each case in each pass")] = 3.0,
) -> None:
    """Time every file on one pinned thread, in turn with the reference product, pass by pass, until each was timed
    undisturbed twice."""
    samples.parent.mkdir(parents=True, exist_ok=True)
    known = {(number, case): run for number, case, run in _recorded(samples) if _is_of(run, case.file(models))}
    with samples.open("a", encoding="utf-8") as journal:
        for number in PASSES:
            speed = undisturbed_ms(ms for run in known.values() for ms in run.reference_ms)
            for case in cases(only):
                path = case.file(models)
                if not path.exists() or (number, case) in known or len(_steady(case, known, speed)) >= ENOUGH:
                    continue
                model = BenchModel(name=str(case), path=str(path), runtime=case.runtime)
                result = bench.measure(registry.device("host"), [model], threads=1, runs=rounds, max_seconds=seconds)
                for failure in result.failures:
                    print(f"{case}: {failure.message}; {failure.remedy}", flush=True)
                for run in result.measurements:
                    known[number, case] = run
                    line = {"pass": number, **case._asdict(), "measurement": _without_folder(run, models)}
                    journal.write(json.dumps(line) + "\n")
                    journal.flush()
                    print(f"pass {number} {case}: {run.median_ms:.3f} ms, {len(run.samples_ms)} rounds", flush=True)


def _steady(case: Case, runs: Mapping[tuple[int, Case], Measurement], speed: float | None) -> list[Measurement]:
    """The passes in which enough rounds of the case were at that speed."""
    return [run for (_, timed), run in runs.items() if timed == case and _at(run, speed)[1]]


def _is_of(run: Measurement, path: Path) -> bool:
    """Whether the file is the one that was measured."""
    return path.exists() and run.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def _without_folder(run: Measurement, models: Path) -> dict[str, Any]:
    path = Path(run.path).resolve().relative_to(models.resolve())
    return run.model_copy(update={"path": str(path)}).model_dump(mode="json")


def _recorded(samples: Path) -> Iterator[tuple[int, Case, Measurement]]:
    """Every line of the raw samples; later ones stand for the same case measured again."""
    for line in samples.read_text(encoding="utf-8").splitlines() if samples.exists() else ():
        entry = json.loads(line)
        case = Case(entry["network"], entry["runtime"], entry["precision"])
        yield entry["pass"], case, Measurement.model_validate(entry["measurement"])


# ---------------------------------------------------------------- predict


@app.command()
def predict(
    models: Models,
    only: Only = None,
    profile: Annotated[str, typer.Option(help="name of a shipped profile, or a .json file")] = "host",
    samples: Samples = RESULTS / "predict.samples.jsonl",
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Price the traced networks, compare with what was measured, write the results."""
    prices = _priced(profile)
    runs = {(number, case): run for number, case, run in _recorded(samples)}
    typical = undisturbed_ms(ms for run in runs.values() for ms in run.reference_ms)
    rows, missing = [], _failures(models)
    for case in cases(only):
        passes = [runs[number, case] for number in PASSES if (number, case) in runs]
        if not passes:
            missing.setdefault(str(case), "not measured")
            continue
        try:
            rows.append(_row(case, _traced(case.network, models), prices, passes, typical))
        except MobilekitError as error:
            missing[str(case)] = str(error)
    result = {
        **_conditions(prices, list(runs.values())),
        "summary": {name: summary._asdict() for name, summary in summaries(rows).items()},
        "rows": [row._asdict() for row in rows],
        "missing": missing,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "predict.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "predict.md").write_text(markdown(result, rows), encoding="utf-8")
    print(markdown(result, rows))
    plot(rows, out / "predict.png")


def _priced(name: str) -> DeviceProfile:
    """The profile; the host's is measured now where it was not before."""
    known = profiles.load(name)
    if known.kind == "host" and not known.tables:
        from mobilekit.pipeline.pricing import measured_profile

        known, _ = measured_profile(registry.device("host"), known, lambda _stage, _fraction: None)
    return known


def _row(
    case: Case, traced: Network, prices: DeviceProfile, passes: Sequence[Measurement], typical: float | None
) -> Row:
    """Predicted beside measured."""
    traced = in_precision(traced, case.precision)
    table = prices.table(case.runtime, case.precision)
    speed = _speed(table.reference_ms if table else None, typical)
    estimate = price(traced, prices, case.runtime)
    steady = [run for run in passes if _at(run, speed)[1]]
    repeats = [_at(run, speed)[0] for run in steady]
    return Row(
        **case._asdict(),
        macs=traced.macs,
        predicted_ms=estimate.latency_ms,
        low_ms=estimate.low_ms,
        high_ms=estimate.high_ms,
        extrapolated=len(estimate.extrapolated),
        measured_ms=mean(repeats or [_at(run, speed)[0] for run in passes]),
        cpu_ms=median([run.median_ms for run in passes]),
        passes=len(steady),
        repeat=repeats[-1] / repeats[0] if len(repeats) > 1 else None,
    )


def _speed(table_ms: float | None, typical_ms: float | None) -> float | None:
    """The speed to compare at: the undisturbed one of the runs, where it is that of the profile.

    The reference product is some percent slower between a hundred small models than beside one large one.
    """
    if table_ms and typical_ms and abs(math.log(table_ms / typical_ms)) > 2 * math.log(SAME_SPEED):
        return table_ms
    return typical_ms or table_ms


def _at(run: Measurement, reference_ms: float | None) -> tuple[float, bool]:
    """CPU time of a run while the reference product takes `reference_ms`, and whether enough rounds were at it."""
    return at_speed(run.cpu_samples_ms, run.reference_ms, reference_ms)


def _traced(name: str, models: Path) -> Network:
    """The network's operators, kept beside its files for as long as the tracer's code is the same."""
    sources = [Path(__file__).with_name("networks.py"), *sorted(Path(network.__file__).parent.glob("*.py"))]
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    path = models / name / f"traced-{key}.json"
    if not path.exists():
        torch.set_num_threads(1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(network.trace(build(name, settle=False), example(name), name).model_dump_json())
    return Network.model_validate_json(path.read_bytes())


def _conditions(prices: DeviceProfile, runs: Iterable[Measurement]) -> dict[str, Any]:
    """What a reader needs to judge or repeat the figures; no paths of this machine."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    info = registry.device("host").info()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": shlex.join(["python", "benchmarks/predict.py", *words]),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "measured": sorted({run.started_at[:10] for run in runs}),
        "cpu": info.soc,
        "cores": info.cores,
        "versions": versions,
        "profile": prices.name,
        "profile_key": prices.key,
    }


if __name__ == "__main__":
    app()
