"""Many runs at once: workloads x profiles x runtimes x budgets x seeds, each a cell of its own, and one summary."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from mobilekit import __version__
from mobilekit.errors import BadInputError, MobilekitError
from mobilekit.files import disk
from mobilekit.pipeline import _sweep_engines as engines
from mobilekit.pipeline._sweep_folders import FAILURE, JOB
from mobilekit.pipeline._sweep_rows import row_of
from mobilekit.pipeline._sweep_spec import Cell, cells_of, read_spec
from mobilekit.pipeline.listener import Listener
from mobilekit.reports import _sweep as report
from mobilekit.reports._words import plural
from mobilekit.store import Store
from mobilekit.types.sweep import CellRow, SweepSummary
from mobilekit.workload import load

ATTEMPTS = 2
"""Of each cell: one that failed is tried once more, from where it was."""
DISTURBED = (
    "several cells may have been measured on one device at the same time, which disturbs their latencies: "
    "give --jobs 1, or on a cluster --cpus-per-cell as many as a machine has"
)
MARK = ".mobilekit-sweep"
CELLS, ROWS, SUMMARY = "cells", "cells.jsonl", "sweep"


@dataclass(frozen=True)
class Where:
    """What the cells run on."""

    engine: Literal["local", "ray"] = "local"
    jobs: int | None = None
    """Most cells at once; None: one here, and as many as a cluster takes there."""
    ray_address: str | None = None
    """None: what RAY_ADDRESS names, else a local cluster for the time of the sweep."""
    cpus_per_cell: int = 1
    """CPUs that Ray sets aside for each cell."""


def sweep(
    spec_file: Path, out: Path, listener: Listener, where: Where | None = None, *, resume: bool = False
) -> SweepSummary:
    """Carry out every cell of a specification and write one summary. What `mobilekit sweep` does.

    A failed cell is tried once more and does not stop the others. Every finished cell is a line of `cells.jsonl` at
    once; `resume` keeps those whose request, profile, workload and weights are still the same. Raises BadInputError
    for a specification that is wrong, before anything is written.
    """
    where = where or Where()
    spec = read_spec(spec_file)
    cells = cells_of(spec, spec_file)
    store = Store(out)
    _refuse(store, resume=resume)
    rows = _finished(store, cells) if resume else {}
    listener.say(plural(len(cells), "cell") + (f", {len(rows)} of them finished before" if rows else ""))
    if len(rows) < len(cells):
        engine = _engine(where)
        try:
            _carry_out(store, engine, cells, rows, listener)
        finally:
            engine.close()
    summary = SweepSummary(
        mobilekit_version=__version__,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        spec=spec_file.name,
        engine=where.engine,
        dry_run=spec.dry_run,
        cells=tuple(rows[cell.name] for cell in cells),
        warnings=(DISTURBED,) if any(row.disturbed for row in rows.values()) else (),
    )
    _write(store, summary)
    return summary


def _write(store: Store, summary: SweepSummary) -> None:
    """sweep.json, sweep.svg where there is anything to draw, sweep.md and sweep.html."""
    store.write_text(f"{SUMMARY}.json", summary.model_dump_json(by_alias=True, indent=2) + "\n")
    picture = report.svg(summary)
    if picture:
        store.write_text(f"{SUMMARY}.svg", picture)
    else:
        with disk(store.folder):
            store.path(f"{SUMMARY}.svg").unlink(missing_ok=True)
    store.write_text(f"{SUMMARY}.md", report.markdown(summary))
    store.write_text(f"{SUMMARY}.html", report.html(summary))


# ---------------------------------------------------------------- the folder


def _refuse(store: Store, *, resume: bool) -> None:
    """Raise BadInputError where the folder holds a sweep that is not gone on with, or others' files."""
    if store.path(MARK).exists():
        if not resume:
            raise BadInputError(
                f"'{store.folder}' holds a sweep already: --resume goes on with it, or give another --out"
            )
        return
    for name in (CELLS, ROWS, *(f"{SUMMARY}.{suffix}" for suffix in ("json", "svg", "md", "html"))):
        if store.path(name).exists():
            raise BadInputError(f"'{store.path(name)}' is there already, and not from a sweep: give another --out")


def _claim(store: Store) -> None:
    """Make the folder, mark it as ours, and remove what a killed sweep was putting in place."""
    store.open()
    store.write_text(MARK, "Made by mobilekit sweep: --resume goes on with what is here.\n")
    with disk(store.folder):
        store.path(CELLS).mkdir(exist_ok=True)
        for draft in store.path(CELLS).glob(".*"):
            shutil.rmtree(draft)


def _finished(store: Store, cells: list[Cell]) -> dict[str, CellRow]:
    """The rows of an earlier sweep that are still right: same request, same profile, same workload and weights."""
    earlier: dict[str, CellRow] = {}
    for line in store.lines(ROWS):
        try:
            row = CellRow.model_validate(line)
        except ValidationError:
            continue  # of another version: run again
        earlier[row.name] = row
    keys: dict[str, str | None] = {}
    kept = {}
    for cell in cells:
        found = earlier.get(cell.name)
        if found is None or found.failure is not None or found.key != cell.job.key:
            continue
        if not store.path(found.folder, "report.json").is_file():
            continue
        if cell.job.workload not in keys:
            keys[cell.job.workload] = _workload_key(cell.job.workload)
        if found.workload_key == keys[cell.job.workload]:
            kept[cell.name] = found
    return kept


def _workload_key(spec: str) -> str | None:
    """sha256 of the workload as it is now; None where it does not load any more, which its cells will say."""
    try:
        return load(spec).key
    except MobilekitError:
        return None


# ---------------------------------------------------------------- running the cells


def _engine(where: Where) -> engines.Engine:
    if where.engine == "ray":
        return engines.OnRay(where.ray_address, where.cpus_per_cell, where.jobs)
    return engines.Local(where.jobs or 1)


def _carry_out(
    store: Store, engine: engines.Engine, cells: list[Cell], rows: dict[str, CellRow], listener: Listener
) -> None:
    """Run the cells that have no row yet, and add their rows."""
    waiting = [cell for cell in cells if cell.name not in rows]
    disturbed = _disturbed(engine, waiting)
    if disturbed:
        listener.say(f"warning: {DISTURBED}")
    _claim(store)
    listener.progress("cells", len(rows) / len(cells))
    for found in _Queue(store, engine, waiting, listener).rows():
        row = found.model_copy(update={"disturbed": found.name in disturbed})
        store.append(ROWS, row)
        rows[row.name] = row
        listener.say(f"{len(rows)}/{len(cells)} {row.name}: {report.in_words(row)}")
        listener.progress("cells", len(rows) / len(cells))


def _disturbed(engine: engines.Engine, cells: list[Cell]) -> set[str]:
    """Names of the cells that may be measured while another one keeps the same device busy."""
    if engine.slots == 1 or len(cells) == 1:
        return set()
    return {cell.name for cell in cells if cell.measured and (engine.crowded or cell.job.device not in (None, "host"))}


class _Queue:
    """Hands cells to an engine, and failed ones a second time."""

    def __init__(self, store: Store, engine: engines.Engine, cells: list[Cell], listener: Listener) -> None:
        self.store, self.engine, self.listener = store, engine, listener
        self.waiting = deque(cells)
        self.running: dict[str, Cell] = {}
        self.seconds: dict[str, list[float]] = {cell.name: [] for cell in cells}

    def rows(self) -> Iterator[CellRow]:
        """The row of each cell as it lands."""
        while self.waiting or self.running:
            while self.waiting and (self.engine.slots is None or len(self.running) < self.engine.slots):
                self._submit(self.waiting.popleft())
            ended = self.engine.next()
            cell = self.running.pop(ended.name)
            spent = self.seconds[cell.name]
            spent.append(ended.seconds)
            row = row_of(cell, self._folder(cell), ended, len(spent), sum(spent))
            if row.failure is not None and len(spent) < ATTEMPTS:
                self.listener.say(f"{cell.name} failed and is tried once more: {row.failure.message}")
                self.waiting.appendleft(cell)
                continue
            yield row

    def _folder(self, cell: Cell) -> Path:
        return self.store.path(CELLS, cell.name)

    def _submit(self, cell: Cell) -> None:
        """Write the job down; what an earlier attempt said of its end is no longer true."""
        folder = self._folder(cell)
        with disk(folder):
            folder.mkdir(exist_ok=True)
            for name in ("report.json", FAILURE):
                (folder / name).unlink(missing_ok=True)
        Store(folder).write_text(JOB, cell.job.model_dump_json(indent=2) + "\n")
        self.running[cell.name] = cell
        self.engine.submit(folder)
