"""Boundary rollouts and the difficulty taxonomy (section 2 of the method), arXiv:2602.21227.

Each training task is rolled out K times (K = 5) by each boundary policy, always-small and always-large [paper].
Always true here: counts are kept, labels are derived from them. 0 of 10 is weak evidence (a task with success
probability 0.2 gives it 10.7% of the time), so a later success anywhere lifts a task out of Intractable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from bopo_ray.records import CostMode, Difficulty, Episode

__all__ = ["BoundaryStats", "boundary_stats", "class_shares", "classify", "counts", "easy_from"]


def easy_from(k: int) -> int:
    """Successes of always-small, of `k` rollouts, from which a task is Easy: 3 of 5, rounded up, at least 1. [ours]"""
    return max(1, -(-3 * k // 5))


@dataclass(frozen=True, slots=True)
class BoundaryStats:
    """What the two boundary policies achieved on one task.

    Raises:
        ValueError: a policy has no rollout, or more successes than rollouts.
    """

    task: str
    """The task's name, unique in its benchmark."""
    k_small: int
    """Rollouts of always-small, at least 1."""
    k_large: int
    """Rollouts of always-large, at least 1."""
    successes_small: int
    """s_S, in 0..k_small."""
    successes_large: int
    """s_L, in 0..k_large."""
    cost_small: float
    """c_S: mean cost of an always-small rollout, in the unit of the cost mode (calls or micro-dollars)."""
    cost_large: float
    """c_L: the same for always-large."""
    outcome_small: float
    """u_S: mean outcome of always-small, in [0, 1]."""
    outcome_large: float
    """u_L: mean outcome of always-large, in [0, 1]."""
    steps_large: float
    """Mean steps of an always-large rollout: C_max of Eq. (6) in `calls` mode."""
    later_successes: int = 0
    """Successes of any rollout made after the boundary rollouts."""

    def __post_init__(self) -> None:
        for name, successes, k in (
            ("small", self.successes_small, self.k_small),
            ("large", self.successes_large, self.k_large),
        ):
            if k < 1 or not 0 <= successes <= k:
                raise ValueError(
                    f"task {self.task}: successes_{name}={successes} of k_{name}={k}: need k >= 1, 0 <= s <= k"
                )
        if self.later_successes < 0:
            raise ValueError(f"task {self.task}: later_successes={self.later_successes}: need at least 0")

    def difficulty(self, easy_at: int | None = None) -> Difficulty:
        """Easy: s_S >= `easy_at`. Intractable: no success of any rollout, later ones included. Hard: the rest. [ours]

        Args:
            easy_at: successes of always-small that make a task Easy, at least 1; None: `easy_from` its rollouts.

        Raises:
            ValueError: `easy_at` is below 1.
        """
        if easy_at is None:
            easy_at = easy_from(self.k_small)
        if easy_at < 1:
            raise ValueError(f"easy_at={easy_at}: need at least 1, or a task that never succeeded would be Easy")
        if self.successes_small >= easy_at:
            return Difficulty.EASY
        if self.successes_small + self.successes_large + self.later_successes == 0:
            return Difficulty.INTRACTABLE
        return Difficulty.HARD

    def promoted(self, n: int) -> BoundaryStats:
        """A copy that counts `n` more successes of later rollouts: Intractable becomes Hard when n > 0. [ours]"""
        if n < 0:
            raise ValueError(f"task {self.task}: n={n} later successes: need at least 0")
        return replace(self, later_successes=self.later_successes + n)


def boundary_stats(
    episodes_small: Sequence[Episode], episodes_large: Sequence[Episode], mode: CostMode
) -> BoundaryStats:
    """The counts and means of one task's boundary rollouts.

    Args:
        episodes_small: the K always-small rollouts of the task.
        episodes_large: the K always-large rollouts of the same task.
        mode: the unit of the costs.

    Raises:
        ValueError: a side is empty, or the episodes are not all of one task.
    """
    tasks = {e.spec.task.name for e in (*episodes_small, *episodes_large)}
    if not episodes_small or not episodes_large or len(tasks) != 1:
        raise ValueError(
            f"boundary rollouts of tasks {sorted(tasks)}, {len(episodes_small)} small and {len(episodes_large)} large: "
            "need one task and at least one rollout of each policy"
        )
    return BoundaryStats(
        task=tasks.pop(),
        k_small=len(episodes_small),
        k_large=len(episodes_large),
        successes_small=sum(e.success for e in episodes_small),
        successes_large=sum(e.success for e in episodes_large),
        cost_small=fmean(e.cost(mode) for e in episodes_small),
        cost_large=fmean(e.cost(mode) for e in episodes_large),
        outcome_small=fmean(e.outcome for e in episodes_small),
        outcome_large=fmean(e.outcome for e in episodes_large),
        steps_large=fmean(len(e.steps) for e in episodes_large),
    )


def classify(stats: Iterable[BoundaryStats], easy_at: int | None = None) -> dict[str, Difficulty]:
    """The label of each task, by task name, in the order given."""
    return {s.task: s.difficulty(easy_at) for s in stats}


def counts(labels: Mapping[str, Difficulty]) -> dict[Difficulty, int]:
    """Tasks per label; each label is there, with 0 where no task has it."""
    values = list(labels.values())
    return {d: values.count(d) for d in Difficulty}


def class_shares(mix: Mapping[str, float], tasks: Mapping[Difficulty, int]) -> dict[Difficulty, float]:
    """Each class's share of the groups of an update: what the mix says, at most its share of the tasks; the rest is
    Hard's. [ours]

    A quarter of all groups on a few Intractable tasks, again and again, holds no success to learn from, and teaches
    that calls cost.

    Args:
        mix: relative weights of the classes, at least 0.
        tasks: how many tasks there are of each class.

    Returns:
        Shares of sum 1 of the classes that have tasks and a weight; without a Hard one the rest is the next class's.
        Empty where there is no such class.
    """
    weights = {d: mix[d] for d in (Difficulty.HARD, *Difficulty) if tasks.get(d, 0) and mix.get(d, 0) > 0}
    shares = {d: min(w / sum(weights.values()), tasks[d] / sum(tasks.values())) for d, w in weights.items()}
    for first in list(shares)[:1]:
        shares[first] += 1 - sum(shares.values())
    return shares
