"""The paper's MDP: the action is the model that writes the next agent action.

What always holds: an episode's cost is the sum of its calls' measured costs, whether they were paid for now or had
been stored; with a budget, each call's worst case is reserved before it is made and settled by the measured usage
(Eq. 9), so the cap is never exceeded, by all tries of an episode together (`Tab`); a call whose model is masked is
made by the best model that can be paid; what a budget has spent is in the steps, also when it ran out between the
attempts at a call: that step has no tokens, no reply and no observation, and says what its attempts may have been
charged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import gymnasium as gym
import numpy as np

from bopo_ray.agent import (
    FEEDBACK,
    Turn,
    budget_text,
    chat_messages,
    parse_action,
    parse_code,
    question_messages,
    router_view,
)
from bopo_ray.errors import ConfigError
from bopo_ray.lanes import aside
from bopo_ray.method.budget import Ledger, affordable_mask
from bopo_ray.models.desk import Answer, BudgetSpent, Desk
from bopo_ray.models.pricing import Usage
from bopo_ray.models.protocol import LanguageModel, Message, ModelPool, Request
from bopo_ray.models.tokens import prompt_tokens
from bopo_ray.records import Budget, CostMode, Question, StopReason
from envs.base import text_space

__all__ = ["RoutingEnv", "Tab"]

R = TypeVar("R")
PLAUSIBLE = 8
"""A bill for less than such a part of the model's own bound says nothing about the next prompt: one that was refused
costs nothing, and some endpoints leave cached tokens out. Of text, a token has three to six bytes."""


class _Charge(NamedTuple):
    """What the tries of an episode have been charged for one call, in micro-dollars."""

    cost: int
    """Of the reply; the next try gets it from the store."""
    lost: int
    """Worst case of attempts whose reply never came."""
    answered: bool


class Tab:
    """What the tries of one episode have been charged under a budget in dollars, by call.

    As a rule a try makes the calls of the failed one before it again and gets the paid replies from the store. Each
    counts when it is asked for, and so does what was lost at it: nothing counts twice, and the steps are those of one
    try whose calls took more attempts. For a try that makes another call, whatever else the earlier ones were charged
    is kept aside: it stands in no step, and can't be spent again. A budget of calls needs no tab, since a call is one
    however many attempts it takes.
    """

    def __init__(self) -> None:
        self._due: dict[tuple[Any, ...], _Charge] = {}
        """By calls of earlier tries that this one has not made."""
        self._counted: dict[tuple[Any, ...], _Charge] = {}
        """By those that it has made, and what is kept aside."""

    def begin(self) -> None:
        """Another try."""
        self._due |= self._counted
        self._counted = {}

    def take(self, call: tuple[Any, ...]) -> tuple[int, int]:
        """What earlier tries lost at `call`, and what is now to be kept aside: nothing where its reply is paid."""
        charge = self._due.pop(call, _Charge(0, 0, False))
        if charge.answered:
            return charge.lost, 0
        self._counted |= self._due
        kept = sum(c.cost + c.lost for c in self._due.values())
        self._due = {}
        return charge.lost, kept

    def count(self, call: tuple[Any, ...], cost: int, lost: int, answered: bool) -> None:
        """`call` was made, and it and earlier attempts at it have been charged so much."""
        before = self._counted.get(call, _Charge(0, 0, False))
        self._counted[call] = _Charge(before.cost + cost, before.lost + lost, answered)


class RoutingEnv(gym.Env[str, np.int64]):
    """Routes one text environment over a pool of models.

    Observation: the router's text view (task, remaining budget, history). Action: index into the pool.
    Reward: the outcome u in [0, 1] at the end, 0 before. `reset(options=...)` takes `task` (name), `sample`
    (sample index of all calls), `budget` (`Budget` or None) and `tab` (`Tab`, one for all tries of an episode). `info`
    after `reset`: task, task_text, first_observation, action_mask.
    `info` after `step`: model, reply, action, observation, prompt_tokens, cached_tokens, completion_tokens,
    cost_microusd, lost_microusd, latency_s, question (`Question`, None unless `ask` was called before),
    action_mask (of the next decision), score, success, outcome, and `stop`
    (StopReason) at the end.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's own form)

    def __init__(
        self,
        env: gym.Env[str, str],
        pool: ModelPool,
        desk: Desk | None = None,
        *,
        temperature: float = 0.7,
    ) -> None:
        """
        Args:
            env: the benchmark; called in a thread of its own but for one that is `instant` (see `envs.base`), or has
                `gives_way = True`, which waits by `bopo_ray.lanes` where it has to.
            pool: who may write its actions.
            desk: where calls are made and billed; by default one that stores nothing.
            temperature: of models whose `sampling` names none.
        """
        self.env = env
        self._on_the_spot = bool(getattr(env, "gives_way", False) or getattr(env.unwrapped, "instant", False))
        self.pool = pool
        self.desk = desk or Desk()
        self.temperature = temperature
        self.max_prompt_tokens = min(m.sampling.max_prompt_tokens for m in pool.models)
        self.guide: str = getattr(env.unwrapped, "action_guide", "")
        self._parse = parse_code if getattr(env.unwrapped, "action_form", "text") == "code" else parse_action
        self.max_steps: int = getattr(env.unwrapped, "max_steps", 40)
        self.observation_space = text_space()
        self.action_space = gym.spaces.Discrete(len(pool))
        self._needs_reset = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Starts an episode; raises EngineError (retry), UnknownTaskError (don't), and ConfigError where the models
        follow an expert plan and the environment has none of the task."""
        self._needs_reset = True
        super().reset(seed=seed)
        options = options or {}
        env_options = {"expert_plan": self.pool.needs_plan}
        if "task" in options:
            env_options["task"] = options["task"]
        observation, info = self._asked(self.env.reset, seed=seed, options=env_options)
        self._task, self._task_text = str(info["task"]), _whole(info["task_text"])
        self._first, self._plan = _whole(observation), tuple(info.get("expert_plan", ()))
        if self.pool.needs_plan and not self._plan:
            raise ConfigError(
                f"the environment has no expert plan of its task {self._task!r} (info['expert_plan'] of reset), which "
                "simulated models follow; name real models with --small and --large, or with --models"
            )
        self._sample = int(options.get("sample", 0))
        self._budget: Budget | None = options.get("budget")
        self._ledger = Ledger(self._budget.cap) if self._budget else None
        self._tab: Tab = options.get("tab") or Tab()
        self._tab.begin()
        self._billed: dict[int, tuple[tuple[Message, ...], int]] = {}
        self._turns: list[Turn] = []
        self._last = info
        self._needs_reset = False
        self._prepare()
        return self._view(), {
            "task": self._task,
            "task_text": self._task_text,
            "first_observation": self._first,
            "action_mask": self._mask,
        }

    def step(self, action: np.int64 | int) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """One model call and one environment step.

        Raises ModelError when the call fails (only what may have been charged was spent, it may be stepped again),
        EngineError when the environment does (the episode is lost: reset).
        """
        if self._needs_reset:
            raise gym.error.ResetNeeded("Cannot call env.step() before calling env.reset() or after the episode ended.")
        if not any(self._mask):
            return self._finish(StopReason.BUDGET, _unanswered(0, 0, self._question) if self._question else {})
        index = max((i for i in range(len(self.pool)) if self._mask[i] and i <= int(action)), default=-1)
        if index < 0:
            index = self._mask.index(True)
        try:
            answer = self._call(index)
        except BudgetSpent as error:
            paid = error.lost or self._question
            return self._finish(StopReason.BUDGET, _unanswered(index, error.lost, self._question) if paid else {})
        reply = answer.reply
        act = self._parse(reply.text)
        terminated = truncated = False
        if act:
            self._needs_reset = True
            text, _, terminated, truncated, self._last = self._asked(self.env.step, act)
            observation = _whole(text)
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
            "cost_microusd": answer.cost,
            "lost_microusd": answer.lost,
            "latency_s": reply.latency_s,
            "question": self._question,
        }
        if terminated or truncated:
            success = bool(self._last["success"])
            stop = StopReason.SUCCESS if success else StopReason.FAILURE if terminated else StopReason.STEP_LIMIT
            return self._finish(stop, info)
        self._prepare()
        return self._view(), 0.0, False, False, info | self._status()

    def ask(self, question: str) -> str:
        """The smallest model's reply to a router's question about its view; its cost is part of the next step's.

        Empty when the budget can't pay for it and for a step of the smallest model after it. Raises ModelError when
        the call fails, and ValueError for a second question before the step.
        """
        if self._question is not None:
            raise ValueError("a router may ask one question before each step")
        model, ledger = self.pool.models[0], None
        messages = question_messages(question, self._view(), self.max_prompt_tokens, prompt_tokens)
        bound = model.bound(messages)
        if self._budget is not None and self._budget.mode is CostMode.USD and self._ledger is not None:
            ledger = self._ledger
            if ledger.remaining < self._worst(0, bound) + self._worst(0, self._bound(0)):
                return ""
        request = Request(
            messages, self._sample, self._temperature(model), model.sampling.max_completion_tokens, self._task,
            self._plan,
        )  # fmt: skip
        try:
            answer = self._paid(0, request, bound, ledger)
        except BudgetSpent as error:
            self._question = Question("", 0, 0, 0, 0, error.lost, 0.0) if error.lost else None
            self._remask()
            return ""
        u = answer.reply.usage
        self._question = Question(
            answer.reply.text, u.prompt_tokens, u.cached_tokens, u.completion_tokens, answer.cost, answer.lost,
            answer.reply.latency_s,
        )  # fmt: skip
        self._remask()
        return answer.reply.text

    @property
    def mask(self) -> tuple[bool, ...]:
        """Which models the rest of the budget can pay for, at the next step."""
        return self._mask

    def close(self) -> None:
        """Closes the benchmark."""
        self.env.close()

    def _asked(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """What the benchmark returns."""
        return function(*args, **kwargs) if self._on_the_spot else aside(function, *args, **kwargs)

    def _call(self, index: int) -> Answer:
        """One call of model `index`; in `calls` mode it takes one from the budget unless it fails."""
        model, ledger = self.pool.models[index], self._ledger
        request = Request(
            self._messages, self._sample, self._temperature(model), model.sampling.max_completion_tokens, self._task,
            self._plan,
        )  # fmt: skip
        if ledger is None or self._budget is None or self._budget.mode is CostMode.USD:
            answer = self._paid(index, request, self._bound(index), ledger)
        else:
            handle = ledger.reserve(int(index > 0))
            assert handle is not None, "the mask holds"
            try:
                answer = self.desk.call(model, request, self._bound(index))
            except BaseException:
                ledger.release(handle)
                raise
            ledger.settle(handle, handle.amount)
        tokens = answer.reply.usage.prompt_tokens
        if PLAUSIBLE * tokens >= model.bound(self._messages):
            self._billed[index] = self._messages, tokens
        return answer

    def _paid(self, index: int, request: Request, bound: int, budget: Ledger | None) -> Answer:
        """A call of model `index` for which `budget` pays; what earlier tries lost at it is lost in this one, too."""
        model = self.pool.models[index]
        if budget is None:
            return self.desk.call(model, request, bound)
        answer: Answer | None = None
        call, before = (index, request.messages), budget.spent
        lost, kept = self._tab.take(call)
        # It fits, since all tries stay below the cap together, unless the store has lost what was paid.
        if handle := budget.reserve(min(lost, budget.remaining)):
            budget.settle(handle, handle.amount)
        budget.reserve(min(kept, budget.remaining))
        try:
            answer = self.desk.call(model, request, bound, budget)
        except BudgetSpent as error:
            raise BudgetSpent(lost + error.lost) from None
        finally:
            cost = 0 if answer is None else answer.cost
            self._tab.count(call, cost, budget.spent - before - cost, answer is not None)
        return dataclasses.replace(answer, lost=lost + answer.lost)

    def _temperature(self, model: LanguageModel) -> float:
        return self.temperature if model.sampling.temperature is None else model.sampling.temperature

    def _bound(self, index: int) -> int:
        """Prompt tokens that model `index` can bill for the next prompt: what it billed for its beginning in this
        episode, if that can be (`PLAUSIBLE`), and the model's own bound for the rest."""
        model = self.pool.models[index]
        start, tokens = self._billed.get(index, ((), 0))
        if start and self._messages[: len(start)] == start:
            return tokens + model.bound(self._messages[len(start) :])
        return model.bound(self._messages)

    def _prepare(self) -> None:
        """Builds the next prompt and decides which models it could be sent to."""
        self._messages: tuple[Message, ...] = chat_messages(
            self._task_text, self._first, self._turns, self.guide, self.max_prompt_tokens, prompt_tokens
        )
        self._question: Question | None = None
        self._remask()

    def _worst(self, index: int, prompt_bound: int) -> int:
        """Micro-dollars that a call of model `index` may cost."""
        model = self.pool.models[index]
        return model.price.cost(Usage(prompt_bound, model.sampling.max_completion_tokens))

    def _remask(self) -> None:
        if self._budget is None or self._ledger is None:
            self._mask: tuple[bool, ...] = (True,) * len(self.pool)
            return
        worst = [self._worst(i, self._bound(i)) for i in range(len(self.pool))]
        self._mask = affordable_mask(self._budget.mode, self._ledger.remaining, worst)

    def _view(self) -> str:
        budget = budget_text(self._budget, self._ledger.spent if self._ledger else 0)
        return router_view(self._task_text, self._first, self._turns, self.max_steps - len(self._turns), budget)

    def _status(self) -> dict[str, Any]:
        return {"action_mask": self._mask} | {k: self._last[k] for k in ("score", "success", "outcome")}

    def _finish(self, stop: StopReason, info: dict[str, Any]) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._needs_reset = True
        terminated = stop in (StopReason.SUCCESS, StopReason.FAILURE)
        outcome = float(self._last["outcome"])
        return self._view(), outcome, terminated, not terminated, info | self._status() | {"stop": stop}


def _whole(text: Any) -> str:
    """What a benchmark says, as it can be counted, stored and sent: half of a surrogate pair can't."""
    return str(text).encode("utf-8", "replace").decode()


def _unanswered(index: int, lost: int, question: Question | None) -> dict[str, Any]:
    """The step of a call of model `index` that no reply came to, and no budget was left to ask (again)."""
    return {
        "model": index, "reply": "", "action": "", "observation": "", "prompt_tokens": 0, "cached_tokens": 0,
        "completion_tokens": 0, "cost_microusd": 0, "lost_microusd": lost, "latency_s": 0.0,
        "question": question,
    }  # fmt: skip
