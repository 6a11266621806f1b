"""The paper's MDP: the action is the model that writes the next agent action.

What always holds: an episode's cost is the sum of its calls' measured costs; with a budget, no call is made whose
worst case the budget can't pay (Eq. 9), so the cap is never exceeded; a call whose model is masked is made by the
best model that can be paid.
"""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym
import numpy as np

from bopo_ray.agent import FEEDBACK, Turn, budget_text, chat_messages, parse_action, router_view
from bopo_ray.method.budget import affordable_mask, remaining
from bopo_ray.models.pricing import Usage
from bopo_ray.models.protocol import Message, ModelPool, Request
from bopo_ray.records import Budget, CostMode, StopReason
from envs.base import text_space

__all__ = ["RoutingEnv"]


class RoutingEnv(gym.Env[str, np.int64]):
    """Routes one text environment over a pool of models.

    Observation: the router's text view (task, remaining budget, history). Action: index into the pool.
    Reward: the outcome u in [0, 1] at the end, 0 before. `reset(options=...)` takes `task` (name), `sample`
    (sample index of all calls) and `budget` (`Budget` or None). `info` after `reset`: task, task_text,
    first_observation, action_mask.
    `info` after `step`: model, reply, action, observation, prompt_tokens, cached_tokens, completion_tokens,
    cost_microusd, latency_s, action_mask (of the next decision), score, success, outcome, and `stop`
    (StopReason) at the end.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's own form)

    def __init__(
        self,
        env: gym.Env[str, str],
        pool: ModelPool,
        *,
        temperature: float = 0.7,
        max_completion_tokens: int = 128,
        max_prompt_tokens: int = 8192,
    ) -> None:
        self.env = env
        self.pool = pool
        self.temperature = temperature
        self.max_completion_tokens = max_completion_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self.guide: str = getattr(env.unwrapped, "action_guide", "")
        self.max_steps: int = getattr(env.unwrapped, "max_steps", 40)
        self.observation_space = text_space()
        self.action_space = gym.spaces.Discrete(len(pool))
        self._needs_reset = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Starts an episode; raises EngineError (retry), UnknownTaskError (don't)."""
        self._needs_reset = True
        super().reset(seed=seed)
        options = options or {}
        env_options = {"expert_plan": self.pool.needs_plan}
        if "task" in options:
            env_options["task"] = options["task"]
        observation, info = self.env.reset(seed=seed, options=env_options)
        self._task, self._task_text = str(info["task"]), str(info["task_text"])
        self._first, self._plan = observation, tuple(info.get("expert_plan", ()))
        self._sample = int(options.get("sample", 0))
        self._budget: Budget | None = options.get("budget")
        self._spent = 0
        self._turns: list[Turn] = []
        self._last = info
        self._needs_reset = False
        self._prepare()
        return self._view(), {
            "task": self._task,
            "task_text": self._task_text,
            "first_observation": observation,
            "action_mask": self._mask,
        }

    def step(self, action: np.int64 | int) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """One model call and one environment step.

        Raises ModelError when the call fails (nothing was spent, it may be stepped again), EngineError when the
        environment does (the episode is lost: reset).
        """
        if self._needs_reset:
            raise gym.error.ResetNeeded("Cannot call env.step() before calling env.reset() or after the episode ended.")
        if not any(self._mask):
            return self._finish(StopReason.BUDGET, {})
        index = max((i for i in range(len(self.pool)) if self._mask[i] and i <= int(action)), default=-1)
        if index < 0:
            index = self._mask.index(True)
        model = self.pool.models[index]
        started = time.perf_counter()
        reply = model.complete(
            Request(self._messages, self._sample, self.temperature, self.max_completion_tokens, self._task, self._plan)
        )
        cost = model.price.cost(reply.usage)
        self._spent += cost if self._budget is None or self._budget.mode is CostMode.USD else int(index > 0)
        act = parse_action(reply.text)
        terminated = truncated = False
        if act:
            self._needs_reset = True
            observation, _, terminated, truncated, self._last = self.env.step(act)
            self._needs_reset = False
        else:
            observation = FEEDBACK
        self._turns.append(Turn(reply.text, act, observation))
        truncated = truncated or (len(self._turns) >= self.max_steps and not terminated)
        info = {
            "model": index,
            "reply": reply.text,
            "action": act,
            "observation": observation,
            "prompt_tokens": reply.usage.prompt_tokens,
            "cached_tokens": reply.usage.cached_tokens,
            "completion_tokens": reply.usage.completion_tokens,
            "cost_microusd": cost,
            "latency_s": reply.latency_s or (time.perf_counter() - started if not model.needs_plan else 0.0),
        }
        if terminated or truncated:
            success = bool(self._last["success"])
            stop = StopReason.SUCCESS if success else StopReason.FAILURE if terminated else StopReason.STEP_LIMIT
            return self._finish(stop, info)
        self._prepare()
        return self._view(), 0.0, False, False, info | self._status()

    def close(self) -> None:
        """Closes the benchmark."""
        self.env.close()

    def _prepare(self) -> None:
        """Builds the next prompt and decides which models it could be sent to."""
        self._messages: tuple[Message, ...] = chat_messages(
            self._task_text, self._first, self._turns, self.guide, self.max_prompt_tokens, self.pool.models[0].count
        )
        if self._budget is None:
            self._mask: tuple[bool, ...] = (True,) * len(self.pool)
            return
        worst = [m.price.cost(Usage(m.count(self._messages), self.max_completion_tokens)) for m in self.pool.models]
        self._mask = affordable_mask(self._budget.mode, remaining(self._budget.cap, self._spent), worst)

    def _view(self) -> str:
        budget = budget_text(self._budget, self._spent)
        return router_view(self._task_text, self._first, self._turns, self.max_steps - len(self._turns), budget)

    def _status(self) -> dict[str, Any]:
        return {"action_mask": self._mask} | {k: self._last[k] for k in ("score", "success", "outcome")}

    def _finish(self, stop: StopReason, info: dict[str, Any]) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._needs_reset = True
        terminated = stop in (StopReason.SUCCESS, StopReason.FAILURE)
        outcome = float(self._last["outcome"])
        return self._view(), outcome, terminated, not terminated, info | self._status() | {"stop": stop}
