"""The methods of a finished run under hard caps (table 1 of the paper): budget-constrained decoding, Eq. (9).

What a method plays under a cap is chosen by its success on dev tasks under that very cap, then played on test tasks.
[ours] A cap is no price: a router that hardly calls the large model at a high lambda leaves a small cap unused. So a
learned router is tried with all offsets that it was calibrated by, a schedule with each of its lengths. With an offset
that leaves the small model nothing, and a limit of large calls, a router is such a schedule; it is one wherever none of
its own settings is better on dev tasks by more than a standard error, since the best of many is flattered by chance.

The episodes are a run of their own in the folder hard-budget of the finished one, with a ledger of their own; they use
its call store, its tasks and its trained routers, and train nothing.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from bopo_ray.analysis.bootstrap import FloatArray
from bopo_ray.analysis.finished import CAPPED, CHOSEN, FinishedRun
from bopo_ray.errors import ConfigError, StoreError
from bopo_ray.files import write_bytes
from bopo_ray.models.pool import read_pool, resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.pipeline.baselines import Policy, dev_tasks, specs, trained_routers
from bopo_ray.pipeline.calibrate import ALL_LARGE, Tried, met_as_it_is, offsets_at, save_with, weights_with
from bopo_ray.pipeline.card import add_results
from bopo_ray.pipeline.preflight import locked, studies, taken_microusd
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.same import check_same_models
from bopo_ray.pipeline.settings import Settings, load_settings, microusd
from bopo_ray.pipeline.sweep import learned_policies
from bopo_ray.records import Budget, CostMode, Episode, EpisodeSpec, Phase
from bopo_ray.routers import ALWAYS_LARGE, LEARNED, Router, parse_router
from bopo_ray.store import EpisodeStore
from envs.base import Split, Task

__all__ = ["Candidate", "Choice", "candidates", "caps_of", "choose", "left_usd", "open_run", "play_caps", "usd_caps"]

SCHEDULES = (ALWAYS_LARGE, "first-large")
"""Methods that a router is, with some offset and limit of large calls."""
USD_SHARES = (0.25, 0.5, 0.75)
"""Dollar caps, as shares of what always-large costs without one."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a method may play under a cap, with one training seed."""

    policy: Policy
    """What is played, under a name of its own. A router that decides has the folder of that without an offset."""
    setting: str
    """What the candidates of several seeds have in common: a share of large calls, a schedule."""
    trained: Path | None = None
    """Of a learned router, without an offset; also where it plays a schedule."""
    offset: float = 0.0
    calls: int | None = None
    """Limit of large calls beside the cap; None: no other than the cap."""


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
    """Three dollar caps that bind: USD_SHARES of always-large's mean cost, to three digits; none where it is free.

    Raises ConfigError where the run was under a budget of its own, and so does not know that cost.
    """
    own = load_settings(finished.folder / "settings.yaml")
    for name in ("budget_calls", "budget_usd"):
        if (cap := getattr(own, name)) is not None:
            raise ConfigError(
                f"{name}={cap:g}: {finished.folder} was evaluated under it, so what always-large costs without a cap, "
                "of which default dollar caps are shares, is not known; give caps with --usd, e.g. --usd 0.01,0.02, "
                "or none with --usd ''"
            )
    large = float(finished.frontier.set_index("policy")["cost_usd"]["always-large"])
    caps = [float(f"{share * large:.3g}") for share in USD_SHARES]
    return [cap for cap in caps if microusd(cap)]


def caps_of(calls: Sequence[int], usd: Sequence[float]) -> list[Budget]:
    """The caps, each once; raises ConfigError for one below 0."""
    wrong = [c for c in (*calls, *usd) if not 0 <= c < float("inf")]
    if wrong or not (calls or usd):
        raise ConfigError(f"caps={wrong or 'none'}: need numbers >= 0; set them with --calls or --usd")
    caps = [Budget(CostMode.CALLS, c) for c in calls] + [Budget(CostMode.USD, microusd(c)) for c in usd]
    return list(dict.fromkeys(caps))


@contextmanager
def open_run(
    finished: FinishedRun, max_spend: float | None, cpus: int, console: Console, name: str = CAPPED
) -> Iterator[Run]:
    """A run in the folder `name` of a finished one, with its settings, tasks, models and call store.

    Its new calls may cost `max_spend` dollars, what it spent before included; None: what the finished one's own limit
    has left (see `left_usd`). Raises ConfigError where models or prices are others than the finished one's, and while
    that one, or another study of it, is open.
    """
    with locked(finished.folder):
        own = _settings(finished.folder, max_spend, cpus, console, name)
        with Run(own, finished.folder / name, resume=True, console=console) as run:
            yield run


def _settings(folder: Path, max_spend: float | None, cpus: int, console: Console, name: str) -> Settings:
    """Of the study `name` of the run in `folder`, see `open_run`."""
    settings = load_settings(folder / "settings.yaml")
    if max_spend is None:
        max_spend = left_usd(folder, settings.max_spend, name)
        if not math.isinf(max_spend):
            console.print(
                f"New calls may cost ${max_spend:.6f}: what is left of the run's limit of ${settings.max_spend:g} "
                "(another with --max-spend)", soft_wrap=True, highlight=False,
            )  # fmt: skip
    prices = price_table(Path(settings.prices)) if settings.prices else price_table()
    models = resolve_pool(settings.pool, settings.small, settings.large, prices)
    check_same_models(read_pool(folder / "pool.yaml", prices), models, folder)
    calls = settings.calls or str(folder / "calls.db")
    return dataclasses.replace(
        settings, calls=calls, max_spend=max_spend, cpus=cpus, budget_calls=None, budget_usd=None
    )


def left_usd(folder: Path, limit: float, name: str) -> float:
    """Dollars that the limit of the run in `folder` leaves to the study in its folder `name`: less what that run and
    its other studies have spent and reserved. What the study itself has spent is for its own ledger to count."""
    if math.isinf(limit):
        return limit
    others = [folder, *(study for study in studies(folder) if study.name != name)]
    return max(0, microusd(limit) - taken_microusd(others)) / 1e6


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
    fixed = [
        Candidate(Policy(name, method, routers[name]), name)
        for name, method in finished.frontier[["policy", "method"]].itertuples(index=False)
        if routers[name] != LEARNED
    ]
    found = [c for c in fixed if c.policy.method in wanted]
    schedules = [c for c in fixed if c.policy.method in SCHEDULES]
    if "first-large" in wanted:  # of all steps it is always-large, which routers may play, too
        whole = [c for c in schedules if c.policy.method == ALWAYS_LARGE]
        found += [Candidate(dataclasses.replace(c.policy, method="first-large"), c.setting) for c in whole]
    several = len(run.settings.train_lambdas or run.settings.lambdas) > 1
    for policy in learned_policies(run.settings, finished.folder):
        if policy.method in wanted:
            trained = f"lambda {policy.lam:g}, " if several and policy.lam is not None else ""
            for setting, offset in _offsets(run, finished, policy).items():
                own = dataclasses.replace(policy, name=Tried(offset).name_of(_folder(policy).name))
                found.append(Candidate(own, trained + setting, policy.folder, offset))
            if run.settings.shares:
                found += [_as_schedule(policy, c) for c in schedules]
    each: dict[tuple[str, int | None, str], Candidate] = {}
    for c in found:  # of several lambdas one plays a schedule for all
        each.setdefault((c.policy.method, c.policy.seed, c.setting), c)
    return list(each.values())


def _offsets(run: Run, finished: FinishedRun, policy: Policy) -> dict[str, float]:
    """What a router is tried with, by setting."""
    found = {"as trained": 0.0}
    if run.settings.shares:
        dev = EpisodeStore(finished.folder / "episodes" / "dev", run.pool.price_hash)
        met = met_as_it_is(dev, _folder(policy))
        if not met:
            raise StoreError(
                f"{finished.folder} has no dev episodes of {_folder(policy).name}: more was asked of the run than it "
                "has finished; go on with it first: python -m experiments.frontier --out FOLDER --resume"
            )
        for share in run.settings.shares:
            (found[f"share {share:g}"],) = offsets_at(met, [share], run.settings.decide == "greedy")
    return found


def _as_schedule(policy: Policy, schedule: Candidate) -> Candidate:
    """The learned policy, where it plays that schedule; the episodes are the schedule's own."""
    played = dataclasses.replace(schedule.policy, method=policy.method, lam=policy.lam, seed=policy.seed)
    steps = parse_router(schedule.policy.router).argument
    return Candidate(played, schedule.setting, policy.folder, ALL_LARGE, None if steps is None else int(steps))


def _folder(policy: Policy) -> Path:
    assert policy.folder is not None
    return policy.folder


def choose(dev: Iterable[Episode], found: Sequence[Candidate], caps: Sequence[Budget], mode: CostMode) -> list[Choice]:
    """By cap and method: the setting with the most success, over tasks and training seeds; of several the cheapest.

    A router's setting counts where it is better than the best schedule by more than a standard error of the difference
    over tasks. One setting for all seeds, since the difference of two is small beside what a few dev tasks tell of one
    router.

    Args:
        dev: episodes of all of them under all caps.
        found: of settings that are as good, the first is taken.
        caps: by which to choose.
        mode: what is cheapest.
    """
    by: dict[tuple[str, Budget | None], dict[str, list[tuple[bool, int]]]] = {}
    for e in dev:
        own = by.setdefault((e.spec.policy, e.spec.budget), {}).setdefault(e.spec.task.name, [])
        own.append((e.success, e.cost(mode)))
    of_tasks = {key: np.array([np.mean(own, 0) for _, own in sorted(tasks.items())]) for key, tasks in by.items()}
    methods: dict[str, dict[str, list[Candidate]]] = {}
    for c in found:
        methods.setdefault(c.policy.method, {}).setdefault(c.setting, []).append(c)

    chosen = []
    for cap in caps:
        for settings in methods.values():
            results = {
                name: np.mean([of_tasks[c.policy.name, cap] for c in seeds], 0) for name, seeds in settings.items()
            }
            best = _best(results, [name for name, seeds in settings.items() if not seeds[0].policy.folder])
            success, _ = results[best].mean(0)
            chosen.append(Choice(cap, best, tuple(settings[best]), round(float(success), 9)))
    return chosen


def _best(results: Mapping[str, FloatArray], schedules: Sequence[str]) -> str:
    """The setting to play, by success and cost on each task, [tasks, 2]."""

    def value(name: str) -> tuple[float, float]:
        success, cost = results[name].mean(0).tolist()
        return round(success, 9), -cost

    if not schedules:
        return max(results, key=value)
    schedule = max(schedules, key=value)

    def better(name: str) -> bool:
        more_T = results[name][:, 0] - results[schedule][:, 0]
        if len(more_T) < 2:
            return False
        error = more_T.std(ddof=1) / math.sqrt(len(more_T))
        return bool(more_T.mean() > error + 1e-9)  # where one task differs, the two are equal

    return max((name for name in results if better(name)), key=value, default=schedule)


def play_caps(
    run: Run, finished: FinishedRun, found: Sequence[Candidate], caps: Sequence[Budget], n_dev: int = 0
) -> pd.DataFrame:
    """Chooses on dev tasks what each method plays under each cap, plays it on the test tasks, and keeps the routers.

    Finished episodes are not repeated. Returns one row per method, training seed and test episode, as
    `bopo_ray.analysis.studies.hard_budget` takes them.

    Args:
        run: of `open_run`.
        finished: the run whose methods these are.
        found: of `candidates`.
        caps: of `caps_of`.
        n_dev: dev tasks to choose by, of those that there are; 0: the run's.
    """
    fixed = [parse_router(c.policy.router) for c in found if c.policy.router != LEARNED]
    trained = trained_routers(run, fixed, finished.folder / "episodes" / "boundary")
    dev, test = run.store("dev"), run.store("evaluation")
    tasks = run.tasks(Split.DEV, n_dev) if n_dev else dev_tasks(run)
    by_name = {c.policy.name: (c, caps) for c in found}
    _play(run, dev, tasks, Phase.SELECTION, list(by_name.values()), trained)
    names = {t.name for t in tasks}
    chosen = choose((e for e in dev.read(Phase.SELECTION) if e.spec.task.name in names), found, caps, run.mode)
    todo: dict[str, tuple[Candidate, list[Budget]]] = {}
    for choice in chosen:
        for c in choice.candidates:
            own = todo.setdefault(c.policy.name, (c, []))[1]
            own += [choice.cap] if choice.cap not in own else []
    _play(run, test, run.test, Phase.EVALUATION, list(todo.values()), trained)
    run.stop_runners()
    table = pd.DataFrame([_chosen_row(run, choice, c) for choice in chosen for c in choice.candidates])
    episodes = pd.DataFrame([_episode_row(e) for e in test.read() if e.spec.budget])
    rows = episodes.merge(table.drop(columns="dev_success"), on=["unit", "cap", "policy"])
    for router, own in rows.groupby("router"):
        add_results(run.out / "policies" / str(router), own, run.settings.decide)
    _keep(run.out, table)
    return rows


def _keep(out: Path, table: pd.DataFrame) -> None:
    """Writes what is chosen, beside what was for other methods and caps, and deletes the routers that no longer are."""
    path, key = out / CHOSEN, ["unit", "cap", "method"]
    if path.exists():
        before = pd.read_csv(path)
        table = pd.concat([before[~before.set_index(key).index.isin(table.set_index(key).index)], table])
    write_bytes(path, table.to_csv(index=False).encode())
    for folder in (out / "policies").glob("*_under-*"):
        if folder.name not in set(table["router"]):
            shutil.rmtree(folder)


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
    if candidate.trained:
        words = f"{cap.cap}-calls" if cap.mode is CostMode.CALLS else f"{cap.cap / 1e6:g}-usd"
        limits = [n for n in (candidate.calls, cap.cap if cap.mode is CostMode.CALLS else None) if n is not None]
        limit = min(limits, default=None)
        own = Tried(offset, limit).name_of(f"{candidate.trained.name}_under-{words}")
        row["router"] = own
        how = {"offset": offset, "cap": words.replace("-", " "), "call_limit": limit}
        save_with(run.out / "policies", dataclasses.replace(policy, folder=candidate.trained), own, **how)
    return row


def _episode_row(e: Episode) -> dict[str, object]:
    assert e.spec.budget is not None
    used = e.large_calls if e.spec.budget.mode is CostMode.CALLS else sum(s.charged_microusd for s in e.steps) / 1e6
    return _cap(e.spec.budget) | {
        "id": e.spec.id, "used": used, "policy": e.spec.policy, "task": e.spec.task.name, "member": e.spec.member,
        "success": e.success, "score": e.score, "cost_usd": e.cost_microusd / 1e6, "large_calls": e.large_calls,
        "steps": len(e.steps), "stop": str(e.stop),
    }  # fmt: skip


def _cap(budget: Budget) -> dict[str, object]:
    cap = budget.cap if budget.mode is CostMode.CALLS else budget.cap / 1e6
    return {"unit": str(budget.mode), "cap": float(cap)}
