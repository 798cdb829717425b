"""Reads the ML Program of a Core ML package: its operations, what they write, and the constants in its files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mobilekit.errors import BadInputError, UnsupportedError, first_line
from mobilekit.runtimes._job import quiet

ELEMENTS: dict[str, str] = {
    "BOOL": "bool",
    "STRING": "string",
    "FLOAT16": "fp16",
    "FLOAT32": "fp32",
    "FLOAT64": "fp64",
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (4, 8, 16, 32, 64)},
    **{f"UINT{bits}": f"uint{bits}" for bits in (1, 2, 3, 6)},
}
"""MIL's names of element types -> the ones used here."""
ARRAYS: dict[str, Any] = {
    "bool": np.bool_,
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
    "int4": np.int8,
    **{f"uint{bits}": np.uint8 for bits in (1, 2, 3, 4, 6)},
    **{
        name: np.dtype(name)
        for name in ELEMENTS.values()
        if name.removeprefix("u") in ("int8", "int16", "int32", "int64")
    },
}
"""Element type -> the NumPy type that its values are read into; types below a byte have one value a byte."""
BLOB_READERS = {"fp32": "read_float_data"}
"""Element types whose reader in coremltools' weight files is not called `read_TYPE_data`."""
IN_PACKAGE = "@model_path/"


@dataclass(frozen=True)
class TensorType:
    """A tensor of the program: its name, type of elements, and shape (None: a length that the file leaves open)."""

    name: str
    elements: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Constant:
    """A stored value; nothing is read from the weight file until `value` is called."""

    type: TensorType
    stored: Any
    """coremltools.proto.MIL_pb2.Value"""
    folder: Path

    def value(self) -> np.ndarray | str:
        """The value in its declared shape, types below a byte one value a byte; a string as it is.

        Raises BadInputError where the file does not hold what it declares, UnsupportedError for lists and the like.
        """
        try:
            return self._blob() if self.stored.WhichOneof("value") == "blobFileValue" else self._immediate()
        except (RuntimeError, ValueError, OSError) as error:
            raise BadInputError(
                f"the constant {self.type.name} cannot be read ({first_line(error)}); export the Core ML package again"
            ) from None

    def _blob(self) -> np.ndarray:
        from coremltools.libmilstoragepython import _BlobStorageReader as Reader

        place, elements = self.stored.blobFileValue, self.type.elements
        path = (self.folder / place.fileName.removeprefix(IN_PACKAGE)).resolve()
        if not place.fileName.startswith(IN_PACKAGE) or not path.is_relative_to(self.folder.resolve()):
            raise ValueError("its weight file lies outside the package")
        if not path.is_file():
            raise ValueError(f"the package has no file {place.fileName.removeprefix(IN_PACKAGE)}")
        read = getattr(Reader(str(path)), BLOB_READERS.get(elements, f"read_{elements}_data"), None)
        if read is None:
            raise ValueError(f"weight files hold no {elements}")
        # A copy: the reader maps the file into memory.
        found = np.array(read(place.offset))
        return self._shaped(found.view(np.float16) if elements == "fp16" else found)

    def _immediate(self) -> np.ndarray | str:
        kind = self.stored.immediateValue.WhichOneof("value")
        if kind != "tensor":
            raise UnsupportedError(f"the constant {self.type.name} is a {kind}, which mobilekit does not evaluate")
        tensor = self.stored.immediateValue.tensor
        field_name = tensor.WhichOneof("value")
        values = getattr(tensor, field_name).values
        if self.type.elements == "string":
            return str(values[0]) if len(values) else ""
        if field_name == "bytes":
            return self._shaped(_from_bytes(values, self.type))
        return self._shaped(np.array(values))

    def _shaped(self, values: np.ndarray) -> np.ndarray:
        wanted = ARRAYS.get(self.type.elements)
        if wanted is None or None in self.type.shape:
            raise ValueError(f"constants are not of type {self.type.elements} {list(self.type.shape)}")
        return values.astype(wanted).reshape([int(size or 0) for size in self.type.shape])


@dataclass(frozen=True)
class Operation:
    """One operation: the names of what it reads, by parameter, and what it writes."""

    kind: str
    arguments: dict[str, tuple[str, ...]]
    outputs: tuple[TensorType, ...]

    @property
    def name(self) -> str:
        """The name of its first output, which no other operation has."""
        return self.outputs[0].name

    def reads(self) -> Iterator[str]:
        """Names of all tensors and constants that it reads."""
        for names in self.arguments.values():
            yield from names


@dataclass(frozen=True)
class Program:
    """The main function of an ML Program, with every operation after those that it reads."""

    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    operations: tuple[Operation, ...]
    """All but `const`: those are `constants`, and so are values that stand in place of an operation's argument."""
    constants: dict[str, Constant] = field(repr=False)


def read(path: Path) -> Program:
    """Read a package (or a single .mlmodel file that holds an ML Program).

    Raises BadInputError, in a sentence, where it is none or refers to what it does not hold.
    """
    if not path.exists():
        raise BadInputError(f"{path} does not exist; export it first")
    parts = [path, *path.rglob("*")]
    strange = [each for each in parts[1:] if each.is_symlink()] + [
        each for each in parts if not (each.is_dir() or each.is_file())
    ]
    if strange:  # a pipe would wait for its writer, and a link may lead anywhere
        raise BadInputError(f"{path} holds a link or something that is no file ({strange[0].name}): export it again")
    specification, folder = _specification(path)
    functions = specification.mlProgram.functions
    main = functions.get(specification.description.defaultFunctionName or "main")
    block = main.block_specializations.get(main.opset) if main is not None else None
    if main is None or block is None:
        raise BadInputError(f"{path} holds no ML Program; export it again")
    try:
        return _Reading(folder, main, block).program()
    except ValueError as error:
        raise BadInputError(f"cannot read {path} as a Core ML package ({error}); export it again") from None


def unpacked(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` numbers of `bits` bits each (1 to 8) of a stream of bytes, least significant bit first: uint8.

    Raises ValueError where the stream holds fewer.
    """
    stream = np.unpackbits(np.ascontiguousarray(packed).reshape(-1).view(np.uint8), bitorder="little")
    if stream.size < count * bits:
        raise ValueError(f"{stream.size // bits} packed numbers where {count} are declared")
    return np.packbits(stream[: count * bits].reshape(count, bits), axis=1, bitorder="little").reshape(-1)


def _specification(path: Path) -> tuple[Any, Path]:
    """The model description, and the folder that weight files are named from."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    with quiet(native=True):
        import coremltools

        try:
            root = _root_model(path) if path.is_dir() else path
            return coremltools.utils.load_spec(str(root)), root.parent
        except (OSError, DecodeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            shown = first_line(error)
            raise BadInputError(f"cannot read {path} as a Core ML package ({shown}); export it again") from None


def _root_model(package: Path) -> Path:
    """The model description that a package's manifest names.

    coremltools' own reader writes a manifest into packages that have none. Raises ValueError, OSError or a lookup error
    where there is none to be had.
    """
    manifest = json.loads((package / "Manifest.json").read_bytes())
    data = (package / "Data").resolve()
    found: Path = (data / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]).resolve()
    if not found.is_relative_to(data):
        raise ValueError("its manifest names a file outside of it")
    return found


def _from_bytes(content: bytes, tensor: TensorType) -> np.ndarray:
    """Values that stand in the description as bytes."""
    elements = tensor.elements
    bits = int(elements.partition("int")[2] or 8)
    if bits >= 8 or elements.startswith("fp"):
        return np.frombuffer(content, ARRAYS[elements])
    values = unpacked(np.frombuffer(content, np.uint8), bits, math.prod(size or 0 for size in tensor.shape))
    signed = values.astype(np.int8)
    return signed if elements.startswith("u") else np.where(signed >= 2 ** (bits - 1), signed - 2**bits, signed)


class _Reading:
    """Turns a function of the description into a Program. Raises ValueError where its parts do not fit together."""

    def __init__(self, folder: Path, main: Any, block: Any) -> None:
        from coremltools.proto import MIL_pb2

        self.folder, self.main, self.block = folder, main, block
        self.element_names = MIL_pb2.DataType
        self.known: dict[str, TensorType] = {}
        self.constants: dict[str, Constant] = {}

    def program(self) -> Program:
        """The whole function."""
        inputs = tuple(self._written(value) for value in self.main.inputs)
        operations = [done for operation in self.block.operations if (done := self._operation(operation))]
        for name in self.block.outputs:
            self._must_be_known(name)
        outputs = tuple(self.known[name] for name in self.block.outputs)
        return Program(inputs, outputs, tuple(operations), self.constants)

    def _operation(self, operation: Any) -> Operation | None:
        """An operation; None for a constant, which is kept apart."""
        if not operation.outputs:
            raise ValueError(f"an operation of kind {operation.type} writes nothing")
        if operation.type == "const":
            (output,) = operation.outputs
            self._keep(self._written(output), operation.attributes["val"])
            return None
        own = operation.outputs[0].name
        arguments = {}
        for parameter, argument in operation.inputs.items():
            bindings = list(enumerate(argument.arguments))
            arguments[parameter] = tuple(self._bound(f"{own}/{parameter}/{i}", binding) for i, binding in bindings)
        # iOS 16's constexpr operations have their parameters here.
        for parameter, value in operation.attributes.items():
            if parameter != "name":
                arguments[parameter] = (self._literal(f"{own}/{parameter}", value),)
        return Operation(operation.type, arguments, tuple(self._written(output) for output in operation.outputs))

    def _bound(self, place: str, binding: Any) -> str:
        if binding.WhichOneof("binding") == "value":
            return self._literal(place, binding.value)
        self._must_be_known(binding.name)
        return str(binding.name)

    def _literal(self, name: str, value: Any) -> str:
        self._keep(self._type(name, value.type), value)
        return name

    def _keep(self, tensor: TensorType, value: Any) -> None:
        self.constants[tensor.name] = Constant(tensor, value, self.folder)

    def _written(self, value: Any) -> TensorType:
        if value.name in self.known:
            raise ValueError(f"{value.name} is written twice")
        self.known[value.name] = self._type(value.name, value.type)
        return self.known[value.name]

    def _must_be_known(self, name: str) -> None:
        if name not in self.known:
            raise ValueError(f"{name} is read and not written before")

    def _type(self, name: str, declared: Any) -> TensorType:
        kind = declared.WhichOneof("type")
        if kind != "tensorType":
            return TensorType(name, str(kind), ())
        tensor = declared.tensorType
        written = self.element_names.Name(tensor.dataType)
        shape = tuple(
            int(size.constant.size) if size.WhichOneof("dimension") == "constant" else None
            for size in tensor.dimensions
        )
        return TensorType(name, ELEMENTS.get(written, written.lower()), shape)
