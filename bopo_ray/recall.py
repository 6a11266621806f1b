"""What a benchmark has said before is not computed again.

Most episodes of a run repeat others: the members of a group that choose alike, a router under two offsets, two routers
on an Easy task. Their model calls are answered from the store, and their environment steps from here: by the contract
of a benchmark the same task, seed and actions give the same texts, scores and flags (`envs.base`).

Always true here: the engine is behind an episode, never elsewhere. It is not even started while all that an episode
meets is known; at the first action that is new it is given those that it has missed. So an episode costs no more engine
steps than it would alone, and one that repeats another costs none. A lane (`bopo_ray.lanes`) that meets what is known
has it on the spot, and gives way while its engine is asked.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym

from bopo_ray.lanes import aside
from envs.errors import EngineError

__all__ = ["RecallEnv", "Transcripts"]

MOST_BYTES = 48 << 20
"""Of what a process remembers, about."""
NODE_BYTES = 1500
"""Of a step, beside its action and what was said: the objects around them."""


@dataclass(eq=False, slots=True)
class _Moment:
    """A point that episodes of a task have come to."""

    said: tuple[Any, ...] | None = None
    """What `reset` or `step` returned there; None while nobody has been there."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by who finds out: others who come here wait, instead of asking their engines the same."""
    next: dict[str, _Moment] = field(default_factory=dict)
    """By action."""


class Transcripts:
    """What was said in a process's episodes, those of the tasks that were played last. Thread-safe."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._lock = most_bytes, threading.Lock()
        self._begins: OrderedDict[str, _Moment] = OrderedDict()
        self._bytes, self._all_bytes = dict[str, int](), 0

    def begin(self, key: str) -> _Moment:
        """The first moment of the episodes of this key."""
        with self._lock:
            moment = self._begins.setdefault(key, _Moment())
            self._begins.move_to_end(key)
            return moment

    def after(self, moment: _Moment, action: str) -> _Moment:
        """What this action leads to."""
        with self._lock:
            return moment.next.setdefault(action, _Moment())

    def grown(self, key: str, action: str, said: tuple[Any, ...]) -> None:
        """Counts a new moment and what was said there; forgets the tasks that nobody has begun for the longest time, if
        it is too much."""
        size = NODE_BYTES + len(action) + len(str(said))
        with self._lock:
            if key in self._begins:
                self._bytes[key] = self._bytes.get(key, 0) + size
                self._all_bytes += size
            while self._all_bytes > self._most and len(self._begins) > 1:
                self._forget(next(iter(self._begins)))

    def forget(self, key: str) -> None:
        """Forgets what was said in the episodes of this key."""
        with self._lock:
            self._forget(key)

    def _forget(self, key: str) -> None:
        self._begins.pop(key, None)
        self._all_bytes -= self._bytes.pop(key, 0)


class RecallEnv(gym.Wrapper[str, str, str, str]):
    """A benchmark whose episodes take from `Transcripts` what is known, see the module's docstring.

    A class attribute `repeatable = False` of the benchmark turns it off. Errors of the engine are the benchmark's, and
    come at the first step that needs it; besides, EngineError is raised when it says something else than before, and
    then nothing is known of that task any more.
    """

    gives_way = True

    def __init__(self, env: gym.Env[str, str], transcripts: Transcripts, name: str = "") -> None:
        """`name`: what tells this benchmark, and its arguments, from others in the same transcripts."""
        super().__init__(env)
        self._transcripts, self._name = transcripts, name
        self._repeatable = bool(getattr(env.unwrapped, "repeatable", True))
        self._path: list[tuple[str, _Moment]] = []
        """The episode: its actions, and what they led to."""
        self._remembers = self._over = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """As the benchmark's; an episode without a named task is not remembered."""
        self._start, self._path, self._over = (seed, options), [], False
        self._remembers = bool(self._repeatable and options and "task" in options)
        if not (self._remembers and options):
            return aside(self.env.reset, seed=seed, options=options)
        self._key = json.dumps([self._name, seed, sorted(options.items())], default=str)
        self._given = 0
        """Moments of the episode that the engine has come to; the first is that after its own reset."""
        text, info = self._come_to(self._transcripts.begin(self._key), "")
        return text, info

    def step(self, action: str) -> tuple[str, Any, bool, bool, dict[str, Any]]:
        """As the benchmark's."""
        if not self._remembers:
            return aside(self.env.step, action)
        if self._over or not self._path:
            raise gym.error.ResetNeeded("The episode is over: call reset() before step().")
        moment = self._transcripts.after(self._path[-1][1], action)
        text, reward, terminated, truncated, info = self._come_to(moment, action)
        self._over = terminated or truncated
        return text, reward, terminated, truncated, info

    def _come_to(self, moment: _Moment, action: str) -> tuple[Any, ...]:
        """What is said there; by the engine, where nobody has been there."""
        said = moment.said or aside(self._find_out, moment, action)
        self._path.append((action, moment))
        return (*said[:-1], dict(said[-1]))

    def _find_out(self, moment: _Moment, action: str) -> tuple[Any, ...]:
        with moment.lock:
            if moment.said is None:
                self._catch_up()
                moment.said = self._ask(action)
                self._transcripts.grown(self._key, action, moment.said)
            return moment.said

    def _catch_up(self) -> None:
        """Gives the engine what it has missed of the episode."""
        for action, moment in self._path[self._given :]:
            if self._ask(action)[0] != moment.said[0]:  # type: ignore[index]  # the episode has been there
                self._transcripts.forget(self._key)
                raise EngineError(
                    f"{self._name}: the same task and actions led to another text than before; a benchmark that can't "
                    "be repeated says so by repeatable = False, see envs/base.py"
                )

    def _ask(self, action: str) -> tuple[Any, ...]:
        """What the engine says to the episode's next action, or to its beginning."""
        seed, options = self._start
        said = self.env.step(action) if self._given else self.env.reset(seed=seed, options=options)
        self._given += 1
        return said
