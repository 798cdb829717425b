"""Compressed weights: what the evaluator unpacks from a package equals coremltools' own decompression, exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")
from coremltools.optimize import coreml
from mil_programs import coremltools, inferred, mb, saved

from mobilekit import registry
from mobilekit.runtimes._job import quiet
from mobilekit.runtimes._mil_evaluator import Evaluator
from mobilekit.runtimes._mil_program import read, unpacked

RANDOM = np.random.default_rng(0)
FIRST = RANDOM.standard_normal((16, 8, 3, 3)).astype(np.float32)
SECOND = RANDOM.standard_normal((32, 16, 1, 1)).astype(np.float32)
X = RANDOM.standard_normal((1, 8, 6, 6)).astype(np.float32)


def two_convolutions(x: Any) -> Any:
    return mb.conv(x=mb.relu(x=mb.conv(x=x, weight=FIRST, pad_type="same")), weight=SECOND)


def quantised(model: Any, joint: bool = False, **options: Any) -> Any:
    config = coreml.OpLinearQuantizerConfig(weight_threshold=0, **options)
    return coreml.linear_quantize_weights(model, coreml.OptimizationConfig(config), joint_compression=joint)


def palettised(model: Any, joint: bool = False, **options: Any) -> Any:
    config = coreml.OpPalettizerConfig(mode="kmeans", weight_threshold=0, **options)
    return coreml.palettize_weights(model, coreml.OptimizationConfig(config), joint_compression=joint)


def pruned(model: Any) -> Any:
    config = coreml.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=0)
    return coreml.prune_weights(model, coreml.OptimizationConfig(config))


BLOCKS = {"granularity": "per_block", "block_size": 4}
COMPRESSED: dict[str, tuple[str, Callable[[Any], Any], str, str]] = {
    "int8 before iOS 18": ("iOS16", lambda m: quantised(m, mode="linear_symmetric"), "affine_dequantize", "int8"),
    "uint8 before iOS 18": ("iOS16", lambda m: quantised(m, mode="linear", dtype="uint8"), "affine_dequantize", "int8"),
    "sparse before iOS 18": ("iOS16", pruned, "sparse_to_dense", "sparse-fp32"),
    "int8": ("iOS18", lambda m: quantised(m, mode="linear_symmetric"), "blockwise_shift_scale", "int8"),
    "uint8": ("iOS18", lambda m: quantised(m, mode="linear", dtype="uint8"), "blockwise_shift_scale", "int8"),
    "int4": ("iOS18", lambda m: quantised(m, dtype="int4"), "blockwise_shift_scale", "int4"),
    "int4 blocks": ("iOS18", lambda m: quantised(m, dtype="int4", **BLOCKS), "blockwise_shift_scale", "int4"),
    "uint4 blocks": (
        "iOS18",
        lambda m: quantised(m, mode="linear", dtype="uint4", **BLOCKS),
        "blockwise_shift_scale",
        "int4",
    ),
    "sparse": ("iOS18", pruned, "sparse_to_dense", "sparse-fp32"),
    **{
        f"{bits} bit before iOS 18": (
            "iOS16",
            lambda m, n=bits: palettised(m, nbits=n),
            "lut_to_dense",
            f"palette{bits}",
        )
        for bits in (1, 2, 4, 6, 8)
    },
    **{
        f"{bits} bit": ("iOS18", lambda m, n=bits: palettised(m, nbits=n), "lut_to_dense", f"palette{bits}")
        for bits in (1, 2, 3, 4, 6, 8)
    },
    "palettes of groups": (
        "iOS18",
        lambda m: palettised(m, nbits=3, granularity="per_grouped_channel", group_size=4),
        "lut_to_dense",
        "palette3",
    ),
    "palette of vectors": ("iOS18", lambda m: palettised(m, nbits=4, cluster_dim=4), "lut_to_dense", "palette4"),
    "palette with scales": (
        "iOS18",
        lambda m: palettised(m, nbits=4, enable_per_channel_scale=True),
        "blockwise_shift_scale",
        "palette4",
    ),
    "sparse palette": (
        "iOS18",
        lambda m: palettised(pruned(m), joint=True, nbits=4),
        "lut_to_sparse",
        "sparse-palette4",
    ),
    "sparse int8": (
        "iOS18",
        lambda m: quantised(pruned(m), joint=True, mode="linear_symmetric"),
        "sparse_blockwise_shift_scale",
        "sparse-int8",
    ),
}
"""Name -> opset, compression, an operation that the file then has, and what `describe` calls the weights."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return {each: saved(two_convolutions, [X], folder / f"{each}.mlpackage", each) for each in ("iOS16", "iOS18")}


def filters(path: Path) -> list[np.ndarray]:
    """Weights of the convolutions, in order, as the evaluator has them."""
    program = read(path)
    weights = Evaluator(program).weights()
    return [weights[each.arguments["weight"][0]] for each in program.operations if each.kind == "conv"]


@pytest.mark.parametrize("case", COMPRESSED)
def test_unpacked_weights_are_coremltools_own(case: str, plain: dict[str, Path], tmp_path: Path) -> None:
    opset, compress, kind, stored = COMPRESSED[case]
    with quiet(native=True):
        model = compress(coremltools.models.MLModel(str(plain[opset]), skip_model_load=True))
        model.save(str(tmp_path / "small.mlpackage"))
        coreml.decompress_weights(model).save(str(tmp_path / "large.mlpackage"))
    program = read(tmp_path / "small.mlpackage")
    assert f"constexpr_{kind}" in {each.kind for each in program.operations}
    assert [each.kind for each in Evaluator(program).operations] == ["conv", "relu", "conv"]
    ours, theirs = filters(tmp_path / "small.mlpackage"), filters(tmp_path / "large.mlpackage")
    assert len(ours) == 2
    assert not np.array_equal(ours[0], FIRST)
    for mine, other in zip(ours, theirs, strict=True):
        assert np.array_equal(mine, other)
    facts = registry.runtime("coreml").describe(tmp_path / "small.mlpackage")
    assert facts.weights == {stored: 2}
    assert facts.operators == ({"fp32": 1, "int8": 2} if stored.endswith("int8") else {"fp32": 3})


MASK = np.array([[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]])


def bits(values: Any, count: int) -> np.ndarray:
    """An array whose type has so many bits, for coremltools."""
    from coremltools.converters.mil.mil.types import type_mapping

    return np.array(values).astype(type_mapping.string_to_nptype(f"uint{count}"))


def test_vectors_in_palettes_lie_along_their_axis(tmp_path: Path) -> None:
    """The example of the operator's documentation, along both axes: iOS18/compression.py, constexpr_lut_to_dense."""
    indices = [[[0, 0], [1, 0]], [[1, 1], [0, 0]]]
    table = np.arange(1, 7, dtype=np.float32).reshape(1, 1, 1, 2, 3)
    expected = {
        1: [[[1, 1], [2, 2], [3, 3], [4, 1], [5, 2], [6, 3]], [[4, 4], [5, 5], [6, 6], [1, 1], [2, 2], [3, 3]]],
        2: [[[1, 2, 3, 1, 2, 3], [4, 5, 6, 1, 2, 3]], [[4, 5, 6, 4, 5, 6], [1, 2, 3, 1, 2, 3]]],
    }
    for axis, wanted in expected.items():

        def build(x: Any, axis: int = axis) -> Any:
            dense = mb.constexpr_lut_to_dense(indices=bits(indices, 1), lut=table, vector_axis=axis)
            return mb.mul(x=x, y=dense)

        path = saved(build, [np.ones(np.shape(wanted), np.float32)], tmp_path / f"{axis}.mlpackage")
        (found,) = Evaluator(read(path)).evaluate({"x0": np.ones(np.shape(wanted), np.float32)}).values()
        assert np.array_equal(found, wanted)


def test_vectors_in_sparse_palettes_are_masked_together(tmp_path: Path) -> None:
    """The example of the operator's documentation: iOS18/compression.py, constexpr_lut_to_sparse."""
    table = np.array([[2, 2.5], [3, 3.5]], np.float32).reshape(1, 1, 2, 2)
    entries = bits([0, 1, 1, 0, 1, 1, 0, 0, 1], 1)
    dense = np.zeros((8, 6), np.float32)
    dense[0::2][MASK == 1] = table[0, 0, entries.astype(int), 0]
    dense[1::2][MASK == 1] = table[0, 0, entries.astype(int), 1]

    def build(x: Any) -> Any:
        mask, values = mb.constexpr_lut_to_sparse(
            indices_mask=bits(MASK, 1), indices_nonzero_data=entries, lut=table, vector_axis=0
        )
        return mb.add(x=x, y=mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask))

    path = saved(build, [np.zeros((8, 6), np.float32)], tmp_path / "sparse.mlpackage")
    (found,) = Evaluator(read(path)).evaluate({"x0": np.zeros((8, 6), np.float32)}).values()
    assert np.array_equal(found, dense)


def test_half_precision_constants_that_are_cast(tmp_path: Path) -> None:
    half = FIRST[0, 0].astype(np.float16)

    def build(x: Any) -> Any:
        return mb.add(x=x, y=mb.constexpr_cast(source_val=half, output_dtype="fp32"))

    zeros = np.zeros((3, 3), np.float32)
    path = saved(build, [zeros], tmp_path / "cast.mlpackage", "iOS16")
    (found,) = Evaluator(read(path)).evaluate({"x0": zeros}).values()
    assert np.array_equal(found, half.astype(np.float32))


def test_quantising_in_half_precision_is_within_a_step_of_coremltools(tmp_path: Path) -> None:
    """NumPy rounds the quotient to half precision before it rounds it to an integer; here it is rounded once."""
    half = (X * 3).astype(np.float16)

    def build(x: Any) -> Any:
        return mb.quantize(input=x, scale=np.float16(0.07), zero_point=np.int8(3), output_dtype="int8")

    path = saved(build, [half], tmp_path / "half.mlpackage")
    (found,) = Evaluator(read(path)).evaluate({"x0": half}).values()
    (theirs,) = inferred(build, [half])
    assert np.abs(found.astype(int) - theirs.astype(int)).max() <= 1
    assert (found == theirs).mean() > 0.98


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
def test_packed_numbers(count: int) -> None:
    values = RANDOM.integers(0, 2**count, 37)
    stream = np.array([value >> bit & 1 for value in values for bit in range(count)], np.uint8)
    assert np.array_equal(unpacked(np.packbits(stream, bitorder="little"), count, 37), values)
    with pytest.raises(ValueError, match="declared"):
        unpacked(np.packbits(stream[:-8], bitorder="little"), count, 37)
