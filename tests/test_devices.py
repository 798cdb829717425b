"""The host device and its measuring script, in real processes with small real models."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import flatbuffers
import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper, numpy_helper

from mobilekit import registry
from mobilekit.devices import _session, host
from mobilekit.devices.host import Host
from mobilekit.errors import BadInputError
from mobilekit.types import BenchModel, BenchRequest, BenchResult

ROOM = Path(host.__file__).parent


def write_onnx(path: Path, channels: int = 8, depth: int = 2, size: int = 16) -> Path:
    """A chain of 3x3 convolutions with sigmoids, and a softmax."""
    generator = np.random.default_rng(0)
    nodes, weights, width = [], [], 3
    for layer in range(depth):
        values = generator.standard_normal((channels, width, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"weight{layer}"))
        nodes += [
            helper.make_node("Conv", [f"x{layer}", f"weight{layer}"], [f"y{layer}"], f"conv{layer}", pads=[1, 1, 1, 1]),
            helper.make_node("Sigmoid", [f"y{layer}"], [f"x{layer + 1}"], f"sigmoid{layer}"),
        ]
        width = channels
    nodes.append(helper.make_node("Softmax", [f"x{depth}"], ["out"], "softmax", axis=1))
    shapes = ("batch", 3, size, size), ("batch", channels, size, size)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(("x0", "out"), shapes, strict=True)
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def write_tflite(path: Path, channels: int = 8, size: int = 16) -> Path:
    """A 3x3 convolution, a sigmoid (both run in XNNPACK) and a floor-mod (which does not)."""
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.buffers, model.subgraphs, model.operatorCodes = 3, [schema.BufferT()], [graph], []
    graph.tensors, graph.operators = [], []

    def tensor(name: str, shape: list[int], values: np.ndarray | None = None) -> int:
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name, shape, schema.TensorType.FLOAT32, 0
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(values.astype(np.float32).tobytes(), np.uint8)
            model.buffers.append(buffer)
            made.buffer = len(model.buffers) - 1
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    def operator(code: int, inputs: list[int], output: int, options: Any = None) -> None:
        kind = schema.OperatorCodeT()
        kind.builtinCode = kind.deprecatedBuiltinCode = code
        kind.version = 1
        model.operatorCodes.append(kind)
        made = schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = len(model.operatorCodes) - 1, inputs, [output]
        if options is not None:
            made.builtinOptionsType, made.builtinOptions = schema.BuiltinOptions.Conv2DOptions, options
        graph.operators.append(made)

    shape = [1, size, size, channels]
    weights = np.random.default_rng(0).standard_normal((channels, 3, 3, 3))
    x, weight = tensor("image", [1, size, size, 3]), tensor("weight", [channels, 3, 3, 3], weights)
    bias, y = tensor("bias", [channels], np.zeros(channels)), tensor("conv", shape)
    options = schema.Conv2DOptionsT()
    options.strideW = options.strideH = options.dilationWFactor = options.dilationHFactor = 1
    operator(schema.BuiltinOperator.CONV_2D, [x, weight, bias], y, options)
    z, two, out = tensor("sigmoid", shape), tensor("two", [1], np.array([2.0])), tensor("out", shape)
    operator(schema.BuiltinOperator.LOGISTIC, [y], z)
    operator(schema.BuiltinOperator.FLOOR_MOD, [z, two], out)
    graph.inputs, graph.outputs = [x], [out]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BenchModel]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "garbage.onnx").write_bytes(b"no model at all")
    (folder / "garbage.tflite").write_bytes(b"no model at all")
    paths = [
        write_onnx(folder / "small.onnx"),
        write_onnx(folder / "large.onnx", 16, 4, 32),
        write_tflite(folder / "lite.tflite"),
        folder / "garbage.onnx",
        folder / "garbage.tflite",
        folder / "missing.onnx",
    ]
    return {path.name: BenchModel(name=path.stem, path=str(path), runtime=path.suffix[1:]) for path in paths}


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every test checks that nothing was left in the temporary folder."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def runner(path: Path = ROOM / "_runner.py") -> ModuleType:
    spec = importlib.util.spec_from_file_location("runner_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def altered_copy(folder: Path, *replaced: tuple[str, str]) -> Path:
    """A copy of the script, in another folder, in which lines are replaced."""
    source = (ROOM / "_runner.py").read_text(encoding="utf-8")
    for old, new in replaced:
        assert source.count(old) == 1
        source = source.replace(old, new)
    copy = folder / "_runner.py"
    copy.write_text(source, encoding="utf-8")
    for script in set(_session.SCRIPTS) - {_session.RUNNER}:
        (folder / script.name).write_bytes(script.read_bytes())
    return copy


def altered_runner(folder: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    """Let Host run a copy in which a line is replaced."""
    monkeypatch.setattr(_session, "RUNNER", altered_copy(folder, (old, new)))


def run(*models: BenchModel, **settings: Any) -> BenchResult:
    known = {"runs": 12, "max_seconds": 5.0, "warmup": 2, "timeout_seconds": 60.0, **settings}
    return Host().run(BenchRequest(models=models, **known))


def rows(result: BenchResult) -> list[tuple[str, str]]:
    return [(failure.stage, failure.subject) for failure in result.failures]


# ---------------------------------------------------------------- Host


def test_host_says_what_it_is() -> None:
    info = registry.device("host").info()
    assert (info.name, info.kind, info.origin) == ("host", "host", "host")
    assert info.soc
    assert info.cores == os.cpu_count()
    assert info.memory_mb
    assert info.memory_mb > 100
    assert set(info.versions) == {"onnx", "tflite"}


def test_host_takes_no_address() -> None:
    with pytest.raises(BadInputError, match="takes no address"):
        registry.device("host:7")


def test_samples_of_both_runtimes_pair_round_by_round(files: dict[str, BenchModel]) -> None:
    asked = files["small.onnx"], files["lite.tflite"], files["large.onnx"]
    result = run(*asked)
    assert result.failures == ()
    assert [m.model for m in result.measurements] == ["small", "lite", "large"]
    for measurement, model in zip(result.measurements, asked, strict=True):
        assert len(measurement.samples_ms) == len(measurement.cpu_samples_ms) == len(measurement.reference_ms) == 12
        assert min(measurement.samples_ms) > 0
        assert min(measurement.reference_ms) > 0
        assert measurement.load_ms > 0
        assert measurement.peak_memory_mb is None
        assert measurement.sha256 == hashlib.sha256(Path(model.path).read_bytes()).hexdigest()
        assert (measurement.device, measurement.origin, measurement.compute_unit) == ("host", "host", "cpu")
        assert set(measurement.versions) == {model.runtime, "python", "numpy"}
        assert datetime.fromisoformat(measurement.started_at).utcoffset() is not None


def test_one_model_has_a_peak_and_the_reference_is_optional(files: dict[str, BenchModel]) -> None:
    (measurement,) = run(files["large.onnx"], reference=False).measurements
    assert measurement.reference_ms == ()
    assert measurement.peak_memory_mb is not None
    assert 0 < measurement.peak_memory_mb < 500


def test_time_limit_stops_after_ten_rounds(files: dict[str, BenchModel]) -> None:
    (measurement,) = run(files["small.onnx"], runs=10**9, max_seconds=1e-3).measurements
    assert 10 <= len(measurement.samples_ms) < 20


def test_same_file_twice_is_measured_twice(files: dict[str, BenchModel]) -> None:
    assert len(run(files["small.onnx"], files["small.onnx"]).measurements) == 2


def test_dozens_of_models_share_their_rounds(files: dict[str, BenchModel]) -> None:
    models = [files["small.onnx"].model_copy(update={"name": f"m{number}"}) for number in range(60)]
    result = run(*models)
    assert [m.model for m in result.measurements] == [model.name for model in models]
    assert {len(m.samples_ms) for m in result.measurements} == {12}


# ---------------------------------------------------------------- what goes wrong


def test_bad_files_fail_and_the_others_are_measured(files: dict[str, BenchModel]) -> None:
    odd = files["small.onnx"].model_copy(update={"name": "odd", "runtime": "coreml"})
    names = "missing.onnx", "garbage.onnx", "small.onnx", "garbage.tflite"
    result = run(*[files[name] for name in names], odd)
    assert [m.model for m in result.measurements] == ["small"]
    assert rows(result) == [("load", "missing"), ("load", "odd"), ("load", "garbage"), ("load", "garbage")]
    assert "No such file" in result.failures[0].message
    assert "not coreml" in result.failures[1].message
    assert all(failure.remedy for failure in result.failures)


def test_nothing_to_measure_is_no_error(files: dict[str, BenchModel]) -> None:
    assert run().measurements == ()
    assert run(files["missing.onnx"]).measurements == ()


def test_crash_is_blamed_on_the_file_that_was_loaded(
    files: dict[str, BenchModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = 'say(f"load {index}")'
    altered_runner(tmp_path, monkeypatch, line, f'{line}\n        entry["name"] == "large" and os.abort()')
    result = run(files["small.onnx"], files["large.onnx"], files["lite.tflite"])
    assert [m.model for m in result.measurements] == ["small", "lite"]
    assert rows(result) == [("load", "large")]
    assert "SIGABRT while it loaded the file" in result.failures[0].message


def test_timeout_keeps_the_finished_rounds(files: dict[str, BenchModel]) -> None:
    asked = files["small.onnx"], files["large.onnx"]
    result = run(*asked, runs=10**9, max_seconds=100.0, timeout_seconds=7.0)
    assert rows(result) == [("measure", "small"), ("measure", "large")]
    assert "its time was over" in result.failures[0].message
    counts = [len(m.samples_ms) for m in result.measurements]
    assert counts[0] == counts[1] > 10
    assert f"{counts[0]} rounds were kept" in result.failures[0].message


def test_timeout_before_the_first_round(files: dict[str, BenchModel]) -> None:
    result = run(files["small.onnx"], timeout_seconds=0.01)
    assert result.measurements == ()
    assert rows(result) == [("measure", "small")]


def children(marker: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == os.getpid() and marker in command:
            found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the child in /proc")
def test_killed_child_keeps_the_finished_rounds(files: dict[str, BenchModel], scratch: Path) -> None:
    results: list[BenchResult] = []
    thread = threading.Thread(target=lambda: results.append(run(files["small.onnx"], runs=10**9, max_seconds=100.0)))
    thread.start()
    deadline = time.monotonic() + 40
    while not list(scratch.glob("*/result.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (child,) = children("_runner.py")
    os.kill(child, signal.SIGKILL)
    thread.join(20)
    (result,) = results
    assert len(result.measurements[0].samples_ms) > 10
    assert rows(result) == [("measure", "small")]
    assert "SIGKILL" in result.failures[0].message
    assert "memory" in result.failures[0].remedy


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the child in /proc")
def test_interrupt_ends_the_child(files: dict[str, BenchModel]) -> None:
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def interrupt() -> None:
        while not children("_runner.py"):
            time.sleep(0.02)
        time.sleep(0.3)
        signal.pthread_kill(main_thread, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    # what a shell starts in the background ignores the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run(files["small.onnx"], runs=10**9, max_seconds=30.0)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join(5)
    assert children("_runner.py") == []


def test_missing_temporary_folder_is_a_failure(
    files: dict[str, BenchModel], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(scratch / "gone"))
    result = run(files["small.onnx"])
    assert rows(result) == [("measure", "host")]
    assert "gone" in result.failures[0].remedy


def test_output_of_native_libraries_is_not_taken_for_a_stage() -> None:
    assert _session.STAGE.findall("load 0\nwarm 12\nreloading 3\nload x\nrounds\nall done\n") == [
        "load 0",
        "warm 12",
        "rounds",
    ]


def test_answer_that_does_not_validate_is_a_failure(files: dict[str, BenchModel]) -> None:
    request = BenchRequest(models=(files["small.onnx"],))
    document = b'{"schema": 1, "conditions": {}, "failures": [], "measurements": [{"samples_ms": [1.0]}]}'
    result = _session.assemble(document, request, {}, _session.Identity("board", "device"))
    assert result.measurements == ()
    assert rows(result) == [("measure", "board")]


# ---------------------------------------------------------------- the protocol


def test_rounds_go_on_to_the_least_of_both(files: dict[str, BenchModel]) -> None:
    (many,) = run(files["small.onnx"], runs=1, least_runs=40).measurements
    assert len(many.samples_ms) == 40
    (long,) = run(files["small.onnx"], runs=1, least_seconds=1.0).measurements
    assert sum(long.samples_ms) + sum(long.reference_ms) > 100
    (ended,) = run(files["small.onnx"], runs=1, least_runs=10**6, max_seconds=0.1).measurements
    assert 10 <= len(ended.samples_ms) < 10**6


@pytest.mark.parametrize(
    ("asked", "over"),
    [
        ({"number": 9, "seconds": 99.0}, False),
        ({"number": 10, "seconds": 5.1}, True),
        ({"number": 30, "seconds": 4.0}, False),
        ({"number": 50, "seconds": 2.0}, False),
        ({"number": 50, "seconds": 3.0}, True),
        ({"number": 1_000_000, "seconds": 0.0}, True),
    ],
)
def test_when_there_are_enough_rounds(asked: dict[str, float], over: bool) -> None:
    request = {"runs": 20, "least_runs": 50, "least_seconds": 3.0, "max_seconds": 5.0}
    assert runner().enough(request, **asked) == over


def test_the_first_run_and_the_warm_up_are_told(files: dict[str, BenchModel]) -> None:
    (measurement,) = run(files["large.onnx"], warmup=7).measurements
    assert measurement.first_run_ms is not None
    assert measurement.first_run_ms > 0
    assert (measurement.warmup, measurement.stable) == (7, None)
    assert (measurement.cool_to_c, measurement.waited_seconds) == (None, 0.0)
    (measurement,) = run(files["large.onnx"], warmup=1, warm_until_stable=True, max_seconds=30.0, runs=1).measurements
    assert measurement.stable in (True, False)
    assert measurement.warmup is not None
    assert measurement.warmup >= 15


def warmed(milliseconds: Iterable[float], limit: float = 0.8, wanted: bool = True) -> Any:
    """A model that takes so long in its runs, one after another, after it was warmed up."""
    script = runner()
    left = iter(milliseconds)

    def call() -> None:
        end = time.process_time() + next(left) / 1e3
        while time.process_time() < end:
            pass

    model = script.Model(0, SimpleNamespace(run=call), 1.0)
    script.warm(model, {"warmup": 3, "warm_until_stable": wanted}, limit)
    return model.row


def test_warming_up_ends_when_runs_are_alike() -> None:
    becoming_faster = [*np.linspace(60, 30, 5), *([12.0] * 200)]
    row = warmed(becoming_faster, limit=10.0)
    assert row["stable"]
    assert 5 < row["warmup"] < 200
    assert row["first_run_ms"] > 40


def test_warming_up_that_never_ends_is_given_up_and_told() -> None:
    growing = 10.0 * 1.05 ** np.arange(100)
    row = warmed(growing)
    assert row["stable"] is False
    assert row["warmup"] < 100


def test_without_being_asked_nobody_waits_until_it_is_warm() -> None:
    row = warmed([5.0] * 10, wanted=False)
    assert (row["warmup"], row["stable"]) == (3, None)


def test_golden_inputs_are_fed_and_outputs_returned(files: dict[str, BenchModel], tmp_path: Path) -> None:
    import onnxruntime
    from ai_edge_litert.interpreter import Interpreter

    images = np.random.default_rng(1).standard_normal((3, 3, 16, 16)).astype("<f4")
    session = onnxruntime.InferenceSession(files["small.onnx"].path)
    interpreter = Interpreter(model_path=files["lite.tflite"].path)
    interpreter.allocate_tensors()

    def lite(image: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    rows_last = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    wanted = {
        "small.onnx": np.concatenate([session.run(None, {"x0": images[i : i + 1]})[0] for i in range(3)]),
        "lite.tflite": np.concatenate([lite(rows_last[i : i + 1]) for i in range(3)]),
    }
    asked = []
    for name, values in (("small.onnx", images), ("lite.tflite", rows_last)):
        (tmp_path / name).write_bytes(values.tobytes())
        asked.append(files[name].model_copy(update={"inputs": (str(tmp_path / name),)}))
    result = run(*asked, return_outputs=True)
    assert result.failures == ()
    for measurement, (name, expected) in zip(result.measurements, wanted.items(), strict=True):
        (output,) = measurement.outputs
        assert (output.name, output.dtype) == ("out", "float32")
        found = np.frombuffer(base64.b64decode(output.data), "<f4").reshape(output.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)
        assert "outputs" not in measurement.model_dump()


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "holds 0 bytes"), (b"odd" * 5, "holds 15 bytes"), (None, "No such file")]
)
def test_inputs_that_do_not_fit_are_a_failure(
    files: dict[str, BenchModel], tmp_path: Path, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "in.bin").write_bytes(content)
    model = files["small.onnx"].model_copy(update={"inputs": (str(tmp_path / "in.bin"),)})
    result = run(model, files["lite.tflite"])
    assert [m.model for m in result.measurements] == ["lite"]
    (failure,) = result.failures
    assert (failure.stage, failure.subject) == ("load", "small")
    assert said in failure.message


def test_a_wrong_number_of_inputs_is_a_failure(files: dict[str, BenchModel], tmp_path: Path) -> None:
    (tmp_path / "in.bin").write_bytes(bytes(4 * 3 * 16 * 16))
    model = files["small.onnx"].model_copy(update={"inputs": (str(tmp_path / "in.bin"),) * 2})
    (failure,) = run(model).failures
    assert "2 files of inputs were given for the model's 1 inputs" in failure.message


def test_outputs_that_cannot_be_computed_cost_no_samples(
    files: dict[str, BenchModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    altered_runner(tmp_path, monkeypatch, "= model.opened.outputs()", '= model.opened.feed("nonsense")')
    result = run(files["small.onnx"], return_outputs=True)
    assert len(result.measurements[0].samples_ms) == 12
    assert rows(result) == [("measure", "small")]
    assert "after the rounds" in result.failures[0].message


def test_energy_is_that_of_one_run(tmp_path: Path) -> None:
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    for name, content in (("name", "package-0"), ("max_energy_range_uj", "1000000000"), ("energy_uj", "5")):
        (zone / name).write_text(content)

    def call() -> None:
        counter = zone / "energy_uj"
        counter.write_text(str(int(counter.read_text()) + 7000))

    script = runner()
    meter = script.machine.meter(tmp_path)
    meter.seconds = 0.05
    assert script.energy_mj(call, meter) == 7.0


def test_setting_the_clock_changes_nothing_but_the_start() -> None:
    """No script reads the time of day but once."""
    calls = [
        ast.unparse(node.func)
        for path in _session.SCRIPTS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    readers = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "datetime.now", "datetime.today"}
    assert [call for call in calls if call in readers] == ["datetime.now"]


# ---------------------------------------------------------------- operators


def test_operators_of_onnx_carry_the_nodes_names(files: dict[str, BenchModel]) -> None:
    (measurement,) = run(files["small.onnx"], per_operator=True).measurements
    names = [operator.name for operator in measurement.operators]
    assert names.count("softmax") == 1
    # Fused and reordered convolutions are named after their output tensor.
    assert [name[:2] for name in names if name.startswith("x")] == ["x1", "x2"]
    assert {"Conv", "Softmax"} <= {operator.kind for operator in measurement.operators}
    assert all(operator.median_us > 0 for operator in measurement.operators)


def test_operators_of_tflite_include_delegated_ones(files: dict[str, BenchModel]) -> None:
    result = run(files["lite.tflite"], per_operator=True)
    assert result.failures == ()
    kinds = [operator.kind for operator in result.measurements[0].operators]
    assert kinds == ["Convolution", "Sigmoid", "FLOOR_MOD"]
    assert len({operator.name for operator in result.measurements[0].operators}) == 3


def test_crashing_profiler_costs_only_that_models_operators(
    files: dict[str, BenchModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = 'row["operators"] = tflite_operators('
    altered_runner(tmp_path, monkeypatch, line, f"os.abort()\n                    {line}")
    result = run(files["lite.tflite"], files["small.onnx"], per_operator=True)
    assert [len(m.samples_ms) for m in result.measurements] == [12, 12]
    assert result.measurements[0].operators == ()
    assert result.measurements[1].operators != ()
    assert rows(result) == [("operators", "lite")]


# ---------------------------------------------------------------- the script

FOREVER = {"runs": 10**9, "max_seconds": 1000.0, "warmup": 0}


def started(folder: Path, script: Path, *models: BenchModel, **settings: Any) -> subprocess.Popen[bytes]:
    """The script at work, watching the pipe that is its standard input."""
    request = BenchRequest(models=models, **{**FOREVER, **settings})
    (folder / "request.json").write_text(_session.request_text(request, lambda path: path), encoding="utf-8")
    command = [sys.executable, str(script), "--watch-stdin", "request.json", "result.json"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 40
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_script_ends_when_its_client_is_gone(files: dict[str, BenchModel], tmp_path: Path) -> None:
    with started(tmp_path, _session.RUNNER, files["small.onnx"]) as process:
        wait_for(tmp_path / "result.json")
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(5) == 4
    kept = json.loads((tmp_path / "result.json").read_text())["measurements"][0]
    assert len(kept["samples_ms"]) > 10


SHORT = ("GRACE_SECONDS = 5.0", "GRACE_SECONDS = 0.4")


def test_the_script_ends_itself_when_its_time_is_over(files: dict[str, BenchModel], tmp_path: Path) -> None:
    script = altered_copy(tmp_path, SHORT)
    with started(tmp_path, script, files["small.onnx"], timeout_seconds=1.0) as process:
        assert process.wait(20) == 5
        assert process.stderr is not None
        assert b"the time that was asked for is over" in process.stderr.read()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the kernel's timer ends it")
def test_native_code_that_holds_python_does_not_outlive_its_time(files: dict[str, BenchModel], tmp_path: Path) -> None:
    line = "    waited = machine.cool_down("
    hangs = "    import ctypes; ctypes.PyDLL(None).sleep(60)\n"
    script = altered_copy(tmp_path, SHORT, (line, hangs + line))
    with started(tmp_path, script, files["small.onnx"], timeout_seconds=1.0) as process:
        assert process.wait(20) == -signal.SIGALRM


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the child in /proc")
def test_the_profiling_child_ends_with_the_script(files: dict[str, BenchModel], tmp_path: Path) -> None:
    line = '    runs = max(OPERATOR_MINIMUM, min(OPERATOR_RUNS, request["runs"]))'
    written = 'Path("child").write_text(str(os.getpid())); time.sleep(60)'
    script = altered_copy(tmp_path, (line, f"    {written}\n{line}"))
    with started(tmp_path, script, files["small.onnx"], runs=3, per_operator=True) as process:
        wait_for(tmp_path / "child")
        process.kill()
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    deadline = time.monotonic() + 5
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":  # nobody may reap it here
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", [script.name for script in _session.SCRIPTS])
def test_script_stands_alone_and_suits_python_3_9(name: str) -> None:
    tree = ast.parse((ROOM / name).read_text(encoding="utf-8"), feature_version=(3, 9))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(module.startswith(("mobilekit", "pydantic")) for module in modules)


def test_every_model_meets_every_neighbour_equally() -> None:
    script = runner()
    assert [script.order(2, number) for number in range(4)] == [[0, 1], [1, 0], [1, 0], [0, 1]]
    turns = [tuple(script.order(3, number)) for number in range(6)]
    assert sorted(turns) == [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


def test_rounds_are_interleaved_and_stay_paired_when_a_model_stops(tmp_path: Path) -> None:
    script = runner()
    calls: list[str] = []

    def model(index: int, lasts: int) -> Any:
        def call() -> None:
            calls.append("ABC"[index])
            if calls.count("ABC"[index]) > lasts:
                raise RuntimeError("worn out")

        made = script.Model(index, SimpleNamespace(run=call), 1.0)
        made.settle = 1 if index == 0 else 0
        return made

    journal = script.Journal(tmp_path / "result.json")
    journal.models = [model(0, 99), model(1, 3), model(2, 99)]
    asked = {"max_seconds": 60, "runs": 12, "least_runs": 0, "least_seconds": 0}
    script.rounds(asked, journal, lambda: calls.append("R"))
    assert "".join(calls[:23]) == "RAABCR" + "RCBAAR" + "RBCAAR" + "RAACB"  # in the fourth B fails
    assert all(a > 0 for m in journal.models for a in m.row["reference_ms"])
    assert [m.index for m in journal.models] == [0, 2]
    lists = "samples_ms", "cpu_samples_ms", "reference_ms"
    assert {len(m.row[name]) for m in journal.models for name in lists} == {12}
    (failure,) = journal.failures
    assert (failure["stage"], failure["index"]) == ("measure", 1)
    assert "worn out (in round 4)" in failure["message"]
