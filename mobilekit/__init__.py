"""mobilekit: a trained CNN and a latency budget in; checked mobile files and a measured report out.

The same verbs as the command line:

>>> import mobilekit as mk
>>> mk.Budget(latency_ms=12).latency_ms
12.0
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mobilekit.errors import BadInputError, MobilekitError
    from mobilekit.pipeline import build, export, measure, plan, predict
    from mobilekit.types import Budget, ExportOptions, Measurement, Plan, Report

__all__ = [
    "BadInputError",
    "Budget",
    "ExportOptions",
    "Measurement",
    "MobilekitError",
    "Plan",
    "Report",
    "build",
    "export",
    "measure",
    "plan",
    "predict",
]

_HOMES = {
    "BadInputError": "mobilekit.errors",
    "MobilekitError": "mobilekit.errors",
    "Budget": "mobilekit.types",
    "ExportOptions": "mobilekit.types",
    "Measurement": "mobilekit.types",
    "Plan": "mobilekit.types",
    "Report": "mobilekit.types",
}


def __getattr__(name: str) -> Any:
    """Load the verbs when they are first used: `import mobilekit` alone must not load torch or numpy."""
    if name not in __all__:
        raise AttributeError(f"module 'mobilekit' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES.get(name, "mobilekit.pipeline")), name)
