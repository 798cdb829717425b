"""Device profiles: the ones that are shipped as JSON files here, and files of the user's own."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from importlib import resources
from pathlib import Path

from mobilekit import documents
from mobilekit.errors import BadInputError
from mobilekit.profiles.explain import explained
from mobilekit.types import DeviceProfile

__all__ = ["cache_folder", "cache_path", "dump", "explained", "load", "names"]


def names() -> list[str]:
    """Names of the shipped profiles, sorted.

    >>> "host" in names()
    True
    """
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def load(name_or_path: str | Path) -> DeviceProfile:
    """The shipped profile of this name, or the one in this `.json` file.

    Raises BadInputError, in one sentence, for an unknown name, an unreadable file, a file that is not JSON and a
    file with a wrong field (its path in the file is named).

    >>> load("host").kind
    'host'
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".json") or "/" in text or os.sep in text:
        subject = f"profile file '{text}'"
        return _parse(documents.content(Path(text).expanduser(), subject), subject)
    known = names()
    if text not in known:
        near = difflib.get_close_matches(text.lower(), known, n=1, cutoff=0.4)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise BadInputError(
            f"unknown profile '{text}'{hint}: choose one that `mobilekit profile list` shows, or give the path of a "
            ".json file"
        )
    return _parse((resources.files(__name__) / f"{text}.json").read_bytes(), f"shipped profile '{text}'")


def dump(profile: DeviceProfile) -> str:
    """The profile as the text of a JSON file that `load` reads back to an equal value.

    >>> dump(load("host")).startswith("{")
    True
    """
    return profile.model_dump_json(indent=2) + "\n"


def cache_folder() -> Path:
    """`$MOBILEKIT_CACHE`, else `$XDG_CACHE_HOME/mobilekit`, else `~/.cache/mobilekit`. It is not created."""
    own = os.environ.get("MOBILEKIT_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(shared) / "mobilekit").expanduser()


def cache_path(key: str) -> Path:
    """Where the profile that was measured on the machine with this key is kept (`DeviceProfile.key`).

    In `cache_folder`. It is not created.

    >>> cache_path("Some CPU; onnx 1.23").name
    'host-some-cpu-onnx-1-23-cc3790b4.json'
    """
    # The readable part is for people and may be cut; the digest is what keeps two machines apart.
    readable = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")[:60]
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return cache_folder() / f"host-{readable}-{digest}.json"


def _parse(data: bytes, subject: str) -> DeviceProfile:
    profile = documents.parse(data, DeviceProfile, subject)
    listed = {entry.name for entry in profile.runtimes}
    for index, table in enumerate(profile.tables):
        if table.runtime not in listed:
            raise BadInputError(
                f"{subject} is wrong at tables[{index}].runtime: {documents.short(repr(table.runtime))} is not one of "
                f"its runtimes ({documents.short(', '.join(sorted(listed)))})"
            )
    return profile
