"""TFLite sketches: the operators of real exports, in the planned precisions, and files that run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import SIDE, build, example

from mobilekit import registry
from mobilekit.errors import UnsupportedError
from mobilekit.network import trace
from mobilekit.runtimes._tflite_facts import schema
from mobilekit.runtimes._tflite_tables import unpacked
from mobilekit.runtimes.tflite import Tflite, start_interpreter
from mobilekit.types import INPUT_GROUP, Candidate, ChannelGroup, ExportJob, Network, Operator, Precision

pytestmark = pytest.mark.skipif(bool(Tflite().unavailable()), reason=Tflite().unavailable() or "")
FEW = ("resnet", "shufflenet_v2")
MORE = ("mobilenet_v2", "squeeze_conv", "densenet", "vgg", "inception", "resnext", "same_pad")


class File:
    """What a file holds: operators in order as (code, type and sizes of what it writes, clamp, padding mode)."""

    def __init__(self, path: Path) -> None:
        model = unpacked(path.read_bytes())
        self.graph = model.subgraphs[0]
        names = {value: name for name, value in vars(schema().BuiltinOperator).items()}
        types = {value: name for name, value in vars(schema().TensorType).items()}
        self.operators: list[tuple[Any, ...]] = []
        for operator in self.graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            output, options = self.graph.tensors[operator.outputs[0]], operator.builtinOptions
            self.operators.append(
                (
                    names[max(code.builtinCode, code.deprecatedBuiltinCode)],
                    types[output.type],
                    tuple(int(size) for size in output.shape),
                    getattr(options, "fusedActivationFunction", 0),
                    getattr(options, "padding", 0),
                )
            )
        self.codes = [operator[0] for operator in self.operators]
        reads = [types[self.graph.tensors[operator.inputs[0]].type] for operator in self.graph.operators]
        self.rescaling = [code == "QUANTIZE" and read == "INT8" for code, read in zip(self.codes, reads, strict=True)]
        self.rescales = sum(self.rescaling)
        """QUANTIZE operators from int8 to int8."""
        self.names = [self.graph.tensors[operator.outputs[0]].name.decode() for operator in self.graph.operators]

    def apart(self) -> list[tuple[Any, ...]]:
        """The operators but for those that change an int8 scale."""
        return [row for row, rescaling in zip(self.operators, self.rescaling, strict=True) if not rescaling]


def in_int8(network: Network, *names: str) -> Network:
    """The same network with these operators, or all of them, in int8."""
    return network.with_precisions({o.name: "int8" for o in network.operators if not names or o.name in names})


def chain(*operators: Operator, channels: int = 8, size: int = 12, widths: dict[str, int] | None = None) -> Network:
    """A network whose channel groups are all as wide as its input but for those given."""
    given = {INPUT_GROUP: channels, **(widths or {})}
    groups = {name for o in operators for name in (*o.in_groups, *o.out_groups)} | {INPUT_GROUP}
    return Network(
        name="chain",
        input_shape=(1, channels, size, size),
        operators=operators,
        groups={name: ChannelGroup(width=given.get(name, channels)) for name in groups},
        axes={},
    )


def step(name: str, kind: str, *inputs: str, size: int = 12, **facts: Any) -> Operator:
    """An operator on maps of one size that reads the network's input where it says nothing else."""
    defaults: dict[str, Any] = {
        "module": "",
        "inputs": inputs or ("input",),
        "in_groups": ("a",),
        "out_groups": ("a",),
        "in_size": (size, size),
        "out_size": (size, size),
    }
    return Operator(name=name, kind=kind, **{**defaults, **facts})


def conv(name: str, *inputs: str, **facts: Any) -> Operator:
    return step(name, "conv", *inputs, **{"kernel": (3, 3), **facts})


def written(network: Network, path: Path) -> File:
    Tflite().sketch(network, path)
    return File(path)


def run(path: Path, seed: int = 0) -> list[np.ndarray]:
    """The outputs for one input."""
    interpreter = start_interpreter(path)
    random = np.random.default_rng(seed)
    for detail in interpreter.get_input_details():
        integer = detail["dtype"] is np.int8
        value = random.integers(-128, 128, detail["shape"]) if integer else random.normal(size=detail["shape"])
        interpreter.set_tensor(detail["index"], value.astype(detail["dtype"]))
    interpreter.invoke()
    return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]


# ---------------------------------------------------------------- real exports


@pytest.fixture(scope="module", params=[*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Path, Path]:
    """A network, and its real exports in fp32 and int8."""
    module, folder = build(request.param), tmp_path_factory.mktemp(request.param)
    network = trace(module, example(), request.param)
    images = np.random.default_rng(0).normal(size=(8, 3, SIDE, SIDE)).astype(np.float32)
    paths = {precision: folder / f"{precision}.tflite" for precision in ("fp32", "int8")}
    for precision, path in paths.items():
        candidate = Candidate(module, example(), network)
        registry.runtime("tflite").export(ExportJob(candidate, precision, path, (images,)))  # type: ignore[arg-type]
    return network, paths["fp32"], paths["int8"]


def test_operators_are_those_of_the_real_export(exported: tuple[Network, Path, Path], tmp_path: Path) -> None:
    network, *real = exported
    for wanted, plan in zip(real, (network, in_int8(network)), strict=True):
        path = tmp_path / "sketch.tflite"
        sketch, export = written(plan, path), File(wanted)
        assert Counter(sketch.apart()) == Counter(export.apart())
        # Whether an input of a concatenation has its scale already depends on the numbers of a real network.
        assert abs(sketch.rescales - export.rescales) <= (export.codes.count("SLICE") > 0)
        facts, described = (registry.runtime("tflite").describe(p) for p in (path, wanted))
        assert [(t.shape, t.dtype) for t in (*facts.inputs, *facts.outputs)] == [
            (t.shape, t.dtype) for t in (*described.inputs, *described.outputs)
        ]
        (output,) = run(path)
        assert np.isfinite(output).all()
        names = {operator.name for operator in network.operators}
        bearers = {part.partition("/")[0] for name in sketch.names for part in name.split(";")}
        assert names <= bearers


# ---------------------------------------------------------------- single operators and borders

HALF = {"out_size": (6, 6), "stride": (2, 2)}
ONE = {"out_size": (1, 1)}
SINGLE: dict[str, tuple[Operator, list[str], tuple[int, ...]]] = {
    "dense": (conv("x", activation="relu6", **HALF), ["PAD", "CONV_2D"], (1, 6, 6, 8)),
    "same": (conv("x"), ["CONV_2D"], (1, 12, 12, 8)),
    "even kernel": (conv("x", kernel=(2, 2)), ["CONV_2D"], (1, 12, 12, 8)),
    "depthwise": (
        conv("x", depthwise=True, activation="silu"),
        ["DEPTHWISE_CONV_2D", "LOGISTIC", "MUL"],
        (1, 12, 12, 8),
    ),
    "grouped": (conv("x", groups=4, activation="hardswish"), ["CONV_2D", "HARD_SWISH"], (1, 12, 12, 8)),
    "hardsigmoid": (conv("x", activation="hardsigmoid"), ["CONV_2D", "MUL"], (1, 12, 12, 8)),
    "conv_transpose": (
        step("x", "conv_transpose", kernel=(2, 2), stride=(2, 2), out_size=(24, 24)),
        ["TRANSPOSE_CONV"],
        (1, 24, 24, 8),
    ),
    "linear": (
        step("x", "linear", in_size=(1, 1), out_size=(1, 1), in_repeat=144, out_groups=("b",)),
        ["TRANSPOSE", "RESHAPE", "FULLY_CONNECTED"],
        (1, 10),
    ),
    "max_pool": (step("x", "max_pool", kernel=(3, 3), **HALF), ["PADV2", "MAX_POOL_2D"], (1, 6, 6, 8)),
    "max_pool, open at the end": (
        step("x", "max_pool", kernel=(3, 3), ceil=True, **HALF),
        ["MAX_POOL_2D"],
        (1, 6, 6, 8),
    ),
    "avg_pool": (step("x", "avg_pool", kernel=(3, 3)), ["PAD", "AVERAGE_POOL_2D"], (1, 12, 12, 8)),
    "global_pool": (step("x", "global_pool", **ONE), ["MEAN"], (1, 1, 1, 8)),
    "add": (step("x", "add", "input", "input", activation="relu"), ["ADD"], (1, 12, 12, 8)),
    "add of three": (step("x", "add", "input", "input", "input"), ["ADD", "ADD"], (1, 12, 12, 8)),
    "mul": (step("x", "mul", "input", "input"), ["MUL"], (1, 12, 12, 8)),
    "concat": (step("x", "concat", "input", "input", out_groups=("a", "a")), ["CONCATENATION"], (1, 12, 12, 16)),
    "batch_norm": (step("x", "batch_norm", activation="relu"), ["SUB", "MUL", "MUL", "ADD"], (1, 12, 12, 8)),
    "softmax": (step("x", "softmax"), ["SOFTMAX"], (1, 12, 12, 8)),
    "pad": (step("x", "pad", out_size=(13, 15)), ["PAD"], (1, 13, 15, 8)),
    "resize": (step("x", "resize", out_size=(24, 18)), ["RESIZE_NEAREST_NEIGHBOR"], (1, 24, 18, 8)),
    "reshape": (step("x", "reshape", out_groups=("flat",), **ONE), ["TRANSPOSE", "RESHAPE"], (1, 1152)),
    "shuffle": (step("x", "shuffle", groups=2), ["TRANSPOSE", "RESHAPE"] * 2 + ["TRANSPOSE"], (1, 12, 12, 8)),
    "slice": (step("x", "slice", out_groups=("c",)), ["SLICE"], (1, 12, 12, 3)),
    "transpose": (step("x", "transpose"), ["TRANSPOSE"], (1, 12, 12, 8)),
    **{
        name: (step("x", "activation", activation=name), [code], (1, 12, 12, 8))
        for name, code in {"relu": "RELU", "sigmoid": "LOGISTIC", "tanh": "TANH", "gelu": "GELU"}.items()
    },
    "prelu": (step("x", "activation", activation="prelu"), ["RELU", "MUL", "MUL", "SUB"], (1, 12, 12, 8)),
}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", SINGLE)
def test_an_operator_alone_is_what_the_exporter_writes(name: str, precision: Precision, tmp_path: Path) -> None:
    operator, codes, dims = SINGLE[name]
    network = chain(operator, widths={"b": 10, "c": 3, "flat": 1152})
    if precision == "int8":
        network = in_int8(network)
        # a linear layer that writes the output writes it in float
        codes = ["QUANTIZE", *([*codes[:-1], "DEQUANTIZE", codes[-1]] if name == "linear" else [*codes, "DEQUANTIZE"])]
    path = tmp_path / "x.tflite"
    assert written(network, path).codes == codes
    (output,) = run(path)
    assert output.shape == dims
    assert output.dtype == np.float32
    assert np.isfinite(output).all()
    assert np.ptp(output) > 0


@pytest.mark.parametrize(("pooled", "codes"), [(True, ["MAX_POOL_2D"]), (False, ["DEQUANTIZE", "RELU6", "QUANTIZE"])])
def test_a_clamp_goes_into_the_operator_in_front_that_it_alone_reads(
    pooled: bool, codes: list[str], tmp_path: Path
) -> None:
    """ai-edge-quantizer has no int8 ReLU6 of its own."""
    pool = step("pool", "max_pool", kernel=(2, 2), stride=(2, 2), out_size=(6, 6))
    clamp = step("clamp", "activation", *(["pool"] if pooled else []), activation="relu6", size=6 if pooled else 12)
    path = tmp_path / "x.tflite"
    file = written(in_int8(chain(*([pool] if pooled else []), clamp)), path)
    assert file.codes == ["QUANTIZE", *codes, "DEQUANTIZE"]
    assert "clamp" in file.names[-2]
    assert np.isfinite(run(path)[0]).all()


@pytest.mark.parametrize(("activation", "inside"), [("leaky_relu", ["LEAKY_RELU"]), ("elu", ["EXP", "GREATER_EQUAL"])])
def test_activation_without_int8_form_runs_in_float_behind_an_int8_convolution(
    activation: str, inside: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.tflite"
    file = written(in_int8(chain(conv("x", activation=activation))), path)
    assert file.codes.count("DEQUANTIZE") == 2
    floats = [code for code, dtype, *_ in file.operators if dtype in ("FLOAT32", "BOOL") and code != "DEQUANTIZE"]
    assert floats == inside
    assert np.isfinite(run(path)[0]).all()


def test_quantize_and_dequantize_alone_are_one_operator(tmp_path: Path) -> None:
    for kind, dtypes in {"quantize": ("float32", "int8"), "dequantize": ("int8", "float32")}.items():
        path = tmp_path / f"{kind}.tflite"
        assert written(chain(step("x", kind)), path).codes == [kind.upper()]
        facts = Tflite().describe(path)
        assert (facts.inputs[0].dtype, facts.outputs[0].dtype) == dtypes


def test_borders_stand_where_the_precision_changes_and_nowhere_else(tmp_path: Path) -> None:
    network = chain(
        conv("one"), conv("two", "one"), conv("three", "two"), conv("side", "one"), step("sum", "add", "three", "side")
    )
    path = tmp_path / "x.tflite"
    file = written(in_int8(network, "two", "side"), path)
    expected = ["CONV_2D", "QUANTIZE", "CONV_2D", "DEQUANTIZE", "CONV_2D", "CONV_2D", "DEQUANTIZE", "ADD"]
    assert file.codes == expected
    assert file.names[1] == "one/quantize"
    types = dict(zip(file.names, (dtype for _, dtype, *_ in file.operators), strict=True))
    assert [types[f"{name}/conv_2d"] for name in ("one", "two", "three", "side")] == [
        "FLOAT32",
        "INT8",
        "FLOAT32",
        "INT8",
    ]
    assert np.isfinite(run(path)[0]).all()


def test_every_operator_that_nobody_reads_is_an_output(tmp_path: Path) -> None:
    path = tmp_path / "x.tflite"
    network = chain(conv("one"), conv("two", "one"), step("pool", "global_pool", "one", **ONE))
    written(in_int8(network, "one", "pool"), path)
    assert [output.shape for output in run(path)] == [(1, 12, 12, 8), (1, 1, 1, 8)]
    assert {output.dtype for output in run(path)} == {np.dtype(np.float32)}


def test_squeeze_and_excite_with_linear_layers_has_no_reshape(tmp_path: Path) -> None:
    """The exporter multiplies the map by the vector as it is."""
    one: dict[str, Any] = {"in_size": (1, 1), "out_size": (1, 1)}
    network = chain(
        conv("body", activation="relu"),
        step("squeeze", "global_pool", "body", **ONE),
        step("reduce", "linear", "squeeze", activation="relu", out_groups=("few",), **one),
        step("expand", "linear", "reduce", activation="hardsigmoid", in_groups=("few",), **one),
        step("gate", "mul", "body", "expand"),
        widths={"few": 4},
    )
    path = tmp_path / "x.tflite"
    layers = ["CONV_2D", "MEAN", "FULLY_CONNECTED", "FULLY_CONNECTED", "MUL", "MUL"]
    assert written(network, path).codes == layers
    assert run(path)[0].shape == (1, 12, 12, 8)
    assert written(in_int8(network), path).codes == ["QUANTIZE", *layers, "DEQUANTIZE"]
    assert run(path)[0].shape == (1, 12, 12, 8)


def test_int8_concatenation_converts_only_what_others_read_too(tmp_path: Path) -> None:
    network = chain(
        conv("trunk"),
        conv("branch", "trunk"),
        step("join", "concat", "trunk", "branch", out_groups=("a", "a")),
        conv("last", "join", in_groups=("a", "a")),
    )
    file = written(in_int8(network), tmp_path / "x.tflite")
    assert file.codes == ["QUANTIZE", "CONV_2D", "CONV_2D", "QUANTIZE", "CONCATENATION", "CONV_2D", "DEQUANTIZE"]
    assert file.names[3].startswith("join/")
    join = next(operator for operator in file.graph.operators if len(operator.inputs) == 2)
    scales = {float(file.graph.tensors[i].quantization.scale[0]) for i in (*join.inputs, *join.outputs)}
    assert len(scales) == 1


def test_second_slice_of_a_source_is_the_rest(tmp_path: Path) -> None:
    network = chain(
        step("first", "slice", out_groups=("c",)), step("second", "slice", out_groups=("d",)), widths={"c": 3, "d": 5}
    )
    path = tmp_path / "x.tflite"
    written(network, path)
    first, second = run(path, seed=3)
    image = np.random.default_rng(3).normal(size=(1, 12, 12, 8)).astype(np.float32)
    assert np.array_equal(np.concatenate([first, second], -1), image)


def test_zeros_that_belong_to_a_convolution_are_padding_of_its_window(tmp_path: Path) -> None:
    """Padding of one row and column at the end is what SAME means for stride 2; more needs an operator."""
    facts: dict[str, Any] = {"out_size": (6, 6), "stride": (2, 2)}
    assert written(chain(conv("x", in_size=(13, 13), **facts)), tmp_path / "a.tflite").codes == ["CONV_2D"]
    wide = conv("x", in_size=(16, 16), out_size=(14, 14))
    file = written(chain(wide), tmp_path / "b.tflite")
    assert file.codes == ["PAD", "CONV_2D"]
    assert file.operators[0][2] == (1, 16, 16, 8)


def test_values_neither_grow_nor_vanish_over_depth(tmp_path: Path) -> None:
    layers = [conv("layer0", activation="relu")]
    for i in range(1, 60):
        layers.append(conv(f"layer{i}", f"layer{i - 1}", activation="relu"))
    path = tmp_path / "x.tflite"
    written(chain(*layers), path)
    largest = float(np.abs(run(path)[0]).max())
    assert 1e-3 < largest < 1e3
    first = path.read_bytes()
    written(chain(*layers), path)
    assert path.read_bytes() == first


def test_what_cannot_be_built_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.tflite"
    refused = {
        "kind other": chain(step("x", "other")),
        "softplus": chain(step("x", "activation", activation="softplus")),
        "padding": chain(conv("x", out_size=(2, 12), stride=(3, 1))),
        "no operators": chain(),
        "writes": chain(conv("x", "absent")),
        "multiple of": chain(step("x", "shuffle", groups=3)),
        "features": chain(step("x", "linear", in_size=(1, 1), out_size=(1, 1))),
        "fp16": chain(conv("x")).with_precisions({"x": "fp16"}),
        "meet": chain(conv("y", **HALF), step("x", "add", "input", "y")),
    }
    for words, network in refused.items():
        with pytest.raises(UnsupportedError, match=words):
            Tflite().sketch(network, path)
    with pytest.raises(UnsupportedError, match="macOS"):
        registry.runtime("coreml").sketch(chain(conv("x")), path)
    assert list(tmp_path.iterdir()) == []
