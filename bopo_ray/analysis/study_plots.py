"""The figures of `bopo_ray.analysis.studies`, in the style of `bopo_ray.analysis.plots`."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter

from bopo_ray.analysis.canvas import DIFFICULTY_COLOURS, INK, MUTED, canvas, head, mark, ordered, styled, usd
from bopo_ray.analysis.plots import draw_costs

__all__ = ["allocation_figure", "hard_budget_figure", "inversion_figure"]


@styled
def inversion_figure(inverted: pd.DataFrame, rates: pd.DataFrame, label: str) -> Figure:
    """Each task's cost with always-large against always-small, a panel per benchmark; inversions are ringed.

    Args:
        inverted: of `studies.inversions`.
        rates: of `studies.inversion_rates`.
        label: what was measured; printed on the figure.
    """
    names = list(dict.fromkeys(inverted["benchmark"]))
    figure, grid = canvas(max(7.5, 5.2 * len(names)), 6.0, 1, len(names))
    width = figure.get_figwidth()
    figure.subplots_adjust(left=0.85 / width, right=1 - 0.2 / width, top=0.76, bottom=0.19, wspace=0.28)
    for axes, name in zip(np.ravel(grid), names, strict=True):
        own = inverted[inverted["benchmark"] == name]
        draw_costs(axes, own, own["difficulty"])
        rate = rates[(rates["benchmark"] == name) & (rates["difficulty"] == "all")].iloc[0]
        interval = f"{rate['rate']:.0%} [{rate['rate_low']:.0%}, {rate['rate_high']:.0%}]"
        axes.set_title(f"{name}: inverted on {interval} of {rate['tasks']} tasks", fontsize=11)
    handles = [Line2D([], [], color=c, marker="o", linestyle="", label=d) for d, c in DIFFICULTY_COLOURS.items()]
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.05, 0.005), ncols=3)
    k = ", ".join(f"{k}" for k in sorted(set(inverted["k"])))
    head(figure, "Cost inversion", f"training tasks; means of K = {k} rollouts per policy; 95% intervals", label)
    return figure


@styled
def allocation_figure(shares: pd.DataFrame, label: str) -> Figure:
    """Two panels of a row per method: shares of its dollars by difficulty, above them the share of the tasks; and on
    how many of its steps it calls the larger models, on tasks of each difficulty, with the share of Hard tasks won.

    Args:
        shares: of `studies.allocation`.
        label: what was measured; printed on the figure.
    """
    methods = ordered(shares["method"].unique())
    tasks = shares[shares["method"] == methods[0]].set_index("difficulty")["task_share"]
    rows = ["share of tasks", *methods]
    height = 0.42 * len(rows) + 2.1
    figure, (dollars, calls) = canvas(13.0, height, 1, 2, width_ratios=(5, 3))
    figure.subplots_adjust(left=0.13, right=0.92, top=1 - 1.1 / height, bottom=0.75 / height, wspace=0.1)
    left = np.zeros(len(rows))
    for name, colour in DIFFICULTY_COLOURS.items():
        own = shares[shares["difficulty"] == name].set_index("method")
        values = np.array([tasks[name], *(own["spend_share"][m] for m in methods)])
        bars = dollars.barh(rows, values, left=left, color=colour, height=0.7)
        bars[0].set_alpha(0.45)
        for y, (start, value) in enumerate(zip(left, values, strict=True)):
            if value >= 0.06:
                text = INK if y == 0 else "white"
                dollars.text(start + value / 2, y, f"{value:.0%}", ha="center", va="center", color=text, fontsize=9)
        left += values
        large = own["large_share"].reindex(methods).to_numpy()
        calls.scatter(large, np.arange(1, len(rows)), color=colour, s=52, zorder=3, clip_on=False)
    for y, method in enumerate(methods, 1):
        own = shares[shares["method"] == method].set_index("difficulty")
        calls.plot([own["large_share"].min(), own["large_share"].max()], [y, y], color=MUTED, linewidth=1.2)
        if own["tasks"]["hard"]:
            calls.text(1.17, y, f"{own['success']['hard']:.0%}", ha="right", va="center", fontsize=9)
    calls.text(1.17, 0, "Hard won", ha="right", va="center", color=DIFFICULTY_COLOURS["hard"], fontsize=9)
    for axes in (dollars, calls):
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.axhline(0.5, color=MUTED, linewidth=0.8)
        axes.set_xlim(0, 1)
        axes.grid(False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    dollars.set_xlabel("share of dollars")
    calls.set_yticks([])
    calls.set_xlabel("steps on which a larger model is called")
    handles = [Line2D([], [], color=c, linewidth=6, label=d) for d, c in DIFFICULTY_COLOURS.items()]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.12, 1 - 0.72 / height), ncols=3, fontsize=10)
    count = int(shares[shares["method"] == methods[0]]["tasks"].sum())
    head(figure, "Where the dollars go", f"{count} held-out tasks, labelled in hindsight", label)
    return figure


@styled
def hard_budget_figure(table: pd.DataFrame, label: str) -> Figure:
    """Success under each cap, a panel for calls and one for dollars; of each method what it was to play there.

    Args:
        table: of `studies.hard_budget`.
        label: what was measured; printed on the figure.
    """
    units = [u for u in ("calls", "usd") if (table["unit"] == u).any()]
    figure, grid = canvas(6.0 * len(units), 6.2, 1, len(units))
    figure.subplots_adjust(left=0.08, right=0.98, top=0.83, bottom=0.25, wspace=0.2)
    methods = ordered(table["method"].unique())
    alone = table.groupby("method")["less"].apply(lambda less: bool(less.isna().all()))  # compared with none
    headline = alone.index[alone][0] if alone.sum() == 1 else ""
    for axes, unit in zip(np.ravel(grid), units, strict=True):
        own = table[table["unit"] == unit]
        for method in methods:
            ours = own[own["method"] == method].sort_values("cap")
            line = {"linewidth": 1.4, "zorder": 3} if method == headline else {"linewidth": 2.2, "zorder": 2}
            axes.plot(ours["cap"], ours["success"], **mark(method, method == headline), **line, alpha=0.9)
        axes.set_xticks(sorted(own["cap"].unique()))
        axes.set_xlabel("cap: calls of the large model per task" if unit == "calls" else "cap: USD per task")
        if unit == "usd":
            axes.xaxis.set_major_formatter(FuncFormatter(usd))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylabel("success")
    handles = [Line2D([], [], **mark(m, m == headline), label=str(m)) for m in methods]
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.05, 0.005), ncols=5, fontsize=10)
    over = int(table["overspends"].sum())
    subtitle = f"budget-constrained decoding; each method's policy chosen on dev tasks at each cap; {over} overspends"
    head(figure, "Success under a hard budget", subtitle, label)
    return figure
