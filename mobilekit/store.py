"""The output folder: whole files or none, lines that survive a crash, and what a resumed run needs."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mobilekit import documents
from mobilekit.errors import BadInputError, StorageError
from mobilekit.files import appearing, disk

OWN_FILES = (
    "plan.json", "report.html", "report.md", "report.json", "measurements.jsonl", "failures.jsonl",
)  # fmt: skip
OWN_FOLDERS = ("models", "checkpoints")
MARK = ".mobilekit"
"""Says that the files with these names came from a run, and may be removed by the next."""
LEAST_FREE_BYTES = 64 * 2**20


class Store:
    """One folder DIR of a plan.

    Every write is atomic (a temporary sibling, flushed, then renamed); JSONL files are appended line by line.
    Errors of the disk become StorageError with one sentence.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._appending = threading.Lock()
        """Several devices may be measured at the same time, and a line's number is part of what is kept."""

    def open(self) -> None:
        """Make the folder and check that a run's files have room in it.

        Raises BadInputError where the path is a file, StorageError where it cannot be written or is nearly full.
        """
        there = next(place for place in (self.folder, *self.folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise BadInputError(f"the output folder '{self.folder}' is a file: give another --out")
        with disk(self.folder):
            total, _, free = shutil.disk_usage(there)
        if total and free < LEAST_FREE_BYTES:  # some virtual file systems have no size
            raise StorageError(
                f"'{self.folder}' has {free / 2**20:.0f} MB free and a run needs {LEAST_FREE_BYTES / 2**20:.0f}: "
                "free some space or give another --out"
            )
        with disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def prepare(self, key: str = "", *, resume: bool) -> bool:
        """Make the folder ready for a run: without `resume` remove what an earlier run left, else only its drafts.

        What a run with another key left is removed too: nothing of it can be gone on from. Returns whether an earlier
        run is gone on with. Raises BadInputError where
        the folder holds something under our names that no run of ours wrote.
        """
        self.open()
        mark = f"Made by mobilekit: a new run removes its earlier files here.\n{key}\n"
        if not self.path(MARK).exists():
            self._refuse_foreign()
        with disk(self.path(MARK)):
            resume = resume and self.path(MARK).exists() and self.path(MARK).read_text(encoding="utf-8") == mark
        self.write_text(MARK, mark)
        with disk(self.folder):
            left = self._drafts() if resume else [self.path(name) for name in (*OWN_FILES, *OWN_FOLDERS)]
            for path in left:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            for name in OWN_FOLDERS:
                self.path(name).mkdir(exist_ok=True)
        return resume

    def _refuse_foreign(self) -> None:
        for name in (*OWN_FILES, *OWN_FOLDERS):
            path = self.path(name)
            if any(path.iterdir()) if path.is_dir() else path.exists():
                raise BadInputError(
                    f"the output folder holds '{name}' already, and not from mobilekit ('{path}'): give another --out"
                )

    def _drafts(self) -> list[Path]:
        """What a killed run was writing: hidden siblings of its files."""
        hidden = [path for name in OWN_FOLDERS for path in self.path(name).glob(".*")]
        return hidden + [path for name in OWN_FILES for path in self.folder.glob(f".{name}.*")]

    def path(self, *parts: str) -> Path:
        """A path inside the folder."""
        return self.folder.joinpath(*parts)

    def write_text(self, name: str, text: str) -> Path:
        """Write a whole file."""
        return self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Let `writer` fill a temporary file, then put it in place."""
        target = self.path(name)
        with appearing(target) as draft:
            writer(draft)
        return target

    def append(self, name: str, value: BaseModel) -> int:
        """Append one JSON line; returns its line number (from 1). A line cut short by a crash is dropped first.

        Raises BadInputError where the file is a link: the line would land outside of the folder.
        """
        target = self.path(name)
        if target.is_symlink():
            raise BadInputError(f"'{target}' is a link, which is not written through: put the file itself there")
        with self._appending, disk(target):
            lines = self._whole_lines(target)
            with open(target, "a", encoding="utf-8") as file:
                file.write(value.model_dump_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
        return lines + 1

    def lines(self, name: str) -> list[Any]:
        """The JSON lines of a file, but for a last one that a crash cut short; none where it does not exist."""
        target = self.path(name)
        if not target.exists():
            return []
        content = documents.content(target, f"'{target}'")
        lines = content.decode("utf-8", errors="replace").split("\n")[:-1]
        found = []
        for number, line in enumerate(lines, 1):
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise StorageError(f"'{target}' is damaged at line {number}: run again without --resume") from error
        return found

    def _whole_lines(self, target: Path) -> int:
        """Count lines and cut off a last one that a crash left without its end."""
        if not target.exists():
            return 0
        content = target.read_bytes()
        if content and not content.endswith(b"\n"):
            content = content[: content.rfind(b"\n") + 1]
            with open(target, "r+b") as file:
                file.truncate(len(content))
        return content.count(b"\n")

    # ------------------------------------------------------------ checkpoints

    def load_stage(self, name: str, key: str) -> Any | None:
        """What `save_stage` kept under this name for the same key, or None."""
        path = self.path("checkpoints", f"{name}.json")
        if not path.exists():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return kept.get("value") if isinstance(kept, dict) and kept.get("key") == key else None

    def save_stage(self, name: str, key: str, value: Any) -> None:
        """Keep a finished stage's JSON-able result."""
        self.write_text(f"checkpoints/{name}.json", json.dumps({"key": key, "value": value}))

    def save_tensors(self, name: str, tensors: dict[str, Any]) -> Path:
        """Keep tensors as safetensors under checkpoints/."""
        from safetensors.torch import save

        contiguous = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        # Written by us and not by safetensors, whose errors do not say what is wrong with the disk.
        return self.write(f"checkpoints/{name}.safetensors", lambda path: path.write_bytes(save(contiguous)))

    def load_tensors(self, name: str) -> dict[str, Any] | None:
        """Tensors kept by `save_tensors`, or None where there are none that can be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path("checkpoints", f"{name}.safetensors")
        try:
            return dict(load_file(path)) if path.exists() else None
        except SafetensorError:
            return None
