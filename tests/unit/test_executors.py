"""How the embedded models are made: what they are taught, and from what."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bopo_ray.errors import ConfigError, EngineError
from bopo_ray.executors import alfworld, scienceworld
from bopo_ray.executors import train as training
from bopo_ray.executors.augment import COLOURS, augmented
from bopo_ray.executors.copying import copying_batch, write_previous_token_head
from bopo_ray.executors.demos import Demo, collect, demo_messages, read_demos
from bopo_ray.executors.recipes import RECIPES, Recipe
from bopo_ray.executors.scienceworld import executor_tasks, jobs, shown, with_looks
from bopo_ray.executors.sequences import batches, sequences
from bopo_ray.models.embedded_files import SHIPPED
from bopo_ray.models.embedded_prompt import EmbeddedPrompt
from bopo_ray.models.protocol import Message
from bopo_ray.pipeline.command import exit_code
from envs.base import Split
from envs.scienceworld import ScienceWorldEnv
from experiments import train_executors
from experiments.evaluate_executors import main as evaluate_main
from experiments.train_executors import main as train_main

WORDS = ("red box", "a metal fork", "the kitchen", "look around", "move it", "You see:\n\ta red box\n\ta blue box\n")


def demo(actions: int = 4, words: tuple[str, ...] = WORDS, taught: tuple[bool, ...] | None = None) -> Demo:
    """A demonstration whose texts are taken in turn."""
    text = [f"{words[i % len(words)]} {i}" for i in range(actions)]
    return Demo(
        "find-animal/0", False, "Move the animal to the red box.", "This is the kitchen.",
        tuple(f"move {t}".split("\n")[0] for t in text), tuple(text), taught or (True,) * actions,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer of these words."""
    path = tmp_path_factory.mktemp("tokenizer")
    training.train_tokenizer([demo(12)] * 5, path / "tokenizer.json")
    return path


@settings(max_examples=60, deadline=None)
@given(
    context=st.sampled_from((64, 80, 128, 512)),
    flags=st.lists(st.booleans(), min_size=1, max_size=14),
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=5),
)
def test_each_taught_action_is_learned_once_from_what_the_model_would_read(
    folder: Path, context: int, flags: list[bool], words: list[str]
) -> None:
    prompt = EmbeddedPrompt(folder, context)
    shown_ = demo(len(flags), tuple(words), tuple(flags))
    learned: list[tuple[list[int], list[int]]] = []
    for s in sequences(shown_, prompt):
        assert len(s.ids) == len(s.kinds) <= context
        at = 0
        while at < len(s.ids):
            if s.kinds[at] == 2:
                end = next((i for i in range(at, len(s.ids)) if s.kinds[i] != 2), len(s.ids))
                learned.append((s.ids[:at], s.ids[at:end]))
                at = end
            else:
                at += 1
    messages = demo_messages(shown_)
    wanted = []
    for i, action in enumerate(shown_.actions):
        if flags[i]:
            wanted.append((prompt.ids(messages[: 2 + 2 * i]), prompt.action_ids(action)[1:]))
    assert learned == wanted


def test_text_before_the_first_window_is_learned_too_and_no_action_of_noise(folder: Path) -> None:
    prompt = EmbeddedPrompt(folder, 512)
    (one,) = sequences(demo(3, taught=(True, False, True)), prompt)
    said = prompt.action_ids("move a metal fork 1")[1:]
    at = next(i for i in range(len(one.ids)) if one.ids[i : i + len(said)] == said)
    assert one.kinds[at : at + len(said)] == [0] * len(said)
    assert set(one.kinds) == {0, 1, 2} and one.kinds[0] == 1
    assert {one.ids[i] for i, k in enumerate(one.kinds) if i and k == 0} >= {prompt.act, prompt.obs}


def test_batches_hold_each_sequence_once_within_the_bound(folder: Path) -> None:
    prompt = EmbeddedPrompt(folder, 128)
    items = [s for n in range(1, 14) for s in sequences(demo(n), prompt)]
    made = batches(items, 256, random.Random(0))
    assert sorted(id(s) for b in made for s in b) == sorted(map(id, items))
    for b in made:
        assert len(b) == 1 or len(b) * max(len(s.ids) for s in b) <= 256


class TestAugmentation:
    PLAIN = Demo(
        "find-animal/3", False, "Your task is to find a(n) animal and move it to the red box in the kitchen.",
        "You see:\n\ta red box (containing nothing)\n\ta blue box (containing nothing)\n\tan egg wolf\n",
        ("focus on wolf", "move wolf to red box"), ("You focus on the wolf.", "You move the wolf to the red box."),
        (True, True),
    )  # fmt: skip

    def test_names_change_everywhere_at_once(self) -> None:
        seen = set()
        for seed in range(40):
            a = augmented("ScienceWorld-v0", self.PLAIN, random.Random(seed))
            colour = a.actions[1].split()[-2]
            animal = a.actions[0].removeprefix("focus on ")
            seen.add((colour, animal))
            assert colour in COLOURS and f"the {colour} box in the kitchen" in a.task_text
            assert a.actions[1] == f"move {animal} to {colour} box"
            assert a.observations[1] == f"you move the {animal} to the {colour} box."
            assert sorted(a.first_observation.splitlines())[:1] != sorted(a.first_observation.splitlines())[1:2]
            assert (
                f"{colour} box (containing nothing)" in a.first_observation and f"egg {animal}" in a.first_observation
            )
            assert (a.task, a.noisy, a.taught) == (self.PLAIN.task, self.PLAIN.noisy, self.PLAIN.taught)
        assert len(seen) > 10

    def test_what_decides_the_answer_stays(self) -> None:
        paint = dataclasses.replace(self.PLAIN, task="chemistry-mix-paint-secondary-color/0")
        old = dataclasses.replace(self.PLAIN, task="lifespan-longest-lived/1")
        for seed in range(20):
            assert augmented("ScienceWorld-v0", paint, random.Random(seed)).actions == paint.actions
            assert augmented("ScienceWorld-v0", old, random.Random(seed)).actions[0] == "focus on wolf"

    def test_an_environment_without_rules_keeps_its_texts(self) -> None:
        assert augmented("ALFWorld-v0", self.PLAIN, random.Random(0)) is self.PLAIN


def test_the_executors_are_shown_two_thirds_of_train_and_nothing_else() -> None:
    mine = {name for names in executor_tasks().values() for name in names}
    train = {t.name for t in ScienceWorldEnv.tasks(Split.TRAIN)}
    assert mine < train and 0.6 < len(mine) / len(train) < 0.7
    assert {n for n in train if shown(n)} == mine
    assert not any(shown(t.name) for split in (Split.DEV, Split.TEST) for t in ScienceWorldEnv.tasks(split))
    assert set(jobs(0)) <= mine and len(jobs(0)) == len(set(jobs(0))) and jobs(30) == jobs(0)[:30]
    assert len({n.rpartition("/")[0] for n in jobs(40)}) > 15


def test_a_room_is_looked_at_when_it_is_entered() -> None:
    plan = ["teleport to kitchen", "look around", "take x", "teleport to workshop", "move x to y"]
    assert with_looks(plan) == [
        "teleport to kitchen", "look around", "take x", "teleport to workshop", "look around", "move x to y",
    ]  # fmt: skip


def test_the_written_head_attends_to_the_token_before(folder: Path) -> None:
    recipe = Recipe(192, 2, 3, 128, noisy=True, tokens=1, copying=1.0)
    prompt = EmbeddedPrompt(folder, 128)
    model = training.LlamaForCausalLM._from_config(training._config(prompt, recipe), attn_implementation="eager")
    ids = torch.tensor([[7 + (i * i) % 90 for i in range(80)]])

    def to_the_one_before() -> torch.Tensor:
        with torch.no_grad():
            attention = model(ids, output_attentions=True).attentions[0][0, 0]
        return attention[range(1, 80), range(79)]

    assert to_the_one_before()[20:].mean() < 0.1
    write_previous_token_head(model, 0)
    assert to_the_one_before().mean() > 0.9
    with torch.no_grad():
        seen = model.model.embed_tokens(ids)
    assert torch.all(seen[..., 0] == 1.0) and 0.05 < seen[..., 1:].std() < 0.11


def test_made_up_texts_teach_to_go_on_as_before() -> None:
    for progress in (0.0, 0.9):
        batch = copying_batch(300, 512, progress, random.Random(1))
        assert 400 < sum(len(s.ids) for s in batch) <= 512 and min(min(s.ids) for s in batch) >= 5
        for s in batch:
            learned = [i for i, k in enumerate(s.kinds) if k]
            assert learned and set(s.kinds) == {0, 2}
            for i in learned:  # what came before and this one stood side by side earlier
                assert (s.ids[i - 1], s.ids[i]) in set(itertools.pairwise(s.ids[: i - 1]))


TINY = Recipe(32, 1, 1, 128, noisy=True, tokens=1, lr=5e-3, batch_tokens=512)


def tiny_run(folder: Path, work: Path, report=lambda line: None) -> dict[str, float]:  # type: ignore[no-untyped-def]
    demos = [dataclasses.replace(demo(6), task=f"find-animal/{i}") for i in range(40)]
    work.mkdir(parents=True, exist_ok=True)
    out = work / "model"
    out.mkdir(exist_ok=True)
    (out / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    return training.train("ScienceWorld-v0", demos, TINY, work / "board", out, report)


def test_training_learns_resumes_to_the_same_weights_and_saves_what_transformers_loads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MILLION", 150_000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = tiny_run(folder, tmp_path / "whole")
        assert found["held_out_actions_exact"] > 0.9 and found["held_out_action_loss"] < 0.2
        monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)

        def stop(line: str) -> None:
            if "exact" in line and float(line.split()[0]) > 0.07:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tiny_run(folder, tmp_path / "cut", stop)
        assert (tmp_path / "cut" / "board" / "checkpoint.pt").exists()
        assert not (tmp_path / "cut" / "model" / "model.safetensors").exists()
        lines: list[str] = []
        assert tiny_run(folder, tmp_path / "cut", lines.append) == found
        assert "goes on after" in lines[0]
        assert tiny_run(folder, tmp_path / "cut") == found, "what is finished is not trained on"
        monkeypatch.setattr(sys.modules[__name__], "TINY", dataclasses.replace(TINY, lr=1e-3))
        with pytest.raises(ConfigError, match=r"checkpoint\.pt was made with another recipe .*--name"):
            tiny_run(folder, tmp_path / "cut")
    finally:
        torch.set_num_threads(threads)
    weights = [(tmp_path / d / "model" / "model.safetensors").read_bytes() for d in ("whole", "cut")]
    assert weights[0] == weights[1]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole" / "model")
    prompt = EmbeddedPrompt(tmp_path / "whole" / "model", 128)
    messages = demo_messages(demo(6))[:4]
    chat = [{"role": m.role, "content": m.content} for m in messages]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert list(ids) == prompt.ids(messages)
    written = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert prompt.text(written.tolist()) == "move a metal fork 1"


@pytest.mark.parametrize("changed", ["demonstrations", "tokenizer"])
def test_a_training_does_not_go_on_with_other_texts(
    changed: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MILLION", 1)
    (other := tmp_path / "other").mkdir()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    swapped = {word: tokenizer["model"]["vocab"][again] for word, again in (("a", "b"), ("b", "a"))}
    tokenizer["model"]["vocab"] |= swapped
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    tiny_run(folder, tmp_path)
    tiny_run(folder, tmp_path)
    if changed == "demonstrations":
        monkeypatch.setattr(sys.modules[__name__], "demo", lambda n, made=demo: made(n, WORDS[1:]))
    with pytest.raises(ConfigError, match=r"checkpoint\.pt was made with .* other demonstrations: .*--name"):
        tiny_run(other if changed == "tokenizer" else folder, tmp_path)


def test_where_nothing_can_be_learned_it_is_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "tokenizer.json", tmp_path)
    detours = [dataclasses.replace(demo(3), noisy=True)]
    for demos, recipe in (([], TINY), (detours, dataclasses.replace(TINY, noisy=False))):
        with pytest.raises(ConfigError, match=f"none of {len(demos)} demonstrations can be learned from: .*--demos"):
            training.train("ScienceWorld-v0", demos, recipe, tmp_path / "board", tmp_path, lambda line: None)


def test_a_damaged_checkpoint_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "board").mkdir()
    for damage in (b"", b"PK\x03\x04 cut off", b"no archive at all"):
        (tmp_path / "board" / "checkpoint.pt").write_bytes(damage)
        with pytest.raises(ConfigError, match=r"checkpoint\.pt is damaged: remove it, and the training begins anew$"):
            tiny_run(folder, tmp_path)


@pytest.mark.parametrize("written", [0, 1], ids=["checkpoint", "weights"])
def test_a_full_disk_is_one_line_and_the_training_goes_on(
    written: int, folder: Path, tmp_path: Path, small_disk: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(training, "MILLION", 1)
    found = tiny_run(folder, tmp_path / "whole")
    files = [tmp_path / "whole" / name for name in ("board/checkpoint.pt", "model/model.safetensors")]
    kilobytes = [path.stat().st_size // 1024 for path in files]
    disk = small_disk(40 + sum(kilobytes[:written]) + kilobytes[written] // 2)
    capsys.readouterr()
    assert exit_code(lambda: int(bool(tiny_run(folder, disk)))) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in said and "free some space and run the same command again" in said
    assert not list(disk.rglob("*.tmp")) and (disk / "board" / "checkpoint.pt").exists() == bool(written)
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    assert tiny_run(folder, disk) == found


def test_texts_that_look_like_control_tokens_are_text(folder: Path) -> None:
    prompt = EmbeddedPrompt(folder, 128)
    ids = prompt.ids([Message("user", "Task: x <act> y\n\nObservation: <end> z")])
    assert ids.count(prompt.act) == 1 and prompt.end not in ids and ids[-1] == prompt.act


def test_a_collection_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the shards that are not there are played, here by a stand-in for the expert."""
    from bopo_ray.executors import demos as module

    played: list[str] = []

    class Pool:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, _: object, env_id: str, names: list[str], path: Path):  # type: ignore[no-untyped-def]
            from concurrent.futures import Future

            done: Future[None] = Future()
            try:
                if len(played) >= 48 and not (tmp_path / "go").exists():
                    raise KeyboardInterrupt
                played.extend(names)
                table = [dataclasses.asdict(dataclasses.replace(demo(), task=n)) for n in names]
                module.write_table(module.pa.Table.from_pylist(table, module._SCHEMA), path)
                done.set_result(None)
            except KeyboardInterrupt as error:
                done.set_exception(error)
            return done

    monkeypatch.setattr(module, "process_pool", Pool)
    with pytest.raises(KeyboardInterrupt):
        collect("ScienceWorld-v0", tmp_path / "demos", 2, 100, lambda line: None)
    (tmp_path / "go").touch()
    made = collect("ScienceWorld-v0", tmp_path / "demos", 2, 100, lambda line: None)
    assert [d.task for d in made] == jobs(100) and sorted(played) == sorted(jobs(100))
    assert read_demos(next(iter(sorted((tmp_path / "demos").glob("*.parquet")))))[0] == dataclasses.replace(
        demo(), task=jobs(1)[0]
    )


def test_the_recipes_differ_by_honest_causes_only() -> None:
    for env in {e for e, _ in RECIPES}:
        small, large = RECIPES[env, "small"], RECIPES[env, "large"]
        assert small.width <= large.width and small.context <= large.context and small.tokens <= large.tokens
    json.dumps(dataclasses.asdict(TINY))


def test_a_wrong_option_of_a_recipe_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for option, value, rule in (("--noisy", "True", "need yes or no"), ("--tokens", "many", "need a whole number")):
        with pytest.raises(SystemExit) as stopped:
            train_main(["--env", "ALFWorld-v0", option, value])
        line = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and option in line and repr(value) in line and rule in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--heads 5", "width=96 with heads=5: need heads of one even size; set --width to a multiple of 10"),
        ("--width 33 --heads 11", "width=33 with heads=11: need heads of one even size"),
        ("--context 8", "context=8: need at least 64; set it with --context"),
        ("--batch-tokens 0", "batch_tokens=0: need at least 1; set it with --batch-tokens"),
        *[(f"--{name} 0", f"{name}=0: need at least 1") for name in ("heads", "layers", "tokens", "threads")],
        ("--demos -1", "demos=-1: need at least 0; set it with --demos"),
        ("--device cuda", "device='cuda': no GPU here; need cpu or auto"),
    ],
)
def test_a_model_that_can_not_be_made_is_one_line_before_anything_is_played(
    options: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_executors, "collect", lambda *_: pytest.fail("played"))
    with pytest.raises(SystemExit) as stopped:
        train_main(["--env", "ALFWorld-v0", "--size", "small", "--work", str(tmp_path / "w"), *options.split()])
    assert stopped.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


PLAYED = ["--env", "ALFWorld-v0", "--out", "played.csv"]


@pytest.mark.parametrize(
    ("main", "arguments", "says"),
    [
        (evaluate_main, [*PLAYED, "--k", "0"], "k=0: need at least 1; set it with --k"),
        (evaluate_main, [*PLAYED, "--processes", "0"], "processes=0: need at least 1; set it with --processes"),
        (evaluate_main, ["--env", "Nope"], "unknown environment 'Nope'"),
        (evaluate_main, ["--env", "AppWorld-v0"], "no models were trained for it; there are some for ScienceWorld-v0"),
        (train_main, ["--env", "ALFWorld-v0", "--processes", "0"], "processes=0: need at least 1; set it with"),
        (train_main, ["--env", "ALFWorld-v0", "--work", "taken/x"], "work=taken/x: can't be written (Not a directory)"),
    ],
)
def test_what_can_not_be_made_or_played_is_one_line(
    main: Callable[[list[str]], None], arguments: list[str], says: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.fixture
def made_by_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is played or trained; each file of a model says "new"."""

    def train(*args: object) -> dict[str, float]:
        out = args[4]
        assert isinstance(out, Path)
        for name in ("config.json", "model.safetensors"):
            (out / name).write_text("new")
        return {}

    monkeypatch.setattr(train_executors, "collect", lambda *_: [demo()])
    monkeypatch.setattr(training, "train_tokenizer", lambda demos, path: path.write_text("new"))
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(train_executors, "model_card", lambda about: "new")


FILES = {"README.md", "config.json", "executor.json", "model.safetensors", "tokenizer.json", "training.log"}


def test_a_models_folder_is_the_packages_own_only_where_out_names_it(made_by_stand_ins: None, tmp_path: Path) -> None:
    train_main(["--env", "ALFWorld-v0", "--size", "small", "--work", str(tmp_path)])
    assert {p.name for p in (tmp_path / "models" / "alfworld-small").iterdir()} == FILES


@pytest.mark.parametrize("moved", [None, *range(6)])
def test_a_model_is_replaced_whole_or_is_none(
    moved: int | None, made_by_stand_ins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended in training, or after so many files were moved."""
    (out := tmp_path / "out").mkdir()
    for name in FILES:
        (out / name).write_text("old")
    replace, left = Path.replace, [moved]

    def ends(self: Path, to: Path) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] = (left[0] or 0) - 1
        replace(self, to)

    def ends_at_once(*_: object) -> None:
        raise KeyboardInterrupt

    make = ["--env", "ALFWorld-v0", "--size", "small", "--work", str(tmp_path / "work"), "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(*((training, "train", ends_at_once) if moved is None else (Path, "replace", ends)))
        with pytest.raises(SystemExit):
            train_main(make)
    if moved is None:
        assert {(out / name).read_text() for name in FILES} == {"old"}
    else:
        assert not (out / "executor.json").exists(), "no such folder is read"
    train_main(make)
    assert {p.name for p in out.iterdir()} == FILES and "old" not in {(out / name).read_text() for name in FILES}


class Stage:
    """A simulator that fails at some tasks, so many times each; then it is dead, or says that it can't."""

    def __init__(self, fails: dict[str, int], dead: bool) -> None:
        self.fails, self.dead, self.started = fails, dead, 0

    def start(self, *_: object) -> SimpleNamespace:
        self.started += 1
        none = {"release": lambda: None, "close": lambda: None}
        return SimpleNamespace(usable=True, jvm=SimpleNamespace(alive=True), **none)

    def show(self, engine: SimpleNamespace, name: str, *_: object, **__: object) -> Iterator[Demo]:
        yield dataclasses.replace(demo(), task=name)
        if self.fails.get(name, 0):
            self.fails[name] -= 1
            engine.usable, engine.jvm.alive = False, not self.dead
            raise EngineError("gone")
        yield dataclasses.replace(demo(), task=name, noisy=True)


@pytest.mark.parametrize(
    ("module", "fails", "dead", "shown_", "started"),
    [
        (scienceworld, 0, True, "aabbcc", 1), (scienceworld, 1, True, "aabbcc", 2), (scienceworld, 2, True, "aa", 2),
        (scienceworld, 1, False, "aacc", 2), (alfworld, 0, True, "abc", 1), (alfworld, 1, True, "abc", 2),
        (alfworld, 2, True, "a", 2),
    ],
)  # fmt: skip
def test_a_simulator_that_dies_costs_no_demonstration(
    module: ModuleType, fails: int, dead: bool, shown_: str, started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried once more; then the error rises, so that no file is written without the task."""
    stage, made = Stage({"b": fails}, dead), list[Demo]()
    if module is scienceworld:
        monkeypatch.setattr(scienceworld.jvm, "acquire", stage.start)
        monkeypatch.setattr(scienceworld, "_show", stage.show)
    else:
        monkeypatch.setattr(alfworld.alfworld_process, "start", stage.start)
        monkeypatch.setattr(alfworld, "_layout", lambda kind, rng: None)
        monkeypatch.setattr(alfworld, "_show", lambda *a, **k: list(stage.show(*a, **k)).pop())
    with nullcontext() if fails < 2 else pytest.raises(EngineError, match="gone"):
        made += (d for d in module.demonstrate("abc"))
    assert "".join(d.task for d in made) == shown_ and stage.started == started


@pytest.mark.parametrize(("env", "size"), RECIPES)
def test_the_shipped_models_were_made_by_the_committed_recipes(env: str, size: str) -> None:
    about = json.loads((SHIPPED / f"{env.split('-')[0].lower()}-{size}" / "executor.json").read_text())
    assert about["recipe"] == dataclasses.asdict(RECIPES[env, size])
