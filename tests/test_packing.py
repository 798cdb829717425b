"""Weight sharing and Huffman codes against independent computations; packages that restore models bit for bit."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import heapq
import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

from mobilekit import cli
from mobilekit.errors import BadInputError
from mobilekit.packing import cluster, codings, container, huffman, pack, sharing, tensors, unpack
from mobilekit.packing.container import Contents, Entry, Piece

STARTS = ("quantile", "linear", "density", "gaussian")
FEW = settings(max_examples=60, deadline=None)

# ---------------------------------------------------------------- clustering


def least_error(values: np.ndarray, count: int) -> float:
    """Mean squared error of the best split of the sorted values into ranges, by trying all of them."""
    ordered = np.sort(values.astype(np.float64))
    splits = itertools.combinations(range(1, len(ordered)), count - 1)
    errors = (sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(ordered, cuts)) for cuts in splits)
    return min(errors) / len(ordered)


@FEW
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=9), st.integers(1, 9), st.sampled_from(STARTS))
def test_few_values_are_clustered_to_the_optimum(values: list[int], count: int, start: str) -> None:
    array = np.array(values, np.float32) / 8
    book = cluster(array, count, start)  # type: ignore[arg-type]
    assert book.exact
    assert len(book.centroids) == min(count, len(set(values)))
    assert book.distortion == pytest.approx(least_error(array, min(count, len(array))), abs=1e-10)
    assert book.distortion == pytest.approx(np.mean((array.astype(np.float64) - book.restored()) ** 2), abs=1e-10)


@pytest.mark.parametrize("count", [2, 16, 200])
@pytest.mark.parametrize("draw", ["normal", "laplace", "outliers"])
def test_many_values_are_clustered_no_worse_than_scipy_does(draw: str, count: int) -> None:
    generator = np.random.default_rng(0)
    values = generator.laplace(size=10000) if draw == "laplace" else generator.standard_normal(10000)
    if draw == "outliers":
        values[:20] *= 100
    values = values.astype(np.float32)
    codebook, labels = kmeans2(values.astype(np.float64), count, iter=60, minit="++", rng=0)
    theirs = float(np.mean((values - codebook[labels]) ** 2))
    for start in STARTS:
        book = cluster(values, count, start)  # type: ignore[arg-type]
        assert book.distortion < 1.01 * theirs
        assert book.distortion == pytest.approx(np.mean((values - book.restored()).astype(np.float64) ** 2), rel=1e-5)


@pytest.mark.parametrize("count", [300, 7, 2, 1])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
def test_every_value_gets_its_nearest_centroid(dtype: type, count: int) -> None:
    values = (np.random.default_rng(1).standard_normal((37, 83)) * 20).astype(dtype)
    book = cluster(values, count)
    assert book.codes.shape == values.shape
    assert book.codes.dtype == (np.uint8 if len(book.centroids) <= 256 else np.uint16)
    assert np.all(np.diff(book.centroids) > 0)
    exactly = values.astype(np.float64)
    distances = np.abs(exactly[..., None] - book.centroids.astype(np.float64))
    np.testing.assert_array_equal(np.abs(exactly - book.restored()), distances.min(axis=-1))


def test_pruned_weights_stay_zero_and_no_others_become_zero() -> None:
    generator = np.random.default_rng(2)
    values = generator.standard_normal((60, 70)).astype(np.float32)
    values[generator.random(values.shape) < 0.9] = 0
    for count in (2, 16, 5000):
        book = cluster(values, count, keep_zero=True)
        np.testing.assert_array_equal(book.restored() == 0, values == 0)
        assert len(book.centroids) <= count
        assert book.distortion == pytest.approx(np.mean((values - book.restored()) ** 2), rel=1e-5)
    assert cluster(np.zeros(5), 3, keep_zero=True).centroids.tolist() == [0]
    assert cluster(np.ones(5), 1, keep_zero=True).centroids.tolist() == [1]


def test_constant_and_few_distinct_values_are_kept() -> None:
    for scale in (1e-38, 1.0, 3e38):
        for values in (np.full(9000, 2.5), np.resize([-1.0, 0.25, 1.0], 9000)):
            array = (values * scale / 2.5).astype(np.float32)
            book = cluster(array, 8)
            np.testing.assert_array_equal(book.restored(), array)
            assert book.distortion == 0


@pytest.mark.parametrize(
    ("values", "count", "said"),
    [
        ([], 2, "no values"),
        ([1.0, np.nan], 1, "finite"),
        ([-np.inf, 1.0], 1, "finite"),
        ([1e200, 1.0], 1, "finite"),
        ([1.0], 0, "between 1 and"),
        ([1.0], 1 << 17, "between 1 and"),
        (["a"], 1, "real numbers"),
        ([1j], 1, "real numbers"),
    ],
)
def test_what_cannot_be_clustered_is_refused(values: list[object], count: int, said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        cluster(np.array(values), count)
    with pytest.raises(BadInputError, match="start"):
        cluster(np.ones(2), 1, "random")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="at least 2"):
        cluster(np.array([0.0, 1.0]), 1, keep_zero=True)


# ---------------------------------------------------------------- Huffman


def huffman_bits(counts: list[int]) -> int:
    """Bits of Huffman's own code, without a limit: the sum of all merged weights."""
    heap, bits = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        bits += merged
        heapq.heappush(heap, merged)
    return bits


@FEW
@given(st.lists(st.integers(1, 50), min_size=2, max_size=40))
def test_codes_are_as_short_as_huffmans(counts: list[int]) -> None:
    lengths = huffman.code_lengths(np.array(counts))
    assert int(lengths.astype(int) @ counts) == huffman_bits(counts)
    assert sum(2.0 ** -int(length) for length in lengths) == 1


@FEW
@given(st.lists(st.integers(1, 300), min_size=2, max_size=6))
def test_limited_codes_are_the_shortest_within_the_limit(counts: list[int]) -> None:
    lengths = huffman.code_lengths(np.array(counts), limit=3)
    possible = (ls for ls in itertools.product((1, 2, 3), repeat=len(counts)) if sum(2.0**-x for x in ls) <= 1)
    assert lengths.max() <= 3
    assert int(lengths.astype(int) @ counts) == min(
        sum(x * c for x, c in zip(ls, counts, strict=True)) for ls in possible
    )


def test_skewed_counts_stay_within_fifteen_bits_and_codes_have_no_common_beginnings() -> None:
    lengths = huffman.code_lengths(np.array([int(1.618**power) + 1 for power in range(40)]))
    assert lengths.max() == huffman.LIMIT
    codes = huffman.canonical(lengths)
    texts = sorted(format(int(code), f"0{int(length)}b") for code, length in zip(codes, lengths, strict=True))
    assert not any(later.startswith(text) for text, later in itertools.pairwise(texts))
    with pytest.raises(BadInputError, match="no prefix code"):
        huffman.code_lengths(np.ones(9), limit=3)


@FEW
@given(st.binary(max_size=3000))
def test_huffman_restores_any_bytes(data: bytes) -> None:
    symbols = np.frombuffer(data, np.uint8)
    np.testing.assert_array_equal(huffman.decode(huffman.encode(symbols), len(symbols)), symbols)


@pytest.mark.parametrize("count", [511, 512, 513, 65535, 65536, 262145, huffman.GROUP + 5])
def test_huffman_restores_streams_of_all_lengths(count: int) -> None:
    symbols = np.random.default_rng(count).geometric(0.002, count).clip(0, 4095)
    block = huffman.encode(symbols)
    np.testing.assert_array_equal(huffman.decode(block, count), symbols)
    counts = np.bincount(symbols)
    share = counts[counts > 0] / count
    entropy = -(share * np.log2(share)).sum() * count / 8
    assert entropy < len(block) < 1.03 * entropy + 5000


@FEW
@given(st.data())
def test_a_damaged_huffman_block_is_refused_or_stays_within_its_bounds(data: st.DataObject) -> None:
    block = bytearray(huffman.encode(np.arange(900) % 70))
    for _ in range(data.draw(st.integers(1, 3))):
        block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(block[: data.draw(st.integers(0, len(block)))])
    with contextlib.suppress(BadInputError):  # anything else, IndexError or MemoryError, is a fault
        assert len(huffman.decode(cut, 900)) <= 900


def test_symbols_beyond_the_alphabet_are_refused() -> None:
    for symbols in (np.array([4096]), np.array([-1]), np.array([0.5]), np.ones((2, 2), int)):
        with pytest.raises(BadInputError, match="Huffman codes are made for"):
            huffman.encode(symbols)


# ---------------------------------------------------------------- codings


@FEW
@given(st.lists(st.integers(0, 700), max_size=12), st.sampled_from([1, 2, 4]), st.booleans())
def test_sparse_tensors_come_back_from_relative_positions(gaps: list[int], width: int, ends: bool) -> None:
    values = np.zeros(sum(gaps) + len(gaps) + 300 * ends + 1, f"<u{width}")
    values[np.cumsum(np.array(gaps, int) + 1)] = np.arange(len(gaps)) % 5 + 1
    coded = sharing.encode(values.tobytes(), width)
    assert coded is not None
    assert sharing.decode(coded, values.nbytes) == values.tobytes()


def test_nan_and_minus_zero_keep_their_bits_and_many_values_are_not_shared() -> None:
    odd = np.array([0x7FC00001, 0x80000000, 0, 0xFF800000] * 50, "<u4").tobytes()
    coded = sharing.encode(odd, 4)
    assert coded is not None
    assert sharing.decode(coded, len(odd)) == odd
    assert sharing.encode(np.arange(4097, dtype="<u4").tobytes(), 4) is None
    assert sharing.encode(bytes(7), 4) is None


@FEW
@given(st.binary(max_size=600), st.sampled_from([1, 2, 4]), st.integers(1, 40))
def test_the_shortest_coding_restores_anything(data: bytes, width: int, times: int) -> None:
    name, coded = codings.encode(data * times, width)
    assert len(coded) <= len(data * times)
    assert codings.decode(name, coded, len(data * times)) == data * times


@FEW
@given(st.binary(max_size=200), st.sampled_from(codings.CODINGS), st.integers(0, 5000))
def test_no_coding_makes_other_sizes_of_garbage(coded: bytes, name: str, size: int) -> None:
    with contextlib.suppress(BadInputError):
        assert len(codings.decode(name, coded, size)) == size


@pytest.mark.parametrize("name", codings.CODINGS)
def test_every_coding_is_chosen_where_it_fits(name: str) -> None:
    generator = np.random.default_rng(3)
    floats = generator.standard_normal(30000).astype("<f4")
    pruned = np.where(generator.random(30000) < 0.9, 0, floats)
    data = {
        "stored": generator.bytes(5000),
        "zlib": bytes(80),
        "lzma": b"".join(generator.permutation(40).astype(np.uint8).tobytes() + bytes(range(200)) for _ in range(200)),
        "huffman": (generator.standard_normal(30000) * 9).astype("i1").tobytes(),
        "planes": floats.tobytes(),
        "shared": cluster(pruned, 32, keep_zero=True).restored().tobytes(),
    }[name]
    chosen, coded = codings.encode(data, 1 if name in {"huffman", "stored"} else 4)
    assert chosen == name
    assert codings.decode(name, coded, len(data)) == data


# ---------------------------------------------------------------- models


@functools.cache
def shared_weights(outputs: int, inputs: int, bits: int, density: float = 0.1) -> np.ndarray:
    """Pruned weights (outputs, inputs) that share 2^bits values."""
    generator = np.random.default_rng(outputs)
    weights = generator.standard_normal((outputs, inputs)).astype(np.float32)
    weights[generator.random(weights.shape) > density] = 0
    return cluster(weights, 1 << bits, keep_zero=True).restored()


def onnx_bytes() -> bytes:
    """Two linear layers: shared weights, and weights as they were trained."""
    dense = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    weights = {"first": shared_weights(256, 512, 5), "second": dense, "bias": np.zeros(64, np.float32)}
    nodes = [
        onnx.helper.make_node("Gemm", ["in", "first"], ["hidden"], transB=1),
        onnx.helper.make_node("Relu", ["hidden"], ["active"]),
        onnx.helper.make_node("Gemm", ["active", "second", "bias"], ["out"], transB=1),
    ]
    shapes = {"in": (1, 512), "out": (1, 64)}
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in shapes.items()]
    initialisers = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "two", ends[:1], ends[1:], initialisers))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def blob() -> bytes:
    """As formats other than ONNX hold tensors: one after the other, aligned, between other things."""
    head = b"\x1c\0\0\0TFL3" + bytes(range(56))
    int8 = (np.random.default_rng(5).standard_normal(40000) * 20).clip(-127, 127).astype(np.int8)
    parts = [head, shared_weights(300, 200, 4).tobytes(), int8.tobytes(), shared_weights(100, 333, 5).tobytes(), b"end"]
    return b"".join(part + bytes(-len(part) % 16) for part in parts[:-1]) + parts[-1]


def package_folder(path: Path) -> Path:
    weights = path / "Data" / "com.apple.CoreML" / "weights"
    weights.mkdir(parents=True)
    (weights / "weight.bin").write_bytes(blob())
    (weights.parent / "model.mlmodel").write_bytes(b"\x08\x07" + bytes(90))
    (path / "Manifest.json").write_text('{"itemInfoEntries": {}}', encoding="utf-8")
    (path / "empty").write_bytes(b"")
    return path


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("name", "least"), [("net.onnx", 1.15), ("net.tflite", 1.15)])
def test_a_file_comes_back_bit_for_bit_and_is_smaller_than_a_zip(tmp_path: Path, name: str, least: float) -> None:
    model = tmp_path / name
    model.write_bytes(onnx_bytes() if name.endswith("onnx") else blob())
    made = pack(model)
    assert Path(made.package).stat().st_size == made.packed_bytes
    assert made.ratio == model.stat().st_size / made.packed_bytes
    assert made.ratio > least * made.zip_ratio
    assert (made.zstd_ratio is None) == (made.zstd_reason is not None)
    (tmp_path / "there").mkdir()
    restored = unpack(Path(made.package), tmp_path / "there")
    assert Path(restored.model) == tmp_path / "there" / name
    assert Path(restored.model).read_bytes() == model.read_bytes()
    assert restored.files == made.files
    assert made.files[0].sha256 == hashlib.sha256(model.read_bytes()).hexdigest()


def test_shared_tensors_are_found_in_onnx_and_in_other_files() -> None:
    first, second = (tensors.spans(data, onnx=is_onnx) for data, is_onnx in ((onnx_bytes(), True), (blob(), False)))
    assert [(span.size, span.width) for span in first] == [(4 * 256 * 512, 4), (4 * 64 * 256, 4)]
    assert {span.width for span in second} == {1, 4}
    for spans, data in ((first, onnx_bytes()), (second, blob())):
        ends = [0, *(span.start + span.size for span in spans)]
        assert all(span.start >= end for span, end in zip(spans, ends, strict=False))
        assert ends[-1] <= len(data)


def test_a_folder_comes_back_with_every_file(tmp_path: Path) -> None:
    model = package_folder(tmp_path / "net.mlpackage")
    made = pack(model, tmp_path / "net.bin")
    restored = unpack(tmp_path / "net.bin", tmp_path / "again.mlpackage")
    assert digests(tmp_path / "again.mlpackage") == digests(model)
    assert len(restored.files) == len(made.files) == 4
    assert unpack(tmp_path / "net.bin").model == str(model)  # the same model is there: nothing is lost
    (model / "empty").write_bytes(b"changed")
    with pytest.raises(BadInputError, match="is another model"):
        unpack(tmp_path / "net.bin")
    assert (model / "empty").read_bytes() == b"changed"


@FEW
@given(data=st.binary(max_size=3000), times=st.integers(1, 60))
def test_any_bytes_come_back(tmp_path_factory: pytest.TempPathFactory, data: bytes, times: int) -> None:
    model = tmp_path_factory.mktemp("any") / "net.onnx"
    model.write_bytes(data * times)
    made = pack(model)
    assert unpack(Path(made.package), model.with_name("again")).size_bytes == len(data) * times
    assert model.with_name("again").read_bytes() == data * times


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no model")
    (tmp_path / "empty.mlpackage").mkdir()
    package_folder(tmp_path / "linked.mlpackage").joinpath("link").symlink_to(tmp_path / "note.txt")
    net = tmp_path / "net.onnx"
    net.write_bytes(onnx_bytes())
    outside = onnx.load_model_from_string(onnx_bytes())
    onnx.save(outside, tmp_path / "outside.onnx", save_as_external_data=True, location="outside.data")
    for name, said in [
        ("note.txt", "no model to pack"),
        ("missing.onnx", "there is no"),
        ("empty.mlpackage", "holds no files"),
        ("linked.mlpackage", "a link"),
        ("outside.onnx", "in another file"),
    ]:
        with pytest.raises(BadInputError, match=said):
            pack(tmp_path / name)
    with pytest.raises(BadInputError, match="give another file"):
        pack(net, net)
    assert net.read_bytes() == onnx_bytes()
    assert not list(tmp_path.glob("*.mkpack"))


# ---------------------------------------------------------------- packages that cannot be trusted


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    model = tmp_path_factory.mktemp("packed") / "net.onnx"
    model.write_bytes(onnx_bytes())
    return Path(pack(model).package).read_bytes()


def refused(folder: Path, package: bytes) -> str:
    path = folder / "bad.mkpack"
    path.write_bytes(package)
    with pytest.raises(BadInputError) as raised:
        unpack(path)
    assert [file.name for file in folder.iterdir()] == ["bad.mkpack"], "something half-written is left"
    return str(raised.value)


def test_every_flipped_bit_and_every_cut_is_refused(packed: bytes, tmp_path: Path) -> None:
    places = [*range(container.HEAD.size + 8), *range(100, len(packed), len(packed) // 40), len(packed) - 1]
    for place in places:
        flipped = bytearray(packed)
        flipped[place] ^= 1 << place % 8
        assert refused(tmp_path, bytes(flipped))
    for length in [*range(container.HEAD.size + 1), len(packed) // 2, len(packed) - 1]:
        assert "cut off" in refused(tmp_path, packed[:length]) or length == 0
    assert "behind its end" in refused(tmp_path, packed + b"\0")
    assert "no mobilekit package" in refused(tmp_path, b"PK\x03\x04" + packed)
    assert "version is 2" in refused(tmp_path, packed[:8] + b"\2" + packed[9:])


def forged(where: Path, entries: list[Entry], payload: list[bytes], **changes: object) -> bytes:
    """A package with right digests whose contents nobody checked."""
    facts = {"name": "net.onnx", "folder": False, "size": sum(e.size for e in entries), "files": tuple(entries)}
    contents = Contents.model_construct(**{**facts, **changes})
    path = where.with_name("forged")
    with pytest.MonkeyPatch.context() as patched, path.open("wb") as stream:
        patched.setattr(container, "check", lambda *_: None)
        container.write(stream, contents, payload)
    return path.read_bytes()


def entry(path: str, size: int, *pieces: Piece, gaps: bool = False) -> Entry:
    digest = hashlib.sha256(b"x").hexdigest()
    rest, held = ((), pieces) if gaps else (pieces, ())
    return Entry.model_construct(path=path, size=size, sha256=digest, rest=rest, tensors=held)


@pytest.mark.parametrize(
    "name", ["../net.onnx", "/net.onnx", "a/net.onnx", "..", ".", "", "a\\b", "C:net.onnx", "a\0b", "n" * 300]
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    one = Piece(0, 1, "stored", 1)
    assert "would leave" in refused(tmp_path, forged(tmp_path, [entry(name, 1, one)], [b"x"], name=name))
    if name != "a/net.onnx":  # inside a folder that is a path like any other
        inside = forged(tmp_path, [entry(f"Data/{name}", 1, one)], [b"x"], name="net.mlpackage", folder=True)
        assert "would leave" in refused(tmp_path, inside)


def test_sizes_that_lie_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    huge = 60 << 20
    block = huffman.encode(np.zeros(huge, np.uint8))
    zeros = sharing.encode(bytes(1 << 20), 4) or b""
    lies = {
        "can": forged(tmp_path, [entry("net.onnx", huge, Piece(0, huge, "huffman", len(block)))], [block]),
        "own table": forged(tmp_path, [entry("net.onnx", 1 << 40, Piece(0, 1 << 40, "zlib", 1))], [b"x"]),
        "pieces of a file": forged(tmp_path, [entry("net.onnx", huge, Piece(0, 1, "stored", 1))], [b"x"]),
        "its length": forged(tmp_path, [entry("net.onnx", 1, Piece(0, 1, "stored", 9))], [b"x"]),
        "the size that": forged(tmp_path, [entry("net.onnx", 1, Piece(0, 1, "stored", 1))], [b"x"], size=huge),
        "outside": forged(tmp_path, [entry("net.onnx", 1, Piece(5, 1, "stored", 1), gaps=True)], [b"x"]),
        "damaged": forged(tmp_path, [entry("net.onnx", 900, Piece(0, 900, "shared", len(zeros)))], [zeros]),
        "not the file": forged(tmp_path, [entry("net.onnx", 1, Piece(0, 1, "stored", 1))], [b"y"]),
        "twice": forged(
            tmp_path, [entry("a", 1, Piece(0, 1, "stored", 1))] * 2, [b"x", b"x"], name="n.mlpackage", folder=True
        ),
    }
    for said, package in lies.items():
        tracemalloc.start()
        message = refused(tmp_path, package)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert said.replace("own table", "table of contents") in message
        assert peak < 8 << 20


# ---------------------------------------------------------------- the command line

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Exit code, stdout and stderr of a command line, run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["mobilekit", *map(str, arguments)])
        monkeypatch.setattr(cli.errors, "_file", None)
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capfd.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return invoke


def test_commands_pack_and_unpack(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "net.onnx"
    model.write_bytes(onnx_bytes())
    code, out, err = run("pack", "net.onnx", "--out", "small", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["packed_bytes"] == (tmp_path / "small").stat().st_size
    assert document["original_bytes"] == len(onnx_bytes())
    code, out, err = run("unpack", "small", "--out", "again.onnx", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["files"][0]["sha256"] == document["files"][0]["sha256"]
    assert (tmp_path / "again.onnx").read_bytes() == onnx_bytes()
    code, out, _ = run("pack", "net.onnx")
    assert code == 0
    assert "ratio" in out
    assert "zip" in out
    assert run("unpack", "net.onnx.mkpack")[0] == 0


@pytest.mark.parametrize("arguments", [("unpack", "bad"), ("unpack", "missing"), ("unpack", "."), ("pack", "bad")])
def test_bad_input_is_one_sentence_and_code_2(run: Run, tmp_path: Path, arguments: tuple[str, str]) -> None:
    (tmp_path / "bad").write_bytes(b"no package")
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("mobilekit: ")
    assert err.count("\n") == 1
    assert "not foreseen" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
