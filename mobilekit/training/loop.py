"""The one training loop, used by every recipe."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence

import torch
from torch import nn

from mobilekit.errors import BadInputError, MobilekitError, first_line
from mobilekit.training import optimiser, rate_range
from mobilekit.training.batches import Batches
from mobilekit.training.hooks import Hook, Loss, Objective
from mobilekit.training.job import Recipe, State, Trained, TrainingJob
from mobilekit.training.keeping import Counters, Subject, copied, named, under

SWEEP = 0.05
"""Part of the time that the search for a learning rate may take."""
JUDGEMENTS = 8
REVIEW = 0.6
SNAPSHOT_STEPS = 20
RETREATS = 3
SLOWER = 0.3
"""Factor on the learning rate after each retreat."""


def train(module: nn.Module, objective: Loss, job: TrainingJob, recipe: Recipe, hooks: Sequence[Hook] = ()) -> Trained:
    """Train the module itself (recipes hand in a copy) and leave it in eval mode.

    The same seed and number of steps give the same weights on the same machine; a training sized by time takes as many
    steps as the machine has time for and does not repeat to the bit. With a fixed number of steps a training that was
    killed ends in the state of one that was not, if `job.batches` gives the same batches again and nothing had to be
    taken back: the optimiser's moments and the random state are kept, and the batches of the steps that were taken are
    drawn again. Else the moments are rebuilt, and only the weights are kept. Batch norms whose scale is frozen keep
    their statistics.

    Batches that hold no finite numbers are left out. Where the loss or the gradient is not finite, the training goes
    back to its last good weights with 0.3 times the learning rate, at most three times; then it stops, with a warning.

    With several `job.workers` every process trains on batches of its own and gradients are averaged; batch norms see
    their own process's batch, as with DistributedDataParallel, and their statistics are averaged before they are used.

    Raises MobilekitError when the data, a step or the loss fails, or the loss or gradient of the first step is not
    finite; BadInputError where nothing can be trained.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    home = next((parameter.device for parameter in module.parameters()), None)
    try:
        # Whoever calls keeps the random numbers he had.
        with torch.random.fork_rng(devices=[]):
            run = _Run(module, objective, job, recipe, hooks)
            run.train()
            return run.result()
    finally:
        module.to(home, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class _NotFiniteError(MobilekitError):
    """The loss or the gradient is no number."""


class _Run:
    """The loop's state: what is saved is enough to go on after a kill."""

    def __init__(
        self, module: nn.Module, objective: Loss, job: TrainingJob, recipe: Recipe, hooks: Sequence[Hook]
    ) -> None:
        if recipe.steps is None and not job.seconds > 0:
            raise BadInputError(f"a training of {job.seconds} seconds was asked for: give more than zero")
        self.module, self.objective, self.job, self.recipe, self.hooks = module, objective, job, recipe, hooks
        self.workers = job.workers
        self.parts = objective.parts if isinstance(objective, Objective) else None
        self.subject = Subject(module, self.parts, hooks)
        self.at = Counters(rate=recipe.learning_rate)
        self.best: State = {}
        self.good: State | None = None
        self.rate_note = self.stopped = ""
        self.trouble: MobilekitError | None = None
        self.started = time.monotonic()
        self.batches = Batches(job, objective, recipe.echo)
        torch.manual_seed(job.seed + 1 + self.workers.rank)
        module.to(self.workers.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(objective, Objective) and self.workers.device is not None:
            objective.to(self.workers.device)
        optimiser.freeze(module, recipe)
        for hook in hooks:
            hook.attach(module)
        self._begin(self.workers.agreed(job.load() or {}))

    def _begin(self, state: State) -> None:
        """Go on from a state, or start: everywhere with the same weights, judged, at a rate that suits them."""
        if state:
            self.at, self.best = Counters.of(state["progress"]), under("best", state)
            self.subject.restore(state)
        elif self.workers.count > 1:
            self.subject.restore(self.workers.agreed(copied(self.subject.state())))
        self.subject.ready()
        self.optimiser = self._optimiser()
        self.started -= self.at.elapsed
        if not state:
            self._judge()
            if self.recipe.find_rate:
                self._find_rate()
            return
        self.rate_note = "found before the training was interrupted" if self.recipe.find_rate else ""
        if self.recipe.steps is not None:
            self._restore_exactly(state)
        else:
            self.batches.left_out = self.at.left_out

    def _find_rate(self) -> None:
        """Look for the learning rate in the first process; the others wait."""
        limit = math.inf if self.recipe.steps is not None else SWEEP * self.job.seconds
        began, found = time.monotonic(), None
        try:
            batches = self.batches.ahead(rate_range.BATCHES)
            limit -= time.monotonic() - began
            if self.workers.rank == 0:
                found = rate_range.sweep(self.module, self.objective, batches, self.recipe, limit)
        except MobilekitError as error:
            self.trouble = error
        except Exception:  # noqa: BLE001, S110 -- what is wrong with the loss, the first step will say
            pass
        found = self.workers.agreed(found)
        if found is not None:
            self.at.rate, self.rate_note = found.rate, found.note

    # ------------------------------------------------------------ steps

    @property
    def done(self) -> float:
        """Finished fraction: by time, but not before the fewest steps and not after the most."""
        recipe, step = self.recipe, self.at.step
        share = 1.0 if math.isnan(self.at.share) else self.at.share
        if self.stopped:
            return 1.0
        if recipe.steps is not None:
            return min(1.0, step / (share * recipe.steps))
        by_time = min(self.at.elapsed / (share * self.job.seconds), step / recipe.fewest_steps)
        return min(1.0, max(by_time, step / recipe.most_steps))

    def train(self) -> None:
        first, saved = self.at.step, time.monotonic()
        while self.done < 1.0:
            try:
                self._one()
            except _NotFiniteError as error:
                self._retreat(error)
            self._look()
            now = time.monotonic()
            if now - saved > self.recipe.checkpoint_seconds:
                self._save()
                saved = now
            if self.workers.rank == 0:
                self.job.progress(self.done)
        if self.at.step > first:
            self._save()
        if self.trouble is not None:
            raise self.trouble

    def _one(self) -> None:
        optimiser.set_rate(self.optimiser, self.at.rate * SLOWER**self.at.retreats * self.recipe.schedule(self.done))
        with torch.no_grad():
            for hook in self.hooks:
                hook.before_forward()
        self.module.zero_grad(set_to_none=True)
        self.optimiser.zero_grad(set_to_none=True)
        # taken before the step, and believed when its loss is finite
        snapshot = copied(self.subject.state()) if self.good is None or self.at.step % SNAPSHOT_STEPS == 0 else None
        value = self._together(*self._gradients())
        if not math.isfinite(value):
            raise _NotFiniteError(
                f"the training loss is {value} at step {self.at.step + 1}: check train_data() and loss()"
            )
        self._update()
        self.good = snapshot or self.good
        self.at.step += 1
        if self.at.step == 1:
            self.at.first_loss = value
        self.at.last_loss = value
        with torch.no_grad():
            for hook in self.hooks:
                hook.after_step(self.at.step, self.done)

    def _gradients(self) -> tuple[float, MobilekitError | None]:
        """The loss of one batch and, where it is a number, its gradients; what went wrong, where something did."""
        if self.trouble is not None:
            return math.nan, self.trouble
        value = math.nan
        try:
            inputs, target = next(self.batches)
            self.at.drawn += 1
            self.at.left_out = self.batches.left_out
            loss = self.objective(self.module, inputs, target)
            value = float(loss.detach())
            if math.isfinite(value):
                loss.backward()  # type: ignore[no-untyped-call]
        except MobilekitError as error:
            return value, error
        except Exception as error:  # noqa: BLE001 -- the user's data may not fit, and the loss is the user's code
            failure = MobilekitError(f"the training step {self.at.step + 1} fails: {first_line(error)}")
            failure.__cause__ = error
            return value, failure
        return value, None

    def _together(self, value: float, failure: MobilekitError | None) -> float:
        """The loss after averaging it, the time and the gradients over the processes; one failure is everybody's."""
        self.at.elapsed = time.monotonic() - self.started
        if self.workers.count > 1:
            told = torch.tensor([value, self.at.elapsed, float(failure is not None)], device=self.workers.device)
            parameters = self.subject.parameters()
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.workers.average([told, *(p.grad for p in parameters if p.grad is not None)])
            value, self.at.elapsed, failed = told.tolist()
            if failed and failure is None:
                failure = MobilekitError(f"the training step {self.at.step + 1} fails in another process")
        if failure is not None:
            raise failure
        return value

    def _update(self) -> None:
        with torch.no_grad():
            for hook in self.hooks:
                hook.before_update()
        updated = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(updated, self.recipe.clip))
        if not math.isfinite(norm):
            raise _NotFiniteError(
                f"the gradient is not finite at step {self.at.step + 1}: check loss(), or lower the learning rate"
            )
        self.optimiser.step()

    def _retreat(self, error: _NotFiniteError) -> None:
        """Back to the last good weights, at a lower rate; the end where that was tried often enough."""
        if self.good is None:
            raise error
        self.subject.restore(self.good)
        self.subject.ready()
        self.optimiser = self._optimiser()
        if self.at.retreats == RETREATS:
            self.stopped = str(error)
        else:
            self.at.retreats += 1

    def _optimiser(self) -> torch.optim.Optimizer:
        hooked = [parameter for hook in self.hooks for parameter in hook.replaced()]
        groups = optimiser.parameter_groups(self.module, self.recipe, hooked)
        if self.parts is not None:
            groups.append({"params": list(self.parts.parameters()), "factor": 1.0})
        own = [parameter for hook in self.hooks for parameter in hook.parameters()]
        if own:
            groups.append({"params": own, "factor": 1.0, "weight_decay": 0.0})
        if not any(group["params"] for group in groups):
            raise BadInputError("every parameter is frozen: there is nothing to train")
        return optimiser.optimiser(groups, self.recipe)

    # ------------------------------------------------------------ judging

    def _look(self) -> None:
        """Judge the weights now and then, and ask once how much time there is."""
        due = int(self.done * JUDGEMENTS)
        if due > self.at.judged:
            self.at.judged = due
            self._judge()
        if self.job.review is not None and math.isnan(self.at.share) and self.done >= REVIEW:
            self.subject.average_statistics(self.workers)
            self.at.share = self.workers.agreed(self.job.review(self._still()) if self.workers.rank == 0 else 1.0)

    def _judge(self) -> None:
        if self.job.judge is None:
            return
        self.subject.average_statistics(self.workers)
        figure = self.workers.agreed(self.job.judge(self._still()) if self.workers.rank == 0 else math.nan)
        if self.at.step == 0:
            self.at.start_figure, self.at.judged = figure, 0
        if figure < self.at.figure:
            self.at.figure, self.at.best_step = figure, self.at.step
            self.best = copied(self.module.state_dict())

    def _still(self) -> nn.Module:
        """A copy in eval mode."""
        return copy.deepcopy(self.module).cpu().eval()

    def result(self) -> Trained:
        """The best weights, and what the training did."""
        self.subject.average_statistics(self.workers)
        if self.best:
            self.module.load_state_dict(self.best)
        judged = self.at.best_step >= 0
        return Trained(
            self.module.eval(),
            self.at.step,
            self.at.first_loss,
            self.at.last_loss,
            seconds=self.at.elapsed,
            learning_rate=self.at.rate,
            rate_note=self.rate_note,
            kept_step=self.at.best_step if judged else None,
            figure=self.at.figure if judged else None,
            start_figure=self.at.start_figure if judged else None,
            warnings=self.at.warnings(self.stopped),
        )

    # ------------------------------------------------------------ keeping

    def _save(self) -> None:
        """In the first process; a disk that fails is told to all with the next step."""
        if self.workers.rank:
            return
        state = {"progress": self.at.tensor(), **self.subject.state(), **named("best", self.best)}
        if self.recipe.steps is not None:
            state |= named("optimiser", optimiser.moments(self.optimiser))
            state["random"] = torch.get_rng_state()
        try:
            self.job.save(state)
        except MobilekitError as error:
            self.trouble = error

    def _restore_exactly(self, state: State) -> None:
        optimiser.restore_moments(self.optimiser, under("optimiser", state))
        if self.done < 1.0:
            for _ in range(self.at.drawn):
                next(self.batches)
        if "random" in state:
            torch.set_rng_state(state["random"])
