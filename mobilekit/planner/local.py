"""Improves a choice within its bounds: single and paired moves, and single ones forced and paid for elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from mobilekit.planner.offers import Place
from mobilekit.planner.terrain import State, Terrain

LEAST_DAMAGE = 1e-9
"""Options that do no measurable damage are ranked by what they save."""
PAIRS = 200
"""Paired moves that are looked at closely in one step: those that gain most."""
KICKS = 150
"""Moves that are forced in one search, each paid for and followed by moves that gain."""


def improved(terrain: Terrain, state: State, bound: np.ndarray, kicks: int = KICKS) -> State:
    """The state after moves that lower the damage and keep the bounds, until none is left or `kicks` were forced."""
    state = _settled(terrain, state, bound)
    left = kicks
    while True:
        for place, taken in islice(_forced(terrain, state), left):
            left -= 1
            found = _paid(terrain, state, place, taken, bound)
            if found is not None and terrain.damage(found) < terrain.damage(state) - LEAST_DAMAGE:
                state = _settled(terrain, found, bound)
                break
        else:
            return state


def _settled(terrain: Terrain, state: State, bound: np.ndarray, fixed: Place | None = None) -> State:
    """After all single and paired moves that gain, but for those at a place that stays as it is."""
    while True:
        better = _better(terrain, state, bound, fixed)
        if better is None:
            return state
        state = better


# ---------------------------------------------------------------- single and paired moves


@dataclass(frozen=True)
class _Moves:
    """All single moves from a state."""

    places: list[int]
    taken: list[int]
    change: np.ndarray
    """Of every figure, shape (moves, limits)."""
    gain: np.ndarray
    """Damage that is gone, shape (moves,)."""


def _moves(terrain: Terrain, state: State, fixed: Place | None) -> _Moves:
    places, options, changes, gains = [], [], [], []
    for number, place in enumerate(terrain.places):
        if place == fixed:
            continue
        figures, now = terrain.at(place, state), state[place]
        for taken in range(figures.shape[1]):
            if taken != now and np.isfinite(figures[:, taken]).all():
                places.append(number)
                options.append(taken)
                changes.append(figures[:, taken] - figures[:, now])
                gains.append(terrain.damages[place][now] - terrain.damages[place][taken])
    return _Moves(places, options, np.array(changes).reshape(-1, len(terrain.limits)), np.array(gains))


def _better(terrain: Terrain, state: State, bound: np.ndarray, fixed: Place | None) -> State | None:
    found = _moves(terrain, state, fixed)
    if not found.places:
        return None
    places, room = terrain.places, bound - terrain.figures(state)
    single = np.where((found.change <= room).all(axis=1), found.gain, -np.inf)
    best = int(np.argmax(single))
    if single[best] > LEAST_DAMAGE:
        return {**state, places[found.places[best]]: found.taken[best]}
    pairs = found.gain[:, None] + found.gain[None, :]
    of = np.array(found.places)
    # a little beyond the bounds, for two moves beside each other save more, or less, than each alone
    fits = ((found.change[:, None, :] + found.change[None, :, :]) <= room + 0.02).all(axis=2)
    pairs[~fits | (of[:, None] >= of[None, :])] = -np.inf
    order = np.argsort(-pairs, axis=None, kind="stable")[:PAIRS]
    for one, other in zip(*np.unravel_index(order, pairs.shape), strict=True):
        if pairs[one, other] <= LEAST_DAMAGE:
            return None
        tried = {**state, **{places[found.places[m]]: found.taken[m] for m in (int(one), int(other))}}
        if (terrain.figures(tried) <= bound).all():
            return tried
    return None


# ---------------------------------------------------------------- forced moves


def _forced(terrain: Terrain, state: State) -> Iterator[tuple[Place, int]]:
    """Single moves that do less damage than the state as a whole, the most harmful place first."""
    most = terrain.damage(state)
    for place in sorted(terrain.places, key=lambda p: (-terrain.damages[p][state[p]], p)):
        for taken, damage in enumerate(terrain.damages[place]):
            if taken != state[place] and damage < most:
                yield place, taken


def _paid(terrain: Terrain, state: State, place: Place, taken: int, bound: np.ndarray) -> State | None:
    """The state with an option forced at a place and the others moved until the bounds hold; None where they do not.

    Each step takes the move that costs least for what it saves of the figure that is furthest over its bound; then
    the others give back what there is room for.
    """
    forced = {**state, place: taken}
    most = 2 * max(terrain.damage(state), terrain.damage(forced))
    state = forced
    for _ in range(2 * len(terrain.places)):
        figures = terrain.figures(state)
        over = figures / bound
        if not np.isfinite(over).all():
            return None
        if (over <= 1).all():
            break
        found = _moves(terrain, state, place)
        worst = int(np.argmax(over))
        saved = np.minimum(-found.change[:, worst], figures[worst] - bound[worst])
        ratios = [max(-g, 0.0) / s if s > 0 else np.inf for g, s in zip(found.gain, saved, strict=True)]
        if not ratios or not np.isfinite(min(ratios)):
            return None
        best = int(np.argmin(ratios))
        state = {**state, terrain.places[found.places[best]]: found.taken[best]}
        if terrain.damage(state) > most:
            return None
    else:
        return None
    return _settled(terrain, state, bound, place)
