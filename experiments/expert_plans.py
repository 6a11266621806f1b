"""Makes the expert plans that ship with the project: those of the quick run's ScienceWorld tasks.

    python -m experiments.expert_plans

The simulated models follow the simulator's expert plan, which takes it up to 16 s to find. These are found once, each
verified by playing it to score 100; any other task's plan is made when it is asked for and kept in a cache. Expect
some minutes, with a count of the tasks, and `envs/data/scienceworld_plans.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from bopo_ray.benchmarks import select_tasks
from bopo_ray.pipeline.command import script_parser
from bopo_ray.pipeline.settings import Settings
from envs import scienceworld_plans
from envs.base import Split
from envs.scienceworld import ScienceWorldEnv
from envs.workers import process_pool

_env: ScienceWorldEnv | None = None


def verified_plan(task: str) -> tuple[str, list[str] | None]:
    """The task's plan, or None when playing it does not reach score 100."""
    global _env
    _env = _env or ScienceWorldEnv(max_steps=1000)
    _, info = _env.reset(options={"task": task, "expert_plan": True})
    plan = list(info["expert_plan"])
    for action in plan:
        _, _, terminated, truncated, info = _env.step(action)
        if terminated or truncated:
            break
    return task, plan if info["success"] else None


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    script_parser("expert_plans", __doc__).parse_args(argv)
    quick = Settings()
    counts = {Split.TRAIN: quick.train_tasks, Split.DEV: quick.test_tasks, Split.TEST: quick.test_tasks}
    tasks = [t.name for split, n in counts.items() for t in select_tasks(quick.env, split, n, 0)]
    with process_pool(2) as pool:
        plans = {}
        for i, (task, plan) in enumerate(pool.map(verified_plan, tasks, chunksize=8), 1):
            plans |= {task: plan} if plan else {}
            print(f"\r{i}/{len(tasks)} tasks", end="" if i < len(tasks) else "\n", file=sys.stderr, flush=True)
    record = {"scienceworld": version("scienceworld"), "version": scienceworld_plans.VERSION, "plans": plans}
    path = Path(scienceworld_plans.__file__).parent / "data" / scienceworld_plans.SHIPPED
    lines = json.dumps(record, ensure_ascii=False, separators=(",", ":")).replace('],"', '],\n"')
    path.write_text(lines + "\n", encoding="utf-8")
    print(f"{path}: {len(plans)} of {len(tasks)} tasks have a verified plan")


if __name__ == "__main__":
    main()
