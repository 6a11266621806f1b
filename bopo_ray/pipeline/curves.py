"""The points of a sweep and their training curves, read from Tune's results. No Ray is imported: notebooks read too."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bopo_ray.method.advantage import AdvantageMode

__all__ = ["Point", "training_curves"]


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


def training_curves(folder: Path) -> pd.DataFrame:
    """One row per trial and update, over all attempts: see `plots.training_curves_figure`."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for file in sorted(folder.glob("attempt-*/*/result.json")):
        for line in file.read_text().splitlines():
            try:
                r = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed trial
            if r.get("spend_limit") or r.get("refused"):
                continue  # no update, and it repeats the number of the last one
            point = Point(*(r["config"][k] for k in ("advantage", "lam", "seed")))
            learner = r.get("learners", {}).get("default_policy", {})
            rollouts, hard = r.get("rollouts", {}), r.get("rollouts_hard", {})
            rows[point.name, int(r["updates"])] = {
                "trial": point.name, "method": point.method, "lam": point.lam, "seed": point.seed,
                "iteration": int(r["updates"]),
                "reward": rollouts.get("reward"), "success": rollouts.get("success"),
                "cost_usd": rollouts.get("cost_usd"), "share_large": rollouts.get("share_large"),
                "share_large_hard": hard.get("share_large"), "success_hard": hard.get("success"),
                "kl": learner.get("kl"), "entropy": learner.get("entropy"),
                "clip_fraction": learner.get("clip_fraction"),
                "grad_norm": learner.get("gradients_default_optimizer_global_norm"),
                "skipped_groups": r.get("groups", {}).get("skipped_groups"),
            }  # fmt: skip
    return pd.DataFrame([rows[k] for k in sorted(rows)])
