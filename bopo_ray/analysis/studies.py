"""The tables behind the paper's other figures: cost inversion, allocation of the spend, model pairs, hard budgets.

Pure functions of frames; what the frames must hold is said with each. Intervals are 95% bootstrap intervals over
tasks, of hypervolumes basic ones and else percentiles, see `bopo_ray.analysis.bootstrap`; of an inversion rate of 0 or
1 exact ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from bopo_ray.analysis.bootstrap import (
    Interval,
    bootstrap_ci,
    holm,
    interval_of,
    paired_difference,
    resample_weights,
    seed_weights,
)
from bopo_ray.analysis.cost_unit import cost_unit
from bopo_ray.analysis.tables import ALWAYS_LARGE, ALWAYS_SMALL, BOUNDARY, ORACLE
from bopo_ray.records import Difficulty

__all__ = [
    "allocation", "hard_budget", "interval_text", "inversion_rates", "inversions", "pair_row", "pair_table",
    "task_difficulty",
]  # fmt: skip

EASY_SHARE = 0.6
"""A test task is Easy where always-small has at least this share of successes: the taxonomy's 3 of 5."""
N_RESAMPLES = 2000
_UNKNOWN = Interval(math.nan, math.nan, math.nan)
KEPT = 0.95
"""Share of always-large's success at which `pair_row` says what the cheapest point that reached it saved."""
FloatArray = npt.NDArray[np.float64]


def inversions(boundaries: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per benchmark and training task: both boundary policies' mean cost, and whether the small one costs more.

    Args:
        boundaries: by benchmark, columns task, difficulty, k, cost_small_usd and cost_large_usd (means of k rollouts).
    """
    columns = ["benchmark", "task", "difficulty", "k", "cost_small_usd", "cost_large_usd"]
    frame = pd.concat([b.assign(benchmark=name)[columns] for name, b in boundaries.items()], ignore_index=True)
    frame["inverted"] = frame["cost_small_usd"] > frame["cost_large_usd"]
    return frame


def inversion_rates(inverted: pd.DataFrame) -> pd.DataFrame:
    """Per benchmark and difficulty, and of all tasks: tasks, inversions and their share with its interval."""
    rows = []
    for benchmark, tasks in inverted.groupby("benchmark", sort=False):
        for name, own in [("all", tasks), *((str(d), tasks[tasks["difficulty"] == str(d)]) for d in Difficulty)]:
            if len(own):
                rate = _share(own["inverted"].to_numpy(dtype=float))
                rows.append(
                    {"benchmark": benchmark, "difficulty": name, "tasks": len(own),
                     "inversions": int(own["inverted"].sum()), "rate": rate.estimate, "rate_low": rate.low,
                     "rate_high": rate.high}
                )  # fmt: skip
    return pd.DataFrame(rows)


def _share(is_T: FloatArray) -> Interval:
    """The share of tasks that are so. Of none or all of several the interval is Clopper and Pearson's (1934): resamples
    all say the same, as if it were certain."""
    found = bootstrap_ci(is_T, n=N_RESAMPLES)
    if len(is_T) == 1 or 0 < found.estimate < 1:
        return found
    exact = stats.binomtest(int(is_T.sum()), len(is_T)).proportion_ci(method="exact")
    return Interval(found.estimate, float(exact.low), float(exact.high))


def task_difficulty(episodes: pd.DataFrame) -> pd.Series:
    """The difficulty of each evaluated task, by task. [ours]

    Easy: always-small succeeds in at least EASY_SHARE of its episodes. Intractable: no episode of any policy succeeds.
    Hard: the rest. In hindsight, from the evaluation itself: no router is told.

    Args:
        episodes: columns method, task, success.
    """
    small = episodes[episodes["method"] == ALWAYS_SMALL].groupby("task")["success"].mean()
    anyone = episodes.groupby("task")["success"].any()
    easy = small.reindex(anyone.index).fillna(0.0) >= EASY_SHARE
    labels = np.where(easy, str(Difficulty.EASY), np.where(anyone, str(Difficulty.HARD), str(Difficulty.INTRACTABLE)))
    return pd.Series(labels, index=anyone.index, name="difficulty")


def allocation(episodes: pd.DataFrame) -> pd.DataFrame:
    """Per method and difficulty: what it spends there, what it wins, and how often it calls the larger models.

    `spend_share` is a share of the method's dollars, to be seen beside `task_share`, and `large_share` of its steps on
    those tasks. A success ends an episode, so whoever wins Hard tasks early spends less there than who loses them: only
    the second says what the router prefers. Intervals are over tasks; a task counts in every resample with all of its
    dollars and steps; of one task they are NaN. A method's episodes are those of all its policies; NaN where it has no
    step, or spent nothing.

    Args:
        episodes: columns method, task, success, cost_usd, large_calls, steps.
    """
    labels = task_difficulty(episodes)
    tasks = labels.index
    weights_RT = resample_weights(len(tasks), N_RESAMPLES)
    rows = []
    for method, own in episodes.groupby("method"):
        sums = own.groupby("task")[["cost_usd", "large_calls", "steps", "success"]].sum().reindex(tasks).fillna(0.0)
        spent_T, large_T, steps_T, won_T = sums.to_numpy(dtype=float).T
        played_T = own.groupby("task").size().reindex(tasks).fillna(0).to_numpy(dtype=float)
        for difficulty in Difficulty:
            is_T = (labels == str(difficulty)).to_numpy(dtype=float)
            spend = _ratio(spent_T * is_T, spent_T, weights_RT)
            large = _ratio(large_T * is_T, steps_T * is_T, weights_RT)
            played = float(played_T @ is_T)
            rows.append(
                {"method": method, "difficulty": str(difficulty), "spend_share": spend.estimate,
                 "spend_share_low": spend.low, "spend_share_high": spend.high, "spend_usd": float(spent_T @ is_T),
                 "task_share": float(is_T.mean()), "tasks": int(is_T.sum()), "large_share": large.estimate,
                 "large_share_low": large.low, "large_share_high": large.high,
                 "success": float(won_T @ is_T) / played if played else math.nan}
            )  # fmt: skip
    return pd.DataFrame(rows)


def _ratio(part_T: FloatArray, whole_T: FloatArray, weights_RT: FloatArray) -> Interval:
    """sum(part) / sum(whole), NaN of nothing, with its interval over tasks, NaN of one that is not empty; empty
    resamples are left out of it."""
    parts_R, wholes_R = weights_RT @ part_T, weights_RT @ whole_T
    if not whole_T.sum():
        return _UNKNOWN
    share, there_R = part_T.sum() / whole_T.sum(), wholes_R > 0
    if np.count_nonzero(whole_T) == 1:
        return Interval(share, math.nan, math.nan)
    return interval_of(share, parts_R[there_R] / wholes_R[there_R])


def hard_budget(episodes: pd.DataFrame, headline: str) -> pd.DataFrame:
    """One row per method and cap: success and share of the cap used, what `headline` wins more, and overspends.

    Means over training seeds, with intervals over tasks and seeds. `less` is the success of `headline` less the
    method's, on the same resamples; p_holm is corrected for the methods under one cap. One task settles nothing: NaN.

    Args:
        episodes: columns method, setting, train_seed, unit ("calls" or "usd"), cap and used (in that unit), task,
            success, cost_usd, large_calls, stop.
        headline: the method to compare the others with.
    """
    rows = []
    for (unit, cap), under in episodes.groupby(["unit", "cap"], sort=True):
        weights_RT = resample_weights(under["task"].nunique(), N_RESAMPLES)
        methods = [m for _, m in under.groupby("method", sort=True)]
        streams = np.random.default_rng([0, 1]).spawn(len(methods))
        drawn = {str(m["method"].iloc[0]): _capped(m, weights_RT, rng) for m, rng in zip(methods, streams, strict=True)}
        n_tasks, ours = weights_RT.shape[1], drawn.get(headline)
        gaps = {
            name: paired_difference(ours.success_R, own.success_R, ours.success - own.success, n_tasks)
            for name, own in drawn.items() if ours and name != headline
        }  # fmt: skip
        adjusted = holm({name: gap.p for name, gap in gaps.items() if not math.isnan(gap.p)})
        for name, own in drawn.items():
            less = gaps[name].interval if name in gaps else _UNKNOWN
            row = {"unit": unit, "cap": cap, "method": name} | own.row | _spread("less", asdict(less))
            row |= {"p_holm": adjusted.get(name, math.nan)}
            if n_tasks == 1:
                row |= {key: math.nan for key in row if key.endswith(("_low", "_high"))}
            rows.append(row)
    return pd.DataFrame(rows)


class _Capped(NamedTuple):
    """A method under one cap."""

    row: dict[str, Any]
    success: float
    success_R: FloatArray


def _capped(own: pd.DataFrame, weights_RT: FloatArray, rng: np.random.Generator) -> _Capped:
    cap = float(own["cap"].iloc[0])
    seeds = own["train_seed"].fillna(-1)
    draws_RS = seed_weights(seeds.nunique(), N_RESAMPLES, rng)
    row: dict[str, Any] = {"setting": str(own["setting"].iloc[0])}
    values = {"success": own["success"].astype(float), "cap_used": own["used"] / cap if cap else own["used"] * 0.0}
    samples_R = {}
    for name, value in values.items():
        values_TS = value.groupby([own["task"], seeds]).mean().unstack().to_numpy(dtype=float)
        samples_R[name] = np.sum((weights_RT @ values_TS) * draws_RS, axis=1)
        row |= _spread(name, asdict(interval_of(float(values_TS.mean()), samples_R[name])))
    row |= {
        "cost_usd": float(own["cost_usd"].mean()), "large_calls": float(own["large_calls"].mean()),
        "stopped_by_budget": int((own["stop"] == "budget").sum()), "overspends": int((own["used"] > cap).sum()),
        "episodes": len(own),
    }  # fmt: skip
    return _Capped(row, row["success"], samples_R["success"])


def pair_row(pair: str, label: str, episodes: pd.DataFrame, summary: Mapping[str, Any]) -> dict[str, Any]:
    """One model pair: its cost ratio, the boundaries' success, BoPO against the best baseline, and what is saved.

    BoPO is the summary's headline. The best baseline is the one with the largest hypervolume of those that it compares:
    neither the oracle nor another advantage of BoPO's. What there is no estimate of is NaN.

    Args:
        pair: its name.
        label: what its models are, e.g. "simulated pair".
        episodes: of the evaluation; columns method, task, cost_usd.
        summary: of `tables.summary`.
    """
    none = {"estimate": np.nan, "low": np.nan, "high": np.nan}
    headline, volumes = summary["headline"], summary["hypervolumes"]
    others = (BOUNDARY, ORACLE, headline)
    rivals = {m: v for m, v in volumes.items() if m not in others and not m.startswith("bopo-")}
    best = max(rivals, key=lambda m: rivals[m]["estimate"], default="")
    points = {p["method"]: p for p in summary["operating_points"] if p["method"] in (ALWAYS_SMALL, ALWAYS_LARGE)}
    saved = [s["saved"]["estimate"] for s in summary["cost_saved"].get(headline, []) if s["success_share"] == KEPT]
    less = summary["differences"].get(best, none)
    row: dict[str, Any] = {"pair": pair, "label": label, "tasks": summary["n_tasks"]}
    row |= _spread("cost_ratio", _cost_ratio(episodes))
    for name, method in (("small", ALWAYS_SMALL), ("large", ALWAYS_LARGE)):
        row |= {f"success_{name}{end}": points[method][f"success{end}"] for end in ("", "_low", "_high")}
    row |= _spread("bopo", volumes.get(headline, none)) | {"best_baseline": best}
    row |= _spread("baseline", volumes.get(best, none)) | _spread("less", less)
    row |= {"less_p_holm": less.get("p_holm", np.nan)}
    row |= {"saved": saved[0] if saved else np.nan, "saved_of": cost_unit(summary).noun}
    return {name: np.nan if value is None else value for name, value in row.items()}


def pair_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `pair_row` as a page shows them: a column per pair, each number with its interval.

    Args:
        rows: one or more pairs.
    """
    shown = {"what": ["models", "held-out tasks", "dollars per task, large / small", "success, always-small",
                      "success, always-large", "hypervolume, BoPO", "best baseline", "its hypervolume",
                      "BoPO less that", "p, Holm",
                      f"{rows['saved_of'].iloc[0]} saved by the cheapest point that reached {KEPT:.0%} of "
                      "always-large's success on these tasks"]}  # fmt: skip
    for row in rows.to_dict("records"):
        shown[str(row["pair"])] = [
            str(row["label"]), str(row["tasks"]), interval_text(row, "cost_ratio", ".2f"),
            interval_text(row, "success_small", ".0%"), interval_text(row, "success_large", ".0%"),
            interval_text(row, "bopo", ".3f"), str(row["best_baseline"]), interval_text(row, "baseline", ".3f"),
            interval_text(row, "less", "+.3f"), "–" if pd.isna(row["less_p_holm"]) else f"{row['less_p_holm']:.3f}",
            "–" if pd.isna(row["saved"]) else f"{row['saved']:.0%}",
        ]  # fmt: skip
    return pd.DataFrame(shown)


def interval_text(row: Mapping[str, Any], name: str, form: str) -> str:
    """The number called `name` with its interval, "0.50 [0.40, 0.60]"; a dash for none."""
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if pd.isna(value):
        return "–"
    return f"{value:{form}}" if pd.isna(low) else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _cost_ratio(episodes: pd.DataFrame) -> dict[str, float]:
    """Mean dollars per task of always-large by those of always-small, on the tasks of both."""
    costs = [episodes[episodes["method"] == m].groupby("task")["cost_usd"].mean() for m in (ALWAYS_SMALL, ALWAYS_LARGE)]
    both = pd.concat(costs, axis=1, join="inner").to_numpy()
    if not both[:, 0].any():
        return {"estimate": np.nan, "low": np.nan, "high": np.nan}
    sums = resample_weights(len(both), N_RESAMPLES) @ both
    sums = sums[sums[:, 0] > 0]
    interval = interval_of(float(both[:, 1].sum() / both[:, 0].sum()), sums[:, 1] / sums[:, 0])
    known = len(both) > 1
    return {"estimate": interval.estimate, "low": interval.low if known else np.nan,
            "high": interval.high if known else np.nan}  # fmt: skip


def _spread(name: str, interval: Mapping[str, float]) -> dict[str, float]:
    return {name: interval["estimate"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}
