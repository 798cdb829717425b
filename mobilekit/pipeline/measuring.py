"""`mobilekit measure`: model files on a device, by the protocol of docs/bench_protocol.md."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from mobilekit import bench, registry
from mobilekit.bench import golden
from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.interfaces import Device
from mobilekit.pipeline.together import on_each
from mobilekit.stats import spread
from mobilekit.types import BenchModel, BenchResult, BenchWarning, Cores, Failure, Measurement, Value

WARMER_C = 2.0
"""With --one-by-one the gate of the second file on is so many degrees above what the first one began at."""
WRONG_OUTPUTS = "do not use the file on this device; try another version of the runtime there"
SESSIONS = bench.Repeats(least=3, most=8, within=0.02)
"""Of files beside a baseline: a process lays out its memory once, and a machine's neighbour stays for seconds, so that
rounds of one session repeat better than sessions do. Ratios of single sessions of ten seconds ranged over almost 7 % on
a host that was kept busy (`benchmarks/repeatability.py`)."""
Sessions = list[list[Measurement]]
"""For each process what it measured."""
PARITY = "parity"
"""The stage of failures of which the exit code is 1."""


@dataclass(frozen=True)
class Timing:
    """How files are measured. Raises BadInputError for what contradicts itself."""

    threads: int = 1
    runs: int | None = None
    """Most rounds, and no more warming up than ten runs; None: the protocol's own."""
    mlperf: bool = False
    repeat: int = 1
    """Where there is a baseline, so many times several sessions."""
    cores: Cores = "any"
    cool_to_c: float | None = None
    one_by_one: bool = False
    baseline: Path | None = None
    parity: bool = True

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.mlperf and self.runs is not None:
            raise BadInputError("--mlperf says how many runs there are: leave out --runs")
        if self.one_by_one and self.baseline is not None:
            raise BadInputError("a --baseline runs in turn with the files: leave out --one-by-one")

    @property
    def settings(self) -> bench.Settings:
        """What is asked of one process."""
        gate: bench.Settings = {"threads": self.threads, "cores": self.cores}
        if self.cool_to_c is not None:
            gate |= {"cool_to_c": self.cool_to_c, "cool_seconds": bench.COOL_SECONDS}
        if self.runs is not None:
            return {**bench.COMPARE, "runs": self.runs, **gate}
        known = bench.MLPERF if self.mlperf else bench.FILES
        return {**known, **gate}

    @property
    def wanted(self) -> int:
        """Rounds below which there is a warning."""
        return bench.FEW_ROUNDS if self.runs is not None else self.settings["least_runs"]


class Ratio(Value):
    """How long a file takes beside the baseline, paired round by round: CPU time, or wall time of several threads."""

    device: str
    model: str
    baseline: str
    ratio: float
    """Its time over the baseline's: 0.5 means that it takes half the time."""
    interval: tuple[float, float]
    """90 % bootstrap interval, over sessions and rounds."""
    fast_ratio: float
    """The same at the fastest speed that the machine had (the tenth percentiles): what a busy machine repeats best."""
    sessions: int


class Repeated(Value):
    """How well a file's figures repeat, each time in a process of its own."""

    device: str
    model: str
    medians_ms: tuple[float, ...]
    median_spread: float
    """By how much the largest is above the smallest, as a share."""
    beside: str
    """What the ratios are to: the baseline, the first file, or the reference product."""
    ratios: tuple[float, ...]
    """Paired round by round; empty for what they are to."""
    ratio_spread: float | None


@dataclass
class Measured:
    """What came of it."""

    measurements: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    warnings: list[BenchWarning] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    repeats: list[Repeated] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    """Names of the devices on which nothing was measured."""

    @property
    def sound(self) -> bool:
        """Whether something was measured on every device, and no outputs were wrong."""
        wrong = any(failure.stage == PARITY for failure in self.failures)
        return bool(self.measurements) and not self.silent and not wrong


def measure_files(paths: Sequence[Path], devices: Sequence[Device], timing: Timing | None = None) -> Measured:
    """Time model files in turn, on all devices at the same time. What `mobilekit measure` does; a folder stands for the
    models in it.

    Where a manifest lies beside a file, it is fed the golden inputs, and its outputs on the device are compared.
    """
    timing = timing or Timing()
    suffixes = {registry.runtime(name).suffix: name for name in registry.names("runtimes")}
    files = [file for path in paths for file in _model_files(path, set(suffixes))]
    if timing.baseline is not None:
        files = _behind(timing.baseline, files, suffixes)
    models = [BenchModel(name=file.name, path=str(file), runtime=suffixes[file.suffix]) for file in files]

    def on(device: Device) -> Measured:
        with tempfile.TemporaryDirectory(prefix="mobilekit-") as folder:
            return _Job(device, timing, Path(folder)).carried_out(models)

    together = Measured()
    for device, found in zip(devices, on_each(devices, on), strict=True):
        if not found.measurements:
            together.silent.append(device.name)
        for part in fields(Measured):
            getattr(together, part.name).extend(getattr(found, part.name))
    return together


def _behind(baseline: Path, files: Sequence[Path], suffixes: dict[str, str]) -> list[Path]:
    """The baseline, and the files that are not it."""
    if not baseline.is_file() or baseline.suffix not in suffixes:
        raise BadInputError(f"the baseline '{baseline}' is no model file ({', '.join(sorted(suffixes))})")
    others = [file for file in files if file.resolve() != baseline.resolve()]
    if not others:
        raise BadInputError(f"'{baseline}' would be compared with itself: give another file beside --baseline")
    return [baseline, *others]


class _Job:
    """Measures models on a device, in one process or several."""

    def __init__(self, device: Device, timing: Timing, folder: Path) -> None:
        self.device = device
        self.timing = timing
        self.folder = folder
        self.found = Measured()
        self.vectors: dict[str, golden.Vectors] = {}

    def carried_out(self, models: Sequence[BenchModel]) -> Measured:
        """All repeats. What fails in one of them is left out of the next."""
        models = [self._with_inputs(model, number) for number, model in enumerate(models)]
        repeats: list[Sessions] = []
        while models and len(repeats) < self.timing.repeat:
            repeats.append(self._sessions(models, outputs=not repeats))
            models = _still_there(models, repeats[-1][-1])
        found = self.found
        found.measurements = [measurement for sessions in repeats for measurement in _whole(sessions)]
        for measurement in found.measurements:
            found.warnings += bench.warnings_about(measurement, self.timing.wanted)
        if self.timing.baseline is not None:
            together = [session for sessions in repeats for session in sessions]
            found.ratios = list(_ratios(together, str(self.timing.baseline)))
        if len(repeats) > 1:
            timed = {measurement.path for measurement in repeats[-1][-1] if measurement.samples_ms}
            found.repeats = [_repeated(repeats, model.path) for model in models if model.path in timed]
            found.warnings += [warning for row in found.repeats for warning in _spreads(row)]
        return found

    def _sessions(self, models: Sequence[BenchModel], *, outputs: bool) -> Sessions:
        """One session, or where there is a baseline as many as it takes to know the ratios to it well enough."""
        baseline = self.timing.baseline
        sessions: Sessions = []
        while True:
            sessions.append(self._session(models, outputs=outputs and not sessions))
            models = _still_there(models, sessions[-1])
            if baseline is None or self.timing.runs is not None or len(sessions) == SESSIONS.most:
                return sessions
            intervals = [row.interval for row in _ratios(sessions, str(baseline))]
            enough = len(sessions) >= SESSIONS.least and all(map(SESSIONS.narrow, intervals))
            if enough or not intervals or len(models) < 2:
                return sessions

    def _with_inputs(self, model: BenchModel, number: int) -> BenchModel:
        """The model, to be fed its golden inputs where it has some."""
        try:
            vectors = golden.of(Path(model.path)) if self.timing.parity else None
        except (MobilekitError, OSError) as error:
            self._fail(model.name, str(error), "export the models again, or measure without comparing (--no-parity)")
            vectors = None
        if vectors is None:
            return model
        self.vectors[model.path] = vectors
        return model.model_copy(update={"inputs": golden.write(vectors, self.folder, str(number))})

    def _session(self, models: Sequence[BenchModel], *, outputs: bool) -> list[Measurement]:
        """Every model once: together in one process, or each in its own."""
        outputs = outputs and bool(self.vectors)
        measured = []
        for result in self._results(models, outputs):
            self.found.failures += [failure for failure in result.failures if failure not in self.found.failures]
            measured += [self._compared(m) if outputs else m for m in result.measurements]
        return measured

    def _results(self, models: Sequence[BenchModel], outputs: bool) -> Iterator[BenchResult]:
        timing = self.timing
        groups = [[model] for model in models] if timing.one_by_one else [list(models)]
        gate = timing.cool_to_c
        for group in groups:
            settings: bench.Settings = {**timing.settings, "return_outputs": outputs}
            if gate is not None:
                settings |= {"cool_to_c": gate, "cool_seconds": bench.COOL_SECONDS}
            result = bench.measure(self.device, group, **settings)
            starts = [m.temperature_before_c for m in result.measurements if m.temperature_before_c is not None]
            if gate is None and starts:
                gate = starts[0] + WARMER_C
            yield result

    def _compared(self, measurement: Measurement) -> Measurement:
        """The measurement with the parity of the outputs that came with it."""
        vectors = self.vectors.get(measurement.path)
        if vectors is None:
            return measurement
        found, wrong = golden.compared(vectors, measurement)
        if wrong is not None:
            self._fail(measurement.model, wrong, WRONG_OUTPUTS)
        return found

    def _fail(self, subject: str, message: str, remedy: str) -> None:
        self.found.failures.append(Failure(stage=PARITY, subject=subject, message=message, remedy=remedy))


# ---------------------------------------------------------------- ratios and repeats


def _clock(measurement: Measurement) -> bench.Clock:
    """CPU time of several threads adds up, and an app may not have taken it."""
    return "cpu" if measurement.threads == 1 and measurement.cpu_samples_ms else "wall"


def _still_there(models: Sequence[BenchModel], session: Sequence[Measurement]) -> list[BenchModel]:
    measured = {measurement.path for measurement in session}
    return [model for model in models if model.path in measured]


def _whole(sessions: Sessions) -> list[Measurement]:
    """A measurement for each file, with the rounds of all sessions."""
    return [_joined(sessions, measurement.path) for measurement in sessions[0]]


def _joined(sessions: Sessions, path: str) -> Measurement:
    return bench.joined([measurement for session in sessions for measurement in session if measurement.path == path])


def _pairs(sessions: Sessions, path: str, other: str) -> list[tuple[Measurement, Measurement]]:
    """The measurements of two files in each session that holds both."""
    by_path = [{measurement.path: measurement for measurement in session} for session in sessions]
    return [(found[path], found[other]) for found in by_path if path in found and other in found]


def _ratios(sessions: Sessions, baseline: str) -> Iterator[Ratio]:
    for measurement in sessions[0] if sessions else []:
        pairs = _pairs(sessions, measurement.path, baseline)
        if measurement.path == baseline or not pairs or not measurement.samples_ms:
            continue
        compared = bench.Comparison.of(*pairs, clock=_clock(measurement))
        yield Ratio(
            device=measurement.device,
            model=measurement.model,
            baseline=pairs[0][1].model,
            ratio=compared.ratio,
            interval=compared.interval,
            fast_ratio=compared.fast_ratio,
            sessions=len(pairs),
        )


def _repeated(repeats: Sequence[Sessions], path: str) -> Repeated:
    """A file over all repeats, beside the first one, or beside the reference product where it is alone."""
    own = [_joined(sessions, path) for sessions in repeats]
    first = repeats[-1][-1][0]
    clock = _clock(own[0])
    medians = tuple(bench.median_ms(measurement, clock) for measurement in own)
    if len(repeats[-1][-1]) > 1:
        beside = first.model
        pairs = [_pairs(sessions, path, first.path) for sessions in repeats if path != first.path]
        ratios = tuple(bench.Comparison.of(*found, clock=clock).ratio for found in pairs)
    else:
        beside = "the reference product"
        ratios = tuple(ratio for m in own if (ratio := bench.reference_ratio(m)) is not None)
    return Repeated(
        device=own[0].device,
        model=own[0].model,
        medians_ms=medians,
        median_spread=spread(medians),
        beside=beside,
        ratios=ratios,
        ratio_spread=spread(ratios) if ratios else None,
    )


def _spreads(row: Repeated) -> Iterator[BenchWarning]:
    of_medians = bench.warning_of_spread(row.model, "its median", row.medians_ms)
    of_ratios = bench.warning_of_spread(row.model, f"its ratio to {row.beside}", row.ratios) if row.ratios else None
    yield from (warning for warning in (of_medians, of_ratios) if warning is not None)


def _model_files(path: Path, suffixes: set[str]) -> list[Path]:
    if not path.exists():
        raise BadInputError(f"'{path}' does not exist: give a model file or a folder that holds some")
    if path.suffix in suffixes:
        return [path]
    below = path.rglob("*") if path.is_dir() else []
    found = sorted(p for p in below if p.suffix in suffixes and "checkpoints" not in p.relative_to(path).parts)
    if not found:
        raise BadInputError(f"'{path}' holds no model files ({', '.join(sorted(suffixes))})")
    return found
