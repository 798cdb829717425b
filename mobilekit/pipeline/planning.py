"""Makes the plan: the search within the budget, its combination checked, and a sentence for every lever."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from mobilekit import registry
from mobilekit.cost.memory import peak_memory_bytes, size_bytes
from mobilekit.pipeline import options
from mobilekit.pipeline.options import Offered, corrected_by, with_damages
from mobilekit.pipeline.original import Baseline, Prices, original_limit
from mobilekit.pipeline.run import Run
from mobilekit.planner import reasons
from mobilekit.planner.offers import Found, Offer
from mobilekit.planner.search import Search
from mobilekit.planner.surface import OneByOne
from mobilekit.planner.terrain import Limit
from mobilekit.types import Plan

MARGIN = 0.935
"""The search stays this far inside the limit: rounds are accepted from about 0.95 of it on shared machines."""
COMBINATIONS = 6
"""Combinations that are measured for the first plan; each corrects the damages for the next search."""
COMBINATIONS_LARGE = 3
"""The same for a network so large that each of them takes long."""
COMBINATIONS_AGAIN = 3
"""The same for each plan that is made with other prices, beside those that were measured before."""
FAR = 3.0
"""Summed damage, over that of the best answer, from which a rival is not worth the time on a large network."""
HOPEFUL = 0.1
"""Share of its damage that a kind of lever is taken for once, where it is not chosen at its whole damage: training may
win it back."""
MEGABYTE = 1_000_000
SIZE_MARGIN = 0.97
"""Predicted file sizes leave out what a format adds."""


def search(run: Run, prices: Prices, known: Offered, target_ms: float, *, like: Search | None = None) -> Search:
    """The search over these options at these prices, within the latency and the sizes that the budget sets; `like`
    is another at the same prices."""
    budget = run.job.request.budget
    limits = [Limit("latency", prices, target_ms)]
    if budget.size_mb is not None:
        limits.append(Limit("size", OneByOne(size_bytes), SIZE_MARGIN * budget.size_mb * MEGABYTE))
    if budget.peak_memory_mb is not None:
        limits.append(Limit("memory", OneByOne(peak_memory_bytes), budget.peak_memory_mb * MEGABYTE))
    return Search(known.starts, known.offers, limits, like=like)


def target(run: Run, prices: Prices, base: Baseline) -> float:
    """The latency that the search has to stay under, as predicted."""
    return MARGIN * original_limit(run, prices, base)


def repriced(run: Run, prices: Prices, given: Plan) -> Plan:
    """A given plan with predictions for the network that it is applied to now."""
    network = prices.network
    for chosen in given.chosen:
        network = registry.transform(chosen.option.transform).predict(network, chosen.option)
    warnings, together = given.warnings, given.together
    if run.job.workload.key != given.workload_key:
        warnings = (*warnings, "the workload's code or weights differ from those that the plan was made for")
        together = None
    return given.model_copy(
        update={
            "estimate": prices.price(network),
            "baseline_estimate": prices.price(prices.network),
            "workload": run.job.request.workload,
            "workload_key": run.job.workload.key,
            "together": together,
            "warnings": warnings,
        }
    )


def make_plan(run: Run, prices: Prices, known: Offered, base: Baseline) -> tuple[Plan, Offered]:
    """Search within the limit less the margin, check what comes out as a whole, and write the best of it down.

    The damages are measured if the limit takes more than another precision. Also returns the options with what the
    combinations taught.
    """
    most = target(run, prices, base)
    searched = search(run, prices, known, most)
    found = searched.without_structure()
    if found is None:
        known = with_damages(run, prices, base, known)
        searched = search(run, prices, known.promising, most)
        found = searched.run()
        if not found.reachable:
            searched = search(run, prices, known, most)
            found = searched.run()
        if found.reachable and found.choice:
            found, known = _checked(run, prices, (searched, found, known))
        searched = search(run, prices, known, most, like=searched)
    return write_plan(run, prices, known, searched, found), known


def _checked(run: Run, prices: Prices, begun: tuple[Search, Found, Offered]) -> tuple[Found, Offered]:
    """Measure combinations, correct the damages, search again; of all that are within the limit, the combination that
    was measured to do least.

    The answer and its rivals come first: damages of widths, layers and precisions add up differently, and combinations
    of one kind alone do not tell which of them is off. What was measured for an earlier plan of the run counts too.
    """
    first, found, known = begun
    promising = len(first.offers) < len(known.offers)
    first_time = COMBINATIONS_LARGE if options.large(prices.network) else COMBINATIONS
    left = COMBINATIONS_AGAIN if known.seen else first_time

    def measured(one: Found) -> bool:
        """Measure a combination; False where that was done before, or is of no use."""
        nonlocal known, left
        if not (left and one.reachable) or any(one.same_as(other) for other, _ in known.seen):
            return False
        known, left = corrected_by(run, prices, known, one), left - 1
        return True

    def corrected() -> Search:
        offered = known.promising if promising else known
        return search(run, prices, offered, first.limits[0].most, like=first)

    for rival in (found, *_rivals(run, prices, begun)):
        measured(rival)
    searched = corrected()
    while left and measured(searched.run()):
        searched = corrected()
    whole = search(run, prices, known, first.limits[0].most, like=first)
    within = [
        (together.damage, again)
        for earlier, together in known.seen
        if together is not None and (again := whole.again(earlier)) is not None
    ]
    if not within:
        return found, replace(begun[2], seen=known.seen)
    return min(within, key=lambda row: row[0])[1], known


def _rivals(run: Run, prices: Prices, begun: tuple[Search, Found, Offered]) -> list[Found]:
    """The best answers of other kinds: float where the first has int8 or the other way round, those that leave layers,
    or layers and blocks, as they are where it does not, and one with blocks or layers where it has none."""
    searched, first, known = begun
    kinds_of_first = {at for at, _ in first.choice}

    def rival(offers: Iterable[Offer]) -> Found:
        fewer = replace(known, offers=tuple(offers))
        return search(run, prices, fewer, searched.limits[0].most, like=searched).run()

    quantised = first.start is not searched.starts[0]
    unlike = [f for f in searched.reached() if (f.start is not searched.starts[0]) != quantised]
    rivals = [min(unlike, key=lambda f: f.damage)] if unlike else []
    for kinds in ({"channels", "block"}, {"channels"}):
        if not kinds_of_first <= kinds:
            rivals.append(rival(o for o in searched.offers if o.place[0] in kinds))
    for kind in sorted({"block", "layer"} - kinds_of_first):
        others = [o for o in searched.offers if o.place[0] != kind]
        measured = [o for o in known.offers if o.place[0] == kind and o.damage is not None]
        rivals.append(rival([*others, *(replace(o, factor=HOPEFUL * o.factor) for o in measured)]))
    return [r for r in rivals if not options.large(prices.network) or r.damage <= FAR * first.damage]


def reachable(plan: Plan) -> bool:
    """Whether the plan is predicted to stay within the target that it was searched for."""
    return plan.target_ms is None or plan.estimate.latency_ms <= plan.target_ms / MARGIN


def write_plan(run: Run, prices: Prices, known: Offered, searched: Search, found: Found) -> Plan:
    """The plan as data, with a sentence for every lever."""
    job = run.job
    levers = [registry.transform(name) for name in options.SEARCHED]
    network = searched.predict(found)
    estimate = prices.price(network)
    limit_ms = searched.limits[0].most
    return Plan(
        workload=job.request.workload,
        workload_key=job.workload.key,
        profile=job.request.profile,
        runtime=job.entry.name,
        device=job.request.device,
        budget=job.request.budget,
        seed=job.request.seed,
        train=job.request.train,
        train_seconds=job.request.train_seconds,
        target_ms=None if math.isinf(limit_ms) else limit_ms,
        estimate=estimate,
        baseline_estimate=prices.price(prices.network),
        chosen=reasons.chosen(searched, found),
        rejected=(
            *reasons.left_in_float(network, prices.price),
            *reasons.rejected(searched, found, levers, job.entry),
            *known.turned_down,
        ),
        together=next((together for other, together in known.seen if found.same_as(other)), None),
        warnings=tuple(_warnings(run, found, estimate.extrapolated)),
    )


def _warnings(run: Run, found: Found, extrapolated: tuple[str, ...]) -> list[str]:
    job = run.job
    warnings = []
    if extrapolated:
        warnings.append(f"{len(extrapolated)} operators lie outside what was timed: their prices are guesses")
    for table in filter(None, (job.profile.table(job.entry.name, p) for p in job.entry.precisions)):
        if table.weak:
            warnings.append(f"low confidence in the prices of {table.runtime} in {table.precision}: {table.weak}")
    if job.entry.format != job.entry.name:
        warnings.append(f"prices are those of {job.entry.name}; the file written for it is {job.entry.format}")
    if not job.workload.trusted:
        warnings.append("no calibration_data(): judged on random input, int8 ranges are not to be trusted")
    first = job.workload.calibration[0][:1]
    if all(bool((inputs == first).all()) for inputs in job.workload.calibration):
        warnings.append("all calibration inputs are alike: they tell nothing of damages or of ranges of int8")
    if job.workload.train_data is None and job.request.train and found.choice:
        warnings.append("no training data: the network is trained on the calibration inputs alone")
    return warnings
