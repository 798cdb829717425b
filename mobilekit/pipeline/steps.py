"""Draws what a profile learned of channel counts: where time rises in steps, and where odd counts are dear."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mobilekit.cost.lines import Line
from mobilekit.cost.price import line_us
from mobilekit.cost.work import Channels, parts
from mobilekit.errors import BadInputError
from mobilekit.files import appearing
from mobilekit.types import DeviceProfile, OperatorShape

WIDTHS = np.arange(8, 129, dtype=np.float64)
SIZE = 28
SUBJECTS = {
    "pointwise convolution, 64 channels in": OperatorShape(
        kind="conv", in_channels=64, out_channels=64, in_size=(SIZE, SIZE), out_size=(SIZE, SIZE)
    ),
    "3x3 convolution, 64 channels in": OperatorShape(
        kind="conv", in_channels=64, out_channels=64, in_size=(SIZE, SIZE), out_size=(SIZE, SIZE), kernel=(3, 3)
    ),
    "3x3 depthwise convolution": OperatorShape(
        kind="conv", in_channels=64, out_channels=64, in_size=(SIZE, SIZE), out_size=(SIZE, SIZE), kernel=(3, 3),
        groups=64,
    ),
}  # fmt: skip


def draw_steps(profile: DeviceProfile, path: Path) -> None:
    """Write a PNG: predicted microseconds of three convolutions over their channel counts, a curve a table.

    Raises BadInputError for a profile without prices.
    """
    from matplotlib.figure import Figure

    if not profile.tables:
        raise BadInputError(f"the profile '{profile.name}' has no prices to draw: build one on the device")
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (title, shape) in zip(figure.subplots(1, len(SUBJECTS)), SUBJECTS.items(), strict=True):
        inputs = WIDTHS if shape.groups > 1 else np.full_like(WIDTHS, shape.in_channels)
        for table in profile.tables:
            line = Line("", "conv", "", table.precision, tuple(parts(shape, Channels(inputs, WIDTHS))))
            axes.step(WIDTHS, line_us(line, table), where="mid", label=table.title, linewidth=1.2)
        axes.set_title(f"{title}, {SIZE}x{SIZE}", fontsize=9)
        axes.set_xlabel("output channels")
        axes.set_xticks(range(0, 129, 16))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("predicted microseconds")
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{profile.name}: what channels cost, as learned from measurements", fontsize=10)
    with appearing(path) as draft:
        figure.savefig(draft, format="png", dpi=110)
