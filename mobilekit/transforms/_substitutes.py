"""Which grouped layers take the place of a dense convolution, what suits them, and what they cost. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mobilekit.transforms._links import INPUT, Link, macs
from mobilekit.types import OperatorShape

LEAST_SAVING = 0.2
"""Share of the layer's multiply-accumulates that an offered substitute saves at least."""
Strengths = Mapping[str, int]
Links = tuple[Link, ...]


def _depthwise_separable(shape: OperatorShape, strengths: Strengths) -> Links:
    inputs = shape.in_channels
    moving = _moving("depthwise", shape, strengths["multiplier"] * inputs, inputs)
    return (moving, Link("pointwise", "conv", None, shape.out_size))


def _inverted_residual(shape: OperatorShape, strengths: Strengths) -> Links:
    hidden = strengths["expansion"] * shape.in_channels
    return (
        Link("expand", "conv", hidden, shape.in_size),
        _moving("depthwise", shape, hidden, hidden),
        Link("project", "conv", None, shape.out_size),
    )


def _shuffle_v1(shape: OperatorShape, strengths: Strengths) -> Links:
    hidden, groups = strengths["expansion"] * shape.in_channels, strengths["groups"]
    return (
        Link("expand", "conv", hidden, shape.in_size, groups=groups),
        Link("shuffle", "shuffle", hidden, shape.in_size, groups=groups),
        _moving("depthwise", shape, hidden, hidden),
        Link("project", "conv", None, shape.out_size, groups=groups),
    )


def _shuffle_v2(shape: OperatorShape, _: Strengths) -> Links:
    inputs, outputs, half = shape.in_channels, shape.out_channels, shape.out_channels // 2
    if keeps_place(shape) and shape.stride == (1, 1) and inputs == outputs:
        first = (
            Link("passing", "slice", half, shape.in_size, reads=(INPUT,)),
            Link("worked", "slice", half, shape.in_size, reads=(INPUT,), start=half),
            Link("reduce", "conv", half, shape.in_size, reads=("worked",)),
        )
        other = "passing"
    else:
        first = (
            _moving("left_depthwise", shape, inputs, inputs, (INPUT,)),
            Link("left", "conv", half, shape.out_size),
            Link("reduce", "conv", half, shape.in_size, reads=(INPUT,)),
        )
        other = "left"
    return (
        *first,
        _moving("depthwise", shape, half, half),
        Link("expand", "conv", half, shape.out_size),
        Link("concat", "concat", outputs, shape.out_size, reads=(other, "expand")),
        Link("shuffle", "shuffle", outputs, shape.out_size, groups=2),
        Link("scale", "conv", None, shape.out_size, groups=outputs),
    )


def _interleaved(shape: OperatorShape, strengths: Strengths) -> Links:
    inputs, groups = shape.in_channels, strengths["groups"]
    return (
        _moving("primary", shape, inputs, groups),
        Link("shuffle", "shuffle", inputs, shape.out_size, groups=groups),
        Link("secondary", "conv", None, shape.out_size, groups=inputs // groups),
    )


def _fire(shape: OperatorShape, strengths: Strengths) -> Links:
    outputs = shape.out_channels
    return (
        Link("squeeze", "conv", strengths["squeeze"], shape.in_size),
        Link("pointwise", "conv", outputs // 2, shape.out_size, stride=shape.stride, reads=("squeeze",)),
        _moving("windows", shape, outputs - outputs // 2, 1, ("squeeze",)),
        Link("concat", "concat", outputs, shape.out_size, reads=("pointwise", "windows")),
        Link("scale", "conv", None, shape.out_size, groups=outputs),
    )


def _moving(layer: str, shape: OperatorShape, width: int, groups: int, reads: tuple[str, ...] = ()) -> Link:
    """The layer with the old kernel."""
    kernel, stride = shape.kernel, shape.stride
    return Link(layer, "conv", width, shape.out_size, kernel, stride, groups, reads=reads, spatial=True)


_LINKS: dict[str, Callable[[OperatorShape, Strengths], Links]] = {
    "depthwise_separable": _depthwise_separable,
    "inverted_residual": _inverted_residual,
    "shuffle_v1": _shuffle_v1,
    "shuffle_v2": _shuffle_v2,
    "interleaved": _interleaved,
    "fire": _fire,
}
METHODS: dict[str, tuple[str, ...]] = {
    "depthwise_separable": ("multiplier",),
    "inverted_residual": ("expansion",),
    "shuffle_v1": ("groups", "expansion"),
    "shuffle_v2": (),
    "interleaved": ("groups",),
    "fire": ("squeeze",),
}
"""Names of the strengths that each method takes."""
GROUPED = frozenset({"shuffle_v1", "shuffle_v2", "interleaved"})
"""Methods that need kernels for grouped convolutions, slices or shuffles, and not for depthwise ones alone."""


def links(shape: OperatorShape, method: str, strengths: Strengths) -> Links:
    """The layers that take the place of one of this shape; `unsuited` and `wrong` have to be None for it."""
    return _LINKS[method](shape, strengths)


def keeps_place(shape: OperatorShape) -> bool:
    """Whether a 1 x 1 layer of the same stride and no padding gives a map of the same size."""
    pairs = zip(shape.in_size, shape.out_size, shape.stride, strict=True)
    return all((inside - 1) // stride + 1 == outside for inside, outside, stride in pairs)


def unsuited(shape: OperatorShape, method: str) -> str | None:
    """Why the method cannot be used on a layer of this shape at any strength, or None."""
    if shape.kind != "conv":
        return f"it is a {shape.kind} layer"
    if shape.groups > 1:
        return f"it is a convolution of {shape.groups} groups already"
    inputs, outputs = shape.in_channels, shape.out_channels
    if 1 in (inputs, outputs):
        return f"it has {inputs} input and {outputs} output channels, and one channel cannot be divided into groups"
    if method != "interleaved" and shape.kernel == (1, 1):
        return f"{method} divides a kernel from the channels, and its kernel is 1 x 1"
    return _unsuited_halves(shape, method)


def _unsuited_halves(shape: OperatorShape, method: str) -> str | None:
    """The same of the methods that halve the outputs."""
    outputs = shape.out_channels
    if method == "shuffle_v2" and (outputs % 2 or outputs < 4):
        return f"shuffle_v2 halves the output channels into two or more each, and there are {outputs}"
    if method == "fire" and not keeps_place(shape):
        sizes = f"{shape.in_size} to {shape.out_size} at stride {shape.stride}"
        return f"fire has a 1 x 1 layer beside the kernel, and from {sizes} their maps are of different sizes"
    return None


def wrong(shape: OperatorShape, method: str, strengths: Mapping[str, object]) -> str | None:
    """Why these strengths cannot be used on a layer of this shape, or None."""
    inputs, outputs, taps = shape.in_channels, shape.out_channels, shape.kernel[0] * shape.kernel[1]
    most = {"multiplier": taps, "expansion": taps, "groups": inputs // 2, "squeeze": inputs}
    least = {"groups": 2}
    whole: dict[str, int] = {}
    for name in METHODS[method]:
        value, low = strengths.get(name), least.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= most[name]:
            return f"its {name} can be {low} to {most[name]}, not {value}"
        whole[name] = value
    groups = whole.get("groups", 1)
    if inputs % groups:
        return f"{groups} groups do not divide its {inputs} input channels"
    if method == "interleaved" and outputs % (inputs // groups):
        return f"{outputs} output channels do not divide among the {inputs // groups} groups of the second layer"
    if method == "shuffle_v1" and outputs % groups:
        return f"{groups} groups do not divide its {outputs} output channels"
    if method == "shuffle_v1" and whole["expansion"] * inputs % groups**2:
        hidden = whole["expansion"] * inputs
        return f"{groups} x {groups} pairs of groups do not divide the {hidden} channels between its layers"
    return None


def strengths(shape: OperatorShape, method: str, multiple: int) -> list[dict[str, int]]:
    """Strengths worth trying, two at most; `multiple` is what the runtime likes channels to be a multiple of."""
    inputs = shape.in_channels
    squeezes = {max(multiple, round(inputs * part / multiple) * multiple) for part in (1 / 2, 1 / 4)}
    wanted: dict[str, list[dict[str, int]]] = {
        "depthwise_separable": [{"multiplier": 2}, {"multiplier": 1}],
        "inverted_residual": [{"expansion": 2}, {"expansion": 1}],
        "shuffle_v1": [{"groups": 2, "expansion": 2}, {"groups": 2, "expansion": 1}],
        "shuffle_v2": [{}],
        "interleaved": [{"groups": 2}, {"groups": 4}],
        "fire": [{"squeeze": squeeze} for squeeze in sorted(squeezes, reverse=True)],
    }
    return [found for found in wanted[method] if wrong(shape, method, found) is None]


def saving(shape: OperatorShape, method: str, strengths: Strengths) -> float:
    """Share of the layer's multiply-accumulates that the substitute saves; below zero where it costs more."""
    return 1 - macs(shape, links(shape, method, strengths)) / shape.macs
