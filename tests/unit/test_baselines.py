"""What an evaluation plays, and makes of other episodes: the best schedule, and random(p) at matched shares."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bopo_ray.method.reward import CostScale
from bopo_ray.pipeline.baselines import DEFAULT_ROUTERS, Policy, asked_for, best_policy, matched_random, specs
from bopo_ray.pipeline.settings import Settings
from bopo_ray.records import CostMode, Episode
from bopo_ray.routers import parse_router
from tests.unit.test_routers import episode, step


def played(policy: str, task: str, success: bool, *models: int) -> Episode:
    """SMALL costs 10, LARGE 100."""
    return episode("x", [step(m, "a", "b", 10 + 90 * m) for m in models], task, success, policy)


@pytest.mark.parametrize("decide", ["greedy", "sample"])
def test_only_learned_routers_decide_as_the_settings_say(decide: str) -> None:
    task, settings = played("always-small", "a", True, 0).spec.task, Settings(decide=decide, eval_samples=2)
    learned = list(specs([task], Policy("bosft", "bosft"), settings, None))
    fixed = list(specs([task], Policy("random(0.5)", "random", "random(0.5)"), settings, None))
    assert [s.member for s in learned] == [0, 1]
    assert [s.greedy for s in learned] == [decide == "greedy"] * 2 and not any(s.greedy for s in fixed)


def test_a_routers_limit_of_large_calls_is_a_schedule_to_compare_with() -> None:
    """A router that always calls the large model until its limit is first-large of that length."""
    settings = Settings(shares=(0.5,), call_limits=(15, 20, 40), max_steps=40, router=("first-large:20", "cascade:1"))
    names = [str(name) for name in asked_for(SimpleNamespace(settings=settings))]  # type: ignore[arg-type]
    lengths = [2, 5, 7, 10, 15, 20]
    assert [n for n in names if n.startswith("first-large")] == [f"first-large({k})" for k in lengths]
    assert names[-1] == "cascade(1)"


DEV = [
    # task a: SMALL costs 20, LARGE 200; first-large(1) succeeds at 110, C_norm = 0.5
    played("always-small", "a", False, 0, 0), played("always-large", "a", True, 1, 1),
    played("first-large(1)", "a", True, 1, 0),
    # task b: all succeed; first-large(1) has C_norm = 0.5 again
    played("always-small", "b", True, 0, 0), played("always-large", "b", True, 1, 1),
    played("first-large(1)", "b", True, 1, 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("lam", "name"),
    [
        (0.0, "always-large"),  # both that succeed twice gain 1: the first of the names
        (0.1, "first-large(1)"),  # 1 - 0.05; always-large 0.9, always-small 0.5
        (0.9, "first-large(1)"),  # 0.55; always-small 0.5
        (1.1, "always-small"),  # 0.45 against 0.5
    ],
)
def test_the_best_policy_by_hand(lam: float, name: str) -> None:
    names = ["always-large", "always-small", "first-large(1)"]
    assert best_policy(DEV, names, lam, CostMode.USD) == best_policy(DEV[::-1], names, lam, CostMode.USD) == name


def test_by_absolute_costs_the_cheap_task_is_the_one_to_spend_on() -> None:
    """LARGE wins both tasks; "dear" buys the one of 20 steps, for 19 of them, "cheap" the one of 2."""
    small, large = [0] * 20, [1] * 20
    episodes = [
        played("always-small", "a", False, *small), played("always-small", "b", False, *small[:2]),
        played("always-large", "a", True, *large), played("always-large", "b", True, *large[:2]),
        played("dear", "a", True, 0, *large[1:]), played("dear", "b", False, *small[:2]),
        played("cheap", "a", False, *small), played("cheap", "b", True, *large[:2]),
    ]  # fmt: skip
    for scale, name in ((CostScale.BOUNDARIES, "dear"), (CostScale.ABSOLUTE, "cheap")):
        assert best_policy(episodes, ["dear", "cheap"], 0.5, CostMode.USD, scale) == name


def test_the_best_policy_is_one_of_the_names_and_the_first_of_equals() -> None:
    assert best_policy(DEV, ["first-large(1)", "always-large"], 0.0, CostMode.USD) == "first-large(1)"
    assert best_policy(DEV, ["always-small"], 0.1, CostMode.USD) == "always-small"


def test_random_is_matched_to_the_share_of_large_calls_over_all_episodes() -> None:
    episodes = [
        played("x", "a", True, 1, 0, 0), played("x", "b", True, 0),  # 1 of 4, not the mean of 1/3 and 0
        played("y", "a", True, 0, 0), played("z", "a", True, 1), played("other", "a", True, 1, 0),
    ]  # fmt: skip
    found = matched_random(episodes, ["x", "y", "z"])
    assert [(p.name, p.method, p.router) for p in found] == [("random(0.25)", "random", "random(0.25)")]


def test_the_default_baselines_have_names_and_ask_no_model() -> None:
    assert all(parse_router(name).family != "prompted" for name in DEFAULT_ROUTERS)
