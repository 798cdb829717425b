"""Which operators an int8 export leaves in float: few, where rounding harms most, and only where that costs little."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import mobilekit as mk
from mobilekit import pipeline
from mobilekit.network import trace
from mobilekit.pipeline.sparing import SHARE_OF_WORK, spared

SIDE = 32


def photographs(count: int) -> torch.Tensor:
    """Smooth pictures far from zero: neighbours are alike."""
    coarse = torch.rand((count, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")


class Edges(nn.Module):
    """A stem whose output is large and even, and a depthwise convolution that sees its differences alone."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.depthwise = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.wide, self.last = nn.Conv2d(4, 64, 3, stride=2, padding=1), nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.head = nn.Linear(64, 10)
        with torch.no_grad():
            self.stem.weight.abs_()
            self.stem.bias.copy_(torch.tensor([2.0, 3.0, 4.0, 5.0]))
            self.depthwise.weight.zero_()
            self.depthwise.weight[:, :, 1, 1], self.depthwise.weight[:, :, 1, 2] = sharpness, -sharpness
            if not sharpness:
                self.depthwise.weight[:, :, 1, 1] = 1.0
            self.head.weight.mul_(40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(nn.functional.relu6(self.stem(x)))
        x = torch.relu(self.last(torch.relu(self.wide(x))))
        return self.head(x.mean((2, 3)))


def test_what_takes_differences_is_spared_with_what_it_reads() -> None:
    module = Edges(200.0).eval()
    network = trace(module, photographs(1))
    found = spared(network, module, photographs(32).split(8))
    assert found == ["conv2d", "conv2d_1"]
    macs = {operator.name: network.shape(operator).macs for operator in network.operators}
    assert sum(macs[name] for name in found) <= SHARE_OF_WORK * network.macs


def test_nothing_is_spared_where_int8_harms_little() -> None:
    module = Edges(0.0).eval()
    assert spared(trace(module, photographs(1)), module, [photographs(32)]) == []


def test_what_does_much_of_the_work_is_not_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobilekit.pipeline.sparing.SHARE_OF_WORK", 1e-4)
    module = Edges(200.0).eval()
    assert spared(trace(module, photographs(1)), module, [photographs(32)]) == []


def test_the_file_holds_them_in_float_unless_all_is_asked_for(tmp_path: object) -> None:
    from pathlib import Path

    from mobilekit import exportable
    from mobilekit.pipeline import exporting

    module, inputs = Edges(60.0).eval(), [photographs(32).numpy()]
    source = exportable.of_module(module, photographs(1), inputs, "net")
    found = {}
    for whole in (False, True):
        order = pipeline.Order(("onnx",), "int8", mk.ExportOptions(), whole=whole)
        (model,), failures = exporting.export(source, order, Path(str(tmp_path), str(whole)), lambda *_: None)
        assert not failures
        found[whole] = model
    assert found[True].facts.weights == {"int8": 5}
    assert found[False].facts.weights == {"fp32": 2, "int8": 3}
    assert found[False].not_int8 == dict.fromkeys(
        ("conv2d", "conv2d_1"), "left in float: rounding it harms more than it saves"
    )
    assert found[True].not_int8 == {}
    assert found[False].parity.sqnr_db > found[True].parity.sqnr_db + 3
    assert np.isfinite(found[False].parity.max_abs_error)
