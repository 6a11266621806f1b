"""Which of the ablation's runs a command asks for."""

from pathlib import Path

import pandas as pd
import pytest

from bopo_ray.analysis import tables
from bopo_ray.analysis.finished import FinishedRun
from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.jobs import Job
from bopo_ray.records import CostMode
from experiments.ablation import FULL, asked, write
from tests.unit.test_analysis_tables import synthetic_episodes


def _jobs(finished: str) -> dict[str, Job]:
    return {
        name: Job(name, Path(name), ("experiments.frontier",), lambda name=name: name == finished)
        for name in ("full", "no-bosft", "no-bonus", "paper")
    }


def test_parts_are_run_beside_the_full_method_and_what_is_finished_joins_the_table() -> None:
    assert list(asked(_jobs(""), [])) == ["full", "no-bosft", "no-bonus", "paper"]
    assert list(asked(_jobs(""), ["paper"])) == ["full", "paper"]
    assert list(asked(_jobs("paper"), ["no-bonus"])) == ["full", "no-bonus", "paper"]
    assert list(asked(_jobs(""), ["full"])) == ["full"]


def test_a_part_that_there_is_not_is_named() -> None:
    with pytest.raises(ConfigError, match="--parts=no-value: with these settings it may name full, no-bosft"):
        asked(_jobs(""), ["paper", "no-value"])


@pytest.mark.parametrize("mode", CostMode)
def test_variants_are_compared_by_what_their_runs_count(
    mode: CostMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes = synthetic_episodes()
    monkeypatch.setattr(FinishedRun, "evaluation", lambda self: episodes)
    full = {"env": "Toy-v0", "label": "simulated pair", "note": "A note.", "cost": str(mode)}
    write(tmp_path, {FULL: FinishedRun(tmp_path, full, pd.DataFrame(), pd.DataFrame())})
    found = pd.read_csv(tmp_path / "ablation.csv").set_index("variant")["estimate"]
    known = tables.summary(episodes[episodes["method"].isin([*found.index, "always-small", "always-large"])],
                           tables.Settings(cost=mode))["hypervolumes"]  # fmt: skip
    assert found.to_dict() == pytest.approx({m: v["estimate"] for m, v in known.items()})
