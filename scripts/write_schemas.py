"""Writes the JSON Schemas in mobilekit/schemas/ again, from the types.

.venv/bin/python scripts/write_schemas.py
"""

from __future__ import annotations

from pathlib import Path

from mobilekit import schemas

for name in schemas.DOCUMENTS:
    Path(schemas.__file__).with_name(f"{name}.schema.json").write_text(schemas.generated(name), encoding="utf-8")
