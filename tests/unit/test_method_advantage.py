"""The three advantages: tables worked by hand, and what must hold for any group."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bopo_ray.method.advantage import AdvantageMode, Anchor, boundary_anchor, group_advantage
from bopo_ray.method.reward import CostRange

VANILLA, AUGMENTED, HYBRID = AdvantageMode.VANILLA, AdvantageMode.AUGMENTED, AdvantageMode.HYBRID
SMALL, LARGE = Anchor(reward=0.0, outcome=0.0), Anchor(reward=1.2, outcome=1.0)

modes = st.sampled_from(list(AdvantageMode))
on_grid = st.integers(-60, 60).map(lambda n: n / 20)
outcome = st.sampled_from([0.0, 0.2, 0.5, 1.0])
groups = st.lists(st.tuples(on_grid, outcome), max_size=9)
anchor_lists = st.lists(st.builds(Anchor, on_grid, outcome, st.booleans()), max_size=3)


def columns(group: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([r for r, _ in group]), np.array([u for _, u in group])


def test_vanilla_by_hand() -> None:
    # mu = 0.5, deviations +-0.5, sigma = 0.5 -> +-1
    result = group_advantage([1, 0, 1, 0], [1, 0, 1, 0], [SMALL, LARGE], VANILLA, eps=0)
    np.testing.assert_allclose(result.advantages, [1, -1, 1, -1])
    np.testing.assert_array_equal(result.anchor_advantages, [0, 0])
    assert not result.skipped and not result.all_failed


def test_augmented_by_hand() -> None:
    # rewards 0, -0.2; anchors 0, 1.2: mu+ = 0.25; deviations -0.25, -0.45, -0.25, 0.95
    # variance (0.0625 + 0.2025 + 0.0625 + 0.9025) / 4 = 0.3075
    result = group_advantage([0, -0.2], [0, 0], [SMALL, LARGE], AUGMENTED, eps=0)
    np.testing.assert_allclose(result.advantages, np.array([-0.25, -0.45]) / 0.3075**0.5)
    np.testing.assert_array_equal(result.anchor_advantages, [0, 0])
    assert result.all_failed and not result.skipped


def test_hybrid_without_success_by_hand() -> None:
    # the numbers above; sigma = 0.1 < sigma+; A_S = -0.25 / s -> no term, A_L = 0.95 / s
    result = group_advantage([0, -0.2], [0, 0], [SMALL, LARGE], HYBRID, eps=0)
    np.testing.assert_allclose(result.advantages, np.array([-0.25, -0.45]) / 0.3075**0.5)
    np.testing.assert_allclose(result.anchor_advantages, [0, 0.95 / 0.3075**0.5])
    assert result.all_failed and not result.skipped


def test_hybrid_divides_by_the_greater_spread() -> None:
    # rewards 0, -3: sigma = 1.5. With anchors 0, 0: mu+ = -0.75, sigma+^2 = (3 * 0.5625 + 5.0625) / 4 = 1.6875
    result = group_advantage([0, -3], [0, 0], [Anchor(0, 0.5), Anchor(0, 0.5)], HYBRID, eps=0)
    np.testing.assert_allclose(result.advantages, [0.75 / 1.5, -2.25 / 1.5])
    np.testing.assert_allclose(result.anchor_advantages, [0.75 / 1.6875**0.5] * 2)


def test_all_fail_cost_noise_is_not_blown_up_to_one() -> None:
    """The engine of the collapse: a cost difference of 0.01 is +-1 for vanilla, and next to nothing for hybrid."""
    rewards, nothing = [0.0, -0.01, 0.0, -0.01], [0, 0, 0, 0]
    vanilla = group_advantage(rewards, nothing, [SMALL, LARGE], VANILLA).advantages
    hybrid = group_advantage(rewards, nothing, [SMALL, LARGE], HYBRID).advantages
    assert np.ptp(vanilla) == pytest.approx(2, abs=1e-3)
    assert np.ptp(hybrid) < 0.03


@pytest.mark.parametrize(
    ("outcomes", "u_small", "u_large", "failed"),
    [
        ([0, 0], 0.0, 1.0, True),
        ([0, 1], 0.0, 1.0, False),
        ([0, 1], 1.0, 1.0, False),  # u = 1 always counts
        ([0.3, 0.5], 0.1, 0.6, True),  # graded: below the better boundary
        ([0.3, 0.6], 0.1, 0.6, False),  # equal is enough
        ([0.3, 0.5], 0.6, 0.1, True),  # the better boundary may be the small one
        ([0, 0], 0.0, 0.0, True),  # Intractable: nothing was achieved either
        ([0.1, 0], 0.0, 0.0, False),
    ],
)
def test_when_a_group_has_failed(outcomes: list[float], u_small: float, u_large: float, failed: bool) -> None:
    anchors = [Anchor(0.0, u_small), Anchor(1.0, u_large)]
    result = group_advantage([0.0, -0.1], outcomes, anchors, HYBRID)
    assert result.all_failed is failed
    assert bool(result.anchor_advantages.any()) is failed


def test_an_anchor_that_may_not_be_imitated_only_counts_in_the_baseline() -> None:
    barred = Anchor(LARGE.reward, LARGE.outcome, imitable=False)
    plain, without = (group_advantage([0, -0.2], [0, 0], [SMALL, a], HYBRID) for a in (LARGE, barred))
    np.testing.assert_array_equal(plain.advantages, without.advantages)
    assert plain.anchor_advantages[1] > 1 and without.anchor_advantages[1] == 0


@pytest.mark.parametrize("mode", list(AdvantageMode))
def test_nothing_to_learn_is_zero_and_skipped(mode: AdvantageMode) -> None:
    same = Anchor(0.3, 0.5)
    for rewards in ([], [0.3], [0.1 + 0.2, 0.3]):  # the last differ in the last bit only
        result = group_advantage(rewards, [0.0] * len(rewards), [same, same], mode)
        assert result.skipped and result.advantages.shape == (len(rewards),)
        assert not result.advantages.any() and not result.anchor_advantages.any()
    singleton = group_advantage([0.7], [0.0], [SMALL, LARGE], mode)
    assert singleton.skipped and not singleton.advantages.any() and not singleton.anchor_advantages.any()


def test_equal_rewards_with_better_anchors_still_teach_hybrid() -> None:
    """Eight identical failures: vanilla has nothing to say, hybrid pulls towards always-large."""
    rewards, nothing = [-0.1] * 8, [0] * 8
    assert group_advantage(rewards, nothing, [SMALL, LARGE], VANILLA).skipped
    hybrid = group_advantage(rewards, nothing, [SMALL, LARGE], HYBRID)
    assert not hybrid.skipped and hybrid.anchor_advantages[1] > 1 and (hybrid.advantages < 0).all()


@given(groups.filter(lambda g: len(g) >= 2 and len({r for r, _ in g}) > 1), anchor_lists)
def test_vanilla_is_textbook_grpo(group: list[tuple[float, float]], anchors: list[Anchor]) -> None:
    rewards, outcomes = columns(group)
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    result = group_advantage(rewards, outcomes, anchors, VANILLA)
    np.testing.assert_allclose(result.advantages, [(r - mean) / (std + 1e-6) for r in rewards], atol=1e-9)


@given(groups, anchor_lists, modes, st.randoms())
def test_permuting_the_group_permutes_the_advantages(
    group: list[tuple[float, float]], anchors: list[Anchor], mode: AdvantageMode, rnd: object
) -> None:
    order = list(range(len(group)))
    rnd.shuffle(order)  # type: ignore[attr-defined]
    rewards, outcomes = columns(group)
    plain = group_advantage(rewards, outcomes, anchors, mode)
    shuffled = group_advantage(rewards[order], outcomes[order], anchors, mode)
    np.testing.assert_allclose(shuffled.advantages, plain.advantages[order], atol=1e-9)
    np.testing.assert_allclose(shuffled.anchor_advantages, plain.anchor_advantages, atol=1e-9)
    assert (shuffled.skipped, shuffled.all_failed) == (plain.skipped, plain.all_failed)


@given(groups, anchor_lists, modes, st.floats(-5, 5))
def test_a_constant_on_all_rewards_changes_nothing(
    group: list[tuple[float, float]], anchors: list[Anchor], mode: AdvantageMode, constant: float
) -> None:
    rewards, outcomes = columns(group)
    plain = group_advantage(rewards, outcomes, anchors, mode)
    moved_anchors = [Anchor(a.reward + constant, a.outcome, a.imitable) for a in anchors]
    moved = group_advantage(rewards + constant, outcomes, moved_anchors, mode)
    np.testing.assert_allclose(moved.advantages, plain.advantages, atol=1e-6)
    np.testing.assert_allclose(moved.anchor_advantages, plain.anchor_advantages, atol=1e-6)
    assert moved.skipped == plain.skipped


@given(groups, anchor_lists, modes)
def test_always_finite_and_anchors_only_in_failed_hybrid_groups(
    group: list[tuple[float, float]], anchors: list[Anchor], mode: AdvantageMode
) -> None:
    result = group_advantage(*columns(group), anchors, mode)
    assert np.isfinite(result.advantages).all() and np.isfinite(result.anchor_advantages).all()
    assert (result.anchor_advantages >= 0).all() and result.anchor_advantages.shape == (len(anchors),)
    if mode is not HYBRID or not result.all_failed:
        assert not result.anchor_advantages.any()
    assert result.skipped == (not result.advantages.any() and not result.anchor_advantages.any())


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        group_advantage([0, 1], [0], [], HYBRID)
    with pytest.raises(ValueError, match="not finite"):
        group_advantage([0, np.nan], [0, 0], [], HYBRID)
    with pytest.raises(ValueError, match="not finite"):
        group_advantage([0, 1], [0, 0], [Anchor(np.inf, 0)], HYBRID)


def test_boundary_anchor_is_the_mean_of_rewards_not_the_reward_of_means() -> None:
    # C_norm of 0 and 300 in 0..100: 0 and 1 (clipped). R: 1.5 - 0 and 0 - 0.4 -> 0.55. Of the mean cost 150: 0.75 - 0.4
    anchor = boundary_anchor([1, 0], [0, 300], True, CostRange(0, 100), lam=0.4)
    assert anchor.reward == pytest.approx(0.55)
    assert (anchor.outcome, anchor.imitable) == (0.5, True)
    with pytest.raises(ValueError, match="0 rollouts"):
        boundary_anchor([], [], True, CostRange(0, 1), lam=0.4)
