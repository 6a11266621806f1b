"""Normalised cost and reward: tables worked by hand, and what must hold for any costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bopo_ray.method.reward import CostRange, CostScale, beta_warning, cost_ranges, normalised_cost, reward
from bopo_ray.method.taxonomy import BoundaryStats
from bopo_ray.records import CostMode

costs = st.floats(0, 1e7)


def stats(
    task: str, c_small: float, c_large: float, u: tuple[float, float] = (0.0, 1.0), steps: float = 10
) -> BoundaryStats:
    s_small, s_large = (round(5 * x) for x in u)
    return BoundaryStats(task, 5, 5, s_small, s_large, c_small, c_large, *u, steps)


def by_name(*all_stats: BoundaryStats) -> dict[str, BoundaryStats]:
    return {s.task: s for s in all_stats}


def test_ranges_in_usd_by_hand() -> None:
    ranges = cost_ranges(
        by_name(stats("plain", 200, 1000), stats("inverted", 1500, 600), stats("flat", 990, 1000)), CostMode.USD
    )
    # C_max: 1000, 1500, 1000 -> median 1000, floor 100. flat spans 10 only: widened to 990..1090
    assert ranges == {
        "plain": CostRange(200, 1000),
        "inverted": CostRange(600, 1500),
        "flat": CostRange(990, 1090),
    }
    assert cost_ranges(by_name(stats("flat", 990, 1000)), CostMode.USD, floor_share=0) == {"flat": CostRange(990, 1000)}


def test_ranges_in_calls_are_zero_to_the_steps_of_always_large() -> None:
    ranges = cost_ranges(by_name(stats("a", 0, 7, steps=7), stats("b", 0, 30, steps=30)), CostMode.CALLS)
    assert ranges == {"a": CostRange(0, 7), "b": CostRange(0, 30)}
    capped = cost_ranges(by_name(stats("a", 0, 5, steps=40)), CostMode.CALLS)
    assert capped == {"a": CostRange(0, 5)}, "the boundary policy's own cost, which a cap keeps below its steps"
    # 1 step where the median is 30: widened to 3
    short = cost_ranges(
        by_name(*(stats(n, 0, s, steps=s) for n, s in (("a", 1), ("b", 30), ("c", 40)))), CostMode.CALLS
    )
    assert short["a"] == CostRange(0, 3)


def test_absolute_costs_have_one_range_for_all_tasks_and_are_not_clipped() -> None:
    tasks = by_name(stats("cheap", 20, 100), stats("dear", 1500, 600))
    ranges = cost_ranges(tasks, CostMode.USD, CostScale.ABSOLUTE)
    assert ranges == dict.fromkeys(tasks, CostRange(0, 800, clip=False))  # the mean of 100 and 1500
    np.testing.assert_allclose(normalised_cost([0, 200, 1600], ranges["cheap"]), [0, 0.25, 2])
    calls = cost_ranges(
        by_name(stats("a", 0, 7, steps=7), stats("b", 0, 9, steps=9)), CostMode.CALLS, CostScale.ABSOLUTE
    )
    assert calls["a"] == calls["b"] == CostRange(0, 8, clip=False)


def test_empty_and_wrong_ranges() -> None:
    assert cost_ranges({}, CostMode.USD) == cost_ranges({}, CostMode.USD, CostScale.ABSOLUTE) == {}
    with pytest.raises(ValueError, match="floor_share=-1"):
        cost_ranges({}, CostMode.USD, floor_share=-1)
    with pytest.raises(ValueError, match="low <= high"):
        CostRange(2, 1)


def test_normalised_cost_by_hand() -> None:
    # (500 - 200) / 800 = 0.375; below 200 is 0, above 1000 is 1
    np.testing.assert_allclose(normalised_cost([100, 200, 500, 1000, 5000], CostRange(200, 1000)), [0, 0, 0.375, 1, 1])
    assert normalised_cost(0, CostRange(0, 0)) == 0  # free models: 0, not NaN


@given(costs, costs, costs, costs)
def test_normalised_cost_is_in_the_unit_interval_and_monotone(c_s: float, c_l: float, a: float, b: float) -> None:
    cost_range = cost_ranges(by_name(stats("x", c_s, c_l)), CostMode.USD)["x"]
    low, high = normalised_cost(np.array(sorted((a, b))), cost_range)
    assert 0 <= low <= high <= 1


@given(costs, costs)
def test_inversion_never_turns_the_sign(c_s: float, c_l: float) -> None:
    """Whichever boundary costs more pays more, and swapping the two changes nothing in the range."""
    cost_range = cost_ranges(by_name(stats("x", c_s, c_l)), CostMode.USD)["x"]
    assert cost_range == cost_ranges(by_name(stats("x", c_l, c_s)), CostMode.USD)["x"]
    r_s, r_l = (float(reward(1, False, normalised_cost(c, cost_range), lam=0.5)) for c in (c_s, c_l))
    assert (r_s >= r_l) if c_s <= c_l else (r_s <= r_l)


def test_reward_by_hand() -> None:
    # Hard success at half cost: 1 + 0.5 - 0.4 * 0.5 = 1.3; Easy: 0.8; failure: -0.2; graded 0.4 Hard: 0.6 - 0.2 = 0.4
    r = reward([1, 1, 0, 0.4], [True, False, True, True], 0.5, lam=0.4)
    np.testing.assert_allclose(r, [1.3, 0.8, -0.2, 0.4])
    assert float(reward(1, True, 0.5, lam=0.4, beta=0)) == pytest.approx(0.8)


def test_beta_warning_names_the_hard_tasks_where_large_loses() -> None:
    tasks = by_name(
        stats("wide", 0, 9, (0.0, 1.0)),  # 1.5 * 1.0 > 0.8
        stats("narrow", 0, 9, (0.2, 0.4)),  # 1.5 * 0.2 = 0.3 < 0.8; needs beta >= 0.8 / 0.2 - 1 = 3
        stats("easy", 0, 9, (0.8, 1.0)),  # not Hard
        stats("reversed", 0, 9, (0.4, 0.2)),  # d < 0: no beta helps
        stats("level", 0, 9, (0.2, 0.2)),  # d = 0
        stats("intractable", 0, 9, (0.0, 0.0)),
    )
    ranges = cost_ranges(tasks, CostMode.USD)
    assert beta_warning(tasks, ranges, beta=0.5, lam=0.8) == ("narrow",)
    assert beta_warning(tasks, ranges, beta=3.1, lam=0.8) == ()
    assert beta_warning(tasks, ranges, beta=-0.5, lam=0.8) == ("wide", "narrow")
    assert beta_warning(tasks, ranges, beta=0.5, lam=0.8, easy_at=5) == ("narrow", "easy")


def test_beta_warning_counts_what_really_lies_between_the_boundaries() -> None:
    """A full unit of C_norm would mean a warning of both tasks, and of none."""
    tasks = by_name(
        stats("inverted", 9000, 3000, (0.2, 1.0)),  # large wins more for less: 1.5 * 0.8 > 1.5 * -1
        stats("flat", 990, 1000, (0.2, 0.4)),  # the range is widened from 10 to 100 (of 1000): 0.3 > 1.5 * 0.1
        stats("plain", 0, 1000, (0.2, 0.4)),  # 0.3 < 1.5
    )
    assert beta_warning(tasks, cost_ranges(tasks, CostMode.USD), beta=0.5, lam=1.5) == ("plain",)
    tasks = by_name(stats("cheap", 20, 100, (0.2, 0.4)), stats("dear", 0, 1600, (0.0, 1.0)))
    absolute = cost_ranges(tasks, CostMode.USD, CostScale.ABSOLUTE)  # in units of 850
    assert beta_warning(tasks, absolute, beta=0.5, lam=0.8) == ("dear",)  # 0.3 > 0.8 * 80 / 850; 1.5 < 0.8 * 1600 / 850
