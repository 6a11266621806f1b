"""What a method plays under a cap, worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.baselines import Policy
from bopo_ray.pipeline.hard_budget import Candidate, caps_of, choose
from bopo_ray.records import Budget, CostMode, Episode
from tests.unit.test_baselines import played

FIVE, TEN = Budget(CostMode.CALLS, 5), Budget(CostMode.CALLS, 10)


def under(cap: Budget, policy: str, task: str, success: bool, *models: int) -> Episode:
    """SMALL costs 10, LARGE 100."""
    e = played(policy, task, success, *models)
    return dataclasses.replace(e, spec=dataclasses.replace(e.spec, budget=cap))


ROUTERS = [
    Candidate(Policy(f"x{seed} {share}", "x", seed=seed), f"share {share}", share)
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
    chosen = {(c.cap, c.candidates[0].policy.method): c for c in choose(dev, [*ROUTERS, *SCHEDULES], [FIVE, TEN])}
    assert len(chosen) == 4
    router = chosen[FIVE, "x"]
    assert (router.setting, router.success) == ("share 0.9", 0.75)
    assert [c.policy.name for c in router.candidates] == ["x0 0.9", "x1 0.9"]
    assert (chosen[TEN, "x"].setting, chosen[TEN, "x"].success) == ("share 0.1", 0.5)
    for cap in (FIVE, TEN):
        assert chosen[cap, "first-large"].setting == "5", "the first of those that are as good and as cheap"
        assert chosen[cap, "first-large"].success == 1.0


def test_caps_are_numbers_each_once() -> None:
    assert caps_of([5, 5], [0.01]) == [FIVE, Budget(CostMode.USD, 10_000)]
    for calls, usd in (([-1], []), ([], [float("nan")]), ([], [])):
        with pytest.raises(ConfigError, match="--calls or --usd"):
            caps_of(calls, usd)
