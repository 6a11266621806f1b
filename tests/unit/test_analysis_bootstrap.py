"""Bootstrap intervals: coverage on a known distribution, pairing, seeds, refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bopo_ray.analysis.bootstrap import (
    Point,
    bootstrap_ci,
    holm,
    interval_of,
    paired_difference,
    paired_hypervolume,
    resample_weights,
)
from bopo_ray.analysis.pareto import Reference, hypervolume

REFERENCE = Reference(cost=2.0)


def point(cost: np.ndarray | float, success: np.ndarray, **kwargs: object) -> Point:
    success = np.asarray(success, dtype=float)
    costs = np.broadcast_to(np.asarray(cost, dtype=float), success.shape).copy()
    return Point("p", costs, success, **kwargs)  # type: ignore[arg-type]


def test_coverage_of_the_mean_of_coin_tosses() -> None:
    rng = np.random.default_rng(11)
    hits = 0
    for trial in range(200):
        values = rng.binomial(1, 0.6, size=80).astype(float)
        interval = bootstrap_ci(values, n=400, seed=trial)
        hits += interval.low <= 0.6 <= interval.high
    assert 0.89 <= hits / 200 <= 0.985  # 95% nominal; 200 trials have a standard error of 1.5%


def test_weights_give_the_same_interval_as_scipy() -> None:
    values = np.random.default_rng(1).normal(size=100)
    own = interval_of(float(values.mean()), resample_weights(100, 4000, 0) @ values)
    reference = bootstrap_ci(values, n=4000)
    assert own.estimate == pytest.approx(reference.estimate)
    assert own.low == pytest.approx(reference.low, abs=0.02)
    assert own.high == pytest.approx(reference.high, abs=0.02)


def test_any_statistic_and_the_same_seed() -> None:
    values = np.arange(30.0)
    assert bootstrap_ci(values, np.median, n=200) == bootstrap_ci(values, np.median, n=200)
    without_axis = bootstrap_ci(values, lambda v: float(sorted(v)[len(v) // 2]), n=200)
    assert without_axis.estimate == 15 and without_axis.low < 15 < without_axis.high


def test_equal_values_and_a_single_task() -> None:
    flat = bootstrap_ci([0.5, 0.5, 0.5], n=50)
    assert (flat.estimate, flat.low, flat.high) == (0.5, 0.5, 0.5)
    single = bootstrap_ci([0.5])
    assert single.estimate == 0.5 and math.isnan(single.low) and math.isnan(single.high)
    lone = paired_hypervolume({"a": [point(1.0, np.array([1.0]))]}, REFERENCE, n=10)
    assert math.isnan(lone.hypervolumes["a"].low)


def test_weights_are_resamples() -> None:
    weights = resample_weights(7, 50, seed=2)
    assert weights.shape == (50, 7)
    assert np.allclose(weights.sum(axis=1), 1)
    assert np.allclose(weights * 7, np.round(weights * 7))


def test_estimate_is_the_hypervolume_of_the_means() -> None:
    rng = np.random.default_rng(5)
    cheap, dear = rng.binomial(1, 0.4, 60).astype(float), rng.binomial(1, 0.8, 60).astype(float)
    found = paired_hypervolume({"m": [point(0.2, cheap), point(1.0, dear)]}, REFERENCE, n=100)
    expected = hypervolume([0.2, 1.0], [cheap.mean(), dear.mean()], REFERENCE, normalise=True)
    interval = found.hypervolumes["m"]
    assert interval.estimate == pytest.approx(expected)
    assert interval.low < expected < interval.high
    assert found.against is None and not found.differences


def test_a_better_method_has_a_positive_difference_and_pairing_makes_it_certain() -> None:
    rng = np.random.default_rng(7)
    worse = rng.binomial(1, 0.5, 100).astype(float)
    better = worse.copy()
    better[np.flatnonzero(worse == 0)[:8]] = 1.0
    methods = {"better": [point(1.0, better)], "worse": [point(1.0, worse)], "same": [point(1.0, better.copy())]}
    found = paired_hypervolume(methods, REFERENCE, against="better", n=1000)
    gap = found.differences["worse"]
    assert gap.interval.low > 0 and gap.p < 0.02
    # unpaired, the two intervals overlap: it is the pairing that tells them apart
    assert found.hypervolumes["better"].low < found.hypervolumes["worse"].high
    reverse = paired_hypervolume(methods, REFERENCE, against="worse", n=1000).differences["better"]
    assert reverse.interval.estimate == pytest.approx(-gap.interval.estimate)
    assert reverse.interval.high < 0 and reverse.p == gap.p
    same = found.differences["same"]
    assert (same.interval.estimate, same.p) == (0.0, 1.0)


def test_p_values_are_uniform_enough_when_nothing_differs() -> None:
    rng = np.random.default_rng(13)
    small = 0
    for trial in range(120):
        methods = {m: [point(1.0, rng.binomial(1, 0.5, 60).astype(float))] for m in ("a", "b")}
        small += paired_hypervolume(methods, REFERENCE, against="a", n=300, seed=trial).differences["b"].p < 0.1
    assert 0.03 <= small / 120 <= 0.19


def test_more_equal_points_at_one_price_are_hardly_ever_called_better() -> None:
    """By percentiles three against one are, in every sixth sample."""
    rng, better, worse = np.random.default_rng(31), 0, 0
    for trial in range(150):
        hard_T = rng.normal(0, 2.5, 120)
        points = [point(1.0, rng.random(120) < 1 / (1 + np.exp(-hard_T))) for _ in range(4)]
        methods = {"three": points[:3], "one": points[3:]}
        gap = paired_hypervolume(methods, REFERENCE, against="three", n=200, seed=trial).differences["one"].interval
        better, worse = better + (gap.low > 0), worse + (gap.high < 0)
    assert better / 150 <= 0.1 and worse / 150 <= 0.06


def test_a_basic_interval_is_the_other_one_reflected_and_holds_no_impossible_values() -> None:
    samples = np.random.default_rng(3).exponential(size=2000)
    plain, basic = interval_of(1.0, samples), interval_of(1.0, samples, basic=True)
    assert (basic.low, basic.high) == (pytest.approx(2 - plain.high), pytest.approx(2 - plain.low))
    few = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # its reflected quantiles are below 0
    volume = paired_hypervolume({"m": [point(0.1, few)]}, REFERENCE, n=500).hypervolumes["m"]
    assert 0 == volume.low < volume.estimate < volume.high <= 1


def test_seeds_are_averaged_and_widen_the_interval() -> None:
    rng = np.random.default_rng(17)
    base = rng.binomial(1, 0.5, 400).astype(float)
    seeds = [np.clip(base * scale, 0, 1) for scale in (0.4, 0.8, 1.0)]
    spread = {"m": [point(1.0, s, seed=i) for i, s in enumerate(seeds)]}
    pooled = {"m": [point(1.0, np.mean(seeds, axis=0))]}
    with_seeds = paired_hypervolume(spread, REFERENCE, n=500).hypervolumes["m"]
    without = paired_hypervolume(pooled, REFERENCE, n=500).hypervolumes["m"]
    assert with_seeds.estimate == pytest.approx(without.estimate)
    assert with_seeds.high - with_seeds.low > 2 * (without.high - without.low)


def test_a_point_without_a_seed_belongs_to_each_seed() -> None:
    tasks = np.ones(10)
    shared = point(0.5, tasks * 0.5)
    found = paired_hypervolume(
        {"m": [shared, point(1.0, tasks, seed=0), point(1.0, tasks * 0.7, seed=1)]}, REFERENCE, n=10
    )
    per_seed = [hypervolume([0.5, 1.0], [0.5, s], REFERENCE, normalise=True) for s in (1.0, 0.7)]
    assert found.hypervolumes["m"].estimate == pytest.approx(np.mean(per_seed))


def test_a_paired_difference_has_scipys_interval() -> None:
    rng = np.random.default_rng(23)
    a, b = rng.binomial(1, 0.7, 80).astype(float), rng.binomial(1, 0.5, 80).astype(float)
    # one point at cost 1 of a box of width 2: half the success is the hypervolume, so the gap is linear
    found = paired_hypervolume({"a": [point(1.0, a)], "b": [point(1.0, b)]}, REFERENCE, against="a", n=4000)
    gap = found.differences["b"].interval
    wanted = stats.bootstrap(
        (a, b), lambda x, y, axis: (x.mean(axis) - y.mean(axis)) / 2, paired=True, vectorized=True, n_resamples=4000,
        method="basic", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert gap.estimate == pytest.approx((a.mean() - b.mean()) / 2)
    assert (gap.low, gap.high) == (pytest.approx(wanted.low, abs=0.006), pytest.approx(wanted.high, abs=0.006))


def test_one_task_has_neither_an_interval_nor_a_p() -> None:
    """All resamples of one task are that task, and would call any difference certain."""
    gap = paired_difference(np.ones(50), np.zeros(50), 1.0, n_tasks=1)
    one = np.array([1.0])
    methods = {"a": [point(1.0, one)], "b": [point(1.5, one)]}
    volumes = paired_hypervolume(methods, REFERENCE, against="a", n=50).differences["b"]
    for found, estimate in ((gap, 1.0), (volumes, 0.25)):
        assert found.interval.estimate == estimate
        assert np.isnan([found.interval.low, found.interval.high, found.p]).all()


def test_two_levels_as_a_loop_over_resamples_draws_them() -> None:
    rng = np.random.default_rng(29)
    tasks, seeds = 40, 4
    success_ST = np.clip(rng.binomial(1, 0.6, tasks) * rng.uniform(0.4, 1.0, (seeds, 1)), 0, 1)
    cost_ST = rng.uniform(0.5, 1.5, (seeds, tasks))
    found = paired_hypervolume(
        {"m": [point(cost_ST[s], success_ST[s], seed=s) for s in range(seeds)]}, REFERENCE, n=3000
    ).hypervolumes["m"]
    loop = []
    for _ in range(3000):
        drawn_tasks, drawn_seeds = rng.integers(tasks, size=tasks), rng.integers(seeds, size=seeds)
        volumes = [
            hypervolume(
                [cost_ST[s][drawn_tasks].mean()], [success_ST[s][drawn_tasks].mean()], REFERENCE, normalise=True
            )
            for s in drawn_seeds
        ]
        loop.append(np.mean(volumes))
    low, high = np.quantile(loop, [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.012), pytest.approx(high, abs=0.012))
    assert high - low > 0.1, "else the tolerance says nothing"


def closed_testing(p: list[float]) -> list[float]:
    """Holm's adjusted p-values by their definition: the largest Bonferroni p of all sets of hypotheses with it."""
    sets = [s for n in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), n)]
    return [max(min(1.0, len(s) * min(p[i] for i in s)) for s in sets if j in s) for j in range(len(p))]


@given(st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.04, 0.3, 0.5, 1.0]), min_size=1, max_size=6))
def test_holm_is_the_closure_of_bonferroni(p: list[float]) -> None:
    found = holm({str(i): value for i, value in enumerate(p)})
    assert list(found) == [str(i) for i in range(len(p))]
    assert list(found.values()) == pytest.approx(closed_testing(p))


def test_holm_by_hand() -> None:
    # 4 * 0.01, 3 * 0.02, then 2 * 0.03 = 0.06 again, 1 * 0.5
    assert holm({"c": 0.03, "a": 0.01, "d": 0.5, "b": 0.02}) == pytest.approx(
        {"c": 0.06, "a": 0.04, "d": 0.5, "b": 0.06}
    )
    assert holm({}) == {} and holm({"a": 0.2}) == {"a": 0.2}
    with pytest.raises(ValueError, match=r"'a': 1\.5"):
        holm({"a": 1.5, "b": 0.1})


def test_refusals() -> None:
    good = {"a": [point(1.0, np.ones(3))]}
    with pytest.raises(ValueError, match="not among"):
        paired_hypervolume(good, REFERENCE, against="b")
    with pytest.raises(ValueError, match="without points"):
        paired_hypervolume({"a": []}, REFERENCE)
    with pytest.raises(ValueError, match="no method"):
        paired_hypervolume({}, REFERENCE)
    with pytest.raises(ValueError, match="shape"):
        paired_hypervolume({**good, "b": [point(1.0, np.ones(4))]}, REFERENCE)
    with pytest.raises(ValueError, match="level"):
        bootstrap_ci([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_ci([])
    with pytest.raises(ValueError, match="at least 1"):
        resample_weights(0)
