"""How a script ends: exit code 0, or one line that says what is wrong, and 1, 2, 3 or 130."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ray.exceptions import RayTaskError

from bopo_ray.errors import ConfigError, EngineError, ModelError, SpendLimitError

__all__ = ["exit_code"]


def exit_code(work: Callable[[], int]) -> int:
    """What `work` returns; 1 when the machine failed, 2 for the user's mistake, 3 when --max-spend is reached, 130 when
    interrupted, each with one line on stderr."""
    try:
        return work()
    except (ConfigError, EngineError, ModelError, SpendLimitError, RayTaskError, OSError) as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(cause, ConfigError | EngineError | ModelError | SpendLimitError | OSError):
            raise
        print(f"error: {' '.join(str(cause).split())}", file=sys.stderr)
        return 2 if isinstance(cause, ConfigError) else 3 if isinstance(cause, SpendLimitError) else 1
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept; run the same command again to go on", file=sys.stderr)
        return 130
