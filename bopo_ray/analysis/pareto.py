"""Pareto front and hypervolume of cost against success.

Two dimensions only: cost is minimised, success maximised. Everything here is a pure function of arrays.
No library is used on purpose: in two dimensions the hypervolume is a sort and a running maximum, and this form
takes thousands of bootstrap resamples at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Reference", "hypervolume", "hypervolumes", "pareto_front"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reference:
    """The corner that a hypervolume is measured from: the worst cost and the worst success that still count."""

    cost: float
    """In the unit of the costs; above 0. A point at this cost or above it contributes nothing."""
    success: float = 0.0
    """In [0, 1). A point at this success or below it contributes nothing."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.cost) and self.cost > 0):
            raise ValueError(f"Reference.cost is {self.cost}, it must be finite and above 0")
        if not 0 <= self.success < 1:
            raise ValueError(f"Reference.success is {self.success}, it must be in [0, 1)")

    @property
    def area(self) -> float:
        """Of the box between the reference and the ideal point (cost 0, success 1)."""
        return self.cost * (1.0 - self.success)


def pareto_front(costs_P: npt.ArrayLike, success_P: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Indices of the points that no other point dominates, cheapest first.

    Another point dominates when it costs no more and succeeds no less, and is better in one of the two.
    Of points equal in both, the first is kept. Costs and successes have shape (P,), P >= 0, and are finite.

    Raises:
        ValueError: the shapes differ, or a value is not finite.
    """
    costs, success = _checked(costs_P, success_P)
    if costs.ndim != 1:
        raise ValueError(f"costs have shape {costs.shape}, one dimension is needed")
    order = np.lexsort((-success, costs))  # by cost, and the better success first; stable, so that ties keep the first
    best_before = np.concatenate(([-np.inf], np.maximum.accumulate(success[order])))[: len(order)]
    return order[success[order] > best_before]


def hypervolume(
    costs_P: npt.ArrayLike, success_P: npt.ArrayLike, reference: Reference, *, normalise: bool = False
) -> float:
    """Area between the front of P points and the reference, in cost units; 0 without points.

    With `normalise` it is a share of the box between the reference and (cost 0, success 1), in [0, 1].
    Points outside the reference count for nothing. Costs must be at least 0 and successes at most 1.

    Raises:
        ValueError: the shapes differ, or a value is out of its range.
    """
    costs, success = _checked(costs_P, success_P)
    if costs.ndim != 1:
        raise ValueError(f"costs have shape {costs.shape}, one dimension is needed")
    return float(hypervolumes(costs, success, reference, normalise=normalise))


def hypervolumes(
    costs_RP: npt.ArrayLike, success_RP: npt.ArrayLike, reference: Reference, *, normalise: bool = False
) -> FloatArray:
    """`hypervolume` over the last axis: shapes (..., P) in, (...) out; used with R bootstrap resamples at once."""
    costs, success = _checked(costs_RP, success_RP)
    if np.any(costs < 0) or np.any(success > 1 + 1e-9):
        raise ValueError("costs must be at least 0 and successes at most 1")
    # A point clipped to the reference cost spans no width, one clipped to the reference success no height.
    costs = np.minimum(costs, reference.cost)
    gains = np.maximum(success - reference.success, 0.0)
    order = np.argsort(costs, axis=-1)
    costs = np.take_along_axis(costs, order, axis=-1)
    heights = np.maximum.accumulate(np.take_along_axis(gains, order, axis=-1), axis=-1)
    widths = np.diff(costs, axis=-1, append=reference.cost)
    areas = np.sum(widths * heights, axis=-1)
    return np.asarray(areas / reference.area if normalise else areas, dtype=np.float64)


def _checked(costs: npt.ArrayLike, success: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    costs_array, success_array = np.asarray(costs, dtype=np.float64), np.asarray(success, dtype=np.float64)
    if costs_array.shape != success_array.shape:
        raise ValueError(f"costs have shape {costs_array.shape}, successes {success_array.shape}: they must agree")
    if not (np.all(np.isfinite(costs_array)) and np.all(np.isfinite(success_array))):
        raise ValueError("costs and successes must be finite")
    return costs_array, success_array
