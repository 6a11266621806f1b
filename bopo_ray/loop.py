"""The process's event loop, and how busy its thread is.

Requests of endpoints run here, and all lanes have their turns here (`bopo_ray.lanes`): a reply wakes no other thread on
its way to who waits for it.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import threading
import time
from functools import cache
from typing import Any

__all__ = ["LOAD", "Load", "event_loop", "on_the_loop"]

WINDOW_S = 0.25
"""Over which the thread sees how busy it is."""


def event_loop() -> asyncio.AbstractEventLoop:
    """The process's, which runs in a thread of its own; all lanes have their turns there."""
    with _STARTING:
        return _loop()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.SelectorEventLoop(_Selector())
    threading.Thread(target=loop.run_forever, name="lanes", daemon=True).start()
    return loop


def on_the_loop() -> bool:
    """Whether its thread asks, from a lane or a coroutine."""
    return asyncio._get_running_loop() is event_loop()


def _forked() -> None:
    """The child of a fork has none of its parent's threads."""
    global _STARTING
    _STARTING = threading.RLock()
    _loop.cache_clear()


os.register_at_fork(after_in_child=_forked)


class Load:
    """How busy the loop's thread is."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """From now on."""
        self.busy = 0.0
        """Share of the last window in which it had work ..."""
        self._idle_s, self._window = 0.0, time.monotonic()
        """... of the present one, how long not, and its begin."""

    def waited(self, since: float) -> None:
        """Nothing was to be done since then."""
        now = time.monotonic()
        self._idle_s += now - since
        if (span_s := now - self._window) > WINDOW_S:
            self.busy, self._idle_s, self._window = 1 - self._idle_s / span_s, 0.0, now


class _Selector(selectors.DefaultSelector):
    """What the event loop waits by."""

    def __init__(self) -> None:
        super().__init__()
        LOAD.begin()

    def select(self, timeout: float | None = None) -> Any:
        before = time.monotonic()
        events = super().select(timeout)
        LOAD.waited(before)
        return events


LOAD = Load()
_STARTING = threading.RLock()  # the search for garbage may close a connection, in whatever thread it comes
