"""How fast and how well weights are clustered, and what a package saves beside a zip.

    .venv/bin/python benchmarks/packing.py [--out DIR]

Clusters a 4096 x 4096 float32 matrix into 256 values, compares the error with scikit-learn on samples, and packs a
LeNet-5 that is pruned and shares weights as in Deep Compression. Its weights are random with a fixed seed: only their
number, density and bits are the paper's. Written to benchmarks/results/packing.json and packing.md. About a minute on
one core.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from sklearn.cluster import KMeans

from mobilekit.packing import cluster, huffman, pack, unpack
from mobilekit.packing.clustering import Start

HERE = Path(__file__).parent
COMMAND = ".venv/bin/python benchmarks/packing.py"
PACKAGES = ("mobilekit", "numpy", "scikit-learn", "onnx", "zstandard")
STARTS: tuple[Start, ...] = ("density", "quantile", "gaussian", "linear")
SIDE, CLUSTERS, SAMPLE, REPEATS = 4096, 256, 50_000, 3
SYMBOLS = 10_000_000
LENET: dict[str, tuple[tuple[int, ...], float, int]] = {
    "conv1": ((20, 1, 5, 5), 0.66, 8),
    "conv2": ((50, 20, 5, 5), 0.12, 8),
    "fc1": ((500, 800), 0.08, 5),
    "fc2": ((10, 500), 0.19, 5),
}
"""Shape, share of weights that are kept and bits of an index of LeNet-5's layers (arXiv:1510.00149, table 3)."""


def clustering(start: Start) -> dict[str, object]:
    """The fastest of a few runs on the whole matrix: wall and CPU seconds, and the mean squared error."""
    values = np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32)
    wall, cpu, error = [], [], 0.0
    for _ in range(REPEATS):
        began = time.perf_counter(), time.process_time()
        error = cluster(values, CLUSTERS, start).distortion
        wall.append(time.perf_counter() - began[0])
        cpu.append(time.process_time() - began[1])
    return {"start": start, "seconds": min(wall), "cpu_seconds": min(cpu), "distortion": error}


def against_sklearn(count: int) -> dict[str, object]:
    """The errors of both on the same sample."""
    sample = np.random.default_rng(1).standard_normal(SAMPLE).astype(np.float32)
    began = time.perf_counter()
    ours = cluster(sample, count)
    between = time.perf_counter()
    fitted = KMeans(count, n_init=1, random_state=0).fit(sample[:, None])
    ended = time.perf_counter()
    theirs = float(np.mean((sample - fitted.cluster_centers_[fitted.labels_, 0]) ** 2))
    return {
        "clusters": count,
        "distortion": ours.distortion,
        "sklearn_distortion": theirs,
        "to_sklearn": ours.distortion / theirs,
        "seconds": between - began,
        "sklearn_seconds": ended - between,
    }


def huffman_speed() -> dict[str, object]:
    """Seconds for ten million symbols, and their bits beside the entropy."""
    symbols = (np.random.default_rng(2).standard_normal(SYMBOLS) * 20 + 128).clip(0, 255).astype(np.uint8)
    began = time.perf_counter()
    block = huffman.encode(symbols)
    between = time.perf_counter()
    same = bool(np.array_equal(huffman.decode(block, SYMBOLS), symbols))
    ended = time.perf_counter()
    assert same
    share = np.bincount(symbols) / SYMBOLS
    share = share[share > 0]
    return {
        "symbols": SYMBOLS,
        "encode_seconds": between - began,
        "decode_seconds": ended - between,
        "bits": 8 * len(block) / SYMBOLS,
        "entropy": float(-(share * np.log2(share)).sum()),
    }


def lenet(step: str) -> bytes:
    """LeNet-5 as an ONNX file with its weights "trained" (random), "pruned", or "pruned and shared"."""
    generator = np.random.default_rng(3)
    weights = []
    for name, (shape, density, bits) in LENET.items():
        values = generator.standard_normal(shape).astype(np.float32) * 0.1
        if step != "trained":
            values[np.abs(values) < np.quantile(np.abs(values), 1 - density)] = 0
        if step == "pruned and shared":
            values = cluster(values, 1 << bits, keep_zero=True).restored()
        bias = generator.standard_normal(shape[0]).astype(np.float32) * 0.1
        weights += [onnx.numpy_helper.from_array(values, name), onnx.numpy_helper.from_array(bias, f"{name}.bias")]
    make, parts = onnx.helper.make_node, list(LENET)
    nodes = []
    for source, name in (("in", "conv1"), ("conv1.pool", "conv2")):
        nodes.append(make("Conv", [source, name, f"{name}.bias"], [f"{name}.out"]))
        nodes.append(make("MaxPool", [f"{name}.out"], [f"{name}.pool"], kernel_shape=[2, 2], strides=[2, 2]))
    nodes.append(make("Flatten", ["conv2.pool"], ["flat"]))
    nodes.append(make("Gemm", ["flat", parts[2], "fc1.bias"], ["fc1.out"], transB=1))
    nodes.append(make("Relu", ["fc1.out"], ["fc1.active"]))
    nodes.append(make("Gemm", ["fc1.active", parts[3], "fc2.bias"], ["out"], transB=1))
    shapes = {"in": (1, 1, 28, 28), "out": (1, 10)}
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in shapes.items()]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "lenet", ends[:1], ends[1:], weights))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def packing(step: str) -> dict[str, object]:
    """Bytes of the file packed, and zipped."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "lenet.onnx")
        model.write_bytes(lenet(step))
        made = pack(model)
        unpack(Path(made.package), Path(folder, "again.onnx"))
        assert Path(folder, "again.onnx").read_bytes() == model.read_bytes()
        return {"weights": step, **made.model_dump(exclude={"model", "package", "files"})}


def table(rows: Sequence[dict[str, object]], columns: dict[str, str]) -> list[str]:
    """Markdown of some columns: key -> heading."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "--:|" * len(columns)]
    for row in rows:
        cells = [f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key]) for key in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def page(report: dict[str, object], parts: dict[str, list[dict[str, object]]]) -> str:
    """The report as Markdown."""
    clusters = {
        "start": "start",
        "seconds": "seconds",
        "cpu_seconds": "CPU seconds",
        "distortion": "mean squared error",
    }
    peer = {
        "clusters": "clusters",
        "distortion": "error",
        "sklearn_distortion": "scikit-learn's error",
        "to_sklearn": "ratio",
        "seconds": "seconds",
        "sklearn_seconds": "scikit-learn's seconds",
    }
    speed = {
        "symbols": "symbols",
        "encode_seconds": "encoding, s",
        "decode_seconds": "decoding, s",
        "bits": "bits a symbol",
        "entropy": "entropy",
    }
    sizes = {
        "weights": "weights",
        "original_bytes": "bytes",
        "packed_bytes": "packed",
        "ratio": "ratio",
        "zip_ratio": "zip's ratio",
        "zstd_ratio": "zstd's ratio",
    }
    why = parts["packing"][0]["zstd_reason"]
    lines = [
        "# Sharing weights and packing them",
        "",
        f"`{report['command']}`, {report['date']}, {report['versions']}; {report['machine']}.",
        "",
        f"{SIDE} x {SIDE} float32 of a normal distribution into {CLUSTERS} clusters, the fastest of {REPEATS} runs:",
        "",
        *table(parts["clustering"], clusters),
        f"A sample of {SAMPLE}, beside scikit-learn's KMeans (its defaults: k-means++, one start, 300 rounds at most):",
        "",
        *table(parts["against_sklearn"], peer),
        "Huffman codes:",
        "",
        *table(parts["huffman"], speed),
        "LeNet-5 with the densities and bits of Deep Compression (arXiv:1510.00149, table 3), on random weights; bytes",
        "of the ONNX file, restored bit for bit. The paper states 39 for its trained LeNet-5, without a file around it."
        + (f" zstd: {why}." if why else ""),
        "",
        *table(parts["packing"], sizes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def processor() -> str:
    """The processor's name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Runs everything and writes both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    parts = {
        "clustering": [clustering(start) for start in STARTS],
        "against_sklearn": [against_sklearn(count) for count in (16, 64, 256)],
        "huffman": [huffman_speed()],
        "packing": [packing(step) for step in ("trained", "pruned", "pruned and shared")],
    }
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
    report: dict[str, object] = {
        "command": COMMAND,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": ", ".join(versions),
        "machine": f"{processor()}, one process",
        **parts,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "packing.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "packing.md").write_text(page(report, parts), encoding="utf-8")
    print(page(report, parts))


if __name__ == "__main__":
    main()
