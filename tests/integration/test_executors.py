"""The embedded models' teachers on the real engines, and the models that ship with the project."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import gymnasium as gym
import pandas as pd
import pytest
import torch

import envs  # noqa: F401 (registers the benchmarks)
from bopo_ray.benchmarks import check_ready, fair_tasks, select_tasks
from bopo_ray.errors import ConfigError
from bopo_ray.executors import alfworld, scienceworld
from bopo_ray.executors.demos import Demo
from bopo_ray.executors.evaluate import play_boundaries
from bopo_ray.models import build_pool
from bopo_ray.models.embedded import EmbeddedModel, embedded_folder, embedded_names
from bopo_ray.models.pool import resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.models.protocol import Message, Request
from bopo_ray.pipeline.settings import resolve
from envs.base import Split
from experiments.evaluate_executors import main as evaluate_executors

NAMES = ("alfworld-large", "alfworld-small", "scienceworld-large", "scienceworld-small")


def alfworld_ready() -> None:
    try:
        check_ready("ALFWorld-v0")
    except ConfigError as error:
        pytest.skip(str(error))


def test_scienceworlds_expert_shows_what_the_environment_then_does() -> None:
    names = [n for n in scienceworld.jobs(0) if n.startswith("find-animal/")][:1]
    shown = list(scienceworld.demonstrate(names))
    assert [(d.task, d.noisy) for d in shown] == [(names[0], False), (names[0], True)]
    env = gym.make("ScienceWorld-v0")
    for demo in shown:
        assert len(demo.actions) == len(demo.observations) == len(demo.taught) <= scienceworld.MAX_STEPS
        assert all(demo.taught) is not demo.noisy
        first, info = env.reset(options={"task": demo.task})
        assert (first, info["task_text"]) == (demo.first_observation, demo.task_text)
        for action, text in zip(demo.actions, demo.observations, strict=True):
            observation, _, _, _, info = env.step(action)
            assert observation == text
        assert info["success"]
    env.close()


def test_alfworlds_expert_wins_games_that_are_on_no_list() -> None:
    alfworld_ready()
    shown = list(alfworld.demonstrate(alfworld.jobs(12)))
    assert len(shown) >= 6 and any(d.noisy for d in shown) and {len(d.kind) > 0 for d in shown} == {True}
    again = list(alfworld.demonstrate([shown[0].task]))
    assert again == shown[:1], "the same name is the same game, played the same way"
    for demo in shown:
        assert isinstance(demo, Demo) and len(demo.actions) <= alfworld.MAX_STEPS and alfworld.shown(demo.task)
        assert demo.taught[-1] and (all(demo.taught) or demo.noisy)


def test_the_shipped_models_are_whole_small_and_known() -> None:
    assert embedded_names() == NAMES
    size = sum(p.stat().st_size for n in NAMES for p in embedded_folder(n).iterdir())
    assert size < 40e6
    for name in NAMES:
        folder: Path = embedded_folder(name)
        (model,) = [m for m in pool(name.partition("-")[0]).models if m.name == name]
        assert isinstance(model, EmbeddedModel)
        model.check()
        assert model.files.size == name.partition("-")[2] and model.kinds
        assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")
        assert "held out" in (folder / "training.log").read_text()


def pool(family: str):  # type: ignore[no-untyped-def]
    return build_pool(resolve_pool(f"embedded:{family}", "", "", price_table()))


@pytest.mark.parametrize("family", ["alfworld", "scienceworld"])
def test_a_shipped_model_writes_what_transformers_writes_with_it(family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = "Your task is to: put some apple on countertop." if family == "alfworld" else "Your task is to find a plant."
    messages = (Message("system", "x"), Message("user", f"Task: {task}\n\nObservation: You see a fridge 1."))
    for model in pool(family).models:
        assert isinstance(model, EmbeddedModel)
        reply = model.complete(Request(messages, 0, 0.0, 32, ""))
        tokenizer = AutoTokenizer.from_pretrained(model.files.folder)
        plain = AutoModelForCausalLM.from_pretrained(model.files.folder, dtype=torch.float32)
        chat = [{"role": m.role, "content": m.content} for m in messages]
        ids = list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        written = plain.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist()
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == reply.text != ""
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), len(written))


def test_the_pair_is_asked_what_it_was_made_for_and_did_not_learn_from() -> None:
    spec = resolve_pool("embedded:scienceworld", "", "", price_table())
    fair = fair_tasks("ScienceWorld-v0", build_pool(spec))
    kinds = build_pool(spec).models[0].kinds  # type: ignore[attr-defined]
    for split in Split:
        tasks = select_tasks("ScienceWorld-v0", split, 100, 0, fair=fair)
        assert len(tasks) == 100 and {t.kind for t in tasks} == kinds
        assert not any(scienceworld.shown(t.name) for t in tasks)
    with pytest.raises(ConfigError, match=r"'scienceworld-small' was trained for ScienceWorld-v0, not for ALFWorld-v0"):
        fair_tasks("ALFWorld-v0", build_pool(spec))


def test_alfworlds_pair_plays_games_it_never_saw() -> None:
    alfworld_ready()
    tasks = random.Random(0).sample([t.name for t in select_tasks("ALFWorld-v0", Split.DEV, 60, 0)], 10)
    settings = resolve(None, {"env": "ALFWorld-v0"})
    spec = resolve_pool(settings.pool, "", "", price_table())
    played = play_boundaries("ALFWorld-v0", spec, tasks, 2, 1, settings.max_steps, settings.temperature)
    success = [sum(p.success for p in played if p.model == m) for m in (0, 1)]
    assert len(played) == 40 and success[0] < success[1] and success[1] >= 10
    assert all(p.cost_usd > 0 and p.steps <= 30 for p in played)
    assert played == play_boundaries("ALFWorld-v0", spec, tasks, 2, 1, settings.max_steps, settings.temperature)


def test_a_model_of_any_folder_is_compared_at_the_price_of_the_one_it_stands_in_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alfworld_ready()
    variant, out = tmp_path / "any_name", tmp_path / "played.csv"
    shutil.copytree(embedded_folder("alfworld-small"), variant)
    asked = ["--env", "ALFWorld-v0", "--tasks", "2", "--k", "1", "--out", str(out)]
    tables = []
    for small in ([], ["--small", str(variant)]):
        evaluate_executors([*asked, *small])
        tables.append(pd.read_csv(out))
    own, theirs = tables
    assert theirs.equals(own) and len(own) == 4 and (own["cost_usd"] > 0).all()
    assert "small dearer on" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        evaluate_executors([*asked, "--large", str(tmp_path / "none")])
    assert "no such model and no such folder" in capsys.readouterr().err
