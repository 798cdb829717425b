"""What every noun is made of: frozen values and a few constrained numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["fp32", "fp16", "int8"]
RuntimeName = str
Target = Literal["host", "x86", "arm"]
"""Whose processors a file is for; `host`: this machine's."""
Origin = Literal["device", "emulator", "host"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Value(BaseModel):
    """A frozen value that refuses unknown fields, so that a misspelt key is an error and not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
