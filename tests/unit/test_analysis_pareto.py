"""Pareto front and hypervolume: hand-worked cases, a brute-force reference and invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bopo_ray.analysis.pareto import Reference, hypervolume, hypervolumes, pareto_front

# Values on a coarse grid, so that ties are common and a count of grid cells is the exact area.
GRID = 8
points = st.lists(st.tuples(st.integers(0, GRID + 2), st.integers(0, GRID)), min_size=0, max_size=8)
REFERENCE = Reference(cost=GRID, success=0.25)


def arrays(drawn: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    costs = np.array([c for c, _ in drawn], dtype=float)
    return costs, np.array([s / GRID for _, s in drawn], dtype=float)


def brute_front(costs: np.ndarray, success: np.ndarray) -> set[tuple[float, float]]:
    pairs = list(zip(costs.tolist(), success.tolist(), strict=True))
    return {p for p in pairs if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in pairs)}


def brute_area(costs: np.ndarray, success: np.ndarray, reference: Reference) -> float:
    """Counts unit cells (1 cost unit by 1/GRID success) of the reference box that some point covers."""
    cells = 0
    for column in range(GRID):
        for row in range(GRID):
            centre_cost, centre_success = column + 0.5, (row + 0.5) / GRID
            if centre_success > reference.success:
                cells += bool(np.any((costs <= centre_cost) & (success >= centre_success)))
    return cells / GRID


def test_front_by_hand() -> None:
    # (1, .5) and (3, .9) stay; (2, .5) costs more for the same; (3, .8) is worse at the same cost; (4, .9) as well.
    assert pareto_front([3, 1, 2, 3, 4], [0.9, 0.5, 0.5, 0.8, 0.9]).tolist() == [1, 0]


def test_of_equal_points_the_first_is_kept() -> None:
    assert pareto_front([2, 1, 1, 1], [0.5, 0.5, 0.5, 0.4]).tolist() == [1]
    assert pareto_front([], []).tolist() == []


def test_hypervolume_by_hand() -> None:
    # Steps: from cost 1 to 3 the height is .5, from 3 to 10 it is .9.
    assert hypervolume([1, 3], [0.5, 0.9], Reference(10)) == pytest.approx(2 * 0.5 + 7 * 0.9)
    assert hypervolume([1, 3], [0.5, 0.9], Reference(10), normalise=True) == pytest.approx(0.73)
    assert hypervolume([1, 3], [0.5, 0.9], Reference(10, success=0.5)) == pytest.approx(7 * 0.4)
    assert hypervolume([0], [1], Reference(10, success=0.2), normalise=True) == pytest.approx(1)
    assert hypervolume([], [], Reference(10)) == 0


def test_points_beyond_the_reference_count_for_nothing() -> None:
    assert hypervolume([10, 11, 1], [1.0, 1.0, 0.3], Reference(10, success=0.3)) == 0


@given(points)
def test_front_agrees_with_its_definition(drawn: list[tuple[int, int]]) -> None:
    costs, success = arrays(drawn)
    front = pareto_front(costs, success)
    found = list(zip(costs[front].tolist(), success[front].tolist(), strict=True))
    assert set(found) == brute_front(costs, success)
    assert len(set(found)) == len(found)
    assert np.all(np.diff(costs[front]) > 0) and np.all(np.diff(success[front]) > 0)


@given(points)
def test_hypervolume_agrees_with_a_count_of_cells(drawn: list[tuple[int, int]]) -> None:
    costs, success = arrays(drawn)
    area = hypervolume(costs, success, REFERENCE)
    assert area == pytest.approx(brute_area(costs, success, REFERENCE))
    assert 0 <= hypervolume(costs, success, REFERENCE, normalise=True) <= 1 + 1e-12


def test_hypervolume_agrees_with_monte_carlo() -> None:
    rng = np.random.default_rng(3)
    costs, success = rng.uniform(0, 1.2, 6), rng.uniform(0, 1, 6)
    draws_cost, draws_success = rng.uniform(0, 1, 100_000), rng.uniform(0, 1, 100_000)
    covered = np.any((costs <= draws_cost[:, None]) & (success >= draws_success[:, None]), axis=1).mean()
    assert hypervolume(costs, success, Reference(1)) == pytest.approx(covered, abs=0.006)


@given(points, st.tuples(st.integers(0, GRID), st.integers(0, GRID)))
def test_another_point_never_lowers_the_hypervolume(drawn: list[tuple[int, int]], extra: tuple[int, int]) -> None:
    before = hypervolume(*arrays(drawn), REFERENCE)
    after = hypervolume(*arrays([*drawn, extra]), REFERENCE)
    assert after >= before - 1e-12
    dominated = any(c <= extra[0] and s >= extra[1] for c, s in drawn)
    if dominated:
        assert after == pytest.approx(before)


@given(points.flatmap(lambda drawn: st.tuples(st.just(drawn), st.permutations(drawn))))
def test_order_does_not_matter(pair: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> None:
    assert hypervolume(*arrays(pair[0]), REFERENCE) == pytest.approx(hypervolume(*arrays(pair[1]), REFERENCE))


def test_many_resamples_at_once() -> None:
    rng = np.random.default_rng(0)
    costs, success = rng.uniform(0, 2, (4, 3, 5)), rng.uniform(0, 1, (4, 3, 5))
    reference = Reference(1.5, 0.1)
    at_once = hypervolumes(costs, success, reference)
    assert at_once.shape == (4, 3)
    assert at_once[2, 1] == pytest.approx(hypervolume(costs[2, 1], success[2, 1], reference))


@pytest.mark.parametrize(
    ("costs", "success"), [([1.0], [0.5, 0.6]), ([np.nan], [0.5]), ([-1.0], [0.5]), ([1.0], [1.5]), ([[1.0]], [[0.5]])]
)
def test_bad_points_are_refused(costs: list[float], success: list[float]) -> None:
    with pytest.raises(ValueError, match="costs"):
        hypervolume(costs, success, Reference(1))


@pytest.mark.parametrize(("cost", "success"), [(0.0, 0.0), (float("nan"), 0.0), (1.0, 1.0), (1.0, -0.1)])
def test_bad_references_are_refused(cost: float, success: float) -> None:
    with pytest.raises(ValueError, match="Reference"):
        Reference(cost, success)
