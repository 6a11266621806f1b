"""How much of the oracle's lead is luck: by hand, where outcomes are the task's, and where they are chance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from bopo_ray.analysis.cost_unit import COST_UNITS
from bopo_ray.analysis.headroom import KNOWN, MOST, ORACLE, SCHEDULES, headroom, headroom_figure, task_share
from bopo_ray.records import CostMode
from experiments.headroom import verdict

USD, CALLS = COST_UNITS[CostMode.USD], COST_UNITS[CostMode.CALLS]
NAMES = {"always-small": 0, "first-large(2)": 2, "first-large(5)": 5, "always-large": 40}
COSTS = {"always-small": 0.001, "first-large(2)": 0.002, "first-large(5)": 0.004, "always-large": 0.01}


def rows(tasks: int, samples: int, wins: Callable[[int, str, int], bool]) -> pd.DataFrame:
    return pd.DataFrame(
        {"task": f"t{t}", "sample": m, "schedule": name, "k": k, "success": wins(t, name, m), "cost_usd": COSTS[name],
         "large_calls": k}
        for t in range(tasks) for name, k in NAMES.items() for m in range(samples)
    )  # fmt: skip


def volumes(table: pd.DataFrame) -> dict[str, float]:
    return table.drop_duplicates("pick").set_index("pick")["hypervolume"].to_dict()


def test_the_share_of_the_task_by_hand() -> None:
    assert task_share([[1, 1], [0, 0]]) == 1.0
    assert task_share([[0, 1], [1, 0], [0, 1]]) == 0.0
    assert np.isnan(task_share([[1, 1], [1, 1]]))
    # within: (0 + 0 + 1/2) / 3 = 1/6; means 1, 0, 1/2 vary by 1/4, less 1/6 / 2: 1/6; so half of it is the task's
    assert task_share([[1, 1], [0, 0], [0, 1]]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="2 episodes of each"):
        task_share([[1], [0]])


def test_where_the_task_decides_the_oracle_has_no_luck() -> None:
    needs = [0, 2, 5, 2, 0, 40]  # the shortest schedule that wins
    table = headroom(rows(6, 3, lambda t, name, _: NAMES[name] >= needs[t]), USD)
    own = table.set_index(["pick", "setting"])
    assert own.loc[SCHEDULES]["success"].tolist() == pytest.approx([2 / 6, 4 / 6, 5 / 6, 1])
    assert own.loc[SCHEDULES]["task_share"].iloc[:3].tolist() == [1.0, 1.0, 1.0]
    for pick in (KNOWN, MOST, ORACLE):  # at the least lambda everything is won, each task at its own price
        cheapest = own.loc[pick].iloc[0]
        assert cheapest["success"] == 1.0 and cheapest["cost_usd"] == pytest.approx(
            (0.001 + 0.002 + 0.004 + 0.002 + 0.001 + 0.01) / 6
        )
    found = volumes(table)
    assert found[KNOWN] == found[MOST] == pytest.approx(found[ORACLE]) and found[ORACLE] > found[SCHEDULES]


def test_a_task_is_chosen_by_the_calls_that_it_takes_where_these_are_the_cost() -> None:
    needs = [0, 2, 5, 2, 0, 40]
    table = headroom(rows(6, 3, lambda t, name, _: NAMES[name] >= needs[t]), CALLS)
    cheapest = table[table["pick"] == ORACLE].iloc[0]
    assert cheapest["success"] == 1.0 and cheapest["large_calls"] == pytest.approx(sum(needs) / 6)
    axes, _ = headroom_figure(table, CALLS, "simulated pair").axes
    assert axes.get_xlabel() == "mean calls of larger models per task"


def test_where_chance_decides_all_of_the_oracles_lead_is_luck() -> None:
    rng = np.random.default_rng(0)
    odds = {"always-small": 0.3, "first-large(2)": 0.5, "first-large(5)": 0.7, "always-large": 0.8}
    table = headroom(rows(400, 3, lambda t, name, m: bool(rng.random() < odds[name])), USD)
    assert (table.loc[table["pick"] == SCHEDULES, "task_share"] < 0.06).all()
    found, more = volumes(table), table.drop_duplicates("pick").set_index("pick")
    assert found[ORACLE] > found[SCHEDULES] + 0.2
    assert more.loc[KNOWN, "more"] < 0.02 and more.loc[KNOWN, "more_low"] < 0
    assert more.loc[ORACLE, "more_low"] > 0.1


def test_what_is_to_be_known_lies_between_the_two_who_know_a_few_plays() -> None:
    """Who knew the odds themselves wins more than those who know them by two other plays: that is a lower bound."""
    rng = np.random.default_rng(1)
    odds = rng.uniform(size=(400, len(NAMES)))
    at, names = 0.03, list(NAMES)  # the least lambda
    table = headroom(rows(400, 3, lambda t, name, _: bool(rng.random() < odds[t, names.index(name)])), USD)
    first = table.drop_duplicates("pick").set_index("pick")
    assert first.loc[[KNOWN, MOST, ORACLE], "setting"].tolist() == [f"lambda {at:.2g}"] * 3
    price = at * np.array(list(COSTS.values())) / COSTS["always-large"]
    value = first["success"] - at * first["cost_usd"] / COSTS["always-large"]
    assert value[KNOWN] + 0.03 < (odds - price).max(axis=1).mean() < value[MOST] - 0.03 < value[ORACLE] - 0.06


def test_the_verdict_calls_luck_only_what_no_knowledge_of_the_tasks_explains() -> None:
    said = verdict({KNOWN: 0.051, MOST: 0.141, ORACLE: 0.188}, 0.01)
    assert "lead of 0.188" in said and "at least 0.051 (27%)" in said and "at most 0.141 (75%)" in said
    assert "the rest, 25% or more, is luck" in said
    unsure = verdict({KNOWN: 0.051, MOST: 0.141, ORACLE: 0.188}, -0.01)
    assert "none for certain is to be known of the tasks" in unsure and "0.051" not in unsure, "its interval holds 0"
    assert "at most 0.141 (75%)" in unsure
    assert "nothing to gain" in verdict({KNOWN: 0.0, MOST: 0.0, ORACLE: 0.0}, 0.0)


def test_each_task_needs_each_schedule_and_the_figure_has_the_four_lines() -> None:
    whole = rows(4, 2, lambda t, name, m: (t + m) % 2 == 0 or name == "always-large")
    for bad in (whole.iloc[1:], whole[whole["sample"] == 0], whole[whole["task"] == "t0"]):
        with pytest.raises(ValueError, match="at least 2 tasks and 2 samples"):
            headroom(bad, USD)
    axes, shares = headroom_figure(headroom(whole, USD), USD, "simulated pair").axes
    legend = axes.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == [SCHEDULES, KNOWN, MOST, ORACLE]
    assert [t.get_text() for t in shares.get_xticklabels()] == list(NAMES)
