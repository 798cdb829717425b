"""Core ML packages are evaluated from the file: whole networks against PyTorch, odd files, and what is said of them."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Inverted, Residual, SqueezeConv, conv_bn, example, headed, settled
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("coremltools")
from mil_programs import coremltools, mb, saved

from mobilekit import evaluate, registry
from mobilekit.errors import BadInputError, UnsupportedError
from mobilekit.runtimes._mil_evaluator import Evaluator
from mobilekit.runtimes._mil_operators import OPERATORS
from mobilekit.runtimes._mil_program import read
from mobilekit.types import Candidate, ExportJob, Network

COREML = registry.runtime("coreml")
X = example().numpy()


class Decoder(nn.Module):
    """U-Net's shape: down, up by a transposed convolution and by interpolation, the encoder's map beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = conv_bn(3, 8), conv_bn(8, 12, stride=2)
        self.up = nn.ConvTranspose2d(12, 6, 3, 2, 1, output_padding=1)
        self.join, self.last = conv_bn(6 + 8 + 12 + 12, 10), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        deep = self.deep(high)
        smooth = F.interpolate(deep, scale_factor=2.0, mode="bilinear", align_corners=False)
        near = F.interpolate(deep, scale_factor=2.0, mode="nearest")
        return self.last(self.join(torch.cat([self.up(deep), high, smooth, near], 1)))


class Attention(nn.Module):
    """A vision transformer's block on patches of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norm, self.both = nn.LayerNorm(16), nn.Linear(16, 48)
        self.out, self.classifier = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        query, key, value = (
            part.reshape(-1, 16, 4, 4).transpose(1, 2) for part in self.both(self.norm(tokens)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(-1, 16, 16)
        return self.classifier(F.gelu(self.out(mixed) + tokens).mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: headed(conv_bn(3, 8), nn.MaxPool2d(3, 2, 1), Residual(8, 8), Residual(8, 12, 2), width=12),
    "mobilenet_v3": lambda: headed(
        conv_bn(3, 6, stride=2), Inverted(6, 8), SqueezeConv(8), Inverted(8, 8), nn.Hardswish(), width=8
    ),
    "unet": Decoder,
    "attention": Attention,
}
LEAST_SQNR_DB = {"fp16": 35.0, "int8": 20.0}


def network(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return settled(NETWORKS[name]())


def export(module: nn.Module, precision: str, path: Path) -> Path:
    traced = Network(name="net", input_shape=(1, 3, 16, 16), operators=(), groups={}, axes={})
    candidate = Candidate(module=module, example_input=example(), network=traced)
    COREML.export(ExportJob(candidate=candidate, precision=precision, path=str(path), calibration=(images(8),)))
    return path


def images(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, 16, 16)).astype(np.float32)


# ---------------------------------------------------------------- whole networks


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(network("resnet"), "fp32", tmp_path_factory.mktemp("resnet") / "net.mlpackage")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_pytorch(name: str, precision: str, tmp_path: Path) -> None:
    module = network(name)
    path = export(module, precision, tmp_path / "net.mlpackage")
    batch = images(3)
    parity = evaluate.file_parity(COREML, path, module, [(batch,)])
    assert (parity.status, parity.samples) == ("evaluated", 3)
    assert parity.sqnr_db is not None
    assert parity.max_abs_error is not None
    if precision == "fp32":
        assert parity.max_abs_error < 1e-3 * np.abs(evaluate.outputs(module, torch.from_numpy(batch))).max()
        assert parity.sqnr_db > 100
    else:
        # Half precision leaves a trace: without one, nothing was rounded.
        assert LEAST_SQNR_DB["fp16"] < parity.sqnr_db < 90


def test_int8_weights_are_told_from_float_ones(tmp_path: Path) -> None:
    module = network("resnet")
    parity = evaluate.file_parity(COREML, export(module, "int8", tmp_path / "n.mlpackage"), module, [(images(3),)])
    assert parity.status == "evaluated"
    assert parity.sqnr_db is not None
    assert LEAST_SQNR_DB["int8"] < parity.sqnr_db < 60


def test_every_tensor_can_be_had(resnet: Path) -> None:
    evaluator = Evaluator(read(resnet))
    found, result = evaluator.tensors({"input": X}), evaluator.evaluate({"input": X})
    written = {output.name for each in evaluator.operations for output in each.outputs}
    assert set(found) == written | {"input"}
    assert np.array_equal(found["output"], result["output"])
    rectified = [found[each.name] for each in evaluator.operations if each.kind == "relu"]
    assert len(rectified) == 5
    assert all((each >= 0).all() for each in rectified)
    module = network("resnet")
    with torch.no_grad():
        first = module[0](torch.from_numpy(X)).numpy()  # type: ignore[index]
    np.testing.assert_allclose(rectified[0], first, rtol=1e-3, atol=1e-5)


def test_weights_are_read_from_the_file(resnet: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.mlpackage"
    shutil.copytree(resnet, other)
    before = COREML.open(other)([X])[0]
    weights = next(other.rglob("weight.bin"))
    content = bytearray(weights.read_bytes())
    # The last tensor of the file: bytes of an exponent.
    for place in range(len(content) - 5, len(content) - 64, -4):
        content[place] ^= 0x01
    weights.write_bytes(content)
    assert not np.array_equal(COREML.open(other)([X])[0], before)
    assert np.array_equal(COREML.open(resnet)([X])[0], before)


def test_a_session_takes_batches_and_gives_float32(resnet: Path) -> None:
    session, batch = COREML.open(resnet), images(3)
    found = session([batch.astype(np.float64)])[0]
    assert (found.shape, found.dtype) == ((3, 5), np.float32)
    assert np.array_equal(found[1:2], session([batch[1:2]])[0])


def test_half_precision_and_integer_inputs_are_hidden(tmp_path: Path) -> None:
    for dtype in (np.float16, np.int32):
        given = np.zeros((1, 4), dtype)
        path = saved(lambda x: mb.add(x=x, y=x), [given], tmp_path / f"{dtype.__name__}.mlpackage")
        found = COREML.open(path)([np.array([[1.0001, 2, 3, 4]], np.float32)])[0]
        assert found.dtype == np.float32
        assert np.array_equal(found, [[2, 4, 6, 8]])


def test_on_macos_core_ml_itself_runs_the_file(resnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Model:
        def __init__(self, path: str) -> None:
            asked.append(path)

        def predict(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"output": given["input"].mean((1, 2, 3))[:, None].astype(np.float16)}

    assert COREML.execution == "evaluated"
    monkeypatch.setattr(coremltools.models, "MLModel", Model)
    program = read(resnet)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("mobilekit.runtimes._mil_program.read", lambda path: program)
    assert COREML.execution == "executed"
    found = COREML.open(resnet)([images(2)])[0]
    monkeypatch.undo()
    assert asked == [str(resnet)]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, images(2).mean((1, 2, 3))[:, None], atol=1e-3)


# ---------------------------------------------------------------- what it cannot do, and odd files


def test_all_missing_operators_are_named_when_the_file_is_opened(tmp_path: Path) -> None:
    def build(x: Any) -> Any:
        spread = mb.space_to_batch(x=x, block_shape=[2, 2], paddings=[[0, 0], [0, 0]])
        return mb.reverse_sequence(x=mb.relu(x=spread), lengths=[1] * 4, seq_axis=1, batch_axis=0)

    path = saved(build, [X], tmp_path / "new.mlpackage")
    with pytest.raises(UnsupportedError, match="lacks reverse_sequence, space_to_batch"):
        COREML.open(path)
    parity = evaluate.file_parity(COREML, path, nn.Identity(), [(X,)])
    assert (parity.status, parity.sqnr_db) == ("structure-only", None)
    assert "reverse_sequence, space_to_batch" in parity.note


def test_a_parameter_that_is_not_known_is_not_ignored(resnet: Path) -> None:
    program = read(resnet)
    first = program.operations[0]
    odd = dataclasses.replace(first, arguments={**first.arguments, "fused_activation": first.arguments["x"]})
    with pytest.raises(UnsupportedError, match=f"{first.kind} .parameter fused_activation."):
        Evaluator(dataclasses.replace(program, operations=(odd, *program.operations[1:])))


def test_a_wrong_shape_is_told_and_not_passed_on(resnet: Path) -> None:
    program = read(resnet)
    *others, last = program.operations
    wrong = dataclasses.replace(last.outputs[0], shape=(1, 6))
    program = dataclasses.replace(program, operations=(*others, dataclasses.replace(last, outputs=(wrong,))))
    with pytest.raises(Exception, match=r"computed as \[1, 5\] where the program declares \[1, 6\]"):
        Evaluator(program).evaluate({"input": X})


def test_inputs_of_other_names_or_shapes_are_refused(resnet: Path) -> None:
    evaluator = Evaluator(read(resnet))
    with pytest.raises(BadInputError, match=r"\['input'\], not \['image'\]"):
        evaluator.evaluate({"image": X})
    with pytest.raises(BadInputError, match=r"shape \[1, 3, 16, 16\], not \[1, 3, 16, 15\]"):
        evaluator.evaluate({"input": X[..., :15]})


def rewritten(package: Path, change: Callable[[Any], None]) -> None:
    """Change the description of a saved package."""
    path = next(package.rglob("model.mlmodel"))
    description = coremltools.utils.load_spec(str(path))
    main = description.mlProgram.functions["main"]
    change(main.block_specializations[main.opset])
    path.write_bytes(description.SerializeToString())


def first_of(block: Any, kind: str) -> Any:
    return next(each for each in block.operations if each.type == kind)


def stored(block: Any) -> Any:
    """The first constant that lies in the weight file."""
    values = (each.attributes["val"] for each in block.operations if each.type == "const")
    return next(each.blobFileValue for each in values if each.WhichOneof("value") == "blobFileValue")


def elsewhere(block: Any) -> None:
    stored(block).fileName = "@model_path/../../../../secret.bin"


def beyond(block: Any) -> None:
    stored(block).offset = 1 << 40


def unwritten(block: Any) -> None:
    first_of(block, "relu").inputs["x"].arguments[0].name = "nothing"


def twice(block: Any) -> None:
    first_of(block, "relu").outputs[0].name = first_of(block, "conv").outputs[0].name


def larger(block: Any) -> None:
    weight = first_of(block, "conv").inputs["weight"].arguments[0].name
    constant = next(each for each in block.operations if each.outputs[0].name == weight)
    constant.outputs[0].type.tensorType.dimensions[0].constant.size = 1 << 50


def weightless(block: Any) -> None:
    del first_of(block, "conv").inputs["weight"]


def no_weights(package: Path) -> None:
    next(package.rglob("weight.bin")).unlink()


def half_weights(package: Path) -> None:
    path = next(package.rglob("weight.bin"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def half_description(package: Path) -> None:
    path = next(package.rglob("model.mlmodel"))
    path.write_bytes(path.read_bytes()[:-700])


def no_manifest(package: Path) -> None:
    (package / "Manifest.json").unlink()


def nothing(package: Path) -> None:
    next(package.rglob("model.mlmodel")).write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{
        change.__name__: (lambda package, change=change: rewritten(package, change))
        for change in (elsewhere, beyond, unwritten, twice, larger, weightless)
    },
    **{damage.__name__: damage for damage in (no_weights, half_weights, half_description, no_manifest, nothing)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_packages_are_bad_input_in_a_sentence(damage: str, resnet: Path, tmp_path: Path) -> None:
    package = tmp_path / "net.mlpackage"
    shutil.copytree(resnet, package)
    (tmp_path / "secret.bin").write_bytes(next(package.rglob("weight.bin")).read_bytes())
    DAMAGES[damage](package)
    with pytest.raises(BadInputError) as raised:
        COREML.open(package)([X])[0]
    assert "\n" not in str(raised.value)
    assert "again" in str(raised.value)


def test_a_package_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist; export it first"):
        COREML.open(tmp_path / "none.mlpackage")


# ---------------------------------------------------------------- what is said of files


def test_quantised_activations_are_evaluated_and_counted(tmp_path: Path) -> None:
    """An int8 network as coremltools writes it: quantise and dequantise between operators, weights in constexpr."""
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
    scales = random.uniform(0.001, 0.01, (4, 1, 1, 1)).astype(np.float32)

    def rounded(x: Any, scale: float) -> Any:
        scale = np.float32(scale)
        return mb.dequantize(input=mb.quantize(input=x, scale=scale, output_dtype="int8"), scale=scale)

    def build(x: Any) -> Any:
        inside = rounded(x, 0.03)
        convolved = mb.conv(
            x=inside, weight=mb.constexpr_blockwise_shift_scale(data=weight, scale=scales), pad_type="same"
        )
        first = rounded(mb.relu(x=convolved), 0.05)
        second = rounded(mb.conv(x=first, weight=random.random((4, 4, 1, 1), np.float32)), 0.05)
        return mb.softmax(x=rounded(mb.add(x=first, y=second), 0.1), axis=1)

    path = saved(build, [X], tmp_path / "int8.mlpackage")
    facts = COREML.describe(path)
    # The convolution by int8 weights, its ReLU, the sum and the softmax, which reads int8; not that by float weights.
    assert facts.operators == {"fp32": 1, "int8": 4}
    assert facts.weights == {"fp32": 1, "int8": 1}

    tensors = Evaluator(read(path)).tensors({"x0": X})
    integers = torch.from_numpy(np.clip(np.round(X / np.float32(0.03)), -128, 127))
    exact = F.conv2d(integers.double(), torch.from_numpy(weight).double(), padding=1).numpy()
    convolved = next(value for name, value in tensors.items() if name.startswith("conv"))
    np.testing.assert_allclose(convolved, exact * 0.03 * scales.reshape(1, -1, 1, 1), rtol=1e-4, atol=1e-5)


def test_every_operator_says_what_it_computes() -> None:
    assert len(OPERATORS) > 120
    assert all(each.parameters for each in OPERATORS.values())
