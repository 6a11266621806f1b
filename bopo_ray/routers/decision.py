"""From a router's distribution over models to one of them: the budget's mask, then the most probable or a draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

__all__ = ["Decision", "decide"]


@dataclass(frozen=True, slots=True)
class Decision:
    """Which model writes the next action."""

    model: int
    """Its index in the pool, 0 is the smallest."""
    probabilities: tuple[float, ...]
    """The router's distribution over models, after the mask."""


def decide(probabilities: Sequence[float], mask: Sequence[bool], draw: float | None = None) -> Decision:
    """Masks, renormalises and chooses; a masked model is never chosen where another is left.

    Args:
        probabilities: the router's [n_models].
        mask: one flag per model, False = masked; those left share alike where the router gives them nothing.
        draw: a uniform number in [0, 1] to sample with; None takes the most probable model.
    """
    masked = [float(p) if open_ else 0.0 for p, open_ in zip(probabilities, mask, strict=True)]
    total = sum(masked)
    if not total > 0:  # nothing is left, or nothing is known (NaN)
        masked, total = [float(open_) for open_ in mask], max(1, sum(mask))
    masked = [p / total for p in masked]
    if draw is None:
        model = masked.index(max(masked))
    else:
        below = sum(bound <= draw for bound in accumulate(masked))
        model = min(below, max((i for i, p in enumerate(masked) if p), default=0))
    return Decision(model, tuple(masked))
