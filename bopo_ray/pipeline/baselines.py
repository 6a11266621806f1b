"""The policies that an evaluation compares: which are asked for, and what those need that a name alone doesn't make."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bopo_ray.method.reward import CostScale, cost_ranges, normalised_cost
from bopo_ray.method.taxonomy import boundary_stats
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.settings import Settings
from bopo_ray.records import Budget, CostMode, Episode, EpisodeSpec, Phase
from bopo_ray.rllib.bopo import read_boundaries
from bopo_ray.routers import ALWAYS_LARGE, ALWAYS_SMALL, LEARNED, Kind, Lesson, Router, RouterName, oracle, parse_router
from envs.base import Split, Task

__all__ = [
    "DEFAULT_ROUTERS",
    "Policy",
    "asked_for",
    "best_policy",
    "dev_episodes",
    "dev_tasks",
    "matched_random",
    "play_dev",
    "play_oracle",
    "specs",
    "trained_routers",
]

DEFAULT_ROUTERS = ("first-large:2", "first-large:5", "first-large:7", "first-large:10", "first-large:15",
                   "last-large:10", "cascade:3", "task-level", "oracle")  # fmt: skip
"""Baselines of each evaluation. Those that are left out take long: dev tasks to play, or a model to ask.

The best of them, first-large, has no fewer points than a learned method has lambdas, since a curve of more points has
more hypervolume."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One row of the results."""

    name: str
    method: str
    router: str = LEARNED
    lam: float | None = None
    seed: int | None = None
    folder: Path | None = None
    """Of the saved router, for a learned one."""
    calls: int | None = None
    """Calls of the larger models that it may make on a task; None: as many as it wants."""


def asked_for(run: Run) -> list[RouterName]:
    """The default baselines, the schedules that a limit of large calls makes of a router that always calls the large
    model until it is reached, and those of --router; each once."""
    limits = [f"first-large:{n}" for n in run.settings.call_limits if n < run.settings.max_steps]
    return list(dict.fromkeys(parse_router(n) for n in (*DEFAULT_ROUTERS, *limits, *run.settings.router)))


def specs(tasks: Sequence[Task], policy: Policy, settings: Settings, budget: Budget | None) -> Iterator[EpisodeSpec]:
    """The evaluation episodes of a policy; learned routers decide as the settings say.

    Without a `budget` it is held to its own limit of large calls, where it has one.
    """
    if budget is None and policy.calls is not None:
        budget = Budget(CostMode.CALLS, policy.calls)
    greedy = policy.router == LEARNED and settings.decide == "greedy"
    for task in tasks:
        for member in range(settings.eval_samples):
            yield EpisodeSpec(
                task, Phase.EVALUATION, policy.name, 0, member, 0, greedy=greedy, budget=budget, router=policy.router
            )


def trained_routers(run: Run, names: Iterable[RouterName], folder: Path | None = None) -> dict[str, Router]:
    """Those of `names` that learn from boundary rollouts, by name: from the run's own, or from those in `folder`."""
    wanted = [n for n in names if n.kind is Kind.TRAINED]
    if not wanted:
        return {}
    boundaries = read_boundaries(folder or run.episodes / "boundary", run.pool.price_hash, run.mode)
    lessons = [Lesson(b.small[0].task_text, b.stats.difficulty(), (*b.small, *b.large)) for b in boundaries.values()]
    return {str(n): n.make(lessons) for n in wanted}


def dev_tasks(run: Run) -> tuple[Task, ...]:
    """Those that a run chooses by."""
    return run.tasks(Split.DEV, run.settings.dev_tasks or run.settings.test_tasks)


def play_dev(run: Run, names: Sequence[str]) -> tuple[Task, ...]:
    """Plays the boundary policies and these schedules on dev tasks, into the store "dev"; returns the tasks.

    Under the budget that the evaluation is under: what is best without one need not be best with it.
    """
    s, tasks = run.settings, dev_tasks(run)
    run.play(
        "fixed schedules on dev tasks", run.store("dev"),
        [EpisodeSpec(t, Phase.SELECTION, n, 0, m, 0, budget=s.budget, router=n) for t in tasks
         for n in (ALWAYS_SMALL, ALWAYS_LARGE, *names) for m in range(s.eval_samples)],
    )  # fmt: skip
    return tasks


def dev_episodes(run: Run) -> list[Episode]:
    """Those by which it is chosen what is evaluated: of a run under a budget, those that were under it."""
    budget = run.settings.budget
    return [e for e in run.store("dev").read(Phase.SELECTION) if budget in (None, e.spec.budget)]


def best_policy(
    episodes: Iterable[Episode], names: Sequence[str], lam: float, mode: CostMode,
    scale: CostScale = CostScale.BOUNDARIES,
) -> str:  # fmt: skip
    """The policy with the best mean of u - lambda * C_norm over the episodes' tasks; ties go to the first of `names`.

    C_norm is Eq. (6), arXiv:2602.21227, between the two boundary policies, which must be among the episodes.
    """
    by: dict[tuple[str, str], list[Episode]] = {}
    for e in episodes:
        by.setdefault((e.spec.policy, e.spec.task.name), []).append(e)
    tasks = sorted({t for _, t in by})
    stats = {t: boundary_stats(by[ALWAYS_SMALL, t], by[ALWAYS_LARGE, t], mode) for t in tasks}
    ranges = cost_ranges(stats, mode, scale)

    def value(policy: str) -> float:
        gains = [
            np.mean([e.outcome - lam * normalised_cost(e.cost(mode), ranges[t]) for e in by[policy, t]]) for t in tasks
        ]
        return float(np.mean(gains))

    return max(names, key=value)


def play_oracle(run: Run, known: Sequence[Episode], todo: Sequence[EpisodeSpec]) -> list[Episode]:
    """Plays the cheapest known success of each task again; its calls are stored ones. Returns the oracle's episodes.

    They have a folder of their own, which begins anew when a policy that came later knows better.
    """
    router, store = oracle(known, run.mode), run.store("oracle")
    if any(tuple(s.model for s in e.steps) != router.choices[e.spec.task.name, e.spec.member] for e in store.read()):
        shutil.rmtree(store.folder)
        store = run.store("oracle")
    run.play("evaluating oracle", store, todo, routers={"oracle": router})
    return list(store.read())


def matched_random(episodes: Iterable[Episode], policies: Iterable[str]) -> list[Policy]:
    """random(p) at the shares of large calls that `policies` have in `episodes`, to two digits."""
    calls = {name: [0, 0] for name in policies}
    for e in episodes:
        if e.spec.policy in calls:
            calls[e.spec.policy][0] += e.large_calls
            calls[e.spec.policy][1] += len(e.steps)
    shares = sorted({round(large / max(1, steps), 2) for large, steps in calls.values()})
    return [Policy(f"random({p:g})", "random", f"random({p:g})") for p in shares if 0 < p < 1]
