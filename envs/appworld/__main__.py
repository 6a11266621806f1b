"""Our own AppWorld tasks: `python -m envs.appworld generate` builds the usual ones now rather than at the first
episode, and with `--out FOLDER --train 192 --seed 1` others, each played once, for APPWORLD_ROOT=FOLDER; `python -m
envs.appworld verify` plays each task: the right solution must succeed, a wrong one and nothing fail.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from envs.appworld import data, own
from envs.base import Split
from envs.errors import ConfigError, EngineError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for a mistake of the user's, 1 for a task that is wrong or an engine that fails."""
    parser = argparse.ArgumentParser(prog="python -m envs.appworld", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="build tasks of our own")
    generate.add_argument("--out", type=Path, help="folder for others than the usual ones")
    for split, count in own.COUNTS.items():
        generate.add_argument(f"--{split}", type=int, default=count, help=f"{split} tasks in --out (default: {count})")
    generate.add_argument("--seed", type=int, default=own.SEED, help=f"of those in --out (default: {own.SEED})")
    commands.add_parser("verify", help="play each of our own tasks that there is")
    args = parser.parse_args(argv)
    try:
        if args.command == "verify":
            _verify()
        elif args.out:
            _make(args.out, {split: getattr(args, split) for split in Split}, args.seed)
        elif {name: getattr(args, name) for name in own.COUNTS} != own.COUNTS or args.seed != own.SEED:
            raise ConfigError("other tasks than the usual ones need a folder: add --out FOLDER")
        else:
            print(_found(own.usual()))
    except (ConfigError, EngineError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _make(out: Path, counts: dict[Split, int], seed: int) -> None:
    own.make(out, counts, seed)
    print(f"{_found(out)}; export APPWORLD_ROOT={out} to play them")


def _verify() -> None:
    folder = data.data_folder()
    if data.world() == data.OFFICIAL:
        raise ConfigError(f"APPWORLD_ROOT ({os.environ['APPWORLD_ROOT']}) holds AppWorld's tasks, which are not ours")
    own.verify(folder, own.listed(folder))
    print(_found(folder.parent))


def _found(root: Path) -> str:
    folder = root / "data"
    sizes = ", ".join(f"{len(own.listed(folder, split))} {split}" for split in Split)
    return f"{data.OWN}: {sizes} in {root}, fingerprint {own.fingerprint(folder)}"


if __name__ == "__main__":
    sys.exit(main())
