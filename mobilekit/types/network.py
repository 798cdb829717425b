"""Networks of priced operators with symbolic channels, and predictions of their latency."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import Field

from mobilekit.types.values import Precision, RuntimeName, Value

INPUT_GROUP = "<input>"
"""Name of the channel group of the network's input: never prunable."""


class OperatorShape(Value):
    """One fused operator with concrete numbers: what a cost table prices and a runtime builds.

    Sizes are (height, width); a linear layer has size (1, 1). MACs and bytes are for batch 1.
    """

    kind: str
    in_channels: int
    out_channels: int
    in_size: tuple[int, int] = (1, 1)
    out_size: tuple[int, int] = (1, 1)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    inputs: int = 1
    activation: str | None = None
    ceil: bool = False
    """A pool's last windows reach over the map's end (PyTorch's ceil_mode), where others pad all sides alike."""

    @property
    def cost_kind(self) -> str:
        """The row of the cost table: convolutions differ by how their kernels work, the rest by their kind."""
        if self.kind != "conv":
            return self.kind
        if self.groups > 1:
            return "depthwise" if self.groups == self.in_channels == self.out_channels else "grouped"
        return "pointwise" if self.kernel == (1, 1) else "dense"

    @property
    def weights(self) -> int:
        """Number of weights (without bias)."""
        taps = self.kernel[0] * self.kernel[1]
        if self.kind == "conv":
            return self.out_channels * (self.in_channels // self.groups) * taps
        if self.kind == "conv_transpose":
            return self.in_channels * (self.out_channels // self.groups) * taps
        return self.in_channels * self.out_channels if self.kind == "linear" else 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference (0 for kinds that only move or compare data)."""
        # a transposed convolution applies its kernel at every input position
        height, width = self.in_size if self.kind == "conv_transpose" else self.out_size
        return self.weights * height * width

    @property
    def elements(self) -> int:
        """Activations read and written."""
        read = self.in_channels * self.in_size[0] * self.in_size[1]
        return read * self.inputs + self.out_channels * self.out_size[0] * self.out_size[1]


class Operator(Value):
    """One operator of a traced network, fused with the batch norm and activation that follow it.

    `in_groups` and `out_groups` name the channel groups whose widths add up to the channel count;
    `in_repeat` is the number of features that one channel becomes when a map is flattened in front of a linear layer.
    """

    name: str
    kind: str
    module: str
    inputs: tuple[str, ...]
    in_groups: tuple[str, ...]
    out_groups: tuple[str, ...]
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    in_repeat: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    depthwise: bool = False
    """Groups follow the channel count when it shrinks."""
    activation: str | None = None
    ceil: bool = False
    """As of `OperatorShape`."""

    def shape(self, in_channels: int, out_channels: int) -> OperatorShape:
        """The operator with these channel counts."""
        return OperatorShape(
            kind=self.kind,
            in_channels=in_channels,
            out_channels=out_channels,
            in_size=self.in_size,
            out_size=self.out_size,
            kernel=self.kernel,
            stride=self.stride,
            groups=in_channels if self.depthwise else self.groups,
            inputs=max(1, len(self.inputs)) if self.kind in ("add", "mul") else 1,
            activation=self.activation,
            ceil=self.ceil,
        )


class Producer(Value):
    """A weight whose output channels, along `dim`, are a channel group."""

    parameter: str
    dim: int


class ChannelGroup(Value):
    """Channels that must be kept or removed together, wherever they appear.

    `refused` says why the width cannot change (None: it can); the norms of the `producers` rank the channels.
    """

    width: Annotated[int, Field(ge=1)]
    refused: str | None = None
    producers: tuple[Producer, ...] = ()


class Axis(Value):
    """Which channel groups one axis of a parameter runs over, in order; each channel takes `repeat` entries."""

    groups: tuple[str, ...]
    repeat: int = 1


class Network(Value):
    """Ordered operators, the coupled channel groups, and where each parameter's axes belong."""

    name: str
    input_shape: tuple[int, ...]
    operators: tuple[Operator, ...]
    groups: dict[str, ChannelGroup]
    axes: dict[str, dict[int, Axis]]
    """Parameter or buffer name -> axis number -> groups."""
    precisions: dict[str, Precision] = Field(default_factory=dict)
    """Operators that do not run in fp32."""

    def width(self, groups: tuple[str, ...]) -> int:
        """Channels of a tensor made of these groups."""
        return sum(self.groups[group].width for group in groups)

    def shape(self, operator: Operator) -> OperatorShape:
        """The operator's shape at the present widths."""
        return operator.shape(self.width(operator.in_groups) * operator.in_repeat, self.width(operator.out_groups))

    def precision(self, operator: Operator) -> Precision:
        """The precision the operator is planned to run in."""
        return self.precisions.get(operator.name, "fp32")

    def with_widths(self, widths: Mapping[str, int]) -> Network:
        """The same network with other channel counts, and depthwise convolutions with as many groups as channels."""
        groups = {
            name: group.model_copy(update={"width": widths[name]}) if name in widths else group
            for name, group in self.groups.items()
        }
        changed = self.model_copy(update={"groups": groups})
        return changed.model_copy(update={"operators": tuple(map(changed._counted, self.operators))})

    def _counted(self, operator: Operator) -> Operator:
        """The operator with the number of groups that a module of these widths has."""
        count = self.width(operator.in_groups) * operator.in_repeat if operator.depthwise else operator.groups
        return operator if count == operator.groups else operator.model_copy(update={"groups": count})

    def with_precisions(self, precisions: Mapping[str, Precision]) -> Network:
        """The same network with these operators in these precisions."""
        return self.model_copy(update={"precisions": dict(precisions)})

    def reads_rounded(self, operator: Operator, int8: Collection[str]) -> bool:
        """Whether the operator reads rounded values with these operators in int8: it rounds what it reads itself,
        or something in front of it rounds what it writes."""
        return operator.name in int8 or any(name in int8 for name in operator.inputs)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(self.shape(operator).macs for operator in self.operators)


def within(name: str, path: str) -> bool:
    """Whether a name is the module's own path or lies below it.

    >>> within("stage1.0.conv1", "stage1.0"), within("stage1.01", "stage1.0")
    (True, False)
    """
    return name == path or name.startswith(f"{path}.")


class OperatorPrice(Value):
    """Predicted time of one operator."""

    name: str
    kind: str
    module: str
    precision: Precision
    latency_ms: float
    low_ms: float
    high_ms: float
    extrapolated: bool


class Estimate(Value):
    """A prediction: never shown in a column of measurements. The interval is nominally 80 %."""

    latency_ms: float
    low_ms: float
    high_ms: float
    runtime: RuntimeName
    basis: Literal["kernel table", "fitted", "anchored"]
    size_bytes: int | None = None
    peak_memory_bytes: int | None = None
    """Largest sum of live activations; weights and the runtime's own memory come on top. None, like the size, where
    only the operators' shapes are known and not how they are connected."""
    operators: tuple[OperatorPrice, ...]
    extrapolated: tuple[str, ...]
