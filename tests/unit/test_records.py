"""Ids, seeds and pickles of the records, and the errors' families."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bopo_ray import errors
from bopo_ray.records import Budget, CostMode, Episode, EpisodeSpec, Phase, Question, Step, spawn_seed
from envs import errors as env_errors
from envs.base import Split, Task
from tests.toy import play, toy_spec

WORDS = st.text("abz-_ ()=.0123456789", min_size=1, max_size=8)
SPECS = st.builds(
    EpisodeSpec,
    task=st.builds(Task, env_id=WORDS, name=WORDS, split=st.just(Split.TRAIN)),
    phase=st.sampled_from(Phase), policy=WORDS, group=st.integers(0, 12), member=st.integers(0, 12),
    seed=st.integers(0, 12), greedy=st.booleans(),
    budget=st.none() | st.builds(Budget, mode=st.sampled_from(CostMode), cap=st.integers(0, 12)),
)  # fmt: skip


@given(SPECS, SPECS)
def test_two_specs_share_an_id_only_when_they_are_equal(a: EpisodeSpec, b: EpisodeSpec) -> None:
    assert (a.id == b.id) == (a == b)
    alone = ("policy", "group", "greedy", "budget", "router")
    drawn = [dataclasses.replace(s, **{k: getattr(a, k) for k in alone}) for s in (a, b)]
    assert (a.stream == b.stream) == (drawn[0] == drawn[1]), "compared policies draw common random numbers"


@pytest.mark.parametrize(
    "change",
    [
        {"task": Task("X-v0", "boil/4", Split.TRAIN)}, {"task": Task("Y-v0", "boil/3", Split.TRAIN)},
        {"phase": Phase.POLICY}, {"policy": "always-large"}, {"group": 1}, {"member": 1}, {"seed": 1}, {"greedy": True},
        {"budget": Budget(CostMode.CALLS, 5)}, {"budget": Budget(CostMode.USD, 5)},
        {"budget": Budget(CostMode.CALLS, 0)},
    ],
)  # fmt: skip
def test_every_field_that_changes_the_episode_changes_the_id(change: dict[str, object]) -> None:
    base = EpisodeSpec(Task("X-v0", "boil/3", Split.TRAIN), Phase.BOUNDARY, "always-small", 0, 0, 0)
    assert dataclasses.replace(base, **change).id != base.id  # type: ignore[arg-type]


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_ids_and_seeds_are_the_same_in_another_process(hash_seed: str) -> None:
    spec = toy_spec("mix/7", budget=Budget(CostMode.USD, 900))
    code = (
        "from bopo_ray.records import *; from envs.base import *\n"
        "s = EpisodeSpec(Task('tests.toy:Toy-v0', 'mix/7', Split.TRAIN), Phase.EVALUATION, 'random(0.5)', 0, 0, 0,"
        " budget=Budget(CostMode.USD, 900), router='random(0.5)')\n"
        "print(s.id, s.stream, spawn_seed('a', 1, 0.5, Split.TEST), sep='\\n')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert run.stdout.splitlines() == [spec.id, str(spec.stream), str(spawn_seed("a", 1, 0.5, Split.TEST))]


@given(st.lists(st.text(max_size=5) | st.integers() | st.floats(), max_size=4))
def test_seeds_fit_63_bits(parts: list[object]) -> None:
    assert 0 <= spawn_seed(*parts) < 2**63


def test_seeds_tell_their_parts_apart_and_spread() -> None:
    assert len({spawn_seed("ab", "c"), spawn_seed("a", "bc"), spawn_seed("abc"), spawn_seed("a", "b", "c")}) == 4
    top_bits = {spawn_seed(i) >> 60 for i in range(200)}
    assert top_bits == set(range(8))  # 200 draws over 8 bins: an empty one has probability 8 * (7/8)^200 < 1e-10


def test_records_pickle() -> None:
    episode, _ = play(toy_spec(budget=Budget(CostMode.CALLS, 2)))
    copy = pickle.loads(pickle.dumps(episode))
    assert copy == episode and copy.spec.id == episode.spec.id and copy.cost_microusd == episode.cost_microusd
    assert isinstance(copy.stop, type(episode.stop)) and isinstance(copy.spec.budget.mode, CostMode)
    for record in (EpisodeSpec, Question, Step, Episode):  # each field is where it was
        made = record(*range(len(dataclasses.fields(record))))
        assert pickle.loads(pickle.dumps(made)) == made


def test_the_two_costs_of_an_episode() -> None:
    episode, _ = play(toy_spec())
    by_hand = dataclasses.replace(
        episode,
        steps=tuple(
            dataclasses.replace(episode.steps[0], model=m, cost_microusd=c) for m, c in ((0, 7), (1, 100), (2, 30))
        ),
    )
    # A third model would count as a large call too: 1 for any call above the smallest.
    assert by_hand.cost(CostMode.USD) == 137 and by_hand.cost(CostMode.CALLS) == 2


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_pickle_and_inherit_the_built_in_class(name: str) -> None:
    kind = getattr(errors, name)
    more = (
        {"kind": "429", "retry": True, "billed": False, "retry_after_s": 2.5, "cost": 3}
        if name == "AttemptError"
        else {}
    )
    error = pickle.loads(pickle.dumps(kind("lam=-1: need lambda >= 0", **more)))
    assert all(getattr(error, k) == v for k, v in more.items())
    assert type(error) is kind and str(error) == "lam=-1: need lambda >= 0"
    failures = ("AttemptError", "EngineError", "ModelError", "SpendLimitError")
    assert isinstance(error, RuntimeError if name in failures else ValueError)
    assert isinstance(error, errors.ConfigError) == (name not in failures)


def test_the_package_and_the_environments_share_their_errors() -> None:
    assert all(getattr(errors, name) is getattr(env_errors, name) for name in env_errors.__all__)
