"""Traces a module through torch.export into fused operators whose channel counts are variables."""

from __future__ import annotations

import torch
from torch import nn

from mobilekit.errors import BadInputError, first_line
from mobilekit.network.channels import Layout
from mobilekit.network.rules import follow
from mobilekit.network.trial import refuse_what_breaks
from mobilekit.network.walk import Walk
from mobilekit.types import INPUT_GROUP, Axis, ChannelGroup, Network, Operator, Producer


def trace(module: nn.Module, example_input: torch.Tensor, name: str = "network") -> Network:
    """The module as a Network.

    `example_input` has shape (1, C, H, W); the module must be in eval mode and return one tensor. Channel groups
    whose removal breaks the module's own forward (a size written into the code) are found by trying, and refused.
    Numbers that a forward derives from a channel count (`x.shape[1] ** -0.5`) are constants here, and follow the
    count in a shrunk module: no refusal, but its outputs are not those of silenced channels.
    Raises BadInputError where torch.export cannot trace the module, and where it cannot be copied.
    """
    try:
        with torch.no_grad():  # a forward with its own no_grad block would become a nested graph otherwise
            program = torch.export.export(module, (example_input,))
    except Exception as error:
        raise BadInputError(f"the model cannot be traced by torch.export: {first_line(error)}") from error
    walk = follow(program)
    network = _network(walk, name, tuple(example_input.shape))
    return refuse_what_breaks(module, example_input, network, walk.result_shapes)


def _network(walk: Walk, name: str, input_shape: tuple[int, ...]) -> Network:
    """Give the channel groups names that people can read: the path of the first layer that writes them."""
    channels = walk.channels
    producers: dict[int, list[Producer]] = {}
    for group, weights in walk.producers.items():
        producers.setdefault(channels.find(group), []).extend(weights)
    roots = sorted({channels.find(group) for group in range(len(channels.widths))})
    label = _labels(roots, producers)
    label[channels.find(0)] = INPUT_GROUP

    def named(layout: Layout) -> tuple[str, ...]:
        return tuple(label[channels.find(group)] for group in layout.groups)

    return Network(
        name=name,
        input_shape=input_shape,
        operators=tuple(
            Operator(
                name=draft.name,
                kind=draft.kind,
                module=draft.module,
                inputs=draft.inputs,
                in_groups=named(draft.in_layout),
                out_groups=named(draft.out_layout),
                in_size=draft.in_size,
                out_size=draft.out_size,
                in_repeat=draft.in_layout.repeat,
                kernel=draft.kernel,
                stride=draft.stride,
                groups=draft.groups,
                depthwise=draft.depthwise,
                activation=draft.activation,
                ceil=draft.ceil,
            )
            for draft in walk.operators.values()
        ),
        groups={
            label[root]: ChannelGroup(
                width=channels.widths[root],
                refused=channels.refusal(root) or (None if root in producers else "no weight produces it"),
                producers=tuple(producers.get(root, ())),
            )
            for root in roots
        },
        axes={
            parameter: {dim: Axis(groups=named(layout), repeat=layout.repeat) for dim, layout in dims.items()}
            for parameter, dims in walk.axes.items()
        },
    )


def _labels(roots: list[int], producers: dict[int, list[Producer]]) -> dict[int, str]:
    """The layer's path; the weight's full name where a layer holds several weights or is the module itself."""
    paths = {root: producers[root][0].parameter for root in roots if root in producers}
    layers = [path.rpartition(".")[0] for path in paths.values()]
    label = {root: f"<{root}>" for root in roots}
    for root, path in paths.items():
        layer = path.rpartition(".")[0]
        label[root] = layer if layer and layers.count(layer) == 1 else path
    return label
