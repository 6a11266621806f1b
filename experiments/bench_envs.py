"""Steps per second of the benchmarks' environments, on the same task with the same actions, one environment at a time.

    python -m experiments.bench envs

ALFWorld's are in `bench_alfworld`, AppWorld's in `bench_appworld`. For ScienceWorld:

* naive: `step` of the simulator's own Python environment, in a Java process as that package starts it;
* ours: `ScienceWorldEnv.step`;
* limit: the engine's `step` alone, called through py4j, in our Java process (first row) and in the package's
  (second row: other Java options, with which the order of listings is not the same from one episode to the next).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from bopo_ray.errors import ConfigError
from experiments import bench_alfworld, bench_appworld
from experiments.bench import Row, interleave

__all__ = ["run"]

TASK = "boil/3"
ACTIONS = (
    *("look around", "teleport to kitchen", "open cupboard", "look in cupboard", "open fridge", "pick up thermometer"),
    *("look around", "examine table", "inventory", "activate sink", "wait1", "teleport to workshop", "look around"),
    *("look at table", "teleport to greenhouse", "look around", "teleport to outside", "look around", "wait1"),
)
WARM_UP_ROUNDS = 4
"""Untimed rounds: Java compiles what runs often."""


def run(seconds: float = 20.0) -> Sequence[Row]:
    """Measure for about `seconds`, after a warm-up; ALFWorld and AppWorld only where they are installed."""
    benchmarks = [_scienceworld]
    if find_spec("fast_downward"):
        benchmarks.append(bench_alfworld.run)
    if _appworld_is_installed():
        benchmarks.append(bench_appworld.run)
    return [row for benchmark in benchmarks for row in benchmark(seconds / len(benchmarks))]


def _appworld_is_installed() -> bool:
    from envs.appworld import client

    try:
        client.find_python()
    except ConfigError:
        return False
    return True


def _scienceworld(seconds: float) -> Sequence[Row]:
    import scienceworld

    from envs.scienceworld import ScienceWorldEnv, parse_task

    logging.getLogger("py4j").setLevel(logging.CRITICAL + 1)
    ours, raw = ScienceWorldEnv(max_steps=10**9), ScienceWorldEnv()
    package, package_raw = scienceworld.ScienceWorldEnv("", envStepLimit=10**9), scienceworld.ScienceWorldEnv("")
    kind, variation = parse_task(TASK)

    def reset() -> None:
        for env in (ours, raw):
            env.reset(options={"task": TASK})
        for env in (package, package_raw):
            env.load(kind, variation, "easy")
            env.server.step("look around")

    def each(step: Callable[[str], object]) -> Callable[[], None]:
        def play() -> None:
            for action in ACTIONS:
                step(action)

        return play

    reset()
    ways = {
        "ours": each(ours.step),
        "limit": each(raw._engine._server.step),
        "naive": each(package.step),
        "package raw": each(package_raw.server.step),
    }
    for _ in range(WARM_UP_ROUNDS):
        for play in ways.values():
            play()
    reset()
    rate = {name: rounds * len(ACTIONS) for name, rounds in interleave(ways, seconds).items()}
    for env in (ours, raw, package, package_raw):
        env.close()
    return [
        Row("ScienceWorld", "steps/s", rate["ours"], rate["naive"], rate["limit"]),
        Row("ScienceWorld, limit as packaged", "steps/s", rate["ours"], rate["naive"], rate["package raw"]),
    ]
