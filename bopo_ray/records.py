"""The records that travel between the parts: what to run, and what came of it.

Always true here: records are frozen and pickle; money is integer micro-dollars; the same spec has the same id
on every machine, so that a repeated episode is recognised and never counted twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from operator import attrgetter
from typing import Any

from envs.base import Task

__all__ = [
    "Budget", "CostMode", "Difficulty", "Episode", "EpisodeSpec", "Phase", "Question", "Step", "StopReason",
    "spawn_seed",
]  # fmt: skip


class _Record:
    """Travels as the call that makes it: field by field, as dataclasses do, an episode costs its runner three times as
    much."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), _fields(type(self))(self)  # type: ignore[arg-type]  # a class is hashable


@cache
def _fields(record: Any) -> Callable[[_Record], tuple[Any, ...]]:
    """Its fields, in the order of its arguments."""
    return attrgetter(*record.__match_args__)


class Difficulty(StrEnum):
    """The taxonomy of training tasks, by what the two boundary policies achieve."""

    EASY = "easy"
    """The small model alone mostly succeeds."""
    HARD = "hard"
    """Some success is known, but not from the small model as a rule."""
    INTRACTABLE = "intractable"
    """No rollout of either boundary policy has succeeded yet."""


class StopReason(StrEnum):
    """Why an episode ended."""

    SUCCESS = "success"
    """The benchmark says that the task is done."""
    FAILURE = "failure"
    """The benchmark ended the episode without success."""
    STEP_LIMIT = "step_limit"
    """Our own limit of agent steps."""
    BUDGET = "budget"
    """What is left can't pay for another call of any model, or for another attempt at the one that failed."""


class Phase(StrEnum):
    """What an episode was made for."""

    BOUNDARY = "boundary"
    """Always-small and always-large on training tasks."""
    STRATIFIED = "stratified"
    """P(LARGE) = k/N on Hard tasks, for BoSFT."""
    POLICY = "policy"
    """Rollouts of the policy that BoPO trains."""
    SELECTION = "selection"
    """Rollouts on dev tasks, by which it is chosen what is evaluated."""
    EVALUATION = "evaluation"
    """Rollouts on held-out tasks; a learned router's are greedy or sampled, as the run's settings say."""


class CostMode(StrEnum):
    """The unit of cost, c in Eq. (1)."""

    CALLS = "calls"
    """1 for a call of any model above the smallest, 0 for the smallest."""
    USD = "usd"
    """Measured tokens at list prices, in micro-dollars."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A hard cap per episode, B_max in Eq. (9)."""

    mode: CostMode
    """The unit of `cap`."""
    cap: int
    """Large calls, or micro-dollars; at least 0."""


def spawn_seed(*parts: object) -> int:
    """A seed in [0, 2^63) that depends on all of `parts` and on nothing else (not on PYTHONHASHSEED)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True)
class EpisodeSpec(_Record):
    """One episode to run."""

    task: Task
    phase: Phase
    policy: str
    """The router's name, e.g. "always-small", "random(0.3)", "bopo-hybrid lam=0.3 seed=0 it=4"."""
    group: int
    """Index of the group of episodes of one task that are compared with each other."""
    member: int
    """Index in the group: each member makes the router's draws of its own."""
    seed: int
    """The run's seed."""
    greedy: bool = False
    """Take the router's most probable model instead of sampling."""
    budget: Budget | None = None
    router: str = "learned"
    """How the choices are made: a fixed router's name, or "learned" for the module that the runner holds."""
    sample: int | None = None
    """Sample index of the model calls; None: the member's index."""

    @property
    def id(self) -> str:
        """Unique and reproducible: a file or a retry that holds the same id holds the same episode."""
        cap = f"{self.budget.mode}:{self.budget.cap}" if self.budget else "-"
        return "|".join(
            map(
                str,
                (
                    self.task.env_id,
                    self.task.name,
                    self.phase,
                    self.policy,
                    self.group,
                    self.member,
                    self.seed,
                    int(self.greedy),
                    cap,
                    "-" if self.sample is None else self.sample,
                ),
            )
        )

    @property
    def stream(self) -> int:
        """Seed of this episode's own random stream.

        Without the policy and the group: policies that are compared draw common random numbers, so that their
        difference is less noisy and what they do alike is paid once.
        """
        return spawn_seed(self.task.env_id, self.task.name, self.phase, self.member, self.sample, self.seed)

    @property
    def call_sample(self) -> int:
        """Sample index of the model calls."""
        return self.member if self.sample is None else self.sample


@dataclass(frozen=True, slots=True)
class Question(_Record):
    """What a router's question to the smallest model, before a step, came to; the fields are those of `Step`."""

    reply: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_microusd: int
    lost_microusd: int
    latency_s: float


@dataclass(frozen=True, slots=True)
class Step(_Record):
    """One decision of the router, the model call it led to and what the environment answered.

    What the router saw is not stored with each step: `bopo_ray.agent.episode_views` rebuilds it.
    """

    model: int
    """Index of the chosen model, 0 is the smallest."""
    probabilities: tuple[float, ...]
    """The router's distribution over models, after the budget mask."""
    mask: tuple[bool, ...]
    """Which models the budget could pay for."""
    reply: str
    """The model's whole reply."""
    action: str
    """The environment action read from it; empty when none could be read."""
    observation: str
    """The environment's answer."""
    prompt_tokens: int
    cached_tokens: int
    """Part of `prompt_tokens` that was billed at the cached price."""
    completion_tokens: int
    cost_microusd: int
    """Of those tokens, at the model's price."""
    lost_microusd: int
    """Worst case of attempts at this call whose reply never came and which may have been charged."""
    latency_s: float
    """Seconds of the model call."""
    router_s: float
    """Seconds of router compute that this decision took."""
    question: Question | None = None
    """What the router asked a model before it decided; None for those that ask nobody."""

    @property
    def total_microusd(self) -> int:
        """Of the call and of the router's question."""
        return self.cost_microusd + (self.question.cost_microusd if self.question else 0)

    @property
    def charged_microusd(self) -> int:
        """What a budget counts."""
        return self.total_microusd + self.lost_microusd + (self.question.lost_microusd if self.question else 0)


@dataclass(frozen=True, slots=True)
class Episode(_Record):
    """One finished episode."""

    spec: EpisodeSpec
    task_text: str
    """The benchmark's task description."""
    first_observation: str
    max_steps: int
    """The step limit that held."""
    steps: tuple[Step, ...]
    outcome: float
    """u in [0, 1]."""
    success: bool
    score: float
    """On the benchmark's own scale."""
    stop: StopReason

    @property
    def cost_microusd(self) -> int:
        """C(tau) of Eq. (1) in `usd` mode, the router's questions included."""
        return sum(s.total_microusd for s in self.steps)

    @property
    def calls(self) -> int:
        """Model calls, the router's questions included."""
        return len(self.steps) + sum(s.question is not None for s in self.steps)

    @property
    def large_calls(self) -> int:
        """C(tau) of Eq. (1) in `calls` mode: calls of any model but the smallest."""
        return sum(s.model > 0 for s in self.steps)

    def cost(self, mode: CostMode) -> int:
        """C(tau) in the unit of `mode`."""
        return self.cost_microusd if mode is CostMode.USD else self.large_calls
