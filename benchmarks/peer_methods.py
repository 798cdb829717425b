"""The methods that mobilekit is compared with: how each makes a network smaller, trains it and writes its file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import lab
import method_list
import numpy as np
import torch
from torch import nn

from mobilekit import profiles, registry
from mobilekit.cost.measure import in_precision
from mobilekit.cost.price import latencies_ms, latency_ms
from mobilekit.errors import UnsupportedError
from mobilekit.network import shrink
from mobilekit.pipeline.pricing import measured_profile
from mobilekit.runtimes._job import quiet
from mobilekit.types import Candidate, DeviceProfile, Network, Option, Precision
from mobilekit.workloads import fashion_mnist

FINE_TUNING: Mapping[str, Any] = {"optimiser": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
"""Of a pruned network, with a cosine to zero."""
FROM_SCRATCH: Mapping[str, Any] = lab.FROM_SCRATCH
PRUNING_STEPS = 5
"""Of Torch-Pruning: a fifth of what is to go, then importances anew."""
FINEST_GRID = 4
"""Channels that NetAdapt takes at once; prices know which multiples a runtime likes."""


class Peer(NamedTuple):
    """A method: its paper, how it makes a network smaller at a strength, and how it goes on."""

    paper: str
    shrink: Callable[[Candidate, float, int], nn.Module] | None
    """Start, share of the channels that stay, multiple that widths are rounded to -> smaller network. None: NetAdapt,
    which chooses its widths while it trains."""
    recipe: Mapping[str, Any] = FINE_TUNING
    own_tools: bool = False
    """Quantised by the tools' own functions, and not by mobilekit's exporters."""
    shapes_of: str = ""
    """The method whose networks have the same shapes, and so the same strengths."""


def peers() -> dict[str, Peer]:
    """All of them by name."""
    return {
        "uniform_l1": Peer("1608.08710", uniform_l1),
        "torch_pruning_group_norm": Peer("2301.12900", by_group_norm, own_tools=True),
        "torch_pruning_taylor": Peer("1906.10771", by_taylor, own_tools=True),
        "width_scratch": Peer("1704.04861", width_scaled, FROM_SCRATCH, shapes_of="uniform_l1"),
        "netadapt": Peer("1804.03230", None),
    }


# ---------------------------------------------------------------- one strength everywhere


def uniform_l1(start: Candidate, share: float, grid: int) -> nn.Module:
    """The same share of every channel group by the L1 norm of its filters."""
    options = [
        Option(transform="channel_pruning", where=name, settings={"width": width, "criterion": "l1"})
        for name, width in uniform_widths(start.network, share, grid).items()
    ]
    return method_list.everywhere(start, options)[0].module if options else copy.deepcopy(start.module)


def width_scaled(start: Candidate, share: float, grid: int) -> nn.Module:
    """The same architecture with every width scaled, and weights as a new network has them."""
    keep = {name: range(width) for name, width in uniform_widths(start.network, share, grid).items()}
    module = shrink(start.module, start.network, keep)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            layer.reset_parameters()
    return module


def uniform_widths(network: Network, share: float, grid: int) -> dict[str, int]:
    """Channels of every group that gets fewer."""
    found = {
        name: min(group.width, max(grid, round(group.width * share / grid) * grid))
        for name, group in network.groups.items()
        if group.refused is None
    }
    return {name: width for name, width in found.items() if width < network.groups[name].width}


# ---------------------------------------------------------------- Torch-Pruning


def by_group_norm(start: Candidate, share: float, grid: int) -> nn.Module:
    """Torch-Pruning's global pruning by the L2 norm of whole groups."""
    import torch_pruning

    return _globally(start, share, grid, torch_pruning.importance.GroupMagnitudeImportance(p=2))


def by_taylor(start: Candidate, share: float, grid: int) -> nn.Module:
    """Torch-Pruning's global pruning by weight times gradient, on the calibration images."""
    import torch_pruning

    return _globally(start, share, grid, torch_pruning.importance.GroupTaylorImportance())


def _globally(start: Candidate, share: float, grid: int, importance: Any) -> nn.Module:
    import torch_pruning

    module = copy.deepcopy(start.module).eval()
    pruner = torch_pruning.BasePruner(
        module,
        start.example_input,
        importance,
        global_pruning=True,
        pruning_ratio=1 - share,
        round_to=grid,
        iterative_steps=PRUNING_STEPS,
        ignored_layers=[layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1:],
    )
    for _ in range(PRUNING_STEPS if share < 1 else 0):
        module.zero_grad(set_to_none=True)
        assert start.calibration is not None
        assert start.calibration.targets is not None
        for images, targets in zip(start.calibration.inputs, start.calibration.targets, strict=True):
            fashion_mnist.loss(module(images), targets).backward()
        pruner.step()
    module.zero_grad(set_to_none=True)
    return module


# ---------------------------------------------------------------- NetAdapt


@dataclass
class NetAdapt:
    """Yang et al. 2018 (arXiv:1804.03230): the most accurate of single cuts that save an iteration's latency, again
    and again.

    In every iteration each channel group is cut by as little as saves what the iteration has to save, by the prices of
    the host's profile as a lookup table; every such network is trained for a moment, and the one that classifies most
    of 2,048 training images rightly is kept. What it measures after an iteration says how much the next has to save.
    """

    runtime: str
    precision: Precision
    speedup: float
    seed: int
    seconds: float
    """Of training in all; a part of it goes into the moments."""
    timed: Callable[[nn.Module], float]
    """How many times faster than the original a network's file is."""
    spent: float = 0.0
    steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    ITERATIONS = 6
    MOST_ITERATIONS = 14
    SHORT_SHARE = 0.4
    """Of the training time for the moments; iterations beyond those that are planned take of what is left."""
    CLOSER = 0.5
    """Where no single cut saves enough, half of it is asked for, in logarithms."""
    LEAST_SAVING = 0.995
    SHORT_RATE = 0.01
    """Highest learning rate of the moments, without momentum's warm-up."""

    def run(self, start: Candidate) -> Candidate:
        """The adapted network before its long training. Raises UnsupportedError where it cannot become fast enough."""
        profile = measured_profile(registry.device("host"), profiles.load("host"), lambda *_: None)[0]
        ratio = first = self.timed(start.module)
        self.history.append({"ratio": ratio})
        judged = [batch for batch, _ in zip(fashion_mnist.train_data(seed=77), range(16), strict=False)]
        subject = start
        for iteration in range(self.MOST_ITERATIONS):
            if ratio >= self.speedup:
                return subject
            done = min(1.0, (iteration + 1) / self.ITERATIONS)
            wanted = max(first * (self.speedup / first) ** done, ratio * 1.01)
            choices = self._cuts(subject.network, profile, ratio / wanted)
            subject = self._best(subject, choices, judged)
            ratio = self.timed(subject.module)
            last = subject.history[-1]
            self.history.append({"cut": last.where, "width": last.settings["width"], "ratio": ratio})
            lab.say(f"  {last.where} to {last.settings['width']} channels: {ratio:.2f}x")
        if ratio < self.speedup:
            raise UnsupportedError(f"{ratio:.2f} times faster after {self.MOST_ITERATIONS} iterations")
        return subject

    def _cuts(self, network: Network, profile: DeviceProfile, left: float) -> list[Option]:
        """For every group the smallest cut that leaves this share of the latency or less."""
        plain = in_precision(network, self.precision, registry.runtime(self.runtime))
        now = latency_ms(plain, profile, self.runtime)
        grids = {
            name: np.arange(group.width - 1 - (group.width - 1) % FINEST_GRID, 0, -FINEST_GRID)
            for name, group in network.groups.items()
            if group.refused is None and group.width > FINEST_GRID
        }
        prices = {name: latencies_ms(plain, profile, self.runtime, {name: grid}) for name, grid in grids.items()}
        while left < self.LEAST_SAVING:
            fitting = {name: grids[name][found <= left * now] for name, found in prices.items()}
            options = [
                Option(transform="channel_pruning", where=name, settings={"width": int(widths[0]), "criterion": "l2"})
                for name, widths in fitting.items()
                if len(widths)
            ]
            if options:
                return options
            left **= self.CLOSER
        raise UnsupportedError("no channel group is left whose cut would save latency")

    def _best(self, subject: Candidate, options: list[Option], judged: Iterable[Any]) -> Candidate:
        """The most accurate of the cut networks after a moment of training each."""
        moment = self.SHORT_SHARE * (self.seconds - self.spent) / (self.ITERATIONS * len(options))
        judged = list(judged)
        best, most = subject, -1.0
        for option in options:
            cut = registry.transform(option.transform).apply(subject, option)
            tuned = lab.tuned_for(cut.module, moment, self.seed, **{**FINE_TUNING, "learning_rate": self.SHORT_RATE})
            self.spent, self.steps = self.spent + moment, self.steps + tuned.steps
            with torch.inference_mode():
                right = [(tuned.module(images).argmax(1) == targets).float().mean() for images, targets in judged]
            found = float(torch.stack(right).mean())
            if found > most:
                best, most = replace(cut, module=tuned.module), found
        return best


# ---------------------------------------------------------------- files


def written(
    peer: Peer,
    subject: Candidate,
    runtime: str,
    precision: Precision,
    path: Path,
    inputs: Sequence[torch.Tensor] | None = None,
) -> Path:
    """A network's file, as this method's users would write it; int8 ranges over the workload's calibration images."""
    images = list(inputs or fashion_mnist.calibration_data())
    if precision != "int8" or not peer.own_tools:
        return lab.exported(subject, runtime, precision, path, images)
    plain = lab.exported(subject, runtime, "fp32", path.with_name(f"{path.stem}-float"))
    samples = [image[None].numpy() for batch in images for image in batch]
    result = path.with_suffix(plain.suffix)
    with quiet(native=True):
        stock_int8(runtime, plain, samples, result)
    return result


def stock_int8(runtime: str, plain: Path, samples: list[np.ndarray], result: Path) -> None:
    """The runtime's own quantiser with its own calibration, on a float file whose maps mobilekit has laid out."""
    {"onnx": _onnxruntime_int8, "tflite": _ai_edge_int8}[runtime](plain, samples, result)


def _onnxruntime_int8(plain: Path, samples: list[np.ndarray], result: Path) -> None:
    """onnxruntime's static quantiser: QDQ, a scale for every channel, and on x86 unsigned activations beside signed
    weights, as its manual advises."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            sample = next(self.rest, None)
            return None if sample is None else {"input": sample}

    prepared = result.with_name(f"{result.stem}-prepared{result.suffix}")
    quant_pre_process(str(plain), str(prepared))
    quantization.quantize_static(
        str(prepared),
        str(result),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


def _ai_edge_int8(plain: Path, samples: list[np.ndarray], result: Path) -> None:
    """ai-edge-quantizer's static recipe."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    ((signature, names),) = Interpreter(model_path=str(plain)).get_signature_list().items()
    data = [{names["inputs"][0]: np.ascontiguousarray(sample.transpose(0, 2, 3, 1))} for sample in samples]
    worker = quantizer.Quantizer(str(plain), recipe.static_wi8_ai8())
    found = worker.calibrate({signature: data})
    worker.quantize(found, enable_progress_report=False).export_model(str(result), overwrite=True)
