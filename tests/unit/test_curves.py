"""Training curves: a line per update, whatever cut the file short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bopo_ray.pipeline.curves import CURVES, Point, keep_curves, training_curves

POINT = Point("hybrid", 0.3, 7)


def result(update: int, reward: float = 0.5) -> dict[str, Any]:
    """As far as RLlib's result of an update is read."""
    return {
        "updates": update,
        "rollouts": {"reward": np.float64(reward), "success": 0.25},
        "learners": {"default_policy": {"kl": np.float32(0.125), "gradients_default_optimizer_global_norm": np.nan}},
        "groups": {"skipped_groups": np.int64(3)},
    }


def test_a_run_without_updates_has_no_rows(tmp_path: Path) -> None:
    assert training_curves(tmp_path).empty


def test_an_update_has_one_row_with_its_figures_and_nothing_that_it_lacks(tmp_path: Path) -> None:
    keep_curves(tmp_path, POINT, result(1))
    (row,) = training_curves(tmp_path).to_dict("records")
    assert (row["trial"], row["method"], row["lam"], row["seed"]) == ("bopo-hybrid_lam0.3_seed7", "bopo-hybrid", 0.3, 7)
    assert (row["iteration"], row["reward"], row["kl"], row["skipped_groups"]) == (1, 0.5, 0.125, 3)
    assert row["share_large_hard"] is None and np.isnan(row["grad_norm"])


def test_a_repeated_update_counts_once_and_a_line_cut_short_spoils_no_other(tmp_path: Path) -> None:
    for update in (1, 2):
        keep_curves(tmp_path, POINT, result(update))
    file = tmp_path / CURVES
    file.write_text(file.read_text()[:-40])  # killed while it wrote
    keep_curves(tmp_path, Point("vanilla", 0.3, 7), result(1))
    keep_curves(tmp_path, POINT, result(2, reward=0.75))
    keep_curves(tmp_path, POINT, result(2, reward=1.0))
    rows = training_curves(tmp_path)[["trial", "iteration", "reward"]].to_numpy().tolist()
    ours, vanilla = POINT.name, "grpo-vanilla_lam0.3_seed7"
    assert rows == [[ours, 1, 0.5], [ours, 2, 1.0], [vanilla, 1, 0.5]]
