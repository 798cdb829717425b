"""Written files hold what the network computes and nothing beside it: no batch norms, no stray changes of layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mobilekit as mk
from mobilekit import registry


class Net(nn.Module):
    """What leaves traces in files: batch norms, padded strides and pools, a depthwise layer, a sum, a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.point, self.pool = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)), nn.MaxPool2d(3, 2, 1)
        self.last = nn.Linear(8 * 16, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = self.stem(image)
        found = torch.relu(found + self.point(self.depthwise(found)))
        return self.last(self.pool(found).flatten(1))


def kinds(path: Path) -> Counter[str]:
    """Types of the nodes of a file."""
    if path.suffix == ".onnx":
        import onnx

        return Counter(node.op_type for node in onnx.load(str(path)).graph.node)
    if path.suffix == ".mlpackage":
        import coremltools

        main = coremltools.utils.load_spec(str(path)).mlProgram.functions["main"]
        return Counter(operation.type for operation in main.block_specializations[main.opset].operations)
    from ai_edge_litert.interpreter import Interpreter

    listed = Interpreter(str(path), num_threads=1)._get_ops_details()
    return Counter(entry["op_name"] for entry in listed if entry["op_name"] != "DELEGATE")


# Most of a kind that a file may hold; of the kinds that are not listed below, none.
ALLOWED = {
    ("onnx", "fp32"): {},
    ("onnx", "int8"): {},
    # A stride of two with one row of padding on both sides is no padding that TFLite knows; the flattened map is NCHW.
    ("tflite", "fp32"): {"PAD": 2, "TRANSPOSE": 1},
    ("tflite", "int8"): {"PAD": 2, "TRANSPOSE": 1, "QUANTIZE": 1, "DEQUANTIZE": 1},
    ("coreml", "fp32"): {},
    # float32 at both ends of a program in half precision.
    ("coreml", "fp16"): {"cast": 2},
    ("coreml", "int8"): {"cast": 2},
}
WATCHED = {
    *("BatchNormalization", "Transpose", "Pad", "Cast", "Identity", "Squeeze", "Unsqueeze", "Constant"),
    *("batch_norm", "transpose", "pad", "cast", "identity", "squeeze", "expand_dims"),
    *("TRANSPOSE", "PAD", "PADV2", "CAST", "SQUEEZE", "EXPAND_DIMS", "MUL", "QUANTIZE", "DEQUANTIZE"),
}


@pytest.mark.parametrize(("to", "precision"), ALLOWED, ids="-".join)
def test_no_stray_nodes(to: str, precision: str, tmp_path: Path) -> None:
    if registry.runtime(to).unavailable():
        pytest.skip(f"nothing writes {to} here")
    torch.manual_seed(0)
    module, real = Net(), np.random.default_rng(0).standard_normal((24, 3, 16, 16), dtype=np.float32)
    module(torch.from_numpy(real))
    example = torch.zeros(1, 3, 16, 16)
    (model,) = mk.export(module.eval(), example, to=[to], precision=precision, calibration=[real], out=tmp_path)
    found = kinds(Path(model.path))
    stray = {kind: count for kind, count in found.items() if kind in WATCHED}
    assert all(count <= ALLOWED[to, precision].get(kind, 0) for kind, count in stray.items()), stray
    assert sum("conv" in kind.lower() for kind in found.elements()) == 3
