"""What two results say about each other."""

from __future__ import annotations

from typing import Literal

from mobilekit.types.values import Origin, RuntimeName, Value

Shown = Literal["faster", "slower", "no difference shown", "not timed"]


class Difference(Value):
    """Something that is not alike in the two results; None: the side does not say or does not have it."""

    what: str
    first: str | None
    second: str | None


class TimedSide(Value):
    """One side of a pair."""

    model: str
    median_ms: float | None
    """Of all samples of all sessions; None: nothing was timed (an emulator)."""
    samples: int
    sessions: int
    instructions: int | None = None
    """Of one run, counted by an emulator."""


class RatioTest(Value):
    """How the medians of the two sides relate, and how sure that is."""

    ratio: float
    """First over second: above 1 the second is faster."""
    interval: tuple[float, float]
    """90 % bootstrap interval, over sessions and blocks of samples; of one session for itself alone."""
    p_value: float | None
    """Mann-Whitney U, two-sided, over medians of sessions or blocks; None: too few of them."""
    unit: Literal["sessions", "blocks"]
    units: tuple[int, int]
    threshold: float
    """Relative difference below which none is shown."""
    threshold_basis: Literal["least", "sessions", "one session", "within"]
    """What nobody needs to know; how well sessions repeat; what is taken where there are too few to see that; how
    restless the machine was within one."""
    verdict: Literal["faster", "slower", "no difference shown"]


class ComparedPair(Value):
    """The same role on the same device in the same runtime, in two results."""

    role: str
    runtime: RuntimeName
    device: str
    origin: Origin
    clock: Literal["cpu", "wall"]
    first: TimedSide
    second: TimedSide
    times: RatioTest | None
    """Of milliseconds; None: not timed."""
    to_reference: RatioTest | None
    """Of samples over the reference matrix product of the same round, which cancels the machine's speed; None: it was
    not timed on both sides."""
    verdict: Shown
    """Of the second result: only what all tests that there are say."""
    reason: str
    differences: tuple[Difference, ...] = ()
    """Of the conditions of this pair."""


class ComparedResults(Value):
    """Two results, the first being what the second is compared with."""

    schema_version: Literal[1] = 1
    first: str
    """As it was given."""
    second: str
    conditions: tuple[Difference, ...]
    """Of devices, versions, threads, clocks and governors, which are to be read before anything else."""
    pairs: tuple[ComparedPair, ...]
    unpaired: tuple[Difference, ...]
    """Measurements that only one of them has."""
    figures: tuple[Difference, ...] = ()
    """Of two reports: budgets, verdicts, accuracies, sizes."""
    levers: tuple[Difference, ...] = ()
    """Of two plans: levers of which one has none, or another strength."""
