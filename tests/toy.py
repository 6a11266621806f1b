"""A small text benchmark for tests of the machinery: real episodes in microseconds, and faults on request.

Used as `tests.toy:Toy-v0`. A task "<kind>/<n>" is a chain of actions; the expert's plan solves it. Kinds whose name
starts with "fault" misbehave.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import gymnasium as gym

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
        self.observation_space = self.action_space = text_space()

    @classmethod
    def tasks(cls, split: Split) -> tuple[Task, ...]:
        offset = {Split.TRAIN: 0, Split.DEV: 100, Split.TEST: 200}[split]
        return tuple(Task(ID, f"{kind}/{offset + i}", split) for kind in PLANS for i in range(8) if "fault" not in kind)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.name = (options or {}).get("task", "fetch/0")
        kind = self.name.rpartition("/")[0]
        if kind not in PLANS:
            raise UnknownTaskError(f"unknown task {self.name!r}; known kinds: {', '.join(PLANS)}")
        self.plan, self.done, self.moves, self.lost = PLANS[kind], 0, 0, False
        info = {"task": self.name, "task_text": f"Your task is to {kind} number {self.name}."} | self._status()
        if (options or {}).get("expert_plan"):
            info["expert_plan"] = self.plan
        return "This room is called the hallway. In it, you see: a cup", info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
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
        over = self.lost or self.done == len(self.plan)
        return text, 0.0, over, not over and self.moves >= self.max_steps, self._status()

    def _misbehave(self) -> None:
        if self.name.startswith("fault-dead"):
            raise EngineError("the toy engine died")
        marker = Path(self.scratch) / self.name.replace("/", "-")
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
