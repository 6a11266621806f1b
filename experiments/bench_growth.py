"""What an update costs its driver, per episode, as there are more of them: nothing may grow faster than the work.

    python -m experiments.bench growth

Two runners hand in episodes that they need not play, of `STEPS` steps each, in groups of `GROUP`; what is measured is
all that the driver then does with them, up to the learner. Time is the driver's CPU time; memory is how much its
resident set has grown when it holds all episodes and the batch; the object store's is the most that was in use.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
from ray.thirdparty_files import psutil

from bopo_ray.models.pool import resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.records import Episode, EpisodeSpec, Phase, Step, StopReason
from bopo_ray.rllib.batch import Group, bopo_batch
from bopo_ray.rllib.bopo import BoPOConfig
from bopo_ray.rllib.collect import collect
from bopo_ray.rllib.placement import RunnerGroup
from bopo_ray.rllib.runner import GroupEnvRunner
from bopo_ray.store import EpisodeStore
from envs.base import Split, Task
from experiments.bench import Row
from experiments.bench_rollouts import ID

__all__ = ["run"]

COUNTS = (100, 1_000, 10_000)
STEPS, GROUP, LANES = 20, 8, 64
CONTEXT, MINIBATCH = 96, 128
MB = 1 << 20


def steps(n: int) -> tuple[Step, ...]:
    """Of the n-th episode: texts of a benchmark's length, which it shares with no other."""
    return tuple(
        Step(
            model=t % 2, probabilities=(0.5, 0.5), mask=(True, True), reply=f"Thought: I tried {n}.\nAction: go {t}",
            action=f"go {t}", observation=f"You go to {n}. You see a table (on which are a cup and {t} jars) and more.",
            prompt_tokens=500, cached_tokens=400, completion_tokens=24, cost_microusd=100, lost_microusd=0,
            latency_s=0.5, router_s=0.001, question=None,
        )
        for t in range(STEPS)
    )  # fmt: skip


class Ready(GroupEnvRunner):
    """Has played every episode already."""

    def exchange(self, session: str, specs: Sequence[EpisodeSpec] = (), *_: Any) -> list[Any]:
        return [
            Episode(
                s, f"Your task is number {s.group}.", "This is the hallway.", STEPS, steps(GROUP * s.group + s.member),
                1.0, True, 100.0, StopReason.SUCCESS,
            )
            for s in specs
        ]  # fmt: skip


def run(seconds: float = 20.0, counts: Sequence[int] = COUNTS) -> Sequence[Row]:
    """One update of each size; `seconds` changes nothing."""
    del seconds
    mine = not ray.is_initialized()
    if mine:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    config = BoPOConfig().environment(ID, env_config={"pool": resolve_pool("simulated", "", "", price_table())})
    config.env_runners(env_runner_cls=Ready, num_env_runners=2, num_envs_per_env_runner=LANES,
                       num_cpus_per_env_runner=0.5)  # fmt: skip
    config.router()
    config.validate()
    group = RunnerGroup(config=config, local_env_runner=False)
    try:
        _update(group, 64, lambda *_: None)  # imports, caches
        rows: list[Row] = []
        for count in counts:
            _update(group, count, lambda what, unit, value, n=count: rows.append(  # type: ignore[misc]
                Row(f"{n:,} episodes, {what}", unit, value, None, None)))  # fmt: skip
        return rows
    finally:
        group.stop()
        if mine:
            ray.shutdown()


def _update(group: RunnerGroup, count: int, say: Callable[[str, str, float], None]) -> None:
    specs = [
        EpisodeSpec(Task(ID, f"0-0-0/{n // GROUP}", Split.TRAIN), Phase.POLICY, "bench", n // GROUP, n % GROUP, 0)
        for n in range(count)
    ]
    spent: dict[str, float] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        start = time.process_time()
        yield
        spent[part] = time.process_time() - start

    before = psutil.Process().memory_info().rss
    with TemporaryDirectory() as folder, _watched_store() as most:
        weights = {"w": np.zeros(60_000, np.float32)}
        with timed("collecting"):
            found = [e for e in collect(group, specs, weights, version=1) if isinstance(e, Episode)]
        with timed("storing"):
            EpisodeStore(Path(folder), "bench").append(found)
        with timed("batching"):
            whole = [found[i : i + GROUP] for i in range(0, len(found), GROUP)]
            groups = [Group(tuple(g), np.ones(len(g)), ()) for g in whole]
            batch = bopo_batch(groups, STEPS, CONTEXT, MINIBATCH, 1, np.random.default_rng(0))
        grown = psutil.Process().memory_info().rss - before
    assert batch is not None and len(found) == count
    for part, value in spent.items():
        say(part, "CPU ms/episode", 1e3 * value / count)
    say("driver's memory", "kB/episode", grown / 1e3 / count)
    say("object store", "MB", most[0] / MB)


@contextmanager
def _watched_store() -> Iterator[list[float]]:
    """The most bytes that were in use in the object store."""
    most, ended = [0.0], threading.Event()
    whole = ray.cluster_resources().get("object_store_memory", 0.0)

    def watch() -> None:
        while not ended.wait(0.1):
            most[0] = max(most[0], whole - ray.available_resources().get("object_store_memory", whole))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()
