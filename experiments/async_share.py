"""Time and result of an update that does not wait for its slowest groups, beside one that does.

    python -m experiments.async_share                   # about 5 minutes
    python -m experiments.async_share --shares 1 0.5    # others

Errands are a toy whose models take their time, a log-normal one: one call in twenty takes more than three times the
mean. A door is open or locked; the small model opens open doors, the large one both. So the router can learn to read
the line before it decides. Prints, for each share and seed, seconds per update, the share of stale groups, and success,
cost and reward of the last updates' episodes. Expect less time for a smaller share, and about the same result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
import numpy as np
import ray
from ray.rllib.utils.metrics import LEARNER_RESULTS

from bopo_ray.models.pool import resolve_pool
from bopo_ray.models.pricing import Price, Usage, price_table
from bopo_ray.models.protocol import ModelPool, Reply, Request
from bopo_ray.pipeline.command import script_parser
from bopo_ray.records import Episode, EpisodeSpec, Phase, spawn_seed
from bopo_ray.rllib.bopo import BoPO, BoPOConfig
from bopo_ray.rllib.open_desk import DeskConfig, open_desk
from bopo_ray.rllib.runner import GroupEnvRunner
from bopo_ray.routers import ALWAYS_LARGE, ALWAYS_SMALL
from bopo_ray.routing_env import RoutingEnv
from bopo_ray.store import EpisodeStore
from envs.base import Split, Task, text_space
from experiments.bench_rollouts import Slow

__all__ = ["main"]

ID = "experiments.async_share:Errands-v0"
DOORS, LIMIT = 5, 8
"""Of an errand, and its steps."""
MEAN_S, SIGMA = 0.1, 1.0
"""Of a call's latency."""
TASKS, GROUPS, MEMBERS, UPDATES, LAST = 24, 8, 8, 16, 4
"""Tasks, groups of an update and their episodes; updates, and how many of them the result is taken from."""


class Errands(gym.Env[str, str]):
    """A row of doors; which are locked depends on the task."""

    action_guide = "Open the door that is before you."
    max_steps = LIMIT

    def __init__(self, **_: Any) -> None:
        self.observation_space = self.action_space = text_space()

    @classmethod
    def tasks(cls, split: Split) -> tuple[Task, ...]:
        return tuple(Task(ID, f"errand/{n}", split) for n in range(TASKS))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self.name, self.door, self.moves = str((options or {})["task"]), 0, 0
        return self._seen(), self._state() | {"task": self.name, "task_text": "Your task is to walk to the kitchen."}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.moves += 1
        self.door += action == ("turn key" if self._locked() else "open door")
        return self._seen(), 0.0, self.door == DOORS, False, self._state()

    def _locked(self) -> bool:
        return spawn_seed(self.name, self.door) % 3 == 0

    def _seen(self) -> str:
        return f"You stand before a {'locked' if self._locked() else 'open'} door."

    def _state(self) -> dict[str, Any]:
        done = self.door == DOORS
        return {"score": 100.0 * done, "success": done, "outcome": float(done), "moves": self.moves}


gym.register("Errands-v0", entry_point=Errands)


class Walker(Slow):
    """A language model that answers after a while; only the large one turns keys."""

    def __init__(self, name: str, price: Price) -> None:
        super().__init__(name)
        self.price = price

    def complete(self, request: Request) -> Reply:
        rng = np.random.default_rng(spawn_seed(self.name, *(m.content for m in request.messages), request.sample))
        seconds = MEAN_S * float(np.exp(rng.normal(-(SIGMA**2) / 2, SIGMA)))
        time.sleep(seconds)
        locked = request.messages[-1].content.endswith("locked door.")
        right = rng.random() < (0.9 if self.name == "large" else 0.05 if locked else 0.8)
        action = ("turn key" if locked else "open door") if right else "wait"
        return Reply(f"Thought: I see it.\nAction: {action}", Usage(60 * len(request.messages), 24), seconds)


class Runner(GroupEnvRunner):
    """The runner of a run, over `Walker`s."""

    def _make_env(self, env_id: str) -> RoutingEnv:
        models = (
            Walker("small", Price(400_000, 100_000, 1_600_000)),
            Walker("large", Price(2_000_000, 500_000, 8_000_000)),
        )
        desk = open_desk(self.config.env_config["desk"])
        return RoutingEnv(gym.make(env_id, disable_env_checker=True), ModelPool(models, "", "", ""), desk)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains once for each share and seed, in turns."""
    parser = script_parser("async_share", __doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=(1.0, 0.75), help="default: 1 0.75")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="default: 0 1 2")
    args = parser.parse_args(argv)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    print("share  seed  s/update  stale  ratio  success  cost, m$  reward", flush=True)
    try:
        with TemporaryDirectory() as folder:
            _boundaries(Path(folder))
            for seed in args.seeds:
                for share in args.shares:
                    print(f"{share:5g}  {seed:4}  {_train(Path(folder), share, seed)}", flush=True)
    finally:
        ray.shutdown()


def _config(folder: Path, name: str) -> BoPOConfig:
    desk = DeskConfig(str(folder / f"{name}.calls"), str(folder / f"{name}.spend"))
    config = BoPOConfig().environment(
        ID, env_config={"pool": resolve_pool("simulated", "", "", price_table()), "desk": desk}
    )
    config.env_runners(
        env_runner_cls=Runner, num_env_runners=2, num_envs_per_env_runner=GROUPS * MEMBERS // 2,
        num_cpus_per_env_runner=1,
    )  # fmt: skip
    config.router(width=32, layers=1)
    return config


def _boundaries(folder: Path) -> None:
    runner = Runner(config=_config(folder, "boundary"))
    specs = [
        EpisodeSpec(task, Phase.BOUNDARY, router, n, member, 0, router=router)
        for n, task in enumerate(Errands.tasks(Split.TRAIN))
        for router in (ALWAYS_SMALL, ALWAYS_LARGE)
        for member in range(5)
    ]
    EpisodeStore(folder / "boundary", "").append([e for e in runner.sample(specs) if isinstance(e, Episode)])
    runner.stop()


def _train(folder: Path, share: float, seed: int) -> str:
    config = _config(folder, f"{share}-{seed}")
    config.boundary_dir, config.t_max = str(folder / "boundary"), LIMIT
    config.group_size, config.tasks_per_update = MEMBERS, GROUPS
    config.difficulty_mix = {"hard": 1, "easy": 1, "intractable": 1}
    config.total_updates, config.async_share, config.lr, config.num_epochs = UPDATES, share, 3e-3, 2
    config.debugging(seed=seed)
    algorithm = config.build_algo()
    assert isinstance(algorithm, BoPO)
    figures: list[tuple[float, ...]] = []
    start = time.monotonic()
    for _ in range(UPDATES):
        result = algorithm.train()
        played = result["rollouts"]
        figures.append((
            result["groups"]["stale_share"], float(result[LEARNER_RESULTS]["default_policy"]["ratio"]),
            played["success"], 1e3 * played["cost_usd"], played["reward"],
        ))  # fmt: skip
    seconds = (time.monotonic() - start) / UPDATES
    algorithm.stop()
    stale, ratio = np.mean(figures, 0)[:2]
    success, cost, reward = np.mean(figures[-LAST:], 0)[2:]
    return f"{seconds:8.2f}  {stale:5.2f}  {ratio:5.3f}  {success:7.2f}  {cost:8.3f}  {reward:6.3f}"


if __name__ == "__main__":
    main()
