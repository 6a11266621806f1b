"""A run's plays: whose weights its runners act by; its files, and what it says at the start."""

from __future__ import annotations

import os
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from bopo_ray.errors import ConfigError
from bopo_ray.models.pool import read_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.pipeline import run as module
from bopo_ray.pipeline.run import Run, crowded, write_json
from bopo_ray.pipeline.settings import Settings, resolve
from bopo_ray.records import Phase
from tests.toy import ID, toy_spec


def test_weights_are_new_to_the_runners_at_each_play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners keep the weights of a version that they know: the same one for other weights would play the old ones."""
    given: list[tuple[Any, int]] = []
    monkeypatch.setattr(
        module, "collect", lambda runners, specs, weights, version, *_, **__: given.append((weights, version))
    )
    monkeypatch.setattr(Run, "runners", lambda self: None)
    with Run(resolve(None, {"env": ID, "scale": "tiny"}), tmp_path / "run", False, Console(quiet=True)) as run:
        for i, store in enumerate((run.store("dev"), run.store("dev"), run.store("evaluation"))):
            run.play("calibrating", store, [toy_spec(member=i, phase=Phase.SELECTION)], f"weights {i}")
        run.play("nothing is missing", run.store("dev"), [], "weights 3")
    assert [w for w, _ in given] == ["weights 0", "weights 1", "weights 2"]
    assert len({version for _, version in given}) == 3


def test_a_file_gets_its_name_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        assert self.stat().st_ino in synced, f"{target} is renamed before it is written"
        return real(self, target)

    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(os.fstat(fd).st_ino))
    monkeypatch.setattr(Path, "replace", replace)
    write_json(tmp_path / "ledger.json", {"a": 1})
    with Run(resolve(None, {"env": ID, "scale": "tiny"}), tmp_path / "run", False, Console(quiet=True)) as run:
        names = {"settings.yaml", "tasks.json"}
    assert (tmp_path / "ledger.json").read_text() and names <= {p.name for p in run.out.iterdir()}


def test_more_processes_than_calls_that_an_endpoint_is_to_have_are_said(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text(
        "models:\n- {model: 'openai:a', price: 0, max_concurrency: 8}\n"
        "- {model: 'hf:b', price: 0, max_concurrency: 1}\n"
    )
    models = read_pool(tmp_path / "pool.yaml", price_table())
    assert crowded(models, 8) == []
    (line,) = crowded(models, 9)
    assert line.startswith("a: max_concurrency=8 is less") and "up to 9 calls may be in flight" in line


def test_a_pool_whose_processes_would_fall_silent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_text(
        "models:\n- {model: 'openai:a', price: 0}\n- {model: 'openai:b', price: 0, requests_per_minute: 6}\n"
    )
    models = read_pool(tmp_path / "pool.yaml", price_table())
    assert crowded(models, 6) == []
    with pytest.raises(ConfigError) as refused:
        crowded(models, 64)
    said = str(refused.value)
    assert said.startswith("model 'openai:b': requests_per_minute=6 lets each of 64 processes begin a call only every")
    assert "every 640 s; need 64 or more" in said and "--cpus" in said and "\n" not in said


def test_a_task_may_be_left_out_by_name(tmp_path: Path) -> None:
    def settings(*names: str) -> Settings:
        return resolve(None, {"env": ID, "scale": "tiny", "without_tasks": names})

    quiet = Console(quiet=True)
    with Run(settings(), tmp_path / "all", False, quiet) as run:
        tasks = run.train
    with Run(settings(tasks[0].name, tasks[2].name), tmp_path / "fewer", False, quiet) as run:
        assert set(run.train) & {tasks[0], tasks[2]} == set() and len(run.train) == len(tasks)
    with pytest.raises(ConfigError, match=r"without_tasks='fetch/999': .*; names look like 'fetch/0' or 'long/207'; "):
        Run(settings("fetch/999"), tmp_path / "none", False, quiet)


def test_time_left_does_not_count_the_start_of_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of 30 comes after 41 s, ten more 2 s apart."""
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    said = Console(record=True, width=100, file=StringIO())
    settings = resolve(None, {"env": ID, "scale": "tiny"})
    with Run(settings, tmp_path / "run", False, said) as run, run.progress("playing", 33, done=3) as advance:
        for i in range(11):
            now = 1041.0 + 2 * i
            advance()
    lines = [line for line in said.export_text().splitlines() if line.startswith("playing")]
    assert lines[:3] == ["playing: 3/33, 0 s", "playing: 4/33, 41 s", "playing: 14/33, 61 s, 38 s left"]


def test_tensorboard_is_named_by_the_main_job_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a study has no logs for it."""
    started = SimpleNamespace(dashboard_url="", address_info={"session_dir": "/tmp"})
    ray = SimpleNamespace(
        is_initialized=lambda: False, init=lambda **_: started, cluster_resources=lambda: {"CPU": 2}, nodes=lambda: [0]
    )
    monkeypatch.setattr(module, "ray", ray)
    monkeypatch.setattr(module, "host_pool", lambda models: None)
    said = Console(record=True, width=100, file=StringIO())
    with Run(resolve(None, {"env": ID, "scale": "tiny", "cpus": 2}), tmp_path / "run", False, said) as run:
        run.start_ray()
    text = said.export_text()
    assert "Ray's logs:" in text and "TensorBoard" not in text
