"""What each part of the method contributes: a run without each of them, on the same tasks (figure 2).

    python -m experiments.ablation --out results/ablation              # quick: 1.5 hours on 2 cores (estimated)
    python -m experiments.ablation --out results/ablation --scale tiny # any option of experiments.frontier
    python -m experiments.ablation --out results/ablation --parts paper,no-bosft    # only these, beside the full method

It runs experiments.frontier with the three advantages (hybrid, augmented, vanilla), without BoSFT, without the bonus on
Hard tasks, and without the normalised cost; on a benchmark that has this project's own additions by default, such as
ScienceWorld-v0, also without those. Each has its folder in --out, all share one call store. Expect those runs' output,
a table, and ablation.html, .csv, .png and .svg in --out. The same command goes on where it was stopped, and does no run
again that is finished; with other --parts it adds those. --max-spend bounds the runs together.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from bopo_ray.analysis import plots, tables
from bopo_ray.analysis.cost_unit import cost_mode
from bopo_ray.analysis.finished import FinishedRun
from bopo_ray.analysis.page import write_study
from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.command import exit_code, script_parser
from bopo_ray.pipeline.jobs import Job, compare_runs
from bopo_ray.pipeline.settings import Settings
from experiments.frontier import as_jobs, settings_for

__all__ = ["FULL", "TAKEN", "asked", "combine", "main", "runs_for", "write"]

FULL = "full"
RUNS: dict[str, tuple[str, ...]] = {
    FULL: ("--advantage", "hybrid,augmented,vanilla"),
    "no-bosft": ("--advantage", "hybrid", "--sft-epochs", "0"),
    "no-bonus": ("--advantage", "hybrid", "--beta", "0"),
    "absolute": ("--advantage", "hybrid", "--cost-scale", "absolute"),
    "no-value": ("--advantage", "hybrid", "--boundary-value", "0"),
    "paper": (
        *("--advantage", "hybrid", "--strata", "10", "--schedules", "0", "--reliability", "0", "--sharpness", "1"),
        *("--train-lambdas", "", "--shares", "", "--call-limits", "", "--boundary-value", "0"),
    ),
}
"""Folder -> its options."""
TAKEN = ("advantage", "sft_epochs", "beta", "cost_scale", "calls")
"""What these options, and the one call store, leave no choice of; our additions may be chosen for all but "paper"."""
NAMES = {
    "no-bosft": "without BoSFT", "no-bonus": "without bonus", "absolute": "without normalised cost",
    "no-value": "without boundary value", "paper": "without our additions",
}  # fmt: skip
ADVANTAGES = ("bopo-hybrid", "bopo-augmented", "grpo-vanilla")
NOTES = (
    "bopo-hybrid is the whole method. bopo-augmented has the boundary policies in the advantage's mean and spread "
    "alone, grpo-vanilla not at all. Without BoSFT it starts from an untrained router; without bonus beta = 0; without "
    "normalised cost an episode pays for its dollars, or calls, in units of the mean cost of the dearer boundary "
    "policy over all tasks, and not of the task's own. Without boundary value, where the benchmark has it by default, "
    "the router is an encoder of the view's text.",
    "Without our additions, where the benchmark has them by default: BoSFT imitates the cheapest success of each Hard "
    "task's 11 stratified rollouts, as the paper does, its logits stay as they are, each lambda is trained, and "
    "routers read the text and decide without an offset chosen on dev tasks.",
    "Each was trained with the same tasks, lambdas, seeds and stored calls, and evaluated on the same held-out tasks.",
)


def runs_for(settings: Settings) -> dict[str, tuple[str, ...]]:
    """Those of RUNS that are different runs: not those without additions of ours that the settings do not have."""
    value = settings.boundary_value > 0
    added = value or settings.reliability > 0 or settings.sharpness != 1 or any((*settings.schedules, *settings.shares))
    return {k: own for k, own in RUNS.items() if (k != "paper" or added) and (k != "no-value" or value)}


def asked(jobs: Mapping[str, Job], parts: Sequence[str]) -> dict[str, Job]:
    """The full method, these parts (none: all), and those that are finished, so that the table has them.

    Raises:
        ConfigError: there is no such part, or the settings have none.
    """
    if wrong := [part for part in parts if part not in jobs]:
        raise ConfigError(f"--parts={wrong[0]}: with these settings it may name {', '.join(jobs)}")
    return {name: job for name, job in jobs.items() if not parts or name in (FULL, *parts) or job.done()}


def combine(runs: Mapping[str, FinishedRun]) -> pd.DataFrame:
    """One evaluation of all variants: the boundary policies and the advantages of the full run, the others' BoPO."""
    full = runs[FULL].evaluation()
    frames = [full[full["method"].isin([tables.ALWAYS_SMALL, tables.ALWAYS_LARGE, *ADVANTAGES])]]
    for folder, name in NAMES.items():
        if folder not in runs:
            continue
        own = runs[folder].evaluation()
        own = own[own["method"] == "bopo-hybrid"]
        frames.append(own.assign(method=name, policy=name + " " + own["policy"]))
    return pd.concat(frames, ignore_index=True)


def write(out: Path, runs: Mapping[str, FinishedRun]) -> list[Path]:
    """Compares the variants: prints the table and writes the figure's files."""
    episodes, run = combine(runs), runs[FULL]
    how = tables.Settings(cost=cost_mode(run.summary))
    summary = tables.summary(episodes, how)
    volumes = pd.DataFrame(
        [{"variant": m} | v | {f"less_{k}": d for k, d in summary["differences"].get(m, {}).items()}
         for m, v in summary["hypervolumes"].items()]
    )  # fmt: skip
    title = f"Ablation: {run.env}, {summary['n_tasks']} held-out tasks"
    figure = plots.frontier_figure(tables.frontier(episodes, how), summary, title, run.label)
    print(volumes.to_string(index=False, float_format="{:.4f}".format))
    notes = [*NOTES, "less: bopo-hybrid's hypervolume less the variant's, paired.", *summary["notes"]]
    return write_study(out, "ablation", title, f"{run.label}. {run.summary['note']}", volumes, figure, notes)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = script_parser("ablation", __doc__, allow_abbrev=False)
    p.add_argument("--out", type=Path, required=True, help="folder of the runs and the figure")
    p.add_argument("--parts", default="", help="only these beside the full method, e.g. paper,no-bosft (default: all)")
    args, options = p.parse_known_args(argv)

    def work() -> int:
        settings = settings_for("the ablation", options, TAKEN)
        runs = runs_for(settings)
        jobs = as_jobs(runs, {name: args.out / name for name in runs}, options, args.out / "calls.db")
        parts = [part.strip() for part in args.parts.split(",") if part.strip()]
        return compare_runs(args.out, asked(jobs, parts), settings.max_spend, write)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
