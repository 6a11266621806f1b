"""Expert plans for ScienceWorld: the simulator's own gold path, shortened, replayed, and kept on disk.

The gold path never teleports and is padded with looks and repeated measurements. `candidates` shortens it in several
ways, the shortest first, and the first one whose replay reaches score 100 is the plan. What always holds:

* a plan marked `verified` reached score 100 on the engine, from a fresh load, with the same simplifications;
* when nothing verifies, the raw gold path is returned with `verified=False`: it may fail (as power-component's do);
* the file cache is only an aid: unreadable files are made again, and a folder that can't be written is no error.
"""

from __future__ import annotations

import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from envs.cache import cache_folder, keep

__all__ = ["Plan", "PlanCache", "candidates", "make_plan"]

VERSION = 1
"""Goes into the cache's path: raise it when `candidates` changes."""
MAX_FINAL_WAITS = 5
"""`wait`s that a replay may add at its end, for what needs time only (water on a stove)."""

SHIPPED = "scienceworld_plans.json"
"""Plans of the tasks of the quick run, in envs/data: made by `python -m experiments.expert_plans`."""

_WALK = re.compile(r"go to (.+)")
_WATERING = re.compile(r"(de)?activate sink|move jug to sink|pour jug into (self watering )?flower pot \d+")


@dataclass(frozen=True, slots=True)
class Plan:
    """A sequence of actions for one task."""

    actions: tuple[str, ...]
    verified: bool
    """A replay reached score 100."""


def teleports(gold: Iterable[str]) -> list[str]:
    """Doors need no opening, and a walk through several rooms becomes one teleport to the last."""
    plan: list[str] = []
    for action in gold:
        if action.startswith("open door to "):
            continue
        if walk := _WALK.fullmatch(action):
            if plan and plan[-1].startswith("teleport to "):
                plan.pop()
            plan.append(f"teleport to {walk[1]}")
        else:
            plan.append(action)
    return plan


def _without_looks(plan: Iterable[str]) -> list[str]:
    return [a for a in plan if a not in ("look around", "inventory")]


def _without_examining(plan: Iterable[str]) -> list[str]:
    """Drop `examine`, except of a stopwatch, which is a reading; look or measure once, not again and again."""
    kept = [a for a in plan if not a.startswith("examine ") or "stopwatch" in a]
    once = ("look at ", "use thermometer ")
    return [a for action, run in groupby(kept) for a in ([action] if action.startswith(once) else run)]


def _with_long_waits(plan: Iterable[str]) -> list[str]:
    """`wait` lasts ten times `wait1`: one for every run of four or more."""
    runs = [(action, len(list(run))) for action, run in groupby(plan)]
    return [a for action, n in runs for a in (["wait"] if action == "wait1" and n >= 4 else [action] * n)]


def _without_watering(plan: Iterable[str]) -> list[str]:
    """The pots water themselves."""
    return [a for a in plan if not _WATERING.fullmatch(a)]


def candidates(gold: Sequence[str], *, teleport: bool = True) -> tuple[tuple[str, ...], ...]:
    """Shorter forms of a gold path, the shortest first, none twice; whether one still succeeds only a replay tells.

    Args:
        gold: the simulator's own actions.
        teleport: whether the simplifications allow it (then doors are open as well).
    """
    moved = teleports(gold) if teleport else list(gold)
    # A look between two walks separates two teleports: move once more after it is gone.
    plain = teleports(_without_looks(gold)) if teleport else _without_looks(gold)
    brief = _without_examining(plain)
    dry = _with_long_waits(_without_watering(brief)) if teleport else brief
    shorter = (dry, _with_long_waits(brief), brief, _with_long_waits(plain), plain, moved)
    unique = {tuple(plan) for plan in shorter if len(plan) < len(gold)}
    return tuple(sorted(unique, key=lambda plan: (len(plan), plan)))


def make_plan(gold: Sequence[str], replay: Callable[[Sequence[str]], Plan], *, teleport: bool = True) -> Plan:
    """The first candidate that `replay` verifies; failing that the gold path, verified or not."""
    for candidate in candidates(gold, teleport=teleport):
        if (plan := replay(candidate)).verified:
            return plan
    plan = replay(gold)
    return plan if plan.verified else Plan(tuple(gold), verified=False)


class PlanCache:
    """Plans of this process, backed by a folder shared between processes."""

    def __init__(self) -> None:
        self._plans: dict[Path, Plan] = {}
        self._locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
        self._guard = threading.Lock()

    def get(self, task: str, simplifications: str, make: Callable[[], Plan]) -> Plan:
        """The plan of a task; `make` is called at most once per task, also when many threads ask."""
        path = _path(task, simplifications)
        with self._guard:
            lock = self._locks[path]
        with lock:
            if path not in self._plans:
                self._plans[path] = _shipped(task, simplifications) or _read(path) or _write(path, make())
            return self._plans[path]


@cache
def _shipped_plans() -> dict[str, list[str]]:
    """Verified plans that come with the package ("easy" only); none when they are another simulator's."""
    file = json.loads(resources.files("envs").joinpath("data", SHIPPED).read_text(encoding="utf-8"))
    current = file["scienceworld"] == version("scienceworld") and file["version"] == VERSION
    plans: dict[str, list[str]] = file["plans"] if current else {}
    return plans


def _shipped(task: str, simplifications: str) -> Plan | None:
    actions = _shipped_plans().get(task) if simplifications == "easy" else None
    return Plan(tuple(actions), verified=True) if actions else None


def _path(task: str, simplifications: str) -> Path:
    folder = f"scienceworld-{version('scienceworld')}-plans-{VERSION}"
    kind, _, variation = task.rpartition("/")
    return cache_folder(folder) / (re.sub(r"\W", "+", simplifications) or "none") / kind / f"{variation}.json"


def _read(path: Path) -> Plan | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        actions, verified = record["actions"], record["verified"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sound = isinstance(actions, list) and all(isinstance(a, str) for a in actions) and isinstance(verified, bool)
    return Plan(tuple(actions), verified) if sound else None


def _write(path: Path, plan: Plan) -> Plan:
    keep(path, json.dumps({"actions": plan.actions, "verified": plan.verified}, ensure_ascii=False).encode())
    return plan
