"""Cost inversion, allocation and hard budgets: hand-worked tables, the files, and the figures' words."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from bopo_ray.analysis.canvas import method_style
from bopo_ray.analysis.page import write_study
from bopo_ray.analysis.studies import (
    allocation,
    hard_budget,
    interval_text,
    inversion_rates,
    inversions,
    pair_row,
    pair_table,
    task_difficulty,
)
from bopo_ray.analysis.study_plots import allocation_figure, hard_budget_figure, inversion_figure
from tests.unit.test_analysis_plots import texts


def boundaries(*rows: tuple[str, str, float, float]) -> pd.DataFrame:
    names = ["task", "difficulty", "cost_small_usd", "cost_large_usd"]
    return pd.DataFrame([dict(zip(names, row, strict=True)) | {"k": 5, "other": 1} for row in rows])


INVERTED = inversions(
    {
        "A-v0": boundaries(("a", "easy", 1, 2), ("b", "hard", 3, 2), ("c", "hard", 1, 2), ("d", "intractable", 2, 2)),
        "B-v0": boundaries(("a", "hard", 9, 1)),
    }
)


def test_inversion_is_strict_and_counted_by_benchmark_and_difficulty() -> None:
    assert INVERTED["inverted"].tolist() == [False, True, False, False, True], "equal costs are no inversion"
    rates = inversion_rates(INVERTED).set_index(["benchmark", "difficulty"])
    assert rates["inversions"].to_dict() == {
        ("A-v0", "all"): 1, ("A-v0", "easy"): 0, ("A-v0", "hard"): 1, ("A-v0", "intractable"): 0,
        ("B-v0", "all"): 1, ("B-v0", "hard"): 1,
    }  # fmt: skip
    row = rates.loc[("A-v0", "all")]
    assert (row["tasks"], row["rate"]) == (4, 0.25) and row["rate_low"] == 0 and 0.5 <= row["rate_high"] <= 1
    assert math.isnan(rates.loc[("B-v0", "all")]["rate_low"]), "one task leaves nothing to resample"


@pytest.mark.parametrize(("small", "rate", "low", "high"), [(1, 0.0, 0.0, 0.4593), (3, 1.0, 0.5407, 1.0)])
def test_none_or_all_of_a_few_tasks_is_not_certain(small: int, rate: float, low: float, high: float) -> None:
    """Clopper and Pearson: 1 - 0.025^(1/6) of six."""
    tasks = boundaries(*((name, "hard", small, 2) for name in "abcdef"))
    row = inversion_rates(inversions({"A-v0": tasks})).iloc[0]
    assert (row["rate"], row["rate_low"], row["rate_high"]) == (rate, pytest.approx(low, abs=1e-4),
                                                                pytest.approx(high, abs=1e-4))  # fmt: skip


def episodes(*rows: tuple[str, str, bool, float], large: tuple[int, ...] = ()) -> pd.DataFrame:
    """Of ten steps each, of which the large model wrote so many; none where that is not said."""
    frame = pd.DataFrame([dict(zip(["method", "task", "success", "cost_usd"], row, strict=True)) for row in rows])
    return frame.assign(large_calls=large or 0, steps=10)


EPISODES = episodes(
    ("always-small", "e", True, 1.0), ("always-small", "h", False, 2.0), ("always-small", "i", False, 1.0),
    ("bopo", "e", True, 1.0), ("bopo", "h", True, 5.0), ("bopo", "h", False, 3.0), ("bopo", "i", False, 1.0),
    large=(0, 0, 0, 1, 4, 8, 0),
)  # fmt: skip


def test_the_difficulty_of_held_out_tasks_by_hand() -> None:
    assert task_difficulty(EPISODES).to_dict() == {"e": "easy", "h": "hard", "i": "intractable"}
    five = [("always-small", "x", i < n, 1.0) for n in (3,) for i in range(5)]
    four = [("always-small", "y", i < 2, 1.0) for i in range(5)]
    assert task_difficulty(episodes(*five, *four)).to_dict() == {"x": "easy", "y": "hard"}  # 3 of 5, 2 of 5
    assert task_difficulty(episodes(("bopo", "x", True, 1.0), ("always-small", "x", False, 1.0)))["x"] == "hard"


def test_allocation_by_hand() -> None:
    found = allocation(EPISODES).set_index(["method", "difficulty"])
    assert found["spend_share"].to_dict() == {
        ("always-small", "easy"): 0.25, ("always-small", "hard"): 0.5, ("always-small", "intractable"): 0.25,
        ("bopo", "easy"): 0.1, ("bopo", "hard"): 0.8, ("bopo", "intractable"): 0.1,
    }  # fmt: skip
    assert found["large_share"].to_dict() == {
        ("always-small", "easy"): 0.0, ("always-small", "hard"): 0.0, ("always-small", "intractable"): 0.0,
        ("bopo", "easy"): 0.1, ("bopo", "hard"): 0.6, ("bopo", "intractable"): 0.0,
    }  # fmt: skip
    assert found["success"].to_dict() == {
        ("always-small", "easy"): 1.0, ("always-small", "hard"): 0.0, ("always-small", "intractable"): 0.0,
        ("bopo", "easy"): 1.0, ("bopo", "hard"): 0.5, ("bopo", "intractable"): 0.0,
    }  # fmt: skip
    one = found.loc[("bopo", "hard")]
    assert math.isnan(one["large_share_low"]) and math.isnan(one["large_share_high"]), "one Hard task settles nothing"
    assert set(found["task_share"]) == {1 / 3} and set(found["tasks"]) == {1}
    assert (found["spend_share_low"] <= found["spend_share"]).all()
    assert (found["spend_share"] <= found["spend_share_high"]).all()
    free = allocation(EPISODES.assign(cost_usd=0.0))
    assert free["spend_share"].isna().all(), "of nothing there is no share"
    easy = allocation(EPISODES[EPISODES["task"] == "e"]).set_index(["method", "difficulty"]).loc[("bopo", "hard")]
    assert easy["tasks"] == 0 and math.isnan(easy["large_share"]) and math.isnan(easy["success"])
    assert easy["spend_share"] == 0 and math.isnan(easy["spend_share_low"]) and math.isnan(easy["spend_share_high"])


def played(policy: str, cap: float, task: str, success: bool, used: float, unit: str = "calls") -> dict[str, object]:
    return {"unit": unit, "cap": cap, "used": used, "method": policy, "setting": "s", "lam": math.nan,
            "train_seed": math.nan, "task": task, "success": success, "cost_usd": 0.01,
            "large_calls": used if unit == "calls" else 1, "stop": "success" if success else "budget"}  # fmt: skip


CAPPED = pd.DataFrame(
    [
        played("x", 5, "a", True, 5), played("x", 5, "a", False, 3), played("x", 5, "b", False, 0),
        played("x", 10, "a", True, 5), played("x", 10, "b", True, 11),
        played("x", 0, "a", False, 0), played("x", 0.02, "a", True, 0.01, "usd"),
    ]
)  # fmt: skip


def test_hard_budgets_by_hand() -> None:
    found = hard_budget(CAPPED, "x").set_index(["unit", "cap"])
    row = found.loc[("calls", 5)]
    # task a: half a success and 80% of the cap, task b: none
    assert (row["success"], row["cap_used"], row["overspends"], row["episodes"]) == (0.25, 0.4, 0, 3)
    assert (row["stopped_by_budget"], row["large_calls"]) == (2, 8 / 3)
    assert found.loc[("calls", 10)]["overspends"] == 1, "11 of 10 is found"
    assert found.loc[("calls", 0)]["cap_used"] == 0.0 and found.loc[("usd", 0.02)]["cap_used"] == 0.5


def test_hard_budgets_are_compared_task_by_task() -> None:
    """Two seeds of x win a fifth and two fifths more than y, of the same twenty tasks, under one cap."""
    rows = []
    for i in range(20):
        task = f"t{i}"
        rows.append(played("y", 5, task, i < 8, 5))
        rows += [played("x", 5, task, i < 8 + 2 * n, 2) | {"train_seed": n} for n in (2, 4)]
    found = hard_budget(pd.DataFrame(rows), "x").set_index("method")
    assert found.loc["x", "success"] == pytest.approx(0.7) and found.loc["x", "setting"] == "s"
    y = found.loc["y"]
    assert (y["success"], y["less"]) == pytest.approx((0.4, 0.3)) and math.isnan(found.loc["x", "less"])
    assert 0 < y["less_low"] < 0.3 < y["less_high"] and y["p_holm"] < 0.05
    assert y["success_low"] < 0.4 < y["success_high"]
    assert hard_budget(pd.DataFrame(rows), "nobody")["less"].isna().all()
    one = hard_budget(pd.DataFrame([played("y", 5, "a", False, 5), played("x", 5, "a", True, 2)]), "x").set_index(
        "method"
    )
    assert one.loc["y", "less"] == 1.0 and one.loc["y", ["less_low", "success_high", "p_holm"]].isna().all()


def test_figures_say_what_they_show() -> None:
    label = "simulated pair"
    inverted = inversion_figure(INVERTED, inversion_rates(INVERTED), label)
    assert any(t.startswith("A-v0: inverted on 25% [") for t in texts(inverted)) and label in texts(inverted)
    assert any("small costs more: 1 of 4 tasks" in t for t in texts(inverted))
    spent = allocation_figure(allocation(EPISODES), label)
    assert {"80%", "33%", label, "3 held-out tasks, labelled in hindsight", "Hard won", "50%"} <= set(texts(spent))
    capped = hard_budget_figure(hard_budget(CAPPED, "x"), label)
    assert label in texts(capped) and any("1 overspends" in t for t in texts(capped))
    lines = [line.get_xydata().tolist() for axes in capped.axes for line in axes.lines]
    seeds = [played("x", 5, "a", s, 1) | {"train_seed": i} for i, s in enumerate((0, 1))]
    (averaged,) = hard_budget_figure(hard_budget(pd.DataFrame(seeds), "x"), label).axes
    assert averaged.lines[0].get_xydata().tolist() == [[5.0, 0.5]], "over seeds the mean, not the luckier one"
    assert lines == [[[0.0, 0.0], [5.0, 0.25], [10.0, 1.0]], [[0.02, 1.0]]]


def test_under_caps_the_headline_is_a_ring_over_the_others_and_caps_are_true() -> None:
    alike = [played(m, 0.00725, "a", True, 0.001, "usd") for m in ("always-large", "bopo-hybrid", "cascade")]
    figure = hard_budget_figure(hard_budget(pd.DataFrame(alike), "bopo-hybrid"), "simulated pair")
    ours, *others = sorted(figure.axes[0].lines, key=lambda line: -line.get_zorder())
    assert ours.get_color() == method_style("bopo-hybrid")[0] and ours.get_markerfacecolor() == "none"
    assert all(ours.get_zorder() > line.get_zorder() and line.get_markerfacecolor() != "none" for line in others)
    figure.draw_without_rendering()
    assert "0.00725" in texts(figure)


def test_a_study_is_four_files_and_its_page_shows_text_as_text(tmp_path: Path) -> None:
    table = pd.DataFrame({"who_pays": ["<b>mallory</b>"], "share": [0.123456], "none": [math.nan]})
    figure = allocation_figure(allocation(EPISODES), "simulated pair")
    written = write_study(tmp_path / "new", "s", "A & B", "Simulated.", table, figure, ["Note <1>."])
    assert [p.name for p in written] == ["s.html", "s.csv", "s.png", "s.svg"]
    page = written[0].read_text()
    assert "&lt;b&gt;mallory" in page and "<b>mallory" not in page and "A &amp; B" in page and "Note &lt;1&gt;." in page
    assert "<th>who pays</th>" in page and "<td>0.1235</td><td>–</td>" in page
    assert "<script" not in page and "default-src 'none'" in page and page.count("<svg") == 1
    pd.testing.assert_frame_equal(pd.read_csv(written[1]), table)
    assert written[2].read_bytes().startswith(b"\x89PNG") and written[3].read_text().startswith("<svg")


@pytest.mark.parametrize("difficulty", ["easy", "intractable"])
def test_a_figure_of_tasks_of_one_kind(difficulty: str) -> None:
    own = EPISODES[EPISODES["task"] == difficulty[0]]
    assert "100%" in texts(allocation_figure(allocation(own), ""))


def compared(**more: dict[str, object]) -> dict[str, object]:
    """As much of a `tables.summary` as a pair's row takes."""
    number = lambda x: {"estimate": x, "low": x - 0.1, "high": x + 0.1}  # noqa: E731
    point = {"success": 0.5, "success_low": 0.4, "success_high": 0.6}
    return {
        "n_tasks": 3, "headline": "bopo-hybrid",
        "operating_points": [point | {"method": m} for m in ("always-small", "always-large", "bopo-hybrid")],
        "hypervolumes": {
            "bopo-hybrid": number(0.5), "bopo-augmented": number(0.7), "oracle": number(0.9),
            "boundary only": number(0.8), "first-large": number(0.4), "random": number(0.3),
        },
        "differences": {m: number(d) | {"p": 0.1, "p_holm": 0.2} for m, d in (("first-large", 0.1), ("random", 0.2))},
        "cost_saved": {"bopo-hybrid": [{"success_share": s, "saved": number(s)} for s in (0.9, 0.95, 1.0)]},
    } | more  # fmt: skip


BOTH = pd.DataFrame(
    [("always-small", "a", 1.0), ("always-small", "a", 3.0), ("always-small", "b", 2.0), ("always-large", "a", 4.0),
     ("always-large", "b", 8.0), ("always-large", "c", 99.0), ("bopo-hybrid", "a", 50.0)],
    columns=["method", "task", "cost_usd"],
)  # fmt: skip


def test_a_model_pair_by_hand() -> None:
    row = pair_row("llama", "simulated pair", BOTH, compared())
    assert row["cost_ratio"] == 3.0, "of the tasks that both have played, each once: (4 + 8) / (2 + 2)"
    assert 2.0 <= row["cost_ratio_low"] <= 3.0 <= row["cost_ratio_high"] <= 4.0
    assert row["best_baseline"] == "first-large", (
        "not the oracle, nor the boundaries alone, nor BoPO under another name"
    )
    assert (row["bopo"], row["baseline"], row["less"], row["less_p_holm"]) == (0.5, 0.4, 0.1, 0.2)
    assert (row["success_large"], row["success_large_low"], row["saved"]) == (0.5, 0.4, 0.95)
    free = pair_row("x", "y", BOTH.assign(cost_usd=0.0), compared())
    assert math.isnan(free["cost_ratio"]), "of nothing there is no multiple"
    one = pair_row("x", "y", BOTH[BOTH["task"] == "a"], compared())
    assert one["cost_ratio"] == 2.0 and math.isnan(one["cost_ratio_low"])
    none = pair_row("x", "y", BOTH, compared(headline=None, cost_saved={}, differences={}))  # type: ignore[arg-type]
    assert math.isnan(none["bopo"]) and math.isnan(none["saved"]) and none["baseline"] == 0.4


def test_the_headline_is_no_rival_of_itself() -> None:
    """Where vanilla GRPO alone was trained it is what the others are compared with."""
    volumes = {m: {"estimate": v, "low": v, "high": v} for m, v in (("grpo-vanilla", 0.6), ("random", 0.3))}
    row = pair_row("x", "y", BOTH, compared(headline="grpo-vanilla", hypervolumes=volumes))  # type: ignore[arg-type]
    assert (row["bopo"], row["best_baseline"], row["less"]) == (0.6, "random", 0.2)


def test_pairs_beside_each_other() -> None:
    rows = pd.DataFrame([pair_row(n, "simulated pair", BOTH, compared()) for n in ("a", "b")])
    shown = pair_table(rows).set_index("what")
    assert list(shown.columns) == ["a", "b"] and shown.loc["best baseline", "b"] == "first-large"
    assert shown.loc["success, always-large", "a"] == "50% [40%, 60%]"
    assert shown.loc["BoPO less that", "a"] == "+0.100 [+0.000, +0.200]"
    kept = "saved by the cheapest point that reached 95% of always-large's success on these tasks"
    assert shown.loc[f"cost {kept}", "a"] == "95%", "picked on these tasks: without an interval"
    calls = pd.DataFrame([pair_row("a", "simulated pair", BOTH, compared(cost="calls"))])  # type: ignore[arg-type]
    assert f"large calls {kept}" in pair_table(calls)["what"].tolist()
    assert interval_text({"x": 0.5, "x_low": math.nan, "x_high": math.nan}, "x", ".1f") == "0.5"
    assert interval_text({"x": math.nan, "x_low": 0, "x_high": 1}, "x", ".1f") == "–"
