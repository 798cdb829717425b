"""What the tensors of a module hold on inputs, by the names of the nodes of its exported graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from mobilekit.types import Range

Watch = Callable[[fx.Node, torch.Tensor], None]
"""Called with a node and what it computes, at once: forms in place write over it later."""


def exported(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> torch.export.ExportedProgram:
    """The module's graph for inputs of these shapes, batch size included."""
    with torch.no_grad():
        return torch.export.export(module, tuple(inputs))


def watched(program: torch.export.ExportedProgram, inputs: Sequence[torch.Tensor], watch: Watch) -> None:
    """Run a program once and look at every floating-point tensor on the way, its inputs included, weights not."""
    signature, state = program.graph_signature, {**program.state_dict, **program.constants}
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    rest = iter(inputs)
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    given = [state[lifted[name]].clone() if name in lifted else next(rest).clone() for name in names]

    class Watcher(fx.Interpreter):
        """Shows each tensor as soon as it is there."""

        def run_node(self, n: fx.Node) -> object:
            result: object = super().run_node(n)
            if n.name not in lifted and isinstance(result, torch.Tensor) and result.is_floating_point():
                watch(n, result)
            return result

    with torch.no_grad():
        Watcher(program.graph_module).run(*given)


def activation_ranges(module: torch.nn.Module, batches: Sequence[Sequence[torch.Tensor]]) -> dict[str, Range]:
    """Least and greatest finite value of every tensor over all inputs, by the node that computes it.

    A batch is one tensor for each input of the module, float32. Exact ends, no moving average: what only some inputs
    reach is not cut off.
    """
    found: dict[str, Range] = {}

    def note(node: fx.Node, value: torch.Tensor) -> None:
        low, high = (float(end) for end in value.aminmax()) if value.numel() else (0.0, 0.0)
        if not low > float("-inf") or not high < float("inf"):
            finite = value[value.isfinite()]
            low, high = (float(end) for end in finite.aminmax()) if finite.numel() else (0.0, 0.0)
        before = found.get(node.name, (low, high))
        found[node.name] = (min(low, before[0]), max(high, before[1]))

    programs: dict[int, torch.export.ExportedProgram] = {}
    for batch in batches:
        size = len(batch[0])
        if size not in programs:
            programs[size] = exported(module, batch)
        watched(programs[size], batch, note)
    return found
