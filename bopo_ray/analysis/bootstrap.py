"""Bootstrap intervals over tasks, paired between methods.

Tasks are the unit of resampling: a task is hard or easy for every method alike, so that one draw of task indices
applies to all of them and the difference of two methods is far less noisy than either. The same seed gives the same
draws, whatever is measured with them.

A mean has a percentile interval. A hypervolume takes the best of several noisy points, so it is biased upwards where
points compete at one price, and in a resample once more: its intervals, and those of differences, are basic ones
(Davison and Hinkley 1997, section 5.2), in which the second bias takes the first away instead of doubling it. Where
three equal points at one price meet one such point, percentiles call them better in 17% of all samples, basic intervals
in 5%; elsewhere both are right. From the estimate the bias is not taken: compare methods with a like number of points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import stats

from bopo_ray.analysis.pareto import Reference, hypervolumes

__all__ = [
    "HypervolumeComparison",
    "Interval",
    "PairedDifference",
    "Point",
    "bootstrap_ci",
    "holm",
    "interval_of",
    "paired_difference",
    "paired_hypervolume",
    "resample_weights",
    "seed_weights",
]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval; the bounds are NaN where one task leaves nothing to resample."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """One method's statistic less another's on the same resamples."""

    interval: Interval
    p: float
    """Two-sided: twice the smaller share of resamples, reflected where the interval is basic, on either side of 0; at
    least 2 / (n + 1), at most 1; NaN, as the interval's bounds, for one task."""


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One operating point of a method: a policy and what it did on each of T tasks."""

    policy: str
    cost_T: FloatArray
    """Mean cost per task over repeats, in the unit of the reference, shape (T,)."""
    success_T: FloatArray
    """Mean success per task over repeats, in [0, 1], shape (T,)."""
    lam: float | None = None
    seed: int | None = None
    """Training seed; None for a policy that was not trained, which then belongs to each seed of its method."""


@dataclass(frozen=True, slots=True)
class HypervolumeComparison:
    """What `paired_hypervolume` found."""

    hypervolumes: Mapping[str, Interval]
    """Per method, in the order given."""
    against: str | None
    """The method that `differences` compare with the others."""
    differences: Mapping[str, PairedDifference] = field(default_factory=dict)
    """Per other method: hypervolume of `against` less that of the method; above 0 means that `against` is better."""


def resample_weights(n_tasks: int, n: int = 2000, seed: int = 0) -> FloatArray:
    """Weights of n bootstrap resamples of the tasks, shape (n, n_tasks), rows sum to 1: `weights @ values_T` are means.

    Raises:
        ValueError: there is no task, or fewer than one resample is asked for.
    """
    if n_tasks < 1 or n < 1:
        raise ValueError(f"n_tasks={n_tasks}, n={n}: both must be at least 1")
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_tasks, np.full(n_tasks, 1.0 / n_tasks), size=n) / n_tasks


def interval_of(estimate: float, samples_R: FloatArray, level: float = 0.95, basic: bool = False) -> Interval:
    """Percentile interval from R resampled statistics, shape (R,), or the `basic` one, which is that reflected at the
    estimate."""
    _check_level(level)
    low, high = np.quantile(_seen_from(estimate, samples_R, basic), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high))


def seed_weights(n_seeds: int, n: int, rng: np.random.Generator) -> FloatArray:
    """Weights of n bootstrap resamples of a method's training seeds, shape (n, n_seeds), rows sum to 1."""
    return rng.multinomial(n_seeds, np.full(n_seeds, 1.0 / n_seeds), size=n) / n_seeds


def paired_difference(
    ours_R: FloatArray, theirs_R: FloatArray, estimate: float, n_tasks: int, level: float = 0.95, basic: bool = False
) -> PairedDifference:
    """Of two statistics on the same R resamples of the tasks, each of shape (R,), and their difference on the sample
    itself; see `interval_of`."""
    gaps_R = ours_R - theirs_R
    p = float("nan") if n_tasks == 1 else _two_sided_p(_seen_from(estimate, gaps_R, basic))
    return PairedDifference(_interval(estimate, gaps_R, n_tasks, level, basic), p)


def bootstrap_ci(
    values_T: npt.ArrayLike,
    statistic: Callable[..., npt.ArrayLike] = np.mean,
    *,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of a statistic of one value per task.

    `statistic` maps values of shape (T,) to a number; when it takes `axis` it is called on all resamples at once.

    Raises:
        ValueError: `values_T` is empty, not one-dimensional or not finite, or `level` is not inside (0, 1).
    """
    _check_level(level)
    values = np.asarray(values_T, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.all(np.isfinite(values)):
        raise ValueError(f"values of shape {values.shape}: a non-empty row of finite numbers is needed")
    estimate = float(np.asarray(statistic(values)))
    if len(values) == 1:
        return Interval(estimate, float("nan"), float("nan"))
    result = stats.bootstrap(
        (values,),
        statistic,
        n_resamples=n,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=256,
    )
    return Interval(estimate, float(result.confidence_interval.low), float(result.confidence_interval.high))


def paired_hypervolume(
    methods: Mapping[str, Sequence[Point]],
    reference: Reference,
    *,
    against: str | None = None,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    normalise: bool = True,
) -> HypervolumeComparison:
    """Hypervolume of each method's points, and the paired differences of one method against each other one.

    Each resample draws tasks once for all methods, and within a method training seeds. A method with several training
    seeds has one hypervolume per seed (of that seed's points and of the points without a seed); they are averaged.
    Seeds are drawn for each method on its own, though a seed of two BoPO methods has BoSFT, the order of the tasks and
    the models' draws in common: of their difference that errs on the wide side. With two or three seeds the spread
    between training runs is understated.

    Args:
        methods: points per method; all arrays have one shape (T,) and the same task order.
        reference: fixed over the resamples.
        against: the method to compare with the others; None for no differences.
        normalise: as a share of the reference box, in [0, 1].

    Raises:
        ValueError: no method, a method without points, arrays of different lengths, or `against` is not a method.
    """
    _check_level(level)
    n_tasks = _checked_length(methods)
    if against is not None and against not in methods:
        raise ValueError(f"against={against!r} is not among the methods {sorted(methods)}")
    # Row 0 is the sample itself, so that estimate and resamples take one path.
    weights = np.vstack([np.full((1, n_tasks), 1.0 / n_tasks), resample_weights(n_tasks, n, seed)])
    streams = np.random.default_rng([seed, 1]).spawn(len(methods))
    samples = {
        method: _method_samples(points, weights, reference, stream, normalise)
        for (method, points), stream in zip(methods.items(), streams, strict=True)
    }
    most = 1.0 if normalise else reference.cost * (1.0 - reference.success)
    intervals = {
        method: _within(most, _interval(values[0], values[1:], n_tasks, level, basic=True))
        for method, values in samples.items()
    }
    differences = {}
    if against is not None:
        ours = samples[against]
        differences = {
            method: paired_difference(ours[1:], values[1:], ours[0] - values[0], n_tasks, level, basic=True)
            for method, values in samples.items()
            if method != against
        }
    return HypervolumeComparison(intervals, against, differences)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of a family of comparisons, by Holm's step-down method (1979).

    Whatever the comparisons have to do with each other, the chance that any true null hypothesis has an adjusted p of
    at most a is itself at most a. The i-th smallest of m is multiplied by m - i + 1, and none is below one before it.

    Raises:
        ValueError: a value is outside [0, 1].
    """
    wrong = {name: p for name, p in p_values.items() if not 0 <= p <= 1}
    if wrong:
        raise ValueError(f"p-values {wrong}: need numbers in [0, 1]")
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _method_samples(
    points: Sequence[Point], weights_RT: FloatArray, reference: Reference, rng: np.random.Generator, normalise: bool
) -> FloatArray:
    """Hypervolume of one method in each resample, shape (R,); row 0 averages the seeds as they are."""
    seeds: list[int | None] = [*sorted({p.seed for p in points if p.seed is not None})] or [None]
    per_seed = []
    for training_seed in seeds:
        own = [p for p in points if p.seed is None or p.seed == training_seed]
        costs_RP = weights_RT @ np.stack([p.cost_T for p in own], axis=1)
        success_RP = weights_RT @ np.stack([p.success_T for p in own], axis=1)
        per_seed.append(hypervolumes(costs_RP, np.minimum(success_RP, 1.0), reference, normalise=normalise))
    values_RS = np.stack(per_seed, axis=1)
    n_seeds = len(seeds)
    draws_RS = seed_weights(n_seeds, len(weights_RT), rng)
    draws_RS[0] = 1.0 / n_seeds
    return np.asarray(np.sum(values_RS * draws_RS, axis=1), dtype=np.float64)


def _interval(estimate: float, samples_R: FloatArray, n_tasks: int, level: float, basic: bool) -> Interval:
    if n_tasks == 1:
        return Interval(float(estimate), float("nan"), float("nan"))
    return interval_of(estimate, samples_R, level, basic)


def _seen_from(estimate: float, samples_R: FloatArray, basic: bool) -> FloatArray:
    """What the truth may be: for a basic interval as far below the estimate as a resample is above it."""
    return 2.0 * estimate - samples_R if basic else samples_R


def _within(most: float, interval: Interval) -> Interval:
    """A hypervolume's interval holds no impossible values; NaN stays."""
    low, high = np.clip([interval.low, interval.high], 0.0, most)
    return Interval(interval.estimate, float(low), float(high))


def _two_sided_p(gaps_R: FloatArray) -> float:
    tiny = 1e-12  # equal methods differ by rounding only
    below, above = np.sum(gaps_R <= tiny), np.sum(gaps_R >= -tiny)
    return float(min(1.0, 2 * (1 + min(below, above)) / (1 + len(gaps_R))))


def _checked_length(methods: Mapping[str, Sequence[Point]]) -> int:
    empty = [method for method, points in methods.items() if not points]
    if not methods or empty:
        raise ValueError(f"methods without points: {empty}" if empty else "there is no method to compare")
    shapes = {np.shape(a) for points in methods.values() for p in points for a in (p.cost_T, p.success_T)}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(
            f"per-task arrays have shapes {sorted(shapes)}: one shape (T,) is needed for paired resampling"
        )
    return int(next(iter(shapes))[0])


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be inside (0, 1), e.g. 0.95")
