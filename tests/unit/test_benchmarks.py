"""Benchmarks by id, and the choice of tasks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bopo_ray.benchmarks import env_class, env_label, select_tasks
from bopo_ray.errors import ConfigError
from envs.base import Split
from envs.scienceworld import ScienceWorldEnv
from tests.toy import ID, PLANS, Toy

KINDS = [k for k in PLANS if "fault" not in k]


def test_classes_by_id() -> None:
    assert env_class("ScienceWorld-v0") is ScienceWorldEnv
    assert env_class(ID).__name__ == Toy.__name__ and env_class(ID).tasks(Split.DEV)[0].name == "fetch/100"


@pytest.mark.parametrize(
    "env_id", ["Nowhere-v0", "no.such.module:Toy-v0", "tests.toy:Nowhere-v0", "", "a b", "..:Toy-v0"]
)
def test_an_unknown_id_lists_the_known_ones(env_id: str) -> None:
    with pytest.raises(
        ConfigError,
        match=r"unknown environment .*; known: .*ScienceWorld-v0.* package\.module:Name-v0; set it with --env",
    ):
        env_class(env_id)


@pytest.mark.parametrize(
    ("env_id", "meant"),
    [("ScienceWord-v0", "ScienceWorld-v0"), ("ALFWorld", "ALFWorld-v0"), ("ScienceWorld-v9", "ScienceWorld-v0"),
     ("tests.toy:Toi-v0", ID)],
)  # fmt: skip
def test_a_mistyped_id_is_told_the_nearest_with_its_version(env_id: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown environment '{env_id}'; did you mean {meant}\?; known: "):
        env_class(env_id)


FAULTY = {
    "no_python": ("x = (\n", r"its module no_python can't be imported: SyntaxError: '\(' was never closed .*line 1"),
    "no_import": ("import nowhere_at_all\n", r"its module no_import can't be imported: ModuleNotFoundError: No module"),
    "no_tasks": (
        "import gymnasium as gym\n\n\nclass Env(gym.Env):\n    @classmethod\n    def tasks(cls, split):\n"
        "        return {}[split]\n\n\ngym.register('NoTasks-v0', entry_point=Env)\n",
        r"its tasks\('train'\) fails: KeyError: .*no_tasks\.py, line 7\); see envs/base\.py",
    ),
}


@pytest.mark.parametrize("module", FAULTY)
def test_a_faulty_module_of_the_users_is_one_line_that_names_it(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, says = FAULTY[module]
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=says) as error:
        select_tasks(f"{module}:NoTasks-v0", Split.TRAIN, 1, 0)
    assert "\n" not in str(error.value) and f"'{module}:NoTasks-v0'" in str(error.value)


def test_an_environment_without_task_lists_is_refused() -> None:
    with pytest.raises(ConfigError, match="'CartPole-v1' has no task lists"):
        env_class("CartPole-v1")


@settings(max_examples=50)
@given(st.sampled_from(Split), st.integers(1, 40), st.integers(0, 5))
def test_the_choice_is_even_over_kinds_reproducible_and_without_repeats(split: Split, count: int, seed: int) -> None:
    tasks = select_tasks(ID, split, count, seed)
    assert tasks == select_tasks(ID, split, count, seed)
    assert len(tasks) == len(set(tasks)) == min(count, 8 * len(KINDS)) and all(t.split is split for t in tasks)
    per_kind = Counter(t.kind for t in tasks)
    shares = [per_kind[k] for k in KINDS]
    assert max(shares) - min(shares) <= 1
    # A larger choice contains the smaller one: growing a run keeps what it has played.
    assert select_tasks(ID, split, count + 3, seed)[: len(tasks)] == tasks


def test_another_seed_chooses_other_tasks() -> None:
    assert len({select_tasks(ID, Split.TRAIN, 8, seed) for seed in range(5)}) > 1


def test_no_task_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"0 train tasks of tests\.toy:Toy-v0 asked for, 32 there; need at least 1"):
        select_tasks(ID, Split.TRAIN, 0, 0)
    with pytest.raises(ConfigError, match=r"3 train tasks of .* asked for, 0 there; need at least 1"):
        select_tasks(ID, Split.TRAIN, 3, 0, fair=lambda task: False)


def test_results_say_which_games_were_played() -> None:
    assert env_label(ID) == ID
    assert env_label("ALFWorld-v0") == "ALFWorld-v0 (ALFWorld engine, own layouts)"


@given(st.integers(1, 12), st.integers(0, 3), st.integers(0, 30))
def test_a_task_that_is_left_out_gives_its_place_to_another_of_its_kind(count: int, seed: int, which: int) -> None:
    tasks = select_tasks(ID, Split.TRAIN, count, seed)
    out = tasks[which % len(tasks)]
    others = select_tasks(ID, Split.TRAIN, count, seed, without=(out.name,))
    assert out not in others and len(others) == len(tasks)
    assert sorted(t.kind for t in others) == sorted(t.kind for t in tasks) and len(set(tasks) - set(others)) == 1


def test_no_task_may_be_left() -> None:
    names = [t.name for t in env_class(ID).tasks(Split.DEV)]
    with pytest.raises(ConfigError, match=r"without_tasks=.* no dev task of .* is left"):
        select_tasks(ID, Split.DEV, 3, 0, without=names)
