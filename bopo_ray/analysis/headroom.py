"""How much of the oracle's lead over schedules is a matter of the task, at least and at most. [ours]

The oracle takes for each task the best of episodes that were played. Where an outcome is partly chance it takes the
lucky ones, and that part of its lead can't be had by anybody who has yet to play. So here two others choose, too. One
knows each task by its other episodes, and is counted on one that was left out: by so few plays less is known than there
is to know, so this is a lower bound, which rises with the plays. One chooses by a task's mean over all of its episodes,
and is counted on these: still partly luck, so this is an upper bound, which falls with the plays. (The expectation of
the greatest of some means is at least the greatest expectation.) Before its first step a router knows less of a task
than the first; it has what happens in its own episode instead.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from bopo_ray.analysis.bootstrap import Point, bootstrap_ci, paired_hypervolume
from bopo_ray.analysis.canvas import INK, MUTED, canvas, head, styled, usd
from bopo_ray.analysis.cost_unit import CostUnit
from bopo_ray.analysis.pareto import Reference, pareto_front

__all__ = ["KNOWN", "MOST", "ORACLE", "SCHEDULES", "headroom", "headroom_figure", "task_share"]

SCHEDULES, KNOWN, MOST, ORACLE = "schedules", "known tasks", "known tasks, at most", "oracle"
LAMBDAS = 0.03, 2.0
"""Least and greatest cost weight at which is chosen, in units of always-large's mean cost."""
COLOURS = {SCHEDULES: INK, KNOWN: "#0072B2", MOST: "#009E73", ORACLE: "#D55E00"}
FloatArray = npt.NDArray[np.float64]


class _Played(NamedTuple):
    """What T tasks came to by K schedules, in the order of their lengths, M times each."""

    names: tuple[str, ...]
    success_TKM: FloatArray
    cost_TKM: FloatArray


def task_share(values_TM: npt.ArrayLike) -> float:
    """The share of the variance of single episodes that lies between tasks: the intraclass correlation ICC(1), not
    below 0. 1: a task always ends the same; 0: which task it is says nothing. NaN where nothing varies.

    Args:
        values_TM: T >= 2 tasks, M >= 2 episodes of each.

    Raises:
        ValueError: there are fewer.

    Source: Shrout and Fleiss, Psychological Bulletin 86 (1979), by the components of variance.
    """
    values = np.asarray(values_TM, np.float64)
    if values.ndim != 2 or min(values.shape) < 2:
        raise ValueError(f"values of shape {values.shape}: need at least 2 tasks and 2 episodes of each")
    within = float(values.var(axis=1, ddof=1).mean())
    between = max(float(values.mean(axis=1).var(ddof=1)) - within / values.shape[1], 0.0)
    return between / (between + within) if between + within else float("nan")


def headroom(rows: pd.DataFrame, unit: CostUnit) -> pd.DataFrame:
    """What is won by schedules, the same for all tasks; by someone who knows the tasks, at least and at most; and by
    the oracle.

    Who chooses takes the schedule of most success less lambda times cost, at as many lambdas as there are schedules
    besides the boundary policies, but at least 2: the oracle by the very episode that is counted; who knows the tasks
    by the M - 1 others of the task, drawn towards the mean over tasks as far as single episodes are luck (the best
    linear prediction), and counted on the one left out; at most, by the mean of all M, on which it is counted.

    Args:
        rows: of `play_schedules`, whole: each task by each schedule in each sample, at least 2 tasks and 2 samples.
        unit: what counts as cost.

    Returns:
        A row per point: pick (`SCHEDULES`, `KNOWN`, `MOST`, `ORACLE`), setting (the schedule, or lambda), success with
        success_low and success_high, the unit's column, task_share (of its successes; schedules only), and, the same
        in all rows of a pick, hypervolume and more, its difference from the schedules', each with _low and _high.
        Intervals: 95% bootstrap over tasks. A hypervolume is that of a pick's points and the two boundary policies, as
        a share of the box up to 1.1 times the dearer one's cost.
    """
    played = _played(rows, unit.column)
    success, cost = played.success_TKM, played.cost_TKM
    most = float(cost[:, -1].mean()) or 1.0
    lambdas = np.geomspace(*LAMBDAS, max(len(played.names) - 2, 2))
    points = {SCHEDULES: [_point(name, cost[:, i], success[:, i]) for i, name in enumerate(played.names)]}
    for pick in (KNOWN, MOST, ORACLE):
        points[pick] = [_chosen(pick, played, float(lam), most) for lam in lambdas]
    boundary = [points[SCHEDULES][0], points[SCHEDULES][-1]]
    reference = Reference(1.1 * max(float(p.cost_T.mean()) for p in boundary) or 1.0)
    together = {pick: own if pick == SCHEDULES else [*boundary, *own] for pick, own in points.items()}
    volumes = {pick: paired_hypervolume(together, reference, against=pick) for pick in points}
    table = []
    for pick, own in points.items():
        volume = volumes[pick].hypervolumes[pick]
        figures = {"hypervolume": volume.estimate, "hypervolume_low": volume.low, "hypervolume_high": volume.high}
        if pick != SCHEDULES:
            more = volumes[pick].differences[SCHEDULES].interval
            figures |= {"more": more.estimate, "more_low": more.low, "more_high": more.high}
        for i, p in enumerate(own):
            interval = bootstrap_ci(p.success_T)
            table.append(
                {
                    "pick": pick, "setting": p.policy, "success": interval.estimate, "success_low": interval.low,
                    "success_high": interval.high, unit.column: float(p.cost_T.mean()),
                    "task_share": task_share(success[:, i]) if pick == SCHEDULES else float("nan"),
                } | figures
            )  # fmt: skip
    return pd.DataFrame(table)


def _played(rows: pd.DataFrame, cost_column: str) -> _Played:
    names = tuple(rows.sort_values("k")["schedule"].unique())
    wide = rows.pivot(index="task", columns=["schedule", "sample"], values=["success", cost_column])
    samples = sorted(rows["sample"].unique())
    success, cost = (
        np.stack([wide[value][name][samples].to_numpy(np.float64) for name in names], axis=1)
        for value in ("success", cost_column)
    )
    if len(success) < 2 or len(samples) < 2 or np.isnan(success).any():
        raise ValueError(f"{success.shape}: need at least 2 tasks and 2 samples, and each task by each schedule")
    return _Played(names, success, cost)


def _point(policy: str, cost_TM: FloatArray, success_TM: FloatArray) -> Point:
    return Point(policy, cost_TM.mean(axis=1), success_TM.mean(axis=1))


def _chosen(pick: str, played: _Played, lam: float, most: float) -> Point:
    """What `pick` takes of the schedules for each task and sample, at `lam` over `most`, the cost of always-large."""
    tasks, _, samples = played.success_TKM.shape
    cost_TM, success_TM = np.empty((tasks, samples)), np.empty((tasks, samples))
    shares = [[task_share(x[:, k]) for k in range(x.shape[1])] for x in (played.success_TKM, played.cost_TKM)]
    for m in range(samples):
        known = {ORACLE: [m], MOST: list(range(samples)), KNOWN: [other for other in range(samples) if other != m]}
        seen = [x[:, :, known[pick]] for x in (played.success_TKM, played.cost_TKM)]
        if pick == KNOWN:
            success_TK, cost_TK = (_predicted(x, share) for x, share in zip(seen, shares, strict=True))
        else:
            success_TK, cost_TK = (x.mean(axis=2) for x in seen)
        best_T = (success_TK - lam * cost_TK / most).argmax(axis=1)
        success_TM[:, m] = played.success_TKM[np.arange(tasks), best_T, m]
        cost_TM[:, m] = played.cost_TKM[np.arange(tasks), best_T, m]
    return _point(f"lambda {lam:.2g}", cost_TM, success_TM)


def _predicted(seen_TKN: FloatArray, share_K: list[float]) -> FloatArray:
    """The best linear prediction [T, K] of another episode: the mean of N of them, drawn towards the mean of all."""
    n, share = seen_TKN.shape[2], np.nan_to_num(np.asarray(share_K))
    weight_K = n * share / (1 + (n - 1) * share)
    prediction: FloatArray = weight_K * seen_TKN.mean(axis=2) + (1 - weight_K) * seen_TKN.mean(axis=(0, 2))
    return prediction


@styled
def headroom_figure(table: pd.DataFrame, unit: CostUnit, label: str) -> Figure:
    """Success against cost of the four, and of each schedule how much of its outcomes is the task's.

    Args:
        table: of `headroom`.
        unit: what counted as cost.
        label: what was measured; printed on the figure.
    """
    figure, (axes, shares) = canvas(12.0, 5.8, 1, 2, width_ratios=(3, 2))
    figure.subplots_adjust(left=0.07, right=0.98, top=0.82, bottom=0.2, wspace=0.2)
    own = table[table["pick"] == SCHEDULES]
    for pick, colour in COLOURS.items():
        points = table[table["pick"] == pick]
        points = points.iloc[pareto_front(points[unit.column], points["success"])]
        axes.plot(points[unit.column], points["success"], marker="o", markersize=5, color=colour, label=pick)
    axes.xaxis.set_major_formatter(FuncFormatter(usd))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(unit.axis)
    axes.set_ylabel("success")
    axes.legend(fontsize=10, loc="lower right")
    shares.bar(range(len(own)), own["task_share"], color=MUTED)
    shares.set_xticks(range(len(own)), own["setting"], rotation=45, ha="right", fontsize=9)
    shares.set_ylim(0, 1)
    shares.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    shares.set_ylabel("share of the outcomes' variance between tasks")
    subtitle = "the oracle chose by the episode that counts; known tasks by others of the task, at most by all; dev"
    head(figure, "How much of the oracle's lead is to be known", subtitle, label)
    return figure
