"""Which of the ablation's runs a command asks for."""

from pathlib import Path

import pytest

from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.jobs import Job
from experiments.ablation import asked


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
