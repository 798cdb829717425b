"""The one training loop, used by every recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mobilekit.errors import BadInputError, MobilekitError, first_line
from mobilekit.training.hooks import Hook, Loss, Objective
from mobilekit.training.job import Recipe, State, Trained, TrainingJob, endless


def train(module: nn.Module, objective: Loss, job: TrainingJob, recipe: Recipe, hooks: Sequence[Hook] = ()) -> Trained:
    """Train the module itself (recipes hand in a copy) and leave it in eval mode.

    The same seed gives the same weights on the same machine. With a fixed number of steps a training that was killed
    ends in the state of one that was not, if `job.batches` gives the same batches again: the optimiser's moments and
    the random state are kept, and the batches of the steps that were taken are drawn again. Else the moments are
    rebuilt, and only the weights are kept. Batch norms whose scale is frozen keep their statistics.

    Raises MobilekitError when the data, a step or the loss fails, or the loss or gradient is no longer finite;
    BadInputError where nothing can be trained.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        # Whoever calls keeps the random numbers he had.
        with torch.random.fork_rng(devices=[]):
            run = _Run(module, objective, job, recipe, hooks)
            run.train()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return Trained(module.eval(), run.step, run.first_loss, run.last_loss)


class _Run:
    """The loop's state: what is saved is enough to go on after a kill."""

    def __init__(
        self, module: nn.Module, objective: Loss, job: TrainingJob, recipe: Recipe, hooks: Sequence[Hook]
    ) -> None:
        if recipe.steps is None and not job.seconds > 0:
            raise BadInputError(f"a training of {job.seconds} seconds was asked for: give more than zero")
        self.module, self.objective, self.job, self.recipe, self.hooks = module, objective, job, recipe, hooks
        self.parts = objective.parts if isinstance(objective, Objective) else None
        self.step = 0
        self.elapsed = 0.0
        self.first_loss = self.last_loss = float("nan")
        # Data and dropout draw from streams of their own, so that the data of earlier steps can be drawn again.
        torch.manual_seed(job.seed)
        self.data_random = torch.get_rng_state()
        torch.manual_seed(job.seed + 1)
        self.data = endless(job)
        _freeze(module, recipe)
        for hook in hooks:
            hook.attach(module)
        state = job.load() or {}
        if state:
            self._restore(state)
        self.optimiser = self._optimiser()
        if state and recipe.steps is not None:
            self._restore_exactly(state)

    # ------------------------------------------------------------ steps

    @property
    def done(self) -> float:
        """Finished fraction: by time, but not before the fewest steps and not after the most."""
        recipe = self.recipe
        if recipe.steps is not None:
            return min(1.0, self.step / recipe.steps)
        by_time = min(self.elapsed / self.job.seconds, self.step / recipe.fewest_steps)
        return min(1.0, max(by_time, self.step / recipe.most_steps))

    def train(self) -> None:
        self.module.train()
        for layer in self.module.modules():
            if isinstance(layer, _BatchNorm) and layer.weight is not None and not layer.weight.requires_grad:
                layer.eval()
        before, saved = self.elapsed, time.monotonic()
        started, first = saved, self.step
        while self.done < 1.0:
            self._one(*self._drawn())
            now = time.monotonic()
            self.elapsed = before + now - started
            with torch.no_grad():
                for hook in self.hooks:
                    hook.after_step(self.step, self.done)
            if now - saved > self.recipe.checkpoint_seconds:
                self._save()
                saved = now
            self.job.progress(self.done)
        if self.step > first:
            self._save()

    def _one(self, inputs: Any, target: Any) -> None:
        share = self.recipe.schedule(self.done)
        for group in self.optimiser.param_groups:
            group["lr"] = group["highest"] * share
        with torch.no_grad():
            for hook in self.hooks:
                hook.before_forward()
        self.module.zero_grad(set_to_none=True)
        self.optimiser.zero_grad(set_to_none=True)
        try:
            if inputs.ndim == 4:
                inputs = inputs.to(memory_format=torch.channels_last)
            loss = self.objective(self.module, inputs, target)
            value = float(loss.detach())
            if math.isfinite(value):
                loss.backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # the user's data may not fit the network, and the loss is the user's code
            raise MobilekitError(f"the training step {self.step + 1} fails: {first_line(error)}") from error
        if not math.isfinite(value):
            raise MobilekitError(f"the training loss is {value} at step {self.step + 1}: check train_data() and loss()")
        self._update()
        self.step += 1
        if self.step == 1:
            self.first_loss = value
        self.last_loss = value

    def _update(self) -> None:
        with torch.no_grad():
            for hook in self.hooks:
                hook.before_update()
        updated = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(updated, self.recipe.clip))
        if not math.isfinite(norm):
            raise MobilekitError(
                f"the gradient is not finite at step {self.step + 1}: check loss(), or lower the learning rate"
            )
        self.optimiser.step()

    def _drawn(self) -> tuple[Any, Any]:
        """The next batch, drawn with the random numbers of the data."""
        others = torch.get_rng_state()
        torch.set_rng_state(self.data_random)
        try:
            return next(self.data)
        finally:
            self.data_random = torch.get_rng_state()
            torch.set_rng_state(others)

    def _optimiser(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        hooked = {id(parameter) for hook in self.hooks for parameter in hook.replaced()}
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and id(parameter) not in hooked:
                groups.setdefault(recipe.rate(name), []).append(parameter)
        if self.parts is not None:
            groups.setdefault(1.0, []).extend(self.parts.parameters())
        chosen: list[dict[str, Any]] = [
            {"params": parameters, "highest": recipe.learning_rate * factor} for factor, parameters in groups.items()
        ]
        own = [parameter for hook in self.hooks for parameter in hook.parameters()]
        if own:
            chosen.append({"params": own, "highest": recipe.learning_rate, "weight_decay": 0.0})
        if not chosen:
            raise BadInputError("every parameter is frozen: there is nothing to train")
        if recipe.optimiser == "sgd":
            return torch.optim.SGD(
                chosen, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
            )
        return torch.optim.AdamW(chosen, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)

    # ------------------------------------------------------------ keeping

    def _save(self) -> None:
        counters = torch.tensor([self.step, self.elapsed, self.first_loss, self.last_loss], dtype=torch.float64)
        state = {"progress": counters, **_named("model", self.module.state_dict())}
        if self.parts is not None:
            state |= _named("objective", self.parts.state_dict())
        for place, hook in enumerate(self.hooks):
            state |= _named(f"hook.{place}", hook.state())
        if self.recipe.steps is not None:
            for place, moments in self.optimiser.state_dict()["state"].items():
                tensors = {name: each for name, each in moments.items() if isinstance(each, torch.Tensor)}
                state |= _named(f"optimiser.{place}", tensors)
            state["random"] = torch.get_rng_state()
        self.job.save(state)

    def _restore(self, state: State) -> None:
        self.step, self.elapsed, self.first_loss, self.last_loss = state["progress"].tolist()
        self.step = int(self.step)
        self.module.load_state_dict(_under("model", state))
        if self.parts is not None:
            self.parts.load_state_dict(_under("objective", state))
        with torch.no_grad():
            for place, hook in enumerate(self.hooks):
                hook.restore(_under(f"hook.{place}", state))

    def _restore_exactly(self, state: State) -> None:
        whole = self.optimiser.state_dict()
        moments: dict[int, State] = {}
        for name, tensor in _under("optimiser", state).items():
            place, _, key = name.partition(".")
            moments.setdefault(int(place), {})[key] = tensor.clone()
        self.optimiser.load_state_dict({**whole, "state": moments})
        if self.done < 1.0:
            for _ in range(self.step):
                self._drawn()
        if "random" in state:
            torch.set_rng_state(state["random"])


def _freeze(module: nn.Module, recipe: Recipe) -> None:
    """Parameters with the rate zero get no gradient. Raises BadInputError for paths that name nothing."""
    names = [name for name, _ in module.named_parameters()]
    for path in recipe.rates:
        if path and not any(name == path or name.startswith(f"{path}.") for name in names):
            raise BadInputError(f"the network has no parameter at '{path}', whose learning rate was given")
    for name, parameter in module.named_parameters():
        if recipe.rate(name) == 0:
            parameter.requires_grad = False


def _named(prefix: str, state: State) -> State:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def _under(prefix: str, state: State) -> State:
    """The part of a state below a prefix, named as it was before."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")}
