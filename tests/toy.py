"""A small text benchmark for tests of the machinery: real episodes in microseconds, and faults on request.

Used as `tests.toy:Toy-v0`. A task "<kind>/<n>" is a chain of actions; the expert's plan solves it. Kinds whose name
starts with "fault" misbehave, a step of a task whose name ends in "slow" takes a second, and a task waits for as long
as there is a file "<kind>-<n>.held" in `scratch`. Where the variable TOY_HOLD names a file that holds a number n, each
process plays n episodes and then waits for as long as the file is there, beside which it leaves a file named by its
process id.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym

from bopo_ray.models import load_pool
from bopo_ray.models.pricing import Price, Usage
from bopo_ray.models.protocol import Message, ModelPool, Reply, Request, Sampling
from bopo_ray.records import Budget, Episode, EpisodeSpec, Phase, Step, StopReason, spawn_seed
from bopo_ray.routing_env import RoutingEnv, Tab
from envs.base import Split, Task, text_space
from envs.errors import EngineError, UnknownTaskError

ID = "tests.toy:Toy-v0"
PLANS = {
    "fetch": ("teleport to kitchen", "pick up cup", "teleport to workshop", "move cup to table"),
    "measure": ("teleport to kitchen", "pick up thermometer", "focus on thermometer", "use thermometer on soup"),
    "mix": ("pick up cup", "pour cup into bowl", "mix bowl", "examine bowl", "focus on bowl", "move bowl to table"),
    "long": tuple(f"examine page {i}" for i in range(60)),
    "fault-dead": ("pick up cup", "pick up cup"),
    "fault-once": ("pick up cup", "move cup to table"),
    "fault-hang": ("pick up cup", "move cup to table"),
}


class Toy(gym.Env[str, str]):
    """See the module's docstring."""

    action_guide = "Do what the task asks."

    def __init__(self, max_steps: int = 20, scratch: str = "", hang_s: float = 3600.0) -> None:
        self.max_steps, self.scratch, self.hang_s = max_steps, scratch, hang_s
        self.repeatable = not Path(os.environ.get("TOY_HOLD", "none")).exists()
        """An episode that is counted must be played."""
        self.observation_space = self.action_space = text_space()
        self.over = True

    @classmethod
    def tasks(cls, split: Split) -> tuple[Task, ...]:
        offset = {Split.TRAIN: 0, Split.DEV: 100, Split.TEST: 200}[split]
        return tuple(Task(ID, f"{kind}/{offset + i}", split) for kind in PLANS for i in range(8) if "fault" not in kind)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        _hold(next(_EPISODES))
        train = self.tasks(Split.TRAIN)
        self.name = (options or {}).get("task") or train[int(self.np_random.integers(len(train)))].name
        kind = self.name.rpartition("/")[0]
        if kind not in PLANS:
            raise UnknownTaskError(f"unknown task {self.name!r}; known kinds: {', '.join(PLANS)}")
        self.plan, self.done, self.moves, self.lost, self.over = PLANS[kind], 0, 0, False, False
        info = {"task": self.name, "task_text": f"Your task is to {kind} number {self.name}."} | self._status()
        if (options or {}).get("expert_plan"):
            info["expert_plan"] = self.plan
        return "This room is called the hallway. In it, you see: a cup", info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.over:
            raise gym.error.ResetNeeded("The episode is over: call reset() before step().")
        self.moves += 1
        self._misbehave()
        text = "No known action matches that input."
        if self.done < len(self.plan) and action == self.plan[self.done]:
            self.done += 1
            text = f"You {action}."
        elif action.startswith("focus on"):
            self.lost, text = True, f"You {action}."
        elif action.startswith(("teleport to", "examine", "look")):
            text = f"You {action}."
        terminated = self.lost or self.done == len(self.plan)
        truncated = not terminated and self.moves >= self.max_steps
        self.over = terminated or truncated
        return text, 0.0, terminated, truncated, self._status()

    def close(self) -> None:
        self.over = True

    def _misbehave(self) -> None:
        if self.name.endswith("slow"):
            time.sleep(1.0)
        if self.name.startswith("fault-dead"):
            raise EngineError("the toy engine died")
        marker = Path(self.scratch) / self.name.replace("/", "-")
        while self.scratch and marker.with_suffix(".held").exists():
            time.sleep(0.02)
        if self.name.startswith(("fault-once", "fault-hang")) and not marker.exists():
            marker.write_text(str(os.getpid()))
            if self.name.startswith("fault-hang"):
                time.sleep(self.hang_s)
            raise EngineError("the toy engine died once")

    def _status(self) -> dict[str, Any]:
        success = self.done == len(self.plan) and not self.lost
        score = -100.0 if self.lost else 100.0 * self.done / len(self.plan)
        return {"score": score, "success": success, "outcome": max(score, 0.0) / 100, "moves": self.moves}


gym.register("Toy-v0", entry_point=Toy)

_EPISODES = itertools.count()
"""Of this process."""


def _hold(episode: int) -> None:
    path = os.environ.get("TOY_HOLD")
    while path and (file := Path(path)).exists() and episode >= int(file.read_text()):
        file.with_name(str(os.getpid())).touch()
        time.sleep(0.05)


class Scripted:
    """A language model that answers step t with `replies[t]`; a token is a word, so that bills are worked by hand."""

    needs_plan = False

    def __init__(
        self,
        name: str,
        price: Price,
        reply: Callable[[int], str],
        sampling: Sampling = Sampling(),  # noqa: B008
    ) -> None:
        self.name = self.identity = name
        self.price, self.reply, self.sampling = price, reply, sampling
        self.calls = 0

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def bound(self, messages: tuple[Message, ...]) -> int:
        return sum(len(m.content.split()) for m in messages)

    def complete(self, request: Request) -> Reply:
        self.calls += 1
        text = self.reply((len(request.messages) - 2) // 2)
        return Reply(text, Usage(self.bound(request.messages), min(len(text.split()), request.max_tokens)), 0.25)


def scripted_pool(replies: Sequence[str], **sampling: int) -> ModelPool:
    """Two models that both say `replies`, at $1/$2 and $10/$20 per million words."""
    prices = (Price(1_000_000, 500_000, 2_000_000), Price(10_000_000, 5_000_000, 20_000_000))
    names = ("scripted:small", "scripted:large")
    models = tuple(
        Scripted(n, p, lambda t: replies[min(t, len(replies) - 1)], Sampling(**sampling))
        for n, p in zip(names, prices, strict=True)
    )
    return ModelPool(models, "scripted", "Scripted replies.", "scripted")


def routing_env(pool: ModelPool | None = None, max_steps: int = 20, scratch: str = "", **settings: Any) -> RoutingEnv:
    """RoutingEnv over Toy, with the simulated pair unless told otherwise."""
    toy = gym.make(ID, disable_env_checker=True, max_steps=max_steps, scratch=scratch)
    return RoutingEnv(toy, pool or load_pool("simulated"), **settings)


def toy_spec(
    name: str = "fetch/0", router: str = "random(0.5)", member: int = 0, budget: Budget | None = None, **more: Any
) -> EpisodeSpec:
    """An evaluation episode of one toy task."""
    fields = {"phase": Phase.EVALUATION, "policy": router, "group": 0, "seed": 0} | more
    return EpisodeSpec(Task(ID, name, Split.TRAIN), member=member, budget=budget, router=router, **fields)


def play(
    spec: EpisodeSpec, env: RoutingEnv | None = None, p_large: float = 0.5, tab: Tab | None = None
) -> tuple[Episode, list[str]]:
    """A real episode by a coin of its own, and the views that RoutingEnv returned before each step."""
    env = env or routing_env()
    options = {"task": spec.task.name, "sample": spec.call_sample, "budget": spec.budget, "tab": tab}
    view, first = env.reset(seed=0, options=options)
    mask, views, steps, info, outcome = first["action_mask"], [], [], {}, 0.0
    while "stop" not in info:
        choice = int(spawn_seed("toy", spec.id, len(steps)) / 2**63 < p_large)
        before, before_mask = view, mask
        view, outcome, _, _, info = env.step(choice)
        mask = info["action_mask"]
        if "reply" in info:
            views.append(before)
            names = ("model", "reply", "action", "observation", "prompt_tokens", "cached_tokens", "completion_tokens",
                     "cost_microusd", "lost_microusd", "latency_s")  # fmt: skip
            own = {"probabilities": (1 - p_large, p_large), "mask": before_mask, "router_s": 0.0}
            steps.append(Step(**own, **{n: info[n] for n in names}))
    episode = Episode(
        spec, first["task_text"], first["first_observation"], env.max_steps, tuple(steps), outcome, info["success"],
        info["score"], StopReason(info["stop"]),
    )  # fmt: skip
    return episode, views
