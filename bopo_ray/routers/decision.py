"""From a router's distribution over models to one of them: the budget's mask, then the most probable or a draw."""

from __future__ import annotations

import math
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
        mask: one flag per model, False = masked. Where the router gives those left nothing, it gets the largest of
            them up to the model that it wants, else the smallest; where it knows nothing (NaN), they share alike.
        draw: a uniform number in [0, 1] to sample with; None takes the most probable model.
    """
    masked = [float(p) if open_ else 0.0 for p, open_ in zip(probabilities, mask, strict=True)]
    total = sum(masked)
    if total == 0 and any(mask) and not any(map(math.isnan, probabilities)):
        # Of a router that is certain, such as always-large, a cap must not make one that tosses a coin.
        wanted = max(range(len(masked)), key=lambda i: probabilities[i])
        left = [i for i, open_ in enumerate(mask) if open_]
        masked[max((i for i in left if i <= wanted), default=left[0])] = total = 1.0
    elif not total > 0:
        masked, total = [float(open_) for open_ in mask], max(1, sum(mask))
    masked = [p / total for p in masked]
    if draw is None:
        model = masked.index(max(masked))
    else:
        below = sum(bound <= draw for bound in accumulate(masked))
        model = min(below, max((i for i, p in enumerate(masked) if p), default=0))
    return Decision(model, tuple(masked))
