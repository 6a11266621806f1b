"""`python -m envs.appworld generate`: build and verify our own tasks now rather than at the first episode."""

from __future__ import annotations

import argparse
import sys

from envs.appworld import data
from envs.base import Split
from envs.errors import ConfigError


def main() -> int:
    """Returns the exit code: 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m envs.appworld", description=__doc__)
    parser.add_argument("command", choices=["generate"])
    parser.parse_args()
    try:
        folder = data.generate()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    sizes = ", ".join(f"{len(data.own_tasks(split))} {split}" for split in Split)
    print(f"{data.OWN}: {sizes} tasks in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
