"""One QuantSpec in every runtime: operators left in float, dynamic int8, int8 weights alone; read back and run."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mobilekit import registry
from mobilekit.cost.work import quantised
from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.network import trace
from mobilekit.network.observation import activation_ranges
from mobilekit.runtimes import _mil_program
from mobilekit.runtimes import onnx as onnx_runtime
from mobilekit.runtimes import tflite as tflite_runtime
from mobilekit.runtimes._job import Source
from mobilekit.runtimes._onnx_weights import _rounded
from mobilekit.transforms.int8 import for_file
from mobilekit.types import Calibration, Candidate, ExportJob, FileFacts, Option, Plan, QuantSpec

SIZE = 24
RUN = ("onnx", "tflite")
LEAST_DB = {"static": 25.0, "dynamic": 30.0, "float": 35.0}
LEFT = ("conv2d_1", "add")


class Net(nn.Module):
    """Dense, depthwise and pointwise convolutions, hard-swish, a sum, pools, a sigmoid, a concatenation, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.Hardswish()
        )
        self.pointwise = nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.wide = nn.Conv2d(64, 128, 3, 1, 1)
        self.last = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.pointwise(self.depthwise(x))
        x = torch.cat([F.max_pool2d(x, 2, 2), torch.sigmoid(F.avg_pool2d(x, 2, 2))], 1)
        x = F.relu(self.wide(x))
        return self.last(F.adaptive_avg_pool2d(x, 1).flatten(1))


def images(count: int, seed: int) -> torch.Tensor:
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=SIZE, mode="bilinear")


def settled(module: nn.Module) -> nn.Module:
    """In eval mode, with batch norms that have seen images."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    with torch.no_grad():
        for seed in range(4):
            module(images(32, seed))
    return module.eval()


@pytest.fixture(scope="module")
def start() -> Candidate:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = settled(Net())
    return Candidate(module=module, example_input=images(1, 0), network=trace(module, images(1, 0)))


def int8(candidate: Candidate, where: str = "network", **settings: Any) -> Candidate:
    option = Option(transform="int8", where=where, settings={"calibration": "min-max", **settings})
    return registry.transform("int8").apply(candidate, option)


def identity(module: nn.Module) -> str:
    """Its class and all its numbers."""
    return type(module).__name__ + str([float(tensor.double().sum()) for tensor in module.state_dict().values()])


@pytest.fixture(scope="module", autouse=True)
def converted_once() -> Iterator[None]:
    """Networks are converted to float once for each runtime: that takes most of an export."""
    protos: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    to_onnx, to_tflite = onnx_runtime._float_model, tflite_runtime._write_float

    def float_model(source: Source, opset: int) -> Any:
        name = identity(source.network)
        if name not in protos:
            protos[name] = to_onnx(source, opset)
        return copy.deepcopy(protos[name])

    def write_float(source: Source, path: Path) -> None:
        name = identity(source.network)
        if name not in files:
            to_tflite(source, path)
            files[name] = path.read_bytes()
        path.write_bytes(files[name])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_runtime, "_float_model", float_model)
        patch.setattr(tflite_runtime, "_write_float", write_float)
        yield


Made = Callable[..., tuple[Path, FileFacts]]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("specs")
    kept: dict[tuple[str, str, str], tuple[Path, FileFacts]] = {}

    def written(name: str, candidate: Candidate, precision: str = "int8") -> tuple[Path, FileFacts]:
        runtime = registry.runtime(name)
        if runtime.unavailable():
            pytest.skip(runtime.unavailable())
        key = (name, repr(candidate.quant), precision)
        if key not in kept:
            path = folder / f"{len(kept)}{runtime.suffix}"
            static = candidate.quant is None or candidate.quant.activations == "static"
            batches = (images(24, 11).numpy(), images(7, 12).numpy()) if static else ()
            runtime.export(ExportJob(candidate, precision, str(path), batches))  # type: ignore[arg-type]
            kept[key] = (path, runtime.describe(path))
        return kept[key]

    return written


def sqnr_db(name: str, path: Path, module: nn.Module) -> float:
    with torch.no_grad():
        wanted = module(images(16, 99)).numpy()
    error = ((wanted - registry.runtime(name).open(path)([images(16, 99).numpy()])[0]) ** 2).mean()
    return float(10 * np.log10((wanted**2).mean() / max(error, 1e-30)))


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def kernels(path: Path, folder: Path) -> Counter[str]:
    """Types of the nodes that ONNX Runtime really runs."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    return Counter(node.op_type.removeprefix("Nhwc").removeprefix("Fused") for node in graph.node)


# ---------------------------------------------------------------- the three treatments, in every runtime


@pytest.mark.parametrize("name", RUN)
def test_a_spec_of_all_operators_is_the_file_without_a_spec(name: str, start: Candidate, export: Made) -> None:
    path, facts = export(name, int8(start))
    bare, _ = export(name, start)
    assert path.read_bytes() == bare.read_bytes()
    assert facts.weights == {"int8": 5}
    assert sqnr_db(name, path, start.module) > LEAST_DB["static"]


@pytest.mark.parametrize(
    ("left", "floats"),
    [
        (LEFT, 3),  # the hard-swish behind the convolution is an operator of the file
        (("conv2d", "linear"), 3),  # the ReLU in ONNX, the padding in TFLite
        (("max_pool2d", "cat"), 3),  # the sigmoid beside them has no int8 of its own
        (("adaptive_avg_pool2d",), 1),
    ],
)
@pytest.mark.parametrize("name", RUN)
def test_operators_left_in_float_are_float_in_the_file(
    name: str, left: tuple[str, ...], floats: int, start: Candidate, export: Made
) -> None:
    path, facts = export(name, int8(start, float=",".join(left)))
    _, whole = export(name, int8(start))
    assert facts.operators["fp32"] == whole.operators.get("fp32", 0) + floats
    kinds = {operator.name: operator for operator in start.network.operators}
    weighted = sum(kinds[n].kind in ("conv", "linear") for n in left)
    assert facts.weights == {**({"fp32": weighted} if weighted else {}), "int8": 5 - weighted}
    assert sqnr_db(name, path, start.module) > LEAST_DB["static"]


def test_onnx_runtime_runs_what_the_file_says(start: Candidate, export: Made, tmp_path: Path) -> None:
    whole = kernels(export("onnx", int8(start))[0], tmp_path)
    assert (whole["QLinearConv"], whole["QLinearAdd"], whole["QLinearConcat"]) == (4, 1, 1)
    mixed = kernels(export("onnx", int8(start, float=",".join(LEFT)))[0], tmp_path)
    assert (mixed["QLinearConv"], mixed["Conv"]) == (3, 1)
    assert (mixed["QLinearAdd"], mixed["Add"]) == (0, 1)
    moved = kernels(export("onnx", int8(start, float="max_pool2d,cat"))[0], tmp_path)
    assert (moved["QLinearConcat"], moved["Concat"], moved["QLinearConv"]) == (0, 1, 4)
    dynamic = kernels(export("onnx", int8(start, activations="dynamic"))[0], tmp_path)
    assert dynamic["ConvInteger"] == 4
    assert dynamic["Conv"] == dynamic["Gemm"] == 0
    weights = kernels(export("onnx", int8(start, activations="float"))[0], tmp_path)
    assert (weights["Conv"], weights["Gemm"], weights["ConvInteger"]) == (4, 1, 0)


def test_a_max_pool_in_float_reads_floats(start: Candidate, export: Made, tmp_path: Path) -> None:
    import onnx

    path, _ = export("onnx", int8(start, float="max_pool2d"))
    kernels(path, tmp_path)
    graph = onnx.shape_inference.infer_shapes(onnx.load(str(tmp_path / "optimised.onnx"))).graph
    (pool,) = [node for node in graph.node if node.op_type == "MaxPool"]
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    sources = {out: node.op_type for node in graph.node for out in node.output}
    assert types.get(pool.output[0], onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT
    assert sources[pool.input[0]] not in ("QuantizeLinear", "QLinearAdd")


@pytest.mark.parametrize("activations", ["dynamic", "float"])
@pytest.mark.parametrize("name", RUN)
def test_no_calibration_is_needed_for_weights_alone_and_for_dynamic_int8(
    name: str, activations: str, start: Candidate, export: Made
) -> None:
    path, facts = export(name, int8(start, activations=activations))
    float_path, float_facts = export(name, start, "fp32")
    assert facts.weights == {"int8": 5}
    assert float_facts.weights == {"fp32": 5}
    if activations == "dynamic":
        assert facts.operators["int8"] == 5
        assert facts.operators["fp32"] >= float_facts.operators["fp32"] - 5
    else:
        assert set(facts.operators) == {"fp32"}
    assert size(path) < 0.35 * size(float_path)
    found = sqnr_db(name, path, start.module)
    assert LEAST_DB[activations] < found < 70  # float weights would give more than 100


@pytest.mark.parametrize("activations", ["dynamic", "float"])
@pytest.mark.parametrize("name", RUN)
def test_one_layer_keeps_float_weights(name: str, activations: str, start: Candidate, export: Made) -> None:
    path, facts = export(name, int8(start, activations=activations, float="conv2d_3"))
    whole, _ = export(name, int8(start, activations=activations))
    assert facts.weights == {"fp32": 1, "int8": 4}
    assert size(path) - size(whole) > 0.9 * 3 * 64 * 128 * 9  # three more bytes a weight
    assert sqnr_db(name, path, start.module) > LEAST_DB[activations]


@pytest.mark.parametrize("name", RUN)
def test_one_operator_alone_can_be_int8(name: str, start: Candidate, export: Made) -> None:
    one = int8(start, "conv2d_2")
    assert one.network.precisions == {"conv2d_2": "int8"}
    path, facts = export(name, one)
    assert facts.operators["int8"] == 1
    assert facts.weights == {"fp32": 4, "int8": 1}
    two = int8(one, "conv2d_3")
    assert two.network.precisions == {"conv2d_2": "int8", "conv2d_3": "int8"}
    assert export(name, two)[1].weights == {"fp32": 3, "int8": 2}
    assert sqnr_db(name, path, start.module) > 40


def test_core_ml_packs_weights_alone_and_says_what_it_has_not(start: Candidate, export: Made) -> None:
    float_path, float_facts = export("coreml", start, "fp32")
    path, facts = export("coreml", int8(start, activations="float"))
    assert float_facts.weights == {"fp32": 5}
    assert facts.weights == {"int8": 5}
    assert size(path) < 0.35 * size(float_path)
    for activations in ("static", "float"):
        mixed, facts = export("coreml", int8(start, activations=activations, float="conv2d_1,linear"))
        assert facts.weights == {"fp16": 2, "int8": 3}
        assert mixed != path
    with pytest.raises(UnsupportedError, match="Core ML has no dynamic"):
        export("coreml", int8(start, activations="dynamic"))


# ---------------------------------------------------------------- one spec's ranges in every file


def scales_of(name: str, path: Path) -> list[float]:
    """Steps of all activations that are rounded in a file."""
    if name == "onnx":
        graph = onnx.load(str(path)).graph
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        return [float(stored[node.input[1]]) for node in graph.node if node.op_type == "QuantizeLinear"]
    if name == "tflite":
        details = tflite_runtime.start_interpreter(path).get_tensor_details()
        return [d["quantization"][0] for d in details if d["dtype"] is np.int8 and d["quantization"][0]]
    program = _mil_program.read(path)
    places = [o.arguments["scale"][0] for o in program.operations if o.kind == "quantize"]
    return [float(program.constants[place].value()) for place in places]


@pytest.mark.parametrize("name", [*RUN, "coreml"])
def test_scales_in_the_file_are_those_of_the_spec(name: str, start: Candidate, export: Made) -> None:
    calibrated = for_file(int8(start), Calibration((images(24, 11),)))
    assert calibrated.quant is not None
    found = calibrated.quant.ranges
    assert found["x"] == (float(images(24, 11).min()), float(images(24, 11).max()))
    # wider than what any of these inputs reaches: only the spec can have said so
    wide = {**found, "x": (-30.0, 21.0), "relu": (0.0, 51.0)}
    spec = calibrated.quant.model_copy(update={"ranges": wide})
    path, _ = export(name, replace(calibrated, quant=spec))
    written = scales_of(name, path)
    # coremltools divides the scales around a sum by one of them, which rounds to the same values
    for node in ("x", "relu", "avg_pool2d") if name == "coreml" else ("x", "relu", "add"):
        low, high = wide[node]
        step = (max(high, 0.0) - min(low, 0.0)) / 255
        assert min(abs(each / step - 1) for each in written) < 1e-3, node


def test_ranges_are_exact_over_all_inputs_and_without_what_is_not_finite() -> None:
    class Logarithm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(x.mean((2, 3)))

    inputs = torch.rand(5, 3, 4, 4) + 0.5
    inputs[3] = 0.0
    found = activation_ranges(Logarithm().eval(), [(inputs[:2],), (inputs[2:],)])
    assert found["x"] == (0.0, float(inputs.max()))
    logs = torch.log(inputs.mean((2, 3)))[[0, 1, 2, 4]]
    assert found["log"] == pytest.approx((float(logs.min()), float(logs.max())))


@pytest.mark.parametrize("name", [*RUN, "coreml"])
def test_logits_are_not_rounded_to_256_values(name: str, start: Candidate, export: Made) -> None:
    path, facts = export(name, int8(start))
    logits = registry.runtime(name).open(path)([images(64, 5).numpy()])[0]
    assert len(np.unique(logits)) > 300
    assert facts.weights == {"int8": 5}
    assert facts.outputs[0].dtype == "float32"


def test_core_ml_computes_in_int8_what_it_can(start: Candidate, export: Made) -> None:
    path, facts = export("coreml", int8(start))
    kinds = Counter(operation.kind for operation in _mil_program.read(path).operations)
    assert kinds["dequantize"] >= kinds["quantize"] > 5
    assert facts.operators["int8"] > 7
    assert sqnr_db("coreml", path, start.module) > LEAST_DB["static"]
    _, mixed = export("coreml", int8(start, float=",".join(LEFT)))
    assert mixed.operators["int8"] == facts.operators["int8"] - len(LEFT)


class Between(nn.Module):
    """A convolution with filters of very different size between two others, directly behind and in front of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.middle, self.after = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 1)
        with torch.no_grad():
            self.middle.weight[0] *= 300  # its output is never above zero: nothing but the other filters' grid is lost
            self.middle.bias[0] = -1e4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(F.relu(self.middle(F.relu(self.before(x)))))


def test_weights_of_a_layer_left_in_float_are_not_rounded_by_the_runtime(export: Made) -> None:
    module = Between().eval()
    start = Candidate(module=module, example_input=images(1, 0), network=trace(module, images(1, 0)))
    for name in RUN:
        path, facts = export(name, int8(start, float="conv2d_1"))
        assert facts.weights == {"fp32": 1, "int8": 2}
        assert sqnr_db(name, path, module) > 30


def test_core_ml_finds_the_weights_of_a_layer_whose_filter_is_nearly_zero(export: Made) -> None:
    module = Between().eval()
    module.middle.weight.data[3] *= 1e-8  # nothing is left of it in half precision
    start = Candidate(module=module, example_input=images(1, 0), network=trace(module, images(1, 0)))
    _, facts = export("coreml", int8(start, float="conv2d_1"))
    assert facts.weights == {"fp16": 1, "int8": 2}


# ---------------------------------------------------------------- sketches


@pytest.mark.parametrize("left", ["", "conv2d_1", "conv2d_3,linear", "conv2d"])
def test_a_sketch_has_as_many_int8_operators_as_the_export(
    left: str, start: Candidate, export: Made, tmp_path: Path
) -> None:
    candidate = int8(start, float=left)
    runtime = registry.runtime("onnx")
    runtime.sketch(candidate.network, tmp_path / "sketch.onnx")
    drawn = runtime.describe(tmp_path / "sketch.onnx")
    _, facts = export("onnx", candidate)
    assert drawn.operators["int8"] == facts.operators["int8"]
    assert drawn.weights == facts.weights


# ---------------------------------------------------------------- what is refused


class Twins(nn.Module):
    """Two operators that compute the same: an exporter may make one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1)
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = torch.cat([F.max_pool2d(x, 2), F.max_pool2d(x, 2)], 1)
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize("name", RUN)
def test_operators_that_cannot_be_told_apart_are_refused(name: str, export: Made) -> None:
    module = Twins().eval()
    twins = Candidate(module=module, example_input=images(1, 0), network=trace(module, images(1, 0)))
    with pytest.raises(UnsupportedError, match="max_pool2d, max_pool2d_1"):
        export(name, int8(twins, float="max_pool2d"))
    _, facts = export(name, int8(twins, float="max_pool2d,max_pool2d_1"))
    assert facts.weights == {"int8": 2}


@pytest.mark.parametrize("name", [*RUN, "coreml"])
def test_specs_that_do_not_fit_the_network_are_refused(name: str, start: Candidate, export: Made) -> None:
    def specified(**changes: Any) -> Candidate:
        quant = QuantSpec(**changes)
        return Candidate(module=start.module, example_input=start.example_input, network=start.network, quant=quant)

    with pytest.raises(BadInputError, match="nobody"):
        export(name, specified(operators={"nobody": "int8"}))
    with pytest.raises(UnsupportedError, match="no operator"):
        export(name, specified(operators={}))
    with pytest.raises(UnsupportedError, match=r"weight-only int8 .* add \(add\)"):
        export(name, specified(operators={"conv2d": "int8", "add": "int8"}, activations="float"))
    with pytest.raises(UnsupportedError, match=r"add"):
        export(name, specified(operators={"add": "int8"}, activations="dynamic"))


def test_options_of_the_lever_that_cannot_be_carried_out(start: Candidate) -> None:
    lever = registry.transform("int8")
    for where, changes, said in (
        ("network", {"float": "conv2d,ghost"}, "ghost"),
        ("network", {"float": 3}, "commas"),
        ("network", {"activations": "sometimes"}, "sometimes"),
        ("network", {"float": ",".join(o.name for o in start.network.operators)}, "all of them"),
        ("ghost", {}, "ghost"),
        ("sigmoid", {}, "activation"),
        ("add", {"activations": "dynamic"}, "add"),
        ("conv2d", {"float": "add"}, "alone"),
    ):
        option = Option(transform="int8", where=where, settings=changes)
        with pytest.raises(UnsupportedError, match=said):
            lever.predict(start.network, option)
        with pytest.raises(UnsupportedError, match=said):
            lever.apply(start, option)
    with pytest.raises(UnsupportedError, match="cannot join"):
        int8(int8(start, "conv2d"), "linear", activations="float")


def test_weights_are_not_rounded_with_care_where_a_layer_stays_in_float(start: Candidate) -> None:
    data = Calibration(inputs=(images(4, 1),))
    given_data = Candidate(start.module, start.example_input, start.network, calibration=data)
    for setting in ({"rounding": "learned"}, {"correct_bias": True}):
        with pytest.raises(UnsupportedError, match="linear would stay in float"):
            int8(given_data, float="linear", **setting)


# ---------------------------------------------------------------- the spec itself


def test_the_network_says_what_computes_in_int8(start: Candidate) -> None:
    everything = quantised(start.network)
    assert int8(start).network.precisions == everything
    mixed = int8(start, float=" conv2d_1 , add")
    assert mixed.network.precisions == {n: p for n, p in everything.items() if n not in LEFT}
    assert mixed.quant is not None
    assert {n for n, p in mixed.quant.operators.items() if p != "int8"} == set(LEFT)
    dynamic = int8(start, activations="dynamic")
    layers = {o.name for o in start.network.operators if o.kind in ("conv", "linear")}
    assert set(dynamic.network.precisions) == layers
    alone = int8(start, activations="float")
    assert alone.network.precisions == {}
    assert alone.quant is not None
    assert set(alone.quant.operators) == layers
    assert int8(int8(start), activations="float").network.precisions == {}  # what was int8 before is so no more


def test_specs_and_plans_written_before_still_load() -> None:
    old = (
        '{"operators": {"conv2d": "int8"}, "weight_scheme": "symmetric per channel",'
        ' "activation_scheme": "asymmetric per tensor", "calibration": "min-max"}'
    )
    assert QuantSpec.model_validate_json(old).activations == "static"
    new = QuantSpec(operators={"conv2d": "int8"}, activations="dynamic")
    assert QuantSpec.model_validate_json(new.model_dump_json()) == new
    assert FileFacts.model_validate({"inputs": (), "outputs": (), "operators": {"fp32": 2}}).weights == {}
    assert Plan.model_fields["schema_version"].default == 1


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)),
    axis=st.integers(-3, 2),
    seed=st.integers(0, 99),
    scale=st.floats(1e-6, 1e6),
)
@settings(deadline=None, max_examples=50)
def test_rounded_weights_are_within_half_a_step(shape: tuple[int, ...], axis: int, seed: int, scale: float) -> None:
    weight = (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)
    weight[0] = 0
    made = _rounded(weight, axis)
    moved = np.moveaxis(made.quantised.astype(np.float64), made.axis, -1) * made.scales
    original = np.moveaxis(weight, axis, -1)
    assert made.scales.shape == (shape[axis],)
    assert np.abs(moved - original).max() <= (np.abs(made.scales) * 0.5001).max()
    assert np.all(np.abs(moved - original) <= made.scales * 0.5001)
