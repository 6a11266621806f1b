"""Train batches: row weights by hand, padding, order, anchors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns

from bopo_ray.agent import episode_views
from bopo_ray.method.synthesis import Expert
from bopo_ray.models.tokens import PAD, tokenizer
from bopo_ray.records import Budget, CostMode, Difficulty, Episode
from bopo_ray.rllib.batch import ADVANTAGE, ANCHOR, BEHAVIOUR, LABEL, LENGTH, MASK, WEIGHT, Group, bopo_batch, sft_batch
from bopo_ray.rllib.encode import Reader, encode_view
from bopo_ray.rllib.reading import Reading
from bopo_ray.rllib.router_module import ASKS
from tests.toy import play, toy_spec

CONTEXT, T_MAX = 96, 20
READ = Reader(CONTEXT)
LONG = play(toy_spec("long/0"))[0]
assert len(LONG.steps) == T_MAX


def episode(steps: int, member: int = 0) -> Episode:
    """The first `steps` steps of an episode."""
    return dataclasses.replace(LONG, spec=toy_spec("long/0", member=member), steps=LONG.steps[:steps])


def group(lengths: list[int], advantages: list[float], anchors: tuple[tuple[Episode, float], ...] = ()) -> Group:
    return Group(tuple(episode(n, i) for i, n in enumerate(lengths)), np.asarray(advantages, float), anchors)


def batch(groups: list[Group], minibatch: int = 4, learners: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    made = bopo_batch(groups, T_MAX, READ, minibatch, learners, np.random.default_rng(seed))
    assert made is not None
    rows = dict(made.data.policy_batches[DEFAULT_MODULE_ID])
    assert all(len(v) == len(rows[WEIGHT]) for v in rows.values()) and len(rows[WEIGHT]) % (made.rows * learners) == 0
    # A row of the small router is one step.
    return {k: v[:, 0] if v.ndim > 1 and k != Columns.OBS else v for k, v in rows.items()}


def test_weights_by_hand() -> None:
    # Two groups, G = 2, T_max = 20: a policy row weighs 1/(2 * 20 * 2) = 1/80, an anchor row 1/(20 * 2) = 1/40.
    # Rows: 1 + 2 + 3 + 1 policy and 2 anchor = 9 make 3 minibatches of 4 at most, so all times 3.
    groups = [group([1, 2], [0.5, -0.5]), group([3, 1], [1.0, -1.0], ((episode(2, 9), 0.7),))]
    rows = batch(groups)
    assert all(len(v) == 9 for v in rows.values())
    for value, count, weight in ((0.5, 1, 3 / 80), (-0.5, 2, 3 / 80), (1.0, 3, 3 / 80), (-1.0, 1, 3 / 80)):
        chosen = (rows[ADVANTAGE] == np.float32(value)) & (rows[WEIGHT] != 0)
        assert chosen.sum() == count and rows[WEIGHT][chosen] == pytest.approx(weight)
    anchors = (rows[ANCHOR] == np.float32(0.7)) & (rows[WEIGHT] != 0)
    assert anchors.sum() == 2 and rows[WEIGHT][anchors] == pytest.approx(3 / 40) and not rows[ADVANTAGE][anchors].any()
    assert (rows[WEIGHT] > 0).all()


def test_with_two_learners_each_minibatch_still_estimates_the_whole() -> None:
    # 3 rows on 2 learners in minibatches of 1: padded to 4 rows = 2 minibatches, gradients of learners added.
    rows = batch([group([1, 2], [1.0, -1.0])], minibatch=1, learners=2)
    assert sorted(rows[WEIGHT]) == pytest.approx([0.0] + [2 / (2 * T_MAX)] * 3)


def test_rows_hold_what_the_router_saw_and_did() -> None:
    played, _ = play(toy_spec("mix/1", budget=Budget(CostMode.CALLS, 2)))
    rows = batch([Group((played, played), np.array([1.0, 1.0]), ())], minibatch=1)
    views = episode_views(played)
    width = rows[Columns.OBS].shape[1]  # of the longest
    expected = sorted((encode_view(v, CONTEXT).tolist()[:width], s.model, list(s.mask))
                      for v, s in zip(views, played.steps, strict=True))  # fmt: skip
    found = sorted(zip(rows[Columns.OBS].tolist(), rows[Columns.ACTIONS].tolist(), rows[MASK].tolist(), strict=True))
    assert found == sorted(expected * 2) and [False] in [m[1:] for _, _, m in found]
    assert rows[Columns.OBS].dtype == np.int32 and rows[MASK].dtype == bool and rows[ADVANTAGE].dtype == np.float32


def test_a_stale_group_says_how_probable_its_choices_were_and_others_do_not() -> None:
    stale = dataclasses.replace(group([2, 1], [1.0, -1.0], ((episode(1, 9), 0.5),)), stale=True)
    rows = batch([stale, group([2, 2], [0.25, -0.25])])
    known = rows[BEHAVIOUR] <= 0
    assert known.sum() == 3 and set(rows[ADVANTAGE][known]) == {1.0, -1.0}
    assert np.exp(rows[BEHAVIOUR][known]) == pytest.approx(0.5)  # as `LONG` was played


def test_the_order_is_a_permutation_that_the_generator_decides() -> None:
    groups = [group([5, 7, 3], [1.0, 0.25, -1.25])]
    a, b, c = batch(groups, seed=1), batch(groups, seed=1), batch(groups, seed=2)
    assert all((a[k] == b[k]).all() for k in a)
    assert not (a[ADVANTAGE] == c[ADVANTAGE]).all()
    wanted = [-1.25] * 3 + [0.25] * 7 + [1.0] * 5
    assert all(sorted(x[ADVANTAGE][x[LENGTH] > 0]) == wanted for x in (a, c))


def test_nothing_to_teach_is_no_batch() -> None:
    rng = np.random.default_rng(0)
    assert bopo_batch([], T_MAX, READ, 4, 1, rng) is None
    # Episodes that no call could be paid for have no step, hence no row.
    broke, _ = play(toy_spec(budget=Budget(CostMode.USD, 0)))
    assert not broke.steps and READ.episode(episode_views(broke)) == []
    assert bopo_batch([Group((broke, broke), np.zeros(2), ())], T_MAX, READ, 4, 1, rng) is None
    assert len(batch([Group((broke, episode(2)), np.array([0.0, 1.0]), ())], minibatch=1)[WEIGHT]) == 2


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), max_size=2), st.integers(1, 9), st.integers(1, 3),
)  # fmt: skip
@example([[1, 1], [1, 6]], [1, 1], 2, 2)
def test_weights_add_up_whatever_the_sizes(
    lengths: list[list[int]], anchor_lengths: list[int], minibatch: int, learners: int
) -> None:
    anchors = tuple((episode(n, 50 + i), 0.5) for i, n in enumerate(anchor_lengths))
    groups = [group(ls, [1.0] * len(ls), anchors if i == 0 else ()) for i, ls in enumerate(lengths)]
    rows = batch(groups, minibatch, learners)
    n = sum(map(sum, lengths)) + sum(anchor_lengths)
    unit = minibatch * learners
    assert n <= len(rows[WEIGHT])
    if learners == 1:  # several share a minibatch by tokens, not by steps
        assert len(rows[WEIGHT]) < n + unit
    assert (rows[WEIGHT] != 0).sum() == n
    # By the method: the sum over groups of sum_i |tau_i| / (G * T_max * n_groups), and anchors.
    whole = sum(sum(ls) / len(ls) for ls in lengths) / (T_MAX * len(lengths))
    whole += sum(anchor_lengths) / (T_MAX * len(lengths))
    # Learners' gradients are added, and each minibatch estimates the whole.
    assert rows[WEIGHT].sum() / -(-n // unit) == pytest.approx(whole, rel=1e-4)


def test_the_sft_batch_keeps_labels_with_their_views_and_weights() -> None:
    experts = [Expert(episode(3), (0, 1, 0), Difficulty.HARD), Expert(episode(2, 1), (1, 1), Difficulty.EASY)]
    weights = {Difficulty.HARD: 1.0, Difficulty.EASY: 2.0}
    made = sft_batch(experts, weights, READ, 4, 1, np.random.default_rng(3))
    rows = dict(made.data.policy_batches[DEFAULT_MODULE_ID])
    assert made.rows == 3 and (rows[WEIGHT][:, 0] == 0).tolist() == [False] * 5 + [True] and made.data.env_steps() == 5
    mean = np.round(rows[WEIGHT][:, 0] * 5 / 2, 5)  # over 5 steps, times 2 minibatches
    found = sorted(zip(mean.tolist(), rows[LABEL][:, 0].tolist(), rows[Columns.OBS].tolist(), strict=True))[1:]
    width = rows[Columns.OBS].shape[1]
    views = [encode_view(v, CONTEXT).tolist()[:width] for e in experts for v in episode_views(e.episode)]
    assert found == sorted(zip([1.0] * 3 + [2.0] * 2, [0, 1, 0, 1, 1], views, strict=True))


def test_padding_ids_are_padding() -> None:
    rows = batch([group([1, 4], [1.0, 1.0])])
    short, long = sorted(zip(rows[LENGTH], rows[Columns.OBS], strict=True), key=lambda r: r[0])[-5::4]
    pad = tokenizer().token_to_id(PAD)
    assert 0 < short[0] < long[0] == len(long[1]) and pad not in short[1][: short[0]]
    assert (short[1][short[0] :] == pad).all()


# -- episodes as sequences --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Whole:
    """Reads each episode as one sequence of 10 tokens a step."""

    padding: int = -1

    def episode(self, views: list[str]) -> list[Reading]:
        asks = np.repeat(np.arange(1, len(views) + 1), 10).astype(np.int32)
        return [Reading(np.arange(len(asks), dtype=np.int32), asks)] if views else []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(1, 30), st.integers(1, 3))
def test_sequences_stay_whole_and_fill_minibatches_evenly(lengths: list[int], minibatch: int, learners: int) -> None:
    made = bopo_batch([group(lengths, [1.0] * len(lengths))], T_MAX, Whole(), minibatch, learners,  # type: ignore[arg-type]
                      np.random.default_rng(len(lengths)))  # fmt: skip
    assert made is not None
    rows = dict(made.data.policy_batches[DEFAULT_MODULE_ID])
    there = rows[LENGTH] > 0
    assert sorted((rows[LENGTH][there] // 10).tolist()) == sorted(lengths) == sorted((rows[WEIGHT] > 0).sum(1)[there])
    assert (rows[ASKS].max(1) * 10 == rows[LENGTH]).all() and (rows[WEIGHT][~there] == 0).all()
    parts = rows[LENGTH].reshape(learners, -1, made.rows)  # as RLlib cuts it: learners, then minibatches
    steps = parts.sum((0, 2)) // 10
    assert (steps > 0).all() and len(steps) <= -(-sum(lengths) // (minibatch * learners))
    assert steps.max() <= sum(lengths) / -(-sum(lengths) // (minibatch * learners)) + max(lengths)
    assert rows[WEIGHT].sum() / len(steps) == pytest.approx(sum(lengths) / len(lengths) / T_MAX, rel=1e-4)
    assert made.data.env_steps() == sum(lengths)
    for m in range(parts.shape[1]):  # no learner has all the work where another could have some
        tokens = parts[:, m].sum(-1)
        assert tokens.max() - tokens.min() <= max(lengths) * 10
