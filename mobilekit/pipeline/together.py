"""Does the same on several devices at the same time; Ctrl-C ends all of it."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mobilekit.interfaces import Device

Result = TypeVar("Result")


def on_each(devices: Sequence[Device], work: Callable[[Device], Result]) -> list[Result]:
    """What the work came to on each device, in their order; raises the first error when all of them are done."""
    if len(devices) == 1:  # in this thread, where Ctrl-C arrives
        return [work(devices[0])]
    at_work: set[int] = set()
    lock = threading.Lock()

    def attended(device: Device) -> Result:
        with lock:
            at_work.add(threading.get_ident())
        try:
            return work(device)
        finally:
            with lock:
                at_work.discard(threading.get_ident())

    with ThreadPoolExecutor(max_workers=max(1, len(devices))) as pool:
        waiting = [pool.submit(attended, device) for device in devices]
        try:
            return [one.result() for one in waiting]
        except KeyboardInterrupt:
            with lock:
                for thread in at_work:
                    _interrupt(thread)
            raise


def _interrupt(thread: int) -> None:
    """Let Ctrl-C, which arrives in the main thread only, arrive in this one too: it then cleans up as if it were alone.

    It does when the thread next runs Python: what waits there must wake now and then.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))
