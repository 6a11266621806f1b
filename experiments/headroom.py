"""How much can a router gain at all? What knowing each task is worth, and how much of the oracle's lead is luck.

    python -m experiments.headroom results/RUN                        # of a finished experiments.frontier
    python -m experiments.headroom results/RUN --lengths 2,5,10 --tasks 100 --samples 5

It plays first-large(K), for each K of --lengths, and the boundary policies on dev tasks, --samples times with other
draws of the models. Expect some minutes, two tables, one sentence, and figures/headroom.html, .csv, .png and .svg in
the run's folder. Calls come from the run's store where they are there; new ones are paid, under --max-spend. The same
command goes on where it was stopped.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from rich.console import Console

from bopo_ray.analysis.finished import open_finished
from bopo_ray.analysis.headroom import KNOWN, ORACLE, SCHEDULES, headroom, headroom_figure
from bopo_ray.analysis.page import write_study
from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.command import exit_code, finished_parser, whole_numbers
from bopo_ray.pipeline.hard_budget import open_run
from bopo_ray.pipeline.headroom import play_schedules

__all__ = ["main"]

FOLDER = "headroom"
"""In the finished run's."""
NOTES = (
    "schedules: first-large(K), the same for all tasks. oracle: of each task the schedule that is best in the very "
    "episode that is counted. known tasks: the schedule that is best by the task's other episodes, drawn towards the "
    "mean over tasks as far as single episodes are luck, counted on the episode left out. Best: most success less "
    "lambda times cost.",
    "What known tasks are above schedules is what there is to know of a task; what the oracle is above that is luck, "
    "which no router can have. A router does not know the task so well, and sees how its own episode goes instead.",
    "task_share: the part of the variance of single outcomes that lies between tasks (ICC); the rest is chance.",
    "Intervals: 95% percentile bootstrap over tasks.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = finished_parser("headroom", __doc__)
    p.add_argument("--lengths", default="1,2,3,4,5,7,10,15,20", help="K of the schedules first-large(K)")
    p.add_argument("--tasks", type=int, default=1000, help="dev tasks, at most")
    p.add_argument("--samples", type=int, default=3, help="episodes of each schedule per task")
    p.add_argument("--max-spend", type=float, default=math.inf, help="dollars that new calls may cost")
    p.add_argument("--cpus", type=int, default=0, help="CPUs to use, 0 for all")
    args = p.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 140)

    def work() -> int:
        lengths = whole_numbers("lengths", args.lengths, 1)
        for name in ("tasks", "samples"):
            if getattr(args, name) < 2:
                raise ConfigError(f"{name}={getattr(args, name)}: need at least 2; set it with --{name}")
        finished = open_finished(args.folder)
        with open_run(finished, args.max_spend, args.cpus, console, FOLDER) as run:
            run.start_ray()
            table = headroom(play_schedules(run, lengths, args.tasks, args.samples))
        points = ["pick", "setting", "success", "success_low", "success_high", "cost_usd", "task_share"]
        print(table[points].to_string(index=False, float_format="{:.4f}".format, na_rep=""))
        volumes = [c for c in table.columns if c.startswith(("hypervolume", "more"))]
        print(table.drop_duplicates("pick")[["pick", *volumes]].to_string(index=False, float_format="{:.4f}".format))
        print(_verdict(table.drop_duplicates("pick").set_index("pick")["more"].to_dict()))
        label = f"{finished.label}. {finished.summary['note']}"
        figure = headroom_figure(table, finished.label)
        title = f"How much of the oracle's lead is luck: {finished.env}"
        print(*write_study(args.out or finished.figures, "headroom", title, label, table, figure, NOTES), sep="\n")
        return 0

    return exit_code(work)


def _verdict(more: dict[str, float]) -> str:
    """One sentence on the differences from the schedules' hypervolume."""
    lead, known = more[ORACLE], max(0.0, more[KNOWN])
    if lead <= 0:
        return f"the oracle is not above the {SCHEDULES}: there is nothing to gain by the task"
    return (
        f"of the oracle's lead of {lead:.3f} over the {SCHEDULES}, {known:.3f} is there for one who knows each task by "
        f"its other episodes; the rest, {1 - known / lead:.0%}, is luck, or must be seen in the episode itself"
    )


if __name__ == "__main__":
    sys.exit(main())
