"""ScienceWorld's expert: the simulator's gold path, shortened, with a look at every room that is entered.

The gold path knows where everything is; a model has to see it. So each teleport is followed by `look around`, and what
does not reach score 100 within the step limit, or needs more than `MAX_STEPS`, is not shown.

The executors learn from two thirds of each kind's train variations. The rest of train, and all of dev and test, are
the router's.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from bopo_ray.executors.demos import Demo
from envs import jvm
from envs.base import Split
from envs.errors import EngineError
from envs.scienceworld import ScienceWorldEnv, parse_task, split_sizes
from envs.scienceworld_plans import candidates

__all__ = ["demonstrate", "executor_tasks", "jobs", "shown"]

MAX_STEPS = 40
SIMPLIFICATIONS = "easy"
"""As the benchmark is played by default."""
TOO_LONG = ("grow-fruit", "mendelian-genetics-known-plant", "mendelian-genetics-unknown-plant")
"""Kinds whose experts need more than `MAX_STEPS` steps."""
PER_KIND = 160
"""Variations shown of a kind, at most: further ones differ little, and each takes a second to play."""
NOISE = 0.2
"""Probability of noise before an action, in a noisy demonstration."""
_USELESS = re.compile(r"No known action|You can't move something into itself|It's not clear how")
"""What the gold path hears where it tries what can't be done; such steps are left out, where that still succeeds."""
ROOMS = ("kitchen", "bathroom", "bedroom", "living room", "workshop", "greenhouse", "foundry", "outside", "art studio",
         "hallway")  # fmt: skip


def shown(name: str) -> bool:
    """Whether a task is one that the executors may learn from: of every three train variations the first two."""
    kind, variation = parse_task(name)
    return variation < split_sizes()[kind][0] and variation % 3 != 2


def executor_tasks() -> dict[str, list[str]]:
    """The train tasks that the executors may learn from, by kind."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for task in ScienceWorldEnv.tasks(Split.TRAIN):
        if shown(task.name):
            kinds[task.kind].append(task.name)
    return kinds


def jobs(limit: int) -> list[str]:
    """Names of the tasks to show, in turn over the kinds, the kinds' variations evenly spread."""
    spread = []
    for kind, names in executor_tasks().items():
        if kind not in TOO_LONG:
            count = min(len(names), PER_KIND)
            spread += [(i / count, kind, names[i * len(names) // count]) for i in range(count)]
    ordered = [name for _, _, name in sorted(spread)]
    return ordered[:limit] if limit else ordered


def demonstrate(names: Sequence[str]) -> Iterator[Demo]:
    """A clean demonstration of each task that allows one, and a noisy one. Raises EngineError when the simulator dies
    or hangs at one task twice."""
    engine = jvm.acquire(120.0)
    for name in names:
        for last in (False, True):
            if not engine.usable:
                engine.release()
                engine = jvm.acquire(120.0)
            try:
                yield from list(_show(engine, name))
            except EngineError:
                if not engine.jvm.alive:
                    if last:
                        raise
                    continue
            break  # also at a gold path that the simulator can't make: the task is not shown
    engine.release()


def _show(engine: jvm.Engine, name: str) -> Iterator[Demo]:
    kind, variation = parse_task(name)
    engine.load(kind, variation, SIMPLIFICATIONS, gold=True)
    gold = engine.strings("getGoldActionSequence")
    for plan in candidates(gold):
        seen = with_looks(plan)
        if len(seen) > MAX_STEPS:
            continue
        if clean := _replay(engine, name, [(a, True) for a in seen], noisy=False):
            useful = [
                (a, True) for a, o in zip(clean.actions, clean.observations, strict=True) if not _USELESS.match(o)
            ]
            if len(useful) < len(clean.actions):
                clean = _replay(engine, name, useful, noisy=False) or clean
            yield clean
            rng = random.Random(name)
            for _ in range(2):
                noisy = _noise(clean, rng)
                if len(noisy) <= MAX_STEPS and (demo := _replay(engine, name, noisy, noisy=True)):
                    yield demo
                    break
            return


def with_looks(plan: Iterable[str]) -> list[str]:
    """The plan with a look at each room that is entered."""
    seen: list[str] = []
    for action in plan:
        if seen and seen[-1].startswith("teleport to ") and action != "look around":
            seen.append("look around")
        seen.append(action)
    return seen


def _replay(engine: jvm.Engine, name: str, plan: Sequence[tuple[str, bool]], *, noisy: bool) -> Demo | None:
    """Plays a plan of (action, taught), and waits at the end where that helps; None unless it succeeds in time."""
    kind, variation = parse_task(name)
    engine.load(kind, variation, SIMPLIFICATIONS)
    first, *_ = engine.step("look around")
    text = engine.call("getTaskDescription")
    actions: list[tuple[str, bool]] = []
    observations: list[str] = []
    for action, taught in (*plan, *[("wait", True)] * 4):
        if len(actions) == MAX_STEPS:
            return None
        observation, score, completed = engine.step(action)
        actions.append((action, taught))
        observations.append(observation)
        if score >= 100:
            said, flags = zip(*actions, strict=True)
            return Demo(name, noisy, text, first, said, tuple(observations), flags)
        if score < 0 or completed:
            return None
    return None


def _noise(clean: Demo, rng: random.Random) -> list[tuple[str, bool]]:
    """The clean plan with harmless detours before some actions; what leads back from one is taught."""
    room = _room(clean.first_observation)
    plan: list[tuple[str, bool]] = []
    texts = (clean.first_observation, *clean.observations)
    for action, text in zip(clean.actions, texts, strict=False):
        if rng.random() < NOISE:
            things = re.findall(r"\ban? ([a-z ]+?)(?:[.,(\t\n]|$)", text)
            detour = rng.randrange(5)
            if detour == 0 and room:
                away = rng.choice([r for r in ROOMS if r != room])
                plan += [(f"teleport to {away}", False), (f"teleport to {room}", True)]
            elif detour == 1:
                plan.append(("inventory", False))
            elif things and detour < 4:
                plan.append((f"{rng.choice(('look at', 'examine', 'open'))} {rng.choice(things)}", False))
            else:
                plan.append((rng.choice(("look around", "wait1")), False))
        if action.startswith("teleport to "):
            room = action.removeprefix("teleport to ")
        plan.append((action, True))
    return plan


def _room(observation: str) -> str:
    found = re.search(r"(?:called the|in the) ([a-z ]+?)\.", observation)
    return found[1] if found and found[1] in ROOMS else "outside" if "outside" in observation[:60] else ""
