"""The tables behind the paper's other figures: cost inversion, allocation of the spend, hard budgets.

Pure functions of frames; what the frames must hold is said with each. Intervals are 95% percentile bootstrap intervals
over tasks, as in `bopo_ray.analysis.bootstrap`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from bopo_ray.analysis.bootstrap import bootstrap_ci, interval_of, resample_weights
from bopo_ray.analysis.tables import ALWAYS_SMALL
from bopo_ray.records import Difficulty

__all__ = ["allocation", "hard_budget", "inversion_rates", "inversions", "task_difficulty"]

EASY_SHARE = 0.6
"""A test task is Easy where always-small has at least this share of successes: the taxonomy's 3 of 5."""
N_RESAMPLES = 2000


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
                rate = bootstrap_ci(own["inverted"].to_numpy(dtype=float), n=N_RESAMPLES)
                rows.append(
                    {"benchmark": benchmark, "difficulty": name, "tasks": len(own),
                     "inversions": int(own["inverted"].sum()), "rate": rate.estimate, "rate_low": rate.low,
                     "rate_high": rate.high}
                )  # fmt: skip
    return pd.DataFrame(rows)


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
    """Per method and difficulty: share of its dollars, with an interval over tasks, beside the share of the tasks.

    A method's episodes are those of all its policies. A task counts in every resample with all of its dollars.

    Args:
        episodes: columns method, task, success, cost_usd.
    """
    labels = task_difficulty(episodes)
    tasks = labels.index
    weights = resample_weights(len(tasks), N_RESAMPLES)
    rows = []
    for method, own in episodes.groupby("method"):
        spent_T = own.groupby("task")["cost_usd"].sum().reindex(tasks).fillna(0.0).to_numpy()
        totals_R = weights @ spent_T
        for difficulty in Difficulty:
            is_T = (labels == str(difficulty)).to_numpy(dtype=float)
            share = float(spent_T @ is_T / spent_T.sum()) if spent_T.sum() else 0.0
            samples_R = np.divide(weights @ (spent_T * is_T), totals_R, out=np.zeros(N_RESAMPLES), where=totals_R > 0)
            interval = interval_of(share, samples_R)
            rows.append(
                {"method": method, "difficulty": str(difficulty), "spend_share": share,
                 "spend_share_low": interval.low, "spend_share_high": interval.high,
                 "spend_usd": float(spent_T @ is_T), "task_share": float(is_T.mean()), "tasks": int(is_T.sum())}
            )  # fmt: skip
    return pd.DataFrame(rows)


def hard_budget(episodes: pd.DataFrame) -> pd.DataFrame:
    """One row per policy and cap: success and share of the cap used, with intervals over tasks, and overspends.

    Args:
        episodes: columns method, policy, lam, train_seed, unit ("calls" or "usd"), cap and used (in that unit), task,
            success, large_calls, stop.
    """
    keys = ["unit", "cap", "method", "policy", "lam", "train_seed"]
    rows = []
    for key, own in episodes.groupby(keys, dropna=False, sort=True):
        cap = float(own["cap"].iloc[0])
        share = own["used"] / cap if cap else own["used"] * 0.0
        row = dict(zip(keys, key, strict=True))
        for name, values in (("success", own["success"].astype(float)), ("cap_used", share)):
            interval = bootstrap_ci(values.groupby(own["task"]).mean().to_numpy(), n=N_RESAMPLES)
            row |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
        row |= {
            "large_calls": float(own["large_calls"].mean()), "stopped_by_budget": int((own["stop"] == "budget").sum()),
            "overspends": int((own["used"] > cap).sum()), "episodes": len(own),
        }  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)
