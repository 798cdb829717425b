"""A Linux board behind ssh as a device: files go there once, and the measuring program runs with the board's Python."""

from __future__ import annotations

import importlib.util
import weakref

from mobilekit.devices import _facts, _session, _ssh_address
from mobilekit.devices._session import DeviceError, Reply, Trouble
from mobilekit.devices._ssh_board import Board
from mobilekit.types import BenchRequest, BenchResult, DeviceInfo, DeviceSettings, Failure


class Ssh:
    """Times models on a Linux board: `ssh:USER@HOST` or `ssh:USER@HOST:PORT`.

    The connection, the program and the models there are kept from one call to the next, and go with `close`, with the
    object or with the process.

    >>> Ssh("pi@board:2222").name
    'ssh:pi@board:2222'
    """

    takes: tuple[str, ...] = ("runner", "wheels")

    def __init__(self, address: str = "", settings: DeviceSettings | None = None) -> None:
        self._board = Board(_ssh_address.parse(address), settings or DeviceSettings())
        self.name = f"ssh:{address}"
        weakref.finalize(self, self._board.close)

    @classmethod
    def visible(cls) -> list[str]:
        """None: a network is not searched for boards."""
        return []

    @classmethod
    def unavailable(cls) -> str | None:
        """What to install where the ssh client is missing."""
        if importlib.util.find_spec("asyncssh") is None:
            return "asyncssh is not installed: pip install 'mobilekit[ssh]'"
        return None

    def info(self) -> DeviceInfo:
        """What the board is. Raises DeviceError where it cannot be asked."""
        text, versions = self._board.run(Board.facts)
        return _facts.parse(text, self.name, "linux-board", "device", versions)

    def run(self, request: BenchRequest) -> BenchResult:
        """Time the request's models on the board, as `_session.run` says; of a connection that is lost, what was
        finished a few seconds before is kept."""
        wanted = {model.runtime for model in request.models if model.runtime in _session.PACKAGES}
        caught: DeviceError | None = None
        absent: dict[str, Trouble] = {}
        try:
            absent = self._board.run(lambda board: board.absent(wanted))
        except DeviceError as error:
            caught = error
        failures = tuple(
            Failure(stage="load", subject=model.name, **absent[model.runtime]._asdict())
            for model in request.models
            if model.runtime in absent
        )
        rest = request.model_copy(update={"models": tuple(m for m in request.models if m.runtime not in absent)})

        def start(asked: BenchRequest, timeout: float) -> Reply:
            if caught is not None:
                raise caught
            return self._board.run(lambda board: board.measure(asked, timeout))

        result = _session.run(rest, _session.Identity(self.name, "device"), start)
        return result.model_copy(update={"failures": failures + result.failures})

    def close(self) -> None:
        """Remove the job's files from the board and end the connection; a later call connects again."""
        self._board.close()
