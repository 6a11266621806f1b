"""Experts on disk, read in parts; and the calibration of p(LARGE), by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bopo_ray.method.calibration import calibration
from bopo_ray.method.synthesis import Expert
from bopo_ray.records import Difficulty
from bopo_ray.rllib import experts as module
from bopo_ray.rllib.experts import ExpertFile
from tests.toy import play, toy_spec

LONG = play(toy_spec("long/0"))[0]


def expert(i: int) -> Expert:
    """One of 1 to 20 steps, every third Hard."""
    n = 1 + i % len(LONG.steps)
    episode = dataclasses.replace(LONG, spec=toy_spec("long/0", member=i), steps=LONG.steps[:n])
    difficulty = (Difficulty.HARD, Difficulty.EASY, Difficulty.INTRACTABLE)[i % 3]
    return Expert(episode, tuple(int(i % 3 == 0 and t % 2) for t in range(n)), difficulty)


def test_what_is_written_comes_back_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP_STEPS", 40)
    made = [expert(i) for i in range(60)]
    asked: list[int] = []

    def one_by_one() -> Iterator[Expert]:
        for i, e in enumerate(made):
            asked.append(i)
            yield e

    file = ExpertFile.write(tmp_path / "experts.parquet", one_by_one())
    assert asked == list(range(60)) and file.trajectories == 60 and not list(tmp_path.glob("*.tmp"))
    assert file.steps == {d: sum(len(e.labels) for e in made if e.difficulty is d) for d in Difficulty}
    read, groups = pq.ParquetFile.read_row_group, list[int]()
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, i: (groups.append(i), read(self, i))[1])
    parts = file.parts(100)
    first = next(parts)
    assert 100 <= sum(len(e.labels) for e in first) < 120 and len(groups) <= 3, "no more is read than a part needs"
    rest = list(parts)
    assert [e for part in (first, *rest) for e in part] == made
    assert all(100 <= sum(len(e.labels) for e in part) < 120 for part in rest[:-1])
    a, b, c = ([e for part in file.parts(100, np.random.default_rng(s)) for e in part] for s in (1, 1, 2))
    assert a == b != c and sorted(a, key=made.index) == sorted(c, key=made.index) == made


def test_no_experts_are_a_file_too(tmp_path: Path) -> None:
    file = ExpertFile.write(tmp_path / "none.parquet", [])
    assert file.trajectories == 0 and file.steps == {} and list(file.parts(10)) == []


def test_calibration_by_hand() -> None:
    # Bins of a half: 0.1 and 0.4 for one success in two, 0.8 for one in one: (|0.5 - 1| + |0.8 - 1|) / 3.
    found = calibration([0.1, 0.4, 0.8], [True, False, True], bins=2)
    assert found is not None and found.steps == 3
    assert found[1:] == pytest.approx((1.3 / 3, 2 / 3, 0.7 / 3))
    assert calibration([], []) is None
    certain = calibration([0.0, 1.0], [False, True])
    assert certain is not None and certain.error == 0


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_the_error_is_no_less_than_the_means_differ(rows: list[tuple[float, bool]]) -> None:
    found = calibration(*zip(*rows, strict=True))
    assert found is not None and abs(found.p_large - found.large) <= found.error + 1e-9 <= 1 + 2e-9
