"""The policies of a finished run under hard caps (table 1 of the paper): budget-constrained decoding, Eq. (9).

The episodes are a run of their own in the folder hard-budget of the finished one, with a ledger of their own; they use
its call store, its tasks and its trained routers, and train nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from bopo_ray.analysis.finished import FinishedRun
from bopo_ray.errors import ConfigError
from bopo_ray.models.pool import read_pool, resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.pipeline.baselines import Policy, specs, trained_routers
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.same import check_same_models
from bopo_ray.pipeline.settings import load_settings
from bopo_ray.pipeline.stages import load_policy
from bopo_ray.records import Budget, CostMode
from bopo_ray.routers import LEARNED, parse_router

__all__ = ["FOLDER", "caps_of", "open_run", "play_caps", "policies_of", "usd_caps"]

FOLDER = "hard-budget"
"""In the finished run's."""
USD_SHARES = (0.25, 0.5, 0.75)
"""Dollar caps, as shares of what always-large costs without one."""


def usd_caps(finished: FinishedRun) -> list[float]:
    """Three dollar caps that bind: USD_SHARES of always-large's mean cost, to four digits."""
    large = finished.frontier.set_index("policy")["cost_usd"]["always-large"]
    return [round(share * float(large), 4) for share in USD_SHARES]


def policies_of(finished: FinishedRun, only: Sequence[str] = ()) -> list[Policy]:
    """The policies that a finished run evaluated, or `only` those of these methods or names.

    Not the oracle, which knows successes without a cap. Raises ConfigError when nothing is left.
    """
    routers = finished.evaluation().drop_duplicates("policy").set_index("policy")["router"]
    found = []
    for row in finished.frontier.to_dict("records"):
        name, method = str(row["policy"]), str(row["method"])
        if method == "oracle" or (only and name not in only and method not in only):
            continue
        lam, seed = (None if pd.isna(row[k]) else row[k] for k in ("lam", "train_seed"))
        learned = routers[name] == LEARNED
        folder = finished.folder / "policies" / name if learned else None
        found.append(Policy(name, method, routers[name], lam, seed if seed is None else int(seed), folder))
    unknown = set(only) - {p.name for p in found} - {p.method for p in found}
    if unknown or not found:
        raise ConfigError(
            f"policies={sorted(unknown)}: not among those of {finished.folder}: "
            f"{', '.join(m for m in finished.frontier['method'].unique() if m != 'oracle')}; set them with --policies"
        )
    return found


def open_run(finished: FinishedRun, max_spend: float, cpus: int, console: Console, name: str = FOLDER) -> Run:
    """A run in the folder `name` of a finished one, with its settings, tasks, models and call store.

    Raises ConfigError where models or prices are others than the finished one's.
    """
    folder = finished.folder
    settings = load_settings(folder / "settings.yaml")
    prices = price_table(Path(settings.prices)) if settings.prices else price_table()
    models = resolve_pool(settings.pool, settings.small, settings.large, prices)
    check_same_models(read_pool(folder / "pool.yaml", prices), models, folder)
    calls = settings.calls or str(folder / "calls.db")
    own = dataclasses.replace(settings, calls=calls, max_spend=max_spend, cpus=cpus, budget_calls=None, budget_usd=None)
    return Run(own, folder / name, resume=True, console=console)


def play_caps(run: Run, finished: FinishedRun, policies: Sequence[Policy], caps: Sequence[Budget]) -> pd.DataFrame:
    """Plays each policy on the test tasks under each cap; finished episodes are not repeated.

    Returns one row per episode, as `bopo_ray.analysis.studies.hard_budget` takes them.
    """
    store = run.store("evaluation")
    names = [parse_router(p.router) for p in policies if p.router != LEARNED]
    trained = trained_routers(run, names, finished.folder / "episodes" / "boundary")
    for i, policy in enumerate(policies):
        todo = [s for cap in caps for s in specs(run.test, policy, run.settings, cap)]
        if store.missing(todo):
            weights = load_policy(run, policy.folder) if policy.folder else None
            run.play(f"{policy.name}, {len(caps)} caps", store, todo, weights, i + 1, trained)
    run.stop_runners()
    by_name, wanted = {p.name: p for p in policies}, set(caps)
    rows = []
    for e in store.read():
        budget, policy = e.spec.budget, by_name.get(e.spec.policy)
        if budget not in wanted or budget is None or policy is None:
            continue
        calls = budget.mode is CostMode.CALLS
        used = e.large_calls if calls else sum(s.charged_microusd for s in e.steps) / 1e6
        rows.append(
            {"unit": str(budget.mode), "cap": budget.cap if calls else budget.cap / 1e6, "used": used,
             "method": policy.method, "policy": policy.name, "lam": policy.lam, "train_seed": policy.seed,
             "task": e.spec.task.name, "member": e.spec.member, "success": e.success, "score": e.score,
             "cost_usd": e.cost_microusd / 1e6, "large_calls": e.large_calls, "steps": len(e.steps),
             "stop": str(e.stop)}
        )  # fmt: skip
    return pd.DataFrame(rows)


def caps_of(calls: Sequence[int], usd: Sequence[float]) -> list[Budget]:
    """The caps, each once; raises ConfigError for one below 0."""
    wrong = [c for c in (*calls, *usd) if not 0 <= c < float("inf")]
    if wrong or not (calls or usd):
        raise ConfigError(f"caps={wrong or 'none'}: need numbers >= 0; set them with --calls or --usd")
    caps = [Budget(CostMode.CALLS, c) for c in calls] + [Budget(CostMode.USD, round(c * 1_000_000)) for c in usd]
    return list(dict.fromkeys(caps))
