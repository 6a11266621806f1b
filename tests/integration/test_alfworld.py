"""ALFWorld on its real engine: episodes, the same texts as the package's own, and what happens when a process fails.

About a minute on two cores.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from gymnasium.error import ResetNeeded

from envs import alfworld, alfworld_generate, alfworld_process
from envs import alfworld_games as games
from envs.alfworld import ALFWorldEnv
from envs.alfworld_layouts import KINDS, SCENES
from envs.base import Split, Task
from envs.errors import EngineError, UnknownTaskError
from tests.processes import gone

if find_spec("fast_downward") is None:
    pytest.skip("make alfworld installs it", allow_module_level=True)


def of_kind(kind: str, split: Split = Split.TEST, at: int = 0) -> str:
    return [task.name for task in ALFWorldEnv.tasks(split) if task.kind == kind][at]


COOL = of_kind("pick_cool_then_place_in_recep")
LIGHT = of_kind("look_at_obj_in_light")


@pytest.fixture
def env() -> Iterator[ALFWorldEnv]:
    env = ALFWorldEnv()
    yield env
    env.close()


@pytest.fixture
def fresh_process() -> Iterator[None]:
    """Neither inherits an engine nor leaves one."""
    alfworld_process.shutdown()
    yield
    alfworld_process.shutdown()


def play(env: ALFWorldEnv, task: str) -> list[object]:
    """Everything that an episode by the expert shows."""
    text, info = env.reset(options={"task": task, "expert_plan": True})
    seen: list[object] = [(text, info)]
    for action in info["expert_plan"]:
        seen.append(env.step(action))
    return seen


@pytest.mark.parametrize("split", [Split.TRAIN, Split.TEST])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_won_by_its_stored_plan(env: ALFWorldEnv, kind: str, split: Split) -> None:
    text, info = env.reset(options={"task": of_kind(kind, split, at=3), "expert_plan": True})
    assert text.startswith("You are in the middle of a room.") and "Your task is to: " not in text
    assert info["task_text"].startswith("Your task is to: ") and info["task_text"].endswith(".")
    plan = info["expert_plan"]
    for at, action in enumerate(plan, start=1):
        text, reward, terminated, truncated, info = env.step(action)
        last = at == len(plan)
        assert (reward, terminated, truncated) == (float(last), last, False) and "Nothing happens" not in text
        assert (info["score"], info["success"], info["outcome"], info["moves"]) == (int(last), last, float(last), at)
    with pytest.raises(ResetNeeded):
        env.step("look")


def package_texts(name: str, choose: random.Random, steps: int) -> list[tuple[str, str, list[str], bool]]:
    """(command, text, admissible commands, won) as the package itself plays it; every third command is random."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALFWORLD_DATA", os.getcwd())  # importing the package would set it
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs import PddlEnv

    game = games.source().game(name)
    package = AlfredDemangler(PddlEnv(textworld.EnvInfos(admissible_commands=True, won=True)))
    argv = sys.argv
    try:  # the package's translator sets sys.argv
        package.load({"pddl_domain": game.domain, "grammar": game.grammar, "pddl_problem": game.problem})
        state = package.reset()
        seen = [("", state.feedback.split("\n\n")[1], state["admissible_commands"], state["won"])]
        plan = iter(game.plan)
        for at in range(steps):
            admissible = state["admissible_commands"]
            command = next(plan, "look") if at % 3 else choose.choice([*admissible, "go to the moon 1", "look "])
            state, _, done = package.step(command)
            seen.append((command, state.feedback, state["admissible_commands"], state["won"]))
            if done:
                break
    finally:
        sys.argv = argv
    return seen


@pytest.mark.parametrize("name", [of_kind("pick_heat_then_place_in_recep", Split.DEV), LIGHT])
def test_texts_commands_and_goal_are_the_packages_own(env: ALFWorldEnv, name: str) -> None:
    theirs = package_texts(name, random.Random(7), steps=12)
    text, info = env.reset(options={"task": name, "admissible": True})
    ours = [("", text, list(info["admissible"]), info["success"])]
    for command, *_ in theirs[1:]:
        text, _, _, _, info = env.step(command)
        ours.append((command, text, list(info["admissible"]), info["success"]))
    assert ours == theirs
    assert {text for _, text, *_ in theirs} >= {"Nothing happens."} or len(theirs) > 10


def test_plans_and_admissible_actions_come_only_on_request(env: ALFWorldEnv) -> None:
    _, info = env.reset(options={"task": COOL})
    assert not {"admissible", "expert_plan"} & (set(info) | set(env.step("look")[4]))
    _, info = env.reset(options={"task": COOL, "admissible": True})
    assert "go to fridge 1" in info["admissible"] and list(info["admissible"]) == sorted(info["admissible"])
    assert "open fridge 1" in env.step("go to fridge 1")[4]["admissible"]


def test_the_step_limit_truncates_and_a_goal_at_the_limit_terminates() -> None:
    plan = games.source().game(COOL).plan
    for limit, end in ((len(plan), (True, False)), (len(plan) - 1, (False, True))):
        env = ALFWorldEnv(max_steps=limit)
        env.reset(options={"task": COOL})
        ends = [env.step(action)[2:4] for action in plan[:limit]]
        assert ends == [(False, False)] * (limit - 1) + [end]
        env.close()


@pytest.mark.parametrize("action", ["", "dance", "GO TO FRIDGE 1", "\ud800\n\\", "look\n{}", "x" * 100_000])
def test_what_is_no_command_changes_nothing_and_counts(env: ALFWorldEnv, action: str) -> None:
    before = env.reset(options={"task": COOL, "admissible": True})[1]["admissible"]
    text, reward, terminated, truncated, info = env.step(action)
    assert (text, reward, terminated, truncated) == ("Nothing happens.", 0.0, False, False)
    assert info["moves"] == 1 and info["admissible"] == before


def test_the_same_in_a_used_a_second_and_a_busy_engine(env: ALFWorldEnv, fresh_process: None) -> None:
    first = play(env, COOL)
    play(env, LIGHT)
    assert play(env, COOL) == first
    alfworld_process.shutdown()
    with ThreadPoolExecutor(3) as pool:
        others = [ALFWorldEnv() for _ in range(3)]
        assert list(pool.map(play, others, [COOL, LIGHT, COOL]))[::2] == [first, first]
    assert len({other._engine.pid for other in others}) == 3
    for other in others:
        other.close()


def test_an_engine_is_kept_between_episodes_and_ends_with_close(env: ALFWorldEnv) -> None:
    env.reset(options={"task": LIGHT})
    engine = env._engine
    env.reset(options={"task": COOL})
    assert env._engine is engine
    start = time.monotonic()
    other = ALFWorldEnv()
    other.reset(options={"task": LIGHT})
    assert time.monotonic() - start < 5, "the nursery forks it, nothing is imported again"
    other.close()
    env.close()
    env.close()
    assert gone(engine.pid)
    env.reset(options={"task": LIGHT})
    assert env._engine.pid != engine.pid


def test_an_engine_is_replaced_after_many_loads(env: ALFWorldEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alfworld_process, "MAX_LOADS", 2)
    engines = []
    for _ in range(3):
        env.reset(options={"task": LIGHT})
        engines.append(env._engine.pid)
    assert engines[0] == engines[1] != engines[2] and gone(engines[0])


def test_a_killed_engine_raises_once_and_reset_starts_afresh(env: ALFWorldEnv) -> None:
    other = ALFWorldEnv()
    other.reset(options={"task": LIGHT})
    expected = play(env, LIGHT)
    env.reset(options={"task": COOL})
    os.kill(env._engine.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="died: reset the environment") as caught:
        env.step("look")
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(ResetNeeded):
        env.step("look")
    assert play(env, LIGHT) == expected
    assert other.step("look")[0].startswith("You are"), "the others don't notice"
    other.close()


def test_a_killed_nursery_is_replaced_and_its_engines_live_on(env: ALFWorldEnv) -> None:
    env.reset(options={"task": LIGHT})
    nursery = alfworld_process._nursery.process
    nursery.kill()
    other = ALFWorldEnv()
    other.reset(options={"task": LIGHT})
    assert alfworld_process._nursery.process.pid != nursery.pid
    assert env.step("look")[0] == other.step("look")[0]
    other.close()


def test_a_hung_engine_is_killed_after_the_deadline() -> None:
    env = ALFWorldEnv(call_timeout_s=2.0)
    env.reset(options={"task": LIGHT})
    pid = env._engine.pid
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(EngineError, match=f"{pid} did not answer 'step' within 2 s and was killed"):
        env.step("look")
    assert 1.9 < time.monotonic() - start < 10 and gone(pid)
    env.reset(options={"task": LIGHT})
    assert env.step("look")[0].startswith("You are")
    env.close()


@pytest.mark.parametrize("part", ["domain", "grammar", "problem"])
def test_a_game_that_the_engine_refuses_is_one_line(part: str) -> None:
    game = games.source().game(LIGHT)
    parts = {"domain": game.domain, "grammar": game.grammar, "problem": game.problem}
    engine = alfworld_process.start()
    with pytest.raises(EngineError, match=r"raised .+ in 'load': reset the environment") as caught:
        engine.load(**parts | {part: parts[part][: len(parts[part]) // 2]})
    assert "\n" not in str(caught.value) and not engine.usable


OWNER = textwrap.dedent("""
    import os, sys, time
    from envs.alfworld import ALFWorldEnv, alfworld_process
    env = ALFWorldEnv()
    env.reset(options={"task": sys.argv[1]})
    helper = os.fork()  # a child that outlives its parent must not keep the processes alive
    if helper == 0:
        time.sleep(60)
        os._exit(0)
    print(env._engine.pid, alfworld_process._nursery.process.pid, helper, flush=True)
    time.sleep(60)
""")


def test_engine_and_nursery_end_with_a_killed_owner() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, LIGHT], stdout=subprocess.PIPE, text=True) as owner:
        engine, nursery, helper = map(int, owner.stdout.readline().split())
        assert not gone(engine, within_s=0.2)
        owner.kill()
        try:
            assert gone(engine) and gone(nursery)
        finally:
            os.kill(helper, signal.SIGKILL)


def _in_child(env: ALFWorldEnv, pipe: multiprocessing.connection.Connection) -> None:
    try:
        env.step("look")
    except EngineError as error:
        pipe.send(str(error))
    env.reset(options={"task": LIGHT})
    pipe.send((env._engine.pid, env.step("look")[0]))
    env.close()


def test_a_forked_child_starts_its_own_and_leaves_the_parents_alone(env: ALFWorldEnv) -> None:
    env.reset(options={"task": LIGHT})
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_child, args=(env, there))
    child.start()
    there.close()
    assert here.poll(60) and "belongs to process" in here.recv()
    assert here.poll(60)
    pid, text = here.recv()
    child.join(20)
    assert pid != env._engine.pid and gone(pid)
    assert env.step("look")[0] == text


def test_an_unknown_task_changes_nothing(env: ALFWorldEnv) -> None:
    env.reset(options={"task": LIGHT})
    with pytest.raises(UnknownTaskError, match="did you mean"):
        env.reset(options={"task": "look_at_obj_in_light/Boook-None-DeskLamp-301-0"})
    assert env.step("look")[4]["moves"] == 1


def test_official_games_are_played_where_the_variable_names_them(
    env: ALFWorldEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder as `alfworld-download` leaves it, with games of our own in the official form."""
    game = games.source().game(LIGHT)
    sentence = game.task_text.removeprefix("Your task is to: ")
    record = {
        "pddl_domain": game.domain, "grammar": game.grammar.replace("UNKNOWN GOAL.", sentence),
        "pddl_problem": game.problem, "solvable": True, "walkthrough": game.plan,
    }  # fmt: skip
    for split in ("train", "valid_seen", "valid_unseen"):
        trial = tmp_path / "json_2.1.1" / split / "look_at_obj_in_light-Book-None-DeskLamp-301" / f"trial_{split}"
        trial.mkdir(parents=True)
        (trial / "game.tw-pddl").write_text(json.dumps(record))
    expected = play(env, LIGHT)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    name = "look_at_obj_in_light/Book-None-DeskLamp-301-trial_valid_unseen"
    assert env.tasks(Split.TEST) == (Task("ALFWorld-v0", name, Split.TEST),)
    assert env.label() == "ALFWorld engine, official games"
    played = play(env, name)
    assert played[0][1].pop("task") == name and expected[0][1].pop("task") == LIGHT
    assert played == expected


def test_generated_games_are_won_and_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = ["--train", "2", "--dev", "1", "--test", "6", "--seed", "5"]
    for processes in ("1", "2"):
        alfworld.main(["generate", "--out", str(tmp_path / processes), *counts, "--processes", processes])
    assert "train / dev / test = 2 / 1 / 6" in capsys.readouterr().out
    assert (tmp_path / "1" / games.FILE).read_bytes() == (tmp_path / "2" / games.FILE).read_bytes()
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "1"))
    assert {task.kind for task in ALFWorldEnv.tasks(Split.TEST)} == set(KINDS)
    assert all(int(t.name.split("-")[-2]) % 100 in SCENES[Split.TEST] for t in ALFWorldEnv.tasks(Split.TEST))
    alfworld.main(["verify"])
    assert "9 plans played, 0 not won" in capsys.readouterr().out


def test_the_bench_measures_all_ways() -> None:
    code = "from experiments.bench_alfworld import run; print(*(row.name for row in run(0.1)), sep='|')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, again, *more = done.stdout.strip().split("|")
    assert (first, again) == ("ALFWorld", "ALFWorld, the same game again") and len(more) in (1, 2)


def test_the_shipped_plan_is_what_the_expert_does() -> None:
    engine = alfworld_process.start()
    for kind in KINDS:
        name = of_kind(kind, Split.DEV, at=1)
        assert alfworld_generate.solve(engine, games.source().layout(name)) == games.source().game(name).plan
    engine.close()
