"""AppWorld without its engine: tasks, plans, messages, what is believed of a hostile process."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import os
import random
import re
import secrets
import socket
import struct
import subprocess
import sys
import threading
import uuid
from collections import Counter
from pathlib import Path
from types import ModuleType

import gymnasium
import pytest
from gymnasium.error import ResetNeeded

import envs  # noqa: F401  (registers the ids)
from envs.appworld import AppWorldEnv, client, data, own
from envs.appworld.__main__ import main
from envs.appworld.engine import kinds
from envs.base import Split, TextEnv
from envs.errors import ConfigError, EngineError, UnknownTaskError

EVERY = [(kind, number) for kind in kinds.KINDS for number in range(1, 1 + sum(kinds.COUNTS.values()))]


@pytest.fixture(autouse=True)
def no_official_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APPWORLD_ROOT", raising=False)
    monkeypatch.delenv("APPWORLD_TEST_SET", raising=False)


def test_importing_the_environment_is_light() -> None:
    code = "import envs.appworld, sys; print([m for m in ('torch', 'ray', 'appworld', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_our_own_splits_are_disjoint_and_hold_every_kind() -> None:
    lists = [AppWorldEnv.tasks(split) for split in Split]
    assert [len(tasks) for tasks in lists] == [64, 24, 32]
    assert len({task.name for tasks in lists for task in tasks}) == 120
    for tasks, count in zip(lists, kinds.COUNTS.values(), strict=True):
        assert Counter(task.kind for task in tasks) == dict.fromkeys(kinds.KINDS, count)
    assert data.world() == "AppWorld engine, own tasks"


def test_our_own_tasks_span_apps_and_steps() -> None:
    specs = [kinds.draw(kind, 1, own.SEED)[1] for kind in kinds.KINDS]
    assert len({app for spec in specs for app in spec.apps}) >= 4
    assert sum(len(spec.apps) > 1 for spec in specs) >= 2, "some need several apps"
    assert all(len(spec.plan()) >= 6 for spec in specs)


@pytest.mark.parametrize(("kind", "number"), EVERY)
def test_each_plan_is_short_lines_of_code_that_end_with_completion(kind: str, number: int) -> None:
    me, spec = kinds.draw(kind, number, own.SEED)
    assert (me, spec) == kinds.draw(kind, number, own.SEED)
    assert spec.plan() != spec.plan(wrong=True)
    for line in spec.plan() + spec.plan(wrong=True):
        assert len(line) <= 200 and "\n" not in line and line == line.strip()
        ast.parse(line)
    assert "complete_task" in spec.plan()[-1] and "complete_task" not in "".join(spec.plan()[:-1])
    assert (spec.answer is None) is (spec.plan()[-1] == "apis.supervisor.complete_task()")


def test_tasks_of_a_kind_differ() -> None:
    for kind in kinds.KINDS:
        drawn = [kinds.draw(kind, number, own.SEED)[1] for number in range(1, 16)]
        assert len({spec.instruction + str(spec.rows) for spec in drawn}) == 15, kind


def test_of_many_tasks_no_two_are_alike_and_the_usual_ones_stay_as_they_are() -> None:
    for kind in kinds.KINDS:
        many = kinds.draw_all(kind, 120, seed=1)
        assert many[:60] == kinds.draw_all(kind, 60, seed=1)
        assert len({f"{me.number} {spec.instruction} {spec.rows}" for me, spec in many}) == 120, kind
        assert kinds.draw_all(kind, 15, own.SEED) == [kinds.draw(kind, n, own.SEED) for n in range(1, 16)]
    drawn = [kinds.draw("text-contact", number, 1) for number in range(1, 61)]
    assert any(task in drawn[:at] for at, task in enumerate(drawn)), "or nothing was drawn again above"


def test_another_seed_makes_another_world() -> None:
    assert kinds.draw("pay-contact", 1, 0) != kinds.draw("pay-contact", 1, 1)


def test_namesakes_are_told_apart_by_how_one_knows_them() -> None:
    for me in kinds.SUPERVISORS:
        known = Counter((person.first, how) for person, how in kinds.contacts_of(me).items())
        assert set(known.values()) == {1}
        assert [p.first for p in kinds.PEOPLE].count(me.first) == 1


def test_a_careless_agent_takes_a_namesake() -> None:
    me, person = kinds.SUPERVISORS[0], kinds.PEOPLE[0]
    assert "ada.frost@" in kinds._careless(person, me)
    assert all(p.email not in kinds._careless(p, me) for p in kinds.contacts_of(me))


def test_verification_refuses_a_task_whose_wrong_solution_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = {"note-total_9": (False, True, True)}
    monkeypatch.setattr(client, "Server", lambda _: io.BytesIO())
    monkeypatch.setattr(own, "_verdict", lambda _s, _d, task: verdicts.get(task, (False, True, False)))
    own.verify(Path(), ["note-total_8"])
    with pytest.raises(EngineError, match=r"our task note-total_9 is wrong: .* succeed \(False, True, True\)"):
        own.verify(Path(), ["note-total_8", "note-total_9"])


@pytest.mark.parametrize("name", ["pay-contact/0", "pay-contact/16", "pay-contact_1", "pay/1", "", 3, "a\nb", None])
def test_an_unknown_task_says_what_is_allowed(name: object) -> None:
    with pytest.raises(UnknownTaskError, match=r"as in 'text-contact/1'") as caught:
        data.task_id(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)
    assert data.task_id("pay-contact/15") == "pay-contact_15"


@pytest.mark.parametrize(
    ("kwargs", "hint"),
    [({"max_steps": 0}, "max_steps is 0"), ({"call_timeout_s": 0.0}, "0.0"), ({"render_mode": "human"}, "'human'")],
)
def test_a_wrong_setting_is_refused(kwargs: dict[str, object], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        AppWorldEnv(**kwargs)  # type: ignore[arg-type]


def test_the_environment_is_registered_and_starts_nothing_until_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "acquire", lambda *_: pytest.fail("started"))
    env = gymnasium.make("AppWorld-v0", max_steps=5)
    assert isinstance(env.unwrapped, AppWorldEnv) and isinstance(env.unwrapped, TextEnv)
    with pytest.raises(ResetNeeded):
        env.step("print(1)")
    with pytest.raises(ConfigError, match="no option 'tsak'"):
        env.reset(options={"tsak": "pay-contact/1"})
    with pytest.raises(UnknownTaskError):
        env.reset(options={"task": "pay-contact/x"})
    env.close()


def official(root: Path, *, version: str = "0.1.0", leave_out: str = "") -> Path:
    """What `appworld download data` leaves, in miniature."""
    sets = {"train": ["82e2fac_1", "82e2fac_2"], "dev": ["50e1ac9_1"], "test_normal": ["aa8502b_1"]}
    sets["test_challenge"] = ["bde36cd_1", "bde36cd_2:tag"]
    files = {"data/api_docs/standard/venmo.json": "{}", "data/base_dbs/venmo.db": ""}
    files |= {f"data/datasets/{name}.txt": "\n".join(ids) + "\n" for name, ids in sets.items()}
    for task in (i.partition(":")[0] for ids in sets.values() for i in ids):
        files[f"data/tasks/{task}/specs.json"] = json.dumps({"db_version": version})
        files[f"data/tasks/{task}/dbs/venmo.jsonl"] = ""
    for path, text in files.items():
        if not leave_out or leave_out not in path:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
    return root


def test_official_data_give_the_official_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPWORLD_ROOT", str(official(tmp_path)))
    lists = [[task.name for task in AppWorldEnv.tasks(split)] for split in Split]
    assert lists == [["82e2fac/1", "82e2fac/2"], ["50e1ac9/1"], ["aa8502b/1"]]
    assert AppWorldEnv.tasks(Split.TRAIN)[0].kind == "82e2fac" and data.world() == "AppWorld"
    assert data.task_id("82e2fac/2") == "82e2fac_2" and data.data_folder() == tmp_path / "data"
    with pytest.raises(ConfigError, match="82e2fac/1 has no expert plan"):
        data.expert_plan("82e2fac/1")
    monkeypatch.setenv("APPWORLD_TEST_SET", "test_challenge")
    assert [task.name for task in AppWorldEnv.tasks(Split.TEST)] == ["bde36cd/1", "bde36cd/2"]
    monkeypatch.setenv("APPWORLD_TEST_SET", "test")
    with pytest.raises(ConfigError, match="'test': it may be test_normal or test_challenge"):
        AppWorldEnv.tasks(Split.TEST)


@pytest.mark.parametrize(
    ("build", "hint"),
    [
        (lambda root: root / "nowhere", "there is no folder .*nowhere/data: run `appworld download data`"),
        (lambda root: official(root, leave_out="base_dbs"), "has no data/base_dbs: run"),
        (lambda root: official(root, leave_out="train.txt"), "no task list .*train.txt"),
        (lambda root: official(root, leave_out="tasks/82e2fac_2"), "holds 1 of the 2 tasks of train; 82e2fac_2"),
        (lambda root: official(root, version="0.2.0"), "version 0.2.0, and appworld 0.1.3.post1 reads 0.1.0"),
    ],
)
def test_bad_official_data_are_one_clear_line(
    build: object, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPWORLD_ROOT", str(build(tmp_path)))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=hint) as caught:
        AppWorldEnv.tasks(Split.TRAIN)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_folder_of_tasks_of_our_own_is_labelled_so_and_says_how_to_make_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APPWORLD_ROOT", str(official(tmp_path, leave_out="train.txt")))
    assert data.world() == data.OFFICIAL
    (tmp_path / own.MARK).write_text('{"seed": 0}')
    assert data.world() == data.OWN
    (tmp_path / own.MARK).write_text('{"seed": 7}')
    assert data.world() == f"{data.OWN}, seed 7", "whose tasks have the same names as the usual ones"
    monkeypatch.setenv("APPWORLD_TEST_SET", "test_challenge")
    assert [task.name for task in AppWorldEnv.tasks(Split.TEST)] == ["aa8502b/1"]
    assert [task.name for task in AppWorldEnv.tasks(Split.DEV)] == ["50e1ac9/1"]
    with pytest.raises(ConfigError, match=r"no task list .*: make it anew, python -m envs.appworld generate --out"):
        AppWorldEnv.tasks(Split.TRAIN)
    plan = tmp_path / "data" / "tasks" / "50e1ac9_1" / "ground_truth" / "plan.json"
    plan.parent.mkdir()
    plan.write_text('{"right": ["a = 1"], "wrong": []}')
    monkeypatch.setattr(data, "_names", lambda: {"50e1ac9/1"})
    assert data.expert_plan("50e1ac9/1") == ("a = 1",)
    (tmp_path / own.MARK).write_text("{}")
    with pytest.raises(ConfigError, match=r"own.json can't be read: make the tasks anew, python -m envs.appworld"):
        data.world()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--train", "12", "--out", "new"], "--train is 12: it must be a multiple of 8, the number of kinds"),
        (["--dev", "0", "--out", "new"], "--dev is 0: it must be a multiple of 8"),
        (["--test", "48"], "other tasks than the usual ones need a folder: add --out FOLDER"),
        (["--seed", "3"], "add --out FOLDER"),
        (["--out", "full"], "--out full is not empty: name a folder that is, or a new one"),
        (["--out", "full/file/below"], r"--out full/file/below can't be made \(.*: name a folder that can"),
    ],
)
def test_tasks_that_can_not_be_made_are_one_clear_line(
    arguments: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BOPO_RAY_APPWORLD", str(second_environment(tmp_path / "venv")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["generate", *arguments]) == 2
    assert re.search(hint, message := capsys.readouterr().err) and message.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_only_our_own_tasks_can_be_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("APPWORLD_ROOT", str(official(tmp_path)))
    assert main(["verify"]) == 2
    assert "holds AppWorld's tasks, which are not ours" in capsys.readouterr().err
    monkeypatch.setenv("APPWORLD_ROOT", str(tmp_path / "nope"))
    assert main(["verify"]) == 2
    assert f"there is no folder {tmp_path / 'nope' / 'data'}" in capsys.readouterr().err


def second_environment(folder: Path, version: str = client.VERSION, *, unpacked: bool = True) -> Path:
    site = folder / "lib" / "python3.11" / "site-packages"
    (site / f"appworld-{version}.dist-info").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch()
    if unpacked:
        (site / "appworld" / "apps" / "venmo").mkdir(parents=True)
    return folder


def test_the_second_environment_is_found_or_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOPO_RAY_APPWORLD", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"none in .*none: run `make appworld`, or set BOPO_RAY_APPWORLD"):
        client.find_python()
    monkeypatch.setenv("BOPO_RAY_APPWORLD", str(second_environment(tmp_path / "old", "0.1.2")))
    with pytest.raises(ConfigError, match=r"holds appworld 0.1.2, and 0.1.3.post1 is needed: run `make appworld`"):
        client.find_python()
    monkeypatch.setenv("BOPO_RAY_APPWORLD", str(second_environment(tmp_path / "half", unpacked=False)))
    with pytest.raises(ConfigError, match="not unpacked: run `make appworld`"):
        client.find_python()
    monkeypatch.delenv("BOPO_RAY_APPWORLD")
    second_environment(tmp_path / ".venv-appworld")
    monkeypatch.chdir(tmp_path)
    assert client.find_python() == tmp_path / ".venv-appworld" / "bin" / "python"


def test_folders_that_the_engine_would_take_for_databases_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOPO_RAY_APPWORLD", str(second_environment(tmp_path / "venv")))
    monkeypatch.setenv("BOPO_RAY_CACHE", str(tmp_path / "in-memory"))
    with pytest.raises(ConfigError, match=r"'memory' in its name .*in-memory.*set BOPO_RAY_CACHE"):
        own.usual()
    with pytest.raises(ConfigError, match=r"'memory' in its name .*in-memory/more\): name another --out"):
        own.make(tmp_path / "in-memory" / "more", own.COUNTS, 1)
    monkeypatch.setattr(client.tempfile, "gettempdir", lambda: "/memory")
    with pytest.raises(ConfigError, match=r"'memory' in its name \(/memory\): set TMPDIR"):
        client.Server(tmp_path)


def test_a_server_that_can_not_start_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = second_environment(tmp_path)
    (folder / "bin" / "python").write_text("#!/bin/sh\necho first >&2\necho no space left >&2\nexit 1\n")
    (folder / "bin" / "python").chmod(0o755)
    monkeypatch.setenv("BOPO_RAY_APPWORLD", str(folder))
    with pytest.raises(EngineError, match=r"did not start \(no space left\): run `make appworld`$"):
        client.Server(tmp_path)
    with pytest.raises(EngineError, match=r"could not build our tasks: no space left$"):
        client.build(tmp_path / "world", 0, (1, 1, 1))

    def slow(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(EngineError, match=r"did not build our tasks within 780 s: try again while .*less to do$"):
        client.build(tmp_path / "world", 0, (1, 1, 1))


def test_what_killed_builds_have_left_is_removed_and_what_others_make_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "build", lambda root, *_: root.mkdir())
    (tmp_path / ".making-left" / "world").mkdir(parents=True)
    with own._making(tmp_path, own.COUNTS, 0) as first, own._making(tmp_path, own.COUNTS, 0) as second:
        assert set(tmp_path.iterdir()) == {first.parent, second.parent}
    assert not any(tmp_path.iterdir())


def test_the_server_inherits_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert set(client._environment()) <= {"HOME", "LANG", "PATH", "TMPDIR", "TZ", "PYTHONHASHSEED"}


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\x00\x00",
        struct.pack("!I", 1 << 31) + b"x",
        struct.pack("!I", 4) + b"{,}}",
        struct.pack("!I", 2) + b"[]",
        struct.pack("!I", 9) + b'"\xff\xfe"ab  ',
        struct.pack("!I", 100) + b'{"output": ',
        struct.pack("!I", 200_000) + b"[" * 200_000,
    ],
)
def test_what_is_no_message_is_refused(sent: bytes) -> None:
    here, there = socket.socketpair()
    there.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    there.sendall(sent)
    there.close()
    with pytest.raises(ValueError):  # noqa: PT011 (whatever it says, the caller words it)
        client._receive(here)
    here.close()


@pytest.mark.parametrize("sent", [struct.pack("!I", 2) + b"{}", struct.pack("!I", 2) + b"[]"])
def test_what_a_hostile_child_sends_along_is_closed(sent: bytes) -> None:
    here, there = socket.socketpair()
    with here, there, Path("/dev/null").open() as file:
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(3):
            socket.send_fds(there, [sent], [file.fileno()])
            with contextlib.suppress(ValueError):
                client._message(here)
        assert set(os.listdir("/proc/self/fd")) == before


def test_a_message_that_trickles_in_has_one_deadline() -> None:
    here, there = socket.socketpair()
    here.settimeout(0.3)
    stop = threading.Event()

    def trickle() -> None:
        there.sendall(struct.pack("!I", 1000))
        while not stop.wait(0.05):
            there.sendall(b" ")

    thread = threading.Thread(target=trickle)
    thread.start()
    with pytest.raises(TimeoutError):
        client._receive(here)
    stop.set()
    thread.join()
    here.close()
    there.close()


def load(name: str) -> ModuleType:
    """A module of the engine's side that needs only the standard library."""
    spec = importlib.util.spec_from_file_location(f"appworld_{name}", client.ENGINE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_databases_that_an_episode_left_are_copied_only_when_plain(tmp_path: Path) -> None:
    server, source = load("server"), tmp_path / "dbs"
    source.mkdir()
    (source / "venmo.jsonl").write_text(json.dumps(["  insert INTO users VALUES (?)", ["a"], False]) + "\n")
    (source / "model_hashes.json").write_text("{}")
    server._copy_changes(source, tmp_path / "copy")
    assert sorted(os.listdir(tmp_path / "copy")) == ["model_hashes.json", "venmo.jsonl"]
    (source / "gmail.jsonl").write_text(json.dumps(["ATTACH DATABASE '/tmp/x' AS x", [], False]))
    with pytest.raises(ValueError, match="a statement that is no change"):
        server._copy_changes(source, tmp_path / "attached")
    (source / "gmail.jsonl").unlink()
    (source / "gmail.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="symbolic"):
        server._copy_changes(source, tmp_path / "linked")
    (source / "gmail.jsonl").unlink()
    os.mkfifo(source / "gmail.jsonl")
    with pytest.raises(ValueError, match="not a file"):
        server._copy_changes(source, tmp_path / "piped")


def test_chance_is_the_same_in_each_play_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    server = load("server")
    for module, name in ((os, "urandom"), (os, "getpid"), (random, "_urandom")):
        monkeypatch.setattr(module, name, getattr(module, name))

    def drawn(task: str) -> tuple[object, ...]:
        server._fix_chance(task)
        return uuid.uuid4(), uuid.uuid4(), secrets.token_hex(), random.SystemRandom().random(), os.getpid()

    assert drawn("pay-contact_1") == drawn("pay-contact_1")
    assert not set(drawn("pay-contact_1")[:4]) & set(drawn("pay-contact_2"))


def test_the_system_call_filter_jumps_within_itself_and_always_returns() -> None:
    jail = load("jail")
    if jail._MACHINE not in jail._ARCH:
        pytest.skip("no filter for this machine")
    program = [struct.unpack("HBBI", line) for (line,) in struct.iter_unpack("8s", jail._program(1234))]
    assert len(program) < 4096 and program[-1][0] == jail._RETURN

    def answer(call: int, argument: int = 0, arch: int = jail._ARCH[jail._MACHINE][1]) -> int:
        at, word, data = 0, 0, {0: call, 4: arch, 16: argument}
        while True:
            code, yes, no, value = program[at]
            at += 1
            if code == jail._RETURN:
                return value
            if code == jail._LOAD:
                word = data[value]
            else:
                holds = {jail._EQUAL: word == value, jail._AT_LEAST: word >= value, jail._ANY_BIT: bool(word & value)}
                at += yes if holds[code] else no

    refused, column = jail._ERRNO | jail._EPERM, jail._ARCH[jail._MACHINE][0]
    for name, numbers in jail._CALLS.items():
        if numbers[column] >= 0:
            assert answer(numbers[column]) == refused, name
    assert answer(0, arch=1) == refused, "another architecture's numbers"
    assert answer(jail._CLONE3) == jail._ERRNO | jail._ENOSYS
    assert answer(jail._CLONE[column], 17) == refused and answer(jail._CLONE[column], 0x3D0F00) == jail._ALLOW
    assert answer(jail._TGKILL[column], 1) == refused and answer(jail._TGKILL[column], 1234) == jail._ALLOW
    assert answer(jail._PRLIMIT[column], 77) == refused and answer(jail._PRLIMIT[column], 0) == jail._ALLOW
    known = {numbers[column] for numbers in jail._CALLS.values()}
    for call in random.Random(0).sample(range(440), 200):
        if call not in {*known, jail._CLONE[column], jail._CLONE3, jail._TGKILL[column], jail._PRLIMIT[column]}:
            assert answer(call) == jail._ALLOW, call


def test_the_makefile_installs_the_version_that_is_asked_for() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    assert f"APPWORLD_VERSION := {client.VERSION}\n" in makefile
