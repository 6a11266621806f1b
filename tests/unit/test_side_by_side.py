"""All benchmarks by one command: what is known beforehand, how money is shared, what is drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from bopo_ray.analysis.tables import Settings as Bootstrap
from bopo_ray.analysis.tables import frontier, summary
from bopo_ray.errors import ConfigError
from bopo_ray.models.pricing import Usage
from bopo_ray.models.spend import SpendLedger
from bopo_ray.pipeline import jobs, side_by_side
from bopo_ray.pipeline.settings import resolve
from experiments.frontier import main
from tests.toy import ID
from tests.unit.test_analysis_tables import synthetic_episodes

TWO = (ID, "docs.example_env:Doors-v0")


def finished(folder: Path) -> None:
    """A folder that looks like a finished run's."""
    episodes, settings = synthetic_episodes(n_tasks=8), Bootstrap(n=20)
    folder.mkdir(parents=True)
    frontier(episodes, settings).to_csv(folder / "frontier.csv", index=False)
    (folder / "summary.json").write_text(json.dumps(summary(episodes, settings) | {"label": "simulated pair"}))


class Started:
    """Stands for the processes: keeps their arguments, finishes their folders, and spends."""

    def __init__(self, spent: Sequence[int] = (0, 0), codes: Sequence[int] = (0, 0)) -> None:
        self.arguments: list[list[str]] = []
        self.spent, self.codes = spent, codes

    def __call__(self, command: list[str]) -> int:
        at, folder = len(self.arguments), Path(command[command.index("--out") + 1])
        self.arguments.append(command[3:])
        finished(folder)
        ledger = SpendLedger(folder / "spend.db", None)
        reservation = ledger.reserve("me", "key", "m", self.spent[at])
        assert reservation is not None
        ledger.settle(reservation, Usage(1, 1), self.spent[at])
        return self.codes[at]


def test_each_benchmark_has_its_folder_and_all_share_the_money(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = Started(spent=(1_250_000, 400_000))
    monkeypatch.setattr(jobs, "run_process", started)
    settings = resolve(None, {"env": "all", "max_spend": "2"})
    assert side_by_side.run_all(settings, ["--env", "all", "--max-spend", "2", "--resume"], tmp_path, TWO) == 0
    first, second = started.arguments
    assert first[-6:] == ["--env", TWO[0], "--out", str(tmp_path / "toy-v0"), "--max-spend", "2.000000"]
    assert second[-6:] == ["--env", TWO[1], "--out", str(tmp_path / "doors-v0"), "--max-spend", "0.750000"]
    assert "--resume" in first and "--resume" in second
    with Image.open(tmp_path / "frontiers.png") as image:
        assert image.width == 1800
    assert (tmp_path / "frontiers.svg").read_text().startswith("<svg")
    assert "frontiers.png" in capsys.readouterr().out


def test_the_first_that_fails_ends_it_with_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(codes=(3, 0))
    monkeypatch.setattr(jobs, "run_process", started)
    assert side_by_side.run_all(resolve(None, {"env": "all"}), [], tmp_path, TWO) == 3
    assert len(started.arguments) == 1 and "--max-spend" not in started.arguments[0]
    assert not (tmp_path / "frontiers.png").exists()


def test_a_missing_engine_is_known_before_anything_is_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(env: str) -> None:
        if env.startswith("AppWorld"):
            raise ConfigError("AppWorld needs a virtual environment: run `make appworld`")

    started = Started()
    monkeypatch.setattr(jobs, "run_process", started)
    monkeypatch.setattr(side_by_side, "check_ready", check)
    assert main(["--env", "all", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: AppWorld needs a virtual environment: run `make appworld`\n"
    assert not started.arguments and not (tmp_path / "out").exists()


def test_a_run_counts_what_its_studies_spent_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken off its limit, too, they would count twice; a study's own limit is less what the run spent."""
    run, study = tmp_path / "full", tmp_path / "full" / "hard-budget"
    for folder, spent in ((run, 500_000), (study, 400_000)):
        finished(folder)
        ledger = SpendLedger(folder / "spend.db", None)
        reservation = ledger.reserve("me", "key", "m", spent)
        assert reservation is not None
        ledger.settle(reservation, Usage(1, 1), spent)
    limits: list[str] = []
    monkeypatch.setattr(jobs, "run_process", lambda command: limits.append(command[-1]) or 0)  # type: ignore[func-returns-value]
    other = tmp_path / "no-bosft"  # beside them: it has what the run and its study leave
    asked = [jobs.Job(name, folder, ("x",)) for name, folder in (("run", run), ("study", study), ("other", other))]
    assert jobs.run_jobs(asked, 2.0) == 0
    assert limits == ["2.000000", "1.500000", "1.100000"]
    limits.clear()
    assert jobs.run_jobs([asked[0], asked[2]], 2.0) == 0
    assert limits == ["2.000000", "1.100000"], "a study that is no job of these counts, too"


def test_what_killed_runs_left_reserved_counts_and_no_limit_is_rounded_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = SpendLedger(tmp_path / "first" / "spend.db", None)
    reservation = ledger.reserve("me", "key", "m", 500_000)
    assert reservation is not None and ledger.reserve("one that was killed", "another", "m", 400_000)
    ledger.settle(reservation, Usage(1, 1), 500_000)
    limits: list[str] = []
    monkeypatch.setattr(jobs, "run_process", lambda command: limits.append(command[-1]) or 0)  # type: ignore[func-returns-value]
    asked = [jobs.Job("next", tmp_path / "next", ("x",))]
    for max_spend in (2.0, 2.0000019, 0.5):
        assert jobs.run_jobs(asked, max_spend, [tmp_path / "first"]) == 0
    assert limits == ["1.100000", "1.100001", "0.000000"]
