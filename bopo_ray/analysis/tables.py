"""From evaluation episodes to the numbers of the paper's tables: frontier rows and the comparison of methods.

One benchmark, one model pair and one price table per frame. Tasks that some policy has no episode of are left out for
all policies, so that every number is paired on the same tasks; what was left out is listed in the summary's warnings.
Repeats of a task are averaged first: each task counts once.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from bopo_ray.analysis.bootstrap import (
    Interval,
    Point,
    holm,
    interval_of,
    paired_hypervolume,
    resample_weights,
    seed_weights,
)
from bopo_ray.analysis.cost_unit import COST_UNITS, CostUnit
from bopo_ray.analysis.pareto import Reference, pareto_front
from bopo_ray.records import CostMode

__all__ = [
    "ALWAYS_LARGE", "ALWAYS_SMALL", "COLUMNS", "TRAINED", "Settings", "frontier", "headline", "spend_by_difficulty",
    "summary", "verdict",
]  # fmt: skip

ALWAYS_SMALL, ALWAYS_LARGE = "always-small", "always-large"
BOUNDARY = "boundary only"
"""The method of a user who deploys one of the boundary policies and trains nothing."""
ORACLE = "oracle"
"""A bound that has seen the answers: nobody can deploy it, so it is on no common front."""
TRAINED = ("bopo-hybrid", "bopo-augmented", "grpo-vanilla")
"""What BoPO trains, by the advantage; the first has the most of the method."""
COLUMNS = (
    "policy", "method", "lam", "train_seed", "task", "success", "score", "cost_usd", "large_calls", "steps",
)  # fmt: skip
"""What a frame of episodes must have; "difficulty" is used where it is there."""
EQUAL_SUCCESS = (0.90, 0.95, 1.00)
"""Shares of always-large's success at which it is reported what the cheapest point that reached them saved."""

_KEY = ["method", "policy", "lam", "train_seed"]
_MEASURES = ("success", "score", "cost_usd", "large_calls")
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Settings:
    """How intervals and hypervolumes are made."""

    cost: CostMode = CostMode.USD
    """What success is set against: dollars, or calls of the larger models."""
    reference: Reference | None = None
    """Cost per task and success; None: 1.1 times the cost of the dearer boundary policy, and success 0."""
    n: int = 2000
    """Bootstrap resamples."""
    seed: int = 0
    """Of the resampling."""
    level: float = 0.95
    """Of the intervals."""

    @property
    def unit(self) -> CostUnit:
        """Of the cost."""
        return COST_UNITS[self.cost]


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """One policy's episodes, averaged per task; arrays of shape (T,) over the tasks that all policies share."""

    method: str
    policy: str
    lam: float | None
    seed: int | None
    n_episodes: int
    share_large: float
    values: Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True, eq=False)
class _Data:
    rows: list[_Row]
    tasks: list[str]
    warnings: list[str]


def headline(methods: Container[str]) -> str | None:
    """The method that is compared with each other one: the first of `TRAINED` that is among them."""
    return next((name for name in TRAINED if name in methods), None)


def frontier(episodes: pd.DataFrame, settings: Settings | None = None) -> pd.DataFrame:
    """One row per operating point (method, policy, lam, train_seed), cheapest first within a method.

    Columns: the four keys; success, score, cost_usd (dollars per task) and large_calls (per task), each also with
    `_low` and `_high` (percentile bootstrap over tasks); share_large (large calls by steps, over all episodes);
    n_tasks, n_episodes; on_front (no other row of the frame dominates it).

    Raises:
        ValueError: a column is missing, the frame is empty, or no task is shared by all policies.
    """
    settings = settings or Settings()
    data = _collect(episodes)
    table = pd.DataFrame(_point_records(data, settings))
    return table.sort_values(["method", settings.unit.column, "policy"], kind="stable", ignore_index=True)


def summary(episodes: pd.DataFrame, settings: Settings | None = None) -> dict[str, Any]:
    """The whole comparison as plain JSON values; NaN becomes None.

    Keys: cost (the unit, "usd" or "calls"), points (the rows of `frontier`), operating_points (the same, averaged over
    training seeds, with intervals over tasks and seeds), hypervolumes, headline, differences (headline less method,
    with p and p_holm, which is corrected for the number of methods and None for the oracle; one task has no p),
    cost_saved, spend_by_difficulty, reference, bootstrap, n_tasks, notes (how to read it) and warnings (what is wrong
    with the data).
    The boundary policies are among the points of every method.

    Raises:
        ValueError: as `frontier`; or there are no episodes of a boundary policy.
    """
    settings = settings or Settings()
    data = _collect(episodes)
    boundary = [_boundary(data, ALWAYS_SMALL), _boundary(data, ALWAYS_LARGE)]
    cost = settings.unit.column
    dearest = max(float(row.values[cost].mean()) for row in boundary)
    reference = settings.reference or Reference(1.1 * dearest or 1.0)  # models that cost nothing: any width will do
    own = _methods(data)
    points = {method: [_as_point(row, cost) for row in [*rows, *boundary]] for method, rows in own.items()}
    points[BOUNDARY] = [_as_point(row, cost) for row in boundary]
    against = headline(points)
    compared = paired_hypervolume(
        points, reference, against=against, n=settings.n, seed=settings.seed, level=settings.level
    )
    tested = {method: gap.p for method, gap in compared.differences.items() if method != ORACLE}
    adjusted = holm({method: p for method, p in tested.items() if not math.isnan(p)})
    result = {
        "cost": str(settings.cost),
        "points": _point_records(data, settings),
        "operating_points": _operating_records(data, settings),
        "hypervolumes": {
            method: {
                **_interval_record(interval),
                "own_points": len(_by_operating_point(own.get(method, []))),
                "train_seeds": len({row.seed for row in own.get(method, []) if row.seed is not None}),
            }
            for method, interval in compared.hypervolumes.items()
        },
        "headline": against,
        "differences": {
            method: {**_interval_record(gap.interval), "p": gap.p, "p_holm": adjusted.get(method)}
            for method, gap in compared.differences.items()
        },
        "cost_saved": {method: _cost_saved(rows, boundary, cost) for method, rows in own.items()},
        "spend_by_difficulty": spend_by_difficulty(episodes[episodes["task"].astype(str).isin(data.tasks)]),
        "reference": {cost: reference.cost, "success": reference.success},
        "bootstrap": {"n": settings.n, "seed": settings.seed, "level": settings.level, "method": "basic"},
        "n_tasks": len(data.tasks),
        "notes": _notes(settings, reference, len(adjusted)),
        "warnings": data.warnings,
    }
    plain: dict[str, Any] = _plain(result)
    return plain


def verdict(gap: Mapping[str, Any], level: float = 0.95) -> str:
    """What one of `summary`'s differences settles: "better", "worse" or "open". By its interval and, where methods are
    tested, by Holm's p: of a dozen true ties one or two have an interval without 0."""
    if gap["low"] is None or (gap["p_holm"] is not None and gap["p_holm"] >= 1 - level):
        return "open"
    return "better" if gap["low"] > 0 else "worse" if gap["high"] < 0 else "open"


def spend_by_difficulty(episodes: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Per method, the share of its dollars spent on tasks of each difficulty.

    Empty without that column or without spend. Tasks without a difficulty are under "unknown". The shares of a method
    sum to 1.
    """
    if "difficulty" not in episodes or episodes["difficulty"].isna().all():
        return {}
    difficulty = episodes["difficulty"].map(lambda value: "unknown" if pd.isna(value) else str(value))
    spent = episodes.groupby([episodes["method"].astype(str), difficulty])["cost_usd"].sum().unstack(fill_value=0.0)
    totals = spent.sum(axis=1)
    shares = spent[totals > 0].div(totals[totals > 0], axis=0)
    return {str(method): {str(k): float(v) for k, v in row.items()} for method, row in shares.iterrows()}


def _collect(episodes: pd.DataFrame) -> _Data:
    missing = [column for column in COLUMNS if column not in episodes]
    if missing:
        raise ValueError(f"the frame of episodes lacks the columns {missing}; it has {list(episodes.columns)}")
    if episodes.empty:
        raise ValueError("the frame has no episodes")
    bad = [c for c in (*_MEASURES, "steps") if not np.all(np.isfinite(episodes[c].to_numpy(dtype=np.float64)))]
    if bad:
        raise ValueError(f"the columns {bad} hold values that are not finite")
    groups = [(key, group) for key, group in episodes.groupby(_KEY, dropna=False, sort=True)]
    every = set(episodes["task"].astype(str))
    shared = set.intersection(*(set(group["task"].astype(str)) for _, group in groups))
    if not shared:
        raise ValueError(f"no task has an episode of each of the {len(groups)} policies: nothing can be paired")
    warnings = []
    if shared != every:
        fewest = min(groups, key=lambda item: item[1]["task"].nunique())
        warnings.append(
            f"{len(every - shared)} of {len(every)} tasks left out, because some policy has no episode of them; "
            f"{fewest[0][1]} has the fewest, {fewest[1]['task'].nunique()}"
        )
    tasks = sorted(shared)
    return _Data([_row(key, group, tasks) for key, group in groups], tasks, warnings)


def _row(key: tuple[Any, ...], group: pd.DataFrame, tasks: list[str]) -> _Row:
    method, policy, lam, seed = key
    kept = group[group["task"].astype(str).isin(tasks)]
    means = kept.astype(dict.fromkeys(_MEASURES, float)).groupby(kept["task"].astype(str))[list(_MEASURES)].mean()
    means = means.loc[tasks]
    return _Row(
        method=str(method),
        policy=str(policy),
        lam=None if pd.isna(lam) else float(lam),
        seed=None if pd.isna(seed) else int(seed),
        n_episodes=len(kept),
        share_large=float(kept["large_calls"].sum() / max(kept["steps"].sum(), 1)),
        values={measure: means[measure].to_numpy(dtype=np.float64) for measure in _MEASURES},
    )


def _methods(data: _Data) -> dict[str, list[_Row]]:
    """Rows per method, without the boundary policies, which belong to all."""
    methods: dict[str, list[_Row]] = {}
    for row in data.rows:
        if row.method not in (ALWAYS_SMALL, ALWAYS_LARGE):
            methods.setdefault(row.method, []).append(row)
    return methods


def _boundary(data: _Data, method: str) -> _Row:
    found = [row for row in data.rows if row.method == method]
    if len(found) != 1:
        raise ValueError(f"{len(found)} policies have method {method!r}: each frontier needs exactly one")
    return found[0]


def _as_point(row: _Row, cost: str) -> Point:
    return Point(row.policy, row.values[cost], row.values["success"], row.lam, row.seed)


def _point_records(data: _Data, settings: Settings) -> list[dict[str, Any]]:
    weights = resample_weights(len(data.tasks), settings.n, settings.seed)
    records = []
    for row in data.rows:
        record: dict[str, Any] = {
            "method": row.method, "policy": row.policy,
            "lam": math.nan if row.lam is None else row.lam,
            "train_seed": math.nan if row.seed is None else row.seed,
        }  # fmt: skip
        for measure in _MEASURES:
            values = row.values[measure]
            record |= _named(measure, _mean_interval(values.mean(), weights @ values, len(data.tasks), settings))
        record |= {"share_large": row.share_large, "n_tasks": len(data.tasks), "n_episodes": row.n_episodes}
        records.append(record)
    _mark_front(records, settings.unit.column)
    return records


def _operating_records(data: _Data, settings: Settings) -> list[dict[str, Any]]:
    """Points averaged over training seeds: a trained method's points of one lambda are one operating point."""
    weights = resample_weights(len(data.tasks), settings.n, settings.seed)
    rng = np.random.default_rng([settings.seed, 2])
    records = []
    for name, rows in _by_operating_point(data.rows).items():
        record: dict[str, Any] = {
            "method": rows[0].method,
            "policy": name,
            "lam": rows[0].lam,
            "train_seeds": [row.seed for row in rows if row.seed is not None],
        }
        draws_RS = seed_weights(len(rows), settings.n, rng)
        for measure in _MEASURES:
            values_TS = np.stack([row.values[measure] for row in rows], axis=1)
            samples = np.sum((weights @ values_TS) * draws_RS, axis=1)
            record |= _named(measure, _mean_interval(values_TS.mean(), samples, len(data.tasks), settings))
        record["share_large"] = float(np.mean([row.share_large for row in rows]))
        records.append(record)
    _mark_front(records, settings.unit.column)
    return records


def _by_operating_point(rows: Sequence[_Row]) -> dict[str, list[_Row]]:
    """Rows that differ in their training seed only, by name; a row without a seed stands alone.

    A seed that comes again at a method's lambda is that of a router trained at another lambda
    (`Settings.train_lambdas`): the n-th of each seed are one operating point, as rows come in the order of their
    policies' names.
    """
    alike: dict[tuple[str, bool, str | float | None], list[list[_Row]]] = {}
    for row in rows:
        same = row.policy if row.seed is None else row.lam
        points = alike.setdefault((row.method, row.seed is None, same), [])
        own = next((point for point in points if all(row.seed != other.seed for other in point)), None)
        if own is None:
            points.append([row])
        else:
            own.append(row)
    return {_name(own, points): own for points in alike.values() for own in points}


def _name(rows: Sequence[_Row], points: Sequence[Sequence[_Row]]) -> str:
    """Of an operating point: the policy's own name where there is only one, else method and lambda, and which of the
    `points` of these."""
    if len(rows) == 1:
        return rows[0].policy
    name = rows[0].method if rows[0].lam is None else f"{rows[0].method} lam={rows[0].lam:g}"
    return name if len(points) == 1 else f"{name}, router {points.index(rows) + 1}"


def _cost_saved(rows: Sequence[_Row], boundary: Sequence[_Row], cost: str) -> list[dict[str, Any]]:
    """Per level of success: the cheapest operating point that reached it, and what that saves against always-large.

    It is picked on the very tasks that it is measured on, so the estimate is rather too good; nor would an interval
    hold the truth as often as it says. NaN where always-large wins nothing: any point reaches that.
    """
    points, records = [], []
    for name, own in _by_operating_point([*rows, *boundary]).items():
        spent, won = (float(np.mean([row.values[measure] for row in own])) for measure in (cost, "success"))
        points.append((name, spent, won))
    _, large, won = points[-1]
    for share in EQUAL_SUCCESS:
        policy, spent, success = min((p for p in points if p[2] >= share * won - 1e-12), key=lambda p: p[1])
        saved = (1.0 - spent / large if large else 0.0) if won else math.nan  # of nothing, nothing
        records.append(
            {"success_share": share, "policy": policy, cost: spent, "success": success, "saved": {"estimate": saved}}
        )
    return records


def _notes(settings: Settings, reference: Reference, n_compared: int) -> list[str]:
    level, n = f"{settings.level:.0%}", settings.n
    return [
        "Each method's points include always-small and always-large: a user can always deploy a boundary policy.",
        f"Hypervolumes are shares of the box between the reference ({settings.unit.text(reference.cost)} per task, "
        f"success {reference.success:g}) and (cost 0, success 1); bigger is better.",
        "A hypervolume takes the best of several measured points: a method with more points has an advantage, the "
        "larger the closer they are in price and the fewer tasks there are.",
        f"Intervals: {level}, {n} paired bootstrap resamples of tasks, and of a method's training seeds; of means by "
        "percentiles, of hypervolumes basic ones, which take back what a resample adds to that advantage.",
        f"p is two-sided, from the same resamples, at least {2 / (n + 1):.2g}. p, Holm: corrected for the "
        f"{n_compared} comparisons of this table; call a difference significant by that one alone.",
        "The resamples take the tasks as a sample of the benchmark's. With fewer than five training seeds per method "
        "they say little about other seeds, with one seed nothing; and of BoPO's sampling alone, since all seeds share "
        "one BoSFT and one set of boundary rollouts.",
        "The oracle has seen the answers: it is a bound, no competitor, and no test is made of it.",
        "Cost saved: always-large against the cheapest operating point, seeds averaged, that reached the share of its "
        "success on these tasks. It was picked on the tasks that it is measured on: the saving is rather too good, the "
        "more so the more points there are and the fewer tasks, and an interval around it would say too much.",
    ]


def _mark_front(records: list[dict[str, Any]], cost: str) -> None:
    own = [r for r in records if r["method"] != ORACLE]
    front = pareto_front([r[cost] for r in own], [r["success"] for r in own]).tolist()
    for record in records:
        record["on_front"] = False
    for index in front:
        own[index]["on_front"] = True


def _mean_interval(estimate: float, samples_R: FloatArray, n_tasks: int, settings: Settings) -> Interval:
    if n_tasks == 1:
        return Interval(float(estimate), math.nan, math.nan)
    return interval_of(float(estimate), samples_R, settings.level)


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _interval_record(interval: Interval) -> dict[str, float]:
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def _plain(value: Any) -> Any:
    """Plain JSON values: no NumPy scalars, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
