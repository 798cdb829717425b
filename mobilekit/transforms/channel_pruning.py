"""Channel pruning over coupled groups, by any of several criteria; readers can be re-fitted and batch norms refreshed.

Norms: Li et al. 2016, arXiv:1608.08710, and He et al. 2019, arXiv:1811.00250; scales: Liu et al. 2017,
arXiv:1708.06519; zeros: Hu et al. 2016, arXiv:1607.03250; gradients: Molchanov et al. 2019, arXiv:1906.10771;
selection: He, Zhang, Sun 2017, arXiv:1707.06168, and Luo et al. 2017, arXiv:1707.06342.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mobilekit.errors import UnsupportedError
from mobilekit.transforms._criteria import ALWAYS_REPAIRED, CRITERIA, REPAIRS, kept, scores
from mobilekit.types import At, Calibration, Candidate, Network, Option, RuntimeEntry

if TYPE_CHECKING:
    import torch

STRENGTHS = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8)
"""Fractions of the channels that stay."""
NARROWEST = 4
"""Below the runtime's multiple its halves and quarters are offered too, down to this: they are slower for a channel
than whole multiples, and still faster than more channels."""
MOST_SELECTED = 160
"""Channels of a group up to which they are selected by reconstruction: its time grows with their cube."""


class ChannelPruning:
    """Removes the channels that a criterion finds least important.

    Settings of an option: `width`, the channels that stay; `criterion`, one of `CRITERIA` (l1 where it is missing);
    `repair`, "least_squares" re-fits every layer that reads the group to its former output ("none" where it is
    missing; `lasso` and `reconstruction` always re-fit); `recalibrate`, true gives batch norms fresh statistics.
    Criteria that measure, repairs and recalibration take their inputs from `Candidate.calibration`.
    """

    name = "channel_pruning"
    changes: Literal["structure", "precision"] = "structure"
    at: At = "channels"

    def options(self, network: Network, entry: RuntimeEntry) -> list[Option]:
        """Each prunable group at each strength, rounded to the channel multiple that the runtime likes,
        and below that to its halves and quarters."""
        return [
            Option(transform=self.name, where=name, settings={"width": width, "criterion": "l1"})
            for name, group in network.groups.items()
            if group.refused is None
            for width in _widths(group.width, entry.channel_multiple)
        ]

    def refusals(self, network: Network, entry: RuntimeEntry) -> dict[str, str]:
        """Groups that cannot be pruned, with the reason."""
        refused = {name: group.refused for name, group in network.groups.items() if group.refused}
        for name, group in network.groups.items():
            if group.refused is None and not _widths(group.width, entry.channel_multiple):
                refused[name] = f"{group.width} channels leave no smaller multiple of {entry.channel_multiple}"
        return refused

    def fitted(self, network: Network, option: Option) -> Option:
        """Channels chosen by what readers can be re-fitted from; in wide groups, where that takes minutes, by L1."""
        narrow = network.groups[option.where].width <= MOST_SELECTED
        settings = {"criterion": "reconstruction"} if narrow else {"criterion": "l1", "repair": "least_squares"}
        return option.model_copy(update={"settings": {**option.settings, **settings}})

    def bare(self, option: Option) -> Option:
        """The first channels by L1."""
        return option.model_copy(update={"settings": {"width": option.settings.get("width"), "criterion": "l1"}})

    def predict(self, network: Network, option: Option) -> Network:
        """The same network with fewer channels in one group, whatever the criterion.

        Raises UnsupportedError where the option is not this lever's, its settings are unknown, or its group unknown,
        refused or too narrow.
        """
        return network.with_widths({option.where: _checked_width(network, option)})

    def apply(self, candidate: Candidate, option: Option) -> Candidate:
        """Keep the most important channels of one group.

        Raises UnsupportedError where `predict` does, where the criterion cannot be used on the group and where it
        needs calibration inputs that the candidate has not; BadInputError where weights or inputs are not finite.
        """
        from mobilekit.network import shrink
        from mobilekit.transforms._criteria.batch_norm import recalibrate
        from mobilekit.transforms._criteria.repair import refit
        from mobilekit.transforms._criteria.subject import Subject

        network, where = candidate.network, option.where
        width, criterion = _checked_width(network, option), str(option.settings.get("criterion", "l1"))
        subject = Subject(candidate.module, network, where, width, candidate.calibration)
        stays = kept(subject, criterion)
        module = shrink(candidate.module, network, {where: stays})
        if criterion in ALWAYS_REPAIRED or option.settings.get("repair", "none") == "least_squares":
            refit(module, subject, stays)
        if option.settings.get("recalibrate", False):
            recalibrate(module, subject.data("recalibration"))
        return candidate.after(option, module=module, network=self.predict(network, option))


def importance(
    module: torch.nn.Module,
    network: Network,
    group: str,
    criterion: str = "l1",
    calibration: Calibration | None = None,
    width: int | None = None,
) -> torch.Tensor:
    """Score of each channel of the group, float64 (channels,): higher is more important.

    `width`, the channels that are to stay (half of them where it is missing), matters to `lasso` and
    `reconstruction` only. Raises UnsupportedError and BadInputError where `ChannelPruning.apply` does.
    """
    from mobilekit.transforms._criteria.subject import Subject

    settings = {"width": max(1, network.groups[group].width // 2) if width is None else width, "criterion": criterion}
    checked = _checked_width(network, Option(transform=ChannelPruning.name, where=group, settings=settings))
    return scores(Subject(module, network, group, checked, calibration), criterion)


def sparsity_penalty(module: torch.nn.Module, network: Network, strength: float) -> torch.Tensor:
    """The loss term of network slimming: `strength` times the L1 norm of the scales that `bn_scale` ranks by.

    A scalar with a gradient, to be added to the loss of a training loop before pruning (Liu et al. 2017,
    arXiv:1708.06519). Raises UnsupportedError where no batch norm over prunable channels has a trainable scale,
    BadInputError for a strength below zero.
    """
    from mobilekit.transforms._criteria import batch_norm

    return batch_norm.sparsity_penalty(module, network, strength)


def _widths(width: int, multiple: int) -> list[int]:
    rounded = {max(multiple, round(width * strength / multiple) * multiple) for strength in STRENGTHS}
    rounded |= {w for w in (multiple // 2, multiple // 4) if w >= max(NARROWEST, width * min(STRENGTHS))}
    return sorted((w for w in rounded if w < width), reverse=True)


def _checked_width(network: Network, option: Option) -> int:
    """Channels that stay. Raises UnsupportedError with a sentence for an option that cannot be carried out."""
    if option.transform != ChannelPruning.name:
        raise UnsupportedError(f"channel_pruning was given an option of {option.transform}")
    group = network.groups.get(option.where)
    if group is None or group.refused is not None:
        reason = "the network has no such channels" if group is None else group.refused
        raise UnsupportedError(f"{option.where} cannot be pruned: {reason}")
    for key, default, known in (("criterion", "l1", tuple(CRITERIA)), ("repair", "none", REPAIRS)):
        value = option.settings.get(key, default)
        if value not in known:
            raise UnsupportedError(
                f"{option.where} cannot be pruned with the {key} '{value}': choose one of {', '.join(known)}"
            )
    recalibrate = option.settings.get("recalibrate", False)
    if not isinstance(recalibrate, bool):
        raise UnsupportedError(f"{option.where} cannot be pruned with recalibrate {recalibrate!r}: true or false")
    width = option.settings.get("width")
    if isinstance(width, bool) or not isinstance(width, int) or not 0 < width <= group.width:
        raise UnsupportedError(f"{option.where} cannot keep {width} of {group.width} channels")
    return width
