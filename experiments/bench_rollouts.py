"""Environment steps per second of the runners, when the models take their time.

    python -m experiments.bench rollouts

* ours: `collect` over `GroupEnvRunner`s, with call store, ledger and a learned router, as in a run; it reads
  --boundary-value, as on ALFWorld;
* naive: the same runners in lock-step, as a vector environment steps: nobody goes on before the slowest has answered;
* limit: the lesser of two bounds, which stand below it. By latency: episodes in flight / mean latency of a call, as if
  nothing else took any time. By CPU: what each runner's process does on one thread, all of them at once, when models
  answer at once: router, desk and harness of as many episodes as it has lanes, nothing waits, no thread and no process
  is talked to; measured just before and after ours.

A model answers after a fixed time, or after one drawn from a log-normal distribution of that mean (sigma 1: one call in
twenty takes more than three times as long). The environment itself costs nothing, and is called on the lanes' thread
(`instant`); its texts are as long as a benchmark's. Rates are of the steady state; "from the start" counts the first
seconds too, in which lanes open their environments. Last stands how much of the machine's CPU ours took, and where a
step's CPU time went.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import ray
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from bopo_ray.lanes import Lanes, finish
from bopo_ray.models.pool import resolve_pool
from bopo_ray.models.pricing import Price, Usage, price_table
from bopo_ray.models.protocol import Message, ModelPool, Reply, Request, Sampling
from bopo_ray.models.sqlite import Database
from bopo_ray.records import EpisodeSpec, Phase, spawn_seed
from bopo_ray.rllib.bopo import BoPOConfig
from bopo_ray.rllib.collect import collect
from bopo_ray.rllib.open_desk import DeskConfig, open_desk
from bopo_ray.rllib.runner import GroupEnvRunner
from bopo_ray.routers import LEARNED
from bopo_ray.routing_env import RoutingEnv
from envs.base import Split, Task, text_space
from experiments.bench import Row

__all__ = ["run"]

R = TypeVar("R")
ID = "experiments.bench_rollouts:Waits-v0"
MAX_STEPS = 24
"""Of an episode; each has its own length, from 8 steps on, so that they don't all end together."""
SIGMA = 1.0
"""Of the log-normal latencies."""
SETTINGS = (
    # latency in ms, drawn or not, runners, episodes in flight
    (50, False, 1, 16), (50, False, 2, 64), (500, False, 1, 256), (500, False, 2, 512), (500, False, 4, 512),
    (500, True, 2, 512), (50, False, 4, 512),
)  # fmt: skip
WARM_UP_S = 3.0
LEAST_S = 4.0
"""A setting is measured for at least so long."""
TIMED = 17
"""One of so many calls of a part is timed: to read a thread's CPU time takes 1 to 3 microseconds."""


@dataclass(frozen=True, slots=True)
class Clockwork:
    """What a task's name says: "<ms>-<drawn>-<until>/<n>"."""

    latency_s: float
    drawn: bool
    until: float
    """On the machine's monotonic clock; from then on calls take no time and episodes end."""

    @classmethod
    @functools.cache
    def of(cls, task: str) -> Clockwork:
        ms, drawn, until = task.partition("/")[0].split("-")
        return cls(float(ms) / 1e3, drawn == "1", float(until) / 1e6)


class Waits(gym.Env[str, str]):
    """Texts of a benchmark's length for nothing; counts its steps."""

    instant = True
    action_guide = "Do what the task asks."
    max_steps = MAX_STEPS
    stamps: list[float] = []  # noqa: RUF012 (of all environments of the process)

    def __init__(self, **_: Any) -> None:
        self.observation_space = self.action_space = text_space()

    @classmethod
    def tasks(cls, split: Split) -> tuple[Task, ...]:
        return ()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self.name = str((options or {})["task"])
        self.moves = 0
        self.length = 8 + spawn_seed("length", self.name) % (MAX_STEPS - 7)
        text = f"Your task is to find number {self.name.rpartition('/')[2]} and bring it to the kitchen."
        return "This room is called the hallway. In it, you see: a cup", self._state() | {
            "task": self.name, "task_text": text}  # fmt: skip

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.moves += 1
        now = time.monotonic()
        self.stamps.append(now)
        text = f"You {action}. You see {self.moves} doors, a table (on which are a cup, a bowl and a jar) and a sink."
        over = self.moves >= self.length or now > Clockwork.of(self.name).until
        return text, 0.0, over, False, self._state()

    def _state(self) -> dict[str, Any]:
        return {"score": 0.0, "success": False, "outcome": 0.0, "moves": self.moves}


gym.register("Waits-v0", entry_point=Waits)


class Slow:
    """A language model that answers the same after its latency, and waits as one behind an endpoint does."""

    needs_plan = False
    gives_way = True
    sampling = Sampling()
    price = Price(400_000, 100_000, 1_600_000)

    def __init__(self, name: str) -> None:
        self.name = self.identity = name

    def bound(self, messages: tuple[Message, ...]) -> int:
        return 64 * len(messages)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass

    def complete(self, request: Request) -> Reply:
        work = Clockwork.of(request.task)
        seconds = work.latency_s
        if work.drawn:
            rng = np.random.default_rng(spawn_seed(request.task, len(request.messages), request.sample))
            seconds *= float(np.exp(rng.normal(-(SIGMA**2) / 2, SIGMA)))
        seconds = min(seconds, work.until - time.monotonic())
        if seconds > 0:
            finish(asyncio.sleep(seconds))
        text = f"Thought: The next one is number {len(request.messages)}.\nAction: open door {len(request.messages)}"
        return Reply(text, Usage(60 * len(request.messages), 24), seconds)


class TimedRunner(GroupEnvRunner):
    """The runner of a run over `Slow` models; says what its parts took."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts, self.calls = Counter[str](), Counter[str]()
        self.marks: list[Counter[str]] = []
        for name in ("read", "_write_all"):  # in this process, which is the runner's
            setattr(Database, name, self._timed_method(getattr(Database, name)))

    def watch(self, at: Sequence[float]) -> None:
        """Notes the CPU times at these moments of the monotonic clock."""
        Waits.stamps.clear()
        self.marks = []
        for moment in at:
            threading.Timer(moment - time.monotonic(), lambda: self.marks.append(self._now())).start()

    def seen(self) -> tuple[list[float], list[Counter[str]]]:
        """Moments of the steps, and CPU seconds by part at the moments of `watch`."""
        return list(Waits.stamps), self.marks

    def alone(self, seconds: float) -> float:
        """Steps per second of so many episodes as there are lanes, when models answer at once on the lanes' thread."""
        lanes, self._lanes = self._lanes, Lanes(workers=0)
        begin = time.monotonic() + WARM_UP_S / 2
        end = begin + seconds
        prefix = f"0-0-{end * 1e6:.0f}/{os.getpid()}"
        Waits.stamps.clear()
        self.sample([_spec(f"{prefix}{n}") for n in range(int(3000 * (seconds + WARM_UP_S) / 8))])
        self._lanes.close(WARM_UP_S)
        self._lanes = lanes
        return sum(begin <= t < end for t in Waits.stamps) / seconds

    def _now(self) -> Counter[str]:
        return Counter({**self.parts, "all": time.process_time()})

    def timed(self, part: str, work: Callable[..., R], *args: Any) -> R:
        """What `work` returns; some of these calls stand for all of the part's."""
        self.calls[part] += 1
        if self.calls[part] % TIMED:
            return work(*args)
        start = time.thread_time()
        try:
            return work(*args)
        finally:
            self.parts[part] += TIMED * (time.thread_time() - start)

    def _timed_method(self, method: Any) -> Any:
        return lambda database, work: self.timed("store and ledger", method, database, work)

    def _make_env(self, env_id: str) -> RoutingEnv:
        models = (Slow("small"), Slow("large"))
        desk = open_desk(self.config.env_config["desk"])
        return RoutingEnv(gym.make(env_id, disable_env_checker=True), ModelPool(models, "", "", ""), desk)

    def _decide(self, asked: Any) -> Any:
        return self.timed("router", super()._decide, asked)


class LockStep(TimedRunner):
    """Waits for all lanes before each decision."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._lanes, self._at_most = Together(2 * self._n_lanes), self._n_lanes


class Together(Lanes):
    """The router is asked by all or by none."""

    def _due(self) -> Any:
        ready = [k for k, waiting in self._batches.items() if not k[0] or len(waiting) == self._alive]
        return min(ready, key=self._rank, default=None)


def run(seconds: float = 20.0, settings: Sequence[tuple[int, bool, int, int]] = SETTINGS) -> Sequence[Row]:
    """Measures each setting for its share of `seconds`, but at least `LEAST_S`, after a warm-up."""
    span = max(LEAST_S, seconds / (2 * len(settings)))
    mine = not ray.is_initialized()
    if mine:
        ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        return [row for setting in settings for row in _setting(*setting, span)]
    finally:
        if mine:
            ray.shutdown()


def _setting(ms: int, drawn: bool, runners: int, flying: int, span: float) -> list[Row]:
    ours = _measure(TimedRunner, ms, drawn, runners, flying, span)
    naive = _measure(LockStep, ms, drawn, runners, flying, span)
    name = f"{ms} ms{' log-normal' * drawn}, {runners} runner{'s' * (runners > 1)}, {flying} in flight"
    by_latency = flying / ms * 1e3
    return [
        Row(name, "steps/s", ours.rate, naive.rate, min(by_latency, ours.by_cpu)),
        Row("  bound by latency", "steps/s", by_latency, None, None),
        Row("  bound by CPU", "steps/s", ours.by_cpu, None, None),
        Row("  from the start", "steps/s", ours.from_start, naive.from_start, None),
        Row("  CPU in use", "cores", ours.cores, naive.cores, float(os.cpu_count() or 1)),
        *(Row(f"  {part}", "CPU ms/step", value, naive.parts[part], None) for part, value in ours.parts.items()),
    ]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was measured of a way."""

    rate: float
    """Steps per second, in the steady state ..."""
    from_start: float
    """... and from the first episode on."""
    by_cpu: float
    """Steps per second that the runners' processes could do."""
    cores: float
    """That runners and driver used."""
    parts: dict[str, float]
    """CPU milliseconds of a step."""


def _measure(cls: type[TimedRunner], ms: int, drawn: bool, runners: int, flying: int, span: float) -> _Seen:
    with TemporaryDirectory() as folder:
        desk = DeskConfig(str(Path(folder) / "calls.db"), str(Path(folder) / "spend.db"), 10**12)
        config = BoPOConfig().environment(
            ID, env_config={"pool": resolve_pool("simulated", "", "", price_table()), "desk": desk}
        )
        config.env_runners(
            env_runner_cls=cls, num_env_runners=runners, num_envs_per_env_runner=flying // runners,
            num_cpus_per_env_runner=1,
        )  # fmt: skip
        config.router(value=True)
        config.validate()
        group = EnvRunnerGroup(config=config, local_env_runner=False)
        try:
            weights = group.foreach_env_runner(_fresh_weights, local_env_runner=False)[0]
            bounds = [_by_cpu(group, span / 2)]
            seen = _play(group, weights, ms, drawn, flying, span)
            bounds.append(_by_cpu(group, span / 2))
            return replace(seen, by_cpu=sum(bounds) / 2)
        finally:
            group.stop()


def _by_cpu(group: EnvRunnerGroup, span: float) -> float:
    return float(sum(group.foreach_env_runner(lambda r: r.alone(span), local_env_runner=False)))


def _play(group: EnvRunnerGroup, weights: Any, ms: int, drawn: bool, flying: int, span: float) -> _Seen:
    begin = time.monotonic()
    start = begin + WARM_UP_S
    end = start + span
    group.foreach_env_runner(lambda r: r.watch((start, end)), local_env_runner=False)
    rate = min(flying / ms * 1e3, 3000.0)  # at most: the rest of the episodes ends at once
    count = max(2 * flying, int(1.2 * rate * (span + WARM_UP_S) / 8))
    prefix = f"{ms}-{int(drawn)}-{end * 1e6:.0f}"
    specs = [_spec(f"{prefix}/{n}") for n in range(count)]
    driver: list[float] = []
    for moment in (start, end):
        threading.Timer(moment - time.monotonic(), lambda: driver.append(time.process_time())).start()
    collect(group, specs, weights, version=1)
    stamps, cpu = list[float](), Counter[str](driver=driver[1] - driver[0])
    for times, (first, last) in group.foreach_env_runner(lambda r: r.seen(), local_env_runner=False):
        stamps += [t for t in times if t < end]
        cpu.update(last - first)
    steps = sum(t >= start for t in stamps)
    total = cpu["all"] + cpu["driver"]
    parts = {
        "router": cpu["router"], "store and ledger": cpu["store and ledger"], "driver": cpu["driver"],
        "harness, turns, Ray": cpu["all"] - cpu["router"] - cpu["store and ledger"],
    }  # fmt: skip
    ms_per_step = {part: 1e3 * seconds / steps for part, seconds in parts.items()}
    return _Seen(steps / span, len(stamps) / (end - begin), 0.0, total / span, ms_per_step)


def _spec(task: str) -> EpisodeSpec:
    return EpisodeSpec(Task(ID, task, Split.TRAIN), Phase.POLICY, "bench", 0, 0, 0, router=LEARNED)


def _fresh_weights(runner: Any) -> Any:
    runner.make_module()
    return runner.module.get_state()
