"""The contract of `envs.base`, for any environment: the benchmarks, the toy, the example, and one's own.

    python -m pytest tests/integration/test_env_contract.py --env-id my_package.my_module:MyEnv-v0

plays the given environments instead. Each test starts what the environment needs. An environment that passes runs in
the main job; what its score means is its own affair. Where it has no expert plans, which only simulated models follow,
the tests of these are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from bopo_ray.benchmarks import env_class
from envs.base import Split, Task, TextEnv
from envs.errors import ConfigError, UnknownTaskError
from tests.toy import ID

EASY_TASKS = {"ScienceWorld-v0": "find-animal/1"}
"""Whose expert plan is short and known; the first task of the others has a plan that succeeds."""
NONSENSE = ("", "xyzzy", "look around", "inventory", "90 °C\n\té \ud800", "go to", "x" * 5000)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "env_id" in metafunc.fixturenames:
        known = ["ScienceWorld-v0", "ALFWorld-v0", "AppWorld-v0", ID, "docs.example_env:Doors-v0"]
        metafunc.parametrize("env_id", metafunc.config.getoption("env_id") or known, scope="module")


@pytest.fixture(scope="module", autouse=True)
def installed(env_id: str) -> None:
    try:
        env_class(env_id)
        make(env_id).reset(options={"task": task_of(env_id)})
    except ConfigError as error:
        if not any(line in str(error) for line in ("make alfworld", "make appworld")):
            raise
        pytest.skip(str(error))


@pytest.fixture
def env(env_id: str) -> Iterator[gymnasium.Env[str, str]]:
    env = make(env_id)
    yield env
    env.close()


def make(env_id: str, **settings: Any) -> gymnasium.Env[str, str]:
    return gymnasium.make(env_id, disable_env_checker=True, **settings).unwrapped


def task_of(env_id: str) -> str:
    return EASY_TASKS.get(env_id) or env_class(env_id).tasks(Split.TRAIN)[0].name


def plan_of(env: gymnasium.Env[str, str], task: str) -> tuple[str, ...]:
    """Empty where the environment gives none."""
    try:
        _, info = env.reset(options={"task": task, "expert_plan": True})
    except ConfigError:
        return ()
    return info.get("expert_plan", ())  # type: ignore[no-any-return]


def needed_plan(env: gymnasium.Env[str, str], task: str) -> tuple[str, ...]:
    """The same; the test is skipped where there is none."""
    return plan_of(env, task) or pytest.skip(
        f"no expert plan of {task} (info['expert_plan'] after reset): only simulated models need one"
    )


def check_info(info: dict[str, Any], moves: int) -> None:
    """The keys that `reset` and `step` share."""
    assert isinstance(info["score"], int | float) and not isinstance(info["score"], bool)
    assert isinstance(info["success"], bool)
    assert isinstance(info["outcome"], float) and 0 <= info["outcome"] <= 1
    assert info["moves"] == moves


def test_task_lists_are_disjoint_named_and_stable(env_id: str) -> None:
    tasks = {split: env_class(env_id).tasks(split) for split in Split}
    names = [task.name for listed in tasks.values() for task in listed]
    assert len(set(names)) == len(names)
    for split, listed in tasks.items():
        assert listed and listed == env_class(env_id).tasks(split)
        assert all(isinstance(t, Task) and t.env_id == env_id and t.split is split for t in listed)
        assert all(t.kind for t in listed), "a task is called kind/variation, e.g. boil/3: tasks are spread over kinds"


def test_it_has_what_the_protocol_asks_for(env: gymnasium.Env[str, str]) -> None:
    assert isinstance(env, TextEnv) and env.max_steps >= 1 and env.action_guide
    assert make(env.tasks(Split.TRAIN)[0].env_id, max_steps=3).max_steps == 3


def test_gymnasiums_own_checker_passes(env: gymnasium.Env[str, str]) -> None:
    check_env(env, skip_render_check=True)


def test_an_episode_says_what_it_must(env: gymnasium.Env[str, str], env_id: str) -> None:
    text, info = env.reset(options={"task": task_of(env_id)})
    assert info["task"] == task_of(env_id) and info["task_text"] and info["task_text"] not in text
    assert not info["success"] and not {"admissible", "expert_plan"} & set(info)
    check_info(info, moves=0)
    for at, action in enumerate(NONSENSE, start=1):
        text, reward, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(text) and isinstance(reward, float)
        assert (terminated, truncated) == (False, False), action
        assert "admissible" not in info
        check_info(info, moves=at)


def test_the_expert_plan_comes_on_request_and_succeeds(env: gymnasium.Env[str, str], env_id: str) -> None:
    plan, end = needed_plan(env, task_of(env_id)), (False, False)
    assert isinstance(plan, tuple) and all(isinstance(action, str) for action in plan)
    assert len(plan) <= env.max_steps
    for action in plan:
        assert end == (False, False)
        *_, terminated, truncated, info = env.step(action)
        end = terminated, truncated
    assert end == (True, False) and info["success"] and info["outcome"] == 1.0
    check_info(info, moves=len(plan))


def test_asking_for_more_leaves_the_episode_as_it_is(env: gymnasium.Env[str, str], env_id: str) -> None:
    options = {"task": task_of(env_id)}
    needed_plan(env, task_of(env_id))
    plain = env.reset(options=options), env.step("look around")
    text, info = env.reset(options=options | {"expert_plan": True})
    del info["expert_plan"]
    assert ((text, info), env.step("look around")) == plain


def test_the_step_limit_truncates(env_id: str) -> None:
    env = make(env_id, max_steps=3)
    env.reset(options={"task": task_of(env_id)})
    assert [env.step("xyzzy")[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]
    env.close()


def test_an_action_needs_an_episode(env_id: str) -> None:
    env = make(env_id, max_steps=1)
    with pytest.raises(ResetNeeded):
        env.step("look around")
    env.reset(options={"task": task_of(env_id)})
    assert env.step("xyzzy")[3]
    with pytest.raises(ResetNeeded):
        env.step("look around")
    env.close()
    with pytest.raises(ResetNeeded):
        env.step("look around")


def test_the_same_task_seed_and_actions_show_the_same(env: gymnasium.Env[str, str], env_id: str) -> None:
    def play(played: gymnasium.Env[str, str], task: str) -> list[object]:
        plan = plan_of(played, task)[:4]
        first = played.reset(seed=5, options={"task": task})
        return [first, *(played.step(action) for action in ("look around", *plan))]

    first, other = play(env, task_of(env_id)), make(env_id)
    play(env, env_class(env_id).tasks(Split.TRAIN)[0].name)
    assert play(env, task_of(env_id)) == first, "after another episode"
    assert play(other, task_of(env_id)) == first, "in another environment"
    other.close()


def test_the_seed_picks_a_training_task(env: gymnasium.Env[str, str]) -> None:
    picked = [env.reset(seed=seed)[1]["task"] for seed in (1, 1, 2, 3, 4)]
    assert picked[0] == picked[1] and len(set(picked)) > 1
    assert set(picked) <= {task.name for task in env.tasks(Split.TRAIN)}


def test_an_unknown_task_is_refused_in_one_line(env: gymnasium.Env[str, str]) -> None:
    with pytest.raises(UnknownTaskError, match="no-such-kind/0") as caught:
        env.reset(options={"task": "no-such-kind/0"})
    assert "\n" not in str(caught.value)


def test_closing_twice_is_fine_and_reset_opens_again(env: gymnasium.Env[str, str], env_id: str) -> None:
    first = env.reset(options={"task": task_of(env_id)})
    env.close()
    env.close()
    assert env.reset(options={"task": task_of(env_id)}) == first
