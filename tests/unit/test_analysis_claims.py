"""The paper's numbers beside ours: hand-worked claims, what their intervals settle, and how they are shown."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pandas as pd
import pytest

from bopo_ray.analysis.bootstrap import Interval
from bopo_ray.analysis.claims import Claim, Results, Unit, claims_of, differences_of, table_of, tally


def played(method: str, policy: str, task: str, success: bool, calls: int) -> dict[str, Any]:
    return {"method": method, "policy": policy, "task": task, "success": success, "large_calls": calls}


FREE = pd.DataFrame(
    [played("always-large", "always-large", t, t != "c", n) for t, n in zip("abc", (10, 20, 30), strict=True)]
)
CAPPED = pd.DataFrame(
    [
        # what was chosen for two seeds: 3 and 1 of 3 tasks, so 2 in the mean, by 9 calls
        *(played("bopo-hybrid", "seed0", t, True, n) for t, n in zip("abc", (0, 12, 15), strict=True)),
        *(played("bopo-hybrid", "seed1", t, t == "a", 9) for t in "abc"),
        *(played("first-large", "first-large(5)", t, t == "a", 5) for t in "abc"),
    ]
)  # fmt: skip
PAIR = {"pair": "simulated", "best_baseline": "first-large", "less_p_holm": 1.0, "less": 0.1, "less_low": -0.1,
        "less_high": 0.3, "saved": 0.5, "saved_of": "cost"}  # fmt: skip
VARIANTS = pd.DataFrame(
    [{"variant": name, "less_estimate": 0.2, "less_low": 0.1, "less_high": 0.3, "less_p_holm": p}
     for name, p in (("grpo-vanilla", 0.01), ("without BoSFT", 0.05), ("without bonus", math.nan))]
)  # fmt: skip
SPENT = pd.DataFrame(
    [{"method": "bopo-hybrid", "difficulty": d, "spend_share": x, "spend_share_low": x - 0.1,
      "spend_share_high": x + 0.1}
     for d, x in (("easy", 0.2), ("hard", 0.5), ("intractable", 0.3))]
)  # fmt: skip
HARD = [
    {"unit": "calls", "method": "first-large", "less": 1 / 3, "less_low": 0.1, "less_high": 0.6, "p_holm": 0.2,
     "overspends": 0, "episodes": 500},
    {"unit": "calls", "method": "bopo-hybrid", "success": 2 / 3, "success_low": 0.2, "success_high": 0.9,
     "cap_used": 0.6, "cap_used_low": 0.3, "cap_used_high": 0.85, "overspends": 0, "episodes": 250},
]  # fmt: skip
BOUNDARIES = pd.DataFrame(
    [
        {"task": t, "difficulty": "hard", "k": 5, "cost_small_usd": c, "cost_large_usd": 2.0}
        for t, c in (("x", 1.0), ("y", 3.0))
    ]
)


def results(env: str = "AppWorld-v0") -> Results:
    return Results(
        env, FREE, BOUNDARIES, pd.concat([CAPPED.assign(cap=15), CAPPED.assign(cap=5)]),
        pd.DataFrame([PAIR, PAIR | {"pair": "llama"}]), VARIANTS, SPENT,
        pd.DataFrame([row | {"cap": cap} for row in HARD for cap in (15.0, 5.0)]),
    )  # fmt: skip


def test_the_claims_by_hand() -> None:
    found = {c.text: c for c in claims_of(results())}
    hard = next(c for c in found.values() if c.source == "figure 3")
    assert (hard.ours, hard.paper) == (Interval(0.5, 0.4, 0.6), 0.522)
    assert hard.reading == "the paper's number is inside our interval"
    success = found["success of BoPO under a cap of 15 calls"]
    assert (success.ours, success.paper) == (Interval(2 / 3, 0.2, 0.9), 0.665), "as the table says it, over seeds, too"
    used = found["share of the cap that BoPO uses under a cap of 15 calls"]
    assert (used.ours, used.paper) == (Interval(0.6, 0.3, 0.85), 0.88)
    assert found["calls of always-large without a cap, as a share of 15"].ours.estimate == pytest.approx(20 / 15)
    assert found["calls of always-large without a cap, as a share of 15"].paper == 1.25
    assert found["success of always-large without a cap"].paper == 0.667
    fewer = found["fewer large calls of BoPO under a cap of 15 calls than of always-large without one"]
    assert (fewer.ours.estimate, fewer.paper) == (pytest.approx(1 - 9 / 20), 0.296)
    rival = found["success of BoPO less that of first-large under a cap of 15 calls"]
    assert (rival.ours, rival.paper) == (Interval(1 / 3, 0.1, 0.6), None)
    assert rival.reading == "not settled: p, Holm 0.2", "one of all methods under that cap"
    assert found["success of BoPO under a cap of 5 calls"].paper is None, "known at 15 alone"
    over = found[
        "episodes that cost more than their cap, of 1,500 that methods have under caps in calls and in dollars"
    ]
    assert (over.ours.estimate, over.paper, over.reading) == (0, 0, "the same")
    assert found["training tasks on which always-small costs more than always-large"].ours.estimate == 0.5
    assert [c.text for c in found.values() if c.source == "figure 4"] == [
        "pair llama: hypervolume of BoPO less that of the best baseline, first-large"
    ]
    assert [c.source for c in found.values()] == sorted(c.source for c in found.values())
    assert not any("cheapest" in text or "saves" in text for text in found), "picked on these tasks: it settles nothing"
    assert [c.reading for c in found.values() if c.source == "figure 2"] == [
        "above 0", "not settled: p, Holm 0.05", "above 0"
    ]  # fmt: skip


def test_a_cap_that_one_of_the_two_was_not_played_under_is_left_out() -> None:
    """chosen.csv keeps what was chosen for earlier caps and methods."""
    own = CAPPED["method"] == "bopo-hybrid"
    more = [CAPPED[own].assign(cap=3), CAPPED[~own].assign(cap=7), CAPPED.assign(cap=9)]
    found = claims_of(dataclasses.replace(results(), capped=pd.concat([results().capped, *more])))
    assert [c.text for c in found] == [c.text for c in claims_of(results())]
    (only,) = (c for c in claims_of(dataclasses.replace(results(), capped=more[0])) if c.source == "table 1")
    assert only.unit is Unit.COUNT


def test_what_came_out_is_counted() -> None:
    half = Interval(0.5, 0.4, 0.6)
    claims = [
        Claim("", "", Unit.SHARE, half, 0.55), Claim("", "", Unit.SHARE, half, 0.7), Claim("", "", Unit.SHARE, half),
        Claim("", "", Unit.COUNT, Interval(0, math.nan, math.nan), 0), Claim("", "", Unit.POINTS, half),
        Claim("", "", Unit.HYPERVOLUME, Interval(0.0, -0.1, 0.1)),
    ]  # fmt: skip
    assert tally(claims) == (
        "Of 3 numbers of the paper that this project knows, 2 lie inside our intervals. "
        "Of 2 differences between BoPO and another policy, 1 above 0, 0 below 0, 1 not settled."
    )


def test_another_benchmarks_numbers_are_not_the_papers() -> None:
    known = {c.text: c.paper for c in claims_of(results("ALFWorld-v0")) if c.paper is not None}
    assert sorted(known.values()) == [0.0, 0.522]


@pytest.mark.parametrize(
    ("claim", "shown", "reading"),
    [
        (Claim("", "", Unit.SHARE, Interval(0.5, 0.4, 0.6), 0.7), "50.0% [40.0%, 60.0%]",
         "the paper's number is above our interval"),
        (Claim("", "", Unit.SHARE, Interval(0.5, 0.4, 0.6), 0.3), "50.0% [40.0%, 60.0%]",
         "the paper's number is below our interval"),
        (Claim("", "", Unit.SHARE, Interval(0.5, 0.4, 0.6)), "50.0% [40.0%, 60.0%]", "–"),
        (Claim("", "", Unit.POINTS, Interval(0.05, 0.01, 0.09)), "+5.0% [+1.0%, +9.0%]", "above 0"),
        (Claim("", "", Unit.HYPERVOLUME, Interval(-0.05, -0.1, -0.01)), "-0.050 [-0.100, -0.010]", "below 0"),
        (Claim("", "", Unit.HYPERVOLUME, Interval(0.0, -0.1, 0.1)), "+0.000 [-0.100, +0.100]",
         "not settled: 0 is inside"),
        (Claim("", "", Unit.SHARE, Interval(0.5, math.nan, math.nan), 0.5), "50.0%", "one task settles nothing"),
        (Claim("", "", Unit.COUNT, Interval(2, math.nan, math.nan), 0), "2", "not the same"),
        (Claim("", "", Unit.SHARE, Interval(math.nan, math.nan, math.nan)), "–", "nothing to measure it by"),
    ],
)  # fmt: skip
def test_what_an_interval_settles(claim: Claim, shown: str, reading: str) -> None:
    row = table_of([claim]).iloc[0]
    assert (row["ours"], row["reading"]) == (shown, reading)
    assert row["paper"] == ("not known" if claim.paper is None else table_of([claim])["paper"].item())


def test_what_differs_from_the_papers_setting() -> None:
    own = differences_of("AppWorld-v0", "AppWorld-v0 (AppWorld engine, own tasks)", "Simulated.", 64, 32, 40, (0,))
    assert own[0].startswith("Models: not GPT-4.1-mini and GPT-4.1") and "Simulated." in own[0]
    assert own[1] == "Tasks: AppWorld-v0 (AppWorld engine, own tasks), not the published ones."
    assert "64 training and 32 test tasks of at most 40 steps; the paper 105 and 168 of at most 40" in own[2]
    assert own[3] == "Training seeds: 1; the paper 3."
    same = differences_of("ScienceWorld-v0", "ScienceWorld-v0", "Simulated.", 2120, 200, 40, (0, 1, 2))
    assert len(same) == 2, "the models, and what the paper leaves open"
    real = "Language models gpt-4.1-mini / gpt-4.1; tokens as reported."
    assert len(differences_of("ScienceWorld-v0", "ScienceWorld-v0", real, 2120, 200, 40, (0, 1, 2))) == 1
    assert "not one of the paper's" in differences_of("Mine-v0", "Mine-v0", "x", 1, 1, 1, (0, 1, 2))[1]
