"""What a method plays under a cap, worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from bopo_ray.analysis.finished import FinishedRun
from bopo_ray.errors import ConfigError, StoreError
from bopo_ray.models.pool import resolve_pool, save_pool
from bopo_ray.models.pricing import Usage, price_table
from bopo_ray.models.spend import SpendLedger
from bopo_ray.models.sqlite import owner_id
from bopo_ray.pipeline.baselines import Policy
from bopo_ray.pipeline.hard_budget import Candidate, caps_of, choose, left_usd, open_run, usd_caps
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.settings import Settings, resolve, save
from bopo_ray.records import Budget, CostMode, Episode
from experiments import frontier
from tests.toy import ID
from tests.unit.test_baselines import played

FIVE, TEN = Budget(CostMode.CALLS, 5), Budget(CostMode.CALLS, 10)


def under(cap: Budget, policy: str, task: str, success: bool, *models: int) -> Episode:
    """SMALL costs 10, LARGE 100."""
    e = played(policy, task, success, *models)
    return dataclasses.replace(e, spec=dataclasses.replace(e.spec, budget=cap))


TRAINED = Path("x")
ROUTERS = [
    Candidate(Policy(f"x{seed} {share}", "x", seed=seed, folder=TRAINED), f"share {share}", TRAINED, share)
    for seed in (0, 1)
    for share in (0.1, 0.9)
]
SCHEDULES = [Candidate(Policy(f"first-large({k})", "first-large", f"first-large({k})"), f"{k}") for k in (2, 5, 7)]
DEV = [
    # under 5: seed 0 is better by 0.1 (two tasks to one), seed 1 by 0.9 (two to none): of both, 0.9
    under(FIVE, "x0 0.1", "a", True, 0), under(FIVE, "x0 0.1", "b", True, 0),
    under(FIVE, "x1 0.1", "a", False, 0), under(FIVE, "x1 0.1", "b", False, 0),
    under(FIVE, "x0 0.9", "a", True, 1), under(FIVE, "x0 0.9", "b", False, 1),
    under(FIVE, "x1 0.9", "a", True, 1), under(FIVE, "x1 0.9", "b", True, 1),
    # under 10 all win half: 0.1 is cheaper
    *(under(TEN, f"x{s} {p}", t, t == "a", int(p == "0.9")) for s in (0, 1) for p in ("0.1", "0.9") for t in "ab"),
    # K = 2 wins a alone, K = 5 and K = 7 both, at the same cost; a was played twice, and counts once
    *(under(c, f"first-large({k})", t, t == "a", 1) for c in (FIVE, TEN) for k in (2, 5, 7) for t in "aa"),
    *(under(c, f"first-large({k})", "b", k != 2, 1) for c in (FIVE, TEN) for k in (2, 5, 7)),
]  # fmt: skip


@pytest.mark.parametrize("dev", [DEV, DEV[::-1]], ids=["as played", "in another order"])
def test_one_setting_for_all_seeds_the_cheapest_of_the_best(dev: list[Episode]) -> None:
    chosen = {
        (c.cap, c.candidates[0].policy.method): c
        for c in choose(dev, [*ROUTERS, *SCHEDULES], [FIVE, TEN], CostMode.USD)
    }
    assert len(chosen) == 4
    router = chosen[FIVE, "x"]
    assert (router.setting, router.success) == ("share 0.9", 0.75)
    assert [c.policy.name for c in router.candidates] == ["x0 0.9", "x1 0.9"]
    assert (chosen[TEN, "x"].setting, chosen[TEN, "x"].success) == ("share 0.1", 0.5)
    for cap in (FIVE, TEN):
        assert chosen[cap, "first-large"].setting == "5", "the first of those that are as good and as cheap"
        assert chosen[cap, "first-large"].success == 1.0


@pytest.mark.parametrize(
    ("wins", "setting"),
    [
        ("abcd", "share 0.1"),  # more than first-large(5) by 1, 1, 0, 0: 0.5, with an error of 0.29
        ("abc", "5"),  # by 1, 0, 0, 0: 0.25, which is its error
        ("cd", "5"),  # as good as the better schedule, and cheaper
        ("c", "5"),
    ],
)
def test_a_router_plays_the_best_schedule_unless_it_is_better_by_more_than_an_error(wins: str, setting: str) -> None:
    settings = {f"first-large({k})": Policy(f"first-large({k})", "x", f"first-large({k})", seed=0) for k in (2, 5)}
    found = [ROUTERS[0], *(Candidate(p, name[-2], TRAINED, 1e3, int(name[-2])) for name, p in settings.items())]
    dev = [
        *(under(FIVE, "x0 0.1", task, task in wins, 0) for task in "abcd"),
        *(under(FIVE, "first-large(2)", task, task == "c", 1) for task in "abcd"),
        *(under(FIVE, "first-large(5)", task, task in "cd", 1) for task in "abcd"),
    ]
    (choice,) = choose(dev, found, [FIVE], CostMode.USD)
    assert choice.setting == setting
    assert choice.success == (1.0 if setting == "share 0.1" else 0.5)


def test_the_cheapest_is_what_the_run_counts() -> None:
    """Six large calls of an episode that ends early may cost fewer dollars than one of a long episode."""
    found = [
        Candidate(Policy(name, "x", seed=0, folder=TRAINED), name, TRAINED, share)
        for name, share in (("dear", 0.1), ("few", 0.9))
    ]
    dev = [under(TEN, "dear", "a", True, *[1] * 6), under(TEN, "few", "a", True, *[0] * 60, 1)]
    for mode, setting in ((CostMode.USD, "dear"), (CostMode.CALLS, "few")):
        assert choose(dev, found, [TEN], mode)[0].setting == setting
        assert choose(dev, found[::-1], [TEN], mode)[0].setting == setting


@pytest.mark.parametrize("n", range(2, 70))
def test_one_task_that_differs_is_no_more_than_its_error(n: int) -> None:
    schedule = Candidate(Policy("first-large(5)", "x", "first-large(5)", seed=0), "5", TRAINED, 1e3, 5)
    dev = [under(FIVE, "first-large(5)", f"{i}", i > 5, 1) for i in range(n)]
    dev += [under(FIVE, "x0 0.1", f"{i}", i > 5 or i == 1, 0) for i in range(n)]
    assert choose(dev, [ROUTERS[0], schedule], [FIVE], CostMode.USD)[0].setting == "5"


def test_of_the_settings_that_are_better_for_certain_the_best_is_played() -> None:
    """The one with the highest mean need not be one of them."""
    schedule = Candidate(Policy("first-large(5)", "x", "first-large(5)", seed=0), "5", TRAINED, 1e3, 5)
    tasks = [f"{i:02d}" for i in range(20)]
    lost = set(tasks[:10])  # by the schedule
    bold = {*tasks[:7], *tasks[15:]}  # wins 7 of these and loses 5 of the others: 0.1, with an error of 0.18
    dev = [under(FIVE, "first-large(5)", t, t not in lost, 1) for t in tasks]
    dev += [under(FIVE, "x0 0.1", t, t in bold, 0) for t in tasks]
    assert choose(dev, [ROUTERS[0], schedule], [FIVE], CostMode.USD)[0].setting == "5"
    dev += [under(FIVE, "x0 0.9", t, t not in lost or t in tasks[:2], 0) for t in tasks]  # 0.1, with an error of 0.07
    dev += [under(FIVE, "x0 0.5", t, t not in lost or t in tasks[:1], 0) for t in tasks]  # 0.05, which is its error
    middle = Candidate(Policy("x0 0.5", "x", seed=0, folder=TRAINED), "share 0.5", TRAINED, 0.5)
    (choice,) = choose(dev, [ROUTERS[0], middle, ROUTERS[1], schedule], [FIVE], CostMode.USD)
    assert (choice.setting, choice.success) == ("share 0.9", 0.6)


@pytest.mark.parametrize(
    ("cost", "caps"),
    [
        (0.0183, [0.00458, 0.00915, 0.0137]),
        (1.0, [0.25, 0.5, 0.75]),
        (0.00001, [2.5e-6, 5e-6, 7.5e-6]),
        (3e-6, [1.5e-6, 2.25e-6]),
        (0.0, []),
    ],
)
def test_dollar_caps_have_three_digits_however_small(cost: float, caps: list[float], tmp_path: Path) -> None:
    save(resolve(None, {"env": ID}), tmp_path / "settings.yaml")
    assert usd_caps(finished_in(tmp_path, cost)) == pytest.approx(caps)


@pytest.mark.parametrize(("name", "value"), [("budget_calls", 10), ("budget_usd", 0.004)])
def test_what_always_large_cost_under_a_cap_is_no_measure_of_dollar_caps(
    name: str, value: float, tmp_path: Path
) -> None:
    save(resolve(None, {"env": ID, name: value}), tmp_path / "settings.yaml")
    with pytest.raises(ConfigError, match=rf"{name}={value:g}: .* give caps with --usd, e\.g\. --usd 0\.01,0\.02"):
        usd_caps(finished_in(tmp_path, 0.001))


def finished_in(folder: Path, large_usd: float) -> FinishedRun:
    frontier = pd.DataFrame([{"policy": "always-large", "cost_usd": large_usd}])
    return FinishedRun(folder, {}, frontier, pd.DataFrame())


def test_one_task_says_nothing_for_a_router() -> None:
    schedule = Candidate(Policy("first-large(5)", "x", "first-large(5)", seed=0), "5", TRAINED, 1e3, 5)
    dev = [under(FIVE, "x0 0.1", "a", True, 0), under(FIVE, "first-large(5)", "a", False, 1)]
    (choice,) = choose(dev, [ROUTERS[0], schedule], [FIVE], CostMode.USD)
    assert choice.setting == "5"


def test_caps_are_numbers_each_once() -> None:
    assert caps_of([5, 5], [0.01]) == [FIVE, Budget(CostMode.USD, 10_000)]
    assert caps_of([], [0.0000019]) == [Budget(CostMode.USD, 1)], "never rounded up"
    for calls, usd in (([-1], []), ([], [float("nan")]), ([], [])):
        with pytest.raises(ConfigError, match="--calls or --usd"):
            caps_of(calls, usd)


def spend(folder: Path, microusd: int, reserved: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    ledger = SpendLedger(folder / "spend.db", None)
    reservation = ledger.reserve(owner_id(), "key", "m", microusd)
    assert reservation is not None
    ledger.settle(reservation, Usage(1, 1), microusd)
    if reserved:
        ledger.reserve(owner_id(), "another", "m", reserved)


QUIET = Console(quiet=True)


def finished_run(folder: Path, limit: float) -> tuple[Settings, FinishedRun]:
    settings = resolve(None, {"env": ID, "scale": "tiny", "max_spend": limit})
    with Run(settings, folder, False, QUIET):
        pass
    return settings, finished_in(folder, 1.0)


@pytest.mark.parametrize(("limit", "given", "cap"), [(20.0, None, 3.5), (20.0, 9.0, 9.0), (math.inf, None, None)])
def test_new_calls_keep_to_what_the_finished_runs_limit_has_left(
    limit: float, given: float | None, cap: float | None, tmp_path: Path
) -> None:
    """Of 20 dollars 14.5 went to the run and 2 to another study of it; what this study paid its own ledger counts."""
    settings = resolve(None, {"env": ID, "scale": "tiny", "max_spend": limit})
    save(settings, tmp_path / "settings.yaml")
    save_pool(resolve_pool(settings.pool, "", "", price_table()), tmp_path / "pool.yaml")
    for folder, paid in ((tmp_path, 14_500_000), (tmp_path / "headroom", 2_000_000)):
        spend(folder, paid)
    finished, console = FinishedRun(tmp_path, {}, pd.DataFrame(), pd.DataFrame()), Console(record=True, width=200)
    for _ in range(2):
        with open_run(finished, given, 1, console) as run:
            assert run.ledger().totals().cap_microusd == (None if cap is None else cap * 1_000_000)
        spend(tmp_path / "hard-budget", 1_000_000)
    said = "New calls may cost $3.500000: what is left of the run's limit of $20 (another with --max-spend)"
    assert console.export_text().count(said) == (2 if cap == 3.5 else 0)


def test_a_run_and_its_studies_keep_to_one_limit_in_any_order(tmp_path: Path) -> None:
    """Of 10 dollars the run spends 6, a study 2 and has 1 in flight when it is killed: 1 is left to all others."""
    settings, finished = finished_run(tmp_path, 10.0)
    spend(tmp_path, 6_000_000)
    with open_run(finished, None, 1, QUIET) as study:
        assert study.ledger().totals().cap_microusd == 4_000_000
    spend(tmp_path / "hard-budget", 2_000_000, reserved=1_000_000)
    assert left_usd(tmp_path, 10.0, "headroom") == left_usd(tmp_path, 10.0000009, "headroom") == 1.0
    assert left_usd(tmp_path, 10.0, "hard-budget") == 4.0, "of which its own ledger counts 3"
    with open_run(finished, None, 1, QUIET, "headroom") as study:
        assert study.ledger().totals().cap_microusd == 1_000_000
    with Run(settings, tmp_path, True, QUIET) as run:
        assert run.ledger().totals().cap_microusd == run.desk.cap_microusd == 7_000_000, "of which it has spent 6"
    assert frontier.spent_line(tmp_path) == "$6.000000 spent on 1 calls, and $3.000000 by studies of this run"
    for limit, left in ((2.0, 0), (math.inf, None)):
        with Run(dataclasses.replace(settings, max_spend=limit), tmp_path, True, QUIET) as run:
            assert run.ledger().totals().cap_microusd == left


def test_one_study_of_a_run_at_a_time_and_not_beside_the_run(tmp_path: Path) -> None:
    """Each works out what is left when it begins."""
    settings, finished = finished_run(tmp_path, 10.0)
    says = r"is in use by another run, or by a study of it; wait for its end, or take another folder$"
    with open_run(finished, None, 1, QUIET):
        with pytest.raises(StoreError, match=says), open_run(finished, None, 1, QUIET, "headroom"):
            pass
        with pytest.raises(StoreError, match=says):
            Run(settings, tmp_path, True, QUIET)
    assert not (tmp_path / "headroom").exists()
    with Run(settings, tmp_path, True, QUIET), pytest.raises(StoreError, match=says):  # noqa: SIM117
        with open_run(finished, None, 1, QUIET):
            pass
    with open_run(finished, None, 1, QUIET, "headroom"):
        pass
