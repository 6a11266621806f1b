"""What LARGE is worth at a single step: is there a signal for a router to learn, and where?

    python -m experiments.counterfactual results/RUN                        # of a finished experiments.frontier
    python -m experiments.counterfactual results/RUN --base always-small --steps 0,2,4,8 --tasks 60

It plays a schedule on dev tasks, and again with the other model at one step, for each of --steps; up to that step both
episodes are the same. Expect some minutes, a table, and figures/counterfactual.html, .csv, .png and .svg in the run's
folder. Calls come from the run's store where they are there; new ones are paid, under --max-spend. The same command
goes on where it was stopped; a run has one study at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from bopo_ray.analysis.counterfactual import counterfactual, counterfactual_figure
from bopo_ray.analysis.finished import open_finished
from bopo_ray.analysis.page import write_study
from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.command import add_max_spend, exit_code, finished_parser, whole_numbers
from bopo_ray.pipeline.counterfactual import play_swaps
from bopo_ray.pipeline.hard_budget import open_run
from bopo_ray.routers import RouterName, parse_router

__all__ = ["main"]

FOLDER = "counterfactual"
"""In the finished run's."""
NOTES = (
    "A line compares the same episodes with LARGE and with SMALL at that step. All other steps are the schedule's, "
    "and what follows may differ by chance: a single episode says little.",
    "A step failed when its answer holds an error's text, or it repeated what was done before.",
    "Only episodes that reached the step; intervals: 95% percentile bootstrap over tasks.",
)


def base_schedule(text: str) -> RouterName:
    """The router of --base; raises ConfigError in words of that option."""
    try:
        return parse_router(text)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--router", "--base")) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = finished_parser("counterfactual", __doc__)
    p.add_argument(
        "--base", default="first-large:5", help="the schedule: always-small, always-large, first-large:K ..."
    )
    p.add_argument("--steps", default="0,1,2,3,4,5,6,8,10,14", help="steps to swap the model at, from 0")
    p.add_argument("--tasks", type=int, default=40, help="dev tasks")
    p.add_argument("--samples", type=int, default=1, help="episodes per task")
    add_max_spend(p)
    p.add_argument("--cpus", type=int, default=0, help="CPUs to use, 0 for all")
    args = p.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)

    def work() -> int:
        base, steps = base_schedule(args.base), whole_numbers("steps", args.steps, 0)
        for name, least in (("tasks", 2), ("samples", 1)):
            if getattr(args, name) < least:
                raise ConfigError(f"{name}={getattr(args, name)}: need at least {least}; set it with --{name}")
        finished = open_finished(args.folder)
        with open_run(finished, args.max_spend, args.cpus, console, FOLDER) as run:
            run.start_ray()
            rows = play_swaps(run, base, steps, args.tasks, args.samples)
        table = counterfactual(rows)
        if table.empty:
            raise ConfigError(
                f"steps={args.steps}: no step was reached on 2 dev tasks; set earlier ones with --steps, or more tasks "
                "with --tasks"
            )
        print(table.to_string(index=False, float_format="{:.4f}".format))
        label = f"{finished.label}. {finished.summary['note']}"
        figure = counterfactual_figure(table, str(base), finished.label)
        title = f"What the large model is worth at one step: {finished.env}, {base}"
        print(
            *write_study(args.out or finished.figures, "counterfactual", title, label, table, figure, NOTES), sep="\n"
        )
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
