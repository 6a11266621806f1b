"""ScienceWorld on its real engine: episodes, determinism, and what happens when the Java process fails.

One Java process serves most tests; the ones about faults start their own. About a minute and a half on two cores.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from envs import jvm, scienceworld
from envs.base import Split, TextEnv
from envs.errors import EngineError, UnknownTaskError
from envs.scienceworld import ScienceWorldEnv
from tests.processes import gone

pytestmark = pytest.mark.integration

_sizes, _engine_splits = scienceworld.split_sizes, scienceworld.engine_splits

WALK = (
    *("look around", "teleport to kitchen", "look around", "open cupboard", "look in cupboard", "open fridge"),
    *("look in fridge", "open drawer in counter", "look in drawer", "inventory", "look at counter"),
    *("teleport to greenhouse", "open bee hive", "look around", "wait", "look around", "wait", "look around"),
    *("teleport to outside", "look around", "wait", "look around", "teleport to workshop", "look around", "wait1"),
)
"""25 steps that show what containers hold and where bees fly; no `focus on`, so that nothing ends early."""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "bopo-cache"
    monkeypatch.setenv("BOPO_RAY_CACHE", str(folder))
    return folder


@pytest.fixture
def env() -> Iterator[ScienceWorldEnv]:
    env = ScienceWorldEnv()
    yield env
    env.close()


@pytest.fixture
def fresh_process() -> Iterator[None]:
    """Neither inherits a Java process nor leaves one."""
    jvm.shutdown()
    yield
    jvm.shutdown()


def play(env: ScienceWorldEnv, task: str, actions: tuple[str, ...] = WALK) -> list[object]:
    """Everything that an episode shows."""
    seen: list[object] = [env.reset(options={"task": task})]
    for action in actions:
        *step, info = env.step(action)
        seen.append((*step, info))
        if step[2] or step[3]:
            break
    return seen


def test_gymnasium_accepts_it() -> None:
    env = gymnasium.make("ScienceWorld-v0")
    assert isinstance(env.unwrapped, TextEnv)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.parametrize("task", ["find-animal/1", "lifespan-longest-lived/0", "chemistry-mix-paint-secondary-color/1"])
def test_the_expert_plan_succeeds(env: ScienceWorldEnv, task: str) -> None:
    text, info = env.reset(options={"task": task, "expert_plan": True})
    assert text.startswith("This room is called")
    assert info["task"] == task and info["task_text"].startswith("Your task is to")
    assert (info["score"], info["success"], info["outcome"], info["moves"]) == (0, False, 0.0, 0)
    plan, rewards = info["expert_plan"], []
    for at, action in enumerate(plan, start=1):
        text, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        assert env.observation_space.contains(text) and info["moves"] == at
        assert terminated is (at == len(plan)) and not truncated
    assert (info["score"], info["success"], info["outcome"]) == (100, True, 1.0)
    assert sum(rewards) == pytest.approx(1.0)
    assert len(plan) <= 8


def test_a_plan_is_made_once_and_kept_on_disk(env: ScienceWorldEnv, cache: Path) -> None:
    made = []
    plans = scienceworld.PlanCache()

    def make() -> scienceworld.Plan:
        made.append(1)
        return env._make_plan("find-plant", 2, "easy")

    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(lambda _: plans.get("find-plant/2", "easy", make), range(4)))
    again = scienceworld.PlanCache().get("find-plant/2", "easy", make)
    assert made == [1] and set(first) == {again} and again.verified
    (file,) = cache.glob("*/easy/find-plant/2.json")
    file.write_text('{"actions": ["look')
    assert scienceworld.PlanCache().get("find-plant/2", "easy", make) == again and made == [1, 1]
    assert "verified" in file.read_text()


def test_asking_for_a_plan_leaves_the_episode_as_it_is(env: ScienceWorldEnv) -> None:
    plain = env.reset(options={"task": "find-living-thing/5"}), env.step("look around")
    text, info = env.reset(options={"task": "find-living-thing/5", "expert_plan": True})
    assert info.pop("expert_plan")
    assert ((text, info), env.step("look around")) == plain


def test_a_wrong_focus_terminates_with_outcome_0(env: ScienceWorldEnv) -> None:
    env.reset(options={"task": "boil/0"})
    env.step("teleport to kitchen")
    _, reward, terminated, truncated, info = env.step("focus on table")
    assert (reward, terminated, truncated) == (-1.0, True, False)
    assert (info["score"], info["success"], info["outcome"], info["moves"]) == (-100, False, 0.0, 2)
    with pytest.raises(ResetNeeded):
        env.step("look around")


def test_the_step_limit_truncates_and_counts_every_action() -> None:
    env = ScienceWorldEnv(max_steps=3)
    env.reset(options={"task": "boil/0"})
    ends = [env.step(action)[2:4] for action in ("look around", "inventory", "no such action \ud800\n\\")]
    assert ends == [(False, False), (False, False), (False, True)]
    with pytest.raises(ResetNeeded):
        env.step("look around")
    env.close()


def test_a_focus_at_the_limit_is_terminated_not_truncated() -> None:
    env = ScienceWorldEnv(max_steps=2)
    env.reset(options={"task": "boil/0"})
    env.step("teleport to kitchen")
    assert env.step("focus on table")[2:4] == (True, False)
    env.close()


def test_admissible_actions_come_only_on_request(env: ScienceWorldEnv) -> None:
    task = {"task": "find-non-living-thing/0"}
    _, info = env.reset(options=task)
    assert "admissible" not in info and "expert_plan" not in info
    assert "admissible" not in env.step("look around")[4]
    _, info = env.reset(options={**task, "admissible": True})
    assert "teleport to kitchen" in info["admissible"] and isinstance(info["admissible"], tuple)
    after = env.step("teleport to kitchen")[4]["admissible"]
    assert after != info["admissible"] and list(after) == sorted(after)


def test_the_seed_picks_a_training_task(env: ScienceWorldEnv) -> None:
    picked = [env.reset(seed=seed)[1]["task"] for seed in (1, 2, 1)]
    assert picked[0] == picked[2] != picked[1]
    assert set(picked) <= {task.name for task in env.tasks(Split.TRAIN)}


def test_electrical_tasks_keep_their_actions() -> None:
    for simplifications in ("easy", "teleportAction,openDoors,noElectricalAction"):
        env = ScienceWorldEnv(simplifications=simplifications)
        env.reset(options={"task": "power-component/1"})
        env.step("teleport to workshop")
        text = env.step("connect battery anode to yellow wire terminal 1")[0]
        assert "connected" in text, text
        env.close()


@pytest.mark.parametrize("kind", ["boil", "inclined-plane-friction-named-surfaces", "identify-life-stages-2"])
def test_the_committed_splits_are_the_engines(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import scienceworld.constants

    assert list(scienceworld.constants.ID2TASK.values()) == list(_sizes())
    monkeypatch.setattr(scienceworld.constants, "ID2TASK", {"-": kind})
    assert _engine_splits() == {kind: _sizes()[kind]}


def test_same_task_and_actions_same_texts_in_a_used_a_busy_and_a_second_process() -> None:
    task, others = (
        "grow-fruit/3",
        ("identify-life-stages-1/7", "test-conductivity/11", "mendelian-genetics-known-plant/2"),
    )
    env, other = ScienceWorldEnv(), ScienceWorldEnv()
    first = play(env, task)
    play(other, others[0])
    assert play(env, task) == first, "after another task"
    other.reset(options={"task": others[1]})
    interleaved = [env.reset(options={"task": task})]
    for action in WALK:
        other.step(action)
        interleaved.append(env.step(action))
    assert interleaved == first, "step by step with another task"
    play(env, others[2], WALK[:8])
    assert play(env, task) == first, "after a third task in the same environment"
    env.close()
    other.close()
    jvm.shutdown()
    again = ScienceWorldEnv()
    play(again, others[0], WALK[:5])
    assert play(again, task) == first, "in a second Java process"
    again.close()


def test_objects_made_in_an_episode_are_found_whatever_is_loaded_beside_it() -> None:
    grower, other = ScienceWorldEnv(), ScienceWorldEnv()
    _, info = grower.reset(options={"task": "grow-plant/110", "expert_plan": True})
    alone = play(grower, "grow-plant/110", info["expert_plan"])
    beside: list[object] = [grower.reset(options={"task": "grow-plant/110"})]
    for action in info["expert_plan"]:  # digs soil several times
        other.reset(options={"task": "boil/0"})
        *step, after = grower.step(action)
        beside.append((*step, after))
    assert beside == alone
    grower.close()
    other.close()


def test_threads_share_one_java_process_and_do_not_disturb_each_other() -> None:
    tasks = ["find-plant/4", "melt/2", "find-plant/4", "use-thermometer/9"]
    envs = [ScienceWorldEnv() for _ in tasks]
    with ThreadPoolExecutor(len(tasks)) as pool:
        together = list(pool.map(play, envs, tasks))
    assert len({env._engine.jvm.process.pid for env in envs}) == 1
    assert together[0] == together[2]
    assert together == [play(envs[0], task) for task in tasks]
    for env in envs:
        env.close()


def test_a_used_up_process_is_replaced_while_old_episodes_finish(
    fresh_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jvm, "MAX_LOADS", 2)
    old, new = ScienceWorldEnv(), ScienceWorldEnv()
    old.reset(options={"task": "boil/0"})
    new.reset(options={"task": "boil/1"})
    first = old._engine.jvm
    assert new._engine.jvm is first
    new.reset(options={"task": "boil/1"})
    assert new._engine.jvm is not first and first.alive, "an episode is still in progress there"
    assert old.step("look around")[0].startswith("This room")
    old.reset(options={"task": "boil/0"})
    assert old._engine.jvm is new._engine.jvm and not first.alive
    del old, new


def test_closed_and_forgotten_environments_free_their_worlds(
    fresh_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jvm, "JAVA_OPTIONS", ("-Xmx128m", *jvm.JAVA_OPTIONS[1:]))
    processes = set()
    for at in range(24):
        env = ScienceWorldEnv()
        env.reset(options={"task": "boil/0"})
        processes.add(env._engine.jvm.process.pid)
        if at % 2:
            env.close()
        del env
        gc.collect()
    assert len(processes) == 1


def test_more_environments_than_the_heap_holds_start_another_process(
    fresh_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jvm, "MAX_ENGINES", 2)
    envs = [ScienceWorldEnv() for _ in range(3)]
    seen = [env.reset(options={"task": "boil/0"}) for env in envs]
    processes = [env._engine.jvm.process.pid for env in envs]
    assert processes[0] == processes[1] != processes[2] and seen[0] == seen[2]
    envs[0].close()
    envs[0].reset(options={"task": "boil/0"})
    assert envs[0]._engine.jvm.process.pid == processes[0], "its place was free again"
    for env in envs:
        env.close()


def test_a_killed_process_raises_once_for_each_environment_and_reset_starts_afresh(
    fresh_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    envs = [ScienceWorldEnv(), ScienceWorldEnv()]
    for env in envs:
        env.reset(options={"task": "boil/0"})
    envs[0]._engine.jvm.process.kill()
    for env in envs:
        with pytest.raises(EngineError, match=r"died \(exit code -9\): reset the environment") as caught:
            env.step("look around")
        assert "\n" not in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        with pytest.raises(ResetNeeded):
            env.step("look around")
    for env in envs:
        env.reset(options={"task": "boil/0"})
        assert env.step("look around")[0].startswith("This room")
        env.close()
    assert not [record for record in caplog.records if record.name.startswith("py4j") or record.name == "root"]


def test_a_hung_process_is_killed_after_the_deadline_for_everyone_on_it(fresh_process: None) -> None:
    quick, patient = ScienceWorldEnv(call_timeout_s=4.0), ScienceWorldEnv()
    for env in (patient, quick):
        env.reset(options={"task": "boil/0"})
    pid = quick._engine.jvm.process.pid
    cycle: list[object] = [quick._engine._gateway.jvm.java.util.ArrayList()]
    cycle.append(cycle)
    os.kill(pid, signal.SIGSTOP)
    del cycle
    start = time.monotonic()
    gc.collect()
    assert time.monotonic() - start < 2, "collecting a Java reference waits for no answer"
    failures = {}

    def fail(name: str, env: ScienceWorldEnv) -> None:
        try:
            env.step("look around")
        except EngineError as error:
            failures[name] = str(error)

    threads = [threading.Thread(target=fail, args=pair) for pair in (("quick", quick), ("patient", patient))]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert 3.9 < time.monotonic() - start < 15
    assert failures["quick"] == failures["patient"]
    assert f"{pid} did not answer 'step' within 4 s and was killed" in failures["quick"]
    assert gone(pid)
    quick.close()
    patient.reset(options={"task": "boil/0"})
    assert patient.step("look around")[0].startswith("This room")
    patient.close()


OWNER = textwrap.dedent("""
    import os, sys, time
    from envs.scienceworld import ScienceWorldEnv
    env = ScienceWorldEnv()
    env.reset(options={"task": "boil/0"})
    helper = os.fork()  # a child that outlives its parent must not keep the Java process alive
    if helper == 0:
        time.sleep(60)
        os._exit(0)
    print(env._engine.jvm.process.pid, helper, flush=True)
    time.sleep(60)
""")


def test_the_java_process_ends_with_a_killed_owner() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        java, helper = map(int, owner.stdout.readline().split())
        assert not gone(java, within_s=0.2)
        owner.kill()
        try:
            assert gone(java)
        finally:
            os.kill(helper, signal.SIGKILL)


def _in_child(env: ScienceWorldEnv, pipe: multiprocessing.connection.Connection) -> None:
    try:
        env.step("look around")
    except EngineError as error:
        pipe.send(str(error))
    env.reset(options={"task": "boil/1"})
    pipe.send((env._engine.jvm.process.pid, env.step("look around")[0]))
    env.close()


def test_a_forked_child_starts_its_own_and_leaves_the_parents_alone(env: ScienceWorldEnv) -> None:
    env.reset(options={"task": "boil/0"})
    before = env.step("look around")[0]
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_child, args=(env, there))
    child.start()
    there.close()
    assert here.poll(60) and "belongs to process" in here.recv()
    assert here.poll(60)
    java, text = here.recv()
    child.join(20)
    assert java != env._engine.jvm.process.pid and text.startswith("This room") and gone(java)
    assert env.step("look around")[0] == before


def test_an_unknown_task_changes_nothing(env: ScienceWorldEnv) -> None:
    env.reset(options={"task": "boil/0"})
    with pytest.raises(UnknownTaskError, match="did you mean 'boil/0'"):
        env.reset(options={"task": "boill/0"})
    assert env.step("look around")[0].startswith("This room")
