"""Says what a device's Python is and which runtimes it can import; stands alone, and is sent to `python3 -` there."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

MODULES = {
    "onnx": (("onnxruntime", "onnxruntime"),),
    "tflite": (("ai_edge_litert.interpreter", "ai-edge-litert"), ("tflite_runtime.interpreter", "tflite-runtime")),
}
CODE = """
import importlib, importlib.metadata, sys
import numpy
importlib.import_module(sys.argv[1])
try:
    print(importlib.metadata.version(sys.argv[2]))
except importlib.metadata.PackageNotFoundError:
    print("unknown")
"""


def version(module: str, package: str) -> str | None:
    """Version of a package whose module can be imported, or None. In a process of its own: native code may crash."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", CODE, module, package],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    words = done.stdout.decode("utf-8", "replace").split()
    return words[-1] if done.returncode == 0 and words else None


def main() -> None:
    """Print one line."""
    runtimes = {}
    for runtime, candidates in MODULES.items():
        for module, package in candidates:
            found = version(module, package) if sys.version_info >= (3, 8) else None
            if found is not None:
                runtimes[runtime] = found
                break
    facts = {
        "python": ".".join(str(number) for number in sys.version_info[:3]),
        "machine": platform.machine(),
        "runtimes": runtimes,
    }
    print("\nmobilekit " + json.dumps(facts))


if __name__ == "__main__":
    main()
