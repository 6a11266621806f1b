"""What TensorBoard is given: families of tags, one run per point, each update once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bopo_ray.pipeline.board import LAYOUT, Board, board_command, scalars


def result(updates: int, success: float = 0.5, **more: Any) -> dict[str, Any]:
    figures = {
        "success": success,
        "cost_usd": 0.01,
        "large_calls": 2.7,
        "share_large": 0.3,
        "steps": 9.0,
        "outcome": 0.5,
    }
    return {
        "updates": updates, "rollouts": figures | {"reward": 0.7}, "rollouts_hard": figures,
        "learners": {"default_policy": {"kl": 0.02, "entropy": 0.4, "clip_fraction": math.nan}},
        "groups": {"skipped_groups": 1.0}, "spend": {"spent_microusd": 2_500_000.0}, "timers": {"x": 1.0},
    } | more  # fmt: skip


def curve(folder: Path, tag: str = "success/all") -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)]


def test_tags_come_in_families() -> None:
    found = scalars(result(1))
    assert found["success/all"] == found["success/hard"] == 0.5 and "success/easy" not in found
    assert found["learner/kl"] == 0.02 and found["groups/skipped"] == 1 and found["spend/cost_usd"] == 2.5
    assert {tag.split("/")[0] for tag in found} == {
        "reward", "success", "cost_usd", "large_calls", "share_large", "steps", "learner", "groups", "spend",
    }  # fmt: skip
    assert "learner/clip_fraction" not in found  # RLlib's NaN for no gradient step
    assert scalars({"updates": 3}) == {}


def test_an_interrupted_point_stays_one_curve(tmp_path: Path) -> None:
    board = Board(tmp_path)
    for r in (result(1, 0.1), result(2, 0.2), result(2, 0.9), result(3, 0.3)):  # the second 2 repeats a failed one
        board.log_trial_result(0, "point", r)
    board.log_trial_result(0, "point", {"updates": 3, "spend_limit": 1})
    board.log_trial_end("point")
    assert curve(tmp_path / "point") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    again = Board(tmp_path)  # goes on from the checkpoint of update 2
    again.log_trial_result(0, "point", {"updates": 2, "refused": "no key"})
    for r in (result(3, 0.5), result(4, 0.6)):
        again.log_trial_result(0, "point", r)
    again.log_trial_end("point")
    assert curve(tmp_path / "point") == [(1, 0.1), (2, 0.2), (3, 0.5), (4, 0.6)]


def test_the_layout_charts_what_is_written() -> None:
    charted = [tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags]
    assert list(LAYOUT) == ["At a glance", "Easy tasks", "Hard tasks", "Intractable tasks", "Is it learning?"]
    assert len(charted) == len(set(charted))
    assert {f"^{t}$" for t in scalars(result(1)) if not t.startswith(("spend/", "steps/"))} <= set(charted)


def test_the_command_names_a_program_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _, rest = board_command(tmp_path / "run").partition(" ")
    assert Path(program).is_file() and rest == f"--logdir {tmp_path / 'run' / 'tensorboard'}"
    (tmp_path / "bin").mkdir()
    for name in ("python", "tensorboard"):
        (tmp_path / "bin" / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    assert board_command(Path("results/x")) == "bin/tensorboard --logdir results/x/tensorboard"
    (tmp_path / "bin" / "tensorboard").unlink()
    assert board_command(Path("results/x")).startswith("tensorboard ")
