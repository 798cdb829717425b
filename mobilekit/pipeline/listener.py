"""Who hears of a run while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mobilekit.interfaces import Progress


@dataclass(frozen=True)
class Listener:
    """Who hears of a run while it goes on: fractions of stages, a few lines for people, and what time is left."""

    progress: Progress = lambda _stage, _fraction: None
    say: Callable[[str], None] = lambda _text: None
    remaining: Callable[[str, float], None] = lambda _stage, _seconds: None
    """Called with a stage's name and the seconds that it still takes, where they are known."""
