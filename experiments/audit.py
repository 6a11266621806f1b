"""Works every dollar of a results folder out again from the raw usage, and compares it with what is stored.

    python -m experiments.audit results/<run>

Expect one line with what was compared, and a table of the differences when there are any. Exit code 0: none; 1: some;
2: the folder can't be audited.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bopo_ray.analysis.audit import Audit, audit
from bopo_ray.pipeline.command import exit_code, script_parser

__all__ = ["main"]

SHOWN = 20
"""Differences on the screen; --json has them all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = script_parser("audit", __doc__)
    p.add_argument("folder", type=Path, help="folder of a run, results/<run>")
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    args = p.parse_args(argv)
    return exit_code(lambda: show(audit(args.folder), args.json))


def show(result: Audit, as_json: bool) -> int:
    """Prints what was found; returns 1 where there are differences."""
    if as_json:
        print(json.dumps(asdict(result), indent=1))
        return int(bool(result.differences))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(
        f"{result.episodes:,} episodes, {result.calls:,} calls worth ${result.cost_microusd / 1e6:.6f}; "
        f"{result.paid_calls:,} paid calls, ${result.paid_microusd / 1e6:.6f}; {result.figures:,} figures compared: "
        f"{len(result.differences)} differ"
    )
    if result.differences:
        table = Table("where", "what", "stored", "recomputed")
        for d in result.differences[:SHOWN]:
            table.add_row(d.where, d.what, f"{d.stored:,.9g}", f"{d.recomputed:,.9g}")
        console.print(table)
        if len(result.differences) > SHOWN:
            console.print(f"... and {len(result.differences) - SHOWN} more; see --json")
    return int(bool(result.differences))


if __name__ == "__main__":
    sys.exit(main())
