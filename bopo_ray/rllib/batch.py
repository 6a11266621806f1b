"""Episodes as train batches: a row per reading, all else about the group already worked into the weights of its steps.

Always true here: a row's weight is its share of the whole batch's loss, times the number of minibatches; so losses and
gradients add up over rows, forward passes and learners, and each minibatch estimates the loss of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

from bopo_ray.agent import episode_views
from bopo_ray.method.synthesis import Expert
from bopo_ray.records import Difficulty, Episode
from bopo_ray.rllib.encode import Reader
from bopo_ray.rllib.reading import Reading
from bopo_ray.rllib.router_module import ASKS

__all__ = [
    "ADVANTAGE", "ANCHOR", "BEHAVIOUR", "LABEL", "LENGTH", "MASK", "OLD_LOGP", "REFERENCE", "WEIGHT", "Group",
    "TrainBatch", "bopo_batch", "passes", "readings_table", "sft_batch",
]  # fmt: skip

ADVANTAGE, ANCHOR, WEIGHT, MASK = "advantages", "anchor_advantages", "weights", "action_mask"
OLD_LOGP, REFERENCE, LABEL = "old_logp", "reference_logits", "labels"
"""Columns beside RLlib's own: per row and decision, [rows, K, ...]. A row with fewer decisions has weight 0 behind."""
BEHAVIOUR = "behaviour_logp"
"""Column: the stored log-probability of a stale group's choice when it was made; 1, which none can be, elsewhere."""
LENGTH = "length"
"""Column: tokens of a row [rows]; 0 for one that only fills up."""
Row = tuple[Reading, dict[str, NDArray[Any]]]
"""A reading, and the columns of its decisions, [k, ...]."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """What one group of episodes contributes to an update."""

    episodes: tuple[Episode, ...]
    """The G policy episodes."""
    advantages: NDArray[np.float64]
    """A_i [G]."""
    anchors: tuple[tuple[Episode, float], ...]
    """Boundary trajectories to imitate, each with its A_b."""
    stale: bool = False
    """Whether an earlier policy decided in it, at least in part."""


class TrainBatch(NamedTuple):
    """For `LearnerGroup.update(batch=data, minibatch_size=rows)`, which then cuts it where it is meant to be cut."""

    data: MultiAgentBatch
    rows: int
    """Of each learner's part of a minibatch."""


def bopo_batch(
    groups: Sequence[Group], t_max: int, read: Reader, minibatch: int, learners: int, rng: np.random.Generator
) -> TrainBatch | None:
    """The train batch of an update; None when no group teaches anything.

    Weights are 1/(G * T_max * n_groups) on policy steps and 1/(T_max * n_groups) on those of anchors.

    Args:
        groups: what to learn from.
        t_max: T_max.
        read: how the router reads.
        minibatch: about the steps per optimizer step and learner: all have as many, but for readings being whole.
        learners: how many share a minibatch.
        rng: of the order.
    """
    rows: list[Row] = []
    for group in groups:
        policy_weight = 1 / (len(group.episodes) * t_max * len(groups))
        for episode, advantage in zip(group.episodes, group.advantages, strict=True):
            rows += _rows(episode, read, policy_weight, advantage=float(advantage), stale=group.stale)
        for episode, anchor in group.anchors:
            rows += _rows(episode, read, 1 / (t_max * len(groups)), anchor=anchor)
    return _arranged(rows, read.padding, minibatch, learners, rng) if rows else None


def sft_batch(
    experts: Sequence[Expert], weights: Mapping[Difficulty, float], read: Reader, minibatch: int, learners: int,
    rng: np.random.Generator,
) -> TrainBatch:  # fmt: skip
    """All expert steps with their classes' weights, over their number; see `bopo_batch`."""
    rows: list[Row] = []
    total = sum(len(e.labels) for e in experts)
    for expert in experts:
        columns = {
            LABEL: np.asarray(expert.labels, np.int64),
            WEIGHT: np.full(len(expert.labels), weights[expert.difficulty] / total, np.float32),
        }
        rows += _with_columns(read.episode(episode_views(expert.episode)), columns)
    return _arranged(rows, read.padding, minibatch, learners, rng)


def readings_table(readings: Sequence[Reading], padding: int) -> dict[str, NDArray[Any]]:
    """Readings as the columns of a batch, to look at and not to learn from."""
    rows = [(r, {WEIGHT: np.ones(r.decisions, np.float32)}) for r in readings]
    return _table(rows, np.arange(len(rows)), padding)


def passes(length_B: NDArray[Any], tokens: int) -> Iterator[NDArray[np.int64]]:
    """Rows of one forward pass after the other: of similar lengths, at most so many tokens with their padding.

    At least one row at a time. Rows of length 0 are left out.
    """
    order = np.argsort(-length_B, kind="stable")
    order = order[: int((length_B > 0).sum())]
    while order.size:
        count = max(1, tokens // int(length_B[order[0]]))
        yield order[:count]
        order = order[count:]


def _rows(
    episode: Episode, read: Reader, weight: float, advantage: float = 0.0, anchor: float = 0.0, stale: bool = False
) -> list[Row]:
    n = len(episode.steps)
    behaviour = [math.log(s.probabilities[s.model]) if stale else 1.0 for s in episode.steps]
    columns = {
        Columns.ACTIONS: np.array([s.model for s in episode.steps], np.int64),
        ADVANTAGE: np.full(n, advantage, np.float32),
        ANCHOR: np.full(n, anchor, np.float32),
        WEIGHT: np.full(n, weight, np.float32),
        BEHAVIOUR: np.array(behaviour, np.float32),
        MASK: np.array([s.mask for s in episode.steps], bool),
    }
    return _with_columns(read.episode(episode_views(episode)), columns)


def _with_columns(readings: Sequence[Reading], columns: dict[str, NDArray[Any]]) -> list[Row]:
    sizes = [r.decisions for r in readings]
    parts = {k: _split(v, sizes) for k, v in columns.items()}
    return [(r, {k: v[i] for k, v in parts.items()}) for i, r in enumerate(readings)]


def _split(values: NDArray[Any], sizes: Sequence[int]) -> list[NDArray[Any]]:
    return np.split(values, np.cumsum(sizes)[:-1]) if sizes else []


def _arranged(rows: Sequence[Row], padding: int, minibatch: int, learners: int, rng: np.random.Generator) -> TrainBatch:
    """Rows in a drawn order, by learner, by minibatch; each learner's part of each filled up to the same size."""
    order = rng.permutation(len(rows))
    steps = np.array([rows[i][0].decisions for i in order])
    wanted = -(-int(steps.sum()) // (minibatch * learners))
    _, batch_of = np.unique((np.cumsum(steps) - steps) * wanted // steps.sum(), return_inverse=True)
    minibatches = int(batch_of[-1]) + 1
    parts = [_shared(order[batch_of == m], rows, learners) for m in range(minibatches)]
    size = max(len(part) for shares in parts for part in shares)
    places = np.full((learners, minibatches, size), -1)
    for m, shares in enumerate(parts):
        for learner, part in enumerate(shares):
            places[learner, m, : len(part)] = part
    table = _table(rows, places.reshape(-1), padding)
    table[WEIGHT] *= minibatches
    return TrainBatch(MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(table)}, env_steps=int(steps.sum())), size)


def _shared(members: NDArray[np.int64], rows: Sequence[Row], learners: int) -> list[list[int]]:
    """A minibatch in shares of nearly as many tokens."""
    shares: list[list[int]] = [[] for _ in range(learners)]
    tokens = [0] * learners
    for i in sorted(members.tolist(), key=lambda i: -len(rows[i][0].ids)) if learners > 1 else members.tolist():
        least = tokens.index(min(tokens))
        shares[least].append(i)
        tokens[least] += len(rows[i][0].ids)
    return shares


def _table(rows: Sequence[Row], places: NDArray[np.int64], padding: int) -> dict[str, NDArray[Any]]:
    """Columns of the rows at `places`; -1 is a row of nothing."""
    T, K = (max(sizes) for sizes in zip(*((len(r.ids), r.decisions) for r, _ in rows), strict=True))
    n = len(places)
    table: dict[str, NDArray[Any]] = {Columns.OBS: np.full((n, T), padding, np.int32), LENGTH: np.zeros(n, np.int32)}
    if rows[0][0].asks is not None:
        table[ASKS] = np.zeros((n, T), np.int32)
    for name, like in rows[0][1].items():
        table[name] = np.zeros((n, K, *like.shape[1:]), like.dtype)
    for at, i in enumerate(places):
        if i < 0:
            continue
        reading, columns = rows[i]
        table[Columns.OBS][at, : len(reading.ids)] = reading.ids
        table[LENGTH][at] = len(reading.ids)
        if reading.asks is not None:
            table[ASKS][at, : len(reading.ids)] = reading.asks
        for name, values in columns.items():
            table[name][at, : len(values)] = values
    return table
