"""Every extension point on one page. A plugin is a file in its room that holds a class named after the file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from mobilekit.types import (
    At,
    BenchRequest,
    BenchResult,
    Candidate,
    DeviceInfo,
    ExportJob,
    FileFacts,
    Network,
    OperatorShape,
    Option,
    Precision,
    Report,
    RuntimeEntry,
    Target,
)

if TYPE_CHECKING:
    import numpy as np

Session = Callable[[Sequence["np.ndarray"]], list["np.ndarray"]]
"""An opened model file: takes a float32 batch (N, ...) for each input, gives a float32 array (N, ...) for each output.

Both are laid out as PyTorch has them: changes of layout and quantised inputs or outputs are hidden inside."""


class Transform(Protocol):
    """A lever: it offers options, says what they would leave, and applies them."""

    name: str
    changes: Literal["structure", "precision"]
    """Levers that change the structure are applied first: precision is chosen for the operators that are left."""
    at: At
    """What an option's `where` names. Two structural levers at one place exclude each other."""

    def options(self, network: Network, entry: RuntimeEntry) -> list[Option]:
        """Places and strengths that suit this runtime of the device. Never an option that `apply` would refuse."""
        ...

    def refusals(self, network: Network, entry: RuntimeEntry) -> dict[str, str]:
        """Places where the lever cannot be used, each with its reason."""
        ...

    def fitted(self, network: Network, option: Option) -> Option:
        """The same structure, with new weights fitted as well as this lever can where there are calibration inputs."""
        ...

    def bare(self, option: Option) -> Option:
        """The same structure with as little work on weights as possible: enough for a file that is only timed."""
        ...

    def predict(self, network: Network, option: Option) -> Network:
        """What tracing the applied network would give. Needs no torch and no weights."""
        ...

    def apply(self, candidate: Candidate, option: Option) -> Candidate:
        """A new candidate; the given one, its module included, is left as it was."""
        ...


class Runtime(Protocol):
    """A file format with the engine that runs it."""

    name: str
    suffix: str
    precisions: tuple[Precision, ...]

    @property
    def execution(self) -> Literal["executed", "evaluated"]:
        """How `open` runs a file on this machine: by the format's own engine, or number by number by mobilekit."""
        ...

    def unavailable(self) -> str | None:
        """Why this machine cannot write the format (a missing package, with the command that installs it)."""
        ...

    def supports(self, shape: OperatorShape, precision: Precision) -> str | None:
        """None where the runtime has a kernel for the operator in this precision, else the reason."""
        ...

    def export(self, job: ExportJob) -> None:
        """Write `job.path` (a file, or a folder for Core ML). Raises UnsupportedError with a sentence."""
        ...

    def describe(self, path: Path) -> FileFacts:
        """Inputs, outputs and operators per precision, read back from the written file."""
        ...

    def open(self, path: Path) -> Session:
        """Open the file to run it here, as `execution` says. Raises UnsupportedError where this machine cannot.

        For files that mobilekit wrote: native code may crash on a damaged one. Other people's run in a process of their
        own (`Device.run`).
        """
        ...

    def tensors(self, path: Path, sample: Sequence[np.ndarray]) -> dict[str, tuple[np.ndarray, ...]]:
        """Every tensor of real numbers that the file computes for a sample (an array for each input), by name.

        Each in every layout that may be meant, quantised ones as float. Raises UnsupportedError where the file cannot
        be looked into here.
        """
        ...

    def sketch(self, network: Network, path: Path, target: Target = "host") -> None:
        """Write a model of this network's structure with random weights, for timing there; needs no torch.

        Each operator runs in `network.precision(operator)`; operators that nobody reads are the outputs.
        Raises UnsupportedError, in a sentence, for an operator that cannot be built.
        """
        ...


class Device(Protocol):
    """Something that models can be timed on.

    Made from what follows its kind in a specification (`ssh:pi@board`: `pi@board`) and the user's settings; nothing is
    connected to before `info` or `run`.
    """

    name: str
    takes: tuple[str, ...]
    """Names of the settings (`DeviceSettings`) that this kind has a use for."""

    @classmethod
    def visible(cls) -> list[str]:
        """Specifications of the devices of this kind that are there now, found at once and without a network.

        Empty where there is none, where what finds them is not installed, and for kinds that cannot be seen from here
        (ssh). Never raises; a device that is seen but cannot be used (not authorised) is listed: its `info` says why.
        """
        ...

    @classmethod
    def unavailable(cls) -> str | None:
        """Why no device of this kind can be used from here (a missing program, with the command that installs it)."""
        ...

    def info(self) -> DeviceInfo:
        """Ask the device what it is. Raises MobilekitError, with what helps, where it cannot be reached."""
        ...

    def run(self, request: BenchRequest) -> BenchResult:
        """Carry out the protocol in a process of its own and return raw samples."""
        ...


class ReportWriter(Protocol):
    """One form of the report."""

    file_name: str

    def render(self, report: Report) -> str:
        """The file's whole text."""
        ...


Progress = Callable[[str, float], None]
"""Called with a stage's name and the finished fraction (0 to 1)."""

Keep = dict[str, Sequence[int]]
"""Channel group -> indices of the channels that stay, ascending."""
