"""ALFWorld without its engine: games and layouts, bad input, and what a process that fails looks like."""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import gymnasium
import pytest
from gymnasium.error import ResetNeeded

from envs import alfworld, alfworld_process
from envs import alfworld_games as games
from envs import alfworld_layouts as layouts
from envs.alfworld import ALFWorldEnv
from envs.alfworld_generate import COUNTS, PLAN_STEPS
from envs.base import Split, Task, TextEnv
from envs.errors import ConfigError, EngineError, UnknownTaskError

needs_package = pytest.mark.skipif(find_spec("alfworld") is None, reason="make alfworld installs it")
NAMES = [task.name for split in Split for task in ALFWorldEnv.tasks(split)]


def test_the_shipped_games_are_many_disjoint_and_short() -> None:
    scenes = {}
    for split in Split:
        tasks = ALFWorldEnv.tasks(split)
        assert len(tasks) == COUNTS[split] and all(task.split is split for task in tasks)
        assert {task.kind: sum(t.kind == task.kind for t in tasks) for task in tasks} == dict.fromkeys(
            layouts.KINDS, COUNTS[split] // 6
        )
        scenes[split] = {int(task.name.split("-")[-2]) for task in tasks}
    assert len(set(NAMES)) == len(NAMES) == 420
    assert not scenes[Split.TRAIN] & scenes[Split.TEST] and not scenes[Split.DEV] & (
        scenes[Split.TRAIN] | scenes[Split.TEST]
    )
    assert ALFWorldEnv.label() == "ALFWorld engine, own layouts"


@needs_package
def test_every_shipped_layout_is_possible_and_not_yet_solved() -> None:
    holds, _, _, _ = layouts._constants()
    own = games.OwnGames(games.SHIPPED / games.FILE)
    for name in NAMES:
        layout, game = own.layout(name), own.game(name)
        furniture = [kind for kind, _, _ in layouts._furniture(layout.scene)]
        for thing, at in layout.things:
            assert furniture[at] in layouts.TABLES if thing == layouts.LAMP else thing in holds[furniture[at]]
            assert thing != layout.thing or furniture[at] != layout.place
        assert len(game.plan) in PLAN_STEPS
        assert layout.thing.lower() in game.task_text and layout.place.lower() in game.task_text
        assert f" {layout.thing}Type)" in game.problem.rpartition("(:goal")[2]


@needs_package
def test_a_layout_survives_the_file_and_the_generator_is_seeded(tmp_path: Path) -> None:
    def draw() -> list[layouts.Layout]:
        rng = random.Random("seed")
        return [made for kind in layouts.KINDS if (made := layouts.furnish(kind, layouts.ROOMS[kind][0] + 7, rng))]

    drawn = draw()
    assert drawn == draw() and len(drawn) == 6
    named = {f"{x.kind}/{x.thing}-None-{x.place}-{x.scene}-0": (x, ("look", "go to bed 1")) for x in drawn}
    empty: dict[str, tuple[layouts.Layout, tuple[str, ...]]] = {}
    (tmp_path / games.FILE).write_text(games.encode({Split.TRAIN: named, Split.DEV: empty, Split.TEST: empty}))
    own = games.OwnGames(tmp_path / games.FILE)
    assert [own.layout(task.name) for task in own.tasks(Split.TRAIN)] == drawn
    assert re.fullmatch(r"ALFWorld engine, own layouts \([0-9a-f]{8}\)", own.label), "not those that ship with us"
    assert own.game(own.tasks(Split.TRAIN)[0].name).plan == ("look", "go to bed 1")


@needs_package
@pytest.mark.parametrize(
    ("kind", "scene"),
    [
        ("pick_heat_then_place_in_recep", 301),  # no microwave
        ("pick_cool_then_place_in_recep", 9),  # too much furniture
        ("pick_clean_then_place_in_recep", 418),  # no sink
    ],
)
def test_a_scene_without_what_a_task_needs_has_no_such_task(kind: str, scene: int) -> None:
    assert all(layouts.furnish(kind, scene, random.Random(seed)) is None for seed in range(5))


@needs_package
def test_reading_the_package_does_not_import_it() -> None:
    """Importing it sets ALFWORLD_DATA, which names the official games."""
    code = (
        "import os, sys; from envs.alfworld_games import source; from envs.base import Split\n"
        "source().game(source().tasks(Split.TEST)[0].name)\n"
        "print([m for m in ('alfworld', 'textworld') if m in sys.modules], 'ALFWORLD_DATA' in os.environ)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


@pytest.mark.parametrize(
    ("kwargs", "hint"),
    [
        ({"max_steps": 0}, "max_steps is 0"),
        ({"call_timeout_s": 0.0}, "call_timeout_s is 0.0"),
        ({"render_mode": "human"}, "render_mode is 'human'"),
    ],
)
def test_a_wrong_setting_is_refused(kwargs: dict[str, object], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        ALFWorldEnv(**kwargs)  # type: ignore[arg-type]


def test_the_environment_is_registered_and_starts_nothing_until_reset() -> None:
    env = gymnasium.make("ALFWorld-v0", max_steps=5)
    assert isinstance(env.unwrapped, ALFWorldEnv) and isinstance(env.unwrapped, TextEnv)
    assert ALFWorldEnv().max_steps == 30
    with pytest.raises(ResetNeeded):
        env.step("look")
    with pytest.raises(ConfigError, match="no option 'tsak'"):
        env.reset(options={"tsak": NAMES[0]})
    env.close()


@pytest.mark.parametrize("name", ["", "boil/3", "pick_and_place_simple/Book", "../../etc/passwd", 7, "a\nb/1"])
def test_an_unknown_task_names_a_close_one(name: object) -> None:
    with pytest.raises(UnknownTaskError) as caught:
        ALFWorldEnv().reset(options={"task": name})
    message = str(caught.value)
    assert f"no task {str(name)!r}" in message and "did you mean '" in message and "\n" not in message


def test_a_missing_package_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(games, "find_spec", lambda name: None if name == "textworld" else object())
    with pytest.raises(ConfigError, match=r"found no package textworld: make alfworld, or pip install .*gcc and g\+\+"):
        ALFWorldEnv().reset(options={"task": NAMES[0]})


KIND, TRIAL = "pick_and_place_simple", "trial_T20190909_075009_810389"
NAME = f"{KIND}/Laptop-None-Desk-306-{TRIAL}"


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as `alfworld-download` leaves it, with one game a split, and ALFWORLD_DATA naming it."""
    root = tmp_path / "alfworld"
    for folder in games.OfficialGames.FOLDERS.values():
        write(root, folder)
    monkeypatch.setenv("ALFWORLD_DATA", str(root))
    monkeypatch.setenv("BOPO_RAY_CACHE", str(tmp_path / "cache"))
    games._source.cache_clear()
    yield root
    games._source.cache_clear()


def write(
    root: Path, folder: str, task: str = f"{KIND}-Laptop-None-Desk-306", trial: str = TRIAL, **fields: object
) -> Path:
    path = root / "json_2.1.1" / folder / task / trial / "game.tw-pddl"
    path.parent.mkdir(parents=True, exist_ok=True)
    grammar = '"task": [{"rhs": "Your task is to: put some laptop on desk."}] template :: "move {o} to {r}";'
    game = {"pddl_domain": "D", "grammar": grammar, "pddl_problem": folder, "solvable": True, "walkthrough": ["look"]}
    path.write_text(json.dumps(game | fields))
    return path


def test_official_games_are_listed_by_split_and_read_by_name(official: Path) -> None:
    write(official, "train", f"{KIND}-AppleSliced-None-Fridge-1")
    write(official, "train", "pick_and_place_with_movable_recep-Pen-Mug-Desk-301")
    write(official, "train", f"{KIND}-Book-None-Bed-301", solvable=False)
    write(official, "train", f"{KIND}-Mug-None-Desk-301", walkthrough=None)
    (official / "json_2.1.1/train/pick_two_obj_and_place-CD-None-Safe-308" / TRIAL).mkdir(parents=True)
    assert [ALFWorldEnv.tasks(split) for split in Split] == [(Task("ALFWorld-v0", NAME, split),) for split in Split]
    assert ALFWorldEnv.label() == "ALFWorld engine, official games"
    game = games.source().game(NAME)
    assert (game.task_text, game.plan) == ("Your task is to: put some laptop on desk.", ("look",))
    assert "laptop" not in game.grammar and "Your task is to: UNKNOWN GOAL." in game.grammar
    for name in (f"{KIND}/Book-None-Bed-301-{TRIAL}", f"{KIND}/Laptop-None-Desk-306-trial_9", "x", "../x-trial_1"):
        with pytest.raises(UnknownTaskError, match=f"did you mean '{NAME}'"):
            games.source().game(name)


def test_official_games_are_indexed_once_and_again_when_they_change(
    official: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[Path] = []
    really = games.OfficialGames._read

    def counted(self: games.OfficialGames, path: Path) -> dict[str, object]:
        read.append(path)
        return really(self, path)

    monkeypatch.setattr(games.OfficialGames, "_read", counted)

    def names() -> list[str]:
        return [task.name for task in games.OfficialGames(official).tasks(Split.TRAIN)]

    assert names() == [NAME] and len(read) == 3 and "Indexing 3 ALFWorld games" in capsys.readouterr().err
    assert names() == [NAME] and len(read) == 3 and capsys.readouterr().err == ""
    write(official, "train", f"{KIND}-Book-None-Bed-301")
    assert len(names()) == 2 and len(read) == 7


def broken(root: Path, how: str) -> None:
    data = root / "json_2.1.1"
    if how == "absent":
        data.rename(root / "json_2.1.0")
    elif how == "zip":
        (root / "json_2.1.2_tw-pddl.zip").touch()
    elif how == "no games":
        for path in data.glob("train/*/*/game.tw-pddl"):
            path.rename(path.with_name("traj_data.json"))
    elif how == "truncated":
        path = write(root, "valid_seen")
        path.write_text(path.read_text()[:50])
    elif how == "old":
        write(root, "valid_unseen", grammar='template :: "put {o} in/on {r}"')
    elif how == "keys":
        write(root, "train").write_text('{"solvable": true}')


@pytest.mark.parametrize(
    ("how", "hint"),
    [
        ("absent", r"has no json_2\.1\.1/train \(it has json_2\.1\.0\)"),
        ("zip", r"half downloaded \(json_2\.1\.2_tw-pddl\.zip is there\)"),
        ("no games", r"train holds no game\.tw-pddl: the download was not finished"),
        ("truncated", r"game\.tw-pddl is no whole game \(JSONDecodeError"),
        ("old", r"made by an older alfworld"),
        ("keys", r"game\.tw-pddl is no whole game \(KeyError: 'grammar'\)"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(official: Path, how: str, hint: str) -> None:
    broken(official, how)
    with pytest.raises(ConfigError, match=hint) as caught:
        ALFWorldEnv.tasks(Split.TRAIN)
    assert "alfworld-download" in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="nowhere', which is no folder: unset it for games of our own"):
        ALFWorldEnv.tasks(Split.TRAIN)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda text: text[:1000], r"can't be read \(JSONDecodeError"),
        (lambda text: "{}", r"can't be read \(KeyError"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "has format 9, not 1"),
    ],
)
def test_a_broken_file_of_our_own_games_is_refused(tmp_path: Path, change: Callable[[str], str], hint: str) -> None:
    text = (games.SHIPPED / games.FILE).read_text()
    (tmp_path / games.FILE).write_text(change(text))
    with pytest.raises(ConfigError, match=f"{hint}.*alfworld generate"):
        games.OwnGames(tmp_path / games.FILE)


@needs_package
def test_games_made_for_another_version_of_the_package_are_refused(tmp_path: Path) -> None:
    text = (games.SHIPPED / games.FILE).read_text()
    (tmp_path / games.FILE).write_text(text.replace('"alfworld": "0.4.2"', '"alfworld": "0.3.0"'))
    with pytest.raises(ConfigError, match=r"made with alfworld 0\.3\.0, and 0\.4\.2 is installed"):
        games.OwnGames(tmp_path / games.FILE).game(NAMES[0])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--processes", "0"], "--processes must be at least 1"),
        (["--test", "-3"], "--test must be at least 1"),
        (["--out", "/dev/null/games"], "--out /dev/null/games can't be made"),
    ],
)
def test_a_wrong_request_for_games_is_refused_in_one_line(
    arguments: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(games, "require_packages", lambda: None)
    with pytest.raises(SystemExit) as caught:
        alfworld.main(["generate", "--out", str(tmp_path), *arguments])
    assert caught.value.code == 2 and hint in capsys.readouterr().err.splitlines()[-1]


Engine = tuple[alfworld_process.Engine, socket.socket, "subprocess.Popen[bytes]"]


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine, the end of its socket that the test plays, and the process that it takes for its own."""
    ours, theirs = socket.socketpair()
    with subprocess.Popen(["sleep", "60"]) as process, theirs:
        yield alfworld_process.Engine(ours, process.pid, timeout_s=0.5), theirs, process
        ours.close()
        process.kill()


def answer(link: socket.socket, data: bytes) -> None:
    threading.Thread(target=lambda: (link.recv(1 << 16), link.sendall(data))).start()


def test_an_answer_may_come_in_pieces(engine: Engine) -> None:
    ours, theirs, _ = engine
    threading.Thread(target=lambda: [theirs.sendall(part) for part in (b'{"text": ', b'"hello"', b"}\n")]).start()
    assert ours.step("look") == {"text": "hello"}
    assert json.loads(theirs.recv(1 << 16)) == {"step": "look", "admissible": False}


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"no json\n", "died"), (b'{"error": "KeyError: 3"}\n', r"raised KeyError: 3 in 'step'"), (b"", "died")],
)
def test_an_engine_that_fails_raises_one_line_and_stays_broken(engine: Engine, data: bytes, why: str) -> None:
    ours, theirs, _ = engine
    if data:
        answer(theirs, data)
    else:
        theirs.close()
    for _ in range(2):
        with pytest.raises(EngineError, match=f"process {ours.pid} {why}: reset the environment") as caught:
            ours.step("look")
        assert "\n" not in str(caught.value) and not ours.usable


@pytest.mark.parametrize("request_chars", [4, 10_000_000])
def test_an_engine_that_neither_reads_nor_answers_is_killed(engine: Engine, request_chars: int) -> None:
    ours, _, process = engine
    with pytest.raises(EngineError, match=r"did not answer 'step' within 0\.5 s and was killed"):
        ours.step("x" * request_chars)
    assert process.wait(10) == -9


def test_a_nursery_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alfworld_process, "_nursery", None)
    monkeypatch.setattr(alfworld_process, "require_packages", lambda: None)
    monkeypatch.setattr(alfworld_process.sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match=r"did not start within 120 s \(exit code 1, /bin/false\)"):
        alfworld_process.start()
