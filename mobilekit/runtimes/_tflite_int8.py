"""Turns a float TFLite file into int8 with exact ranges, and makes padded max pools fit for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from mobilekit.errors import UnsupportedError, first_line
from mobilekit.runtimes._job import quiet
from mobilekit.runtimes._selection import Selection
from mobilekit.runtimes._tflite_facts import schema
from mobilekit.runtimes._tflite_tables import packed, unpacked
from mobilekit.runtimes._tracing import FileNode, OperatorValue, kept_nodes

Range = tuple[float, float]


def quantised(
    content: bytes, interpreter: Any, samples: list[np.ndarray], selection: Selection, left: set[str]
) -> bytes:
    """The float network in int8, with float32 at both ends; operators that write the tensors `left` stay in float.

    `interpreter` runs the same network and keeps every tensor; samples are (1, H, W, C). Static ranges are over all
    samples; otherwise none is read. Raises UnsupportedError where a tensor of `left` cannot be told from others, and
    where the quantiser fails.
    """
    static = selection.activations == "static"
    ranges = _measured(interpreter, samples) if static else {}
    model = unpacked(content)
    if static and _give_pads_a_value(model, ranges):
        content = packed(model)
    with quiet(native=True):
        from ai_edge_quantizer import quantizer

        worker = quantizer.Quantizer(content, _recipe(selection))
        _leave_float(worker, [tensor.name.decode() for tensor in model.subgraphs[0].tensors], left)
        try:
            found = _calibrated(worker, interpreter, samples[0], ranges) if static else None
            return bytes(worker.quantize(found, enable_progress_report=False).quantized_model)
        # It raises bare ValueErrors where it meets operators that it knows half of.
        except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            message = f"ai-edge-quantizer cannot write the network in int8: {first_line(error)}"
            raise UnsupportedError(message) from error


def float_tensors(
    content: bytes, interpreter: Any, selection: Selection, values: list[OperatorValue], sample: np.ndarray
) -> set[str]:
    """Names of the tensors written by operators which stay in float. `sample` is (1, H, W, C).

    Raises UnsupportedError as `kept_nodes`.
    """
    graph = unpacked(content).subgraphs[0]
    names = [tensor.name.decode() for tensor in graph.tensors]
    nodes = [
        FileNode(
            names[operator.outputs[0]],
            tuple(names[i] for i in operator.inputs if i >= 0),
            tuple(names[i] for i in operator.outputs),
        )
        for operator in graph.operators
    ]
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], sample)
    interpreter.invoke()
    written = {name for node in nodes for name in node.outputs}
    tensors: dict[str, tuple[np.ndarray, ...]] = {}
    for detail in interpreter.get_tensor_details():
        if detail["name"] in written and detail["dtype"] is np.float32:
            value = interpreter.get_tensor(detail["index"])
            forms = (value, value.transpose(0, 3, 1, 2)) if value.ndim == 4 else (value,)
            tensors[detail["name"]] = forms
    keys = kept_nodes(selection, nodes, tensors, values)
    return {node.outputs[0] for node in nodes if node.key in keys}


def _recipe(selection: Selection) -> Any:
    """The quantiser's recipe for all operators that it knows."""
    from ai_edge_quantizer import recipe

    if selection.activations == "dynamic":
        return recipe.dynamic_wi8_afp32()
    return recipe.weight_only_wi8_afp32() if selection.activations == "float" else recipe.static_wi8_ai8()


def _leave_float(worker: Any, names: list[str], left: set[str]) -> None:
    """Keep both ends of the network, and the operators that write the tensors `left`, in float."""
    from ai_edge_quantizer import qtyping, quantizer

    kinds, none = qtyping.TFLOperationName, quantizer.AlgorithmName.NO_QUANTIZE
    for end in (kinds.INPUT, kinds.OUTPUT):
        worker.update_quantization_recipe(regex=".*", operation_name=end, algorithm_key=none)
    for name in sorted(left):
        if names.count(name) > 1:
            raise UnsupportedError(f"several tensors of the exported file are called {name}: it cannot stay in float")
        # An operator goes by the names of the tensors that it writes, each with a semicolon behind it.
        exactly = f"^{re.escape(name)};"
        worker.update_quantization_recipe(regex=exactly, operation_name=kinds.ALL_SUPPORTED, algorithm_key=none)


def _calibrated(worker: Any, interpreter: Any, sample: np.ndarray, ranges: dict[str, Range]) -> Any:
    """The quantiser's statistics with exact ranges in them."""
    ((signature, names),) = interpreter.get_signature_list().items()
    # One sample is enough for the form of the result. Its own ranges would be a moving average over samples
    # (0.95), which cuts off what only some of them reach.
    found = worker.calibrate({signature: [{names["inputs"][0]: sample}]}, num_threads=1)
    for name, (low, high) in ranges.items():
        entry = found.get(name, {})
        if "min" in entry and entry["min"].size == 1:
            entry["min"], entry["max"] = np.full_like(entry["min"], low), np.full_like(entry["max"], high)
    return found


def _measured(interpreter: Any, samples: list[np.ndarray]) -> dict[str, Range]:
    """Smallest and largest finite value of every float tensor that is computed, over all samples."""
    source = interpreter.get_input_details()[0]
    written = {int(i) for operator in interpreter._get_ops_details() for i in operator["outputs"]}
    watched = [
        (detail["index"], detail["name"])
        for detail in interpreter.get_tensor_details()
        if detail["dtype"] is np.float32 and (detail["index"] in written or detail["index"] == source["index"])
    ]
    ranges: dict[str, Range] = {name: (np.inf, -np.inf) for _, name in watched}
    for sample in samples:
        interpreter.set_tensor(source["index"], sample)
        interpreter.invoke()
        for index, name in watched:
            # A view of the interpreter's memory: gone before the next run.
            value = interpreter.tensor(index)()
            low, high = float(value.min()), float(value.max())
            if low == -np.inf:
                low = float(value[np.isfinite(value)].min())
            ranges[name] = (min(ranges[name][0], low), max(ranges[name][1], high))
            del value
    return ranges


def zero_pads(path: Path) -> None:
    """Pad max pools behind a ReLU with zeros, in place: nothing there is smaller, so it changes no output.

    The converter pads them with minus infinity through PADV2, which XNNPACK does not run in int8 and whose range
    the quantiser takes for infinite.
    """
    content = path.read_bytes()
    model = unpacked(content)
    graph = model.subgraphs[0]
    pads = _infinite_pads(model)
    zero_ended = {
        int(operator.outputs[0])
        for operator in graph.operators
        if getattr(operator.builtinOptions, "fusedActivationFunction", 0) in _clamps()
        or _code(model, operator) in (schema().BuiltinOperator.RELU, schema().BuiltinOperator.RELU6)
    }
    changed = False
    for operator in pads:
        if int(operator.inputs[0]) in zero_ended:
            operator.inputs = operator.inputs[:2]
            operator.opcodeIndex = _opcode(model, schema().BuiltinOperator.PAD)
            operator.builtinOptionsType = schema().BuiltinOptions.PadOptions
            operator.builtinOptions = schema().PadOptionsT()
            changed = True
    if changed:
        path.write_bytes(packed(model))


def _give_pads_a_value(model: Any, ranges: dict[str, Range]) -> bool:
    """Replace the infinite pads that are left by the smallest value of what they pad; whether there were any."""
    graph = model.subgraphs[0]
    pads = _infinite_pads(model)
    for number, operator in enumerate(pads):
        padded = graph.tensors[operator.inputs[0]].name.decode()
        buffer, tensor = schema().BufferT(), schema().TensorT()
        buffer.data = np.frombuffer(np.array(ranges[padded][0], np.float32).tobytes(), np.uint8)
        tensor.name, tensor.shape = f"finite_pad_{number}".encode(), np.array([], np.int32)
        tensor.type, tensor.buffer = schema().TensorType.FLOAT32, len(model.buffers)
        model.buffers.append(buffer)
        # Each has its own: a constant that several share would widen the ranges of all.
        operator.inputs = np.array([*operator.inputs[:2], len(graph.tensors)], np.int32)
        graph.tensors.append(tensor)
    return bool(pads)


def _code(model: Any, operator: Any) -> int:
    code = model.operatorCodes[operator.opcodeIndex]
    return max(int(code.builtinCode), int(code.deprecatedBuiltinCode))


def _opcode(model: Any, builtin: int) -> int:
    """Index of an operator code, added where the model has none."""
    for index, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == builtin:
            return index
    code = schema().OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), 1
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _clamps() -> tuple[int, ...]:
    kinds = schema().ActivationFunctionType
    return (kinds.RELU, kinds.RELU6)


def _infinite_pads(model: Any) -> list[Any]:
    """PADV2 operators whose value is minus infinity (or the converter's smallest float)."""
    graph = model.subgraphs[0]
    found = []
    for operator in graph.operators:
        if _code(model, operator) == schema().BuiltinOperator.PADV2:
            data = model.buffers[graph.tensors[operator.inputs[2]].buffer].data
            if data is not None and len(data) == 4 and np.asarray(data).view(np.float32)[0] < -3e38:
                found.append(operator)
    return found
