"""Turns down, before anything is measured, the options that the profile's prices say save no time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mobilekit.errors import UnsupportedError
from mobilekit.planner.offers import Offer, Start
from mobilekit.planner.surface import alone
from mobilekit.types import Estimate, Network, RejectedOption

Pricing = Callable[[Network], Estimate]


@dataclass(frozen=True)
class Worth:
    """The offers that are left, what each saves alone at the start where it saves most, and why others are not."""

    offers: tuple[Offer, ...]
    saved_ms: dict[str, float]
    """By the option as JSON."""
    turned_down: tuple[RejectedOption, ...]


def worth(starts: Sequence[Start], offers: Sequence[Offer], price: Pricing) -> Worth:
    """Keep an offer if it is predicted to save time in one of the starts' precisions.

    A lever at a layer is priced on the layer alone, and has to come out with prices of its own for every operator
    that it brings: a grouped convolution that the profile has no row for is not known to run natively there.
    """
    kept, saved = [], {}
    prices = _Prices(price)
    both = starts[:2]  # all in float and all in int8: others lie between them
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for offer in offers:
        gain, why = max(_gain(start.network, offer, prices) for start in both)
        if gain > 0:
            kept.append(offer)
            saved[offer.key] = gain
        else:
            key = offer.option.transform, offer.option.where
            best[key] = max(best.get(key, (-float("inf"), "")), (gain, why))
    left = {(o.option.transform, o.option.where) for o in kept}
    rows = [
        RejectedOption(transform=transform, where=where, reason=why)
        for (transform, where), (_, why) in best.items()
        if (transform, where) not in left
    ]
    return Worth(tuple(kept), saved, tuple(rows))


class _Prices:
    """Prices of what is there now, each asked for once."""

    def __init__(self, price: Pricing) -> None:
        self.price = price
        self._known: dict[tuple[int, str], tuple[Network, Estimate]] = {}

    def now(self, network: Network, layer: str) -> tuple[Network, Estimate]:
        """The layer alone, or all of the network where none is named, and its price."""
        key = id(network), layer
        if key not in self._known:
            operator = next((o for o in network.operators if o.module == layer), None) if layer else None
            part = network if operator is None else alone(network, operator, {})
            self._known[key] = part, self.price(part)
        return self._known[key]


def _gain(network: Network, offer: Offer, prices: _Prices) -> tuple[float, str]:
    """Milliseconds that the offer saves in these precisions, and a sentence for where it saves none."""
    option = offer.option
    settings = ", ".join(f"{name} {value}" for name, value in option.settings.items())
    part, now = prices.now(network, option.where if offer.transform.at == "layer" else "")
    try:
        then = prices.price(offer.transform.predict(part, option))
    except UnsupportedError as error:
        return -float("inf"), str(error)
    gain = now.latency_ms - then.latency_ms
    precision = "int8" if "int8" in network.precisions.values() else "float"
    strange = sorted(
        {row.kind for row in then.operators if row.extrapolated} - {r.kind for r in now.operators if r.extrapolated}
    )
    if offer.transform.at == "layer" and strange:
        return -float("inf"), f"{settings}: the profile has no price for its {', '.join(strange)} on this runtime"
    where = "the layer takes" if offer.transform.at == "layer" else "the network takes"
    sentence = (
        f"{settings} takes {then.latency_ms:.3f} ms in {precision} where {where} {now.latency_ms:.3f} ms (predicted)"
    )
    return gain, sentence
