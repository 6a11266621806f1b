"""What each part of the method contributes: without BoSFT, the reference-guided advantage, the bonus (figure 2).

    python -m experiments.ablation --out results/ablation                 # quick: about an hour on 2 cores
    python -m experiments.ablation --out results/ablation --scale tiny    # any option of experiments.frontier

It runs experiments.frontier three times, into full/, no-bosft/ and no-bonus/, with one call store, and compares on the
same test tasks. Expect those runs' output, a table, and ablation.html, .csv, .png and .svg in --out. The same command
goes on where it was stopped. --max-spend bounds each of the three runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from bopo_ray.analysis import plots, tables
from bopo_ray.analysis.finished import FinishedRun, open_finished
from bopo_ray.analysis.page import write_study
from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.command import exit_code

__all__ = ["combine", "main"]

RUNS = {
    "full": ("--advantage", "hybrid,vanilla"),
    "no-bosft": ("--advantage", "hybrid", "--sft-epochs", "0"),
    "no-bonus": ("--advantage", "hybrid", "--beta", "0"),
}
"""Folder -> its options."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(
        prog="python -m experiments.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True, help="folder of the three runs and the figure")
    args, options = p.parse_known_args(argv)

    def work() -> int:
        for flag in {o.partition("=")[0] for o in options} & {"--advantage", "--sft-epochs", "--beta", "--calls"}:
            raise ConfigError(f"{flag}: the ablation sets it itself; leave it out")
        for folder, own in RUNS.items():
            command = [sys.executable, "-m", "experiments.frontier", *options, *own, "--resume"]
            files = ["--calls", str(args.out / "calls.db"), "--out", str(args.out / folder)]
            args.out.mkdir(parents=True, exist_ok=True)
            print(f"{folder}: {' '.join(own)}", flush=True)
            code = subprocess.run([*command, *files], check=False).returncode
            if code:
                return code
        runs = {folder: open_finished(args.out / folder) for folder in RUNS}
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
        label = f"{run.label}. {run.summary['note']}"
        print(*write_study(args.out, "ablation", title, label, volumes, figure, notes), sep="\n")
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
