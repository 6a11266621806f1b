"""Our own AppWorld tasks: `python -m envs.appworld generate` builds them now rather than at the first episode, and
`python -m envs.appworld verify` plays each of them: the right solution must succeed, a wrong one and nothing fail.
"""

from __future__ import annotations

import argparse
import sys

from envs.appworld import data
from envs.base import Split
from envs.errors import ConfigError, EngineError


def main() -> int:
    """Returns the exit code: 2 for a mistake of the user's, 1 for a task that is wrong or an engine that fails."""
    parser = argparse.ArgumentParser(prog="python -m envs.appworld", description=__doc__)
    parser.add_argument("command", choices=["generate", "verify"])
    command = parser.parse_args().command
    try:
        folder = data.generate()
        if command == "verify":
            data.verify(folder / "data")
    except (ConfigError, EngineError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    sizes = ", ".join(f"{len(data.own_tasks(split))} {split}" for split in Split)
    print(f"{data.OWN}: {sizes} tasks in {folder}, fingerprint {data.fingerprint(folder / 'data')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
