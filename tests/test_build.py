"""A profile from timing, on a machine of known speed: what it finds, what it survives, when it stops."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from priced import BOTH, FLOAT, profile

from mobilekit import profiles, registry
from mobilekit.cost import build as building
from mobilekit.cost import fusions
from mobilekit.cost.build import Built, build, key, save
from mobilekit.cost.channels import channel_multiple
from mobilekit.cost.lines import lines
from mobilekit.cost.measure import Sample, in_precision
from mobilekit.cost.price import latency_ms, price, price_shapes
from mobilekit.cost.sampling import channel_ladder, pool
from mobilekit.cost.tables import fitted
from mobilekit.errors import MobilekitError, StorageError, UnsupportedError
from mobilekit.types import (
    BenchRequest,
    BenchResult,
    DeviceInfo,
    DeviceProfile,
    Failure,
    Measurement,
    Network,
    OperatorShape,
    OperatorTime,
    Precision,
    RuntimeEntry,
    Target,
)


class Paper:
    """A runtime whose files hold the network that they are of."""

    suffix = ".txt"
    precisions: tuple[Precision, ...] = ("fp32", "int8")

    def __init__(self, name: str = "onnx", missing: str | None = None) -> None:
        self.name = name
        self.missing = missing

    def unavailable(self) -> str | None:
        return self.missing

    def supports(self, shape: OperatorShape, precision: Precision) -> str | None:
        return "no resizing in int8" if (shape.kind, precision) == ("resize", "int8") else None

    def sketch(self, network: Network, path: Path, target: Target = "host") -> None:
        if any(o.kind == "softmax" for o in network.operators):
            raise UnsupportedError("no softmax here")
        path.write_text(network.model_dump_json(), encoding="utf-8")


Clock = Callable[[OperatorShape, Precision], float]
FUSED = ("conv+relu", "conv+relu6", "add+relu", "conv>add")
OVERHEAD_US = 11.0
REFERENCE_MS = 2.0


def clock(shape: OperatorShape, precision: Precision) -> float:
    """Microseconds of an operator: convolutions compute 16 channels at a time, in int8 four times as fast."""
    size = 4 if precision == "fp32" else 1
    us = 5 + 1e-4 * size * shape.elements
    if shape.kind == "conv":
        together = shape.out_channels if shape.cost_kind == "depthwise" else shape.out_channels // shape.groups
        us += shape.macs * (-(-together // 16) * 16 / together) * (2e-5 if precision == "fp32" else 5e-6)
    if shape.kind == "linear":
        us += 2e-5 * size * shape.weights
    return us


class Kernel(NamedTuple):
    """What the machine runs: a name, a kind, and its microseconds."""

    name: str
    kind: str
    us: float


def kernels(network: Network, clock: Clock, fused: Collection[str] = FUSED) -> list[Kernel]:
    """Every kernel of a file; activations and additions that are `fused` are none of their own."""
    precisions: dict[str, Precision] = {"input": "fp32"}
    by_name = {operator.name: operator for operator in network.operators}
    read: dict[str, int] = {}
    for name in (name for operator in network.operators for name in operator.inputs):
        read[name] = read.get(name, 0) + 1
    made, converted = [], set()

    def convert(tensor: str) -> None:
        if tensor not in converted:
            converted.add(tensor)
            count = int(np.prod(network.input_shape))
            if tensor in by_name:
                shape = network.shape(by_name[tensor])
                count = shape.out_channels * shape.out_size[0] * shape.out_size[1]
            made.append(Kernel(f"of {tensor}", "QuantizeLinear", 4 + 5e-4 * count))

    for operator in network.operators:
        precision, shape = network.precision(operator), network.shape(operator)
        for tensor in operator.inputs:
            if precisions[tensor] != precision:
                convert(tensor)
        precisions[operator.name] = precision
        before = [by_name[name] for name in operator.inputs if name in by_name and read[name] == 1]
        hosts = [o for o in before if o.kind in ("conv", "linear") and not o.activation]
        inside = any(f"conv>{operator.kind}" in fused and network.precision(o) == precision for o in hosts)
        own_us = clock(shape, precision)
        made.append(Kernel(operator.name, operator.kind, 0.2 * own_us if inside else own_us))
        family = "conv" if operator.kind in ("conv", "linear", "conv_transpose") else operator.kind
        if operator.activation and operator.kind != "activation":
            pass_us = 3 + 2e-4 * shape.out_channels * shape.out_size[0] * shape.out_size[1]
            own = f"{family}+{operator.activation}" not in fused
            made.append(Kernel(f"{operator.name}/{operator.activation}", operator.activation, pass_us if own else 0.0))
    for name in by_name:
        if name not in read and precisions[name] == "int8":
            convert(name)
    return made


def us_of(network: Network, clock: Clock = clock, fused: Collection[str] = FUSED) -> float:
    return OVERHEAD_US + sum(kernel.us for kernel in kernels(network, clock, fused))


class Calendar:
    """A clock that stands still until somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Machine:
    """A device that times files by a formula, which takes `each` seconds, and profiles their kernels."""

    name = "paper machine"
    each = 0.2
    calendar = Calendar()

    def __init__(self, clock: Clock = clock, broken: str = "", fused: Collection[str] = FUSED) -> None:
        self.clock = clock
        self.broken = broken
        self.fused = fused
        self.requests: list[BenchRequest] = []
        self.names: list[list[str]] = []

    @property
    def batches(self) -> list[tuple[BenchRequest, list[str]]]:
        """The requests that timed whole runs, with the names of their networks."""
        return [pair for pair in zip(self.requests, self.names, strict=True) if pair[0].reference]

    def info(self) -> DeviceInfo:
        versions = {"onnx": "1", "tflite": "2"}
        return DeviceInfo(
            name=self.name, kind="host", origin="host", soc="P1", cores=4, memory_mb=2000, os="OS", versions=versions
        )

    def slowness(self) -> float:
        """By how much the machine is slower than it can be, during the latest request."""
        return 1.0

    def run(self, request: BenchRequest) -> BenchResult:
        self.calendar.now += self.each * len(request.models) * (1.0 if request.reference else 0.1)
        self.requests.append(request)
        self.names.append([])
        measured, failures = [], []
        for model in request.models:
            network = Network.model_validate_json(Path(model.path).read_text(encoding="utf-8"))
            self.names[-1].append(network.name)
            precision = "int8" if network.precisions else "fp32"
            if f"{model.runtime} {precision}" == self.broken:
                failures.append(Failure(stage="load", subject=model.name, message="bad file", remedy="none"))
                continue
            measured.append(self.measured(model.name, model.runtime, network, request))
        return BenchResult(measurements=tuple(measured), failures=tuple(failures))

    def measured(self, name: str, runtime: str, network: Network, request: BenchRequest) -> Measurement:
        slow = self.slowness()
        cpu = us_of(network, self.clock, self.fused) / 1000 * slow
        visible = [k for k in kernels(network, self.clock, self.fused) if k.us]
        if "conv>add" in self.fused and request.per_operator and "probe sum True" in network.name:
            visible = [k for k in visible if k.kind != "add"]
        found = [OperatorTime(name=k.name, kind=k.kind, median_us=k.us) for k in visible]
        rounds = min(8, request.runs)
        return Measurement(
            model=name, path="", sha256="", runtime=runtime, device=self.name, origin="host", threads=request.threads,
            samples_ms=(1.5 * cpu / request.threads,) * rounds, cpu_samples_ms=(cpu,) * rounds,
            reference_ms=(REFERENCE_MS * slow,) * rounds if request.reference else (),
            load_ms=1, compute_unit="cpu", started_at="now", versions={},
            operators=tuple(found) if request.per_operator else (),
        )  # fmt: skip


def still(patch: pytest.MonkeyPatch) -> Calendar:
    """No time passes but what a machine says."""
    calendar = Calendar()
    patch.setattr(Machine, "calendar", calendar)
    for module in ("build", "measure"):
        patch.setattr(f"mobilekit.cost.{module}.time", SimpleNamespace(monotonic=calendar.monotonic))
    return calendar


@pytest.fixture(autouse=True)
def calendar(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Calendar:
    """The time in this test."""
    return Calendar() if "slow" in request.keywords else still(monkeypatch)


def errors(found: DeviceProfile, runtime: str, precision: Precision, networks: list[Network]) -> np.ndarray:
    """Relative errors of the profile's predictions."""
    planned = [in_precision(network, precision, Paper()) for network in networks]
    predicted = np.array([1000 * latency_ms(network, found, runtime) for network in planned])
    return np.abs(predicted / [us_of(network) for network in planned] - 1)


FLOAT_ONLY = profiles.load("host").model_copy(
    update={
        "runtimes": tuple(
            RuntimeEntry(name=name, precisions=("fp32",), channel_multiple=8) for name in ("onnx", "tflite")
        )
    }
)
FRESH = [n for n in pool(777, 60) if not any(o.kind == "softmax" for o in n.operators)]


def convolution(width: int) -> OperatorShape:
    return OperatorShape(
        kind="conv", in_channels=64, out_channels=width, in_size=(14, 14), out_size=(14, 14), kernel=(3, 3)
    )


def alone(found: DeviceProfile, shape: OperatorShape) -> float:
    """Microseconds of an operator in the first runtime of the profile, without a run's overhead."""
    (line,) = price_shapes({"x": shape}, "fp32", found, found.tables[0].runtime).operators
    return 1000 * line.latency_ms


# ---------------------------------------------------------------- what it finds


@pytest.fixture(scope="module")
def whole() -> tuple[Built, Machine, list[float]]:
    """Two runtimes in two precisions."""
    machine, fractions = Machine(), list[float]()
    with pytest.MonkeyPatch.context() as patch:
        still(patch)
        patch.setattr(machine, "each", 0.035)
        runtimes = [Paper("onnx"), Paper("tflite")]
        built = build(machine, runtimes, profiles.load("host"), 60, lambda _s, f: fractions.append(f))
    return built, machine, fractions


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_build_finds_the_machines_prices(precision: Precision, whole: tuple[Built, Machine, list[float]]) -> None:
    built, machine, _ = whole
    found = errors(built.profile, "onnx", precision, FRESH)
    timed = {name for names in machine.names for name in names}
    assert not timed & {network.name for network in FRESH}
    assert len(FRESH) > 40
    assert np.median(found) < 0.01
    assert np.mean(found < 0.05) > 0.9


def test_a_built_profile_says_what_it_is(whole: tuple[Built, Machine, list[float]]) -> None:
    built, machine, fractions = whole
    found = built.profile
    assert not built.failures
    variants = {(t.runtime, t.precision, t.threads) for t in found.tables}
    assert variants == {(r, p, 1) for r in ("onnx", "tflite") for p in ("fp32", "int8")}
    onnx = found.table("onnx", "fp32")
    assert onnx is not None
    assert onnx.overhead_us == pytest.approx(OVERHEAD_US, rel=0.1)
    assert onnx.reference_ms == REFERENCE_MS
    assert "softmax" not in onnx.kinds
    assert "quantize" not in onnx.kinds
    assert "quantize" in (found.table("onnx", "int8") or onnx).kinds
    assert found.validation_error is not None
    assert found.validation_error < 0.02
    assert found.key == "P1; onnx 1; tflite 2" == key(machine.info())
    assert (found.soc, found.cores, found.memory_mb, found.name) == ("P1", 4, 2000, "host")
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] == 1
    assert f"{len(built.samples)} runs of sketches" in found.provenance[0].source


def test_channel_steps_are_seen(whole: tuple[Built, Machine, list[float]]) -> None:
    found = whole[0].profile
    assert {entry.channel_multiple for entry in found.runtimes} == {16}
    assert any("steps of 16" in p.source for p in found.provenance)
    for width in (31, 32, 33, 47, 48, 49):
        assert alone(found, convolution(width)) == pytest.approx(clock(convolution(width), "fp32"), rel=0.05)


def test_fusions_are_read_from_the_machines_profile(whole: tuple[Built, Machine, list[float]]) -> None:
    found = whole[0].profile
    assert {frozenset(t.fusions) for t in found.tables} == {frozenset(FUSED)}
    said = [p.source for p in found.provenance]
    assert any("conv+relu: inside the kernel before it" in s for s in said)
    assert any("conv+hardswish: a kernel of its own (new: hardswish)" in s for s in said)
    onnx = next(iter(found.tables))
    assert onnx.kinds["conv+hardswish"].coefficients["calls"] > 1
    plain, same = convolution(64), convolution(64).model_copy(update={"activation": "relu"})
    assert alone(found, same) == pytest.approx(alone(found, plain), rel=0.01)
    slower = alone(found, convolution(64).model_copy(update={"activation": "hardswish"}))
    assert slower - alone(found, plain) == pytest.approx(3 + 2e-4 * 64 * 14 * 14, rel=0.2)


def test_the_machine_is_asked_for_kernels_or_for_times(whole: tuple[Built, Machine, list[float]]) -> None:
    requests = whole[1].requests
    assert requests[0].per_operator
    assert all(r.reference != r.per_operator and r.threads == 1 for r in requests)
    # All variants are timed together, so that what slows the machine for a while slows all of them.
    assert all({m.runtime for m in r.models} == {"onnx", "tflite"} for r, _ in whole[1].batches)


def test_no_network_is_timed_twice_and_each_variant_chooses(
    whole: tuple[Built, Machine, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = [
        (network, model.name.partition("-")[2])  # "onnx-int8"
        for request, names in whole[1].batches
        for network, model in zip(names, request.models, strict=True)
    ]
    assert len({variant for _, variant in timed}) == 4
    assert len(timed) == len(set(timed))
    asked: list[Precision] = []
    most_telling = building.most_telling

    def watched(timed: Any, candidates: Any, count: int) -> list[int]:
        asked.append(candidates[0].precision)
        assert {o.precision for o in timed} == {candidates[0].precision}
        return most_telling(timed, candidates, count)

    monkeypatch.setattr(building, "most_telling", watched)
    monkeypatch.setattr(Machine, "each", 0.12)
    monkeypatch.setattr(building, "QUICK_BATCH", 24)
    monkeypatch.setattr(building, "BATCH", 24)
    build(Machine(), [Paper()], profiles.load("host"), 60)
    assert set(asked) == {"fp32", "int8"}


def test_raw_samples_fit_to_the_same_table(whole: tuple[Built, Machine, list[float]], tmp_path: Path) -> None:
    built = whole[0]
    raw = save(built.profile, built.samples, tmp_path / "me.json")
    kept = []
    for line in raw.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        fields["network"] = Network.model_validate(fields["network"])
        fields["kernels"] = tuple(OperatorTime.model_validate(k) for k in fields["kernels"])
        kept.append(Sample(**fields))
    fused = {(t.runtime, t.precision): t.fusions for t in built.profile.tables}
    assert tuple(fitted(kept, fused)) == built.profile.tables


def test_an_unlike_machine_gets_other_fusions_and_odd_channels() -> None:
    def uneven(shape: OperatorShape, precision: Precision) -> float:
        return clock(shape, precision) * (3 if shape.cost_kind == "depthwise" and shape.out_channels % 4 else 1)

    found = build(Machine(uneven, fused=()), [Paper("tflite")], FLOAT_ONLY).profile
    assert found.tables[0].fusions == ()
    for width in (62, 64):
        deep = convolution(width).model_copy(update={"in_channels": width, "groups": width})
        for shape in (deep, convolution(width)):
            assert alone(found, shape) == pytest.approx(uneven(shape, "fp32"), rel=0.15)
    sample = next(n for n in FRESH if any(o.kind == "add" for o in n.operators))
    expected = us_of(sample, uneven, ())
    assert 1000 * latency_ms(sample, found, "tflite") == pytest.approx(expected, rel=0.05)


# ---------------------------------------------------------------- what does not work


def test_build_keeps_what_works() -> None:
    machine = Machine(broken="onnx int8")
    built = build(machine, [Paper("onnx"), Paper("tflite", missing="tflite is not installed")], profiles.load("host"))
    assert [(t.runtime, t.precision) for t in built.profile.tables] == [("onnx", "fp32")]
    said = {failure.subject: failure.message for failure in built.failures}
    assert said["tflite"] == "tflite is not installed"
    assert said["onnx int8"] == "no sketch could be timed"
    assert any(subject.startswith("onnx int8 ") and text == "bad file" for subject, text in said.items())
    assert len(built.failures) == len(set(built.failures))


def test_build_of_nothing_is_an_error() -> None:
    with pytest.raises(MobilekitError, match=r"no operator could be timed on paper machine \(onnx: gone\)"):
        build(Machine(), [Paper(missing="gone")], profiles.load("host"))
    with pytest.raises(MobilekitError, match="no runtime"):
        build(Machine(), [], profiles.load("host"))


def test_build_survives_a_device_that_refuses() -> None:
    class Gone(Machine):
        def run(self, request: BenchRequest) -> BenchResult:
            self.requests.append(request)
            self.calendar.now += 20
            raise MobilekitError("the cable is out")

    with pytest.raises(MobilekitError, match="the cable is out"):
        build(Gone(), [Paper()], profiles.load("host"))


def test_a_device_that_refuses_for_a_while_costs_only_those_batches() -> None:
    class Loose(Machine):
        def run(self, request: BenchRequest) -> BenchResult:
            result = super().run(request)
            if request.reference and len(self.batches) == 3:
                raise MobilekitError("the cable was loose")
            return result

    built = build(Loose(), [Paper()], FLOAT_ONLY)
    assert [f.message for f in built.failures] == ["the cable was loose"]
    assert np.median(errors(built.profile, "onnx", "fp32", FRESH)) < 0.02


def test_a_sketch_that_cannot_be_written_is_a_failure_and_an_unsupported_one_is_counted() -> None:
    class Clumsy(Paper):
        def sketch(self, network: Network, path: Path, target: Target = "host") -> None:
            if network.name.startswith("dense-"):
                raise MobilekitError("the disk is full")
            super().sketch(network, path)

    built = build(Machine(), [Clumsy()], FLOAT_ONLY)
    assert {f.message for f in built.failures} == {"the disk is full"}
    assert "; 0 could not be written" not in built.profile.provenance[0].source
    assert "could not be written" in built.profile.provenance[0].source


def test_build_only_times_what_the_template_lists() -> None:
    template = profiles.load("host").model_copy(
        update={"runtimes": (RuntimeEntry(name="onnx", precisions=("fp32",), channel_multiple=8),)}
    )
    built = build(Machine(), [Paper("onnx"), Paper("tflite")], template)
    assert [(t.runtime, t.precision) for t in built.profile.tables] == [("onnx", "fp32")]
    assert [f.subject for f in built.failures] == ["tflite"]


# ---------------------------------------------------------------- when it stops


def noisy(shape: OperatorShape, precision: Precision) -> float:
    """Kernels that no feature explains: the target error is never reached."""
    return clock(shape, precision) * (1 + 0.5 * ((7 * shape.out_channels + 3 * shape.in_channels) % 5))


@pytest.mark.parametrize("seconds", [40, 60])
def test_build_stops_at_the_time(seconds: int, calendar: Calendar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "QUICK_BATCH", 24)
    monkeypatch.setattr(building, "BATCH", 24)
    begin = calendar.now
    machine = Machine(noisy)
    build(machine, [Paper()], FLOAT_ONLY, seconds)
    spent = calendar.now - begin
    assert spent <= seconds
    assert spent > 0.6 * seconds
    assert all(request.timeout_seconds > request.max_seconds for request in machine.requests)


def test_a_build_without_time_still_has_the_first_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "QUICK_BATCH", 48)
    machine = Machine()
    built = build(machine, [Paper()], profiles.load("host"), seconds=0)
    assert len(machine.batches) == 1
    assert 48 <= len(built.samples) <= 2 * 48
    kinds = built.profile.tables[0].kinds.keys()
    assert kinds >= {"dense", "pointwise", "depthwise.3", "add.fused", "linear", "max_pool", "concat"}
    assert {entry.channel_multiple for entry in built.profile.runtimes} == {8}
    assert any("the channel ladder was not timed" in p.source for p in built.profile.provenance)


def test_build_stops_early_at_the_target_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "LEAST_BATCHES", 4)
    sure, unsure = Machine(), Machine(noisy)
    found = [build(machine, [Paper("tflite")], FLOAT_ONLY, 60).profile for machine in (sure, unsure)]
    assert found[0].validation_error is not None
    assert found[1].validation_error is not None
    assert found[0].validation_error <= building.TARGET_ERROR < found[1].validation_error
    batches = [len(machine.batches) for machine in (sure, unsure)]
    assert building.LEAST_BATCHES <= batches[0] < batches[1]


# ---------------------------------------------------------------- speed and threads


def test_uneven_speed_is_taken_out_by_the_reference() -> None:
    class Throttled(Machine):
        def slowness(self) -> float:
            return 1.0 if len(self.batches) % 2 else 2.0

    found = build(Throttled(), [Paper("tflite")], FLOAT_ONLY).profile
    assert np.median(errors(found, "tflite", "fp32", FRESH)) < 0.02


def test_rounds_of_a_busy_core_are_left_out() -> None:
    class Shared(Machine):
        def measured(self, name: str, runtime: str, network: Network, request: BenchRequest) -> Measurement:
            run = super().measured(name, runtime, network, request)
            if not run.reference_ms:
                return run
            # The other thread of the core slows the reference by half, and these kernels threefold.
            cpu = run.cpu_samples_ms[:5] + tuple(3 * ms for ms in run.cpu_samples_ms[5:])
            reference = run.reference_ms[:5] + tuple(1.5 * ms for ms in run.reference_ms[5:])
            return run.model_copy(update={"cpu_samples_ms": cpu, "reference_ms": reference})

    found = build(Shared(), [Paper("tflite")], FLOAT_ONLY).profile
    assert np.median(errors(found, "tflite", "fp32", FRESH)) < 0.02


def test_thread_counts_have_tables_of_their_own() -> None:
    machine = Machine()
    found = build(machine, [Paper()], FLOAT_ONLY, 60, threads=(1, 4)).profile
    assert {(t.precision, t.threads) for t in found.tables} == {("fp32", 1), ("fp32", 4)}
    assert {request.threads for request in machine.requests} == {1, 4}
    of = {t.threads: found.model_copy(update={"tables": (t,)}) for t in found.tables}
    one, four = (np.array([latency_ms(n, of[count], "onnx") for n in FRESH]) for count in (1, 4))
    # On one thread CPU time counts, on several the wall's.
    assert np.median(one / four) == pytest.approx(4 / 1.5, rel=0.02)
    assert found.table("onnx", "fp32") == of[1].tables[0]


@pytest.mark.parametrize(("block", "expected"), [(4, 4), (8, 8), (16, 16)])
def test_channel_multiple_from_steps(block: int, expected: int) -> None:
    timed = [ladder_sample(n, lambda width: 20 + 0.5 * -(-width // block) * block) for n in channel_ladder()]
    multiple, words = channel_multiple(timed)
    assert multiple == expected
    assert f"steps of {expected} miss by 0.0 %" in words


def test_channel_multiple_of_noise_and_of_nothing() -> None:
    random = np.random.default_rng(0)
    noise = [ladder_sample(n, lambda _: float(random.uniform(10, 100))) for n in channel_ladder()]
    assert channel_multiple(noise)[0] == 8
    assert channel_multiple([]) == (8, "the channel ladder was not timed")


def ladder_sample(network: Network, us: Callable[[int], float]) -> Sample:
    width = int(network.name.rpartition("-")[2])
    return Sample("tflite", "fp32", 1, network, (us(width) / 1000,), ())


# ---------------------------------------------------------------- fusions


def profiled(network: Network, *kinds: str) -> Sample:
    found = tuple(OperatorTime(name=kind, kind=kind, median_us=1.0) for kind in kinds)
    return Sample("onnx", "fp32", 1, network, (1.0,), (), found)


@pytest.mark.parametrize("probe", fusions.probes(), ids=lambda probe: probe.fusion)
def test_probes_differ_by_what_they_ask(probe: fusions.Probe) -> None:
    def rows(network: Network) -> list[str]:
        return sorted(part.row for line in lines(network) for part in line.parts)

    more, less = rows(probe.with_it), rows(probe.without)
    for name in less:
        more.remove(name)
    assert more == ([probe.fusion] if "+" in probe.fusion else ["add"])
    assert probe.fusion in fusions.learned([probe], [profiled(n, "Conv") for n in (probe.without, probe.with_it)])[0]


def test_fusions_are_learned_both_ways() -> None:
    probe = next(p for p in fusions.probes() if p.fusion == "conv+hardswish")
    plain = profiled(probe.without, "Conv", "Conv", "Conv")
    fused, words = fusions.learned([probe], [plain, profiled(probe.with_it, "Conv", "Conv", "ConvHardSwish")])
    assert fused == ("conv+hardswish",)
    assert "inside the kernel before it, 3 kernels without and 3 with it" in words[0]
    apart, words = fusions.learned([probe], [plain, profiled(probe.with_it, "Conv", "Conv", "HardSwish", "Conv")])
    assert apart == ()
    assert "a kernel of its own (new: HardSwish), 3 kernels without and 4 with it" in words[0]


def test_conversions_are_no_kernels_of_the_operator() -> None:
    probe = fusions.probes()[0]
    extra = ("ReorderOutput", "TRANSPOSE", "QuantizeLinear", "DequantizeLinear")
    samples = [profiled(probe.without, "Conv", "Conv"), profiled(probe.with_it, "Conv", *extra, "Conv")]
    assert fusions.learned([probe], samples)[0] == (probe.fusion,)


def test_a_missing_profile_teaches_nothing() -> None:
    probe = fusions.probes()[0]
    for samples in ([], [profiled(probe.with_it, "Conv")], [profiled(probe.without, "Conv"), profiled(probe.with_it)]):
        assert fusions.learned([probe], samples) == ((), [])


# ---------------------------------------------------------------- files


def test_saved_profile_reads_back_and_lies_beside_its_samples(tmp_path: Path) -> None:
    built = build(Machine(), [Paper()], profiles.load("host"), seconds=0)
    path = tmp_path / "deep" / "me.json"
    raw = save(built.profile, built.samples, path)
    assert profiles.load(path) == built.profile
    kept = [json.loads(line) for line in raw.read_text().splitlines()]
    assert len(kept) == len(built.samples)
    assert all(line["samples_ms"] and line["reference_ms"] for line in kept)
    first = Network.model_validate(kept[0]["network"])
    assert 1000 * kept[0]["samples_ms"][0] == pytest.approx(us_of(first))
    assert sorted(p.name for p in path.parent.iterdir()) == ["me.json", "me.samples.jsonl"]
    assert price(FRESH[0], profiles.load(path), "onnx") == price(FRESH[0], built.profile, "onnx")


def test_save_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="give another folder"):
        save(BOTH, [], tmp_path / "file" / "x.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "me.json"
    save(BOTH, [], path)
    before = path.read_text()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mobilekit.files.os.replace", refuse)
    with pytest.raises(StorageError, match="No space left"):
        save(profile(FLOAT), [], path)
    assert path.read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["me.json", "me.samples.jsonl"]


@pytest.mark.slow
def test_this_machine_is_priced_in_a_minute() -> None:
    runtimes = [registry.runtime(name) for name in ("onnx", "tflite")]
    built = build(registry.device("host"), runtimes, profiles.load("host"), 60)
    assert built.failures == []
    assert len(built.profile.tables) == 4
    assert built.profile.validation_error is not None
    assert built.profile.validation_error < 0.3
    for cost_table in built.profile.tables:
        assert "dense" in cost_table.kinds
