"""Stored episodes, decided again by a saved router."""

from __future__ import annotations

import numpy as np
import pytest

from bopo_ray import Budget, CostMode, Decision, History, SavedRouter
from bopo_ray.records import Episode


def replayed(router: SavedRouter, episode: Episode) -> list[Decision]:
    """What the router decides at each step of a stored episode."""
    decisions, budget, spent = list[Decision](), episode.spec.budget, 0
    seed = None if episode.spec.greedy else episode.spec.stream
    if budget is None or budget.mode is CostMode.CALLS:
        calls = None if budget is None else budget.cap
        routed = router.begin(
            episode.task_text, episode.first_observation, max_steps=episode.max_steps, calls=calls, seed=seed
        )
        for step in episode.steps:
            decisions.append(routed.decide(step.mask))
            routed.after(step.action, step.observation, step.model)
        return decisions
    history = History(episode.task_text, episode.first_observation, episode.max_steps)
    for step in episode.steps:
        left = Budget(budget.mode, budget.cap - spent)
        decisions.append(router.decide(history, left, mask=step.mask, seed=seed))
        history = history.after(step.action, step.observation)
        spent += step.charged_microusd
    return decisions


def agree(router: SavedRouter, episode: Episode) -> int:
    """Fails where a replayed decision is another; returns how many there were."""
    decisions = replayed(router, episode)
    for step, decision in zip(episode.steps, decisions, strict=True):
        assert decision.probabilities == pytest.approx(step.probabilities, abs=1e-5)
        if not episode.spec.greedy or abs(np.diff(step.probabilities)).min() > 1e-4:
            assert decision.model == step.model
    return len(decisions)
