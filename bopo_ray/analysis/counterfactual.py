"""What LARGE is worth at a single step: table and figure of `bopo_ray.pipeline.counterfactual`'s rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bopo_ray.analysis.bootstrap import bootstrap_ci
from bopo_ray.analysis.canvas import INK, MUTED, canvas, head, styled

__all__ = ["counterfactual", "counterfactual_figure"]

WHERE = {"all": "all steps", "yes": "after a step that failed", "no": "after one that did not"}
"""Which rows a line of the table is of, and how the figure calls it."""
FEWEST = 5
"""Tasks that a step of the figure must have."""
COLOURS = {"all": INK, "yes": "#D55E00", "no": "#0072B2"}


def counterfactual(rows: pd.DataFrame) -> pd.DataFrame:
    """Per step, and over all of them: how much more outcome and cost an episode has with LARGE there than with SMALL.

    Args:
        rows: of `play_swaps`.

    A task counts once, however many of its episodes have the step.

    Returns:
        Columns step ("all" or its number), after_failure ("all", "yes", "no"), tasks, episodes, outcome_small,
        outcome_large, gain, gain_low, gain_high, extra_cost_usd, extra_cost_usd_low, extra_cost_usd_high; intervals:
        95% bootstrap over tasks. No line where there are fewer than 2 tasks; empty where no step has as many.
    """
    table = []
    steps: list[tuple[object, pd.DataFrame]] = [("all", rows), *rows.groupby("step")] if len(rows) else []
    for step, own in steps:
        for where in WHERE:
            part = own if where == "all" else own[own["after_failure"] == (where == "yes")]
            if part["task"].nunique() < 2:
                continue
            tasks = part.groupby("task")[["outcome_small", "outcome_large", "cost_small_usd", "cost_large_usd"]].mean()
            line = {
                "step": str(step), "after_failure": where, "tasks": len(tasks), "episodes": len(part),
                "outcome_small": float(tasks["outcome_small"].mean()),
                "outcome_large": float(tasks["outcome_large"].mean()),
            }  # fmt: skip
            for name, less, more in (
                ("gain", "outcome_small", "outcome_large"),
                ("extra_cost_usd", "cost_small_usd", "cost_large_usd"),
            ):
                interval = bootstrap_ci((tasks[more] - tasks[less]).to_numpy())
                line |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
            table.append(line)
    return pd.DataFrame(table)


@styled
def counterfactual_figure(table: pd.DataFrame, base: str, label: str) -> Figure:
    """The gain by step, with its interval: of all episodes, and apart by whether the step before had failed; where
    fewer than `FEWEST` tasks had such a step, the table alone has it, and the figure says so.

    Args:
        table: of `counterfactual`.
        base: the schedule, by name.
        label: what was measured; printed on the figure.
    """
    figure, axes = canvas(9.0, 5.6)
    figure.subplots_adjust(left=0.1, right=0.97, top=0.82, bottom=0.12)
    own = table[(table["step"] != "all") & (table["tasks"] >= FEWEST)]
    for i, where in enumerate(WHERE):
        line = own[own["after_failure"] == where]
        x = line["step"].astype(float) + (i - 1) * 0.12
        low, high = line["gain"] - line["gain_low"], line["gain_high"] - line["gain"]
        axes.errorbar(
            x, line["gain"], yerr=np.stack([low.clip(lower=0), high.clip(lower=0)]), marker="o", markersize=5,
            linewidth=1.4, capsize=2, color=COLOURS[where], label=WHERE[where], alpha=0.9,
        )  # fmt: skip
    if own.empty:
        text = f"No step was reached on {FEWEST} tasks: see the table."
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="bottom", color=MUTED)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("step, from 0")
    axes.set_ylabel("outcome with LARGE less outcome with SMALL")
    axes.legend(fontsize=10)
    subtitle = f"all other steps by {base}; dev tasks; only steps that {FEWEST} tasks or more reached"
    head(figure, "What the large model is worth at one step", subtitle, label)
    return figure
