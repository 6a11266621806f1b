"""Whether processes and files are gone, in time; what Ray's actors say, also while they are being replaced."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["ask_runners", "gone", "removed"]


def ask_runners(group: Any, question: Callable[[Any], Any], within_s: float = 120.0) -> list[Any]:
    """The answer of each runner of a group; waits for those that are being replaced."""
    import ray

    found, deadline = [], time.monotonic() + within_s
    for actor in group._worker_manager.actors().values():
        while True:
            try:
                found.append(ray.get(actor.apply.remote(question), timeout=max(0.1, deadline - time.monotonic())))
                break
            except ray.exceptions.ActorUnavailableError:
                time.sleep(0.2)
    return found


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process ends in time; a zombie that nobody reaps counts as ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def removed(path: Path, within_s: float = 10.0) -> bool:
    """Whether a file or folder is removed in time."""
    deadline = time.monotonic() + within_s
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not path.exists()
