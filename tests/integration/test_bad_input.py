"""What a user gets wrong is refused before anything starts: one line that names it, exit code 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from bopo_ray.models import load_pool
from bopo_ray.store import EpisodeStore
from experiments.frontier import main
from tests.toy import ID, play, toy_spec

pytestmark = pytest.mark.integration
TOY = ["--env", ID, "--scale", "tiny"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, and no Ray: the test fails should one be started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the command, which must fail with exit code 2; returns the one line on stderr."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--env", "Nowhere-v0"], ["'Nowhere-v0'", "ScienceWorld-v0"]),
        (["--env", "no.such.module:X-v0"], ["'no.such.module:X-v0'", "package.module:Name-v0"]),
        (["--env", "CartPole-v1"], ["'CartPole-v1'", "task lists", "envs/base.py"]),
        ([*TOY, "--models", "gpt-9"], ["'gpt-9'", "simulated", "--models"]),
        ([*TOY, "--lambdas", "0.1,-0.3"], ["lambdas=(0.1, -0.3)", ">= 0", "--lambdas"]),
        ([*TOY, "--lambdas", "cheap"], ["lambdas='cheap'", "numbers >= 0", "--lambdas"]),
        ([*TOY, "--lambdas", ""], ["lambdas=''", "numbers >= 0", "--lambdas"]),
        ([*TOY, "--lambdas", "nan"], ["lambdas=(nan,)", ">= 0", "--lambdas"]),
        ([*TOY, "--seeds", "0,-1"], ["seeds=(0, -1)", ">= 0", "--seeds"]),
        ([*TOY, "--seeds", "1.5"], ["seeds='1.5'", "whole numbers", "--seeds"]),
        (["--env", ID, "--scale", "enormous"], ["scale='enormous'", "tiny, quick, paper", "--scale"]),
        ([*TOY, "--train-tasks", "0"], ["train_tasks=0", "at least 1", "--train-tasks"]),
        ([*TOY, "--test-tasks", "0"], ["test_tasks=0", "at least 1", "--test-tasks"]),
        ([*TOY, "--advantage", "hybrid,magic"], ["'magic'", "hybrid", "vanilla", "--advantage"]),
        ([*TOY, "--cost", "euro"], ["cost='euro'", "usd", "--cost"]),
        ([*TOY, "--group-size", "1"], ["group_size=1", "at least 2", "--group-size"]),
    ],
)
def test_a_wrong_option(
    arguments: list[str], named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *arguments)
    for part in named:
        assert part in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lambdas: [0.1", ["can't be read", "line 1"]),
        ("lambda: 0.1", ["unknown 'lambda'", "lambdas"]),
        ("- 1", ["unknown 'list'"]),
        ("updates: many", ["updates='many'", "a whole number", "--updates"]),
        ("scale: huge", ["scale='huge'", "quick"]),
        (None, ["No such file"]),
    ],
)
def test_a_wrong_settings_file(
    text: str | None, named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    line = refused(capsys, "--env", ID, "--settings", str(file))
    for part in named:
        assert part in line
    assert list(tmp_path.iterdir()) == ([file] if text is not None else [])


def test_a_file_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for out in (taken, taken / "below"):
        line = refused(capsys, *TOY, "--out", str(out))
        assert str(out) in line and "choose another --out" in line
    assert taken.read_text() == "mine" and list(tmp_path.iterdir()) == [taken]


@pytest.mark.parametrize(("key", "what"), [(b"bopo_ray.schema", "schema version"), (b"bopo_ray.prices", "price table")])
def test_episodes_of_another_version(key: bytes, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "results" / "episodes" / "boundary"
    EpisodeStore(folder, load_pool("simulated").price_hash).append([play(toy_spec())[0]])
    (shard,) = folder.iterdir()
    table = pq.read_table(shard)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, key: b"from-elsewhere"}), shard)
    before = shard.read_bytes()
    line = refused(capsys, *TOY, "--out", str(tmp_path / "results"))
    assert str(shard) in line and what in line and "from-elsewhere" in line and "choose another --out" in line
    assert shard.read_bytes() == before
