"""The value of the small boundary policy: does SMALL alone win from here on? [ours]

The frontier bends where the large model hands over. A state is worth handing over when SMALL can finish the task from
there, and the rollouts that the method plays anyway say when that is so: whatever follows an episode's last call of a
larger model is a rollout of the boundary policy from that state on, and so is all of always-small.
"""

from __future__ import annotations

from dataclasses import dataclass

from bopo_ray.records import Episode

__all__ = ["Tail", "small_tail"]


@dataclass(frozen=True, slots=True)
class Tail:
    """The part of an episode that SMALL wrote alone, up to its end."""

    start: int
    """Its first step: the state of the hand-over."""
    weights: tuple[float, ...]
    """Of each of its states, in the order of the steps."""
    success: bool
    """Whether it won."""


def small_tail(episode: Episode) -> Tail | None:
    """What an episode says of SMALL's value; None where a larger model was called last.

    Its n states share an outcome, so each has the weight 1/n, but for the first: as many hand-overs as episodes have
    weight 1, for it is there that the value decides.
    """
    start = max((t + 1 for t, step in enumerate(episode.steps) if step.model > 0), default=0)
    n = len(episode.steps) - start
    if n <= 0:
        return None
    return Tail(start, (1.0, *(1 / n,) * (n - 1)), episode.success)
