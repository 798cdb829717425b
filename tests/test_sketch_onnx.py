"""Sketches for ONNX: what ONNX Runtime makes of them is what it makes of the real export of the same network."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import networks as small
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from mobilekit import registry
from mobilekit.errors import UnsupportedError
from mobilekit.network import trace
from mobilekit.types import Candidate, ChannelGroup, ExportJob, Network, Operator, OperatorShape, Precision

ONNX = registry.runtime("onnx")
BLOCKS = [("residual", 0), ("inverted", 0), ("squeeze", 0), ("dense", 5), ("depthwise", 0), ("fire", 7)]
QUICK = ("all blocks", "shufflenet_v2")
OTHERS = ("resnet", "mobilenet_v2", "squeeze_conv", "densenet", "vgg", "squeezenet", "inception", "resnext", "same_pad",
          "pre_activation", "shared", "hard_coded")  # fmt: skip
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
FACTS = frozenset({"kernel_shape", "strides", "group", "activation", "perm", "channels_last"})
FLOAT_KERNELS = frozenset({"Conv", "FusedConv", "Gemm", "Add", "Mul", "Concat", "Relu", "Sigmoid", "LeakyRelu"})


def build(name: str) -> torch.nn.Module:
    return small.blocks(BLOCKS) if name == "all blocks" else small.build(name)


def optimised(path: Path) -> onnx.GraphProto:
    """The graph that ONNX Runtime runs instead of the file's."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


def kernels(path: Path) -> Counter[tuple[Any, ...]]:
    """Kinds of the optimised nodes with their settings and the size of the largest constant that each reads."""
    graph = optimised(path)
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found: Counter[tuple[Any, ...]] = Counter()
    for node in graph.node:
        settings = {a.name: str(helper.get_attribute_value(a)) for a in node.attribute if a.name in FACTS}
        constants = [sizes[name] for name in node.input if name in sizes]
        largest = max(constants, key=np.prod, default=())
        found[node.domain, node.op_type, tuple(sorted(settings.items())), largest] += 1
    return found


def op_types(path: Path, fused: bool = True) -> Counter[str]:
    graph = optimised(path) if fused else onnx.load(str(path)).graph
    return Counter(node.op_type for node in graph.node)


def planned(network: Network, precision: Precision) -> Network:
    """The network with every operator in this precision that has a kernel in it."""
    able = [o.name for o in network.operators if ONNX.supports(network.shape(o), precision) is None]
    return network.with_precisions(dict.fromkeys(able, precision))


def run(path: Path, data: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: data})


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# ---------------------------------------------------------------- against real exports


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_sketch_becomes_what_the_real_export_becomes(name: str, tmp_path: Path) -> None:
    module = build(name)
    network = trace(module, small.example(), name)
    batches = (torch.randn(4, 3, small.SIDE, small.SIDE, generator=torch.Generator().manual_seed(1)).numpy(),)
    candidate = Candidate(module=module, example_input=small.example(), network=network)
    for precision in PRECISIONS:
        real, sketch = tmp_path / f"real_{precision}.onnx", tmp_path / f"sketch_{precision}.onnx"
        calibration = batches if precision == "int8" else ()
        ONNX.export(ExportJob(candidate=candidate, precision=precision, path=str(real), calibration=calibration))
        ONNX.sketch(planned(network, precision), sketch)
        wanted, found = kernels(real), kernels(sketch)
        assert found == wanted, f"only real: {wanted - found}; only sketch: {found - wanted}"
        of_real, of_sketch = ONNX.describe(real), ONNX.describe(sketch)
        assert of_sketch.operators == of_real.operators
        assert [spec.shape for spec in of_sketch.outputs] == [spec.shape for spec in of_real.outputs]
        assert {spec.dtype for spec in (*of_sketch.inputs, *of_sketch.outputs)} == {"float32"}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", QUICK)
def test_nodes_bear_the_operators_names_and_outputs_are_tame(name: str, precision: Precision, tmp_path: Path) -> None:
    network = planned(trace(build(name), small.example(), name), precision)
    path = tmp_path / "sketch.onnx"
    ONNX.sketch(network, path)
    content = path.read_bytes()
    ONNX.sketch(network, path)
    assert path.read_bytes() == content
    operators = {operator.name for operator in network.operators}
    names = [node.name for node in onnx.load(str(path)).graph.node]
    assert len(set(names)) == len(names)
    assert {name.partition("/")[0] for name in names} <= operators | {"input"}
    pieces = {o.name for o in network.operators if o.kind == "slice"}
    assert operators - set(names) <= pieces  # a split is named after its first piece
    for data in (small.example().numpy(), np.zeros((1, 3, small.SIDE, small.SIDE), np.float32)):
        result = run(path, data)[0]
        assert np.isfinite(result).all()
        assert 1e-6 < np.abs(result).max() < 100


def test_writing_needs_no_torch(tmp_path: Path) -> None:
    network = planned(trace(build("mobilenet_v2"), small.example()), "int8")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mobilekit import registry\n"
        "from mobilekit.types import Network\n"
        "registry.runtime('onnx').sketch(Network.model_validate_json(sys.stdin.read()), Path(sys.argv[1]))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    path = tmp_path / "sketch.onnx"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        input=network.model_dump_json(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ONNX.sketch(network, tmp_path / "here.onnx")
    assert path.read_bytes() == (tmp_path / "here.onnx").read_bytes()


# ---------------------------------------------------------------- networks by hand


def operator(name: str, inputs: str, shape: OperatorShape) -> Operator:
    """An operator of this shape; `inputs` are names with blanks between. Widths are the names of the groups."""
    facts = {key: getattr(shape, key) for key in ("kind", "in_size", "out_size", "kernel", "stride", "groups")}
    return Operator(
        name=name, module=name, inputs=tuple(inputs.split()), activation=shape.activation,
        in_groups=(str(shape.in_channels),), out_groups=(str(shape.out_channels),), **facts,
    )  # fmt: skip


def network_of(*operators: Operator, **precisions: Precision) -> Network:
    first = operators[0]
    widths = {group for o in operators for group in (*o.in_groups, *o.out_groups)}
    return Network(
        name="by hand",
        input_shape=(1, int(first.in_groups[0]), *first.in_size),
        operators=operators,
        groups={name: ChannelGroup(width=int(name)) for name in widths},
        axes={},
        precisions=precisions,
    )


def shape(kind: str, channels: int = 16, **changes: object) -> OperatorShape:
    same = {"in_size": (14, 14), "out_size": (14, 14), "in_channels": channels, "out_channels": channels}
    return OperatorShape.model_validate({"kind": kind, **same, **changes})


HALF = {"out_size": (7, 7), "stride": (2, 2)}
ONE = {"in_size": (1, 1), "out_size": (1, 1)}
SHAPES = {
    "dense": shape("conv", out_channels=24, kernel=(3, 3), activation="relu6", **HALF),
    "odd": shape("conv", in_size=(17, 15), out_size=(9, 8), kernel=(3, 3), stride=(2, 2)),
    "even kernel": shape("conv", kernel=(2, 2)),
    "pointwise": shape("conv", out_channels=40, activation="hardswish"),
    "strided pointwise": shape("conv", **HALF),
    "depthwise": shape("conv", groups=16, kernel=(5, 5), activation="silu"),
    "grouped": shape("conv", groups=4, kernel=(3, 3), activation="leaky_relu"),
    "transposed": shape("conv_transpose", kernel=(3, 3), stride=(2, 2), out_size=(28, 28), activation="relu"),
    "linear": shape("linear", 64, out_channels=10, **ONE),
    "max_pool": shape("max_pool", kernel=(3, 3), **HALF),
    "avg_pool": shape("avg_pool", kernel=(2, 2), **HALF),
    "global_pool": shape("global_pool", out_size=(1, 1)),
    "add": shape("add", activation="relu"),
    "mul": shape("mul"),
    "concat": shape("concat", out_channels=32),
    "softmax": shape("softmax"),
    "batch_norm": shape("batch_norm", activation="relu"),
    "pad": shape("pad", out_size=(15, 17)),
    "resize": shape("resize", out_size=(28, 28)),
    "resize by parts": shape("resize", out_size=(20, 21)),
    "reshape": shape("reshape", out_channels=16 * 14 * 14, out_size=(1, 1)),
    "shuffle": shape("shuffle", groups=4),
    "slice": shape("slice", out_channels=5),
    "transpose": shape("transpose", in_size=(14, 7), out_size=(7, 14)),
    "constant": shape("activation"),
    **{
        name: shape("activation", activation=name)
        for name in ("relu", "relu6", "hardswish", "sigmoid", "silu", "leaky_relu", "hardsigmoid", "tanh", "gelu")
    },
    **{f"conv {name}": shape("conv", activation=name) for name in ("elu", "prelu", "sigmoid", "tanh", "gelu")},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", SHAPES)
def test_an_operator_alone_is_a_network(kind: str, precision: Precision, tmp_path: Path) -> None:
    wanted, path = SHAPES[kind], tmp_path / "one.onnx"
    sources = "input input" if wanted.kind in ("add", "mul", "concat") else "input"
    network = network_of(operator("alone", sources, wanted), alone=precision)
    if ONNX.supports(wanted, precision):
        with pytest.raises(UnsupportedError, match="no int8 kernel"):
            ONNX.sketch(network, path)
        return
    ONNX.sketch(network, path)
    (result,) = run(path, noise(network.input_shape))
    flat = wanted.kind in ("linear", "reshape")
    assert result.shape == ((1, wanted.out_channels) if flat else (1, wanted.out_channels, *wanted.out_size))
    assert np.isfinite(result).all()
    assert result.dtype == np.float32
    types = op_types(path)
    # a hard swish is a function to ONNX Runtime: it is replaced by nodes without names, in exports too
    assert kind == "hardswish" or any("alone" in node.name for node in optimised(path).node)
    if precision == "int8":
        assert not FLOAT_KERNELS & set(types)
        # a slice that is no split has no int8 form: between int8 operators it runs in float
        assert types["QuantizeLinear"] or kind == "slice"


def test_quantise_and_dequantise_nodes_alone(tmp_path: Path) -> None:
    path = tmp_path / "border.onnx"
    ONNX.sketch(network_of(operator("down", "input", shape("quantize"))), path)
    (low,) = run(path, noise((1, 16, 14, 14)))
    assert low.dtype == np.uint8
    assert op_types(path) == {"QuantizeLinear": 1}
    ONNX.sketch(network_of(operator("up", "input", shape("dequantize"))), path)
    (back,) = run(path, low)
    np.testing.assert_allclose(back, noise((1, 16, 14, 14)), atol=0.026)


def test_sketches_for_arm_are_the_same_networks_with_signed_activations(tmp_path: Path) -> None:
    layer = shape("conv", kernel=(3, 3), activation="hardswish")
    chain = [operator("a", "input", layer), operator("b", "a", layer), operator("sum", "a b", shape("add"))]
    network, given, found = network_of(*chain, a="int8", b="int8", sum="int8"), noise((1, 16, 14, 14)), {}
    for target, kind in (("x86", TensorProto.UINT8), ("arm", TensorProto.INT8)):
        path = tmp_path / f"{target}.onnx"
        ONNX.sketch(network, path, target)
        graph = onnx.load(str(path)).graph
        zeros = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"}
        assert zeros
        assert {tensor.data_type for tensor in graph.initializer if tensor.name in zeros} == {kind}
        (found[target],) = run(path, given)
    np.testing.assert_allclose(found["arm"], found["x86"], atol=0.1 * float(np.abs(found["x86"]).max()))
    assert np.corrcoef(found["arm"].ravel(), found["x86"].ravel())[0, 1] > 0.99


def test_movements_are_those_of_pytorch(tmp_path: Path) -> None:
    path, given = tmp_path / "moved.onnx", noise((1, 12, 6, 4))
    data = torch.from_numpy(given)
    fixed = {"in_size": (6, 4), "out_size": (6, 4)}
    moved: dict[str, tuple[OperatorShape, torch.Tensor]] = {
        "shuffle": (shape("shuffle", 12, groups=3, **fixed), torch.nn.functional.channel_shuffle(data, 3)),
        "resize": (
            shape("resize", 12, in_size=(6, 4), out_size=(12, 12)),
            torch.nn.functional.interpolate(data, size=(12, 12)),
        ),
        "transpose": (shape("transpose", 12, in_size=(6, 4), out_size=(4, 6)), data.transpose(2, 3)),
        "pool": (
            shape("max_pool", 12, in_size=(6, 4), out_size=(3, 2), kernel=(3, 3), stride=(2, 2)),
            torch.nn.functional.max_pool2d(data, 3, 2, 1),
        ),
    }
    for wanted, result in moved.values():
        ONNX.sketch(network_of(operator("moved", "input", wanted)), path)
        np.testing.assert_array_equal(run(path, given)[0], result.numpy())


def test_slices_split_their_source_or_come_from_both_ends(tmp_path: Path) -> None:
    path, given = tmp_path / "slices.onnx", noise((1, 12, 6, 4))
    fixed = {"in_size": (6, 4), "out_size": (6, 4)}

    def pieces(*widths: int) -> list[np.ndarray]:
        shapes = [shape("slice", 12, out_channels=width, **fixed) for width in widths]
        ONNX.sketch(network_of(*(operator(f"piece_{i}", "input", s) for i, s in enumerate(shapes))), path)
        return run(path, given)

    for widths in ((6, 6), (5, 7), (4, 4, 4)):
        np.testing.assert_array_equal(np.concatenate(pieces(*widths), axis=1), given)
        assert op_types(path) == {"Split": 1}
    first, second = pieces(5, 3)
    np.testing.assert_array_equal(first, given[:, :5])
    np.testing.assert_array_equal(second, given[:, -3:])
    assert op_types(path) == {"Slice": 2}


def test_quantise_nodes_stand_exactly_at_the_borders(tmp_path: Path) -> None:
    path, layer = tmp_path / "mixed.onnx", shape("conv", kernel=(3, 3), activation="relu")
    chain = [operator("a", "input", layer), operator("b", "a", layer), operator("c", "b", layer)]
    ONNX.sketch(network_of(*chain, b="int8"), path)
    names = [n.name for n in onnx.load(str(path)).graph.node if "uantize" in n.op_type and "weight" not in n.name]
    assert [name for name in names if "bias" not in name] == [
        "a/relu/quantize", "a/relu/dequantize", "b/relu/quantize", "b/relu/dequantize",
    ]  # fmt: skip
    types = op_types(path)
    assert (types["QLinearConv"], types["QuantizeLinear"], types["DequantizeLinear"]) == (1, 1, 1)
    assert types["Conv"] + types["FusedConv"] == 2

    ONNX.sketch(network_of(*chain, operator("sum", "a c", shape("add")), a="int8", b="int8", c="int8"), path)
    types = op_types(path)
    assert types["QLinearConv"] == 3
    assert types["Add"] == 1
    ONNX.sketch(network_of(*chain), path)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(op_types(path, fused=False))


def test_values_stay_tame_over_depth(tmp_path: Path) -> None:
    path, layer = tmp_path / "deep.onnx", shape("conv", kernel=(3, 3), activation="relu")
    plain = [operator(f"conv_{i}", f"conv_{i - 1}" if i else "input", layer) for i in range(60)]
    residual = []
    for i in range(30):
        before = f"add_{i - 1}" if i else "input"
        residual += [operator(f"conv_{i}", before, layer), operator(f"add_{i}", f"conv_{i} {before}", shape("add"))]
    for operators in (plain, residual):
        ONNX.sketch(network_of(*operators), path)
        (result,) = run(path, noise((1, 16, 14, 14)))
        assert np.isfinite(result).all()
        assert 1e-10 < np.abs(result).max() < 1e10


def test_vectors_meet_maps(tmp_path: Path) -> None:
    path = tmp_path / "gate.onnx"
    gate = [
        operator("pool", "input", shape("global_pool", out_size=(1, 1))),
        operator("linear", "pool", shape("linear", activation="sigmoid", **ONE)),
        operator("mul", "input linear", shape("mul")),
        operator("last", "mul", shape("linear", 16 * 14 * 14, out_channels=7, **ONE)),
    ]
    for precision in PRECISIONS:
        ONNX.sketch(network_of(*gate, **dict.fromkeys(("pool", "linear", "mul", "last"), precision)), path)
        (result,) = run(path, noise((1, 16, 14, 14)))
        assert result.shape == (1, 7)
    assert not FLOAT_KERNELS & set(op_types(path))


REFUSED = {
    "other": (operator("x", "input", shape("other")), "x .other."),
    "activation": (operator("x", "input", shape("conv", activation="softplus")), "softplus"),
    "window": (operator("x", "input", shape("conv", out_size=(3, 9))), "does not lead from 14 to 3"),
    "groups": (operator("x", "input", shape("shuffle", groups=5)), "16 channels are no 5 groups"),
    "unread": (operator("x", "nobody", shape("conv")), "nobody"),
    "reshape": (operator("x", "input", shape("reshape", out_size=(3, 3))), "number of entries"),
    "transpose": (operator("x", "input", shape("transpose", out_size=(3, 3))), "order of the axes"),
    "too wide": (operator("x", "input", shape("slice", out_channels=17)), "17 channels of 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    wrong, words = REFUSED[case]
    with pytest.raises(UnsupportedError, match=words):
        ONNX.sketch(network_of(wrong), tmp_path / "never.onnx")
    assert not list(tmp_path.iterdir())


def test_precisions_and_networks_that_cannot_be_written(tmp_path: Path) -> None:
    layer = operator("x", "input", shape("conv"))
    with pytest.raises(UnsupportedError, match="fp16"):
        ONNX.sketch(network_of(layer, x="fp16"), tmp_path / "never.onnx")
    with pytest.raises(UnsupportedError, match="quantize"):
        ONNX.sketch(network_of(layer, operator("y", "x", shape("quantize"))), tmp_path / "never.onnx")
    with pytest.raises(UnsupportedError, match="no operators"):
        ONNX.sketch(network_of(layer).model_copy(update={"operators": ()}), tmp_path / "never.onnx")
    joined = operator("y", "x input", shape("concat", 32, out_channels=32))
    strided = operator("x", "input", shape("conv", **HALF))
    with pytest.raises(UnsupportedError, match="joins"):
        ONNX.sketch(network_of(strided, joined), tmp_path / "never.onnx")
    with pytest.raises(UnsupportedError, match="does not meet"):
        ONNX.sketch(network_of(strided, operator("y", "x input", shape("add"))), tmp_path / "never.onnx")
    assert not list(tmp_path.iterdir())
