"""Which tasks each method spends its dollars on, and calls the large model on: Easy, Hard, Intractable (figure 3).

    python -m experiments.allocation results/RUN          # of a finished experiments.frontier

Expect two tables on the screen, at once, and allocation.html, .csv, .png and .svg in figures/ of the run's folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bopo_ray.analysis.finished import open_finished
from bopo_ray.analysis.page import write_study
from bopo_ray.analysis.studies import allocation
from bopo_ray.analysis.study_plots import allocation_figure
from bopo_ray.pipeline.command import exit_code, finished_parser

__all__ = ["main"]

NOTES = (
    "Shares are of a method's dollars on the held-out tasks, over all its operating points; beside them the share of "
    "the tasks.",
    "A task is Easy where always-small mostly succeeds, Intractable where no policy of this evaluation ever did, Hard "
    "otherwise. This is hindsight: no router was told. With few episodes per task the labels are rough.",
    "A success ends an episode, so who wins Hard tasks early spends less on them than who loses them: the share of "
    "dollars on Hard falls as success rises. What a router prefers shows in the steps that a larger model writes.",
    "Intervals: 95% percentile bootstrap over tasks.",
)


PERCENT = "{:.1%}".format


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = finished_parser("allocation", __doc__).parse_args(argv)

    def work() -> int:
        run = open_finished(args.folder)
        shares = allocation(run.evaluation())
        for column, title in (("spend_share", "share of dollars"), ("large_share", "steps with a larger model")):
            print(f"{title}:")
            print(shares.pivot(index="method", columns="difficulty", values=column).to_string(float_format=PERCENT))
        written = write_study(
            args.out or run.figures, "allocation", f"Where the dollars go: {run.env}",
            f"{run.label}. {run.summary['note']}", shares, allocation_figure(shares, run.label), NOTES,
        )  # fmt: skip
        print(*written, sep="\n")
        return 0

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
