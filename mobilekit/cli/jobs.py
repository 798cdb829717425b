"""The commands of the job: plan, demo, apply, export, measure, import."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.table import Table

from mobilekit.cli import measuring
from mobilekit.cli.terminal import (
    CoolTo,
    Devices,
    DeviceSpec,
    JsonFlag,
    Out,
    Runner,
    Seed,
    Wheels,
    device_settings,
    documents,
    errors,
    figure,
    listed,
    listening,
    number,
)
from mobilekit.errors import BadInputError
from mobilekit.named_models import short_name
from mobilekit.types import Budget, ExportedModel, ExportOptions, Precision, Report, Target, WeightForm
from mobilekit.types.plan import Activations

app = typer.Typer(
    help="A trained CNN and a latency budget in; checked mobile files and a measured report out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
DEMO_SPEEDUP = 3.0
DEMO_TRAIN_SECONDS = 75.0
EXIT_CODES = {"met": 0, None: 0, "missed": 3, "unreachable": 3}


@app.command()
def plan(  # noqa: PLR0913, PLR0917 -- the options are the contract
    workload: Annotated[
        str, typer.Argument(help="file.py or package.module that defines model() and example_input().")
    ],
    profile: Annotated[str, typer.Option("--profile", help="Name of a shipped profile, or a .json file.")],
    latency_ms: Annotated[str | None, typer.Option("--latency-ms", help="Budget in milliseconds.")] = None,
    speedup: Annotated[str | None, typer.Option("--speedup", help="Budget: times faster than the original.")] = None,
    size_mb: Annotated[
        str | None, typer.Option("--size-mb", help="Largest file size: searched for, and judged.")
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option("--max-drop", help="Largest loss in points: judged; alone, the fastest within it.")
    ] = None,
    runtime: Annotated[str | None, typer.Option("--runtime", help="onnx, tflite or coreml.")] = None,
    device: DeviceSpec = None,
    devices: Devices = None,
    runner: Runner = None,
    wheels: Wheels = None,
    cool_to: CoolTo = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop at the plan: predicted, nothing measured.")] = False,
    no_train: Annotated[bool, typer.Option("--no-train", help="Do not fine-tune.")] = False,
    pareto: Annotated[
        int | None, typer.Option("--pareto", help="Make so many plans from fast to careful; measured untrained.")
    ] = None,
    train_minutes: Annotated[
        str | None, typer.Option("--train-minutes", help="Time for all training [default: 5].")
    ] = None,
    qat_drop: Annotated[
        str | None,
        typer.Option("--qat-drop", help="Points that int8 may cost before it is trained with rounding [default: 0.3]."),
    ] = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in --out.")] = False,
    seed: Seed = 0,
    as_json: JsonFlag = False,
) -> None:
    """Plan, apply, train, export, check and measure: the whole job."""
    if latency_ms is not None and speedup is not None:
        raise BadInputError("give --latency-ms or --speedup, not both")
    budget = Budget(
        latency_ms=number("--latency-ms", latency_ms),
        speedup=number("--speedup", speedup),
        size_mb=number("--size-mb", size_mb),
        max_drop=number("--max-drop", max_drop, zero=True),
    )
    minutes, drop = number("--train-minutes", train_minutes), number("--qat-drop", qat_drop, zero=True)
    folder = out or _default_out(workload)

    from mobilekit import pipeline

    request = pipeline.Request(
        workload,
        profile,
        budget,
        runtime,
        device,
        seed,
        settings=device_settings(runner, wheels),
        devices=listed(devices),
        cool_to_c=cool_to,
        train=not no_train,
        pareto=pareto,
    )
    if minutes is not None:
        request = replace(request, train_seconds=60 * minutes)
    if drop is not None:
        request = replace(request, qat_drop=drop)
    with listening() as listener:
        report = pipeline.run(request, folder, listener, resume=resume, dry=dry_run)
    _finish(report, folder, as_json, dry=dry_run)


@app.command()
def demo(out: Out = None, as_json: JsonFlag = False) -> None:
    """The main job on the bundled workload: three times faster on this machine, in ONNX Runtime."""
    from mobilekit import pipeline

    workload = "mobilekit.workloads.fashion_mnist"
    budget = Budget(speedup=DEMO_SPEEDUP)
    request = pipeline.Request(workload, "host", budget, "onnx", train_seconds=DEMO_TRAIN_SECONDS)
    folder = out or _default_out(workload)
    with listening() as listener:
        report = pipeline.run(request, folder, listener)
    _finish(report, folder, as_json)


@app.command()
def apply(  # noqa: PLR0913, PLR0917 -- the options are the contract
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A saved plan.")],
    workload: Annotated[str, typer.Argument(help="The workload to apply it to.")],
    out: Annotated[Path, typer.Option("--out", help="Output folder.")],
    devices: Devices = None,
    runner: Runner = None,
    wheels: Wheels = None,
    as_json: JsonFlag = False,
) -> None:
    """Replay a saved plan exactly as it is."""
    from mobilekit import pipeline

    settings = device_settings(runner, wheels)
    with listening() as listener:
        report = pipeline.apply(plan_file, workload, out, listener, settings=settings, devices=listed(devices))
    _finish(report, out, as_json)


@app.command()
def export(  # noqa: PLR0913, PLR0917 -- the options are the contract
    workload: Annotated[str, typer.Argument(help="The workload whose network is written as it is.")],
    to: Annotated[str, typer.Option("--to", help="Formats, with commas between: onnx,tflite,coreml.")],
    out: Annotated[Path, typer.Option("--out", help="Output folder.")],
    precision: Annotated[str, typer.Option("--precision", help="fp32, fp16 or int8.")] = "fp32",
    opset: Annotated[
        int | None, typer.Option("--opset", min=17, max=22, help="Of ONNX files [default: 20].", show_default=False)
    ] = None,
    ios: Annotated[
        int | None,
        typer.Option("--ios", min=15, max=18, help="Oldest iOS for Core ML [default: 16].", show_default=False),
    ] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Leave the batch open: ONNX and Core ML.")
    ] = False,
    activations: Annotated[
        str, typer.Option("--activations", help="Of int8 files: static, dynamic, or float (weights alone).")
    ] = "static",
    weights: Annotated[
        str, typer.Option("--weights", help="Core ML, float activations: int8, int4, palette8, palette6, 4 or 2.")
    ] = "int8",
    target: Annotated[
        str, typer.Option("--target", help="Processor of int8 ONNX files: x86, arm, or host: this one.")
    ] = "host",
    whole: Annotated[
        bool, typer.Option("--whole", help="int8 also for operators where rounding harms most and saves little.")
    ] = False,
    io: Annotated[str, typer.Option("--io", help="float, or int8: inputs and outputs of TFLite int8 files.")] = "float",
    as_json: JsonFlag = False,
) -> None:
    """Write model files and compare each with PyTorch."""
    from mobilekit import pipeline

    known: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}
    if precision not in known:
        raise BadInputError(f"--precision is fp32, fp16 or int8, not '{precision}'")
    names = [name.strip() for name in to.split(",") if name.strip()]
    if not names:
        raise BadInputError("--to names no format: give onnx, tflite or coreml")
    given = {"opset": opset, "ios": ios, "io": io, "weights": weights, "target": target, "dynamic_batch": dynamic_batch}
    kinds: dict[str, Activations] = {"static": "static", "dynamic": "dynamic", "float": "float"}
    if activations not in kinds:
        raise BadInputError(f"--activations is static, dynamic or float, not '{activations}'")
    order = pipeline.Order(tuple(names), known[precision], _export_options(names, given), kinds[activations], whole)
    with listening() as listener:
        models, failures = pipeline.export_workload(workload, order, out, listener)
    if as_json:
        document = {
            "models": [model.model_dump(mode="json") for model in models],
            "failures": [failure.model_dump() for failure in failures],
        }
        print(json.dumps(document, indent=2))
    else:
        documents().print(_export_table(models))
        for model in models:
            for operator, reason in model.not_int8.items():
                documents().print(f"{model.path}: {operator}: {reason}", markup=False, soft_wrap=True)
    for failure in failures:
        errors.print(f"{failure.subject}: {failure.message}", style="red", markup=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


app.command()(measuring.measure)


@app.command("import")
def import_(
    result: Annotated[Path, typer.Argument(metavar="RESULT.json", help="A result that the phone app shared.")],
    into: Annotated[Path, typer.Option("--into", metavar="DIR", help="Folder of a plan that holds the model.")],
    as_json: JsonFlag = False,
) -> None:
    """Take in a measurement that a phone app shared."""
    from mobilekit import pipeline

    made = pipeline.import_result(result, into)
    if as_json:
        print(made.model_dump_json(indent=2))
        return
    row = made.row
    said = f"median {row.median_ms:.3f} ms {row.clock} time, p90 {row.p90_ms:.3f}"
    print(f"{made.model} on {row.device} ({row.origin}): {said}")
    print(f"  {row.samples} runs, line {row.line} of {row.file}")
    print(f"report: {Path(made.report).resolve() if made.report else 'none in this folder'}")


# ---------------------------------------------------------------- what they print


def _export_options(names: list[str], given: dict[str, str | int | bool | None]) -> ExportOptions:
    """What was asked for; an option of a format that is not written is a mistake."""
    for option, values in (("io", ("float", "int8")), ("weights", get_args(WeightForm)), ("target", get_args(Target))):
        if given[option] not in values:
            raise BadInputError(f"--{option} is one of {', '.join(values)}, not '{given[option]}'")
    for option, name in (("opset", "onnx"), ("ios", "coreml")):
        if given[option] is not None and name not in names:
            raise BadInputError(f"--{option} is for {name} files: add {name} to --to, or leave it out")
    return ExportOptions.model_validate({key: value for key, value in given.items() if value is not None})


def _export_table(models: list[ExportedModel]) -> Table:
    rows = Table("file", "precision", "kB", "parity", "SQNR dB", "top-1 agreement", "operators", box=None)
    for model in models:
        parity = model.parity
        operators = ", ".join(f"{count} {name}" for name, count in model.facts.operators.items())
        rows.add_row(
            model.path, model.precision, f"{model.size_bytes / 1000:.0f}", parity.status,
            figure(parity.sqnr_db, ".1f"), figure(parity.top1_agreement, ".3f"), operators,
        )  # fmt: skip
    return rows


def _default_out(workload: str) -> Path:
    return Path("mobilekit-out") / short_name(workload)


def _finish(report: Report, folder: Path, as_json: bool, *, dry: bool = False) -> None:
    """Print the outcome and leave with the verdict's exit code."""
    if as_json:
        print((folder / "report.json").read_text(encoding="utf-8"))
    else:
        for line in _outcome(report):
            print(line)
        print(f"report: {(folder / 'report.html').resolve()}")
    code = EXIT_CODES[report.verdict]
    if report.verdict is None and report.findings and report.device is not None and not dry:
        code = 1  # a budget was given and the result could not be measured against it
    raise typer.Exit(code)


def _outcome(report: Report) -> Iterator[str]:
    verdicts = {
        "met": "budget met, as measured",
        "missed": "budget missed, as measured",
        "unreachable": "budget unreachable",
        None: "no verdict: nothing to meet, or nothing measured",
    }
    yield verdicts[report.verdict]
    for row in report.findings:
        yield f"  {row.item}: asked {row.limit:g}, found {figure(row.found, '.4g')} {row.note}".rstrip()
    if report.best_reachable_ms is not None:
        yield f"  best reachable: {report.best_reachable_ms:.4g} ms"
    before, after = report.baseline, report.result
    if after.latency_ms is not None:
        clock = report.budget.clock
        yield f"  latency {figure(before.latency_ms, '.3f')} -> {after.latency_ms:.3f} ms (median of {clock} time)"
    if after.accuracy is not None:
        yield f"  accuracy {figure(before.accuracy, '.4f')} -> {after.accuracy:.4f} ({report.accuracy_kind})"
    if after.size_bytes is not None:
        yield f"  size {figure((before.size_bytes or 0) / 1000, '.0f')} -> {after.size_bytes / 1000:.0f} kB"
    for failure in report.failures:
        yield f"  failed: {failure.stage} {failure.subject}: {failure.message}"
