"""The main job on all benchmarks, one after the other, and their frontiers side by side in one figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from bopo_ray.analysis import canvas, plots
from bopo_ray.analysis.cost_unit import common_noun
from bopo_ray.benchmarks import check_ready, env_label
from bopo_ray.pipeline.jobs import Job, run_jobs
from bopo_ray.pipeline.settings import Settings

__all__ = ["ALL", "BENCHMARKS", "draw_side_by_side", "run_all"]

ALL = "all"
"""The `--env` that stands for all of them."""
BENCHMARKS = ("ScienceWorld-v0", "ALFWorld-v0", "AppWorld-v0")
FIGURE = "frontiers.png"


def run_all(settings: Settings, arguments: Sequence[str], out: Path, benchmarks: Sequence[str] = BENCHMARKS) -> int:
    """Runs `experiments.frontier` with these arguments for each benchmark, in a process of its own.

    Each has its folder in `out` and goes on there with --resume; --max-spend bounds the dollars of all together.
    Returns the first exit code that is not 0, or 0 with the figure drawn. Raises ConfigError, before anything is
    played, when what one of them needs is not installed.
    """
    for env in benchmarks:
        check_ready(env)
    folders = {env: out / env.rpartition(":")[2].lower() for env in benchmarks}
    jobs = [
        Job(env, folder, ("experiments.frontier", *arguments, "--env", env, "--out", str(folder)))
        for env, folder in folders.items()
    ]
    if code := run_jobs(jobs, settings.max_spend):
        return code
    print(f"all frontiers: {draw_side_by_side(folders, out / FIGURE)}")
    return 0


def draw_side_by_side(folders: Mapping[str, Path], path: Path) -> Path:
    """Draws the frontiers of finished runs, by benchmark, into one PNG, and beside it as SVG."""
    summaries = {env: json.loads((f / "summary.json").read_text(encoding="utf-8")) for env, f in folders.items()}
    labels = {str(summary["label"]) for summary in summaries.values()}
    panels = {
        env_label(env) + (f"\n{summary['label']}" if len(labels) > 1 else ""): (
            pd.read_csv(folders[env] / "frontier.csv"), summary
        )
        for env, summary in summaries.items()
    }  # fmt: skip
    title = f"Success against {common_noun(summaries.values())} on held-out tasks"
    figure = plots.frontiers_figure(panels, title, ", ".join(sorted(labels)))
    path.with_suffix(".svg").write_text(canvas.to_svg(figure, title), encoding="utf-8")
    canvas.save_png(figure, path, width_px=1800)
    return path
