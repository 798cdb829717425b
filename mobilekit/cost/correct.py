"""Brings the prices of a profile to what a network was measured at: kind by kind, and then as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mobilekit.cost.price import corrected, latency_ms
from mobilekit.errors import BadInputError
from mobilekit.types import CostTable, DeviceProfile, KindFactor, Network, Precision

CLOSE = 1e-9
"""Relative distance at which a price is the measurement."""


def corrected_kinds(profile: DeviceProfile, runtime: str, factors: Sequence[KindFactor]) -> DeviceProfile:
    """The profile with these rows of the runtime's tables multiplied by their factors; other rows keep their prices."""
    tables = tuple(_scaled(table, factors) if table.runtime == runtime else table for table in profile.tables)
    return profile.model_copy(update={"tables": tables})


def _scaled(table: CostTable, factors: Sequence[KindFactor]) -> CostTable:
    kinds = dict(table.kinds)
    for found in factors:
        if found.precision == table.precision and found.row in kinds:
            row = kinds[found.row]
            prices = {feature: price * found.factor for feature, price in row.coefficients.items()}
            kinds[found.row] = row.model_copy(update={"coefficients": prices})
    return table.model_copy(update={"kinds": kinds})


def brought_to(
    network: Network, profile: DeviceProfile, runtime: str, precision: Precision, measured_ms: float
) -> DeviceProfile:
    """The profile in which the network costs what it was measured at, milliseconds.

    Only the table of `precision`, the one that the network runs in, is multiplied: operators that stay in another
    precision keep their prices. Where these alone cost more than was measured, all tables of the runtime are. Raises
    BadInputError for a time that is not positive and finite.
    """
    if not 0 < measured_ms < math.inf:
        raise BadInputError(f"a measured latency has to be positive and finite, not {measured_ms}")
    own = profile
    for _ in range(3):  # once, but for the overhead of a run, which is the dearest of the tables in use
        price = latency_ms(network, own, runtime)
        if abs(price - measured_ms) <= CLOSE * measured_ms:
            return own
        slope = latency_ms(network, corrected(own, runtime, precision, 2.0), runtime) - price
        factor = 1 + (measured_ms - price) / slope if slope > 0 else 0.0
        if factor <= 0:
            break
        own = corrected(own, runtime, precision, factor)
    if abs(latency_ms(network, own, runtime) - measured_ms) <= CLOSE * measured_ms:
        return own
    every = {table.precision for table in profile.tables if table.runtime == runtime and table.kinds}
    common = measured_ms / latency_ms(network, profile, runtime)
    for each in sorted(every):
        profile = corrected(profile, runtime, each, common)
    return profile
