"""What each part of the method contributes: without BoSFT, the reference-guided advantage, the bonus (figure 2).

    python -m experiments.ablation --out results/ablation                 # quick: about an hour on 2 cores
    python -m experiments.ablation --out results/ablation --scale tiny    # any option of experiments.frontier

It runs experiments.frontier three times, into full/, no-bosft/ and no-bonus/, with one call store, and compares on the
same test tasks. Expect those runs' output, a table, and ablation.html, .csv, .png and .svg in --out. The same command
goes on where it was stopped, and does no run again that is finished. --max-spend bounds the three runs together.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from bopo_ray.analysis import plots, tables
from bopo_ray.analysis.finished import FinishedRun, open_finished
from bopo_ray.analysis.page import write_study
from bopo_ray.pipeline.command import exit_code, script_parser
from bopo_ray.pipeline.jobs import Job, run_jobs
from experiments.frontier import as_job, settings_for

__all__ = ["TAKEN", "combine", "jobs", "main", "write"]

RUNS = {
    "full": ("--advantage", "hybrid,vanilla"),
    "no-bosft": ("--advantage", "hybrid", "--sft-epochs", "0"),
    "no-bonus": ("--advantage", "hybrid", "--beta", "0"),
}
"""Folder -> its options."""
TAKEN = ("advantage", "sft_epochs", "beta", "calls")
"""What these options, and the one call store, leave no choice of."""
NAMES = {"no-bosft": "without BoSFT", "no-bonus": "without bonus"}
NOTES = (
    "bopo-hybrid is the whole method. grpo-vanilla is the same without the reference-guided advantage; without BoSFT "
    "it starts from an untrained router; without bonus beta = 0.",
    "Each was trained with the same tasks, lambdas, seeds and stored calls, and evaluated on the same held-out tasks.",
)


def combine(runs: Mapping[str, FinishedRun]) -> pd.DataFrame:
    """One evaluation of all variants: the boundary policies and both advantages of "full", and the others' BoPO."""
    full = runs["full"].evaluation()
    frames = [full[full["method"].isin([tables.ALWAYS_SMALL, tables.ALWAYS_LARGE, "bopo-hybrid", "grpo-vanilla"])]]
    for folder, name in NAMES.items():
        own = runs[folder].evaluation()
        own = own[own["method"] == "bopo-hybrid"]
        frames.append(own.assign(method=name, policy=name + " " + own["policy"]))
    return pd.concat(frames, ignore_index=True)


def jobs(folders: Mapping[str, Path], options: Sequence[str], calls: Path) -> dict[str, Job]:
    """The runs of RUNS, in these folders, with these options and one call store."""
    return {
        name: as_job(f"{name} ({' '.join(own)})", folders[name], [*options, *own, "--calls", str(calls)])
        for name, own in RUNS.items()
    }


def write(out: Path, runs: Mapping[str, FinishedRun]) -> list[Path]:
    """Compares the variants: prints the table and writes the figure's files."""
    episodes, run = combine(runs), runs["full"]
    summary = tables.summary(episodes)
    volumes = pd.DataFrame(
        [{"variant": m} | v | {f"less_{k}": d for k, d in summary["differences"].get(m, {}).items()}
         for m, v in summary["hypervolumes"].items()]
    )  # fmt: skip
    title = f"Ablation: {run.env}, {summary['n_tasks']} held-out tasks"
    figure = plots.frontier_figure(tables.frontier(episodes), summary, title, run.label)
    print(volumes.to_string(index=False, float_format="{:.4f}".format))
    notes = [*NOTES, "less: bopo-hybrid's hypervolume less the variant's, paired.", *summary["notes"]]
    return write_study(out, "ablation", title, f"{run.label}. {run.summary['note']}", volumes, figure, notes)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = script_parser("ablation", __doc__, allow_abbrev=False)
    p.add_argument("--out", type=Path, required=True, help="folder of the three runs and the figure")
    args, options = p.parse_known_args(argv)

    def work() -> int:
        settings = settings_for("the ablation", options, TAKEN)
        folders = {name: args.out / name for name in RUNS}
        args.out.mkdir(parents=True, exist_ok=True)
        if code := run_jobs(list(jobs(folders, options, args.out / "calls.db").values()), settings.max_spend):
            return code
        print(*write(args.out, {name: open_finished(folder) for name, folder in folders.items()}), sep="\n")
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
