"""How well a pair plays alone: boundary episodes of both models on given tasks, without Ray.

Always true here: an episode is played by the harness that the main job uses, at the same temperature and sample index.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

from envs.workers import process_pool

__all__ = ["Played", "play_boundaries"]

LANES = 8
"""Episodes in flight per process."""


class Played(NamedTuple):
    """One episode of a boundary policy."""

    task: str
    model: int
    """Index into the pool: 0 is SMALL."""
    sample: int
    outcome: float
    success: bool
    stop: str
    steps: int
    cost_usd: float
    actions: tuple[str, ...]
    observations: tuple[str, ...]


def play_boundaries(
    env_id: str, pool: Any, tasks: Sequence[str], k: int, processes: int, max_steps: int, temperature: float,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Played]:  # fmt: skip
    """Plays each task `k` times with each model.

    Args:
        env_id: the environment.
        pool: `PoolSpec` of the models.
        tasks: names.
        k: samples.
        processes: that play at once.
        max_steps: agent steps per episode.
        temperature: of the models.
        report: called with episodes done and in all.
    """
    jobs = [(task, model, sample) for task in tasks for model in range(len(pool.models)) for sample in range(k)]
    parts = [jobs[i::processes] for i in range(processes)]
    parts = [part[at : at + 64] for part in parts for at in range(0, len(part), 64)]
    out: list[Played] = []
    with process_pool(processes) as workers:
        waiting = [workers.submit(_play, env_id, pool, part, max_steps, temperature) for part in parts]
        for future in as_completed(waiting):
            out += future.result()
            report(len(out), len(jobs))
    return sorted(out)


def _play(
    env_id: str, spec: Any, jobs: Sequence[tuple[str, int, int]], max_steps: int, temperature: float
) -> list[Played]:
    import gymnasium as gym
    import torch

    import envs  # noqa: F401 (registers the benchmarks)
    from bopo_ray.models import build_pool
    from bopo_ray.routing_env import RoutingEnv

    torch.set_num_threads(1)
    pool, local = build_pool(spec), threading.local()

    def one(job: tuple[str, int, int]) -> Played:
        if not hasattr(local, "env"):
            local.env = RoutingEnv(
                gym.make(env_id, max_steps=max_steps, disable_env_checker=True), pool, temperature=temperature
            )
        task, model, sample = job
        local.env.reset(options={"task": task, "sample": sample})
        steps: list[dict[str, Any]] = []
        over = False
        while not over:
            _, outcome, terminated, truncated, info = local.env.step(model)
            steps.append(info)
            over = terminated or truncated
        return Played(
            task, model, sample, float(outcome), bool(info["success"]), str(info["stop"]), len(steps),
            sum(s["cost_microusd"] for s in steps) / 1e6,
            tuple(s["action"] for s in steps), tuple(s["observation"] for s in steps),
        )  # fmt: skip

    with ThreadPoolExecutor(LANES) as threads:
        return list(threads.map(one, jobs))
