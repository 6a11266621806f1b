"""Steps and resets per second of ALFWorld, on the same game with the same actions, none of which wins.

    python -m experiments.bench envs

* naive: the alfworld package's own environment, in this process (it works out all commands at each step);
* ours: `ALFWorldEnv`, whose engine is a process of its own;
* limit: our engine's code in this process, without the way there and back. With several processes, for all of them
  together: so many times the rate of one. Threads of this process drive them, as a runner does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from experiments.bench import Row, interleave

__all__ = ["run"]

KIND = "pick_heat_then_place_in_recep"
ACTIONS = (
    *("look", "inventory", "go to fridge 1", "open fridge 1", "examine fridge 1", "close fridge 1", "go to cabinet 1"),
    *(
        "open cabinet 1",
        "close cabinet 1",
        "go to microwave 1",
        "look",
        "dance",
        "go to countertop 1",
        "go to drawer 1",
    ),
    *("open drawer 1", "close drawer 1", "go to sinkbasin 1", "examine sinkbasin 1", "go to countertop 2", "look"),
)


def _package(game: Any) -> Any:
    """The package's own environment, with a game loaded."""
    data = os.environ.get("ALFWORLD_DATA")
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld import EnvInfos
    from textworld.envs import PddlEnv

    if data is None:
        os.environ.pop("ALFWORLD_DATA", None)  # importing the package sets it
    env = AlfredDemangler(PddlEnv(EnvInfos(admissible_commands=True, won=True)))
    argv = sys.argv
    env.load({"pddl_domain": game.domain, "grammar": game.grammar, "pddl_problem": game.problem})
    env.reset()
    sys.argv = argv  # its translator sets it
    return env


def _together(count: int, name: str, seconds: float) -> float:
    """Steps per second of `count` environments at once."""
    from envs.alfworld import ALFWorldEnv

    envs = [ALFWorldEnv(max_steps=10**9) for _ in range(count)]
    for env in envs:
        env.reset(options={"task": name})
    end = time.monotonic() + seconds

    def play(env: ALFWorldEnv) -> int:
        steps = 0
        while time.monotonic() < end:
            env.step(ACTIONS[steps % len(ACTIONS)])
            steps += 1
        return steps

    start = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        steps = sum(pool.map(play, envs))
    elapsed = time.monotonic() - start
    for env in envs:
        env.close()
    return steps / elapsed


def run(seconds: float) -> Sequence[Row]:
    """Measure for about `seconds`, after the engines have started."""
    from envs import alfworld_games as games
    from envs.alfworld import ALFWorldEnv
    from envs.alfworld_engine import World, prepare
    from envs.base import Split

    games.require_packages()
    name = next(task.name for task in ALFWorldEnv.tasks(Split.TEST) if task.kind == KIND)
    game = games.source().game(name)
    ours, package = ALFWorldEnv(max_steps=10**9), _package(game)

    def each(step: Callable[[str], object]) -> Callable[[], None]:
        return lambda: [step(action) for action in ACTIONS] and None

    ours.reset(options={"task": name})
    rate = interleave({"ours": each(ours.step), "naive": each(package.step)}, seconds / 3)
    resets = interleave(
        {"ours": lambda: ours.reset(options={"task": name}) and None, "naive": package.reset}, seconds / 6
    )
    ours.close()
    prepare()  # from here on the package's own would be as fast
    world = World(game.domain, game.grammar, game.problem)
    rate |= interleave({"limit": each(world.step)}, seconds / 6)
    steps = {way: rounds * len(ACTIONS) for way, rounds in rate.items()}
    cores = os.cpu_count() or 1
    growth = {count: _together(count, name, seconds / 9) for count in (1, cores, 2 * cores)}
    return [
        Row("ALFWorld", "steps/s", steps["ours"], steps["naive"], steps["limit"]),
        Row("ALFWorld, the same game again", "resets/s", resets["ours"], resets["naive"], None),
        *(Row(f"ALFWorld, {n} processes", "steps/s", growth[n], None, n * growth[1]) for n in list(growth)[1:]),
    ]
