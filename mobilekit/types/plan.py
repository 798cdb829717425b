"""What is asked and what will be done: budgets, options, plans, candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from mobilekit.types.network import Estimate, Network
from mobilekit.types.values import NonNegative, Positive, Precision, RuntimeName, Value

if TYPE_CHECKING:
    import torch


class Budget(Value):
    """What the result has to meet. One of `latency_ms` and `speedup` at most; neither: nothing to meet.

    >>> Budget(latency_ms=12).statistic
    'median'
    """

    latency_ms: Positive | None = None
    speedup: Positive | None = None
    """Times faster than the fp32 original in the planned runtime on the same device."""
    statistic: Literal["median"] = "median"
    clock: Literal["cpu", "wall"] = "cpu"
    """Host measurements are judged on CPU time of the one pinned thread: other tenants disturb wall time."""
    size_mb: Positive | None = None
    peak_memory_mb: Positive | None = None
    max_drop: NonNegative | None = None
    """Largest allowed fall of `accuracy`, in points (0.01 of the fraction)."""

    @property
    def limits_nothing(self) -> bool:
        """Whether there is nothing to meet."""
        limits = (self.latency_ms, self.speedup, self.size_mb, self.peak_memory_mb, self.max_drop)
        return all(limit is None for limit in limits)

    @property
    def is_dual(self) -> bool:
        """Whether the accuracy is what is limited, and the latency what is to be small."""
        return self.max_drop is not None and self.latency_ms is None and self.speedup is None

    @model_validator(mode="after")
    def _one_latency(self) -> Budget:
        if self.latency_ms is not None and self.speedup is not None:
            raise ValueError("give latency_ms or speedup, not both")
        return self


Json = str | int | float | bool | None


class Option(Value):
    """One lever at one place with one strength."""

    transform: str
    where: str
    settings: dict[str, Json]


At = Literal["channels", "layer", "block", "network"]
"""What an option's `where` names: a channel group, the module path of a layer, that of a residual block, or the whole
network (or one of its operators)."""


class ChosenOption(Value):
    """A lever that the plan uses."""

    option: Option
    reason: str
    saved_ms: float | None
    """Predicted saving when this option is added last; None: no price was available."""
    damage: float | None
    """Divergence of the output from the original's that this option alone causes; None: not measured."""


class Together(Value):
    """What all options of a plan do to the output on calibration inputs, measured after a trial of training."""

    damage: float
    agreement: float | None
    """Share of inputs on which the top-1 class is the original's; None: the output has no classes."""
    steps: int = 0
    """Of the trial; 0: it was measured before any training."""

    def __str__(self) -> str:
        """A sentence for people."""
        same = "" if self.agreement is None else f", the same class for {self.agreement:.1%} of the inputs"
        return f"all of it together, measured {self.when}: a damage of {self.damage:.4f}{same}"

    @property
    def when(self) -> str:
        """In words."""
        return f"after a trial of {self.steps} training steps" if self.steps else "before any training"


class RejectedOption(Value):
    """A lever that the plan does not use."""

    transform: str
    where: str
    reason: str


class Plan(Value):
    """What will be done to the network, why, and what it is predicted to cost. Plain data: print, save, replay."""

    schema_version: Literal[1] = 1
    workload: str
    workload_key: str
    profile: str
    runtime: RuntimeName
    device: str | None
    budget: Budget
    seed: int
    train: bool
    train_seconds: float
    target_ms: float | None
    """Latency that the search had to stay under, as predicted."""
    estimate: Estimate
    baseline_estimate: Estimate
    chosen: tuple[ChosenOption, ...]
    rejected: tuple[RejectedOption, ...]
    together: Together | None = None
    """None: not measured."""
    warnings: tuple[str, ...] = ()

    @property
    def damage(self) -> float:
        """Of all options together as measured, else the sum of what was measured of each alone."""
        return self.together.damage if self.together else sum(c.damage or 0.0 for c in self.chosen)

    def __str__(self) -> str:
        """A few lines for people."""
        lines = [f"plan for {self.workload} on {self.profile} in {self.runtime}:"]
        lines += [f"  {c.option.transform} {c.option.where}: {c.reason}" for c in self.chosen] or ["  change nothing"]
        if self.together:
            lines.append(f"  {self.together}")
        e = self.estimate
        lines.append(
            f"  predicted {e.latency_ms:.3f} ms ({e.low_ms:.3f} to {e.high_ms:.3f}, {e.basis}), "
            f"original {self.baseline_estimate.latency_ms:.3f} ms; not measured"
        )
        return "\n".join(lines)


Activations = Literal["static", "dynamic", "float"]
WEIGHTS_IN_INT8: dict[str, frozenset[str]] = {
    "dynamic": frozenset({"conv", "linear"}),
    "float": frozenset({"conv", "conv_transpose", "linear"}),
}
"""Treatment of activations -> kinds of operators that it reaches: only weights are int8 in the file."""


Range = tuple[float, float]
"""Least and greatest value of a tensor."""


class QuantSpec(Value):
    """Which operators run in int8 and how; every runtime realises it natively or says why it cannot.

    >>> QuantSpec(operators={"conv2d": "int8"}).activations
    'static'
    """

    operators: dict[str, Precision]
    """Those in int8, and those that were asked to stay as they are. The others stay in float too."""
    activations: Activations = "static"
    """`static`: int8 with ranges from calibration. `dynamic`: int8 with ranges taken at every inference, float between
    operators. `float`: int8 weights alone, and arithmetic in float."""
    weight_scheme: Literal["symmetric per channel"] = "symmetric per channel"
    activation_scheme: Literal["asymmetric per tensor"] = "asymmetric per tensor"
    calibration: Literal["min-max"] = "min-max"
    ranges: dict[str, Range] = Field(default_factory=dict)
    """Static int8: what tensors range over on the calibration inputs, by the node of the exported PyTorch graph that
    computes them. All files of a candidate get their scales from these. Empty: not calibrated yet."""


@dataclass(frozen=True)
class Calibration:
    """Inputs to measure a network on, for levers that look at activations or gradients, or re-fit weights."""

    inputs: tuple[torch.Tensor, ...]
    """Batches (N, C, H, W)."""
    targets: tuple[Any, ...] | None = None
    """What the loss compares the outputs with, one for each batch; None: there are no labels."""
    loss: Callable[[torch.Tensor, Any], torch.Tensor] | None = None
    """Loss of an output and a target, a scalar tensor; None: cross entropy."""
    seed: int = 0
    """Fixes every draw: sampled positions, and labels drawn from the network's own output."""


@dataclass(frozen=True)
class Candidate:
    """A network on its way: the module, its input and what was done to it. The module is never changed in place."""

    module: torch.nn.Module
    example_input: torch.Tensor
    network: Network
    quant: QuantSpec | None = None
    history: tuple[Option, ...] = ()
    calibration: Calibration | None = None
    """None: levers that need data refuse."""

    def after(self, option: Option, **changes: Any) -> Candidate:
        """The candidate after one more option."""
        return replace(self, history=(*self.history, option), **changes)


@dataclass(frozen=True)
class Untraced:
    """A network that is exported as it is and nothing else: any number of tensors in and out, no operators known.

    In int8 it is quantised as a whole, statically.
    """

    module: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    """An example of each input, batch 1."""
