"""Hard budgets: budget-constrained decoding (section 5 of the method), Eq. (9), arXiv:2602.21227.

Always true here: money is integer micro-dollars, and a cap is never exceeded, not by one call, also when calls run
at the same time: reserve the worst case, call, settle with the measured usage.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from bopo_ray.records import CostMode

__all__ = ["Ledger", "Reservation", "affordable_mask"]


def affordable_mask(mode: CostMode, remaining: int, worst_case: Sequence[int]) -> tuple[bool, ...]:
    """Which models the rest of the budget can pay for, whatever the call turns out to cost. [masking: paper]

    `calls`: the smallest model is free, any other needs one call. `usd`: a model needs its worst case. When no
    model is left the episode stops with `StopReason.BUDGET`.

    Args:
        mode: the unit of `remaining`.
        remaining: b_t of Eq. (9).
        worst_case: worst cost of the next call of each of the N models, in micro-dollars; only its length counts
            in `calls` mode.

    Returns:
        One flag per model, False = masked.
    """
    if mode is CostMode.CALLS:
        return tuple(i == 0 or remaining >= 1 for i in range(len(worst_case)))
    return tuple(remaining >= cost for cost in worst_case)


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """The right to spend up to `amount`, until it is settled or released; equal only to itself."""

    amount: int
    """In the ledger's unit."""


class Ledger:
    """The one owner of one budget: spent + reserved never exceeds the cap. Thread-safe. [ours]

    Args:
        cap: B_max in calls or micro-dollars, at least 0.

    Raises:
        ValueError: a negative cap.
    """

    def __init__(self, cap: int) -> None:
        if cap < 0:
            raise ValueError(f"cap={cap}: need at least 0")
        self._cap = cap
        self._spent = 0
        self._open: set[Reservation] = set()
        self._lock = threading.Lock()

    @property
    def cap(self) -> int:
        """B_max."""
        return self._cap

    @property
    def spent(self) -> int:
        """The sum of all settled amounts."""
        with self._lock:
            return self._spent

    @property
    def remaining(self) -> int:
        """What can still be reserved: cap - spent - reserved; between calls b_t of Eq. (9), arXiv:2602.21227."""
        with self._lock:
            return self._available()

    def reserve(self, amount: int) -> Reservation | None:
        """Set the worst case of a call aside; None when it can't be paid any more (nothing changes then).

        Raises:
            ValueError: a negative amount.
        """
        if amount < 0:
            raise ValueError(f"amount={amount}: need at least 0")
        with self._lock:
            if amount > self._available():
                return None
            handle = Reservation(amount)
            self._open.add(handle)
            return handle

    def settle(self, handle: Reservation, actual: int) -> None:
        """Spend `actual` of a reservation and give back the rest.

        Raises:
            ValueError: `actual` is negative or above what was reserved (the reservation then stays open), or
                `handle` is not an open reservation of this ledger.
        """
        if not 0 <= actual <= handle.amount:
            raise ValueError(f"actual={actual} of a reservation of {handle.amount}: need 0 <= actual <= reserved")
        with self._lock:
            self._close(handle)
            self._spent += actual

    def release(self, handle: Reservation) -> None:
        """Give a reservation back unspent: the call was not made.

        Raises:
            ValueError: `handle` is not an open reservation of this ledger.
        """
        with self._lock:
            self._close(handle)

    def _available(self) -> int:
        return self._cap - self._spent - sum(r.amount for r in self._open)

    def _close(self, handle: Reservation) -> None:
        if handle not in self._open:
            raise ValueError(
                f"reservation of {handle.amount} is not open here: settle or release it once, where it was made"
            )
        self._open.remove(handle)
