"""The main job on several pairs of models, with other ratios of cost to capability, on the same tasks (figure 4).

    python -m experiments.model_pairs --out results/pairs                 # quick: under 40 minutes on 2 cores
    python -m experiments.model_pairs --out results/pairs --pair mine=pool.yaml      # beside the two default pairs
    python -m experiments.model_pairs --out results/pairs --pair mine=pool.yaml --pair simulated=simulated
    python -m experiments.model_pairs --out results/pairs --scale tiny    # any option of experiments.frontier

Without --pair: the pair that --models, or --small and --large, name, else the benchmark's default one; and a second one
that is simulated, at the list prices of Llama-3.1 8B and 70B. A single --pair joins these, two or more take their
place. It runs experiments.frontier for each pair, into --out/NAME, with the same tasks, seeds and lambdas. Expect those
runs' output, a table, and model_pairs.html, .csv, .png and .svg in --out. The same command goes on where it was
stopped, and does no run again that is finished. --max-spend bounds the runs together.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from bopo_ray.analysis import plots
from bopo_ray.analysis.finished import FinishedRun
from bopo_ray.analysis.page import write_study
from bopo_ray.analysis.studies import pair_row, pair_table
from bopo_ray.benchmarks import fair_tasks
from bopo_ray.errors import ConfigError
from bopo_ray.models import build_pool
from bopo_ray.models.pool import resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.pipeline.command import exit_code, script_parser
from bopo_ray.pipeline.jobs import compare_runs
from bopo_ray.pipeline.settings import Settings
from experiments.frontier import as_jobs, settings_for

__all__ = ["Pairs", "check_pairs", "default_pairs", "joined", "main", "parse_pairs", "write"]

Pairs = dict[str, tuple[str, ...]]
"""Name -> options of experiments.frontier that say which models these are."""
SECOND = "simulated-llama"
NOTES = (
    "Each pair has a frontier, a scale of cost and a router of its own; tasks, seeds and lambdas are the same.",
    "Cost ratio: mean dollars per task of always-large by those of always-small. The price per token differs by "
    "another factor, as the small model may take more steps.",
    "The best baseline is the one with the largest hypervolume on these very tasks, which favours it; what is saved is "
    "of the cheapest point that reaches the share on them, which is rather too good, and so has no interval.",
    "Intervals: 95% bootstrap over tasks, and training seeds where there are several; of hypervolumes basic ones, else "
    "percentiles.",
)


def parse_pairs(given: Sequence[str]) -> Pairs:
    """The pairs of NAME=SPEC, where SPEC is what --models takes; raises ConfigError in one line."""
    pairs: Pairs = {}
    for text in given:
        name, equals, spec = text.partition("=")
        if not (equals and spec and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)):
            raise ConfigError(f"pair={text!r}: need NAME=SPEC, e.g. mine=pool.yaml, NAME of letters, digits, . _ and -")
        if name in pairs:
            raise ConfigError(f"pair={text!r}: a second pair of the name {name}; give each its own with --pair")
        pairs[name] = ("--models", spec)
    return pairs


def joined(settings: Settings, given: Pairs) -> Pairs:
    """The pairs to compare: two or more that were given, else the default ones and a single one that was.

    Raises ConfigError for a single one that has the name of a default one.
    """
    if len(given) > 1:
        return given
    default = default_pairs(settings)
    if both := sorted(set(default) & set(given)):
        raise ConfigError(
            f"pair={both[0]}=...: a default pair, which a single --pair joins, has that name; give another"
        )
    no_own = ("--small=", "--large=") if settings.small else ()
    return default | {name: (*own, *no_own) for name, own in given.items()}


def default_pairs(settings: Settings) -> Pairs:
    """The pair that the settings have, and a simulated one that is another."""
    small, large, models = settings.small, settings.large, settings.models
    second = SECOND if small or models != SECOND else "simulated"
    if small:
        return {_name(f"{small}-{large}"): ("--small", small, "--large", large),
                second: ("--models", second, "--small=", "--large=")}  # fmt: skip
    own = Path(models).stem if models.endswith((".yaml", ".yml")) else models
    return {_name(own): ("--models", models), second: ("--models", second)}


def _name(models: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", models)


def check_pairs(script: str, pairs: Pairs, options: Sequence[str]) -> None:
    """Raises ConfigError, before anything is played, for models that there are not, that have no price, or that this
    benchmark can't be played with."""
    for own in pairs.values():
        s = settings_for(script, [*options, *own], ())
        prices = price_table(Path(s.prices)) if s.prices else price_table()
        fair_tasks(s.env, build_pool(resolve_pool(s.pool, s.small, s.large, prices)))


def write(out: Path, runs: Mapping[str, FinishedRun]) -> list[Path]:
    """Compares the pairs: prints the table and writes the figure's files."""
    rows = pd.DataFrame([pair_row(name, run.label, run.evaluation(), run.summary) for name, run in runs.items()])
    shown = pair_table(rows)
    print(shown.to_string(index=False))
    panels = {f"{name}: {run.label}": (run.frontier, run.summary) for name, run in runs.items()}
    env = next(iter(runs.values())).env
    labels = ", ".join(sorted({run.label for run in runs.values()}))
    figure = plots.frontiers_figure(panels, f"Pairs of models: {env}", labels)
    notes = " ".join(dict.fromkeys(str(run.summary["note"]) for run in runs.values()))
    return write_study(out, "model_pairs", f"Pairs of models: {env}", f"{labels}. {notes}", rows, figure, NOTES, shown)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = script_parser("model_pairs", __doc__, allow_abbrev=False)
    p.add_argument("--out", type=Path, required=True, help="folder of the runs and the figure")
    p.add_argument(
        "--pair", action="append", default=[], metavar="NAME=SPEC",
        help="a pair of models; SPEC as in --models of experiments.frontier: embedded, simulated, simulated-llama, "
        "embedded:FAMILY, or a pool file (.yaml); one joins the default pairs, several take their place",
    )  # fmt: skip
    args, options = p.parse_known_args(argv)

    def work() -> int:
        given = parse_pairs(args.pair)
        named = ("models", "small", "large") if len(given) > 1 else ()
        settings = settings_for("model_pairs", options, ("calls", *named))
        pairs = joined(settings, given)
        check_pairs("model_pairs", pairs, options)
        jobs = as_jobs(pairs, {name: args.out / name for name in pairs}, options, args.out / "calls.db")
        return compare_runs(args.out, jobs, settings.max_spend, write)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
