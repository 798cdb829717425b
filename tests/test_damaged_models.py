"""Single damaged model files, each of which once was a crash, a hang or a strange error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers
import networks
import onnx
import pytest

from mobilekit import bench, packing, pipeline, registry
from mobilekit.devices import _session
from mobilekit.devices.host import Host
from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.network import trace
from mobilekit.runtimes._tflite_facts import schema
from mobilekit.store import Store

Edit = Callable[[Any], object]


@pytest.fixture(scope="module")
def sketches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sketches")
    network = trace(networks.build("resnet"), networks.example(), "net")
    int8 = {o.name: "int8" for o in network.operators if o.kind in ("conv", "linear")}
    registry.runtime("onnx").sketch(network, folder / "net.onnx")
    registry.runtime("tflite").sketch(network.with_precisions(int8), folder / "net.tflite")  # type: ignore[arg-type]
    return folder


def edited_onnx(source: Path, edit: Edit, target: Path) -> Path:
    model = onnx.load(str(source))
    edit(model.graph)
    target.write_bytes(model.SerializeToString())
    return target


def edited_tflite(source: Path, edit: Edit, target: Path) -> Path:
    model = schema().ModelT.InitFromObj(schema().Model.GetRootAs(source.read_bytes(), 0))
    edit(model)
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    target.write_bytes(bytes(builder.Output()))
    return target


def one_operator_twice(model: Any) -> None:
    """LiteRT 2.3 crashes while it runs this."""
    operators = model.subgraphs[0].operators
    convolution = next(o for o in operators if len(o.inputs) == 3)
    operators[-1] = convolution


def unknown_type(graph: Any) -> None:
    graph.input[0].type.tensor_type.elem_type = 999


def no_inputs(graph: Any) -> None:
    for node in graph.node:
        del node.input[:]


def elsewhere(graph: Any) -> None:
    tensor = graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="../secret.bin")


@pytest.mark.parametrize("edit", [unknown_type, no_inputs])
def test_an_onnx_file_that_contradicts_itself_is_bad_input(edit: Edit, sketches: Path, tmp_path: Path) -> None:
    path = edited_onnx(sketches / "net.onnx", edit, tmp_path / "net.onnx")
    with pytest.raises(BadInputError, match="is a damaged ONNX file"):
        registry.runtime("onnx").describe(path)


def test_weights_in_other_places_are_not_read_to_describe_a_file(sketches: Path, tmp_path: Path) -> None:
    path = edited_onnx(sketches / "net.onnx", elsewhere, tmp_path / "net.onnx")
    assert registry.runtime("onnx").describe(path).operators
    with pytest.raises(MobilekitError):
        registry.runtime("onnx").open(path)


def test_a_name_that_is_no_text_is_bad_input(sketches: Path, tmp_path: Path) -> None:
    content = (sketches / "net.onnx").read_bytes()
    name = onnx.load(str(sketches / "net.onnx")).graph.node[0].output[0].encode()
    path = tmp_path / "net.onnx"
    path.write_bytes(content.replace(name, b"\xff" * len(name), 1))
    with pytest.raises(BadInputError, match="ONNX Runtime cannot open"):
        registry.runtime("onnx").open(path)


def wrong_type(model: Any) -> None:
    model.subgraphs[0].tensors[0].type = 99


def wrong_operator(model: Any) -> None:
    model.operatorCodes[0].builtinCode = 9999


@pytest.mark.parametrize("edit", [wrong_type, wrong_operator])
def test_a_tflite_file_that_contradicts_itself_is_bad_input(edit: Edit, sketches: Path, tmp_path: Path) -> None:
    path = edited_tflite(sketches / "net.tflite", edit, tmp_path / "net.tflite")
    with pytest.raises(BadInputError, match="is a damaged TFLite file"):
        registry.runtime("tflite").describe(path)


def test_a_crash_of_the_runtime_is_a_failure_and_the_others_are_measured(
    sketches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "COMPARE", {**bench.COMPARE, "max_seconds": 0.2})
    edited_tflite(sketches / "net.tflite", one_operator_twice, tmp_path / "crashes.tflite")
    (tmp_path / "sound.tflite").write_bytes((sketches / "net.tflite").read_bytes())
    found = pipeline.measure_files([tmp_path], [Host()], pipeline.Timing(runs=3))
    assert [m.model for m in found.measurements] == ["sound.tflite"]
    (failure,) = found.failures
    assert failure.subject == "crashes.tflite"
    assert failure.remedy
    assert failure.message


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes with names there")
def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("net.onnx", "net.tflite", "net.mkpack", "lines.jsonl"):
        os.mkfifo(tmp_path / name)
    found = pipeline.measure_files([tmp_path], [Host()], pipeline.Timing(runs=3))
    assert not found.measurements
    assert [f.message.rpartition(": ")[2] for f in found.failures] == ["it is no plain file"] * 2
    for name in ("onnx", "tflite"):
        with pytest.raises(BadInputError, match="no plain file"):
            registry.runtime(name).describe(tmp_path / f"net.{name}")
    with pytest.raises(BadInputError, match="no plain file"):
        registry.runtime("onnx").open(tmp_path / "net.onnx")
    with pytest.raises(BadInputError, match="no plain file"):
        packing.unpack(tmp_path / "net.mkpack")
    with pytest.raises(BadInputError, match="no plain file"):
        Store(tmp_path).lines("lines.jsonl")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_to_themselves_are_refused(sketches: Path, tmp_path: Path) -> None:
    loop = tmp_path / "net.onnx"
    package = Path(packing.pack(sketches / "net.onnx", tmp_path / "net.mkpack").package)
    loop.symlink_to(loop)
    with pytest.raises(BadInputError, match="exists and is another model"):
        packing.unpack(package)
    with pytest.raises(BadInputError, match="there is no"):
        packing.pack(loop)
    (failure,) = pipeline.measure_files([tmp_path], [Host()], pipeline.Timing(runs=3)).failures
    assert "cannot be read" in failure.message


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the memory of a process")
def test_the_measuring_process_takes_no_more_memory_than_there_is() -> None:
    script = (
        "import runpy, sys; own = runpy.run_path(sys.argv[1]); limit = own['limit_memory'];"
        "machine = own['machine']; assert machine.free_memory() > 2**20;"
        "machine.free_memory = lambda: 300 * 2**20; limit();"
        "small = bytearray(50 * 2**20); print('small', flush=True); large = bytearray(300 * 2**20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(_session.RUNNER)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "small\n"
    assert "MemoryError" in done.stderr


def test_errors_are_one_line_whatever_they_quote() -> None:
    said = str(BadInputError(f"the name '{'x' * 5000}\n\x1b[2J\u202e' is wrong: give another"))
    assert said.isprintable()
    assert len(said) <= 390
    assert said.startswith("the name 'xxx")
    assert said.endswith("\\x1b[2J\\u202e' is wrong: give another")


def test_a_pipe_or_a_link_in_a_package_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    for name, make in (("pipe", os.mkfifo), ("link", lambda place: place.symlink_to("/etc/hostname"))):
        package = tmp_path / f"{name}.mlpackage"
        package.mkdir()
        make(package / "Manifest.json")
        with pytest.raises(BadInputError, match="a link or something that is no file"):
            registry.runtime("coreml").describe(package)


def test_a_package_without_a_manifest_stays_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    package = tmp_path / "net.mlpackage"
    package.mkdir()
    for content in (None, "{}", '{"itemInfoEntries": {"a": {"path": "../../x"}}, "rootModelIdentifier": "a"}', "[1]"):
        if content is not None:
            (package / "Manifest.json").write_text(content)
        before = sorted(package.rglob("*"))
        with pytest.raises(BadInputError, match=r"cannot read .* as a Core ML package"):
            registry.runtime("coreml").describe(package)
        assert sorted(package.rglob("*")) == before
