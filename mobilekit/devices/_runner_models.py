"""Model files opened in their runtimes: what is fed to them, a run, their outputs; stands alone beside `_runner.py`."""

# The rules below want Python 3.11; boards have 3.9.
# ruff: noqa: B905

from __future__ import annotations

import base64
import contextlib
import importlib
import math
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Run = Callable[[], object]
Kind = tuple[list[Any], str]
"""Shape and type of an input."""

PACKAGES = {"onnx": "onnxruntime", "tflite": "ai-edge-litert"}


class Opened:
    """A model that can be run, with one of the samples that it was given as its input."""

    samples: list[list[Any]]
    """For each sample the arrays of the inputs in their order."""

    def feed(self, sample: int) -> None:
        """Take this sample from now on."""
        raise NotImplementedError

    def run(self) -> object:
        """Run once."""
        raise NotImplementedError

    def results(self) -> list[tuple[str, Any]]:
        """Name and values of each output for the sample; runs once."""
        raise NotImplementedError

    def outputs(self) -> list[dict[str, Any]]:
        """The outputs for all samples, as RESULT.json holds them. The first sample is fed again afterwards."""
        import numpy as np

        found = []
        for sample in range(len(self.samples)):
            self.feed(sample)
            found.append([(name, np.array(values)) for name, values in self.results()])  # copies: runs overwrite them
        self.feed(0)
        rows = []
        for column in zip(*found):
            name, parts = column[0][0], [values for _, values in column]
            batched = parts[0].ndim > 0 and parts[0].shape[0] == 1
            whole = np.concatenate(parts) if batched else np.stack(parts)
            little = np.ascontiguousarray(whole, whole.dtype.newbyteorder("<"))
            data = base64.b64encode(little.tobytes()).decode("ascii")
            rows.append({"name": name, "shape": list(whole.shape), "dtype": whole.dtype.name, "data": data})
        return rows


def tensor(shape: list[Any], dtype: str) -> Any:
    """An input: seeded normal numbers for floats, zeros for everything else. Unknown extents are 1."""
    import numpy as np

    if not dtype.startswith("float"):
        return np.zeros(extents(shape), dtype=dtype)
    return np.random.default_rng(0).standard_normal(extents(shape), dtype=np.float32).astype(dtype)


def extents(shape: list[Any]) -> list[int]:
    """A shape whose open axes are 1."""
    return [size if isinstance(size, int) and size > 0 else 1 for size in shape]


def samples(files: Sequence[str], kinds: Sequence[Kind]) -> list[list[Any]]:
    """What a model with such inputs is fed: the samples in these files, one file for each input, or one of `tensor`.

    Raises ValueError where the files are not of these inputs.
    """
    import numpy as np

    if not files:
        return [[tensor(shape, dtype) for shape, dtype in kinds]]
    if len(files) != len(kinds):
        raise ValueError(f"{len(files)} files of inputs were given for the model's {len(kinds)} inputs")
    columns = []
    for file, (shape, dtype) in zip(files, kinds):
        little = np.dtype(dtype).newbyteorder("<")
        values = Path(file).read_bytes()
        size = little.itemsize * math.prod(extents(shape))
        if not values or len(values) % size:
            raise ValueError(f"a file of inputs holds {len(values)} bytes, and a sample of the model's input {size}")
        columns.append(np.frombuffer(values, little).astype(dtype).reshape([-1, *extents(shape)]))
    if len({len(column) for column in columns}) > 1:
        raise ValueError("the files of inputs do not hold equally many samples")
    return [[column[number] for column in columns] for number in range(len(columns[0]))]


# ---------------------------------------------------------------- ONNX Runtime


class Onnx(Opened):
    """A file in ONNX Runtime, without spinning threads."""

    def __init__(self, path: str, threads: int, inputs: Sequence[str] = (), profile_prefix: str = "") -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        # A thread that spins while it waits would burn the CPU time that is being measured.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile_prefix:
            options.enable_profiling = True
            options.profile_file_prefix = profile_prefix
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = {"float": "float32", "double": "float64"}
        kinds = [(entry.shape, entry.type[len("tensor(") : -1]) for entry in self.session.get_inputs()]
        self.samples = samples(inputs, [(shape, names.get(kind, kind)) for shape, kind in kinds])
        self.names = [entry.name for entry in self.session.get_inputs()]
        self.fed: dict[str, Any] = {}
        self.feed(0)

    def feed(self, sample: int) -> None:
        """Take this sample from now on."""
        self.fed = dict(zip(self.names, self.samples[sample]))

    def run(self) -> object:
        """Run once."""
        return self.session.run(None, self.fed)

    def results(self) -> list[tuple[str, Any]]:
        """Name and values of each output for the sample; runs once."""
        return list(zip([entry.name for entry in self.session.get_outputs()], self.session.run(None, self.fed)))


# ---------------------------------------------------------------- LiteRT


def interpreter_module() -> Any:
    """LiteRT's package, or that of its predecessor, which older boards have; its interpreter is imported."""
    for name in ("ai_edge_litert", "tflite_runtime"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name + ".interpreter")
            return sys.modules[name]
    raise ImportError("neither ai_edge_litert nor tflite_runtime is installed")


class Tflite(Opened):
    """A file in LiteRT."""

    def __init__(self, path: str, threads: int, inputs: Sequence[str] = ()) -> None:
        import numpy as np

        self.interpreter = interpreter_module().interpreter.Interpreter(model_path=path, num_threads=threads)
        self.interpreter.allocate_tensors()
        self.ends = self.interpreter.get_input_details()
        kinds = [(entry["shape"].tolist(), np.dtype(entry["dtype"]).name) for entry in self.ends]
        self.samples = samples(inputs, kinds)
        self.run = self.interpreter.invoke  # type: ignore[method-assign] # nothing of ours inside a timed run
        self.feed(0)

    def feed(self, sample: int) -> None:
        """Take this sample from now on: invoking does not overwrite inputs."""
        for entry, values in zip(self.ends, self.samples[sample]):
            self.interpreter.set_tensor(entry["index"], values)

    def results(self) -> list[tuple[str, Any]]:
        """Name and values of each output for the sample; runs once."""
        self.interpreter.invoke()
        return [
            (entry["name"], self.interpreter.get_tensor(entry["index"]))
            for entry in self.interpreter.get_output_details()
        ]


LOADERS: dict[str, Callable[[str, int, Sequence[str]], Opened]] = {"onnx": Onnx, "tflite": Tflite}


def import_runtimes(names: set[str]) -> dict[str, str]:
    """Import runtimes before anything is timed; returns the versions of those that are there."""
    import numpy as np

    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for name in names & set(LOADERS):
        with contextlib.suppress(ImportError):
            module = importlib.import_module("onnxruntime") if name == "onnx" else interpreter_module()
            versions[name] = str(getattr(module, "__version__", "unknown"))
    return versions
