"""The contract of every benchmark: text in, text out, one task per reset, an outcome in [0, 1].

A benchmark is a `gymnasium.Env` whose `reset(seed=..., options={"task": "<name>"})` starts the named task.
What always holds:

* observation and action are strings (`text_space()`), the first observation does not repeat the task text;
* `info` after `reset` has `task` and `task_text`; after `reset` and `step` it has `score` (the benchmark's own
  scale), `success` (bool), `outcome` (float in [0, 1], u in the method) and `moves` (steps taken so far);
* `terminated` means that the benchmark ended the episode, `truncated` that our own step limit did;
* what costs time comes only when asked for: `options={"admissible": True}` adds `info["admissible"]` (tuple of
  str) to each reset and step, `options={"expert_plan": True}` adds `info["expert_plan"]` (tuple of str) to reset;
  a plan is for simulated models alone, and an environment may have none;
* without a task, `reset` starts a training task that the seed picks; a `step` outside an episode is `ResetNeeded`;
* same task, same seed, same actions: the same texts, scores and flags;
* which is why nothing is computed twice that other episodes have met before (`bopo_ray.recall`); a class attribute
  `repeatable = False` says that the promise above can't be kept;
* a class attribute `instant = True` says that `reset` and `step` take microseconds and wait for nothing, as pure Python
  may: then they are called on the thread on which all episodes of a process take turns, and not in one of their own;
* a class attribute `action_form = "code"` says that an action is code, which may have lines; else it is one line;
* a class attribute `footprint_mb = (a, b)` says that n environments of a process take a + b * n MB with their engines
  (Linux's proportional set size, at its highest), so that Ray puts no more on a machine than fits;
* a dead or hung engine raises `EngineError`; the next `reset` starts a fresh one.

`python -m pytest tests/integration/test_env_contract.py --env-id my_package.my_module:MyEnv-v0` checks all this.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from gymnasium import spaces

__all__ = ["Split", "Task", "TextEnv", "text_space"]


class Split(StrEnum):
    """The three disjoint task lists of a benchmark."""

    TRAIN = "train"
    """Tasks the router learns on."""
    DEV = "dev"
    """Tasks for choosing settings."""
    TEST = "test"
    """Tasks for the final figures only."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a benchmark."""

    env_id: str
    """Gymnasium id of the benchmark, e.g. "ScienceWorld-v0"."""
    name: str
    """Unique in the benchmark, e.g. "boil/3": the kind and the variation."""
    split: Split
    """The official list that it belongs to."""

    @property
    def kind(self) -> str:
        """The task type, e.g. "boil"."""
        return self.name.rpartition("/")[0]


@runtime_checkable
class TextEnv(Protocol):
    """What a benchmark's class offers beyond `gymnasium.Env`."""

    max_steps: int
    """Agent steps per episode."""
    action_guide: str
    """How an agent acts here, for its system prompt."""

    @classmethod
    def tasks(cls, split: Split) -> tuple[Task, ...]:
        """All tasks of a split, in the benchmark's own order. A class method `label()`, where there is one, says in
        results which tasks these are; `ready()` raises ConfigError where something that it needs is not installed."""
        ...


class _AnyText(spaces.Text):
    """`spaces.Text` that admits any character: observations may hold tabs, degrees and accents."""

    def contains(self, x: object) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length


def text_space(max_length: int = 65_536) -> spaces.Text:
    """A space of strings of at most `max_length` characters (sampling draws printable ASCII)."""
    return _AnyText(max_length=max_length, min_length=0, charset=string.printable)
