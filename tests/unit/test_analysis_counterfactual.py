"""What LARGE is worth at one step: the table by hand, the figure, and the router that swaps a step."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from bopo_ray.analysis.counterfactual import counterfactual, counterfactual_figure
from bopo_ray.pipeline.counterfactual import Swapped
from bopo_ray.routers import Moment, parse_router
from experiments import counterfactual as script


def row(task: str, step: int, failed: bool, small: float, large: float) -> dict[str, object]:
    return {
        "task": task, "member": 0, "step": step, "large": False, "after_failure": failed, "outcome_small": small,
        "outcome_large": large, "cost_small_usd": 0.01, "cost_large_usd": 0.03,
    }  # fmt: skip


ROWS = pd.DataFrame(
    [row("a", 0, False, 0, 1), row("b", 0, False, 0, 1), row("a", 2, True, 0, 1), row("b", 2, False, 1, 0),
     row("c", 2, True, 0, 0)]
)  # fmt: skip


def test_the_table_by_hand() -> None:
    table = counterfactual(ROWS).set_index(["step", "after_failure"])
    assert table.loc[("0", "all"), "gain"] == table.loc[("0", "all"), "gain_low"] == 1.0
    assert table.loc[("2", "all"), "gain"] == pytest.approx(0.0)  # +1, -1, 0
    assert table.loc[("2", "yes"), ["tasks", "gain"]].tolist() == [2, 0.5]
    # over all steps a task counts once: a (1 + 1) / 2, b (1 - 1) / 2, c 0
    assert table.loc[("all", "all"), "gain"] == pytest.approx(1 / 3)
    assert table.loc[("all", "all"), ["outcome_small", "outcome_large"]].tolist() == pytest.approx([1 / 6, 1 / 2])
    assert table["extra_cost_usd"].tolist() == pytest.approx([0.02] * len(table))
    assert ("2", "no") not in table.index and ("0", "yes") not in table.index  # one task, none


def test_the_gain_is_the_difference_of_the_two_outcomes_however_often_a_task_was_played() -> None:
    """Nine episodes of a task that LARGE loses, and one of a task that it wins: each task counts once."""
    table = counterfactual(pd.DataFrame([row("a", 0, False, 1, 0)] * 9 + [row("b", 0, False, 0, 1)]))
    whole = table.set_index(["step", "after_failure"]).loc[("all", "all")]
    assert whole[["outcome_small", "outcome_large", "gain"]].tolist() == [0.5, 0.5, 0.0]
    assert (table["outcome_large"] - table["outcome_small"]).tolist() == pytest.approx(table["gain"].tolist())


def test_the_figure_has_a_line_for_each_kind_of_step() -> None:
    figure = counterfactual_figure(counterfactual(ROWS), "first-large(5)", "simulated pair")
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["all steps", "after a step that failed",
                                                          "after one that did not"]  # fmt: skip


def test_a_step_of_few_tasks_is_in_the_table_alone() -> None:
    many = pd.DataFrame(
        [row(f"t{i}", 0, False, 0, 1) for i in range(5)] + [row(f"t{i}", 1, False, 0, 1) for i in range(4)]
    )
    table = counterfactual(many)
    assert set(table["step"]) == {"all", "0", "1"}
    figure = counterfactual_figure(table, "first-large(5)", "simulated pair")
    (axes,) = figure.axes
    assert [list(line[0].get_xdata()) for line in axes.containers] == [[-0.12], [], [0.12]]
    assert any("only steps that 5 tasks or more reached" in t.get_text() for t in figure.texts) and not axes.texts
    few = counterfactual_figure(counterfactual(many[many["step"] == 1]), "first-large(5)", "simulated pair")
    assert [t.get_text() for t in few.axes[0].texts] == ["No step was reached on 5 tasks: see the table."]


@pytest.mark.parametrize("rows", [ROWS.iloc[:0], pd.DataFrame(), ROWS[ROWS["task"] == "a"]])
def test_what_no_two_tasks_have_reached_is_said_in_one_line(
    rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, played = SimpleNamespace(start_ray=lambda: None), list[int]()
    monkeypatch.setattr(script, "open_finished", lambda _: SimpleNamespace())
    monkeypatch.setattr(script, "open_run", lambda *_: nullcontext(run))
    monkeypatch.setattr(script, "play_swaps", lambda *a: played.append(a[3]) or rows)
    assert script.main([str(Path()), "--steps", "2"]) == 2 and played == [40]
    line = capsys.readouterr().err
    assert line.startswith("error: steps=2: no step was reached on 2 dev tasks") and line.count("\n") == 1
    assert script.main([str(Path()), "--tasks", "1"]) == 2 and played == [40], "before anything is paid for"
    assert "error: tasks=1: need at least 2; set it with --tasks" in capsys.readouterr().err


@pytest.mark.parametrize(("step", "models"), [(0, [0, 1, 0, 0]), (1, [1, 0, 0, 0]), (3, [1, 1, 0, 1])])
def test_one_step_has_the_other_model(step: int, models: list[int]) -> None:
    router = Swapped(parse_router("first-large:2").make(), step)
    assert [router(Moment("", t, 2)).index(1.0) for t in range(4)] == models
