"""The commands of packages for download: pack, unpack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobilekit.cli.terminal import JsonFlag


def pack(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx or .tflite file, or an .mlpackage folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write [default: MODEL.mkpack].")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Pack a model file for download; unpack restores it bit for bit."""
    from mobilekit import packing

    made = packing.pack(model, out)
    if as_json:
        print(made.model_dump_json(indent=2))
        return
    zstd = f"{made.zstd_ratio:.2f}" if made.zstd_ratio is not None else f"not measured, {made.zstd_reason}"
    print(f"{made.original_bytes} -> {made.packed_bytes} bytes, ratio {made.ratio:.2f}, read back and compared")
    print(f"  beside it: zip {made.zip_ratio:.2f}; zstd {zstd}")
    print(f"package: {made.package}")


def unpack(
    package: Annotated[Path, typer.Argument(metavar="FILE", help="A package that pack made.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The model to write, or a folder to write it into [default: beside FILE]."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Restore the model of a package, checked by its SHA-256."""
    from mobilekit import packing

    made = packing.unpack(package, out)
    if as_json:
        print(made.model_dump_json(indent=2))
        return
    files = "1 file" if len(made.files) == 1 else f"{len(made.files)} files"
    print(f"{made.size_bytes} bytes in {files}, SHA-256 as packed")
    print(f"model: {made.model}")
