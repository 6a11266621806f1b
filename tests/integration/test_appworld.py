"""AppWorld on its real engine, with our own tasks: the contract, hostile code, a server that dies."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from envs.appworld import AppWorldEnv, client, data, own
from envs.appworld.__main__ import main
from envs.base import Split
from envs.errors import ConfigError, EngineError, UnknownTaskError
from tests.processes import gone, removed

TASK = "text-contact/1"
HANG = "while True:\n  try:\n    for i in iter(int, 1): i + 1\n  except BaseException: pass"


@pytest.fixture(scope="module", autouse=True)
def _tasks_of_our_own() -> Iterator[None]:
    try:
        client.find_python()
    except ConfigError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("APPWORLD_ROOT", raising=False)
        patch.setenv("OPENAI_API_KEY", "sk-secret")
        yield
    client.shutdown()


@pytest.fixture
def env() -> Iterator[AppWorldEnv]:
    env = AppWorldEnv()
    yield env
    env.close()


def play(env: AppWorldEnv, task: str) -> list[object]:
    text, info = env.reset(options={"task": task, "expert_plan": True})
    return [(text, info), *(env.step(line) for line in info["expert_plan"])]


def server_of(env: AppWorldEnv) -> client.Server:
    assert env._session is not None
    return env._session.server


def test_the_world_is_the_verified_one_and_nothing_of_it_is_in_the_repository() -> None:
    folder = data.data_folder()
    assert own.fingerprint(folder) == own.VERIFIED
    here = Path(own.__file__).resolve().parents[2]
    assert here not in folder.resolve().parents


def test_a_task_of_each_kind_is_judged_right_on_the_engine() -> None:
    folder = data.data_folder()
    own.verify(folder, [task for task in own.listed(folder) if task.endswith("_9")])


def test_more_tasks_of_our_own_are_made_played_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "more"
    counts = ["--train", "8", "--dev", "16", "--test", "8"]
    assert main(["generate", "--out", str(out), *counts, "--seed", "1"]) == 0
    said = capsys.readouterr()
    assert (
        f"8 train, 16 dev, 8 test in {out}" in said.out and f"export APPWORLD_ROOT={out}" in said.out and said.err == ""
    )
    assert [path.name for path in tmp_path.iterdir()] == ["more"], "nothing is left of the making"
    monkeypatch.setenv("APPWORLD_ROOT", str(out))
    assert [len(AppWorldEnv.tasks(split)) for split in Split] == [8, 16, 8] and data.world() == f"{data.OWN}, seed 1"
    env = AppWorldEnv()
    assert play(env, "pay-contact/3")[-1][-1]["success"], "a dev task, by its plan"  # type: ignore[index]
    env.close()
    assert main(["generate", "--out", str(out)]) == 2, "nothing is written over"


def test_check_env() -> None:
    env = AppWorldEnv(max_steps=3)
    check_env(env, skip_render_check=True)
    env.close()


def test_the_expert_plan_succeeds(env: AppWorldEnv) -> None:
    text, info = env.reset(options={"task": TASK, "expert_plan": True})
    assert text == "A Python interpreter is ready; `apis` is defined."
    assert info["task"] == TASK and info["task_text"].startswith("Send a text message to my")
    assert (info["score"], info["success"], info["outcome"], info["moves"]) == (0.0, False, 0.0, 0)
    plan = info["expert_plan"]
    for at, line in enumerate(plan, start=1):
        text, reward, terminated, truncated, info = env.step(line)
        assert "failed" not in text and info["moves"] == at and not truncated
        assert terminated is (at == len(plan)) and reward == float(terminated)
    assert (info["score"], info["success"], info["outcome"]) == (100.0, True, 1.0)
    with pytest.raises(ResetNeeded):
        env.step("print(1)")


def test_completing_without_doing_scores_what_passes(env: AppWorldEnv) -> None:
    env.reset(options={"task": "note-total/2"})
    _, reward, terminated, truncated, info = env.step("apis.supervisor.complete_task(answer=-1)")
    assert (reward, terminated, truncated) == (0.0, True, False)
    assert (info["score"], info["success"], info["outcome"]) == (50.0, False, 0.0)


WRONG = {
    "deny the others": (
        "approve-requests/1",
        "for r in requests: r in small or apis.venmo.deny_payment_request(payment_request_id=r['payment_request_id'], "
        "access_token=venmo)",
    ),
    "switch the alarm off and clear its days": (
        "move-alarm/1",
        "apis.phone.update_alarm(alarm_id=alarm['alarm_id'], enabled=False, repeat_days=[], access_token=phone)",
    ),
    "rename the tasks": (
        "finish-tasks/1",
        "for t in urgent: apis.todoist.update_task(task_id=t['task_id'], title='x', priority='low', "
        "description='gone', access_token=todoist)",
    ),
    "complete what was to be added": (
        "shopping-tasks/1",
        "for t in apis.todoist.show_tasks(project_id=project['project_id'], access_token=todoist)['no_section_tasks']: "
        "apis.todoist.update_task(task_id=t['task_id'], is_completed=True, access_token=todoist)",
    ),
    "add a section": (
        "shopping-tasks/1",
        "apis.todoist.create_section(project_id=project['project_id'], name='x', access_token=todoist)",
    ),
    "change the account's name": (
        "pay-contact/1",
        "apis.venmo.update_account_name(first_name='X', access_token=venmo)",
    ),
    "drop the text message": (
        TASK,
        "apis.phone.delete_text_message(text_message_id=1, access_token=phone)",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_doing_more_than_the_task_needs_is_no_success(what: str, env: AppWorldEnv) -> None:
    task, more = WRONG[what]
    _, info = env.reset(options={"task": task, "expert_plan": True})
    for line in (*info["expert_plan"][:-1], more):
        assert env.step(line)[0] == "Execution successful."
    _, reward, terminated, _, info = env.step(info["expert_plan"][-1])
    assert (reward, terminated, info["success"]) == (0.0, True, False) and 0 < info["score"] < 100


def test_the_step_limit_truncates_and_a_solution_not_marked_complete_fails() -> None:
    env = AppWorldEnv(max_steps=5)
    _, info = env.reset(options={"task": TASK, "expert_plan": True})
    *_, last = [env.step(line) for line in info["expert_plan"][:5]]
    assert last[1:4] == (0.0, False, True)
    assert last[4]["success"] is False and 0 < last[4]["score"] < 100
    with pytest.raises(ResetNeeded):
        env.step("print(1)")


def test_what_code_prints_is_seen_bounded_and_state_stays(env: AppWorldEnv) -> None:
    env.reset(options={"task": TASK})
    assert env.step("x = 20 + 1")[0] == "Execution successful."
    assert env.step("print(x * 2)")[0].strip() == "42"
    assert "NameError" in env.step("y")[0]
    assert "Syntax error" in env.step("y =")[0]
    assert env.step("no such action \ud800\n\\")[0].startswith("Execution failed")
    text = env.step("print('a' * 3000, 'b' * 30_000)")[0]
    assert len(text) < 4100 and "characters left out" in text and text in env.observation_space
    assert "x" in env.step("for i in range(2):\n    print('x', i)")[0], "several lines do too"


def test_same_task_and_actions_same_texts_alone_together_and_in_a_second_server() -> None:
    envs = [AppWorldEnv() for _ in range(3)]
    first = play(envs[0], "approve-requests/3")
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(play, envs, ["approve-requests/3", "pay-contact/4", "approve-requests/3"]))
    assert together[0] == together[2] == first
    client.shutdown()
    looks = ["print(hash('a'), id)", "print(object(), {*'abcdef'})", "import random; print(random.random())"]
    looks += ["import uuid; print(uuid.uuid4())", "import os; print(os.getpid(), dict(os.environ))"]
    looks += ["import datetime; print(datetime.datetime.now())", "1/0"]
    seen = []
    for env in envs[:2]:
        env.reset(options={"task": TASK})
        seen.append([env.step(look) for look in looks])
    assert seen[0] == seen[1]
    assert play(envs[0], "approve-requests/3") == first
    for env in envs:
        env.close()


def test_the_seed_picks_a_training_task(env: AppWorldEnv) -> None:
    picked = [env.reset(seed=seed)[1]["task"] for seed in (1, 2, 1)]
    assert picked[0] == picked[2] != picked[1]
    assert set(picked) <= {task.name for task in env.tasks(Split.TRAIN)}
    with pytest.raises(UnknownTaskError):
        env.reset(options={"task": "pay-contact/99"})
    assert env.step("print(7)")[0].strip() == "7", "an unknown task changes nothing"


# What an agent may try. `P` reaches past the engine's own guard, which is a list of names.
P = "__import__('posix')"
OPEN = f"getattr({P}, 'open')"
READ = f"getattr({P}, 'read')({OPEN}({{!r}}, 0), 100)"
HOSTILE = {
    "read the key from its environment": "print(__import__('os').environ)",
    "read the key from the environment it was started with": "print(" + READ.format("/proc/self/environ") + ")",
    "read the key from its owner": "print(" + READ.format(f"/proc/{os.getpid()}/environ") + ")",
    "read the answer": "print(" + READ.format("{truth}/answer.json") + ")",
    "read the solution": "from pathlib import Path; print(Path({truth!r}, 'plan.json').read_text())",
    "read how the tasks are made": "print(" + READ.format(str(client.ENGINE / "kinds.py")) + ")",
    "list the home folder": "getattr(" + P + ", 'listdir')({home!r})",
    "read this repository": "print(" + READ.format(__file__) + ")",
    "write outside": "print('written', " + OPEN + "({outside!r}, 0o101))",
    "write into the data": "print('written', " + OPEN + "({truth!r} + '/../specs.json', 1))",
    "write into the engine": "import appworld; print('written', " + OPEN + "(appworld.__file__, 1))",
    "open a socket": "__import__('socket').create_connection(('127.0.0.1', {port}), 2); print('connected')",
    "listen": "__import__('socket').create_server(('127.0.0.1', 0)); print('connected')",
    "send a datagram": "s = __import__('socket'); s.socket(s.AF_INET, s.SOCK_DGRAM); print('connected')",
    "spawn a process": P + ".posix_spawn('/bin/sh', ['sh', '-c', 'echo spawned > {outside}'], {{}})",
    "fork": "f = getattr(" + P + ", 'fork'); f() or f(); print('forked')",
    "replace itself": P + ".execv('/bin/sh', ['sh', '-c', 'echo spawned > {outside}'])",
    "kill its owner": "getattr(" + P + f", 'kill')({os.getpid()}, 15); print('killed')",
    "kill the server": "getattr(" + P + ", 'kill')(" + P + ".getppid(), 9); print('killed')",
    "trace its owner": f"print('traced', __import__('ctypes').CDLL(None).ptrace(16, {os.getpid()}, 0, 0) == 0 or 1/0)",
    "load a namespace": "__import__('ctypes').CDLL(None).unshare(0x10000000) and 1/0; print('unshared')",
    "become root": "getattr(" + P + ", 'setuid')({other}); print('changed')",
    "take all memory": "x = [0] * 10**10; print('taken')",
    "take memory bit by bit": "b = 'a' * 10\nwhile True: b += b",
    "write a large file": "f = " + OPEN + "('big', 0o102); w = getattr(" + P + ", 'write')\n"
    "for _ in range(100): w(f, bytes(1 << 20))",
    "start threads without end": "wait = __import__('select').select\n"
    "try:\n  while True: __import__('_thread').start_new_thread(wait, ([], [], [], 3))\n"
    "except RuntimeError:\n  wait([], [], [], 4)\n  raise",
}


@pytest.fixture(scope="module")
def listener() -> Iterator[int]:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_code_is_refused_and_the_episode_goes_on(
    what: str, env: AppWorldEnv, tmp_path: Path, listener: int
) -> None:
    _, info = env.reset(options={"task": TASK, "expert_plan": True})
    missing = [layer for layer, on in env.confinement.items() if not on and (layer != "user" or os.geteuid() == 0)]
    if missing:
        pytest.skip(f"this machine lacks {missing}")
    outside = tmp_path / "outside"
    tmp_path.chmod(0o777)
    truth = data.data_folder() / "tasks" / "text-contact_1" / "ground_truth"
    line = HOSTILE[what].format(
        truth=str(truth), home=str(Path.home()), outside=str(outside), port=listener, other=os.geteuid() + 1
    )
    text = env.step(line)[0]
    allowed = what == "read the key from its environment"
    assert allowed or text.startswith("Execution failed"), text
    assert "Syntax error" not in text and "Usage of the following" not in text, "it reached past the engine's guard"
    for sign in ("sk-secret", "complete_task", "def draw", "spawned", "written", "connected", "forked", "killed"):
        assert sign not in text.replace(line, "").partition("Error")[0].rpartition("\n    ")[0], text
    assert not outside.exists()
    for step in info["expert_plan"]:
        *_, info = env.step(step)
    assert info["success"]


def test_code_that_can_not_be_stopped_is_undone_and_the_episode_goes_on() -> None:
    env, beside = AppWorldEnv(call_timeout_s=3.0), AppWorldEnv()
    _, info = env.reset(options={"task": TASK, "expert_plan": True})
    beside.reset(options={"task": TASK})
    plan = info["expert_plan"]
    for line in plan[:3]:
        env.step(line)
    pid = env._session.pid
    start = time.monotonic()
    text, reward, terminated, truncated, info = env.step(f"phone = None\n{HANG}")
    assert time.monotonic() - start < 15 and gone(pid)
    assert text == (
        "Execution failed. The code did not end within 3 s. Everything that this action did was undone."
    ) and (reward, terminated, truncated, info["moves"]) == (0.0, False, False, 4)
    assert beside.step("print(1)")[0].strip() == "1", "others did not notice"
    assert "ended its interpreter" in env.step("getattr(__import__('posix'), '_exit')(0)")[0]
    assert "ended its interpreter" in env.step("__import__('ctypes').string_at(0)")[0]
    for line in plan[3:]:
        *_, info = env.step(line)
    assert info["success"] and info["moves"] == len(plan) + 3
    env.close()
    beside.close()


def test_code_can_not_forge_its_verdict_nor_leave_anything_behind(env: AppWorldEnv) -> None:
    env.reset(options={"task": "pay-contact/2"})
    forge = "import appworld.evaluator as e; e.TestTracker.success = property(lambda self: True); import builtins"
    assert env.step(f"{forge}; builtins.left = 1; e.evaluate_task = lambda *a, **k: e.TestTracker()")[0]
    *_, info = env.step("apis.supervisor.complete_task()")
    assert info["success"] is False
    env.reset(options={"task": "pay-contact/2"})
    assert "AttributeError" in env.step("import builtins; print(builtins.left)")[0]
    tamper = "import glob, os; p = [d for d, _, f in os.walk('.')]; print(p)"
    env.step(tamper)
    *_, info = env.step("apis.supervisor.complete_task()")
    assert info["success"] is False


def test_databases_that_were_tampered_with_do_not_pass(env: AppWorldEnv) -> None:
    _, info = env.reset(options={"task": TASK, "expert_plan": True})
    for line in info["expert_plan"][:-1]:
        env.step(line)
    path = "experiments/outputs/{}/tasks/text-contact_1/dbs/phone.jsonl"
    write = f"""
        posix, name = {P}, {path!r}.format(__import__('os').environ['TMPDIR'].rpartition('/')[2])
        def tamper():
            while True:
                try:
                    file = getattr(posix, 'open')(name, 0o1101)
                    getattr(posix, 'write')(file, b'["ATTACH DATABASE x AS y", [], false]')
                    getattr(posix, 'close')(file)
                except OSError:  # the engine writes it anew
                    pass
        posix and __import__('_thread').start_new_thread(tamper, ())
    """
    assert env.step(textwrap.dedent(write))[0] == "Execution successful."
    *_, info = env.step("apis.supervisor.complete_task()")
    assert info["success"] is False


def test_an_episode_that_cannot_be_saved_fails(env: AppWorldEnv) -> None:
    _, info = env.reset(options={"task": TASK, "expert_plan": True})
    session = env._session
    for line in info["expert_plan"]:
        session.execute(line)
    assert session.evaluate()[0] is True
    wait = "lock = __import__('_thread').allocate_lock(); lock.acquire()"
    later = f"lambda: [lock.acquire(True, 2), getattr({P}, '_exit')(0)]"
    start = f"{wait}; __import__('_thread').start_new_thread({later}, ())"
    assert session.execute(start)[0].strip() == "Execution successful."
    assert gone(session.pid)
    assert session.evaluate() == (False, 0, 1)


def test_a_killed_server_raises_once_for_each_environment_and_reset_starts_afresh() -> None:
    envs = [AppWorldEnv(), AppWorldEnv()]
    for env in envs:
        env.reset(options={"task": TASK})
    server, children = server_of(envs[0]), [env._session.pid for env in envs]
    assert server is server_of(envs[1])
    server.process.kill()
    assert all(gone(pid) for pid in children), "no child outlives the server"
    for env in envs:
        with pytest.raises(EngineError, match="reset the environment to go on afresh") as caught:
            env.step("print(1)")
        assert "\n" not in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        with pytest.raises(ResetNeeded):
            env.step("print(1)")
    for env in envs:
        env.reset(options={"task": TASK})
        assert env.step("print(1)")[0].strip() == "1"
        env.close()
    assert removed(server.folder)


def test_a_hung_server_is_killed_after_the_deadline(env: AppWorldEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    env.reset(options={"task": TASK})
    server = server_of(env)
    os.kill(server.process.pid, signal.SIGSTOP)
    monkeypatch.setattr(client, "START_TIMEOUT_S", 2.0)
    with pytest.raises(EngineError, match="died or hung and was killed"):
        AppWorldEnv().reset(options={"task": TASK})
    assert gone(server.process.pid)
    monkeypatch.undo()
    env.reset(options={"task": TASK})
    assert env.step("print(1)")[0].strip() == "1"


def test_closed_and_forgotten_environments_leave_no_process_and_no_file() -> None:
    kept = AppWorldEnv()
    kept.reset(options={"task": TASK})
    server = server_of(kept)
    pids = []
    for at in range(4):
        env = AppWorldEnv()
        env.reset(options={"task": TASK})
        pids.append(env._session.pid)
        if at % 2:
            env.close()
        del env
        gc.collect()
    assert all(gone(pid) for pid in pids)
    assert server.folder.exists()
    client.shutdown()
    assert gone(server.process.pid) and removed(server.folder)


OWNER = textwrap.dedent("""
    import os, sys, time
    from envs.appworld import AppWorldEnv
    env = AppWorldEnv()
    env.reset(options={"task": "text-contact/1"})
    helper = os.fork()  # a child that outlives its parent must not keep the server alive
    if helper == 0:
        time.sleep(60)
        os._exit(0)
    print(env._session.server.process.pid, env._session.pid, helper, env._session.server.folder, flush=True)
    env.step(HANG)
""")


def test_server_and_children_end_with_a_killed_owner() -> None:
    code = OWNER.replace("HANG", repr(HANG))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        line = owner.stdout.readline().split()
        server, child, helper = map(int, line[:3])
        assert not gone(server, within_s=0.2) and not gone(child, within_s=0.2)
        owner.kill()
        try:
            assert gone(server) and gone(child)
            assert removed(Path(line[3]))
        finally:
            os.kill(helper, signal.SIGKILL)


def test_a_forked_child_starts_its_own_and_leaves_the_parents_alone(env: AppWorldEnv) -> None:
    env.reset(options={"task": TASK})
    env.step("x = 1")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            try:
                env.step("x = 2")
            except EngineError:
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert env.step("print(x)")[0].strip() == "1"


def test_the_command_builds_the_world_and_names_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "envs.appworld", "generate"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and done.stdout.startswith("AppWorld engine, own tasks: 64 train, 24 dev, 32 test")
    nowhere = {**os.environ, "BOPO_RAY_APPWORLD": "/nowhere", "BOPO_RAY_CACHE": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-m", "envs.appworld", "generate"], env=nowhere, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "make appworld" in done.stderr


def test_what_is_kept_of_a_task_says_who_made_it() -> None:
    folder = data.data_folder() / "tasks" / "pay-contact_1"
    specs = json.loads((folder / "specs.json").read_text())
    assert specs["db_version"] == data.DB_VERSION and specs["supervisor"]["email"].endswith("@example.com")
