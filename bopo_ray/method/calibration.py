"""Does the router's p(LARGE) mean what it says? [ours]"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Calibration", "calibration"]


class Calibration(NamedTuple):
    """Of probabilities beside what they are probabilities of."""

    steps: int
    p_large: float
    """Mean p(LARGE), of any model but the smallest."""
    large: float
    """Share of steps at which the expert chose such a model."""
    error: float
    """Expected calibration error: the mean distance of the two within bins of p, weighted by their steps."""


def calibration(p_large_N: ArrayLike, large_N: ArrayLike, bins: int = 10) -> Calibration | None:
    """Compares p(LARGE) at N steps with the expert's choices there; None without a step.

    Args:
        p_large_N: probabilities in [0, 1].
        large_N: whether the expert chose a larger model.
        bins: of equal width, for the error.
    """
    p_N, large = np.asarray(p_large_N, float), np.asarray(large_N, float)
    if not p_N.size:
        return None
    bin_N = np.minimum((p_N * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_N, weights=p_N - large, minlength=bins)
    return Calibration(p_N.size, float(p_N.mean()), float(large.mean()), float(np.abs(gaps).sum() / p_N.size))
