"""Turns a float TFLite file into int8 with exact ranges, and makes padded max pools fit for it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilekit.errors import UnsupportedError, first_line
from mobilekit.runtimes._job import Sample, quiet
from mobilekit.runtimes._selection import Selection
from mobilekit.runtimes._tflite_facts import schema
from mobilekit.runtimes._tflite_tables import packed, unpacked
from mobilekit.runtimes._tracing import FileNode, OperatorValue, kept_nodes
from mobilekit.types import Range


def quantised(
    content: bytes,
    sample: Sample,
    selection: Selection,
    left: set[str],
    ranges: dict[str, Range],
    float_ends: bool = True,
) -> bytes:
    """The float network in int8; operators that write the tensors `left` stay in float, and both ends if asked.

    `ranges` are those of all tensors, for static activations, and `sample`, with maps as (1, H, W, C), any that fits;
    otherwise neither is read. A linear layer that writes an output in float quantises its input by itself: 256 values
    for all logits give the first place to several classes at once. Raises UnsupportedError where a tensor of `left`
    cannot be told from others, and where the quantiser fails.
    """
    static = selection.activations == "static"
    model = unpacked(content)
    if static and _give_pads_a_value(model, ranges):
        content = packed(model)
    names = [tensor.name.decode() for tensor in model.subgraphs[0].tensors]
    with quiet(native=True):
        from ai_edge_quantizer import quantizer

        worker = quantizer.Quantizer(content, _recipe(selection))
        if float_ends:
            _leave_ends_float(worker)
        if static and float_ends:
            _write_sums_in_float(worker, names, _last_linear(model) - left)
        _leave_float(worker, names, left)
        try:
            found = _calibrated(worker, model, sample, ranges) if static else None
            return bytes(worker.quantize(found, enable_progress_report=False).quantized_model)
        # It raises whatever its many passes raise, for subgraphs that it does not follow among others.
        except Exception as error:
            raise UnsupportedError(f"ai-edge-quantizer cannot quantise the network: {first_line(error)}") from error


def float_tensors(
    content: bytes, selection: Selection, values: list[OperatorValue], tensors: Mapping[str, Sequence[np.ndarray]]
) -> set[str]:
    """Names of the tensors written by operators which stay in float; `tensors` as of `computed`.

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
    written = {name for node in nodes for name in node.outputs}
    keys = kept_nodes(selection, nodes, {n: forms for n, forms in tensors.items() if n in written}, values)
    return {node.outputs[0] for node in nodes if node.key in keys}


def run(interpreter: Any, sample: Sample) -> None:
    """Run an interpreter on a sample, maps as (1, H, W, C)."""
    for source, array in zip(interpreter.get_input_details(), sample, strict=True):
        interpreter.set_tensor(source["index"], array)
    interpreter.invoke()


def computed(interpreter: Any) -> dict[str, tuple[np.ndarray, ...]]:
    """What an interpreter that keeps every tensor read and wrote in its last run: float32 and int8, the latter as
    float; maps as they are and as NCHW."""
    found: dict[str, tuple[np.ndarray, ...]] = {}
    for detail in _watched(interpreter):
        value = interpreter.get_tensor(detail["index"])
        if detail["dtype"] is np.int8:
            scale, zero = detail["quantization"]
            value = (value.astype(np.float32) - zero) * np.float32(scale)
        found[detail["name"]] = (value, value.transpose(0, 3, 1, 2)) if value.ndim == 4 else (value,)
    return found


def measured(interpreter: Any, names: Collection[str], samples: Iterable[Sample]) -> dict[str, Range]:
    """Smallest and largest finite value of these float tensors over all samples, maps as (1, H, W, C)."""
    ranges: dict[str, Range] = {}
    tensors = [detail for detail in _watched(interpreter) if detail["name"] in names]
    for sample in samples:
        run(interpreter, sample)
        for detail in tensors:
            name, value = detail["name"], interpreter.get_tensor(detail["index"])
            finite = value if np.isfinite(value.sum()) else value[np.isfinite(value)]
            low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
            before = ranges.get(name, (low, high))
            ranges[name] = (min(before[0], low), max(before[1], high))
    return ranges


def _watched(interpreter: Any) -> list[dict[str, Any]]:
    """Every float32 or int8 tensor that is no constant."""
    given = {source["index"] for source in interpreter.get_input_details()}
    known = given | {int(i) for operator in interpreter._get_ops_details() for i in operator["outputs"]}
    details = interpreter.get_tensor_details()
    return [each for each in details if each["index"] in known and each["dtype"] in (np.float32, np.int8)]


def _recipe(selection: Selection) -> Any:
    """The quantiser's recipe for all operators that it knows."""
    from ai_edge_quantizer import recipe

    if selection.activations == "dynamic":
        return recipe.dynamic_wi8_afp32()
    return recipe.weight_only_wi8_afp32() if selection.activations == "float" else recipe.static_wi8_ai8()


def _last_linear(model: Any) -> set[str]:
    """Names of the outputs of the network that linear layers write."""
    graph = model.subgraphs[0]
    linear = schema().BuiltinOperator.FULLY_CONNECTED
    ends = {int(i) for i in graph.outputs}
    written = {int(op.outputs[0]) for op in graph.operators if _code(model, op) == linear}
    return {graph.tensors[i].name.decode() for i in ends & written}


def _write_sums_in_float(worker: Any, names: list[str], ends: set[str]) -> None:
    """Linear layers that write these tensors quantise their inputs at every inference, and write float."""
    from ai_edge_quantizer import qtyping

    for name in sorted(ends):
        if names.count(name) == 1:
            kind = qtyping.TFLOperationName.FULLY_CONNECTED
            worker.add_dynamic_config(regex=f"^{re.escape(name)};", operation_name=kind, num_bits=8)


def _leave_ends_float(worker: Any) -> None:
    from ai_edge_quantizer import qtyping, quantizer

    for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        worker.update_quantization_recipe(
            regex=".*", operation_name=end, algorithm_key=quantizer.AlgorithmName.NO_QUANTIZE
        )


def _leave_float(worker: Any, names: list[str], left: set[str]) -> None:
    """Keep the operators that write the tensors `left` in float."""
    from ai_edge_quantizer import qtyping, quantizer

    kinds, none = qtyping.TFLOperationName, quantizer.AlgorithmName.NO_QUANTIZE
    for name in sorted(left):
        if names.count(name) > 1:
            raise UnsupportedError(f"several tensors of the exported file are called {name}: it cannot stay in float")
        # An operator goes by the names of the tensors that it writes, each with a semicolon behind it.
        exactly = f"^{re.escape(name)};"
        worker.update_quantization_recipe(regex=exactly, operation_name=kinds.ALL_SUPPORTED, algorithm_key=none)


def _calibrated(worker: Any, model: Any, sample: Sample, ranges: dict[str, Range]) -> Any:
    """The quantiser's statistics with these ranges in them."""
    (signature,) = model.signatureDefs
    graph = model.subgraphs[0]
    order = {int(tensor): position for position, tensor in enumerate(graph.inputs)}
    given = {each.name.decode(): sample[order[int(each.tensorIndex)]] for each in signature.inputs}
    # One sample gives the form of the result. The quantiser's own ranges would be a moving average over samples
    # (0.95), which cuts off what only some of them reach.
    found = worker.calibrate({signature.signatureKey.decode(): [given]}, num_threads=1)
    for name, (low, high) in ranges.items():
        entry = found.get(name, {})
        if "min" in entry and entry["min"].size == 1:
            entry["min"], entry["max"] = np.full_like(entry["min"], low), np.full_like(entry["max"], high)
    return found


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
