"""The report writers: contract keys, escaping, well-formed output, and words where nothing was measured."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest

from mobilekit import registry
from mobilekit.reports import _words as words
from mobilekit.reports._blocks import MOST_ROWS
from mobilekit.reports._figures import ticks
from mobilekit.reports._operators import _grouped, _paired
from mobilekit.types import (
    Battery,
    BenchWarning,
    Budget,
    Cluster,
    DeviceInfo,
    DeviceRow,
    Failure,
    Finding,
    FrontierRow,
    Interval,
    KindFactor,
    MeasurementRow,
    ModelFigures,
    ModelRow,
    OperatorBar,
    Parity,
    PlanRow,
    PrecisionRow,
    RejectedOption,
    Report,
    Round,
    StageRow,
    Together,
)

HOSTILE = (
    "<script>alert(\"1\")</script> & 'q' | `x` \\ https://evil.example/x.js "
    "\u202egnp\u202c 模型 \x00\x1b ]]> --> {{ 7*7 }}"
)
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}
NUMBERS = random.Random(7)  # noqa: S311


def bars(scale: float, names: int = 24) -> tuple[OperatorBar, ...]:
    sizes = [0.021, *([0.094, 0.101, 0.006] * 4), *([0.061, 0.072, 0.004] * 3), 0.003, 0.002]
    kinds = ["dense", *(["dense", "dense", "add"] * 7), "global_pool", "linear"]
    rows = zip(sizes * 5, kinds * 5, strict=False)
    found = [
        OperatorBar(name=f"stage{i // 8 + 1}.{i % 8}.conv{i % 3 + 1}", kind=k, ms=s * scale)
        for i, (s, k) in enumerate(rows)
    ]
    return tuple(found[:names])


def samples(middle: float, count: int = 200) -> tuple[float, ...]:
    found = [middle * (0.975 + NUMBERS.expovariate(28)) for _ in range(count)]
    found[17] = middle * 3.4
    return tuple(found)


def measured(middle: float, line: int, **changes: Any) -> MeasurementRow:
    row = MeasurementRow(
        device="host",
        origin="host",
        threads=1,
        median_ms=middle,
        clock="cpu",
        p90_ms=middle * 1.07,
        min_ms=middle * 0.97,
        wall_median_ms=middle * 1.02,
        reference_ratio=middle / 4.9,
        samples=200,
        file="measurements.jsonl",
        line=line,
    )
    return row.model_copy(update=changes)


def model(path: str, runtime: str, precision: str, parity: Parity, **changes: Any) -> ModelRow:
    row = ModelRow(
        path=path,
        runtime=runtime,
        precision=precision,  # type: ignore[arg-type]
        size_bytes=291_482,
        sha256="9f3c" * 16,
        parity=parity,
        operators={"int8": 20, "fp32": 2},
        accuracy=0.9324,
        measurements=(),
    )
    return row.model_copy(update=changes)


def models() -> tuple[ModelRow, ...]:
    exact = Parity(status="executed", cosine=1.0, top1_agreement=1.0, max_abs_error=0.0, samples=64)
    close = Parity(
        status="executed", sqnr_db=34.62, cosine=0.999812, top1_agreement=0.9941, max_abs_error=0.4127, samples=512
    )
    shape = Parity(status="structure-only", note="this machine has no Core ML runtime")
    evaluated = Parity(
        status="evaluated", sqnr_db=44.1, cosine=0.99998, top1_agreement=1.0, max_abs_error=0.0312, samples=16
    )
    original = model("models/original.onnx", "onnx", "fp32", exact, size_bytes=2_793_110, operators={"fp32": 22})
    return (
        original.model_copy(update={"accuracy": 0.9362, "measurements": (measured(1.292, 1),)}),
        model("models/fashion_mnist-int8.onnx", "onnx", "int8", close, measurements=(measured(0.4151, 2),)),
        model(
            "models/fashion_mnist-int8.tflite",
            "tflite",
            "int8",
            close,
            size_bytes=302_112,
            measurements=(
                measured(0.588, 3),
                measured(0.93, 4, device="pixel-6-api-34", origin="emulator", reference_ratio=None),
            ),
        ),
        model(
            "models/fashion_mnist-fp16.mlpackage", "coreml", "fp16", evaluated, accuracy=None, operators={"fp16": 22}
        ),
        model("models/fashion_mnist-int8.mlpackage", "coreml", "int8", shape, accuracy=None, operators={}),
    )


def plan_rows() -> tuple[PlanRow, ...]:
    pruning, place = "channel_pruning", "stage1 (4 coupled modules)"
    widest = "keeps 20 of 32 channels: the widest group that the damage allows"
    multiple = "keeps 72 of 128 channels, a multiple of 8 that the kernels like"
    rank = "rank 36 of 128 holds 96 % of the weight's energy"
    int8 = "every convolution gains; the classifier stays in fp32 because int8 saves nothing there"
    return (
        PlanRow(transform=pruning, where=place, reason=widest, saved_ms=0.281, damage=0.0121),
        PlanRow(transform=pruning, where="stage3.0.conv1", reason=multiple, saved_ms=0.094, damage=0.0043),
        PlanRow(transform="low_rank", where="stage3.1.conv2", reason=rank, saved_ms=0.041, damage=0.0019),
        PlanRow(transform="int8", where="20 operators", reason=int8, saved_ms=0.462, damage=None),
    )


def rejected_rows(count: int = 9) -> tuple[RejectedOption, ...]:
    return tuple(
        RejectedOption(
            transform="group_convolution",
            where=f"stage{i % 3 + 1}.{i % 2}.conv{i % 2 + 1}",
            reason="4 groups cost 0.031 of damage for 0.012 ms: pruning the same layer saves more for less",
        )
        for i in range(count)
    )


def sample_report(**changes: Any) -> Report:
    """A Fashion-MNIST ResNet that had to become 3 times faster and did."""
    path = "models/fashion_mnist-int8.onnx"
    report = Report(
        mobilekit_version="0.1.0",
        created_at="2026-11-14T09:26:41+00:00",
        workload="mobilekit/workloads/fashion_mnist.py",
        data="10,000 labelled test images",
        profile="host",
        device="host",
        device_info=DeviceInfo(
            name="host",
            kind="host",
            origin="host",
            soc="AMD EPYC 7R13",
            cores=2,
            memory_mb=7_813,
            os="Linux 6.1",
            versions={"onnx": "onnxruntime 1.23.2", "tflite": "ai-edge-litert 2.1.0"},
        ),
        seed=0,
        budget=Budget(speedup=3, max_drop=1),
        verdict="met",
        findings=(
            Finding(item="speedup", limit=3, found=3.112, met=True, note="lower end of the 90 % interval"),
            Finding(item="accuracy_drop", limit=1, found=0.38, met=True),
        ),
        best_reachable_ms=None,
        best_reachable_basis=None,
        dry_run=False,
        baseline=ModelFigures(
            latency_ms=1.2923, accuracy=0.9362, size_bytes=2_793_110, macs=30_821_632, params=696_618,
            runtime="onnx", precision="fp32", path="models/original.onnx",
        ),
        result=ModelFigures(
            latency_ms=0.4151, accuracy=0.9324, size_bytes=291_482, macs=11_482_112, params=271_034,
            runtime="onnx", precision="int8", path=path,
        ),
        accuracy_kind="top-1, by the workload's evaluate",
        ratio=3.1128,
        ratio_interval=(3.082, 3.171),
        predicted_latency_ms=Interval(low=0.381, value=0.4219, high=0.468, basis="anchored"),
        predicted_baseline_ms=Interval(low=1.1, value=1.27, high=1.4, basis="anchored"),
        extrapolated=("stage3.0.conv1", "classifier"),
        rounds=(
            Round(predicted_ms=0.402, measured_ms=0.521, baseline_ms=1.301, target_ms=0.431, options=3),
            Round(predicted_ms=0.4219, measured_ms=0.4183, baseline_ms=1.294, target_ms=0.431, options=4),
        ),
        plan=plan_rows(),
        rejected=rejected_rows(),
        models=models(),
        operators_before=bars(1.0),
        operators_after=bars(0.33, 22),
        predicted_before=bars(1.04),
        predicted_after=bars(0.31, 22),
        samples={"original, fp32": samples(1.292), "result, int8": samples(0.4151)},
        conditions={
            "clock": "CPU time of one pinned thread",
            "protocol": "10 warm-up rounds, 200 rounds, models in turn",
            "load_average": "0.41 before, 0.62 after",
            "temperature": "not readable on this device",
        },
        stages=(
            StageRow(name="trace", seconds=1.92, resumed=True),
            StageRow(name="damage", seconds=88.1, resumed=True),
            StageRow(name="search", seconds=4.7),
            StageRow(name="train", seconds=1421.0),
            StageRow(name="export", seconds=31.6),
            StageRow(name="measure", seconds=41.0),
        ),
        failures=(
            Failure(
                stage="export",
                subject="models/fashion_mnist-int8.mlpackage",
                message="The file could not be executed: Core ML runs on Apple systems only.",
                remedy="Open it on a Mac and run `mobilekit measure` there.",
            ),
            Failure(
                stage="measure",
                subject="adb:pixel-4",
                message="No device answered.\nadb: device 'pixel-4' not found",
                remedy="Connect the phone and allow USB debugging.",
            ),
        ),
        warnings=(
            "The host is shared: wall time was 2 % above CPU time.",
            "2 operators are priced outside the sampled range.",
        ),
    )  # fmt: skip
    return report.model_copy(update=changes)


def unreachable_report() -> Report:
    return sample_report(
        budget=Budget(latency_ms=0.1, size_mb=0.25),
        verdict="unreachable",
        best_reachable_ms=0.287,
        best_reachable_basis="predicted",
        findings=(
            Finding(item="latency_ms", limit=0.1, found=0.287, met=False, note="all levers at their strongest"),
            Finding(item="size_mb", limit=0.25, found=None, met=False),
        ),
        result=ModelFigures(latency_ms=None, accuracy=None, size_bytes=None, macs=8_112_000, params=190_000),
        ratio=None,
        ratio_interval=None,
        rounds=(Round(predicted_ms=0.287, measured_ms=None, baseline_ms=1.29, target_ms=0.1, options=9),),
        operators_after=(),
        models=models()[:1],
        failures=(),
    )


def dry_report() -> Report:
    untouched = ModelFigures(latency_ms=None, accuracy=None, size_bytes=None, macs=30_821_632, params=696_618)
    return sample_report(
        device=None,
        device_info=None,
        dry_run=True,
        verdict=None,
        findings=(),
        baseline=untouched,
        result=untouched.model_copy(update={"macs": 11_482_112, "params": 271_034}),
        ratio=None,
        ratio_interval=None,
        rounds=(),
        models=(),
        operators_before=(),
        operators_after=(),
        samples={},
        conditions={},
        stages=(),
        failures=(),
        warnings=(),
        extrapolated=(),
    )


def hostile_report() -> Report:
    bar = OperatorBar(name=HOSTILE, kind=HOSTILE, ms=0.1)
    return sample_report(
        workload=HOSTILE,
        data=HOSTILE,
        profile=HOSTILE,
        device=HOSTILE,
        created_at=HOSTILE,
        mobilekit_version=HOSTILE,
        accuracy_kind=HOSTILE,
        device_info=DeviceInfo(
            name=HOSTILE,
            kind=HOSTILE,
            origin="device",
            soc=HOSTILE,
            cores=1,
            memory_mb=None,
            os=HOSTILE,
            versions={HOSTILE: HOSTILE},
        ),
        findings=(Finding(item=HOSTILE, limit=1, found=2, met=False, note=HOSTILE),),
        predicted_latency_ms=Interval(low=0.3, value=0.4, high=0.5, basis=HOSTILE),
        plan=(PlanRow(transform=HOSTILE, where=HOSTILE, reason=HOSTILE, saved_ms=None, damage=0.0),),
        rejected=(RejectedOption(transform=HOSTILE, where=HOSTILE, reason=HOSTILE),),
        models=(
            model(
                HOSTILE, HOSTILE, "int8", Parity(status="unchecked", note=HOSTILE), operators={HOSTILE: 1},
                sha256=HOSTILE, measurements=(measured(1.0, 1, device=HOSTILE, file=HOSTILE),),
            ),
        ),
        operators_before=(bar, bar),
        operators_after=(bar,),
        samples={HOSTILE: (0.1, float("inf"), float("nan"), 0.2), "none": ()},
        conditions={HOSTILE: HOSTILE},
        extrapolated=(HOSTILE,),
        stages=(StageRow(name=HOSTILE, seconds=0),),
        precisions=(PrecisionRow(name=HOSTILE, kind=HOSTILE, precision="fp32", reason=HOSTILE),) * 2,
        devices=(
            DeviceRow(
                device=HOSTILE, info=None, baseline_ms=1e300, result_ms=1e-9, ratio=1e12, ratio_interval=(0.0, 1e300),
                operators_before=(bar,), samples={HOSTILE: (1e300, -1.0, 0.1)}, conditions={HOSTILE: HOSTILE},
            ),
        ),
        measured_warnings=(BenchWarning(kind="drift", subject=HOSTILE, message=HOSTILE, advice=HOSTILE),),
        failures=(Failure(stage=HOSTILE, subject=HOSTILE, message=HOSTILE * 200, remedy=HOSTILE),),
        warnings=(HOSTILE, "# not a heading", "- not a list", "1. not a list", "_not_ emphasis"),
    )  # fmt: skip


def deep_report() -> Report:
    names = bars(1.0, 60)
    named = tuple(b.model_copy(update={"name": f"features.{i}.block.conv.{b.name}"}) for i, b in enumerate(names))
    return sample_report(
        operators_before=named,
        operators_after=named[:51],
        predicted_before=named,
        predicted_after=named[:51],
        rejected=rejected_rows(600),
        samples={f"model {i}": samples(1.0 + i, 1000) for i in range(3)},
        failures=tuple(Failure(stage="s", subject="x", message="m" * 9000, remedy="r") for _ in range(40)),
    )


def no_budget_report() -> Report:
    return sample_report(budget=Budget(), verdict=None, findings=())


def missed_report() -> Report:
    finding = Finding(item="latency_ms", limit=0.4, found=0.4151, met=False)
    return sample_report(budget=Budget(latency_ms=0.4), verdict="missed", findings=(finding,))


def precision_rows(count: int = 24) -> tuple[PrecisionRow, ...]:
    """The first layer and a pool that the runtime has no int8 kernel for stay in float."""
    kept = {0: "left in float: rounding it harms more than it saves", 17: "this runtime has no int8 pool"}
    return tuple(
        PrecisionRow(
            name=f"stage{i // 8 + 1}.{i % 8}.conv{i % 3 + 1}",
            kind="global_pool" if i == 17 else "conv",
            precision="fp32" if i in kept else "int8",
            reason=kept.get(i),
        )
        for i in range(count)
    )


PHONE = DeviceInfo(
    name="adb:8A1X0P4Q", kind="android", origin="device", soc="Google Tensor G3", cores=9, memory_mb=7_630,
    os="Android 16", versions={"tflite": "2.3.0"}, architecture="aarch64",
    clusters=(
        Cluster(cpus=(8,), core="Cortex-X3", min_mhz=500, max_mhz=2914, governor="sched_pixel"),
        Cluster(cpus=(4, 5, 6, 7), core="Cortex-A715", max_mhz=2367, governor="sched_pixel"),
        Cluster(cpus=(0, 1, 2, 3), core="Cortex-A510", max_mhz=1704, governor="sched_pixel"),
    ),
    temperatures_c={"BIG": 41.3, "skin": 33.0}, throttling="none",
    battery=Battery(percent=81, charging=False, temperature_c=31.2),
)  # fmt: skip
ARM = DeviceInfo(
    name="emulated-arm64", kind="emulated-arm64", origin="emulator", soc="qemu-user", cores=2, memory_mb=None,
    os="Debian 12 (aarch64)", versions={"onnx": "1.31.1"},
)  # fmt: skip


def devices() -> tuple[DeviceRow, ...]:
    """A phone, a board that measured no single operators, and an emulator that times nothing."""
    return (
        DeviceRow(
            device=PHONE.name, info=PHONE, baseline_ms=4.912, result_ms=1.204, ratio=4.081,
            ratio_interval=(3.97, 4.16), sessions=5, operators_before=bars(3.9), operators_after=bars(0.95, 22),
            samples={"original": samples(4.912), "result": samples(1.204)},
            conditions={"protocol": "10 warm-up rounds, 200 rounds, models in turn", "governor": "sched_pixel"},
        ),
        DeviceRow(
            device="ssh:pi@kitchen", info=None, baseline_ms=9.1, result_ms=4.02, ratio=2.264,
            ratio_interval=(2.25, 2.28), sessions=5, samples={"original": samples(9.1), "result": samples(4.02)},
        ),
        DeviceRow(
            device=ARM.name, info=ARM, baseline_ms=None, result_ms=None, ratio=None, ratio_interval=None, sessions=None
        ),
    )  # fmt: skip


UNTIMED: dict[str, Any] = {
    "median_ms": None, "p90_ms": None, "min_ms": None, "wall_median_ms": None, "reference_ratio": None, "samples": 0,
}  # fmt: skip


def many_devices_report() -> Report:
    """The final files on a host, a phone, a board, an emulator, and in an app on a phone without a cable."""
    near = Parity(status="executed", sqnr_db=37.1, cosine=0.9999, top1_agreement=1.0, max_abs_error=0.14, samples=8)
    rows = list(models())
    facts = {"load_ms": 31.2, "first_run_ms": 2.31, "peak_memory_mb": 61.4}
    rows[1] = rows[1].model_copy(
        update={
            "measurements": (
                *(measured(0.41 + 0.003 * i, 2 + i, **facts) for i in range(5)),
                measured(1.204, 9, device=PHONE.name, origin="device", energy_mj=3.91, parity=near, **facts),
                measured(4.02, 11, device="ssh:pi@kitchen", origin="device", load_ms=88.0),
                measured(0, 12, **UNTIMED, device=ARM.name, origin="emulator", instructions=41_203_551, parity=near),
            )
        }
    )
    app = {"origin": "device", "clock": "wall", "reference_ratio": None, "app": "mobilekit demo 1.2", "load_ms": 12.0}
    rows[3] = rows[3].model_copy(
        update={"measurements": (measured(0.31, 13, device="Apple iPhone15,2", compute_unit="npu", **app),)}
    )
    seen = (
        BenchWarning(
            kind="throttling", subject="result on adb:8A1X0P4Q",
            message="the phone lowered its frequencies after 41 s", advice="let it cool down and measure again",
        ),
        BenchWarning(
            kind="two-modes", subject="original",
            message="the samples have two modes, 1.292 ms and 1.701 ms (31% of the rounds)",
            advice="close what else runs on the machine",
        ),
    )  # fmt: skip
    front = tuple(
        FrontierRow(
            plan=f"plans/{i}.json", target_ms=None, predicted_ms=0.30 + 0.12 * i, measured_ms=0.32 + 0.13 * i,
            ratio=1.292 / (0.32 + 0.13 * i), damage=0.08 / (i + 1) ** 2, agreement=1 - 0.07 / (i + 1) ** 2,
            judged="before any training", options=6 - i, beaten=i == 3,
        )
        for i in range(5)
    )  # fmt: skip
    return sample_report(
        devices=devices(), models=tuple(rows), measured_warnings=seen, precisions=precision_rows(), frontier=front
    )


def wide_report() -> Report:
    """300 operators, 100 levers not used, names as long as timm's."""
    names = tuple(f"features.{i // 6}.block.{i % 6}.very_long_module_name.conv_{i % 3}" for i in range(300))
    kinds = ("conv", "QuantizeLinear", "hard_swish", "QLinearGlobalAveragePool", "squeeze_excite_scale")

    def side(scale: float) -> tuple[OperatorBar, ...]:
        return tuple(
            OperatorBar(name=name, kind=kinds[i % 5], ms=scale * (0.3 + i % 7) / 10) for i, name in enumerate(names)
        )

    rows = tuple(
        PrecisionRow(name=name, kind=kinds[i % 5], precision="fp16" if i % 5 == 2 else "int8",
                     reason="this runtime has no int8 form of hard-swish" if i % 5 == 2 else None)
        for i, name in enumerate(names)
    )  # fmt: skip
    before, after = side(1.0), side(0.4)
    base = sample_report()
    kind = "top-1 accuracy on the Fashion-MNIST test images"
    return sample_report(
        operators_before=before, operators_after=after, predicted_before=before, predicted_after=after,
        accuracy_kind=kind, baseline=base.baseline.model_copy(update={"latency_interval_ms": (1.282, 1.305)}),
        result=base.result.model_copy(update={"latency_interval_ms": (0.4092, 0.4213)}),
        precisions=rows, rejected=rejected_rows(100), samples={f"m{i}": samples(1.0 + i, 3000) for i in range(4)},
    )  # fmt: skip


REPORTS = {
    "met": sample_report,
    "missed": missed_report,
    "unreachable": unreachable_report,
    "dry run": dry_report,
    "no budget": no_budget_report,
    "hostile": hostile_report,
    "deep": deep_report,
    "many devices": many_devices_report,
    "wide": wide_report,
}


@pytest.fixture(params=REPORTS)
def report(request: pytest.FixtureRequest) -> Report:
    return REPORTS[request.param]()


def html(report: Report) -> str:
    return registry.report_writer("html").render(report)


def markdown(report: Report) -> str:
    return registry.report_writer("markdown").render(report)


class Outline(HTMLParser):
    """Checks that tags are balanced and collects visible text, links and identifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"double attribute in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def outline(text: str) -> Outline:
    parser = Outline()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


# ---------------------------------------------------------------- report.json


def test_json_begins_with_schema_and_round_trips(report: Report) -> None:
    text = registry.report_writer("json").render(report)
    assert next(iter(json.loads(text))) == "schema"
    if all(math.isfinite(s) for values in report.samples.values() for s in values):  # JSON has no infinity
        assert Report.model_validate_json(text) == report


def test_json_keeps_the_contracts_keys() -> None:
    found = json.loads(registry.report_writer("json").render(sample_report()))
    assert found["schema"] == 1
    top = (
        "schema workload profile device seed budget verdict best_reachable_ms baseline result accuracy_kind "
        "predicted_latency_ms rounds plan rejected models stages failures"
    )
    assert set(top.split()) <= set(found)
    figures = {"latency_ms", "accuracy", "size_bytes", "macs", "params"}
    parity = {"status", "sqnr_db", "cosine", "top1_agreement", "max_abs_error", "samples"}
    rows = {"device", "origin", "threads", "median_ms", "p90_ms", "min_ms", "samples", "file", "line"}
    model_keys = {"path", "runtime", "precision", "size_bytes", "sha256", "parity", "operators", "measurements"}
    expected: list[tuple[dict[str, Any], set[str]]] = [
        (found["budget"], {"latency_ms", "statistic"}),
        (found["baseline"], figures),
        (found["result"], figures | {"runtime", "precision", "path"}),
        (found["predicted_latency_ms"], {"low", "value", "high", "basis"}),
        (found["rounds"][0], {"predicted_ms", "measured_ms"}),
        (found["plan"][0], {"transform", "where", "reason", "saved_ms", "damage"}),
        (found["rejected"][0], {"transform", "where", "reason"}),
        (found["models"][0], model_keys),
        (found["models"][0]["parity"], parity),
        (found["models"][0]["measurements"][0], rows),
        (found["stages"][0], {"name", "seconds"}),
        (found["failures"][0], {"stage", "subject", "message", "remedy"}),
    ]
    for row, keys in expected:
        assert keys <= set(row)


def test_json_keeps_null_for_what_was_not_measured() -> None:
    found = json.loads(registry.report_writer("json").render(dry_report()))
    assert found["result"]["latency_ms"] is None
    assert found["verdict"] is None


# ---------------------------------------------------------------- report.html


def test_html_is_balanced_and_has_unique_ids(report: Report) -> None:
    page = outline(html(report))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {str(attrs["href"]).removeprefix("#") for tag, attrs in page.tags if tag == "a"}
    assert links <= set(ids)
    assert [tag for tag, _ in page.tags if tag == "h1"] == ["h1"]
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")


def test_html_needs_nothing_from_outside(report: Report) -> None:
    page = outline(html(report))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "foreignobject"}
    for _, attrs in page.tags:
        assert not {"src", "srcset", "action"} & set(attrs)
        assert not any(name.startswith("on") for name in attrs)
        assert str(attrs.get("href", "#")).startswith("#")
    style = re.findall(r"<style>(.*?)</style>", html(report), re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]


def test_html_has_no_address_of_its_own() -> None:
    assert "http:" not in html(sample_report())
    assert "https:" not in html(sample_report())


def test_hostile_strings_are_shown_and_not_run() -> None:
    text = html(hostile_report())
    assert "<script" not in text
    assert "alert(&#34;1&#34;)" in text
    assert "模型" in text
    assert "49" not in re.findall(r"\{\{ .*? \}\}", text)
    assert not set(text) & set("\x00\x1b\u202e\u202c")


def test_html_has_words_where_nothing_was_measured(report: Report) -> None:
    spoken = " ".join(outline(html(report)).text)
    for word in ("None", "nan", "NaN", " inf", "null"):
        assert not re.search(rf"(?<![a-z]){word}(?![a-z])", spoken)


def test_svg_is_well_formed_named_and_the_same_every_time(report: Report) -> None:
    text = html(report)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert pictures
    for picture in pictures:
        root = ET.fromstring(picture)  # noqa: S314
        assert root.get("role") == "img"
        assert root.get("aria-label")
        places = [e.get(name, "0") for e in root.iter() for name in ("x", "y", "cx", "cy", "width", "height", "x1")]
        assert all(re.fullmatch(r"-?[0-9.]+%?", place) for place in places)
    assert html(report) == text


def test_a_deep_network_stays_small_and_readable() -> None:
    report = deep_report()
    text = html(report)
    assert len(text.encode()) < 2_000_000
    first = ET.fromstring(re.findall(r'<svg class="bars measured".*?</svg>', text, re.DOTALL)[1])  # noqa: S314
    assert len(first.findall("g")) <= 18
    assert " more (add)" in text
    assert "All 60 operators, measured" in text
    assert f"{600 - MOST_ROWS:,} more in report.json" in text


def test_grouped_bars_add_up() -> None:
    report = deep_report()
    shown = _grouped(_paired(report.operators_before, report.operators_after))
    assert sum(b.before or 0 for b in shown) == pytest.approx(sum(b.ms for b in report.operators_before))
    assert sum(b.after or 0 for b in shown) == pytest.approx(sum(b.ms for b in report.operators_after))


def test_measured_and_predicted_never_share_a_column(report: Report) -> None:
    page = html(report)
    for name in re.findall(r'<th scope="col"[^>]*>(.*?)</th>', page):
        assert not ("predicted" in name.lower() and "measured" in name.lower()) or name == "Measured over predicted"


# ---------------------------------------------------------------- reading it with other eyes


def variables(style: str, dark: bool) -> dict[str, tuple[float, float, float]]:
    """The colours of a theme, each channel from 0 to 1."""
    blocks = re.findall(r":root \{([^}]*)\}", style.split("@media print {", maxsplit=1)[0])
    assert len(blocks) == 2
    found = dict(re.findall(r"--(\w[\w-]*): #([0-9a-f]{6})", blocks[0]))
    if dark:
        found |= dict(re.findall(r"--(\w[\w-]*): #([0-9a-f]{6})", blocks[1]))
    return {name: tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name, value in found.items()}  # type: ignore[misc]


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """WCAG 2's contrast ratio."""

    def luminance(colour: tuple[float, float, float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


TEXT_ON = [
    *((name, paper) for name in ("ink", "soft", "after", "guess") for paper in ("paper", "page")),
    *((name, f"{name}-back") for name in ("good", "bad", "warn")),
    *(("paper", "after"), ("ink", "tint"), ("soft", "faint")),
]
SHAPES = ("before", "after", "guess", "target", "soft")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast_is_enough_in_both_themes(dark: bool) -> None:
    style = re.findall(r"<style>(.*?)</style>", html(sample_report()), re.DOTALL)[0]
    colours = variables(style, dark)
    assert contrast((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) == pytest.approx(21)
    for text, back in TEXT_ON:
        assert contrast(colours[text], colours[back]) >= 4.5, (text, back)
    for shape in SHAPES:
        assert contrast(colours[shape], colours["paper"]) >= 3, shape


def test_a_policy_forbids_all_but_its_own_style(report: Report) -> None:
    head = html(report).split("<title>")[0]
    assert """content="default-src 'none'; style-src 'unsafe-inline'">""" in head


def test_the_page_begins_with_a_way_past_its_head(report: Report) -> None:
    page = outline(html(report))
    first = next(attrs for tag, attrs in page.tags if tag == "a")
    assert first == {"class": "skip", "href": "#main"}
    levels = [int(tag[1]) for tag, _ in page.tags if tag in {"h1", "h2", "h3", "h4"}]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_what_scrolls_is_reached_by_the_keyboard_and_named(report: Report) -> None:
    for _, attrs in outline(html(report)).tags:
        if attrs.get("tabindex") is not None:
            assert (attrs["tabindex"], attrs["role"]) == ("0", "region")
            assert attrs["aria-label"]


# ---------------------------------------------------------------- devices, precisions, warnings


@pytest.mark.parametrize("render", [html, markdown])
def test_every_device_has_its_line_and_its_parts(render: Any) -> None:
    text = render(many_devices_report())
    for phrase in (
        "On every device", "adb:8A1X0P4Q", "Google Tensor G3", "3.97 to 4.16", "Measured on adb:8A1X0P4Q",
        "On ssh:pi@kitchen operators were not measured one by one.", "Raw samples on ssh:pi@kitchen",
        "On emulated-arm64 nothing was timed", "Conditions on adb:8A1X0P4Q", "Cortex-X3", "governor sched_pixel",
        "81 %, not charging, 31.2 °C", "41.2 M", "37.1 dB, top-1 100.0 %", "shared by mobilekit demo 1.2",
    ):  # fmt: skip
        assert phrase in text


def test_an_emulator_has_no_latency() -> None:
    line = next(row for row in markdown(many_devices_report()).splitlines() if row.startswith("| emulated-arm64 |"))
    assert line.startswith("| emulated-arm64 | not measured | not measured | not measured |")
    rows = [row for row in markdown(many_devices_report()).splitlines() if "| emulated-arm64 | **emulator** |" in row]
    assert len(rows) == 1
    assert "not measured | not measured | not measured | 0 |" in rows[0]


def test_what_nobody_measured_has_no_column() -> None:
    text = markdown(many_devices_report())
    head = "| File | Device | Load (ms) | First run (ms) | Peak memory (MB) | Energy of a run (mJ) |"
    assert head in text
    bare = markdown(sample_report())
    assert "Beside the latency" not in bare
    rows = list(models())
    rows[0] = rows[0].model_copy(update={"measurements": (measured(1.292, 1, load_ms=31.0),)})
    some = markdown(sample_report(models=tuple(rows)))
    assert "| File | Device | Load (ms) |\n" in some
    assert "Not measured on any device: first run, peak memory, energy of a run, instructions of a run" in some


def test_an_emulator_has_instructions_and_parity_but_no_latency() -> None:
    close = Parity(status="executed", sqnr_db=29.91, cosine=0.9995, top1_agreement=1.0, max_abs_error=0.24, samples=4)
    nothing = dict.fromkeys(("median_ms", "p90_ms", "min_ms", "wall_median_ms", "reference_ratio"))
    counted = {"instructions": 81_950_619, "beside_host": close, "samples": 0}
    emulated = measured(1.0, 1, device="emulated-arm64", origin="emulator", **nothing, **counted)
    rows = list(models())
    rows[0] = rows[0].model_copy(update={"measurements": (emulated,)})
    text = markdown(sample_report(models=tuple(rows)))
    line = next(row for row in text.splitlines() if "| emulated-arm64 |" in row and "not measured" in row)
    assert "emulator" in line
    assert "ms" not in line
    assert "Emulated beside this machine" in text
    assert "29.9 dB, top-1 100.0 %" in text
    assert "82.0 M" in text


def test_sessions_of_a_file_are_one_line_with_their_range() -> None:
    text = markdown(many_devices_report())
    line = next(row for row in text.splitlines() if "0.410 to 0.422" in row)
    assert line.startswith("| fashion\\_mnist-int8.onnx | host |") or line.startswith(
        "| fashion_mnist-int8.onnx | host |"
    )
    assert "| 5 | 0.410 to 0.422 |" in line
    assert "| 1,000 |" in line


def test_columns_that_are_all_alike_are_said_once() -> None:
    rows = list(models())
    rows[2] = rows[2].model_copy(update={"measurements": rows[2].measurements[:1]})
    text = markdown(sample_report(models=tuple(rows)))
    assert "**Latency, measured (origin host, threads: 1, CPU time)**" in text
    assert "| File | Device | Sessions | Median (ms) |" in text


def test_the_map_has_a_spot_for_every_operator() -> None:
    text = html(many_devices_report())
    picture = re.findall(r'<figure class="map">.*?</figure>', text, re.DOTALL)[0]
    spots = re.findall(r'<i class="spot (\w+)" title="([^"]*)">(\d+)</i>', picture)
    assert [(kind, sign) for kind, _, sign in spots] == [
        ("fp32", "32") if i in {0, 17} else ("int8", "8") for i in range(24)
    ]
    assert "stage3.1.conv3 (global pool): fp32" in picture
    assert "22 in int8" in picture
    assert re.findall(r"<dt>(.*?)</dt>", picture) == ["stage1", "stage2", "stage3"]
    assert "Counted in the file itself: 20 in int8 and 2 in fp32" in text
    assert "| this runtime has no int8 pool | fp32 | 1 |" in markdown(many_devices_report())
    assert "Not known: no result was written." in html(dry_report())


def test_measured_warnings_are_counted_and_shown_with_advice() -> None:
    text = markdown(many_devices_report())
    assert "**2 failures and 4 warnings**" in text
    assert "| throttling | result on adb:8A1X0P4Q | the phone lowered its frequencies after 41 s | let it cool" in text


def test_the_result_stands_beside_the_rounds() -> None:
    text = markdown(sample_report())
    line = next(row for row in text.splitlines() if row.startswith("| Result |"))
    assert line.startswith("| Result | 4 | 0.431 ms | 0.422 ms | 0.415 ms | −1.6 % | 1.29 ms |")


def test_reasons_of_levers_that_were_not_used_are_all_there() -> None:
    text = markdown(wide_report())
    section = text.split("## Tried and not used")[1].split("\n## ")[0]
    assert section.count("group convolution |") == 100
    assert "Not used: group convolution at 100 places." in section


@pytest.mark.parametrize("values", [(1e300, 1.0), (0.0,), (-3.0, 2.0), (1.0, 1.0), (5e-324, 1e11)])
def test_any_samples_can_be_drawn(values: tuple[float, ...]) -> None:
    text = html(sample_report(samples={"x": values}))
    for picture in re.findall(r'<svg class="strips".*?</svg>', text, re.DOTALL):
        places = [float(p) for p in re.findall(r'(?:cx|x|x1)="(-?[0-9.]+)%"', picture)]
        assert all(-1 <= place <= 101 for place in places)


# ---------------------------------------------------------------- the verdict


PHRASES = {
    "met": (
        "3 times faster than the fp32 original; 3.11 times; 90 % interval of the ratio: 3.08 to 3.17; 93.62 %; "
        "93.24 %; 1.29 ms; 0.415 ms; 10,000 labelled test images"
    ),
    "missed": "at most 0.4 ms; not met; Missed",
    "unreachable": "best reachable latency is 0.287 ms (predicted); at most 0.25 MB; Unreachable; not measured",
    "dry run": "dry run; nothing was measured; 0.422 ms; Not judged",
    "no budget": "No budget was given; Not judged; 0.415 ms",
}


@pytest.mark.parametrize("render", [html, markdown])
@pytest.mark.parametrize("name", PHRASES)
def test_the_verdict_comes_with_its_numbers(name: str, render: Any) -> None:
    text = render(REPORTS[name]())
    for phrase in PHRASES[name].split("; "):
        assert phrase in text
    assert text.index("Asked" if name != "no budget" else "No budget") < text.index("Before and after")


def test_a_slower_result_is_called_slower() -> None:
    report = sample_report(verdict="missed", ratio=0.8, ratio_interval=(0.78, 0.82))
    assert "1.25 times slower (90 % interval of the ratio: 0.780 to 0.820)" in markdown(report)


def test_parameters_that_were_not_counted_are_told_in_words() -> None:
    uncounted = sample_report().baseline.model_copy(update={"params": None})
    assert "| Parameters | not counted | 271 k | — |" in markdown(sample_report(baseline=uncounted))


def test_a_long_table_keeps_its_alignment() -> None:
    many = sample_report().plan * 200
    lines = markdown(sample_report(plan=many)).splitlines()
    assert lines[lines.index("| Lever | Where | Why | Saves, predicted | Damage, measured |") + 1].endswith(
        "| ---: | ---: |"
    )
    assert "| 400 more in report.json |  |  |  |  |" in lines


@pytest.mark.parametrize("agreement", [0.9375, None])
def test_what_the_plan_does_as_a_whole_stands_below_its_rows(agreement: float | None) -> None:
    said = "All of it together, measured before any training: a damage of 0.2215"
    assert said not in markdown(sample_report())
    report = sample_report(together=Together(damage=0.22146, agreement=agreement))
    more = "." if agreement is None else ", the same class for 93.8% of the inputs."
    assert said + more in markdown(report)
    assert said + more in html(report)


def test_a_sentence_about_the_data_ends_once() -> None:
    text = html(sample_report().model_copy(update={"data": "All the test images."}))
    assert "All the test images." in text
    assert "images.." not in text


def test_a_side_without_profile_is_not_called_zero() -> None:
    text = html(unreachable_report())
    assert "Sum before: 1.24 ms, after: not measured" in text
    assert "→ none" not in re.findall(r'<svg class="bars measured".*?</svg>', text, re.DOTALL)[1]


def test_operators_that_do_not_add_up_to_the_latency_are_remarked_on() -> None:
    report = sample_report()
    slowed = tuple(bar.model_copy(update={"ms": 4 * bar.ms}) for bar in report.operators_after)
    remark = "only their shares can be compared"
    assert remark not in markdown(sample_report(operators_before=(), operators_after=()))
    text = markdown(sample_report(operators_before=(), operators_after=slowed))
    assert text.count(remark) == 1
    assert "The operators of the result add up to" in text


@pytest.mark.parametrize("render", [html, markdown])
def test_parity_is_told_in_words(render: Any) -> None:
    text = render(sample_report())
    for phrase in (
        "bit-exact",
        "structure only, neither executed nor evaluated",
        "not checked",
        "evaluated by mobilekit, not by its runtime",
    ):
        assert phrase in text
    assert "emulator" in text
    assert "resumed" in text


def test_a_measured_best_is_called_measured() -> None:
    rounds = (Round(predicted_ms=0.2, measured_ms=0.287, baseline_ms=1.2, target_ms=0.1, options=2),)
    text = markdown(unreachable_report().model_copy(update={"rounds": rounds, "best_reachable_basis": "measured"}))
    assert "0.287 ms (measured)" in text


def uncertain_report() -> Report:
    """A speedup that the median keeps and the lower end of its interval does not; rounds with what they found."""
    kinds = (KindFactor(precision="int8", row="depthwise.3", factor=1.21, operators=4),)
    facts = {"sessions": 4, "accept": 0.95, "ratio_interval": (2.61, 2.74), "predicted_ratio": 3.27}
    missed = Round(
        predicted_ms=0.4, measured_ms=0.48, baseline_ms=1.3, target_ms=0.43, options=3, ratio=2.68, accepted=False,
        kinds=kinds, **facts,
    )  # fmt: skip
    finding = Finding(
        item="speedup", limit=3, found=3.021, met=False, interval=(2.964, 3.077), judged=2.964, note="7 sessions"
    )
    base = sample_report()
    return base.model_copy(
        update={
            "verdict": "missed", "findings": (finding,), "ratio": 3.021, "ratio_interval": (2.964, 3.077),
            "sessions": 7, "rounds": (missed, missed.model_copy(update={"accepted": True, "kinds": ()})),
            "baseline": base.baseline.model_copy(update={"latency_interval_ms": (1.282, 1.305)}),
            "result": base.result.model_copy(update={"latency_interval_ms": (0.4092, 0.4213)}),
        }
    )  # fmt: skip


def test_medians_come_with_their_intervals() -> None:
    text = markdown(uncertain_report())
    assert "(90 % interval of the ratio: 2.96 to 3.08, over 7 sessions)" in text
    assert "| 90 % interval of that median | 1.28 to 1.30 ms | 0.409 to 0.421 ms | — |" in text
    assert "| speedup | 3 times | 3.02 times | 2.96 to 3.08 times | **not met** | 7 sessions |" in text
    page = html(uncertain_report())
    assert "2.96 to 3.08 times" in page
    assert "0.409 to 0.421 ms" in page


def test_rounds_say_what_was_accepted_and_what_the_profile_said() -> None:
    text = markdown(uncertain_report())
    first, second = (line for line in text.splitlines() if line.startswith(("| Round 1 | 3 |", "| Round 2 | 3 |")))
    assert first.endswith("| 3.27 | 2.68 | 2.61 to 2.74 | no |")
    assert second.endswith("| yes |")
    assert "| Round 1 | depthwise.3 | int8 | 4 | 1.21 |" in text
    assert "runtime's profile" not in markdown(sample_report()).split("## Predicted against measured")[1].split("##")[0]


def test_what_is_within_reach_is_told_as_a_ratio_too() -> None:
    changes = {"best_reachable_basis": "measured", "best_reachable_ratio": 4.02}
    text = markdown(unreachable_report().model_copy(update=changes))
    assert "0.287 ms (measured), that is 4.02 times faster than the original" in text


# ---------------------------------------------------------------- report.md


def columns(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line.replace("\\\\", "")))


def test_markdown_tables_are_regular(report: Report) -> None:
    text = markdown(report)
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert tables
    for lines in tables:
        assert len({columns(line) for line in lines}) == 1
        assert re.fullmatch(r"\|( ---:? \|)+", lines[1])


def test_markdown_escapes_what_would_be_markup() -> None:
    text = markdown(hostile_report())
    assert "<script" not in text
    assert set(re.findall(r"<[^>]*>", text)) <= {"<details>", "<summary>", "</summary>", "</details>"}
    assert "\\| \\`x\\`" in text
    for line in ("- \\# not a heading", "- \\- not a list", "- 1\\. not a list", "- \\_not\\_ emphasis"):
        assert line in text


def test_markdown_has_the_same_parts_in_the_same_order_as_html(report: Report) -> None:
    heads = re.findall(r"^## (.*)$", markdown(report), re.MULTILINE)
    assert heads == re.findall(r"<h2[^>]*>(.*?)</h2>", html(report))


def test_markdown_has_words_where_nothing_was_measured(report: Report) -> None:
    assert not re.search(r"(?<![a-z])(None|nan|NaN|inf|null)(?![a-z])", markdown(report))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.41549, "0.415"),
        (9.996, "10.0"),
        (0.0, "0"),
        (1234.5, "1,230"),
        (-0.5, "−0.500"),
        (None, "—"),
        (float("inf"), "—"),
    ],
)
def test_three_digits(value: float | None, text: str) -> None:
    assert words.number(value) == text


def test_other_words() -> None:
    assert (words.size(291_482), words.size(999), words.size(0)) == ("291 kB", "999 bytes", "0 bytes")
    assert (words.seconds(4.7), words.seconds(1421), words.seconds(7322)) == ("4.70 s", "23 min 41 s", "2 h 02 min")
    assert words.count_of(30_821_632) == "30.8 M"
    assert words.score(71.25) == "71.25"
    assert words.score_change(0.9362, 0.9324) == "−0.38 points"
    assert words.change(0, 1) == "—"
    assert words.middle("stage1.blocks.conv", 9) == "stag…conv"
    assert words.moment("2026-11-14T09:26:41+00:00") == "2026-11-14 09:26 UTC"


@pytest.mark.parametrize(("top", "last"), [(1.35, 1.0), (0.0, 0.0), (100, 100), (7e-9, 6e-9), (float("nan"), 0.0)])
def test_ticks_are_round(top: float, last: float) -> None:
    assert ticks(top)[-1] == pytest.approx(last)
    assert len(ticks(top)) <= 6


def test_the_bars_of_devices_are_headed_by_what_they_are() -> None:
    lines = markdown(sample_report(devices=devices())).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("**Latency before and after on each device"))
    assert lines[at + 2].startswith("| Device |")


def test_the_result_is_predicted_as_its_round_was() -> None:
    """The profile's price of the original may be far from what the rounds took: one column has one meaning."""
    report = sample_report()
    last = report.rounds[-1].model_copy(update={"predicted_ratio": 3.21, "accepted": True, "options": len(report.plan)})
    far = report.predicted_baseline_ms.model_copy(update={"value": 10 * report.predicted_baseline_ms.value})
    changed = report.model_copy(update={"rounds": (*report.rounds[:-1], last), "predicted_baseline_ms": far})
    lines = markdown(changed).splitlines()
    line = next(row for row in lines if row.startswith("| Result |"))
    assert "| 3.21 |" in line


def test_a_stage_of_no_time_has_no_long_figure() -> None:
    stage = sample_report().stages[0].model_copy(update={"seconds": 0.0000107})
    text = markdown(sample_report(stages=(stage,)))
    assert "under 0.01 s" in text
