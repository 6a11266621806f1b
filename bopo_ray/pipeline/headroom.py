"""Every schedule on dev tasks, several times: what there is to gain by knowing a task. [ours]"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.run import Run
from bopo_ray.records import EpisodeSpec, Phase
from bopo_ray.routers import ALWAYS_LARGE, ALWAYS_SMALL
from envs.base import Split

__all__ = ["play_schedules"]


def play_schedules(run: Run, lengths: Sequence[int], tasks: int, samples: int) -> pd.DataFrame:
    """Plays first-large(K) and both boundary policies on dev tasks; stored episodes are not repeated.

    Args:
        run: holds the store "headroom".
        lengths: K of each schedule, in steps; those of the benchmark's step limit or above are always-large, and left
            out.
        tasks: of the dev split, at most.
        samples: episodes of each schedule on each task, with other draws of the models.

    Returns:
        A row per episode: task, sample, schedule (its name), k (0: always-small; the step limit: always-large),
        success, cost_usd, large_calls.

    Raises ConfigError where no schedule is left.
    """
    limit, store = run.settings.max_steps, run.store("headroom")
    own = sorted({k for k in lengths if 0 < k < limit})
    if not own:
        raise ConfigError(f"lengths={list(lengths)}: need one from 1 to {limit - 1}; set them with --lengths")
    schedules = {ALWAYS_SMALL: 0} | {f"first-large({k})": k for k in own} | {ALWAYS_LARGE: limit}
    specs = [
        EpisodeSpec(task, Phase.SELECTION, name, 0, member, 0, router=name)
        for name in schedules
        for task in run.tasks(Split.DEV, tasks)
        for member in range(samples)
    ]
    run.play("schedules on dev tasks", store, specs)
    wanted = {spec.id for spec in specs}
    return pd.DataFrame(
        {
            "task": e.spec.task.name, "sample": e.spec.member, "schedule": e.spec.policy,
            "k": schedules[e.spec.policy], "success": e.success, "cost_usd": e.cost_microusd / 1e6,
            "large_calls": e.large_calls,
        }
        for e in store.read()
        if e.spec.id in wanted
    )  # fmt: skip
