"""Reads a sweep's specification and makes its cells: every workload x profile x runtime x budget x seed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from mobilekit import __version__, profiles, registry
from mobilekit.errors import BadInputError
from mobilekit.pipeline.request import DEFAULT_TRAIN_SECONDS
from mobilekit.types import DeviceProfile
from mobilekit.types.sweep import CellJob, NamedBudget, SweepSpec

LONGEST_PART = 48
"""Characters of one axis in a folder's name: five of them stay below the 255 bytes of a file system."""


@dataclass(frozen=True)
class Cell:
    """One point of the product: its job, and what people call its parts."""

    name: str
    """Of its folder: unique, and plain on every file system."""
    workload: str
    profile: str
    budget: NamedBudget
    job: CellJob
    measured: bool
    """Whether a device is timed."""


def read_spec(path: Path) -> SweepSpec:
    """The specification in a TOML file.

    Raises BadInputError, in one sentence that names the field, for whatever is wrong with it.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"the sweep '{path}' cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"the sweep '{path}' is not text in UTF-8") from error
    except (ValueError, RecursionError) as error:
        said = str(error)[:1].lower() + str(error)[1:]
        raise BadInputError(f"the sweep '{path}' is not TOML: {said}") from error
    try:
        # TOML has dates and arrays where the specification has texts and tuples: JSON's rules tell them apart strictly.
        return SweepSpec.model_validate_json(json.dumps(found, default=str), strict=True)
    except ValidationError as error:
        raise BadInputError(f"the sweep '{path}' is wrong{_complaint(error)}") from error


def _complaint(error: ValidationError) -> str:
    """Pydantic's first complaint in words, with the field's path."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "the field is missing"
    elif first["type"] == "extra_forbidden":
        message = "there is no such field"
    elif isinstance(first["input"], str | int | float | bool):
        message += f", got {str(first['input'])[:60]!r}"
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    return f" at {where}: {message}" if where else f": {message}"


def cells_of(spec: SweepSpec, path: Path) -> list[Cell]:
    """The cells of a specification, workload by workload; `path` is its file, which relative paths start from.

    Raises BadInputError for a workload file, profile, runtime or device that does not exist.
    """
    folder = path.absolute().parent
    workloads = [
        _workload(text, folder, f"'{path}' is wrong at workloads[{i}]") for i, text in enumerate(spec.workloads)
    ]
    loaded = [_profile(text, folder, f"'{path}' is wrong at profiles[{i}]") for i, text in enumerate(spec.profiles)]
    _check_devices(spec, [profile for _, profile in loaded], path)
    axes = (
        zip(workloads, spec.workloads, _file_names(spec.workloads), strict=True),
        zip(loaded, spec.profiles, _file_names(spec.profiles), strict=True),
        zip(spec.runtimes or (None,), _unique(spec.runtimes or ("",)), strict=True),
        zip(spec.budgets, _unique([budget.label for budget in spec.budgets]), strict=True),
        spec.seeds,
    )
    cells = []
    for workload, profile, runtime, budget, seed in itertools.product(*axes):
        name = "__".join(filter(None, (workload[2], profile[2], runtime[1], budget[1], f"seed{seed}")))
        job = _job(spec, workload[0], profile[0], (runtime[0], budget[0], seed))
        measured = not spec.dry_run and (spec.device is not None or profile[0][1].kind == "host")
        cells.append(Cell(name, workload[1], profile[1], budget[0], job, measured))
    return cells


def _job(
    spec: SweepSpec, workload: str, profile: tuple[str, DeviceProfile], rest: tuple[str | None, NamedBudget, int]
) -> CellJob:
    source, found = profile
    runtime, budget, seed = rest
    return CellJob(
        mobilekit_version=__version__,
        workload=workload,
        profile=source,
        profile_sha256=hashlib.sha256(found.model_dump_json().encode()).hexdigest(),
        budget=budget.plain,
        runtime=runtime,
        device=spec.device,
        seed=seed,
        train=spec.train,
        train_seconds=DEFAULT_TRAIN_SECONDS if spec.train_minutes is None else 60 * spec.train_minutes,
        dry_run=spec.dry_run,
    )


# ---------------------------------------------------------------- what the axes name


def _workload(text: str, folder: Path, where: str) -> str:
    """An absolute path for a file, an importable name as it is."""
    path = folder / os.path.expanduser(text)
    if path.is_file():
        return str(path)
    if text.endswith(".py") or "/" in text or os.sep in text:
        raise BadInputError(f"the sweep {where}: '{path}' does not exist")
    return text


def _profile(text: str, folder: Path, where: str) -> tuple[str, DeviceProfile]:
    is_file = text.endswith(".json") or "/" in text or os.sep in text
    source = str(folder / os.path.expanduser(text)) if is_file else text
    try:
        return source, profiles.load(source)
    except BadInputError as error:
        raise BadInputError(f"the sweep {where}: {error}") from error


def _check_devices(spec: SweepSpec, loaded: Sequence[DeviceProfile], path: Path) -> None:
    for index, runtime in enumerate(spec.runtimes):
        for profile in loaded:
            if profile.runtime(runtime) is None:
                known = ", ".join(entry.name for entry in profile.runtimes)
                raise BadInputError(
                    f"the sweep '{path}' is wrong at runtimes[{index}]: the profile '{profile.name}' does not run "
                    f"{runtime}, but {known}"
                )
    if spec.device is not None:
        try:
            registry.device(spec.device)
        except BadInputError as error:
            raise BadInputError(f"the sweep '{path}' is wrong at device: {error}") from error


# ---------------------------------------------------------------- what folders are called


def _file_names(texts: Sequence[str]) -> list[str]:
    """The last part of each path or module name, with as many parts before it as tell them apart."""
    split = [re.split(r"[/\\]", re.sub(r"\.(py|json)$", "", text)) for text in texts]
    split = [parts if len(parts) > 1 else parts[0].split(".") for parts in split]
    names = [parts[-1] for parts in split]
    for depth in range(2, max(map(len, split)) + 1):
        taken = Counter(_plain(name) for name in names)
        names = [
            "-".join(parts[-depth:]) if taken[_plain(name)] > 1 else name
            for name, parts in zip(names, split, strict=True)
        ]
    return _unique(names)


def _unique(names: Sequence[str]) -> list[str]:
    """The names as parts of folder names, numbered where they would be alike."""
    found: list[str] = []
    for name in map(_plain, names):
        number = 1
        while (taken := name if number == 1 else f"{name}-{number}") in found:
            number += 1
        found.append(taken)
    return found


def _plain(name: str) -> str:
    """Lower case, digits, points and dashes: the same folder on every file system, and no way out of it."""
    plain = re.sub(r"_{2,}", "_", re.sub(r"[^a-z0-9._]+", "-", name.lower())).strip("-._")
    if not plain:
        return "x" if name else ""
    if len(plain) <= LONGEST_PART:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: LONGEST_PART - 9]}-{digest}"
