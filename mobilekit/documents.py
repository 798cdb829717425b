"""Reads JSON documents that others may have written: a checked value, or one sentence that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from mobilekit.errors import BadInputError, one_line

Document = TypeVar("Document", bound=BaseModel)

MOST_BYTES = 256 * 2**20
"""Far above any document of ours: a file that is larger is not read into memory."""
LONGEST = 120
"""Characters of a document's own words that are passed on."""


def read(path: Path, kind: type[Document], subject: str) -> Document:
    """The document in a file; `subject` names it, as in "the plan 'plan.json'".

    Raises BadInputError for a file that cannot be read, that is too large, and as `parse` does.
    """
    return parse(content(path, subject), kind, subject)


def content(path: Path, subject: str) -> bytes:
    """The bytes of a file. Raises BadInputError where it cannot be read, is no plain file, or is too large."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise BadInputError(f"{subject} cannot be read: it is no plain file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise BadInputError(f"{subject} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:  # a zero byte in the path
        raise BadInputError(f"{subject} cannot be read: {error}") from error
    if len(data) > MOST_BYTES:
        raise BadInputError(f"{subject} is larger than {MOST_BYTES >> 20} MiB, which no such document is")
    return data


def parse(data: bytes, kind: type[Document], subject: str) -> Document:
    """The document in these bytes. Raises BadInputError where they are not JSON or a field is wrong, which is named."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise BadInputError(f"{subject} {sentence(error)}") from error


def sentence(error: ValidationError) -> str:
    """Pydantic's first complaint in words, and how many more there are; ends a sentence that names the document."""
    complaints = error.errors(include_url=False)
    first = complaints[0]
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "json_invalid":
        return f"is not JSON: {short(message.removeprefix('invalid JSON: '))}"
    if first["type"] == "missing":
        message = "the field is missing"
    elif first["type"] == "extra_forbidden":
        message = "there is no such field"
    elif isinstance(first["input"], str | int | float | bool | None):
        message = f"{short(message)}, got {short(repr(first['input']), LONGEST // 2)}"
    others = len(complaints) - 1
    more = f" (and {others} more wrong field{'s' if others > 1 else ''})" if others else ""
    where = short(_where(first["loc"]), LONGEST // 2)
    return f"is wrong at {where}: {short(message, 2 * LONGEST)}{more}" if where else f"is wrong: {short(message)}{more}"


def short(text: str, most: int = LONGEST) -> str:
    """At most so many characters of a text, in one line that any terminal can show."""
    return one_line(text, most)


def _where(location: tuple[int | str, ...]) -> str:
    """A field's path as one would write it: tables[0].kinds.dense.low."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
