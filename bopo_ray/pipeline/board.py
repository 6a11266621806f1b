"""TensorBoard's view of a sweep: one run per point, few tags in families, and a page of charts laid out.

Always true here: a point's curves are one run under its name, however often the run was interrupted, and an update is
written once.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune.logger import TBXLoggerCallback
from tensorboardX import SummaryWriter

from bopo_ray.records import Difficulty

__all__ = ["LAYOUT", "Board", "board_command", "board_folder", "scalars"]

CLASSES = ("all", *Difficulty)
ROLLOUTS = ("success", "cost_usd", "large_calls", "share_large", "steps")
"""Means over an update's episodes, for all tasks and for each class."""
LEARNER = {
    "kl": "kl", "entropy": "entropy", "clip_fraction": "clip_fraction", "loss": "total_loss",
    "gradient_norm": "gradients_default_optimizer_global_norm",
}  # fmt: skip
"""Tag to RLlib's name."""
GROUPS = ("skipped", "dropped", "anchored", "stale", "open")
SPEND = {"episodes": "episodes", "calls": "calls", "cost_usd": "spent_microusd"}
"""Since the point's start."""

_CHARTS = {
    "At a glance": ["reward/all", *(f"{measure}/all" for measure in ROLLOUTS[:4])],
    **{f"{c.capitalize()} tasks": [f"{measure}/{c}" for measure in ROLLOUTS[:4]] for c in CLASSES[1:]},
    "Is it learning?": [*(f"learner/{tag}" for tag in LEARNER), *(f"groups/{name}" for name in GROUPS)],
}
LAYOUT: Mapping[str, Mapping[str, tuple[str, list[str]]]] = {
    category: {tag.replace("_", " "): ("Multiline", [f"^{tag}$"]) for tag in tags} for category, tags in _CHARTS.items()
}
"""The tab "Custom scalars": category, chart, and its tags; a chart has one line per point."""


def board_folder(out: Path) -> Path:
    """Where a run's logs for TensorBoard are."""
    return out / "tensorboard"


def board_command(out: Path) -> str:
    """Opens TensorBoard on a run; names the program of this Python, which need not be on PATH."""
    program = Path(sys.executable).with_name("tensorboard")
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return f"{program if program.exists() else 'tensorboard'} --logdir {board_folder(out)}"


def scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """The tags of one update, from an RLlib result; without those that it has no finite value for."""
    rollouts = {c: result.get("rollouts" if c == "all" else f"rollouts_{c}") or {} for c in CLASSES}
    learner = (result.get("learners") or {}).get("default_policy") or {}
    groups, spend = result.get("groups") or {}, result.get("spend") or {}
    found = {
        "reward/all": rollouts["all"].get("reward"),
        **{f"{m}/{c}": rollouts[c].get(m) for m in ROLLOUTS for c in CLASSES},
        **{f"learner/{tag}": learner.get(name) for tag, name in LEARNER.items()},
        **{f"groups/{name}": groups.get(f"{name}_groups") for name in GROUPS},
        **{f"spend/{tag}": spend.get(name) for tag, name in SPEND.items()},
    }
    if found["spend/cost_usd"] is not None:
        found["spend/cost_usd"] /= 1e6
    return {tag: float(value) for tag, value in found.items() if value is not None and math.isfinite(value)}


class Board(TBXLoggerCallback):
    """Writes `scalars` for TensorBoard; a subclass of Tune's own writer, so that Tune adds no second one."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.writers: dict[str, SummaryWriter] = {}
        self.written: set[tuple[str, int]] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for a restore of its own, which is not used."""
        return {}

    def log_trial_start(self, trial: Any) -> None:
        """Nothing: a point's writer is opened by its first result, which says where it goes on."""

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """Writes one update, unless it was no whole one, or is a repetition after a failure."""
        name, update = str(trial), int(result["updates"])
        if result.get("spend_limit") or result.get("refused") or (name, update) in self.written:
            return
        self.written.add((name, update))
        if name not in self.writers:  # what an earlier attempt wrote of this update and later ones is void
            self.writers[name] = SummaryWriter(
                str(self.folder / name), purge_step=update, filename_suffix=f".{time.time_ns()}"
            )  # the suffix: files of the same second would overwrite each other
            self.writers[name].add_custom_scalars(LAYOUT)
        for tag, value in scalars(result).items():
            self.writers[name].add_scalar(tag, value, update)
        self.writers[name].flush()

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """Closes the point's file; a point that is tried again opens another."""
        if writer := self.writers.pop(str(trial), None):
            writer.close()
