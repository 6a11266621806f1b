"""What is known after the boundary rollouts."""

from __future__ import annotations

import dataclasses
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from bopo_ray.errors import GateError
from bopo_ray.pipeline import stages
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.settings import resolve
from bopo_ray.records import CostMode
from bopo_ray.rllib.bopo import Boundary
from bopo_ray.rllib.bosft import BoSFT, BoSFTConfig, Judgement
from bopo_ray.rllib.open_desk import DeskConfig
from bopo_ray.routers import ALWAYS_LARGE, ALWAYS_SMALL
from tests.toy import ID, toy_spec
from tests.unit.test_baselines import played
from tests.unit.test_experts import expert


def test_without_a_hard_task_a_run_ends_before_bosft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def boundary(task: str, small: bool, large: bool) -> Boundary:
        return Boundary([played(ALWAYS_SMALL, task, small, 0)], [played(ALWAYS_LARGE, task, large, 1)], CostMode.USD)

    easy, intractable = boundary("a", True, True), boundary("b", False, False)
    hard = boundary("c", False, True)
    monkeypatch.setattr(Run, "play", lambda *_, **__: None)
    settings, console = resolve(None, {"env": ID, "scale": "tiny"}), Console(record=True, width=200)
    with Run(settings, tmp_path / "run", False, console) as run:
        for found, says in (
            ({"a": easy}, r"among 1 \(1 Easy, 0 Intractable\), .* a weaker --small"),
            ({"b": intractable}, r"among 1 \(0 Easy, 1 Intractable\), .* a stronger --large"),
            ({"a": easy, "b": intractable}, r"among 2 \(1 Easy, 1 Intractable\), .* --small .* --large"),
        ):
            monkeypatch.setattr(stages, "read_boundaries", lambda *_, found=found: found)
            with pytest.raises(GateError, match=says):
                stages.boundary_stage(run)
        assert "taxonomy: 1 easy, 0 hard, 1 intractable" in console.export_text(), "said before it ends"
        monkeypatch.setattr(stages, "read_boundaries", lambda *_: {"a": easy, "c": hard})
        assert stages.boundary_stage(run)
    with Run(dataclasses.replace(settings, ignore_gate=True), tmp_path / "run", True, console) as run:
        monkeypatch.setattr(stages, "read_boundaries", lambda *_: {"a": easy})
        assert stages.boundary_stage(run)


def test_what_bosft_learned_is_said_in_words_and_nothing_of_tasks_that_were_not_held_out() -> None:
    figures: dict[str, Any] = {
        "experts": 6, "steps": 79, "epoch": 3, "epochs": 20, "loss": 0.25, "held_out": 0, "validation_loss": 0.125,
        "calibration": {"hard": {"p_large": 0.83, "large": 0.8, "error": 0.05}},
    }  # fmt: skip
    imitates, hard, classes = stages._said(figures, 0.83)
    assert imitates.endswith("6 trajectories, one a task, 79 steps in all; it keeps epoch 3 of 20, whose loss is 0.250")
    assert "0.83 on Hard training tasks" in hard and "needs 0.10" in hard
    assert "on training tasks" in classes and classes.endswith("hard 0.83 (0.80; 0.05)")
    imitates, _, classes = stages._said(figures | {"held_out": 2}, 0.83)
    assert imitates.endswith("is 0.250, and 0.125 on 2 held-out tasks") and "on held-out tasks" in classes
    assert len(list(stages._said(figures | {"calibration": {}}, 0.83))) == 2


def test_what_bosft_took_of_a_gpu_is_free_before_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trained(BoSFT):
        """With nothing to learn; it refers to itself, as RLlib's do."""

        def __init__(self) -> None:
            self.itself = self

        def fit(self, *_: Any, **__: Any) -> dict[str, float]:
            return {"epoch": 1}

        def judge(self, _: Any) -> Judgement:
            return Judgement(0.0, np.zeros(0), np.zeros(0, bool), np.zeros(0, str))

        def save_router(self, folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)

        set_experts = load_router = sharpen = lambda *_: None
        stop = lambda _: None  # noqa: E731

    made, there = list[weakref.ref[Trained]](), list[bool]()

    def build(_: BoSFTConfig) -> Trained:
        algorithm = Trained()
        made.append(weakref.ref(algorithm))
        return algorithm

    monkeypatch.setattr(BoSFTConfig, "build_algo", build)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: there.append(made[0]() is not None))
    monkeypatch.setattr(stages, "describe", lambda *_, **__: None)
    settings, console = resolve(None, {"env": ID, "scale": "tiny"}), Console(quiet=True)
    with Run(settings, tmp_path / "run", False, console) as run:
        monkeypatch.setattr(Run, "cpus", 1)
        stages._train(run, [expert(0)], {}, run.out / "bosft")
    assert there == [False]


def test_the_tasks_are_read_where_the_run_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another node the environment is that of its Ray."""
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    lent = DeskConfig(actor="desk")
    monkeypatch.setattr(stages, "borrow_environment", lambda desk: monkeypatch.setenv("ALFWORLD_DATA", desk.actor))
    made = stages.gym.make

    def make(*args: Any, **kwargs: Any) -> Any:
        assert os.environ["ALFWORLD_DATA"] == "desk", "first of all"
        return made(*args, **kwargs)

    monkeypatch.setattr(stages.gym, "make", make)
    (text,) = stages._task_texts(lent, ID, {"max_steps": 5}, [toy_spec().task]).values()
    assert text
