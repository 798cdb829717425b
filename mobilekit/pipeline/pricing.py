"""Device profiles as users meet them: built by timing a device, anchored on a measurement, asked for a prediction."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from mobilekit import profiles, registry
from mobilekit.cost import build as cost_build
from mobilekit.cost.layers import read_layers
from mobilekit.cost.measure import in_precision
from mobilekit.cost.price import corrected, price, price_shapes
from mobilekit.errors import BadInputError
from mobilekit.interfaces import Device, Progress
from mobilekit.network import trace
from mobilekit.pipeline.listener import Listener
from mobilekit.types import DeviceProfile, Estimate, Failure, Network, OperatorShape, Precision
from mobilekit.workload import load

QUICK_SECONDS = 50.0
"""What the first plan on a machine spends on its prices: loading and fitting stay inside a minute."""
BUILD_SECONDS = 570.0


def measured_profile(
    device: Device, template: DeviceProfile, progress: Progress
) -> tuple[DeviceProfile, list[Failure]]:
    """The template with measured operator times: kept from an earlier run for the same processor and runtimes."""
    key = cost_build.key(device.info())
    path = profiles.cache_path(key)
    if path.exists():
        try:
            kept = profiles.load(path)
        except BadInputError:  # written by another version, or cut short: measure again
            kept = template
        if kept.key == key and kept.tables:
            return kept, []
    runtimes = [registry.runtime(entry.name) for entry in template.runtimes]
    built = cost_build.build(device, runtimes, template, QUICK_SECONDS, progress)
    cost_build.save(built.profile, built.samples, path)
    return built.profile, built.failures


def build_profile(
    target: Device, out: Path, listener: Listener, *, quick: bool = False, threads: Sequence[int] = (1,)
) -> DeviceProfile:
    """Time operators on a device and write its profile. What `mobilekit profile build` does."""
    template = profiles.load("host")
    runtimes = [registry.runtime(entry.name) for entry in template.runtimes]
    seconds = QUICK_SECONDS if quick else BUILD_SECONDS
    built = cost_build.build(target, runtimes, template, seconds, listener.progress, threads)
    cost_build.save(built.profile, built.samples, out)
    for failure in built.failures:
        listener.say(f"{failure.subject}: {failure.message}; {failure.remedy}")
    return built.profile


class Asked(TypedDict, total=False):
    """What a prediction may be narrowed by."""

    runtime: str | None
    precision: str | None
    anchor: str | None
    """NETWORK=MS: the measured latency of a related network, to which all prices are scaled."""


def predict(
    profile: str,
    subject: str,
    *,
    layers: Path | None = None,
    listener: Listener | None = None,
    **asked: Unpack[Asked],
) -> Estimate:
    """Predicted latency of a workload's network as it is, or of a network of a layers table (`layers`).

    What `mobilekit profile predict` does; `runtime`, `precision` and `anchor` may be given. Raises BadInputError for
    a runtime or precision that the profile has no prices for, and for a network that the table does not hold.

    >>> import mobilekit as mk
    >>> mk.predict("host", "mobilekit.workloads.fashion_mnist").runtime
    'onnx'
    """
    known = profiles.load(profile)
    if known.kind == "host" and not known.tables:
        known, _ = measured_profile(registry.device("host"), known, (listener or Listener()).progress)
    runtime, precision = _variant(known, asked.get("runtime"), asked.get("precision"))
    table = None if layers is None else read_layers(layers)

    def estimate(name: str) -> Estimate:
        if layers is None or table is None:
            return price(_network(name, precision), known, runtime)
        return price_shapes(_layers_of(table, name, layers), precision, known, runtime)

    anchor = asked.get("anchor")
    if anchor is not None:
        base, measured_ms = _anchor(anchor)
        factor = measured_ms / estimate(base).latency_ms
        # Every precision by the same factor: an int8 network has float parts too.
        for each in dict.fromkeys(t.precision for t in known.tables if t.runtime == runtime):
            known = corrected(known, runtime, each, factor)
    return estimate(subject)


def _variant(profile: DeviceProfile, runtime: str | None, precision: str | None) -> tuple[str, Precision]:
    """The runtime and precision that are asked for, else the first that the profile prices."""
    tables = [t for t in profile.tables if runtime in (None, t.runtime) and precision in (None, t.precision)]
    if not tables:
        known = ", ".join(dict.fromkeys(f"{t.runtime} {t.precision}" for t in profile.tables)) or "nothing"
        asked = " ".join(part for part in (runtime, precision) if part)
        raise BadInputError(f"the profile '{profile.name}' has no prices for {asked or 'any runtime'}: it has {known}")
    return tables[0].runtime, tables[0].precision


def _network(workload: str, precision: Precision) -> Network:
    loaded = load(workload)
    network = trace(loaded.module, loaded.example_input, loaded.name)
    if precision == "fp32":
        return network
    if precision == "fp16":
        return network.with_precisions({operator.name: "fp16" for operator in network.operators})
    return in_precision(network, precision)


def _anchor(text: str) -> tuple[str, float]:
    """NETWORK=MS. Raises BadInputError for anything else."""
    base, _, figure = text.rpartition("=")
    try:
        measured_ms = float(figure)
    except ValueError:
        measured_ms = math.nan
    if not base or not (math.isfinite(measured_ms) and measured_ms > 0):
        raise BadInputError(f"--anchor is NETWORK=MS with a measured latency in milliseconds above 0, not '{text}'")
    return base, measured_ms


def _layers_of(table: Mapping[str, Sequence[OperatorShape]], network: str, path: Path) -> dict[str, OperatorShape]:
    """The network's operators, named by their place and kind."""
    if network in table:
        return {f"{number} {shape.cost_kind}": shape for number, shape in enumerate(table[network], start=1)}
    near = difflib.get_close_matches(network, table, n=1, cutoff=0.4)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    raise BadInputError(f"'{path}' has no network '{network}'{hint}: it has {', '.join(sorted(table))}")
