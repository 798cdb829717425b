"""Times sketches on a device: writes their files, asks for them in mixed batches, keeps the raw samples."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mobilekit.cost.work import quantised
from mobilekit.errors import MobilekitError, UnsupportedError
from mobilekit.interfaces import Device, Runtime
from mobilekit.stats import median
from mobilekit.types import BenchModel, BenchRequest, Failure, Measurement, Network, OperatorTime, Precision, Target

ROUNDS = 14
LEAST_SECONDS = 20.0
"""A device gets at least this long to answer before its sketches count as failed."""
SAME_SPEED = 1.08
"""Rounds in which the reference product's times differ by up to this factor are of one speed: a core whose other thread
is busy is slower by half, and slower for some kernels than for others."""
SOME = 0.05
"""Share of the rounds that may be faster than the undisturbed speed by chance."""
NAMED = frozenset({"onnx"})
"""Runtimes whose profiles name kernels after the file's nodes, so that each operator's part of a run is known."""
FEW = 4
"""Rounds at one speed below which those at another have to help."""


class Variant(NamedTuple):
    """A runtime in a precision with some threads: what gets a cost table of its own."""

    runtime: Runtime
    precision: Precision
    threads: int = 1

    def __str__(self) -> str:
        """As failures name it: `onnx int8`."""
        return f"{self.runtime.name} {self.precision}" + (f" {self.threads} threads" if self.threads > 1 else "")


class Sample(NamedTuple):
    """What was measured of one sketch: raw times in milliseconds, round by round."""

    runtime: str
    precision: Precision
    threads: int
    network: Network
    samples_ms: tuple[float, ...]
    """CPU time on one thread, wall time on several."""
    reference_ms: tuple[float, ...]
    """The reference product in the same rounds; empty where the device has none."""
    kernels: tuple[OperatorTime, ...] = ()
    """The runtime's own profile, where it was asked for."""

    def shares(self, profiling_us: float = 0.0) -> dict[str, float]:
        """Each operator's share of all kernels' time, where the runtime names its kernels after operators.

        `profiling_us` of each kernel's time is the profiler's.
        """
        if self.runtime not in NAMED:
            return {}
        times = [max(kernel.median_us - profiling_us, 0.0) for kernel in self.kernels]
        total = sum(times) or 1.0
        found: dict[str, float] = {}
        waiting = 0.0
        for kernel, us in zip(self.kernels, times, strict=True):  # in the order in which they ran
            owner = _owner(kernel.name, self.network)
            if owner is None and "quantize" in kernel.kind.lower():
                continue  # conversions between precisions have prices of their own
            waiting += us / total
            if owner is not None:  # what changes a tensor's layout runs in front of the operator that needs it
                found[owner] = found.get(owner, 0.0) + waiting
                waiting = 0.0
        return found

    def us(self, reference_ms: float | None) -> float:
        """Microseconds of a run while the reference product takes `reference_ms` (see `at_speed`)."""
        return 1000 * at_speed(self.samples_ms, self.reference_ms, reference_ms)[0]

    def steady(self, reference_ms: float | None) -> bool:
        """Whether enough rounds were at the reference's speed."""
        return at_speed(self.samples_ms, self.reference_ms, reference_ms)[1]

    def record(self) -> dict[str, object]:
        """The sample as one JSON line, from which tables can be fitted again."""
        network = self.network.model_dump(mode="json", exclude_defaults=True)
        return {**self._asdict(), "network": network, "kernels": [k.model_dump() for k in self.kernels]}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Sample:
        """The sample of a JSON line that `record` wrote."""
        made = {
            "network": Network.model_validate(record["network"]),
            "samples_ms": tuple(record["samples_ms"]),
            "reference_ms": tuple(record["reference_ms"]),
            "kernels": tuple(OperatorTime.model_validate(kernel) for kernel in record["kernels"]),
        }
        return cls(**{**record, **made})


def joined(samples: Iterable[Sample]) -> list[Sample]:
    """Samples of which those of one network in one variant, timed several times, are one with all rounds."""
    found: dict[tuple[object, ...], Sample] = {}
    for given in samples:
        sample = given
        key = sample.runtime, sample.precision, sample.threads, sample.network.name
        known = found.get(key)
        if known is not None:
            rounds = known.samples_ms + sample.samples_ms, known.reference_ms + sample.reference_ms
            sample = known._replace(samples_ms=rounds[0], reference_ms=rounds[1])
        found[key] = sample
    return list(found.values())


def at_speed(
    samples_ms: Sequence[float], references_ms: Sequence[float], reference_ms: float | None
) -> tuple[float, bool]:
    """Median milliseconds of the rounds in which the reference product took about `reference_ms`.

    Their small deviations stay: what else a process runs between them moves the product by some percent too. Where
    fewer than FEW rounds were at that speed, all are brought to it by the product, and the second value is False.
    Without a reference it is the plain median.
    """
    if not reference_ms or not references_ms:
        return median(samples_ms), True
    pairs = list(zip(samples_ms, references_ms, strict=True))
    same = [pair for pair in pairs if reference_ms / SAME_SPEED <= pair[1] <= SAME_SPEED * reference_ms]
    if len(same) >= FEW:
        return median([ms for ms, _ in same]), True
    return reference_ms * median([ms / reference for ms, reference in pairs]), False


def _owner(kernel: str, network: Network) -> str | None:
    """The operator that a kernel is named after: `conv_1`, `fused conv_1`, `conv_1_token_3`, `conv_1/relu/out`."""
    kernel = kernel.removeprefix("fused ")
    for operator in network.operators:
        rest = kernel.removeprefix(operator.name)
        if rest != kernel and not rest[:1].isalnum():
            return operator.name
    return None


def in_precision(network: Network, precision: Precision, runtime: Runtime | None = None) -> Network:
    """The network with every operator that has an int8 form in int8; a network with precisions keeps them.

    Where a runtime is given, what it has no int8 kernel for stays in float.
    """
    if precision != "int8" or network.precisions:
        return network
    int8 = quantised(network)
    if runtime is not None:
        asked = [o for o in network.operators if o.name in int8]
        int8 = {o.name: "int8" for o in asked if runtime.supports(network.shape(o), "int8") is None}
    return network.with_precisions(int8)


def undisturbed_ms(references_ms: Iterable[float]) -> float | None:
    """The reference product's time at the speed that the machine has when nothing disturbs it; None without times.

    A core with a busy neighbour is slower, and for every kernel and neighbour by another factor: only the fastest
    rounds say the same thing twice. The median of those within SAME_SPEED, either way, of the fastest but a few.
    """
    times = sorted(references_ms)
    if not times:
        return None
    fastest = times[int(SOME * len(times))]
    return median([ms for ms in times if ms <= fastest * SAME_SPEED**2])


@dataclass
class Timer:
    """Times sketches on one device until the deadline (`time.monotonic` seconds); keeps what failed."""

    device: Device
    deadline: float
    failures: list[Failure] = field(default_factory=list)
    unsupported: int = 0
    target: Target = "host"
    """Whose processors the sketches are for."""

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.monotonic()

    def time(self, variants: Sequence[Variant], networks: Sequence[Network], profile: bool = False) -> list[Sample]:
        """Time the networks in all variants, together: what slows the machine for a while slows all of them.

        A sketch that cannot be written is left out; one that fails on the device is a failure. With `profile` the
        runtime's own times of its kernels are asked for too.
        """
        samples = []
        for threads in sorted({variant.threads for variant in variants}):
            samples += self._together([v for v in variants if v.threads == threads], networks, profile)
        return samples

    def _together(self, variants: Sequence[Variant], networks: Sequence[Network], profile: bool) -> list[Sample]:
        timeout = max(3 * self.left, LEAST_SECONDS)
        with tempfile.TemporaryDirectory(prefix="mobilekit-sketches-") as folder:
            models: dict[str, tuple[Variant, Network]] = {}
            request = []
            for variant in variants:
                for network in networks:
                    if network.precisions and variant.precision != "int8":
                        continue  # Conversions belong to the int8 tables.
                    name = f"{len(models)}-{variant.runtime.name}-{variant.precision}"
                    path = Path(folder) / f"{name}{variant.runtime.suffix}"
                    planned = in_precision(network, variant.precision, variant.runtime)
                    if self._write(variant, planned, path):
                        models[name] = (variant, planned)
                        request.append(BenchModel(name=name, path=str(path), runtime=variant.runtime.name))
            if not request:
                return []
            asked = BenchRequest(
                models=tuple(request),
                threads=variants[0].threads,
                warmup=2,
                runs=1 if profile else ROUNDS,
                max_seconds=timeout / 4,
                timeout_seconds=timeout,
                per_operator=profile,
                reference=not profile,
            )
            found = self._measure(asked, models)
            named = tuple(m for m in request if m.runtime in NAMED and m.name in found and not profile)
            kernels: dict[str, Measurement] = {}
            if named:
                detail = {"models": named, "warmup": 1, "runs": 1, "reference": False, "per_operator": True}
                kernels = self._measure(asked.model_copy(update=detail), models)
            return [_sample(run, kernels.get(name, run).operators, *models[name]) for name, run in found.items()]

    def _write(self, variant: Variant, network: Network, path: Path) -> bool:
        try:
            variant.runtime.sketch(network, path, self.target)
        except UnsupportedError:
            self.unsupported += 1
            return False
        except MobilekitError as error:
            self._fail(f"{variant} {network.name}", str(error), "time this network by hand")
            return False
        return True

    def _measure(self, request: BenchRequest, models: dict[str, tuple[Variant, Network]]) -> dict[str, Measurement]:
        try:
            result = self.device.run(request)
        except MobilekitError as error:
            self._fail(self.device.name, str(error), "check the device with `mobilekit doctor`")
            return {}
        for failure in result.failures:
            subject = failure.subject
            if subject in models:
                subject = f"{models[subject][0]} {models[subject][1].name}"
            self._fail(subject, failure.message, failure.remedy)
        return {m.model: m for m in result.measurements if m.model in models and m.samples_ms}

    def _fail(self, subject: str, message: str, remedy: str) -> None:
        """Note a failure once, however many sketches share it."""
        failure = Failure(stage="profile", subject=subject, message=message, remedy=remedy)
        if failure not in self.failures:
            self.failures.append(failure)


def _sample(run: Measurement, kernels: tuple[OperatorTime, ...], variant: Variant, network: Network) -> Sample:
    several = variant.threads > 1 or not run.cpu_samples_ms
    return Sample(
        runtime=variant.runtime.name,
        precision=variant.precision,
        threads=variant.threads,
        network=network,
        samples_ms=run.samples_ms if several else run.cpu_samples_ms,
        reference_ms=run.reference_ms,
        kernels=kernels,
    )
