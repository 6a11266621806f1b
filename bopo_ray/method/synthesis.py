"""BoSFT: boundary-guided synthesis of supervised data (section 3 of the method), arXiv:2602.21227.

Easy and Intractable tasks teach SMALL at each step (cheap success; cheap failure); a Hard task teaches the
cheapest success known [paper], of those that were not mere luck [ours]. Always true here: the choice does not depend on
the order of the episodes.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bopo_ray.errors import GateError
from bopo_ray.records import CostMode, Difficulty, Episode

__all__ = [
    "FIRST_LARGE", "Expert", "choose_expert", "class_weights", "gate", "reliable_policies", "stratified_shares",
    "task_gate",
]  # fmt: skip

FIRST_LARGE = (1, 2, 3, 5, 8, 13)
"""K of the first-large(K) rollouts of a Hard task, a second family of strata. [ours]

Independent choices hardly ever make an episode whose first steps are all LARGE and whose others are all SMALL: of the
2^T routings of T steps, K such steps at a share of K/T come with probability (K/T)^K (1-K/T)^(T-K). Where the beginning
decides (finding the object, in ALFWorld), the paper's strata hold no such success to imitate.
"""


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


def reliable_policies(hard: Iterable[Episode], mode: CostMode, share: float = 0.5) -> frozenset[str] | None:
    """The routing policies whose successes on Hard tasks are no mere luck, by name. [ours]

    The cheapest of some twenty rollouts that can each succeed by chance is nearly always a lucky one: with real models
    always-small wins a Hard task now and then, and then is the cheapest of all. What it did is not worth imitating, nor
    is what a policy did that costs more than another and wins less often. So, over all Hard tasks together, a policy
    must succeed at least `share` times as often as the most successful one, and no other policy may be cheaper and
    succeed as often.

    Args:
        hard: the stratified and the boundary rollouts of all Hard tasks.
        mode: the unit of C(tau).
        share: in [0, 1]; 0 trusts every success, as the paper does.

    Returns:
        Names, at least one where there is an episode; None for `share` 0: no matter how often they win.

    Raises:
        ValueError: `share` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: need 0 <= share <= 1")
    if share == 0:
        return None
    own: dict[str, list[tuple[bool, float]]] = {}
    for e in hard:
        own.setdefault(e.spec.policy, []).append((e.success, e.cost(mode)))
    means = {name: np.mean(figures, axis=0) for name, figures in own.items()}
    best = max((success for success, _ in means.values()), default=0.0)
    return frozenset(
        name
        for name, (success, cost) in means.items()
        if success >= share * best and not any(s >= success and c < cost for s, c in means.values())
    )


def choose_expert(
    difficulty: Difficulty,
    boundary_small: Sequence[Episode],
    boundary_large: Sequence[Episode],
    stratified: Sequence[Episode],
    mode: CostMode,
    reliable: Container[str] | None = None,
) -> Expert | None:
    """The trajectory that BoSFT imitates on one task. [paper; tie rules and fall-backs ours]

    Hard: the cheapest success among the stratified rollouts, else the cheapest of always-large, with the models it
    chose; without any it is treated as Intractable. A boundary policy has K rollouts where a stratum has one, and so as
    many chances to win by luck: they are no candidates beside the strata [paper], unless by name among the `reliable`
    ones, and then the successes of these come first, and any success after them [ours]. Easy and Intractable: SMALL at
    each step of a cached always-small rollout, the cheapest success if there is one, else the cheapest.

    Args:
        difficulty: the task's label.
        boundary_small: cached always-small rollouts of the task.
        boundary_large: cached always-large rollouts of the task.
        stratified: rollouts with P(LARGE) = k/N, and by schedules; empty unless the task is Hard.
        mode: the unit of C(tau).
        reliable: names of policies, see `reliable_policies`; None: the paper's rule.

    Returns:
        The expert, or None when SMALL is to be taught and no always-small rollout is there to teach it on.
    """
    if difficulty is Difficulty.HARD:
        if reliable is None:
            first, then = stratified, boundary_large
        else:
            then = (*stratified, *boundary_small, *boundary_large)
            first = [e for e in then if e.spec.policy in reliable]
        best = _cheapest([e for e in first if e.success] or [e for e in then if e.success], mode)
        if best is not None:
            return Expert(best, tuple(s.model for s in best.steps), Difficulty.HARD)
        difficulty = Difficulty.INTRACTABLE
    chosen = _cheapest([e for e in boundary_small if e.success] or boundary_small, mode)
    if chosen is None:
        return None
    return Expert(chosen, (0,) * len(chosen.steps), difficulty)


def class_weights(steps: Mapping[Difficulty, int], hard_share: float = 1 / 3) -> dict[Difficulty, float]:
    """Weights of the classes' steps in the supervised loss, so that Hard ones carry at least `hard_share` of it. [ours]

    Without it the many easy SMALL labels make BoSFT itself collapse to SMALL. The share is that of the total
    weight. It only ever raises Hard: steps keep weight 1 where Hard already has its share, is absent or is all.

    Args:
        steps: how many steps there are of tasks of each difficulty.
        hard_share: in [0, 1).

    Returns:
        A weight for each difficulty; over all steps their mean is 1.

    Raises:
        ValueError: `hard_share` is outside [0, 1).
    """
    if not 0 <= hard_share < 1:
        raise ValueError(f"hard_share={hard_share}: need 0 <= hard_share < 1")
    share = steps.get(Difficulty.HARD, 0) / max(1, sum(steps.values()))
    if share == 0.0 or share >= hard_share:
        return dict.fromkeys(Difficulty, 1.0)
    return dict.fromkeys(Difficulty, (1 - hard_share) / (1 - share)) | {Difficulty.HARD: hard_share / share}


def task_gate(tasks: Mapping[Difficulty, int], override: bool = False) -> None:
    """Refuses training tasks of which none is Hard: there BoSFT has nothing to imitate but SMALL. [ours]

    Args:
        tasks: how many there are of each difficulty.
        override: go on all the same.

    Raises:
        GateError: there is no Hard task, and `override` is not set.
    """
    easy, intractable = (tasks.get(d, 0) for d in (Difficulty.EASY, Difficulty.INTRACTABLE))
    if override or tasks.get(Difficulty.HARD, 0):
        return
    harder, easier = "harder tasks, a weaker --small or fewer --max-steps", "easier tasks or a stronger --large"
    if not intractable:
        why = f"the small model alone wins nearly all; take {harder}"
    elif not easy:
        why = f"no model wins any; take {easier}"
    else:
        why = (
            "the small model alone wins nearly all of the Easy ones, and no model any of the others; for the first "
            f"take {harder}, for the others {easier}"
        )
    raise GateError(
        f"no Hard training task among {easy + intractable} ({easy} Easy, {intractable} Intractable), so there is "
        f"nothing to route: {why}, or go on with --ignore-gate"
    )


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
