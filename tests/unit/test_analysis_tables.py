"""Frontier rows and the comparison of methods, on hand-worked frames and on a synthetic evaluation."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from bopo_ray.analysis.pareto import Reference, pareto_front
from bopo_ray.analysis.tables import BOUNDARY, COLUMNS, Settings, frontier, spend_by_difficulty, summary
from bopo_ray.records import CostMode

QUICK = Settings(n=200)


def synthetic_episodes(n_tasks: int = 60, seeds: tuple[int, ...] = (0, 1), seed: int = 0) -> pd.DataFrame:
    """An evaluation in which bopo-hybrid uses the large model mainly on hard tasks and random does not."""
    rng = np.random.default_rng(seed)
    difficulty = rng.choice(["easy", "hard", "intractable"], size=n_tasks, p=[0.4, 0.45, 0.15])
    policies: list[tuple[str, str, float, float, float, float]] = [  # name, method, lam, seed, p on hard, p elsewhere
        ("always-small", "always-small", math.nan, math.nan, 0.0, 0.0),
        ("always-large", "always-large", math.nan, math.nan, 1.0, 1.0),
        *((f"random({p})", "random", math.nan, math.nan, p, p) for p in (0.2, 0.4, 0.6, 0.8)),
        *((f"first-large({k})", "first-large", math.nan, math.nan, k / 12, k / 12) for k in (3, 6)),
    ]
    for s in seeds:
        policies.append((f"bosft seed={s}", "bosft", math.nan, s, 0.55, 0.15))
        for lam in (0.1, 0.2, 0.3, 0.5, 0.8):
            name = f"lam={lam} seed={s} it=4"
            policies.append((f"bopo-hybrid {name}", "bopo-hybrid", lam, s, 1 - 0.75 * lam, 0.3 - 0.3 * lam))
            policies.append((f"bopo-augmented {name}", "bopo-augmented", lam, s, 0.9 - 0.9 * lam, 0.3 - 0.2 * lam))
            policies.append((f"grpo-vanilla {name}", "grpo-vanilla", lam, s, max(0.0, 0.6 - lam * 2), 0.05))
    rows = []
    for policy, method, lam, train_seed, p_hard, p_other in policies:
        for task in range(n_tasks):
            hard = difficulty[task] == "hard"
            p = p_hard if hard else p_other
            chance = {"easy": 0.85 + 0.1 * p, "hard": 0.12 + 0.7 * p, "intractable": 0.02}[difficulty[task]]
            success = bool(rng.random() < chance)
            steps = int(rng.integers(8, 20)) if success else 30
            large = int(rng.binomial(steps, p))
            prompt, completion = 900 * steps, 60 * steps
            rows.append(
                {
                    "policy": policy,
                    "method": method,
                    "lam": lam,
                    "train_seed": train_seed,
                    "task": f"kind-{task % 5}/{task}",
                    "kind": f"kind-{task % 5}",
                    "member": 0,
                    "difficulty": difficulty[task],
                    "success": success,
                    "outcome": float(success),
                    "score": 100.0 * success,
                    "cost_usd": (large * 2.28 + (steps - large) * 0.46) * 1e-3,
                    "large_calls": large,
                    "steps": steps,
                    "prompt_tokens": prompt,
                    "completion_tokens": completion,
                    "stop": "success" if success else "step_limit",
                }
            )
    return pd.DataFrame(rows)


def frame(*rows: tuple[str, str, float, float, str, bool, float, int, int]) -> pd.DataFrame:
    names = ["policy", "method", "lam", "train_seed", "task", "success", "cost_usd", "large_calls", "steps"]
    return pd.DataFrame([dict(zip(names, row, strict=True)) | {"score": 100.0 * row[5]} for row in rows])


NAN = math.nan
HAND = frame(
    ("always-small", "always-small", NAN, NAN, "a/0", True, 1.0, 0, 4),
    ("always-small", "always-small", NAN, NAN, "a/1", False, 1.0, 0, 6),
    ("always-large", "always-large", NAN, NAN, "a/0", True, 4.0, 4, 4),
    ("always-large", "always-large", NAN, NAN, "a/1", True, 4.0, 6, 6),
    ("x s0", "bopo-hybrid", 0.3, 0, "a/0", True, 1.0, 0, 4),
    ("x s0", "bopo-hybrid", 0.3, 0, "a/1", True, 2.0, 2, 4),
    ("x s0", "bopo-hybrid", 0.3, 0, "a/1", False, 4.0, 4, 4),
    ("x s1", "bopo-hybrid", 0.3, 1, "a/0", True, 2.0, 2, 4),
    ("x s1", "bopo-hybrid", 0.3, 1, "a/1", True, 2.0, 2, 4),
)


def test_frontier_by_hand() -> None:
    table = frontier(HAND, QUICK).set_index("policy")
    # x s0: task a/0 costs 1, task a/1 costs (2 + 4) / 2 = 3 and succeeds half the time; each task counts once.
    row = table.loc["x s0"]
    assert (row["cost_usd"], row["success"], row["large_calls"]) == (2.0, 0.75, 1.5)
    assert row["share_large"] == pytest.approx(6 / 12)
    assert (row["n_tasks"], row["n_episodes"]) == (2, 3)
    assert (row["success_low"], row["success_high"]) == (0.5, 1.0)
    assert table["on_front"].to_dict() == {
        "always-small": True, "always-large": False, "x s0": False, "x s1": True,
    }  # fmt: skip


def test_summary_by_hand() -> None:
    found = summary(HAND, Settings(n=50, reference=Reference(5.0)))
    # boundary: (1, .5), (4, 1): .5 * 3 + 1 * 1 = 2.5 of 5.  seed 0 adds (2, .75): .5 + 1.5 + 1 = 3; seed 1 (2, 1): 3.5
    assert found["hypervolumes"][BOUNDARY]["estimate"] == pytest.approx(0.5)
    assert found["hypervolumes"]["bopo-hybrid"]["estimate"] == pytest.approx((0.6 + 0.7) / 2)
    assert found["hypervolumes"]["bopo-hybrid"]["own_points"] == 1
    assert found["hypervolumes"]["bopo-hybrid"]["train_seeds"] == 2
    assert found["differences"][BOUNDARY]["estimate"] == pytest.approx(0.15)
    # seeds together: cost 2, success .875; always-large has 1 at cost 4
    saved = {record["success_share"]: record for record in found["cost_saved"]["bopo-hybrid"]}
    assert (saved[0.9]["policy"], saved[0.9]["saved"]["estimate"]) == ("always-large", 0.0)
    merged = next(r for r in found["operating_points"] if r["method"] == "bopo-hybrid")
    assert (merged["cost_usd"], merged["success"], merged["train_seeds"]) == (2.0, 0.875, [0, 1])
    assert merged["policy"] == "bopo-hybrid lam=0.3"


def test_routers_that_were_trained_at_several_lambdas_are_operating_points_of_their_own() -> None:
    """Each has an offset for each lambda, so that a method, lambda and seed occur twice; nobody plays their mean."""
    trained = HAND[HAND["method"] == "bopo-hybrid"]
    both = pd.concat(
        [HAND[HAND["method"] != "bopo-hybrid"]]
        + [trained.assign(policy=f"x {at} " + trained["policy"], cost_usd=trained["cost_usd"] * k)
           for at, k in (("lam0.1", 1.0), ("lam0.3", 0.5))]
    )  # fmt: skip
    found = summary(both, QUICK)
    own = [p for p in found["operating_points"] if p["method"] == "bopo-hybrid"]
    assert [(p["policy"], p["train_seeds"], p["cost_usd"]) for p in own] == [
        ("bopo-hybrid lam=0.3, router 1", [0, 1], 2.0), ("bopo-hybrid lam=0.3, router 2", [0, 1], 1.0),
    ]  # fmt: skip
    assert found["hypervolumes"]["bopo-hybrid"]["own_points"] == 2
    won = both.assign(success=both["success"] | (both["method"] == "bopo-hybrid"))
    saved = summary(won, QUICK)["cost_saved"]["bopo-hybrid"][0]
    assert (saved["policy"], saved["saved"]["estimate"]) == ("bopo-hybrid lam=0.3, router 2", 0.75)


def test_cost_saved_takes_the_cheapest_point_that_keeps_the_success() -> None:
    table = HAND[HAND["policy"] != "x s0"]
    saved = summary(table, QUICK)["cost_saved"]["bopo-hybrid"]
    assert [(r["policy"], r["saved"]) for r in saved] == [("x s1", {"estimate": 0.5})] * 3, "picked here: no interval"
    lost = summary(table.assign(success=False), QUICK)["cost_saved"]["bopo-hybrid"]
    assert [r["saved"] for r in lost] == [{"estimate": None}] * 3, "all of no success is reached by any point"


def test_default_reference_is_above_the_dearer_boundary() -> None:
    assert summary(HAND, QUICK)["reference"] == {"cost_usd": pytest.approx(4.4), "success": 0.0}


def test_success_may_be_set_against_calls_of_the_large_model() -> None:
    """The order of the points, the front, the box and the savings are all in calls; dollars stand beside them."""
    calls = Settings(n=50, cost=CostMode.CALLS, reference=Reference(10.0))
    table = frontier(HAND, calls).set_index("policy")
    # calls, success: small (0, .5), large (5, 1), x s0 ((0 + 3) / 2, .75), x s1 ((2 + 2) / 2, 1)
    assert table["large_calls"].to_dict() == {"always-large": 5, "always-small": 0, "x s0": 1.5, "x s1": 2}
    assert table["on_front"].to_dict() == {"always-small": True, "always-large": False, "x s0": True, "x s1": True}
    assert table["cost_usd"]["always-small"] == 1.0
    found = summary(HAND, calls)
    assert (found["cost"], found["reference"]) == ("calls", {"large_calls": 10.0, "success": 0.0})
    # boundary: .5 * 5 + 1 * 5 = 7.5 of 10; seed 0: .5 * 1.5 + .75 * 3.5 + 5 = 8.375; seed 1: .5 * 2 + 1 * 8 = 9
    assert found["hypervolumes"][BOUNDARY]["estimate"] == pytest.approx(0.75)
    assert found["hypervolumes"]["bopo-hybrid"]["estimate"] == pytest.approx((0.8375 + 0.9) / 2)
    saved = found["cost_saved"]["bopo-hybrid"][0]  # seeds together: 1.75 calls, .875: less than 90% of always-large's 1
    assert (saved["policy"], saved["large_calls"]) == ("always-large", 5.0)
    assert any("10.00 large calls per task" in note for note in found["notes"])
    assert summary(HAND, Settings(n=50, cost=CostMode.CALLS))["reference"]["large_calls"] == pytest.approx(5.5)


def test_points_are_sorted_and_starred_by_what_counts() -> None:
    episodes = synthetic_episodes()
    for mode, cost in ((CostMode.USD, "cost_usd"), (CostMode.CALLS, "large_calls")):
        settings = Settings(n=20, cost=mode)
        table, found = frontier(episodes, settings), pd.DataFrame(summary(episodes, settings)["operating_points"])
        assert all(own[cost].is_monotonic_increasing for _, own in table.groupby("method"))
        for rows in (table, found):
            best = pareto_front(rows[cost], rows["success"])
            assert set(rows.index[rows["on_front"]]) == set(best.tolist())


def test_synthetic_evaluation() -> None:
    episodes = synthetic_episodes(n_tasks=240)
    found = summary(episodes, QUICK)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    volumes = found["hypervolumes"]
    assert all(0 <= v["low"] <= v["high"] <= 1 for v in volumes.values())
    assert all(volumes[m]["estimate"] >= volumes[BOUNDARY]["estimate"] for m in volumes)
    assert volumes["bopo-hybrid"]["estimate"] > volumes["random"]["estimate"]
    assert found["differences"]["random"]["estimate"] > 0 and found["differences"]["random"]["p"] < 0.05
    assert set(found["differences"]) == set(volumes) - {"bopo-hybrid"}
    assert all(gap["p"] <= gap["p_holm"] <= 1 for gap in found["differences"].values())
    assert found["differences"]["random"]["p_holm"] > found["differences"]["random"]["p"]
    table = frontier(episodes, QUICK)
    assert len(table) == len(found["points"]) == 2 + 4 + 2 + 2 * 16
    assert table["on_front"].sum() >= 2
    assert ((table["success_low"] <= table["success"]) & (table["success"] <= table["success_high"])).all()


def test_the_oracle_is_a_bound_and_no_competitor() -> None:
    bound = HAND[HAND["policy"] == "x s1"].assign(
        policy="oracle", method="oracle", lam=NAN, train_seed=NAN, cost_usd=0.5
    )
    found = summary(pd.concat([HAND, bound]), QUICK)
    assert found["differences"]["oracle"]["p_holm"] is None and found["differences"]["oracle"]["estimate"] < 0
    without = {r["policy"]: r["on_front"] for r in summary(HAND, QUICK)["points"]}
    assert {r["policy"]: r["on_front"] for r in found["points"]} == without | {"oracle": False}
    assert found["differences"][BOUNDARY]["p_holm"] == found["differences"][BOUNDARY]["p"], "a family of one"


def test_order_of_episodes_does_not_matter() -> None:
    episodes = synthetic_episodes(n_tasks=12, seeds=(0,))
    shuffled = episodes.sample(frac=1.0, random_state=1)
    pd.testing.assert_frame_equal(frontier(episodes, QUICK), frontier(shuffled, QUICK))


@pytest.mark.parametrize("dtypes", [{"lam": object, "train_seed": object}, {"train_seed": "Int64"}])
def test_keys_may_be_objects_or_nullable_integers(dtypes: dict[str, object]) -> None:
    typed = HAND.astype(dtypes)
    if "lam" in dtypes:
        typed = typed.where(typed.notna(), None)
    pd.testing.assert_frame_equal(frontier(typed, QUICK), frontier(HAND, QUICK))


def test_tasks_that_a_policy_lacks_are_left_out_and_said() -> None:
    lacking = HAND[~((HAND["policy"] == "x s1") & (HAND["task"] == "a/1"))]
    found = summary(lacking.assign(difficulty=lacking["task"].map({"a/0": "easy", "a/1": "hard"})), QUICK)
    assert found["spend_by_difficulty"]["bopo-hybrid"] == {"easy": 1.0}
    assert found["n_tasks"] == 1
    assert "1 of 2 tasks left out" in found["warnings"][0] and "x s1" in found["warnings"][0]
    assert found["points"][0]["success_low"] is None  # one task: nothing to resample
    with pytest.raises(ValueError, match="nothing can be paired"):
        frontier(
            HAND[~((HAND["policy"] == "x s1") & (HAND["task"] == "a/1")) & (HAND["policy"] != "x s0")].iloc[[1, 4]]
        )


def test_only_baselines_make_a_summary_too() -> None:
    found = summary(HAND[HAND["method"].str.startswith("always")], QUICK)
    assert found["headline"] is None and found["differences"] == {}
    assert list(found["hypervolumes"]) == [BOUNDARY]


def test_one_task_has_no_p() -> None:
    found = summary(HAND[HAND["task"] == "a/0"], QUICK)
    gap = found["differences"][BOUNDARY]
    assert gap["estimate"] is not None and [gap[k] for k in ("low", "high", "p", "p_holm")] == [None] * 4


@pytest.mark.parametrize(
    ("trained", "first"),
    [
        (["grpo-vanilla", "bopo-augmented", "bopo-hybrid"], "bopo-hybrid"),
        (["grpo-vanilla", "bopo-augmented"], "bopo-augmented"),
        (["grpo-vanilla"], "grpo-vanilla"),
    ],
)
def test_the_most_of_bopo_that_was_trained_is_compared_with_the_others(trained: list[str], first: str) -> None:
    """With `--advantage vanilla` alone there is no bopo-hybrid, and still something to compare."""
    own = HAND[HAND["method"] == "bopo-hybrid"]
    routers = [own.assign(method=m, policy=m + " " + own["policy"]) for m in trained]
    found = summary(pd.concat([HAND[HAND["method"] != "bopo-hybrid"], *routers]), QUICK)
    assert found["headline"] == first and set(found["differences"]) == {BOUNDARY, *trained} - {first}


def test_spend_by_difficulty() -> None:
    assert spend_by_difficulty(HAND) == {}
    marked = HAND.assign(difficulty=["easy", "hard"] * 2 + ["easy", "hard", "hard", "easy", None])
    shares = spend_by_difficulty(marked)
    assert shares["always-small"]["easy"] == 0.5
    assert shares["bopo-hybrid"] == pytest.approx({"easy": 3 / 11, "hard": 6 / 11, "unknown": 2 / 11})


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named(column: str) -> None:
    with pytest.raises(ValueError, match=column):
        frontier(HAND.drop(columns=column))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no episodes"):
        frontier(HAND.iloc[:0])
    with pytest.raises(ValueError, match="always-large"):
        summary(HAND[HAND["method"] != "always-large"], QUICK)
    with pytest.raises(ValueError, match="not finite"):
        frontier(HAND.assign(cost_usd=NAN))
