"""The command doctor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mobilekit.cli.terminal import JsonFlag, documents, listening
from mobilekit.types import Ability, Battery, Cluster, DeviceInfo, Health, Machine

HOTTEST = 4
"""Temperature zones that are shown; a phone has some eighty."""
ENGINES = (
    "torch", "numpy", "onnx", "onnxruntime", "onnxscript", "ai-edge-litert", "ai-edge-quantizer", "litert-torch",
    "coremltools", "asyncssh",
)  # fmt: skip
"""Packages that decide what can be done; of the others only those that are missing or of a wrong version are shown."""


def doctor(
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="Ask this one too, such as ssh:USER@HOST; may be repeated.", show_default=False),
    ] = None,
    install_emulator: Annotated[
        bool, typer.Option("--install-emulator", help="First install what emulated-arm64 needs.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """What this machine can export, run and measure, and what to install."""
    from mobilekit import pipeline

    if install_emulator:
        with listening() as listener:
            pipeline.install_emulator(listener.progress)
    found = pipeline.examine(device or ())
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    _show(found, documents())


def _show(found: Health, console: Console) -> None:
    _heading(console, "This machine")
    _indented(console, Text(f"mobilekit {found.machine.mobilekit}, Python {found.machine.python}"))
    _indented(console, Text(found.machine.system))
    _indented(console, _packages(found.machine))
    _heading(console, "What it can do")
    _abilities(console, found.abilities)
    for state in found.devices:
        _heading(console, f"Device {state.device}")
        if state.info is None:
            _indented(console, Text(f"not reached: {state.problem}", style="red"))
            continue
        table = Table.grid(padding=(0, 2))
        for name, text in _facts(state.info):
            table.add_row(Text(name, style="dim"), Text(text))
        _indented(console, table)
        if state.advice:
            console.print()
            _indented(console, Text("Before measuring there:"))
            _abilities(console, state.advice)


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _abilities(console: Console, rows: Sequence[Ability]) -> None:
    """A table, and below it what helps: on lines that are not broken, so that commands can be copied."""
    lines = [(Text(row.what), Text(row.state, style="yellow" if row.remedy else "")) for row in rows]
    _indented(console, _table(("what", "state"), lines))
    if any(row.remedy for row in rows):
        console.print()
        _indented(console, Text("What to do:", style="dim"))
    for row in rows:
        if row.remedy:
            console.print(Text(f"    {row.what}: {row.remedy}"), soft_wrap=True)


def _indented(console: Console, what: Table | Text) -> None:
    console.print(Padding(what, (0, 0, 0, 2), expand=False))


# ---------------------------------------------------------------- tables


def _table(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> Table:
    """Columns without a single entry are left out; the first is not wrapped."""
    kept = [i for i in range(len(columns)) if any(row[i].plain for row in rows)]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for i in kept:
        table.add_column(columns[i], no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*(row[i] for i in kept))
    return table


def _packages(machine: Machine) -> Table:
    rows = []
    for package in machine.packages:
        if package.name in ENGINES or package.state != "ok":
            style = "" if package.state == "ok" else "yellow"
            here = Text(package.version or "missing", style=style)
            needed, wanted_by = Text(package.needed or "any"), Text(package.extra or "mobilekit")
            rows.append((Text(package.name, style=style), here, needed, wanted_by, Text(package.remedy)))
    return _table(("package", "here", "needed", "for", "what to do"), rows)


# ---------------------------------------------------------------- a device in words


def _facts(info: DeviceInfo) -> Iterator[tuple[str, str]]:
    if info.model:
        yield "model", info.model
    counted = "1 core" if info.cores == 1 else f"{info.cores} cores"
    yield "processor", f"{info.soc}, {counted}" + (f", {info.architecture}" if info.architecture else "")
    for cluster in info.clusters:
        yield "cluster", _cluster(cluster)
    yield "memory", _memory(info)
    yield "system", info.os
    versions = ", ".join(f"{name} {version}" for name, version in sorted(info.versions.items()))
    yield "runtimes", versions or "none"
    hottest = sorted(info.temperatures_c.items(), key=lambda zone: -zone[1])
    more = f" and {len(hottest) - HOTTEST} cooler zones" if len(hottest) > HOTTEST else ""
    zones = ", ".join(f"{name} {value:.1f} °C" for name, value in hottest[:HOTTEST])
    yield "temperatures", f"{zones}{more}" if zones else "it does not say"
    yield "throttling", info.throttling or "it does not say"
    if info.battery is not None:
        yield "battery", _battery(info.battery)


def _cluster(cluster: Cluster) -> str:
    words = [f"CPU {_ranges(cluster.cpus)}"]
    if cluster.core:
        words.append(cluster.core)
    if cluster.max_mhz is not None:
        lowest = f"{cluster.min_mhz:.0f} to " if cluster.min_mhz is not None else ""
        words.append(f"{lowest}{cluster.max_mhz:.0f} MHz")
    if cluster.now_mhz is not None:
        words.append(f"now {cluster.now_mhz:.0f}")
    words.append(f"governor {cluster.governor}" if cluster.governor else "frequencies are not shown")
    return ", ".join(words)


def _ranges(cpus: Sequence[int]) -> str:
    """
    >>> _ranges((0, 1, 2, 5))
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _memory(info: DeviceInfo) -> str:
    if info.memory_mb is None:
        return "it does not say"
    free = f", {info.free_memory_mb} free" if info.free_memory_mb is not None else ""
    swapped = f", {info.swap_used_mb} swapped out" if info.swap_used_mb else ""
    return f"{info.memory_mb} MB{free}{swapped}"


def _battery(battery: Battery) -> str:
    charging = {True: "charging", False: "not charging", None: None}[battery.charging]
    percent = None if battery.percent is None else f"{battery.percent:.0f} %"
    degrees = None if battery.temperature_c is None else f"{battery.temperature_c:.1f} °C"
    return ", ".join(word for word in (percent, charging, degrees) if word) or "it does not say"
