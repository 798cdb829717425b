"""Post-training quantisation to int8 (Jacob et al. 2018, arXiv:1712.05877), as a QuantSpec that runtimes realise."""

from __future__ import annotations

from typing import Literal

from mobilekit.cost.work import quantised
from mobilekit.errors import UnsupportedError
from mobilekit.types import Candidate, Network, Option, Precision, QuantSpec, RuntimeEntry


class Int8:
    """Runs every operator of a quantisable kind in int8: weights symmetric per channel, activations per tensor."""

    name = "int8"
    changes: Literal["structure", "precision"] = "precision"

    def options(self, network: Network, entry: RuntimeEntry) -> list[Option]:
        """The whole network in int8, where the runtime has int8 on this device."""
        if "int8" not in entry.precisions or not quantised(network):
            return []
        return [Option(transform=self.name, where="network", settings={"calibration": "min-max"})]

    def refusals(self, network: Network, entry: RuntimeEntry) -> dict[str, str]:
        """Why int8 is not offered."""
        if "int8" not in entry.precisions:
            return {"network": f"{entry.name} on this device has no int8"}
        if not quantised(network):
            return {"network": "no operator of the network has an int8 form"}
        return {}

    def predict(self, network: Network, option: Option) -> Network:
        """The same network with its quantisable operators in int8.

        Raises UnsupportedError where the option is not this lever's or asks for what no runtime does.
        """
        return network.with_precisions({**network.precisions, **_checked_operators(network, option)})

    def apply(self, candidate: Candidate, option: Option) -> Candidate:
        """Write the QuantSpec; weights stay in float, the runtimes calibrate and round when they export.

        Raises UnsupportedError where `predict` does.
        """
        spec = QuantSpec(operators=_checked_operators(candidate.network, option))
        return candidate.after(option, quant=spec, network=self.predict(candidate.network, option))


def _checked_operators(network: Network, option: Option) -> dict[str, Precision]:
    """The operators that become int8. Raises UnsupportedError for an option that cannot be carried out."""
    if option.transform != Int8.name or option.where != "network":
        raise UnsupportedError(f"int8 takes the whole network, not {option.transform} at {option.where}")
    calibration = option.settings.get("calibration", "min-max")
    if calibration != "min-max":
        raise UnsupportedError(f"int8 cannot calibrate by '{calibration}': only by min-max")
    operators = quantised(network)
    if not operators:
        raise UnsupportedError("no operator of the network has an int8 form")
    return operators
