"""Names and order of a TFLite file's inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilekit.errors import UnsupportedError
from mobilekit.runtimes._tflite_tables import packed, unpacked


def name_ends(path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    """Give the inputs and outputs of a converted file these names and this order, in place.

    The names are those in the signature and those of the tensors, but for a tensor that is several outputs, or an input
    too: it keeps its first. Raises UnsupportedError where the converter has dropped an input or an output.
    """
    model = unpacked(path.read_bytes())
    graph, signature = model.subgraphs[0], model.signatureDefs[0]
    given, results = _in_order(signature.inputs), _in_order(signature.outputs)
    if len(given) != len(inputs) or len(results) != len(outputs):
        raise UnsupportedError(
            f"litert-torch kept {len(given)} of {len(inputs)} inputs and {len(results)} of {len(outputs)} outputs: "
            "leave out those that nothing reads or changes"
        )
    taken: set[int] = set()
    for entry, name in zip((*given, *results), (*inputs, *outputs), strict=True):
        entry.name = name.encode()
        if entry.tensorIndex not in taken:
            _rename(graph, entry.tensorIndex, name)
        taken.add(entry.tensorIndex)
    graph.inputs = [entry.tensorIndex for entry in given]
    graph.outputs = [entry.tensorIndex for entry in results]
    path.write_bytes(packed(model))


def _in_order(entries: list[Any]) -> list[Any]:
    """The converter calls them `args_0`, `args_1`, ... and `output_0`, `output_1`, ..., and sorts them as words."""
    return sorted(entries, key=lambda entry: int(entry.name.decode().rpartition("_")[2]))


def _rename(graph: Any, index: int, name: str) -> None:
    """Tensors go by their names in the quantiser: another of this name makes way."""
    for other, tensor in enumerate(graph.tensors):
        if tensor.name == name.encode() and other != index:
            tensor.name = f"{name}_{other}".encode()
    graph.tensors[index].name = name.encode()
