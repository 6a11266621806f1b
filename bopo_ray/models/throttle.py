"""How many calls one process may have in flight at one endpoint, adaptively.

Additive increase, multiplicative decrease, as TCP does it: a refusal (429) halves the limit, as many successes as the
present limit raise it by one. A refusal counts only when its call began after the last cut, for what was already on its
way then says nothing about the new limit, and when that cut is a second old.

Always true here: calls begin in the order in which they asked; never more than `limit` of them are in flight when one
begins; starts are at least 60 / per_minute seconds apart, the first one at a random point of such a gap, so that
processes that begin together don't call together; everything runs on one event loop, and nothing polls.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["MAX_PAUSE_S", "Throttle", "retry_after_s"]

MAX_PAUSE_S = 60.0
"""No endpoint can ask for a longer silence."""
MIN_CUT_GAP_S = 1.0


class Throttle:
    """One endpoint's limits in this process. Not thread-safe: for the event loop that it is first used on."""

    def __init__(self, max_concurrency: int, per_minute: float = 0) -> None:
        """
        Args:
            max_concurrency: most calls in flight, and the limit to start from.
            per_minute: most starts per minute; 0 sets no bound.
        """
        self.maximum, self.limit, self.in_flight = max_concurrency, max_concurrency, 0
        self._gap_s = 60 / per_minute if per_minute else 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._next_start_s = self._resume_s = self._last_cut_s = -math.inf
        self._successes = 0
        self._timer: asyncio.TimerHandle | None = None

    def tighten(self, max_concurrency: int, per_minute: float) -> None:
        """Keeps the stricter of its limits and these: two models of one endpoint may be given different ones."""
        self.maximum = min(self.maximum, max_concurrency)
        self.limit = min(self.limit, self.maximum)
        self._gap_s = max(self._gap_s, 60 / per_minute if per_minute else 0.0)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[float]:
        """Waits for its turn and holds it; yields the loop's time at which the call began."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._start_waiting()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # had its turn already
                self.in_flight -= 1
                self._start_waiting()
            raise
        try:
            yield asyncio.get_running_loop().time()
        finally:
            self.in_flight -= 1
            self._start_waiting()

    def succeeded(self) -> None:
        """A call was answered."""
        self._successes += 1
        if self._successes >= self.limit:
            self._successes = 0
            self.limit = min(self.limit + 1, self.maximum)

    def refused(self, began_s: float) -> None:
        """A call that began at `began_s` was answered with 429."""
        now = asyncio.get_running_loop().time()
        if began_s >= self._last_cut_s and now >= self._last_cut_s + MIN_CUT_GAP_S:
            self._last_cut_s = now
            self._successes = 0
            self.limit = max(1, self.limit // 2)

    def pause(self, seconds: float) -> None:
        """The endpoint asked for silence: no call begins for so long."""
        until = asyncio.get_running_loop().time() + min(seconds, MAX_PAUSE_S)
        self._resume_s = max(self._resume_s, until)

    def _start_waiting(self) -> None:
        loop = asyncio.get_running_loop()
        if self._next_start_s == -math.inf:
            self._next_start_s = loop.time() + random.random() * self._gap_s
        while self._waiting and self.in_flight < self.limit:
            if self._waiting[0].cancelled():
                self._waiting.popleft()
                continue
            now, free_s = loop.time(), max(self._next_start_s, self._resume_s)
            if now < free_s:
                if self._timer is None:
                    self._timer = loop.call_at(free_s, self._wake)
                return
            turn = self._waiting.popleft()
            self._next_start_s = now + self._gap_s
            self.in_flight += 1
            turn.set_result(None)

    def _wake(self) -> None:
        self._timer = None
        self._start_waiting()


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The wait that an endpoint asks for, from headers with names in lower case; None where it asks for none."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            wait_s = float(value) * unit_s
        except ValueError:
            try:
                when = parsedate_to_datetime(value)
            except (ValueError, OverflowError):
                continue
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            wait_s = (when - datetime.now(UTC)).total_seconds()
        if math.isfinite(wait_s):
            return max(0.0, wait_s)
    return None
