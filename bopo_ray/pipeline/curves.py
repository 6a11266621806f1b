"""The points of a sweep and their training curves. No Ray is imported: notebooks read them too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bopo_ray.method.advantage import AdvantageMode

__all__ = ["CURVES", "Point", "keep_curves", "training_curves"]

CURVES = "curves.jsonl"
"""In a run's folder: a line per update."""


@dataclass(frozen=True, slots=True)
class Point:
    """One trial."""

    advantage: str
    lam: float
    seed: int

    @property
    def method(self) -> str:
        """The method's name in results."""
        return "grpo-vanilla" if self.advantage == AdvantageMode.VANILLA else f"bopo-{self.advantage}"

    @property
    def name(self) -> str:
        """Unique in a sweep; names its folders."""
        return f"{self.method}_lam{self.lam:g}_seed{self.seed}"


def keep_curves(out: Path, point: Point, result: Mapping[str, Any]) -> None:
    """Adds one update of a point, from an RLlib result, to a run's curves; it is on disk at once.

    Tune's own files can't serve: it copies them to a run's folder now and then, and not in one piece.
    """
    learner = (result.get("learners") or {}).get("default_policy") or {}
    rollouts, hard = result.get("rollouts") or {}, result.get("rollouts_hard") or {}
    row = {
        "trial": point.name, "method": point.method, "lam": point.lam, "seed": point.seed,
        "iteration": int(result["updates"]),
        "reward": rollouts.get("reward"), "success": rollouts.get("success"),
        "cost_usd": rollouts.get("cost_usd"), "large_calls": rollouts.get("large_calls"),
        "share_large": rollouts.get("share_large"),
        "share_large_hard": hard.get("share_large"), "success_hard": hard.get("success"),
        "kl": learner.get("kl"), "entropy": learner.get("entropy"),
        "clip_fraction": learner.get("clip_fraction"),
        "grad_norm": learner.get("gradients_default_optimizer_global_norm"),
        "skipped_groups": (result.get("groups") or {}).get("skipped_groups"),
    }  # fmt: skip
    with (out / CURVES).open("a") as file:
        file.write("\n" + json.dumps(row, default=float))  # a line cut short by a kill must not spoil the next


def training_curves(out: Path) -> pd.DataFrame:
    """One row per trial and update of a run, over all attempts, of a repeated update the last: see
    `plots.training_curves_figure`."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for line in (out / CURVES).read_text().splitlines() if (out / CURVES).exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # empty, or cut short
        rows[row["trial"], row["iteration"]] = row
    return pd.DataFrame([rows[k] for k in sorted(rows)])
