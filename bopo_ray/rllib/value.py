"""The value of always-small as the small router reads it: logistic regression on the tokens of its view. [ours]

Linear, because it must hold on tasks that it has not seen: a transformer that learns the same from 90 games ranks the
states of others worse. What is in `bopo_ray.method.value` says what it learns from.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bopo_ray.agent import episode_views
from bopo_ray.method.value import small_tail
from bopo_ray.models.tokens import CLS, PAD, SEP, tokenizer
from bopo_ray.records import Episode
from bopo_ray.rllib.encode import encode_view

__all__ = ["NEAR", "SECTIONS", "BoundaryValue", "fit_value", "rank_quality"]

SECTIONS = 4
"""Of a reading: task, budget, older history, newest history. A token counts for itself in each."""
NEAR = 24
"""Tokens of the newest history."""


class BoundaryValue(NamedTuple):
    """logit P(SMALL alone wins from here on) = bias + the sum of the weights of a reading's tokens."""

    weights: NDArray[np.float32]
    """[SECTIONS * vocabulary]"""
    bias: float
    states: int
    """That it was fitted to."""


def fit_value(episodes: Iterable[Episode], context: int, strength: float) -> BoundaryValue | None:
    """Fits the value to the tails of training episodes that SMALL wrote alone.

    Args:
        episodes: of any routing; those that end with a larger model say nothing.
        context: tokens of a reading.
        strength: inverse of the L2 penalty, as scikit-learn's C.

    Returns:
        The value; None where no tail, or none but of one outcome, is there to tell by.
    """
    from scipy.sparse import csr_matrix  # with scikit-learn it takes a second, and most processes never need it
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    columns, labels, weights = [], list[bool](), list[float]()
    for episode in episodes:
        if tail := small_tail(episode):
            columns += [_columns(encode_view(v, context)) for v in episode_views(episode)[tail.start :]]
            labels += [tail.success] * len(tail.weights)
            weights += tail.weights
    if len(set(labels)) < 2:
        return None
    places = np.concatenate(columns), np.cumsum([0, *map(len, columns)])
    size = SECTIONS * tokenizer().get_vocab_size()
    counts = csr_matrix((np.ones(len(places[0]), np.float32), *places), shape=(len(labels), size))
    counts.sum_duplicates()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough: its ranks are what counts
        model = LogisticRegression(C=strength, max_iter=200).fit(counts, labels, sample_weight=weights)
    return BoundaryValue(model.coef_[0].astype(np.float32), float(model.intercept_[0]), len(labels))


def rank_quality(value: BoundaryValue, episodes: Iterable[Episode], context: int) -> float:
    """How well it ranks hand-overs, the first states of tails behind a larger model's call: the probability that one
    that SMALL won has the higher value than one that it lost (AUC). NaN without both.
    """
    from sklearn.metrics import roc_auc_score

    values, labels = list[float](), list[bool]()
    for episode in episodes:
        tail = small_tail(episode)
        if tail and tail.start:
            ids = encode_view(episode_views(episode)[tail.start], context)
            values.append(float(value.weights[_columns(ids)].sum()))
            labels.append(tail.success)
    return float(roc_auc_score(labels, values)) if len(set(labels)) == 2 else float("nan")


def _columns(ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """The weights that a reading's tokens have."""
    ids = ids[ids != tokenizer().token_to_id(PAD)].astype(np.int64)
    ids[0] = tokenizer().token_to_id(CLS)  # the step, which the budget line says as well
    section = np.minimum(np.cumsum(ids == tokenizer().token_to_id(SEP)), 2)
    start = int((section < 2).sum())
    section[start : start + NEAR] = SECTIONS - 1
    return section * tokenizer().get_vocab_size() + ids
