"""The reference-guided advantage of a group of episodes (section 4 of the method), arXiv:2602.21227.

The paper names the idea; the formulas are ours [ours]. mu and sigma are over the G rewards of the group; mu+ and
sigma+ over those G values and one more per boundary policy, the mean reward of its cached rollouts. Standard
deviations are of the population (divide by n). Always true here: permuting the group permutes the advantages, a
constant added to all rewards changes nothing, and no result is ever NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bopo_ray.method.reward import CostRange, normalised_cost, reward

__all__ = ["AdvantageMode", "Anchor", "GroupAdvantage", "boundary_anchor", "group_advantage"]

_NOISE = 1e-12
"""Rewards this close together differ by rounding only."""


class AdvantageMode(StrEnum):
    """How a group's rewards become advantages; the three are the ablation."""

    VANILLA = "vanilla"
    """GRPO: A_i = (R_i - mu) / (sigma + eps); the boundaries are not looked at."""
    AUGMENTED = "augmented"
    """The closest reading of the paper: A_i = (R_i - mu+) / (sigma+ + eps), the boundaries in the baseline only."""
    HYBRID = "hybrid"
    """Default: VANILLA where some rollout succeeded; where none did A_i = (R_i - mu+) / (max(sigma, sigma+) + eps)
    and each boundary policy above mu+ is imitated, weighted by A_b = (R_b - mu+) / (sigma+ + eps). In an all-fail
    group the only spread is cost: divided by sigma alone, tiny cost differences become +-1 and drive the router
    to always-small."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """One boundary policy on one task, as a reference point."""

    reward: float
    """R_b: the mean reward of its cached rollouts, with the same lambda and beta as the group's."""
    outcome: float
    """Their mean u, in [0, 1]."""
    imitable: bool = True
    """False when no cached rollout may be imitated (always-large without a success): it then counts in mu+ and
    sigma+ and never gets an anchor term."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupAdvantage:
    """What one group teaches."""

    advantages: NDArray[np.float64]
    """A_i [G]."""
    anchor_advantages: NDArray[np.float64]
    """A_b [n_boundaries]: above 0 where an anchor term applies, else 0."""
    skipped: bool
    """All of the above is 0: leave the group out and count it."""
    all_failed: bool
    """No rollout succeeded: the best outcome of the group is 0, or below the better boundary's mean outcome."""


def boundary_anchor(
    outcomes_K: ArrayLike,
    costs_K: ArrayLike,
    hard: bool,
    cost_range: CostRange,
    lam: float,
    beta: float = 0.5,
    imitable: bool = True,
) -> Anchor:
    """The anchor of a boundary policy: the mean of its K rewards (C_norm clips: not the reward of the mean). [ours]

    Args:
        outcomes_K: u of the K cached rollouts.
        costs_K: their C(tau), in the unit of `cost_range`.
        hard, cost_range, lam, beta: as for the group's rewards.
        imitable: see `Anchor`.

    Raises:
        ValueError: no rollout.
    """
    outcomes = np.asarray(outcomes_K, dtype=np.float64)
    if outcomes.size == 0:
        raise ValueError("an anchor of 0 rollouts: need at least 1 cached rollout of the boundary policy")
    rewards = reward(outcomes, hard, normalised_cost(costs_K, cost_range), lam, beta)
    return Anchor(float(rewards.mean()), float(outcomes.mean()), imitable)


def _spread(values: NDArray[np.float64]) -> float:
    """Population standard deviation; exactly 0 where values differ by rounding only."""
    return 0.0 if np.ptp(values) <= _NOISE else float(values.std())


def group_advantage(
    rewards_G: ArrayLike,
    outcomes_G: ArrayLike,
    anchors: Sequence[Anchor],
    mode: AdvantageMode,
    eps: float = 1e-6,
) -> GroupAdvantage:
    """Advantages of the G policy episodes of one task, arXiv:2602.21227. [named by the paper; formulas ours]

    "None succeeded" is max_i u_i < max_b u_b, or max_i u_i = 0 (so an Intractable group is an all-fail group too;
    u_i = 1 always counts as success). A group of one, one without spread, and an empty one give zeros and are
    skipped; `augmented` and an all-fail `hybrid` group look at sigma+ for that, the others at sigma.

    Args:
        rewards_G: R_i [G].
        outcomes_G: u_i [G], in [0, 1].
        anchors: the boundary policies, in the caller's order; may be empty.
        mode: which formula.
        eps: added to the denominators, in the unit of the reward.

    Raises:
        ValueError: rewards and outcomes differ in shape, are not vectors, or hold a value that is not finite.
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    outcomes = np.asarray(outcomes_G, dtype=np.float64)
    if rewards.shape != outcomes.shape or rewards.ndim != 1:
        raise ValueError(f"rewards {rewards.shape} and outcomes {outcomes.shape}: need two vectors of one length")
    anchor_rewards = np.array([a.reward for a in anchors], dtype=np.float64)
    if not (np.isfinite(rewards).all() and np.isfinite(outcomes).all() and np.isfinite(anchor_rewards).all()):
        raise ValueError("a reward or an outcome that is not finite: drop the group's failed episodes first")

    best = float(outcomes.max(initial=0.0))
    failed = best <= 0.0 or best < max((a.outcome for a in anchors), default=0.0)
    no_anchor = np.zeros(len(anchors))
    if rewards.size < 2:
        return GroupAdvantage(np.zeros(rewards.size), no_anchor, skipped=True, all_failed=failed)

    if mode is AdvantageMode.VANILLA or (mode is AdvantageMode.HYBRID and not failed):
        sigma = _spread(rewards)
        advantages = (rewards - rewards.mean()) / (sigma + eps) if sigma else np.zeros(rewards.size)
        return GroupAdvantage(advantages, no_anchor, skipped=sigma == 0, all_failed=failed)

    reference = np.concatenate([rewards, anchor_rewards])
    mu_plus, sigma_plus = float(reference.mean()), _spread(reference)
    if sigma_plus == 0:
        return GroupAdvantage(np.zeros(rewards.size), no_anchor, skipped=True, all_failed=failed)
    if mode is AdvantageMode.AUGMENTED:
        return GroupAdvantage((rewards - mu_plus) / (sigma_plus + eps), no_anchor, skipped=False, all_failed=failed)
    advantages = (rewards - mu_plus) / (max(_spread(rewards), sigma_plus) + eps)
    imitable = np.array([a.imitable for a in anchors], dtype=bool)
    pull = np.where(imitable, np.maximum((anchor_rewards - mu_plus) / (sigma_plus + eps), 0.0), 0.0)
    return GroupAdvantage(advantages, pull, skipped=False, all_failed=failed)
