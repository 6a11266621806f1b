"""How fast the parts are, beside a naive way to do the same and beside what the machine allows.

    python -m experiments.bench envs              # a table
    python -m experiments.bench envs --json       # the same rows as a list of objects
    python -m experiments.bench envs --seconds 60 # longer, steadier
    python -m experiments.bench executors         # the language models that come with the project
    python -m experiments.bench rollouts          # env runners under models that take their time
    python -m experiments.bench desk              # the call store and the ledger, on their node and from others
    python -m experiments.bench growth            # an update's cost to its driver, of 100 to 10,000 episodes
    python -m experiments.bench learner router    # the router's updates, and its decisions
    python -m experiments.bench http              # calls of an endpoint, by the CPU time that they take

`envs` takes about a minute. Expect ours within a few per cent of ScienceWorld's raw step, and several times the
simulator's own Python environment, which computes all valid actions at each step. The others are described in their
modules. The ways take turns in one run, so that a machine that slows down slows all of them. A bench is a function
`seconds -> rows` in the module that `BENCHES` names; it is imported when it is asked for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module

from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.command import script_parser

__all__ = ["BENCHES", "Row", "interleave", "main"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of a bench, the same unit for all three ways."""

    name: str
    unit: str
    """Of `ours`, `naive` and `limit`, e.g. "steps/s"."""
    ours: float
    naive: float | None
    """The straightforward way to do it; None where there is none."""
    limit: float | None
    """What no way of doing it can beat; None where it is unknown."""

    def as_dict(self) -> dict[str, str | float | None]:
        """The row with its two ratios; the keys of `--json`."""
        return asdict(self) | {
            "ratio_to_limit": self.ours / self.limit if self.limit else None,
            "ratio_to_naive": self.ours / self.naive if self.naive else None,
        }


def interleave(ways: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Rounds per second of each way. They take turns for `seconds`; the median round counts."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = time.monotonic() + seconds
    while time.monotonic() < end or not all(times.values()):
        for name, play in ways.items():
            start = time.perf_counter()
            play()
            times[name].append(time.perf_counter() - start)
    return {name: 1 / sorted(values)[len(values) // 2] for name, values in times.items()}


BENCHES = {
    "desk": "experiments.bench_desk",
    "envs": "experiments.bench_envs",
    "executors": "experiments.bench_executors",
    "growth": "experiments.bench_growth",
    "http": "experiments.bench_http",
    "learner": "experiments.bench_learner",
    "rollouts": "experiments.bench_rollouts",
    "router": "experiments.bench_router",
}
"""Name on the command line -> module with `run(seconds) -> Sequence[Row]`."""


def _print_table(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("name", "unit", "ours", "naive", "limit", "ours / limit", "ours / naive"):
        table.add_column(column, justify="left" if column in ("name", "unit") else "right")
    for row in rows:
        name, unit, *numbers = row.as_dict().values()
        table.add_row(str(name), str(unit), *("-" if n is None else f"{n:,.3g}" for n in numbers))
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benches named on the command line."""
    parser = script_parser("bench", __doc__)
    parser.add_argument("bench", nargs="+", choices=sorted(BENCHES))
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    parser.add_argument("--seconds", type=float, default=20.0, help="time to measure for, per bench (default: 20)")
    args = parser.parse_args(argv)
    try:
        rows = [row for name in args.bench for row in import_module(BENCHES[name]).run(args.seconds)]
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")
    if args.json:
        print(json.dumps([row.as_dict() for row in rows], indent=2))
    else:
        _print_table(rows)


if __name__ == "__main__":
    main()
