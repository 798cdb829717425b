"""Times model files on the machine it runs on; stands alone, so that it can be copied to a board.

    python _runner.py [--watch-stdin] REQUEST.json RESULT.json

Needs Python 3.9, numpy and the runtimes of the files. docs/bench_protocol.md describes both files; RESULT.json is
replaced as a whole every few seconds, so that what was measured before a crash is still there. What is being done is
written to standard output ("load 3"), so that a crash of native code can be blamed on a file.

It ends itself (exit code 5) five seconds after the request's timeout_seconds, and with --watch-stdin at once (4) when
its standard input ends: nothing is left running on a device whose client is gone.
"""

# The rules below want Python 3.11; boards have 3.9.
# ruff: noqa: B905, UP017

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

Request = dict[str, Any]
Run = Callable[[], object]
Operators = list[dict[str, Any]]

MINIMUM_ROUNDS = 10
MOST_ROUNDS = 1_000_000
"""Whatever is asked for: a result file holds no more."""
CHECKPOINT_SECONDS = 2.0
WARMUP_SHARE, WARMUP_SECONDS = 0.25, 30.0
"""Warming up all models takes at most this share of the request's max_seconds, and so long (but one run each)."""
STABLE = 1.05
WINDOWS = 3
WINDOW_RUNS, WINDOW_SECONDS = 5, 0.1
"""A model is warm when the medians of its last three windows of runs are within 5 % of each other: then it became
neither faster nor slower. A window is at least five runs and a tenth of a second, in which a processor has long changed
its frequency."""
SETTLE = ((2.0, 2), (20.0, 1))
"""Models faster than so many milliseconds run so many times untimed before each timed run.

What ran before has filled the caches with its data. A 0.19 ms network took 0.38 ms right after the reference product,
0.22 ms after one untimed run and 0.195 ms after two, whatever had run before; slow models refill a cache in passing.
"""
ENERGY_RUNS = 3
"""At least so many runs between two readings of the meter."""
OPERATOR_RUNS = 30
OPERATOR_WARMUP = 5
OPERATOR_MINIMUM = 10
REFERENCE_SIZE = 512
REFERENCE_EVERY = 0.02
"""Seconds of a round between two runs of the reference product."""
MEMORY_SHARE = 0.9
CLIENT_GONE, TIME_OVER = 4, 5
"""Exit codes."""
LONGEST_SECONDS = 1e7
"""That the kernel's timer is set to."""
GRACE_SECONDS = 5.0
"""Beyond timeout_seconds, in which the starter ends it; and once more for the kernel where native code holds Python."""
OPERATOR_REMEDY = "the whole model's time stands; leave out per_operator, or profile it in another runtime"


def beside(name: str) -> ModuleType:
    """A file that was copied with this one, by its path: the folder is no place to import from, for its files could
    hide installed packages."""
    where = Path(__file__).resolve().with_name(name + ".py")
    spec = importlib.util.spec_from_file_location(name, where)
    if spec is None or spec.loader is None:
        raise ImportError(f"{where} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


machine = beside("_runner_machine")
models = beside("_runner_models")


class Model:
    """A loaded file and what was measured of it."""

    def __init__(self, index: int, opened: Any, load_ms: float) -> None:
        self.index = index
        self.opened = opened
        self.run: Run = opened.run
        self.settle = 0
        self.wall_ms: list[float] = []
        self.row: dict[str, Any] = {
            "index": index,
            "load_ms": load_ms,
            "first_run_ms": None,
            "warmup": 0,
            "stable": None,
            "samples_ms": self.wall_ms,
            "cpu_samples_ms": [],
            "reference_ms": [],
            "peak_memory_mb": None,
            "energy_mj": None,
            "instructions": None,
            "operators": [],
            "outputs": [],
        }
        """As the result file holds it."""

    def add(self, wall: float, cpu: float, reference: float | None) -> None:
        """Keep a round."""
        self.wall_ms.append(wall)
        self.row["cpu_samples_ms"].append(cpu)
        if reference is not None:
            self.row["reference_ms"].append(reference)


class Journal:
    """Keeps the result file up to date."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.conditions: dict[str, Any] = {}
        self.models: list[Model] = []
        self.failures: list[dict[str, Any]] = []
        self.saved = time.monotonic()
        self.parent = os.getppid()

    def note(self, stage: str, index: int, message: str, remedy: str) -> None:
        """Keep what did not work."""
        self.failures.append({"stage": stage, "index": index, "message": message, "remedy": remedy})

    def fail(self, stage: str, index: int, message: str, remedy: str) -> None:
        """Keep why a model could not be measured, and forget its samples."""
        self.note(stage, index, message, remedy)
        self.models = [model for model in self.models if model.index != index]

    def save(self) -> None:
        """Replace the result file in one step: a reader never sees half of it."""
        document = {
            "schema": 1,
            "conditions": self.conditions,
            "measurements": [model.row for model in self.models],
            "failures": self.failures,
        }
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(json.dumps(document), encoding="utf-8")
        partial.replace(self.path)
        self.saved = time.monotonic()


def say(stage: str) -> None:
    """Tell the starter what comes next."""
    print(stage, flush=True)


# ---------------------------------------------------------------- its own end


class Watch:
    """Ends this process and its child when nobody waits for the result any more.

    It stands on monotonic time: setting the clock changes nothing.
    """

    def __init__(self) -> None:
        self.child: subprocess.Popen[bytes] | None = None

    def over(self, seconds: float) -> None:
        """End the process so many seconds from now."""
        seconds = min(seconds, LONGEST_SECONDS)
        if hasattr(signal, "setitimer"):  # the kernel's own timer: native code may hold Python's lock for good
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS)
        end = time.monotonic() + seconds

        def wait() -> None:
            while time.monotonic() < end:
                time.sleep(min(3600.0, max(0.0, end - time.monotonic())))
            self.end(TIME_OVER, "the time that was asked for is over")

        threading.Thread(target=wait, daemon=True).start()

    def standard_input(self) -> None:
        """End the process when its standard input ends."""

        def wait() -> None:
            with contextlib.suppress(OSError):  # an input that cannot be read is one that has ended
                while os.read(0, 4096):
                    pass
            self.end(CLIENT_GONE, "standard input has ended: the client is gone")

        threading.Thread(target=wait, daemon=True).start()

    def end(self, code: int, reason: str) -> None:
        """Leave without another word: what is measured is in the result file."""
        if self.child is not None:
            with contextlib.suppress(OSError):
                self.child.kill()
        with contextlib.suppress(OSError):
            os.write(2, (reason + "\n").encode())
        os._exit(code)

    def run(self, command: list[str]) -> int:
        """Run a command to its end; its exit code. It ends when this process does, whatever ended that: its standard
        input is ours to hold."""
        with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
            self.child = child
            code = child.wait()
        self.child = None
        return code


WATCH = Watch()


# ---------------------------------------------------------------- loading and warming up


def one_blas_thread() -> None:
    """Keep numpy to one thread; only works before numpy is imported."""
    for name in ("OMP", "OPENBLAS", "MKL", "VECLIB", "NUMEXPR"):
        os.environ[name + ("_MAXIMUM_THREADS" if name == "VECLIB" else "_NUM_THREADS")] = "1"


def limit_memory() -> None:
    """Let a file that asks for more memory than there is fail, instead of the machine."""
    free = machine.free_memory()
    if free is None:
        return
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = int(MEMORY_SHARE * free)
        if hard == resource.RLIM_INFINITY or wanted < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def load_all(request: Request, journal: Journal) -> None:
    """Load every model; what cannot be loaded becomes a failure."""
    for index, entry in enumerate(request["models"]):
        say(f"load {index}")
        runtime = entry["runtime"]
        if runtime not in models.LOADERS:
            message = f"this machine runs {' and '.join(models.LOADERS)} files, not {runtime}"
            journal.fail("load", index, message, "measure this file on a device that runs it")
            continue
        if runtime not in journal.conditions["versions"]:
            package = models.PACKAGES[runtime]
            journal.fail("load", index, f"{package} is not installed on this machine", f"pip install {package}")
            continue
        start = time.perf_counter_ns()
        try:
            opened = models.LOADERS[runtime](entry["path"], request["threads"], entry["inputs"])
        except Exception as error:  # noqa: BLE001 (native runtimes raise anything)
            journal.fail("load", index, sentence(error), "check that the file is a whole model of this runtime")
            continue
        journal.models.append(Model(index, opened, (time.perf_counter_ns() - start) / 1e6))


def sentence(error: Exception) -> str:
    """An exception as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def warm_up(request: Request, journal: Journal) -> None:
    """Run every model some times: lazy allocation, weight packing and caches happen here."""
    limit = min(WARMUP_SHARE * request["max_seconds"], WARMUP_SECONDS) / max(1, len(journal.models))
    for model in list(journal.models):
        say(f"warm {model.index}")
        try:
            warm(model, request, limit)
        except Exception as error:  # noqa: BLE001
            remedy = "check that the file runs on zeros of its input shape"
            journal.fail("measure", model.index, sentence(error), remedy)


def warm(model: Model, request: Request, limit: float) -> None:
    """Run a model until it has run as often as asked for and, where that is asked for too, its runs are alike; at most
    `limit` seconds, but once even where no warm-up is asked for: a file that cannot run fails here."""
    start = time.monotonic()
    model.row["first_run_ms"], _ = timed(model.run)
    fastest, count, steady = model.row["first_run_ms"], 1, Steady()
    wanted = request["warm_until_stable"]
    while time.monotonic() - start <= limit and (count < request["warmup"] or (wanted and not steady.reached)):
        wall, cpu = timed(model.run)
        steady.add(wall, cpu)
        fastest = min(fastest, wall)
        count += 1
    model.row["warmup"] = count
    model.row["stable"] = steady.reached if wanted else None
    model.settle = next((runs for limit_ms, runs in SETTLE if fastest < limit_ms), 0)


class Steady:
    """Whether the last runs were as long as those before them."""

    def __init__(self) -> None:
        self.window: list[float] = []
        self.seconds = 0.0
        self.medians: list[float] = []

    def add(self, wall_ms: float, cpu_ms: float) -> None:
        """Take a run into account: its CPU time, which other processes disturb less; windows are of wall time."""
        self.window.append(cpu_ms)
        self.seconds += wall_ms / 1e3
        if len(self.window) >= WINDOW_RUNS and self.seconds >= WINDOW_SECONDS:
            self.medians.append(statistics.median(self.window))
            self.window, self.seconds = [], 0.0

    @property
    def reached(self) -> bool:
        """Whether the medians of the last windows are within 5 % of each other."""
        last = self.medians[-WINDOWS:]
        return len(last) == WINDOWS and max(last) <= STABLE * min(last)


# ---------------------------------------------------------------- timing


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

    left, right = (models.tensor([REFERENCE_SIZE, REFERENCE_SIZE], "float32") for _ in range(2))
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


def enough(request: Request, number: int, seconds: float) -> bool:
    """Whether so many rounds in so many seconds are what was asked for, or the time is over."""
    if number >= MOST_ROUNDS or (number >= MINIMUM_ROUNDS and seconds > request["max_seconds"]):
        return True
    return bool(number >= max(request["runs"], request["least_runs"]) and seconds >= request["least_seconds"])


def rounds(request: Request, journal: Journal, reference: Run | None, look: Run = lambda: None) -> None:
    """Time all models in turn, round after round. Only whole rounds are kept, so that samples stay paired.

    `look` is called every two seconds.
    """
    say("rounds")
    start = time.monotonic()
    number = 0
    while journal.models and not enough(request, number, time.monotonic() - start):
        runs = [(model.run, model.settle) for model in journal.models]
        try:
            times = one_round(runs, number, reference)
        except RunError as error:
            failed = journal.models[error.position]
            journal.fail("measure", failed.index, f"{error} (in round {number + 1})", "run the file by itself")
            continue
        for model, (wall, cpu, around) in zip(journal.models, times):
            model.add(wall, cpu, around if reference else None)
        number += 1
        if os.getppid() != journal.parent:  # whoever asked is gone: do not disturb the machine for nobody
            raise SystemExit("the process that asked for the measurement has ended")
        if time.monotonic() - journal.saved > CHECKPOINT_SECONDS:
            look()
            journal.save()


def energy_mj(run: Run, meter: Any) -> float | None:
    """Energy of one run, millijoules: runs one after another, nothing else, between two readings of the meter."""
    start, count = time.monotonic(), 0
    meter.start()
    while count < ENERGY_RUNS or time.monotonic() - start < meter.seconds:
        run()
        meter.look()
        count += 1
    spent: float | None = meter.spent_mj()
    return None if spent is None else spent / count


def measure(request: Request, journal: Journal) -> None:
    """The whole protocol except the operators' times."""
    waited = machine.cool_down(request["cool_to_c"], request["cool_seconds"])
    throttling = machine.Throttling()
    cpus = machine.pin(request["threads"], request["cores"])
    one_blas_thread()
    versions = models.import_runtimes({entry["runtime"] for entry in request["models"]})
    reference = reference_product() if request["reference"] else None
    if reference:
        reference()
    journal.conditions.update(
        started_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=versions,
        compute_unit="cpu",
        cpus=cpus,
        waited_seconds=waited,
        temperature_before_c=machine.temperature_c(),
        thermal_before=throttling.words(),
    )

    def look() -> None:
        throttling.look()
        after = {"temperature_after_c": machine.temperature_c(), "thermal_after": throttling.words()}
        journal.conditions.update(after, throttled=throttling.seen)

    before = machine.peak_memory_mb(reset=True)
    load_all(request, journal)
    warm_up(request, journal)
    gc.collect()
    gc.disable()
    rounds(request, journal, reference, look)
    gc.enable()
    look()
    after = machine.peak_memory_mb()
    if len(request["models"]) == 1 and before is not None and after is not None:
        for model in journal.models:
            model.row["peak_memory_mb"] = max(0.0, after - before)
    journal.save()
    finish(request, journal)


def finish(request: Request, journal: Journal) -> None:
    """Outputs, instructions, and the energy of a model that is alone; a model that fails here keeps its samples."""
    meter = machine.meter() if len(request["models"]) == 1 else None
    counter = machine.instructions()
    for model in journal.models:
        try:
            if request["return_outputs"]:
                model.row["outputs"] = model.opened.outputs()
            if counter is not None:
                model.row["instructions"] = counter.of(model.run)
            if meter is not None:
                model.row["energy_mj"] = energy_mj(model.run, meter)
        except Exception as error:  # noqa: BLE001
            journal.note("measure", model.index, f"{sentence(error)} (after the rounds)", "run the file by itself")
    if request["return_outputs"] or meter is not None or counter is not None:
        journal.save()


# ---------------------------------------------------------------- operators


def onnx_operators(entry: Request, threads: int, folder: str, limit: tuple[int, float]) -> Operators:
    """Median microseconds of each fused node, in the order in which they run, from ONNX Runtime's profile.

    `limit` is the number of runs and the seconds after which fewer will do.
    """
    runs, seconds = limit
    opened = models.Onnx(entry["path"], threads, entry["inputs"], os.path.join(folder, "profile"))
    begin = time.monotonic()
    done = 0
    while done < OPERATOR_WARMUP + runs and (done < OPERATOR_MINIMUM or time.monotonic() - begin < seconds):
        opened.run()
        done += 1
    profile = Path(opened.session.end_profiling())
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


def tflite_operators(entry: Request, threads: int, limit: tuple[int, float]) -> Operators:
    """Median microseconds of each operator, those inside the XNNPACK delegate included."""
    opened = models.Tflite(entry["path"], threads, entry["inputs"])
    outputs = [values for _, values in opened.results()]
    profiler = beside("_litert_profiler")
    with contextlib.closing(profiler.CompiledModel(entry["path"], threads)) as model:
        found: Operators = profiler.operator_times(model, opened.samples[0], outputs, *limit)
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
                    row["operators"] = onnx_operators(entry, request["threads"], str(answer.parent), limit)
                else:
                    row["operators"] = tflite_operators(entry, request["threads"], limit)
            except Exception as error:  # noqa: BLE001 (one file's profile must not cost the others')
                row["message"] = sentence(error)
            print(json.dumps(row), file=lines, flush=True)


def add_operators(request: Request, journal: Journal) -> None:
    """Profile every measured model in a child process, which is started again behind a model that crashed it."""
    say("operators")
    profiled = {model.index: model.row for model in journal.models}
    waiting = list(profiled)
    while waiting:
        # Beside the result, where the starter cleans up even if it has to kill us.
        with tempfile.TemporaryDirectory(dir=journal.path.parent) as folder:
            asked, answer = Path(folder, "request.json"), Path(folder, "answer.jsonl")
            asked.write_text(json.dumps({**request, "indices": waiting}), encoding="utf-8")
            script = [sys.executable, str(Path(__file__).resolve()), "--watch-stdin", "--operators"]
            code = WATCH.run([*script, str(asked), str(answer)])
            rows = (
                [json.loads(line) for line in answer.read_text(encoding="utf-8").splitlines()]
                if answer.exists()
                else []
            )
        for row in rows:
            if "operators" in row:
                profiled[row["index"]]["operators"] = row["operators"]
            elif "message" in row:
                journal.note("operators", row["index"], row["message"], OPERATOR_REMEDY)
        finished = {row["index"] for row in rows if len(row) > 1}
        waiting = [index for index in waiting if index not in finished]
        if waiting:
            message = f"the runtime's profiler crashed (exit code {code})"
            journal.note("operators", waiting.pop(0), message, OPERATOR_REMEDY)
        journal.save()


def main(arguments: list[str]) -> int:
    """Measure as asked; 0 also where models failed, for that is part of the result."""
    # The folder of this script is no place to import from: its files could hide installed packages.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    options, paths = set(arguments[:-2]), arguments[-2:]
    if len(paths) != 2 or options - {"--watch-stdin", "--operators"}:
        print("usage: python _runner.py [--watch-stdin] REQUEST.json RESULT.json", file=sys.stderr)
        return 2
    if "--watch-stdin" in options:
        WATCH.standard_input()
    request: Request = json.loads(Path(paths[0]).read_text(encoding="utf-8"))
    WATCH.over(request["timeout_seconds"] + GRACE_SECONDS)
    limit_memory()
    if "--operators" in options:
        profile_operators(request, Path(paths[1]))
        return 0
    journal = Journal(Path(paths[1]))
    measure(request, journal)
    if request["per_operator"]:
        add_operators(request, journal)
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
