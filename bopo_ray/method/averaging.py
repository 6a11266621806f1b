"""Which router an update hands on: the average of the later ones. [ours]

A single router at the end is as good or bad as its last few groups were lucky; an average is not.
"""

from __future__ import annotations

__all__ = ["averaging_weight"]

_ETA = 3
"""How much later routers count more."""


def averaging_weight(update: int) -> float:
    """How far the average moves to the present router after update 1, 2, ...: a number in (0, 1].

    The polynomial-decay averaging of Shamir & Zhang (ICML 2013): with eta = 3 the router after update i counts in
    proportion to i (i + 1) (i + 2), without having to know how many updates will come.

    Raises:
        ValueError: `update` is below 1.
    """
    if update < 1:
        raise ValueError(f"update={update}: need at least 1")
    return (_ETA + 1) / (update + _ETA)
