"""What the planner may choose from: the levers' options, worth their time as predicted, with their measured damage."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mobilekit import registry
from mobilekit.errors import MobilekitError
from mobilekit.pipeline.original import Baseline, Prices, whole_int8
from mobilekit.pipeline.run import Run
from mobilekit.pipeline.trial import tried
from mobilekit.planner.offers import Found, Method, Offer, Start, by_method, in_order, predicted
from mobilekit.planner.precision import starts
from mobilekit.planner.surface import alone
from mobilekit.planner.surrogate import Parts, completed, correction
from mobilekit.planner.worth import worth
from mobilekit.sensitivity import (
    HOPELESS,
    MOST_SAMPLES,
    Reference,
    damages,
    int8_damages,
    passes_at_most,
    samples,
    simulated_int8,
)
from mobilekit.types import Candidate, Network, Option, RejectedOption, Together, Value
from mobilekit.workload import FEWEST_TO_SPLIT

SEARCHED = ("channel_pruning", "block_removal", "group_convolution", "low_rank", "int8")
"""The levers that the search combines; the others are applied by their names."""
UNITS = {"channel_pruning": 4.0, "block_removal": 1.0, "group_convolution": 3.0, "low_rank": 1.0}
"""Forward passes of the samples that fitting and judging one option takes, roughly."""
SLOW = {"tucker2": 2.0}
"""The same for methods that are slow by themselves."""
TOO_SLOW = frozenset({"cp"})
"""Methods whose fit takes as long as all others together: carried out where a plan names them."""
RUNS = 240
"""Runs of the network that measuring is planned for: it fixes the samples of each."""
RUNS_TOGETHER = 100
"""The same for each combination, which is judged more carefully."""
MOST_METHODS = 3
"""Methods of one lever that are searched at one layer: those that save most."""


class Measured(Value):
    """The damage of one option, or why it cannot be applied."""

    option: Option
    damage: float | None
    refused: str = ""


class Damages(Value):
    """What was measured: of options, of int8 at single operators, and of combinations."""

    options: tuple[Measured, ...]
    int8: dict[str, float]
    passes: int
    """Forward passes of one sample that it took."""
    most_passes: int
    """What it was allowed to take."""


Seen = tuple[tuple[Found, Together | None], ...]
"""Combinations and what was measured of them; None where they cannot be applied."""


@dataclass(frozen=True)
class Offered:
    """Everything that the search needs at some prices."""

    starts: tuple[Start, ...]
    offers: tuple[Offer, ...]
    saved_ms: Mapping[str, float]
    """By the option as JSON: what it saves alone in the precision where it saves most, as predicted."""
    turned_down: tuple[RejectedOption, ...]
    damages: Damages | None
    """None: nothing was measured yet."""
    seen: Seen = ()

    @property
    def promising(self) -> Offered:
        """Without the offers of which each alone leaves nothing of the network, or would as far as is known."""
        left = [o for o in self.offers if (o.assumed if o.damage is None else o.damage) < HOPELESS]
        return replace(self, offers=tuple(left))

    def taught(self, seen: Seen) -> Offered:
        """The same options with the factors that these combinations teach, in the place of earlier ones."""
        factors = correction([Parts.of(found, together.damage) for found, together in seen if together])
        starts = tuple(replace(start, factor=factors.precision) for start in self.starts)
        return replace(self, starts=starts, offers=tuple(factors.of(offer) for offer in self.offers), seen=seen)


def offered(run: Run, prices: Prices, base: Baseline, known: Damages | None, seen: Seen = ()) -> Offered:
    """The options at these prices, with the damages that are known; those that were measured replace all others."""
    begin = _starts(run, prices, base, known)
    every = [Offer(option, registry.transform(option.transform)) for option in _structural(run, prices.network)]
    found = worth(begin, every, prices.price)
    offers, turned_down = _searched(found.offers, found.saved_ms), list(found.turned_down)
    if known is not None:
        measured = {m.option.model_dump_json(): m for m in known.options}
        offers = [_with_damage(offer, measured) for offer in offers]
        refused = {m.option.model_dump_json(): m.refused for m in known.options if m.damage is None}
        turned_down += _cannot(offers, refused)
        left = [o for o in offers if o.key not in refused]
        offers = completed(left, strength(prices.network), HOPELESS)
    return Offered(begin, tuple(offers), found.saved_ms, tuple(turned_down), known).taught(seen)


def _rank(key: Method, saved: Mapping[Method, float]) -> int:
    """How many other methods of the lever save more at the place."""
    return sum(saved[other] > saved[key] for other in saved if other[:2] == key[:2])


def _searched(offers: Iterable[Offer], saved_ms: Mapping[str, float]) -> list[Offer]:
    """The offers of those methods that are worth the time of measuring and searching them."""
    rows = {key: found for key, found in by_method(offers).items() if key[2] not in TOO_SLOW}
    saved = {key: max(saved_ms[offer.key] for offer in found) for key, found in rows.items()}
    return [offer for key, found in rows.items() if _rank(key, saved) < MOST_METHODS for offer in found]


def _with_damage(offer: Offer, measured: dict[str, Measured]) -> Offer:
    known = measured.get(offer.key)
    return offer if known is None else replace(offer, damage=known.damage)


def _cannot(offers: Sequence[Offer], refused: dict[str, str]) -> list[RejectedOption]:
    """A row for every lever and place at which an option turned out not to be applicable."""
    rows = {(o.option.transform, o.option.where): refused[o.key] for o in offers if o.key in refused}
    return [RejectedOption(transform=t, where=w, reason=reason) for (t, w), reason in rows.items()]


def _starts(run: Run, prices: Prices, base: Baseline, known: Damages | None) -> tuple[Start, ...]:
    if whole_int8(run, prices.network) is None:
        return (Start(prices.network),)
    return tuple(starts(prices.network, prices.latency_ms, known.int8 if known else None, base.int8_damage))


def _structural(run: Run, network: Network) -> list[Option]:
    """Every option of the levers that change the structure."""
    if not run.job.workload.trusted:
        return []  # without real inputs nobody can tell what removing channels does
    levers = [registry.transform(name) for name in SEARCHED]
    return [o for lever in levers if lever.changes == "structure" for o in lever.options(network, run.job.entry)]


def strength(network: Network) -> functools.partial[float]:
    """A function that gives the share of a layer's, block's or group's work which an offer takes away."""
    return functools.partial(_strength, network)


def _strength(network: Network, offer: Offer) -> float:
    option = offer.option
    if offer.transform.at == "channels":
        return 1 - int(str(option.settings["width"])) / network.groups[option.where].width
    if offer.transform.at == "block":
        return 1.0
    before = alone(network, next(o for o in network.operators if o.module == option.where), {})
    return max(0.01, 1 - offer.transform.predict(before, option).macs / max(1, before.macs))


# ---------------------------------------------------------------- measuring


def with_damages(run: Run, prices: Prices, base: Baseline, known: Offered) -> Offered:
    """The options with their damages, measured once a run."""
    if known.damages is not None:
        return known
    found = run.stages.run("damage", Damages, lambda: _measure(run, prices, known))
    return offered(run, prices, base, found)


def _measure(run: Run, prices: Prices, known: Offered) -> Damages:
    """Damages of as many options as the passes allow, in the order of what they save."""
    network, workload = prices.network, run.job.workload
    inputs, others = _parted(workload.calibration, samples(network.macs, RUNS))
    reference = Reference(workload.module, inputs)
    most = passes_at_most(network.macs)
    picked = _picked(known, strength(network), most / len(inputs))
    start = _fewer(run.start(network), others)
    share = 0.75 if len(known.starts) > 1 else 1.0

    def applied(candidate: Candidate, option: Option) -> Candidate:
        lever = registry.transform(option.transform)
        return lever.apply(candidate, lever.fitted(network, option))

    def progress(begin: float, part: float, fraction: float) -> None:
        run.stages.progress("damage", begin + part * fraction)

    values = damages(start, [o.option for o in picked], applied, reference, lambda f: progress(0.0, share, f))
    int8: dict[str, float] = {}
    if len(known.starts) > 1:
        int8 = int8_damages(network, reference, lambda f: progress(share, 1 - share, f))
    return Damages(
        options=tuple(
            Measured(option=o.option, damage=v.value, refused=v.refused) for o, v in zip(picked, values, strict=True)
        ),
        int8=int8,
        passes=round(sum(v.passes for v in values) + len(inputs) * sum(_units(o) - 1 for o in picked)),
        most_passes=most,
    )


def _parted(calibration: Sequence[torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs to judge on and inputs to fit on, at most so many each.

    They are not the same where there are enough: a layer with more inputs than there are samples fits these exactly
    and tells nothing of others.
    """
    inputs = torch.cat(list(calibration))
    if len(inputs) < FEWEST_TO_SPLIT:
        return inputs, inputs
    count = min(count, len(inputs) // 2)
    return inputs[:count], inputs[count : 2 * count]


def _fewer(candidate: Candidate, inputs: torch.Tensor) -> Candidate:
    """The candidate with these calibration inputs: fits for a ranking need fewer than those that stay."""
    if candidate.calibration is None:
        return candidate
    batches = tuple(torch.split(inputs, 32))
    return replace(candidate, calibration=replace(candidate.calibration, inputs=batches))


def _units(offer: Offer) -> float:
    return UNITS[offer.option.transform] * SLOW.get(str(offer.option.settings.get("method", "")), 1.0)


def _picked(known: Offered, strong: functools.partial[float], units: float) -> list[Offer]:
    """The options to measure: one strength at every place, then further ones, until the passes are used up.

    Widths come before layers, and the method that saves most at a layer before others there. What is left out gets
    its damage from those of the same method at the same place, if there are any.
    """
    rows = by_method(known.offers)
    saved = {key: max(known.saved_ms[offer.key] for offer in found) for key, found in rows.items()}
    queue: list[tuple[int, float, Offer]] = []
    for key, found in rows.items():
        found.sort(key=strong)
        middle, last = len(found) // 2, len(found) - 1
        layer = found[0].transform.at == "layer"
        for turn, index in enumerate(dict.fromkeys((middle, last, 0, (middle + last) // 2))):
            queue.append((2 * (turn + _rank(key, saved)) + layer, -saved[key], found[index]))
    picked: list[Offer] = []
    for _, _, offer in sorted(queue, key=lambda row: row[:2]):
        cost = _units(offer)
        if cost <= units:
            units -= cost
            picked.append(offer)
    return picked


def corrected_by(run: Run, prices: Prices, known: Offered, found: Found) -> Offered:
    """The options with damages corrected by what this combination is measured to do."""
    measured = combination(run, prices, f"combination {len(known.seen) + 1}", found)
    return known.taught((*known.seen, (found, measured)))


def large(network: Network) -> bool:
    """Whether a combination can be judged on fewer samples than it should be."""
    return samples(network.macs, RUNS_TOGETHER) < MOST_SAMPLES


def combination(run: Run, prices: Prices, name: str, found: Found) -> Together | None:
    """What a search's answer does to the output as a whole, once a run; None where it cannot be applied.

    Structure is applied, fitted and trained for a moment, int8 is simulated on top of it: pruned and then quantised
    loses more than the sum, and training wins more back of one lever than of another.
    """
    workload = run.job.workload
    inputs, others = _parted(workload.calibration, samples(prices.network.macs, RUNS_TOGETHER))
    options = [o.option for o in in_order(found.choice)]

    def measured() -> Together | None:
        candidate = _fewer(run.start(prices.network), others)
        try:
            for option in options:
                lever = registry.transform(option.transform)
                candidate = lever.apply(candidate, lever.fitted(candidate.network, option))
        except MobilekitError:
            return None
        reference = Reference(workload.module, inputs)
        precisions = predicted(found.start, found.choice).precisions
        names = [name for name, precision in precisions.items() if precision == "int8"]

        def judged(module: nn.Module, steps: int) -> Together | None:
            with simulated_int8(module, candidate.network, set(names), reference.batches):
                whole = reference.damage(module)
            return None if whole.value is None else Together(damage=whole.value, agreement=whole.agreement, steps=steps)

        before, (module, steps) = judged(candidate.module, 0), tried(run, prices.network, candidate)
        after = judged(module, steps) if steps else None
        # a training keeps the weights from before it where it makes them no better
        return min((row for row in (before, after) if row), key=lambda row: row.damage, default=None)

    return run.stages.run(name, Together | None, measured)
