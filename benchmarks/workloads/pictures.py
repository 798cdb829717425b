"""What the workloads beside this file share: Fashion-MNIST, in the order of the run's seed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the lab lies

from lab import train_data, trained

from mobilekit.workloads.fashion_mnist import (
    ACCURACY_KIND,
    calibration_data,
    data_description,
    evaluate,
    example_input,
    labels,
    loss,
    preprocessing,
)

__all__ = [
    "ACCURACY_KIND",
    "calibration_data",
    "data_description",
    "evaluate",
    "example_input",
    "labels",
    "loss",
    "preprocessing",
    "train_data",
    "trained",
]
