"""Keeps torch.onnx's table of operators between exports."""

from __future__ import annotations

import functools


@functools.cache
def keep_operators() -> None:
    """Let torch.onnx build its table of ONNX functions once a process instead of once an export.

    Building it parses the source of some 500 functions again: half of the time of exporting a small network. The
    table is the same each time and is only read where an export brings no functions of its own, and ours do not.
    Where another release of PyTorch has no such class, nothing is changed.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return
    build = getattr(ONNXRegistry, "from_torchlib", None)
    if build is not None:
        ONNXRegistry.from_torchlib = staticmethod(functools.cache(build))  # type: ignore[method-assign]
