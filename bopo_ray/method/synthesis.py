"""BoSFT: boundary-guided synthesis of supervised data (section 3 of the method), arXiv:2602.21227.

Easy and Intractable tasks teach SMALL at each step (cheap success; cheap failure); a Hard task teaches the
cheapest success known [paper]. Always true here: the choice does not depend on the order of the episodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bopo_ray.errors import GateError
from bopo_ray.records import CostMode, Difficulty, Episode

__all__ = ["Expert", "choose_expert", "gate", "step_weights", "stratified_shares"]


@dataclass(frozen=True, slots=True)
class Expert:
    """One trajectory to imitate.

    Raises:
        ValueError: there is not one label for each step.
    """

    episode: Episode
    """Where the router's views come from."""
    labels: tuple[int, ...]
    """The model to choose at each step, 0 is the smallest."""
    difficulty: Difficulty
    """How the task was treated: a Hard task without a known success is treated as Intractable."""

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.episode.steps):
            raise ValueError(f"{len(self.labels)} labels for {len(self.episode.steps)} steps: need one for each step")


def stratified_shares(n: int = 10) -> list[float]:
    """P(LARGE) of the n + 1 stratified rollouts of a Hard task: k/n for k = 0..n. [paper; n = 20 where tasks are few]

    Raises:
        ValueError: `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: need at least 1 stratum")
    return [k / n for k in range(n + 1)]


def _cheapest(episodes: Sequence[Episode], mode: CostMode) -> Episode | None:
    """argmin C(tau); ties: fewer steps, then the smaller id. [paper; tie rules ours]"""
    return min(episodes, key=lambda e: (e.cost(mode), len(e.steps), e.spec.id), default=None)


def choose_expert(
    difficulty: Difficulty,
    boundary_small: Sequence[Episode],
    boundary_large: Sequence[Episode],
    stratified: Sequence[Episode],
    mode: CostMode,
) -> Expert | None:
    """The trajectory that BoSFT imitates on one task. [paper; tie rules and fall-backs ours]

    Hard: the cheapest success among the stratified and the boundary rollouts, with the models it chose; without
    any it is treated as Intractable. (A cheapest successful always-large rollout, the method's fall-back when no
    stratified rollout succeeds, is among these candidates.) Easy and Intractable: SMALL at each step of a cached
    always-small rollout, the cheapest success if there is one, else the cheapest.

    Args:
        difficulty: the task's label.
        boundary_small: cached always-small rollouts of the task.
        boundary_large: cached always-large rollouts of the task.
        stratified: rollouts with P(LARGE) = k/N; empty unless the task is Hard.
        mode: the unit of C(tau).

    Returns:
        The expert, or None when SMALL is to be taught and no always-small rollout is there to teach it on.
    """
    if difficulty is Difficulty.HARD:
        candidates = (*stratified, *boundary_small, *boundary_large)
        best = _cheapest([e for e in candidates if e.success], mode)
        if best is not None:
            return Expert(best, tuple(s.model for s in best.steps), Difficulty.HARD)
        difficulty = Difficulty.INTRACTABLE
    chosen = _cheapest([e for e in boundary_small if e.success] or boundary_small, mode)
    if chosen is None:
        return None
    return Expert(chosen, (0,) * len(chosen.steps), difficulty)


def step_weights(difficulties_N: Sequence[Difficulty], hard_share: float = 1 / 3) -> NDArray[np.float64]:
    """Weight of each step in the supervised loss, so that Hard steps carry at least `hard_share` of it. [ours]

    Without it the many easy SMALL labels make BoSFT itself collapse to SMALL. The share is that of the total
    weight. It only ever raises Hard: steps keep weight 1 where Hard already has its share, is absent or is all.

    Args:
        difficulties_N: the difficulty of the task of each of N steps.
        hard_share: in [0, 1).

    Returns:
        weights [N], mean 1.

    Raises:
        ValueError: `hard_share` is outside [0, 1).
    """
    if not 0 <= hard_share < 1:
        raise ValueError(f"hard_share={hard_share}: need 0 <= hard_share < 1")
    hard_N = np.array([d is Difficulty.HARD for d in difficulties_N], dtype=bool)
    share = float(hard_N.mean()) if hard_N.size else 0.0
    if share == 0.0 or share >= hard_share:
        return np.ones(hard_N.size)
    return np.where(hard_N, hard_share / share, (1 - hard_share) / (1 - share))


def gate(p_large_hard: ArrayLike, threshold: float = 0.1, override: bool = False) -> float:
    """Mean pi(LARGE) on Hard training states after BoSFT: BoPO may start when it reaches `threshold`. [ours]

    Args:
        p_large_hard: probabilities [n] of any model above the smallest on the n Hard training states.
        threshold: the least mean, in [0, 1]. Plain GRPO does not recover from 0.02.
        override: go on all the same.

    Returns:
        The mean, to be reported; NaN when there is no Hard state and `override` is set.

    Raises:
        GateError: the mean is below `threshold` or there is no Hard state, and `override` is not set.
    """
    p = np.asarray(p_large_hard, dtype=np.float64)
    mean = float(p.mean()) if p.size else math.nan
    if override or mean >= threshold:
        return mean
    found = f"mean pi(LARGE) on {p.size} Hard training states is {mean:.3f}" if p.size else "no Hard training state"
    raise GateError(
        f"after BoSFT: {found}, need at least {threshold:g} for BoPO to learn from: "
        "train BoSFT longer, add stratified rollouts or Hard tasks, or go on with --ignore-gate"
    )
