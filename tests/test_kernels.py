"""Prices that are corrected by a measured network: as a whole, and kind by kind from the runtime's profile."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from priced import BOTH, FLOAT, INT8, profile, residual, table, varied
from torch import nn

from mobilekit import registry
from mobilekit.cost.correct import brought_to, corrected_kinds
from mobilekit.cost.kernels import MOST_OFF, Profiled, kind_factors, profiling_us, times_us
from mobilekit.cost.price import PricedLine, latency_ms, price, priced_lines
from mobilekit.errors import BadInputError
from mobilekit.network import trace
from mobilekit.types import Candidate, ExportJob, KindFactor, Network, OperatorTime, Precision

MIXED = residual().with_precisions({"b": "int8"})
QUANTISED = residual().with_precisions(dict.fromkeys(("a", "b", "c", "sum", "fc"), "int8"))
NETWORKS: list[tuple[Network, Precision]] = [(residual(), "fp32"), (QUANTISED, "int8"), (MIXED, "int8")]


def kernel(kind: str, us: float, name: str = "") -> OperatorTime:
    return OperatorTime(name=name or kind, kind=kind, median_us=us)


def line(name: str, kind: str, us: float, row: str = "dense", precision: Precision = "fp32") -> PricedLine:
    return PricedLine(name, kind, precision, row, us)


def factor(row: str, by: float, precision: Precision = "fp32") -> KindFactor:
    return KindFactor(precision=precision, row=row, factor=by, operators=3)


def of_rows(network: Network, known: Any) -> dict[tuple[str, str], float]:
    """Microseconds of each operator, by its name and row."""
    return {(found.name, found.row): found.us for found in priced_lines(network, known, "onnx") if found.us}


# ---------------------------------------------------------------- what a network is priced by


@pytest.mark.parametrize("network", [residual(), QUANTISED, MIXED, varied()], ids=lambda n: n.name)
def test_lines_add_up_to_the_price(network: Network) -> None:
    known = BOTH if network.name == "residual" else profile(FLOAT, INT8)
    found = priced_lines(network, known, "onnx")
    overhead = 6.0 if network.precisions else 5.0
    assert 1000 * latency_ms(network, known, "onnx") == pytest.approx(overhead + sum(one.us for one in found))
    prices = {row.name: 1000 * row.latency_ms for row in price(network, known, "onnx").operators}
    for one in found:
        assert one.us == 0 or one.us <= prices[one.name.removesuffix(", inside")] + 1e-9


def test_lines_name_the_row_that_prices_them() -> None:
    rows = {one.name: (one.precision, one.row) for one in priced_lines(MIXED, BOTH, "onnx") if one.us}
    assert rows["a"] == ("fp32", "dense")
    assert rows["b"] == ("int8", "dense")
    assert rows["c"] == ("fp32", "pointwise")
    assert rows["quantize a"] == ("int8", "quantize")
    stand_in = profile(table("fp32", {"dense": FLOAT.kinds["dense"], "add": FLOAT.kinds["add"]}))
    assert {one.row for one in priced_lines(residual(), stand_in, "onnx") if one.name in ("c", "fc")} == {"dense"}


# ---------------------------------------------------------------- as a whole, and by kind


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NETWORKS), st.floats(0.3, 8.0))
def test_a_corrected_price_is_the_measurement(given_: tuple[Network, Precision], times: float) -> None:
    network, precision = given_
    measured = times * latency_ms(network, BOTH, "onnx")
    better = brought_to(network, BOTH, "onnx", precision, measured)
    assert latency_ms(network, better, "onnx") == pytest.approx(measured)


def test_only_the_precision_that_the_network_runs_in_is_corrected() -> None:
    measured = 1.3 * latency_ms(MIXED, BOTH, "onnx")
    better = brought_to(MIXED, BOTH, "onnx", "int8", measured)
    assert better.table("onnx", "fp32") == BOTH.table("onnx", "fp32")
    assert latency_ms(residual(), better, "onnx") == latency_ms(residual(), BOTH, "onnx")
    # What stays in float alone costs more than was measured: then all of it was too dear.
    least = brought_to(MIXED, BOTH, "onnx", "int8", 0.1 * latency_ms(MIXED, BOTH, "onnx"))
    assert latency_ms(MIXED, least, "onnx") == pytest.approx(0.1 * latency_ms(MIXED, BOTH, "onnx"))
    assert latency_ms(residual(), least, "onnx") == pytest.approx(0.1 * latency_ms(residual(), BOTH, "onnx"))


@pytest.mark.parametrize("measured", [0.0, -1.0, math.inf, math.nan])
def test_no_time_is_no_measurement(measured: float) -> None:
    with pytest.raises(BadInputError, match="positive and finite"):
        brought_to(residual(), BOTH, "onnx", "fp32", measured)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 2.0), st.floats(0.5, 2.0), st.floats(0.5, 2.0))
def test_kinds_and_the_whole_together(dense: float, pointwise: float, whole: float) -> None:
    """The corrected price of the measured network is its measurement; kinds that were not touched keep their ratio."""
    measured = whole * latency_ms(residual(), BOTH, "onnx")
    by_kind = corrected_kinds(BOTH, "onnx", [factor("dense", dense), factor("pointwise", pointwise, "fp32")])
    better = brought_to(residual(), by_kind, "onnx", "fp32", measured)
    assert latency_ms(residual(), better, "onnx") == pytest.approx(measured)
    before, after = of_rows(residual(), BOTH), of_rows(residual(), better)
    common = after["fc", "linear"] / before["fc", "linear"]
    assert after["sum", "add"] / before["sum", "add"] == pytest.approx(common)
    assert after["a", "dense"] / before["a", "dense"] == pytest.approx(dense * common)
    assert after["c", "pointwise"] / before["c", "pointwise"] == pytest.approx(pointwise * common)
    assert better.table("onnx", "int8") == BOTH.table("onnx", "int8")


def test_rows_of_other_tables_stay() -> None:
    better = corrected_kinds(BOTH, "onnx", [factor("dense", 2.0, "int8"), factor("nothing", 3.0)])
    assert better.table("onnx", "fp32") == BOTH.table("onnx", "fp32")
    assert of_rows(MIXED, better)["b", "dense"] == pytest.approx(2 * of_rows(MIXED, BOTH)["b", "dense"])
    assert corrected_kinds(BOTH, "tflite", [factor("dense", 2.0)]) == BOTH


# ---------------------------------------------------------------- the profiler's own time


def files(slower: float, profiler: float) -> list[Profiled]:
    """A large file and a small one with as many kernels."""
    return [
        Profiled([kernel("Conv", slower * us + profiler) for us in times], sum(times))
        for times in ([100.0, 80.0, 60.0, 1.0], [9.0, 8.0, 5.0, 1.0])
    ]


@pytest.mark.parametrize(("slower", "profiler"), [(1.0, 0.0), (1.0, 5.0), (0.8, 5.0), (1.3, 2.0)])
def test_what_profiling_adds_is_found(slower: float, profiler: float) -> None:
    assert profiling_us(files(slower, profiler)) == pytest.approx(profiler, abs=1e-9)


def test_no_kernel_takes_less_than_the_profiler() -> None:
    slow, quick = Profiled([kernel("Conv", 100.0), kernel("Reshape", 4.0)], 10.0), Profiled([kernel("Conv", 1e3)], 1e3)
    assert profiling_us([slow, quick]) == 4.0
    assert profiling_us([]) == profiling_us([Profiled([], 10.0)]) == 0.0


def test_the_profilers_time_does_not_leak_into_the_factors() -> None:
    """The same file with and without a profiler that takes 5 us a kernel: the same factors."""
    lines = [line(f"c{i}", "conv", us) for i, us in enumerate((30.0, 20.0, 30.0))] + [line("s", "add", 2.0, "add")]
    true = {"c0": 33.0, "c1": 22.0, "c2": 33.0, "s": 6.0}
    found = []
    for profiler in (0.0, 5.0):
        kernels = [kernel("Add" if one.kind == "add" else "Conv", true[one.name] + profiler) for one in lines]
        times = times_us(lines, kernels, profiling_us([*files(1.0, profiler), Profiled(kernels, sum(true.values()))]))
        assert times == pytest.approx(true)
        found.append({one.row: one.factor for one in kind_factors(lines, times)})
    assert found[0] == pytest.approx(found[1])
    assert found[0]["add"] > 1 > found[0]["dense"]


# ---------------------------------------------------------------- which kernel is whose


def test_onnx_kernels_find_their_operators() -> None:
    """As ONNX Runtime names them: layers by order, changes of layout with what they are for, activations inside."""
    lines = [
        line("quantize input", "quantize", 1.0),
        line("conv2d", "conv", 9.0), line("conv2d, inside", "inside", 2.0), line("add", "add", 3.0),
        line("pool", "global_pool", 1.0), line("linear", "linear", 2.0), line("dequantize linear", "dequantize", 1.0),
    ]  # fmt: skip
    kinds = ("QuantizeLinear", "Transpose", "QLinearConv", "HardSigmoid", "Mul", "QLinearAdd",
             "QLinearGlobalAveragePool", "Transpose", "Reshape", "QGemm", "DequantizeLinear")  # fmt: skip
    times = times_us(lines, [kernel(kind, 10.0 + i) for i, kind in enumerate(kinds)], 1.0)
    assert times == {
        "quantize input": 9.0,
        "conv2d": 10.0 + 11.0,
        "conv2d, inside": 12.0,
        "add": 14.0,
        "pool": 15.0,
        "linear": 16.0 + 17.0 + 18.0,
        "dequantize linear": 19.0,
    }


def test_xnnpack_kernels_find_their_operators() -> None:
    """1 x 1 convolutions are fully connected kernels, and both borders are conversions."""
    lines = [
        line("quantize input", "quantize", 1.0), line("conv2d", "conv", 9.0), line("conv2d, inside", "inside", 3.0),
        line("conv2d_1", "conv", 4.0, "pointwise"), line("add", "add", 3.0, "add"), line("add, inside", "inside", 0.0),
        line("linear", "linear", 2.0), line("dequantize linear", "dequantize", 1.0),
    ]  # fmt: skip
    kinds = ("Convert", "Convolution", "Fully Connected", "Add", "Clamp", "Fully Connected", "Convert")
    times = times_us(lines, [kernel(kind, 4.0 * (i + 1)) for i, kind in enumerate(kinds)], 0.0)
    assert times["conv2d"] == pytest.approx(8.0 * 9 / 12)  # one kernel does both: as priced
    assert times["conv2d, inside"] == pytest.approx(8.0 * 3 / 12)
    assert times["conv2d_1"] == 12.0
    assert times["add"] == 16.0 + 20.0  # a clamp of its own that is priced with the addition
    assert (times["linear"], times["quantize input"], times["dequantize linear"]) == (24.0, 4.0, 28.0)


def test_kinds_whose_kernels_do_not_pair_are_left_out() -> None:
    lines = [line("conv2d", "conv", 9.0), line("mul", "mul", 3.0), line("act", "activation", 1.0)]
    kernels = [kernel("Conv", 9.0), kernel("Mul", 5.0), kernel("Sigmoid", 1.0), kernel("Mul", 5.0), kernel("Tile", 9.0)]
    assert times_us(lines, kernels, 0.0) == {"conv2d": 9.0, "act": 1.0}
    assert times_us(lines, [], 0.0) == {}
    assert kind_factors(lines, {}) == ()


class Block(nn.Module):
    """A stem, and two convolutions beside a 1 x 1 shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.one, self.two, self.shortcut = nn.Conv2d(4, 6, 3, 1, 1), nn.Conv2d(6, 5, 3, 1, 1), nn.Conv2d(4, 5, 1)
        self.last = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.two(torch.relu(self.one(x))) + self.shortcut(x))
        return self.last(x.mean((2, 3)))


def weights(path: Path) -> Mapping[str, tuple[int, ...]]:
    """Shapes of what the layers of an ONNX file hold, by the names that ONNX Runtime gives their kernels."""
    import onnx

    graph = onnx.load(str(path)).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return {f"{n.output[0]}_nchwc": shapes[n.input[1]] for n in graph.node if n.op_type in ("Conv", "Gemm")}


def test_kernels_of_an_onnx_file_are_told_apart_in_whatever_order_they_run(tmp_path: Path) -> None:
    module, example = Block().eval(), torch.zeros(1, 3, 8, 8)
    network = trace(module, example, "block")
    path = tmp_path / "block.onnx"
    registry.runtime("onnx").export(ExportJob(Candidate(module, example, network), "fp32", str(path)))
    held = weights(path)
    kernels = [kernel("Conv" if len(shape) == 4 else "Gemm", math.prod(shape), name) for name, shape in held.items()]
    random.Random(3).shuffle(kernels)  # noqa: S311
    lines = priced_lines(network, BOTH, "onnx")
    times = times_us(lines, kernels, 0.0, path)
    for operator in network.operators:
        if operator.kind in ("conv", "linear"):
            own = times[operator.name] + times.get(f"{operator.name}, inside", 0.0)
            assert own == pytest.approx(network.shape(operator).weights), operator.name


# ---------------------------------------------------------------- how far it is believed


def observed(counts: Mapping[str, int], off: Mapping[str, float], us: float = 20.0) -> dict[str, float]:
    """The factors of kinds with so many operators of which each takes `off` times its price."""
    lines = [line(f"{row}{i}", "conv", us, row) for row, count in counts.items() for i in range(count)]
    return {one.row: one.factor for one in kind_factors(lines, {one.name: off[one.row] * one.us for one in lines})}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.4, 2.5), st.floats(0.2, 5.0))
def test_factors_are_shrunk_towards_the_whole(one: int, other: int, off: float, speed: float) -> None:
    """The machine's speed is no kind's; a kind is corrected in the direction in which it is off, and by less."""
    found = observed({"dense": one, "pointwise": other}, {"dense": off * speed, "pointwise": speed}, us=20.0 / speed)
    common = (one * off + other) / (one + other)
    for row, true in (("dense", off / common), ("pointwise", 1 / common)):
        believed = math.log(found[row])
        assert abs(believed) <= min(abs(math.log(true)), math.log(MOST_OFF)) + 1e-9
        assert believed * math.log(true) >= -1e-12


def test_many_operators_and_long_kernels_are_believed_more() -> None:
    off = {"dense": 1.0, "few": 1.5, "many": 1.5}
    found = observed({"dense": 200, "few": 1, "many": 12}, off)
    assert 1.05 < found["few"] < 1.15
    assert 1.25 < found["many"] < 1.5
    short = observed({"dense": 200, "few": 1, "many": 12}, off, us=0.5)
    assert short["many"] < found["few"]
    assert all(0.99 < by < 1.01 for by in observed({"a": 5, "b": 5}, {"a": 3.0, "b": 3.0}).values())
