"""A run's plays: whose weights its runners act by; its files, and what it says at the start."""

from __future__ import annotations

import os
from collections.abc import Callable
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


class FakeRay:
    """As much of Ray as `Run.start_ray` asks; `started` is what it was started with."""

    def __init__(self, connected: bool = False) -> None:
        self.connected = connected
        self.started: dict[str, Any] = {}

    def is_initialized(self) -> bool:
        return self.connected

    def init(self, **how: Any) -> Any:
        self.connected, self.started = True, how
        return SimpleNamespace(dashboard_url="", address_info={"session_dir": "/tmp"})

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "here", "Alive": True, "Resources": {"CPU": 2, "memory": 8e9}}]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Run, str]]:
    """Starts a run on a fake Ray; returns it and what it said."""

    def started(ray: FakeRay, **settings: Any) -> tuple[Run, str]:
        monkeypatch.setattr(module, "ray", ray)
        monkeypatch.setattr(module, "node_id", lambda: "here")
        monkeypatch.setattr(module, "host_pool", lambda models: None)
        monkeypatch.setattr(module, "serve_desk", lambda desk, environment: desk)
        said = Console(record=True, width=100, file=StringIO())
        with Run(resolve(None, {"env": ID, "scale": "tiny", **settings}), tmp_path / "run", True, said) as run:
            run.start_ray()
        return run, said.export_text()

    return started


def test_tensorboard_is_named_by_the_main_job_alone(start: Callable[..., tuple[Run, str]]) -> None:
    """A run of a study has no logs for it."""
    run, text = start(FakeRay(), cpus=2)
    assert "Ray's logs:" in text and "TensorBoard" not in text
    assert run.desk.actor == "", "all its processes are here"


def test_a_run_serves_its_desk_where_ray_was_there_before_it(
    start: Callable[..., tuple[Run, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each node opens a ledger of its own, with the whole of --max-spend."""
    ray = FakeRay(connected=True)
    run, _ = start(ray)
    assert (run.desk.node, run._desk_actor) == ("here", run.desk) and run.desk.actor and not ray.started
    with pytest.raises(ConfigError, match="has no GPU"):
        start(ray, num_gpus_per_learner=1)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    run, _ = start(ray := FakeRay())
    assert run.desk.node == "here" and run.desk.actor and ray.started["address"] == "auto"


def test_ray_starts_with_the_cpus_that_this_process_may_use(
    start: Callable[..., tuple[Run, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    for cpus, num_cpus, line in ((0, 4, ""), (4, 4, ""), (6, 6, "--cpus 6: this machine has 4, ")):
        _, text = start(ray := FakeRay(), cpus=cpus)
        assert ray.started["num_cpus"] == num_cpus and text.startswith(line or "Ray dashboard")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    start(ray := FakeRay())
    assert ray.started["num_cpus"] is None, "Ray knows a container's limit"


def test_nothing_waits_for_runners_without_a_word(
    start: Callable[..., tuple[Run, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RLlib would, before there is a `Fleet` to say that none comes."""
    run, _ = start(FakeRay())
    monkeypatch.setattr(module, "RunnerGroup", lambda config, local_env_runner: config)
    for cpus in (2, 9):
        monkeypatch.setattr(Run, "cpus", cpus)
        run._group = None
        assert run.runners().validate_env_runners_after_construction is False  # type: ignore[attr-defined]
