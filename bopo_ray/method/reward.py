"""The boundary-normalised cost and the reward of an episode (section 4 of the method), arXiv:2602.21227.

Absolute money is a bad penalty: a small model that loops to the step limit can cost more than the large one that
finishes early. Always true here: a cost that is normalised never falls when the cost rises, and, unless it is absolute,
is in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, median

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bopo_ray.method.taxonomy import BoundaryStats
from bopo_ray.records import CostMode, Difficulty

__all__ = ["CostRange", "CostScale", "beta_warning", "cost_ranges", "normalised_cost", "reward"]


class CostScale(StrEnum):
    """What a normalised cost is measured by."""

    BOUNDARIES = "boundaries"
    """Eq. (6): the two boundary policies' costs on the task itself."""
    ABSOLUTE = "absolute"
    """One number for all tasks, the mean of their C_max: absolute money up to that factor, which keeps lambda's unit.
    Nothing is subtracted or clipped. It is there to be compared with. [ours]"""


@dataclass(frozen=True, slots=True)
class CostRange:
    """C_min(x) and C_max(x) of Eq. (6), arXiv:2602.21227, in the unit of the cost mode.

    Raises:
        ValueError: `high` is below `low`.
    """

    low: float
    """C_min: what costs this or less has normalised cost 0."""
    high: float
    """C_max: what costs this or more has normalised cost 1."""
    clip: bool = True
    """False: what costs more has more than 1."""

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"cost range low={self.low}, high={self.high}: need low <= high")


def cost_ranges(
    stats: Mapping[str, BoundaryStats],
    mode: CostMode,
    scale: CostScale = CostScale.BOUNDARIES,
    floor_share: float = 0.1,
) -> dict[str, CostRange]:
    """C_min and C_max of each task for Eq. (6), arXiv:2602.21227. [the boundary policies' costs: paper; the rest ours]

    `usd`: the lesser and the greater of the two mean boundary costs, never "small's and large's": where the small model
    costs more, that would turn the penalty's sign. `calls`: 0 and the mean large calls of always-large: its steps, or
    fewer under a cap. In both modes a range narrower than `floor_share` x the median C_max over the tasks is widened
    upwards to that, so that two boundaries of nearly equal cost do not turn cents into a full penalty.

    Args:
        stats: by task name; costs in the unit of `mode`.
        mode: the unit.
        scale: see `CostScale`.
        floor_share: at least 0.

    Returns:
        The range of each task, by the same names.

    Raises:
        ValueError: `floor_share` is negative.
    """
    if floor_share < 0:
        raise ValueError(f"floor_share={floor_share}: need at least 0")
    bounds = {
        name: (0.0, s.cost_large)
        if mode is CostMode.CALLS
        else (min(s.cost_small, s.cost_large), max(s.cost_small, s.cost_large))
        for name, s in stats.items()
    }
    if scale is CostScale.ABSOLUTE and bounds:
        one = CostRange(0.0, fmean(high for _, high in bounds.values()), clip=False)
        return dict.fromkeys(bounds, one)
    floor = floor_share * median(high for _, high in bounds.values()) if bounds else 0.0
    return {name: CostRange(low, max(high, low + floor)) for name, (low, high) in bounds.items()}


def normalised_cost(cost: ArrayLike, cost_range: CostRange, eps: float = 1e-9) -> NDArray[np.float64]:
    """C_norm = clip((C - C_min) / (C_max - C_min + eps), 0, 1): Eq. (6), arXiv:2602.21227. [paper]

    Args:
        cost: C(tau), any shape, in the unit of `cost_range`.
        cost_range: the task's C_min and C_max.
        eps: in the same unit, above 0.

    Returns:
        C_norm in [0, 1], without that where the range does not clip; same shape.
    """
    c = np.asarray(cost, dtype=np.float64)
    share = (c - cost_range.low) / (cost_range.high - cost_range.low + eps)
    return np.clip(share, 0.0, 1.0) if cost_range.clip else share


def reward(
    outcome: ArrayLike, hard: ArrayLike, cost_norm: ArrayLike, lam: float, beta: float = 0.5
) -> NDArray[np.float64]:
    """R = u + beta * 1{x is Hard} * u - lambda * C_norm, arXiv:2602.21227. [the three terms: paper; beta = 0.5: ours]

    Args:
        outcome: u in [0, 1], any shape.
        hard: whether the task is Hard; bool, broadcast against `outcome`.
        cost_norm: C_norm of Eq. (6), broadcast against `outcome`.
        lam: lambda, the price of cost, at least 0.
        beta: the bonus for success on Hard tasks.

    Returns:
        R, at most 1 + beta and with C_norm in [0, 1] at least -lambda, the broadcast shape.
    """
    u = np.asarray(outcome, dtype=np.float64)
    bonus = 1.0 + beta * np.asarray(hard, dtype=bool)
    return np.asarray(bonus * u - lam * np.asarray(cost_norm, dtype=np.float64), dtype=np.float64)


def beta_warning(
    stats: Mapping[str, BoundaryStats], ranges: Mapping[str, CostRange], beta: float, lam: float,
    easy_at: int | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """The Hard tasks on which always-large does not out-reward always-small: (1 + beta) * d <= lambda * c. [ours]

    d = u_L - u_S is the gap of mean outcomes (of success rates where u is 0 or 1), c that of the normalised mean costs:
    less than 1 where a range is wider than the boundaries, below 0 where always-small is the dearer one. Tasks with
    d <= 0 are left out: there no beta helps.

    Args:
        stats: by task name.
        ranges: of `cost_ranges`, by the same names.
        beta, lam: as in `reward`.
        easy_at: as in `BoundaryStats.difficulty`.

    Returns:
        Task names in the order of `stats`; empty when there is nothing to warn of.
    """
    doubtful = []
    for name, s in stats.items():
        gain = s.outcome_large - s.outcome_small
        small, large = normalised_cost([s.cost_small, s.cost_large], ranges[name])
        if s.difficulty(easy_at) is Difficulty.HARD and gain > 0 and (1 + beta) * gain <= lam * (large - small):
            doubtful.append(name)
    return tuple(doubtful)
