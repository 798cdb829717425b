"""Every runtime: what it writes runs, agrees with PyTorch, is as int8 as it says, and leaves nothing behind."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mobilekit import registry
from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.runtimes._shape import padding
from mobilekit.types import Candidate, ExportJob, Network, OperatorShape

SIZE = 32
EXECUTED = ("onnx", "tflite")


class Residual(nn.Module):
    """Convolutions with batch norm, a residual sum with two readers, a padded max pool, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.last = nn.Linear(16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        map_ = self.pool(self.first(image))
        map_ = torch.relu(self.third(self.second(map_)) + map_)
        return self.last(nn.functional.adaptive_avg_pool2d(map_, 1).flatten(1))


class Depthwise(nn.Module):
    """Asymmetric padding, depthwise, a float-only activation, pools, a sum and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(16, 16, 3, 2, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.pointwise = nn.Sequential(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.Hardswish())
        # Behind hard-swish the padding value matters: zero is not the smallest.
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.last = nn.Linear(48, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        map_ = self.pool(self.pointwise(self.depthwise(self.first(image))))
        map_ = nn.functional.avg_pool2d(map_, 2)
        return self.last(torch.cat([map_, torch.sigmoid(map_)], 1).mean((2, 3)))


def smooth(count: int, seed: int) -> np.ndarray:
    """Images without fine noise, (N, 3, SIZE, SIZE) float32."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=SIZE, mode="bilinear").numpy()


def trained(kind: type[nn.Module]) -> nn.Module:
    """A network whose batch norms have seen data, in eval mode."""
    torch.manual_seed(0)
    module = kind()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    with torch.no_grad():
        for seed in range(3):
            module(torch.from_numpy(smooth(32, seed)))
    return module.eval()


def job(module: nn.Module, precision: str, path: Path, example: torch.Tensor | None = None) -> ExportJob:
    network = Network(name="net", input_shape=(1, 3, SIZE, SIZE), operators=(), groups={}, axes={})
    example = torch.from_numpy(smooth(1, 0)) if example is None else example
    candidate = Candidate(module=module, example_input=example, network=network)
    batches = (smooth(24, 11), smooth(7, 12)) if precision == "int8" else ()
    return ExportJob(candidate=candidate, precision=precision, path=str(path), calibration=batches)


def sqnr_db(reference: np.ndarray, found: np.ndarray) -> float:
    error = ((reference - found) ** 2).mean()
    return float(10 * np.log10((reference**2).mean() / max(error, 1e-30)))


MODULES = {"residual": Residual, "depthwise": Depthwise}
CASES = [
    (net, name, precision)
    for net, name in itertools.product(MODULES, ("onnx", "tflite", "coreml"))
    for precision in registry.runtime(name).precisions
    if not (net == "depthwise" and name == "coreml")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtimes")


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exported(request: pytest.FixtureRequest, folder: Path) -> tuple[str, str, str, nn.Module, Path]:
    """An exported file; its module was checked to be as before."""
    net, name, precision = request.param
    runtime = registry.runtime(name)
    if runtime.unavailable():
        pytest.skip(runtime.unavailable())
    module = trained(MODULES[net])
    before = copy.deepcopy(module.state_dict())
    path = folder / f"{net}_{precision}{runtime.suffix}"
    runtime.export(job(module, precision, path))
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not module.training
    return net, name, precision, module, path


def test_file_agrees_and_is_what_it_says(
    exported: tuple[str, str, str, nn.Module, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    net, name, precision, module, path = exported
    runtime = registry.runtime(name)
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []

    facts = runtime.describe(path)
    nhwc = name == "tflite"
    assert facts.inputs[0].shape == ((1, SIZE, SIZE, 3) if nhwc else (1, 3, SIZE, SIZE))
    assert facts.inputs[0].layout == ("NHWC" if nhwc else "NCHW")
    assert facts.outputs[0].shape == (1, 10)
    assert (facts.inputs[0].dtype, facts.outputs[0].dtype) == ("float32", "float32")
    check_counts(net, name, precision, facts.operators)

    assert runtime.execution == ("evaluated" if name == "coreml" else "executed")
    images = smooth(16, 99)
    with torch.no_grad():
        reference = module(torch.from_numpy(images)).numpy()
    found = runtime.open(path)([images])[0]
    assert found.shape == reference.shape
    assert found.dtype == np.float32
    assert sqnr_db(reference, found) > {"fp32": 60, "fp16": 40, "int8": 20}[precision]
    assert capfd.readouterr() == ("", "")


def check_counts(net: str, name: str, precision: str, operators: dict[str, int]) -> None:
    if precision != "int8":
        assert set(operators) == {precision}
        assert operators[precision] >= 6
    elif name == "coreml":
        assert operators["int8"] >= 6  # three convolutions, their activations, the sum and the linear layer
    elif net == "residual" or name == "tflite":
        assert set(operators) == {"int8"}
        assert operators["int8"] >= 7
    else:
        # ONNX Runtime has no int8 hard-swish: its hard sigmoid runs in float, and the count says so.
        assert operators["fp32"] == 1
        assert operators["int8"] >= 9


def test_onnx_counts_are_what_onnxruntime_fuses(folder: Path) -> None:
    import onnx

    path = folder / "residual_int8.onnx"
    runtime = registry.runtime("onnx")
    if not path.exists():
        runtime.export(job(trained(Residual), "int8", path))
    types = [node.op_type for node in onnx.load(optimised(path, folder)).graph.node]
    kernels = [kind for kind in types if kind.startswith("Q") and kind != "QuantizeLinear"]
    kernels += [kind for kind in types if kind.endswith("MaxPool")]  # runs on bytes under its own name
    assert runtime.describe(path).operators == {"int8": len(kernels)}
    assert kernels.count("QLinearConv") == 3
    assert kernels.count("QLinearAdd") == 1


def optimised(path: Path, folder: Path) -> str:
    """The graph that ONNX Runtime really runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return options.optimized_model_filepath


def test_onnx_file_is_reproducible_and_has_no_paths_of_this_machine(folder: Path) -> None:
    runtime = registry.runtime("onnx")
    files = [folder / f"again_{i}.onnx" for i in range(2)]
    for path in files:
        runtime.export(job(trained(Residual), "fp32", path))
    contents = [path.read_bytes() for path in files]
    assert contents[0] == contents[1]
    assert str(Path(__file__).parent).encode() not in contents[0]


def test_onnx_files_do_not_depend_on_earlier_exports(folder: Path) -> None:
    """The exporter's table of operators is kept between exports, and nothing else."""
    written = []
    for count, kind in enumerate((Residual, Depthwise, Residual)):
        path = folder / f"{count}.onnx"
        registry.runtime("onnx").export(job(trained(kind), "fp32", path))
        written.append(path.read_bytes())
    assert written[0] == written[2] != written[1]


def test_map_output_is_nchw_for_the_caller(folder: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU()).eval()
    images = smooth(3, 5)
    with torch.no_grad():
        reference = module(torch.from_numpy(images)).numpy()
    for name in EXECUTED:
        runtime = registry.runtime(name)
        if runtime.unavailable():
            continue
        path = folder / f"map{runtime.suffix}"
        runtime.export(job(module, "fp32", path))
        assert sqnr_db(reference, runtime.open(path)([images])[0]) > 60
        assert runtime.describe(path).outputs[0].layout == ("NHWC" if name == "tflite" else "NCHW")


@pytest.mark.parametrize("name", ["onnx", "tflite"])
def test_int8_without_calibration_is_refused(name: str, folder: Path) -> None:
    wanted = job(trained(Residual), "int8", folder / "none")
    bare = ExportJob(candidate=wanted.candidate, precision="int8", path=wanted.path)
    with pytest.raises(BadInputError, match="calibration"):
        registry.runtime(name).export(bare)
    with pytest.raises(UnsupportedError, match="fp16"):
        registry.runtime(name).export(ExportJob(wanted.candidate, "fp16", wanted.path))
    wrong = ExportJob(wanted.candidate, "int8", wanted.path, (smooth(2, 0)[:, :, :16],))
    with pytest.raises(BadInputError, match="shape"):
        registry.runtime(name).export(wrong)
    assert not Path(wanted.path).exists()


@pytest.mark.parametrize("name", ["onnx", "tflite"])
def test_damaged_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    runtime = registry.runtime(name)
    path = tmp_path / f"net{runtime.suffix}"
    for content in (b"", b"nothing of the kind", b"\x18\x00\x00\x00TFL3" + b"\xff" * 40):
        path.write_bytes(content)
        if name == "tflite" or content:  # an empty file is an empty protobuf message
            with pytest.raises(BadInputError, match=str(path)):
                runtime.describe(path)
        with pytest.raises(BadInputError, match=str(path)):
            runtime.open(path)
    with pytest.raises(BadInputError):
        runtime.open(tmp_path / "absent")


def test_untraceable_network_is_unsupported(folder: Path) -> None:
    class Branching(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image if image.sum() > 0 else -image

    with pytest.raises(UnsupportedError, match="ONNX"):
        registry.runtime("onnx").export(job(Branching().eval(), "fp32", folder / "branch.onnx"))
    assert not (folder / "branch.onnx").exists()


def shape(kind: str, channels: int = 16, **changes: object) -> OperatorShape:
    same = {"in_size": (14, 14), "out_size": (14, 14), "in_channels": channels, "out_channels": channels}
    return OperatorShape(kind=kind, **{**same, **changes})


HALF = {"out_size": (7, 7), "stride": (2, 2)}
SHAPES = {
    "dense": shape("conv", out_channels=24, kernel=(3, 3), activation="relu6", **HALF),
    "even kernel": shape("conv", kernel=(2, 2)),
    "strided pointwise": shape("conv", **HALF),
    "add": shape("add", inputs=2, activation="relu"),
    "hardswish": shape("activation", activation="hardswish"),
    "relu6": shape("activation", activation="relu6"),
}


def test_precisions_and_reasons() -> None:
    onnx, tflite, coreml = (registry.runtime(name) for name in ("onnx", "tflite", "coreml"))
    dense = SHAPES["dense"]
    assert onnx.supports(dense, "int8") is None
    assert "fp16" in onnx.supports(dense, "fp16")
    assert "hardswish" in onnx.supports(SHAPES["hardswish"], "int8")
    assert tflite.supports(SHAPES["hardswish"], "int8") is None
    assert "relu6" in tflite.supports(SHAPES["relu6"], "int8")
    assert "unknown" in tflite.supports(shape("other"), "int8")
    assert coreml.supports(dense, "int8") is None
    assert coreml.supports(SHAPES["add"], "int8") is None
    assert "hardswish" in coreml.supports(SHAPES["hardswish"], "int8")


def test_padding_leads_to_the_output_size() -> None:
    assert padding(SHAPES["dense"]) == ((1, 0), (1, 0))
    assert padding(SHAPES["strided pointwise"]) == ((0, 0), (0, 0))
    assert padding(SHAPES["even kernel"]) == ((1, 0), (1, 0))
