"""ScienceWorld: 30 kinds of primary-school science experiments in a text world, 7,207 tasks.

`ScienceWorld-v0`. A task's name is "<kind>/<variation>", e.g. "boil/3". The first observation is the result of
`look around`. The score is 0..100, or -100 after a wrong `focus on`, which ends the episode; the outcome is
max(score, 0) / 100. Every action counts as a step, also those that the simulator calls free.

    env = gymnasium.make("ScienceWorld-v0")
    text, info = env.reset(options={"task": "boil/3"})
    text, reward, terminated, truncated, info = env.step("teleport to kitchen")

The task lists are a committed file, since asking the simulator takes 5 s; `python -m envs.scienceworld splits` writes
it anew from the simulator. `info["expert_plan"]` is a plan that was verified where one could be found (see
`scienceworld_plans`); for some tasks it is the simulator's own gold path, which may fail.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded

from envs import jvm
from envs.base import Split, Task, text_space
from envs.errors import ConfigError, EngineError, UnknownTaskError
from envs.scienceworld_plans import MAX_FINAL_WAITS, Plan, PlanCache, make_plan

__all__ = ["SIMPLIFICATIONS", "ScienceWorldEnv"]

ENV_ID = "ScienceWorld-v0"
SIMPLIFICATIONS = (
    "easy", "teleportAction", "selfWateringFlowerPots", "openContainers", "openDoors", "noElectricalAction",
)  # fmt: skip
"""What the simulator knows. "easy" is teleports, open doors, self-watering pots and no electrical actions; for the
tasks about electricity the simulator itself leaves the last one out."""

_OPTIONS = ("task", "admissible", "expert_plan")
_SPLITS_FILE = "scienceworld_splits.json"
_plans = PlanCache()


@functools.cache
def split_sizes() -> dict[str, tuple[int, int, int]]:
    """Kind -> number of train, dev and test variations; they follow each other in this order, from 0."""
    data = json.loads((files("envs") / "data" / _SPLITS_FILE).read_text(encoding="utf-8"))
    return {kind: tuple(sizes) for kind, sizes in data.items()}


@functools.cache
def _task_list(split: Split) -> tuple[Task, ...]:
    at = list(Split).index(split)
    return tuple(
        Task(ENV_ID, f"{kind}/{variation}", split)
        for kind, sizes in split_sizes().items()
        for variation in range(sum(sizes[:at]), sum(sizes[: at + 1]))
    )


def parse_task(name: object) -> tuple[str, int]:
    """ "boil/3" -> ("boil", 3).

    Raises:
        UnknownTaskError: no such task; the message names the closest kind.
    """
    sizes = split_sizes()
    kind, _, variation = name.rpartition("/") if isinstance(name, str) else ("", "", "")
    known = kind in sizes
    if known and variation.isascii() and variation.isdigit() and int(variation) < sum(sizes[kind]):
        return kind, int(variation)
    if known:
        allowed = f"variations of {kind!r} are 0 to {sum(sizes[kind]) - 1}, as in '{kind}/0'"
    else:
        wanted = kind or str(name)
        close = difflib.get_close_matches(wanted, sizes, n=1, cutoff=0.4) or [next(iter(sizes))]
        allowed = f"a task is '<kind>/<variation>' with one of {len(sizes)} kinds: did you mean '{close[0]}/0'?"
    raise UnknownTaskError(f"ScienceWorld has no task {name!r}: {allowed} (all: ScienceWorldEnv.tasks)")


class ScienceWorldEnv(gymnasium.Env[str, str]):
    """One ScienceWorld episode at a time; see `envs.base` for the contract.

    The environments of a process share a Java process (one for every 24 of them), in which they take turns, from any
    number of threads; one environment is used by one thread at a time.

    Args:
        max_steps: steps until the episode is truncated.
        simplifications: "easy", or names of `SIMPLIFICATIONS` joined by commas, or "".
        call_timeout_s: seconds that one call of the simulator may take before it counts as hung; planning five times as
            long.
        render_mode: None or "ansi" (`render` returns the last observation).
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"]}  # noqa: RUF012 (gymnasium's own form)

    footprint_mb = (300, 40)
    """See `envs.base`. Measured: the Java process; 589 MB with 8 episodes in flight, 363 with 2."""
    action_guide = """Actions: look around, look at X, look in X, inventory, examine X, go to ROOM, teleport to ROOM,
open X, close X, activate X, deactivate X, pick up X, put down X, move X to Y, pour X into Y, mix X, dunk X in Y,
use X on Y, read X, connect X to Y, disconnect X, eat X, flush X, wait, wait1, focus on X (names the task's object: a
wrong one ends the task), and a number to answer a question. One action at a time; X and Y are objects that you see."""
    """How an agent acts here, for its system prompt."""

    def __init__(
        self,
        max_steps: int = 40,
        simplifications: str = "easy",
        *,
        call_timeout_s: float = 60.0,
        render_mode: str | None = None,
    ) -> None:
        if max_steps < 1:
            raise ConfigError(f"max_steps is {max_steps}: it must be at least 1")
        if not call_timeout_s > 0:
            raise ConfigError(f"call_timeout_s is {call_timeout_s}: it must be above 0 seconds")
        if wrong := [name for name in simplifications.split(",") if name and name not in SIMPLIFICATIONS]:
            raise ConfigError(f"simplifications has {wrong[0]!r}: the simulator knows {', '.join(SIMPLIFICATIONS)}")
        if render_mode not in (None, "ansi"):
            raise ConfigError(f"render_mode is {render_mode!r}: it may be None or 'ansi'")
        self.max_steps = max_steps
        self.simplifications = simplifications
        self.call_timeout_s = call_timeout_s
        self.render_mode = render_mode
        self.observation_space = text_space()
        self.action_space = text_space()
        self._engine: jvm.Engine | None = None
        self._over = True
        self._text = ""
        self._score = 0
        self._moves = 0
        self._admissible = False

    @classmethod
    def tasks(cls, split: Split) -> tuple[Task, ...]:
        """All tasks of a split, kind after kind."""
        return _task_list(Split(split))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start a task: `options["task"]`, or a training task that the seed picks.

        Raises:
            UnknownTaskError: no such task.
            EngineError: the Java process died or hung; call again for a fresh one.
        """
        super().reset(seed=seed)
        options = options or {}
        if wrong := [key for key in options if key not in _OPTIONS]:
            raise ConfigError(f"reset has no option {wrong[0]!r}: it knows {', '.join(_OPTIONS)}")
        name = options.get("task")
        if name is None:
            train = self.tasks(Split.TRAIN)
            name = train[int(self.np_random.integers(len(train)))].name
        kind, variation = parse_task(name)
        self._over = True
        self._admissible = bool(options.get("admissible"))
        engine = self._fresh_engine()
        simplifications = _allowed(kind, self.simplifications)
        engine.load(kind, variation, simplifications)
        self._text, *_ = engine.step("look around")
        self._score, self._moves, self._over = 0, 0, False
        info = {"task": name, "task_text": engine.call("getTaskDescription"), **self._info()}
        if options.get("expert_plan"):
            plan = _plans.get(name, simplifications, lambda: self._make_plan(kind, variation, simplifications))
            info["expert_plan"] = plan.actions
        return self._text, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one action. The reward is the change of the score, divided by 100.

        Raises:
            ResetNeeded: the episode is over, or none was started.
            EngineError: the Java process died or hung; the episode is lost.
        """
        if self._over or self._engine is None:
            raise ResetNeeded("The episode is over: call reset() before step().")
        self._over = True  # until the engine has answered
        self._text, score, completed = self._engine.step(action.encode("utf-8", "replace").decode())
        reward, self._score = (score - self._score) / 100, score
        self._moves += 1
        terminated = completed or not 0 <= score < 100
        truncated = not terminated and self._moves >= self.max_steps
        info = self._info()
        self._over = terminated or truncated
        return self._text, reward, terminated, truncated, info

    def render(self) -> str | None:  # type: ignore[override]  # gymnasium names no text type
        """The last observation."""
        return self._text if self.render_mode == "ansi" else None

    def close(self) -> None:
        """Give the simulator back; the Java process stays for the next environment of this process."""
        self._over = True
        if self._engine is not None:
            self._engine.release()
            self._engine = None

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = {
            "score": self._score,
            "success": self._score >= 100,
            "outcome": max(self._score, 0) / 100,
            "moves": self._moves,
        }
        if self._admissible and self._engine is not None:
            info["admissible"] = tuple(sorted(self._engine.strings("getValidActionObjectCombinations")))
        return info

    def _fresh_engine(self) -> jvm.Engine:
        if self._engine is not None and not self._engine.usable:
            self.close()
        if self._engine is None:
            self._engine = jvm.acquire(self.call_timeout_s)
        return self._engine

    def _make_plan(self, kind: str, variation: int, simplifications: str) -> Plan:
        """Plan on a simulator of its own, so that this environment's episode stays as it is."""
        with _borrowed(self.call_timeout_s) as engine:
            engine.load(kind, variation, simplifications, gold=True)
            gold = engine.strings("getGoldActionSequence")

            def replay(plan: Sequence[str]) -> Plan:
                engine.load(kind, variation, simplifications)
                return _replay(engine, plan)

            names = simplifications.split(",")
            return make_plan(gold, replay, teleport="easy" in names or {"teleportAction", "openDoors"} <= set(names))


@contextlib.contextmanager
def _borrowed(timeout_s: float) -> Iterator[jvm.Engine]:
    engine = jvm.acquire(timeout_s)
    try:
        yield engine
    finally:
        engine.release()


def _allowed(kind: str, simplifications: str) -> str:
    """The simplifications without the one that would make a task about electricity impossible."""
    if "power-component" not in kind and "conductivity" not in kind:
        return simplifications
    return ",".join(name for name in simplifications.split(",") if name != "noElectricalAction")


def _replay(engine: jvm.Engine, plan: Sequence[str]) -> Plan:
    """Play a plan on a freshly loaded task, up to the step that succeeds or fails; wait a little at the end."""
    engine.step("look around")
    done: list[str] = []
    for action in (*plan, *["wait"] * MAX_FINAL_WAITS):
        _, score, completed = engine.step(action)
        done.append(action)
        if score >= 100:
            return Plan(tuple(done), verified=True)
        if score < 0 or completed:
            break
    return Plan(tuple(plan), verified=False)


def engine_splits() -> dict[str, tuple[int, int, int]]:
    """The split sizes as the simulator reports them.

    Raises:
        EngineError: a split is not the consecutive range that the file can express.
    """
    from scienceworld.constants import ID2TASK

    sizes = {}
    with _borrowed(60.0) as engine:
        for kind in ID2TASK.values():
            engine.load(kind, 0, "")
            lists = [list(map(int, engine.call(f"getVariations{name}"))) for name in ("Train", "Dev", "Test")]
            if list(chain(*lists)) != list(range(engine.call("getTaskMaxVariations", kind))):
                raise EngineError(
                    f"ScienceWorld's variations of {kind} are not consecutive: list them in {_SPLITS_FILE}"
                )
            train, dev, test = map(len, lists)
            sizes[kind] = train, dev, test
    return sizes


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m envs.scienceworld splits`: write the committed task lists from the simulator."""
    parser = argparse.ArgumentParser(prog="python -m envs.scienceworld", description=main.__doc__)
    parser.add_argument("command", choices=["splits"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data" / _SPLITS_FILE)
    out = parser.parse_args(argv).out
    sizes = engine_splits()
    lines = ",\n".join(f"  {json.dumps(kind)}: {json.dumps(row)}" for kind, row in sizes.items())
    out.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    totals = [sum(column) for column in zip(*sizes.values(), strict=True)]
    print(f"{out}: {len(sizes)} kinds, train / dev / test = {' / '.join(map(str, totals))}")


if __name__ == "__main__":
    main()
