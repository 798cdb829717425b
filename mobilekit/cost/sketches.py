"""Builds networks operator by operator without torch, as tracing a module of the same layers would give them."""

from __future__ import annotations

from typing import NamedTuple

from mobilekit.errors import BadInputError
from mobilekit.types import INPUT_GROUP, ChannelGroup, Network, Operator


class Tensor(NamedTuple):
    """What an operator wrote: its name, its channel groups and their widths in sum, and (height, width) of the map."""

    source: str
    groups: tuple[str, ...]
    width: int
    size: tuple[int, int]


class Sketch:
    """A network in the making: every method adds one operator and gives the tensor that it writes.

    Batch 1, square or oblong maps, padding as PyTorch's usual layers have it: kernel // 2 on all sides, none for pools
    with even kernels. Batch norms that follow a convolution are part of it. Methods raise BadInputError where the
    tensors do not fit together.

    >>> sketch = Sketch("example", channels=3, size=(8, 8))
    >>> wide = sketch.conv(sketch.input, 16, kernel=3)
    >>> same = sketch.conv(wide, 16, kernel=3, activation=None)
    >>> _ = sketch.add(same, wide, "relu")
    >>> [operator.name for operator in sketch.network().operators]
    ['conv_1', 'conv_2', 'add_1']
    """

    def __init__(self, name: str, channels: int, size: tuple[int, int]) -> None:
        self.name = name
        self.input = Tensor("input", (INPUT_GROUP,), channels, size)
        self._operators: list[Operator] = []
        self._groups = {INPUT_GROUP: ChannelGroup(width=channels, refused="it is the network's input")}

    def __len__(self) -> int:
        """Operators so far."""
        return len(self._operators)

    def network(self) -> Network:
        """What was built so far; no parameter has axes, so that it can be priced and timed but not shrunk."""
        operators, groups = tuple(self._operators), dict(self._groups)
        input_shape = (1, self.input.width, *self.input.size)
        return Network(name=self.name, input_shape=input_shape, operators=operators, groups=groups, axes={})

    def rename(self, tensor: Tensor, name: str) -> Tensor:
        """Give the last operator, which wrote `tensor`, another name."""
        last = self._operators[-1]
        if last.name != tensor.source:
            raise BadInputError(f"{tensor.source} is not the last operator: others may read it by its name")
        self._operators[-1] = last.model_copy(update={"name": name})
        return tensor._replace(source=name)

    # ------------------------------------------------------------ layers with weights

    def conv(
        self, x: Tensor, width: int, kernel: int = 1, stride: int = 1, groups: int = 1, activation: str | None = "relu"
    ) -> Tensor:
        """A dense, pointwise or grouped convolution with an odd kernel and its activation."""
        if x.width % groups or width % groups:
            raise BadInputError(f"{x.width} to {width} channels cannot be divided into {groups} groups")
        facts = {"kernel": (kernel, kernel), "stride": (stride, stride), "groups": groups, "activation": activation}
        return self._append("conv", (x,), self._new(width), _strided(x.size, stride), **facts)

    def depthwise(self, x: Tensor, kernel: int = 3, stride: int = 1, activation: str | None = "relu") -> Tensor:
        """A convolution of every channel on its own."""
        facts: dict[str, object] = {"kernel": (kernel, kernel), "stride": (stride, stride), "activation": activation}
        if x.width == 1:  # nothing to divide: tracing calls it a dense convolution
            return self._append("conv", (x,), self._new(1), _strided(x.size, stride), **facts)
        facts |= {"groups": x.width, "depthwise": True}
        return self._append("conv", (x,), x.groups, _strided(x.size, stride), **facts)

    def conv_transpose(
        self, x: Tensor, width: int, kernel: int = 2, stride: int = 2, activation: str | None = None
    ) -> Tensor:
        """A transposed convolution that makes the map `stride` times as large."""
        facts = {"kernel": (kernel, kernel), "stride": (stride, stride), "activation": activation}
        size = (x.size[0] * stride, x.size[1] * stride)
        return self._append("conv_transpose", (x,), self._new(width), size, **facts)

    def linear(self, x: Tensor, width: int, activation: str | None = None) -> Tensor:
        """A linear layer; a map is flattened in front of it."""
        repeat = x.size[0] * x.size[1]
        flat = x._replace(size=(1, 1))
        return self._append("linear", (flat,), self._new(width), (1, 1), in_repeat=repeat, activation=activation)

    # ------------------------------------------------------------ element by element

    def add(self, a: Tensor, b: Tensor, activation: str | None = None) -> Tensor:
        """A sum of two tensors of the same shape."""
        if (a.width, a.size) != (b.width, b.size):
            raise BadInputError(f"{a.source} and {b.source} differ in shape: they cannot be added")
        return self._append("add", (a, b), a.groups, a.size, activation=activation)

    def mul(self, a: Tensor, gate: Tensor) -> Tensor:
        """A product with a tensor of the same shape, or with one number a channel."""
        if a.width != gate.width or gate.size not in (a.size, (1, 1)):
            raise BadInputError(f"{gate.source} does not fit {a.source}: they cannot be multiplied")
        return self._append("mul", (a, gate), a.groups, a.size)

    def activation(self, x: Tensor, function: str) -> Tensor:
        """A function of its own: exporters fold it into the operator in front only where nothing else reads that."""
        return self._append("activation", (x,), x.groups, x.size, activation=function)

    def batch_norm(self, x: Tensor, activation: str | None = None) -> Tensor:
        """A batch norm that cannot be folded into a convolution in front of it, with its activation."""
        return self._append("batch_norm", (x,), x.groups, x.size, activation=activation)

    def softmax(self, x: Tensor) -> Tensor:
        """A softmax over the channels."""
        return self._append("softmax", (x,), x.groups, x.size)

    # ------------------------------------------------------------ maps

    def max_pool(self, x: Tensor, kernel: int = 2, stride: int = 2, ceil: bool = False) -> Tensor:
        """The largest value of each window; `ceil`: windows reach over the map's end, and no side is padded."""
        return self._pool("max_pool", x, kernel, stride, ceil)

    def avg_pool(self, x: Tensor, kernel: int = 2, stride: int = 2, ceil: bool = False) -> Tensor:
        """The mean of each window; `ceil` as of `max_pool`."""
        return self._pool("avg_pool", x, kernel, stride, ceil)

    def global_pool(self, x: Tensor) -> Tensor:
        """The mean of each channel's whole map."""
        return self._append("global_pool", (x,), x.groups, (1, 1))

    def resize(self, x: Tensor, factor: int = 2) -> Tensor:
        """A map `factor` times as large, without weights."""
        return self._append("resize", (x,), x.groups, (x.size[0] * factor, x.size[1] * factor))

    def pad(self, x: Tensor, rows: int = 1) -> Tensor:
        """Constants around the map that are no zeros in front of a convolution, which runtimes fold into it."""
        return self._append("pad", (x,), x.groups, (x.size[0] + 2 * rows, x.size[1] + 2 * rows))

    def transpose(self, x: Tensor) -> Tensor:
        """Rows and columns exchanged."""
        return self._append("transpose", (x,), x.groups, (x.size[1], x.size[0]))

    # ------------------------------------------------------------ channels

    def concat(self, *parts: Tensor) -> Tensor:
        """The channels of several tensors one after the other."""
        if len({part.size for part in parts}) != 1:
            raise BadInputError("maps of different sizes cannot be concatenated")
        groups = tuple(group for part in parts for group in part.groups)
        width = sum(part.width for part in parts)
        whole = parts[0]._replace(groups=groups, width=width)
        sources = tuple(part.source for part in parts)
        return self._append("concat", (whole,), groups, whole.size, inputs=sources)

    def shuffle(self, x: Tensor, groups: int) -> Tensor:
        """ShuffleNet's interleaving of channel groups: reshape, transpose, reshape."""
        if x.width % groups:
            raise BadInputError(f"{x.width} channels cannot be shuffled in {groups} groups")
        return self._append("shuffle", (x,), self._new(x.width), x.size, groups=groups)

    def split(self, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The first `width` channels and the rest: two operators of kind "slice", in this order."""
        if not 0 < width < x.width:
            raise BadInputError(f"{width} of {x.width} channels is no split")
        first = self._append("slice", (x,), self._new(width), x.size)
        return first, self._append("slice", (x,), self._new(x.width - width), x.size)

    # ------------------------------------------------------------ blocks

    def squeeze_excite(self, x: Tensor, reduced: int, gate: str = "hardsigmoid", linear: bool = False) -> Tensor:
        """A gate for every channel out of the channels' means: 1 x 1 convolutions (MobileNetV3) or linear (SENet)."""
        pooled = self.global_pool(x)
        if linear:
            scale = self.linear(self.linear(pooled, reduced, "relu"), x.width, gate)
        else:
            scale = self.conv(self.conv(pooled, reduced), x.width, activation=gate)
        return self.mul(x, scale)

    # ------------------------------------------------------------ pieces

    def _pool(self, kind: str, x: Tensor, kernel: int, stride: int, ceil: bool) -> Tensor:
        if ceil:
            size = (-(-(x.size[0] - kernel) // stride) + 1, -(-(x.size[1] - kernel) // stride) + 1)
        elif kernel % 2:
            size = _strided(x.size, stride)
        else:
            size = ((x.size[0] - kernel) // stride + 1, (x.size[1] - kernel) // stride + 1)
        return self._append(kind, (x,), x.groups, size, kernel=(kernel, kernel), stride=(stride, stride), ceil=ceil)

    def _new(self, width: int) -> tuple[str, ...]:
        """A channel group for the tensor that the next operator writes."""
        name = f"<{len(self._groups)}>"
        self._groups[name] = ChannelGroup(width=width)
        return (name,)

    def _append(
        self, kind: str, read: tuple[Tensor, ...], written: tuple[str, ...], size: tuple[int, int], **facts: object
    ) -> Tensor:
        if min(size) < 1:
            raise BadInputError(f"nothing is left of a map of {read[0].size} behind {kind}")
        name = f"{kind}_{1 + sum(operator.kind == kind for operator in self._operators)}"
        given = {
            "name": name,
            "kind": kind,
            "module": "",
            "inputs": tuple(tensor.source for tensor in read),
            "in_groups": read[0].groups,
            "out_groups": written,
            "in_size": read[0].size,
            "out_size": size,
        }
        self._operators.append(Operator.model_validate(given | facts))
        return Tensor(name, written, sum(self._groups[group].width for group in written), size)


def _strided(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Size behind an odd kernel that is padded by half of it."""
    return -(-size[0] // stride), -(-size[1] // stride)
