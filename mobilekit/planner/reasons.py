"""Says in sentences with numbers why each lever was chosen or rejected."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mobilekit.interfaces import Transform
from mobilekit.planner.offers import Choice, Found, Offer, Place, in_order
from mobilekit.planner.precision import as_option
from mobilekit.planner.search import Search
from mobilekit.types import ChosenOption, Estimate, Network, RejectedOption, RuntimeEntry

Pricing = Callable[[Network], Estimate]


def chosen(search: Search, found: Found) -> tuple[ChosenOption, ...]:
    """The chosen options in the order in which they are applied: widths, layers, precision."""
    rows = []
    for offer in in_order(found.choice):
        without = {place: kept for place, kept in found.choice.items() if place != offer.place}
        saved = search.latency_ms(found.start, without) - found.latency_ms
        rows.append(
            ChosenOption(
                option=offer.option,
                reason=f"{_what(offer, search.network)} {_saves(saved)} {_for(offer)}",
                saved_ms=saved,
                damage=offer.damage,
            )
        )
    precision = as_option(search.predict(found))
    if precision is not None:
        before = search.latency_ms(search.starts[0], found.choice)
        left = len([name for name in str(precision.settings.get("float", "")).split(",") if name])
        what = f"int8 with {left} operators left in float" if left else "int8 on the network"
        rows.append(
            ChosenOption(
                option=precision,
                reason=f"{what} {_saves(before - found.latency_ms)} at a damage of {found.start.damage:.4f}",
                saved_ms=before - found.latency_ms,
                damage=found.start.damage,
            )
        )
    return tuple(rows)


def rejected(
    search: Search, found: Found, transforms: Sequence[Transform], entry: RuntimeEntry
) -> tuple[RejectedOption, ...]:
    """Every place at which a lever was offered and not chosen, and those where it is not offered, with the reason."""
    rows = []
    offered: dict[tuple[str, str], list[Offer]] = {}
    for offer in search.offers:
        offered.setdefault((offer.option.transform, offer.option.where), []).append(offer)
    taken = {(offer.option.transform, offer.option.where) for offer in found.choice.values()}
    for (transform, where), offers in offered.items():
        if (transform, where) not in taken:
            reason = _why_not(search, found, offers)
            rows.append(RejectedOption(transform=transform, where=where, reason=reason))
    if len(search.starts) > 1 and found.start is search.starts[0]:
        rows.append(RejectedOption(transform="int8", where="network", reason=_why_float(search, found)))
    for lever in transforms:
        for where, reason in lever.refusals(search.network, entry).items():
            rows.append(RejectedOption(transform=lever.name, where=where, reason=reason))
    return tuple(rows)


def left_in_float(network: Network, price: Pricing) -> tuple[RejectedOption, ...]:
    """A sentence for every operator that stays in float beside others in int8, with its price in both."""
    option = as_option(network)
    names = [name for name in str(option.settings.get("float", "")).split(",") if name] if option else []
    now = {row.name: row for row in price(network).operators}
    rows = []
    for name in names:
        whole = price(network.with_precisions({**network.precisions, name: "int8"}))
        then = {row.name: row for row in whole.operators}
        place = next((o.module for o in network.operators if o.name == name), "") or name
        own = f"{then[name].latency_ms:.3f} ms against {now[name].latency_ms:.3f} ms in float on this runtime"
        borders = sum(r.latency_ms for r in then.values()) - then[name].latency_ms
        borders -= sum(r.latency_ms for r in now.values()) - now[name].latency_ms
        more = f", and {borders:+.3f} ms at its borders" if abs(borders) >= 0.0005 else ""
        spared = ": its damage is worth more than what it saves" if whole.latency_ms < price(network).latency_ms else ""
        rows.append(RejectedOption(transform="int8", where=place, reason=f"{own}{more} (predicted){spared}"))
    return tuple(rows)


def _why_float(search: Search, found: Found) -> str:
    """Compare the fastest of the other precisions, with the same structure, with the plan."""
    others = [(search.latency_ms(start, found.choice), start) for start in search.starts[1:]]
    latency, start = min(others, key=lambda row: row[0])
    saved = found.latency_ms - latency
    if saved <= 0:
        return f"{start.name} saves nothing: {-saved:.3f} ms slower as predicted"
    if found.reachable:
        return f"not needed: {start.name} would save {saved:.3f} ms (predicted) at a damage of {start.damage:.4f}"
    return f"{start.name} saves {saved:.3f} ms (predicted), not enough"


def _why_not(search: Search, found: Found, offers: Sequence[Offer]) -> str:
    """Compare the place's strongest option, added to the plan, with the plan."""
    strongest = min(offers, key=lambda offer: search.latency_ms(found.start, _with(found.choice, offer)))
    place: Place = strongest.place
    if place in found.choice:
        other = found.choice[place]
        taken = f"{_what(other, search.network)} {_for(other)}"
        return f"{taken} is taken there; {_what(strongest, search.network)} {_for(strongest)} is not"
    saved = found.latency_ms - search.latency_ms(found.start, _with(found.choice, strongest))
    what = _what(strongest, search.network)
    if saved == -float("inf"):
        return f"{what} does not fit the widths that were chosen"
    if saved <= 0:
        return f"{what} saves nothing: {-saved:.3f} ms slower as predicted"
    if found.reachable:
        return f"not needed: {what} would save another {saved:.3f} ms (predicted) {_for(strongest)}"
    return f"{what} saves {saved:.3f} ms (predicted), not enough"


def _with(choice: Choice, offer: Offer) -> Choice:
    return {**choice, offer.place: offer}


def _what(offer: Offer, network: Network) -> str:
    option = offer.option
    if offer.transform.at == "channels":
        return f"keeping {option.settings['width']} of {network.groups[option.where].width} channels"
    if offer.transform.at == "block":
        return "leaving the block out"
    settings = [f"{name} {value}" for name, value in option.settings.items() if name not in ("method", "fit")]
    return f"{option.settings.get('method', option.transform)} ({', '.join(settings)})"


def _saves(saved: float) -> str:
    return f"saves {saved:.3f} ms (predicted)"


def _for(offer: Offer) -> str:
    if offer.damage is None:
        return "(damage not measured)"
    basis = "a damage, between measured ones, of" if offer.interpolated else "a measured damage of"
    return f"at {basis} {offer.damage:.4f}"
