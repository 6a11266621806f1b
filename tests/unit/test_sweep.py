"""The sweep's checkpoints: which one an interrupted point goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bopo_ray.pipeline.run import write_json
from bopo_ray.pipeline.sweep import CONTENTS, Point, Sweep

POINT = Point("hybrid", 0.3, 0)


def checkpoint(folder: Path, attempt: int, number: int, updates: int) -> Path:
    """As the sweep leaves it."""
    path = folder / f"attempt-{attempt}" / POINT.name / f"checkpoint_{number:06}"
    (path / "learner").mkdir(parents=True)
    (path / "learner" / "module_state.pkl").write_bytes(bytes(1000 + number))
    (path / "updates.json").write_text(str(updates))
    sizes = {str(f.relative_to(path)): f.stat().st_size for f in path.rglob("*") if f.is_file()}
    write_json(path / CONTENTS, sizes)
    return path


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    made = Sweep.__new__(Sweep)
    made.folder = tmp_path
    return made


def chosen(sweep: Sweep) -> str | None:
    return sweep._checkpoint(POINT)


def test_the_newest_is_taken_whichever_attempt_made_it(sweep: Sweep) -> None:
    assert chosen(sweep) is None
    first = checkpoint(sweep.folder, 0, 0, 1)
    assert chosen(sweep) == str(first)
    second = checkpoint(sweep.folder, 0, 1, 2)
    checkpoint(sweep.folder, 1, 0, 1)
    assert chosen(sweep) == str(second)


@pytest.mark.parametrize(
    "damage",
    [
        lambda at: (at / "learner" / "module_state.pkl").write_bytes(b"half"),
        lambda at: (at / "learner" / "module_state.pkl").unlink(),
        lambda at: (at / CONTENTS).unlink(),
        lambda at: (at / CONTENTS).write_text('{"learner/'),
        lambda at: (at / "updates.json").write_text("?"),
        lambda at: (at / "updates.json").unlink(),
    ],
    ids=["cut short", "file gone", "killed before its list", "half a list", "no number", "no updates"],
)
def test_a_damaged_one_is_passed_over_for_the_one_before(sweep: Sweep, damage: Callable[[Path], object]) -> None:
    whole = checkpoint(sweep.folder, 0, 0, 1)
    damage(checkpoint(sweep.folder, 0, 1, 2))
    assert chosen(sweep) == str(whole)
    damage(whole)
    assert chosen(sweep) is None, "then the point begins anew"


def test_a_list_of_other_sizes_is_no_whole_checkpoint(sweep: Sweep) -> None:
    at = checkpoint(sweep.folder, 0, 0, 1)
    sizes = json.loads((at / CONTENTS).read_text())
    write_json(at / CONTENTS, sizes | {"learner/module_state.pkl": 5})
    assert chosen(sweep) is None
