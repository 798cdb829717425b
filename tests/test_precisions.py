"""In which precision every operator of a result runs, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mobilekit.network import trace
from mobilekit.pipeline.precisions import LEFT, NO_FORM, NOT_REACHED, WEIGHTS_ONLY, precision_rows
from mobilekit.transforms.int8 import Int8
from mobilekit.types import Candidate, ExportedModel, FileFacts, Option, Parity, Precision


class Net(nn.Module):
    """A convolution, a sum, an activation that nothing fuses with, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
        self.act = nn.Softmax(1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.act(x + self.body(x))
        return self.last(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture(scope="module")
def start() -> Candidate:
    example = torch.zeros(1, 3, 8, 8)
    module = Net().eval()
    return Candidate(module, example, trace(module, example))


def exported(precision: Precision, counted: dict[str, int], not_int8: dict[str, str] | None = None) -> ExportedModel:
    facts = FileFacts(inputs=(), outputs=(), operators=counted)
    parity = Parity(status="unchecked")
    return ExportedModel(
        path="models/net.onnx", runtime="onnx", precision=precision, sha256="0" * 64, size_bytes=1, facts=facts,
        parity=parity, not_int8=not_int8 or {},
    )  # fmt: skip


def quantised(start: Candidate, **settings: str) -> Candidate:
    lever = Int8()
    return lever.apply(
        start, Option(transform="int8", where="network", settings={"calibration": "min-max", **settings})
    )


def told(candidate: Candidate, model: ExportedModel) -> dict[str, tuple[str, str | None]]:
    return {f"{row.name} {row.kind}": (row.precision, row.reason) for row in precision_rows(candidate, model)}


def test_a_float_file_is_one_precision(start: Candidate) -> None:
    rows = precision_rows(start, exported("fp16", {"fp16": 6}))
    assert [row.name for row in rows] == [o.module or o.name for o in start.network.operators]
    assert {(row.precision, row.reason) for row in rows} == {("fp16", None)}


def test_an_int8_file_says_why_some_are_not(start: Candidate) -> None:
    second = start.network.operators[1].name
    model = exported("int8", {"int8": 3, "fp32": 3}, {second: "left in float: rounding it harms more than it saves"})
    found = told(quantised(start, **{"float": second}), model)
    assert found["stem conv"] == ("int8", None)
    assert found["body.0 conv"] == ("fp32", "left in float: rounding it harms more than it saves")
    assert found["last linear"] == ("int8", None)
    assert ("fp32", NO_FORM) in found.values()


def test_a_runtimes_refusal_is_the_reason(start: Candidate) -> None:
    name = start.network.operators[0].name
    found = told(quantised(start), exported("int8", {"int8": 3, "fp16": 3}, {name: "Core ML has no int8 form of it"}))
    assert found["stem conv"] == ("fp16", "Core ML has no int8 form of it")


def test_dynamic_int8_reaches_some_kinds(start: Candidate) -> None:
    found = told(quantised(start, activations="dynamic"), exported("int8", {"int8": 3, "fp32": 3}))
    assert found["stem conv"] == ("int8", None)
    assert ("fp32", NOT_REACHED) in found.values()


def test_weights_alone_compute_in_float(start: Candidate) -> None:
    found = told(quantised(start, activations="float"), exported("int8", {"fp32": 6}))
    assert found["stem conv"] == ("fp32", WEIGHTS_ONLY)


def test_an_option_for_one_operator_leaves_the_others(start: Candidate) -> None:
    place = start.network.operators[0].name
    candidate = Int8().apply(start, Option(transform="int8", where=place, settings={"calibration": "min-max"}))
    found = told(candidate, exported("int8", {"int8": 1, "fp32": 5}))
    assert found["stem conv"] == ("int8", None)
    assert found["body.0 conv"] == ("fp32", LEFT)
