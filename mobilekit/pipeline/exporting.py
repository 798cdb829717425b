"""Writes a network as it is in several formats, checks each file, and describes them: what `mobilekit export` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mobilekit import exportable, registry
from mobilekit.errors import BadInputError, MobilekitError, StorageError, UnsupportedError
from mobilekit.exportable import Exportable
from mobilekit.interfaces import Progress, Runtime
from mobilekit.network import trace
from mobilekit.pipeline.listener import Listener
from mobilekit.pipeline.shipping import file_name, write_checked, write_manifest
from mobilekit.pipeline.sparing import spared
from mobilekit.store import Store
from mobilekit.types import Candidate, ExportedModel, ExportOptions, Failure, Precision, RuntimeEntry, Untraced
from mobilekit.types.plan import Activations


@dataclass(frozen=True)
class Order:
    """Which files are asked for."""

    to: tuple[str, ...]
    precision: Precision
    options: ExportOptions
    activations: Activations = "static"
    """Of int8 files."""
    whole: bool = False
    """Whether operators are rounded too where that harms most and saves little (`sparing`)."""


def export_workload(
    spec: str, order: Order, out: Path, listener: Listener
) -> tuple[list[ExportedModel], list[Failure]]:
    """Write a workload's network, as it is, in these formats. What `mobilekit export` does.

    A format that cannot be written in this precision is a failure and the others are written; BadInputError where
    none can.
    """
    return export(exportable.load(spec), order, out, listener.progress)


def export(
    source: Exportable, order: Order, out: Path, progress: Progress
) -> tuple[list[ExportedModel], list[Failure]]:
    """Write what was ordered, and the manifest; a file that cannot be had, or that differs, is a failure.

    Raises BadInputError where none of the formats can be written, and where int8 lacks calibration inputs.
    """
    precision = order.precision
    runtimes, failures = _writers(order.to, precision)
    if precision == "int8" and order.activations == "static" and not source.trusted:
        raise BadInputError(
            f"int8 needs calibration inputs: define calibration_data() in '{source.spec}', or give calibration="
        )
    candidate = _in_int8(source, order) if precision == "int8" else Untraced(source.module, source.inputs)
    store = Store(out)
    store.open()
    written = []
    for index, runtime in enumerate(runtimes):
        progress("export", index / len(runtimes))
        name = file_name(source.name, runtime, precision)
        try:
            written.append(write_checked(candidate, runtime, precision, store.path(name), source, order.options))
        except StorageError:
            raise
        except MobilekitError as error:
            remedy = "use another format or precision; the other files are not affected"
            failures.append(Failure(stage="export", subject=name, message=str(error), remedy=remedy))
    if written:
        write_manifest(store, candidate, written, source)
    progress("export", 1.0)
    return written, failures


def _in_int8(source: Exportable, order: Order) -> Candidate | Untraced:
    """The network in int8: by its operators where they can be traced, so that weights are prepared; else as a whole."""
    untraced, activations = Untraced(source.module, source.inputs), order.activations
    try:
        if not source.plannable:
            raise UnsupportedError("it has several inputs or outputs")
        network = trace(source.module, source.inputs[0], source.name)
    except MobilekitError as error:
        if activations == "static":  # what a plan cannot follow may be exported all the same
            return untraced
        raise UnsupportedError(
            f"int8 with {activations} activations needs a network that is traced: {error}"
        ) from error
    candidate = Candidate(source.module, source.inputs[0], network)
    lever = registry.transform("int8")
    for option in lever.options(network, RuntimeEntry(name="any", precisions=("int8",), channel_multiple=1)):
        settings = {**option.settings, "activations": activations}
        if activations == "static" and not order.whole:
            settings["float"] = ",".join(spared(network, source.module, [batch for (batch,) in source.calibration]))
        candidate = lever.apply(candidate, option.model_copy(update={"settings": settings}))
    return candidate


def _writers(to: Sequence[str], precision: Precision) -> tuple[list[Runtime], list[Failure]]:
    """The runtimes that can write this precision here, and why the others cannot."""
    runtimes, failures = [], []
    for name in dict.fromkeys(to):
        runtime = registry.runtime(name)
        reason = runtime.unavailable()
        if reason is None and precision not in runtime.precisions:
            reason = f"{name} files are written in {', '.join(runtime.precisions)}, not in {precision}"
        if reason is None:
            runtimes.append(runtime)
        else:
            failures.append(Failure(stage="export", subject=f"{name} {precision}", message=reason, remedy=""))
    if not runtimes:
        raise BadInputError("; ".join(failure.message for failure in failures))
    return runtimes, failures
