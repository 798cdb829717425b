"""Times model files on the machine it runs on; stands alone, so that it can be copied to a board.

    python _runner.py REQUEST.json RESULT.json

Needs Python 3.9, numpy and the runtimes of the files. docs/bench_protocol.md describes both files; RESULT.json is
replaced as a whole every few seconds, so that what was measured before a crash is still there. What is being done is
written to standard output ("load 3"), so that a crash of native code can be blamed on a file.
"""

# The rules below want Python 3.11; boards have 3.9.
# ruff: noqa: B905, UP017

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Request = dict[str, Any]
Run = Callable[[], object]
Operators = list[dict[str, Any]]

MINIMUM_ROUNDS = 10
CHECKPOINT_SECONDS = 2.0
WARMUP_SHARE = 0.25
"""Warming up all models takes at most this share of the request's max_seconds (but one run each)."""
SETTLE = ((2.0, 2), (20.0, 1))
"""Models faster than so many milliseconds run so many times untimed before each timed run.

What ran before has filled the caches with its data. A 0.19 ms network took 0.38 ms right after the reference product,
0.22 ms after one untimed run and 0.195 ms after two, whatever had run before; slow models refill a cache in passing.
"""
OPERATOR_RUNS = 30
OPERATOR_WARMUP = 5
OPERATOR_MINIMUM = 10
REFERENCE_SIZE = 512
REFERENCE_EVERY = 0.02
"""Seconds of a round between two runs of the reference product."""
MEMORY_SHARE = 0.9
CONTAINERS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of a container's memory, in both versions of control groups."""
OPERATOR_REMEDY = "the whole model's time stands; leave out per_operator, or profile it in another runtime"


class Model:
    """A loaded file and what was measured of it."""

    def __init__(self, index: int, run: Run, load_ms: float) -> None:
        self.index = index
        self.run = run
        self.load_ms = load_ms
        self.settle = 0
        self.wall_ms: list[float] = []
        self.cpu_ms: list[float] = []
        self.reference_ms: list[float] = []
        self.operators: Operators = []
        self.peak_memory_mb: float | None = None


class Journal:
    """Keeps the result file up to date."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.conditions: dict[str, Any] = {}
        self.models: list[Model] = []
        self.failures: list[dict[str, Any]] = []
        self.saved = time.monotonic()
        self.parent = os.getppid()

    def fail(self, stage: str, index: int, message: str, remedy: str) -> None:
        """Note what did not work, and forget the model's samples unless only its operators are missing."""
        self.failures.append({"stage": stage, "index": index, "message": message, "remedy": remedy})
        if stage != "operators":
            self.models = [model for model in self.models if model.index != index]

    def save(self) -> None:
        """Replace the result file in one step: a reader never sees half of it."""
        document = {
            "schema": 1,
            "conditions": self.conditions,
            "measurements": [
                {
                    "index": model.index,
                    "load_ms": model.load_ms,
                    "samples_ms": model.wall_ms,
                    "cpu_samples_ms": model.cpu_ms,
                    "reference_ms": model.reference_ms,
                    "peak_memory_mb": model.peak_memory_mb,
                    "operators": model.operators,
                }
                for model in self.models
            ],
            "failures": self.failures,
        }
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(json.dumps(document), encoding="utf-8")
        partial.replace(self.path)
        self.saved = time.monotonic()
        self.parent = os.getppid()


def say(stage: str) -> None:
    """Tell the starter what comes next."""
    print(stage, flush=True)


# ---------------------------------------------------------------- the machine


def busy_ticks() -> dict[int, int]:
    """Clock ticks that each CPU has worked since boot."""
    ticks = {}
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, _idle, _iowait, *rest = (int(value) for value in fields[:8])
            ticks[int(name[3:])] = user + nice + system + sum(rest)
    return ticks


def pin(threads: int) -> list[int]:
    """Bind this process to the `threads` least busy CPUs that it may use; empty where the system has no such call."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))
    try:
        before = busy_ticks()
        time.sleep(0.05)
        after = busy_ticks()
        allowed.sort(key=lambda cpu: after[cpu] - before[cpu])
    except (OSError, ValueError, KeyError):
        pass
    chosen = allowed[:threads]
    try:
        os.sched_setaffinity(0, chosen)
    except OSError:
        return []
    return chosen


def one_blas_thread() -> None:
    """Keep numpy to one thread; only works before numpy is imported."""
    for name in ("OMP", "OPENBLAS", "MKL", "VECLIB", "NUMEXPR"):
        os.environ[name + ("_MAXIMUM_THREADS" if name == "VECLIB" else "_NUM_THREADS")] = "1"


def temperature_c() -> float | None:
    """The hottest readable thermal zone in degrees Celsius, or None."""
    readings = []
    for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        with contextlib.suppress(OSError, ValueError):
            readings.append(int(zone.read_text(encoding="ascii")) / 1000)
    return max((value for value in readings if 0 < value < 150), default=None)


def peak_memory_mb(reset: bool = False) -> float | None:
    """Largest resident memory so far in MB (10^6 bytes), or None where the system does not say.

    Linux: VmHWM, which starts anew with the program; ru_maxrss still holds the size of the parent that forked us.
    """
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest * (1 if sys.platform == "darwin" else 1024) / 1e6


def free_memory() -> int | None:
    """Bytes that this process can take before the system, or its container, runs out; None: neither says."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    for limit, used in CONTAINERS:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is "max"
            found.append(int(Path(limit).read_text(encoding="ascii")) - int(Path(used).read_text(encoding="ascii")))
    return max(0, min(found)) if found else None


def limit_memory() -> None:
    """Let a file that asks for more memory than there is fail, instead of the machine."""
    free = free_memory()
    if free is None:
        return
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = int(MEMORY_SHARE * free)
        if hard == resource.RLIM_INFINITY or wanted < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


# ---------------------------------------------------------------- the runtimes


def tensor(shape: list[Any], dtype: str) -> Any:
    """An input: seeded normal numbers for floats, zeros for everything else. Unknown extents are 1."""
    import numpy as np

    extents = [size if isinstance(size, int) and size > 0 else 1 for size in shape]
    if not dtype.startswith("float"):
        return np.zeros(extents, dtype=dtype)
    return np.random.default_rng(0).standard_normal(extents, dtype=np.float32).astype(dtype)


def onnx_session(path: str, threads: int, profile_prefix: str = "") -> tuple[Any, dict[str, Any]]:
    """A session without spinning threads, and its inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # A thread that spins while it waits would burn the CPU time that is being measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile_prefix:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = {"float": "float32", "double": "float64"}
    feed = {}
    for entry in session.get_inputs():
        kind = entry.type[len("tensor(") : -1]
        feed[entry.name] = tensor(entry.shape, kinds.get(kind, kind))
    return session, feed


def load_onnx(path: str, threads: int) -> Run:
    """A call that runs the file once in ONNX Runtime."""
    session, feed = onnx_session(path, threads)
    return lambda: session.run(None, feed)


def interpreter_module() -> Any:
    """LiteRT's package, or that of its predecessor, which older boards have; its interpreter is imported."""
    for name in ("ai_edge_litert", "tflite_runtime"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name + ".interpreter")
            return sys.modules[name]
    raise ImportError("neither ai_edge_litert nor tflite_runtime is installed")


def new_interpreter(path: str, threads: int) -> Any:
    """An interpreter of a file with its tensors allocated."""
    interpreter = interpreter_module().interpreter.Interpreter(model_path=path, num_threads=threads)
    interpreter.allocate_tensors()
    return interpreter


def load_tflite(path: str, threads: int) -> Run:
    """A call that runs the file once in LiteRT. Inputs are set once: invoking does not overwrite them."""
    interpreter = new_interpreter(path, threads)
    feed_interpreter(interpreter)
    run: Run = interpreter.invoke
    return run


def feed_interpreter(interpreter: Any) -> list[Any]:
    """Set an interpreter's inputs; returns them."""
    import numpy as np

    arrays = []
    for entry in interpreter.get_input_details():
        arrays.append(tensor(entry["shape"].tolist(), np.dtype(entry["dtype"]).name))
        interpreter.set_tensor(entry["index"], arrays[-1])
    return arrays


LOADERS: dict[str, Callable[[str, int], Run]] = {"onnx": load_onnx, "tflite": load_tflite}
PACKAGES = {"onnx": "onnxruntime", "tflite": "ai-edge-litert"}


def import_runtimes(names: set[str]) -> dict[str, str]:
    """Import runtimes before anything is timed; returns the versions of those that are there."""
    import numpy as np

    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for name in names & set(LOADERS):
        with contextlib.suppress(ImportError):
            module = importlib.import_module("onnxruntime") if name == "onnx" else interpreter_module()
            versions[name] = str(getattr(module, "__version__", "unknown"))
    return versions


# ---------------------------------------------------------------- timing


def load_all(request: Request, journal: Journal) -> None:
    """Load every model; what cannot be loaded becomes a failure."""
    for index, entry in enumerate(request["models"]):
        say(f"load {index}")
        runtime = entry["runtime"]
        if runtime not in LOADERS:
            message = f"this machine runs {' and '.join(LOADERS)} files, not {runtime}"
            journal.fail("load", index, message, "measure this file on a device that runs it")
            continue
        if runtime not in journal.conditions["versions"]:
            message = f"{PACKAGES[runtime]} is not installed on this machine"
            journal.fail("load", index, message, f"pip install {PACKAGES[runtime]}")
            continue
        start = time.perf_counter_ns()
        try:
            run = LOADERS[runtime](entry["path"], request["threads"])
        except Exception as error:  # noqa: BLE001 (native runtimes raise anything)
            journal.fail("load", index, sentence(error), "check that the file is a whole model of this runtime")
            continue
        journal.models.append(Model(index, run, (time.perf_counter_ns() - start) / 1e6))


def sentence(error: Exception) -> str:
    """An exception as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def attempt(model: Model, journal: Journal) -> bool:
    """Run a model once, untimed; False when it failed and was dropped."""
    try:
        model.run()
    except Exception as error:  # noqa: BLE001
        journal.fail("measure", model.index, sentence(error), "check that the file runs on zeros of its input shape")
        return False
    return True


def warm_up(request: Request, journal: Journal) -> None:
    """Run every model some times: lazy allocation, weight packing and caches happen here."""
    limit = WARMUP_SHARE * request["max_seconds"] / max(1, len(journal.models))
    for model in list(journal.models):
        say(f"warm {model.index}")
        start = time.monotonic()
        fastest = float("inf")
        # At least one run even where no warm-up is asked for, so that a file that cannot run fails here.
        for _ in range(max(1, request["warmup"])):
            begin = time.perf_counter()
            if not attempt(model, journal):
                break
            fastest = min(fastest, time.perf_counter() - begin)
            if time.monotonic() - start > limit:
                break
        model.settle = next((count for limit_ms, count in SETTLE if fastest * 1e3 < limit_ms), 0)


def order(count: int, number: int) -> list[int]:
    """Positions in the order of a round: rotated every second round, and run backwards in between.

    Rotation alone would leave every model behind the same neighbour, whose cache and clock state it inherits.
    """
    start = number // 2 % count
    turn = [(start + step) % count for step in range(count)]
    return turn[::-1] if number % 2 else turn


def reference_product() -> Run:
    """A call that multiplies two 512x512 float32 matrices."""
    import numpy as np

    left, right = (tensor([REFERENCE_SIZE, REFERENCE_SIZE], "float32") for _ in range(2))
    out = np.empty_like(left)
    return lambda: np.matmul(left, right, out=out)


def one_round(runs: list[tuple[Run, int]], number: int, reference: Run | None) -> list[tuple[float, float, float]]:
    """Wall and CPU milliseconds of each call, in the order of `runs`, and the reference's. Raises RunError.

    Each call comes with the number of untimed calls before the timed one. The reference runs before the first call,
    after the last, and in between whenever REFERENCE_EVERY has passed; a call's is the mean of the two around it: a
    shared machine changes its speed within a round of many models.
    """
    times = [(0.0, 0.0, 0.0)] * len(runs)
    turn = order(len(runs), number)
    waiting: list[int] = []
    before = timed(reference)[1] if reference else 0.0
    since = time.monotonic()
    for position in turn:
        run, settle = runs[position]
        try:
            for _ in range(settle):
                run()
            times[position] = (*timed(run), 0.0)
        except Exception as error:
            raise RunError(position, error) from error
        waiting.append(position)
        if reference and (position == turn[-1] or time.monotonic() - since > REFERENCE_EVERY):
            after = timed(reference)[1]
            for index in waiting:
                times[index] = (*times[index][:2], (before + after) / 2)
            before, since, waiting = after, time.monotonic(), []
    return times


def timed(run: Run) -> tuple[float, float]:
    """Wall and CPU milliseconds of a call."""
    wall, cpu = time.perf_counter_ns, time.process_time_ns
    cpu_start = cpu()
    wall_start = wall()
    run()
    wall_end = wall()
    cpu_end = cpu()
    return (wall_end - wall_start) / 1e6, (cpu_end - cpu_start) / 1e6


class RunError(Exception):
    """A model stopped working in a round."""

    def __init__(self, position: int, error: Exception) -> None:
        super().__init__(sentence(error))
        self.position = position


def rounds(request: Request, journal: Journal, reference: Run | None) -> None:
    """Time all models in turn, round after round. Only whole rounds are kept, so that samples stay paired."""
    say("rounds")
    deadline = time.monotonic() + request["max_seconds"]
    number = 0
    while journal.models and number < request["runs"]:
        if number >= MINIMUM_ROUNDS and time.monotonic() > deadline:
            break
        runs = [(model.run, model.settle) for model in journal.models]
        try:
            times = one_round(runs, number, reference)
        except RunError as error:
            failed = journal.models[error.position]
            journal.fail("measure", failed.index, f"{error} (in round {number + 1})", "run the file by itself")
            continue
        for model, (wall, cpu, around) in zip(journal.models, times):
            model.wall_ms.append(wall)
            model.cpu_ms.append(cpu)
            if reference:
                model.reference_ms.append(around)
        number += 1
        if os.getppid() != journal.parent:  # whoever asked is gone: do not disturb the machine for nobody
            raise SystemExit("the process that asked for the measurement has ended")
        if time.monotonic() - journal.saved > CHECKPOINT_SECONDS:
            journal.save()


def measure(request: Request, journal: Journal) -> None:
    """The whole protocol except the operators' times."""
    cpus = pin(request["threads"])
    one_blas_thread()
    versions = import_runtimes({entry["runtime"] for entry in request["models"]})
    reference = reference_product() if request["reference"] else None
    if reference:
        reference()
    journal.conditions.update(
        started_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions,
        compute_unit="cpu",
        cpus=cpus,
        temperature_before_c=temperature_c(),
        temperature_after_c=None,
    )
    before = peak_memory_mb(reset=True)
    load_all(request, journal)
    warm_up(request, journal)
    gc.collect()
    gc.disable()
    rounds(request, journal, reference)
    gc.enable()
    after = peak_memory_mb()
    if len(request["models"]) == 1 and before is not None and after is not None:
        for model in journal.models:
            model.peak_memory_mb = max(0.0, after - before)
    journal.conditions["temperature_after_c"] = temperature_c()
    journal.save()


# ---------------------------------------------------------------- operators


def onnx_operators(path: str, threads: int, folder: str, limit: tuple[int, float]) -> Operators:
    """Median microseconds of each fused node, in the order in which they run, from ONNX Runtime's profile.

    `limit` is the number of runs and the seconds after which fewer will do.
    """
    runs, seconds = limit
    session, feed = onnx_session(path, threads, profile_prefix=os.path.join(folder, "profile"))
    begin = time.monotonic()
    done = 0
    while done < OPERATOR_WARMUP + runs and (done < OPERATOR_MINIMUM or time.monotonic() - begin < seconds):
        session.run(None, feed)
        done += 1
    profile = Path(session.end_profiling())
    events = json.loads(profile.read_text(encoding="utf-8"))
    profile.unlink()
    times: dict[tuple[str, str], list[int]] = {}
    kinds: dict[tuple[str, str], str] = {}
    for event in events:
        if event["cat"] != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        facts = event["args"]
        node = (event["name"][: -len("_kernel_time")], facts.get("node_index", ""))
        times.setdefault(node, []).append(event["dur"])
        kinds[node] = facts.get("op_name", "")
    skip = min(OPERATOR_WARMUP, done // 2)
    return [
        {
            "name": node[0] or f"{kinds[node]}_{node[1]}",
            "kind": kinds[node],
            # Durations are cut to whole microseconds: 7 means 7 up to 8, and the median is interpolated in there.
            "median_us": statistics.median_grouped(spent[skip:]) + 0.5,
        }
        for node, spent in times.items()
    ]


def tflite_operators(path: str, threads: int, limit: tuple[int, float]) -> Operators:
    """Median microseconds of each operator, those inside the XNNPACK delegate included."""
    interpreter = new_interpreter(path, threads)
    inputs = feed_interpreter(interpreter)
    interpreter.invoke()
    outputs = [interpreter.get_tensor(entry["index"]) for entry in interpreter.get_output_details()]
    # By its path: the runner has taken its own folder off the import path.
    where = Path(__file__).resolve().with_name("_litert_profiler.py")
    spec = importlib.util.spec_from_file_location("_litert_profiler", where)
    if spec is None or spec.loader is None:
        raise ImportError(f"{where} cannot be loaded")
    profiler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(profiler)
    with contextlib.closing(profiler.CompiledModel(path, threads)) as model:
        found: Operators = profiler.operator_times(model, inputs, outputs, *limit)
    return found


def profile_operators(request: Request, answer: Path) -> None:
    """What the child process does: write a line before and after each model that is still to be profiled."""
    one_blas_thread()
    runs = max(OPERATOR_MINIMUM, min(OPERATOR_RUNS, request["runs"]))
    limit = (runs, max(1.0, request["max_seconds"] / max(1, len(request["models"]))))
    with answer.open("a", encoding="utf-8") as lines:
        for index in request["indices"]:
            print(json.dumps({"index": index}), file=lines, flush=True)
            entry = request["models"][index]
            row: dict[str, Any] = {"index": index}
            try:
                if entry["runtime"] == "onnx":
                    row["operators"] = onnx_operators(entry["path"], request["threads"], str(answer.parent), limit)
                else:
                    row["operators"] = tflite_operators(entry["path"], request["threads"], limit)
            except Exception as error:  # noqa: BLE001 (one file's profile must not cost the others')
                row["message"] = sentence(error)
            print(json.dumps(row), file=lines, flush=True)


def add_operators(request: Request, journal: Journal) -> None:
    """Profile every measured model in a child process, which is started again behind a model that crashed it."""
    say("operators")
    models = {model.index: model for model in journal.models}
    waiting = list(models)
    while waiting:
        # Beside the result, where the starter cleans up even if it has to kill us.
        with tempfile.TemporaryDirectory(dir=journal.path.parent) as folder:
            asked, answer = Path(folder, "request.json"), Path(folder, "answer.jsonl")
            asked.write_text(json.dumps({**request, "indices": waiting}), encoding="utf-8")
            command = [sys.executable, str(Path(__file__).resolve()), "--operators", str(asked), str(answer)]
            code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
            rows = (
                [json.loads(line) for line in answer.read_text(encoding="utf-8").splitlines()]
                if answer.exists()
                else []
            )
        for row in rows:
            if "operators" in row:
                models[row["index"]].operators = row["operators"]
            elif "message" in row:
                journal.fail("operators", row["index"], row["message"], OPERATOR_REMEDY)
        finished = {row["index"] for row in rows if len(row) > 1}
        waiting = [index for index in waiting if index not in finished]
        if waiting:
            message = f"the runtime's profiler crashed (exit code {code})"
            journal.fail("operators", waiting.pop(0), message, OPERATOR_REMEDY)
        journal.save()


def main(arguments: list[str]) -> int:
    """Measure as asked; 0 also where models failed, for that is part of the result."""
    # The folder of this script is no place to import from: its files could hide installed packages.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    if len(arguments) not in (2, 3):
        print("usage: python _runner.py REQUEST.json RESULT.json", file=sys.stderr)
        return 2
    request: Request = json.loads(Path(arguments[-2]).read_text(encoding="utf-8"))
    limit_memory()
    if arguments[0] == "--operators":
        profile_operators(request, Path(arguments[-1]))
        return 0
    journal = Journal(Path(arguments[-1]))
    measure(request, journal)
    if request["per_operator"]:
        add_operators(request, journal)
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
