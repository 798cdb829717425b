"""JSON Schemas of the documents that apps and measuring programs read and write, made from the types and shipped
beside this file."""

from __future__ import annotations

import json

from pydantic import BaseModel

from mobilekit.types import Manifest, RunnerRequest, RunnerResult, SharedResult

DOCUMENTS: dict[str, type[BaseModel]] = {
    "manifest": Manifest,
    "shared_result": SharedResult,
    "runner_request": RunnerRequest,
    "runner_result": RunnerResult,
}


def generated(name: str) -> str:
    """The schema (draft 2020-12) of a document, as the text of `NAME.schema.json`.

    >>> "golden" in generated("manifest")
    True
    """
    kind = DOCUMENTS[name]
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema(by_alias=True)}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
