"""The top of the report: what it says, and what it may not say."""

from __future__ import annotations

from typing import Any

import pytest

from bopo_ray.analysis.story import FEW_TASKS, tell
from bopo_ray.analysis.tables import Settings, summary
from bopo_ray.records import CostMode
from tests.unit.test_analysis_tables import synthetic_episodes


def told(**changes: Any) -> dict[str, Any]:
    return summary(synthetic_episodes(), Settings(n=50)) | changes


def gap(low: float | None, high: float | None, p_holm: float | None = 0.01) -> dict[str, float | None]:
    return {"estimate": 0.1, "low": low, "high": high, "p": 0.01, "p_holm": p_holm}


def test_the_sentence_is_the_most_successful_point_against_always_large() -> None:
    own = [p for p in told()["operating_points"] if p["method"] == "bopo-hybrid"]
    most = max(p["success"] for p in own)
    best = min((p for p in own if p["success"] == most), key=lambda p: p["cost_usd"])
    assert sum(p["success"] == most for p in own) == 2, "of a tie, the cheaper one"
    story = tell(told())
    assert [c.name for c in story.cards] == ["always-small", "bopo-hybrid", "always-large"]  # by cost
    assert story.cards[2].cost_bar == 1 and max(c.success_bar for c in story.cards) == 1
    chosen = next(c for c in story.cards if c.chosen)
    assert chosen.point["policy"] == best["policy"] and chosen.note.endswith("the most successful of 5 points")
    large = next(c.point for c in story.cards if c.name == "always-large")
    for part in (
        f"bopo-hybrid at λ = {best['lam']:g} solves {best['success']:.0%}",
        f"{best['success'] / large['success']:.0%} of what always-large solves",
        f"at {best['cost_usd'] / large['cost_usd']:.0%} of its cost.",
    ):
        assert part in story.sentence


def test_a_run_that_counts_calls_is_told_in_calls() -> None:
    story = tell(summary(synthetic_episodes(), Settings(n=50, cost=CostMode.CALLS)))
    small, chosen, large = (c.point["large_calls"] for c in story.cards)
    assert [c.cost_bar for c in story.cards] == [small / large, chosen / large, 1.0] and small == 0
    assert f"at {chosen / large:.0%} of its large calls." in story.sentence
    assert "of its large calls: picked on these tasks" in story.findings[0]


def test_only_an_interval_without_zero_and_holms_p_settle_anything() -> None:
    differences = {
        "a": gap(0.01, 0.2), "b": gap(-0.2, -0.01), "c": gap(0.0, 0.2), "boundary only": gap(0.01, 0.3),
        "lucky": gap(0.01, 0.2, 0.17), "d": gap(None, None, None), "oracle": gap(-1, -0.5, None),
    }  # fmt: skip
    findings = tell(told(differences=differences)).findings
    assert findings[-3:] == (
        "Its frontier is better than that of a and the boundary policies alone.",
        "Its frontier is worse than that of b.",
        "Within the noise of this run: the difference to c and lucky.",
    )
    assert findings[0].startswith("The cheapest point of bopo-hybrid or the boundary policies that kept 90% of always-")
    assert findings[0].endswith("% of its cost: picked on these tasks, so rather too good.")


def test_where_always_large_saves_most_no_point_of_the_method_does() -> None:
    for saved in ({"estimate": 0.0}, {"estimate": 0.0, "low": 0.0, "high": 0.0}):  # the latter of older runs
        record = {"success_share": 0.9, "policy": "always-large", "success": 0.8, "saved": saved}
        findings = tell(told(cost_saved={"bopo-hybrid": [record]})).findings
        assert findings[0] == "No point of bopo-hybrid kept 90% of always-large's success for less."


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.0, "on no step at any λ, just as always-small does."), (1.0, "on every step at any λ, just as always-large")],
)
def test_a_router_that_collapsed_is_said_to_have(share: float, said: str) -> None:
    found = told(n_tasks=FEW_TASKS)
    own = [p for p in found["operating_points"] if p["method"] == "bopo-hybrid"]
    for point in own:
        point["share_large"] = share
    assert tell(found).caution.startswith("bopo-hybrid calls a large model ") and said in tell(found).caution
    few = tell(found | {"n_tasks": 4}).caution
    assert said in few and "Only 4 held-out tasks" in few
    own[0]["share_large"] = 0.5
    assert tell(found).caution == "", "one point routes"


@pytest.mark.parametrize(("n", "warned"), [(1, "1 held-out task:"), (FEW_TASKS - 1, "29 held-out tasks"), (30, "")])
def test_few_tasks_are_no_comparison(n: int, warned: str) -> None:
    caution = tell(told(n_tasks=n)).caution
    assert warned in caution and bool(warned) == bool(caution)


def test_nobody_succeeds_and_nothing_costs() -> None:
    episodes = synthetic_episodes(n_tasks=4)
    story = tell(summary(episodes.assign(success=False), Settings(n=20)))
    assert "solves 0% of the tasks at " in story.sentence
    assert story.sentence.endswith("% of the cost of always-large; always-large solves none.")
    assert not any("kept" in f for f in story.findings)
    assert "cost" not in tell(summary(episodes.assign(cost_usd=0.0), Settings(n=20))).sentence


def test_without_a_trained_method_the_boundary_policies_stand_alone() -> None:
    episodes = synthetic_episodes(n_tasks=40)
    untrained = ~episodes["method"].isin(["bopo-hybrid", "bopo-augmented", "grpo-vanilla"])
    story = tell(summary(episodes[untrained], Settings(n=20)))
    assert (story.sentence, story.findings) == ("", ())
    assert [c.name for c in story.cards] == ["always-small", "always-large"]
