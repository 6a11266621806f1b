"""The value of the small boundary policy: what it learns from, by hand, and that a router reads it as fitted."""

from __future__ import annotations

import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModule

from bopo_ray.agent import episode_views
from bopo_ray.method.value import Tail, small_tail
from bopo_ray.models.tokens import SEP, tokenizer
from bopo_ray.records import Episode
from bopo_ray.rllib.encode import encode_view
from bopo_ray.rllib.router_module import RouterModule
from bopo_ray.rllib.value import NEAR, SECTIONS, BoundaryValue, fit_value, rank_quality
from bopo_ray.rllib.value_router import LEVELS, STEPS, ValueRouter
from envs.base import text_space
from tests.unit.test_method_data import episode

CONTEXT = 96


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ((0, 0, 0, 0), (0, (1.0, 0.25, 0.25, 0.25))),  # always-small: all of it
        ((1, 1, 0, 0), (2, (1.0, 0.5))),  # behind the hand-over
        ((1, 0, 1, 0), (3, (1.0,))),  # behind the last one
        ((2, 0), (1, (1.0,))),  # of a larger pool
        ((0, 0, 1), None),  # LARGE wrote the end
        ((), None),
    ],
)
def test_the_tail_that_small_wrote_alone(
    models: tuple[int, ...], expected: tuple[int, tuple[float, ...]] | None
) -> None:
    found = small_tail(episode(models, True))
    assert found == (None if expected is None else Tail(*expected, success=True))


def telling(holds: bool, success: bool, models: tuple[int, ...], member: int) -> Episode:
    """An episode whose first action tells how it ends, if nothing else goes wrong."""
    e = episode(models, success, name=f"boil/{member}", member=member)
    first = dataclasses.replace(e.steps[0], action="take cup" if holds else "look around", observation="Done.")
    return dataclasses.replace(e, steps=(first, *e.steps[1:]))


def lessons() -> list[Episode]:
    rng = np.random.default_rng(0)
    return [
        telling(holds, bool(rng.random() < (0.9 if holds else 0.1)), (1, 0, 0), 2 * n + holds)
        for n in range(60)
        for holds in (False, True)
    ]


def test_the_value_is_higher_where_small_went_on_to_win() -> None:
    value = fit_value(lessons(), CONTEXT, 1.0)
    assert value is not None and value.states == 120 * 2
    assert value.weights.shape == (SECTIONS * tokenizer().get_vocab_size(),)
    router = ValueRouter(2)
    router.set_value(value)
    views = [encode_view(episode_views(telling(h, True, (1, 0), 999))[1], CONTEXT) for h in (False, True)]
    low, high = torch.sigmoid(router.value_of(torch.from_numpy(np.stack(views)))).flatten().tolist()
    assert low < 0.3 and high > 0.7


def test_it_is_judged_by_how_it_ranks_the_hand_overs_of_other_tasks() -> None:
    value = fit_value(lessons(), CONTEXT, 1.0)
    assert value is not None
    sure = [telling(h, h, (1, 0), n) for n in range(3) for h in (False, True)]
    assert rank_quality(value, sure, CONTEXT) == 1.0
    assert rank_quality(value, [*sure, telling(False, True, (1, 0), 9)], CONTEXT) == pytest.approx((3 + 0.5) / 4)
    assert math.isnan(rank_quality(value, [telling(True, True, (1, 0), 0), telling(False, False, (0, 0), 1)], CONTEXT))


@pytest.mark.parametrize("episodes", [[], [episode((0, 0), True)], [episode((1, 1), b) for b in (True, False)]])
def test_there_is_no_value_without_both_outcomes(episodes: list[Episode]) -> None:
    assert fit_value(episodes, CONTEXT, 1.0) is None


def test_the_value_by_hand() -> None:
    """Each token counts in its section: task, budget, older and newest history; [CLS] and padding, by the layout."""
    view = "task: boil\nbudget: unlimited; steps left 9\n| A hall.\n" + "\n".join(
        f"> look {i} | A cup." for i in range(9)
    )
    ids, size = encode_view(view, CONTEXT), tokenizer().get_vocab_size()
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(SECTIONS, size)).astype(np.float32)
    first, second = np.flatnonzero(ids == tokenizer().token_to_id(SEP))
    section = np.zeros(CONTEXT, int)
    section[first:], section[second:], section[second : second + NEAR] = 1, 2, 3
    there = ids != 0
    by_hand = weights[section[1:], ids[1:]][there[1:]].sum() + weights[0, tokenizer().token_to_id("[CLS]")] + 0.5
    router = ValueRouter(2)
    router.set_value(BoundaryValue(weights.reshape(-1), 0.5, 1))
    assert float(router.value_of(torch.from_numpy(ids)[None])) == pytest.approx(by_hand, abs=1e-4)
    assert ids[0] - size == 9, "the steps taken"
    short = int(there.sum())
    pair = torch.from_numpy(np.stack([ids, encode_view("\n".join(view.split("\n")[:4]), CONTEXT)]))
    alone = [router.value_of(row[None]) for row in pair]
    assert torch.allclose(router.value_of(pair), torch.cat(alone), atol=1e-4), "others in the batch don't count"
    assert float(router.value_of(pair[:1, :short])) == pytest.approx(by_hand, abs=1e-4), "nor does padding"


def module(**shape: object) -> RouterModule:
    return RouterModule(
        observation_space=text_space(), action_space=gym.spaces.Discrete(2), model_config={"context": CONTEXT} | shape,
        inference_only=False,
    )  # fmt: skip


def test_the_router_reads_value_and_step_alone_and_keeps_them_when_saved(tmp_path: object) -> None:
    value = fit_value(lessons(), CONTEXT, 1.0)
    assert value is not None
    own = module(value=True)
    own.set_value(value)
    own.sharpen(3.0)
    own.add_offset(0.25)
    views = [v for e in lessons()[:4] for v in episode_views(e)]
    ids = torch.from_numpy(np.stack([encode_view(v, CONTEXT) for v in views]))
    with torch.no_grad():
        logits = own._forward({Columns.OBS: ids})[Columns.ACTION_DIST_INPUTS]
    own.save_to_path(str(tmp_path))
    again = RLModule.from_checkpoint(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again._forward({Columns.OBS: ids})[Columns.ACTION_DIST_INPUTS], logits)
    for router in (own.policy, own.average, own.reference):
        assert torch.equal(router.value, torch.from_numpy(value.weights)), "also for those that training compares with"
    assert own.policy.inner.in_features == len(LEVELS) + len(STEPS)
    trained = {name for name, _ in own.policy.named_parameters()}
    assert trained == {"inner.weight", "inner.bias", "head.weight", "head.bias"}, "no gradient changes the value"
    assert ids[1, 0] - ids[0, 0] == 1
    same = torch.stack([ids[0], ids[0]])
    same[1, 0] += 4
    with torch.no_grad():
        early, late = own._forward({Columns.OBS: same})[Columns.ACTION_DIST_INPUTS]
    assert not torch.equal(early, late), "the step counts"


def test_an_encoder_does_not_see_the_step_behind_the_view() -> None:
    encoder, ids = module(), torch.from_numpy(encode_view("task: boil\nbudget: none\n| A hall.", CONTEXT))
    later = ids.clone()
    later[0] += 5
    with torch.no_grad():
        a, b = encoder._forward({Columns.OBS: torch.stack([ids, later])})[Columns.ACTION_DIST_INPUTS]
    assert torch.equal(a, b)
