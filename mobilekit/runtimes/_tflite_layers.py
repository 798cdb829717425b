"""What litert-torch writes for each kind of operator, in the TFLite operators of a sketch.

Found by exporting one of each: `tests/test_sketch_tflite.py` compares whole networks with real exports.
"""

from __future__ import annotations

from collections.abc import Callable

from mobilekit.errors import UnsupportedError
from mobilekit.runtimes import _tflite_activations as activations
from mobilekit.runtimes._shape import plain
from mobilekit.runtimes._tflite_windows import Step, as_map, padded, refusal, window
from mobilekit.runtimes._tflite_writer import LOWEST, TO_NCHW, TO_NHWC, Activation, Writer

Layer = Callable[[Writer, Step], Activation]


def build(writer: Writer, step: Step) -> Activation:
    """Add an operator with its activation. Raises UnsupportedError, in a sentence, where it cannot be built."""
    kind, shape = step.shape.kind, step.shape
    if kind not in LAYERS:
        raise UnsupportedError(f"{step.name} is of kind {kind}, which cannot be built for TFLite")
    if plain(shape.activation) not in (None, *activations.KNOWN):
        raise UnsupportedError(f"{step.name} has the activation {shape.activation}, which cannot be built for TFLite")
    result = LAYERS[kind](writer, step)
    activation = plain(shape.activation)
    if activation and kind != "activation":
        result = activations.follow(writer, result, activation, step.feeds_weights)
    return result


# ---------------------------------------------------------------- layers with weights


def _conv(writer: Writer, step: Step) -> Activation:
    shape = step.shape
    source, options = window(writer, step, "CONV_2D")
    options |= {"dilationHFactor": 1, "dilationWFactor": 1}
    dims = (1, *shape.out_size, shape.out_channels)
    if source.dims[3] != shape.in_channels or shape.in_channels % shape.groups or shape.out_channels % shape.groups:
        raise refusal(step, f"its weights do not fit {source.dims[3]} channels in {shape.groups} groups")
    if shape.groups == shape.in_channels > 1:
        weights = writer.weights((1, *shape.kernel, shape.out_channels), 3, source)
        options["depthMultiplier"] = shape.out_channels // shape.in_channels
        return writer.apply("DEPTHWISE_CONV_2D", [source, *weights], dims, **options)
    weights = writer.weights((shape.out_channels, *shape.kernel, shape.in_channels // shape.groups), 0, source)
    version = 6 if shape.groups > 1 else 1
    return writer.apply("CONV_2D", [source, *weights], dims, version=version, **options)


def _conv_transpose(writer: Writer, step: Step) -> Activation:
    """SAME where the map grows by the stride, VALID where nothing is cut off; stride 1 is a plain convolution."""
    shape, source = step.shape, as_map(writer, step.source)
    dims = (1, *shape.out_size, shape.out_channels)
    if shape.groups > 1:
        raise refusal(step, "the exporter has none with groups")
    if source.dims != (1, *shape.in_size, shape.in_channels):
        raise refusal(step, f"it does not fit what it reads, {source.dims}")
    weights = writer.weights((shape.out_channels, *shape.kernel, shape.in_channels), 0, source)
    modes, sizes = writer.tables.fb.Padding, list(zip(*(shape.in_size, shape.stride, shape.kernel), strict=True))
    if shape.stride == (1, 1) and shape.in_size == shape.out_size:
        options = {"strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1, "padding": modes.SAME}
        return writer.apply("CONV_2D", [source, *weights], dims, **options)
    if shape.out_size == tuple((size - 1) * stride + kernel for size, stride, kernel in sizes):
        mode = modes.VALID
    elif shape.out_size == tuple(size * stride for size, stride, _ in sizes):
        mode = modes.SAME
    else:
        raise refusal(step, f"no padding leads from {shape.in_size} to {shape.out_size}")
    inputs: list[Activation | int] = [writer.integers("size", dims), weights[0], source, weights[1]]
    return writer.apply("TRANSPOSE_CONV", inputs, dims, strideH=shape.stride[0], strideW=shape.stride[1], padding=mode)


def _linear(writer: Writer, step: Step) -> Activation:
    """A fully connected layer; a map is flattened in PyTorch's order in front of it."""
    shape, source = step.shape, step.source
    if source.elements != shape.in_channels:
        raise refusal(step, f"it reads {shape.in_channels} features of {source.elements}")
    if source.elements != source.dims[-1]:
        source = _flattened(writer, source)
    dims = (shape.out_channels, shape.in_channels)
    if step.writes_output and writer.int8:
        # as in `_tflite_int8`: it quantises its input by itself, and writes float
        weights = writer.weights(dims, 0, source, float_bias=True)
        source = writer.cast(source, False)
        writer.begin(step.name, False)
    else:
        weights = writer.weights(dims, 0, source)
    vector = len(source.dims) == 2
    return writer.apply(
        "FULLY_CONNECTED",
        [source, *weights],
        (1, shape.out_channels),
        version=5 if vector else 1,
        keepNumDims=vector,
    )


def _flattened(writer: Writer, source: Activation) -> Activation:
    """A map as a vector, channel by channel."""
    if len(source.dims) == 4 and source.dims[3] > 1 and source.elements > source.dims[3]:
        source = writer.transposed(source, TO_NCHW)
    return writer.reshaped(source, (1, source.elements))


# ---------------------------------------------------------------- pools and resizing


def _max_pool(writer: Writer, step: Step) -> Activation:
    return _pool(writer, step, "MAX_POOL_2D")


def _avg_pool(writer: Writer, step: Step) -> Activation:
    return _pool(writer, step, "AVERAGE_POOL_2D")


def _pool(writer: Writer, step: Step, code: str) -> Activation:
    source, options = window(writer, step, code)
    height, width = step.shape.kernel
    dims = (1, *step.shape.out_size, source.dims[3])
    return writer.apply(code, [source], dims, filterHeight=height, filterWidth=width, **options)


def _global_pool(writer: Writer, step: Step) -> Activation:
    source = as_map(writer, step.source)
    dims = (1, source.dims[3]) if step.feeds_linear else (1, 1, 1, source.dims[3])
    return writer.apply("MEAN", [source, writer.integers("axes", [2, 1])], dims, keepDims=not step.feeds_linear)


def _resize(writer: Writer, step: Step) -> Activation:
    source = as_map(writer, step.source)
    size = writer.integers("size", step.shape.out_size)
    dims = (1, *step.shape.out_size, source.dims[3])
    return writer.apply("RESIZE_NEAREST_NEIGHBOR", [source, size], dims, alignCorners=False, halfPixelCenters=True)


def _pad(writer: Writer, step: Step) -> Activation:
    source = as_map(writer, step.source)
    extra = [out - size for size, out in zip(source.dims[1:3], step.shape.out_size, strict=True)]
    if min(extra) < 0:
        raise refusal(step, f"{step.shape.out_size} is smaller than what it reads")
    rows, columns = ((more // 2, more - more // 2) for more in extra)
    return padded(writer, source, rows, columns)


# ---------------------------------------------------------------- element by element


def _add(writer: Writer, step: Step) -> Activation:
    return _pairwise(writer, step, "ADD")


def _mul(writer: Writer, step: Step) -> Activation:
    return _pairwise(writer, step, "MUL")


def _pairwise(writer: Writer, step: Step, code: str) -> Activation:
    """One after the other; a vector, and a map of one pixel or channel, meet every place of a larger one."""
    result, *others = step.inputs if len(step.inputs) > 1 else step.inputs * 2
    for other in others:
        longer, shorter = sorted((result.dims, other.dims), key=len, reverse=True)
        pairs = list(zip(longer[::-1], shorter[::-1], strict=False))
        if any(1 not in pair and pair[0] != pair[1] for pair in pairs):
            raise refusal(step, f"{result.dims} and {other.dims} do not meet")
        dims = (*longer[: len(longer) - len(shorter)], *(max(pair) for pair in reversed(pairs)))
        result = writer.apply(code, [result, other], dims)
    return result


def _batch_norm(writer: Writer, step: Step) -> Activation:
    """Four operators: the converter folds none of them into what follows."""
    result, dims = step.source, (*(1,) * (len(step.source.dims) - 1), step.source.dims[-1])
    for code, value in (("SUB", 0.1), ("MUL", 0.9), ("MUL", 1.1), ("ADD", 0.1)):
        result = writer.apply(code, [result, writer.constant("statistic", dims, value)], result.dims)
    return result


def _activation(writer: Writer, step: Step) -> Activation:
    """An activation of its own; one without a name is a number added to everything."""
    activation, source = plain(step.shape.activation), step.source
    if activation is None:
        return writer.apply("ADD", [source, writer.constant("number", (), 0.5)], source.dims)
    return activations.alone(writer, source, activation, step.feeds_weights)


def _softmax(writer: Writer, step: Step) -> Activation:
    return writer.apply("SOFTMAX", [step.source], step.source.dims, beta=1.0)


# ---------------------------------------------------------------- movement of data


def _concat(writer: Writer, step: Step) -> Activation:
    """In int8 all inputs have the output's scale: the widest one's where nothing is negative, else a new one.

    Which scale it is depends on the data of a real network. Of inputs that reach below zero, none is taken to hold
    both the smallest and the largest of all numbers; a slice is not taken to hold the largest of its source.
    """
    parts = list(step.inputs)
    if len({len(part.dims) for part in parts}) > 1:
        parts = [as_map(writer, part) for part in parts]
    if len({part.dims[:-1] for part in parts}) > 1:
        raise refusal(step, f"its inputs are {', '.join(str(part.dims) for part in parts)}")
    dims = (*parts[0].dims[:-1], sum(part.dims[-1] for part in parts))
    axis = len(dims) - 1
    if not writer.int8:
        return writer.apply("CONCATENATION", parts, dims, axis=axis)
    known = [writer.tables.quantisation(part.index) for part in parts]
    whole = [q for part, q in zip(parts, known, strict=True) if not writer.makes(part, "SLICE")]
    if whole and all(zero == LOWEST for _, zero in known):
        target = max(whole)
    else:
        target = known[0] if len(set(known)) == 1 else writer.signed()
    parts = [writer.to_scale(part, target) for part in parts]
    result = writer.activation("concatenation", dims, True, target)
    writer.write("CONCATENATION", parts, result, axis=axis)
    return result


def _slice(writer: Writer, step: Step) -> Activation:
    source, width = step.source, step.shape.out_channels
    begin = [*(0 for _ in source.dims[1:]), step.first_channel]
    dims = (*source.dims[:-1], width)
    if step.first_channel + width > source.dims[-1]:
        raise refusal(step, f"it takes {width} channels of {source.dims[-1]}")
    return writer.apply("SLICE", [source, writer.integers("begin", begin), writer.integers("size", dims)], dims)


def _shuffle(writer: Writer, step: Step) -> Activation:
    """The exporter keeps the channels first in between, at the price of two more transpositions."""
    source, groups = as_map(writer, step.source), step.shape.groups
    _, height, width, channels = source.dims
    if channels % groups:
        raise refusal(step, f"{channels} channels are no multiple of {groups} groups")
    result = writer.transposed(source, TO_NCHW)
    result = writer.reshaped(result, (1, groups, channels // groups, height, width))
    result = writer.transposed(result, (0, 2, 1, 3, 4))
    result = writer.reshaped(result, (1, channels, height, width))
    return writer.transposed(result, TO_NHWC)


def _transpose(writer: Writer, step: Step) -> Activation:
    """An exchange of rows and columns; any other order of the axes through the channels-first form."""
    if step.source.dims == (1, *step.shape.in_size, step.shape.out_channels):
        return writer.transposed(step.source, (0, 2, 1, 3))
    return _reshape(writer, step)


def _reshape(writer: Writer, step: Step) -> Activation:
    """The same numbers in other sizes, in PyTorch's order."""
    source, shape = step.source, step.shape
    if source.elements != shape.out_channels * shape.out_size[0] * shape.out_size[1]:
        raise refusal(step, f"{source.elements} numbers do not become {shape.out_channels} x {shape.out_size}")
    if shape.out_size == (1, 1):
        return _flattened(writer, source)
    if len(source.dims) == 4:
        source = writer.transposed(source, TO_NCHW)
    return writer.transposed(writer.reshaped(source, (1, shape.out_channels, *shape.out_size)), TO_NHWC)


def _quantize(writer: Writer, step: Step) -> Activation:
    return writer.cast(step.source, True)


def _dequantize(writer: Writer, step: Step) -> Activation:
    return writer.cast(step.source, False)


LAYERS: dict[str, Layer] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "global_pool": _global_pool,
    "resize": _resize,
    "pad": _pad,
    "add": _add,
    "mul": _mul,
    "batch_norm": _batch_norm,
    "activation": _activation,
    "softmax": _softmax,
    "concat": _concat,
    "slice": _slice,
    "shuffle": _shuffle,
    "transpose": _transpose,
    "reshape": _reshape,
    "quantize": _quantize,
    "dequantize": _dequantize,
}
