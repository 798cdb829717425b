"""What the search chooses from: one option of a lever at a place, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from mobilekit.interfaces import Transform
from mobilekit.types import Network, Option

Place = tuple[str, str]
"""What an option's `where` names ("channels", "layer" or "block"), and its name. At most one option is chosen at a
place."""
ORDER = ("channels", "block", "layer")
"""In which options are applied: ranks and groups of layers go by the widths."""


@dataclass(frozen=True)
class Offer:
    """An option with its damage (None: not measured) and the lever it belongs to."""

    option: Option
    transform: Transform
    damage: float | None = None
    interpolated: bool = False
    """The damage comes from those of other strengths at the same place."""
    factor: float = 1.0
    """What combinations taught about damages of this kind."""
    assumed: float = 0.0
    """What the search counts where no damage was measured."""

    @cached_property
    def key(self) -> str:
        """The option as JSON: equal for equal options."""
        return self.option.model_dump_json()

    @property
    def place(self) -> Place:
        """Levers that work on the same layer exclude each other there."""
        return self.transform.at, self.option.where

    @property
    def cost(self) -> float:
        """The damage as the search counts it."""
        return (self.assumed if self.damage is None else self.damage) * self.factor


@dataclass(frozen=True)
class Start:
    """The network in one assignment of precisions, its structure unchanged, and the damage which that alone does."""

    network: Network
    damage: float = 0.0
    factor: float = 1.0
    """As of `Offer`."""

    @property
    def cost(self) -> float:
        """The damage as the search counts it."""
        return self.damage * self.factor

    @property
    def name(self) -> str:
        """A word for people."""
        kinds = {self.network.precision(operator) for operator in self.network.operators}
        if "int8" not in kinds:
            return "float"
        return "int8" if kinds == {"int8"} else "mixed precision"


Choice = dict[Place, Offer]
Method = tuple[str, str, str]
"""A lever, a place, and a method of the lever there."""


@dataclass(frozen=True)
class Found:
    """The search's answer: where it started, the choice, its predicted latency, and whether that meets the target."""

    start: Start
    choice: Choice
    latency_ms: float
    reachable: bool

    @property
    def damage(self) -> float:
        """Summed damage of the choice and its precisions."""
        return damage(self.choice) + self.start.cost

    def same_as(self, other: Found) -> bool:
        """Whether both are the same plan."""
        taken = [{offer.key for offer in found.choice.values()} for found in (self, other)]
        return taken[0] == taken[1] and self.start.network.precisions == other.start.network.precisions


def by_method(offers: Iterable[Offer]) -> dict[Method, list[Offer]]:
    """The strengths of every method at every place, in the order of the offers."""
    rows: dict[Method, list[Offer]] = {}
    for offer in offers:
        method = str(offer.option.settings.get("method", ""))
        rows.setdefault((offer.option.transform, offer.option.where, method), []).append(offer)
    return rows


def in_order(choice: Choice) -> list[Offer]:
    """The order in which options are applied."""
    return sorted(choice.values(), key=lambda offer: (ORDER.index(offer.transform.at), offer.option.where))


def damage(choice: Choice) -> float:
    """Summed damage of a choice."""
    return sum(offer.cost for offer in choice.values())


def predicted(start: Start, choice: Choice) -> Network:
    """The network after a choice. Raises UnsupportedError where options do not go together."""
    network = start.network
    for offer in in_order(choice):
        network = offer.transform.predict(network, offer.option)
    return network
