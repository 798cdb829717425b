"""What commands share with the terminal: documents on stdout, bars and complaints on stderr, options and figures."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from mobilekit.errors import BadInputError

if TYPE_CHECKING:
    from mobilekit.pipeline import Listener
    from mobilekit.types import DeviceSettings

errors = Console(stderr=True, highlight=False)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Out = Annotated[Path | None, typer.Option("--out", help="Output folder [default: mobilekit-out/WORKLOAD].")]
DeviceSpec = Annotated[str | None, typer.Option("--device", help="Where to measure: host, ssh:USER@HOST, adb, ...")]
Devices = Annotated[
    str | None, typer.Option("--devices", help="More devices, commas between: they measure the final files.")
]
CoolTo = Annotated[
    float | None,
    typer.Option("--cool-to", metavar="C", min=-50, max=150, help="First wait until it is no hotter, at most 5 min."),
]
Runner = Annotated[
    str | None, typer.Option("--runner", help="Program that measures on the device, in place of mobilekit's script.")
]
Wheels = Annotated[
    str | None, typer.Option("--wheels", help="Folder of wheels with runtimes, for a board without internet.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]


def number(option: str, text: str | None, *, zero: bool = False) -> float | None:
    """A positive number (or zero where allowed) from the command line, or BadInputError with one sentence."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise BadInputError(f"{option} must be a number {'of at least' if zero else 'above'} 0, not '{text}'")
    return value


def device_settings(runner: str | None, wheels: str | None) -> DeviceSettings:
    """What was said about a device. Raises BadInputError for a path that does not exist."""
    from mobilekit.types import DeviceSettings

    if runner is not None and not Path(runner).is_file():
        raise BadInputError(f"--runner '{runner}' is no file: give the program that measures on the device")
    if wheels is not None and not Path(wheels).is_dir():
        raise BadInputError(f"--wheels '{wheels}' is no folder: give one that holds the runtimes' wheels")
    return DeviceSettings(runner=runner, wheels=wheels)


def listed(text: str | None) -> tuple[str, ...]:
    """The devices between the commas. Raises BadInputError where an option was given and names none."""
    found = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if text is not None and not found:
        raise BadInputError("--devices names no device: give some, with commas between, or leave it out")
    return found


def documents() -> Console:
    """For tables on stdout; a file or a pipe has no width that names would have to be cut to."""
    return Console(width=None if sys.stdout.isatty() else 240)


def figure(value: float | None, form: str) -> str:
    """A number, or the words for one that nobody measured."""
    return "not measured" if value is None else format(value, form)


class LeftColumn(TimeRemainingColumn):
    """The time that a stage still takes: what it says itself where it knows, else what its speed so far tells."""

    def render(self, task: Task) -> Text:
        """Minutes and seconds, with what they are."""
        known = task.fields.get("remaining")
        if task.finished:
            return Text()
        if known is None:
            return Text.assemble(super().render(task), " left")
        return Text(f"{known // 60:.0f}:{known % 60:02.0f} left", style="progress.remaining")


@contextmanager
def listening() -> Iterator[Listener]:
    """Bars and lines on stderr while a job runs."""
    from mobilekit.pipeline import Listener

    columns = (TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn(), LeftColumn())
    bars = Progress(*columns, console=errors)
    tasks: dict[str, TaskID] = {}

    def task(stage: str) -> TaskID:
        bars.start()  # not before: an error in the input is then all that is on stderr
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=1.0)
        return tasks[stage]

    def progress(stage: str, fraction: float) -> None:
        bars.update(task(stage), completed=min(1.0, fraction))

    def remaining(stage: str, seconds: float) -> None:
        bars.update(task(stage), remaining=int(seconds))

    try:
        with contextlib.redirect_stdout(sys.stderr):  # a workload may print: stdout is for documents only
            yield Listener(progress, lambda text: bars.console.print(text, markup=False), remaining)
    finally:
        if tasks:
            bars.stop()
