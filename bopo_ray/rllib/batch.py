"""Episodes as train batches: one row per step, everything else about the group already worked into its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

from bopo_ray.agent import episode_views
from bopo_ray.method.synthesis import Expert
from bopo_ray.records import Episode
from bopo_ray.rllib.encode import Reader

__all__ = [
    "ADVANTAGE",
    "ANCHOR",
    "LABEL",
    "MASK",
    "OLD_LOGP",
    "REFERENCE",
    "WEIGHT",
    "Group",
    "bopo_batch",
    "sft_batch",
]

ADVANTAGE, ANCHOR, WEIGHT, MASK = "advantages", "anchor_advantages", "row_weights", "action_mask"
OLD_LOGP, REFERENCE, LABEL = "old_logp", "reference_logits", "labels"
"""Columns beside RLlib's own."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """What one group of episodes contributes to an update."""

    episodes: tuple[Episode, ...]
    """The G policy episodes."""
    advantages: NDArray[np.float64]
    """A_i [G]."""
    anchors: tuple[tuple[Episode, float], ...]
    """Boundary trajectories to imitate, each with its A_b."""


def episode_ids(episode: Episode, read: Reader) -> NDArray[np.int32]:
    """What the router saw at each step, encoded: [steps, context]."""
    rows = [read(v) for v in episode_views(episode)]
    return np.stack(rows) if rows else np.empty((0, read.context), np.int32)


def bopo_batch(
    groups: Sequence[Group], t_max: int, read: Reader, minibatch: int, learners: int, rng: np.random.Generator
) -> MultiAgentBatch | None:
    """The train batch of an update, shuffled and padded to whole minibatches; None when no group teaches anything.

    Weights are 1/(G * T_max * n_groups) on policy rows and 1/(T_max * n_groups) on anchor rows, times the number of
    minibatches per learner and of learners (whose gradients are averaged): each minibatch then estimates the whole
    loss.
    """
    rows: list[dict[str, Any]] = []
    for group in groups:
        policy_weight = 1 / (len(group.episodes) * t_max * len(groups))
        for episode, advantage in zip(group.episodes, group.advantages, strict=True):
            rows += _rows(episode, read, policy_weight, advantage=float(advantage))
        for episode, anchor in group.anchors:
            rows += _rows(episode, read, 1 / (t_max * len(groups)), anchor=anchor)
    if not rows:
        return None
    table = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    table[WEIGHT] *= -(-len(rows) // (minibatch * learners)) * learners
    return _finish(table, minibatch, learners, rng)


def sft_batch(
    experts: Sequence[Expert], weights: NDArray[np.float64], read: Reader, minibatch: int, learners: int,
    rng: np.random.Generator,
) -> MultiAgentBatch:  # fmt: skip
    """All expert steps with their class weights (mean 1), shuffled and padded to whole minibatches."""
    ids = np.concatenate([episode_ids(e.episode, read) for e in experts])
    labels = np.concatenate([np.asarray(e.labels, np.int64) for e in experts])
    table = {Columns.OBS: ids, LABEL: labels, WEIGHT: weights.astype(np.float32)}
    return _finish(table, minibatch, learners, rng)


def _rows(
    episode: Episode, read: Reader, weight: float, advantage: float = 0.0, anchor: float = 0.0
) -> list[dict[str, Any]]:
    return [
        {
            Columns.OBS: ids,
            Columns.ACTIONS: np.int64(step.model),
            ADVANTAGE: np.float32(advantage),
            ANCHOR: np.float32(anchor),
            WEIGHT: np.float32(weight),
            MASK: np.asarray(step.mask, bool),
        }
        for step, ids in zip(episode.steps, episode_ids(episode, read), strict=True)
    ]


def _finish(table: dict[str, NDArray[Any]], minibatch: int, learners: int, rng: np.random.Generator) -> MultiAgentBatch:
    n = len(table[WEIGHT])
    order = rng.permutation(n)
    unit = minibatch * learners
    padded = -(-n // unit) * unit
    order = np.concatenate([order, np.zeros(padded - n, order.dtype)])
    table = {k: v[order] for k, v in table.items()}
    table[WEIGHT][n:] = 0.0
    return MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(table)}, env_steps=n)
