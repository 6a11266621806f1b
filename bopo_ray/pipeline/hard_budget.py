"""The methods of a finished run under hard caps (table 1 of the paper): budget-constrained decoding, Eq. (9).

What a method plays under a cap is chosen by its success on dev tasks under that very cap, then played on test tasks.
[ours] A cap is no price: a router that hardly calls the large model at a high lambda leaves a small cap unused. So a
learned router is tried with all offsets that it was calibrated by, and with one that has it call the large model until
the cap is used up; a schedule with each of its lengths.

The episodes are a run of their own in the folder hard-budget of the finished one, with a ledger of their own; they use
its call store, its tasks and its trained routers, and train nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from bopo_ray.analysis.finished import CAPPED, CHOSEN, FinishedRun
from bopo_ray.errors import ConfigError
from bopo_ray.models.pool import read_pool, resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.pipeline.baselines import Policy, dev_tasks, specs, trained_routers
from bopo_ray.pipeline.calibrate import ALL_LARGE, Tried, met_as_it_is, offsets_at, save_with, weights_with
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.same import check_same_models
from bopo_ray.pipeline.settings import load_settings
from bopo_ray.pipeline.sweep import learned_policies
from bopo_ray.records import Budget, CostMode, Episode, EpisodeSpec, Phase
from bopo_ray.routers import LEARNED, Router, parse_router
from bopo_ray.store import EpisodeStore
from envs.base import Task

__all__ = ["Candidate", "Choice", "candidates", "caps_of", "choose", "open_run", "play_caps", "usd_caps"]

USD_SHARES = (0.25, 0.5, 0.75)
"""Dollar caps, as shares of what always-large costs without one."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a method may play under a cap, with one training seed."""

    policy: Policy
    """Under a name of its own; of a learned router the folder is that of the router without an offset."""
    setting: str
    """What the candidates of several seeds have in common: a share of large calls, a schedule."""
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """What a method plays under a cap."""

    cap: Budget
    setting: str
    candidates: tuple[Candidate, ...]
    """One per training seed."""
    success: float
    """Of them under this cap, on dev tasks: the best of several, so flattered."""


def usd_caps(finished: FinishedRun) -> list[float]:
    """Three dollar caps that bind: USD_SHARES of always-large's mean cost, to four digits."""
    large = finished.frontier.set_index("policy")["cost_usd"]["always-large"]
    return [round(share * float(large), 4) for share in USD_SHARES]


def caps_of(calls: Sequence[int], usd: Sequence[float]) -> list[Budget]:
    """The caps, each once; raises ConfigError for one below 0."""
    wrong = [c for c in (*calls, *usd) if not 0 <= c < float("inf")]
    if wrong or not (calls or usd):
        raise ConfigError(f"caps={wrong or 'none'}: need numbers >= 0; set them with --calls or --usd")
    caps = [Budget(CostMode.CALLS, c) for c in calls] + [Budget(CostMode.USD, round(c * 1_000_000)) for c in usd]
    return list(dict.fromkeys(caps))


def open_run(finished: FinishedRun, max_spend: float, cpus: int, console: Console, name: str = CAPPED) -> Run:
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


def candidates(run: Run, finished: FinishedRun, methods: Sequence[str] = ()) -> list[Candidate]:
    """What the methods of a finished run may play under caps; all of its methods, or `methods` of them.

    Not the oracle, which knows successes without a cap. Raises ConfigError for a method that it has not.
    """
    known = [m for m in finished.frontier["method"].unique() if m != "oracle"]
    wanted = list(dict.fromkeys(methods)) or known
    if unknown := [m for m in wanted if m not in known]:
        raise ConfigError(
            f"methods={unknown}: not among those of {finished.folder}: {', '.join(known)}; set them with --methods"
        )
    routers = finished.evaluation().drop_duplicates("policy").set_index("policy")["router"]
    found = [
        Candidate(Policy(name, method, routers[name]), name)
        for name, method in finished.frontier[["policy", "method"]].itertuples(index=False)
        if method in wanted and routers[name] != LEARNED
    ]
    several = len(run.settings.train_lambdas or run.settings.lambdas) > 1
    for policy in learned_policies(run.settings, finished.folder):
        if policy.method in wanted:
            trained = f"lambda {policy.lam:g}, " if several and policy.lam is not None else ""
            for setting, offset in _offsets(run, finished, policy).items():
                own = dataclasses.replace(policy, name=Tried(offset).name_of(_folder(policy).name))
                found.append(Candidate(own, trained + setting, offset))
    return found


def _offsets(run: Run, finished: FinishedRun, policy: Policy) -> dict[str, float]:
    """What a router is tried with, by setting."""
    found = {"as trained": 0.0}
    if run.settings.shares:
        dev = EpisodeStore(finished.folder / "episodes" / "dev", run.pool.price_hash)
        met = met_as_it_is(dev, _folder(policy))
        for share in (*run.settings.shares, ALL_LARGE):
            (found[f"share {share:g}"],) = offsets_at(met, [share])
    return found


def _folder(policy: Policy) -> Path:
    assert policy.folder is not None
    return policy.folder


def choose(dev: Iterable[Episode], found: Sequence[Candidate], caps: Sequence[Budget]) -> list[Choice]:
    """By cap and method: the setting with the most success, over tasks and training seeds; of several the cheapest.

    One for all seeds, since the difference of two settings is small beside what a few dev tasks tell of one router.

    Args:
        dev: episodes of all of them under all caps.
        found: of settings that are as good, the first is taken.
        caps: by which to choose.
    """
    by: dict[tuple[str, Budget | None], dict[str, list[tuple[bool, int]]]] = {}
    for e in dev:
        own = by.setdefault((e.spec.policy, e.spec.budget), {}).setdefault(e.spec.task.name, [])
        own.append((e.success, e.cost_microusd))
    means = {key: np.mean([np.mean(own, 0) for own in tasks.values()], 0) for key, tasks in by.items()}
    methods: dict[str, dict[str, list[Candidate]]] = {}
    for c in found:
        methods.setdefault(c.policy.method, {}).setdefault(c.setting, []).append(c)

    def value(seeds: Sequence[Candidate], cap: Budget) -> tuple[float, float]:
        success, cost = np.mean([means[c.policy.name, cap] for c in seeds], 0).tolist()
        return round(success, 9), -cost

    chosen = []
    for cap in caps:
        for settings in methods.values():
            best = max(settings, key=lambda name: value(settings[name], cap))
            chosen.append(Choice(cap, best, tuple(settings[best]), value(settings[best], cap)[0]))
    return chosen


def play_caps(run: Run, finished: FinishedRun, found: Sequence[Candidate], caps: Sequence[Budget]) -> pd.DataFrame:
    """Chooses on dev tasks what each method plays under each cap, plays it on the test tasks, and keeps the routers.

    Finished episodes are not repeated. Returns one row per test episode, as `bopo_ray.analysis.studies.hard_budget`
    takes them.
    """
    names = [parse_router(c.policy.router) for c in found if c.policy.router != LEARNED]
    trained = trained_routers(run, names, finished.folder / "episodes" / "boundary")
    dev, test = run.store("dev"), run.store("evaluation")
    tasks = dev_tasks(run)
    _play(run, dev, tasks, Phase.SELECTION, [(c, caps) for c in found], trained)
    chosen = choose(dev.read(Phase.SELECTION), found, caps)
    todo: dict[str, tuple[Candidate, list[Budget]]] = {}
    for choice in chosen:
        for c in choice.candidates:
            todo.setdefault(c.policy.name, (c, []))[1].append(choice.cap)
    _play(run, test, run.test, Phase.EVALUATION, list(todo.values()), trained)
    run.stop_runners()
    table = pd.DataFrame([_chosen_row(run, choice, c) for choice in chosen for c in choice.candidates])
    table.to_csv(run.out / CHOSEN, index=False)
    rows = pd.DataFrame([_episode_row(e) for e in test.read() if e.spec.budget])
    return rows.merge(table.drop(columns="dev_success"), on=["unit", "cap", "policy"])


def _play(
    run: Run, store: EpisodeStore, tasks: Sequence[Task], phase: Phase,
    wanted: Sequence[tuple[Candidate, Sequence[Budget]]], trained: Mapping[str, Router],
) -> None:  # fmt: skip
    """Each candidate under its caps, as far as it is not there; those without weights all at once."""

    def todo(candidate: Candidate, caps: Sequence[Budget]) -> list[EpisodeSpec]:
        own = (s for cap in caps for s in specs(tasks, candidate.policy, run.settings, cap))
        return [dataclasses.replace(s, phase=phase) for s in own]

    where = "dev" if phase is Phase.SELECTION else "test"
    fixed = [s for c, caps in wanted if c.policy.folder is None for s in todo(c, caps)]
    run.play(f"baselines under caps, {where} tasks", store, fixed, routers=trained)
    for c, caps in wanted:
        if c.policy.folder and store.missing(own := todo(c, caps)):
            weights = weights_with(run, c.policy.folder, c.offset)
            run.play(f"{c.policy.name}, {len(caps)} caps, {where} tasks", store, own, weights)


def _chosen_row(run: Run, choice: Choice, candidate: Candidate) -> dict[str, object]:
    """The choice for a training seed; a router is saved for it, with its offset and a card."""
    policy, cap, offset = candidate.policy, choice.cap, candidate.offset
    row: dict[str, object] = _cap(cap) | {
        "method": policy.method, "setting": choice.setting, "train_seed": policy.seed, "policy": policy.name,
        "dev_success": choice.success, "router": None,
    }  # fmt: skip
    if policy.folder:
        words = f"{cap.cap}-calls" if cap.mode is CostMode.CALLS else f"{cap.cap / 1e6:g}-usd"
        row["router"] = f"{policy.folder.name}_under-{words}_offset{offset:g}"
        how = {"offset": offset, "cap": words.replace("-", " ")}
        save_with(run.out / "policies", policy, str(row["router"]), **how)
    return row


def _episode_row(e: Episode) -> dict[str, object]:
    assert e.spec.budget is not None
    used = e.large_calls if e.spec.budget.mode is CostMode.CALLS else sum(s.charged_microusd for s in e.steps) / 1e6
    return _cap(e.spec.budget) | {
        "used": used, "policy": e.spec.policy, "task": e.spec.task.name, "member": e.spec.member,
        "success": e.success, "score": e.score, "cost_usd": e.cost_microusd / 1e6, "large_calls": e.large_calls,
        "steps": len(e.steps), "stop": str(e.stop),
    }  # fmt: skip


def _cap(budget: Budget) -> dict[str, object]:
    cap = budget.cap if budget.mode is CostMode.CALLS else budget.cap / 1e6
    return {"unit": str(budget.mode), "cap": float(cap)}
