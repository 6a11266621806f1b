"""From a router's distribution over models to one of them: the budget's mask, then the most probable or a draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    masked = np.where(mask, probabilities, 0.0)
    total = masked.sum()
    masked = masked / total if total > 0 else np.asarray(mask, float) / max(1, sum(mask))
    if draw is None:
        model = int(masked.argmax())
    else:
        model = min(int((masked.cumsum() <= draw).sum()), max(np.flatnonzero(masked).tolist(), default=0))
    return Decision(model, tuple(masked.tolist()))
