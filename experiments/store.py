"""Looks into a call store, copies it to one file, or makes it smaller.

    python -m experiments.store stats  results/<run>                # a table of what it holds; --json for programs
    python -m experiments.store export results/<run> calls.parquet  # all calls in one file, to replay a run elsewhere
    python -m experiments.store prune  results/<run> --older-than 30 --model gpt-4.1-mini
    python -m experiments.store prune  results/<run> --max-mb 500

Expect a table, or a line that says how many calls there are, at once. PATH is a call store (calls.db) or the folder of
results that it stands in. All of it works while a run uses the store.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bopo_ray.errors import ConfigError, StoreError
from bopo_ray.models.calls import CallStore, StoreStats
from bopo_ray.pipeline.command import exit_code, script_parser

__all__ = ["main"]


def parser() -> argparse.ArgumentParser:
    """The three commands."""
    p = script_parser("store", __doc__)
    commands = p.add_subparsers(dest="command", required=True)
    stats = commands.add_parser("stats", help="what it holds, per model")
    stats.add_argument("--json", action="store_true", help="print one object instead of a table")
    export = commands.add_parser("export", help="copy all calls to one Parquet file")
    prune = commands.add_parser("prune", help="drop calls and give their space back")
    for command in (stats, export, prune):
        command.add_argument("path", type=Path, metavar="PATH", help="a calls.db, or a folder of results")
    export.add_argument("out", type=Path, metavar="OUT", help="the file to write, e.g. calls.parquet")
    prune.add_argument("--older-than", type=float, metavar="DAYS", help="those stored longer ago")
    prune.add_argument("--model", metavar="NAME", help="those of one model; with --older-than, those that are both")
    prune.add_argument("--max-mb", type=float, metavar="N", help="then the oldest, until the rest fits in N megabytes")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parser().parse_args(argv)

    def work() -> int:
        store = CallStore(store_file(args.path), repair=False)
        if args.command == "stats":
            show(store.stats(), args.json)
        elif args.command == "export":
            print(f"{args.out}: {export(store, args.out)} calls")
        else:
            print(f"{prune(store, args)} calls dropped")
        return 0

    return exit_code(work)


def store_file(path: Path) -> Path:
    """The store that a path means; raises ConfigError when there is none."""
    file = path / "calls.db" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"no call store at {file}; name a calls.db, or a folder of results that holds one")
    return file


def export(store: CallStore, out: Path) -> int:
    """How many calls were written; raises ConfigError for a file that can't be."""
    try:
        return store.export(out)
    except StoreError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        why = error.__cause__.strerror or error.__cause__
        raise ConfigError(f"{out} can't be written ({why}); name another file as OUT, or free some space") from error


def prune(store: CallStore, args: argparse.Namespace) -> int:
    """How many calls were dropped; raises ConfigError for options that make no sense."""
    for flag, value in (("--older-than", args.older_than), ("--max-mb", args.max_mb)):
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"{flag}={value:g}: need a number >= 0")
    if args.older_than is args.model is args.max_mb is None:
        raise ConfigError("prune: nothing says what to drop; give --older-than DAYS, --model NAME or --max-mb N")
    known = [m.model for m in store.stats().models]
    if args.model is not None and args.model not in known:
        raise ConfigError(f"--model={args.model!r}: the store has {', '.join(known) or 'no calls'}")
    older_than_s = None if args.older_than is None else args.older_than * 86_400
    return store.prune(older_than_s, args.model, None if args.max_mb is None else int(args.max_mb * 1e6))


def show(stats: StoreStats, as_json: bool) -> None:
    """Prints them."""
    if as_json:
        print(json.dumps(asdict(stats), indent=2))
        return
    table = Table(title=f"{stats.calls:,} calls, {stats.bytes / 1e6:,.1f} MB")
    for column in ("model", "calls", "prompt tokens", "cached", "completion tokens", "oldest", "newest"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for m in stats.models:
        counts = (m.calls, m.prompt_tokens, m.cached_tokens, m.completion_tokens)
        times = (f"{datetime.fromtimestamp(t):%Y-%m-%d %H:%M}" for t in (m.oldest, m.newest))
        table.add_row(m.model, *(f"{n:,}" for n in counts), *times)
    Console(width=None if sys.stdout.isatty() else 130).print(table)


if __name__ == "__main__":
    sys.exit(main())
