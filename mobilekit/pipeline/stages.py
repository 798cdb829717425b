"""Runs the story's stages: each is timed, kept when finished, and not repeated by a resumed run."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from mobilekit.interfaces import Progress
from mobilekit.store import Store
from mobilekit.types import Failure, StageRow

T = TypeVar("T")


class Stages:
    """The finished stages of one run in one folder."""

    def __init__(self, store: Store, key: str, progress: Progress) -> None:
        self.store = store
        self.key = key
        self.progress = progress
        self.rows: list[StageRow] = []
        self._failing = threading.Lock()
        self.failures = [Failure.model_validate(line) for line in store.lines("failures.jsonl")]

    def run(self, name: str, kind: object, compute: Callable[[], T]) -> T:
        """The stage's result: kept from an earlier run with the same key, or computed and kept now.

        `kind` is the result's type, as pydantic's TypeAdapter takes it.
        """
        adapter: TypeAdapter[T] = TypeAdapter(kind)
        kept = self.store.load_stage(name, self.key)
        try:
            if kept is not None:
                earlier = adapter.validate_python(kept["value"])
                self.rows.append(StageRow(name=name, seconds=kept["seconds"], resumed=True))
                self.progress(name, 1.0)
                return earlier
        except (ValidationError, KeyError, TypeError):
            pass  # damaged: done again
        self.progress(name, 0.0)
        started = time.monotonic()
        value = compute()
        seconds = time.monotonic() - started
        self.store.save_stage(name, self.key, {"seconds": seconds, "value": adapter.dump_python(value, mode="json")})
        self.rows.append(StageRow(name=name, seconds=seconds))
        self.progress(name, 1.0)
        return value

    def told_as(self, subject: str) -> Stages:
        """The same stages and failures, whose progress is told as that of `subject`."""
        told = copy.copy(self)
        told.progress = lambda _stage, fraction: self.progress(subject, fraction)
        return told

    def fail(self, failure: Failure) -> None:
        """Keep a failure; a resumed run that fails alike does not say it twice."""
        with self._failing:
            if failure not in self.failures:
                self.failures.append(failure)
                self.store.append("failures.jsonl", failure)
