"""Fits the cost tables of the shipped profiles, one function a kind of source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from paper_networks import layers as paper_layers

from mobilekit.cost import blocks, borrowing
from mobilekit.cost.layers import read_layers
from mobilekit.cost.price import price_shapes
from mobilekit.cost.published import Row, Selection, combined, read_measurements, select
from mobilekit.cost.shipped import PROVENANCE as BORROWED
from mobilekit.cost.work import BYTES
from mobilekit.types import CostTable, DeviceProfile, OperatorShape, Precision, Provenance, RuntimeEntry

ROOT = Path(__file__).resolve().parents[1]
POOL, BENCHMARKS = ROOT / "mobilekit" / "cost" / "data", ROOT / "benchmarks" / "data"
READ = "2026-11-22"
"""When the sources were read."""
FEWEST = 4
"""Networks without which a table is not worth shipping: one is left out, and three are the least that is fitted to."""
Facts = Mapping[str, Any]


def source(text: str, version: str, licence: str) -> Provenance:
    return Provenance(source=text, version=version, date=READ, licence=licence)


NCNN = source(
    "latencies of whole networks, Tencent/ncnn benchmark/README.md, and their layers, benchmark/models/*.param",
    "f4e9a78",
    "BSD-3-Clause",
)
PAPERS = source("layers of those networks, built from their papers by scripts/paper_networks.py", "1", "Apache-2.0")
CORE_ML = source(
    "latencies of whole networks, rounded to 1 ms, vladimir-chernykh/coreml-model-zoo; 22 of them are widths and "
    "resolutions of MobileNetV2, so that leaving one out is no hard test of that family",
    "69a05b3",
    "MIT",
)
AI_HUB = source(
    "latencies of whole networks, all layers on the NPU, Qualcomm AI Hub, PyPI wheel qai-hub-models, "
    "models/*/perf.yaml; which statistic they are is not said",
    "0.65.0",
    "BSD-3-Clause",
)
BLOCKS = {
    "nn-Meter LUT v3": source(
        "latencies of blocks run by themselves, microsoft/nn-Meter lut/*_v3.json", "dev/hybrid-transformer", "MIT"
    ),
    "once-for-all": source(
        "latencies of blocks run by themselves, mit-han-lab/once-for-all latency_table@note10; threads are not stated, "
        "one is assumed",
        "698a5c1",
        "MIT",
    ),
}
CHECKED = ("Pixel 1", "nn-Meter LUT v3")
"""The block table whose phone has whole networks in the same kernels, XNNPACK's."""
XNNPACK = source("whole networks on Pixel 1, google/XNNPACK README (end2end_bench 2020)", "2020", "BSD-3-Clause")
MULTIPLES = {
    "ncnn": (
        8,
        "ncnn keeps channels in packs of 4 (float32) or 8 (float16 and int8): elempack in its source",
        "f4e9a78",
    ),
    "tflite": (8, "XNNPACK's float32 matrix kernels for NEON compute 6 x 8 tiles: 8 output channels", "source"),
    "coreml": (8, "Apple publishes none; 8 as for the other runtimes on Arm cores", "assumption"),
    "npu": (
        32,
        "Qualcomm's HTP rounds channels to the next multiple of 32 (80-63442-10, 'Avoid low depth activations')",
        "2025",
    ),
}


# ---------------------------------------------------------------- tables


@lru_cache(maxsize=2)
def rows_of(path: Path) -> list[Row]:
    return read_measurements(path)


@lru_cache(maxsize=1)
def ncnn_layers() -> dict[str, tuple[OperatorShape, ...]]:
    return read_layers(POOL / "layers.csv.gz")


def ncnn_tables(facts: Facts) -> Iterator[CostTable]:
    """Float and int8 on the CPU, float on the GPU.

    The list has int8 rows of GPUs as well, but its text does not say what Vulkan computes in int8: they are left out.
    """
    half: Precision = "fp16" if "fp16" in facts else "fp32"
    for where in facts["cpu"]:
        threads, cores = where.split()
        wanted = Selection(facts["ncnn"], "cpu", "ncnn", None, threads, cores)
        yield from ncnn_of(wanted, {"float": half, "int8": "int8"}, arithmetic(facts))
    if "gpu" in facts:
        name = facts["ncnn"] if facts["gpu"] is True else facts["gpu"]
        why = "float is fp16: ncnn's Vulkan kernels keep activations in fp16 by default"
        yield from ncnn_of(Selection(name, "gpu", "ncnn-vulkan"), {"float": "fp16"}, why)


def ncnn_of(wanted: Selection, precisions: Mapping[str, Precision], why: str) -> Iterator[CostTable]:
    """The tables of a set-up in these precisions of the list, each where enough networks were timed."""
    rows = rows_of(POOL / "measurements.csv.gz")
    for precision, computed in precisions.items():
        asked = wanted._replace(precision=precision)
        fields = asked.limits
        if not any(
            row.setup.device == asked.device
            and all(str(getattr(row.setup, name)).lower().startswith(value) for name, value in fields.items())
            for row in rows
        ):
            continue
        setup, own = select(rows, asked)
        timed = combined(own)
        if len(timed) < FEWEST:
            continue
        measured = NCNN.model_copy(update={"source": f"{NCNN.source}, '{setup.device}', {len(own)} rows; {why}"})
        table = borrowing.table(setup, timed, ncnn_layers(), (measured, BORROWED))
        yield relabelled(table, wanted.runtime or "ncnn", computed)


def arithmetic(facts: Facts) -> str:
    if "fp16" in facts:
        return f"float is fp16: {facts['fp16']} has Armv8.2-A half-precision arithmetic"
    return "float is fp32: the cores have no half-precision arithmetic"


def block_tables(facts: Facts) -> Iterator[CostTable]:
    device, origin = facts["blocks"]
    fitted, slower = fitted_blocks(device, origin), slower_than_blocks()
    judged = fitted.table.validation
    if judged is None:
        raise SystemExit(f"{device}: blocks are always judged five-fold")
    high = fitted.table.high * max(slower)
    inside = (fitted.left_out * fitted.table.low <= 1) & (fitted.left_out * high >= 1)
    whole = XNNPACK.model_copy(
        update={
            "source": f"{XNNPACK.source}: {len(slower)} networks took {min(slower):.2f} to {max(slower):.2f} times the "
            "sum of their blocks, by which the upper end of the interval is widened"
        }
    )
    yield fitted.table.model_copy(
        update={
            "high": high,
            "provenance": (BLOCKS[origin], whole),
            "validation": judged.model_copy(update={"coverage": float(inside.mean())}),
        }
    )


@lru_cache(maxsize=8)
def fitted_blocks(device: str, origin: str) -> blocks.Fitted:
    return blocks.fitted(blocks.read(BENCHMARKS / "blocks.csv.gz", device, origin))


@lru_cache(maxsize=1)
def slower_than_blocks() -> tuple[float, ...]:
    """Measured over predicted time of whole networks on the one phone that has them beside its blocks, sorted."""
    table = fitted_blocks(*CHECKED).table
    profile = DeviceProfile(
        name="checked",
        kind="android",
        soc="",
        cores=1,
        memory_mb=None,
        compute_units=("cpu",),
        runtimes=(entry(table.runtime, (table,)),),
        tables=(table,),
    )
    rows = [row for row in rows_of(BENCHMARKS / "phones.csv.gz") if row.source == "xnnpack-readme"]
    found = []
    for row in rows:
        shapes = {str(number): shape for number, shape in enumerate(paper_layers(row.network) or ())}
        found.append(row.ms / price_shapes(shapes, table.precision, profile, table.runtime).latency_ms)
    return tuple(sorted(found))


def core_ml_tables(facts: Facts) -> Iterator[CostTable]:
    """The CPU computes the float32 models as they are, the GPU and the Neural Engine in half precision."""
    precisions: dict[str, Precision] = {"cpu": "fp32", "gpu": "fp16", "npu": "fp16"}
    for processor, precision in precisions.items():
        table = paper_table(Selection(facts["coreml"], processor, "coreml"), CORE_ML)
        yield relabelled(table, f"coreml-{processor}", precision)


def npu_tables(facts: Facts) -> Iterator[CostTable]:
    """Float networks run in half precision; int8 ones are lent the float prices of GPUs as well.

    (Vulkan's int8 prices fit NPUs worse: left-out medians of 16 to 44 % against 10 to 28 %.)
    """
    precisions: dict[str, Precision] = {"float": "fp16", "w8a8": "int8"}
    for runtime, name in (("tflite", "tflite-npu"), ("qnn_dlc", "qnn-npu")):
        for published, precision in precisions.items():
            wanted = Selection(facts["npu"], "npu", runtime, published)
            table = paper_table(wanted, AI_HUB.model_copy(update={"source": f"{AI_HUB.source}, '{facts['npu']}'"}))
            yield relabelled(table, name, precision)


def paper_table(wanted: Selection, measured: Provenance) -> CostTable:
    """The table of a set-up, as of float32, from networks whose layers come from their papers."""
    setup, rows = select(rows_of(BENCHMARKS / "phones.csv.gz"), wanted)
    # Batch norms are folded: with and without them the network is the same.
    rows = [row._replace(network=row.network.removesuffix("_BN")) for row in rows]
    shapes = {row.network: paper_layers(row.network) or () for row in rows}
    return borrowing.table(setup._replace(precision="float"), combined(rows), shapes, (measured, PAPERS, BORROWED))


def relabelled(table: CostTable, runtime: str, precision: Precision) -> CostTable:
    """The same prices for a runtime's name, and for a precision of which a byte holds more elements."""
    ratio = BYTES[table.precision] / BYTES[precision]
    kinds = {
        name: model.model_copy(
            update={
                "coefficients": {
                    feature: price * (ratio if feature.endswith("_bytes") else 1.0)
                    for feature, price in model.coefficients.items()
                },
                "min_bytes": model.min_bytes / ratio,
                "max_bytes": model.max_bytes / ratio,
            }
        )
        for name, model in table.kinds.items()
    }
    return table.model_copy(update={"runtime": runtime, "precision": precision, "kinds": kinds})


MAKERS = {"ncnn": ncnn_tables, "blocks": block_tables, "coreml": core_ml_tables, "npu": npu_tables}
"""Key of a device's facts -> what fits its tables."""


# ---------------------------------------------------------------- runtimes


def entry(name: str, tables: Sequence[CostTable]) -> RuntimeEntry:
    family, _, suffix = name.partition("-")
    written = family if family in ("tflite", "coreml") else "onnx"
    return RuntimeEntry(
        name=name,
        processor={"": "cpu", "cpu": "cpu", "vulkan": "gpu", "gpu": "gpu", "npu": "npu"}[suffix],  # type: ignore[arg-type]
        precisions=tuple(dict.fromkeys(table.precision for table in tables if table.runtime == name)),
        channel_multiple=multiple_of(name)[0],
        writes="" if written == name else written,
    )


def multiple_of(runtime: str) -> tuple[int, Provenance]:
    """Channels that the runtime's kernels compute together, and where that is from."""
    family, _, suffix = runtime.partition("-")
    key = "npu" if suffix == "npu" and family != "coreml" else family
    multiple, why, version = MULTIPLES[key]
    return multiple, source(f"channel multiple {multiple} of {runtime}: {why}", version, "a fact")


def heading(device: str) -> str:
    """The device in the words of the published list, clocks and all."""
    return Counter(row.soc for row in rows_of(POOL / "measurements.csv.gz") if row.setup.device == device).most_common(
        1
    )[0][0]
