"""A finished episode step by step, for people: what the router saw, what it chose, what that brought and cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bopo_ray.agent import episode_views
from bopo_ray.records import Episode
from bopo_ray.rllib.encode import visible

__all__ = ["step_records"]


def step_records(episode: Episode, models: Sequence[str], router_tokens: int | None = None) -> list[dict[str, Any]]:
    """One record per step: view, model, large, p_large, masked, reply, action, observation, tokens and dollars.

    Args:
        episode: as stored.
        models: their names, the smallest first.
        router_tokens: context of the router; the view is what fits into it, or all of it for None.
    """
    spent, records = 0, []
    for step, view in zip(episode.steps, episode_views(episode), strict=True):
        spent += step.total_microusd
        records.append(
            {
                "view": visible(_valid(view), router_tokens) if router_tokens else view,
                "model": models[step.model] if step.model < len(models) else f"model {step.model}",
                "large": step.model > 0,
                "p_large": sum(step.probabilities[1:]),
                "masked": not all(step.mask),
                "reply": step.reply,
                "action": step.action,
                "observation": step.observation,
                "prompt_tokens": step.prompt_tokens,
                "completion_tokens": step.completion_tokens,
                "cost_usd": step.total_microusd / 1e6,
                "spent_usd": spent / 1e6,
            }
        )
    return records


def _valid(text: str) -> str:
    """Without lone surrogates, which no tokenizer reads."""
    return text.encode(errors="replace").decode()
