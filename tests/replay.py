"""Stored episodes, decided again by a saved router."""

from __future__ import annotations

import numpy as np
import pytest

from bopo_ray import Budget, CostMode, Decision, History, SavedRouter
from bopo_ray.records import Episode


def replayed(router: SavedRouter, episode: Episode) -> list[Decision]:
    """What the router decides at each step of a stored episode."""
    history = History(episode.task_text, episode.first_observation, episode.max_steps)
    decisions, budget, spent = [], episode.spec.budget, 0
    seed = None if episode.spec.greedy else episode.spec.stream
    for step in episode.steps:
        left = budget and Budget(budget.mode, budget.cap - spent)
        decisions.append(router.decide(history, left, mask=step.mask, seed=seed))
        history = history.after(step.action, step.observation)
        if budget is not None:
            spent += step.charged_microusd if budget.mode is CostMode.USD else int(step.model > 0)
    return decisions


def agree(router: SavedRouter, episode: Episode) -> int:
    """Fails where a replayed decision is another; returns how many there were."""
    decisions = replayed(router, episode)
    for step, decision in zip(episode.steps, decisions, strict=True):
        assert decision.probabilities == pytest.approx(step.probabilities, abs=1e-5)
        if not episode.spec.greedy or abs(np.diff(step.probabilities)).min() > 1e-4:
            assert decision.model == step.model
    return len(decisions)
