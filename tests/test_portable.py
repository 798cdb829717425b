"""Forms that exporters refuse or get wrong: rewritten they compute the same, and files can be made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mobilekit as mk
from mobilekit import registry
from mobilekit.runtimes import _portable
from mobilekit.runtimes._job import Source
from mobilekit.runtimes._portable import RULES

SIDE = 12
QUICK = settings(deadline=None, max_examples=25)


class Around(nn.Module):
    """A function of a map between two convolutions."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(torch.relu(self.first(x)), *self.layers))


def around(function: Callable[..., Tensor], *layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Around(function, *layers).eval()


def example(side: int = SIDE) -> Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))


def portable(module: nn.Module, x: Tensor, runtime: str) -> nn.Module:
    return _portable.portable(Source(module, module, (x,), ("input",), {}, open_batch=False), runtime)


def check_same(module: nn.Module, runtime: str, x: Tensor, rewritten: bool = True) -> None:
    found = portable(module, x, runtime)
    assert (found is not module) == rewritten
    with torch.inference_mode():
        torch.testing.assert_close(found(x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("runtime", RULES)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.avg_pool2d(x, (2,)),
        lambda x: F.avg_pool2d(x, (3,), stride=(2,), padding=(1,), ceil_mode=True, count_include_pad=False),
        lambda x: F.max_pool2d(x, (3,), padding=(1,)),
        lambda x: F.adaptive_max_pool2d(x, 1),
        lambda x: F.adaptive_max_pool2d(x, (4, 5)),
    ],
)
def test_pools_that_every_exporter_needs_rewritten(runtime: str, function: Callable[[Tensor], Tensor]) -> None:
    check_same(around(function), runtime, example())


@pytest.mark.parametrize("runtime", RULES)
def test_what_needs_no_rewriting_is_handed_over_as_it_is(runtime: str) -> None:
    def plain(x: Tensor, up: nn.Module) -> Tensor:
        x = F.adaptive_avg_pool2d(F.avg_pool2d(F.max_pool2d(x, 2, 2), 3, 1, 1), 3)
        return up(x) * torch.sigmoid(x.mean((2, 3), keepdim=True))

    check_same(around(plain, nn.ConvTranspose2d(8, 8, 2, 2)), runtime, example(), rewritten=False)


def test_indices_of_a_pool_stay_where_they_are_read() -> None:
    module = around(lambda x: F.adaptive_max_pool2d(x, 3, return_indices=True)[1].float())
    check_same(module, "onnx", example(), rewritten=False)


@QUICK
@given(size=st.integers(3, 17), wanted=st.tuples(st.integers(1, 9), st.integers(1, 9)), largest=st.booleans())
def test_pools_to_any_size(size: int, wanted: tuple[int, int], largest: bool) -> None:
    pool = nn.AdaptiveMaxPool2d(wanted) if largest else nn.AdaptiveAvgPool2d(wanted)
    uneven = any(size % each for each in wanted)
    check_same(pool, "tflite", example(size), rewritten=uneven or largest)


@QUICK
@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 4]),
    data=st.data(),
)
def test_transposed_convolutions(kernel: int, stride: int, dilation: int, groups: int, data: st.DataObject) -> None:
    padding = data.draw(st.integers(0, min(3, dilation * (kernel - 1))))
    more = data.draw(st.integers(0, max(stride, dilation) - 1))
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 8, kernel, stride, padding, more, groups, dilation=dilation)
    x = torch.randn(2, 4, 7, 5)
    found = portable(layer, x, "tflite")
    with torch.inference_mode():
        torch.testing.assert_close(found(x), layer(x), rtol=1e-5, atol=1e-5)
    for node in found.graph.nodes if found is not layer else ():  # type: ignore[union-attr]
        if "conv_transpose" in str(node.target):
            assert list(node.args[4]) == list(node.args[5]) == [0, 0]


@QUICK
@given(
    size=st.integers(5, 14), kernel=st.integers(2, 4), stride=st.integers(1, 4), ceil=st.booleans(),
    counted=st.booleans(), runtime=st.sampled_from(list(RULES)), data=st.data(),
)  # fmt: skip
def test_average_pools(  # noqa: PLR0917
    size: int, kernel: int, stride: int, ceil: bool, counted: bool, runtime: str, data: st.DataObject
) -> None:
    pool = nn.AvgPool2d(kernel, stride, data.draw(st.integers(0, kernel // 2)), ceil, counted)
    x = torch.randn(2, 3, size, size + 2)
    with torch.inference_mode():
        torch.testing.assert_close(portable(pool, x, runtime)(x), pool(x), rtol=1e-5, atol=1e-6)


def test_a_slice_that_takes_everything_is_left_out() -> None:
    check_same(around(lambda x: x[:, :8, :, :]), "coreml", example())
    check_same(around(lambda x: torch.cat([x[:, 2:], x[:, :2]], 1)), "coreml", example(), rewritten=False)


def test_a_shuffle_of_channels_is_written_as_what_it_is(tmp_path: Path) -> None:
    module = around(lambda x: F.channel_shuffle(x, 4))
    check_same(module, "coreml", example())
    check_same(module, "onnx", example(), rewritten=False)
    (model,) = mk.export(module, example(), to=["coreml"], out=tmp_path)
    assert model.parity.sqnr_db > 100


def test_a_map_without_a_batch_axis_is_left_alone() -> None:
    check_same(nn.ConvTranspose2d(3, 4, 3, 2, 1), "tflite", example()[0], rewritten=False)


def gated(x: Tensor, gate: nn.Module, *_: nn.Module) -> Tensor:
    return x * torch.sigmoid(gate(F.adaptive_avg_pool2d(x, 1))).expand_as(x)


def test_an_expansion_is_left_to_what_reads_it() -> None:
    module = around(gated, nn.Conv2d(8, 8, 1))
    check_same(module, "tflite", example())
    check_same(module, "onnx", example(), rewritten=False)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat([x, x.mean((2, 3), keepdim=True).expand_as(x)], 1)[:, :8],  # what reads it cannot broadcast
        lambda x: x.mean((2, 3), keepdim=True).expand_as(x) + x.mean((2, 3), keepdim=True).expand_as(x),
    ],
)
def test_an_expansion_that_others_need_stays(function: Callable[[Tensor], Tensor]) -> None:
    x, module = example(), around(function)
    with torch.inference_mode():
        assert portable(module, x, "tflite")(x).shape == module(x).shape


class Everything(nn.Module):
    """All of them in one network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1)
        self.last = nn.Linear(8 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.max_pool2d(torch.relu(self.first(x)), 2), (2,))
        x = F.avg_pool2d(F.pad(x, (0, 4, 0, 4)), 3, 2, 1, ceil_mode=True, count_include_pad=False)
        x = gated(self.up(x), self.gate)[:, :8, :, :]
        return self.last(F.adaptive_max_pool2d(x, 3).flatten(1) + F.adaptive_avg_pool2d(x, (3, 3)).flatten(1))


@pytest.mark.parametrize("runtime", ["onnx", "tflite", "coreml"])
def test_files_of_all_of_them(runtime: str, tmp_path: Path) -> None:
    reason = registry.runtime(runtime).unavailable()
    if reason:
        pytest.skip(reason)
    torch.manual_seed(0)
    module = Everything().eval()
    batches = [torch.randn(16, 3, 20, 20, generator=torch.Generator().manual_seed(2)).numpy()]
    for precision, least in (("fp32", 100), ("int8", 25)):
        (file,) = mk.export(
            module,
            example(20),
            to=[runtime],
            precision=precision,
            calibration=batches,
            out=tmp_path,  # type: ignore[arg-type]
        )
        assert file.parity.status in ("executed", "evaluated", "structure-only")
        if file.parity.status == "executed":
            assert file.parity.sqnr_db is not None
            assert file.parity.sqnr_db > least
