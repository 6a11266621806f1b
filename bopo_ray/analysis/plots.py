"""The figures, as Matplotlib `Figure` objects: no pyplot, no display, no state between calls.

`bopo_ray.analysis.canvas` holds what they share, and renders them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from bopo_ray.analysis.canvas import (
    DIFFICULTY_COLOURS,
    INK,
    MUTED,
    NARROW,
    canvas,
    head,
    mark,
    method_style,
    ordered,
    styled,
    usd,
)
from bopo_ray.analysis.cost_unit import cost_unit
from bopo_ray.analysis.labels import free_spots, spread
from bopo_ray.analysis.pareto import pareto_front
from bopo_ray.analysis.tables import ALWAYS_LARGE, ALWAYS_SMALL

__all__ = ["draw_costs", "frontier_figure", "frontiers_figure", "taxonomy_figure", "training_curves_figure"]


@styled
def frontier_figure(
    frontier_df: pd.DataFrame,
    summary: Mapping[str, Any],
    title: str,
    label: str,
    subtitle: str = "",
    narrow: bool = False,
) -> Figure:
    """Success against mean cost per task: marks averaged over seeds with intervals, seeds as dots, fronts as steps.

    Args:
        frontier_df: rows of `tables.frontier`; drawn as faint dots where a method has several training seeds.
        summary: of `tables.summary`; its operating points are the marks.
        title: printed large.
        label: what was measured, e.g. "simulated pair"; printed on the figure, so that a copy of it stays honest.
        subtitle: printed under the title.
        narrow: for a phone, with a legend below instead of names beside.
    """
    figure, axes = canvas(*((NARROW, 6.6) if narrow else (11.0, 7.0)))
    ends = _draw_frontier(axes, frontier_df, summary)
    top = head(figure, title, subtitle or ("" if narrow else _subtitle(summary)), label)
    if narrow:
        rows = -(-len(ends) // 2)
        figure.subplots_adjust(left=0.17, right=0.97, top=1 - top, bottom=0.12 + 0.034 * rows)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        _legend(figure, ends, 2, {str(summary.get("headline"))})
    else:
        figure.subplots_adjust(left=0.075, right=0.80, top=0.88, bottom=0.09)
        names = _label_methods(axes, ends, str(summary.get("headline") or ""))
        figure.draw_without_rendering()
        widest = max((name.get_window_extent().x1 for name in names), default=0.0) / figure.bbox.width
        figure.subplots_adjust(right=0.80 - max(0.0, widest - 0.99))
    points = pd.DataFrame(summary["operating_points"])
    _label_lambdas(figure, axes, points, summary)
    return figure


@styled
def frontiers_figure(
    panels: Mapping[str, tuple[pd.DataFrame, Mapping[str, Any]]], title: str, label: str, subtitle: str = ""
) -> Figure:
    """Several frontiers side by side, a panel each, with scales of their own and one legend.

    Args:
        panels: what stands over a panel -> its `tables.frontier` and `tables.summary`, as in `frontier_figure`.
        title, label, subtitle: as in `frontier_figure`.

    Raises:
        ValueError: there is no panel.
    """
    if not panels:
        raise ValueError("no frontier to draw: need at least one")
    width = max(9.0, 5.4 * len(panels))
    figure, grid = canvas(width, 6.4, 1, len(panels))
    methods: set[str] = set()
    headlines = {str(summary.get("headline")) for _, summary in panels.values()}
    for axes, (name, (frontier_df, summary)) in zip(np.ravel(grid), panels.items(), strict=True):
        methods |= set(_draw_frontier(axes, frontier_df, summary))
        axes.set_title(f"{name}\n{summary['n_tasks']} tasks", fontsize=11)
        points = pd.DataFrame(summary["operating_points"])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        _label_lambdas(figure, axes, points, summary)
    columns = min(len(methods), int(width / 1.6))
    rows = -(-len(methods) // columns)
    figure.subplots_adjust(left=0.9 / width, right=0.985, top=0.8, bottom=0.15 + 0.05 * rows, wspace=0.24)
    _legend(figure, methods, columns, headlines)
    head(figure, title, subtitle, label)
    return figure


def _legend(figure: Figure, methods: Iterable[str], columns: int, headlines: Container[str]) -> None:
    """The methods' marks under the drawing."""
    handles = [Line2D([], [], **mark(m, m in headlines), linestyle="", label=str(m)) for m in ordered(list(methods))]
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.01, 0.005), ncols=columns, fontsize=10)


def _draw_frontier(axes: Axes, frontier_df: pd.DataFrame, summary: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """All methods' marks and fronts, with scales; returns where each front ends."""
    points, unit = pd.DataFrame(summary["operating_points"]), cost_unit(summary)
    cost, ends = unit.column, {}
    for name in ordered(points["method"].unique()):
        own = points[points["method"] == name].sort_values([cost, "success"])
        per_seed = frontier_df[frontier_df["method"] == name]
        ends[name] = _draw_method(axes, name, own, per_seed, cost, name == summary.get("headline"))
    _draw_random_line(axes, points, cost)
    spread_x = points[f"{cost}_high"].fillna(points[cost]).max() or 1.0
    free = not points[cost].all()  # a mark at 0 is to be seen whole
    axes.set_xlim(-0.02 * spread_x * free, spread_x * 1.04)
    lowest = points["success_low"].fillna(points["success"]).min()
    highest = points["success_high"].fillna(points["success"]).max()
    room = max(0.05, 0.08 * (highest - lowest))
    axes.set_ylim(max(-0.02, lowest - room), min(1.02, highest + room))
    axes.set_xlabel(unit.axis)
    axes.set_ylabel("success")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_formatter(FuncFormatter(usd))
    return ends


@styled
def training_curves_figure(
    df: pd.DataFrame,
    title: str = "Training",
    label: str = "",
    metrics: Sequence[str] | None = None,
    narrow: bool = False,
) -> Figure:
    """Small multiples: one panel per metric against the iteration, one line per trial.

    Args:
        df: columns trial, method, lam, seed, iteration and one column per metric; a metric may be NaN.
        title: printed large.
        label: what was measured; printed on the figure.
        metrics: columns to draw; None: every other numeric column that has a value.
        narrow: for a phone.

    Raises:
        ValueError: there is nothing to draw.
    """
    keys = {"trial", "method", "lam", "seed", "iteration"}
    numeric = [c for c in df.columns if c not in keys and pd.api.types.is_numeric_dtype(df[c])]
    shown = [c for c in (metrics or numeric) if df[c].notna().any()]
    if not shown:
        raise ValueError(f"no metric to draw among the columns {list(df.columns)}")
    columns = min(2 if narrow else 3, len(shown))
    rows = -(-len(shown) // columns)
    height = (1.9 if narrow else 2.5) * rows + (2.0 if narrow else 1.5)
    figure, grid = canvas(NARROW if narrow else 11.0, height, rows, columns)
    lams = sorted(df["lam"].dropna().unique().tolist())
    colours = dict(zip(lams, matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, max(len(lams), 1))), strict=False))
    methods = ordered(df["method"].unique())
    dashes = dict(zip(methods, ["-", "--", ":", "-."] * len(methods), strict=False))
    flat = list(np.ravel(grid))
    for axes, metric in zip(flat, shown, strict=False):
        for _, trial in df.dropna(subset=[metric]).groupby("trial", sort=False):
            trial = trial.sort_values("iteration")
            first = trial.iloc[0]
            axes.plot(
                trial["iteration"], trial[metric], dashes[first["method"]], color=colours.get(first["lam"], MUTED),
                linewidth=1.6, alpha=0.9, marker="." if len(trial) < 3 else None,
            )  # fmt: skip
        axes.set_title(metric.replace("_", " "))
        axes.set_xlim(df["iteration"].min() - 0.2, df["iteration"].max() + 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if (df[metric].dropna() % 1 == 0).all():  # counts
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    for axes in flat[len(shown) :]:
        axes.set_visible(False)
    for axes in flat[max(0, len(shown) - columns) : len(shown)]:
        axes.set_xlabel("iteration")
    handles = [Line2D([], [], color=colours[lam], linewidth=3, label=f"λ={lam:g}") for lam in lams]
    handles += [Line2D([], [], color=INK, linestyle=dashes[m], label=str(m)) for m in methods]
    stacked, abreast = head(figure, title, "", label) * height, 3 if narrow else 8
    above = stacked if narrow else 0.6  # inches, as below
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.01 if narrow else 0.05, 1 - above / height),
        ncols=abreast, columnspacing=1.4, handlelength=2.0, fontsize=10, borderaxespad=0,
    )  # fmt: skip
    above += 0.54 + 0.21 * -(-len(handles) // abreast)
    figure.subplots_adjust(
        left=0.17 if narrow else 0.06, right=0.985, top=1 - above / height, bottom=0.55 / height,
        hspace=0.5 if narrow else 0.42, wspace=0.45 if narrow else 0.26,
    )  # fmt: skip
    return figure


@styled
def taxonomy_figure(
    stats_df: pd.DataFrame, title: str = "Tasks by difficulty", label: str = "", narrow: bool = False
) -> Figure:
    """Counts of Easy, Hard and Intractable, and each task's cost with always-large against always-small.

    Args:
        stats_df: one row per task: task, difficulty, cost_small_usd, cost_large_usd (means over boundary rollouts).
        title: printed large.
        label: what was measured; printed on the figure.
        narrow: for a phone, one panel above the other.

    Raises:
        ValueError: a column is missing or there is no task.
    """
    needed = ["difficulty", "cost_small_usd", "cost_large_usd"]
    missing = [column for column in needed if column not in stats_df]
    if missing or stats_df.empty:
        raise ValueError(f"columns {missing} are missing" if missing else "there is no task to draw")
    if narrow:
        figure, (bars, scatter) = canvas(NARROW, 7.6, 2, 1, height_ratios=[1, 2.2])
        figure.subplots_adjust(left=0.2, right=0.97, top=0.88, bottom=0.08, hspace=0.32)
    else:
        figure, (bars, scatter) = canvas(11.0, 4.9, 1, 2, width_ratios=[1, 1.35])
        figure.subplots_adjust(left=0.1, right=0.985, top=0.84, bottom=0.13, wspace=0.24)
    difficulty = stats_df["difficulty"].astype(str)
    counts = difficulty.value_counts()
    names = list(DIFFICULTY_COLOURS)
    heights = [int(counts.get(d, 0)) for d in names]
    bars.barh(names[::-1], heights[::-1], color=[DIFFICULTY_COLOURS[d] for d in names[::-1]], height=0.62)
    for row, count in enumerate(heights[::-1]):
        bars.text(count, row, f"  {count} ({count / len(stats_df):.0%})", va="center", color=INK)
    bars.set_xlim(0, max(heights) * 1.32 + 0.5)
    bars.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    bars.grid(False, axis="y")
    bars.set_xlabel("tasks")
    draw_costs(scatter, stats_df, difficulty)
    head(figure, title, "", label)
    return figure


def draw_costs(axes: Axes, stats_df: pd.DataFrame, difficulty: pd.Series) -> None:
    """Each task's cost with always-large against always-small, in dollars; inversions are ringed."""
    small, large = (stats_df[c].to_numpy(dtype=float) for c in ("cost_small_usd", "cost_large_usd"))
    inverted = small > large
    top = float(max(small.max(), large.max(), 1e-9)) * 1.06
    axes.fill_between([0, top], [0, 0], [0, top], color="#D55E00", alpha=0.06, linewidth=0)
    axes.plot([0, top], [0, top], color=MUTED, linewidth=1, linestyle="--")
    for name, colour in DIFFICULTY_COLOURS.items():
        own = (difficulty == name).to_numpy()
        axes.scatter(small[own & ~inverted], large[own & ~inverted], s=22, color=colour, alpha=0.75, linewidth=0)
        axes.scatter(
            small[own & inverted], large[own & inverted], s=34, color=colour, edgecolor="#D55E00", linewidth=1.4
        )
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_xlabel("always-small: cost per task (USD)")
    axes.set_ylabel("always-large: cost per task (USD)")
    axes.xaxis.set_major_formatter(FuncFormatter(usd))
    axes.yaxis.set_major_formatter(FuncFormatter(usd))
    text = f"small costs more: {int(inverted.sum())} of {len(small)} tasks ({inverted.mean():.0%})"
    axes.text(0.98, 0.03, text, transform=axes.transAxes, ha="right", color="#B34700", fontsize=10)


def _draw_method(
    axes: Axes, name: str, own: pd.DataFrame, per_seed: pd.DataFrame, cost_column: str, headline: bool
) -> tuple[float, float]:
    """Marks, intervals and front of one method; returns where its label's line starts."""
    colour = method_style(name)[0]
    cost, success = own[cost_column].to_numpy(dtype=float), own["success"].to_numpy(dtype=float)
    if per_seed["train_seed"].nunique() > 1:
        axes.scatter(per_seed[cost_column], per_seed["success"], s=12, color=colour, alpha=0.3, linewidth=0, zorder=2)
    errors = {
        side: np.nan_to_num(
            np.abs(np.stack([own[m] - own[f"{m}_low"], own[f"{m}_high"] - own[m]]).astype(float)), nan=0.0
        )
        for side, m in (("xerr", cost_column), ("yerr", "success"))
    }
    axes.errorbar(cost, success, **errors, fmt="none", ecolor=colour, elinewidth=0.9, alpha=0.25, zorder=2)
    axes.plot(cost, success, **mark(name, headline), zorder=4.5 if headline else 4, linestyle="")
    front = pareto_front(cost, success)
    if len(front) > 1 and name != "random":
        line: Any = {"linewidth": 1.4, "zorder": 3.5} if headline else {"linewidth": 2.2, "zorder": 3}
        axes.step(cost[front], success[front], where="post", color=colour, alpha=0.9, **line)
    return float(cost[front[-1]]), float(success[front[-1]])


def _draw_random_line(axes: Axes, points: pd.DataFrame, cost: str) -> None:
    """always-small - random - always-large, by share of large calls: what mixing without looking buys."""
    line = points[points["method"].isin([ALWAYS_SMALL, "random", ALWAYS_LARGE])].sort_values("share_large")
    if len(line) > 1:
        axes.plot(line[cost], line["success"], color=MUTED, linewidth=1.2, linestyle="--", zorder=1)


def _label_methods(axes: Axes, ends: Mapping[str, tuple[float, float]], headline: str) -> list[Text]:
    """Names in the right margin, kept apart, the headline's in bold, each with a thin line to the end of its front."""
    names = []
    low, high = axes.get_ylim()
    wanted = [(ends[name][1] - low) / (high - low) for name in ends]
    placed = spread(wanted, gap=0.046, low=0.02, high=0.98)
    for (name, (cost, success)), y in zip(ends.items(), placed, strict=True):
        colour = method_style(name)[0]
        axes.annotate(
            "", xy=(cost, success), xycoords="data", xytext=(1.018, y), textcoords="axes fraction", zorder=1,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "linewidth": 0.8},
        )  # fmt: skip
        axes.plot([1.028], [y], **mark(name, name == headline), transform=axes.transAxes, clip_on=False)
        names.append(axes.text(
            1.045, y, name, transform=axes.transAxes, color=colour, va="center",
            fontweight="bold" if name == headline else "normal",
        ))  # fmt: skip
    return names


def _label_lambdas(figure: Figure, axes: Axes, points: pd.DataFrame, summary: Mapping[str, Any]) -> None:
    """Writes lambda at the points that have one, the headline's first; a label that finds no free spot is left out."""
    headline, where = str(summary.get("headline") or ""), [cost_unit(summary).column, "success"]
    figure.draw_without_rendering()
    to_pixels = axes.transData.transform
    obstacles = to_pixels(points[where].to_numpy(dtype=float))
    labelled = points[points["lam"].notna()].copy() if "lam" in points else points.iloc[:0]
    labelled["rank"] = labelled["method"] != headline
    labelled = labelled.sort_values(["rank", "method", where[0]])
    spots = free_spots(
        to_pixels(labelled[where].to_numpy(dtype=float)) if len(labelled) else np.empty((0, 2)),
        [f"λ={lam:g}" for lam in labelled["lam"]],
        obstacles,
        character_px=figure.dpi * 0.085,
        line_px=figure.dpi * 0.15,
    )
    for (_, row), spot in zip(labelled.iterrows(), spots, strict=True):
        if spot is not None:
            x, y = axes.transData.inverted().transform(spot)
            text = f"λ={row['lam']:g}"
            halo = [withStroke(linewidth=2.5, foreground="white")]
            colour = method_style(row["method"])[0]
            axes.text(x, y, text, color=colour, fontsize=9, ha="center", va="center", zorder=5, path_effects=halo)


def _subtitle(summary: Mapping[str, Any]) -> str:
    level = f"{summary['bootstrap']['level']:.0%}"
    marks = f"{summary['n_tasks']} tasks; marks: means over training seeds; bars: {level} intervals"
    dashed = "random" if "random" in {p["method"] for p in summary["operating_points"]} else "between the boundaries"
    return f"{marks}; steps: each method's own front; dashed: {dashed}"
